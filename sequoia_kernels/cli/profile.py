"""`profile`: measure the models and ops on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.arguments import add_command, add_models, positive, positives
from sequoia_kernels.cli.pair import load_pair, measure_pair
from sequoia_kernels.cli.terminal import BadUsage, Terminal


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "profile",
        run,
        "Measure the models and ops on this machine.",
        "sequoia-kernels profile --target T --draft D --contexts 128,1024 --out profile.json",
    )
    add_models(parser)
    parser.add_argument("--contexts", type=positives, default="128,512", help="context lengths to measure at")
    parser.add_argument("--batch-size", type=positive, default=1, help="requests decoded together")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument(
        "--microbenchmarks", action="store_true",
        help="also measure the parts of which forwards of other models can be composed (about a minute more)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", type=Path, nargs="+", metavar="CONFIG",
        help="with --microbenchmarks: the shapes of these models (config.json or folder), not a grid of common ones",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="write the profile to this JSON file")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels.drafts import LOOKUP
    from sequoia_kernels.planner import ModelFingerprint

    if args.shapes is not None and not args.microbenchmarks:
        raise BadUsage("--shapes needs --microbenchmarks")
    if args.draft == LOOKUP:
        raise BadUsage("profile needs a draft that draws its tokens, got --draft lookup")
    shapes = [ModelFingerprint.from_config(path) for path in args.shapes or ()]
    pair = load_pair(args, terminal)
    profile = measure_pair(pair, args.contexts, args.batch_size, args.quick, terminal)
    if args.microbenchmarks:
        from sequoia_kernels.measure import measure_microbenchmarks

        with terminal.progress("measuring the parts of models") as advance:
            parts = measure_microbenchmarks(
                pair.target.device, pair.target.dtype, shapes=shapes, quick=args.quick, progress=advance
            )
        profile = profile.merged(parts)
    if args.out is not None:
        profile.save(args.out)

    def show() -> None:
        terminal.out.print(str(profile.device))
        for key in profile.models:
            forwards = profile.forward_table(key, args.batch_size)
            columns = ("rows", *(f"context {context}" for context in forwards.context_lens))
            rows = [
                (str(count), *(f"{value:.2f}" for value in times))
                for count, *times in zip(forwards.node_counts, *forwards.p50_ms)
            ]
            terminal.table(columns, rows, f"{key}: forward, ms")
        if args.microbenchmarks:
            counts = ", ".join(f"{len(points)} of {op}" for op, points in parts.ops.items())
            terminal.out.print(f"parts in {str(pair.target.dtype).removeprefix('torch.')}: {counts}")

    terminal.result(profile.to_document(), show)
    return 0
