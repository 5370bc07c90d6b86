"""compact_kv_cache_ in C++ on the CPU; see csrc/host/compact_kv_cache.cpp. Inputs as in reference.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sequoia_kernels import _host
from sequoia_kernels.ops.host_calls import address

from .cache_table import cache_entries


def supports(
    caches: Sequence[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    *unused: object,
) -> str | None:
    """Return None if the call is one for CPU tensors, else the reason why not."""
    return None if cache_lens.is_cpu else "takes CPU tensors"


def run(
    caches: Sequence[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    entries: Tensor | None,
    max_row_bytes: int,
    max_slots: int,
    advance: bool,
) -> None:
    """Move the rows and advance the lengths."""
    paged = block_table is not None and len(caches) > 0
    if entries is None:
        entries = cache_entries(caches, paged)
    if not advance:
        cache_lens = cache_lens.clone()  # what the module advances
    table_strides = block_table.stride() if block_table is not None else (0, 0)
    _host.compact_kv_cache(
        entries.data_ptr(),
        len(caches),
        accepted_nodes.data_ptr(),
        *accepted_nodes.stride(),
        num_accepted.data_ptr(),
        num_accepted.stride(0),
        cache_lens.data_ptr(),
        cache_lens.stride(0),
        accepted_nodes.shape[0],
        address(block_table if paged else None),
        *table_strides,
        caches[0].shape[1] if paged else 1,
    )
