"""Attention of tree nodes over the committed cache and, under a packed mask, over the tree's own cache rows."""

from .op import TreeAttentionOutput, tree_attention

__all__ = ["TreeAttentionOutput", "tree_attention"]
