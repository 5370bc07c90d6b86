"""Shaped trees against token trees of as many nodes on the demo pair: tokens per step and tokens per second.

Steps are recorded on some prompts. From them come, for each number of nodes, the token tree that is optimal by the
acceptance vector, the best one that a search over the recorded steps finds, and the shaped tree. On other prompts all
are decoded in turn, under each rule.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from bench.common.demo import Demo, decoding_rate, take_turns
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from sequoia_kernels import TokenTree
from sequoia_kernels.decoding import GenerateStats, record_steps
from sequoia_kernels.planner import OptimalTrees, StepRecords, shape_tree
from sequoia_kernels.tree import ShapedTree


def optimal(records: StepRecords, nodes: int) -> TokenTree:
    """The optimal tree of so many nodes by the acceptance vector."""
    trees = OptimalTrees(records.acceptance.vector, nodes, min(nodes, 16))
    tree = max((trees.tree(nodes, depth) for depth in range(2, min(nodes, 16) + 1)),
               key=lambda tree: tree.expected_tokens(records.acceptance.vector))  # fmt: skip
    assert tree.num_nodes == nodes
    return tree


def even_shape(shaped: ShapedTree, records: StepRecords) -> TokenTree:
    """A token tree of a shaped one's widths: children go to what is worth most by the vector, in every step alike."""
    vector = [*records.acceptance.vector, *[0.0] * shaped.max_branching][: shaped.max_branching]
    parents, values, first = [-1], [1.0], 0
    for width, below in zip(shaped.widths, shaped.widths[1:]):
        slots = [(values[node] * chance, -node, -rank) for node in range(first, first + width)
                 for rank, chance in enumerate(vector)]  # fmt: skip
        chosen = sorted((-node, -rank, worth) for worth, node, rank in sorted(slots, reverse=True)[:below])
        parents += [node for node, _, _ in chosen]
        values += [worth for _, _, worth in chosen]
        first += width
    return TokenTree(parents)


def gain(runs: Sequence[GenerateStats], base: Sequence[GenerateStats]) -> tuple[float, float]:
    """How much more tokens per step than others on the same prompts, as a ratio of sums, and its standard error."""
    counts = [
        [
            (sum(n * count for n, count in enumerate(run.accepted_histogram)), sum(run.accepted_histogram))
            for run in part
        ]
        for part in (runs, base)
    ]
    means = [sum(tokens for tokens, _ in part) / sum(steps for _, steps in part) for part in counts]
    mean_steps = [sum(steps for _, steps in part) / len(part) for part in counts]
    # Linearised: what each prompt adds to the logarithm of the ratio.
    parts = [
        sum(sign * (tokens - mean * steps) / (mean * count)
            for sign, (tokens, steps), mean, count in zip((1, -1), pair, means, mean_steps))
        for pair in zip(*counts)
    ]  # fmt: skip
    ratio = means[0] / means[1]
    return ratio, ratio * math.sqrt(sum(part * part for part in parts)) / len(parts)


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    calibration, prompts = demo.prompts(options)
    names = ("new_tokens", "prompt_tokens", "prompts", "calibration_prompts", "rounds", "nodes")
    bench.document |= {name: getattr(options, name) for name in names}
    bench.document["results"] = [
        at_temperature(demo, temperature, calibration, prompts, options) for temperature in options.temperatures
    ]


def at_temperature(
    demo: Demo, temperature: float, calibration: Sequence[Any], prompts: Sequence[Any], options: Any
) -> dict[str, Any]:
    """Measure everything at one temperature."""
    settings = {"max_new_tokens": demo.new_tokens, "temperature": temperature}
    records = record_steps(demo.target, demo.draft, calibration, **settings)
    trees: dict[str, dict[int, Any]] = {"optimal": {}, "fixed, same widths": {}, "shaped": {}}
    for nodes in options.nodes:
        shaped = shape_tree(records, nodes)
        trees["optimal"][nodes] = optimal(records, nodes)
        trees["fixed, same widths"][nodes] = even_shape(shaped, records)
        trees["shaped"][nodes] = shaped
    rules = ("sequoia", "traversal") if temperature else ("sequoia",)
    common = demo.decoding(temperature)
    decoders = {
        (kind, nodes, rule): demo.decoder(tree, rule=rule, **common)
        for kind, sizes in trees.items() for nodes, tree in sizes.items() for rule in rules
    }  # fmt: skip
    for decode in decoders.values():
        decode(prompts[0], 0)
    runs: dict[Any, list[GenerateStats]] = {key: [] for key in decoders}
    for turn in range(options.rounds):
        for key, found in take_turns(decoders, prompts, 1000 * turn).items():
            runs[key] += found
    rows = []
    for nodes in options.nodes:
        for rule in rules:
            for kind, sizes in trees.items():
                found, base = runs[kind, nodes, rule], runs["optimal", nodes, rule]
                ratio, error = gain(found, base)
                rows.append(
                    {
                        "tree": kind, "nodes": nodes, "rule": rule, "widths": list(sizes[nodes].widths),
                        "tokens_per_step": _mean(found), "over_optimal": ratio, "standard_error": error,
                        "tokens_per_second": decoding_rate(found),
                    }
                )  # fmt: skip
    row = {"temperature": temperature, "recorded_steps": len(records), "trees": rows}
    show(row)
    return row


def _mean(runs: Sequence[GenerateStats]) -> float:
    tokens = sum(n * count for run in runs for n, count in enumerate(run.accepted_histogram))
    return tokens / sum(sum(run.accepted_histogram) for run in runs)


def show(row: dict[str, Any]) -> None:
    """Print one temperature."""
    print(f"\nT={row['temperature']:g}, {row['recorded_steps']} recorded steps")
    rows = [
        [
            entry["tree"], entry["rule"], f"{entry['nodes']} x {len(entry['widths'])}",
            f"{entry['tokens_per_step']:.2f}", f"{entry['over_optimal']:.3f} ± {entry['standard_error']:.3f}",
            f"{entry['tokens_per_second']:.0f}",
        ]
        for entry in row["trees"]
    ]  # fmt: skip
    print(table(["tree", "rule", "nodes x levels", "tokens/step", "over optimal", "tokens/s"], rows), flush=True)


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.0, 0.6, 1.0], prompts=24, calibration_prompts=12),
    *shared(rounds=1, prompt_tokens=128, new_tokens=128),
    option("--nodes", type=int, nargs="+", default=[8, 16, 32, 64], help="sizes of the trees"),
]
QUICK = {"temperatures": [1.0], "prompts": 1, "calibration_prompts": 1, "rounds": 1, "prompt_tokens": 48}
QUICK |= {"new_tokens": 24, "nodes": [8]}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
