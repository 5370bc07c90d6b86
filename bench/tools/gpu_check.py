"""Everything that needs a GPU, in one command: tests on the device, compute-sanitizer, benchmarks.

    python -m bench.tools.gpu_check --out results --minutes 10

The stages are told in docs/gpu.md, the ones that tell most first. Each has a limit of its own, and one that fails does
not stop the next; one that the time does not reach for is left out and named. Written are OUT/gpu_check.json,
OUT/logs/<stage>.log, OUT/logs/failures.log (every failure of a test, as it happens) and what the benchmarks write. Exit
status: 0 every stage passed, 1 one failed or ran out of time, 2 there is no CUDA device, 3 none failed but one was
skipped or left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common.machine import ROOT, command_line, commit, device_folder, environment
from bench.common.script import ending_on_sigterm, write_json

SANITIZER_FOUND = 97  # exit status that compute-sanitizer is told to give for a finding
SANITIZE = (sys.executable, "-m", "bench.tools.sanitize")
ONE_ALLOCATION_A_TENSOR = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

TESTS = (
    *("python_tests/ops", "python_tests/gpu"),
    *("python_tests/models/test_fused.py", "python_tests/models/test_few_rows.py"),
)
FAR_OFFSETS = "python_tests/gpu/test_far_offsets.py"  # 20 GiB a test: in one process, with nothing beside it
MORE_TESTS = (
    *("python_tests/test_lossless.py", "python_tests/test_known_defects.py", "python_tests/test_cuda_graphs.py"),
    *("python_tests/decoding", "python_tests/models", "python_tests/measure", "python_tests/test_examples.py"),
)
ON_THE_DEVICE = "not reference-cpu and not sdpa-cpu and not host-cpu"  # a machine without one runs these, too

WORKERS = 16  # test processes that the stages' seconds are told for
PATIENCE = 2.0  # a stage's limit, in units of the time that it is given
WIND_DOWN_SECONDS = 20.0  # from the interrupt to being killed: xdist gives its workers 10 s before it sums up


class Short(NamedTuple):
    """What a stage becomes where the time is not enough for the whole plan."""

    seconds: float
    words: tuple[str, ...]  # behind its command


class Stage(NamedTuple):
    """One stage. In its command MINUTES and SECONDS stand for the time that it is given, LIMIT_MINUTES for its end."""

    name: str
    seconds: float  # about what it takes on an H100 beside 16 cores
    command: list[str]
    variables: Mapping[str, str] = {}
    short: Short | None = None
    skip: str | None = None


class Share(NamedTuple):
    """What a stage gets of the time that is left."""

    words: tuple[str, ...]  # of its short form
    seconds: float  # to be used
    limit_seconds: float  # when it is ended
    left_out: str | None  # why it is not begun


class Outcome(NamedTuple):
    name: str
    status: str  # passed, failed, out of time, skipped, left out
    seconds: float
    limit_seconds: float
    detail: str
    command: str
    log: str


def sanitizer_stage(tool: str, seconds: float) -> Stage:
    """compute-sanitizer on the script that runs every kernel once."""
    program = shutil.which("compute-sanitizer") or _toolkit_program("compute-sanitizer")
    command = [
        *(program or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)),
        *("--target-processes", "all", *SANITIZE),
    ]
    skip = None if program else "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
    return Stage(tool, seconds, command, ONE_ALLOCATION_A_TENSOR, skip=skip)


def _toolkit_program(name: str) -> str | None:
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [Path(folder, "bin", name) for folder in folders if folder]
    return next((str(path) for path in candidates if path.is_file()), None)


def test_stage(name: str, seconds: float, failures: Path, workers: int, *arguments: str) -> Stage:
    """Tests on the device. Failures are written as they happen, and a process whose device is lost is replaced."""
    command = [sys.executable, str(ROOT / "python_tests" / "run.py"), "--no-lint", "-n", str(workers)]
    command += ["-p", "support.failure_log", "--failure-log", str(failures), "-k", ON_THE_DEVICE, *arguments]
    # where the plugin is found; pytest reads its own `pythonpath` only later
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "python_tests")]
    return Stage(name, seconds, command, {"PYTHONPATH": os.pathsep.join(paths)})


def bench_stage(name: str, seconds: float, results: Path, bench: str, *words: str, short: Short | None = None) -> Stage:
    """One benchmark by itself."""
    command = [sys.executable, "-m", f"bench.systems.bench_{bench}", "--device", "cuda", *words]
    return Stage(name, seconds, [*command, "--json", str(results / f"{name}.json")], {}, short)


def paper_stage(row: str, seconds: float, results: Path) -> Stage:
    """One row of the paper; transformers' loops, which would take most of the time, are left out."""
    short = Short(0.6 * seconds, ("--prompts", "2", "--new-tokens", "256", "--profile-seconds", "8"))
    return bench_stage(
        f"paper_systems_{row}", seconds, results, "paper_systems", "--rows", row, "--no-rivals", short=short
    )


