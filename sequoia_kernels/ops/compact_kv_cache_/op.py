"""compact_kv_cache_: contract, checks and dispatch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops.operators import Operator

from .cache_table import CacheTable, cache_entries, check_caches, max_row_bytes, named, num_slots, sum_of_addresses

__all__ = ["CompactInputs", "compact_kv_cache_"]

OP = "compact_kv_cache_"

MOST_ROWS = 2**30 - 1
"""what a length may say without caches to bound it: the Triton kernel counts in the highest bits of a length's word"""


class CompactInputs(NamedTuple):
    """What a backend takes: caches on one device, with the same block table or none.

    Attributes:
        caches: [B, S, H, D] each, or pages [P, page, H, D] with a block table; any dtype, last dimension contiguous.
        accepted_nodes: [B, L], int32.
        num_accepted: [B], int32.
        cache_lens: [B], int32; written.
        block_table: [B, max_pages], int32, or None.
        entries: `CacheTable.entries` of these caches, [num_caches, 7], int64; None if the caller gave tensors.
        max_row_bytes: bytes of the widest row.
        max_slots: rows that a request has room for.
        advance: whether the lengths advance: they do with the last of the launches of one call.
    """

    caches: list[Tensor]
    accepted_nodes: Tensor
    num_accepted: Tensor
    cache_lens: Tensor
    block_table: Tensor | None
    entries: Tensor | None
    max_row_bytes: int
    max_slots: int
    advance: bool

    @property
    def page_size(self) -> int:
        """Slots of a page, 0 where there are none."""
        return self.caches[0].shape[1] if self.caches and self.block_table is not None else 0

    @property
    def table_strides(self) -> tuple[int, ...]:
        """Strides of the block table, of requests and of pages."""
        return (0, 0) if self.block_table is None else self.block_table.stride()

    def table(self) -> Tensor:
        """Give the entries, made now if the caller had no table."""
        return cache_entries(self.caches, self.block_table is not None) if self.entries is None else self.entries


class CompactCall(NamedTuple):
    """What the op takes: groups of caches, each moved by a launch of its own, and one path for all.

    Attributes:
        caches: of all groups, one group behind the other.
        accepted_nodes: as in `CompactInputs`, as the two below.
        num_accepted: see above.
        cache_lens: see above.
        block_tables: one for each group, or None.
        entries: one for each group; None for a list of tensors.
        group_sizes: number of caches of each group.
        numbers: three for each group with entries: sum of addresses, bytes of the widest row, slots of a cache.
    """

    caches: list[Tensor]
    accepted_nodes: Tensor
    num_accepted: Tensor
    cache_lens: Tensor
    block_tables: list[Tensor | None]
    entries: list[Tensor | None]
    group_sizes: list[int]
    numbers: list[int]


