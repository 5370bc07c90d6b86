"""Interrupts at every place where one could arrive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType, ModuleType
from typing import Any


def interrupt_everywhere(
    work: Callable[[], Any],
    check: Callable[[], Any],
    modules: Iterable[ModuleType],
    event: str = "line",
    stride: int = 1,
) -> int:
    """Run `work` again and again, a KeyboardInterrupt later each time, and `check` behind every run.

    Args:
        work: what is interrupted; what it does must be the same each time.
        check: what must hold whether it was interrupted or not.
        modules: in whose code the interrupts arrive.
        event: "line" or "opcode", before every one of which an interrupt may arrive.
        stride: how many places later it arrives each time.

    Returns:
        The number of places, rounded up to the stride.
    """
    files = {module.__file__ for module in modules}
    places = 0
    while True:
        remaining = places

        def trace(frame: FrameType, kind: str, argument: Any) -> Any:
            nonlocal remaining
            if frame.f_code.co_filename not in files:
                return None
            frame.f_trace_opcodes = event == "opcode"
            if kind == event:
                remaining -= 1
                if remaining < 0:
                    raise KeyboardInterrupt  # which ends the tracing as well
            return trace

        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = event == "opcode"  # Python 3.12 looks for a frame that has it here only
        sys.settrace(trace)
        try:
            work()
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = False
        finally:
            sys.settrace(before)
        check()
        if not interrupted:
            return places
        places += stride
