"""compact_kv_cache_: contract, checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sequoia_kernels import backends, checks

from .cache_table import CacheTable, check_caches, max_row_bytes, named, num_slots, sum_of_addresses

OP = "compact_kv_cache_"

MOST_ROWS = 2**30 - 1
"""what a length may say without caches to bound it: the Triton kernel counts in the highest bits of a length's word"""


def compact_kv_cache_(
    caches: Sequence[Tensor] | CacheTable,
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Move the accepted tree rows behind the committed prefix in all caches, in place, and advance the lengths.

    For every cache and every d < num_accepted[b], row cache_lens[b] + d becomes what row
    cache_lens[b] + accepted_nodes[b, d] was before the call; then cache_lens[b] grows by num_accepted[b]. Sources and
    targets may overlap. Nothing else changes.

    Args:
        caches: K and V of every layer, in any order. Each [B, S, H, D], or pages [P, page, H, D] with ``block_table``;
            any dtype and any strides with the last dimension contiguous; H, D and dtype may differ from cache to cache.
            A ``CacheTable`` of them is checked once, not at every call, and is what a CUDA graph needs.
        accepted_nodes: the accepted path, strictly increasing tree slots; what lies behind num_accepted is not read.
            [B, L], int32.
        num_accepted: accepted rows, from 0 (a lane at rest) to L. [B], int32.
        cache_lens: committed rows; advanced in place. [B], int32.
        block_table: page of each stretch of a request's cache: row s is in page block_table[b, s // page].
            [B, max_pages], int32.
        backend: "auto" or a backend's name.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, layout or device, or what is written shares memory with another argument; on CPU
            tensors also paths that do not increase, counts outside 0..L, and rows or pages outside the cache. Nothing
            has been written then.
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates the caches and ``cache_lens``. No host sync on a device; with a ``CacheTable`` it can be captured in a
        CUDA graph; deterministic. On devices other than the CPU nobody checks values.

    Source:
        The commit step of tree decoding (Sequoia, arXiv 2402.12374), which there gathers into a copy.

    Example:
        >>> cache = torch.arange(6.0).reshape(1, 6, 1, 1)  # two committed rows, then four tree rows
        >>> cache_lens = torch.tensor([2], dtype=torch.int32)
        >>> path = torch.tensor([[0, 2, -1]], dtype=torch.int32)
        >>> compact_kv_cache_([cache], path, torch.tensor([2], dtype=torch.int32), cache_lens)
        >>> cache.flatten().tolist(), cache_lens.tolist()
        ([0.0, 1.0, 2.0, 4.0, 4.0, 5.0], [4])
    """
    checks.check_tensors(OP, accepted_nodes=accepted_nodes, num_accepted=num_accepted, cache_lens=cache_lens)
    checks.check_options(OP, backend)
    paged = block_table is not None
    if paged:
        checks.check_tensor(OP, "block_table", block_table)
    if isinstance(caches, CacheTable):
        if caches.paged != paged:
            kind = "CacheTable(..., paged=True) with" if paged else "CacheTable(..., paged=False) without"
            raise ValueError(f"{OP}: caches must be a {kind} a block_table, got paged={caches.paged}")
        table = (caches.entries, caches.address_sum, caches.max_row_bytes, caches.num_slots)
        _operator(caches.caches, accepted_nodes, num_accepted, cache_lens, block_table, *table, backend)
        return
    if not isinstance(caches, (list, tuple)):
        raise TypeError(f"{OP}: caches must be a list of tensors or a CacheTable, got {type(caches).__name__}")
    for index, cache in enumerate(caches):
        checks.check_tensor(OP, f"caches[{index}]", cache)
    _operator(caches, accepted_nodes, num_accepted, cache_lens, block_table, None, 0, 0, 0, backend)


def _run(
    caches: list[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    entries: Tensor | None,
    address_sum: int,
    row_bytes: int,
    slots: int,
    backend: str,
) -> None:
    # torch.compile may hand over copies of the caches and write them back later: then a table of the originals is void.
    if entries is not None and sum_of_addresses(caches) != address_sum:
        entries = None
    _check_structure(caches, accepted_nodes, num_accepted, cache_lens, block_table, entries)
    written: dict[str, Tensor | None] = {"cache_lens": cache_lens}
    if entries is None:
        written |= named(caches)  # a table's were looked at when it was built
    given = {"accepted_nodes": accepted_nodes, "num_accepted": num_accepted, "block_table": block_table}
    checks.check_memory(OP, written, given)
    if entries is None:
        paged = block_table is not None
        row_bytes, slots = max_row_bytes(caches), num_slots(caches, paged)
    on_cpu = cache_lens.is_cpu
    if on_cpu:
        _check_values(caches, accepted_nodes, num_accepted, cache_lens, block_table, slots)
    inputs = (caches, accepted_nodes, num_accepted, cache_lens, block_table, entries, row_bytes)
    backends.choose(OP, backend, "cpu" if on_cpu else cache_lens.device.type, inputs).run(*inputs)


def _fake(
    caches: list[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    entries: Tensor | None,
    address_sum: int,
    row_bytes: int,
    slots: int,
    backend: str,
) -> None:
    _check_structure(caches, accepted_nodes, num_accepted, cache_lens, block_table, entries)


def _check_structure(
    caches: list[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    entries: Tensor | None,
) -> None:
    if entries is None:  # whoever gives a table has had its caches checked when it was built
        check_caches(OP, caches, block_table is not None)
    checks.check_dtype(OP, "accepted_nodes", accepted_nodes, torch.int32)
    if accepted_nodes.dim() != 2:
        checks.fail_range(OP, "accepted_nodes", "have shape [batch, levels]", checks.shape_text(accepted_nodes.shape))
    batch_size = accepted_nodes.shape[0]
    device = cache_lens.device
    checks.check_dtype(OP, "num_accepted", num_accepted, torch.int32)
    checks.check_shape(OP, "num_accepted", num_accepted, (batch_size,), "batch")
    checks.check_dtype(OP, "cache_lens", cache_lens, torch.int32)
    checks.check_shape(OP, "cache_lens", cache_lens, (batch_size,), "batch")
    checks.check_device(OP, "accepted_nodes", accepted_nodes, device)
    checks.check_device(OP, "num_accepted", num_accepted, device)
    if caches:
        checks.check_device(OP, "caches[0]", caches[0], device)
        if block_table is None and caches[0].shape[0] != batch_size:
            rule = f"have the batch {batch_size} of accepted_nodes"
            checks.fail_range(OP, "caches[0]", rule, checks.shape_text(caches[0].shape))
    if block_table is not None:
        checks.check_dtype(OP, "block_table", block_table, torch.int32)
        if block_table.dim() != 2 or block_table.shape[0] != batch_size:
            rule = f"have shape [batch, pages] with batch {batch_size}"
            checks.fail_range(OP, "block_table", rule, checks.shape_text(block_table.shape))
        checks.check_device(OP, "block_table", block_table, device)


def _check_values(
    caches: Sequence[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    slots: int,
) -> None:
    """Paths increase and stay inside the cache, so every target does, too. CPU tensors only."""
    num_levels = accepted_nodes.shape[1]
    room = MOST_ROWS  # without caches the lengths are all that is read and written
    if caches:
        room = slots if block_table is None else block_table.shape[1] * caches[0].shape[1]
        room = min(room, torch.iinfo(torch.int32).max)  # an expanded cache may have more rows than a length can say
    pages = None if block_table is None or not caches else block_table.tolist()
    counts, paths = num_accepted.tolist(), accepted_nodes.tolist()
    for request, (cache_len, count) in enumerate(zip(cache_lens.tolist(), counts)):
        if not 0 <= count <= num_levels:
            checks.fail_range(OP, "num_accepted", f"be from 0 to {num_levels}", f"{count} for request {request}")
        if not 0 <= cache_len <= room:
            checks.fail_range(OP, "cache_lens", f"be from 0 to {room}", f"{cache_len} for request {request}")
        path = paths[request][:count]
        last = -1
        for node in path:
            if node <= last:
                rule = "be tree slots that increase along each path"
                checks.fail_range(OP, "accepted_nodes", rule, f"{path} for request {request}")
            last = node
        if cache_len + last >= room:
            rule = f"stay inside a cache of {room} slots with {cache_len} committed"
            checks.fail_range(OP, "accepted_nodes", rule, f"{path} for request {request}")
        if pages is not None and path:
            page_size = caches[0].shape[1]
            rows = [cache_len + node for node in path] + list(range(cache_len, cache_len + count))
            used = sorted({pages[request][row // page_size] for row in rows})
            if used[0] < 0 or used[-1] >= slots:
                rule = f"name pages from 0 to {slots - 1}"
                checks.fail_range(OP, "block_table", rule, f"{used} for request {request}")


backends.register_room(OP, package=__package__)

_operator: Any = backends.define_operator(
    f"{OP}(Tensor(a!)[] caches, Tensor accepted_nodes, Tensor num_accepted, Tensor(b!) cache_lens, "
    "Tensor? block_table, Tensor? entries, SymInt address_sum, SymInt row_bytes, SymInt slots, str backend) -> ()",
    run=_run,
    fake=_fake,
)
