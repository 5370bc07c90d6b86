"""Start other processes from tests: with a limit, in a group that is ended as a whole, and not beyond their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import sequoia_kernels

__all__ = ["launched", "python_environment", "run_process"]

# Ends what hangs. Not a measure of how long something should take: machines may be slow, or busy.
LIMIT_SECONDS = 900.0

# Asks Linux to kill the process when its parent has gone, then becomes the command; argv: the parent's id, the command.
_LAUNCHER = """
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which stays across exec
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent has gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def python_environment(**more: str) -> dict[str, str]:
    """Return an environment in which a new Python finds the package under test and what this one finds."""
    paths = [str(Path(sequoia_kernels.__file__).parents[1]), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def launched(command: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return a command that runs another one and ends with this process, where the system can tell."""
    words = [os.fspath(word) for word in command]
    if sys.platform == "win32":
        return words
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *words]


def run_process(
    command: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdout: int | IO[Any] = subprocess.PIPE,
    check: bool = True,
    timeout: float = LIMIT_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its status and its output as text.

    Args:
        command: the program and its arguments.
        env: its environment, None for this one.
        cwd: its folder.
        stdout: where its output goes instead of into the result.
        check: fail where its status is not 0, and show its output.
        timeout: seconds after which it is killed with whatever it has started.

    Raises:
        AssertionError: with `check`, the command has failed.
        subprocess.TimeoutExpired: it took too long.
    """
    words = launched(command)
    process = subprocess.Popen(
        words, env=env, cwd=cwd, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=stdout, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException:  # the limit, or Ctrl-C
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.communicate()
        raise
    status = process.returncode
    assert not check or status == 0, f"{words[-1]} ended with {status}:\n{(output or '')[-5000:]}\n{errors[-5000:]}"
    return subprocess.CompletedProcess(list(command), status, output, errors)
