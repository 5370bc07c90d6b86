"""plan_tree: the tree that gives the most tokens per second on the measured device, and what it was compared with.

Tokens per second = F(T) / step time. F(T) is the tree's expected accepted tokens per step (Sequoia, arXiv 2402.12374,
section 3.1), the step time is composed from the profile (see `cost_model`). Recorded steps have a search of their own
(`recorded_search`), which weighs shaped trees too. With a vector the candidates are the optimal tree of
every (budget, levels) cell, the fastest of them refined for the draft's widths (see `local_search`), the chain of every
length, and no speculation at all.

Search: the value of a cell is known from the table of optimal values, and its step takes at least as long as one whose
draft levels are all one node wide. That bounds its speed from above. Cells are costed in the order of their bounds
until no bound reaches the best speed found, less the tolerance; the result is that of costing every cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels import checks
from sequoia_kernels.documents import Document, Fields, Format, is_number, is_text
from sequoia_kernels.errors import ProfileError
from sequoia_kernels.planner.acceptance import POSITIVE, AcceptanceEstimate, validate_acceptance
from sequoia_kernels.planner.candidates import PlanCandidate, milestones, size_of, speed_of
from sequoia_kernels.planner.cost_model import STAGES, CostModel, StepShape, StepTimes
from sequoia_kernels.planner.local_search import refine_tree
from sequoia_kernels.planner.profile import HardwareProfile
from sequoia_kernels.planner.recorded_search import RecordedSearch
from sequoia_kernels.planner.search import OptimalTrees
from sequoia_kernels.planner.step_records import StepRecords
from sequoia_kernels.tree import (
    DEFAULT_RULE,
    MAX_STEP_ROWS,
    TokenTree,
    VerificationRule,
    check_acceptance,
    rule_named,
    usual_rule,
)

__all__ = ["TreePlan", "plan_tree"]

DEFAULT_MAX_LEVELS = 32
_TOLERANCE = checks.Rule("be in [0, 1)", lambda value: 0 <= value < 1)
VALUE_ROUNDING = 1e-12  # two values nearer than this are the same


@dataclass(frozen=True)
class TreePlan(PlanCandidate, Document):
    """The tree to decode with, its predicted speed, and the runners-up.

    Attributes:
        tree: the pick. A single node means: do not speculate. It and its predicted speed are those of a candidate.
        tokens_per_step_interval: its interval from the acceptance's uncertainty; None for a plain vector.
        speedup_interval: its interval from the acceptance's uncertainty alone; None for a plain vector.
        candidates: what the pick was compared with, the pick included, fastest first: the best tree at each of a few
            budgets, the best chain, no speculation.
        context_len: committed tokens that the times are for.
        batch_size: requests decoded together.
        temperature: sampling temperature that the times are for, None when not told.
        confidence: of the intervals; None for a plain vector.
        tolerance: a smaller tree was preferred within this fraction of the best speed.
        acceptance: the acceptance vector.
        target: key of the target in the profile.
        draft: key of the draft in the profile.
        device: the profile's device, in words.
        notes: what the prediction rests on beyond measurement, e.g. extrapolated times.
        rule: verification rule that the values are for, by its name.
    """

    FORMAT = Format("sequoia-kernels/tree-plan", 1)

    tokens_per_step_interval: tuple[float, float] | None
    speedup_interval: tuple[float, float] | None
    candidates: tuple[PlanCandidate, ...]
    context_len: float
    batch_size: int
    temperature: float | None
    confidence: float | None
    tolerance: float
    acceptance: tuple[float, ...]
    target: str
    draft: str | None
    device: str
    notes: tuple[str, ...] = ()
    rule: str = DEFAULT_RULE

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second of the whole batch."""
        return 1e3 * self.batch_size / self.ms_per_token

    @property
    def no_speculation(self) -> PlanCandidate:
        """The candidate that everything is compared with."""
        return next(candidate for candidate in self.candidates if candidate.kind == "no speculation")

    @property
    def best_chain(self) -> PlanCandidate | None:
        """The fastest chain of at least two nodes, None where the budget or the levels allow none."""
        return next((candidate for candidate in self.candidates if candidate.kind == "chain"), None)

    def describe(self) -> str:
        """Give the plan as text: the verdict, the pick by stage, and the table of candidates."""
        lines = [_verdict(self), ""]
        interval = _interval_text(self.tokens_per_step_interval, self.confidence, "")
        lines.append(f"tokens per step  {self.tokens_per_step:.2f}{interval}")
        shown = [f"{name} {self.stages[name]:.2f}" for name in STAGES if self.stages[name] > 0]
        lines.append(f"step             {self.step_ms:.2f} ms ({', '.join(shown)})")
        interval = _interval_text(self.speedup_interval, self.confidence, "x")
        lines.append(f"speedup          {self.speedup:.2f}x{interval}")
        lines += ["", "  candidate        nodes  levels  tokens/step  step ms  ms/token  speedup"]
        for candidate in self.candidates:
            mark = ">" if candidate.tree == self.tree else " "
            lines.append(
                f"{mark} {candidate.kind:<15}  {candidate.tree.num_nodes:5d}  {candidate.tree.num_levels:6d}"
                f"  {candidate.tokens_per_step:11.2f}  {candidate.step_ms:7.2f}  {candidate.ms_per_token:8.3f}"
                f"  {candidate.speedup:6.2f}x"
            )
        lines += ["", f"for {self.context_len:g} tokens of context, batch {self.batch_size}, on {self.device}"]
        if self.rule != DEFAULT_RULE:
            lines.append(f"verified by the rule {self.rule}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_fields(self) -> dict[str, Any]:
        """Give the fields of the plan's document."""
        own = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "tree"}
        own["candidates"] = [candidate.to_fields() for candidate in self.candidates]
        return {**super().to_fields(), "tokens_per_second": self.tokens_per_second, **own}

    @classmethod
    def from_fields(cls, fields: Fields) -> TreePlan:
        """Read a plan from the fields of its document; ValueError names what is wrong with it."""
        acceptance = tuple(map(float, fields.entries("acceptance", is_number, "a list of probabilities")))
        check_acceptance(acceptance, fields.where)
        candidates = tuple(map(PlanCandidate.read, fields.objects("candidates")))
        if not any(candidate.kind == "no speculation" for candidate in candidates):
            raise fields.refuse("candidates", "hold no speculation, the tree of one node")
        return cls(
            **vars(PlanCandidate.read(fields)),
            tokens_per_step_interval=_read_interval(fields, "tokens_per_step_interval"),
            speedup_interval=_read_interval(fields, "speedup_interval"),
            candidates=candidates,
            context_len=fields.number("context_len", lambda value: value >= 0, "a finite number >= 0"),
            batch_size=fields.count("batch_size"),
            temperature=fields.number("temperature", lambda value: value >= 0, "a finite number >= 0", optional=True),
            confidence=fields.number("confidence", lambda value: 0 < value < 1, "a number in (0, 1)", optional=True),
            tolerance=fields.number("tolerance", lambda value: 0 <= value < 1, "a number in [0, 1)"),
            acceptance=acceptance,
            target=fields.text("target"),
            draft=fields.text("draft", optional=True),
            device=fields.text("device"),
            notes=tuple(fields.entries("notes", is_text, "a list of strings")),
            rule=fields.text("rule", optional=True) or DEFAULT_RULE,  # plans had none before there were several
        )


