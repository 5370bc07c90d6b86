"""Links: how a layer's block travels from the host to a device buffer, beside the computation.

A link starts copies in the order in which they are asked for, never waits in `copy`, and makes the computation wait in
`wait`. Two of them: CUDA streams and events, and a worker thread.
"""

from __future__ import annotations

import queue
import time
from abc import ABC, abstractmethod
from typing import Any

import torch

from sequoia_kernels.offload.host_memory import CudaPageLock, HostBlock, PageLock, fill_all
from sequoia_kernels.offload.host_weights import HostLayer
from sequoia_kernels.offload.memory import format_bytes
from sequoia_kernels.offload.threads import Signal, Task

__all__ = ["CudaLink", "Link", "ThreadLink"]


class Link(ABC):
    """Copies blocks from the host into device buffers, one after the other."""

    def check(self) -> None:  # noqa: B027
        """Refuse to be used from here; called before anything is changed for a copy."""

    @abstractmethod
    def copy(self, source: HostLayer, destination: torch.Tensor, after: Any) -> Any:
        """Start a copy and return the transfer, for `wait`, at once.

        Args:
            source: the layer.
            destination: at least `source.num_bytes`. uint8, on the device.
            after: mark behind which the destination may be overwritten, from `mark`; None at once.
        """

    @abstractmethod
    def wait(self, transfer: Any) -> None:
        """Let what is computed from now on see the copy's result."""

    def mark(self) -> Any:
        """Mark the point that the computation has been told to reach."""
        return None

    def recover(self) -> None:  # noqa: B027
        """Put right what a call that broke off may have left in the calling thread; copies keep their order."""

    @abstractmethod
    def close(self) -> None:
        """Drop copies that have not begun, finish the one that has, release threads and memory. Idempotent."""


def _closed() -> RuntimeError:
    return RuntimeError("OffloadedModel: the model must be open, got a closed one; load it again")


