"""Topologies: what a tree's tensors say, and a tree for each request in one of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from support.trees import parents_lists

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


def assert_equal(made: Topology, wanted: Topology) -> None:
    for name, part, right in zip(Topology._fields, made, wanted, strict=True):
        if isinstance(right, torch.Tensor):
            assert part.dtype == torch.int32 and part.is_contiguous()
            assert torch.equal(part, right), name
        else:
            assert part == right, name


@settings(max_examples=60, deadline=None)
@given(parents_lists())
def test_parents_alone_make_the_topology_of_their_tree(parents: list[int]) -> None:
    wanted = TokenTree(parents).tensors()
    for dtype in (torch.int32, torch.int64):
        made = Topology.from_parents(torch.tensor(parents, dtype=dtype))
        assert_equal(made, wanted)
        made.check()
    assert_equal(Topology.from_parents(torch.tensor(parents), num_levels=99, max_branching=98)._replace(
        num_levels=wanted.num_levels, max_branching=wanted.max_branching
    ), wanted)  # fmt: skip


def test_parents_of_a_tree_for_each_request() -> None:
    wanted = Topology.stack([tree.tensors() for tree in TREES])
    assert_equal(Topology.from_parents(wanted.parents), wanted)
    large = TokenTree.kary(2, 10)
    assert_equal(Topology.from_parents(torch.tensor(large.parents)), large.tensors())
    assert Topology.from_parents(torch.zeros(0, 3, dtype=torch.int32)).parents.shape == (0, 3)


def test_unused_nodes_are_nobodys_children() -> None:
    made = Topology.from_parents(torch.tensor([[-1, 0, 0, 1, -1], [-1, -1, -1, -1, -1], [-1, 0, 1, 2, 3]]))
    made.check()
    assert made.num_children.tolist() == [[2, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert made.depths.tolist() == [[0, 1, 1, 2, 0], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert made.ancestor_mask[:, 4, 0].tolist() == [16, 16, 31]
    assert (made.num_levels, made.max_branching) == (5, 2)


def test_nothing_is_read_where_the_bounds_are_given() -> None:
    parents = torch.zeros(2, 5, dtype=torch.int32, device="meta")
    made = Topology.from_parents(parents, num_levels=3, max_branching=2)
    assert made.ancestor_mask.shape == (2, 5, 1) and made.ancestor_mask.device.type == "meta"


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([0, 0], "be -1 at node 0, the root, got 0 at node 0"),
        ([-1, -2], "be at least -1, got -2 at node 1"),
        ([-1, 0, 2], "name an earlier node, got 2 at node 2"),
        ([-1, -1, 0], "have unused nodes, of parent -1, behind all others, got 0 at node 2"),
        ([-1, 0, 1, 0], r"be breadth-first \(never decrease\), got 0 at node 3"),
        ([[-1, 0, 0, 0], [-1, 0, 1, 0]], r"be breadth-first \(never decrease\), got 0 at node 3 of request 1"),
    ],
)
def test_parents_of_no_tree_are_refused(parents: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Topology.from_parents: parents must {message}"):
        Topology.from_parents(torch.tensor(parents))
    made = TokenTree.chain(4).tensors()._replace(parents=torch.tensor(parents, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"^here: tree.parents must {message}"):
        made.check("here")
    with pytest.raises(TypeError, match=r"^here: tree\.parents must have dtype int32, got int64"):
        made._replace(parents=made.parents.long()).check("here")


def test_what_is_no_parents_tensor_is_refused() -> None:
    for parents in ([-1, 0], torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"parents must (be a tensor|have dtype int32 or int64), got"):
            Topology.from_parents(parents)
    for shape in ((), (0,), (2, 0), (1, 1, 1)):
        with pytest.raises(ValueError, match=r"parents must have shape \[nodes\] or \[batch, nodes\], got"):
            Topology.from_parents(torch.zeros(shape, dtype=torch.int32))
        made = TokenTree.chain(2).tensors()._replace(parents=torch.zeros(shape, dtype=torch.int32))
        with pytest.raises(ValueError, match=r"^here: tree.parents must have shape \[nodes\] or \[batch, nodes\], got"):
            made.check("here")


@pytest.mark.parametrize("name", Topology._fields[1:-2])
def test_a_tensor_that_contradicts_the_parents_is_named(name: str) -> None:
    topology = Topology.stack([tree.tensors() for tree in TREES])
    topology.check()
    part = getattr(topology, name).clone()
    part[1, 4] += 1
    with pytest.raises(ValueError, match=rf"^Topology.check: tree.{name} must be .* at node 4 of request 1, got"):
        topology._replace(**{name: part}).check()
    with pytest.raises(ValueError, match=rf"tree.{name} must have shape .*, as its parents say, got"):
        topology._replace(**{name: part[0]}).check()
    for other, message in ((None, "be a tensor, got NoneType"), (part.long(), "have dtype int32, got int64")):
        with pytest.raises(TypeError, match=rf"^Topology.check: tree.{name} must {message}"):
            topology._replace(**{name: other}).check()


def test_bounds_that_do_not_hold_are_refused() -> None:
    for name, least in (("num_levels", 6), ("max_branching", 5)):
        topology = Topology.stack([tree.tensors() for tree in TREES])
        with pytest.raises(ValueError, match=f"Topology.check: {name} must be at least {least}, got 2"):
            topology._replace(**{name: 2}).check()
        with pytest.raises(ValueError, match=f"Topology.from_parents: {name} must be at least {least}, got 2"):
            Topology.from_parents(topology.parents, **{name: 2})
        for bound in (6.5, "6", True):
            with pytest.raises(TypeError, match=f"^Topology.from_parents: {name} must be an integer, got"):
                Topology.from_parents(topology.parents, **{name: bound})
            with pytest.raises(TypeError, match=f"^Topology.check: tree.{name} must be an integer, got"):
                topology._replace(**{name: bound}).check()
    with pytest.raises(ValueError, match=r"^Topology\.from_parents: num_levels must be at least 1, got 0"):
        Topology.from_parents(torch.zeros(2, device="meta", dtype=torch.int32), num_levels=0, max_branching=1)
