"""Engines of vLLM in processes of their own, started and driven from tests."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from support.processes import launched

import sequoia_kernels

__all__ = ["PAIR", "Engine", "EngineError", "end_group", "engine", "engine_environment", "vllm_python"]

PACKAGE = Path(sequoia_kernels.__file__).parent
TESTS = Path(__file__).resolve().parents[2]
PAIR = PACKAGE / "demo" / "pair"

# One thread, which waits in peace; no reports to anybody. Engines run in the process that drives them. Requests without
# a seed draw by their names, which get nothing random: a test that passes once passes again.
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LIMIT_SECONDS = 1800.0  # ends what hangs; machines may be slow, or busy


def vllm_python() -> str:
    """The Python that has vLLM; `run.py --vllm` says which."""
    return os.environ["SEQUOIA_VLLM_PYTHON"]


def engine_environment(folder: Path, **more: str) -> dict[str, str]:
    """An environment in which vLLM's Python finds the package under test, the tests, and nothing else of this one.

    Args:
        folder: where what the processes keep may lie.
        more: further variables.
    """
    site = folder / "site"
    if not site.exists():
        site.mkdir()
        (site / PACKAGE.name).symlink_to(PACKAGE)
        metadata = _metadata_folder()
        (site / metadata.name).symlink_to(metadata)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST", "OMP_"))}
    paths = os.pathsep.join([str(site), str(TESTS)])
    return {**kept, **_QUIET, "PYTHONPATH": paths, "VLLM_CACHE_ROOT": str(folder / "vllm"), **more}


def _metadata_folder() -> Path:
    """The folder of the installed package's metadata, by which vLLM finds the plugin."""
    files = importlib.metadata.distribution("sequoia-kernels")
    folder = Path(str(files._path))  # type: ignore[attr-defined]  # nothing public says where it lies
    plugin = "vllm.general_plugins" in (folder / "entry_points.txt").read_text()
    assert plugin, f"{folder} is of an older installation: install the package again"
    return folder


class EngineError(Exception):
    """What went wrong in an engine's process: the error's type and message."""


class Engine:
    """A process with an engine.

    Attributes:
        log: file of what it prints.
    """

    def __init__(self, folder: Path, name: str, **environment: str) -> None:
        self.log = folder / f"{name}.log"
        commands, write = os.pipe()
        read, answers = os.pipe()
        command = [vllm_python(), "-m", "support.engines.process", str(commands), str(answers)]
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                launched(command), env=engine_environment(folder, **environment), cwd=folder, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, pass_fds=(commands, answers), start_new_session=True,
            )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._commands, self._answers = open(write, "w"), open(read)  # noqa: SIM115  # they live as long as the process

    def call(self, do: str, *arguments: Any, **settings: Any) -> Any:
        """Send a command and wait for its result.

        Raises:
            EngineError: the command failed, or the process ended, or took too long.
        """
        text = ""
        with contextlib.suppress(BrokenPipeError):
            self._commands.write(json.dumps({"do": do, "arguments": arguments, **settings}) + "\n")
            self._commands.flush()
            if not select.select([self._answers], [], [], LIMIT_SECONDS)[0]:
                raise EngineError(f"{do} took longer than {LIMIT_SECONDS:.0f} s:\n{self.log_tail()}")
            text = self._answers.readline()
        if not text:
            raise EngineError(f"the engine's process has ended:\n{self.log_tail()}")
        answer = json.loads(text)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["result"]

    def log_tail(self, num_characters: int = 5000) -> str:
        """The last that it printed."""
        return self.log.read_text(errors="replace")[-num_characters:]

    def close(self) -> None:
        """End the process and what it has started."""
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        end_group(self._process)
        self._answers.close()


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a group, and the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def engine(
    folder: Path, name: str, model: str | Path, options: dict[str, Any], *, environment: Any = None, **trees: Any
):
    """Start an engine for the body of a with statement.

    Args:
        folder: for its log and what it keeps.
        name: of the log.
        model: the target's folder.
        options: arguments of vLLM's `LLM`.
        environment: further variables.
        trees: arguments of `engine_args`, of which `draft` makes it an engine of trees.
    """
    process = Engine(folder, name, **(environment or {}))
    try:
        process.call("start", str(model), options, **trees)
        yield process
    finally:
        process.close()
