"""A link on a virtual clock: what overlaps with what is exact and repeatable."""

from __future__ import annotations

import torch

from sequoia_kernels.offload import Link
from sequoia_kernels.offload.host_weights import HostLayer


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        """Let the computation take some time."""
        self.now += seconds


class _SimulatedTransfer:
    def __init__(self, source: HostLayer, destination: torch.Tensor, start: float, end: float) -> None:
        self.source, self.destination, self.start, self.end = source, destination, start, end
        self.arrived = False


class SimulatedLink(Link):
    """A link of a given bandwidth on a virtual clock: what overlaps with what is exact and repeatable, nothing sleeps.

    The destination is filled with 0xFF when a copy is asked for (NaN in every floating-point type) and with the layer
    when it is waited for, so a scheduler that reads too early or overwrites too early computes NaN.

    Args:
        bandwidth_bytes_per_s: of the link.
        latency_s: before each copy.
        clock: the computation's clock; `wait` advances it to the end of a copy that is still running.

    Attributes:
        bytes_copied: in all.
        history: (start, end) of every copy, in seconds.
        stalled_s: how long the computation has waited.
    """

    def __init__(self, bandwidth_bytes_per_s: float, latency_s: float = 0.0, clock: VirtualClock | None = None) -> None:
        self._bandwidth, self._latency = bandwidth_bytes_per_s, latency_s
        self.clock = clock or VirtualClock()
        self.bytes_copied = 0
        self.history: list[tuple[float, float]] = []
        self.stalled_s = 0.0
        self.closed = False
        self._free_at = 0.0

    def copy(self, source: HostLayer, destination: torch.Tensor, after: float | None) -> _SimulatedTransfer:
        """Queue a copy behind the ones before it."""
        if self.closed:
            raise RuntimeError("OffloadedModel: the model must be open, got a closed one; load it again")
        start = max(self.clock.now, self._free_at, after or 0.0)
        end = start + self._latency + source.num_bytes / self._bandwidth
        self._free_at = end
        self.history.append((start, end))
        self.bytes_copied += source.num_bytes
        destination.fill_(0xFF)
        return _SimulatedTransfer(source, destination, start, end)

    def wait(self, transfer: _SimulatedTransfer) -> None:
        """Let the clock reach the end of the copy."""
        if self.closed:
            raise RuntimeError("OffloadedModel: the model must be open, got a closed one; load it again")
        self.stalled_s += max(0.0, transfer.end - self.clock.now)
        self.clock.now = max(self.clock.now, transfer.end)
        if not transfer.arrived:
            transfer.source.write_into(transfer.destination[: transfer.source.num_bytes])
            transfer.arrived = True

    def mark(self) -> float:
        """Return the time."""
        return self.clock.now

    def close(self) -> None:
        """Refuse further copies."""
        self.closed = True
