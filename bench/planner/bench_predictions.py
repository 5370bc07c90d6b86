"""Predicted tokens per step beside measured ones on the demo pair: both rules, trees of several sizes.

Steps are recorded on each half of the prompts. Trees are made from one half's steps and decode the prompts of the
other, then the two change places. A tree is valued in the steps of the half that it was made from, which differs from
what is measured by the texts, too; and in the steps that were recorded on the very prompts that it decodes, with other
seeds, which tells whether the prediction itself is off. No times are taken.

    python -m bench.planner.bench_predictions --threads 1 --json bench/results/cpu/predictions.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.common.demo import Demo
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from bench.planner.bench_rules import RULES, tokens_per_step
from sequoia_kernels import TokenTree
from sequoia_kernels.decoding import GenerateStats, record_steps
from sequoia_kernels.planner import OptimalTrees, StepRecords

CHAINS = (3, 5)
INTERVAL_ERRORS = 2 * 1.96  # standard errors that a 95 % interval spans
SIDES = ("made from", "same prompts")


def trees_of(records: StepRecords, sizes: Sequence[int]) -> dict[str, TokenTree]:
    """Chains, and the optimal tree of each size by the acceptance vector of recorded steps."""
    trees = {f"chain of {length}": TokenTree.chain(length) for length in CHAINS}
    for nodes in sizes:
        levels = min(nodes, records.tree.num_levels)
        optimal = OptimalTrees(records.acceptance.vector, nodes, levels)
        for depth in np.argsort(-optimal.values[nodes, 2:], kind="stable") + 2:
            tree = optimal.tree(nodes, int(depth))
            if tree.num_nodes == nodes and records.holds(tree):
                trees[f"{nodes} nodes"] = tree
                break
    return trees


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    prompts = demo.encode(demo.texts(options.prompts))
    names = ("new_tokens", "prompt_tokens", "prompts", "nodes")
    bench.document |= {name: getattr(options, name) for name in names} | {"results": []}
    for temperature in options.temperatures:
        bench.document["results"] += at_temperature(demo, temperature, [prompts[::2], prompts[1::2]], options.nodes)
        bench.tell(f"T = {temperature:g}")
        bench.save()
    print(markdown(bench.document["results"]))


def at_temperature(demo: Demo, temperature: float, halves: Sequence[Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Predict in both halves, measure on the one that a tree was not made from; a row for each tree and rule."""
    rules = RULES if temperature else RULES[:1]
    predicted: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    measured: dict[tuple[str, str], list[GenerateStats]] = {}
    settings = {"max_new_tokens": demo.new_tokens, "temperature": temperature}
    recorded = [record_steps(demo.target, demo.draft, half, **settings) for half in halves]
    for half, records in enumerate(recorded):
        for name, tree in trees_of(records, sizes).items():
            for rule in rules:
                sides = predicted.setdefault((name, rule), {side: [] for side in SIDES})
                for side, steps in zip(SIDES, (records, recorded[1 - half])):
                    lower, upper = steps.tokens_per_step_interval(tree, rule)
                    sides[side].append((steps.tokens_per_step(tree, rule), (upper - lower) / INTERVAL_ERRORS))
                decode = demo.decoder(tree, rule=rule, **demo.decoding(temperature))
                measured.setdefault((name, rule), []).extend(
                    decode(ids, 1000 * (1 + half) + seed) for seed, ids in enumerate(halves[1 - half])
                )
    rows = []
    for (name, rule), sides in predicted.items():
        mean, error = tokens_per_step(measured[name, rule])
        row = {
            "temperature": temperature, "tree": name, "rule": rule, "measured": mean, "measured_error": error,
            "steps": sum(run.num_steps for run in measured[name, rule]),
        }  # fmt: skip
        rows.append(row | {side: together(entries) for side, entries in sides.items()})
    return rows


def together(entries: Sequence[tuple[float, float]]) -> list[float]:
    """Tokens per step over texts of which each half has as many tokens, and the standard error."""
    values, errors = (np.array(part) for part in zip(*entries))
    mean = 1 / (1 / values).mean()
    return [float(mean), float(mean**2 * np.sqrt(((errors / values**2) ** 2).sum()) / len(values))]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each tree and temperature, the rules beside one another."""
    lines: dict[Any, list[str]] = {}
    for row in rows:
        line = lines.setdefault((row["temperature"], row["tree"]), [f"{row['temperature']:g}", row["tree"]])
        line += [f"{value:.2f} ± {error:.2f}" for value, error in (row[side] for side in SIDES)]
        line.append(f"{row['measured']:.2f} ± {row['measured_error']:.2f}")
    header = ["T", "tree", *(f"{rule}: {part}" for rule in RULES for part in (*SIDES, "measured"))]
    return table(header, [line + [""] * (len(header) - len(line)) for line in lines.values()])


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.0, 0.6, 1.0], prompts=56),
    *shared(prompt_tokens=128, new_tokens=128),
    option("--nodes", type=int, nargs="+", default=[8, 16, 32, 64], help="sizes of the optimal trees"),
]
QUICK = {"temperatures": [1.0], "nodes": [8], "prompts": 2, "prompt_tokens": 48, "new_tokens": 24}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
