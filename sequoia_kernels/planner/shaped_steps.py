"""Which recorded nodes a shaped tree would have taken, step by step: as `drafts/shaping.py`, on recorded steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels.tree import PROBABILITY_EDGES, ShapedTree, TokenTree

__all__ = ["nodes_given_out"]

LEAST_REACH = np.float32(1e-20)  # as in drafts/shaping.py
EDGES = np.array(PROBABILITY_EDGES, dtype=np.float32)


def nodes_given_out(
    tree: ShapedTree, recorded: TokenTree, likelihood: NDArray[np.float32], said: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Give out the children of a shaped tree in recorded steps.

    Args:
        tree: the shaped tree.
        recorded: the tree that was recorded, of N nodes, of which I have children.
        likelihood: the draft's probability of each node's token behind its parent, 0 where none was drawn. [S, N].
        said: what the table of undrawn children goes by, as `StepRecords.said` gives it. [S, I].

    Returns:
        The recorded nodes among the tree's, the root among them. [S, N] bool. Children that it would have, but that
        were not recorded, are in nobody's place: a level then has fewer nodes than the tree's width.
    """
    num_steps = len(likelihood)
    drawn, undrawn = (np.array(table, dtype=np.float32) for table in (tree.confidence.drawn, tree.confidence.undrawn))
    columns, said_columns = (np.searchsorted(EDGES, part, side="right") for part in (likelihood, said))
    place = {node: index for index, node in enumerate(node for node, n in enumerate(recorded.num_children) if n)}
    first_child = recorded.first_child
    taken = np.zeros(likelihood.shape, dtype=np.bool_)
    taken[:, 0] = True
    reach = np.ones(likelihood.shape, dtype=np.float32)
    rows = np.arange(num_steps)[:, None]
    for level, width in enumerate(tree.widths[1:]):
        if level + 1 >= recorded.num_levels:
            break
        parents = np.array([node for node in recorded.level_nodes(level) if recorded.num_children[node]])
        ranks = [rank for node in parents for rank in range(min(recorded.num_children[node], len(undrawn)))]
        above = np.repeat(parents, [min(recorded.num_children[node], len(undrawn)) for node in parents])
        children = np.array([first_child[node] + rank for node, rank in zip(above, ranks)])
        at_said = said_columns[:, [place[node] for node in above.tolist()]]
        worth = np.where(taken[:, above], reach[:, above] * undrawn[ranks, at_said], -1)
        chosen = np.argsort(-worth, axis=1, kind="stable")[:, :width]
        taken[rows, children[chosen]] = worth[rows, chosen] > 0
        chances = drawn[np.minimum(ranks, len(drawn) - 1), columns[:, children]]
        reach[:, children] = np.maximum(reach[:, above] * chances, LEAST_REACH)
    return taken
