"""A runtime in a process of its own: threads that one keeps spinning, and libraries that do not get along, stay apart.

Requests and answers are lines of JSON; what a runtime prints goes to a log beside its converted weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench.common.machine import ROOT
from bench.common.runtimes.base import Pair, Request, Runtime, runtime_class, use_threads
from sequoia_kernels.errors import BackendUnavailableError


class RuntimeFailedError(RuntimeError):
    """A runtime's process ended, or told of an error."""


class RuntimeProcess:
    """The side that asks. Raises `BackendUnavailableError` with the reason where the runtime cannot run here."""

    def __init__(self, name: str, pair: Pair, threads: int, folder: Path, timeout: float = 1800.0) -> None:
        self.name, self.timeout = name, timeout
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        variables.pop("PYTHONSAFEPATH", None)
        command = [sys.executable, "-m", "bench.common.runtimes.process", name, str(threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            places = {"target": str(pair.target), "draft": pair.draft and str(pair.draft)}
            opened = self._ask("open", pair=pair._asdict() | places, threads=threads, folder=str(folder))
        except BaseException:
            self.close()
            raise
        self.facts: dict[str, Any] = opened["facts"]
        self.tuned: bool = opened["tuned"]
        self._modes: dict[int, list[str]] = {}

    def modes(self, batch_size: int) -> list[str]:
        """What it can do with so many requests."""
        if batch_size not in self._modes:
            self._modes[batch_size] = self._ask("modes", batch_size=batch_size)["modes"]
        return self._modes[batch_size]

    def prepare(self, request: Request, seconds: float | None) -> dict[str, Any]:
        """See `Runtime.prepare`."""
        return self._ask("prepare", request=request._asdict(), seconds=seconds)["facts"]

    def decode(self, request: Request) -> tuple[float, list[list[int]]]:
        """Seconds that decoding took there, and the tokens."""
        answer = self._ask("decode", request=request._asdict())
        return answer["seconds"], answer["tokens"]

    def sample(self, request: Request, count: int) -> list[list[int]]:
        """Decode the same prompt again and again, with seeds that follow the request's."""
        return self._ask("sample", request=request._asdict(), count=count)["tokens"]

    def _ask(self, what: str, **fields: Any) -> dict[str, Any]:
        watchdog = threading.Timer(self.timeout, self.process.kill)
        watchdog.start()
        try:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps({"do": what, **fields}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            status = self.process.wait()
            raise RuntimeFailedError(f"{self.name}: ended with status {status} at {what!r}; see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            raise BackendUnavailableError(answer["unavailable"])
        if "error" in answer:
            raise RuntimeFailedError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def serve(name: str, lines: Any, write: Any) -> None:
    """The side that answers."""
    runtime: Runtime | None = None
    for line in lines:
        asked = json.loads(line)
        try:
            if asked["do"] == "open":
                found = runtime_class(name)
                pair = asked["pair"] | {"target": Path(asked["pair"]["target"])}
                pair["draft"] = pair["draft"] and Path(pair["draft"])
                runtime = found(Pair(**pair), asked["threads"], Path(asked["folder"]))
                answer: dict[str, Any] = {"facts": runtime.facts(), "tuned": runtime.tuned}
            else:
                assert runtime is not None, "open comes first"
                answer = _answer(runtime, asked)
        except BackendUnavailableError as error:
            answer = {"unavailable": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        write(json.dumps(answer) + "\n")


def _answer(runtime: Runtime, asked: dict[str, Any]) -> dict[str, Any]:
    what = asked["do"]
    if what == "modes":
        return {"modes": runtime.modes(asked["batch_size"])}
    request = Request(**asked["request"])
    if what == "prepare":
        return {"facts": runtime.prepare(request, asked["seconds"])}
    if what == "sample":
        seeds = range(request.seed, request.seed + asked["count"])
        return {"tokens": [runtime.decode(request._replace(seed=seed))[0] for seed in seeds]}
    started = time.perf_counter()
    tokens = runtime.decode(request)
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def main(name: str, threads: int) -> None:
    """Serve on standard input and output; what libraries print goes to standard error."""
    use_threads(threads)
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        serve(name, sys.stdin, answers.write)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
