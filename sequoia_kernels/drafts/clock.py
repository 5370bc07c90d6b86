"""Where the time of a decoding step goes, stage by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

_NO_STAGE = nullcontext()


class StageClock:
    """Adds up wall time by stage. Only meaningful where work is synchronous; elsewhere it is switched off.

    The stages are prefill, draft, sample, target, verify, commit and host.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds: dict[str, float] = defaultdict(float)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time the body of a with statement as a stage."""
        return _Stage(self, name) if self.enabled else _NO_STAGE


class _Stage:
    __slots__ = ("clock", "name", "start")

    def __init__(self, clock: StageClock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.clock.seconds[self.name] += time.perf_counter() - self.start