def suite_stage(name: str, seconds: float, out: Path, minutes: str, short: Short | None = None) -> Stage:
    """A suite of benchmarks, which share out the time; those that would not fill it are told the limit instead."""
    command = [str(ROOT / "bench" / "run.py"), "--suite", name, "--device", "cuda", "--out", str(out)]
    return Stage(name, seconds, [sys.executable, *command, "--minutes", minutes], {}, short)


def stages(out: Path, results: Path, workers: int) -> list[Stage]:
    """All stages, the ones that tell most first. `results` is the folder of this device's documents."""
    doctor = "import sys; from sequoia_kernels.cli import main; sys.exit(main(['doctor']))"
    failures = out / "logs" / "failures.log"
    slower = max(1.0, WORKERS / workers)
    return [
        Stage("doctor", 10, [sys.executable, "-c", doctor]),
        Stage("kernels", 20 * slower, [*SANITIZE, "--processes", str(workers)], ONE_ALLOCATION_A_TENSOR),
        test_stage("tests", 120 * slower, failures, workers, f"--ignore={FAR_OFFSETS}", *TESTS),
        test_stage("far_offsets", 40, failures, 1, FAR_OFFSETS),
        bench_stage("captured_loop", 50, results, "captured_loop"),
        paper_stage("7B", 125, results),
        paper_stage("13B", 135, results),
        paper_stage("33B", 185, results),
        suite_stage("ops", 240, out, "MINUTES", Short(130, ("--quick", "--minutes", "LIMIT_MINUTES"))),
        sanitizer_stage("memcheck", 130),
        sanitizer_stage("racecheck", 140),
        bench_stage("few_rows", 90, results, "few_rows", short=Short(45, ("--quick",))),
        test_stage("more_tests", 200 * slower, failures, workers, *MORE_TESTS),
        bench_stage("demo_pair", 90, results, "demo_pair", short=Short(30, ("--quick",))),
        bench_stage("offload", 500, results, "offload", "--seconds", "SECONDS", short=Short(240, ("--quick",))),
        suite_stage("planner", 300, out, "LIMIT_MINUTES"),
    ]


PLANS: dict[str, Callable[[Stage], bool]] = {
    "first-hour": lambda stage: True,
    "times": lambda stage: any("bench_" in word or word == "--suite" for word in stage.command),
}


