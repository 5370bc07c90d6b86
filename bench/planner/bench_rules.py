"""Verification rules against one another on a trained pair: what recorded steps predict, and what is measured.

Steps are recorded on some prompts; from them each rule's own plan is made. On other prompts, decoded by all in turn:
the plans end to end, each rule's plan under either rule; and trees of a few sizes under both rules, tokens per step
predicted beside measured, which is also the grid that the picks are compared with.

The pair is the demo pair, or SmolLM2 with a draft that `python -m bench.systems.train_draft` wrote:

    python -m bench.planner.bench_rules --threads 1 --rounds 2 --json bench/results/cpu/rules.json
    python -m bench.planner.bench_rules --pair smollm2 --json bench/results/cpu/rules_smollm2.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.common.demo import Demo, TrainedPair, decoding_rate, take_turns
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from bench.common.smollm2 import DRAFT, SmolLM2, why_not
from sequoia_kernels import TokenTree, plan_tree
from sequoia_kernels.decoding import GenerateStats, record_steps
from sequoia_kernels.planner import OptimalTrees, StepRecords

RULES = ("sequoia", "traversal")
PLAIN = ("no tree", "")
GRID_NODES = (8, 16, 32, 64)
PAIRS: dict[str, Callable[[Run], TrainedPair]] = {"demo": Demo, "smollm2": SmolLM2}


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


def verify_share(runs: Sequence[GenerateStats]) -> float:
    """Share of the decoding time that goes into deciding which nodes are accepted."""
    return sum(run.stage_seconds.get("verify", 0.0) for run in runs) / sum(run.decode_seconds for run in runs)


def measure(bench: Run) -> None:
    options = bench.options
    pair = PAIRS[options.pair](bench)
    calibration, prompts = pair.prompts(options)
    profile = pair.profile(pair.prompt_tokens + pair.new_tokens, quick=options.profile_seconds is not None,
                           seconds=options.profile_seconds)  # fmt: skip
    names = ("pair", "new_tokens", "prompts", "calibration_prompts", "rounds")
    bench.document |= {name: getattr(options, name) for name in names} | {"prompt_tokens": pair.prompt_tokens}
    bench.document["results"] = [
        at_temperature(pair, profile, temperature, calibration, prompts, options.rounds)
        for temperature in options.temperatures
    ]


def at_temperature(
    pair: TrainedPair, profile: Any, temperature: float, calibration: Sequence[Any], prompts: Sequence[Any], rounds: int
) -> dict[str, Any]:
    """Measure everything at one temperature."""
    common = pair.decoding(temperature)
    settings = {"max_new_tokens": pair.new_tokens, "temperature": temperature}
    records = record_steps(pair.target, pair.draft, calibration, **settings)
    plans = {rule: plan_tree(records, profile, context_len=pair.context_len, rule=rule, shaped=False) for rule in RULES}
    trees = {f"plan for {rule}": plan.tree for rule, plan in plans.items()} | grid_of(records)
    decoders = {(name, rule): pair.decoder(tree, rule=rule, **common) for name, tree in trees.items() for rule in RULES}
    decoders[PLAIN] = pair.decoder(None, **common)
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
                    "tokens_per_second": rates[name, rule], "verify_share": verify_share(runs[name, rule]),
                }
            )  # fmt: skip
    own = {rule: rates[f"plan for {rule}", rule] for rule in RULES}
    best = {rule: max(rates[name, rule] for name in trees) for rule in RULES}
    row = {
        "temperature": temperature, "recorded_steps": len(records), "trees": rows,
        "plain_tokens_per_second": rates[PLAIN],
        "own_plan_over_sequoias": {rule: own[rule] / own["sequoia"] for rule in RULES},
        "plan_over_best_of_grid": {rule: own[rule] / best[rule] for rule in RULES},
    }  # fmt: skip
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    """Print one temperature, a line a tree, as the documents have it."""
    print(f"\nT = {row['temperature']:g}, {row['recorded_steps']} recorded steps:\n")
    header, lines = ["tree", "nodes x levels"], {}
    for rule in RULES:
        header += [f"{rule}: predicted", "measured", "tokens/s", "verify"]
    for entry in row["trees"]:
        tokens = entry["tokens_per_step"]
        line = lines.setdefault(entry["tree"], [entry["tree"], f"{entry['nodes']} x {entry['levels']}"])
        line += [
            f"{tokens['predicted']:.2f}", f"{tokens['measured']:.2f} ± {tokens['standard_error']:.2f}",
            f"{entry['tokens_per_second']:.{0 if entry['tokens_per_second'] >= 100 else 1}f}",
            f"{100 * entry['verify_share']:.1f} %",
        ]  # fmt: skip
    print(table(header, list(lines.values())))
    print(f"without a draft: {row['plain_tokens_per_second']:.1f} tokens/s")
    for rule, ratio in row["own_plan_over_sequoias"].items():
        best = row["plan_over_best_of_grid"][rule]
        print(f"plan for {rule}: {ratio:.3f}x of sequoia's, {best:.3f}x of the best of the grid", flush=True)


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.6, 1.0], prompts=12, calibration_prompts=12),
    *shared(rounds=3, prompt_tokens=128, new_tokens=128),
    option("--profile-seconds", help="time for the hardware profile (default: its own choice)"),
    option("--pair", choices=tuple(PAIRS), default="demo", help="default %(default)s"),
    option("--draft", type=Path, default=DRAFT, help="of smollm2: a model folder (default build/drafts/smollm2)"),
]
QUICK = {"temperatures": [1.0], "prompts": 1, "calibration_prompts": 1, "rounds": 1, "prompt_tokens": 48}
QUICK |= {"new_tokens": 24, "profile_seconds": 1.0}


def problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the options."""
    return why_not(options) if options.pair == "smollm2" else None


main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK, check=problem).main


if __name__ == "__main__":
    sys.exit(main())
