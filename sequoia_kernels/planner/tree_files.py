"""Files that name a tree: a tree, a shaped tree or a plan."""

from __future__ import annotations

import os

from sequoia_kernels.documents import read_text
from sequoia_kernels.planner.plan import TreePlan
from sequoia_kernels.tree import ShapedTree, TokenTree

__all__ = ["read_tree"]


def read_tree(path: str | os.PathLike[str]) -> TokenTree | ShapedTree | TreePlan:
    """Read a tree from its file, whatever wrote it.

    Args:
        path: file of `TokenTree.save`, `ShapedTree.save` or `TreePlan.save`, or what the commands `plan` and `shape`
            write.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds none of the three; the message says what is wrong.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "tree.json")
        >>> TokenTree.chain(3).save(path)
        >>> read_tree(path).num_nodes
        3
    """
    text = read_text(path)  # once: it may be a pipe
    for kind in (TreePlan, ShapedTree):
        if kind.FORMAT.name in text:
            return kind.from_json(text)
    return TokenTree.from_json(text)
