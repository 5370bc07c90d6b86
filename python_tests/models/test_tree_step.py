"""The steps of chains and trees."""

from __future__ import annotations

import pytest
import torch
from support.sequential import packed_mask

from sequoia_kernels import TokenTree, Topology, TreeStep
from sequoia_kernels.models import causal_step


@pytest.mark.parametrize("num_rows", [1, 2, 31, 32, 33, 64, 65, 200, 1024])
def test_row_i_sees_the_slots_up_to_i(num_rows: int) -> None:
    step = causal_step(num_rows)
    expected = packed_mask([row - 1 for row in range(num_rows)]) if num_rows <= 200 else None
    bits = (step.tree_mask[:, :, None] >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(1)[:, :num_rows], torch.ones(num_rows, num_rows, dtype=torch.int32).tril())
    assert expected is None or torch.equal(step.tree_mask, expected)
    assert step.node_ids.tolist() == step.depths.tolist() == list(range(num_rows))
    assert (step.num_tree_rows, step.first_node) == (num_rows, 0)
    assert {step.tree_mask.dtype, step.node_ids.dtype, step.depths.dtype} == {torch.int32}


def test_steps_are_cached_and_outlive_inference_mode() -> None:
    causal_step.cache_clear()
    with torch.inference_mode():
        step = causal_step(5)
    assert causal_step(5) is step
    assert not step.tree_mask.is_inference()


@pytest.mark.parametrize("num_rows", [0, -3, 1025])
def test_bad_number_of_rows(num_rows: int) -> None:
    with pytest.raises(ValueError, match=rf"causal_step: num_rows must be in 1\.\.1024, got {num_rows}"):
        causal_step(num_rows)


def same(step: TreeStep, other: TreeStep) -> bool:
    return all(
        torch.equal(*pair) if isinstance(pair[0], torch.Tensor) else pair[0] == pair[1] for pair in zip(step, other)
    )


def test_a_tree_is_as_good_as_its_topology() -> None:
    tree = TokenTree([-1, 0, 0, 1, 1, 2])
    for nodes in (None, [1, 2], (3, 5), range(2, 4), torch.tensor([1, 3, 4])):
        step = TreeStep.of(tree, nodes)
        assert same(step, TreeStep.of(tree.tensors(), nodes)) and same(step, TreeStep.of(tree, nodes, device="cpu"))
        fed = list(range(6)) if nodes is None else [int(node) for node in nodes]
        assert type(step.num_tree_rows) is int
        assert step.node_ids.tolist() == fed and step.depths.tolist() == [tree.depths[node] for node in fed]
        assert torch.equal(step.tree_mask, packed_mask(tree.parents)[fed])
        assert step.num_tree_rows == fed[-1] + 1
        assert step.first_node == (fed[0] if fed == list(range(fed[0], fed[-1] + 1)) else None)


@pytest.mark.parametrize("nodes", [[], [1, 1], [2, 1], [-1, 0], [5, 6]])
def test_nodes_that_are_not_the_trees_are_refused(nodes: list[int]) -> None:
    for tree in (TokenTree.chain(6), Topology.stack([TokenTree.chain(6).tensors()] * 2)):
        with pytest.raises(ValueError, match=r"TreeStep.of: nodes must increase within 0\.\.5, got \["):
            TreeStep.of(tree, nodes)


def test_what_is_no_tree_or_no_node_is_refused() -> None:
    for tree in (None, [-1, 0]):
        with pytest.raises(TypeError, match=r"^TreeStep\.of: tree must be a TokenTree or a Topology, got"):
            TreeStep.of(tree)
    for nodes in (3, [1.5], [True], torch.tensor([0.0, 1.0])):
        with pytest.raises(TypeError, match=r"^TreeStep\.of: nodes must be integers, got"):
            TreeStep.of(TokenTree.chain(6), nodes)


def test_trees_whose_levels_differ_are_refused() -> None:
    trees = [TokenTree(parents).tensors() for parents in ([-1, 0, 0, 1], [-1, 0, 0, 2], [-1, 0, 1, 1])]
    assert TreeStep.of(Topology.stack(trees[:2])).depths.tolist() == [0, 1, 1, 2]
    message = r"have equally many nodes .*, got depths 1 and 2 of node 2 of the requests 0 and 2"
    for nodes in (None, [1]):
        with pytest.raises(ValueError, match=rf"^TreeStep\.of: tree must {message}"):
            TreeStep.of(Topology.stack(trees), nodes)


def test_a_topology_is_where_it_is() -> None:
    with pytest.raises(ValueError, match=r"TreeStep\.of: device must be None beside a Topology, got cpu"):
        TreeStep.of(TokenTree.chain(2).tensors(), device="cpu")
