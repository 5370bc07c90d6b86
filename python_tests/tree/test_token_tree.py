"""TokenTree: topology, masks, values, identity and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.trees import all_parents, parents_lists

from sequoia_kernels.tree import MAX_NODES, TokenTree, check_acceptance

EXAMPLE = [-1, 0, 0, 0, 1, 1, 3, 4, 4, 6]


def bits_of(mask: torch.Tensor, num_nodes: int) -> np.ndarray:
    words = mask.numpy().view(np.uint32)
    columns = np.arange(num_nodes)
    return (words[:, columns // 32] >> (columns % 32).astype(np.uint32)) & 1 == 1


def test_topology_of_an_example():
    tree = TokenTree(EXAMPLE)
    assert tree.parents == EXAMPLE
    assert tree.num_nodes == len(tree) == 10
    assert tree.num_levels == 4
    assert tree.depths == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert tree.widths == [1, 3, 3, 3]
    assert tree.first_child == [1, 4, -1, 6, 7, -1, 9, -1, -1, -1]
    assert tree.num_children == [3, 2, 0, 1, 2, 0, 1, 0, 0, 0]
    assert tree.children(0) == [1, 2, 3]
    assert tree.children(2) == []
    assert [tree.rank(node) for node in range(10)] == [0, 0, 1, 2, 0, 1, 0, 0, 1, 0]
    assert tree.level_nodes(2) == [4, 5, 6]
    assert tree.internal_nodes(2) == [4, 6]
    assert tree.internal_nodes(3) == []
    assert tree.max_branching == 3
    assert not tree.is_chain


def test_named_shapes():
    assert TokenTree.single().parents == [-1]
    assert TokenTree.single().is_chain
    assert TokenTree.single().max_branching == 0
    assert TokenTree.chain(4).parents == [-1, 0, 1, 2]
    assert TokenTree.chain(1) == TokenTree.single()
    assert TokenTree.chain(4).is_chain
    assert TokenTree.kary(2, 3).parents == [-1, 0, 0, 1, 1, 2, 2]
    assert TokenTree.kary(3, 1) == TokenTree.single()
    assert TokenTree.kary(1, 5) == TokenTree.chain(5)
    assert TokenTree.k_chains(3, 2).parents == [-1, 0, 0, 0, 1, 2, 3]
    assert TokenTree.k_chains(1, 4) == TokenTree.chain(5)
    assert TokenTree.k_chains(4, 1).widths == [1, 4]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parents_lists())
def test_topology_follows_from_the_parents(parents):
    tree = TokenTree(parents)
    num_nodes = len(parents)
    expected_mask = np.zeros((num_nodes, num_nodes), dtype=bool)
    for node in range(num_nodes):
        ancestor = node
        while ancestor >= 0:
            expected_mask[node, ancestor] = True
            ancestor = parents[ancestor]
    mask = tree.ancestor_mask()
    assert mask.shape == (num_nodes, (num_nodes + 31) // 32)
    assert mask.dtype == torch.int32
    assert (bits_of(mask, num_nodes) == expected_mask).all()
    assert tree.depths == (expected_mask.sum(axis=1) - 1).tolist()
    assert tree.depths == sorted(tree.depths)
    assert sum(tree.widths) == num_nodes
    assert [len(tree.children(node)) for node in range(num_nodes)] == tree.num_children
    for node in range(1, num_nodes):
        assert tree.children(parents[node])[tree.rank(node)] == node
    levels = [tree.level_nodes(level) for level in range(tree.num_levels)]
    assert [node for nodes in levels for node in nodes] == list(range(num_nodes))
    internal = [tree.internal_nodes(level) for level in range(tree.num_levels)]
    assert [node for nodes in internal for node in nodes] == sorted(set(parents[1:]))


@pytest.mark.parametrize("num_nodes", [1, 31, 32, 33, 64, 65, 1024])
def test_mask_of_chains_and_stars_has_no_stray_bits(num_nodes):
    chain = TokenTree.chain(num_nodes).ancestor_mask()
    assert (bits_of(chain, num_nodes) == np.tri(num_nodes, dtype=bool)).all()
    star = TokenTree([-1] + [0] * (num_nodes - 1)).ancestor_mask()
    expected = np.eye(num_nodes, dtype=bool)
    expected[:, 0] = True
    assert (bits_of(star, num_nodes) == expected).all()
    padding = chain.shape[1] * 32
    assert bits_of(chain, padding)[:, num_nodes:].sum() == 0
    assert bits_of(star, padding)[:, num_nodes:].sum() == 0


def test_tensors_are_shared_and_agree_with_the_lists():
    tree = TokenTree(EXAMPLE)
    tensors = tree.tensors("cpu")
    assert tree.tensors(torch.device("cpu")) is tensors
    for name in ("parents", "depths", "first_child", "num_children"):
        tensor = getattr(tensors, name)
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == getattr(tree, name)
    assert tensors.ranks.tolist() == [tree.rank(node) for node in range(10)]
    assert torch.equal(tensors.ancestor_mask, tree.ancestor_mask())
    assert tree.tensors("meta").parents.device.type == "meta"


def test_returned_masks_and_lists_are_copies():
    tree = TokenTree(EXAMPLE)
    tree.ancestor_mask().zero_()
    tree.parents[1] = 7
    tree.depths.clear()
    assert tree == TokenTree(EXAMPLE)
    assert tree.depths[1] == 1
    assert tree.ancestor_mask()[0, 0] == 1


def test_tensors_made_in_inference_mode_work_outside():
    tree = TokenTree(EXAMPLE)
    with torch.inference_mode():
        tensors = tree.tensors("cpu")
    assert not any(tensor.is_inference() for tensor in tensors[:-2])


def test_identity():
    tree = TokenTree(EXAMPLE)
    assert tree == TokenTree(tuple(EXAMPLE))
    assert tree != TokenTree.chain(10)
    assert tree != EXAMPLE
    assert hash(tree) == hash(TokenTree(EXAMPLE))
    assert len({tree, TokenTree(EXAMPLE), TokenTree.single()}) == 2
    tree.tensors("cpu")
    assert pickle.loads(pickle.dumps(tree)) == tree
    assert copy.deepcopy(tree) is tree
    assert copy.copy(tree) is tree
    assert eval(repr(tree)) == tree
    assert repr(TokenTree.chain(100)) == (
        "<TokenTree of 100 nodes on 100 levels, widths [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ...]>"
    )


def test_trees_are_immutable():
    tree = TokenTree(EXAMPLE)
    for name in ("num_nodes", "_parents", "anything"):
        with pytest.raises(AttributeError, match=f"TokenTree: {name} must not be set"):
            setattr(tree, name, 3)
    with pytest.raises(AttributeError, match="must not be deleted"):
        del tree._parents


def test_parents_may_be_any_integers():
    for parents in (np.array(EXAMPLE), torch.tensor(EXAMPLE), map(int, EXAMPLE), [np.int32(p) for p in EXAMPLE]):
        tree = TokenTree(parents)
        assert tree.parents == EXAMPLE
        assert all(type(parent) is int for parent in tree.parents)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], r"TokenTree: parents must have at least the root's entry -1, got none"),
        ([0], r"must begin with -1 for the root, got parents\[0\] = 0"),
        ([0, 0], r"must begin with -1 for the root"),
        ([-1, -1], r"must have -1 at the root only, got parents\[1\] = -1"),
        ([-1, 0, -7], r"must have -1 at the root only, got parents\[2\] = -7"),
        ([-1, 1], r"must name an earlier node \(parents\[i\] < i\), got parents\[1\] = 1"),
        ([-1, 2, 1], r"must name an earlier node \(parents\[i\] < i\), got parents\[1\] = 2"),
        ([-1, 0, 1, 0], r"must keep siblings side by side, got parents\[3\] = 0 after parents\[2\] = 1"),
        ([-1, 0, 0, 2, 1], r"must be breadth-first \(never decrease\), got parents\[4\] = 1 after parents\[3\] = 2"),
        ([-1] + [0] * MAX_NODES, rf"TokenTree: a tree must have at most {MAX_NODES} nodes, got {MAX_NODES + 1}"),
    ],
)
def test_malformed_trees_are_refused(parents, message):
    with pytest.raises(ValueError, match=message):
        TokenTree(parents)


@pytest.mark.parametrize(
    "parents",
    [
        *(None, 3, "[-1, 0]", b"\x00", {-1: 0}, {-1, 0}),
        *([-1, 0.0], [-1, "0"], [-1, None], [-1, True], [[-1], [0]]),
        *(np.array([-1.0, 0.0]), np.array(-1), torch.tensor([[-1, 0]]), torch.tensor([-1.0])),
    ],
)
def test_what_is_not_a_list_of_integers_is_refused(parents):
    with pytest.raises(TypeError, match=r"TokenTree: parents.* must be a"):
        TokenTree(parents)


def test_arguments_out_of_range_are_refused():
    tree = TokenTree(EXAMPLE)
    with pytest.raises(ValueError, match=r"TokenTree.children: node must be in 0\.\.9, got 10"):
        tree.children(10)
    with pytest.raises(ValueError, match=r"TokenTree.rank: node must be in 0\.\.9, got -1"):
        tree.rank(-1)
    with pytest.raises(ValueError, match=r"TokenTree.level_nodes: level must be in 0\.\.3, got 4"):
        tree.level_nodes(4)
    with pytest.raises(ValueError, match=r"TokenTree.internal_nodes: level must be in 0\.\.3, got -1"):
        tree.internal_nodes(-1)
    with pytest.raises(TypeError, match=r"TokenTree.children: node must be an integer, got 1.0 of type float"):
        tree.children(1.0)
    with pytest.raises(ValueError, match=r"TokenTree.chain: num_nodes must be at least 1, got 0"):
        TokenTree.chain(0)
    with pytest.raises(ValueError, match=rf"TokenTree.kary: a tree must have at most {MAX_NODES} nodes"):
        TokenTree.kary(60000, 60000)
    with pytest.raises(ValueError, match=rf"TokenTree.k_chains: a tree must have at most {MAX_NODES} nodes"):
        TokenTree.k_chains(1024, 64)


def test_values_of_every_small_tree():
    acceptance = [0.5, 0.125, 0.25]
    for num_nodes in range(1, 7):
        for parents in all_parents(num_nodes):
            expected = [1.0]
            for node in range(1, num_nodes):
                rank = sum(parents[other] == parents[node] for other in range(1, node))
                expected.append(expected[parents[node]] * (acceptance[rank] if rank < 3 else 0.0))
            tree = TokenTree(parents)
            assert tree.node_values(acceptance) == expected  # powers of two: no rounding
            assert tree.expected_tokens(acceptance) == sum(expected)


def test_values_of_known_trees():
    assert TokenTree.single().expected_tokens([0.9]) == 1.0
    assert TokenTree.chain(1024).expected_tokens([1.0]) == 1024.0
    assert math.isclose(TokenTree.chain(5).expected_tokens([0.5, 0.5]), 1.9375)
    assert math.isclose(TokenTree.kary(2, 11).expected_tokens(np.array([0.5, 0.5])), 11.0)
    assert TokenTree.kary(3, 2).expected_tokens(torch.tensor([0.5, 0.25], dtype=torch.float64)) == 1.75


@pytest.mark.parametrize(
    ("acceptance", "error", "message"),
    [
        ([], ValueError, "acceptance must have at least 1 entry, got 0"),
        ([[0.5]], ValueError, r"acceptance must have shape \[max_children\], got \[1, 1\]"),
        (0.5, ValueError, r"acceptance must have shape \[max_children\], got \[\]"),
        ([0.5, float("nan")], ValueError, r"acceptance must have finite entries, got acceptance\[1\] = nan"),
        ([float("inf")], ValueError, r"acceptance must have finite entries, got acceptance\[0\] = inf"),
        ([0.5, -1e-9], ValueError, r"acceptance must have entries >= 0, got acceptance\[1\] = -1e-09"),
        ([0.5, 0.6], ValueError, "acceptance must have a sum of at most 1, got 1.1"),
        ([1.0 + 1e-8], ValueError, "acceptance must have a sum of at most 1, got 1.00000001"),
        (["0.5"], TypeError, "acceptance must be a sequence of real numbers"),
        ([None], TypeError, "acceptance must be a sequence of real numbers"),
        ([0.5 + 0j], TypeError, "acceptance must be a sequence of real numbers"),
        ([True], TypeError, "acceptance must be a sequence of real numbers"),
        ([[0.5], [0.1, 0.2]], TypeError, "acceptance must be a sequence of real numbers"),
        (torch.tensor([0.5], device="meta"), TypeError, "acceptance must be a sequence of real numbers"),
    ],
)
def test_bad_acceptance_vectors_are_refused(acceptance, error, message):
    with pytest.raises(error, match="caller: " + message):
        check_acceptance(acceptance, "caller")
    with pytest.raises(error, match="TokenTree.node_values: " + message):
        TokenTree.chain(3).node_values(acceptance)
    with pytest.raises(error, match="TokenTree.expected_tokens: " + message):
        TokenTree.chain(3).expected_tokens(acceptance)


def test_acceptance_vectors_are_copied_and_may_exceed_one_by_rounding():
    source = np.array([0.5, 0.25], dtype=np.float32)
    vector = check_acceptance(source, "caller")
    vector[0] = 0.0
    assert vector.dtype == np.float64
    assert source[0] == 0.5
    assert check_acceptance([1, 0], "caller").tolist() == [1.0, 0.0]
    assert check_acceptance([0.7, 0.3 + 1e-10], "caller").sum() > 1.0
