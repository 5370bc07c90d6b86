"""Confidence fitted to recorded steps, and the widths of trees that are shaped by it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels import checks
from sequoia_kernels.planner.step_records import StepRecords
from sequoia_kernels.tree import PROBABILITY_EDGES, Confidence, ShapedTree

__all__ = ["fit_confidence", "held_out_values", "shape_tree"]

Floats = NDArray[np.float64]

MAX_CHILDREN = 16  # of a node; few are given more, and every one of them is drawn for each node of a level
PSEUDO_VISITS = 4.0  # of each bin, spread over its neighbours' mean: few visits must not say never, or always
LEAST_CONFIDENCE = 1e-4
FALL = 0.999  # from rank to rank at least


def fit_confidence(records: StepRecords) -> Confidence:
    """Fit how often a child is accepted once its parent is, by what the draft said of it in recorded steps.

    Every node counts by the probability that its parent was accepted, under the rule "sequoia". Between neighbouring
    probabilities of the draft the estimate is smoothed by a few visits of both together. Where the draft foretells
    acceptance itself, children that are not drawn go by that, if it tells more of what was accepted than its likeliest
    token's probability does: of each half of the requests, by the counts of the other half.

    Args:
        records: the steps; of the temperature and warps that the tree is for.

    Returns:
        The confidence. Ranks that were not recorded are no rank of it.

    Example:
        >>> from sequoia_kernels.decoding import record_steps
        >>> from sequoia_kernels.demo import load_demo_pair
        >>> pair = load_demo_pair()
        >>> prompt = pair.tokenizer("def main(", return_tensors="pt").input_ids
        >>> records = record_steps(pair.target, pair.draft, [prompt], max_new_tokens=16, temperature=0.6)
        >>> fit_confidence(records).max_children
        7
    """
    tree = records.tree
    parents = np.array(tree.parents)
    ranks = np.array([0 if parent < 0 else node - tree.first_child[parent] for node, parent in enumerate(tree.parents)])
    internal = {node: place for place, node in enumerate(node for node, n in enumerate(tree.num_children) if n)}
    num_ranks = min(tree.max_branching, MAX_CHILDREN)
    drawn = []
    signs = [records.nodes.peak] if records.foretold is None else [records.nodes.peak, records.foretold]
    undrawn: list[list[Floats]] = [[] for _ in signs]
    surprise = [0.0] * len(signs)  # at what was accepted of requests that were not counted, by each
    second = _second_half(records)
    halves = [half for half in (second, ~second) if len(signs) > 1 and half.any() and not half.all()]
    for rank in range(num_ranks):
        nodes = np.flatnonzero((ranks == rank) & (parents >= 0))
        above = parents[nodes]
        visits, accepted = records.reached[:, above], records.reached[:, nodes]
        drawn.append(_by_bin(records.nodes.likelihood[:, nodes], visits, accepted))
        places = [internal[parent] for parent in above.tolist()]
        for index, sign in enumerate(signs):
            said = sign[:, places]
            undrawn[index].append(_by_bin(said, visits, accepted))
            for half in halves:
                counted = _by_bin(said[~half], visits[~half], accepted[~half])
                chances = np.minimum(counted, 1 - LEAST_CONFIDENCE)[_bins(said[half])]
                taken, missed = accepted[half], visits[half] - accepted[half]
                surprise[index] -= float((taken * np.log(chances) + missed * np.log1p(-chances)).sum())
    chosen = int(np.argmin(surprise))  # the first of equals
    falling = np.array(undrawn[chosen])
    for rank in range(1, num_ranks):
        falling[rank] = np.minimum(falling[rank], FALL * falling[rank - 1])
    return Confidence(_rows(np.array(drawn)), _rows(falling), foretold=chosen == 1)


def shape_tree(records: StepRecords, num_nodes: int) -> ShapedTree:
    """Give the shaped tree of a size: confidence from recorded steps, and widths by what would be taken one by one.

    In every recorded step the nodes are taken whose worth before their draw is largest, as if no width were fixed; the
    widths are what that comes to on each level, on average.

    Args:
        records: the steps, with a tree of several times as many nodes.
        num_nodes: nodes of the tree, at most as many as were recorded.

    Raises:
        TypeError: num_nodes is no integer.
        ValueError: it is out of range.

    Example:
        >>> from sequoia_kernels.decoding import record_steps
        >>> from sequoia_kernels.demo import load_demo_pair
        >>> pair = load_demo_pair()
        >>> prompt = pair.tokenizer("def main(", return_tensors="pt").input_ids
        >>> records = record_steps(pair.target, pair.draft, [prompt], max_new_tokens=16)
        >>> shape_tree(records, 12).num_nodes
        12
    """
    checks.whole_number("shape_tree", "num_nodes", num_nodes, rule=checks.at_least(2))
    tree = records.tree
    if num_nodes > tree.num_nodes:
        checks.fail_range("shape_tree", "num_nodes", f"be at most the {tree.num_nodes} nodes recorded", num_nodes)
    confidence = fit_confidence(records)
    worth = _worths(records, confidence)
    taken = np.argsort(-worth, axis=1, kind="stable")[:, :num_nodes]
    depths = np.array(tree.depths)[taken]
    means = np.array([(depths == level).sum(axis=1).mean() for level in range(tree.num_levels)])
    return ShapedTree(tuple(_rounded(means, num_nodes, confidence.max_children)), confidence)


def held_out_values(records: StepRecords, tree: ShapedTree, rule: str) -> Floats:
    """Give what a shaped tree's widths are worth in recorded steps whose confidence was fitted to others. [S] float64.

    The steps of every other request are shaped by the confidence of the rest, and the other way round; of a single
    request those of its first half and its second.
    """
    second = _second_half(records)
    values = np.ones(len(records))
    for half in (second, ~second):
        if half.any() and not half.all():
            confidence = fit_confidence(records.part(np.flatnonzero(~half)))
            values[half] = records.part(np.flatnonzero(half)).values(ShapedTree(tree.widths, confidence), rule)
    return values


def _second_half(records: StepRecords) -> NDArray[np.bool_]:
    """Which steps are those of every other request, or of the second half of a single one. [S]"""
    _, request = np.unique(records.requests, return_inverse=True)
    return request % 2 == 1 if request.max(initial=0) else np.arange(len(records)) >= len(records) // 2


def _by_bin(probabilities: NDArray[np.float32], visits: Floats, accepted: Floats) -> Floats:
    """Accepted over visited, by the bin of the draft's probability."""
    bins = _bins(probabilities).ravel()
    num_bins = len(PROBABILITY_EDGES) + 1
    visited, taken = (np.bincount(bins, weights=part.ravel(), minlength=num_bins) for part in (visits, accepted))
    mean = (taken.sum() + 0.5 * LEAST_CONFIDENCE) / (visited.sum() + LEAST_CONFIDENCE)
    # What bins with few visits lean on: those beside them, the nearer the more.
    distance = np.abs(np.arange(num_bins)[:, None] - np.arange(num_bins))
    weights = np.exp2(-distance.astype(np.float64)) * (distance > 0)
    near = (weights @ taken + mean) / (weights @ visited + 1)
    return np.asarray(np.clip((taken + PSEUDO_VISITS * near) / (visited + PSEUDO_VISITS), LEAST_CONFIDENCE, 1))


