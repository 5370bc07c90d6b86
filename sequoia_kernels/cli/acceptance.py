"""`acceptance`: estimate the acceptance vector of a pair from ordinary runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.arguments import (
    add_command,
    add_models,
    add_prompts,
    add_sampling,
    load_tree,
    sampling_settings,
)
from sequoia_kernels.cli.pair import encode_prompts, estimate_pair, load_pair, need_draft, read_prompts, record_pair
from sequoia_kernels.cli.terminal import BadUsage, Terminal


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "acceptance",
        run,
        "Estimate the acceptance vector of a pair from ordinary runs.",
        "sequoia-kernels acceptance --target T --draft D --prompts-file prompts.txt --out acceptance.json",
    )
    add_models(parser)
    add_sampling(parser)
    add_prompts(parser)
    parser.add_argument("--tree", type=Path, help="tree JSON to run with (default: a wide probe)")
    parser.add_argument("--out", type=Path, help="write the estimate to this JSON file")
    parser.add_argument(
        "--records", dest="records_out", metavar="RECORDS", type=Path,
        help="decode with a large tree and keep every step in this file (.npz), which `plan --records` values trees in",
    )  # fmt: skip


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels import TokenTree, TreePlan

    need_draft(args)
    tree = None if args.tree is None else load_tree(args.tree)
    if tree is not None and not isinstance(tree, (TokenTree, TreePlan)):
        raise BadUsage(f"--tree {args.tree} must be a tree or plan file, got a shaped tree: its steps have no ranks")
    texts = read_prompts(args, terminal)
    pair = load_pair(args, terminal)
    prompts = encode_prompts(texts, pair, args.prompt_tokens)
    if args.records_out is None:
        estimate = estimate_pair(pair, prompts, args.new_tokens, sampling_settings(args), terminal, tree)
    else:
        records = record_pair(pair, prompts, args.new_tokens, sampling_settings(args), terminal, tree)
        records.save(args.records_out)
        estimate = records.acceptance
    if args.out is not None:
        estimate.save(args.out)

    def show() -> None:
        percent = f"{100 * estimate.confidence:g} %"
        columns = zip(estimate.vector, estimate.lower, estimate.upper, estimate.visited, estimate.accepted)
        rows = [
            (str(rank), f"{value:.4f}", f"{lower:.4f} to {upper:.4f}", str(visited), str(accepted))
            for rank, (value, lower, upper, visited, accepted) in enumerate(columns)
        ]
        headings = ("child", "probability", f"{percent} interval", "visited", "accepted")
        terminal.table(headings, rows, f"acceptance vector at temperature {args.temperature:g}")

    terminal.result(estimate.to_document(), show)
    return 0
