"""Paged caches as servers keep them: flat lists of pages or slots, slots of new rows, lengths that include the tree.

Row s of request b is in page block_table[b, s // page_size] here; its slot is page * page_size + s % page_size there.
"""

from __future__ import annotations

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
LENGTHS = (torch.int32, torch.int64, torch.uint32)


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
        num_nodes: rows of the tree. An integer, or [B], int32 or int64.
        dtype: of the result: int32, int64 or uint32, which FlashInfer's xqa wants.

    Returns:
        [B] of `dtype`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, or (on a CPU) negative numbers, or sums that `dtype` does not hold.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> lens_with_tree(torch.tensor([7, 2], dtype=torch.int32), 4).tolist()
        [11, 6]
    """
    where = "lens_with_tree"
    _check_vector(where, "cache_lens", cache_lens, torch.int32)
    if dtype not in LENGTHS:
        raise TypeError(f"{where}: dtype must be one of {', '.join(map(str, LENGTHS))}, got {dtype}")
    lens = cache_lens.to(torch.int64) + _tree_rows(where, num_nodes, cache_lens)
    if lens.is_cpu:
        _check_not_negative(where, "cache_lens", cache_lens)
        most = torch.iinfo(dtype).max
        if bool((lens > most).any()):
            checks.fail_range(where, "cache_lens", f"be at most {most} with the tree", int(lens.max()))
    return lens.to(dtype)


def committed_lens(seq_lens: torch.Tensor, num_nodes: int | torch.Tensor) -> torch.Tensor:
    """Give the lengths that our ops take from those of a server: without the tree.

    Args:
        seq_lens: rows of each request, the tree's included. [B], int32, int64 or uint32.
        num_nodes: rows of the tree. An integer, or [B], int32 or int64.

    Returns:
        [B], int32, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, or (on a CPU) a length that is shorter than the tree, or beyond int32.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> committed_lens(torch.tensor([11, 6]), 4).tolist()
        [7, 2]
    """
    where = "committed_lens"
    _check_vector(where, "seq_lens", seq_lens, *LENGTHS)
    lens = seq_lens.to(torch.int64) - _tree_rows(where, num_nodes, seq_lens)
    if lens.is_cpu:
        if bool((lens < 0).any()):
            rows = num_nodes.tolist() if isinstance(num_nodes, torch.Tensor) else num_nodes
            checks.fail_range(where, "seq_lens", f"include the {rows} rows of the tree", seq_lens.tolist())
        most = torch.iinfo(torch.int32).max
        if bool((lens > most).any()):
            checks.fail_range(where, "seq_lens", f"be at most {most} without the tree", int(lens.max()))
    return lens.to(torch.int32)


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
        ValueError: a wrong shape or device, or (on a CPU) a negative number, or a row that has no page.

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
        _check_not_negative(where, "node_ids", node_ids)
        _check_rows(where, rows, block_table, page_size)
    pages = block_table.gather(1, rows // page_size).to(torch.int64)
    if pages.is_cpu:
        _check_not_negative(where, "block_table", pages, "pages that are used")
    return pages * page_size + rows % page_size


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
        ValueError: a wrong shape or device; on a CPU also lengths that are negative or that the table or the capacity
            has no room for, and listed pages that are negative or whose slots are beyond int32.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> table = torch.tensor([[5, 3], [2, 0]], dtype=torch.int32)
        >>> lists = to_slot_lists(table, torch.tensor([3, 1], dtype=torch.int32), page_size=2, capacity=4)
        >>> lists.indptr.tolist(), lists.indices.tolist()
        ([0, 3, 4], [10, 11, 6, 4])
    """
    where = "to_slot_lists"
    _check_listed(where, block_table, lens, page_size)
    return _listed(where, block_table, lens, page_size, capacity, "rows")


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
        ValueError: a wrong shape or device; on a CPU also lists that lie outside of `indices` or are longer than
            `max_rows`, and slots that are negative, make no pages, or are on pages beyond int32.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> from_slot_lists(torch.tensor([0, 3, 4]), torch.tensor([10, 11, 6, 4]), max_rows=4, page_size=2).tolist()
        [[5, 3], [2, 0]]
    """
    return _table("from_slot_lists", indptr, indices, "max_rows", max_rows, page_size)


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
        ValueError: a wrong shape or device; on a CPU also lengths that are negative or that the table or the capacity
            has no room for, and listed pages that are negative or whose slots are beyond int32.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> table = torch.tensor([[5, 3], [2, 0]], dtype=torch.int32)
        >>> lists = to_page_lists(table, torch.tensor([3, 1], dtype=torch.int32), page_size=2, capacity=3)
        >>> lists.indptr.tolist(), lists.indices.tolist(), lists.last_page_len.tolist()
        ([0, 2, 3], [5, 3, 2], [1, 1])
    """
    where = "to_page_lists"
    _check_listed(where, block_table, lens, page_size)
    num_pages = (lens.to(torch.int64) + page_size - 1) // page_size
    indptr, indices = _listed(where, block_table, num_pages, 1, capacity, "pages")
    return PageLists(indptr, indices, (lens - (num_pages - 1).clamp(min=0) * page_size).to(torch.int32))


