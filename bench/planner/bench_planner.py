"""What speculation gives a pair of models on this machine, over batch sizes and context lengths: planned, not run.

The parts of both models are measured, no model is loaded; the planner composes the forwards from the configurations and
picks a tree for every batch size and context length. Reported are tokens per step and speedup, with intervals from the
acceptance vector's uncertainty, milliseconds by stage, where a tree beats a tuned chain, and where nothing beats plain
decoding; and, for one request, the speedup over budget and levels.

The acceptance vector is a typical one as if counted over `--visits` nodes, unless one is given by --acceptance.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from bench.common.report import NO_PYPLOT, pyplot, table
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import PAIRS, llama_config
from sequoia_kernels import (
    AcceptanceEstimate,
    HardwareProfile,
    TreePlan,
    estimate_acceptance,
    measure_profile,
    plan_tree,
)
from sequoia_kernels.decoding import measure_overhead
from sequoia_kernels.demo import load_demo_pair
from sequoia_kernels.measure import measure_microbenchmarks
from sequoia_kernels.planner import CostModel, ModelFingerprint, OptimalTrees
from sequoia_kernels.planner.cost_model import STAGES, StepShape
from sequoia_kernels.tree import TYPICAL_ACCEPTANCE

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (512, 2048, 8192, 32768)
BUDGETS = (2, 4, 8, 16, 32, 64, 128, 256)
LEVELS = (2, 3, 4, 6, 8, 12, 16, 24)


def typical_acceptance(visits: int) -> AcceptanceEstimate:
    """The typical vector, as an estimate from this many visited nodes: rank by rank those that rejected so far."""
    visited, accepted, left = [], [], float(visits)
    for rate in TYPICAL_ACCEPTANCE:
        visited.append(round(left))
        accepted.append(round(visits * rate))
        left -= visits * rate
    return estimate_acceptance((visited, accepted))


def measure(models: list[ModelFingerprint], device: torch.device, dtype: torch.dtype, quick: bool) -> HardwareProfile:
    """Measure the parts of the models, and with the demo pair what the loop takes beyond forwards and ops."""
    pair = load_demo_pair(torch.float32 if device.type == "cpu" else dtype, device)
    profile = measure_profile(
        pair.target, pair.draft, context_lens=(128,), seconds=2, min_repeats=2 if quick else 5, quick=True
    )
    profile = measure_overhead(pair.target, pair.draft, profile, context_len=64)
    effort: dict[str, Any] = {"min_repeats": 4, "seconds": 45}
    if quick:
        effort = {"min_repeats": 1, "seconds": 2, "rows": (1, 4, 16, 64, 256)}
    return profile.merged(measure_microbenchmarks(device, dtype, shapes=models, quick=quick, **effort))


def cell(plan: TreePlan, batch_size: int, context_len: int) -> dict[str, Any]:
    chain = plan.best_chain
    trees = [candidate for candidate in plan.candidates if candidate.kind == "tree"]
    row = {"batch_size": batch_size, "context_len": context_len, "kind": plan.kind}
    row |= {"nodes": plan.tree.num_nodes, "levels": plan.tree.num_levels, "tokens_per_step": plan.tokens_per_step}
    row |= {"tokens_per_step_interval": plan.tokens_per_step_interval, "step_ms": plan.step_ms}
    row |= {"stages_ms": plan.stages, "tokens_per_second": plan.tokens_per_second}
    return row | {
        "speedup": plan.speedup,
        "speedup_interval": plan.speedup_interval,
        "best_tree_speedup": max((tree.speedup for tree in trees), default=None),
        "best_chain_speedup": None if chain is None else chain.speedup,
        "best_chain_nodes": None if chain is None else chain.tree.num_nodes,
        "notes": list(plan.notes),
    }


def surface(model: CostModel, vector: tuple[float, ...], context_len: int, budgets: tuple[int, ...]) -> list[list[Any]]:
    """Speedup of the optimal tree of at most this many nodes and just these levels; None where there is none."""
    times = model.at_context(context_len)
    trees = OptimalTrees(list(vector), budgets[-1], LEVELS[-1])
    single_ms = times.step_ms(StepShape(1, (), ()))
    rows: list[list[Any]] = []
    for budget in budgets:
        row: list[Any] = []
        for levels in LEVELS:
            tree = trees.tree(budget, min(levels, budget)) if levels <= budget else None
            if tree is None or tree.num_levels < levels:
                row.append(None)
            else:
                row.append(tree.expected_tokens(list(vector)) * single_ms / times.step_ms(StepShape.of(tree)))
        rows.append(row)
    return rows


def plot(path: Path, title: str, budgets: tuple[int, ...], speedups: list[list[Any]]) -> str | None:
    """Draw the speedup over budget, a line for every number of levels; return why not, if not."""
    plt = pyplot()
    if plt is None:
        return NO_PYPLOT
    figure, axes = plt.subplots(figsize=(7.0, 4.5), layout="constrained")
    for column, levels in enumerate(LEVELS):
        points = [(budget, row[column]) for budget, row in zip(budgets, speedups, strict=True) if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{levels} levels")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("nodes")
    axes.set_ylabel("predicted speedup")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
    return None


def markdown(document: dict[str, Any]) -> str:
    cells, budgets = document["results"], document["surface"]["budgets"]
    confidence = document["acceptance"]["confidence"]

    def number(value: float | None, interval: Any = None, unit: str = "") -> str:
        if value is None:
            return ""
        return f"{value:.2f}{unit}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")

    rows = [
        [
            str(entry["batch_size"]),
            str(entry["context_len"]),
            entry["kind"],
            f"{entry['nodes']} x {entry['levels']}",
            number(entry["tokens_per_step"], entry["tokens_per_step_interval"]),
            number(entry["speedup"], entry["speedup_interval"], "x"),
            number(entry["best_chain_speedup"], unit="x"),
            f"{entry['step_ms']:.1f}",
            *(f"{entry['stages_ms'][stage]:.1f}" for stage in STAGES),
        ]
        for entry in cells
    ]
    header = ["batch", "context", "pick", "nodes x levels", "tokens/step", "speedup", "best chain", "step ms", *STAGES]
    batches = list(dict.fromkeys(entry["batch_size"] for entry in cells))
    contexts = list(dict.fromkeys(entry["context_len"] for entry in cells))
    by_place = {(entry["batch_size"], entry["context_len"]): entry for entry in cells}
    winners = [
        [str(batch), *(f"{by_place[batch, c]['kind']} {by_place[batch, c]['speedup']:.2f}x" for c in contexts)]
        for batch in batches
    ]
    speedups = [
        [str(budget), *("" if value is None else f"{value:.2f}" for value in row)]
        for budget, row in zip(budgets, document["surface"]["speedups"], strict=True)
    ]
    device = document["environment"]["device"]
    return "\n\n".join(
        [
            "## planner",
            f"{document['pair']}, {document['dtype']}, on {device['name']}; predicted from microbenchmarks, not run. "
            f"Acceptance: {document['acceptance']['source']}. Intervals: {confidence:.0%}, of the acceptance alone.\n"
            f"`{document['command']}`",
            "What wins, by batch size and context length:",
            table(["batch", *(f"context {context}" for context in contexts)], winners),
            "The picks, with milliseconds by stage:",
            table(header, rows, left=4),
            f"Speedup over nodes and levels, one request, context {document['surface']['context_len']}:",
            table(["nodes", *(f"{levels} levels" for levels in LEVELS)], speedups),
            "\n".join(f"- {note}" for note in dict.fromkeys(note for entry in cells for note in entry["notes"])),
        ]
    )


def run(bench: Run) -> None:
    options, device = bench.options, bench.device
    name = options.pair or ("tiny" if options.quick else "7B/68M" if device.type == "cuda" else "350M/8M")
    pair = PAIRS[name]
    dtype = torch.bfloat16
    shapes = {"target": pair.target, "draft": pair.draft}
    configs = {role: llama_config(shape, pair.vocab, 65536) for role, shape in shapes.items()}
    models = {role: ModelFingerprint.from_config(config, dtype) for role, config in configs.items()}
    if options.profile:
        profile = HardwareProfile.load(options.profile)
    else:
        profile = measure(list(models.values()), device, dtype, options.quick)
    if options.acceptance:
        acceptance = AcceptanceEstimate.load(options.acceptance)
    else:
        acceptance = typical_acceptance(options.visits)
    batches, contexts = ((1, 8), (512, 8192)) if options.quick else (BATCHES, CONTEXTS)
    max_budget = 64 if options.quick else options.max_budget
    results = []
    for batch_size in batches:
        for context_len in contexts:
            where = {"batch_size": batch_size, "context_len": context_len}
            plan = plan_tree(acceptance, profile, **models, **where, max_budget=max_budget, max_levels=24)
            results.append(cell(plan, batch_size, context_len))
    budgets = tuple(budget for budget in BUDGETS if budget <= max_budget)
    speedups = surface(CostModel(profile, **models), acceptance.vector, contexts[0], budgets)
    document = bench.document
    source = str(options.acceptance or f"a typical vector, as if counted over {options.visits} nodes")
    found = {"source": source, "vector": list(acceptance.vector), "confidence": acceptance.confidence}
    document |= {"pair": name, "dtype": str(dtype).removeprefix("torch."), "acceptance": found, "results": results}
    document["surface"] = {"context_len": contexts[0], "budgets": budgets, "levels": LEVELS, "speedups": speedups}
    print(markdown(document))
    if options.json:
        title = f"{name}, {document['dtype']}, {document['environment']['device']['name']}, context {contexts[0]}"
        reason = plot(options.json.with_suffix(".svg"), title, budgets, speedups)
        if reason:
            print(f"no plot: {reason}")


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False),
    option("--pair", choices=sorted(PAIRS), help="shapes (default: 350M/8M on a CPU, 7B/68M on CUDA)"),
    option("--profile", type=Path, help="a profile with microbenchmarks, instead of measuring"),
    option("--acceptance", type=Path, help="JSON of an acceptance estimate (default: a typical vector)"),
    option("--visits", type=int, default=2000, help="nodes the typical vector is as if counted over"),
    option("--max-budget", type=int, default=256),
]
main = Script(__spec__, run, __doc__, OPTIONS, markdown=markdown).main


if __name__ == "__main__":
    sys.exit(main())
