"""Verification rules against one another on the demo pair: what is predicted from recorded steps, and what is measured.

Steps are recorded on some prompts; from them each rule's own plan is made. On other prompts, decoded by all in turn:
the plans end to end, each rule's plan under either rule; and trees of a few sizes under both rules, tokens per step
predicted beside measured, which is also the grid that the picks are compared with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from bench.common.demo import Demo, decoding_rate, take_turns
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from sequoia_kernels import TokenTree, plan_tree
from sequoia_kernels.decoding import GenerateStats, record_steps
from sequoia_kernels.planner import OptimalTrees, StepRecords

RULES = ("sequoia", "traversal")
GRID_NODES = (8, 16, 32, 64)


def grid_of(records: StepRecords) -> dict[str, TokenTree]:
    """Trees to measure: optimal ones of a few sizes by the acceptance vector, and chains."""
    vector, levels = records.acceptance.vector, records.tree.num_levels
    trees = {f"chain of {length}": TokenTree.chain(length) for length in (3, 4, 5, 6, 8)}
    for nodes in GRID_NODES:
        optimal = OptimalTrees(vector, nodes, min(nodes, levels))
        for depth in sorted(range(2, min(nodes, levels) + 1), key=lambda depth: -optimal.values[nodes, depth]):
            tree = optimal.tree(nodes, depth)
            if tree.num_nodes == nodes and records.holds(tree):
                trees[f"{nodes} nodes"] = tree
                break
    return trees


def tokens_per_step(runs: Sequence[GenerateStats]) -> tuple[float, float]:
    """Mean over all steps, and its standard error between the runs."""
    tokens = [sum(n * count for n, count in enumerate(run.accepted_histogram)) for run in runs]
    steps = [sum(run.accepted_histogram) for run in runs]
    mean = sum(tokens) / sum(steps)
    spread = sum((own - mean * count) ** 2 for own, count in zip(tokens, steps))
    return mean, math.sqrt(spread) / sum(steps)


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    calibration, prompts = demo.prompts(options)
    profile = demo.profile(options.prompt_tokens + options.new_tokens, quick=options.profile_seconds is not None,
                           seconds=options.profile_seconds)  # fmt: skip
    names = ("new_tokens", "prompt_tokens", "prompts", "calibration_prompts", "rounds")
    bench.document |= {name: getattr(options, name) for name in names}
    bench.document["results"] = [
        at_temperature(demo, profile, temperature, calibration, prompts, options.rounds)
        for temperature in options.temperatures
    ]


def at_temperature(
    demo: Demo, profile: Any, temperature: float, calibration: Sequence[Any], prompts: Sequence[Any], rounds: int
) -> dict[str, Any]:
    """Measure everything at one temperature."""
    common = demo.decoding(temperature)
    settings = {"max_new_tokens": demo.new_tokens, "temperature": temperature}
    records = record_steps(demo.target, demo.draft, calibration, **settings)
    plans = {rule: plan_tree(records, profile, context_len=demo.context_len, rule=rule) for rule in RULES}
    trees = {f"plan for {rule}": plan.tree for rule, plan in plans.items()} | grid_of(records)
    decoders = {(name, rule): demo.decoder(tree, rule=rule, **common) for name, tree in trees.items() for rule in RULES}
    for decode in decoders.values():
        decode(prompts[0], 0)
    runs: dict[Any, list[GenerateStats]] = {key: [] for key in decoders}
    for turn in range(rounds):
        for key, found in take_turns(decoders, prompts, 1000 * turn).items():
            runs[key] += found
    rates = {key: decoding_rate(found) for key, found in runs.items()}
    rows = []
    for name, tree in trees.items():
        for rule in RULES:
            measured, error = tokens_per_step(runs[name, rule])
            lower, upper = records.tokens_per_step_interval(tree, rule)
            rows.append(
                {
                    "tree": name, "rule": rule, "nodes": tree.num_nodes, "levels": tree.num_levels,
                    "parents": list(tree.parents),
                    "tokens_per_step": {
                        "predicted": records.tokens_per_step(tree, rule), "interval": [lower, upper],
                        "measured": measured, "standard_error": error,
                    },
                    "tokens_per_second": rates[name, rule],
                }
            )  # fmt: skip
    own = {rule: rates[f"plan for {rule}", rule] for rule in RULES}
    best = {rule: max(rates[name, rule] for name in trees) for rule in RULES}
    row = {
        "temperature": temperature, "recorded_steps": len(records), "trees": rows,
        "own_plan_over_sequoias": {rule: own[rule] / own["sequoia"] for rule in RULES},
        "plan_over_best_of_grid": {rule: own[rule] / best[rule] for rule in RULES},
    }  # fmt: skip
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    """Print one temperature."""
    print(f"\nT={row['temperature']:g}, {row['recorded_steps']} recorded steps")
    rows = []
    for entry in row["trees"]:
        tokens = entry["tokens_per_step"]
        rows.append(
            [
                entry["tree"], entry["rule"], f"{entry['nodes']}", f"{entry['levels']}", f"{tokens['predicted']:.2f}",
                f"{tokens['measured']:.2f} ± {tokens['standard_error']:.2f}", f"{entry['tokens_per_second']:.0f}",
            ]
        )  # fmt: skip
    print(table(["tree", "rule", "nodes", "levels", "predicted", "measured", "tokens/s"], rows))
    for rule, ratio in row["own_plan_over_sequoias"].items():
        best = row["plan_over_best_of_grid"][rule]
        print(f"plan for {rule}: {ratio:.3f}x of sequoia's, {best:.3f}x of the best of the grid", flush=True)


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.6, 1.0], prompts=12, calibration_prompts=12),
    *shared(rounds=3, prompt_tokens=128, new_tokens=128),
    option("--profile-seconds", help="time for the hardware profile (default: its own choice)"),
]
QUICK = {"temperatures": [1.0], "prompts": 1, "calibration_prompts": 1, "rounds": 1, "prompt_tokens": 48}
QUICK |= {"new_tokens": 24, "profile_seconds": 1.0}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
