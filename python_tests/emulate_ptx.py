"""Run compiled kernels on a CPU, in the PTX emulator (support/ptx).

    python python_tests/emulate_ptx.py --quick       # small calls of every op, one op's tests: what CI runs
    python python_tests/emulate_ptx.py               # the ops' own Triton tests too, in several orders
    python python_tests/emulate_ptx.py --mutations   # are barriers, fences and waits missed?

Triton and nvcc compile the kernels for devices that need not be there; every access is then checked: bounds, alignment,
bytes that nobody wrote, races in a block and between blocks, barriers, copies and matrix products in flight. Other
arguments go to pytest, for instance `--maxfail=1`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from run import PYTEST, QUIET_ENVIRONMENT

TESTS = Path(__file__).resolve().parent
LIMIT_S = 4 * 3600

CAPABILITIES = (80, 90)
ORDERS = (
    ("--ptx-order=random", "--ptx-interleave=4"),
    ("--ptx-order=reversed", "--ptx-warps=last"),
    ("--ptx-order=serial", "--ptx-warps=random", "--ptx-approximate"),
)


def pytest_command(*arguments: str) -> list[str]:
    """A command that runs tests in a process whose kernels are compiled."""
    return [sys.executable, "-c", PYTEST, "-q", "-p", "no:cacheprovider", *arguments]


def small_calls(arguments: list[str]) -> list[str]:
    """Calls of every op, on every device."""
    return pytest_command(*arguments, str(TESTS / "ptx" / "test_compiled_ops.py"))


def op_tests(capability: int, order: tuple[str, ...], file: str, arguments: list[str]) -> list[str]:
    """The ops' own tests of the Triton backend, or one file of them."""
    device = f"--ptx-capability={capability}"
    chosen = ["-k", "triton-cpu", *arguments, str(TESTS / "ops" / file)]
    return pytest_command("-p", "support.ptx.plugin", device, *order, *chosen)


def commands(quick: bool, arguments: list[str]) -> list[list[str]]:
    """What is run, one after the other."""
    if quick:
        return [small_calls(arguments), op_tests(90, ORDERS[0], "test_compact_kv_cache_.py", arguments)]
    whole = [op_tests(capability, order, "", arguments) for capability in CAPABILITIES for order in ORDERS]
    return [small_calls(arguments), *whole]


def main() -> int:
    """Run them all; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true", help="small calls only")
    chosen.add_argument("--mutations", action="store_true", help="report which planted faults are noticed")
    options, arguments = parser.parse_known_args()
    environment = {**QUIET_ENVIRONMENT, **os.environ}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    if options.mutations:
        whole = [[sys.executable, "-m", "support.ptx.campaign"]]
    else:
        whole = commands(options.quick, arguments)
    failed = False
    for command in whole:
        print("$ python", *("..." if part == PYTEST else part for part in command[1:]), flush=True)
        status = subprocess.run(command, cwd=TESTS.parent, env=environment, check=False, timeout=LIMIT_S).returncode
        failed = failed or status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
