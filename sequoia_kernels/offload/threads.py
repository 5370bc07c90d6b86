"""Threads that Ctrl-C cannot break.

An interrupt is raised in the main thread, between any two steps of Python code, and also inside of `threading`, whose
primitives are written in Python: it may leave their locks locked, and then another thread waits for good. What the main
thread does here is made of single steps of C code that happen as a whole or not at all, and may be repeated; everything
else happens in threads of their own, where no interrupt arrives.
"""

from __future__ import annotations

import _thread
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Signal", "Task", "run_shielded"]


class Signal:
    """Something that happens once, and that threads wait for; `is_set` when it has happened."""

    def __init__(self) -> None:
        self.is_set = False
        self._wake_ups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """Let it happen."""
        self.is_set = True
        self._wake_ups.put(None)

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when it has happened, or the time is over."""
        if not self.is_set:
            with suppress(queue.Empty):
                self._wake_ups.get(timeout=timeout_s)
        if self.is_set:
            self._wake_ups.put(None)  # for whoever else waits


class Task:
    """A function that runs in a thread of its own, once. Its methods may be interrupted anywhere, and called again."""

    def __init__(self, function: Callable[[], None], name: str) -> None:
        self.error: BaseException | None = None  # what the function has raised, or why there is no thread for it
        self._function: Callable[[], None] | None = function  # until it has run, so that nothing is kept alive
        self._name = name
        self._launched, self._ended = Signal(), Signal()
        self._first: dict[str, object] = {}  # `setdefault` decides in one step who comes first
        self._thread: threading.Thread | None = None

    @property
    def begun(self) -> bool:
        """Whether the function runs or has run."""
        return self._thread is not None

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread, unless it was started or has been ended; without one, `error` says so."""
        # Not by `Thread.start`, which waits under a lock for the new thread to lock it as well.
        try:
            _thread.start_new_thread(self._launch, ())
        except RuntimeError as error:  # the system has no more threads
            self._fail(error)
        else:
            self._launched.wait()

    def wait(self) -> None:
        """Wait until the function of a started task has returned and its thread is gone, unless this is that thread."""
        if self._thread is not threading.current_thread():
            self._ended.wait()
            if self._thread is not None:
                self._thread.join()

    def end(self) -> None:
        """Wait as `wait`, and see that a task that has not begun never will; what interrupts that is raised then."""

        def end() -> None:
            if self._first.setdefault("first", self) is not self:
                self.wait()

        _persist(end)

    def _launch(self) -> None:
        token = object()
        if self._first.setdefault("first", token) is token:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._thread = None
                self._fail(error)
        self._launched.set()

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self._ended.set()

    def _run(self) -> None:
        function, self._function = self._function, None
        assert function is not None
        try:
            function()
        except BaseException as error:
            self.error = error
        finally:
            del function
            self._ended.set()


def run_shielded(function: Callable[[], None], name: str) -> None:
    """Run a function to its end in a thread that no interrupt reaches; what interrupted the wait is raised then."""
    task = Task(function, name)

    def run() -> None:
        task.start()
        task.wait()

    _persist(run)
    error, task.error = task.error, None  # the thread that started it may know the task for a moment longer
    if not task.begun:
        function()
    elif error is not None:
        raise error


def _persist(step: Callable[[], None]) -> None:
    """Repeat a step until it comes through, then raise what has interrupted it."""
    interrupt: BaseException | None = None
    while True:
        try:
            step()
            break
        except (KeyboardInterrupt, SystemExit) as error:  # from signal handlers; the step itself raises neither
            interrupt = error
    if interrupt is not None:
        raise interrupt
