"""Import of the official repository's grow maps."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import parents_lists

from sequoia_kernels.errors import TreeFormatError
from sequoia_kernels.tree import TokenTree


def growmap_of(parents, order=None):
    """The fields that the official tree search writes, its nodes renamed: node i of the tree is called order[i]."""
    num_nodes = len(parents)
    order = list(range(num_nodes)) if order is None else order
    depths = [0] * num_nodes
    mask = torch.zeros(num_nodes, num_nodes, dtype=torch.long)
    successors = [[] for _ in range(num_nodes)]
    for node, parent in enumerate(parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            mask[order[node]] = mask[order[parent]]
            successors[order[parent]].append(order[node])
        mask[order[node], order[node]] = 1
    roots = [[order[n] for n in range(num_nodes) if depths[n] == step] for step in range(max(depths) + 1)]
    depth = torch.zeros(num_nodes, dtype=torch.long)
    depth[torch.tensor(order)] = torch.tensor(depths)
    return {
        "roots": roots,
        "branches": [[len(successors[node]) for node in step] for step in roots],
        "Successors": successors,
        "mask": mask,
        "depth": depth,
        "size": num_nodes,
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(parents_lists(max_nodes=40), st.integers(0, 2**32))
def test_any_numbering_becomes_breadth_first(parents, seed):
    renamed = list(range(1, len(parents)))
    random.Random(seed).shuffle(renamed)
    assert TokenTree.from_growmap(growmap_of(parents)).parents == parents
    assert TokenTree.from_growmap(growmap_of(parents, [0, *renamed])).parents == parents


def test_draw_order_is_the_order_of_the_successors():
    tree = TokenTree.from_growmap({"Successors": [[2, 1], [3], [], []]})
    assert tree.parents == [-1, 0, 0, 2]  # old node 1, with its child, is the second child
    assert tree.depths == [0, 1, 1, 2]


def test_lists_arrays_and_tensors():
    fields = growmap_of([-1, 0, 0, 1])
    plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}
    arrays = {
        "Successors": [np.array(row, dtype=int) for row in fields["Successors"]],
        "mask": fields["mask"].numpy().astype(bool),
        "depth": fields["depth"].numpy(),
        "size": np.int64(4),
    }
    for given_fields in (plain, arrays, {"Successors": plain["Successors"]}, {**plain, "note": "extra fields pass"}):
        assert TokenTree.from_growmap(given_fields).parents == [-1, 0, 0, 1]


def test_files_of_the_official_format(tmp_path):
    path = tmp_path / "growmap.pt"
    torch.save(growmap_of([-1, 0, 0, 1, 1, 2]), path)
    fields = torch.load(path, weights_only=True)
    assert TokenTree.from_growmap(fields) == TokenTree([-1, 0, 0, 1, 1, 2])


def changed(**changes):
    fields = growmap_of([-1, 0, 0, 1])
    for name, value in changes.items():
        fields.pop(name) if value is None else fields.update({name: value})
    return fields


MASK = growmap_of([-1, 0, 0, 1])["mask"]
WRONG_MASK = MASK.clone()
WRONG_MASK[3, 2] = 1
BLIND_MASK = MASK.clone()
BLIND_MASK[3, 0] = 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (changed(Successors=None), 'growmap_fields must have "Successors", got the fields'),
        (changed(Successors=3), '"Successors" must be a list of lists of integers, got int'),
        (changed(Successors=[1, 2]), '"Successors" must be a list of lists of integers, got int at 0'),
        (changed(Successors=[[1.0], []]), '"Successors" must be a list of lists of integers, got 1.0 in entry 0'),
        (changed(Successors=["12", []]), '"Successors" must be a list of lists of integers, got str at 0'),
        (changed(Successors=[]), '"Successors" must have at least the root\'s list, got none'),
        (changed(Successors=[[1, 4], [], [], []]), r'"Successors" must name nodes in 0\.\.3, got 4 below node 0'),
        (changed(Successors=[[1], [0]]), '"Successors" must have node 0 as the root, got it below node 1'),
        (changed(Successors=[[1, 2], [2], []]), '"Successors" must give each node one parent, got node 2'),
        (
            changed(Successors=[[1, 1], []]),
            '"Successors" must give each node one parent, got node 1 below nodes 0 and 0',
        ),
        (changed(Successors=[[1], [], [3], [2]]), "must reach every node from node 0, got no path to node 2"),
        (changed(size=5), '"size" must be 4, the length of "Successors", got 5'),
        (changed(size="4"), '"size" must be 4, the length of "Successors", got \'4\''),
        (changed(depth=[0, 1, 1]), '"depth" must have 4 entries, one a node, got 3'),
        (changed(depth=2), '"depth" must have 4 entries, one a node, got int'),
        (changed(depth=torch.tensor([0, 1, 1, 1])), '"depth" must agree with "Successors", got 1 at node 3 of depth 2'),
        (changed(mask=MASK[:3]), r'"mask" must be numbers of shape \[nodes, nodes\] = \[4, 4\], got shape \[3, 4\]'),
        (changed(mask=[[1], [1, 1]]), '"mask" must be numbers of shape'),
        (changed(mask=[["1"] * 4] * 4), '"mask" must be numbers of shape'),
        (
            changed(mask=WRONG_MASK),
            r'"mask" must agree with "Successors", got 1 at \[3, 2\] where node 2 is not node 3',
        ),
        (changed(mask=BLIND_MASK), r'"mask" must agree with "Successors", got 0 at \[3, 0\] where node 0 is node 3 or'),
        (changed(branches=None), 'must have both "roots" and "branches", got no "branches"'),
        (changed(branches=[[2], [1], [0]]), '"branches" must have one entry for each of "roots"'),
        (
            changed(branches=[[2], [0, 1], [0]]),
            '"branches" must agree with "Successors", got 0 for node 1, which has 1',
        ),
        (changed(roots=[[0], [1, 4], [3]]), r'"roots" must name nodes in 0\.\.3, got 4 in step 1'),
        (changed(roots=[[0], [1, 3], [2]]), '"roots" must expand each node once, in the step of its depth, got node 3'),
        (changed(roots=[[0], [1, 1], [3]], branches=[[2], [1, 1], [0]]), "must expand each node once"),
        (changed(roots=[[0]], branches=[[2]]), '"roots" must have every node with children, got no node 1'),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(TreeFormatError, match="TokenTree.from_growmap: .*" + message):
        TokenTree.from_growmap(fields)


def test_what_is_not_a_dictionary_is_refused():
    with pytest.raises(TypeError, match=r"must be the grow map's dictionary, got str; load it with torch.load\("):
        TokenTree.from_growmap("growmap.pt")
