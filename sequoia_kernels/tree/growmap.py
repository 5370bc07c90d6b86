"""Import of the official Sequoia repository's grow maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from sequoia_kernels.documents import is_integer
from sequoia_kernels.errors import TreeFormatError

__all__ = ["parents_from_growmap"]

WHERE = "TokenTree.from_growmap"


def parents_from_growmap(fields: Mapping[str, Any]) -> list[int]:
    """Return breadth-first parents of a grow map, all of whose fields agree. See `TokenTree.from_growmap`."""
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"{WHERE}: growmap_fields must be the grow map's dictionary, got {type(fields).__name__}; "
            "load it with torch.load(path, weights_only=True)"
        )
    if "Successors" not in fields:
        _refuse('growmap_fields must have "Successors"', f"the fields {sorted(map(str, fields))}")
    successors = _integer_lists(fields["Successors"], "Successors")
    parents = _parents(successors)
    order = _breadth_first(successors)
    depths = [0] * len(parents)
    for node in order[1:]:
        depths[node] = depths[parents[node]] + 1

    if "size" in fields:
        size = _plain(fields["size"])
        if isinstance(size, bool) or size != len(parents):
            _refuse(f'"size" must be {len(parents)}, the length of "Successors"', repr(size))
    if "depth" in fields:
        _check_depth(_plain(fields["depth"]), depths)
    if "mask" in fields:
        _check_mask(_plain(fields["mask"]), parents, order)
    if "roots" in fields or "branches" in fields:
        _check_expansion(fields, successors, depths)

    new_ids = {node: new_id for new_id, node in enumerate(order)}
    return [-1] + [new_ids[parents[node]] for node in order[1:]]


def _refuse(rule: str, actual: str) -> NoReturn:
    raise TreeFormatError(f"{WHERE}: {rule}, got {actual}")


def _parents(successors: list[list[int]]) -> list[int]:
    """Invert the lists of children; every node but 0 must occur once."""
    if not successors:
        _refuse('"Successors" must have at least the root\'s list', "none")
    parents = [-1] * len(successors)
    for node, children in enumerate(successors):
        for child in children:
            if not 0 <= child < len(successors):
                _refuse(f'"Successors" must name nodes in 0..{len(successors) - 1}', f"{child} below node {node}")
            if child == 0:
                _refuse('"Successors" must have node 0 as the root', f"it below node {node}")
            if parents[child] >= 0:
                actual = f"node {child} below nodes {parents[child]} and {node}"
                _refuse('"Successors" must give each node one parent', actual)
            parents[child] = node
    return parents


def _breadth_first(successors: list[list[int]]) -> list[int]:
    order = [0]
    for node in order:
        order.extend(successors[node])
    if len(order) < len(successors):
        missing = min(set(range(len(successors))) - set(order))
        _refuse('"Successors" must reach every node from node 0', f"no path to node {missing}")
    return order


def _check_depth(given: Any, depths: list[int]) -> None:
    if not isinstance(given, list) or len(given) != len(depths):
        actual = str(len(given)) if isinstance(given, list) else type(given).__name__
        _refuse(f'"depth" must have {len(depths)} entries, one a node', actual)
    for node, (actual, expected) in enumerate(zip(given, depths, strict=True)):
        if isinstance(actual, bool) or actual != expected:
            _refuse('"depth" must agree with "Successors"', f"{actual!r} at node {node} of depth {expected}")


def _check_mask(given: Any, parents: list[int], order: list[int]) -> None:
    num_nodes = len(parents)
    try:
        mask = np.asarray(given)
    except ValueError:  # ragged lists
        mask = np.empty(0)
    if mask.shape != (num_nodes, num_nodes) or mask.dtype.kind not in "biuf":
        rule = f'"mask" must be numbers of shape [nodes, nodes] = [{num_nodes}, {num_nodes}]'
        _refuse(rule, f"shape {list(mask.shape)}")
    expected = np.zeros((num_nodes, num_nodes), dtype=bool)
    for node in order:
        if node:
            expected[node] = expected[parents[node]]
        expected[node, node] = True
    wrong = np.argwhere((mask != 0) != expected)
    if len(wrong):
        row, column = map(int, wrong[0])
        relation = "is" if expected[row, column] else "is not"
        actual = (
            f"{mask[row, column]} at [{row}, {column}] where node {column} {relation} node {row} or an ancestor of it"
        )
        _refuse('"mask" must agree with "Successors"', actual)


def _check_expansion(fields: Mapping[str, Any], successors: list[list[int]], depths: list[int]) -> None:
    """Check which nodes are expanded in each draft step ("roots") and into how many children ("branches")."""
    for name in ("roots", "branches"):
        if name not in fields:
            _refuse('growmap_fields must have both "roots" and "branches"', f'no "{name}"')
    roots = _integer_lists(fields["roots"], "roots")
    branches = _integer_lists(fields["branches"], "branches")
    if [len(step) for step in roots] != [len(step) for step in branches]:
        _refuse('"branches" must have one entry for each of "roots"', "other lengths")
    expanded: set[int] = set()
    for step, (nodes, counts) in enumerate(zip(roots, branches, strict=True)):
        for node, count in zip(nodes, counts, strict=True):
            if not 0 <= node < len(successors):
                _refuse(f'"roots" must name nodes in 0..{len(successors) - 1}', f"{node} in step {step}")
            if depths[node] != step or node in expanded:
                actual = f"node {node} of depth {depths[node]} in step {step}"
                _refuse('"roots" must expand each node once, in the step of its depth', actual)
            if count != len(successors[node]):
                actual = f"{count} for node {node}, which has {len(successors[node])} children"
                _refuse('"branches" must agree with "Successors"', actual)
            expanded.add(node)
    forgotten = [node for node, children in enumerate(successors) if children and node not in expanded]
    if forgotten:
        _refuse('"roots" must have every node with children', f"no node {forgotten[0]} in any step")


def _plain(value: Any) -> Any:
    """Turn tensors and arrays into lists and numbers."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else value


def _integer_lists(value: Any, name: str) -> list[list[int]]:
    rule = f'"{name}" must be a list of lists of integers'
    rows = _plain(value)
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        _refuse(rule, type(value).__name__)
    checked = []
    for index, row in enumerate(map(_plain, rows)):
        if not isinstance(row, Sequence) or isinstance(row, (str, bytes)):
            _refuse(rule, f"{type(row).__name__} at {index}")
        entries = [_plain(entry) for entry in row]
        for entry in entries:
            if not is_integer(entry):
                _refuse(rule, f"{entry!r} in entry {index}")
        checked.append(entries)
    return checked
