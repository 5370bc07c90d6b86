"""Trees with a path of proposed tokens: what is looked up in the text, and what the draft would have said instead.

In a `LookupTree` a path of L proposed nodes hangs below the root; each of its nodes but the last, and the root, may
have further children behind the proposed one, which are drawn. All nodes of the path are known before anything is
drawn, so that the draft scores the whole path in one forward.

A `MergedTree` is a draft's own tree whose first children, from the root down, may be proposed instead of drawn: what
hangs below them and beside them is the draft's, drawn level by level as ever.
"""

from __future__ import annotations

from sequoia_kernels.tree.token_tree import TokenTree

__all__ = ["LONGEST_PATH", "LookupTree", "MergedTree"]

LONGEST_PATH = 32  # tokens that are proposed at most


class LookupTree(TokenTree):
    """A path of proposed nodes, with drawn siblings.

    Args:
        length: nodes of the path, below the root.
        siblings: drawn children beside each of them.

    Attributes:
        length: as given.
        siblings: as given.
        path: the nodes of the path, from the root's child on; every one is its parent's first child. [length]

    Example:
        >>> tree = LookupTree(2, 1)
        >>> tree.parents, tree.path
        ([-1, 0, 0, 1, 1], (1, 3))
    """

    length: int
    siblings: int
    path: tuple[int, ...]

    def __init__(self, length: int, siblings: int = 0) -> None:
        path = tuple(1 + level * (1 + siblings) for level in range(length))
        parents = [-1] + [parent for parent in (0, *path[:-1]) for _ in range(1 + siblings)]
        super().__init__(parents)
        vars(self).update(length=length, siblings=siblings, path=path, _hash=hash((LookupTree, length, siblings)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LookupTree):
            return False
        return (self.length, self.siblings) == (other.length, other.siblings)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[LookupTree], tuple[int, int]]:  # type: ignore[override]
        return LookupTree, (self.length, self.siblings)

    def __repr__(self) -> str:
        return f"LookupTree({self.length}, {self.siblings})"


class MergedTree(TokenTree):
    """A draft's tree that takes proposed tokens in: each first child from the root down may be one.

    Args:
        base: the draft's tree.

    Attributes:
        base: as given.
        path: the nodes that may be proposed: the root's first child, that one's first child, and so on.

    Example:
        >>> MergedTree(TokenTree([-1, 0, 0, 1, 2])).path
        (1, 3)
    """

    base: TokenTree
    path: tuple[int, ...]

    def __init__(self, base: TokenTree) -> None:
        super().__init__(base.parents)
        path: list[int] = []
        node = 0
        num_children, first_child = base.num_children, base.first_child
        while num_children[node] and len(path) < LONGEST_PATH:
            node = first_child[node]
            path.append(node)
        vars(self).update(base=base, path=tuple(path), _hash=hash((MergedTree, base)))

    def __eq__(self, other: object) -> bool:
        return self.base == other.base if isinstance(other, MergedTree) else False

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[MergedTree], tuple[TokenTree]]:  # type: ignore[override]
        return MergedTree, (self.base,)

    def __repr__(self) -> str:
        return f"MergedTree({self.base!r})"
