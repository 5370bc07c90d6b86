"""Processes that tests start end: by their limit, with what they have started, and with the test."""

from __future__ import annotations

import ast
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import python_environment, run_process

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")

SLEEP = "import time; time.sleep(3600)"


def test_no_test_starts_a_process_without_a_limit_or_a_parent() -> None:
    """All go through `run_process`, or begin a `Popen` with what `launched` gives; those wait with limits."""
    folder = Path(__file__).parent
    inside = [path for path in folder.glob("*/**/*.py") if path.name != "processes.py"]
    for path in inside + [path for path in folder.glob("test_*.py") if path != Path(__file__)]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not ast.unparse(call.func).startswith("subprocess."):
                continue
            words = ast.unparse(call.args[0]) if call.args else ""
            is_bound = ast.unparse(call.func) == "subprocess.Popen" and words.startswith("launched(")
            assert is_bound or ast.unparse(call.func).endswith("Expired"), f"{path}:{call.lineno}"


def test_the_status_and_the_output() -> None:
    result = run_process([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"], check=False)
    assert (result.returncode, result.stdout, result.stderr) == (1, "out\n", "err\n")
    with pytest.raises(AssertionError, match=r"ended with 1:\n\nthe reason"):
        run_process([sys.executable, "-c", "import sys; sys.exit('the reason')"])


def ended(read_end: int) -> bool:
    """Whether nobody holds the other end of a pipe any more, or will not within a minute."""
    readable, _, _ = select.select([read_end], [], [], 60.0)
    return bool(readable) and os.read(read_end, 1) == b""


@pytest.fixture
def pipe():
    ends = os.pipe()
    os.set_inheritable(ends[1], True)
    yield ends
    os.close(ends[0])


def test_the_limit_ends_what_was_started_as_well(pipe, monkeypatch) -> None:
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], close_fds=False); {SLEEP}"
    plain = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **options: plain(*words, pass_fds=pipe[1:], **options))
    with pytest.raises(subprocess.TimeoutExpired):
        run_process([sys.executable, "-c", code], timeout=3.0)
    os.close(pipe[1])
    assert ended(pipe[0])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent has ended")
def test_a_process_ends_with_the_test_that_started_it(pipe) -> None:
    code = (
        "import subprocess, sys; from support import processes; plain = subprocess.Popen\n"
        f"subprocess.Popen = lambda *words, **options: plain(*words, pass_fds=[{pipe[1]}], **options)\n"
        f"processes.run_process([sys.executable, '-c', 'import os, sys; os.write({pipe[1]}, b\"x\"); {SLEEP}'])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=python_environment(), pass_fds=pipe[1:])
    os.close(pipe[1])
    try:
        assert os.read(pipe[0], 1) == b"x"  # the process runs
    finally:
        os.kill(parent.pid, signal.SIGKILL)  # no clean-up of Python's own
        parent.wait()
    assert ended(pipe[0])
