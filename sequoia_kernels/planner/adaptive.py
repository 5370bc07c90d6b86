"""Plans that follow the text: a few trees, and an online estimate of acceptance that decides which one decodes next.

How often a draft is right depends on what is written: much in boilerplate, little in prose it never saw. The estimate
has one degree of freedom. Let h_k be the chance that child k is accepted once the children before it were rejected
(element k of the acceptance vector over what the elements before it leave). A shift d moves all of them together,
logit h_k(d) = logit h_k + d, so few steps tell it well, and ranks that the current tree does not try move along. It is
fitted to the accepted and rejected children of the recent steps, each step counting less the longer ago it was.

The trees are the planner's picks for a ladder of shifts, so each is the best one for some acceptance. A step's time
does not depend on acceptance: the fastest tree at the estimated shift is the one with the most expected tokens per
millisecond there, and it is taken over when it beats the current one by the margin (hysteresis).

`plan_from_evidence` makes such a plan of what a pair's calls have shown so far. There the ladder is as wide as the
shift is uncertain, and not to speculate is among the choices: for good, as the draft never sees those tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels import checks
from sequoia_kernels.planner.acceptance import validate_acceptance
from sequoia_kernels.planner.evidence import REQUEST_SPREAD, AcceptanceEvidence
from sequoia_kernels.planner.plan import PlanCandidate, TreePlan, plan_tree
from sequoia_kernels.planner.profile import HardwareProfile
from sequoia_kernels.planner.value import tree_values
from sequoia_kernels.tree import TokenTree, vector_of_chances

__all__ = ["AdaptivePlan", "ShiftEstimate", "TreeFollower", "plan_adaptive", "plan_from_evidence", "shift_acceptance"]

DEFAULT_SHIFTS = (-2.0, -1.0, 0.0, 1.0, 2.0)
EVIDENCE_SHIFTS = (-1.0, 0.0, 1.0)  # in standard deviations of the shift
EVIDENCE_MARGIN, EVIDENCE_PATIENCE = 0.04, 6
LARGEST_SHIFT = 4.0
_SHIFT = checks.Rule(f"lie within {-LARGEST_SHIFT:g}..{LARGEST_SHIFT:g}", lambda shift: abs(shift) <= LARGEST_SHIFT)
GRID = np.linspace(-LARGEST_SHIFT, LARGEST_SHIFT, 65)
NORMAL_PLACES = np.array([-1, 0, 1]) * math.sqrt(3)  # Gauss-Hermite: exact up to the fifth power
NORMAL_WEIGHTS = np.array([1, 4, 1]) / 6
NEWTON_STEPS = 4
LEAST_CHANCE = 1e-6


def shift_acceptance(acceptance: Any, shift: float) -> NDArray[np.float64]:
    """Move an acceptance vector: every conditional chance of acceptance h becomes sigmoid(logit h + shift).

    Args:
        acceptance: an `AcceptanceEstimate` or an acceptance vector.
        shift: in logits; 0 changes nothing, above 0 more is accepted.

    Returns:
        The moved vector. [ranks] float64.

    Example:
        >>> shift_acceptance([0.5, 0.25], 0.0).tolist()
        [0.5, 0.25]
    """
    chances = _chances(validate_acceptance(acceptance, "shift_acceptance"))
    return vector_of_chances(_shifted(chances, shift))


@dataclass(frozen=True, eq=False)
class AdaptivePlan:
    """A few trees to switch between while decoding; made by `plan_adaptive`, given to `generate` as its tree.

    Attributes:
        plans: the planner's picks for different acceptance, for lower acceptance first. All speculate, but the first
            one of `plan_from_evidence`; a follower that came to it stays there.
        start: index of the plan to begin with, the one for the acceptance as given.
        acceptance: that acceptance vector. [ranks] float64.
        half_life: steps after which what was seen counts half.
        margin: a tree takes over when it is predicted to be faster than the current one by this fraction.
        patience: steps that a tree decodes at least.
        spread: standard deviation of the shift before anything was seen, in logits.
    """

    plans: tuple[TreePlan, ...]
    start: int
    acceptance: NDArray[np.float64]
    half_life: float = 24.0
    margin: float = 0.08
    patience: int = 8
    spread: float = 1.0

    @property
    def trees(self) -> list[TokenTree]:
        """The trees, in the order of the plans."""
        return [plan.token_tree for plan in self.plans]

    @property
    def largest(self) -> TokenTree:
        """The tree with the most nodes."""
        return max(self.trees, key=lambda tree: tree.num_nodes)

    @property
    def rule(self) -> str:
        """The verification rule that all the trees are planned for."""
        return self.plans[0].rule

    def follow(self) -> TreeFollower:
        """Start to follow a generation."""
        return TreeFollower(self)

    def describe(self) -> str:
        """Give the plans as a table."""
        lines = ["  nodes  levels  step ms  first child accepted  tokens/step"]
        for index, plan in enumerate(self.plans):
            mark = ">" if index == self.start else " "
            lines.append(
                f"{mark} {plan.tree.num_nodes:5d}  {plan.tree.num_levels:6d}  {plan.step_ms:7.2f}"
                f"  {plan.acceptance[0]:20.2f}  {plan.tokens_per_step:11.2f}"
            )
        return "\n".join(lines)


class ShiftEstimate:
    """Estimates the shift of acceptance from accepted and rejected children; what came first fades.

    Args:
        acceptance: acceptance vector that the shift counts from. [ranks]
        half_life: observations after which one counts half.
        spread: standard deviation of the shift before anything was seen, in logits.

    Attributes:
        shift: the estimate, in logits.

    Example:
        >>> estimate = ShiftEstimate([0.5, 0.2])
        >>> estimate.observe([40], [36])
        >>> estimate.fit() > 0.5
        True
    """

    def __init__(self, acceptance: Any, *, half_life: float = 24.0, spread: float = 1.0) -> None:
        chances = _chances(validate_acceptance(acceptance, "ShiftEstimate"))
        self.shift = 0.0
        self._decay = 0.5 ** (1.0 / half_life)
        self._precision = spread**-2
        self._logits = np.log(chances) - np.log1p(-chances)
        self._tried = np.zeros_like(chances)
        self._accepted = np.zeros_like(chances)

    def fade(self, num_steps: float = 1) -> None:
        """Let what was seen fade without seeing anything."""
        self._tried *= self._decay**num_steps
        self._accepted *= self._decay**num_steps

    def observe(self, tried: Sequence[int], accepted: Sequence[int]) -> None:
        """Take in one step; see `TreeFollower.observe`."""
        self.fade()
        ranks = min(len(tried), self._tried.size)
        self._tried[:ranks] += tried[:ranks]
        self._accepted[:ranks] += accepted[:ranks]

    def fit(self) -> float:
        """Give the shift of the largest posterior under a normal prior; concave, so Newton's steps find it."""
        shift = self.shift
        for _ in range(NEWTON_STEPS):
            chances = 1 / (1 + np.exp(-(self._logits + shift)))
            gradient = float((self._accepted - self._tried * chances).sum()) - self._precision * shift
            curvature = float((self._tried * chances * (1 - chances)).sum()) + self._precision
            shift = min(max(shift + gradient / curvature, -LARGEST_SHIFT), LARGEST_SHIFT)
        self.shift = shift
        return shift


