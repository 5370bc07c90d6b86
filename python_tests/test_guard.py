"""What is set up is put back, wherever an interrupt arrives."""

from __future__ import annotations

import sys
import threading

import pytest
from support.interrupts import interrupt_everywhere

from sequoia_kernels import guard


@pytest.mark.parametrize("event", ["line", "opcode"])
def test_a_lock_is_released_and_a_value_put_back(event: str) -> None:
    lock, state = threading.RLock(), {"value": 1}

    def leave() -> None:
        state["value"] = 1
        guard.release_if_owned(lock)

    def enter() -> None:
        lock.acquire()
        state["value"] = 2

    def check() -> None:
        assert state["value"] == 1
        assert not lock._is_owned()

    def work() -> None:
        guard.guarded(enter, lambda: state["value"], leave)

    assert interrupt_everywhere(work, check, [guard, sys.modules[__name__]], event) > 10


def test_errors_of_the_work_come_through() -> None:
    left: list[int] = []
    with pytest.raises(ValueError, match="of the work"):
        guard.guarded(lambda: None, lambda: int("of the work"), lambda: left.append(1))
    assert left
    assert guard.guarded(lambda: None, lambda: 7, lambda: None) == 7