def from_page_lists(indptr: torch.Tensor, indices: torch.Tensor, max_pages: int) -> torch.Tensor:
    """Make a block table of flat page lists: `from_slot_lists`, each page being one entry.

    Args:
        indptr: where each request's list begins, and the end. [B + 1], int32 or int64.
        indices: pages of the requests, in order. [capacity], int32 or int64.
        max_pages: pages of the longest request, or more.

    Returns:
        Block table, [B, max_pages], int32, contiguous; 0 behind a request's last page.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device; on a CPU also lists that lie outside of `indices` or are longer than
            `max_pages`, and pages that are negative or beyond int32.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> from_page_lists(torch.tensor([0, 2, 3]), torch.tensor([5, 3, 2]), 2).tolist()
        [[5, 3], [2, 0]]
    """
    return _table("from_page_lists", indptr, indices, "max_pages", max_pages, 1)


def _listed(
    where: str, block_table: torch.Tensor, lens: torch.Tensor, page_size: int, capacity: int | None, unit: str
) -> SlotLists:
    """List `lens` slots of every request; `unit` is what messages call them."""
    batch_size, max_pages = block_table.shape
    device, max_rows = block_table.device, max_pages * page_size
    if capacity is None:
        capacity = batch_size * max_rows
    else:
        capacity = checks.whole_number(where, "capacity", capacity, rule=checks.at_least(0))
    if lens.is_cpu:
        total = int(lens.sum())
        if total > capacity:
            checks.fail_range(where, "capacity", f"be at least {total}, the {unit} that are listed", capacity)
        most = (torch.iinfo(torch.int32).max + 1) // page_size - 1
        is_listed = page_size * torch.arange(max_pages) < lens[:, None]
        outside = is_listed & ((block_table < 0) | (block_table > most))
        if bool(outside.any()):
            rule = f"be from 0 to {most} in pages that are listed"
            checks.fail_range(where, "block_table", rule, int(block_table[outside][0]))
    indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
    torch.cumsum(lens, 0, dtype=torch.int32, out=indptr[1:])
    rows = torch.arange(max_rows, device=device)
    slots = (block_table[:, :, None] * page_size + torch.arange(page_size, dtype=torch.int32, device=device)).flatten(1)
    places = torch.where(rows < lens[:, None], indptr[:-1, None] + rows, capacity).clamp(max=capacity)
    indices = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
    indices.scatter_(0, places.flatten(), slots.flatten())
    return SlotLists(indptr, indices[:-1])


