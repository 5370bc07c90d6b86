"""A tree around one path of proposed tokens: what is looked up in the text, and what the draft would have said instead.

A path of L proposed nodes hangs below the root; each of its nodes but the last, and the root, may have further children
behind the proposed one, which are drawn. All nodes of the path are known before anything is drawn, so that the draft
scores the whole path in one forward.
"""

from __future__ import annotations

from sequoia_kernels.tree.token_tree import TokenTree

__all__ = ["LookupTree"]


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
