"""Shaped trees against token trees of as many nodes in the same recorded steps of the demo pair: tokens per step.

Steps are recorded on held-out prompts with a large tree, in which all others lie. What each tree would have been worth
in every step is summed without coins, so trees differ by what they are and not by what was drawn. Trees and confidence
come from the prompts of every other text and are valued on the rest; then the two halves change places. No times are
taken.

    python -m bench.planner.bench_shaped_steps --threads 1 --json bench/results/cpu/shaped_steps.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.common.demo import Demo
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from bench.planner.bench_rules import RULES
from sequoia_kernels import TokenTree
from sequoia_kernels.decoding import record_steps
from sequoia_kernels.planner import OptimalTrees, StepRecords, optimal_tree, shape_tree
from sequoia_kernels.planner.recorded_search import tree_of_best_nodes
from sequoia_kernels.tree import ShapedTree

WIDE_VECTOR = (0.7, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.007)  # as of `decoding.RECORD_TREE`
KINDS = ("optimal", "best nodes", "shaped")


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    prompts = demo.encode(demo.texts(options.prompts))
    names = ("new_tokens", "prompt_tokens", "prompts", "nodes", "recorded_nodes")
    bench.document |= {name: getattr(options, name) for name in names} | {"results": []}
    tree = optimal_tree(WIDE_VECTOR, options.recorded_nodes)
    for temperature in options.temperatures:
        settings = {"max_new_tokens": demo.new_tokens, "temperature": temperature, "in_turns": False}
        records = record_steps(demo.target, demo.draft, prompts, tree=tree, **settings)
        bench.document["results"] += at_temperature(records, temperature, options.nodes)
        bench.tell(f"T = {temperature:g}, {len(records)} steps")
        bench.save()
    print(markdown(bench.document["results"]))


def at_temperature(records: StepRecords, temperature: float, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each size, rule and kind of tree."""
    is_odd = records.requests % 2 == 1
    halves = [records.part(np.flatnonzero(half)) for half in (is_odd, ~is_odd)]
    num_requests = int(records.requests.max()) + 1
    for nodes in sizes:
        made = [trees_of(given, nodes) for given in halves]
        for rule in RULES if temperature else RULES[:1]:
            sums = {kind: np.zeros(num_requests) for kind in KINDS}
            for trees, others in zip(made, halves[::-1]):
                for kind, tree in trees.items():
                    values = others.values(tree, rule)
                    sums[kind] += np.bincount(others.requests, weights=values, minlength=num_requests)
            for kind, own in sums.items():
                row = {"temperature": temperature, "nodes": nodes, "rule": rule, "tree": kind}
                yield row | {"tokens_per_step": float(own.sum() / len(records)), **ratios(own, sums)}


def ratios(own: np.ndarray, sums: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Tokens over those of the fixed trees, and their standard error between prompts."""
    found = {}
    for name, base in ((f"over {kind}", sums[kind]) for kind in KINDS[:2]):
        ratio = own.sum() / base.sum()
        found[name] = [float(ratio), float(np.sqrt(((own - ratio * base) ** 2).sum()) / base.sum())]
    return found


def trees_of(records: StepRecords, nodes: int) -> dict[str, TokenTree | ShapedTree]:
    """The optimal tree by the acceptance vector, the one of the nodes accepted most often, and the shaped one."""
    levels = min(nodes, records.tree.num_levels)
    optimal = OptimalTrees(records.acceptance.vector, nodes, levels)
    by_value = np.argsort(-optimal.values[nodes, 2:], kind="stable") + 2
    trees = (optimal.tree(nodes, int(depth)) for depth in by_value)
    best = next(tree for tree in trees if tree.num_nodes == nodes and records.holds(tree))
    return dict(zip(KINDS, (best, tree_of_best_nodes(records, nodes), shape_tree(records, nodes))))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each temperature, rule and size."""
    lines: dict[Any, list[str]] = {}
    for row in rows:
        key = row["temperature"], row["rule"], row["nodes"]
        line = lines.setdefault(key, [f"{row['temperature']:g}", row["rule"], str(row["nodes"])])
        if row["tree"] == KINDS[0]:
            line.append(f"{row['tokens_per_step']:.2f}")
            continue
        for base in KINDS[: KINDS.index(row["tree"])]:
            ratio, error = row[f"over {base}"]
            line.append(f"{ratio:.3f} ± {error:.3f}")
    header = ["T", "rule", "nodes", "optimal", "best nodes / optimal", "shaped / optimal", "shaped / best nodes"]
    return table(header, list(lines.values()), left=2)


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.0, 0.6, 1.0], prompts=56),
    *shared(prompt_tokens=128, new_tokens=128),
    option("--nodes", type=int, nargs="+", default=[8, 16, 32, 64], help="sizes of the trees"),
    option("--recorded-nodes", type=int, default=256, help="of the tree that is recorded (default %(default)s)"),
]
QUICK = {"temperatures": [1.0], "nodes": [8], "prompts": 2, "prompt_tokens": 48, "new_tokens": 24}
QUICK |= {"recorded_nodes": 32}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
