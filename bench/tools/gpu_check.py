"""Everything that needs a GPU, in one command: tests on the device, compute-sanitizer, benchmarks.

    python -m bench.tools.gpu_check --out results --minutes 10

The stages are told in docs/gpu.md; each has a limit of its own, and one that fails does not stop the next. Written are
OUT/gpu_check.json, OUT/logs/<stage>.log and what the benchmarks write. Exit status: 0 every stage passed, 1 one failed
or ran out of time, 2 there is no CUDA device, 3 none failed but one was skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common.machine import ROOT, command_line, commit, environment
from bench.common.script import write_json

SANITIZER_FOUND = 97  # exit status that compute-sanitizer is told to give for a finding
SANITIZE = (sys.executable, "-m", "bench.tools.sanitize")
ONE_ALLOCATION_A_TENSOR = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
TEST_PATHS = (
    *("python_tests/gpu", "python_tests/ops", "python_tests/test_known_defects.py", "python_tests/test_lossless.py"),
    "python_tests/test_cuda_graphs.py",
    *("python_tests/decoding", "python_tests/models", "python_tests/measure"),
)


class Stage(NamedTuple):
    """One stage. Of the time that is left it gets its weight's share."""

    name: str
    weight: float
    command: list[str]
    variables: dict[str, str]
    skip: str | None = None


class Outcome(NamedTuple):
    name: str
    status: str  # passed, failed, out of time, skipped
    seconds: float
    limit_seconds: float
    detail: str
    command: str
    log: str


def sanitizer_stage(tool: str, weight: float) -> Stage:
    """compute-sanitizer on the script that runs every kernel once."""
    program = shutil.which("compute-sanitizer") or _toolkit_program("compute-sanitizer")
    command = [
        *(program or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)),
        *("--target-processes", "all", *SANITIZE),
    ]
    skip = None if program else "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
    return Stage(tool, weight, command, ONE_ALLOCATION_A_TENSOR, skip)


def _toolkit_program(name: str) -> str | None:
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [Path(folder, "bin", name) for folder in folders if folder]
    return next((str(path) for path in candidates if path.is_file()), None)


def stages(out: Path, workers: int) -> list[Stage]:
    """All stages in order."""
    doctor = "import sys; from sequoia_kernels.cli import main; sys.exit(main(['doctor']))"
    tests = [str(ROOT / "python_tests" / "run.py"), "--no-lint", "-n", str(workers), *TEST_PATHS]
    bench = [str(ROOT / "bench" / "run.py"), "--suite", "all", "--device", "cuda", "--out", str(out)]
    return [
        Stage("doctor", 0.3, [sys.executable, "-c", doctor], {}),
        Stage("tests", 4.0, [sys.executable, *tests], {}),
        Stage("kernels", 1.0, [*SANITIZE, "--processes", str(workers)], ONE_ALLOCATION_A_TENSOR),
        sanitizer_stage("memcheck", 1.5),
        sanitizer_stage("racecheck", 1.5),
        Stage("bench", 4.0, [sys.executable, *bench, "--minutes", "MINUTES"], {}),
    ]


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a stage: kernels are compiled, whatever the caller had set."""
    removed = ("TRITON_INTERPRET", "PYTHONSAFEPATH")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def run_stage(stage: Stage, limit_seconds: float, folder: Path) -> Outcome:
    """Run one stage in a process group of its own, which is ended when the limit is over."""
    log = folder / f"{stage.name}.log"
    # The benchmarks share out what they have, and leave some of it for starting and writing.
    command = [f"{0.9 * limit_seconds / 60:.2f}" if word == "MINUTES" else word for word in stage.command]
    text = " ".join(command)
    if stage.skip is not None:
        return Outcome(stage.name, "skipped", 0.0, limit_seconds, stage.skip, text, "")
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=child_environment(stage.variables),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(stage.name, "failed", 0.0, limit_seconds, str(error), text, str(log))
        try:
            code = process.wait(timeout=limit_seconds)
            status = "passed" if code == 0 else "failed"
            detail = last_line(log)
            if code == SANITIZER_FOUND:
                detail = f"the sanitizer found something: {detail}"
            elif code != 0:
                detail = f"exit status {code}: {detail}"
        except subprocess.TimeoutExpired:
            end_group(process)
            status, detail = "out of time", last_line(log)
        except BaseException:  # Ctrl-C reaches this process only: the stage has a session of its own
            end_group(process)
            raise
    return Outcome(stage.name, status, time.perf_counter() - started, limit_seconds, detail, text, str(log))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a stage and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_line(log: Path) -> str:
    """The end of a log, where pytest and the sanitizer write their verdict."""
    lines = [line.strip(" =") for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def run_all(
    planned: Sequence[Stage], minutes: float, out: Path, on_outcome: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Run the stages within the time; what one leaves over goes to those behind it."""
    folder = out / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + 60 * minutes
    outcomes = []
    for index, stage in enumerate(planned):
        weights = sum(other.weight for other in planned[index:] if other.skip is None)
        left = max(deadline - time.perf_counter(), 1.0)
        outcomes.append(run_stage(stage, left * stage.weight / max(weights, stage.weight), folder))
        on_outcome(outcomes[-1])
    return outcomes


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0, 1 or 3, as in the module's docstring."""
    if any(outcome.status in ("failed", "out of time") for outcome in outcomes):
        return 1
    return 3 if any(outcome.status == "skipped" for outcome in outcomes) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages only")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="test processes, which share the GPU"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        print(
            f"gpu_check: torch sees no CUDA device on this machine (torch {torch.__version__} {built}); "
            "nothing was run. bench/run.py --device cpu and python_tests/run.py need none.",
            file=sys.stderr,
        )
        return 2
    out = options.out.resolve()
    planned = stages(out, options.workers)
    known = [stage.name for stage in planned]
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        parser.error(f"--only takes {', '.join(known)}, got {', '.join(unknown)}")
    planned = [stage for stage in planned if not options.only or stage.name in options.only]
    document: dict[str, Any] = {
        "command": command_line("bench.tools.gpu_check", arguments),
        "commit": commit(),
        "environment": environment("cuda"),
        "stages": [],
    }

    def on_outcome(outcome: Outcome) -> None:
        print(f"{outcome.name:<10} {outcome.status:<12} {outcome.seconds:6.1f} s  {outcome.detail}", flush=True)
        document["stages"].append(outcome._asdict())
        write_json(out / "gpu_check.json", document)  # whatever ends the run early, what is known stays

    outcomes = run_all(planned, options.minutes, out, on_outcome)
    status = exit_status(outcomes)
    write_json(out / "gpu_check.json", {**document, "passed": status == 0})
    print(f"{out / 'gpu_check.json'}: {'all passed' if status == 0 else 'not all passed'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
