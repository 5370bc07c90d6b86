"""compact_kv_cache_ in CUDA; see csrc/cuda/compact_kv_cache.cu. Inputs as in reference.py.

One launch moves K and V of all layers, a second one of a few threads advances the lengths. The kernel has been
compiled, and its source was run thread by thread on a CPU; it has not run on a GPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sequoia_kernels import _cuda

from .cache_table import cache_entries

MAX_LEVELS = 64  # rows that one thread holds in registers
MAX_GRID = 65535  # caches and requests are grid dimensions y and z


def unavailable() -> str | None:
    """Tell why no CUDA device can be used, or None."""
    if torch.cuda.is_available():
        return None
    return _cuda.unavailable_reason() or f"torch {torch.__version__} sees no CUDA device"


@functools.cache
def _device_reason(device: torch.device) -> str | None:
    """Tell why this build has no code for a device, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    oldest = min(int(number) for number in re.findall(r"\b\d+", _cuda.architectures))
    if 10 * major + minor >= oldest:
        return None
    return f"was built for architectures {_cuda.architectures}, this device is sm_{major}{minor}"


def supports(
    caches: Sequence[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    entries: Tensor | None,
    max_row_bytes: int,
) -> str | None:
    """Return None if the kernel takes this call, else the reason why not."""
    if not cache_lens.is_cuda:
        return "takes CUDA tensors"
    batch_size, num_levels = accepted_nodes.shape
    if num_levels > MAX_LEVELS:
        return f"takes up to {MAX_LEVELS} levels"
    if max(len(caches), batch_size) > MAX_GRID:
        return f"takes up to {MAX_GRID} caches and requests"
    if entries is None and torch.cuda.is_current_stream_capturing():
        return "needs a CacheTable while a CUDA graph is captured"
    return _device_reason(cache_lens.device)


def run(
    caches: Sequence[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    entries: Tensor | None,
    max_row_bytes: int,
) -> None:
    """Launch the moves and the advance of the lengths on the current stream."""
    batch_size, num_levels = accepted_nodes.shape
    if batch_size == 0 or num_levels == 0:
        return
    if entries is None:
        entries = cache_entries(caches, paged=block_table is not None)
    paged = block_table is not None and len(caches) > 0
    _cuda.compact_kv_cache(
        device=cache_lens.device.index,
        stream=torch.cuda.current_stream(cache_lens.device).cuda_stream,
        cache_table=entries.data_ptr(),
        num_caches=len(caches),
        max_row_bytes=max_row_bytes,
        accepted_nodes=accepted_nodes.data_ptr(),
        stride_nodes_request=accepted_nodes.stride(0),
        stride_nodes_level=accepted_nodes.stride(1),
        num_levels=num_levels,
        num_accepted=num_accepted.data_ptr(),
        stride_num_accepted=num_accepted.stride(0),
        cache_lens=cache_lens.data_ptr(),
        stride_cache_lens=cache_lens.stride(0),
        batch_size=batch_size,
        block_table=block_table.data_ptr() if block_table is not None and paged else 0,
        stride_table_request=block_table.stride(0) if block_table is not None else 0,
        stride_table_page=block_table.stride(1) if block_table is not None else 0,
        page_size=caches[0].shape[1] if paged else 0,
        max_pages=block_table.shape[1] if block_table is not None else 0,
    )
