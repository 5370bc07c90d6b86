"""`acceptance`: estimate the acceptance vector of a pair from ordinary runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from sequoia_kernels.cli.arguments import (
    add_command,
    add_models,
    add_prompts,
    add_sampling,
    load_tree,
    sampling_settings,
)
from sequoia_kernels.cli.pair import encode_prompts, estimate_pair, load_pair, need_draft, read_prompts
from sequoia_kernels.cli.terminal import Terminal


def add(commands: Any) -> None:
    parser = add_command(commands, "acceptance", run, "Estimate the acceptance vector of a pair from ordinary runs.")
    add_models(parser)
    add_sampling(parser)
    add_prompts(parser)
    parser.add_argument(
        "--tree", type=Path, default=argparse.SUPPRESS, help="tree JSON to run with (default: a wide probe)"
    )
    parser.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="write the estimate to this JSON file")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    need_draft(args)
    tree = load_tree(args.tree) if hasattr(args, "tree") else None
    texts = read_prompts(args, terminal)
    pair = load_pair(args, terminal)
    prompts = encode_prompts(texts, pair, args.prompt_tokens)
    estimate = estimate_pair(pair, prompts, args.new_tokens, sampling_settings(args), terminal, tree)
    if hasattr(args, "out"):
        estimate.save(args.out)

    def show() -> None:
        percent = f"{100 * estimate.confidence:g} %"
        table = Table(title=f"acceptance vector at temperature {args.temperature:g}")
        for column in ("child", "probability", f"{percent} interval", "visited", "accepted"):
            table.add_column(column, justify="right")
        for rank, value in enumerate(estimate.vector):
            table.add_row(
                str(rank),
                f"{value:.4f}",
                f"{estimate.lower[rank]:.4f} to {estimate.upper[rank]:.4f}",
                str(estimate.visited_by_rank[rank]),
                str(estimate.accepted_by_rank[rank]),
            )
        terminal.table(table)

    terminal.result(json.loads(estimate.to_json()), show)
    return 0
