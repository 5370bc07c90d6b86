"""Lint, type check and test the installed package: the whole gate in one command.

Runs `ruff check`, `ruff format --check`, `mypy` on the package's source and then pytest against the package that is
installed beside the running Python, not against the source tree. Without a CUDA device Triton's interpreter runs the
Triton kernels, unless --no-interpreter is given. A failed lint step does not stop the tests; the exit code is non-zero
if anything failed, and pytest's closing line is the last line of the output.

    python python_tests/run.py                         everything, as CI does
    python python_tests/run.py --no-lint -k chain  pytest only, with pytest's own arguments behind ours
    python python_tests/run.py --lint-only             ruff and mypy only
    python python_tests/run.py --vllm quick            engines of vLLM with trees, a few of them; --vllm alone: all
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTALL = 'pip install -c constraints.txt ".[test]"'

# A small machine: one thread of arithmetic per test process, and threads that sleep while they wait. The hub is never
# asked for anything: every model of the suite is made or shipped.
QUIET_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "PYTHONSAFEPATH": "1",
}

# What starts engines of vLLM; the quick part is in the first folder.
ENGINE_TESTS = ("python_tests/vllm_engine", "python_tests/test_pages.py::test_the_code_on_serving_runs")

# Drops the empty entry that `-c` puts first on older Pythons, where it would let the source tree hide the package.
PYTEST = "import sys; sys.path[:] = [entry for entry in sys.path if entry]; import pytest; sys.exit(pytest.main())"


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into our options and pytest's."""
    parser = argparse.ArgumentParser(
        prog="python python_tests/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other arguments go to pytest; test paths are relative to the repository.",
    )
    parser.add_argument(
        "-n",
        "--workers",
        default=str(max(1, min(4, os.cpu_count() or 1))),
        help="number of pytest processes, each with one BLAS thread; 0 runs in one process (default here: %(default)s)",
    )
    lint = parser.add_mutually_exclusive_group()
    lint.add_argument("--no-lint", action="store_true", help="skip ruff and mypy")
    lint.add_argument("--lint-only", action="store_true", help="stop after ruff and mypy")
    parser.add_argument(
        "--no-interpreter",
        action="store_true",
        help="skip the Triton kernels where there is no CUDA device, instead of interpreting them",
    )
    parser.add_argument(
        "--vllm",
        nargs="?",
        choices=("quick", "all"),
        const="all",
        help="test the plugin in engines of vLLM instead, nothing else: in the Python that SEQUOIA_VLLM_PYTHON names, "
        "or in an environment that is made under build/",
    )
    return parser.parse_known_args(arguments)


def installed_package() -> Path:
    """Return the folder of the installed package, or exit with the command that installs it."""
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (ROOT, ROOT / "python_tests")]
    sys.path += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    spec = importlib.util.find_spec("sequoia_kernels")
    if spec is None or spec.origin is None:
        sys.exit(f"sequoia_kernels is not installed for {sys.executable}; run: {INSTALL}")
    return Path(spec.origin).parent


def check_up_to_date(package: Path) -> None:
    """Exit if the installed package is not the one of this source tree: a stale install tests the wrong code."""
    source = ROOT / "sequoia_kernels"
    if package.samefile(source):
        return
    names = {path.relative_to(source) for path in source.rglob("*.py")}
    names |= {path.relative_to(package) for path in package.rglob("*.py")}
    stale = sorted(
        str(name)
        for name in names
        if not ((source / name).is_file() and (package / name).is_file())
        or not filecmp.cmp(source / name, package / name, shallow=False)
    )
    if stale:
        shown = ", ".join(stale[:5]) + (", ..." if len(stale) > 5 else "")
        sys.exit(f"the installed sequoia_kernels at {package} differs from this tree in {shown}; run: {INSTALL}")


def has_cuda_device() -> bool:
    """Tell whether torch sees a CUDA device, without importing it here."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def interpreter_obstacle() -> str | None:
    """Return why triton's interpreter cannot run here, None where it can."""
    try:
        triton, numpy = (
            tuple(map(int, re.findall(r"\d+", importlib.metadata.version(name))[:2])) for name in ("triton", "numpy")
        )
    except importlib.metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed"
    # before 3.7 it makes Python integers of arrays with one dimension, which numpy no longer allows
    if triton < (3, 7) and numpy >= (2, 4):
        return "triton before 3.7 interprets kernels with numpy before 2.4 only"
    return None


def run_lint() -> list[str]:
    """Run the linters on the source tree and return the commands that failed."""
    failed = []
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        text = " ".join(command)
        print(f"$ {text}", flush=True)
        if subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode != 0:
            failed.append(text)
    return failed


def run_engines(part: str, pytest_arguments: list[str]) -> int:
    """Test the plugin in engines of vLLM, one after the other, and return pytest's exit code."""
    from vllm_environment import NAME, python_with_vllm

    environment = {**QUIET_ENVIRONMENT, **os.environ, NAME: str(python_with_vllm())}
    package = installed_package()
    check_up_to_date(package)
    tests = pytest_arguments
    if not any((ROOT / argument.split("::")[0]).exists() for argument in pytest_arguments):
        tests = [*pytest_arguments, *ENGINE_TESTS[: 1 if part == "quick" else None]]
    print(f"$ pytest, testing {package} in vLLM of {environment[NAME]}", flush=True)
    command = [sys.executable, "-c", PYTEST, "--engines", part, *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """Run the gate and return the exit code."""
    options, pytest_arguments = parse_arguments(sys.argv[1:])
    if options.vllm is not None:
        return run_engines(options.vllm, pytest_arguments)
    failed = [] if options.no_lint else run_lint()
    if options.lint_only:
        print("failed: " + ", ".join(failed) if failed else "lint passed")
        return 1 if failed else 0

    package = installed_package()
    check_up_to_date(package)
    if failed:
        print("failed, see above: " + ", ".join(failed), flush=True)
    command = [sys.executable, "-c", PYTEST, *pytest_arguments]
    if options.workers != "0":
        command += ["-n", options.workers]
    # What is set in the caller's environment stays as it is.
    environment = {**QUIET_ENVIRONMENT, **os.environ}
    if not options.no_interpreter and not has_cuda_device():
        obstacle = interpreter_obstacle()
        if obstacle is None:
            environment.setdefault("TRITON_INTERPRET", "1")
        else:
            print(f"the Triton kernels are not interpreted: {obstacle}", flush=True)
    print(f"$ pytest, testing {package}", flush=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        while process.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):  # pytest gets Ctrl-C, too, and sums up before it ends
                process.wait()
    return process.returncode or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