def compact_kv_cache_(
    caches: Sequence[Tensor] | CacheTable | Sequence[CacheTable],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    *,
    block_table: Tensor | Sequence[Tensor | None] | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> None:
    """Move the accepted tree rows behind the committed prefix in all caches, in place, and advance the lengths.

    For every cache and every d < num_accepted[b], row cache_lens[b] + d becomes what row
    cache_lens[b] + accepted_nodes[b, d] was before the call; then cache_lens[b] grows by num_accepted[b]. Sources and
    targets may overlap. Nothing else changes.

    All caches that share ``cache_lens`` belong into one call, target's and draft's alike: a second call would start
    from the lengths that the first one has advanced.

    Args:
        caches: K and V of every layer, in any order. Each [B, S, H, D], or pages [P, page, H, D] with ``block_table``;
            any dtype and any strides with the last dimension contiguous; H, D and dtype may differ from cache to cache.
            A ``CacheTable`` of them is checked once, not at every call, and is what a CUDA graph needs. A list of these
            holds caches that are paged by different block tables, or lie on different devices, which may be others than
            that of the lengths.
        accepted_nodes: the accepted path, strictly increasing tree slots; what lies behind num_accepted is not read.
            [B, L], int32.
        num_accepted: accepted rows, from 0 (a lane at rest) to L. [B], int32.
        cache_lens: committed rows; advanced in place. [B], int32.
        block_table: page of each stretch of a request's cache: row s is in page block_table[b, s // page].
            [B, max_pages], int32, on the device of the caches. For a list of tables a list: the block table of each,
            None for one that is not paged.
        backend: "auto" or a backend's name.
        debug: check values on devices other than the CPU, too, which syncs with the host.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, layout or device, or what is written shares memory with another argument; on CPU
            tensors or under ``debug`` also paths that do not increase, counts outside 0..L, and rows or pages outside
            the cache. Nothing has been written then.
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates the caches and ``cache_lens``; returns nothing. No host sync on a device unless ``debug``; with tables
        on one device it can be captured in a CUDA graph; deterministic. One launch for each table; the last one
        advances the lengths. A device other than theirs gets copies of path and lengths. On devices other than the CPU
        nobody else checks values.

    Source:
        The commit step of tree decoding (Sequoia, arXiv 2402.12374), which there gathers into a copy.

    Example:
        >>> cache = torch.arange(6.0).reshape(1, 6, 1, 1)  # two committed rows, then four tree rows
        >>> cache_lens = torch.tensor([2], dtype=torch.int32)
        >>> path = torch.tensor([[0, 2, -1]], dtype=torch.int32)
        >>> compact_kv_cache_([cache], path, torch.tensor([2], dtype=torch.int32), cache_lens)
        >>> cache.flatten().tolist(), cache_lens.tolist()
        ([0.0, 1.0, 2.0, 4.0, 4.0, 5.0], [4])

        Target and draft with pages of their own:

        >>> target, draft = torch.arange(6.0).reshape(3, 2, 1, 1), torch.arange(6.0).reshape(3, 2, 1, 1)
        >>> tables = [CacheTable([target], paged=True), CacheTable([draft], paged=True)]
        >>> pages = [torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([[2, 1, 0]], dtype=torch.int32)]
        >>> cache_lens = torch.tensor([2], dtype=torch.int32)
        >>> compact_kv_cache_(tables, path, torch.tensor([2], dtype=torch.int32), cache_lens, block_table=pages)
        >>> target.flatten().tolist(), draft.flatten().tolist(), cache_lens.tolist()
        ([0.0, 1.0, 2.0, 4.0, 4.0, 5.0], [0.0, 1.0, 2.0, 0.0, 4.0, 5.0], [4])
    """
    checks.check_tensor(OP, "accepted_nodes", accepted_nodes)
    checks.check_tensor(OP, "num_accepted", num_accepted)
    checks.check_tensor(OP, "cache_lens", cache_lens)
    checks.check_options(OP, backend, debug=debug)
    if isinstance(caches, (list, tuple)) and caches and all(isinstance(table, CacheTable) for table in caches):
        groups: list[Any] = list(caches)
        block_tables: Any = [None] * len(groups) if block_table is None else block_table
        if not isinstance(block_tables, (list, tuple)):
            rule = f"be a list with one for each of the {len(groups)} CacheTables"
            raise TypeError(f"{OP}: block_table must {rule}, got {type(block_tables).__name__}")
        if len(block_tables) != len(groups):
            checks.fail_range(OP, "block_table", f"have one for each of {len(groups)} CacheTables", len(block_tables))
    else:
        groups, block_tables = [caches], [block_table]
        if isinstance(caches, (list, tuple)):
            for index, cache in enumerate(caches):
                checks.check_tensor(OP, f"caches[{index}]", cache)
        elif not isinstance(caches, CacheTable):
            rule = "be a list of tensors, a CacheTable or a list of them"
            raise TypeError(f"{OP}: caches must {rule}, got {type(caches).__name__}")
    tensors: list[Tensor] = []
    entries: list[Tensor | None] = []
    numbers: list[int] = []
    for index, (group, pages) in enumerate(zip(groups, block_tables)):
        if pages is not None:
            checks.check_tensor(OP, _named("block_table", index, groups), pages)
        if not isinstance(group, CacheTable):
            tensors, entries, numbers = [*group], [None], [0, 0, 0]
            continue
        if group.paged != (pages is not None):
            kind = "CacheTable(..., paged=True) with" if pages is not None else "CacheTable(..., paged=False) without"
            checks.fail_range(OP, _named("caches", index, groups), f"be a {kind} a block_table", f"paged={group.paged}")
        tensors += group.caches
        entries.append(group.entries)
        numbers += (group.address_sum, group.max_row_bytes, group.num_slots)
    sizes = [len(group) for group in groups]
    path = (accepted_nodes, num_accepted, cache_lens)
    OPERATOR(CompactCall(tensors, *path, list(block_tables), entries, sizes, numbers), None, backend, debug)


def _named(argument: str, index: int, groups: Sequence[object]) -> str:
    """An argument, or the element of it where it is a list with one for each of several groups."""
    return argument if len(groups) == 1 else f"{argument}[{index}]"


def _groups(call: CompactCall) -> Iterator[tuple[int, list[Tensor], Tensor | None, Tensor | None]]:
    """Index, caches, block table and entries of each group."""
    first = 0
    for index, (size, block_table, table) in enumerate(zip(call.group_sizes, call.block_tables, call.entries)):
        yield index, call.caches[first : first + size], block_table, table
        first += size


def check(call: CompactCall) -> None:
    """Check dtypes, shapes, layouts and devices."""
    accepted_nodes, num_accepted, cache_lens = call[1:4]
    checks.check_dtype(OP, "accepted_nodes", accepted_nodes, torch.int32)
    if accepted_nodes.dim() != 2:
        checks.fail_range(OP, "accepted_nodes", "have shape [batch, levels]", checks.shape_text(accepted_nodes.shape))
    batch_size, device = accepted_nodes.shape[0], cache_lens.device
    checks.check_device(OP, "accepted_nodes", accepted_nodes, device)
    checks.check_row_values(OP, "num_accepted", num_accepted, batch_size, torch.int32, device, "batch")
    checks.check_row_values(OP, "cache_lens", cache_lens, batch_size, torch.int32, device, "batch")
    for index, own, block_table, table in _groups(call):
        if table is None:
            check_caches(OP, own, block_table is not None)  # those of a table were checked when it was built
            if own:
                checks.check_device(OP, "caches[0]", own[0], device)
        if own and block_table is None and own[0].shape[0] != batch_size:
            name = "caches" if len(call.group_sizes) == 1 else f"caches[{index}].caches"
            rule = f"have the batch {batch_size} of accepted_nodes"
            checks.fail_range(OP, f"{name}[0]", rule, checks.shape_text(own[0].shape))
        if block_table is not None:
            pages = _named("block_table", index, call.group_sizes)
            checks.check_dtype(OP, pages, block_table, torch.int32)
            if block_table.dim() != 2 or block_table.shape[0] != batch_size:
                rule = f"have shape [batch, pages] with batch {batch_size}"
                checks.fail_range(OP, pages, rule, checks.shape_text(block_table.shape))
            checks.check_device(OP, pages, block_table, own[0].device if own else device)


def launches(call: CompactCall) -> list[CompactInputs]:
    """Split a call into launches, one a group; check what cannot be asked of fake tensors: memory, and values."""
    home = call.cache_lens.device
    moves = [_launch(call, *group) for group in _groups(call)]
    _check_memory(call, moves)
    # The last launch advances the lengths, so it is one on their device.
    moves.sort(key=lambda move: not move.caches or move.caches[0].device == home)
    if moves[-1].caches and moves[-1].caches[0].device != home:
        moves.append(_launch(call, -1, [], None, None))
    for index, move in enumerate(moves):
        device = move.caches[0].device if move.caches else home
        path = call[1:4]
        moved = move._replace(
            accepted_nodes=path[0].to(device), num_accepted=path[1].to(device), cache_lens=path[2].to(device),
            advance=index + 1 == len(moves),
        )  # fmt: skip
        if move.cache_lens.is_cpu or moved.cache_lens.is_cpu:
            _check_values(move if move.cache_lens.is_cpu else moved)
        moves[index] = moved
    return moves


def _launch(
    call: CompactCall, index: int, own: list[Tensor], block_table: Tensor | None, table: Tensor | None
) -> CompactInputs:
    address_sum, row_bytes, slots = (0, 0, 0) if table is None else call.numbers[3 * index : 3 * index + 3]
    # torch.compile may hand over copies of the caches and write them back later: a table of others is void.
    if table is None or sum_of_addresses(own) != address_sum:
        table, row_bytes, slots = None, max_row_bytes(own), num_slots(own, block_table is not None)
    if not own:
        room = MOST_ROWS  # the lengths are all that is read and written
    else:  # an expanded cache may have more rows than a length can say
        room = slots if block_table is None else block_table.shape[1] * own[0].shape[1]
        room = min(room, torch.iinfo(torch.int32).max)
    return CompactInputs(own, *call[1:4], block_table, table, row_bytes, room, False)


def _check_memory(call: CompactCall, moves: Sequence[CompactInputs]) -> None:
    """What is written lies apart. Of tables, which were looked at when they were built, only from one another."""
    written: dict[str, Tensor | None] = {"cache_lens": call.cache_lens}
    devices = [move.caches[0].device if move.caches else None for move in moves]
    for index, (move, device) in enumerate(zip(moves, devices)):
        if call.entries[0] is not None and device is not None and devices.count(device) > 1:
            written |= {f"caches[{index}].{name}": cache for name, cache in named(move.caches).items()}
    if call.entries[0] is None:
        written |= named(call.caches)
    given: dict[str, Tensor | None] = {"accepted_nodes": call.accepted_nodes, "num_accepted": call.num_accepted}
    given |= {_named("block_table", index, moves): move.block_table for index, move in enumerate(moves)}
    checks.check_memory(OP, written, given)


def _check_values(inputs: CompactInputs, wait: bool = False) -> None:
    """Paths increase and stay inside the caches, so every target does, too. `wait`: read pages on a device as well."""
    num_levels, room, block_table = inputs.accepted_nodes.shape[1], inputs.max_slots, inputs.block_table
    pages = None
    if inputs.caches and block_table is not None and (wait or block_table.is_cpu):
        pages = block_table.tolist()
    counts, paths = inputs.num_accepted.tolist(), inputs.accepted_nodes.tolist()
    for request, (cache_len, count) in enumerate(zip(inputs.cache_lens.tolist(), counts)):
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
            num_pages, page_size = num_slots(inputs.caches, True), inputs.page_size
            rows = [cache_len + node for node in path] + list(range(cache_len, cache_len + count))
            used = sorted({pages[request][row // page_size] for row in rows})
            if used[0] < 0 or used[-1] >= num_pages:
                rule = f"name pages from 0 to {num_pages - 1}"
                checks.fail_range(OP, "block_table", rule, f"{used} for request {request}")


OPERATOR: Operator[CompactCall, tuple[()]] = Operator(
    OP,
    CompactCall,
    package=__package__,
    check=check,
    check_use=functools.partial(_check_values, wait=True),
    launches=launches,
    mutated=("caches", "cache_lens"),
)
