"""Pages, slots and lengths: written out by hand, round trips, and the ops on what comes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sequoia_kernels import TokenTree, compact_kv_cache_, tree_attention
from sequoia_kernels.interop import (
    committed_lens,
    from_page_lists,
    from_slot_lists,
    lens_with_tree,
    to_page_lists,
    to_slot_lists,
    tree_slots,
)


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


TABLE = int32([[5, 3, 9], [2, 0, 0], [7, 1, 0]])  # pages of two rows
LENS = int32([5, 0, 4])


def test_lists_written_by_hand() -> None:
    slots = to_slot_lists(TABLE, LENS, 2)
    assert slots.indptr.tolist() == [0, 5, 5, 9]
    assert slots.indices.tolist() == [10, 11, 6, 7, 18, 14, 15, 2, 3] + [0] * 9
    pages = to_page_lists(TABLE, LENS, 2)
    assert pages.indptr.tolist() == [0, 3, 3, 5]
    assert pages.indices.tolist() == [5, 3, 9, 7, 1, 0, 0, 0, 0]
    assert pages.last_page_len.tolist() == [1, 0, 2]
    assert {part.dtype for part in (*slots, *pages)} == {torch.int32}
    assert from_slot_lists(*slots, max_rows=5).tolist() == [[10, 11, 6, 7, 18], [0] * 5, [14, 15, 2, 3, 0]]
    assert from_slot_lists(*slots, max_rows=5, page_size=2).tolist() == [[5, 3, 9], [0, 0, 0], [7, 1, 0]]
    assert from_page_lists(*pages[:2], max_pages=4).tolist() == [[5, 3, 9, 0], [0] * 4, [7, 1, 0, 0]]


def test_slots_of_trees_written_by_hand() -> None:
    lens = int32([3, 0, 1])
    assert tree_slots(TABLE, lens, torch.arange(2), 2).tolist() == [[7, 18], [4, 5], [15, 2]]
    assert tree_slots(TABLE, lens, int32([[2], [1], [0]]), 2).tolist() == [[19], [5], [15]]


def test_lengths() -> None:
    for dtype in (torch.int32, torch.int64, torch.uint32):
        lens = lens_with_tree(LENS, 4, dtype)
        assert lens.dtype == dtype and lens.tolist() == [9, 4, 8]
        assert committed_lens(lens, 4).tolist() == LENS.tolist() and committed_lens(lens, 4).dtype == torch.int32
    assert lens_with_tree(LENS, int32([1, 2, 3])).tolist() == [6, 2, 7]


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A block table of pages that are used once, lengths that it has room for, and the page size."""
    batch_size, max_pages, page_size = (draw(st.integers(1, most)) for most in (4, 5, 7))
    pages = draw(st.permutations(range(batch_size * max_pages)))
    lens = [draw(st.integers(0, max_pages * page_size)) for _ in range(batch_size)]
    return int32(pages).reshape(batch_size, max_pages), int32(lens), page_size