def _bins(probabilities: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.searchsorted(PROBABILITY_EDGES, probabilities, side="right")


def _rows(table: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table.tolist()))


def _worths(records: StepRecords, confidence: Confidence) -> Floats:
    """What each recorded node was worth before its draw, at most as much as the node above it. [S, N]"""
    tree, nodes = records.tree, records.nodes
    drawn, undrawn = np.array(confidence.drawn), np.array(confidence.undrawn)
    worth, reach = np.ones(nodes.target.shape), np.ones(nodes.target.shape)
    said = _bins(records.said(confidence))
    internal = [node for node, count in enumerate(tree.num_children) if count]
    for place, node in enumerate(internal):
        columns = said[:, place]
        for rank, child in enumerate(tree.children(node)):
            if rank >= len(undrawn):
                worth[:, child] = reach[:, child] = 0
                continue
            own = _bins(nodes.likelihood[:, child])
            worth[:, child] = np.minimum(reach[:, node] * undrawn[rank, columns], worth[:, node]) * FALL
            reach[:, child] = reach[:, node] * drawn[rank, own]
    return worth


def _rounded(means: Floats, num_nodes: int, max_children: int) -> list[int]:
    """Whole widths that add up, as near the means as can be; each level has nodes, none more than can hang there."""
    widths = [1]
    for level in range(1, len(means)):
        left = num_nodes - sum(widths)
        if left == 0:
            break
        rest = float(means[level:].sum())  # what the levels from here on share
        share = left if level + 1 == len(means) else round(left * float(means[level]) / rest) if rest > 0 else left
        widths.append(min(max(1, share), left, widths[-1] * max_children))
    for level in range(1, len(widths)):  # the deepest levels could not take all
        left = num_nodes - sum(widths)
        widths[level] += min(left, widths[level - 1] * max_children - widths[level])
    return widths
