"""Several forwards of one model, layer by layer side by side: the order that needs every layer's weights only once.

A model's forward runs through all layers before it returns, so chunks of a prompt fed one after the other stream the
weights once a chunk. Here every chunk's forward runs in a thread of its own, and only one of them at a time: when it
reaches the next streamed layer it hands over to the next chunk, and goes on when all chunks have come that far. Each
chunk computes what it would alone, in the same order relative to the chunks before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

__all__ = ["Lockstep"]

Result = TypeVar("Result")


class _Aborted(Exception):
    """Another forward failed."""


class Lockstep:
    """Runs functions in turns. `barrier`, called inside one of them, lets each of the others come that far first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._turn = 0
        self._waiting: list[int] = []  # members that are not done, in order
        self._aborted = False
        self._member = threading.local()

    @property
    def inside(self) -> bool:
        """Whether the calling thread is one of those that take turns."""
        return getattr(self._member, "index", None) is not None

    def barrier(self) -> None:
        """Hand over to the next member and return at this one's next turn."""
        index: int = self._member.index
        with self._condition:
            self._pass_on(index)
            self._wait_for_turn(index)

    def run(self, functions: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
        """Run all functions in lockstep.

        Args:
            functions: what to run, in the order of turns; all of them call `barrier` equally often.
            device: the device whose current stream the functions use, as the caller does.

        Returns:
            Their results.

        Raises:
            BaseException: the first error that one of them raised; the others are abandoned at their next turn.
        """
        results: dict[int, Result] = {}
        errors: list[BaseException] = []
        inference = torch.is_inference_mode_enabled()
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._turn, self._waiting, self._aborted = 0, list(range(len(functions))), False

        def member(index: int) -> None:
            self._member.index = index
            try:
                # Gradient and inference modes and the current stream belong to a thread.
                with torch.inference_mode(inference), torch.no_grad(), torch.cuda.stream(stream):
                    with self._condition:
                        self._wait_for_turn(index)
                    results[index] = functions[index]()
            except _Aborted:
                pass
            except BaseException as error:
                errors.append(error)
                self._abort()
            finally:
                with self._condition:
                    if index in self._waiting:
                        self._pass_on(index)
                        self._waiting.remove(index)
                    self._condition.notify_all()

        threads = [
            threading.Thread(target=member, args=(index,), name=f"sequoia-chunk-{index}", daemon=True)
            for index in range(len(functions))
        ]
        try:
            for thread in threads:
                thread.start()
            self._wait_for_all()
        except BaseException:  # Ctrl-C arrives in the main thread
            self._abort()
            with self._condition:
                self._waiting = [index for index in self._waiting if threads[index].ident is not None]
            self._wait_for_all()  # nobody may be inside the model when its memory is freed
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if errors:
            raise errors[0]
        return [results[index] for index in range(len(functions))]

    def _wait_for_all(self) -> None:
        """Wait until every member is done. Not by `join`: interrupted, it may take a running thread for ended."""
        with self._condition:
            self._condition.wait_for(lambda: not self._waiting)

    def _wait_for_turn(self, index: int) -> None:
        self._condition.wait_for(lambda: self._aborted or self._turn == index)
        if self._aborted:
            raise _Aborted

    def _pass_on(self, index: int) -> None:
        """Give the turn to the next member that is not done; the caller holds the condition."""
        place = self._waiting.index(index)
        self._turn = self._waiting[(place + 1) % len(self._waiting)]
        self._condition.notify_all()

    def _abort(self) -> None:
        with self._condition:
            self._aborted = True
            self._condition.notify_all()