def share_of(stage: Stage, left: float, planned: float) -> Share:
    """What a stage gets: what it takes, and more where more is left than everything from here on takes.

    Args:
        stage: the stage.
        left: seconds until the end.
        planned: seconds that this stage and all behind it take.
    """
    seconds, words = stage.seconds, ()
    if stage.short is not None and left < planned:
        seconds, words = stage.short
    if left < seconds:
        return Share(words, 0.0, 0.0, f"{max(left, 0.0):.0f} s left, needs about {seconds:.0f}")
    seconds = min(left, seconds * max(1.0, left / planned))
    return Share(words, seconds, min(left, PATIENCE * seconds), None)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a stage: kernels are compiled, whatever the caller had set."""
    removed = ("TRITON_INTERPRET", "PYTHONSAFEPATH")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def run_stage(stage: Stage, share: Share, folder: Path) -> Outcome:
    """Run one stage in a process group of its own, which is ended when the limit is over."""
    log = folder / f"{stage.name}.log"
    limit = share.limit_seconds
    wind_down = min(WIND_DOWN_SECONDS, limit / 4)
    # What fills its time leaves some of it for starting and writing.
    given = {"MINUTES": f"{0.9 * share.seconds / 60:.2f}", "SECONDS": f"{0.9 * share.seconds:.0f}"}
    given["LIMIT_MINUTES"] = f"{0.9 * (limit - wind_down) / 60:.2f}"
    command = [given.get(word, word) for word in (*stage.command, *share.words)]
    text = " ".join(command)
    if stage.skip is not None:
        return Outcome(stage.name, "skipped", 0.0, limit, stage.skip, text, "")
    if share.left_out is not None:
        return Outcome(stage.name, "left out", 0.0, limit, share.left_out, text, "")
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        try:
            with interrupts_heard():
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=child_environment(stage.variables),
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            return Outcome(stage.name, "failed", 0.0, limit, str(error), text, str(log))
        try:
            code = process.wait(timeout=limit - wind_down)
            status = "passed" if code == 0 else "failed"
            detail = last_line(log)
            if code == SANITIZER_FOUND:
                detail = f"the sanitizer found something: {detail}"
            elif code != 0:
                detail = f"exit status {code}: {detail}"
        except subprocess.TimeoutExpired:
            end_group(process, wind_down)
            status, detail = "out of time", last_line(log)
        except BaseException:  # Ctrl-C reaches this process only: the stage has a session of its own
            end_group(process, wind_down)
            raise
    return Outcome(stage.name, status, time.perf_counter() - started, limit, detail, text, str(log))


@contextlib.contextmanager
def interrupts_heard() -> Iterator[None]:
    """Let what is started in here hear Ctrl-C: a shell's background jobs ignore it, and so does all that they start."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a new program begins without
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_group(process: subprocess.Popen[bytes], wind_down: float) -> None:
    """End a stage and whatever it started: as Ctrl-C does, upon which pytest still sums up, then by force."""
    for number, seconds in ((signal.SIGINT, wind_down), (signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=seconds)
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
        seconds = sum(other.seconds for other in planned[index:] if other.skip is None)
        share = share_of(stage, deadline - time.perf_counter(), max(seconds, stage.seconds))
        outcomes.append(run_stage(stage, share, folder))
        on_outcome(outcomes[-1])
    return outcomes


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0, 1 or 3, as in the module's docstring."""
    if any(outcome.status in ("failed", "out of time") for outcome in outcomes):
        return 1
    return 3 if any(outcome.status in ("skipped", "left out") for outcome in outcomes) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything")
    parser.add_argument("--plan", choices=tuple(PLANS), default="first-hour", help="everything, or benchmarks only")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages only, whatever the plan")
    parser.add_argument(
        "--workers", type=int, default=min(WORKERS, os.cpu_count() or 1), help="test processes, which share the GPU"
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
    planned = stages(out, out / device_folder("cuda"), options.workers)
    known = [stage.name for stage in planned]
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        parser.error(f"--only takes {', '.join(known)}, got {', '.join(unknown)}")
    chosen = PLANS[options.plan] if not options.only else lambda stage: stage.name in options.only
    planned = [stage for stage in planned if chosen(stage)]
    if any("--failure-log" in stage.command for stage in planned):
        (out / "logs" / "failures.log").unlink(missing_ok=True)  # it is appended to
    document: dict[str, Any] = {
        "command": command_line("bench.tools.gpu_check", arguments),
        "commit": commit(),
        "environment": environment("cuda"),
        "stages": [],
    }

    def on_outcome(outcome: Outcome) -> None:
        print(f"{outcome.name:<18} {outcome.status:<12} {outcome.seconds:6.1f} s  {outcome.detail}", flush=True)
        document["stages"].append(outcome._asdict())
        write_json(out / "gpu_check.json", document)  # whatever ends the run early, what is known stays

    outcomes = run_all(planned, options.minutes, out, on_outcome)
    status = exit_status(outcomes)
    write_json(out / "gpu_check.json", {**document, "passed": status == 0})
    print(f"{out / 'gpu_check.json'}: {'all passed' if status == 0 else 'not all passed'}")
    return status


if __name__ == "__main__":
    with ending_on_sigterm():
        sys.exit(main())
