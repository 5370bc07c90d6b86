"""What a kernel must know to reach every layer's cache in one launch: a table of addresses and strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sequoia_kernels import checks

ENTRY_FIELDS = ("base", "stride_outer", "stride_slot", "stride_head", "num_heads", "head_bytes", "extent")
"""Columns of the table. Strides in bytes; outer = request (or page), extent = slots a request (or pages)."""


class CacheTable:
    """The caches of all layers, checked once, with their addresses and strides in a tensor on their device.

    Building the table at every call would cost more than the moves themselves, and could not be captured in a CUDA
    graph. It holds the caches, so their memory stays where it is; it is void if a cache is resized or set to other
    storage. A graph reads the table at every replay: keep it for as long as the graph.

    Args:
        caches: K and V of every layer, in any order, on one device. Each [B, S, H, D], or pages [P, page, H, D] with
            ``paged``; any dtype and any strides with the last dimension contiguous. H, D and dtype may differ from
            cache to cache, S (or P) too: the smallest counts.
        paged: the caches are pages, to be used with a block table.

    Attributes:
        caches: the tensors, a tuple.
        paged: as given.
        entries: [num_caches, 7] int64 on the caches' device; columns as in ``ENTRY_FIELDS``.
        address_sum: sum of the caches' addresses, which tells whether the table still describes them.
        max_row_bytes: bytes of the widest row, H * D * itemsize.
        num_slots: the smallest S, or the smallest P if paged.

    Raises:
        TypeError: something is not a tensor.
        ValueError: a wrong shape, layout or device, caches that disagree on B or on the page size or share memory.

    Example:
        >>> table = CacheTable([torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 2, 4)])
        >>> table.entries.shape, table.num_slots, table.max_row_bytes
        (torch.Size([2, 7]), 8, 32)
    """

    __slots__ = ("address_sum", "caches", "entries", "max_row_bytes", "num_slots", "paged")

    def __init__(self, caches: Sequence[Tensor], *, paged: bool = False) -> None:
        if not isinstance(caches, (list, tuple)):
            raise TypeError(f"CacheTable: caches must be a list of tensors, got {type(caches).__name__}")
        if not isinstance(paged, bool):
            raise TypeError(f"CacheTable: paged must be a bool, got {type(paged).__name__}")
        self.caches = tuple(caches)
        self.paged = paged
        check_caches("CacheTable", self.caches, paged)
        checks.check_memory("CacheTable", named(self.caches), {})
        self.entries = cache_entries(self.caches, paged)
        self.address_sum = sum_of_addresses(self.caches)
        self.max_row_bytes = max_row_bytes(self.caches)
        self.num_slots = num_slots(self.caches, paged)

    @classmethod
    def by_device(cls, caches: Sequence[Tensor], *, paged: bool = False) -> list[CacheTable]:
        """Make one table for each device that caches lie on, for a model that is spread over several.

        Args:
            caches: as for one table, but on any devices.
            paged: as for one table.

        Returns:
            The tables, in the order in which the devices appear; ``compact_kv_cache_`` takes them all in one call.

        Example:
            >>> CacheTable.by_device([torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 2, 4)])
            [CacheTable(2 caches, 8 slots)]
        """
        groups: dict[torch.device, list[Tensor]] = {}
        for index, cache in enumerate(caches):
            checks.check_tensor("CacheTable", f"caches[{index}]", cache)
            groups.setdefault(cache.device, []).append(cache)
        return [cls(group, paged=paged) for group in groups.values()]

    def __len__(self) -> int:
        return len(self.caches)

    def __repr__(self) -> str:
        kind = "paged caches" if self.paged else "caches"
        return f"CacheTable({len(self.caches)} {kind}, {self.num_slots} {'pages' if self.paged else 'slots'})"


def check_caches(op: str, caches: Sequence[Tensor], paged: bool) -> None:
    """Check types, shapes, layouts and devices of the caches."""
    legend = "pages, page size, heads, head dim" if paged else "batch, slots, heads, head dim"
    shared_dim = 1 if paged else 0  # the size that all caches share: the page size, or the batch
    for index, cache in enumerate(caches):
        name = f"caches[{index}]"
        checks.check_tensor(op, name, cache)
        checks.check_rows(op, name, cache, legend)
        checks.check_device(op, name, cache, caches[0].device)
        if cache.shape[shared_dim] != caches[0].shape[shared_dim]:
            rule = f"have the {'page size' if paged else 'batch'} {caches[0].shape[shared_dim]} of caches[0]"
            checks.fail_range(op, name, rule, checks.shape_text(cache.shape))


def named(caches: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """The caches by the names that messages give them."""
    return {f"caches[{index}]": cache for index, cache in enumerate(caches)}


def cache_entries(caches: Sequence[Tensor], paged: bool) -> Tensor:
    """The table. [num_caches, 7] int64 on the caches' device."""
    rows = []
    for cache in caches:
        size = cache.element_size()
        strides = [stride * size for stride in cache.stride()[:3]]
        num_heads, head_dim = cache.shape[2:]
        rows.append([cache.data_ptr(), *strides, num_heads, head_dim * size, cache.shape[0 if paged else 1]])
    entries = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(ENTRY_FIELDS))
    return entries.to(caches[0].device) if rows else entries


def sum_of_addresses(caches: Sequence[Tensor]) -> int:
    """One number that changes when any cache lies elsewhere."""
    return sum([cache.data_ptr() for cache in caches])


def max_row_bytes(caches: Sequence[Tensor]) -> int:
    """Bytes of the widest row."""
    return max((cache.shape[2] * cache.shape[3] * cache.element_size() for cache in caches), default=0)


def num_slots(caches: Sequence[Tensor], paged: bool) -> int:
    """The smallest number of slots (pages, if paged) of a cache."""
    return min((cache.shape[0 if paged else 1] for cache in caches), default=0)


def length_bits(num_caches: int, num_slices: int, max_slots: int) -> tuple[int, int] | None:
    """Choose how many programs share a cache, and how many bits of a length's word stay the length's own.

    A kernel that moves the rows and advances the lengths in one launch counts in the bits above a length the programs
    that have read it; the last one writes the new length.

    Args:
        num_caches: caches of the launch.
        num_slices: programs that may share the columns of a cache, if there are bits to count them.
        max_slots: rows that a request has room for: its largest length.

    Returns:
        (programs that share a cache, low bits of the word that hold the length), or None if no word of 31 bits can hold
        both a length and the number of programs.
    """
    for slices in (num_slices, 1):  # one slice does with the fewest programs; each of them then takes all columns
        bits = 31 - (slices * max(num_caches, 1)).bit_length()
        if max_slots.bit_length() <= bits:
            return slices, bits
    return None
