"""The five ops of a tree decoding step. Each is a room of its own; none knows of another."""

from .sample_without_replacement import SampledTokens, sample_without_replacement
from .tree_attention import TreeAttentionOutput, tree_attention
from .verify_tree import VerifiedPath, verify_tree
from .warped_logsumexp import WarpedNormaliser, warped_logsumexp

__all__ = [
    "SampledTokens",
    "TreeAttentionOutput",
    "VerifiedPath",
    "WarpedNormaliser",
    "sample_without_replacement",
    "tree_attention",
    "verify_tree",
    "warped_logsumexp",
]
