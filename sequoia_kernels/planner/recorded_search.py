"""The search of `plan_tree` over recorded steps, where a tree has the value that it would have had in them.

No table holds these values: under the rule "traversal" a node's worth depends on what is below it. So the search begins
with trees that are good under the rule from the root (the optimal ones of the steps' acceptance vector, those of the
nodes that were accepted most often, and chains), costs the most promising of them in the records, and improves the best
by moves, as long as one raises the tokens per second: add a child; remove a last leaf; do both; lengthen a path by two.

Shaped trees of a few sizes are weighed against the result, each valued in steps that its confidence was not fitted to.
One is taken where it is faster by more than noise: in 39 of 40 draws of the requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels.planner.candidates import PlanCandidate, milestones, size_of, speed_of
from sequoia_kernels.planner.confidence import held_out_values, shape_tree
from sequoia_kernels.planner.cost_model import StepShape, StepTimes
from sequoia_kernels.planner.search import OptimalTrees
from sequoia_kernels.planner.step_records import StepRecords
from sequoia_kernels.tree import ShapedTree, TokenTree

__all__ = ["RecordedSearch", "tree_of_best_nodes"]

MOST_STARTS = 24  # trees that are costed in the records before any is improved
NUM_IMPROVED = 3
MOST_ROUNDS = 40
MOST_MOVES = 12  # of a kind, in a round
LEAST_GAIN = 1e-3  # relative, of a round; times are not measured that well
LEAST_SHAPED = 6  # nodes; below, which node has how many children is hardly a choice
NOISE = 0.025  # of the draws in which a shaped tree may be slower
SEARCHED_STEPS = 256  # recorded steps that the search looks at, evenly spaced; the result is valued in all


class RecordedSearch:
    """Costs trees within the recorded one.

    Args:
        records: recorded steps.
        times: the cost model at the context.
        max_budget: largest number of nodes.
        max_levels: largest number of levels.
        tolerance: a smaller tree is preferred within this fraction of the best speed.
        rule: verification rule, by its name.
        shaped: whether shaped trees are weighed.
    """

    def __init__(
        self, records: StepRecords, times: StepTimes, max_budget: int, max_levels: int, tolerance: float, rule: str,
        shaped: bool,
    ) -> None:  # fmt: skip
        self.shaped = shaped
        self.records, self.times, self.rule, self.tolerance = records, times, rule, tolerance
        self.max_budget, self.max_levels = max_budget, max_levels
        self.sample = records.sample(SEARCHED_STEPS)
        self.single_ms = times.step_ms(StepShape(1, (), ()))
        self._speeds: dict[TokenTree, float] = {}
        self._candidates: dict[TokenTree, PlanCandidate] = {}
        self._shaped_values: dict[ShapedTree, NDArray[np.float64]] = {}

    def choose(self) -> tuple[PlanCandidate, list[PlanCandidate]]:
        """Give the pick, and what it is shown with, the pick included, fastest first."""
        single = TokenTree.single()
        starts = list(dict.fromkeys(tree for tree in self._starts() if self.records.holds(tree)))
        starts.sort(key=self._first_guess, reverse=True)
        for tree in starts[:MOST_STARTS]:
            self._speed(tree)
        for tree in sorted(self._speeds, key=self._speeds.__getitem__, reverse=True)[:NUM_IMPROVED]:
            self._improve(tree)
        known = sorted(self._speeds, key=self._speeds.__getitem__, reverse=True)
        finalists = [
            single,
            *(tree for tree in known if self._speeds[tree] >= (1 - self.tolerance) * self._speeds[known[0]]),
        ]
        candidates = [self.candidate(tree) for tree in finalists]
        least = (1 - self.tolerance) * max(map(speed_of, candidates))
        pick = min((candidate for candidate in candidates if speed_of(candidate) >= least), key=size_of)
        shown = {single: candidates[0], pick.tree: pick}
        for tree in (*self._best_chain(starts), *self._best_by_budget(known)):
            shown.setdefault(tree, self.candidate(tree))
        others = sorted(shown.values(), key=speed_of, reverse=True)
        if not self.shaped:
            return pick, others
        shaped = self._best_shaped({candidate.tree.num_nodes for candidate in others})
        if shaped is not None:
            if self._is_faster(shaped, others[0]):
                pick = shaped
            others = sorted([*others, shaped], key=speed_of, reverse=True)
        return pick, others

    def interval(self, pick: PlanCandidate) -> tuple[float, float]:
        """Give the 95 % interval of a candidate's tokens per step."""
        if not isinstance(pick.tree, ShapedTree):
            return self.records.tokens_per_step_interval(pick.tree, self.rule)
        return self.records.interval_of(self._values(pick))

    def _best_shaped(self, sizes: set[int]) -> PlanCandidate | None:
        """The fastest shaped tree of these and the sizes between, None where none is large enough to be weighed."""
        most = min(self.max_budget, self.records.tree.num_nodes)
        between = {3 * size // 2 for size in sizes}
        best: PlanCandidate | None = None
        for nodes in sorted(size for size in sizes | between if LEAST_SHAPED <= size <= most):
            tree = shape_tree(self.records, nodes)
            if tree.num_levels <= self.max_levels:
                candidate = self._costed(tree, self.records.mean_of(self._values_of(tree)))
                best = candidate if best is None or speed_of(candidate) > speed_of(best) else best
        return best

    def _is_faster(self, shaped: PlanCandidate, other: PlanCandidate) -> bool:
        """Whether a shaped tree is faster by more than the difference between requests makes."""
        speeds = [
            self.records.drawn_means(self._values(candidate)) / candidate.step_ms for candidate in (shaped, other)
        ]
        return float(np.quantile(speeds[0] / speeds[1], NOISE)) > 1

    def _values(self, candidate: PlanCandidate) -> NDArray[np.float64]:
        tree = candidate.tree
        return self._values_of(tree) if isinstance(tree, ShapedTree) else self.records.values(tree, self.rule)

    def _values_of(self, tree: ShapedTree) -> NDArray[np.float64]:
        if tree not in self._shaped_values:
            self._shaped_values[tree] = held_out_values(self.records, tree, self.rule)
        return self._shaped_values[tree]

    def candidate(self, tree: TokenTree) -> PlanCandidate:
        """Cost a tree in all records."""
        if tree not in self._candidates:
            self._candidates[tree] = self._costed(tree, self.records.tokens_per_step(tree, self.rule))
        return self._candidates[tree]

    def _costed(self, tree: TokenTree | ShapedTree, tokens: float) -> PlanCandidate:
        stages = self.times.stages(StepShape.of(tree))
        return PlanCandidate(tree, tokens, stages, tokens * self.single_ms / sum(stages.values()))

    def _speed(self, tree: TokenTree) -> float:
        """Tokens per millisecond in the sample."""
        if tree not in self._speeds:
            tokens = self.sample.tokens_per_step(tree, self.rule)
            self._speeds[tree] = tokens / self.times.step_ms(StepShape.of(tree))
        return self._speeds[tree]

    def _first_guess(self, tree: TokenTree) -> float:
        """Tokens per millisecond under the rule from the root, which is quick to tell."""
        return self.sample.tokens_per_step(tree) / self.times.step_ms(StepShape.of(tree))

    def _starts(self) -> Iterator[TokenTree]:
        levels = min(self.max_levels, self.records.tree.num_levels)
        budget = min(self.max_budget, self.records.tree.num_nodes)
        yield from (TokenTree.chain(length) for length in range(2, min(levels, budget) + 1))
        if budget < 2:
            return
        optimal = OptimalTrees(self.records.acceptance.vector, budget, levels)
        budgets = sorted(
            {*range(3, min(budget, 12) + 1), *milestones(budget), *(3 * n // 2 for n in milestones(2 * budget // 3))}
        )
        for nodes in budgets:
            for depth in range(2, min(levels, nodes) + 1):
                yield optimal.tree(nodes, depth)
        for taken in _best_nodes(self.records, levels):
            if len(taken) in budgets:
                yield _tree_of(self.records.tree, taken)

    def _improve(self, tree: TokenTree) -> None:
        for _ in range(MOST_ROUNDS):
            start = self._speed(tree)
            best = max(self._moves(tree), key=self._speed, default=tree)
            if self._speed(best) < start * (1 + LEAST_GAIN):
                return
            tree = best

    def _moves(self, tree: TokenTree) -> Iterator[TokenTree]:
        """Trees one move away, of each kind of move those of the nodes that promise most."""
        recorded, worths = self.records.tree, self.records.node_worths
        nodes = self.records.nodes_of(tree)
        inside = set(nodes)
        further = [
            recorded.first_child[node] + count
            for node, count in zip(nodes, tree.num_children)
            if count < recorded.num_children[node] and recorded.depths[node] + 1 < self.max_levels
        ]
        leaves = [
            node
            for node, count in zip(nodes, tree.num_children)
            if not count and node and node + 1 not in self._siblings(node, inside)
        ]
        further.sort(key=lambda node: -worths[node])
        leaves.sort(key=lambda node: worths[node])
        further, leaves = further[:MOST_MOVES], leaves[:MOST_MOVES]
        for leaf in leaves:
            yield _tree_of(recorded, inside - {leaf})
            for node in further[: MOST_MOVES // 3]:
                if node != leaf + 1 and recorded.parents[node] != leaf:
                    yield _tree_of(recorded, inside - {leaf} | {node})
        for node in further:
            if len(nodes) < self.max_budget:
                yield _tree_of(recorded, inside | {node})
            below = recorded.first_child[node]
            if len(nodes) + 1 < self.max_budget and below > 0 and recorded.depths[below] < self.max_levels:
                yield _tree_of(recorded, inside | {node, below})

    def _siblings(self, node: int, inside: set[int]) -> set[int]:
        """Nodes inside with the same parent."""
        parent = self.records.tree.parents[node]
        return {child for child in self.records.tree.children(parent) if child in inside}

    def _best_chain(self, starts: list[TokenTree]) -> list[TokenTree]:
        chains = [tree for tree in starts if tree.is_chain]
        return [max(chains, key=self._speed)] if chains else []

    def _best_by_budget(self, known: list[TokenTree]) -> Iterator[TokenTree]:
        for budget in milestones(self.max_budget):
            best = next((tree for tree in known if tree.num_nodes == budget), None)
            if best is not None:
                yield best


def tree_of_best_nodes(records: StepRecords, num_nodes: int) -> TokenTree:
    """Give the tree of so many recorded nodes that were accepted most often by the rule "sequoia", of all at most."""
    taken = [0]
    for taken in _best_nodes(records, records.tree.num_levels):
        if len(taken) == num_nodes:
            break
    return _tree_of(records.tree, taken)


def _best_nodes(records: StepRecords, levels: int) -> Iterator[list[int]]:
    """The nodes that are accepted most often, one more each time."""
    tree, worths = records.tree, records.node_worths
    taken: list[int] = [0]
    waiting = [(-worths[child], child) for child in tree.children(0)[:1]]
    while waiting:
        _, node = heapq.heappop(waiting)
        taken.append(node)
        parent = tree.parents[node]
        if node + 1 < tree.first_child[parent] + tree.num_children[parent]:
            heapq.heappush(waiting, (-worths[node + 1], node + 1))
        if tree.num_children[node] and tree.depths[node] + 1 < levels:
            heapq.heappush(waiting, (-worths[tree.first_child[node]], tree.first_child[node]))
        yield taken


def _tree_of(recorded: TokenTree, nodes: set[int] | list[int]) -> TokenTree:
    """The tree of some recorded nodes: with each node its parent and its earlier siblings are among them."""
    ordered = sorted(nodes)
    place = {node: index for index, node in enumerate(ordered)}
    return TokenTree([-1, *(place[recorded.parents[node]] for node in ordered[1:])])
