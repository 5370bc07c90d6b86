"""The one main and the one set of options of all benchmarks: what is measured is the script's, the rest is here.

A script measures in a function and calls it through a `Script`, which is its main::

    def run(bench: Run) -> None:
        bench.document["results"] = measure(bench.device, bench.options.rounds)

    main = Script(__spec__, run, __doc__, shared(device="auto", rounds=3)).main

The document that is written begins with the bench's name, the command that repeats it, the commit and the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from bench.common.machine import command_line, commit, environment, pick_device
from sequoia_kernels.documents import write_text

Option = tuple[str, dict[str, Any]]  # what `ArgumentParser.add_argument` takes


SHARED: dict[str, dict[str, Any]] = {
    "device": {"choices": ("auto", "cpu", "cuda"), "help": "default %(default)s"},
    "threads": {"type": int, "help": "CPU threads (default: torch's choice)"},
    "quick": {"action": "store_true", "help": "few small cases, a few seconds: does it work?"},
    "seconds": {"type": float, "help": "time for everything: begin nothing that would take longer"},
    "dtype": {"choices": ("float32", "bfloat16", "float16"), "help": "of all models (default %(default)s)"},
    "temperatures": {"type": float, "nargs": "+", "help": "default %(default)s"},
    "prompts": {"type": int, "help": "timed prompts (default %(default)s)"},
    "calibration-prompts": {"type": int, "help": "other prompts, for the acceptance vector (default %(default)s)"},
    "prompt-tokens": {"type": int, "help": "tokens of a prompt (default %(default)s)"},
    "new-tokens": {"type": int, "help": "tokens decoded behind a prompt (default %(default)s)"},
    "rounds": {"type": int, "help": "times that everything is timed (default %(default)s)"},
    "profile-seconds": {"type": float, "help": "time for the hardware profile (default %(default)s)"},
    "prompts-file": {"type": Path, "help": "prompts, two empty lines between them"},
}


def option(name: str, **settings: Any) -> Option:
    """One option; settings replace those of `SHARED`, where it is among them."""
    return name, SHARED.get(name.removeprefix("--"), {}) | settings


def shared(**defaults: Any) -> list[Option]:
    """Options that several scripts have, by name, with this script's defaults."""
    return [option("--" + name.replace("_", "-"), default=default) for name, default in defaults.items()]


@dataclass
class Run:
    """One run of a script."""

    options: argparse.Namespace  # what was asked for
    device: torch.device
    document: dict[str, Any]  # what will be written; begun with what every document has
    markdown: Callable[[dict[str, Any]], str] | None
    began: float = field(default_factory=time.perf_counter)

    def tell(self, what: str) -> None:
        """Say on the terminal what is being done, and since when the run goes on."""
        print(f"  {time.perf_counter() - self.began:6.1f} s  {what}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """Write what is known so far, so that it stays whatever ends the run; the tables beside it."""
        if self.options.json:
            write_json(self.options.json, self.document)
            if self.markdown is not None:
                write_text(self.options.json.with_suffix(".md"), self.markdown(self.document).rstrip("\n") + "\n")


@dataclass(frozen=True)
class Script:
    """A benchmark's command line."""

    spec: ModuleSpec | None  # of its module
    measure: Callable[[Run], int | None]  # fills the run's document; returns the exit status, None for 0
    description: str | None  # the first line is the help's
    options: Sequence[Option] = ()  # beside --json
    quick: Mapping[str, Any] = field(default_factory=dict)  # defaults of options that --quick changes
    markdown: Callable[[dict[str, Any]], str] | None = None  # gives the tables that are written beside a document
    check: Callable[[argparse.Namespace], str | None] = lambda options: None  # what is wrong with the options

    def __post_init__(self) -> None:
        if self.spec is None:
            raise SystemExit("run it as a module from the top of the repository: python -m bench.<room>.<script>")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=(self.description or "").split("\n")[0])
        parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here, tables and plots beside")
        for name, settings in self.options:
            parser.add_argument(name, **settings)
        options = parser.parse_args(arguments)
        if getattr(options, "quick", False):  # less of everything that was not asked for by itself
            parser.set_defaults(**self.quick)
            options = parser.parse_args(arguments)
        problem = self.check(options)
        if problem is not None:
            parser.error(problem)
        return options

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Parse, measure and write. Returns the exit status."""
        options = self.parse(arguments)
        if getattr(options, "threads", None):
            torch.set_num_threads(options.threads)
        device = pick_device(getattr(options, "device", "cpu"))
        assert self.spec is not None
        document = {
            "bench": self.spec.name.rpartition(".")[2].removeprefix("bench_"),
            "command": command_line(self.spec.name, arguments),
            "commit": commit(),
            "environment": environment(device),
        }
        run = Run(options, device, document, self.markdown)
        with without_own_measurements(), ending_on_sigterm():
            status = self.measure(run)
        run.save()
        return status or 0


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Where SIGTERM comes, leave by SystemExit, so that what was started ends, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def without_own_measurements() -> Iterator[None]:
    """What the user's own runs have measured is neither read nor changed."""
    before = os.environ.get("SEQUOIA_CACHE")
    os.environ["SEQUOIA_CACHE"] = "0"
    try:
        yield
    finally:
        del os.environ["SEQUOIA_CACHE"]
        os.environ.update({} if before is None else {"SEQUOIA_CACHE": before})


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document whole or not at all; folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")
