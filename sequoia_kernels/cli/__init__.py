"""The command line: demo, generate, acceptance, profile, plan, shape, cache, doctor, a module each.

Results go to standard output, progress and logs to standard error, so that `--json` output can be piped. Exit status:
0 done, 1 the work failed, 2 a bad argument or file, 130 interrupted. Files are written whole or not at all.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from sequoia_kernels.cli import acceptance, cache, demo, doctor, generate, plan, profile, shape
from sequoia_kernels.cli.terminal import BadUsage, Terminal
from sequoia_kernels.documents import check_writable
from sequoia_kernels.version import __version__

__all__ = ["COMMANDS", "command_parser", "main"]

COMMANDS = (demo, generate, acceptance, profile, plan, shape, cache, doctor)  # in the order of --help


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = command_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # what it has no characters for must not end the work
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, stream=sys.stderr, format="%(message)s"
    )
    terminal = Terminal(getattr(args, "json", False), args.quiet)
    try:
        for option in ("out", "svg", "html", "records_out"):
            path = getattr(args, option, None)
            if path is not None:
                check_writable(path)  # before minutes of work
        return args.run(args, terminal)
    except KeyboardInterrupt:
        terminal.note("interrupted; nothing was left half-written")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BadUsage, ValueError, TypeError, OSError) as error:
        if args.traceback:
            raise
        terminal.problem(f"sequoia-kernels {args.command}: {error}")
        return 2
    except RuntimeError as error:
        if args.traceback:
            raise
        terminal.problem(f"sequoia-kernels {args.command}: {error}")
        return 1


def command_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line, all commands in it."""
    parser = argparse.ArgumentParser(
        prog="sequoia-kernels",
        description="Lossless tree speculative decoding with a tree chosen for this machine.",
        epilog="Start with `sequoia-kernels demo`. Every command explains itself with --help.",
    )
    parser.add_argument("--version", action="version", version=f"sequoia-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
