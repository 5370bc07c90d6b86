"""Masks in other words: written out by hand, and round trips over random trees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sequential import ancestors
from support.trees import parents_lists

from sequoia_kernels import TokenTree, Topology
from sequoia_kernels.interop import flat_mask, from_bool_mask, from_mask_words, to_bool_mask, to_mask_words

PARENTS = [-1, 0, 0, 1]
MASK = TokenTree(PARENTS).ancestor_mask()


def sees(parents: list[int]) -> list[list[bool]]:
    """Who sees whom, node by node."""
    return [[other in ancestors(parents, node) for other in range(len(parents))] for node in range(len(parents))]


def test_a_mask_written_by_hand() -> None:
    assert to_bool_mask(MASK).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert to_mask_words(MASK, torch.uint8, 1).tolist() == [[1], [3], [5], [11]]  # a byte a row
    assert to_mask_words(MASK, torch.uint16).tolist() == [[1, 0], [3, 0], [5, 0], [11, 0]]  # two words for 32 nodes
    lens = torch.tensor([2, 0], dtype=torch.int32)
    rows = [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1]]
    expected = [bit for row in rows for bit in row] + [bit for row in rows for bit in row[2:]]
    assert flat_mask(MASK, lens).int().tolist() == expected
    assert flat_mask(MASK, lens, size=42).int().tolist() == [*expected, 0, 0]


@settings(max_examples=60, deadline=None)
@given(parents_lists(max_nodes=100))
def test_masks_come_back(parents: list[int]) -> None:
    mask = TokenTree(parents).ancestor_mask()
    booleans = to_bool_mask(mask)
    assert booleans.tolist() == sees(parents)
    assert torch.equal(from_bool_mask(booleans), mask)
    for dtype, bits in ((torch.uint8, 8), (torch.uint16, 16), (torch.uint32, 32), (torch.int32, 32)):
        words = to_mask_words(mask, dtype)
        assert words.shape == (len(parents), 32 // bits * mask.shape[1]) and words.data_ptr() == mask.data_ptr()
        for row, seen in zip(words.tolist(), sees(parents)):
            unsigned = [word % 2**bits for word in row]
            assert [bool(unsigned[node // bits] >> node % bits & 1) for node in range(len(parents))] == seen
        for num_words in (None, -(-len(parents) // bits)):
            assert torch.equal(from_mask_words(to_mask_words(mask, dtype, num_words)), mask)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(parents_lists(max_nodes=40), st.integers(0, 9)), min_size=1, max_size=4))
def test_a_flat_mask_of_ragged_requests(requests: list[tuple[list[int], int]]) -> None:
    num_nodes = max(len(parents) for parents, _ in requests)
    padded = [parents + [-1] * (num_nodes - len(parents)) for parents, _ in requests]
    mask = Topology.from_parents(torch.tensor(padded)).ancestor_mask
    lens = torch.tensor([length for _, length in requests], dtype=torch.int32)
    expected = [
        bit for parents, length in zip(padded, lens.tolist()) for row in sees(parents) for bit in [True] * length + row
    ]
    assert flat_mask(mask, lens).tolist() == expected
    assert flat_mask(mask, lens, size=len(expected) + 5).tolist() == expected + [False] * 5
    assert torch.equal(from_bool_mask(to_bool_mask(mask)), mask)


def test_a_level_of_a_tree() -> None:
    """Rows of some nodes only, as a draft feeds them."""
    rows = MASK[1:3]
    assert to_bool_mask(rows, 4).int().tolist() == [[1, 1, 0, 0], [1, 0, 1, 0]]
    assert torch.equal(from_bool_mask(to_bool_mask(rows, 4)), rows)


def test_strides_of_a_dimension_of_one_word_do_not_matter() -> None:
    for words in (MASK, MASK.to(torch.uint16), MASK.to(torch.uint8)):
        column = words.view(1, 4).clone().t()
        assert column.stride() == (1, 4) and column.tolist() == words.tolist()
        assert torch.equal(from_mask_words(column), MASK)
    column = MASK.view(1, 4).clone().t()
    assert to_mask_words(column, torch.uint8).tolist() == to_mask_words(MASK, torch.uint8).tolist()
    assert to_bool_mask(column).tolist() == to_bool_mask(MASK).tolist()


def test_wrong_masks() -> None:
    for call, error, message in (
        (lambda: to_mask_words(MASK.long(), torch.uint8), TypeError, "to_mask_words: tree_mask must have dtype int32"),
        (
            lambda: to_mask_words(MASK, torch.int16),
            TypeError,
            "to_mask_words: dtype must be one of torch.uint8, .*int16",
        ),
        (
            lambda: to_mask_words(MASK, torch.uint8, 5),
            ValueError,
            "num_words must hold 4 nodes in words of 8 bits, and be",
        ),
        (lambda: to_mask_words(MASK[:, 0], torch.uint8), ValueError, r"tree_mask must have shape .*, got \[4\]"),
        (lambda: from_mask_words(MASK.long()), TypeError, "from_mask_words: words must have dtype"),
        (lambda: from_mask_words(MASK[0]), ValueError, r"from_mask_words: words must have shape .*, got \[1\]"),
        (
            lambda: to_bool_mask(MASK, 33),
            ValueError,
            r"to_bool_mask: num_nodes must be in 1\.\.32, the mask's bits, got 33",
        ),
        (lambda: to_bool_mask(MASK, 2.0), TypeError, "to_bool_mask: num_nodes must be an integer, got float"),
        (
            lambda: to_mask_words(MASK, torch.uint8, 1.0),
            TypeError,
            "to_mask_words: num_words must be an integer, got float",
        ),
        (
            lambda: from_mask_words(torch.zeros(4, 0, dtype=torch.uint8)),
            ValueError,
            r"from_mask_words: words must have shape .*, got \[4, 0\]",
        ),
        (
            lambda: flat_mask(MASK, torch.tensor([3, -2], dtype=torch.int32)),
            ValueError,
            "flat_mask: cache_lens must not be negative, got -2",
        ),
        (
            lambda: flat_mask(MASK, torch.tensor([2, 0], dtype=torch.int32), size=39),
            ValueError,
            "flat_mask: size must be at least 40, got 39",
        ),
        (
            lambda: flat_mask(MASK, torch.zeros(1, dtype=torch.int32), size=16.0),
            TypeError,
            "flat_mask: size must be an integer, got float",
        ),
        (
            lambda: flat_mask(MASK.repeat(10, 1), torch.zeros(1, dtype=torch.int32)),
            ValueError,
            "flat_mask: tree_mask must have a bit for each of 40 nodes, got 32",
        ),
        (lambda: from_bool_mask(MASK), TypeError, "from_bool_mask: mask must have dtype bool, got int32"),
        (lambda: from_bool_mask(MASK[0] > 0), ValueError, "from_bool_mask: mask must have shape"),
        (
            lambda: flat_mask(MASK, torch.tensor([1])),
            TypeError,
            "flat_mask: cache_lens must have dtype int32, got int64",
        ),
        (
            lambda: flat_mask(MASK[None], torch.zeros(2, dtype=torch.int32)),
            ValueError,
            r"flat_mask: cache_lens must have shape \[batch\] = \[1\], got \[2\]",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    many = TokenTree.chain(17).ancestor_mask()
    with pytest.raises(ValueError, match="num_words must hold 17 nodes in words of 16 bits, and be at most 2, got 1"):
        to_mask_words(many, torch.uint16, 1)
