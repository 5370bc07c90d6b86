"""Bandwidth of the device's memory and of its link to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from sequoia_kernels.cuda_graphs import on_device
from sequoia_kernels.documents import is_count
from sequoia_kernels.measure.timing import time_calls

__all__ = ["measure_bandwidth"]

CPU_BYTES = 64 << 20  # beyond the caches of most processors, quick to copy
CUDA_BYTES = 1 << 30  # far beyond any L2


def measure_bandwidth(
    device: torch.device | str = "cpu", *, num_bytes: int | None = None, seconds: float = 0.5
) -> dict[str, float]:
    """Measure how fast a device moves large blocks of memory.

    Args:
        device: "cpu" or a CUDA device.
        num_bytes: size of a block; 64 MiB on a CPU and 1 GiB on CUDA when None.
        seconds: time to spend on each figure, roughly.

    Returns:
        GB/s (1e9 bytes), medians: "memory_copy" counts the bytes read and those written of a copy within the device;
        on CUDA also "host_to_device" and "device_to_host", from and to pinned memory, and "host_to_device_two_streams",
        the same block in two halves that travel side by side.

    Example:
        >>> sorted(measure_bandwidth("cpu", num_bytes=1 << 16, seconds=0.01))
        ['memory_copy']
    """
    device = torch.device(device)
    if num_bytes is None:
        num_bytes = CUDA_BYTES if device.type == "cuda" else CPU_BYTES
    if not is_count(num_bytes, 1):
        raise ValueError(f"measure_bandwidth: num_bytes must be a positive integer, got {num_bytes!r}")
    with on_device(device):  # where the pinned block is registered and streams are made
        calls, moved = _copies(device, num_bytes)
        times = time_calls(calls, device, seconds=seconds * len(calls), min_repeats=3)
    return {name: moved[name] / (time.p50_ms * 1e6) for name, time in times.items()}


def _copies(device: torch.device, num_bytes: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Build the copies that are timed, and the bytes that each moves."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    calls: dict[str, Callable[[], object]] = {
        "memory_copy": partial(torch.empty_like(source).copy_, source, non_blocking=True)
    }
    moved = {"memory_copy": 2 * num_bytes}
    if device.type == "cuda":
        host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)
        calls["host_to_device"] = partial(source.copy_, host, non_blocking=True)
        streams = [torch.cuda.Stream(device) for _ in range(2)]
        calls["host_to_device_two_streams"] = partial(_copy_in_parts, host, source, streams)
        calls["device_to_host"] = partial(host.copy_, source, non_blocking=True)
        moved.update(dict.fromkeys(set(calls) - {"memory_copy"}, num_bytes))
    return calls, moved


def _copy_in_parts(source: torch.Tensor, destination: torch.Tensor, streams: Sequence[torch.cuda.Stream]) -> None:
    """Copy one part on each stream; the current stream goes on when all have arrived."""
    current = torch.cuda.current_stream(destination.device)
    parts = zip(source.tensor_split(len(streams)), destination.tensor_split(len(streams)), streams)
    for part, place, stream in parts:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            place.copy_(part, non_blocking=True)
    for stream in streams:
        current.wait_stream(stream)
