"""The one command for a GPU, tried without one: its order, its time, and what stays of runs that fail or are ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.bench_scripts import BENCH, gpu_check, targets
from support.processes import python_environment, run_process

AMPLE = gpu_check.Share((), 300.0, 600.0, None)


def python_stage(name, code, seconds=1.0, **more):
    return gpu_check.Stage(name, seconds, [sys.executable, "-c", code], {"A_VARIABLE": name}, **more)


# One stage, and one after the other


def test_a_failing_stage_does_not_stop_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcomes = gpu_check.run_all(
        [
            python_stage("fails", "print('a reason'); raise SystemExit(3)"),
            python_stage("finds", f"raise SystemExit({gpu_check.SANITIZER_FOUND})"),
            python_stage("absent", "", skip="no such tool"),
            python_stage("sees", "import os; print(os.environ['A_VARIABLE'], os.environ.get('TRITON_INTERPRET'))"),
        ],
        10.0,
        tmp_path,
    )
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "skipped", "passed"]
    assert outcomes[0].detail == "exit status 3: a reason"
    assert outcomes[1].detail.startswith("the sanitizer found something")
    assert outcomes[2].detail == "no such tool"
    assert outcomes[3].detail == "sees None"
    assert (tmp_path / "logs" / "sees.log").read_text() == "sees None\n"
    assert [gpu_check.exit_status(outcomes[start:]) for start in (0, 2, 3)] == [1, 3, 0]


def test_a_stage_has_its_own_limit(tmp_path):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    stage = python_stage("hangs", code + "print('begun', flush=True); time.sleep(600)")
    outcome = gpu_check.run_stage(stage, gpu_check.Share((), 1.0, 2.0, None), tmp_path)
    assert outcome.status == "out of time" and outcome.seconds < 300  # it did not wait for either
    assert gpu_check.exit_status([outcome]) == 1


def test_what_ignores_the_interrupt_is_ended_by_force(tmp_path):
    code = "import signal, time; [signal.signal(number, signal.SIG_IGN) for number in (2, 15)]; time.sleep(600)"
    outcome = gpu_check.run_stage(python_stage("stays", code), gpu_check.Share((), 2.0, 4.0, None), tmp_path)
    assert outcome.status == "out of time" and outcome.seconds < 300


def test_an_interrupted_stage_is_ended(tmp_path, monkeypatch):
    """Ctrl-C on a terminal does not reach it: it has a session of its own."""
    ended, ready = [], tmp_path / "ready"

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout == 580.0:
                while not ready.exists():  # an interpreter that still starts has an exit status of its own
                    time.sleep(0.01)
                raise KeyboardInterrupt
            ended.append(code := super().wait(timeout))
            return code

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Interrupted)
    code = f"import time; open({str(ready)!r}, 'w').close(); time.sleep(3600)"
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_stage(python_stage("hangs", code), AMPLE, tmp_path)
    assert ended and ended[0] < 0


def test_a_stage_is_told_its_time(tmp_path):
    code = "import sys; print(*sys.argv[1:])"
    command = [sys.executable, "-c", code, "MINUTES", "SECONDS"]
    stage = gpu_check.Stage("told", 1.0, command, short=gpu_check.Short(1.0, ("--quick", "LIMIT_MINUTES")))
    share = gpu_check.Share(stage.short.words, 300.0, 620.0, None)
    assert gpu_check.run_stage(stage, share, tmp_path).detail == "4.50 270 --quick 9.00"


# The plan


def test_the_stages_run_what_the_document_says(tmp_path):
    planned = {stage.name: stage for stage in gpu_check.stages(tmp_path, tmp_path / "gpu", workers=3)}
    assert list(planned) == [
        *("doctor", "kernels", "tests", "far_offsets", "captured_loop"),
        *("paper_systems_7B", "paper_systems_13B", "paper_systems_33B", "ops", "memcheck", "racecheck"),
        *("few_rows", "more_tests", "demo_pair", "offload", "planner"),
    ]
    document = (BENCH.parent / "docs" / "gpu.md").read_text()
    assert [name for name in planned if f"`{name}`" not in document] == []
    root = BENCH.parent
    for path in (*gpu_check.TESTS, *gpu_check.MORE_TESTS, gpu_check.FAR_OFFSETS):
        assert (root / path).exists()
    tests, far = planned["tests"].command, planned["far_offsets"].command
    assert "--no-lint" in tests and tests[tests.index("-n") + 1] == "3" and far[far.index("-n") + 1] == "1"
    assert f"--ignore={gpu_check.FAR_OFFSETS}" in tests and far[-1] == gpu_check.FAR_OFFSETS
    assert tests[tests.index("--failure-log") + 1] == str(tmp_path / "logs" / "failures.log")
    for tool in ("memcheck", "racecheck"):
        assert planned[tool].command[1:3] == ["--tool", tool]
        # what was compiled without the sanitizer, side by side, is what it runs: the same calls on the same tensors
        assert planned[tool].command[-3:] == planned["kernels"].command[:3]
        assert planned[tool].variables == planned["kernels"].variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert planned["kernels"].command[3:] == ["--processes", "3"]
    assert "MINUTES" in planned["ops"].command and "SECONDS" in planned["offload"].command
    times = [name for name, stage in planned.items() if gpu_check.PLANS["times"](stage)]
    assert times == [*list(planned)[4:9], list(planned)[11], *list(planned)[13:]]


@pytest.mark.parametrize("form", ["whole", "short"])
def test_every_benchmark_takes_its_stages_words(form, tmp_path):
    """Options that it does not know would show on the device only."""
    for stage in gpu_check.stages(tmp_path, tmp_path, workers=1):
        if "-m" not in stage.command or "sanitize" in " ".join(stage.command):
            continue
        words = [*stage.command[3:], *(stage.short.words if form == "short" and stage.short else ())]
        words = ["100" if word == "SECONDS" else word for word in words]
        script = __import__(stage.command[2], fromlist=["main"])
        options = script.main.__self__.parse(words)
        assert options.device == "cuda" and options.json.stem == stage.name


def simulated(minutes, takes=lambda stage: stage.seconds, workers=gpu_check.WORKERS, planned=None):
    """{stage: seconds, or why it is left out} if every stage takes what `takes` says, or is ended at its limit."""
    planned = gpu_check.stages(BENCH, BENCH, workers) if planned is None else planned
    left, shares = 60.0 * minutes, {}
    for index, stage in enumerate(planned):
        share = gpu_check.share_of(stage, left, sum(other.seconds for other in planned[index:]))
        shares[stage.name] = share.left_out or share
        if share.left_out is None:
            assert share.seconds <= share.limit_seconds <= left
            left -= min(stage.short.seconds if share.words else takes(stage), share.limit_seconds)
    assert left >= 0
    return shares


def test_ten_minutes_and_an_hour():
    left_out = {name: share for name, share in simulated(10).items() if isinstance(share, str)}
    names = [stage.name for stage in gpu_check.stages(BENCH, BENCH, 16)]
    assert set(names[: names.index("ops")]).isdisjoint(left_out)  # through the paper's rows
    assert {"more_tests", "offload", "planner"} <= set(left_out)
    assert left_out["offload"].endswith("s left, needs about 240")
    hour = simulated(60)
    assert all(isinstance(share, gpu_check.Share) and not share.words for share in hour.values())
    assert hour["offload"].seconds > 500  # and there is more than it needs


def test_a_stage_that_hangs_takes_its_limit_and_no_more():
    shares = simulated(10, lambda stage: 1e9 if stage.name == "tests" else stage.seconds)
    assert shares["tests"].limit_seconds == gpu_check.PATIENCE * 120
    assert isinstance(shares["paper_systems_7B"], gpu_check.Share)


def test_what_fits_runs_though_what_was_before_it_did_not():
    planned = [python_stage(name, "", seconds) for name, seconds in (("long", 90.0), ("brief", 30.0))]
    shares = simulated(40 / 60, planned=planned)
    assert shares["long"] == "40 s left, needs about 90"
    assert shares["brief"] == gpu_check.Share((), 40.0, 40.0, None)  # all that is left is its own


def test_a_stage_by_itself_is_given_all_the_time():
    (stage,) = [stage for stage in gpu_check.stages(BENCH, BENCH, 16) if stage.name == "ops"]
    assert gpu_check.share_of(stage, 600.0, stage.seconds) == gpu_check.Share((), 600.0, 600.0, None)
    assert gpu_check.share_of(stage, 200.0, stage.seconds) == gpu_check.Share(stage.short.words, 130.0, 200.0, None)


def test_fewer_processes_take_longer():
    seconds = {n: {stage.name: stage.seconds for stage in gpu_check.stages(BENCH, BENCH, n)} for n in (4, 16, 32)}
    assert seconds[4]["tests"] == 4 * seconds[16]["tests"] and seconds[32] == seconds[16]
    assert seconds[4]["memcheck"] == seconds[16]["memcheck"]


# The command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command's main with a stand-in for the device, and stages of its own."""
    planned = [
        python_stage("doctor", "print('well')"),
        python_stage("tests", "print('all passed')"),
        python_stage("offload", "", 1000.0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda device: {"device": {"name": "stand-in"}})
    monkeypatch.setattr(gpu_check, "device_folder", lambda device: "stand-in")
    monkeypatch.setattr(gpu_check, "stages", lambda out, results, workers: planned)

    def run(*arguments):
        status = gpu_check.main(["--out", str(tmp_path), "--minutes", "5", *arguments])
        return status, json.loads((tmp_path / "gpu_check.json").read_text())

    return run


def test_what_is_left_out_is_named(command, capsys):
    status, document = command()
    assert status == 3 and document["passed"] is False
    entry = document["stages"][-1]
    assert [stage["status"] for stage in document["stages"]] == ["passed", "passed", "left out"]
    assert entry["name"] == "offload" and entry["detail"].endswith("s left, needs about 1000")
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split()[:3] == ["offload", "left", "out"] and line.endswith(entry["detail"])


def test_stages_are_picked_by_name(command, capsys):
    status, document = command("--only", "tests")
    assert status == 0 and [stage["name"] for stage in document["stages"]] == ["tests"]
    status, document = command("--plan", "times", "--only", "doctor")
    assert status == 0 and [stage["name"] for stage in document["stages"]] == ["doctor"]
    with pytest.raises(SystemExit):
        command("--only", "everything")
    assert "--only takes doctor, tests, offload, got everything" in capsys.readouterr().err


def test_rows_that_were_timed_one_by_one_are_read_together(tmp_path):
    for row in ("7B", "13B"):
        document = {"bench": "paper_systems", "results": [{"row": row}]}
        (tmp_path / f"paper_systems_{row}.json").write_text(json.dumps(document))
    documents = targets.load_documents(tmp_path)
    assert {result["row"] for result in documents["paper_systems"]["results"]} == {"7B", "13B"}


# Failures of tests


# Tests of a package that is not there, on a device that breaks: torch is a stand-in, so that processes start quickly.
CONFTEST = """
import sys
from types import SimpleNamespace

broken = []

def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))

import pytest

@pytest.fixture
def device():
    synchronize()  # nothing works on a broken device
    return broken
"""


def folder_of_tests(folder, text):
    """A folder of tests with a configuration of its own."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_them.py").write_text(text)
    return folder / "failures.log"


def pytest_words(folder, failures, workers):
    return ["-n", str(workers), "-p", "support.failure_log", "--failure-log", str(failures), str(folder)]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_failure_is_written_with_its_traceback(tmp_path, workers):
    text = (
        "def test_wrong():\n    print('said')\n    number = 3\n    assert number == 4\n\ndef test_right():\n    pass\n"
    )
    failures = folder_of_tests(tmp_path, text)
    (tmp_path / "test_others.py").write_text("import no_such_package\n")
    environment = python_environment(PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    result = run_process([*command, *pytest_words(tmp_path, failures, workers)], env=environment, check=False)
    assert result.returncode == 1 and "1 failed, 1 passed, 1 error" in result.stdout
    written = failures.read_text()
    assert written.count("FAILED ") == 1 and "FAILED test_them.py::test_wrong (call)\n" in written
    assert "assert number == 4" in written and "said" in written
    assert written.count("NOT COLLECTED test_others.py") == 1 and "no_such_package" in written


def test_a_worker_whose_device_is_lost_is_replaced(tmp_path):
    breaks = "def test_breaks(device):\n    device.append(1)\n    assert False\n"
    uses = "".join(f"def test_uses_{index}(device):\n    pass\n" for index in range(8))
    fails = "def test_fails(device):\n    assert False\n"
    failures = folder_of_tests(tmp_path, breaks + fails + uses)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    result = run_process(
        [*command, *pytest_words(tmp_path, failures, 1)],
        env=python_environment(PYTHONDONTWRITEBYTECODE="1"),
        check=False,
    )
    assert "8 passed" in result.stdout and "test_uses" not in result.stdout.split("short test summary")[1]
    written = failures.read_text()
    assert "FAILED test_them.py::test_breaks (call)" in written and "FAILED test_them.py::test_fails (call)" in written
    lost = "THE DEVICE DOES NOT ANSWER behind test_them.py::test_breaks; the worker ends\nCUDA error: an illegal memory"
    assert written.count("DOES NOT ANSWER") == 1 and lost in written


def test_a_stage_hears_the_interrupt_that_its_parent_ignores(tmp_path):
    """As the background jobs of a shell do."""
    code = "import signal; raise SystemExit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = gpu_check.run_stage(python_stage("listens", code), AMPLE, tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == "passed"


def test_a_run_that_is_ended_keeps_its_failures(tmp_path, monkeypatch):
    """On disk as they happen; and pytest, which is interrupted first, sums up in the stage's log."""
    text = "import time\n\ndef test_wrong():\n    number = 3\n    assert number == 4\n"
    text += "".join(f"\ndef test_hangs_{index}():\n    time.sleep(600)\n" for index in range(4))
    failures = folder_of_tests(tmp_path, text)

    class EndedOnceAFailureIsWritten(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout != 580.0:
                return super().wait(timeout)
            until = time.monotonic() + timeout
            while not (failures.exists() and failures.read_text().endswith("\n\n")):
                assert self.poll() is None and time.monotonic() < until
                time.sleep(0.1)
            raise subprocess.TimeoutExpired("pytest", timeout)

    monkeypatch.setenv("PYTHONPATH", python_environment()["PYTHONPATH"])
    monkeypatch.setattr(gpu_check.subprocess, "Popen", EndedOnceAFailureIsWritten)
    stage = gpu_check.test_stage("tests", 10.0, failures, 2, "--no-interpreter", str(tmp_path))
    outcome = gpu_check.run_stage(stage, AMPLE, tmp_path)
    assert outcome.status == "out of time"
    written = failures.read_text()
    assert "FAILED test_them.py::test_wrong (call)" in written
    assert "test_them.py::test_hangs_" in written.split("INTERRUPTED while these ran")[1]
    log = (tmp_path / "tests.log").read_text()
    assert "assert number == 4" in log and "test_them.py::test_wrong" in log.split("short test summary")[1]
    assert "1 failed" in outcome.detail
