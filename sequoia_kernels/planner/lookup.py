"""What proposals copied from a request's own text are worth: chances by how much of the text agreed, and the best tree.

A proposal is a path of tokens that followed an earlier place where the newest `match` tokens stood as well. Once the
first d of them are accepted, match + d tokens agree at the next one, so one table of chances by agreement says all:

    value(L) = 1 + sum over d = 1..L of prod over i < d of chance(match + i)

A drawn child beside each proposed node is reached when that node is rejected, and accepted with `sibling_chance` then.
In a merged tree the draft's own children and what is below them take its place:

    value(node i) = chance(match + i) * (1 + value(node i + 1)) + (1 - chance(match + i)) * (of the drawn children)

Whether a proposal would have been accepted is seen in every step, whatever the step decoded with: its tokens are
compared with those that were emitted, so that the table learns without proposals being tried.

Trees with proposals in them are set up when a call first decodes with one. So none is taken before all that has been
promised, the milliseconds that proposals would have saved, makes up for that: where texts repeat that is soon, where
they hardly do it is never.

`LookupEvidence`, `BaseEvidence`, `LookupCosts.fastest` and `SetUp` specify what the loop does by `choice_of`, in C++:
it is asked when the weights that were just read have emptied the caches of all that is Python's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from sequoia_kernels.host_module import host as _host
from sequoia_kernels.planner.candidates import PlanCandidate
from sequoia_kernels.planner.cost_model import ROOT_ROWS, CostModel
from sequoia_kernels.tree import LONGEST_PATH, TYPICAL_ACCEPTANCE, LookupTree, MergedTree, TokenTree

__all__ = [
    "LEAST_MATCH", "MOST_MATCH", "BaseEvidence", "LookupCosts", "LookupEvidence", "LookupPick", "MergedValue", "SetUp",
    "choice_of", "lookup_trees",
]  # fmt: skip

LEAST_MATCH, MOST_MATCH = 2, 32  # tokens that must agree, and that are compared at most
# First agreement of each bin, and the chance that the next token is right before anything was seen. Estimates.
BIN_STARTS = (0, 3, 4, 6, 9, 14, 20)
PRIOR_CHANCES = (0.3, 0.45, 0.55, 0.65, 0.75, 0.8, 0.85)
PRIOR_WEIGHT = 4.0
BASE_WEIGHT = 8.0  # steps that the expected tokens of the draft's own tree count as
AGREED_WEIGHT = 2.0  # and what it accepts of all texts, for those where as much agrees
MERGED_WEIGHT = 8.0  # and what the chances say of it with a proposal in it
DOUBT = 0.5  # by which a lookup tree must be faster than a draft that was never tried where as much agrees
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, LONGEST_PATH)
LONGEST_READ = 12  # of paths with siblings, whose rows of logits are kept
_BIN_OF = [bisect_right(BIN_STARTS, agreed) - 1 for agreed in range(MOST_MATCH + LENGTHS[-1] + 1)]
_BIN_WIDTHS = [_BIN_OF.count(index) for index in range(len(BIN_STARTS))]


class LookupEvidence:
    """How often a proposed token was right, by how many tokens before it agreed."""

    def __init__(self) -> None:
        self.tried = [PRIOR_WEIGHT] * len(BIN_STARTS)
        self.right = [chance * PRIOR_WEIGHT for chance in PRIOR_CHANCES]
        self.siblings_tried, self.siblings_right = PRIOR_WEIGHT, PRIOR_WEIGHT * TYPICAL_ACCEPTANCE[0]
        self._chances: list[float] = []  # by agreement; empty where they are to be computed again

    def note(self, match: int, proposed: Sequence[int], emitted: Sequence[int]) -> None:
        """Compare a proposal with the tokens that were emitted behind the text it was made for.

        Args:
            match: tokens that agreed when it was made.
            proposed: the proposal.
            emitted: what came.
        """
        if not proposed:
            return
        for place, (one, other) in enumerate(zip(proposed, emitted, strict=False), match):
            bin_index = _BIN_OF[min(place, len(_BIN_OF) - 1)]
            self.tried[bin_index] += 1
            self.right[bin_index] += one == other
            if one != other:
                break
        self._chances = []  # most steps ask for none

    @property
    def sibling_chance(self) -> float:
        """That a drawn child is accepted where the proposed one was not."""
        return self.siblings_right / self.siblings_tried

    def note_sibling(self, accepted: bool) -> None:
        """Take in a step whose proposed path ended early, and whether a sibling was accepted there."""
        self.siblings_tried += 1
        self.siblings_right += accepted

    def chances(self, match: int, length: int) -> list[float]:
        """Give the chance of accepting each of `length` proposed nodes, if those above it are. [length]."""
        chances = self._chances = self._chances or self._by_agreement()
        return chances[match : match + length]

    def reach(self, match: int, length: int) -> list[float]:
        """Give the chance of accepting the whole path down to each of `length` proposed nodes. [length]."""
        return list(accumulate(self.chances(match, length), mul))

    def _by_agreement(self) -> list[float]:
        chances: list[float] = []
        for right, tried, width in zip(self.right, self.tried, _BIN_WIDTHS, strict=True):
            chances += [right / tried] * width
        return chances


class LookupPick(NamedTuple):
    """A tree for a step, and the tokens a millisecond that are expected of it."""

    tree: LookupTree
    speed: float


class MergedValue:
    """What a draft's tree is worth that takes a proposed path in.

    Args:
        tree: the draft's tree.
        acceptance: its acceptance vector.
    """

    def __init__(self, tree: TokenTree, acceptance: Sequence[float]) -> None:
        first_child, num_children = tree.first_child, tree.num_children
        below = [0.0] * tree.num_nodes  # tokens that are expected below each node
        for node in reversed(range(tree.num_nodes)):
            children = range(first_child[node], first_child[node] + num_children[node])
            below[node] = sum(
                chance * (1.0 + below[child]) for chance, child in zip(acceptance, children, strict=False)
            )
        self._nodes = []  # of the path, its first node's parent first: tokens below, and by the other children alone
        for node in (0, *MergedTree(tree).path):
            # The draft's first guess is the second child now, and so on.
            others = range(first_child[node] + 1, first_child[node] + num_children[node])
            drawn = sum(chance * (1.0 + below[child]) for chance, child in zip(acceptance, others, strict=False))
            self._nodes.append((below[node], drawn))

    @property
    def nodes(self) -> list[tuple[float, float]]:
        """Tokens below the root and each node of the path, and those of them by drawn children beside a proposal."""
        return list(self._nodes)

    def expected_tokens(self, chances: Sequence[float]) -> float:
        """Give the tokens of a step, the bonus token included.

        Args:
            chances: of each proposed token, if those before it are accepted; the tree has room for the first ones.

        Example:
            >>> MergedValue(TokenTree([-1, 0, 0]), [0.5]).expected_tokens([0.8])  # the second child: 0.2 * 0.5
            1.9
        """
        length = min(len(chances), len(self._nodes) - 1)
        value = self._nodes[length][0]
        for chance, (_, drawn) in zip(reversed(chances[:length]), reversed(self._nodes[:length]), strict=True):
            value = chance * (1.0 + value) + (1.0 - chance) * drawn
        return 1.0 + value


@lru_cache(maxsize=64)
def _lookup_trees(max_nodes: int, siblings: tuple[int, ...]) -> tuple[LookupTree, ...]:
    shapes = [(length, count) for length in LENGTHS for count in siblings]
    return tuple(
        LookupTree(length, count)
        for length, count in shapes
        if 1 + length * (1 + count) <= max_nodes and (count == 0 or length <= LONGEST_READ)
    )


def lookup_trees(max_nodes: int, siblings: Sequence[int]) -> list[LookupTree]:
    """Give the trees to choose among: the same objects at every call, which hold what was made of them.

    Args:
        max_nodes: nodes of the largest.
        siblings: numbers of drawn children beside a proposed node that come into question: 0 and 1.

    Example:
        >>> lookup_trees(4, [0])
        [LookupTree(1, 0), LookupTree(2, 0), LookupTree(3, 0)]
    """
    return list(_lookup_trees(max_nodes, tuple(siblings)))


class LookupCosts:
    """What steps with lookup trees, and the steps beside them, take.

    Args:
        trees: lookup trees to choose among.
        step_ms: milliseconds of a step with each.
        base_ms: milliseconds of a step with each tree of the draft.
        base_tokens: tokens that are expected of such a step, before any was seen.
        acceptance: the draft's acceptance vector, for what its trees are worth with proposals in them.
        set_up_ms: milliseconds that a call takes to set trees with proposals in them up.
    """

    def __init__(
        self,
        trees: Sequence[LookupTree],
        step_ms: Mapping[LookupTree, float],
        base_ms: Mapping[TokenTree, float],
        base_tokens: Mapping[TokenTree, float],
        acceptance: Sequence[float] = TYPICAL_ACCEPTANCE,
        set_up_ms: float = 0.0,
    ) -> None:
        self.set_up_ms = set_up_ms
        self.trees, self.step_ms, self.base_ms, self.base_tokens = tuple(trees), step_ms, base_ms, base_tokens
        self.acceptance = tuple(map(float, acceptance))
        self._rows = [(tree, tree.length, tree.siblings, 1.0 / step_ms[tree]) for tree in trees]
        self._unread = [row for row in self._rows if not row[2]]

    @property
    def rows(self) -> list[tuple[int, int, float]]:
        """Length, siblings and steps a millisecond of each tree."""
        return [(length, siblings, rate) for _, length, siblings, rate in self._rows]

    def within(self, num_rows: int) -> LookupCosts:
        """Give the same for trees that need no more cache rows: one a node and two a level."""
        trees = [tree for tree in self.trees if tree.num_nodes + 2 * tree.num_levels <= num_rows]
        return LookupCosts(trees, self.step_ms, self.base_ms, self.base_tokens, self.acceptance, self.set_up_ms)

    def fastest(
        self, reaches: Sequence[Sequence[float] | None], sibling_chance: float, read: bool = True
    ) -> LookupPick | None:
        """Choose the lookup tree with the most expected tokens a millisecond; None where there is none.

        Args:
            reaches: of each request that still decodes, for as many nodes as its proposal has; None without a proposal.
            sibling_chance: that a drawn child is accepted where the proposed one was not.
            read: whether trees that the draft reads along come into question.
        """
        rows = self._rows if read else self._unread
        if not rows:
            return None
        expected = [0.0] * len(rows)
        for reach in reaches:
            below = (0.0,) if reach is None else (0.0, *accumulate(reach))  # tokens, by length
            known = len(below) - 1
            for row, (_, length, siblings, _) in enumerate(rows):
                expected[row] += 1.0 + below[min(length, known)]
                if siblings:
                    through = reach[length - 1] if length <= known else 0.0  # type: ignore[index]
                    expected[row] += (1.0 - through) * sibling_chance
        speeds = [tokens * rate for tokens, (_, _, _, rate) in zip(expected, rows, strict=True)]
        speed = max(speeds)
        return LookupPick(rows[speeds.index(speed)][0], speed)

    @classmethod
    def alike(cls, base: Sequence[TokenTree], max_nodes: int, siblings: Sequence[int]) -> LookupCosts:
        """Without times: a step takes the same with every tree of up to so many nodes."""
        trees = lookup_trees(max_nodes, siblings)
        tokens = {tree: tree.expected_tokens(TYPICAL_ACCEPTANCE) for tree in base}
        alike = dict.fromkeys((*trees, *base), 1.0)
        return cls(trees, {tree: alike[tree] for tree in trees}, alike, tokens)

    @classmethod
    def measured(
        cls,
        costs: CostModel,
        context_len: float,
        plans: Sequence[PlanCandidate],
        siblings: Sequence[int],
        acceptance: Sequence[float] = TYPICAL_ACCEPTANCE,
        reads: bool | None = None,
        set_up_ms: float = 0.0,
    ) -> LookupCosts:
        """From a profile.

        Args:
            costs: of the pair, or of the target alone.
            context_len: committed tokens.
            plans: the trees of the draft that may be decoded with.
            siblings: as in `lookup_trees`; more than 0 where the draft reads paths along.
            acceptance: the draft's acceptance vector.
            reads: whether the draft reads what was accepted without it; None: where there may be siblings.
            set_up_ms: see the class.
        """
        reads = max(siblings) > 0 if reads is None else reads
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
            # A draft that reads along does so now, or reads what it missed later.
            if reads:
                step_ms[tree] += times.draft[min(tree.length + ROOT_ROWS, costs.max_draft_rows)]
            if tree.siblings:
                step_ms[tree] += times.sample(tree.length, tree.siblings)
        base_ms = {plan.token_tree: plan.step_ms for plan in plans}
        base_tokens = {plan.token_tree: plan.tokens_per_step for plan in plans}
        single = TokenTree.single()
        base_ms.setdefault(single, times.target[1] + times.verify[1] + times.host[1])
        base_tokens.setdefault(single, 1.0)
        # A call of some steps shall be able to make up for it, however short these are.
        return cls(trees, step_ms, base_ms, base_tokens, acceptance, min(set_up_ms, base_ms[single]))


class SetUp:
    """Whether proposals have promised enough to be taken.

    Args:
        set_up_ms: milliseconds that it takes to set trees with proposals up.
    """

    def __init__(self, set_up_ms: float) -> None:
        self.set_up_ms, self.promised_ms = set_up_ms, 0.0

    def pays(self, saved_ms: float) -> bool:
        """Tell whether to take a proposal that promises to save so many milliseconds."""
        if self.promised_ms < self.set_up_ms:
            self.promised_ms += saved_ms
        return self.promised_ms >= self.set_up_ms


class BaseEvidence:
    """What the draft's own trees have been worth, by how much of the text agreed with an earlier place.

    Where a text repeats it is easy for the draft, too: what lookup competes with there is more than the average.
    """

    def __init__(self, costs: LookupCosts) -> None:
        self.costs = costs
        self.tokens, self.steps = 0.0, 0.0
        # Tokens and steps, first without agreement; the same of steps that took proposals in.
        self._agreed, self._merged = ([[0.0, 0.0] for _ in range(len(BIN_STARTS) + 1)] for _ in range(2))
        self._values: dict[TokenTree, MergedValue] = {}

    def note(self, match: int, num_tokens: int) -> None:
        """Take in a step with one of the draft's trees, for a request of which so many tokens agreed; 0 for none."""
        self.tokens += num_tokens
        self.steps += 1
        _count(self._agreed[_bin_of(match)], num_tokens)

    def note_merged(self, match: int, num_tokens: int) -> None:
        """Take in a step that took the request's proposal into the draft's tree."""
        _count(self._merged[_bin_of(match)], num_tokens)

    def tokens_to_beat(self, tree: TokenTree, match: int) -> float:
        """Give the tokens that must be promised to a request in place of a step with the draft's tree.

        Args:
            tree: the draft's tree.
            match: how many tokens of the request's text agree.
        """
        if tree.num_nodes == 1:
            return 1.0
        usual = (self.costs.base_tokens[tree] * BASE_WEIGHT + self.tokens) / (BASE_WEIGHT + self.steps)
        tokens, steps = self._agreed[_bin_of(match)]
        own = (usual * AGREED_WEIGHT + tokens) / (AGREED_WEIGHT + steps)
        return own * (1.0 + (DOUBT / (1.0 + steps / AGREED_WEIGHT) if match else 0.0))

    def merged_tokens(self, tree: TokenTree, match: int, chances: Sequence[float]) -> float:
        """Give the tokens that are expected of the draft's tree with a proposal in it.

        Args:
            tree: the draft's tree.
            match: how many tokens of the request's text agree.
            chances: as in `MergedValue.expected_tokens`.
        """
        value = self._values.get(tree)
        if value is None:
            value = self._values[tree] = MergedValue(tree, self.costs.acceptance)
        tokens, steps = self._merged[_bin_of(match)]
        return (value.expected_tokens(chances) * MERGED_WEIGHT + tokens) / (MERGED_WEIGHT + steps)


