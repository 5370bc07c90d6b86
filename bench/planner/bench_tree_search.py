"""How long it takes to find optimal trees, on one core.

The vectors are the hard kind: not monotone, so that the dynamic programme runs, and with a likely child, so that no
level limit leaves the tree as it is and no level can be skipped. Results are checked before they are timed::

    python -m bench.planner.bench_tree_search --json out.json
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import numpy as np

from bench.common.clocks import host_percentiles
from bench.common.script import Run, Script, option, shared
from sequoia_kernels.planner.search import OptimalTrees, optimal_tree, optimal_values

# nodes, levels, children; the bound in ms is what the package promises for one core
CASES = [(1024, 32, 32, 1000.0), (256, 24, 16, 50.0)]
PLANNER_CELLS = 2000


def make_vector(num_children: int) -> np.ndarray:
    """A vector whose best child is the second."""
    vector = np.full(num_children, 0.03 / (num_children - 2))
    vector[0], vector[1] = 0.02, 0.92
    return vector


def check(trees: OptimalTrees, vector: np.ndarray, num_nodes: int, num_levels: int) -> None:
    """Refuse to time wrong results: trees must be worth what the table says, and both methods must agree."""
    for budget, levels in [(num_nodes, num_levels), (num_nodes // 2, num_levels // 2), (17, 5)]:
        value = trees.value(budget, levels)
        if not math.isclose(trees.tree(budget, levels).expected_tokens(vector), value, rel_tol=1e-12):
            raise SystemExit(f"wrong tree at {budget} nodes, {levels} levels")
    monotone = np.sort(vector)[::-1]
    table = OptimalTrees(monotone, num_nodes, num_levels, method="dynamic_programme").values
    if not np.allclose(table, OptimalTrees(monotone, num_nodes, num_levels).values, rtol=1e-12):
        raise SystemExit("best_first and dynamic_programme disagree")


def measure(num_nodes: int, num_levels: int, num_children: int, repeats: int) -> dict[str, Any]:
    """Time everything that a planner asks for at one size."""
    vector = make_vector(num_children)
    monotone = np.sort(vector)[::-1]
    trees = OptimalTrees(vector, num_nodes, num_levels)
    check(trees, vector, num_nodes, num_levels)
    budgets = np.linspace(2, num_nodes, PLANNER_CELLS // num_levels).astype(int).tolist()

    def scan() -> None:
        for budget in budgets:
            for levels in range(1, num_levels + 1):
                trees.widths(budget, levels)

    return {
        "table and tree": host_percentiles(
            lambda: OptimalTrees(vector, num_nodes, num_levels).tree(num_nodes, num_levels), repeats
        ),
        "tree from the table": host_percentiles(lambda: trees.tree(num_nodes, num_levels), repeats),
        "tree without a level limit": host_percentiles(lambda: optimal_tree(vector, num_nodes), repeats),
        f"widths of {len(budgets) * num_levels} cells": host_percentiles(scan, max(2, repeats // 4)),
        "best-first values": host_percentiles(lambda: optimal_values(monotone, num_nodes, num_levels), repeats),
        "best-first tree": host_percentiles(lambda: optimal_tree(monotone, num_nodes, num_levels), repeats),
    }


def run(bench: Run) -> int:
    """Run all cases; 1 if a promise is not kept."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    results = bench.document["results"] = []
    kept = True
    for num_nodes, num_levels, num_children, bound_ms in CASES:
        times = measure(num_nodes, num_levels, num_children, bench.options.repeats)
        kept = kept and times["table and tree"]["p50"] < bound_ms
        results.append(
            {"nodes": num_nodes, "levels": num_levels, "children": num_children, "bound_ms": bound_ms, "ms": times}
        )
        print(f"{num_nodes} nodes, {num_levels} levels, {num_children} children (promised: {bound_ms:g} ms)")
        for name, fifths in times.items():
            print(f"  {name:<28} p20 {fifths['p20']:9.3f}  p50 {fifths['p50']:9.3f}  p80 {fifths['p80']:9.3f} ms")
    return 0 if kept else 1


main = Script(
    __spec__,
    run,
    __doc__,
    [
        shared("quick"),
        option("--repeats", type=int, default=20, metavar="N", help="timed calls of each (default %(default)s)"),
    ],
    quick={"repeats": 2},
    check=lambda options: None if options.repeats > 1 else f"--repeats must be at least 2, got {options.repeats}",
).main


if __name__ == "__main__":
    sys.exit(main())
