"""Run compiled kernels on a CPU, in the PTX emulator (support/ptx).

    python python_tests/emulate_ptx.py --quick       # small calls of every op, one op's tests: what CI runs
    python python_tests/emulate_ptx.py               # the ops' own Triton tests too, in several orders
    python python_tests/emulate_ptx.py --only sm_90 verify_tree     # of these, whose names have all these words
    python python_tests/emulate_ptx.py --mutations   # are barriers, fences and waits missed?

Triton and nvcc compile the kernels for devices that need not be there; every access is then checked: bounds, alignment,
bytes that nobody wrote, races in a block and between blocks, barriers, copies and matrix products in flight. Other
arguments go to pytest, for instance `--maxfail=1`.

Each file of tests is run by itself, for a device in an order. What came of it is told when it ends, with its output
where it failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from run import PYTEST, QUIET_ENVIRONMENT

TESTS = Path(__file__).resolve().parent
LIMIT_S = 4 * 3600
NO_TESTS = 5  # pytest's exit code where a file has none for us

CAPABILITIES = (80, 90)
ORDERS = (
    ("--ptx-order=random", "--ptx-interleave=4"),
    ("--ptx-order=reversed", "--ptx-warps=last"),
    ("--ptx-order=serial", "--ptx-warps=random", "--ptx-approximate"),
)


class Slice(NamedTuple):
    """A part that is run by itself."""

    name: str
    command: list[str]


class Outcome(NamedTuple):
    """What came of a slice."""

    name: str
    status: int
    last_line: str
    seconds: float

    def __str__(self) -> str:
        return f"{'ok    ' if self.status == 0 else 'FAILED'} {self.seconds:6.0f} s  {self.name}: {self.last_line}"


def pytest_command(*arguments: str) -> list[str]:
    """A command that runs tests in a process whose kernels are compiled."""
    return [sys.executable, "-c", PYTEST, "-q", "-p", "no:cacheprovider", *arguments]


def calls(file: str, arguments: list[str]) -> Slice:
    """Tests that make calls on every device."""
    return Slice(file, pytest_command(*arguments, str(TESTS / "ptx" / file)))


def op_tests(capability: int, order: tuple[str, ...], file: str, arguments: list[str]) -> Slice:
    """A file of the ops' own tests of the Triton backend."""
    device = f"--ptx-capability={capability}"
    chosen = ["-k", "triton-cpu", *arguments, str(TESTS / "ops" / file)]
    name = " ".join([f"sm_{capability}", *(option.removeprefix("--ptx-") for option in order), file])
    return Slice(name, pytest_command("-p", "support.ptx.plugin", device, *order, *chosen))


def slices(quick: bool, arguments: list[str]) -> list[Slice]:
    """What is run."""
    small = calls("test_compiled_ops.py", arguments)
    if quick:
        return [small, op_tests(90, ORDERS[0], "test_compact_kv_cache_.py", arguments)]
    files = [path.name for path in sorted((TESTS / "ops").glob("test_*.py"))]
    return [
        small,
        calls("test_native_forwards.py", arguments),
        *(op_tests(device, order, file, arguments) for device in CAPABILITIES for order in ORDERS for file in files),
    ]


def run_slices(chosen: list[Slice], jobs: int, environment: dict[str, str]) -> list[Outcome]:
    """Run them, several at a time, and tell what came of each when it has ended."""

    def run(one: Slice) -> Outcome:
        began = time.monotonic()
        done = subprocess.run(
            one.command, cwd=TESTS.parent, env=environment, check=False, timeout=LIMIT_S, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines() or ["no output"]
        if done.returncode == NO_TESTS:
            return Outcome(one.name, 0, "no tests", 0.0)
        outcome = Outcome(one.name, done.returncode, lines[-1].strip("= "), time.monotonic() - began)
        print(f"{done.stdout}\n{outcome}" if outcome.status else outcome, flush=True)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, chosen))


def main() -> int:
    """Run them all; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true", help="small calls only")
    chosen.add_argument("--mutations", action="store_true", help="report which planted faults are noticed")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="slices whose names have all these words")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="slices at a time (default here: %(default)s)"
    )
    options, arguments = parser.parse_known_args()
    environment = {**QUIET_ENVIRONMENT, **os.environ}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    if options.mutations:
        command = [sys.executable, "-m", "support.ptx.campaign", *arguments]
        return subprocess.run(command, cwd=TESTS.parent, env=environment, check=False, timeout=LIMIT_S).returncode
    began = time.monotonic()
    wanted = [one for one in slices(options.quick, arguments) if all(word in one.name for word in options.only)]
    outcomes = run_slices(wanted, options.jobs, environment)
    failed = [outcome for outcome in outcomes if outcome.status != 0]
    print(f"{len(outcomes)} slices, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    for outcome in failed:
        print(outcome)
    return int(bool(failed) or not outcomes)


if __name__ == "__main__":
    sys.exit(main())