class TreeFollower:
    """Follows one generation: counts what is accepted and names the tree of the next step.

    Attributes:
        plan: the trees.
        num_switches: times that the tree has changed.
    """

    def __init__(self, plan: AdaptivePlan) -> None:
        self.plan = plan
        self.num_switches = 0
        self._index = plan.start
        self._since = 0
        self._estimate = ShiftEstimate(plan.acceptance, half_life=plan.half_life, spread=plan.spread)
        chances = _chances(plan.acceptance)
        vectors = np.stack([vector_of_chances(_shifted(chances, shift)) for shift in GRID])
        # tokens per millisecond of each tree at each shift. [trees, shifts]
        self._speeds = np.stack(
            [tree_values(entry.token_tree, vectors, entry.rule) / entry.step_ms for entry in plan.plans]
        )

    @property
    def shift(self) -> float:
        """Estimated shift of acceptance against the plan's own."""
        return self._estimate.shift

    @property
    def tree(self) -> TokenTree:
        """The tree to decode with now."""
        return self.plan.plans[self._index].token_tree

    def observe(self, tried: Sequence[int], accepted: Sequence[int]) -> None:
        """Take in one step.

        Args:
            tried: how many nodes tried their child k, by k: those that had one and rejected all children before it.
            accepted: how many of them accepted it.
        """
        self._estimate.observe(tried, accepted)
        self._since += 1
        if self._since < self.plan.patience or len(self.plan.plans) == 1 or self.tree.num_nodes == 1:
            return
        best, gain = self.fastest(self._estimate.fit())
        margin = self.plan.margin if self.plan.plans[best].tree.num_nodes > 1 else 0.0  # slower than plain: not at all
        if best != self._index and gain > 1 + margin:
            self._index, self._since = best, 0
            self.num_switches += 1

    def fastest(self, shift: float, spread: float = 0.0) -> tuple[int, float]:
        """Give the index of the fastest plan at a shift, and its speed over the current one's.

        With a spread, over requests whose shifts are normally distributed around it: by what they take together.
        """
        places, weights = shift + spread * NORMAL_PLACES, NORMAL_WEIGHTS
        speeds = [1 / float(weights @ (1 / np.interp(places, GRID, row))) for row in self._speeds]
        best = int(np.argmax(speeds))
        return best, speeds[best] / speeds[self._index]


