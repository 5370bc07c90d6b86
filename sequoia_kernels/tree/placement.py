"""Where the nodes of a drawn tree go: levels below one another, subtrees packed side by side without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Shape", "horizontal_positions"]


class Shape(Protocol):
    """What a drawing asks of a tree; a `TokenTree` answers."""

    @property
    def num_nodes(self) -> int: ...
    @property
    def num_levels(self) -> int: ...
    @property
    def parents(self) -> list[int]: ...
    @property
    def depths(self) -> list[int]: ...
    @property
    def first_child(self) -> list[int]: ...
    @property
    def num_children(self) -> list[int]: ...
    def children(self, node: int, /) -> list[int]: ...
    def rank(self, node: int, /) -> int: ...
    def level_nodes(self, level: int, /) -> list[int]: ...


class _Outline:
    """Left and right edges of a packed group of subtrees, one entry a level, the top level last.

    Stored deepest level first and moved by `shift`, so that adding a parent and moving the group cost nothing, and
    merging two groups costs the height of the lower one: the layout is linear in the number of nodes.
    """

    __slots__ = ("left", "right", "shift")

    def __init__(self, half_width: float) -> None:
        self.left = [-half_width]
        self.right = [half_width]
        self.shift = 0.0

    def distance_to(self, other: _Outline) -> float:
        """Return how far right `other` must move to touch this group on some level."""
        common = min(len(self.right), len(other.left))
        overlap = max(self.right[-level] - other.left[-level] for level in range(1, common + 1))
        return overlap + self.shift - other.shift

    def absorb(self, other: _Outline) -> None:
        """Extend this group by one that stands to its right."""
        offset = other.shift - self.shift
        common = min(len(self.right), len(other.left))
        if len(self.right) >= len(other.right):
            for level in range(1, common + 1):
                self.right[-level] = other.right[-level] + offset
            return
        for level in range(1, common + 1):
            other.left[-level] = self.left[-level] - offset
        self.left, self.right, self.shift = other.left, other.right, other.shift

    def add_parent(self, position: float, half_width: float) -> None:
        self.left.append(position - half_width - self.shift)
        self.right.append(position + half_width - self.shift)


def horizontal_positions(
    tree: Shape, half_widths: Sequence[float], sibling_gap: float, cousin_gap: float
) -> list[float]:
    """Return the horizontal centre of each node, the leftmost edge of the drawing at 0; all sizes in pixels.

    The gaps are those between neighbouring leaves of one parent, and between neighbouring subtrees.
    """
    first_child, num_children, parents = tree.first_child, tree.num_children, tree.parents
    outlines: list[_Outline | None] = [None] * tree.num_nodes
    offsets = [0.0] * tree.num_nodes  # from the parent
    for node in reversed(range(tree.num_nodes)):
        children = range(first_child[node], first_child[node] + num_children[node])
        if not children:
            outlines[node] = _Outline(half_widths[node])
            continue
        group = outlines[children[0]]
        assert group is not None
        centres = [0.0]
        for child in children[1:]:
            outline = outlines[child]
            assert outline is not None
            leaves = num_children[child] == 0 and num_children[child - 1] == 0
            move = group.distance_to(outline) + (sibling_gap if leaves else cousin_gap)
            outline.shift += move
            centres.append(move)
            group.absorb(outline)
            outlines[child] = None
        outlines[children[0]] = None
        centre = (centres[0] + centres[-1]) / 2
        for child, position in zip(children, centres, strict=True):
            offsets[child] = position - centre
        group.add_parent(centre, half_widths[node])
        group.shift -= centre  # every outline has its own root at 0
        outlines[node] = group

    positions = [0.0] * tree.num_nodes
    for node in range(1, tree.num_nodes):
        positions[node] = positions[parents[node]] + offsets[node]
    left_edge = min(position - half for position, half in zip(positions, half_widths, strict=True))
    return [position - left_edge for position in positions]