@settings(max_examples=80, deadline=None)
@given(tables())
def test_tables_come_back(table: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    block_table, lens, page_size = table
    num_pages = (lens + page_size - 1) // page_size
    max_pages = block_table.shape[1]
    wanted = torch.where(torch.arange(max_pages) < num_pages[:, None], block_table, 0)
    slots = to_slot_lists(block_table, lens, page_size)
    assert torch.equal(from_slot_lists(*slots, max_pages * page_size, page_size), wanted)
    pages = to_page_lists(block_table, lens, page_size)
    assert torch.equal(from_page_lists(*pages[:2], max_pages), wanted)
    assert ((pages.indptr.diff() - 1).clamp(min=0) * page_size + pages.last_page_len).tolist() == lens.tolist()
    for request, count in enumerate(lens.tolist()):
        mine = slots.indices[slots.indptr[request] : slots.indptr[request + 1]].tolist()
        rows = tree_slots(block_table[[request]], int32([0]), torch.arange(count), page_size)
        assert mine == rows[0].tolist()
    total = int(lens.sum())
    exact = to_slot_lists(block_table, lens, page_size, capacity=total)
    assert torch.equal(exact.indices, slots.indices[:total])


def test_the_ops_take_what_comes_out() -> None:
    """Pages of four rows, and the same rows as pages of one: the same attention, and the same rows moved."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(12, 4, 2, 8, generator=generator) for _ in range(2))
    queries = torch.randn(2, 4, 4, 8, generator=generator)
    block_table, lens = int32([[7, 2, 9], [1, 11, 4]]), int32([6, 3])
    mask = TokenTree([-1, 0, 0, 1]).ancestor_mask()
    wanted = tree_attention(queries, keys, values, mask, lens, block_table=block_table).out
    lists = to_slot_lists(block_table, lens_with_tree(lens, 4), 4)
    slots = from_slot_lists(*lists, max_rows=10)
    rows = [cache.view(48, 1, 2, 8) for cache in (keys, values)]
    found = tree_attention(queries, *rows, mask, lens, block_table=slots).out
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    path, counts = int32([[0, 1, 3], [0, 2, -1]]), int32([3, 2])
    moved = [cache.clone() for cache in (keys, values)]
    compact_kv_cache_(moved, path, counts, lens.clone(), block_table=block_table)
    compact_kv_cache_(rows, path, counts, lens, block_table=slots)
    assert torch.equal(keys, moved[0]) and torch.equal(values, moved[1]) and lens.tolist() == [9, 5]


def test_nothing_is_read_on_a_device() -> None:
    table, lens = (part.to("meta") for part in (TABLE, LENS))
    slots = to_slot_lists(table, lens, 2)
    assert slots.indices.shape == (18,)
    assert from_slot_lists(*slots, max_rows=6, page_size=2).shape == (3, 3)
    assert to_page_lists(table, lens, 2).indices.shape == (9,)
    assert tree_slots(table, lens, torch.arange(2, device="meta"), 2).shape == (3, 2)
    assert committed_lens(lens_with_tree(lens, 4), 4).shape == (3,)


def test_wrong_arguments() -> None:
    nodes = torch.arange(2)
    for call, error, message in (
        (lambda: to_slot_lists(TABLE.long(), LENS, 2), TypeError, "to_slot_lists: block_table must have dtype int32"),
        (
            lambda: to_slot_lists(TABLE[0], LENS, 2),
            ValueError,
            r"block_table must have shape \[batch, pages\], got \[3\]",
        ),
        (lambda: to_slot_lists(TABLE, LENS[:2], 2), ValueError, r"lens must have shape \[batch\] = \[3\], got \[2\]"),
        (lambda: to_slot_lists(TABLE, LENS, 0), ValueError, "page_size must be at least 1, got 0"),
        (
            lambda: to_slot_lists(TABLE, LENS + 2, 2),
            ValueError,
            "block_table must have a page for every row of 3 pages of 2, got row 6 of request 0",
        ),
        (
            lambda: to_slot_lists(TABLE, LENS, 2, capacity=8),
            ValueError,
            "capacity must be at least 9, the rows that are",
        ),
        (
            lambda: tree_slots(TABLE, LENS, nodes, 2),
            ValueError,
            "tree_slots: block_table must have a page for every row",
        ),
        (lambda: tree_slots(TABLE, LENS, nodes.float(), 2), TypeError, "node_ids must have dtype int32 or int64"),
        (
            lambda: tree_slots(TABLE, LENS, nodes[:, None], 2),
            ValueError,
            r"node_ids must have shape .* batch 3, got \[2, 1\]",
        ),
        (lambda: from_slot_lists(int32([]), LENS, 4), ValueError, r"indptr must have shape \[batch \+ 1\], got \[0\]"),
        (lambda: from_slot_lists(int32([0, 4]), LENS, 4), ValueError, r"indptr must rise within 0\.\.3, got \[0, 4\]"),
        (
            lambda: from_slot_lists(int32([0, 3]), LENS, 2),
            ValueError,
            "max_rows must be at least 3 for request 0, got 2",
        ),
        (
            lambda: from_slot_lists(int32([0, 3]), int32([4, 5, 7]), 4, page_size=2),
            ValueError,
            "indices must list pages of 2 slots whole, got 7 at place 2 of request 0",
        ),
        (
            lambda: committed_lens(LENS, 1),
            ValueError,
            r"committed_lens: seq_lens must include the 1 rows .*\[5, 0, 4\]",
        ),
        (
            lambda: lens_with_tree(LENS.long(), 1),
            TypeError,
            "lens_with_tree: cache_lens must have dtype int32, got int64",
        ),
        (
            lambda: lens_with_tree(LENS, 1.5),
            TypeError,
            r"num_nodes must be an integer or a tensor \[batch\], got float",
        ),
        (lambda: lens_with_tree(LENS, -1), ValueError, "lens_with_tree: num_nodes must be at least 0, got -1"),
        (
            lambda: lens_with_tree(LENS, LENS[:, None]),
            ValueError,
            r"num_nodes must have shape .* = \[3\], got \[3, 1\]",
        ),
        (lambda: lens_with_tree(LENS, -LENS), ValueError, "lens_with_tree: num_nodes must not be negative, got -5"),
        (
            lambda: lens_with_tree(LENS, 1, torch.float32),
            TypeError,
            "lens_with_tree: dtype must be one of torch.int32, ",
        ),
        (lambda: lens_with_tree(LENS - 1, 9, torch.uint32), ValueError, "cache_lens must not be negative, got -1"),
        (
            lambda: lens_with_tree(LENS, 2**31 - 5),
            ValueError,
            "cache_lens must be at most 2147483647 with the tree, got 2",
        ),
        (lambda: lens_with_tree(LENS[None], 1), ValueError, r"cache_lens must have shape \[batch\], got \[1, 3\]"),
        (lambda: committed_lens(LENS[None], 0), ValueError, r"seq_lens must have shape \[batch\], got \[1, 3\]"),
        (lambda: committed_lens(LENS, 1.5), TypeError, "committed_lens: num_nodes must be an integer or a tensor"),
        (lambda: committed_lens(LENS, LENS + 1), ValueError, r"seq_lens must include the \[6, 1, 5\] rows of the tree"),
        (
            lambda: committed_lens(LENS.long() + 2**31, 1),
            ValueError,
            "seq_lens must be at most 2147483647 without the tree, got 2147483652",
        ),
        (
            lambda: tree_slots(TABLE, LENS - 1, nodes, 2),
            ValueError,
            "tree_slots: cache_lens must not be negative, got -1",
        ),
        (
            lambda: tree_slots(TABLE, LENS, nodes - 1, 2),
            ValueError,
            "tree_slots: node_ids must not be negative, got -1",
        ),
        (
            lambda: tree_slots(TABLE - 3, int32([0, 0, 0]), nodes, 2),
            ValueError,
            "tree_slots: block_table must not be negative in pages that are used, got -1",
        ),
        (lambda: tree_slots(TABLE, LENS, nodes, 2**31), ValueError, "tree_slots: page_size must fit into int32"),
        (lambda: to_slot_lists(TABLE, LENS - 1, 2), ValueError, "to_slot_lists: lens must not be negative, got -1"),
        (lambda: to_page_lists(TABLE, LENS - 1, 4), ValueError, "to_page_lists: lens must not be negative, got -1"),
        (
            lambda: to_page_lists(TABLE, LENS + 2, 2),
            ValueError,
            "to_page_lists: block_table must have a page for every row of 3 pages of 2, got row 6 of request 0",
        ),
        (
            lambda: to_page_lists(TABLE, LENS, 2, capacity=4),
            ValueError,
            "to_page_lists: capacity must be at least 5, the pa",
        ),
        (lambda: to_slot_lists(TABLE, LENS, 2, capacity=9.0), TypeError, "capacity must be an integer, got float"),
        (lambda: to_slot_lists(TABLE, LENS, 2, capacity=-1), ValueError, "capacity must be at least 0, got -1"),
        (
            lambda: to_page_lists(TABLE - 2, LENS, 2),
            ValueError,
            "to_page_lists: block_table must be from 0 to 2147483647 in pages that are listed, got -1",
        ),
        (
            lambda: to_slot_lists(TABLE + 2**29, LENS, 4),
            ValueError,
            "to_slot_lists: block_table must be from 0 to 536870911 in pages that are listed, got 5368709",
        ),
        (
            lambda: from_slot_lists(int32([0, 3]), LENS - 1, 3),
            ValueError,
            "indices must be from 0 to .*, got -1 at place 1",
        ),
        (
            lambda: from_slot_lists(int32([0, 1]), LENS.long() + 2**31, 3),
            ValueError,
            "indices must be from 0 to 2147483647",
        ),
        (
            lambda: from_page_lists(int32([0, 3]), LENS, 2),
            ValueError,
            "from_page_lists: max_pages must be at least 3 for request 0, got 2",
        ),
        (
            lambda: from_page_lists(int32([0, 4]), LENS, 2),
            ValueError,
            r"from_page_lists: indptr must rise within 0\.\.3",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    # What is not used may be anything; servers pad with -1.
    padded = torch.where(TABLE == 0, -1, TABLE)
    assert torch.equal(to_slot_lists(padded, LENS, 2).indices, to_slot_lists(TABLE, LENS, 2).indices)
    assert tree_slots(padded, int32([5, 0, 3]), nodes[:1], 2).tolist() == [[19], [4], [3]]
    # The last slot that fits is listed.
    last = to_slot_lists(int32([[2**29 - 1]]), int32([4]), 4)
    assert last.indices.tolist() == [2**31 - 4, 2**31 - 3, 2**31 - 2, 2**31 - 1]
