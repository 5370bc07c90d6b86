"""Linked trees and accepted rows: the conventions written out by hand, and round trips over random trees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import parents_lists

from sequoia_kernels import TokenTree, Topology
from sequoia_kernels.interop import AcceptedRows, from_accepted_rows, from_retrieve, to_accepted_rows, to_retrieve
from sequoia_kernels.ops import VerifiedPath

# Depth first: 0 has the children 1, 4, 5; 1 has 2 and 3; 5 has 6.
LINKS = torch.tensor([[1, 2, -1, -1, -1, 6, -1]]), torch.tensor([[-1, 4, 3, -1, 5, -1, -1]])


def test_a_tree_written_by_hand() -> None:
    tree = from_retrieve(*LINKS)
    assert tree.topology.parents.tolist() == [[-1, 0, 0, 0, 1, 1, 3]]
    assert tree.order.tolist() == [[0, 1, 4, 5, 2, 3, 6]]
    assert tree.places.tolist() == [[0, 1, 4, 5, 2, 3, 6]]
    assert (tree.topology.num_levels, tree.topology.max_branching) == (3, 3)
    arrays = to_retrieve(tree.topology)
    assert arrays.rows.tolist() == [list(range(7))]
    assert arrays.next_token.tolist() == [[1, 4, -1, 6, -1, -1, -1]]
    assert arrays.next_sibling.tolist() == [[-1, 2, 3, -1, 5, -1, -1]]


def test_one_tree_for_all_requests() -> None:
    arrays = to_retrieve(TokenTree([-1, 0, 0, 1]), 2, dtype=torch.int32)
    assert {part.dtype for part in arrays} == {torch.int32}
    assert arrays.rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert arrays.next_token.tolist() == [[1, 3, -1, -1]] * 2
    assert arrays.next_sibling.tolist() == [[-1, 2, -1, -1]] * 2
    assert all(part.is_contiguous() for part in arrays)


def test_nodes_that_are_linked_to_nothing_are_unused() -> None:
    # Two nodes short, and a piece of a tree that the root does not lead to.
    next_token = torch.tensor([[3, -1, -1, -1, -1], [1, -1, 3, -1, -1]], dtype=torch.int32)
    next_sibling = torch.tensor([[-1, -1, -1, 4, -1], [-1, -1, -1, -1, -1]], dtype=torch.int32)
    tree = from_retrieve(next_token, next_sibling)
    assert tree.topology.parents.tolist() == [[-1, 0, 0, -1, -1], [-1, 0, -1, -1, -1]]
    assert tree.order.tolist() == [[0, 3, 4, 1, 2], [0, 1, 2, 3, 4]]
    tree.topology.check()
    again = to_retrieve(tree.topology)
    assert again.next_token.tolist() == [[1, -1, -1, -1, -1]] * 2
    assert again.next_sibling.tolist() == [[-1, 2, -1, -1, -1], [-1, -1, -1, -1, -1]]


def test_every_level_waits_for_the_order_of_the_one_above() -> None:
    """Two chains side by side whose nodes a server numbers the other way round, level by level."""
    depth = 6
    ours = TokenTree([-1, 0, 0, *range(1, 2 * depth - 1)])
    arrays = to_retrieve(ours, 1)
    theirs = torch.tensor([[0, *(node + 1 if node % 2 else node - 1 for node in range(1, 2 * depth + 1))]])
    next_token, next_sibling = (
        torch.where(links >= 0, theirs.gather(1, links.clamp(min=0)), -1).gather(1, theirs) for links in arrays[1:]
    )
    tree = from_retrieve(next_token, next_sibling)
    assert tree.topology.parents[0].tolist() == ours.parents
    assert torch.equal(tree.order, theirs)


def test_what_the_root_does_not_lead_to_counts_for_no_bound() -> None:
    next_token, next_sibling = torch.tensor([[-1, 2, 3, -1, -1, -1]]), torch.tensor([[-1, -1, -1, 4, 5, -1]])
    tree = from_retrieve(next_token, next_sibling, max_branching=0)
    assert (tree.topology.num_levels, tree.topology.parents.tolist()) == (1, [[-1] * 6])


@st.composite
def batches(draw: st.DrawFn) -> tuple[Topology, torch.Tensor]:
    """A random tree for each of some requests, and an order of the nodes for each that begins with the root."""
    trees = draw(st.lists(parents_lists(max_nodes=40), min_size=1, max_size=3))
    num_nodes = max(map(len, trees))
    topology = Topology.from_parents(torch.tensor([tree + [-1] * (num_nodes - len(tree)) for tree in trees]))
    shuffled = [[0, *draw(st.permutations(range(1, num_nodes)))] for _ in trees]
    return topology, torch.tensor(shuffled)


@settings(max_examples=80, deadline=None)
@given(batches(), st.sampled_from([torch.int32, torch.int64]))
def test_trees_come_back_from_any_order_of_nodes(batch: tuple[Topology, torch.Tensor], dtype: torch.dtype) -> None:
    topology, theirs = batch  # the server's node k is our theirs[k]
    arrays = to_retrieve(topology, dtype=dtype)
    numbers = theirs.argsort(dim=1)  # our node j is the server's numbers[j]

    def renumbered(links: torch.Tensor) -> torch.Tensor:
        return torch.where(links >= 0, numbers.gather(1, links.clamp(min=0).long()), -1).gather(1, theirs).to(dtype)

    links = renumbered(arrays.next_token), renumbered(arrays.next_sibling)
    bounds = {"num_levels": topology.num_levels, "max_branching": topology.max_branching}
    for given_bounds in ({}, bounds):
        tree = from_retrieve(*links, **given_bounds)
        for part, right in zip(tree.topology, topology, strict=True):
            assert torch.equal(part, right) if isinstance(right, torch.Tensor) else part == right
        used = (topology.parents >= 0) | (torch.arange(topology.num_nodes) == 0)
        assert torch.equal(tree.order[used], numbers[used])
        assert torch.equal(tree.order.gather(1, tree.places), torch.arange(topology.num_nodes).expand(theirs.shape))


def test_the_largest_trees() -> None:
    for tree in (TokenTree.chain(1024), TokenTree.kary(1023, 2), TokenTree.kary(2, 10)):
        arrays = to_retrieve(tree, 1)
        assert from_retrieve(arrays.next_token, arrays.next_sibling).topology.parents[0].tolist() == tree.parents


def test_nothing_is_read_where_the_bounds_are_given() -> None:
    links = [torch.zeros(2, 5, dtype=torch.int64, device="meta")] * 2
    tree = from_retrieve(*links, num_levels=3, max_branching=2)
    assert tree.topology.ancestor_mask.device.type == tree.order.device.type == "meta"


@pytest.mark.parametrize(
    ("next_token", "next_sibling", "message"),
    [
        ([[3, -1, -1]], [[-1, -1, -1]], "next_token must be from -1 to 2, got 3 at node 0 of request 0"),
        ([[1, -1, -1]], [[-1, -1, -2]], "next_sibling must be from -1 to 2, got -2 at node 2 of request 0"),
        ([[1, 2, -1]], [[-1, 2, -1]], "link to every node but the root, and at most once, got 2 links to node 2"),
        ([[1, 0, -1]], [[-1, -1, -1]], "link to every node but the root, and at most once, got 1 links to node 0"),
        ([[-1, 2, -1]], [[-1, -1, 1]], "lead from the root to leaves, got a ring that holds node"),
        ([[-1, -1, -1]], [[-1, 1, -1]], "lead from the root to leaves, got a ring that holds node 1 of request 0"),
    ],
)
def test_links_of_no_tree_are_refused(next_token: list, next_sibling: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"^from_retrieve: .*{message}"):
        from_retrieve(torch.tensor(next_token), torch.tensor(next_sibling))


def test_wrong_arguments_of_trees() -> None:
    next_token, next_sibling = LINKS
    for arguments, error, message in (
        (([1], next_sibling), TypeError, "next_token must be a tensor, got list"),
        ((next_token.float(), next_sibling), TypeError, "next_token must have dtype int32 or int64, got float32"),
        ((next_token, next_sibling.int()), TypeError, "next_sibling must have dtype int64, got int32"),
        ((next_token[0], next_sibling[0]), ValueError, r"next_token must have shape \[batch, nodes\], got \[7\]"),
        ((next_token, next_sibling[:, :5]), ValueError, r"next_sibling must have shape .* = \[1, 7\], got \[1, 5\]"),
    ):
        with pytest.raises(error, match=f"^from_retrieve: {message}"):
            from_retrieve(*arguments)
    for bounds, error, message in (
        ({"num_levels": 2}, ValueError, "num_levels must be at least 3, got 2"),
        ({"num_levels": 1}, ValueError, "num_levels must be at least 3, got 1"),
        ({"max_branching": 2}, ValueError, "max_branching must be at least 3, got 2"),
        ({"num_levels": 0}, ValueError, "num_levels must be at least 1, got 0"),
        ({"num_levels": 3.0}, TypeError, "num_levels must be an integer, got float"),
        ({"max_branching": "3"}, TypeError, "max_branching must be an integer, got str"),
    ):
        with pytest.raises(error, match=f"^from_retrieve: {message}"):
            from_retrieve(*LINKS, **bounds)
    # Children that stand in front of their parents: too few rounds would sort them wrongly.
    links = torch.tensor([[3, -1, 1, 2]]), torch.full((1, 4), -1)
    assert from_retrieve(*links, num_levels=4).order.tolist() == [[0, 3, 2, 1]]
    with pytest.raises(ValueError, match=r"^from_retrieve: num_levels must be at least 4, got 2"):
        from_retrieve(*links, num_levels=2)
    tree, topology = TokenTree.chain(3), Topology.stack([TokenTree.chain(3).tensors()] * 2)
    for arguments, error, message in (
        ({"tree": [-1, 0]}, TypeError, "tree must be a TokenTree or a Topology, got list"),
        ({"tree": tree}, ValueError, "batch_size must be given for a tree that all requests share, got None"),
        ({"tree": topology, "batch_size": 3}, ValueError, "batch_size must be the topology's 2, got 3"),
        ({"tree": tree, "batch_size": -1}, ValueError, "batch_size must be at least 0, got -1"),
        ({"tree": tree, "batch_size": 2.0}, TypeError, "batch_size must be an integer, got float"),
        ({"tree": topology, "dtype": torch.int16}, TypeError, "dtype must be torch.int64 or torch.int32, got torch.in"),
    ):
        with pytest.raises(error, match=f"^to_retrieve: {message}"):
            to_retrieve(**arguments)


# ---- accepted paths

PATH = VerifiedPath(
    torch.tensor([[0, 3, 6], [0, 1, -1], [0, -1, -1]], dtype=torch.int32),
    torch.tensor([3, 2, 1], dtype=torch.int32),
    torch.tensor([90, 91, 92]),
)
TOKENS = torch.arange(21).reshape(3, 7) + 50


def test_accepted_rows_written_by_hand() -> None:
    rows = to_accepted_rows(PATH, TOKENS)
    assert {part.dtype for part in rows} == {torch.int32}
    assert rows.accept_index.tolist() == [[0, 3, 6], [7, 8, -1], [14, -1, -1]]
    assert rows.accept_token_num.tolist() == [2, 1, 0]
    expected = [-1] * 21
    expected[0], expected[3], expected[6] = 53, 56, 90  # behind the root comes node 3's token, behind node 6 the bonus
    expected[7], expected[8] = 58, 91
    expected[14] = 92
    assert rows.predicts.tolist() == expected


def test_accepted_rows_in_the_servers_order_and_rows() -> None:
    order = from_retrieve(*LINKS).order.expand(3, -1)
    rows = to_accepted_rows(PATH, TOKENS, order=order)
    assert rows.accept_index.tolist() == [[0, 5, 6], [7, 8, -1], [14, -1, -1]]
    assert [int(rows.predicts[row]) for row in (0, 5, 6)] == [53, 56, 90]
    elsewhere = torch.arange(21).flip(0).reshape(3, 7)
    rows = to_accepted_rows(PATH, TOKENS, batch_rows=elsewhere)
    assert rows.accept_index.tolist() == [[20, 17, 14], [13, 12, -1], [6, -1, -1]]
    assert [int(rows.predicts[row]) for row in (20, 17, 14, 13, 12, 6)] == [53, 56, 90, 58, 91, 92]
    elsewhere[2, 1:] = -1  # nodes that have no row, and are not accepted
    again = to_accepted_rows(PATH, TOKENS, batch_rows=elsewhere)
    assert all(torch.equal(part, right) for part, right in zip(again, rows, strict=True))


@settings(max_examples=60, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_paths_come_back(batch: tuple[Topology, torch.Tensor], chance) -> None:
    topology, theirs = batch
    nodes = torch.full((len(theirs), topology.num_levels), -1, dtype=torch.int32)
    nodes[:, 0] = 0
    for request in range(len(theirs)):
        for level in range(1, topology.num_levels):
            above = int(nodes[request, level - 1])
            count = int(topology.num_children[request, above])
            if above < 0 or count == 0 or chance.random() < 0.2:
                break
            nodes[request, level] = topology.first_child[request, above] + chance.randrange(count)
    tokens = torch.randint(1000, theirs.shape, generator=torch.Generator().manual_seed(0))
    num_accepted = (nodes >= 0).sum(1).to(torch.int32)
    path = VerifiedPath(nodes, num_accepted, torch.arange(len(nodes)) + 5000)
    for order, places in ((None, None), (theirs.argsort(1), theirs)):
        rows = to_accepted_rows(path, tokens, order=order)
        again = from_accepted_rows(rows, topology.num_nodes, places=places)
        assert all(torch.equal(part, right) for part, right in zip(again, path, strict=True))
        for request, accepted in enumerate(nodes.tolist()):
            said = [int(rows.predicts[row]) for row in rows.accept_index[request].tolist() if row >= 0]
            assert said == [int(tokens[request, node]) for node in accepted[1:] if node >= 0] + [5000 + request]


def test_wrong_arguments_of_paths() -> None:
    for changes, error, message in (
        ({"tokens": TOKENS.int()}, TypeError, "tokens must have dtype int64, got int32"),
        ({"tokens": TOKENS[:2]}, ValueError, r"tokens must have shape \[batch, nodes\] with batch 3, got \[2, 7\]"),
        ({"order": TOKENS.int()}, TypeError, "order must have dtype int64, got int32"),
        ({"batch_rows": TOKENS[0]}, ValueError, r"batch_rows must have shape .* = \[3, 7\], got \[7\]"),
        ({"batch_rows": TOKENS}, ValueError, "batch_rows must be from 0 to 20, got 5"),
        ({"order": TOKENS - 51}, ValueError, "order must be from 0 to 6, got -1"),
        ({"path": tuple(PATH)}, TypeError, "path must be a VerifiedPath, got tuple"),
        ({"path": PATH._replace(nodes=PATH.nodes.float())}, TypeError, "path.nodes must have dtype int32 or int64"),
        (
            {"path": PATH._replace(nodes=PATH.nodes[0])},
            ValueError,
            r"path.nodes must have shape \[batch, levels\], got",
        ),
        ({"path": PATH._replace(nodes=PATH.nodes + 3)}, ValueError, "path.nodes must be from -1 to 6, got 9"),
        (
            {"path": PATH._replace(num_accepted=PATH.num_accepted * 0)},
            ValueError,
            r"path.num_accepted must count the nodes in front of the first -1, got 0 for \[0, 3, 6\] of request 0",
        ),
        (
            {"path": PATH._replace(num_accepted=PATH.num_accepted + 1)},
            ValueError,
            "path.num_accepted must count .* got 4",
        ),
        ({"path": PATH._replace(next_token=TOKENS[0])}, ValueError, r"path.next_token must have shape .* got \[7\]"),
        ({"path": PATH._replace(next_token=None)}, TypeError, "path.next_token must be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=f"^to_accepted_rows: {message}"):
            to_accepted_rows(**{"path": PATH, "tokens": TOKENS, **changes})
    rows = to_accepted_rows(PATH, TOKENS)
    with pytest.raises(ValueError, match=r"^from_accepted_rows: accept_index must have shape \[batch, levels\], got"):
        from_accepted_rows(AcceptedRows(rows.predicts, rows.accept_index[0], rows.accept_token_num), 7)
    with pytest.raises(TypeError, match="accept_index must have dtype int32 or int64, got bool"):
        from_accepted_rows(rows._replace(accept_index=rows.accept_index > 0), 7)
    own_rows = torch.where(rows.accept_index >= 0, rows.accept_index % 7, -1)
    for changes, error, message in (
        ({"rows": tuple(rows)}, TypeError, "rows must be AcceptedRows, got tuple"),
        ({"num_nodes": 0}, ValueError, "num_nodes must be at least 1, got 0"),
        ({"num_nodes": 7.0}, TypeError, "num_nodes must be an integer, got float"),
        ({"num_nodes": 8}, ValueError, r"predicts must have shape \[rows\] with at least 24 rows, got \[21\]"),
        (
            {"rows": rows._replace(accept_index=own_rows)},
            ValueError,
            "accept_index must be -1 or rows 7 to 13 for request 1, got 0",
        ),
        (
            {"rows": rows._replace(accept_index=rows.accept_index - 1)},
            ValueError,
            "accept_index must be -1 or .*, got 6",
        ),
        (
            {"rows": rows._replace(accept_token_num=rows.accept_token_num + 1)},
            ValueError,
            r"accept_token_num must count the nodes .* but for the root, got 3 for \[0, 3, 6\] of request 0",
        ),
        (
            {"rows": rows._replace(accept_token_num=rows.accept_token_num[:2])},
            ValueError,
            "accept_token_num must have s",
        ),
        ({"rows": rows._replace(predicts=None)}, TypeError, "predicts must be a tensor, got NoneType"),
        ({"places": TOKENS[:2]}, ValueError, r"places must have shape .* = \[3, 7\], got \[2, 7\]"),
    ):
        with pytest.raises(error, match=f"^from_accepted_rows: {message}"):
            from_accepted_rows(**{"rows": rows, "num_nodes": 7, **changes})
    longer = torch.cat((rows.predicts, rows.predicts[:1]))  # SGLang's buffer may have a row more
    assert torch.equal(from_accepted_rows(rows._replace(predicts=longer), 7).next_token, PATH.next_token)


def test_counts_of_accepted_rows_are_int32_whatever_the_paths_are() -> None:
    rows = to_accepted_rows(PATH._replace(num_accepted=PATH.num_accepted.long(), nodes=PATH.nodes.long()), TOKENS)
    assert {part.dtype for part in rows} == {torch.int32}
