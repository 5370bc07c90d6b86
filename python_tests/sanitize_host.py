"""Run the C++ module's tests on it built with address and undefined-behaviour sanitizers.

    python python_tests/sanitize_host.py [pytest arguments]
    python python_tests/sanitize_host.py --threads

Builds ``sequoia_kernels._host`` with ``SEQUOIA_SANITIZE=1`` into ``build/`` beside the installed one, which stays as it
is, and runs the tests of the "host" backend and of the native forward against it, with all of torch's and NumPy's
memory under the address sanitizer's eyes. A read or write outside of a tensor, also one that does no harm, and every
overflow, shift or conversion that C++ leaves undefined ends the run with a report.

Before that, and with ``--threads`` alone, the team of threads behind native forwards runs under the thread sanitizer,
in a program of its own (``support/team_threads.cpp``): Python and torch would be strangers to it.

Needs gcc and setarch (util-linux) on Linux, and what builds the package without isolation: cmake, ninja, pybind11,
setuptools.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LIBRARY = ROOT / "build" / "sanitized-lib"
LIMIT_S = 900
"""of the build, and of the tests"""


def runtime(compiler: list[str], name: str) -> str:
    """Path of a library of the compiler's, which must be in the process before any other."""
    found = subprocess.run(
        [*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
    if not os.path.isabs(found):
        raise SystemExit(
            f"sanitize_host.py: {shlex.join(compiler)} has no {name}; install it, or set CXX to a gcc that has"
        )
    return os.path.realpath(found)


def check_team(compiler: list[str]) -> None:
    """Run the team of threads under the thread sanitizer; a report, or a team that waits for ever, ends this."""
    program = ROOT / "build" / "team_threads"
    program.parent.mkdir(exist_ok=True)
    sources = [ROOT / "csrc" / "host" / "forward" / "team.cpp", TESTS / "support" / "team_threads.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler, *flags, *map(str, sources), "-ldl", "-o", str(program)], check=True, timeout=LIMIT_S)
    # The sanitizer's memory has a fixed place, which a loader that lays things out at random may have taken.
    subprocess.run(["setarch", "-R", str(program)], check=True, timeout=LIMIT_S)


def main() -> int:
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if "--threads" in sys.argv[1:] or not sys.argv[1:]:
        check_team(compiler)
    if "--threads" in sys.argv[1:]:
        return 0
    preloaded = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    build = os.environ | {"SEQUOIA_SANITIZE": "1", "SEQUOIA_CUDA": "0", "CXX": shlex.join(compiler)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(LIBRARY)]
    subprocess.run(command, cwd=ROOT, env=build, check=True, timeout=LIMIT_S)
    module = next(LIBRARY.glob("sequoia_kernels/_host.*"))
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        # Python never frees all it has; other libraries' names may collide; a huge request is a MemoryError.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SEQUOIA_SANITIZED_HOST": str(module),
    }
    # The sanitizer reports a crash itself. Tests that start compilers or other interpreters are none of its business.
    chosen = sys.argv[1:]
    if not chosen:
        natives = [
            *("models/test_native.py", "models/test_native_instruction_sets.py", "models/test_native_quantised.py"),
            *("models/test_paged_cache.py", "models/test_few_rows_linear.py"),
            *("decoding/test_paged_steps.py", "decoding/test_in_place.py"),
            *("drafts/test_shaping.py", "drafts/test_eagle3.py", "drafts/test_dflash.py"),
        ]
        chosen = ["python_tests/ops", *(f"python_tests/{name}" for name in natives), "-n", "2", "-m", "not slow"]
        chosen += [
            "-k",
            "host or (test_native and not compiled) or test_in_place or (test_shaping and cpp) "
            "or in_one_call or few_rows or (test_paged and not modules)",
        ]
    arguments = [
        "-q",
        "--capture=sys",
        "-p",
        "no:faulthandler",
        "-p",
        "no:cacheprovider",
        "-p",
        "support.sanitized_host",
        *chosen,
    ]
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, check=False, timeout=LIMIT_S
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
