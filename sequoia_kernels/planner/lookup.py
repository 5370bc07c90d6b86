"""What proposals copied from a request's own text are worth: chances by how much of the text agreed, and the best tree.

A proposal is a path of tokens that followed an earlier place where the newest `match` tokens stood as well. Once the
first d of them are accepted, match + d tokens agree at the next one, so one table of chances by agreement says all:

    value(L) = 1 + sum over d = 1..L of prod over i < d of chance(match + i)

A drawn child beside each proposed node is reached when that node is rejected, and accepted with `sibling_chance` then.
Whether a proposal would have been accepted is seen in every step, whatever the step decoded with: its tokens are
compared with those that were emitted, so that the table learns without proposals being tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sequoia_kernels.planner.candidates import PlanCandidate
from sequoia_kernels.planner.cost_model import ROOT_ROWS, CostModel
from sequoia_kernels.tree import TYPICAL_ACCEPTANCE, LookupTree, TokenTree

__all__ = [
    "LEAST_MATCH", "MOST_MATCH", "LookupCosts", "LookupEvidence", "LookupPick", "fastest_lookup", "lookup_trees",
    "lookup_value",
]  # fmt: skip

LEAST_MATCH, MOST_MATCH = 2, 32  # tokens that must agree, and that are compared at most
# First agreement of each bin, and the chance that the next token is right before anything was seen. Estimates.
BIN_STARTS = (0, 3, 4, 6, 9, 14, 20)
PRIOR_CHANCES = (0.3, 0.45, 0.55, 0.65, 0.75, 0.8, 0.85)
PRIOR_WEIGHT = 4.0
BASE_WEIGHT = 8.0  # steps that the expected tokens of the draft's own tree count as
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_BIN_OF = np.searchsorted(BIN_STARTS, np.arange(MOST_MATCH + LENGTHS[-1] + 1), side="right") - 1


class LookupEvidence:
    """How often a proposed token was right, by how many tokens before it agreed."""

    def __init__(self) -> None:
        self.tried = np.full(len(BIN_STARTS), PRIOR_WEIGHT)
        self.right = np.array(PRIOR_CHANCES) * PRIOR_WEIGHT

    def note(self, match: int, proposed: Sequence[int], emitted: Sequence[int]) -> None:
        """Compare a proposal with the tokens that were emitted behind the text it was made for.

        Args:
            match: tokens that agreed when it was made.
            proposed: the proposal.
            emitted: what came.
        """
        for place, (one, other) in enumerate(zip(proposed, emitted, strict=False)):
            bin_index = _BIN_OF[min(match + place, len(_BIN_OF) - 1)]
            self.tried[bin_index] += 1
            self.right[bin_index] += one == other
            if one != other:
                break

    def reach(self, match: int, length: int) -> np.ndarray:
        """Give the chance of accepting the whole path down to each of `length` proposed nodes. [length] float64."""
        places = np.minimum(match + np.arange(length), len(_BIN_OF) - 1)
        return np.cumprod((self.right / self.tried)[_BIN_OF[places]])


class LookupPick(NamedTuple):
    """A tree for a step, and the tokens a millisecond that are expected of it."""

    tree: LookupTree
    speed: float


def lookup_trees(max_nodes: int, siblings: Sequence[int]) -> list[LookupTree]:
    """Give the trees to choose among.

    Args:
        max_nodes: nodes of the largest.
        siblings: numbers of drawn children beside a proposed node that come into question.

    Example:
        >>> lookup_trees(4, [0])
        [LookupTree(1, 0), LookupTree(2, 0), LookupTree(3, 0)]
    """
    shapes = [(length, count) for length in LENGTHS for count in siblings]
    return [LookupTree(length, count) for length, count in shapes if 1 + length * (1 + count) <= max_nodes]


def lookup_value(tree: LookupTree, reach: np.ndarray, sibling_chance: float) -> float:
    """Give the expected tokens of a step with a tree, for the chances of its path that `LookupEvidence.reach` gives."""
    reached = np.concatenate(([1.0], reach[: tree.length]))
    value = float(reached.sum())
    if tree.siblings:
        rejected = float((reached[:-1] - reached[1:]).sum())
        value += rejected * (1 - (1 - sibling_chance) ** tree.siblings)
    return value


def fastest_lookup(
    trees: Sequence[LookupTree],
    reaches: Sequence[np.ndarray | None],
    step_ms: Mapping[LookupTree, float],
    sibling_chance: float,
) -> LookupPick | None:
    """Choose the tree with the most expected tokens a millisecond over all requests; None without any trees.

    Args:
        trees: to choose among.
        reaches: of each request that still decodes, for as many nodes as its proposal has; None without a proposal.
        step_ms: milliseconds of a step with each.
        sibling_chance: that a drawn child is accepted where the proposed one was not.
    """
    nothing = np.zeros(0)
    best = None
    for tree in trees:
        value = 0.0
        for reach in reaches:
            own = nothing if reach is None else reach[: tree.length]
            padded = np.zeros(tree.length)
            padded[: len(own)] = own
            value += lookup_value(tree, padded, sibling_chance)
        speed = value / step_ms[tree]
        if best is None or speed > best.speed:
            best = LookupPick(tree, speed)
    return best


class LookupCosts:
    """What steps with lookup trees, and the steps beside them, take.

    Args:
        trees: lookup trees to choose among.
        step_ms: milliseconds of a step with each.
        base_ms: milliseconds of a step with each tree of the draft.
        base_tokens: tokens that are expected of such a step, before any was seen.
        sibling_chance: that a drawn child is accepted where the proposed one was not.
    """

    def __init__(
        self,
        trees: Sequence[LookupTree],
        step_ms: Mapping[LookupTree, float],
        base_ms: Mapping[TokenTree, float],
        base_tokens: Mapping[TokenTree, float],
        sibling_chance: float,
    ) -> None:
        self.trees, self.step_ms, self.base_ms, self.base_tokens = tuple(trees), step_ms, base_ms, base_tokens
        self.sibling_chance = sibling_chance

    @classmethod
    def alike(cls, base: Sequence[TokenTree], max_nodes: int, siblings: Sequence[int]) -> LookupCosts:
        """Without times: a step takes the same with every tree of up to so many nodes."""
        trees = lookup_trees(max_nodes, siblings)
        tokens = {tree: tree.expected_tokens(TYPICAL_ACCEPTANCE) for tree in base}
        alike = dict.fromkeys((*trees, *base), 1.0)
        return cls(trees, {tree: alike[tree] for tree in trees}, alike, tokens, TYPICAL_ACCEPTANCE[0])

    @classmethod
    def measured(
        cls, costs: CostModel, context_len: float, plans: Sequence[PlanCandidate], siblings: Sequence[int]
    ) -> LookupCosts:
        """From a profile.

        Args:
            costs: of the pair, or of the target alone.
            context_len: committed tokens.
            plans: the trees of the draft that may be decoded with.
            siblings: as in `lookup_trees`; more than 0 where the draft reads paths along.
        """
        times = costs.at_context(context_len)
        reads = any(siblings)
        most = costs.max_nodes if not reads else min(costs.max_nodes, costs.max_draft_rows - ROOT_ROWS)
        trees = lookup_trees(most, siblings)
        step_ms = {}
        for tree in trees:
            nodes = tree.num_nodes
            step_ms[tree] = times.target[nodes] + times.verify[nodes] + times.host[2 if reads else 1]
            if costs.draft is not None:
                step_ms[tree] += times.compact[min(tree.num_levels, len(times.compact) - 1)]
            if reads:
                step_ms[tree] += times.draft[tree.length + ROOT_ROWS]
            if tree.siblings:
                step_ms[tree] += times.sample(tree.length, tree.siblings)
        base_ms = {plan.tree: plan.step_ms for plan in plans}
        base_tokens = {plan.tree: plan.tokens_per_step for plan in plans}
        single = TokenTree.single()
        base_ms.setdefault(single, times.target[1] + times.verify[1] + times.host[1])
        base_tokens.setdefault(single, 1.0)
        return cls(trees, step_ms, base_ms, base_tokens, TYPICAL_ACCEPTANCE[0])

    def base_speed(self, tree: TokenTree, seen_tokens: float, seen_steps: float) -> float:
        """Give the tokens a millisecond of a tree of the draft, from what is expected and what was seen."""
        if tree.num_nodes == 1:
            return 1.0 / self.base_ms[tree]
        tokens = (self.base_tokens[tree] * BASE_WEIGHT + seen_tokens) / (BASE_WEIGHT + seen_steps)
        return tokens / self.base_ms[tree]
