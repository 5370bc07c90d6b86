"""How long it takes to plan: `plan_tree` on a measured profile, on one core.

The times in the profile do not matter for how long planning takes, only how many sizes there are: a tiny model is
measured for a second. Every plan is checked before it is timed::

    python -m bench.planner.bench_plan --json out.json
"""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.common.clocks import host_percentiles
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import Shape, llama_config
from sequoia_kernels import HardwareProfile, measure_profile, plan_tree
from sequoia_kernels.tree import TYPICAL_ACCEPTANCE

# nodes, levels; the bound in ms is what the package promises for one core
CASES = [(64, 12, None), (256, 24, 1000.0), (1024, 32, None)]
NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# A vector whose best child is the second: the dynamic programme runs, and with it the planner's slow way.
NOT_MONOTONE = (0.15, 0.55, 0.08, 0.04, 0.03, 0.02, 0.01, 0.01)
VECTORS = {"falling": TYPICAL_ACCEPTANCE, "not monotone": NOT_MONOTONE}


def tiny_profile(seconds: float) -> HardwareProfile:
    """Measure a tiny pair over all tree sizes."""
    torch.manual_seed(0)
    config = llama_config(Shape(32, 1, 2, 64), vocab=64, positions=2048)
    target, draft = (LlamaForCausalLM(config).eval() for _ in range(2))
    return measure_profile(
        target,
        draft,
        context_lens=(64, 512),
        node_counts=NODE_COUNTS,
        draft_node_counts=(1, 2, 8, 32, 128, 512),
        seconds=seconds,
        min_repeats=1,
        bandwidth=False,
    )


def measure(
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
    torch.set_num_threads(1)
    profile = tiny_profile(bench.options.profile_seconds)
    results, kept = [], True
    for num_nodes, num_levels, bound_ms in CASES:
        for name, vector in VECTORS.items():
            ms = measure(profile, vector, num_nodes, num_levels, bench.options.repeats)
            kept = kept and (bound_ms is None or ms["p50"] < bound_ms)
            results.append({"nodes": num_nodes, "levels": num_levels, "vector": name, "bound_ms": bound_ms, "ms": ms})
            promise = "" if bound_ms is None else f"  (promised: {bound_ms:g} ms)"
            print(f"{num_nodes:5d} nodes x {num_levels} levels, {name:<13} {ms['p50']:9.2f} ms{promise}")
    median_ms = statistics.median(entry["ms"]["p50"] for entry in results)
    bench.document |= {"median_ms": median_ms, "results": results}
    return 0 if kept else 1


main = Script(
    __spec__,
    run,
    __doc__,
    [
        *(shared("quick"), shared("profile-seconds", 1.0)),
        option("--repeats", type=int, default=10, metavar="N", help="timed plans of each (default %(default)s)"),
    ],
    quick={"repeats": 3, "profile_seconds": 0.3},
).main


if __name__ == "__main__":
    sys.exit(main())
