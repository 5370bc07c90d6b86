"""Import of the official Sequoia repository's grow maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        raise TreeFormatError(
            f'{WHERE}: growmap_fields must have "Successors", got the fields {sorted(map(str, fields))}'
        )
    successors = _integer_lists(fields["Successors"], "Successors")
    parents = _parents(successors)
    order = _breadth_first(successors)
    depths = [0] * len(parents)
    for node in order[1:]:
        depths[node] = depths[parents[node]] + 1

    if "size" in fields:
        size = _plain(fields["size"])
        if isinstance(size, bool) or size != len(parents):
            raise TreeFormatError(f'{WHERE}: "size" must be {len(parents)}, the length of "Successors", got {size!r}')
    if "depth" in fields:
        _check_depth(_plain(fields["depth"]), depths)
    if "mask" in fields:
        _check_mask(_plain(fields["mask"]), parents, order)
    if "roots" in fields or "branches" in fields:
        _check_expansion(fields, successors, depths)

    new_ids = {node: new_id for new_id, node in enumerate(order)}
    return [-1] + [new_ids[parents[node]] for node in order[1:]]


def _parents(successors: list[list[int]]) -> list[int]:
    """Invert the lists of children; every node but 0 must occur once."""
    if not successors:
        raise TreeFormatError(f'{WHERE}: "Successors" must have at least the root\'s list, got none')
    parents = [-1] * len(successors)
    for node, children in enumerate(successors):
        for child in children:
            if not 0 <= child < len(successors):
                raise TreeFormatError(
                    f'{WHERE}: "Successors" must name nodes in 0..{len(successors) - 1}, got {child} below node {node}'
                )
            if child == 0:
                raise TreeFormatError(f'{WHERE}: "Successors" must have node 0 as the root, got it below node {node}')
            if parents[child] >= 0:
                raise TreeFormatError(
                    f'{WHERE}: "Successors" must give each node one parent, got node {child} below '
                    f"nodes {parents[child]} and {node}"
                )
            parents[child] = node
    return parents


def _breadth_first(successors: list[list[int]]) -> list[int]:
    order = [0]
    for node in order:
        order.extend(successors[node])
    if len(order) < len(successors):
        missing = min(set(range(len(successors))) - set(order))
        raise TreeFormatError(f'{WHERE}: "Successors" must reach every node from node 0, got no path to node {missing}')
    return order


def _check_depth(given: Any, depths: list[int]) -> None:
    if not isinstance(given, list) or len(given) != len(depths):
        actual = len(given) if isinstance(given, list) else type(given).__name__
        raise TreeFormatError(f'{WHERE}: "depth" must have {len(depths)} entries, one a node, got {actual}')
    for node, (actual, expected) in enumerate(zip(given, depths, strict=True)):
        if isinstance(actual, bool) or actual != expected:
            raise TreeFormatError(
                f'{WHERE}: "depth" must agree with "Successors", got {actual!r} at node {node} of depth {expected}'
            )


def _check_mask(given: Any, parents: list[int], order: list[int]) -> None:
    num_nodes = len(parents)
    try:
        mask = np.asarray(given)
    except ValueError:  # ragged lists
        mask = np.empty(0)
    if mask.shape != (num_nodes, num_nodes) or mask.dtype.kind not in "biuf":
        raise TreeFormatError(
            f'{WHERE}: "mask" must be numbers of shape [nodes, nodes] = [{num_nodes}, {num_nodes}], '
            f"got shape {list(mask.shape)}"
        )
    expected = np.zeros((num_nodes, num_nodes), dtype=bool)
    for node in order:
        if node:
            expected[node] = expected[parents[node]]
        expected[node, node] = True
    wrong = np.argwhere((mask != 0) != expected)
    if len(wrong):
        row, column = map(int, wrong[0])
        relation = "is" if expected[row, column] else "is not"
        raise TreeFormatError(
            f'{WHERE}: "mask" must agree with "Successors", got {mask[row, column]} at [{row}, {column}] '
            f"where node {column} {relation} node {row} or an ancestor of it"
        )


def _check_expansion(fields: Mapping[str, Any], successors: list[list[int]], depths: list[int]) -> None:
    """Check which nodes are expanded in each draft step ("roots") and into how many children ("branches")."""
    for name in ("roots", "branches"):
        if name not in fields:
            raise TreeFormatError(f'{WHERE}: growmap_fields must have both "roots" and "branches", got no "{name}"')
    roots = _integer_lists(fields["roots"], "roots")
    branches = _integer_lists(fields["branches"], "branches")
    if [len(step) for step in roots] != [len(step) for step in branches]:
        raise TreeFormatError(f'{WHERE}: "branches" must have one entry for each of "roots", got other lengths')
    expanded: set[int] = set()
    for step, (nodes, counts) in enumerate(zip(roots, branches, strict=True)):
        for node, count in zip(nodes, counts, strict=True):
            if not 0 <= node < len(successors):
                raise TreeFormatError(
                    f'{WHERE}: "roots" must name nodes in 0..{len(successors) - 1}, got {node} in step {step}'
                )
            if depths[node] != step or node in expanded:
                raise TreeFormatError(
                    f'{WHERE}: "roots" must expand each node once, in the step of its depth, '
                    f"got node {node} of depth {depths[node]} in step {step}"
                )
            if count != len(successors[node]):
                raise TreeFormatError(
                    f'{WHERE}: "branches" must agree with "Successors", got {count} for node {node}, '
                    f"which has {len(successors[node])} children"
                )
            expanded.add(node)
    forgotten = [node for node, children in enumerate(successors) if children and node not in expanded]
    if forgotten:
        raise TreeFormatError(
            f'{WHERE}: "roots" must have every node with children, got no node {forgotten[0]} in any step'
        )


def _plain(value: Any) -> Any:
    """Turn tensors and arrays into lists and numbers."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else value


def _integer_lists(value: Any, name: str) -> list[list[int]]:
    rows = _plain(value)
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        raise TreeFormatError(f'{WHERE}: "{name}" must be a list of lists of integers, got {type(value).__name__}')
    checked = []
    for index, row in enumerate(rows):
        row = _plain(row)
        if not isinstance(row, Sequence) or isinstance(row, (str, bytes)):
            raise TreeFormatError(
                f'{WHERE}: "{name}" must be a list of lists of integers, got {type(row).__name__} at {index}'
            )
        entries = [_plain(entry) for entry in row]
        for entry in entries:
            if not is_integer(entry):
                raise TreeFormatError(
                    f'{WHERE}: "{name}" must be a list of lists of integers, got {entry!r} in entry {index}'
                )
        checked.append(entries)
    return checked
