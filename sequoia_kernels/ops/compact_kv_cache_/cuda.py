"""compact_kv_cache_ in CUDA; see csrc/cuda/compact_kv_cache.cu. Inputs as in op.py.

One launch moves K and V of all layers and advances the lengths, as in Triton: what it spares is Triton itself, its
compilation and its launcher's time on the host. Which of the two is faster on a device has not been measured; the
tests of both passed on an H100.
"""

from __future__ import annotations

import functools

import torch

from sequoia_kernels import _cuda

from .cache_table import length_bits
from .op import CompactInputs

__all__ = ["run", "supports", "unavailable"]

MAX_LEVELS = 64  # rows that one thread holds in registers
MAX_GRID = 65535  # caches and requests are grid dimensions y and z
THREADS = 128  # of a block, as in the kernel's file


def unavailable() -> str | None:
    """Tell why no CUDA device can be used, or None."""
    # The module brings a runtime of its own: the driver may be too old for it, and good enough for torch's.
    reason = _cuda.unavailable_reason()
    if reason is None and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device"
    if reason is None:  # asking costs a device some memory, so first the one that is in use anyway
        current, count = torch.cuda.current_device(), torch.cuda.device_count()
        reasons = map(_device_reason, sorted(range(count), key=lambda index: index != current))
        first = next(reasons)
        reason = None if first is None or None in reasons else first
    return reason


@functools.cache
def _device_reason(index: int) -> str | None:
    """Tell why this build has no code for a device, or None."""
    reason = _cuda.device_reason(index)
    return None if reason is None else f"built for {_cuda.architectures}; {torch.cuda.get_device_name(index)}: {reason}"


def _launch_config(num_caches: int, num_levels: int, max_row_bytes: int, max_slots: int) -> tuple[int, int] | None:
    """Choose blocks that share a cache, and the bits of a length's word; None if no word can hold both."""
    slice_bytes = (16 if num_levels <= 32 else 8) * THREADS  # one column a thread at the usual width
    return length_bits(num_caches, min(max(1, -(-max_row_bytes // slice_bytes)), 65535), max_slots)


def supports(inputs: CompactInputs) -> str | None:
    """CUDA tensors of up to so many levels, caches, requests and rows."""
    if not inputs.cache_lens.is_cuda:
        return "takes CUDA tensors"
    num_caches, (batch_size, num_levels) = len(inputs.caches), inputs.accepted_nodes.shape
    if num_levels > MAX_LEVELS:
        return f"takes up to {MAX_LEVELS} levels"
    if max(num_caches, batch_size) > MAX_GRID:
        return f"takes up to {MAX_GRID} caches and requests"
    if _launch_config(num_caches, num_levels, inputs.max_row_bytes, inputs.max_slots) is None:
        return "takes up to 2**30 slots times caches"
    if inputs.entries is None and torch.cuda.is_current_stream_capturing():
        return "needs a CacheTable while a CUDA graph is captured"
    return _device_reason(inputs.cache_lens.device.index)


def run(inputs: CompactInputs, outputs: None = None) -> None:
    """Move the rows and advance the lengths in one launch on the current stream."""
    accepted_nodes, num_accepted, cache_lens, block_table = inputs[1:5]
    batch_size, num_levels = accepted_nodes.shape
    if batch_size == 0 or num_levels == 0:
        return
    config = _launch_config(len(inputs.caches), num_levels, inputs.max_row_bytes, inputs.max_slots)
    assert config is not None  # supports() has asked
    entries = inputs.table()
    _cuda.compact_kv_cache(
        device=cache_lens.device.index,
        stream=torch.cuda.current_stream(cache_lens.device).cuda_stream,
        cache_table=entries.data_ptr(),
        num_caches=len(inputs.caches),
        num_slices=config[0],
        accepted_nodes=accepted_nodes.data_ptr(),
        stride_nodes_request=accepted_nodes.stride(0),
        stride_nodes_level=accepted_nodes.stride(1),
        num_levels=num_levels,
        num_accepted=num_accepted.data_ptr(),
        stride_num_accepted=num_accepted.stride(0),
        cache_lens=cache_lens.data_ptr(),
        stride_cache_lens=cache_lens.stride(0),
        length_bits=config[1] if inputs.advance else 0,
        batch_size=batch_size,
        block_table=block_table.data_ptr() if block_table is not None and inputs.page_size else 0,
        stride_table_request=inputs.table_strides[0],
        stride_table_page=inputs.table_strides[1],
        page_size=inputs.page_size,
        max_pages=block_table.shape[1] if block_table is not None else 0,
    )
