"""The five ops of a tree decoding step. Each is a room of its own; none knows of another."""

from .tree_attention import TreeAttentionOutput, tree_attention
from .warped_logsumexp import WarpedNormaliser, warped_logsumexp

__all__ = [
    "TreeAttentionOutput",
    "WarpedNormaliser",
    "tree_attention",
    "warped_logsumexp",
]
