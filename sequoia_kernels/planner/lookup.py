"""What proposals copied from a request's own text are worth: chances by how much of the text agreed, and the best tree.

A proposal is a path of tokens that followed an earlier place where the newest `match` tokens stood as well. Once the
first d of them are accepted, match + d tokens agree at the next one, so one table of chances by agreement says all:

    value(L) = 1 + sum over d = 1..L of prod over i < d of chance(match + i)

A drawn child beside each proposed node is reached when that node is rejected, and accepted with `sibling_chance` then.
Whether a proposal would have been accepted is seen in every step, whatever the step decoded with: its tokens are
compared with those that were emitted, so that the table learns without proposals being tried.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from sequoia_kernels.planner.candidates import PlanCandidate
from sequoia_kernels.planner.cost_model import ROOT_ROWS, CostModel
from sequoia_kernels.tree import TYPICAL_ACCEPTANCE, LookupTree, TokenTree

__all__ = [
    "LEAST_MATCH", "MOST_MATCH", "BaseEvidence", "LookupCosts", "LookupEvidence", "LookupPick", "lookup_trees",
]  # fmt: skip

LEAST_MATCH, MOST_MATCH = 2, 32  # tokens that must agree, and that are compared at most
# First agreement of each bin, and the chance that the next token is right before anything was seen. Estimates.
BIN_STARTS = (0, 3, 4, 6, 9, 14, 20)
PRIOR_CHANCES = (0.3, 0.45, 0.55, 0.65, 0.75, 0.8, 0.85)
PRIOR_WEIGHT = 4.0
BASE_WEIGHT = 8.0  # steps that the expected tokens of the draft's own tree count as
AGREED_WEIGHT = 2.0  # and what it accepts of all texts, for those where as much agrees
DOUBT = 0.5  # by which a lookup tree must be faster than a draft that was never tried where as much agrees
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
LONGEST_READ = 12  # of paths with siblings, whose rows of logits are kept
_BIN_OF = [bisect_right(BIN_STARTS, agreed) - 1 for agreed in range(MOST_MATCH + LENGTHS[-1] + 1)]
_BIN_WIDTHS = [_BIN_OF.count(index) for index in range(len(BIN_STARTS))]


class LookupEvidence:
    """How often a proposed token was right, by how many tokens before it agreed."""

    def __init__(self) -> None:
        self.tried = [PRIOR_WEIGHT] * len(BIN_STARTS)
        self.right = [chance * PRIOR_WEIGHT for chance in PRIOR_CHANCES]
        self.siblings_tried, self.siblings_right = PRIOR_WEIGHT, PRIOR_WEIGHT * TYPICAL_ACCEPTANCE[0]
        self._chances = self._by_agreement()

    def note(self, match: int, proposed: Sequence[int], emitted: Sequence[int]) -> None:
        """Compare a proposal with the tokens that were emitted behind the text it was made for.

        Args:
            match: tokens that agreed when it was made.
            proposed: the proposal.
            emitted: what came.
        """
        for place, (one, other) in enumerate(zip(proposed, emitted, strict=False), match):
            bin_index = _BIN_OF[min(place, len(_BIN_OF) - 1)]
            self.tried[bin_index] += 1
            self.right[bin_index] += one == other
            if one != other:
                break
        self._chances = self._by_agreement()

    @property
    def sibling_chance(self) -> float:
        """That a drawn child is accepted where the proposed one was not."""
        return self.siblings_right / self.siblings_tried

    def note_sibling(self, accepted: bool) -> None:
        """Take in a step whose proposed path ended early, and whether a sibling was accepted there."""
        self.siblings_tried += 1
        self.siblings_right += accepted

    def reach(self, match: int, length: int) -> list[float]:
        """Give the chance of accepting the whole path down to each of `length` proposed nodes. [length]."""
        return list(accumulate(self._chances[match : match + length], mul))

    def _by_agreement(self) -> list[float]:
        chances: list[float] = []
        for right, tried, width in zip(self.right, self.tried, _BIN_WIDTHS, strict=True):
            chances += [right / tried] * width
        return chances


class LookupPick(NamedTuple):
    """A tree for a step, and the tokens a millisecond that are expected of it."""

    tree: LookupTree
    speed: float


def lookup_trees(max_nodes: int, siblings: Sequence[int]) -> list[LookupTree]:
    """Give the trees to choose among.

    Args:
        max_nodes: nodes of the largest.
        siblings: numbers of drawn children beside a proposed node that come into question: 0 and 1.

    Example:
        >>> lookup_trees(4, [0])
        [LookupTree(1, 0), LookupTree(2, 0), LookupTree(3, 0)]
    """
    shapes = [(length, count) for length in LENGTHS for count in siblings]
    return [
        LookupTree(length, count)
        for length, count in shapes
        if 1 + length * (1 + count) <= max_nodes and (count == 0 or length <= LONGEST_READ)
    ]


class LookupCosts:
    """What steps with lookup trees, and the steps beside them, take.

    Args:
        trees: lookup trees to choose among.
        step_ms: milliseconds of a step with each.
        base_ms: milliseconds of a step with each tree of the draft.
        base_tokens: tokens that are expected of such a step, before any was seen.
    """

    def __init__(
        self,
        trees: Sequence[LookupTree],
        step_ms: Mapping[LookupTree, float],
        base_ms: Mapping[TokenTree, float],
        base_tokens: Mapping[TokenTree, float],
    ) -> None:
        self.trees, self.step_ms, self.base_ms, self.base_tokens = tuple(trees), step_ms, base_ms, base_tokens
        self.longest = max((tree.length for tree in trees), default=0)
        self._rows = [(tree, tree.length, 1.0 / step_ms[tree]) for tree in trees]
        self._unread = [row for row in self._rows if not row[0].siblings]

    def within(self, num_rows: int) -> LookupCosts:
        """Give the same for trees that need no more cache rows: one a node and two a level."""
        trees = [tree for tree in self.trees if tree.num_nodes + 2 * tree.num_levels <= num_rows]
        return LookupCosts(trees, self.step_ms, self.base_ms, self.base_tokens)

    def fastest(
        self, reaches: Sequence[Sequence[float] | None], sibling_chance: float, read: bool = True
    ) -> LookupPick | None:
        """Choose the lookup tree with the most expected tokens a millisecond; None where there is none.

        Args:
            reaches: of each request that still decodes, for as many nodes as its proposal has; None without a proposal.
            sibling_chance: that a drawn child is accepted where the proposed one was not.
            read: whether trees that the draft reads along come into question.
        """
        longest, count = self.longest, len(reaches)
        if longest == 0:
            return None
        through, below = [0.0] * (longest + 1), [0.0] * (longest + 1)  # of all requests: chance and tokens, by length
        for reach in reaches:
            accepted = 0.0
            known = 0 if reach is None else min(len(reach), longest)
            for length in range(1, known + 1):
                accepted += reach[length - 1]  # type: ignore[index]
                through[length] += reach[length - 1]  # type: ignore[index]
                below[length] += accepted
            for length in range(known + 1, longest + 1):
                below[length] += accepted
        rows = self._rows if read else self._unread
        saved = [0.0, sibling_chance]
        speeds = [
            (count + below[length] + (count - through[length]) * saved[tree.siblings]) * rate
            for tree, length, rate in rows
        ]
        if not rows:
            return None
        best = max(range(len(rows)), key=speeds.__getitem__)
        return LookupPick(rows[best][0], speeds[best])

    @classmethod
    def alike(cls, base: Sequence[TokenTree], max_nodes: int, siblings: Sequence[int]) -> LookupCosts:
        """Without times: a step takes the same with every tree of up to so many nodes."""
        trees = lookup_trees(max_nodes, siblings)
        tokens = {tree: tree.expected_tokens(TYPICAL_ACCEPTANCE) for tree in base}
        alike = dict.fromkeys((*trees, *base), 1.0)
        return cls(trees, {tree: alike[tree] for tree in trees}, alike, tokens)

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
        trees = [
            tree
            for tree in lookup_trees(costs.max_nodes, siblings)
            if not tree.siblings or tree.length + ROOT_ROWS <= costs.max_draft_rows
        ]
        step_ms = {}
        for tree in trees:
            nodes = tree.num_nodes
            step_ms[tree] = times.target[nodes] + times.verify[nodes] + times.host[2 if tree.siblings else 1]
            if costs.draft is not None:
                step_ms[tree] += times.compact[min(tree.num_levels, len(times.compact) - 1)]
            if tree.siblings:
                step_ms[tree] += times.draft[tree.length + ROOT_ROWS] + times.sample(tree.length, tree.siblings)
        base_ms = {plan.tree: plan.step_ms for plan in plans}
        base_tokens = {plan.tree: plan.tokens_per_step for plan in plans}
        single = TokenTree.single()
        base_ms.setdefault(single, times.target[1] + times.verify[1] + times.host[1])
        base_tokens.setdefault(single, 1.0)
        return cls(trees, step_ms, base_ms, base_tokens)


class BaseEvidence:
    """What the draft's own trees have been worth, by how much of the text agreed with an earlier place.

    Where a text repeats it is easy for the draft, too: what lookup competes with there is more than the average.
    """

    def __init__(self, costs: LookupCosts) -> None:
        self.costs = costs
        self.tokens, self.steps = 0.0, 0.0
        self._agreed = [[0.0, 0.0] for _ in range(len(BIN_STARTS) + 1)]  # tokens and steps, first without agreement

    def note(self, match: int, num_tokens: int) -> None:
        """Take in a step with one of the draft's trees, for a request of which so many tokens agreed; 0 for none."""
        self.tokens += num_tokens
        self.steps += 1
        entry = self._agreed[_bin_of(match)]
        entry[0] += num_tokens
        entry[1] += 1

    def speed(self, tree: TokenTree, matches: Sequence[int]) -> float:
        """Give the tokens a millisecond that a lookup tree must promise to be taken, of all requests together.

        Args:
            tree: the draft's tree.
            matches: of each request, how many tokens agree.
        """
        if tree.num_nodes == 1:
            return len(matches) / self.costs.base_ms[tree]
        usual = (self.costs.base_tokens[tree] * BASE_WEIGHT + self.tokens) / (BASE_WEIGHT + self.steps)
        wanted = 0.0
        for match in matches:
            tokens, steps = self._agreed[_bin_of(match)]
            own = (usual * AGREED_WEIGHT + tokens) / (AGREED_WEIGHT + steps)
            wanted += own * (1.0 + (DOUBT / (1.0 + steps / AGREED_WEIGHT) if match else 0.0))
        return wanted / self.costs.base_ms[tree]


def _bin_of(match: int) -> int:
    return 0 if match == 0 else 1 + _BIN_OF[match]
