"""What a tree is worth under a verification rule and many acceptance vectors at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels.tree import DEFAULT_RULE, TokenTree, rule_named

__all__ = ["tree_values"]


def tree_values(tree: TokenTree, vectors: NDArray[np.float64], rule: str = DEFAULT_RULE) -> NDArray[np.float64]:
    """Give the expected accepted tokens per step, bonus token included, of one tree under many acceptance vectors.

    Vectors are [draws, ranks], ranks beyond their end count as 0; values are [draws], float64 both. For Sequoia's rule
    that is the sum over nodes of the product of the acceptances along the path; rules whose values do not add up like
    this are asked for each vector.
    """
    verification = rule_named("tree_values", rule)
    if not verification.adds_up:
        return np.array([verification.expected_tokens(tree, vector) for vector in vectors.tolist()])
    num_draws, num_ranks = vectors.shape
    values = np.ones((tree.num_nodes, num_draws))
    by_rank = np.ascontiguousarray(vectors.T)
    first_child = tree.first_child
    for node, parent in enumerate(tree.parents[1:], start=1):
        rank = node - first_child[parent]
        values[node] = values[parent] * by_rank[rank] if rank < num_ranks else 0.0
    return values.sum(axis=0)