class _ThreadTransfer:
    def __init__(self, source: HostLayer, destination: torch.Tensor, after: Any) -> None:
        self.source, self.destination, self.after = source, destination, after
        self.done = Signal()
        self.error: BaseException | None = None
        self.event: Any = None

    def finish(self, error: BaseException | None = None) -> None:
        self.error = error
        self.done.set()

    def result(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise RuntimeError(f"OffloadedModel: a layer could not be copied: {self.error}") from self.error


class ThreadLink(Link):
    """Copies in a worker thread, for a device whose memory is the host's; torch releases the GIL while it copies.

    Args:
        bandwidth_bytes_per_s: slows copies down to this rate; None leaves them at the speed of memory.
        latency_s: added to each copy.

    Raises:
        ValueError: the bandwidth is not positive or the latency negative.
    """

    def __init__(self, bandwidth_bytes_per_s: float | None = None, latency_s: float = 0.0) -> None:
        if bandwidth_bytes_per_s is not None and not bandwidth_bytes_per_s > 0:
            raise ValueError(f"ThreadLink: bandwidth_bytes_per_s must be positive, got {bandwidth_bytes_per_s}")
        if not latency_s >= 0:
            raise ValueError(f"ThreadLink: latency_s must be at least 0, got {latency_s}")
        self._bandwidth, self._latency = bandwidth_bytes_per_s, latency_s
        self._jobs: queue.SimpleQueue[_ThreadTransfer | None] = queue.SimpleQueue()
        self._stop = Signal()
        self._worker = Task(self._run, "sequoia-weights")

    def copy(self, source: HostLayer, destination: torch.Tensor, after: Any) -> _ThreadTransfer:
        """Queue a copy; the first one starts the thread."""
        if self._stop.is_set:
            raise _closed()
        if not self._worker.begun:
            self._worker.start()
            if self._worker.error is not None:
                raise self._worker.error
        transfer = _ThreadTransfer(source, destination, after)
        self._jobs.put(transfer)
        return transfer

    def wait(self, transfer: _ThreadTransfer) -> None:
        """Block until the copy is done."""
        transfer.result()

    def close(self) -> None:
        """Stop the worker; copies that wait in the queue fail."""
        self._stop.set()
        self._jobs.put(None)
        self._worker.end()

    def _run(self) -> None:
        while (transfer := self._jobs.get()) is not None:
            if self._stop.is_set:
                transfer.finish(_closed())
                continue
            started = time.perf_counter()
            try:
                self._copy(transfer)
                if self._bandwidth is not None or self._latency:
                    duration = self._latency + transfer.source.num_bytes / (self._bandwidth or float("inf"))
                    # Waits on the stop signal and not by sleeping, so that closing never takes as long as a copy.
                    self._stop.wait(max(0.0, duration - (time.perf_counter() - started)))
                transfer.finish()
            except BaseException as error:  # the thread must live; the error is raised where the layer is wanted
                transfer.finish(error)
            del transfer  # while the thread waits for work it must not keep a layer alive

    def _copy(self, transfer: _ThreadTransfer) -> None:
        transfer.source.write_into(transfer.destination[: transfer.source.num_bytes])


class CudaLink(Link):
    """Copies on a CUDA stream of its own, ordered with the computation by events in both directions.

    A page-locked block is one asynchronous copy that the host only launches. Layers in memory-mapped files pass through
    two page-locked staging blocks that a reading thread fills; then the host waits for that thread, never for the GPU.

    `staging_bytes` is the size of such a block, 0 when all layers are page-locked.
    """

    def __init__(self, device: torch.device, staging_bytes: int = 0) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._outer_stream: torch.cuda.Stream | None = None
        self._closed = False
        self._reader: _StagingReader | None = None
        if staging_bytes:
            self._reader = _StagingReader(self, _locked_blocks(staging_bytes, 2, CudaPageLock(device)))

    def check(self) -> None:
        """Refuse a CUDA graph: marks made in it would mean nothing to later copies."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("layers that stream from the host cannot be captured in a CUDA graph")

    def copy(self, source: HostLayer, destination: torch.Tensor, after: Any) -> Any:
        """Launch a copy."""
        if self._closed:
            raise _closed()
        self._outer_stream = torch.cuda.current_stream(self._device)
        if source.block is not None:
            return self.launch(source.block, destination[: source.num_bytes], after)
        staged = 0 if self._reader is None else self._reader.staging_bytes
        if self._reader is None or staged < source.num_bytes:
            raise RuntimeError(
                f"CudaLink: staging_bytes must be at least {source.num_bytes}, the size of a layer that is not "
                f"page-locked, got {staged}"
            )
        return self._reader.copy(source, destination, after)

    def launch(self, block: torch.Tensor, destination: torch.Tensor, after: torch.cuda.Event | None) -> Any:
        """Launch the copy of a page-locked block and return the event behind it."""
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            destination.copy_(block, non_blocking=True)
        done = torch.cuda.Event(blocking=self._reader is not None)  # the reader waits for it without spinning
        done.record(self._stream)
        return done

    def wait(self, transfer: Any) -> None:
        """Let the current stream wait for the copy; the host goes on."""
        if isinstance(transfer, _ThreadTransfer):
            transfer.result()
            transfer = transfer.event
        torch.cuda.current_stream(self._device).wait_event(transfer)

    def mark(self) -> torch.cuda.Event:
        """Record an event on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def recover(self) -> None:
        """Leave the stream of the copies where an interrupted launch has stayed on it."""
        if self._outer_stream is not None and torch.cuda.current_stream(self._device) == self._stream:
            torch.cuda.set_stream(self._outer_stream)

    def close(self) -> None:
        """Wait for running copies, so that their memory may be freed."""
        if not self._closed:
            self._closed = True
            if self._reader is not None:
                self._reader.close()
            # Not only the copies: buffers are freed next, and layers may be running in them on any stream.
            try:
                torch.cuda.synchronize(self._device)
            finally:
                if self._reader is not None:
                    self._reader.free()


class _StagingReader(ThreadLink):
    """Reads layers into page-locked staging blocks and launches their copies."""

    def __init__(self, link: CudaLink, blocks: list[HostBlock]) -> None:
        self._link, self._blocks = link, blocks
        self.staging_bytes = blocks[0].num_bytes
        self._copied: list[torch.cuda.Event | None] = [None] * len(blocks)  # until then a block is being read
        self._turn = 0
        super().__init__()

    def _copy(self, transfer: _ThreadTransfer) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % len(self._blocks)
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        num_bytes, content = transfer.source.num_bytes, self._blocks[turn].block
        assert content is not None
        block = content[:num_bytes]
        with torch.cuda.device(self._link._device):
            transfer.source.write_into(block)
            transfer.event = self._link.launch(block, transfer.destination[:num_bytes], transfer.after)
        self._copied[turn] = transfer.event

    def free(self) -> None:
        """Unlock and free the staging blocks; the reader and its copies have ended."""
        for block in self._blocks:
            block.close()


def _locked_blocks(num_bytes: int, count: int, page_lock: PageLock) -> list[HostBlock]:
    """Allocate blocks and lock their pages; all or nothing."""
    blocks = [HostBlock(num_bytes, page_lock) for _ in range(count)]
    fill_all(
        blocks,
        HostBlock.allocate,
        lambda done, error: (
            f"load_offloaded: the host must have {format_bytes(count * num_bytes)} of memory that can be page-locked "
            f"for staging, got {format_bytes(done)} ({error})"
        ),
    )
    return blocks
