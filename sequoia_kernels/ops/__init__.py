"""The four ops of a tree decoding step, and `warped_logsumexp`, an extra for own verifiers and samplers.

Each is a room of its own; none knows of another. What they share is beside the rooms: backends, operators, warping.
"""

from .compact_kv_cache_ import CacheTable, compact_kv_cache_
from .sample_without_replacement import SampledTokens, sample_without_replacement
from .tree_attention import TreeAttentionOutput, tree_attention
from .verify_tree import VerifiedPath, verify_tree
from .warped_logsumexp import WarpedNormaliser, warped_logsumexp

__all__ = [
    "CacheTable",
    "SampledTokens",
    "TreeAttentionOutput",
    "VerifiedPath",
    "WarpedNormaliser",
    "compact_kv_cache_",
    "sample_without_replacement",
    "tree_attention",
    "verify_tree",
    "warped_logsumexp",
]
