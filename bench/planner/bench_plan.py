"""How long planning takes on one core: the search for trees by itself, and `plan_tree` on a measured profile.

The search's vectors are the hard kind: not monotone, so that the dynamic programme runs, and with a likely child, so
that no level limit leaves the tree as it is and no level can be skipped. The times in the profile do not matter for how
long planning takes, only how many sizes there are: a tiny model is measured for a second. Trees and plans are checked
before they are timed.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from bench.common.clocks import host_percentiles
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import Shape, llama_config
from sequoia_kernels import HardwareProfile, measure_profile, plan_tree
from sequoia_kernels.planner.search import OptimalTrees, optimal_tree, optimal_values
from sequoia_kernels.tree import TYPICAL_ACCEPTANCE

# The bounds in ms are what the package promises for one core.
SEARCHES = [(1024, 32, 32, 1000.0), (256, 24, 16, 50.0)]  # nodes, levels, children, bound
PLANS = [(64, 12, None), (256, 24, 1000.0), (1024, 32, None)]  # nodes, levels, bound
PLANNER_CELLS = 2000
NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# A vector whose best child is the second: the dynamic programme runs, and with it the planner's slow way.
NOT_MONOTONE = (0.15, 0.55, 0.08, 0.04, 0.03, 0.02, 0.01, 0.01)
VECTORS = {"falling": TYPICAL_ACCEPTANCE, "not monotone": NOT_MONOTONE}


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


def measure_search(num_nodes: int, num_levels: int, num_children: int, repeats: int) -> dict[str, Any]:
    """Time everything that a planner asks for at one size, with a vector whose best child is the second."""
    vector = np.full(num_children, 0.03 / (num_children - 2))
    vector[:2] = 0.02, 0.92
    monotone = np.sort(vector)[::-1]
    trees = OptimalTrees(vector, num_nodes, num_levels)
    check(trees, vector, num_nodes, num_levels)
    budgets = np.linspace(2, num_nodes, PLANNER_CELLS // num_levels).astype(int).tolist()
    calls = {
        "table and tree": lambda: OptimalTrees(vector, num_nodes, num_levels).tree(num_nodes, num_levels),
        "tree from the table": lambda: trees.tree(num_nodes, num_levels),
        "tree without a level limit": lambda: optimal_tree(vector, num_nodes),
        "best-first values": lambda: optimal_values(monotone, num_nodes, num_levels),
        "best-first tree": lambda: optimal_tree(monotone, num_nodes, num_levels),
    }

    def scan() -> None:
        for budget in budgets:
            for levels in range(1, num_levels + 1):
                trees.widths(budget, levels)

    cells = {f"widths of {len(budgets) * num_levels} cells": host_percentiles(scan, max(2, repeats // 4))}
    return {name: host_percentiles(call, repeats) for name, call in calls.items()} | cells


def tiny_profile(seconds: float) -> HardwareProfile:
    """Measure a tiny pair over all tree sizes."""
    torch.manual_seed(0)
    config = llama_config(Shape(32, 1, 2, 64), vocab=64, positions=2048)
    target, draft = (LlamaForCausalLM(config).eval() for _ in range(2))
    sizes = {"context_lens": (64, 512), "node_counts": NODE_COUNTS, "draft_node_counts": (1, 2, 8, 32, 128, 512)}
    return measure_profile(target, draft, **sizes, seconds=seconds, min_repeats=1, bandwidth=False)


def measure_plan(
    profile: HardwareProfile, vector: tuple[float, ...], num_nodes: int, num_levels: int, repeats: int
) -> dict[str, Any]:
    """Check a plan against its own tree, then time planning it."""

    def plan() -> Any:
        return plan_tree(vector, profile, max_budget=num_nodes, max_levels=num_levels)

    found = plan()
    if not math.isclose(found.tree.expected_tokens(vector), found.tokens_per_step, rel_tol=1e-9):
        raise SystemExit(f"wrong plan at {num_nodes} nodes, {num_levels} levels")
    return host_percentiles(plan, repeats)


def run(bench: Run) -> int:
    """Run all cases; 1 if a promise is not kept."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    options, kept = bench.options, True
    searches = bench.document["searches"] = []
    for nodes, levels, children, bound_ms in SEARCHES:
        times = measure_search(nodes, levels, children, options.search_repeats)
        kept = kept and times["table and tree"]["p50"] < bound_ms
        searches.append({"nodes": nodes, "levels": levels, "children": children, "bound_ms": bound_ms, "ms": times})
        print(f"{nodes} nodes, {levels} levels, {children} children (promised: {bound_ms:g} ms)")
        for name, fifths in times.items():
            print(f"  {name:<28} p20 {fifths['p20']:9.3f}  p50 {fifths['p50']:9.3f}  p80 {fifths['p80']:9.3f} ms")
    profile = tiny_profile(options.profile_seconds)
    results = bench.document["results"] = []
    for nodes, levels, bound_ms in PLANS:
        for name, vector in VECTORS.items():
            ms = measure_plan(profile, vector, nodes, levels, options.repeats)
            kept = kept and (bound_ms is None or ms["p50"] < bound_ms)
            results.append({"nodes": nodes, "levels": levels, "vector": name, "bound_ms": bound_ms, "ms": ms})
            promise = "" if bound_ms is None else f"  (promised: {bound_ms:g} ms)"
            print(f"{nodes:5d} nodes x {levels} levels, {name:<13} {ms['p50']:9.2f} ms{promise}")
    bench.document["median_ms"] = statistics.median(entry["ms"]["p50"] for entry in results)
    return 0 if kept else 1


OPTIONS = [
    *shared(quick=False, profile_seconds=1.0),
    option("--repeats", type=int, default=10, metavar="N", help="timed plans of each (default %(default)s)"),
    option("--search-repeats", type=int, default=20, metavar="N", help="timed searches of each (default %(default)s)"),
]
QUICK = {"repeats": 3, "search_repeats": 2, "profile_seconds": 0.3}
main = Script(__spec__, run, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