def plan_tree(
    acceptance: Any,
    profile: HardwareProfile,
    *,
    context_len: float | None = None,
    max_budget: int | None = None,
    max_levels: int | None = None,
    batch_size: int = 1,
    target: Any = None,
    draft: Any = None,
    temperature: float | None = None,
    host_ms: float | None = None,
    tolerance: float = 0.01,
    dtype: Any = None,
    rule: str | None = None,
    shaped: bool | None = None,
) -> TreePlan:
    """Choose the tree that gives the most tokens per second on the profile's device.

    Args:
        acceptance: `StepRecords`, whose trees are valued in recorded steps; an `AcceptanceEstimate`; or a plain
            acceptance vector (then without intervals).
        profile: the device's measured times; see `measure_profile`. Call its `check_device` for this machine.
        context_len: committed tokens to plan for; the middle of the measured contexts when None. Times are interpolated
            between measured contexts; a note says so where they had to be extrapolated.
        max_budget: largest number of nodes; the largest measured target forward when None (at most 1024).
        max_levels: largest number of levels; 32 when None. Never more than the draft can grow, where the profile says
            so (a block draft's).
        batch_size: requests decoded together; forwards must have been measured at it, or at a smaller and a larger one
            that differ by at most a factor of four, or are composed for it.
        target: target model: the key of a measured one, a fingerprint or a model; or a transformers configuration, or
            the path of a folder or file that has one. The forwards of a model that was not measured are composed of the
            profile's microbenchmarks. The profile's own target when None.
        draft: draft model, likewise.
        temperature: sampling temperature, which decides whether greedy or sampled times of the ops are used; the
            estimate's own when None.
        host_ms: overhead of a step outside forwards and ops, instead of the profile's.
        tolerance: take the tree with the fewest nodes among those within this fraction of the best speed. Measured
            times are not more exact than that, and a smaller tree suffers less from a wrong acceptance vector.
        dtype: dtype of models given by a configuration; the configuration's own when None.
        rule: verification rule to decode with, by its name (see `tree.rules`): candidates are valued by its
            `expected_tokens`, or in the records. None takes the usual one of the device with records, and "sequoia",
            whose acceptance a vector tells, without. A rule whose values do not add up over nodes chooses from
            Sequoia's optimal trees at a few budgets.
        shaped: weigh shaped trees too, which take records to plan: the pick is one where it is faster than the best
            token tree by more than the difference between requests makes. None weighs them on a CPU; elsewhere what
            giving out the children takes has not been timed.

    Returns:
        The plan. No speculation is always among its candidates, and is the pick where nothing beats it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or `max_budget` exceeds what was measured.
        ProfileError: the profile lacks a model, a batch size or an op; the message says how to measure it.

    Notes:
        Pure host arithmetic, deterministic; well under a second for 256 nodes x 24 levels.

    Source:
        Sequoia (arXiv 2402.12374), section 3.3, which optimises tokens per second over (budget, levels) with typed-in
        times. Here all times are measured, level by level, and chains and no speculation are candidates.

    Example:
        >>> from sequoia_kernels import measure_profile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> target, draft = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
        >>> profile = measure_profile(target, draft, context_lens=[16], node_counts=[1, 2, 4], seconds=0.1)
        >>> plan_tree([0.6, 0.2], profile).kind  # a draft as slow as its target
        'no speculation'
    """
    where = "plan_tree"
    records = acceptance if isinstance(acceptance, StepRecords) else None
    given = acceptance if records is None else records.acceptance
    vector = validate_acceptance(given, where)
    estimate = given if isinstance(given, AcceptanceEstimate) else None
    if not isinstance(profile, HardwareProfile):
        raise TypeError(f"{where}: profile must be a HardwareProfile, got {type(profile).__name__}")
    batch_size = checks.whole_number(where, "batch_size", batch_size, rule=POSITIVE)
    if temperature is None and estimate is not None:
        temperature = estimate.temperature
    if temperature is not None:
        checks.check_number(where, "temperature", temperature, checks.NOT_NEGATIVE)
    checks.check_number(where, "tolerance", tolerance, _TOLERANCE)
    if shaped is None:
        shaped = profile.device.type == "cpu"
    if not isinstance(shaped, bool):
        raise TypeError(f"{where}: shaped must be a bool or None, got {type(shaped).__name__}")
    if rule is None:
        rule = DEFAULT_RULE if records is None else usual_rule(profile.device.type, temperature != 0)
    verification = rule_named(where, rule)
    model = CostModel(
        profile, batch_size=batch_size, target=target, draft=draft, temperature=temperature, host_ms=host_ms,
        dtype=dtype, rule=rule,
    )  # fmt: skip
    if model.draft is None:
        raise ProfileError(
            f"{where}: the profile must have a draft model, got none; measure it with measure_profile(target, draft) "
            "or `sequoia-kernels profile`"
        )
    if context_len is None:
        context_len = (model.context_lens[0] + model.context_lens[-1]) / 2
    checks.check_number(where, "context_len", context_len, checks.NOT_NEGATIVE)
    largest = min(model.max_nodes, MAX_STEP_ROWS)
    max_budget = largest if max_budget is None else checks.whole_number(where, "max_budget", max_budget, rule=POSITIVE)
    if max_budget > largest:
        raise ValueError(
            f"{where}: max_budget must be at most the {largest} nodes that were measured, got {max_budget}; "
            "measure a profile with larger node_counts"
        )
    max_levels = DEFAULT_MAX_LEVELS if max_levels is None else max_levels
    max_levels = min(checks.whole_number(where, "max_levels", max_levels, rule=POSITIVE), max_budget)
    growable = profile.draft_levels.get(model.draft.key, max_levels)
    is_cut = growable < max_levels
    max_levels = min(max_levels, growable)

    times = model.at_context(context_len)
    search: _Search | RecordedSearch
    if records is None:
        search = _Search(vector, times, max_budget, max_levels, tolerance, verification)
    else:
        search = RecordedSearch(records, times, max_budget, max_levels, tolerance, rule, shaped)
    pick, candidates = search.choose()
    interval = None
    if isinstance(search, RecordedSearch):
        interval = search.interval(pick)
    elif estimate is not None:
        interval = estimate.tokens_per_step_interval(pick.token_tree, rule)
    factor = pick.speedup / pick.tokens_per_step  # speedup for each token per step, at this step time
    return TreePlan(
        **vars(pick), tokens_per_step_interval=interval,
        speedup_interval=None if interval is None else (factor * interval[0], factor * interval[1]),
        candidates=tuple(candidates), context_len=context_len, batch_size=batch_size, temperature=temperature,
        confidence=None if estimate is None else estimate.confidence, tolerance=tolerance,
        acceptance=tuple(vector.tolist()), target=model.target.key, draft=model.draft.key, device=str(profile.device),
        notes=tuple(_notes(model, context_len, pick, estimate, growable if is_cut else None)), rule=rule,
    )  # fmt: skip


