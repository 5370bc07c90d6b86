"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.terminal import BadUsage

__all__ = [
    "DTYPES",
    "add_command",
    "add_models",
    "add_prompts",
    "add_sampling",
    "load_tree",
    "positive",
    "positives",
    "sampling_settings",
    "separator",
]


DTYPES = ("float32", "bfloat16", "float16")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def add_command(
    commands: Any, name: str, run: Callable[..., int], summary: str, example: str
) -> argparse.ArgumentParser:
    """Add a subcommand with the options that every one has. The example is a whole command line."""
    parser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"Example: {example}", formatter_class=_HelpFormatter
    )
    parser.set_defaults(run=run)
    general = parser.add_argument_group("general")
    general.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    general.add_argument("--quiet", action="store_true", help="no progress")
    general.add_argument("--verbose", action="store_true", help="log backend choices and measurements")
    general.add_argument("--traceback", action="store_true", help="show Python's traceback of an error")
    return parser


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add what `pair.load_pair` reads."""
    models = parser.add_argument_group("models (the demo pair when none is given)")
    models.add_argument("--target", help="folder or hub id of the target")
    models.add_argument(
        "--draft",
        help="folder or hub id of the draft: a smaller model, a published head or assistant for the target; or lookup "
        "(copies from the text), layers:8 (the target's own first layers) or mtp (its multi-token prediction modules)",
    )
    models.add_argument(
        "--dtype", choices=DTYPES,
        help="dtype to compute in (default: the one that each model is stored in; float32 for the demo pair)",
    )  # fmt: skip
    models.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one")
    models.add_argument("--threads", type=positive, help="CPU threads")
    models.add_argument(
        "--offload", action="store_true", help="stream the target's layers from host memory (see docs/offloading.md)"
    )
    models.add_argument(
        "--device-memory", metavar="SIZE",
        help="device memory for an offloaded target, such as 20GiB (default: 90%% of what is free)",
    )  # fmt: skip
    models.add_argument(
        "--host-memory", choices=("packed", "mapped"), default="packed",
        help="keep an offloaded target in memory, or stream it from its files",
    )  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add what `sampling_settings` reads."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sampling.add_argument("--top-k", type=int, help="keep the k most probable tokens")
    sampling.add_argument("--top-p", type=float, help="keep this much probability")
    sampling.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts")


def add_prompts_file(prompts: Any, help: str, num_prompts: int) -> None:
    """Add what `pair.read_prompts` reads."""
    prompts.add_argument("--prompts-file", type=Path, help=help)
    prompts.add_argument(
        "--separator", type=separator, default=r"\n\n\n",
        help=r"what stands between two prompts of the file; \n, \r, \t and \\ are line feed, return, tab and backslash",
    )  # fmt: skip
    prompts.add_argument("--num-prompts", type=positive, default=num_prompts, help="read at most so many")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add prompts to generate from for measuring."""
    prompts = parser.add_argument_group("prompts")
    add_prompts_file(
        prompts, "text file with prompts (the demo pair's default: held-out files of the standard library)", 8
    )
    prompts.add_argument("--prompt-tokens", type=positive, default=128, help="longer prompts are cut")
    prompts.add_argument("--new-tokens", type=positive, default=96, help="tokens generated for each prompt")


def positive(text: str) -> int:
    """Read an argument that is an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positives(text: str) -> list[int]:
    """Read an argument that is a comma-separated list of them."""
    return [positive(part) for part in text.split(",")]


def separator(text: str) -> str:
    """Read an argument that separates texts, its escapes resolved."""
    if not text:
        raise argparse.ArgumentTypeError("must hold at least one character, got none")
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t"}.get(match[1], "\\"), text)


def setting(text: str) -> tuple[str, Any]:
    """Read an argument NAME=VALUE, a generation setting; the value is JSON, or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Give the sampling arguments as those of `generate`."""
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}


def load_tree(path: Path) -> Any:
    """Load a tree, a shaped tree or a plan from its file, one that the ops accept; BadUsage where it is none."""
    from sequoia_kernels.planner import TreePlan, read_tree
    from sequoia_kernels.tree import MAX_STEP_ROWS

    try:
        tree = read_tree(path)
    except ValueError as error:
        raise BadUsage(f"--tree {path} must be a tree or plan file: {error}") from None
    if isinstance(tree, TreePlan):
        return tree
    if tree.num_nodes > MAX_STEP_ROWS:
        raise BadUsage(f"--tree {path} must have at most {MAX_STEP_ROWS} nodes, got {tree.num_nodes}")
    return tree
