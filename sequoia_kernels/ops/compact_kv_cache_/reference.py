"""Reference of compact_kv_cache_: the specification, in plain torch on any device. Inputs as in op.py.

Definition, for every cache and request b, all reads before all writes:
    row[cache_lens[b] + d] <- row[cache_lens[b] + accepted_nodes[b, d]]   for d < num_accepted[b]
and then, with advance, cache_lens[b] <- cache_lens[b] + num_accepted[b]. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .op import CompactInputs

__all__ = ["run", "supports"]


def supports(inputs: CompactInputs) -> str | None:
    """Every call that passes the op's checks runs here."""
    return None


def run(inputs: CompactInputs, outputs: None = None) -> None:
    """Move the rows and advance the lengths."""
    if inputs.cache_lens.is_cpu and inputs.block_table is None:
        move_request_by_request(*inputs[:4])
    else:
        move_all_requests(*inputs[:5])
    if inputs.advance:
        inputs.cache_lens.add_(inputs.num_accepted)


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