class _Search:
    """Costs optimal trees, as few as it can.

    Attributes:
        values: tokens per step of each cell's tree under the rule. [budget, levels]
        bounds: no tree of a cell gives more tokens per millisecond; 0 where a cell is passed over. [budget, levels]
    """

    def __init__(
        self, vector: NDArray[np.float64], times: StepTimes, max_budget: int, max_levels: int, tolerance: float,
        rule: VerificationRule,
    ) -> None:  # fmt: skip
        self.vector: list[float] = vector.tolist()
        self.times, self.max_budget, self.max_levels = times, max_budget, max_levels
        self.tolerance, self.rule = tolerance, rule
        self.trees = OptimalTrees(self.vector, max_budget, max_levels)
        self.single_ms = times.step_ms(StepShape(1, (), ()))
        values = self.trees.values
        # A cell counts where both its last node and its last level gain something: elsewhere a smaller cell has the
        # same tree. So the tree of a cell that counts has exactly its nodes and levels.
        counts = np.zeros(values.shape, dtype=bool)
        gain = VALUE_ROUNDING * values[1:, 1:]
        counts[1:, 1:] = (values[1:, 1:] - values[:-1, 1:] > gain) & (values[1:, 1:] - values[1:, :-1] > gain)
        counts[:, :2] = False  # a single node is no tree
        if not rule.adds_up:  # such a rule says only what a tree is worth that it is shown
            shown = np.zeros(max_budget + 1, dtype=bool)
            shown[[*milestones(max_budget), *(3 * budget // 2 for budget in milestones(2 * max_budget // 3))]] = True
            counts &= shown[:, None]
            values = np.zeros(values.shape)
            for budget, levels in np.argwhere(counts).tolist():
                values[budget, levels] = rule.expected_tokens(self.trees.tree(budget, levels), self.vector)
        self.values = values
        self.bounds = np.where(counts, values / self._least_ms(), 0.0)

    def choose(self) -> tuple[PlanCandidate, list[PlanCandidate]]:
        """Give the pick, and what it is shown with, the pick included, fastest first."""
        single = self.candidate(TokenTree.single())
        chains = [self.candidate(TokenTree.chain(length)) for length in range(2, self.max_levels + 1)]
        others = [single, *chains]
        fastest, near = self.fastest_tree(max(map(speed_of, others)))
        trees = chains if fastest is None else [*chains, fastest]
        if trees and self.rule.adds_up:  # whose values the moves add up
            start, vector = max(trees, key=speed_of).token_tree, np.asarray(self.vector)
            refined = refine_tree(start, vector, self.times, self.max_budget, self.max_levels)
            others.append(self.candidate(refined))
        least = (1 - self.tolerance) * max(map(speed_of, others if fastest is None else [*others, fastest]))
        pick = min((other for other in others if speed_of(other) >= least), key=size_of, default=None) or fastest
        assert pick is not None
        for budget, levels in sorted(near):
            if budget > pick.tree.num_nodes:
                break
            candidate = self.cell(budget, levels, least)
            if candidate is not None and size_of(candidate) < size_of(pick):
                pick = candidate
        shown = {single.tree: single, pick.tree: pick}
        if chains:
            chain = max(chains, key=speed_of)
            shown[chain.tree] = chain
        for budget in milestones(self.max_budget):
            tree = self.best_tree(budget)
            if tree is not None:
                shown.setdefault(tree.tree, tree)
        return pick, sorted(shown.values(), key=speed_of, reverse=True)

    def candidate(self, tree: TokenTree) -> PlanCandidate:
        """Cost a tree."""
        stages = self.times.stages(StepShape.of(tree))
        tokens = self.rule.expected_tokens(tree, self.vector)
        return PlanCandidate(tree, tokens, stages, tokens * self.single_ms / sum(stages.values()))

    def fastest_tree(self, reference: float) -> tuple[PlanCandidate | None, list[tuple[int, int]]]:
        """Find the fastest optimal tree, None where none exceeds a reference speed in tokens per millisecond.

        All cells that may be within the tolerance of the fastest or the reference come with it.
        """
        best, fastest = reference, None
        near: list[tuple[float, int, int]] = []
        cells = np.argwhere(self.bounds >= (1 - self.tolerance) * best)
        order = np.argsort(-self.bounds[tuple(cells.T)], kind="stable")
        for budget, levels in cells[order].tolist():
            if self.bounds[budget, levels] < (1 - self.tolerance) * best:
                break
            bound = self._narrow_bound(budget, levels)
            if bound > best:
                candidate = self.candidate(self.trees.tree(budget, levels))
                if speed_of(candidate) > best:
                    best, fastest = speed_of(candidate), candidate
            near.append((bound, budget, levels))
        return fastest, [(budget, levels) for bound, budget, levels in near if bound >= (1 - self.tolerance) * best]

    def best_tree(self, budget: int) -> PlanCandidate | None:
        """Give the fastest optimal tree of one budget, None where no tree uses it up."""
        best: PlanCandidate | None = None
        for levels in np.argsort(-self.bounds[budget], kind="stable").tolist():
            least = 0.0 if best is None else speed_of(best)
            if self.bounds[budget, levels] <= least:
                break
            best = self.cell(budget, levels, least) or best
        return best

    def cell(self, budget: int, levels: int, least: float) -> PlanCandidate | None:
        """Cost a cell's tree, None where it is slower than `least` tokens per millisecond."""
        if self._narrow_bound(budget, levels) < least:
            return None
        candidate = self.candidate(self.trees.tree(budget, levels))
        return candidate if speed_of(candidate) >= least else None

    def _narrow_bound(self, budget: int, levels: int) -> float:
        """A bound on a cell's tokens per millisecond, exact but for the number of samples that its levels draw."""
        widths = self.trees.widths(budget, levels)
        internal = tuple(widths.internal[:-1])
        # the largest number of children on a level takes the whole tree to know; it is at least their mean
        fewest = tuple(-(-nodes // width) for nodes, width in zip(widths.nodes[1:], internal, strict=True))
        return float(self.values[budget, levels]) / self.times.step_ms(StepShape(budget, internal, fewest))

    def _least_ms(self) -> NDArray[np.float64]:
        """The least a step of a cell's tree can take: every level of the draft is one node wide. [budget, levels]."""
        times = self.times
        levels = np.arange(self.max_levels + 1)
        by_node = np.add(times.target, times.verify)[: self.max_budget + 1]
        by_level = (
            times.draft_root
            + np.maximum(levels - 2, 0) * times.draft[1]
            + np.maximum(levels - 1, 0) * times.sample(1, 1)
            + np.asarray(times.compact)[levels]
            + np.asarray(times.host)[levels]
        )
        return by_node[:, None] + by_level


def _notes(
    model: CostModel, context_len: float, pick: PlanCandidate, estimate: AcceptanceEstimate | None,
    draft_levels: int | None,
) -> Iterator[str]:  # fmt: skip
    contexts = model.context_lens
    if not contexts[0] <= context_len <= contexts[-1]:
        yield f"context {context_len:g} lies outside the measured {contexts[0]}..{contexts[-1]}: times are extrapolated"
    for role in model.composed:
        yield f"forwards of the {role} are composed of microbenchmarks, not measured"
    for role in model.interpolated:
        yield f"forwards of the {role} are interpolated between measured batch sizes"
    if model.transfer_ms > 0:
        yield f"the target streams its weights: no forward takes less than {model.transfer_ms:.1f} ms"
    widest, measured = max(StepShape.of(pick.tree).widths, default=0), model.max_draft_rows
    if widest > measured:
        yield f"a draft level feeds {widest} nodes, {measured} were measured at most: its time is extrapolated"
    if pick.tree.num_nodes == min(model.max_nodes, MAX_STEP_ROWS):
        yield f"the pick has the largest measured budget, {pick.tree.num_nodes} nodes: a larger one may be faster still"
    if draft_levels is not None:
        yield f"the draft can grow no tree of more than {draft_levels} levels: deeper ones are no candidates"
    if estimate is not None and pick.tree.max_branching > len(estimate.visited):
        yield f"ranks from {len(estimate.visited)} on are extrapolated, not measured"


def _verdict(plan: TreePlan) -> str:
    if plan.kind == "no speculation":
        rivals = [candidate for candidate in plan.candidates if candidate.kind != "no speculation"]
        best = f": the best tree gives {rivals[0].speedup:.2f}x" if rivals else ""
        return f"Do not speculate{best}."
    nodes = f"{plan.tree.num_nodes} nodes on {plan.tree.num_levels} levels"
    gain = f"{plan.ms_per_token:.2f} ms per token, {plan.speedup:.2f}x"
    if plan.kind == "shaped tree":
        fixed = max(entry.speedup for entry in plan.candidates if entry.kind != "shaped tree")
        return f"Speculate with a shaped tree of {nodes}: {gain} (best fixed tree: {fixed:.2f}x)."
    if plan.kind == "chain":
        margin = f" by more than {100 * plan.tolerance:g}%" if plan.tolerance else ""
        return f"Speculate with a chain of {plan.tree.num_nodes} nodes: {gain}. No tree is faster{margin}."
    chain = plan.best_chain
    against = "" if chain is None else f" (best chain: {chain.speedup:.2f}x)"
    return f"Speculate with a tree of {nodes}: {gain}{against}."


def _interval_text(interval: tuple[float, float] | None, confidence: float | None, unit: str) -> str:
    if interval is None or confidence is None:
        return ""
    return f"  ({confidence:.0%} interval {interval[0]:.2f}{unit} to {interval[1]:.2f}{unit})"


def _read_interval(document: Fields, name: str) -> tuple[float, float] | None:
    ends = document.entries(name, lambda value: is_number(value) and value >= 0, "two numbers >= 0", optional=True)
    if ends is None:
        return None
    if len(ends) != 2 or ends[0] > ends[1]:
        raise document.refuse(name, "be two numbers, the lower one first", str(ends)[:60])
    return float(ends[0]), float(ends[1])
