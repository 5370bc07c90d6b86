"""Reference of compact_kv_cache_: gather all rows, then write them, in plain torch on any device.

Inputs (of ``supports`` and ``run``, in this order):
    caches          list of [B, S, H, D], or of pages [P, page, H, D] with block_table; any dtype; last dim contiguous
    accepted_nodes  [B, L] int32
    num_accepted    [B] int32
    cache_lens      [B] int32; written
    block_table     [B, max_pages] int32 or None
    entries         [num_caches, 7] int64 on the caches' device: ``CacheTable.entries``; None if the caller gave a list
                    of tensors, and then ``cache_table.cache_entries`` makes it
    max_row_bytes   int, bytes of the widest row
    max_slots       int, rows that a request has room for
    advance         bool, whether the lengths advance: they do with the last of the launches of one call
Outputs: none, ``run`` returns None.

Definition, for every cache and request b, all reads before all writes:
    row[cache_lens[b] + d] <- row[cache_lens[b] + accepted_nodes[b, d]]   for d < num_accepted[b]
and then, with advance, cache_lens[b] <- cache_lens[b] + num_accepted[b]. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def supports(*inputs: object) -> str | None:
    """Everything in the contract is supported."""
    return None


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
    if cache_lens.is_cpu and block_table is None:
        move_request_by_request(caches, accepted_nodes, num_accepted, cache_lens)
    else:
        move_all_requests(caches, accepted_nodes, num_accepted, cache_lens, block_table)
    if advance:
        cache_lens += num_accepted


def move_all_requests(
    caches: Sequence[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
) -> None:
    """One gather and one write a cache, without reading a length on the host."""
    batch_size, num_levels = accepted_nodes.shape
    if not caches or accepted_nodes.numel() == 0 or any(0 in cache.shape[:2] for cache in caches):
        return
    requests = torch.arange(batch_size, device=cache_lens.device)[:, None].expand(-1, num_levels)
    depths = torch.arange(num_levels, device=cache_lens.device)
    active = depths < num_accepted[:, None]  # [B, L]
    lens = cache_lens.long()[:, None]
    sources, targets = torch.where(active, lens + accepted_nodes, 0), torch.where(active, lens + depths, 0)
    source_index, target_index = (requests, sources), (requests, targets)
    if block_table is not None:
        if block_table.shape[1] == 0:
            return
        page_size, pages = caches[0].shape[1], block_table.long()
        source_index = (pages.gather(1, sources // page_size), sources % page_size)
        target_index = (pages.gather(1, targets // page_size), targets % page_size)
    # A pair behind the end of a path must write, too, where shapes do not depend on data, and must not look at pages
    # that its request does not use. It repeats the first pair of all, which writes the same value to the same place; if
    # there is none, the very first row is written to itself.
    first = active.flatten().int().argmax().reshape(1)

    def filled(index: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        fillers = [torch.where(active.any(), part.flatten().index_select(0, first), 0) for part in index]
        return tuple(torch.where(active, part, filler) for part, filler in zip(index, fillers))

    read, written = filled(source_index), filled(target_index)
    for cache in caches:
        rows = _as_indexable(cache)
        rows[written] = rows[read]


def move_request_by_request(
    caches: Sequence[Tensor], accepted_nodes: Tensor, num_accepted: Tensor, cache_lens: Tensor
) -> None:
    """On a CPU lengths cost nothing to read: touch only what moves. A chain that was accepted moves nothing."""
    counts, paths = num_accepted.tolist(), accepted_nodes.tolist()
    for request, (cache_len, count) in enumerate(zip(cache_lens.tolist(), counts)):
        path = paths[request][:count]
        in_place = 0
        while in_place < count and path[in_place] == in_place:
            in_place += 1
        if in_place == count:
            continue
        sources = torch.tensor([cache_len + node for node in path[in_place:]])
        for cache in caches:
            rows = _as_indexable(cache)[request]
            rows[cache_len + in_place : cache_len + count] = rows.index_select(0, sources)


def _as_indexable(cache: Tensor) -> Tensor:
    """Rows as bytes where the dtype is one of float8, which torch does not index everywhere."""
    return cache.view(torch.uint8) if cache.element_size() == 1 else cache
