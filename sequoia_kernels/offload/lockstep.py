"""Several forwards of one model, layer by layer side by side: the order that needs every layer's weights only once.

A model's forward runs through all layers before it returns, so chunks of a prompt fed one after the other stream the
weights once a chunk. Here every chunk's forward runs in a thread of its own, and only one of them at a time: when it
reaches the next streamed layer it hands over to the next chunk, and goes on when all chunks have come that far. Each
chunk computes what it would alone, in the same order relative to the chunks before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from sequoia_kernels.offload.threads import Task

__all__ = ["Lockstep"]

Result = TypeVar("Result")


class _Aborted(Exception):
    """The forwards are given up."""


class Lockstep:
    """Runs functions in turns. `barrier`, called inside one of them, lets each of the others come that far first."""

    def __init__(self) -> None:
        self._member = threading.local()
        self._round: _Round[Any] | None = None

    @property
    def inside(self) -> bool:
        """Whether the calling thread is one of those that take turns."""
        return getattr(self._member, "barrier", None) is not None

    @property
    def idle(self) -> bool:
        """Whether no function runs."""
        return self._round is None

    def barrier(self) -> None:
        """Hand over to the next member and return at this one's next turn."""
        self._member.barrier()

    def run(self, functions: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
        """Run all functions, in this order of turns, and return their results; all call `barrier` equally often.

        They use the current stream of `device`, as the caller does. The first error that one of them raises is raised
        here; the others are abandoned at their next turn. So they are where the caller is interrupted.
        """
        self.end()
        turns = self._round = _Round(functions, device, self._member)
        try:
            turns.task.start()
            turns.task.wait()
        finally:
            self.end()
        return turns.results()

    def end(self) -> None:
        """Give up what an interrupted `run` has left, and return when nobody is inside a function any more."""
        if self._round is not None:
            self._round.aborted = True
            self._round.task.end()
            self._round = None


class _Round(Generic[Result]):
    """One run. Nothing but its own threads, which no interrupt reaches, uses its condition."""

    def __init__(
        self, functions: Sequence[Callable[[], Result]], device: torch.device, member: threading.local
    ) -> None:
        self.aborted = False  # set by anybody, seen at the next turn
        self.task = Task(self._run_all, "sequoia-chunk-0")
        self._functions, self._member = functions, member
        self._condition = threading.Condition()
        self._turn = 0
        self._waiting = list(range(len(functions)))  # members that are not done, in order
        self._results: dict[int, Result] = {}
        self._errors: list[BaseException] = []
        # Gradient and inference modes and the current stream belong to a thread.
        self._inference = torch.is_inference_mode_enabled()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def results(self) -> list[Result]:
        """Return what the functions have returned, or raise what one of them has raised."""
        for error in (*self._errors, self.task.error):
            if error is not None:
                raise error
        return [self._results[index] for index in range(len(self._functions))]

    def _run_all(self) -> None:
        threads: list[threading.Thread] = []
        try:
            for index in self._waiting[1:]:
                name = f"sequoia-chunk-{index}"
                thread = threading.Thread(target=self._run_one, args=(index,), name=name, daemon=True)
                thread.start()
                threads.append(thread)
        except BaseException:
            self.aborted = True
            raise
        finally:
            self._run_one(0)
            for thread in threads:
                thread.join()

    def _run_one(self, index: int) -> None:
        self._member.barrier = partial(self._barrier, index)
        try:
            with torch.inference_mode(self._inference), torch.no_grad(), torch.cuda.stream(self._stream):
                with self._condition:
                    self._wait_for_turn(index)
                self._results[index] = self._functions[index]()
        except _Aborted:
            pass
        except BaseException as error:
            self._errors.append(error)
            self.aborted = True
        finally:
            with self._condition:
                self._pass_on(index)
                self._waiting.remove(index)

    def _barrier(self, index: int) -> None:
        with self._condition:
            self._pass_on(index)
            self._wait_for_turn(index)

    def _wait_for_turn(self, index: int) -> None:
        self._condition.wait_for(lambda: self.aborted or self._turn == index)
        if self.aborted:
            raise _Aborted

    def _pass_on(self, index: int) -> None:
        """Give the turn to the next member that is not done; the caller holds the condition."""
        place = self._waiting.index(index)
        self._turn = self._waiting[(place + 1) % len(self._waiting)]
        self._condition.notify_all()
