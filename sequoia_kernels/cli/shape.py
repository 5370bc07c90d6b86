"""`shape`: make a tree that takes its shape while it grows, from recorded steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.arguments import add_command, positive
from sequoia_kernels.cli.terminal import Terminal


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "shape",
        run,
        "Make a tree that takes its shape while it grows: children go where the draft is sure.",
        "sequoia-kernels shape --records steps.npz --nodes 32 --out tree.json",
    )
    parser.add_argument("--records", type=Path, required=True, help="steps kept by `acceptance --records`")
    parser.add_argument("--nodes", type=positive, required=True, help="nodes of the tree, the root included")
    parser.add_argument("--out", type=Path, help="write the tree to this JSON file, for `generate --tree`")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels.planner import StepRecords, shape_tree
    from sequoia_kernels.tree import Confidence

    tree = shape_tree(StepRecords.load(args.records), args.nodes)
    if args.out is not None:
        tree.save(args.out)

    def show() -> None:
        terminal.out.print(f"{tree.num_nodes} nodes on {tree.num_levels} levels, by level: {list(tree.widths)}")
        undrawn = "undrawn, foretold" if tree.confidence.foretold else "undrawn"
        probabilities = (0.05, 0.3, 0.6, 0.9, 0.99)
        rows = [
            (name, str(rank), *(f"{table[rank][Confidence.bin_of(p)]:.3f}" for p in probabilities))
            for name, table in (("drawn", tree.confidence.drawn), (undrawn, tree.confidence.undrawn))
            for rank in range(min(3, len(table)))
        ]
        headings = ("confidence", "child", *(f"draft {p:g}" for p in probabilities))
        terminal.table(headings, rows, "how often a child is accepted, by the draft's probability")

    terminal.result(tree.to_document(), show)
    return 0