def plan_adaptive(
    acceptance: Any,
    profile: HardwareProfile,
    *,
    shifts: Sequence[float] = DEFAULT_SHIFTS,
    half_life: float = 24.0,
    margin: float = 0.08,
    patience: int = 8,
    **settings: Any,
) -> AdaptivePlan:
    """Choose a few trees to switch between while acceptance drifts.

    Args:
        acceptance: an `AcceptanceEstimate`, or a plain acceptance vector: what is expected at the start.
        profile: the device's measured times.
        shifts: moves of the acceptance, in logits (see `shift_acceptance`), to plan a tree for each; 0 is always among
            them. On a GPU each tree's step is captured before decoding begins, so a long ladder has its price.
        half_life: steps after which what was seen counts half.
        margin: a tree takes over when it is predicted to be faster than the current one by this fraction.
        patience: steps that a tree decodes at least.
        settings: further arguments of `plan_tree`.

    Returns:
        The plan. Where not to speculate would be fastest it holds a chain of two instead: the draft must see every
        token to speculate again later, and its fate is what the estimate learns from.

    Raises:
        TypeError: as `plan_tree`.
        ValueError: an argument is out of range.
        ProfileError: as `plan_tree`.

    Example:
        >>> from sequoia_kernels import measure_profile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> target, draft = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
        >>> profile = measure_profile(target, draft, context_lens=[16], node_counts=[1, 2, 4], seconds=0.1)
        >>> plan_adaptive([0.6, 0.2], profile).follow().tree.num_nodes > 1
        True
    """
    where = "plan_adaptive"
    for name, value, least in (("half_life", half_life, 1), ("margin", margin, 0), ("patience", patience, 1)):
        checks.check_number(where, name, value, checks.number_from(least))
    for shift in shifts:
        checks.check_number(where, "shifts", shift, _SHIFT)
    base = plan_tree(acceptance, profile, **settings)
    vector = np.asarray(base.acceptance)
    if base.temperature is not None:
        settings = {**settings, "temperature": base.temperature}
    plans: list[TreePlan] = []
    start = 0
    for shift in sorted({0.0, *map(float, shifts)}):
        plan = _speculating(base if shift == 0 else plan_tree(shift_acceptance(vector, shift), profile, **settings))
        if plan is None:
            continue
        if not plans or plans[-1].tree != plan.tree:
            plans.append(plan)
        elif shift == 0:
            plans[-1] = plan
        if shift <= 0:
            start = len(plans) - 1
    if not plans:
        raise ValueError(f"{where}: max_budget and max_levels must allow a tree of two nodes, got {settings}")
    return AdaptivePlan(tuple(plans), start, vector, float(half_life), float(margin), int(patience))


def plan_from_evidence(
    evidence: AcceptanceEvidence, profile: HardwareProfile, *, explore: bool = True, **settings: Any
) -> AdaptivePlan:
    """Choose a few trees for what is known of a pair, to go on learning with.

    Args:
        evidence: what the pair's calls have shown; nothing at first.
        profile: the device's measured times.
        explore: where not to speculate seems fastest, but the evidence leaves room for doubt, begin with the cheapest
            tree all the same: nothing would ever be learnt otherwise. The follower stops soon if nothing comes of it.
        settings: further arguments of `plan_tree`.

    Returns:
        The plan. It holds one tree of a single node where speculation is as good as ruled out.

    Raises:
        As `plan_tree`.
    """
    vector = evidence.vector
    spread = float(np.hypot(evidence.spread, REQUEST_SPREAD))
    plans: list[TreePlan] = []
    for shift in EVIDENCE_SHIFTS:
        plan = plan_tree(shift_acceptance(vector, shift * spread), profile, **settings)
        if not plans:
            plans.append(_with(plan, plan.no_speculation))
        speculating = _speculating(plan)
        if speculating is not None and plans[-1].tree != speculating.tree:
            plans.append(speculating)
    found = AdaptivePlan(tuple(plans), 0, vector, math.inf, EVIDENCE_MARGIN, EVIDENCE_PATIENCE, spread)
    follower = found.follow()
    start, _ = follower.fastest(0.0, spread)
    if start == 0 and explore and follower.fastest(spread)[0] > 0:
        start = min(range(1, len(plans)), key=lambda index: plans[index].step_ms)
    return replace(found, start=start) if start > 0 else replace(found, plans=found.plans[:1])


def _speculating(plan: TreePlan) -> TreePlan | None:
    """The plan, or one with its fastest speculating candidate where it would rather not speculate; None without any."""
    if plan.tree.num_nodes > 1:
        return plan
    rival = next((candidate for candidate in plan.candidates if candidate.kind != "no speculation"), None)
    return None if rival is None else _with(plan, rival)


def _with(plan: TreePlan, candidate: PlanCandidate) -> TreePlan:
    """The plan with another candidate as its pick."""
    return replace(plan, **vars(candidate), tokens_per_step_interval=None, speedup_interval=None)


def _chances(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Conditional chances of a vector: element k over what the elements before it leave; inside (0, 1)."""
    left = 1.0 - np.concatenate(([0.0], np.cumsum(vector)[:-1]))
    chances = np.divide(vector, left, out=np.zeros_like(vector), where=left > 0)
    return np.clip(chances, LEAST_CHANCE, 1 - LEAST_CHANCE)


def _shifted(chances: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-(np.log(chances) - np.log1p(-chances) + shift)))
