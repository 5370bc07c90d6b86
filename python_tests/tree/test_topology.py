"""Topologies: what a tree's tensors say, and a tree for each request in one of them."""

from __future__ import annotations

import pytest
import torch

from sequoia_kernels import TokenTree, Topology

TREES = [TokenTree([-1, 0, 0, 0, 1, 2]), TokenTree([-1, 0, 1, 2, 3, 4]), TokenTree([-1, 0, 0, 0, 0, 0])]


def test_a_topology_says_what_its_tree_says() -> None:
    for tree in [*TREES, TokenTree.single(), TokenTree.kary(2, 6)]:
        topology = tree.tensors()
        assert topology.num_nodes == tree.num_nodes and topology.batch_size is None
        assert topology.parents.tolist() == tree.parents
        assert topology.depths.tolist() == tree.depths
        assert topology.first_child.tolist() == tree.first_child
        assert topology.num_children.tolist() == tree.num_children
        assert topology.ranks.tolist() == [tree.rank(node) for node in range(tree.num_nodes)]
        assert torch.equal(topology.ancestor_mask, tree.ancestor_mask())
        assert (topology.num_levels, topology.max_branching) == (tree.num_levels, tree.max_branching)


def test_a_stack_holds_a_tree_for_each_request() -> None:
    topology = Topology.stack([tree.tensors() for tree in TREES])
    assert (topology.batch_size, topology.num_nodes) == (3, 6)
    for name in Topology._fields[:-2]:
        for row, tree in enumerate(TREES):
            assert torch.equal(getattr(topology, name)[row], getattr(tree.tensors(), name))
    assert (topology.num_levels, topology.max_branching) == (6, 5)


@pytest.mark.parametrize("trees", [[], [TREES[0], TokenTree.chain(5)]])
def test_what_cannot_be_stacked_is_refused(trees: list[TokenTree]) -> None:
    with pytest.raises(ValueError, match=r"Topology.stack: topologies must be single trees of equally many nodes"):
        Topology.stack([tree.tensors() for tree in trees])
    with pytest.raises(ValueError, match="must be single trees"):
        Topology.stack([Topology.stack([TREES[0].tensors()])])