def _table(
    where: str, indptr: torch.Tensor, indices: torch.Tensor, bound: str, max_rows: int, page_size: int
) -> torch.Tensor:
    """Make the block table of flat lists; `bound` is what messages call `max_rows`."""
    for name, part in (("indptr", indptr), ("indices", indices)):
        checks.check_tensor(where, name, part)
        checks.check_dtype(where, name, part, *INTEGERS)
        if part.dim() != 1 or (name == "indptr" and len(part) == 0):
            legend = "batch + 1" if name == "indptr" else "capacity"
            checks.fail_range(where, name, f"have shape [{legend}]", checks.shape_text(part.shape))
    checks.check_device(where, "indices", indices, indptr.device)
    for name, number in ((bound, max_rows), ("page_size", page_size)):
        checks.whole_number(where, name, number, rule=checks.at_least(1))
    starts, lens = indptr[:-1].to(torch.int64), indptr.diff().to(torch.int64)
    if indptr.is_cpu:
        _check_lists(where, indptr, indices, bound, max_rows, page_size)
    if len(indices) == 0:
        return torch.zeros(len(starts), -(-max_rows // page_size), dtype=torch.int32, device=indptr.device)
    first_rows = torch.arange(0, max_rows, page_size, device=indptr.device)
    places = (starts[:, None] + first_rows).clamp(max=len(indices) - 1)
    pages = torch.where(first_rows < lens[:, None], indices[places] // page_size, 0)
    return pages.to(torch.int32).contiguous()


def _check_vector(where: str, name: str, lens: torch.Tensor, *dtypes: torch.dtype) -> None:
    checks.check_tensor(where, name, lens)
    checks.check_dtype(where, name, lens, *dtypes)
    if lens.dim() != 1:
        checks.fail_range(where, name, "have shape [batch]", checks.shape_text(lens.shape))


def _tree_rows(where: str, num_nodes: int | torch.Tensor, lens: torch.Tensor) -> int | torch.Tensor:
    """Check the rows of the requests' trees: a number, or one for each of the lengths."""
    if not isinstance(num_nodes, torch.Tensor):
        kind = "an integer or a tensor [batch]"
        return checks.whole_number(where, "num_nodes", num_nodes, kind=kind, rule=checks.at_least(0))
    checks.check_dtype(where, "num_nodes", num_nodes, *INTEGERS)
    checks.check_shape(where, "num_nodes", num_nodes, tuple(lens.shape), "batch")
    checks.check_device(where, "num_nodes", num_nodes, lens.device)
    if num_nodes.is_cpu:
        _check_not_negative(where, "num_nodes", num_nodes)
    return num_nodes


def _check_table(where: str, block_table: torch.Tensor, page_size: int) -> None:
    checks.check_tensor(where, "block_table", block_table)
    checks.check_dtype(where, "block_table", block_table, torch.int32)
    if block_table.dim() != 2:
        checks.fail_range(where, "block_table", "have shape [batch, pages]", checks.shape_text(block_table.shape))
    checks.whole_number(where, "page_size", page_size, torch.int32, rule=checks.at_least(1))


def _check_lens(where: str, name: str, lens: torch.Tensor, block_table: torch.Tensor) -> None:
    checks.check_tensor(where, name, lens)
    checks.check_row_values(where, name, lens, len(block_table), torch.int32, block_table.device, "batch")
    if lens.is_cpu:
        _check_not_negative(where, name, lens)


def _check_not_negative(where: str, name: str, values: torch.Tensor, which: str = "") -> None:
    """Raise ValueError if a value is negative. Reads values."""
    if bool((values < 0).any()):
        checks.fail_range(where, name, "not be negative" + (f" in {which}" if which else ""), int(values.min()))


def _check_listed(where: str, block_table: torch.Tensor, lens: torch.Tensor, page_size: int) -> None:
    """A table, and lengths that it has pages for."""
    _check_table(where, block_table, page_size)
    _check_lens(where, "lens", lens, block_table)
    if lens.is_cpu:
        _check_rows(where, lens.to(torch.int64)[:, None] - 1, block_table, page_size)


def _check_rows(where: str, rows: torch.Tensor, block_table: torch.Tensor, page_size: int) -> None:
    """Raise ValueError where a row of a request lies behind its last page. rows: [B, any], int64. Reads values."""
    outside = rows >= block_table.shape[1] * page_size
    if bool(outside.any()):
        request, column = outside.nonzero()[0].tolist()
        rule = f"have a page for every row of {block_table.shape[1]} pages of {page_size}"
        checks.fail_range(where, "block_table", rule, f"row {int(rows[request, column])} of request {request}")


def _check_lists(
    where: str, indptr: torch.Tensor, indices: torch.Tensor, bound: str, max_rows: int, page_size: int
) -> None:
    """Raise ValueError unless lists lie in their buffer, fit into a table, and consist of whole pages. Reads values."""
    if int(indptr[0]) < 0 or bool((indptr.diff() < 0).any()) or int(indptr[-1]) > len(indices):
        checks.fail_range(where, "indptr", f"rise within 0..{len(indices)}", indptr.tolist())
    lens = indptr.diff().to(torch.int64)
    if bool((lens > max_rows).any()):
        request = int((lens > max_rows).nonzero()[0])
        checks.fail_range(where, bound, f"be at least {int(lens[request])} for request {request}", max_rows)
    requests = torch.arange(len(lens)).repeat_interleave(lens)
    places = torch.arange(int(indptr[0]), int(indptr[-1]))
    rows = places - indptr[requests]
    slots, in_page = indices[places].to(torch.int64), rows % page_size
    first_slots = indices[places - in_page]
    most = page_size * (torch.iinfo(torch.int32).max + 1) - 1
    for rule, broken in (
        (f"be from 0 to {most}", (slots < 0) | (slots > most)),
        (f"list pages of {page_size} slots whole", (first_slots % page_size != 0) | (slots != first_slots + in_page)),
    ):
        if bool(broken.any()):
            first = int(broken.nonzero()[0])
            actual = f"{int(slots[first])} at place {int(rows[first])} of request {int(requests[first])}"
            checks.fail_range(where, "indices", rule, actual)