def choice_of(costs: LookupCosts, num_requests: int, known_tokens: int) -> _host.LookupChoice:
    """Give what chooses the trees of a batch's steps, and learns from them: a `_host.LookupChoice`.

    Args:
        costs: what steps take.
        num_requests: of the batch.
        known_tokens: tokens from this one on are never proposed.
    """
    settings = {
        "num_requests": num_requests,
        "least_match": LEAST_MATCH,
        "most_match": MOST_MATCH,
        "longest_path": LONGEST_PATH,
        "known_tokens": known_tokens,
        "bin_of": _BIN_OF,
        "prior_chances": PRIOR_CHANCES,
        "prior_weight": PRIOR_WEIGHT,
        "base_weight": BASE_WEIGHT,
        "agreed_weight": AGREED_WEIGHT,
        "merged_weight": MERGED_WEIGHT,
        "doubt": DOUBT,
        "sibling_chance": TYPICAL_ACCEPTANCE[0],
        "set_up_ms": costs.set_up_ms,
    }
    return _host.LookupChoice(settings, costs.rows)


def _count(entry: list[float], num_tokens: int) -> None:
    entry[0] += num_tokens
    entry[1] += 1


def _bin_of(match: int) -> int:
    return 0 if match == 0 else 1 + _BIN_OF[match]
