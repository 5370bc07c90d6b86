"""Trees of which the scheduler left only the first nodes: near the end of the context, or of a step's token budget."""

from __future__ import annotations

from functools import lru_cache

from sequoia_kernels.tree import TokenTree

__all__ = ["first_nodes"]


@lru_cache(maxsize=1024)
def first_nodes(tree: TokenTree, num_nodes: int) -> TokenTree:
    """Give what is left of a tree of which only so many nodes were scheduled: nodes are numbered breadth-first."""
    return tree if num_nodes == tree.num_nodes else TokenTree(tree.parents[:num_nodes])
