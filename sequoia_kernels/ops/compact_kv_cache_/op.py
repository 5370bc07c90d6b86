"""compact_kv_cache_: contract, checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops import backends

from .cache_table import CacheTable, check_caches, max_row_bytes, named, num_slots, sum_of_addresses

OP = "compact_kv_cache_"

MOST_ROWS = 2**30 - 1
"""what a length may say without caches to bound it: the Triton kernel counts in the highest bits of a length's word"""


def compact_kv_cache_(
    caches: Sequence[Tensor] | CacheTable | Sequence[CacheTable],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    *,
    block_table: Tensor | Sequence[Tensor | None] | None = None,
    backend: str = "auto",
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

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, layout or device, or what is written shares memory with another argument; on CPU
            tensors also paths that do not increase, counts outside 0..L, and rows or pages outside the cache. Nothing
            has been written then.
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates the caches and ``cache_lens``. No host sync on a device; with tables on one device it can be captured in
        a CUDA graph; deterministic. One launch for each table; the last one advances the lengths. A device other than
        theirs gets copies of path and lengths. On devices other than the CPU nobody checks values.

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
    checks.check_tensors(OP, accepted_nodes=accepted_nodes, num_accepted=num_accepted, cache_lens=cache_lens)
    checks.check_options(OP, backend)
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
    _operator(tensors, accepted_nodes, num_accepted, cache_lens, list(block_tables), entries, sizes, numbers, backend)


def _named(argument: str, index: int, groups: Sequence[object]) -> str:
    """An argument, or the element of it where it is a list with one for each of several groups."""
    return argument if len(groups) == 1 else f"{argument}[{index}]"


class _Group(NamedTuple):
    """Caches that one launch moves: on one device, with the same block table or none."""

    caches: list[Tensor]
    block_table: Tensor | None
    entries: Tensor | None
    max_row_bytes: int
    num_slots: int
    """slots of a request in the smallest cache; pages, if there is a block table"""

    @property
    def max_slots(self) -> int:
        """Rows that a request has room for."""
        if not self.caches:
            return MOST_ROWS  # the lengths are all that is read and written
        pages = self.block_table
        room = self.num_slots if pages is None else pages.shape[1] * self.caches[0].shape[1]
        return min(room, torch.iinfo(torch.int32).max)  # an expanded cache may have more rows than a length can say


def _run(
    caches: list[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_tables: list[Tensor | None],
    entries: list[Tensor | None],
    group_sizes: list[int],
    numbers: list[int],
    backend: str,
) -> None:
    home = cache_lens.device
    path = (accepted_nodes, num_accepted, cache_lens)
    groups = _checked_groups(caches, path, block_tables, entries, group_sizes, numbers)
    written: dict[str, Tensor | None] = {"cache_lens": cache_lens}
    if entries[0] is None:
        written |= named(caches)  # a table's were looked at when it was built
    given: dict[str, Tensor | None] = {"accepted_nodes": accepted_nodes, "num_accepted": num_accepted}
    given |= {_named("block_table", index, groups): group.block_table for index, group in enumerate(groups)}
    checks.check_memory(OP, written, given)
    if len(groups) > 1:
        _check_apart(groups)
    # The last launch advances the lengths, so it is one on their device.
    groups.sort(key=lambda group: not group.caches or group.caches[0].device == home)
    if groups[-1].caches and groups[-1].caches[0].device != home:
        groups.append(_Group([], None, None, 0, 0))
    calls = []
    for index, group in enumerate(groups):
        device = group.caches[0].device if group.caches else home
        moved = tuple(tensor.to(device) for tensor in path)
        readable = next((tensors for tensors in (path, moved) if tensors[2].is_cpu), None)
        if readable is not None:
            _check_values(group, *readable)
        is_last = index + 1 == len(groups)
        inputs = (
            group.caches, *moved, group.block_table, group.entries, group.max_row_bytes, group.max_slots, is_last,
        )  # fmt: skip
        calls.append((backends.choose(OP, backend, device.type, inputs), inputs))
    for chosen, inputs in calls:
        chosen.run(*inputs)


def _fake(
    caches: list[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_tables: list[Tensor | None],
    entries: list[Tensor | None],
    group_sizes: list[int],
    numbers: list[int],
    backend: str,
) -> None:
    _checked_groups(caches, (accepted_nodes, num_accepted, cache_lens), block_tables, entries, group_sizes, None)


def _checked_groups(
    caches: list[Tensor],
    path: tuple[Tensor, Tensor, Tensor],
    block_tables: list[Tensor | None],
    entries: list[Tensor | None],
    group_sizes: list[int],
    numbers: list[int] | None,
) -> list[_Group]:
    """Check dtypes, shapes and devices and sort the arguments by group. ``numbers`` is None for fake tensors."""
    accepted_nodes, num_accepted, cache_lens = path
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
    groups, first = [], 0
    for index, (size, block_table, table) in enumerate(zip(group_sizes, block_tables, entries)):
        own, paged = caches[first : first + size], block_table is not None
        first += size
        name = "caches" if len(group_sizes) == 1 else f"caches[{index}].caches"
        row_bytes, slots = 0, 0
        if table is None:
            check_caches(OP, own, paged)  # whoever gives a table has had its caches checked when it was built
            if own:
                checks.check_device(OP, "caches[0]", own[0], device)
        if numbers is not None:
            address_sum, row_bytes, slots = numbers[3 * index : 3 * index + 3]
            # torch.compile may hand over copies of the caches and write them back later: a table of others is void.
            if table is None or sum_of_addresses(own) != address_sum:
                table, row_bytes, slots = None, max_row_bytes(own), num_slots(own, paged)
        if own and not paged and own[0].shape[0] != batch_size:
            rule = f"have the batch {batch_size} of accepted_nodes"
            checks.fail_range(OP, f"{name}[0]", rule, checks.shape_text(own[0].shape))
        if block_table is not None:
            pages = _named("block_table", index, group_sizes)
            checks.check_dtype(OP, pages, block_table, torch.int32)
            if block_table.dim() != 2 or block_table.shape[0] != batch_size:
                rule = f"have shape [batch, pages] with batch {batch_size}"
                checks.fail_range(OP, pages, rule, checks.shape_text(block_table.shape))
            checks.check_device(OP, pages, block_table, own[0].device if own else device)
        groups.append(_Group(own, block_table, table, row_bytes, slots))
    return groups


def _check_apart(groups: Sequence[_Group]) -> None:
    """No cache lies where one of another table lies, or its rows would move twice. Those of a table were looked at."""
    devices = [group.caches[0].device if group.caches else None for group in groups]
    checks.check_memory(
        OP,
        {
            f"caches[{index}].{name}": cache
            for index, (group, device) in enumerate(zip(groups, devices))
            if device is not None and devices.count(device) > 1
            for name, cache in named(group.caches).items()
        },
        {},
    )


def _check_values(group: _Group, accepted_nodes: Tensor, num_accepted: Tensor, cache_lens: Tensor) -> None:
    """Paths increase and stay inside the caches, so every target does, too. CPU tensors only."""
    num_levels, room, block_table = accepted_nodes.shape[1], group.max_slots, group.block_table
    pages = block_table.tolist() if group.caches and block_table is not None and block_table.is_cpu else None
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
            page_size = group.caches[0].shape[1]
            rows = [cache_len + node for node in path] + list(range(cache_len, cache_len + count))
            used = sorted({pages[request][row // page_size] for row in rows})
            if used[0] < 0 or used[-1] >= group.num_slots:
                rule = f"name pages from 0 to {group.num_slots - 1}"
                checks.fail_range(OP, "block_table", rule, f"{used} for request {request}")


backends.register_room(OP, package=__package__)

_operator: Any = backends.define_operator(
    f"{OP}(Tensor(a!)[] caches, Tensor accepted_nodes, Tensor num_accepted, Tensor(b!) cache_lens, "
    "Tensor?[] block_tables, Tensor?[] entries, int[] group_sizes, SymInt[] numbers, str backend) -> ()",
    run=_run,
    fake=_fake,
)
