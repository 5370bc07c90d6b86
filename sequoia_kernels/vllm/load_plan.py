"""Which tree a step decodes with, by how many requests are running: never slower than without trees under load.

A forward of the target over B requests of N nodes reads the weights once, whatever B and N, until its arithmetic takes
longer than that; from there on every row costs, and a tree's rows are mostly rejected. So the best tree shrinks with
the number of running requests, down to none. What is compared is tokens a second:

    sum over requests of E[tokens | tree, acceptance] / seconds(B, tree, context)

Seconds are those of a table of measurements: forwards by rows, attention by rows and context, the draft's levels by
rows, all timed once at start; and what a whole step took beyond them, learned from the steps themselves. Acceptance is
one number that the verified paths tell (`ShiftEstimate`), for greedy and for sampled requests.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels.planner.adaptive import ShiftEstimate, shift_acceptance
from sequoia_kernels.planner.evidence import AcceptanceEvidence, visits_by_rank
from sequoia_kernels.planner.value import tree_values
from sequoia_kernels.tree import TokenTree

__all__ = ["Curve", "LoadPlan", "StepCosts", "batch_bucket"]

Floats = NDArray[np.float64]

SHIFTS = np.linspace(-4.0, 4.0, 33)
HALF_LIFE = 48.0  # steps after which what was accepted counts half
FADING = 0.1  # of a step's fading where nothing is drafted
FORGETTING = 1 / 1024  # what is known of trees that are not taken fades by this fraction in a step
FIRST_STEPS = 3  # of which the shortest counts: the first ones find nothing prepared, and may be interrupted
LEARNING_RATE = 0.15  # of what steps take beyond the table
MARGIN = 0.02  # a choice takes over when it is predicted to be faster by this fraction
PATIENCE = 4  # steps that it is kept at least
PROBE_STEPS = 4  # steps without trees that tell what those take, the first time and again
PROBE_EVERY = 1024
LARGEST_STEP = 4.0  # a step that took so many times its prediction was interrupted by something else


def batch_bucket(num_requests: int) -> int:
    """Give the number of requests that stands for this one in what is learned: at most an eighth more.

    Example:
        >>> [batch_bucket(number) for number in (1, 8, 9, 17, 18, 33)]
        [1, 8, 9, 18, 18, 36]
    """
    step = max(1, 1 << max(0, num_requests.bit_length() - 4))
    return -(-num_requests // step) * step


class Curve:
    """Seconds over a size, between measured points on straight lines, beyond the last one along the last line.

    Example:
        >>> Curve({1: 2.0, 3: 4.0})([1, 2, 5]).tolist()
        [2.0, 3.0, 6.0]
    """

    def __init__(self, points: dict[int, float]) -> None:
        sizes = sorted(points)
        self.sizes = np.array(sizes, dtype=np.float64)
        # More work never takes less time: where it seems to, that was noise.
        self.seconds = np.maximum.accumulate(np.array([points[size] for size in sizes], dtype=np.float64))

    def __call__(self, sizes: Any) -> Floats:
        """Give the seconds of sizes. [...]"""
        sizes = np.asarray(sizes, dtype=np.float64)
        seconds = np.interp(sizes, self.sizes, self.seconds)
        if len(self.sizes) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
            seconds = seconds + np.maximum(sizes - self.sizes[-1], 0) * slope
        return seconds


@dataclass
class StepCosts:
    """Seconds of the parts of a step.

    Attributes:
        forward: of the target, but for its attention, by rows of all requests.
        attention: of all layers, by rows of all requests times committed tokens of each.
        draft_root: of the draft's first level and all that comes once a tree, by requests.
        draft_level: of each further level, by rows of all requests.
    """

    forward: Curve = field(default_factory=lambda: Curve({1: 0.0}))
    attention: Curve = field(default_factory=lambda: Curve({1: 0.0}))
    draft_root: Curve = field(default_factory=lambda: Curve({1: 0.0}))
    draft_level: Curve = field(default_factory=lambda: Curve({1: 0.0}))

    def without_attention(self, num_requests: int, num_nodes: Floats, level_widths: Floats) -> Floats:
        """Give the seconds of steps with each of several trees, but for what the context changes.

        Args:
            num_requests: requests.
            num_nodes: of the trees. [T]
            level_widths: nodes with children of each level behind the root, 0 where there is none. [T, levels]
        """
        levels = np.where(level_widths > 0, self.draft_level(num_requests * level_widths), 0.0).sum(1)
        return self.forward(num_requests * num_nodes) + self.draft_root(num_requests) + levels


class LoadPlan:
    """Chooses the tree of every step.

    Args:
        trees: the trees to choose from, besides none.
        rule: verification rule.
        costs: measured seconds; without any, all that is known is learned from steps.

    Attributes:
        trees: as given.
        costs: as given; not to be changed any more.
    """

    def __init__(self, trees: Sequence[TokenTree], rule: str, costs: StepCosts | None = None) -> None:
        self.trees = list(trees)
        self.costs = costs or StepCosts()
        prior = AcceptanceEvidence().vector
        vectors = np.stack([shift_acceptance(prior, float(shift)) for shift in SHIFTS])
        self._values = np.stack([tree_values(tree, vectors, rule) for tree in self.trees])  # [trees, shifts]
        self._num_nodes = np.array([tree.num_nodes for tree in self.trees], dtype=np.float64)
        most = max(tree.num_levels for tree in self.trees)
        self._num_rows = np.concatenate(([1.0], self._num_nodes))
        self._widths = np.zeros((len(self.trees), most))
        for row, tree in zip(self._widths, self.trees):
            widths = [len(tree.internal_nodes(level)) for level in range(1, tree.num_levels - 1)]
            row[: len(widths)] = widths
        self._visits = {tree: _visits_by_end(tree) for tree in self.trees}
        self._fixed: dict[int, Floats] = {}  # by requests: seconds of the table that no context changes. [1 + trees]
        self._estimates = {greedy: ShiftEstimate(prior, half_life=HALF_LIFE) for greedy in (True, False)}
        # seconds beyond the table, by bucket and choice; -1 is none
        self._beyond: defaultdict[int, dict[int, float]] = defaultdict(dict)
        self._num_seen: dict[tuple[int, int], int] = {}
        self._probed: set[int] = set()  # buckets
        self._current: dict[int, int] = {}  # the choice of a bucket
        self._since: dict[int, int] = {}  # steps since it was made
        self._probe: dict[int, int] = {}  # steps without trees that are left
        self._unprobed: dict[int, int] = {}  # steps with trees since

    @property
    def shifts(self) -> dict[bool, float]:
        """Estimated shifts of acceptance, of greedy and of sampled requests."""
        return {greedy: estimate.shift for greedy, estimate in self._estimates.items()}

    def choose(self, num_requests: int, num_greedy: int, context: float) -> TokenTree | None:
        """Choose the tree of the next step, None for no tree.

        Args:
            num_requests: requests that would get one.
            num_greedy: how many of them are greedy.
            context: committed tokens of each, on average.
        """
        bucket = batch_bucket(num_requests)
        if self._probe.get(bucket, 0) > 0:
            self._probe[bucket] -= 1
            return None
        current = self._current.get(bucket)
        self._since[bucket] = self._since.get(bucket, PATIENCE) + 1
        if current is None or self._since[bucket] > PATIENCE:
            speeds = self._speeds(num_requests, num_greedy, context)
            best = int(np.argmax(speeds)) - 1
            if current is None or speeds[best + 1] > (1 + MARGIN) * speeds[current + 1]:
                current = self._current[bucket] = best
                self._since[bucket] = 0
        if current < 0:
            self._forget(bucket)
            return None
        unprobed = self._unprobed[bucket] = self._unprobed.get(bucket, 0) + 1
        if unprobed >= (PROBE_EVERY if bucket in self._probed else 2 * PROBE_STEPS):
            self._unprobed[bucket], self._probe[bucket] = 0, PROBE_STEPS
            self._probed.add(bucket)
        return self.trees[current]

    def seconds(self, num_requests: int, context: float) -> Floats:
        """Give the predicted seconds of a step without trees and with each of them. [1 + trees]"""
        return self._table(num_requests, context) + self._beyond_of(batch_bucket(num_requests))

    def _table(self, num_requests: int, context: float) -> Floats:
        """Give the seconds that the table says. [1 + trees]"""
        fixed = self._fixed.get(num_requests)
        if fixed is None:
            plain = self.costs.forward([num_requests])
            of_trees = self.costs.without_attention(num_requests, self._num_nodes, self._widths)
            fixed = self._fixed[num_requests] = np.concatenate((plain, of_trees))
        return fixed + self.costs.attention(num_requests * context * self._num_rows)

    def observe_step(self, num_requests: int, context: float, tree: TokenTree | None, seconds: float) -> None:
        """Take in how long a step took, from its beginning to the next one's.

        Args:
            num_requests: requests of the step, all of which had the tree, or none.
            context: committed tokens of each, on average.
            tree: what the step decoded with.
            seconds: how long it took.
        """
        choice, bucket = -1 if tree is None else self.trees.index(tree), batch_bucket(num_requests)
        seen = self._num_seen.get((bucket, choice), 0)
        old = float(self._beyond_of(bucket)[choice + 1])
        predicted = float(self._table(num_requests, context)[choice + 1]) + old
        new = old + seconds - predicted
        if seen < FIRST_STEPS:
            self._beyond[bucket][choice] = min(new, old) if seen else new
        elif seconds < LARGEST_STEP * predicted:
            self._beyond[bucket][choice] = old + LEARNING_RATE * (new - old)
        self._num_seen[bucket, choice] = seen + 1

    def _forget(self, bucket: int) -> None:
        """Let what was seen of trees fade while none is grown, so that they are tried again some day."""
        for estimate in self._estimates.values():
            estimate.fade(FADING)
        learned = self._beyond.get(bucket, {})
        if -1 in learned:
            for choice, seconds in learned.items():
                learned[choice] = seconds + FORGETTING * (learned[-1] - seconds)  # of none it stays

    def observe_path(self, tree: TokenTree, paths: Sequence[tuple[Sequence[int], int]], greedy: bool) -> None:
        """Take in accepted paths of one step.

        Args:
            tree: the tree.
            paths: nodes, and how many of them were accepted, of each request.
            greedy: whether the requests are greedy.
        """
        tried, accepted = self._visits[tree]
        ends = [nodes[num_accepted - 1] for nodes, num_accepted in paths]
        self._estimates[greedy].observe(tried[ends].sum(0).tolist(), accepted[ends].sum(0).tolist())

    def report(self) -> dict[str, Any]:
        """Give what is known, as plain values: shifts of acceptance, and by number of requests what is chosen."""
        buckets = {}
        for bucket, choice in sorted(self._current.items()):
            seconds = self.seconds(bucket, 0.0)
            buckets[str(bucket)] = {
                "nodes": 1 if choice < 0 else self.trees[choice].num_nodes,
                "levels": 1 if choice < 0 else self.trees[choice].num_levels,
                "plain_ms": round(1e3 * float(seconds[0]), 3),
                "step_ms": round(1e3 * float(seconds[choice + 1]), 3),
            }
        return {"shift_greedy": self.shifts[True], "shift_sampled": self.shifts[False], "by_requests": buckets}

    def _speeds(self, num_requests: int, num_greedy: int, context: float) -> Floats:
        """Tokens a second without trees and with each of them. [1 + trees]"""
        tokens = np.full(1 + len(self.trees), float(num_requests))
        tokens[1:] = 0.0
        for greedy, count in ((True, num_greedy), (False, num_requests - num_greedy)):
            if count:
                shift = self._estimates[greedy].fit()
                place = (shift - SHIFTS[0]) / (SHIFTS[1] - SHIFTS[0])
                below = min(int(place), len(SHIFTS) - 2)
                values = self._values[:, below] + (place - below) * (
                    self._values[:, below + 1] - self._values[:, below]
                )
                tokens[1:] += count * values
        return tokens / np.maximum(self.seconds(num_requests, context), 1e-9)

    def _beyond_of(self, bucket: int) -> Floats:
        """Seconds beyond the table, of no tree and of each: as learned, or of what is nearest to it. [1 + trees]"""
        beyond = np.zeros(1 + len(self.trees))
        if not self._beyond:
            return beyond
        here = self._beyond[min(self._beyond, key=lambda other: abs(math.log(other / bucket)))]
        of_trees = {choice: seconds for choice, seconds in here.items() if choice >= 0}
        plain = here.get(-1)
        if of_trees and plain is not None and len(self.costs.forward.sizes) > 1:
            # What trees take beyond the table and a step without is their rows', so that of a smaller tree is less.
            a_node = fmean((seconds - plain) / self.trees[choice].num_nodes for choice, seconds in of_trees.items())
            beyond[1:] = plain + a_node * self._num_nodes
        else:
            beyond[1:] = fmean(of_trees.values() or here.values())
        beyond[0] = min(here.values()) if plain is None else plain
        for choice, seconds in here.items():
            beyond[choice + 1] = seconds
        return beyond


def _visits_by_end(tree: TokenTree) -> tuple[Floats, Floats]:
    """Count tries and acceptances of each rank on the path that ends at each node. Both [nodes, ranks]."""
    tried, accepted = np.zeros((2, tree.num_nodes, tree.max_branching))
    for node in range(tree.num_nodes):
        path = [node]
        while path[0] > 0:
            path.insert(0, tree.parents[path[0]])
        visits, takes = visits_by_rank(tree, path, len(path))
        tried[node, : len(visits)], accepted[node, : len(takes)] = visits, takes
    return tried, accepted
