"""Work between setting something up and putting it back, which an interrupt at any line must not come between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["guarded", "release_if_owned"]

Result = TypeVar("Result")


def guarded(enter: Callable[[], Any], body: Callable[[], Result], leave: Callable[[], Any]) -> Result:
    """Run `body` between `enter` and `leave`, and `leave` to its end although an interrupt arrives at any line.

    Args:
        enter: sets up; may be left half done by an exception.
        body: the work.
        leave: puts back whatever of `enter` was done, and nothing else, however often it is called.

    Returns:
        What `body` returns.

    Notes:
        A `with` statement would not do: a signal's exception may be raised behind the last line of `__enter__` that
        counts, or before the first one of `__exit__`. What interrupts `leave` here makes it run once more.
    """
    try:
        try:
            enter()
            return body()
        finally:
            leave()
    except BaseException:
        leave()
        raise


def release_if_owned(lock: Any) -> None:
    """Release a `threading.RLock` if this thread holds it. The lock itself knows, at whatever line it was taken."""
    if lock._is_owned():
        lock.release()
