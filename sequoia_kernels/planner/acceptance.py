"""The acceptance vector: estimated from ordinary runs, with intervals, saved and merged.

Element k of an acceptance vector is the probability that the child drawn at rank k (0 is the first) is the accepted
one. A run observes it censored: a node with two children says nothing about the third. Every visit of a node tries its
children in order, so rank k has a hazard h[k], the chance that child k is accepted given that children 0..k-1 were
rejected, and every count of it is usable whatever the tree was. The product-limit estimate puts the hazards together:

    h[k] = accepted[k] / visited[k]            a[k] = h[k] * (1 - h[0]) * ... * (1 - h[k-1])

Source: Kaplan and Meier (1958) for the estimate; the vector and its use are those of Sequoia (arXiv 2402.12374),
section 4.1, which measures it with a probe of many children instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels import checks
from sequoia_kernels.documents import MAX_COUNT, Document, Fields, Format, is_count, is_integer, is_number, is_text
from sequoia_kernels.planner.value import tree_values
from sequoia_kernels.tree import DEFAULT_RULE, MAX_NODES, TokenTree, check_acceptance, vector_of_chances

__all__ = ["AcceptanceEstimate", "estimate_acceptance", "validate_acceptance"]

NUM_DRAWS = 4096  # draws behind every interval: their own noise moves an end by about 2 % of the width
MIN_CELL_COUNT = 2.0  # expected acceptances and rejections of a (run, rank) cell that may speak on dispersion
MIN_DISPERSION_FREEDOM = 4  # degrees of freedom below which dispersion is not estimated
TAIL_RANKS = 6  # measured ranks that an extrapolated tail is fitted to
MAX_TAIL_RATIO = 0.95  # an extrapolated tail always falls

POSITIVE = checks.Rule("be >= 1", lambda value: value >= 1)
SHARE = checks.Rule("be in (0, 1)", lambda value: 0 < value < 1)

# What is kept with an estimate, if it was told: what it may be, in code and in words.
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: is_number(value) and value >= 0, "a finite number >= 0"),
    "top_k": (lambda value: is_count(value, 0), "an integer >= 0"),
    "top_p": (lambda value: is_number(value) and 0 < value <= 1, "a number in (0, 1]"),
    "target": (is_text, "a string"),
    "draft": (is_text, "a string"),
}


def validate_acceptance(vector: Any, where: str = "validate_acceptance") -> NDArray[np.float64]:
    """Check an acceptance vector and return it as a new float64 array.

    Args:
        vector: probabilities by rank, 0 first: a sequence, array, tensor or `AcceptanceEstimate`. [ranks]
        where: function named in the message.

    Returns:
        The vector. [ranks] float64.

    Raises:
        TypeError: it does not hold numbers.
        ValueError: it is not one-dimensional, is empty, holds a negative, NaN or infinite entry, or sums above 1.

    Example:
        >>> validate_acceptance([0.6, 0.2])
        array([0.6, 0.2])
    """
    if isinstance(vector, AcceptanceEstimate):
        vector = vector.vector
    if hasattr(vector, "detach"):  # a tensor, on whatever device it is
        vector = vector.detach().cpu().double().numpy()
    return check_acceptance(vector, where)


@dataclass(frozen=True)
class AcceptanceEstimate(Document):
    """An acceptance vector with the counts and intervals behind it.

    Attributes:
        vector: probability that the child at each rank is the accepted one; rank 0 first. Sums to at most 1.
        lower: lower end of each rank's interval.
        upper: upper end of each rank's interval.
        visited: nodes that had a child at this rank and had rejected those before it; shorter than `vector` by
            `num_extrapolated`.
        accepted: how many of them accepted it.
        confidence: probability that an interval is made for, e.g. 0.95.
        dispersion: variance of the counts between runs over that of independent trials, at least 1; intervals are
            wider by its square root. 1 when there were too few runs to tell.
        num_runs: runs merged.
        num_extrapolated: ranks at the end that were not measured but continued (see `estimate_acceptance`).
        temperature: sampling temperature of the runs, None when not told.
        top_k: top-k of the runs, None when off or not told.
        top_p: top-p of the runs, None when off or not told.
        target: name of the target model, for the reader.
        draft: name of the draft model, for the reader.

    Notes:
        Intervals treat a node's outcome as independent of its neighbours'; `dispersion` carries what is seen between
        runs (prompts differ) but not within one.
    """

    FORMAT = Format("sequoia-kernels/acceptance", 1)

    vector: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    visited: tuple[int, ...]
    accepted: tuple[int, ...]
    confidence: float = 0.95
    dispersion: float = 1.0
    num_runs: int = 1
    num_extrapolated: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    target: str | None = None
    draft: str | None = None

    def __len__(self) -> int:
        return len(self.vector)

    @property
    def visited_by_rank(self) -> tuple[int, ...]:
        """The counts under the name that a run's statistics use, so that estimates can be merged like runs."""
        return self.visited

    @property
    def accepted_by_rank(self) -> tuple[int, ...]:
        """The counts under the name that a run's statistics use, so that estimates can be merged like runs."""
        return self.accepted

    @property
    def hazards(self) -> tuple[float, ...]:
        """Chance of each measured rank's child given that those before it were rejected."""
        return tuple(accepted / visited for accepted, visited in zip(self.accepted, self.visited))

    def draw_vectors(self, num_draws: int = NUM_DRAWS, seed: int = 0) -> NDArray[np.float64]:
        """Draw acceptance vectors that the counts allow: a parametric bootstrap of the hazards.

        Each hazard is drawn from a beta distribution centred at its estimate with the spread of its counts. Rank 0
        takes Jeffreys' prior (a half added to both counts), which keeps a spread where every trial went one way. Later
        ranks take none: dozens of hardly visited ranks would otherwise add half an acceptance each and lift every
        tree's value.

        Args:
            num_draws: vectors to draw.
            seed: of the draws; the same seed gives the same vectors.

        Returns:
            The vectors. [num_draws, ranks] float64.
        """
        prior = np.zeros(len(self.visited))
        prior[0] = 0.5
        draws = _draw_vectors(self.visited, self.accepted, self.dispersion, prior, num_draws, seed)
        tail = np.asarray(self.vector[len(self.visited) :])
        if tail.size:
            # the tail keeps its shape, hangs on the last measured rank as drawn, and never takes more than is left
            last = self.vector[len(self.visited) - 1]
            scale = draws[:, -1:] / last if last > 0 else np.zeros((num_draws, 1))
            tails = scale * tail
            left = np.maximum(1 - draws.sum(axis=1, keepdims=True), 0)
            total = tails.sum(axis=1, keepdims=True)
            tails *= np.minimum(1, np.divide(left, total, out=np.ones_like(left), where=total > 0))
            draws = np.concatenate((draws, tails), axis=1)
        return draws

    def tokens_per_step(self, tree: TokenTree, rule: str = DEFAULT_RULE) -> float:
        """Give the tree's expected accepted tokens per step under a verification rule, bonus token included."""
        return float(tree_values(tree, np.asarray(self.vector)[None], rule)[0])

    def tokens_per_step_interval(self, tree: TokenTree, rule: str = DEFAULT_RULE) -> tuple[float, float]:
        """Give the interval of the tree's accepted tokens per step at the estimate's confidence.

        Args:
            tree: the tree.
            rule: verification rule, by its name.

        Returns:
            (lower, upper), quantiles of the tree's value over `draw_vectors`, widened to hold the estimate itself.

        Example:
            >>> estimate = estimate_acceptance(([100, 40], [60, 10]))
            >>> lower, upper = estimate.tokens_per_step_interval(TokenTree.chain(2))
            >>> lower < 1.6 < upper
            True
        """
        value = self.tokens_per_step(tree, rule)
        tail = (1 - self.confidence) / 2
        lower, upper = np.quantile(tree_values(tree, self.draw_vectors(), rule), [tail, 1 - tail])
        return min(float(lower), value), max(float(upper), value)

    def to_fields(self) -> dict[str, Any]:
        """Give the fields of the estimate's document. Loading derives vector and intervals from its counts again."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @classmethod
    def from_fields(cls, fields: Fields) -> AcceptanceEstimate:
        """Read an estimate from the fields of its document; ValueError names what is wrong with it."""
        counts = {
            name: fields.entries(name, partial(is_count, least=least), rule)
            for name, least, rule in (("visited", 1, "a list of positive counts"), ("accepted", 0, "a list of counts"))
        }
        if not counts["visited"]:
            raise fields.refuse("visited", "be a list of positive counts")
        visited, accepted = _check_counts(counts["visited"], counts["accepted"], fields.where)
        num_extrapolated = fields.count("num_extrapolated", 0)
        if num_extrapolated > MAX_NODES:
            raise fields.refuse("num_extrapolated", f"be at most {MAX_NODES}")
        confidence = float(fields.number("confidence", lambda value: 0 < value < 1, "a number in (0, 1)"))
        dispersion = float(fields.number("dispersion", lambda value: 1 <= value <= MAX_COUNT, "a number >= 1"))
        estimate = _build(
            visited, accepted, confidence, dispersion, fields.count("num_runs"), len(visited) + num_extrapolated,
            **{name: fields.get(name, accepts, rule, optional=True) for name, (accepts, rule) in SETTINGS.items()},
        )  # fmt: skip
        stored = list(map(float, fields.entries("vector", is_number, "a list of numbers")))
        if len(stored) != len(estimate.vector) or not np.allclose(stored, estimate.vector, rtol=1e-6, atol=1e-9):
            raise fields.refuse(
                "vector", "follow from visited and accepted",
                "one that does not; give plan_tree a plain vector if the counts are not known",
            )  # fmt: skip
        return estimate


def estimate_acceptance(
    runs: Any,
    confidence: float = 0.95,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    target: str | None = None,
    draft: str | None = None,
    extrapolate_to: int | None = None,
) -> AcceptanceEstimate:
    """Estimate the acceptance vector from the counts of ordinary runs, whatever trees they used.

    Ranks that no node visited are dropped, not guessed. A rank that was visited and never accepted has an estimate of 0
    and an upper end above 0.

    Args:
        runs: one object with `visited_by_rank` and `accepted_by_rank` (a run's statistics, or its output with `.stats`,
            or another estimate), or a dict with these keys, or an iterable of them, or one pair of count sequences
            (visited, accepted).
        confidence: of the intervals, in (0, 1).
        temperature: sampling temperature of the runs, kept with the estimate and read by `plan_tree`. Taken from the
            runs when they are estimates.
        top_k: top-k of the runs, kept with the estimate.
        top_p: top-p of the runs, kept with the estimate.
        target: name of the target model, kept with the estimate.
        draft: name of the draft model, kept with the estimate.
        extrapolate_to: continue the vector to this many ranks with a geometric tail fitted to the last measured ranks
            that were accepted at all. Off by default: such ranks were not observed. Their intervals reach from 0 to the
            upper end of the last measured rank.

    Returns:
        The estimate. Its intervals: a rank's hazard is drawn from its Jeffreys posterior, Beta(accepted + 1/2,
        rejected + 1/2), and the rank's interval is the quantiles of the product-limit formula over 4096 seeded draws,
        with the lower end 0 where nothing was accepted. With enough runs the counts are first divided by the dispersion
        seen between runs (Pearson's chi-square over its degrees of freedom, never below 1).

    Raises:
        TypeError: no counts can be read from `runs`, or counts are not integers.
        ValueError: counts are negative, contradict one another, or no node was visited at all; runs at different
            temperatures are mixed; `confidence` is outside (0, 1).

    Notes:
        Pure host arithmetic, deterministic.

    Source:
        Product-limit estimate: Kaplan and Meier (1958). Jeffreys intervals: Brown, Cai and DasGupta (2001).

    Example:
        >>> estimate = estimate_acceptance(([200, 80], [120, 20]))
        >>> [round(value, 3) for value in estimate.vector]
        [0.6, 0.1]
        >>> estimate.lower[0] < 0.6 < estimate.upper[0]
        True
    """
    where = "estimate_acceptance"
    confidence = checks.real_number(where, "confidence", confidence, SHARE)
    items = _split_runs(runs, where)
    counts = [_check_counts(*pair, where) for pair in map(_counts_of, items) if pair is not None]
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "target": target, "draft": draft}
    for name, value in settings.items():
        told = {getattr(item, name) for item in items if isinstance(item, AcceptanceEstimate)}
        if value is None and len(told) > 1:
            raise ValueError(
                f"{where}: runs must agree on {name}, got {sorted(told, key=repr)}; "
                f"estimate them apart, or give {name} for the mixture"
            )
        if value is None and told:
            settings[name] = told.pop()
        accepts, rule = SETTINGS[name]
        if settings[name] is not None and not accepts(settings[name]):
            raise ValueError(f"{where}: {name} must be {rule}, got {settings[name]!r}")
    num_ranks = max(len(visited) for visited, _ in counts)
    table = np.zeros((2, len(counts), num_ranks), dtype=np.int64)
    for run, pair in enumerate(counts):
        for side in range(2):
            table[side, run, : len(pair[side])] = pair[side]
    visited, accepted = (tuple(int(count) for count in side.sum(axis=0)) for side in table)
    num_visited_ranks = next((rank for rank, count in enumerate(visited) if count == 0), num_ranks)
    if num_visited_ranks == 0:
        raise ValueError(
            f"{where}: runs must have tried the first child at least once, got counts of 0; "
            "run with a draft model and a tree of more than one node"
        )
    visited, accepted = visited[:num_visited_ranks], accepted[:num_visited_ranks]
    if extrapolate_to is not None:
        checks.whole_number(where, "extrapolate_to", extrapolate_to, rule=POSITIVE)
    dispersion = max(
        _dispersion(table[0], table[1]),
        max((item.dispersion for item in items if isinstance(item, AcceptanceEstimate)), default=1.0),
    )
    num_runs = sum(item.num_runs if isinstance(item, AcceptanceEstimate) else 1 for item in items)
    total_ranks = max(len(visited), extrapolate_to or 0)
    return _build(visited, accepted, confidence, dispersion, num_runs, total_ranks, **settings)


def _build(
    visited: tuple[int, ...], accepted: tuple[int, ...], confidence: float, dispersion: float, num_runs: int,
    total_ranks: int, **settings: Any,
) -> AcceptanceEstimate:  # fmt: skip
    hazards = np.asarray(accepted) / np.asarray(visited)
    vector = vector_of_chances(hazards)
    draws = _draw_vectors(visited, accepted, dispersion, np.full(len(visited), 0.5), NUM_DRAWS, seed=0)
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(draws, [tail, 1 - tail], axis=0)
    lower = np.where(np.asarray(accepted) == 0, 0.0, np.minimum(lower, vector))
    upper = np.maximum(upper, vector)
    num_extrapolated = total_ranks - len(visited)
    if num_extrapolated:
        vector = np.concatenate((vector, _geometric_tail(vector, np.asarray(accepted), num_extrapolated)))
        lower = np.concatenate((lower, np.zeros(num_extrapolated)))
        upper = np.concatenate((upper, np.maximum(np.full(num_extrapolated, upper[-1]), vector[len(visited) :])))
    return AcceptanceEstimate(
        tuple(vector.tolist()), tuple(lower.tolist()), tuple(upper.tolist()), visited, accepted,
        confidence=confidence, dispersion=dispersion, num_runs=num_runs, num_extrapolated=num_extrapolated, **settings,
    )  # fmt: skip


def _draw_vectors(
    visited: Sequence[int], accepted: Sequence[int], dispersion: float, prior: NDArray[np.float64], num_draws: int,
    seed: int,
) -> NDArray[np.float64]:  # fmt: skip
    """Draw vectors from the hazards' posterior; the prior is pseudo-counts added to both sides of each rank."""
    ones = np.asarray(accepted, dtype=np.float64) / dispersion
    zeros = np.asarray(visited, dtype=np.float64) / dispersion - ones
    hazards = np.where(ones + zeros > 0, ones / (ones + zeros), 0.0)[None].repeat(num_draws, axis=0)
    spread = (ones + prior > 0) & (zeros + prior > 0)  # a rank without prior that went one way only stays there
    generator = np.random.Generator(np.random.PCG64(seed))
    size = num_draws, int(spread.sum())
    hazards[:, spread] = generator.beta((ones + prior)[spread], (zeros + prior)[spread], size=size)
    return vector_of_chances(hazards)


def _dispersion(visited: NDArray[np.int64], accepted: NDArray[np.int64]) -> float:
    """Pearson's chi-square between runs over its degrees of freedom, at least 1. Counts are [runs, ranks]."""
    total = visited.sum(axis=0)
    hazards = np.divide(accepted.sum(axis=0), total, out=np.zeros(total.shape), where=total > 0)
    expected = visited * hazards
    misses = visited - expected
    usable = (expected >= MIN_CELL_COUNT) & (misses >= MIN_CELL_COUNT)
    freedom = int(np.maximum(usable.sum(axis=0) - 1, 0).sum())
    usable &= usable.sum(axis=0) > 1
    if freedom < MIN_DISPERSION_FREEDOM:
        return 1.0
    variance = expected * (1 - hazards)
    chi_square = ((accepted - expected)[usable] ** 2 / variance[usable]).sum()
    return max(1.0, float(chi_square / freedom))


def _geometric_tail(vector: NDArray[np.float64], accepted: NDArray[np.int64], num_ranks: int) -> NDArray[np.float64]:
    """Continue a vector with a geometric tail, from a count-weighted log-linear fit to the last positive ranks."""
    ranks = np.flatnonzero(vector > 0)[-TAIL_RANKS:]
    if ranks.size < 2:
        return np.zeros(num_ranks)  # nothing to fit a fall to
    weights = np.sqrt(accepted[ranks])  # the variance of log a[k] is about 1 / accepted[k]
    slope, level = np.polyfit(ranks, np.log(vector[ranks]), 1, w=weights)
    ratio = min(float(np.exp(slope)), MAX_TAIL_RATIO)
    start = min(float(np.exp(level + slope * (len(vector) - 1))), float(vector[ranks].max()))
    tail = start * ratio ** np.arange(1, num_ranks + 1, dtype=np.float64)
    left = max(1 - float(vector.sum()), 0.0)
    return np.asarray(tail * min(1.0, left / float(tail.sum())), dtype=np.float64)


def _split_runs(runs: Any, where: str) -> list[Any]:
    if _counts_of(runs):
        return [runs]
    if isinstance(runs, (str, bytes)) or not isinstance(runs, Iterable):
        raise TypeError(
            f"{where}: runs must have visited_by_rank and accepted_by_rank, or be an iterable of such runs or a pair "
            f"of count sequences, got {type(runs).__name__}"
        )
    items = list(runs)
    if not items:
        raise ValueError(f"{where}: runs must hold at least one run, got none")
    if all(map(_counts_of, items)):
        return items
    if len(items) == 2 and not any(map(_counts_of, items)):
        return [{"visited_by_rank": items[0], "accepted_by_rank": items[1]}]
    bad = next(item for item in items if not _counts_of(item))
    raise TypeError(f"{where}: runs must have visited_by_rank and accepted_by_rank, got {type(bad).__name__}")


def _counts_of(item: Any) -> tuple[Any, Any] | None:
    """The counts that a run's statistics hold, or its output, an estimate or a dict; None where there are none."""
    item = getattr(item, "stats", item)
    read = item.get if isinstance(item, Mapping) else partial(getattr, item)
    visited, accepted = read("visited_by_rank", None), read("accepted_by_rank", None)
    return None if visited is None or accepted is None else (visited, accepted)


def _check_counts(visited: Any, accepted: Any, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    checked: list[tuple[int, ...]] = []
    for name, counts in (("visited", visited), ("accepted", accepted)):
        if hasattr(counts, "tolist"):  # an array or tensor
            counts = counts.tolist()
        if not isinstance(counts, Sequence) or isinstance(counts, (str, bytes)):
            raise TypeError(f"{where}: {name} must be a sequence of counts, got {type(counts).__name__}")
        for rank, count in enumerate(counts):
            if not is_integer(count):
                raise TypeError(f"{where}: {name} must hold integers, got {count!r} at rank {rank}")
            if not 0 <= count <= MAX_COUNT:
                raise ValueError(f"{where}: {name} must hold counts >= 0 and <= 2**53, got {count} at rank {rank}")
        checked.append(tuple(int(count) for count in counts))
    if len(checked[0]) != len(checked[1]):
        actual = f"{len(checked[0])} and {len(checked[1])}"
        checks.fail_range(where, "visited and accepted", "have one count a rank each", actual)
    rejected = math.inf
    for rank, (tried, taken) in enumerate(zip(*checked)):
        if taken > tried:
            raise ValueError(f"{where}: accepted must be at most visited, got {taken} of {tried} at rank {rank}")
        if tried > rejected:
            actual = f"{tried} at rank {rank} after {rejected} rejections at rank {rank - 1}"
            checks.fail_range(where, "visited", "count nodes that rejected every child before this one", actual)
        rejected = tried - taken
    return checked[0], checked[1]
