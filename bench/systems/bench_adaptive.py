"""Adaptive plans against static ones on the demo pair: on text like the calibration's, and on text that drifts.

The static plan and the adaptive one are made from the same profile and the same acceptance, estimated on held-out
source code. The steady workload is more of that; the drifting one mixes it with tables of numbers, counting and prose,
on which the draft does better or worse. Providers take turns prompt by prompt.
"""

from __future__ import annotations

import random
import statistics
import sys

from bench.common.demo import Demo, decoding_rate, take_turns
from bench.common.script import Run, Script, shared
from sequoia_kernels import plan_adaptive, plan_tree

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


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    texts = demo.texts(3 * options.prompts)
    calibration = demo.encode(texts[: options.prompts])
    workloads = {
        "steady": demo.encode(texts[options.prompts : 2 * options.prompts]),
        "drifting": demo.encode(drifting_texts(texts[2 * options.prompts :])),
    }
    profile = demo.profile(options.prompt_tokens + options.new_tokens, quick=options.quick)
    bench.document["new_tokens"] = options.new_tokens
    results = bench.document["results"] = []
    for temperature in options.temperatures:
        common = demo.decoding(temperature)
        acceptance = demo.acceptance(calibration, **common)
        static = plan_tree(acceptance, profile, context_len=demo.context_len)
        adaptive = plan_adaptive(acceptance, profile, context_len=demo.context_len)
        for workload, prompts in workloads.items():
            trees = {
                "autoregressive": None,
                "static plan": static,
                "adaptive plan": adaptive,
                "adaptive plan, kept from prompt to prompt": adaptive.follow(),
            }
            runs = take_turns(
                {name: demo.decoder(tree, rule="sequoia", **common) for name, tree in trees.items()}, prompts
            )
            rate = {name: decoding_rate(stats) for name, stats in runs.items()}
            switches = sum(len(stats.steps_by_tree) - 1 for stats in runs["adaptive plan"])
            row = {
                "temperature": temperature,
                "workload": workload,
                "prompts": len(prompts),
                "trees": [{"nodes": tree.num_nodes, "levels": tree.num_levels} for tree in adaptive.trees],
                "mean_trees_used_beyond_the_first": switches / len(prompts),
                "providers": {},
            }
            for name, stats in runs.items():
                tokens, steps = (sum(run.new_tokens[0] - 1 for run in stats), sum(run.num_steps for run in stats))
                pairs = zip(stats, runs["static plan"], strict=True)
                row["providers"][name] = {
                    "tokens_per_second": rate[name],
                    "tokens_per_step": tokens / steps,
                    "over_static_plan": rate[name] / rate["static plan"],
                    "median_over_static_plan": statistics.median(
                        own.tokens_per_second / other.tokens_per_second for own, other in pairs
                    ),
                }
            results.append(row)
            print(f"T={temperature:g}, {workload} text, {len(prompts)} prompts")
            for name, entry in row["providers"].items():
                speed = f"{entry['tokens_per_second']:8.1f} tokens/s{entry['tokens_per_step']:7.2f} tokens/step"
                against = f"{entry['over_static_plan']:.2f}x of the static plan"
                print(f"  {name:44s}{speed}  {against} (median {entry['median_over_static_plan']:.2f}x)", flush=True)


OPTIONS = shared(
    device="cpu", threads=None, quick=False, temperatures=[0.0, 1.0], prompts=8, prompt_tokens=128, new_tokens=192
)
QUICK = {"prompts": 1, "new_tokens": 32, "temperatures": [0.0]}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
