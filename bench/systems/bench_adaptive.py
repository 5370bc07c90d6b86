"""Adaptive plans against static ones on the demo pair: on text like the calibration's, and on text that drifts.

The static plan and the adaptive one are made from the same profile and the same acceptance, estimated on held-out
source code. The steady workload is more of that; the drifting one mixes it with tables of numbers, counting and prose,
on which the draft does better or worse. Providers take turns prompt by prompt::

    python -m bench.systems.bench_adaptive --json bench/results/cpu/adaptive.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

import torch

from bench.common.harness import write_json
from bench.common.machine import command_line, commit, environment, pick_device
from sequoia_kernels import estimate_acceptance, generate, measure_profile, plan_adaptive, plan_tree
from sequoia_kernels.decoding import PROBE_TREE, measure_overhead
from sequoia_kernels.demo import held_out_prompts, load_demo_pair
from sequoia_kernels.models import adapt

PROSE = (
    "Permission is granted to use the tables below for any purpose. They were made by hand, and nobody has checked "
    "whether every line of them is right; where two lines disagree, the later one counts. Write to the keeper of the "
    "register when a line is missing. Lines are never taken away, so numbers stay what they are. "
)


def drifting_texts(code: list[str]) -> list[str]:
    """Interleave source code with what the draft was not calibrated on."""
    others = [
        lambda n: "".join(f"    {random.Random(100 * n + i).randint(0, 255)}, " for i in range(80)),
        lambda n: "".join(f"    {i}: 'item{i}',\n" for i in range(n, n + 50)),
        lambda n: PROSE[7 * n :] + PROSE,
        lambda n: f"x{n} = [" + "0, " * 100,
    ]
    return [text for n, piece in enumerate(code) for text in (piece, others[n % len(others)](n))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompts", type=int, default=8, help="code prompts of each workload (default 8)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="one prompt, few tokens, a quick profile")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.prompts, args.new_tokens, args.temperatures = 1, 32, args.temperatures[:1]
    device = pick_device(args.device)
    pair = load_demo_pair(torch.float32, device)
    target, draft = adapt(pair.target), adapt(pair.draft)

    def encode(texts: list[str]) -> list[torch.Tensor]:
        encoded = [pair.tokenizer(text, return_tensors="pt").input_ids for text in texts]
        return [ids[:, : args.prompt_tokens].to(device) for ids in encoded]

    texts = held_out_prompts(3 * args.prompts, 4 * args.prompt_tokens)
    calibration = encode(texts[: args.prompts])
    workloads = {
        "steady": encode(texts[args.prompts : 2 * args.prompts]),
        "drifting": encode(drifting_texts(texts[2 * args.prompts :])),
    }
    context_len = args.prompt_tokens + args.new_tokens // 2
    contexts = (args.prompt_tokens, args.prompt_tokens + args.new_tokens)
    profile = measure_profile(target, draft, context_lens=contexts, quick=args.quick)
    profile = measure_overhead(target, draft, profile, context_len=args.prompt_tokens)

    results = []
    for temperature in args.temperatures:
        common = {"max_new_tokens": args.new_tokens, "temperature": temperature, "eos_token_id": ()}
        acceptance = estimate_acceptance(
            [generate(target, draft, x, tree=PROBE_TREE, seed=n, **common).stats for n, x in enumerate(calibration)],
            temperature=temperature,
        )
        static = plan_tree(acceptance, profile, context_len=context_len)
        adaptive = plan_adaptive(acceptance, profile, context_len=context_len)
        for workload, prompts in workloads.items():
            follower = adaptive.follow()
            providers = {
                "autoregressive": (None, "auto"),
                "static plan": (draft, static),
                "adaptive plan": (draft, adaptive),
                "adaptive plan, kept from prompt to prompt": (draft, follower),
            }
            rates: dict[str, list[float]] = {name: [] for name in providers}
            totals = {name: [0.0, 0, 0] for name in providers}
            switches = 0
            for index, prompt in enumerate(prompts):
                for name, (model, tree) in providers.items():
                    stats = generate(target, model, prompt, tree=tree, seed=index, **common).stats
                    rates[name].append(stats.tokens_per_second)
                    totals[name][0] += stats.decode_seconds
                    totals[name][1] += stats.new_tokens[0] - 1
                    totals[name][2] += stats.num_steps
                    switches += name == "adaptive plan" and len(stats.steps_by_tree) - 1
            static_rates = rates["static plan"]
            row = {
                "temperature": temperature,
                "workload": workload,
                "prompts": len(prompts),
                "trees": [{"nodes": tree.num_nodes, "levels": tree.num_levels} for tree in adaptive.trees],
                "mean_trees_used_beyond_the_first": switches / len(prompts),
                "providers": {
                    name: {
                        "tokens_per_second": tokens / seconds,
                        "tokens_per_step": tokens / steps,
                        "over_static_plan": tokens / seconds * totals["static plan"][0] / totals["static plan"][1],
                        "median_over_static_plan": statistics.median(
                            a / b for a, b in zip(rates[name], static_rates, strict=True)
                        ),
                    }
                    for name, (seconds, tokens, steps) in totals.items()
                },
            }
            results.append(row)
            print(f"T={temperature:g}, {workload} text, {len(prompts)} prompts")
            for name, entry in row["providers"].items():
                speed = f"{entry['tokens_per_second']:8.1f} tokens/s{entry['tokens_per_step']:7.2f} tokens/step"
                against = f"{entry['over_static_plan']:.2f}x of the static plan"
                print(f"  {name:44s}{speed}  {against} (median {entry['median_over_static_plan']:.2f}x)", flush=True)
    if args.json:
        write_json(
            args.json,
            {
                "bench": "adaptive",
                "command": command_line("bench.systems.bench_adaptive", argv),
                "commit": commit(),
                "environment": environment(device),
                "new_tokens": args.new_tokens,
                "results": results,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
