"""End to end on the demo pair: planned trees against the own autoregressive loop and transformers, in one run.

Every provider decodes the same held-out prompts, one after the other in turn, so that drift of the machine hits all of
them alike. Acceptance is estimated on other prompts than those that are timed. Prediction and measurement stand side
by side.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.common.demo import Demo, decoding_rate
from bench.common.script import Run, Script, option, shared
from sequoia_kernels import TreePlan, generate, plan_tree

STAGES = ("draft", "sample", "target", "verify", "commit", "host")


def providers_of(
    demo: Demo, plan: TreePlan, temperature: float, common: dict[str, Any]
) -> dict[str, Callable[[torch.Tensor, int], Any]]:
    """Who decodes: name -> what gives a prompt's output, with a seed."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    sampling |= {"max_new_tokens": common["max_new_tokens"], "pad_token_id": 0}

    def own(draft: Any, **options: Any) -> Callable[[torch.Tensor, int], Any]:
        return lambda prompt, seed: generate(demo.target, draft, prompt, seed=seed, **options, **common)

    def transformers(**options: Any) -> Callable[[torch.Tensor, int], Any]:
        return lambda prompt, _: demo.pair.target.generate(
            prompt, attention_mask=torch.ones_like(prompt), **sampling, **options
        )

    return {
        "autoregressive": own(None),
        "planned tree": own(demo.draft, tree=plan),
        "transformers generate": transformers(),
        "transformers assisted": transformers(assistant_model=demo.pair.draft),
    }


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench, getattr(torch, options.dtype))
    for model in demo.pair[:2]:
        model.generation_config.eos_token_id = None  # every provider decodes exactly the same number of tokens
    calibration, prompts = demo.prompts(options)
    bench.document |= {name: getattr(options, name) for name in ("dtype", "new_tokens", "prompt_tokens", "rounds")}
    bench.document["num_prompts"] = len(prompts)
    results = bench.document["results"] = []
    for temperature in options.temperatures:
        common = demo.decoding(temperature)
        evidence = demo.evidence(calibration, **common)
        # For each temperature anew: within minutes a machine drifts by more than a prediction is to be wrong by.
        profile = demo.profile(
            options.prompt_tokens + options.new_tokens,
            seconds=options.profile_seconds,
            quick=options.profile_seconds is not None,
        )
        plan = plan_tree(evidence, profile, context_len=demo.context_len, shaped=False)
        providers = providers_of(demo, plan, temperature, common)
        for run in providers.values():
            run(prompts[0], 0)
        seconds = {name: [0.0] * options.rounds for name in providers}
        stats = {"autoregressive": [], "planned tree": []}
        for turn in range(options.rounds):
            for index, prompt in enumerate(prompts):
                for name, run in providers.items():
                    started = time.perf_counter()
                    result = run(prompt, turn * 1000 + index)
                    seconds[name][turn] += time.perf_counter() - started
                    if name in stats:
                        stats[name].append(result.stats)
        tokens = options.new_tokens * len(prompts)
        planned, steps = stats["planned tree"], sum(s.num_steps for s in stats["planned tree"])
        step_ms, plain_ms = (
            1e3 * sum(s.decode_seconds for s in runs) / sum(s.num_steps for s in runs)
            for runs in (planned, stats["autoregressive"])
        )
        measured_steps = statistics.mean(s.tokens_per_step for s in planned)
        row = {
            "temperature": temperature,
            "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
            "speedup_of_planned_tree_over": {
                name: statistics.median(a / b for a, b in zip(values, seconds["planned tree"], strict=True))
                for name, values in seconds.items()
                if name != "planned tree"
            },
            "tree": {"nodes": plan.tree.num_nodes, "levels": plan.tree.num_levels, "parents": list(plan.tree.parents)},
            "rule": plan.rule,
            "acceptance": [round(float(a), 4) for a in plan.acceptance],
            "tokens_per_step": {"predicted": plan.tokens_per_step, "measured": measured_steps},
            "step_ms": {"predicted": plan.step_ms, "measured": step_ms},
            "autoregressive_step_ms": {"predicted": plan.no_speculation.step_ms, "measured": plain_ms},
            "decoding_tokens_per_second": {"predicted": 1e3 / plan.ms_per_token, "measured": decoding_rate(planned)},
            "overhead_fraction": {
                name: statistics.mean(s.overhead_fraction for s in stats[name])
                for name in ("planned tree", "autoregressive")
            },
            "stage_ms_per_step": {
                stage: 1e3 * sum(s.stage_seconds.get(stage, 0.0) for s in planned) / steps for stage in STAGES
            },
        }
        results.append(row)
        print(f"T={temperature:g}  tree {plan.tree.num_nodes} nodes x {plan.tree.num_levels} levels")
        for name, rate in row["tokens_per_second"].items():
            ratio = row["speedup_of_planned_tree_over"].get(name)
            print(f"  {name:24s}{rate:9.1f} tokens/s" + (f"   planned tree is {ratio:.2f}x" if ratio else ""))
        for name in ("tokens_per_step", "step_ms", "autoregressive_step_ms", "decoding_tokens_per_second"):
            print(f"  {name:28s} predicted {row[name]['predicted']:8.2f}   measured {row[name]['measured']:8.2f}")
        print(f"  outside the forwards: {100 * row['overhead_fraction']['planned tree']:.1f} % of a step", flush=True)


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.0, 0.6, 1.0], prompts=8, calibration_prompts=8),
    *shared(rounds=3, prompt_tokens=128, new_tokens=128, dtype="float32"),
    option("--profile-seconds", help="time for the hardware profile (default: its own choice)"),
]
QUICK = {"temperatures": [0.6], "prompts": 1, "calibration_prompts": 1, "rounds": 1, "prompt_tokens": 48}
QUICK |= {"new_tokens": 32, "profile_seconds": 1.0}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
