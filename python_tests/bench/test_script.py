"""What all benchmarks share."""

from __future__ import annotations

import sys
from pathlib import Path

from support.processes import python_environment, run_process

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal
from bench.common.script import ending_on_sigterm

before = signal.getsignal(signal.SIGTERM)
with ending_on_sigterm():
    pass
assert signal.getsignal(signal.SIGTERM) is before
try:
    with ending_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
finally:
    print("what was started is ended", flush=True)
"""


def test_sigterm_leaves_by_an_exception():
    ended = run_process([sys.executable, "-c", PROGRAM], cwd=ROOT, env=python_environment(), check=False)
    assert (ended.returncode, ended.stdout) == (143, "what was started is ended\n"), ended.stderr
