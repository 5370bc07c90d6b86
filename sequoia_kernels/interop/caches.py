"""Paged caches as servers keep them: flat lists of pages or slots, slots of new rows, lengths that include the tree.

Row s of request b is in page block_table[b, s // page_size] here; its slot is page * page_size + s % page_size there.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from sequoia_kernels import checks

__all__ = [
    "PageLists",
    "SlotLists",
    "committed_lens",
    "from_page_lists",
    "from_slot_lists",
    "lens_with_tree",
    "to_page_lists",
    "to_slot_lists",
    "tree_slots",
]

INTEGERS = (torch.int32, torch.int64)


class SlotLists(NamedTuple):
    """The slots of all requests' rows, one request behind the other (SGLang's kv_indptr and kv_indices).

    Attributes:
        indptr: where each request begins, and the end. [B + 1], int32.
        indices: slots; what lies behind indptr[B] means nothing. [capacity], int32.
    """

    indptr: torch.Tensor
    indices: torch.Tensor


class PageLists(NamedTuple):
    """The pages of all requests, one request behind the other (FlashInfer's paged_kv_*).

    Attributes:
        indptr: where each request begins, and the end. [B + 1], int32.
        indices: pages; what lies behind indptr[B] means nothing. [capacity], int32.
        last_page_len: rows in each request's last page, 1 to the page size; 0 without rows. [B], int32.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


def lens_with_tree(
    cache_lens: torch.Tensor, num_nodes: int | torch.Tensor, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """Give the lengths that servers pass to attention: committed rows and the tree's.

    Args:
        cache_lens: committed rows of each request. [B], int32.
        num_nodes: rows of the tree. A number, or [B].
        dtype: of the result; FlashInfer's xqa wants torch.uint32.

    Returns:
        [B] of `dtype`.

    Raises:
        TypeError: cache_lens is no int32 tensor.

    Example:
        >>> lens_with_tree(torch.tensor([7, 2], dtype=torch.int32), 4).tolist()
        [11, 6]
    """
    checks.check_tensor("lens_with_tree", "cache_lens", cache_lens)
    checks.check_dtype("lens_with_tree", "cache_lens", cache_lens, torch.int32)
    return (cache_lens + num_nodes).to(dtype)


def committed_lens(seq_lens: torch.Tensor, num_nodes: int | torch.Tensor) -> torch.Tensor:
    """Give the lengths that our ops take from those of a server: without the tree.

    Args:
        seq_lens: rows of each request, the tree's included. [B], an integer dtype.
        num_nodes: rows of the tree. A number, or [B].

    Returns:
        [B], int32, contiguous.

    Raises:
        TypeError: seq_lens is no tensor of integers.
        ValueError: on a CPU, a length that is shorter than the tree.

    Example:
        >>> committed_lens(torch.tensor([11, 6]), 4).tolist()
        [7, 2]
    """
    where = "committed_lens"
    checks.check_tensor(where, "seq_lens", seq_lens)
    checks.check_dtype(where, "seq_lens", seq_lens, torch.int32, torch.int64, torch.uint32)
    lens = (seq_lens.to(torch.int64) - num_nodes).to(torch.int32)
    if lens.is_cpu and bool((lens < 0).any()):
        checks.fail_range(where, "seq_lens", f"include the {num_nodes} rows of the tree", seq_lens.tolist())
    return lens.contiguous()


def tree_slots(
    block_table: torch.Tensor, cache_lens: torch.Tensor, node_ids: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Give the slots of tree rows, where their keys and values are to be written (vLLM's slot_mapping).

    Args:
        block_table: page of each stretch of a request's cache. [B, max_pages], int32.
        cache_lens: committed rows of each request. [B], int32.
        node_ids: the nodes that are fed: node j is row cache_lens[b] + j. [N] or [B, N], int32 or int64.
        page_size: rows of a page.

    Returns:
        [B, N], int64: places in `pages.flatten(0, 1)`, pages being [P, page_size, H, D].

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, or (on a CPU) a row behind the last page.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> table, lens = torch.tensor([[5, 3]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
        >>> tree_slots(table, lens, torch.arange(3), page_size=2).tolist()
        [[11, 6, 7]]
    """
    where = "tree_slots"
    _check_table(where, block_table, page_size)
    _check_lens(where, "cache_lens", cache_lens, block_table)
    checks.check_tensor(where, "node_ids", node_ids)
    checks.check_dtype(where, "node_ids", node_ids, *INTEGERS)
    checks.check_device(where, "node_ids", node_ids, block_table.device)
    if node_ids.dim() != 1 and (node_ids.dim() != 2 or len(node_ids) != len(block_table)):
        rule = f"have shape [nodes] or [batch, nodes] with batch {len(block_table)}"
        checks.fail_range(where, "node_ids", rule, checks.shape_text(node_ids.shape))
    rows = cache_lens.to(torch.int64)[:, None] + node_ids
    if rows.is_cpu:
        _check_rows(where, rows, block_table, page_size)
    return block_table.gather(1, rows // page_size).to(torch.int64) * page_size + rows % page_size


def to_slot_lists(
    block_table: torch.Tensor, lens: torch.Tensor, page_size: int, *, capacity: int | None = None
) -> SlotLists:
    """List the slots of every request's first rows.

    Args:
        block_table: page of each stretch of a request's cache. [B, max_pages], int32.
        lens: rows of each request that are listed, the tree's included where it is to be read. [B], int32.
        page_size: rows of a page; 1 lists pages.
        capacity: length of `indices`; None takes B * max_pages * page_size, which is enough.

    Returns:
        SlotLists(indptr, indices); 0 behind the last slot.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device; on a CPU also lengths that the table or the capacity has no room for.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> table = torch.tensor([[5, 3], [2, 0]], dtype=torch.int32)
        >>> lists = to_slot_lists(table, torch.tensor([3, 1], dtype=torch.int32), page_size=2, capacity=4)
        >>> lists.indptr.tolist(), lists.indices.tolist()
        ([0, 3, 4], [10, 11, 6, 4])
    """
    where = "to_slot_lists"
    _check_table(where, block_table, page_size)
    _check_lens(where, "lens", lens, block_table)
    batch_size, max_pages = block_table.shape
    device, max_rows = block_table.device, max_pages * page_size
    if lens.is_cpu and batch_size:
        _check_rows(where, lens.to(torch.int64)[:, None] - 1, block_table, page_size)
    capacity = batch_size * max_rows if capacity is None else capacity
    indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
    torch.cumsum(lens, 0, dtype=torch.int32, out=indptr[1:])
    if lens.is_cpu and int(indptr[-1]) > capacity:
        checks.fail_range(where, "capacity", f"be at least {int(indptr[-1])}, the rows that are listed", capacity)
    rows = torch.arange(max_rows, device=device)
    slots = (block_table[:, :, None] * page_size + torch.arange(page_size, dtype=torch.int32, device=device)).flatten(1)
    places = torch.where(rows < lens[:, None], indptr[:-1, None] + rows, capacity).clamp(max=capacity)
    indices = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
    indices.scatter_(0, places.flatten(), slots.flatten())
    return SlotLists(indptr, indices[:-1])


def from_slot_lists(indptr: torch.Tensor, indices: torch.Tensor, max_rows: int, page_size: int = 1) -> torch.Tensor:
    """Make a block table of flat slot lists.

    Args:
        indptr: where each request's list begins, and the end. [B + 1], int32 or int64.
        indices: slots of the requests' rows, in order. [capacity], int32 or int64.
        max_rows: rows of the longest request, or more.
        page_size: rows of a page. 1 serves any list; with more, the slots of a page must follow each other, the first
            being a multiple of it.

    Returns:
        Block table, [B, ceil(max_rows / page_size)], int32, contiguous, for caches seen as pages of `page_size` rows; 0
        behind a request's last page.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device; on a CPU also lists longer than `max_rows`, or slots that make no pages.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> from_slot_lists(torch.tensor([0, 3, 4]), torch.tensor([10, 11, 6, 4]), max_rows=4, page_size=2).tolist()
        [[5, 3], [2, 0]]
    """
    where = "from_slot_lists"
    for name, part in (("indptr", indptr), ("indices", indices)):
        checks.check_tensor(where, name, part)
        checks.check_dtype(where, name, part, *INTEGERS)
        if part.dim() != 1 or (name == "indptr" and len(part) == 0):
            legend = "batch + 1" if name == "indptr" else "capacity"
            checks.fail_range(where, name, f"have shape [{legend}]", checks.shape_text(part.shape))
    checks.check_device(where, "indices", indices, indptr.device)
    for name, number in (("max_rows", max_rows), ("page_size", page_size)):
        checks.whole_number(where, name, number, rule=checks.at_least(1))
    starts, lens = indptr[:-1].to(torch.int64), indptr.diff().to(torch.int64)
    if indptr.is_cpu:
        _check_lists(where, indptr, indices, max_rows, page_size)
    if len(indices) == 0:
        return torch.zeros(len(starts), -(-max_rows // page_size), dtype=torch.int32, device=indptr.device)
    first_rows = torch.arange(0, max_rows, page_size, device=indptr.device)
    places = (starts[:, None] + first_rows).clamp(max=len(indices) - 1)
    pages = torch.where(first_rows < lens[:, None], indices[places] // page_size, 0)
    return pages.to(torch.int32).contiguous()


def to_page_lists(
    block_table: torch.Tensor, lens: torch.Tensor, page_size: int, *, capacity: int | None = None
) -> PageLists:
    """List every request's pages.

    Args:
        block_table: page of each stretch of a request's cache. [B, max_pages], int32.
        lens: rows of each request, the tree's included where it is to be read. [B], int32.
        page_size: rows of a page.
        capacity: length of `indices`; None takes B * max_pages, which is enough.

    Returns:
        PageLists(indptr, indices, last_page_len); 0 behind the last page.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device; on a CPU also lengths that the table or the capacity has no room for.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> table = torch.tensor([[5, 3], [2, 0]], dtype=torch.int32)
        >>> lists = to_page_lists(table, torch.tensor([3, 1], dtype=torch.int32), page_size=2, capacity=3)
        >>> lists.indptr.tolist(), lists.indices.tolist(), lists.last_page_len.tolist()
        ([0, 2, 3], [5, 3, 2], [1, 1])
    """
    where = "to_page_lists"
    _check_table(where, block_table, page_size)
    _check_lens(where, "lens", lens, block_table)
    num_pages = (lens + page_size - 1) // page_size
    indptr, indices = to_slot_lists(block_table, num_pages, 1, capacity=capacity)
    return PageLists(indptr, indices, lens - (num_pages - 1).clamp(min=0) * page_size)


def from_page_lists(indptr: torch.Tensor, indices: torch.Tensor, max_pages: int) -> torch.Tensor:
    """Make a block table of flat page lists: `from_slot_lists`, each page being one entry.

    Args:
        indptr: where each request's list begins, and the end. [B + 1], int32 or int64.
        indices: pages of the requests, in order. [capacity], int32 or int64.
        max_pages: pages of the longest request, or more.

    Returns:
        Block table, [B, max_pages], int32, contiguous; 0 behind a request's last page.

    Raises:
        TypeError, ValueError: as `from_slot_lists`.

    Example:
        >>> from_page_lists(torch.tensor([0, 2, 3]), torch.tensor([5, 3, 2]), 2).tolist()
        [[5, 3], [2, 0]]
    """
    return from_slot_lists(indptr, indices, max_pages)


def _check_table(where: str, block_table: torch.Tensor, page_size: int) -> None:
    checks.check_tensor(where, "block_table", block_table)
    checks.check_dtype(where, "block_table", block_table, torch.int32)
    if block_table.dim() != 2:
        checks.fail_range(where, "block_table", "have shape [batch, pages]", checks.shape_text(block_table.shape))
    checks.whole_number(where, "page_size", page_size, rule=checks.at_least(1))


def _check_lens(where: str, name: str, lens: torch.Tensor, block_table: torch.Tensor) -> None:
    checks.check_tensor(where, name, lens)
    checks.check_row_values(where, name, lens, len(block_table), torch.int32, block_table.device, "batch")


def _check_rows(where: str, rows: torch.Tensor, block_table: torch.Tensor, page_size: int) -> None:
    """Raise ValueError where a row of a request lies behind its last page. rows: [B, any], int64; -1 for none."""
    max_rows = block_table.shape[1] * page_size
    outside = (rows < -1) | (rows >= max_rows)
    if bool(outside.any()):
        request, column = outside.nonzero()[0].tolist()
        rule = f"have a page for every row of {block_table.shape[1]} pages of {page_size}"
        checks.fail_range(where, "block_table", rule, f"row {int(rows[request, column])} of request {request}")


def _check_lists(where: str, indptr: torch.Tensor, indices: torch.Tensor, max_rows: int, page_size: int) -> None:
    """Raise ValueError unless lists lie in their buffer, fit into a table, and consist of whole pages. Reads values."""
    bounds = indptr.tolist()
    if bounds[0] < 0 or sorted(bounds) != bounds or bounds[-1] > len(indices):
        checks.fail_range(where, "indptr", f"rise within 0..{len(indices)}", bounds)
    for request, (start, end) in enumerate(pairwise(bounds)):
        if end - start > max_rows:
            checks.fail_range(where, "max_rows", f"be at least {end - start} for request {request}", max_rows)
        slots = indices[start:end].tolist()
        for row, slot in enumerate(slots):
            first = slots[row - row % page_size]
            if first % page_size or slot != first + row % page_size:
                rule = f"list pages of {page_size} slots whole"
                checks.fail_range(where, "indices", rule, f"slot {slot} at row {row} of request {request}")
