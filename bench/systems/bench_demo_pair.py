"""End to end on the demo pair: planned trees against the own autoregressive loop and transformers, in one run.

Every provider decodes the same held-out prompts, one after the other in turn, so that drift of the machine hits all of
them alike. Acceptance is estimated on other prompts than those that are timed. Prediction and measurement stand side
by side::

    python -m bench.systems.bench_demo_pair --json out.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from bench.common.harness import write_json
from bench.common.machine import command_line, commit, environment, pick_device
from sequoia_kernels import estimate_acceptance, generate, measure_profile, plan_tree
from sequoia_kernels.decoding import PROBE_TREE, measure_overhead
from sequoia_kernels.demo import held_out_prompts, load_demo_pair
from sequoia_kernels.models import adapt


def timed(run) -> tuple[float, object]:
    """Return (seconds, result)."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    parser.add_argument("--prompts", type=int, default=8, help="timed prompts (default 8)")
    parser.add_argument("--calibration-prompts", type=int, default=8, help="other prompts, for the acceptance vector")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="times that every prompt is decoded (default 3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--profile-seconds", type=float, help="time for the hardware profile (default: its own choice)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    pair = load_demo_pair(getattr(torch, args.dtype), device)
    for model in (pair.target, pair.draft):
        model.generation_config.eos_token_id = None  # every provider decodes exactly the same number of tokens
    target, draft = adapt(pair.target), adapt(pair.draft)
    texts = held_out_prompts(args.prompts + args.calibration_prompts, 4 * args.prompt_tokens)
    ids = [pair.tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt_tokens].to(device) for text in texts]
    calibration, prompts = ids[: args.calibration_prompts], ids[args.calibration_prompts :]
    context_len = args.prompt_tokens + args.new_tokens // 2
    profile = measure_profile(
        target,
        draft,
        context_lens=(args.prompt_tokens, args.prompt_tokens + args.new_tokens),
        seconds=args.profile_seconds,
        quick=args.profile_seconds is not None,
    )
    profile = measure_overhead(target, draft, profile, context_len=args.prompt_tokens)

    results = []
    for temperature in args.temperatures:
        common = {"max_new_tokens": args.new_tokens, "temperature": temperature, "eos_token_id": ()}
        acceptance = estimate_acceptance(
            [generate(target, draft, x, tree=PROBE_TREE, seed=n, **common).stats for n, x in enumerate(calibration)],
            temperature=temperature,
        )
        plan = plan_tree(acceptance, profile, context_len=context_len)
        sampling = (
            {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
        )
        hf = {"max_new_tokens": args.new_tokens, "pad_token_id": 0, **sampling}
        providers = {
            "autoregressive": lambda x, n, common=common: generate(target, None, x, seed=n, **common),
            "planned tree": lambda x, n, plan=plan, common=common: generate(
                target, draft, x, tree=plan, seed=n, **common
            ),
            "transformers generate": lambda x, n, hf=hf: pair.target.generate(
                x, attention_mask=torch.ones_like(x), **hf
            ),
            "transformers assisted": lambda x, n, hf=hf: pair.target.generate(
                x, attention_mask=torch.ones_like(x), assistant_model=pair.draft, **hf
            ),
        }
        for run in providers.values():
            run(prompts[0], 0)
        seconds = {name: [0.0] * args.rounds for name in providers}
        stats = {"autoregressive": [], "planned tree": []}
        for turn in range(args.rounds):
            for index, prompt in enumerate(prompts):
                for name, run in providers.items():
                    elapsed, result = timed(lambda run=run, prompt=prompt, seed=turn * 1000 + index: run(prompt, seed))
                    seconds[name][turn] += elapsed
                    if name in stats:
                        stats[name].append(result.stats)
        tokens = args.new_tokens * len(prompts)
        planned, plain = stats["planned tree"], stats["autoregressive"]
        step_ms = 1e3 * sum(s.decode_seconds for s in planned) / sum(s.num_steps for s in planned)
        measured_rate = sum(sum(s.new_tokens) - 1 for s in planned) / sum(s.decode_seconds for s in planned)
        row = {
            "temperature": temperature,
            "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
            "speedup_of_planned_tree_over": {
                name: statistics.median(a / b for a, b in zip(values, seconds["planned tree"], strict=True))
                for name, values in seconds.items()
                if name != "planned tree"
            },
            "tree": {"nodes": plan.tree.num_nodes, "levels": plan.tree.num_levels, "parents": list(plan.tree.parents)},
            "acceptance": [round(float(a), 4) for a in acceptance.vector],
            "tokens_per_step": {
                "predicted": plan.tokens_per_step,
                "measured": statistics.mean(s.tokens_per_step for s in planned),
            },
            "step_ms": {"predicted": plan.step_ms, "measured": step_ms},
            "decoding_tokens_per_second": {"predicted": 1e3 / plan.ms_per_token, "measured": measured_rate},
            "overhead_fraction": {
                "planned tree": statistics.mean(s.overhead_fraction for s in planned),
                "autoregressive": statistics.mean(s.overhead_fraction for s in plain),
            },
            "stage_ms_per_step": {
                stage: 1e3 * sum(s.stage_seconds.get(stage, 0.0) for s in planned) / sum(s.num_steps for s in planned)
                for stage in ("draft", "sample", "target", "verify", "commit", "host")
            },
        }
        results.append(row)
        print(f"T={temperature:g}  tree {plan.tree.num_nodes} nodes x {plan.tree.num_levels} levels")
        for name, rate in row["tokens_per_second"].items():
            ratio = row["speedup_of_planned_tree_over"].get(name)
            print(f"  {name:24s}{rate:9.1f} tokens/s" + (f"   planned tree is {ratio:.2f}x" if ratio else ""))
        for name in ("tokens_per_step", "step_ms", "decoding_tokens_per_second"):
            print(f"  {name:28s} predicted {row[name]['predicted']:8.2f}   measured {row[name]['measured']:8.2f}")
        print(f"  outside the forwards: {100 * row['overhead_fraction']['planned tree']:.1f} % of a step", flush=True)
    if args.json:
        document = {
            "bench": "demo_pair",
            "command": command_line("bench.systems.bench_demo_pair", argv),
            "commit": commit(),
            "environment": environment(device),
            "dtype": args.dtype,
            "new_tokens": args.new_tokens,
            "prompt_tokens": args.prompt_tokens,
            "num_prompts": len(prompts),
            "rounds": args.rounds,
            "results": results,
        }
        write_json(args.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
