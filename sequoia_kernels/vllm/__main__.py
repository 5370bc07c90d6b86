"""`python -m sequoia_kernels.vllm --draft D`: the flags that a vLLM server decodes trees with, ready for a shell.

flags=$(python -m sequoia_kernels.vllm --draft D) && eval "vllm serve T $flags"

mapfile -t flags < <(python -m sequoia_kernels.vllm --draft D --lines)
vllm serve T "${flags[@]}"
"""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from sequoia_kernels.tree import rule_names
from sequoia_kernels.vllm import engine_args, server_flags

__all__ = ["main"]

DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(engine_args).parameters.items()}


def flag_parser() -> argparse.ArgumentParser:
    """Give the parser: an option for each argument of `engine_args`, and how they are printed."""
    parser = argparse.ArgumentParser(
        prog="python -m sequoia_kernels.vllm",
        description="Print the flags that a vLLM server decodes token trees with; see docs/serving.md.",
        epilog="They go behind `python -m vllm.entrypoints.openai.api_server --model T` or `vllm serve T`.",
    )

    def add(name: str, text: str, **settings: Any) -> None:
        default = DEFAULTS[name.removeprefix("--").replace("-", "_")]
        told = "" if default is None or default is False or settings.get("required") else f" (default: {default})"
        parser.add_argument(name, help=text + told, **({"default": default} | settings))

    add("--draft", "folder or hub id of a smaller model of the same tokenizer", required=True)
    add(
        "--tree",
        "auto chooses by load among trees and none; the file of one tree or plan is taken whatever the load; among the "
        "trees of several files, and none, it is chosen by load",
        nargs="+",
        metavar="FILE",
    )
    add("--max-nodes", "nodes of the largest tree of auto", type=int)
    add("--rule", "verification rule", choices=rule_names())
    add(
        "--draft-dtype",
        "dtype to load the draft in, instead of the target's",
        choices=("float32", "bfloat16", "float16"),
    )
    add("--draft-cache-tokens", "tokens that the draft's pages hold, instead of as many as vLLM's cache", type=int)
    add("--profile-seconds", "how long steps are timed at start, at most, where a tree is chosen by load", type=float)
    add("--check-ranks", "compare what several ranks would have decided, in every step", action="store_true")
    parser.add_argument("--lines", action="store_true", help="one word a line and unquoted, for mapfile -t")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the flags. Returns the exit status: 1 where no vLLM can take them, 2 for a bad argument."""
    parser = flag_parser()
    settings = vars(parser.parse_args(argv))
    lines = settings.pop("lines")
    if settings["tree"] is not DEFAULTS["tree"] and len(settings["tree"]) == 1:
        (settings["tree"],) = settings["tree"]
    try:
        flags = server_flags(settings.pop("draft"), **settings)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except (TypeError, ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write("\n".join(flags) + "\n" if lines else shlex.join(flags) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
