"""Local improvement of a tree where the draft's time grows with the width of its levels.

The tables of optimal trees know nodes and levels only. Among trees of equal nodes and levels they take the one of the
largest value, however many internal nodes it has on a level; a draft whose forward takes longer over more rows would
rather have fewer. So the best tree of the table is improved by moves, as long as one raises the tokens per second: add
a leaf; remove a leaf; make a node a leaf; and the last two with the removed leaves placed elsewhere, anywhere or only
where no node becomes internal by it. Where the draft's time hardly depends on the width, no move gains anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels.planner.cost_model import StepShape, StepTimes
from sequoia_kernels.tree import TokenTree

__all__ = ["refine_tree"]

MAX_ROUNDS = 100
LEAST_GAIN = 1e-9  # relative gain of a move; below it is rounding
LEAST_ROUND_GAIN = 1e-4  # relative gain of a round; times are not measured that well


class Move(NamedTuple):
    """A change of a tree."""

    removed: tuple[tuple[int, int], ...]  # (node, count): how many of a node's last children go, all of them leaves
    added: tuple[int, ...]  # nodes that get a further child each, one entry a child


def refine_tree(
    tree: TokenTree, vector: NDArray[np.float64], times: StepTimes, max_budget: int, max_levels: int
) -> TokenTree:
    """Improve a tree's tokens per second, at this acceptance vector [ranks], by local moves until none helps."""
    for _ in range(MAX_ROUNDS):
        state = _State(tree, vector, times, max_budget, max_levels)
        start = state.speed(Move((), ()))
        least = start * (1 + LEAST_GAIN)
        gains = [(speed, move) for move in state.moves() if (speed := state.speed(move)) > least]
        if not gains:
            return tree
        gains.sort(key=lambda gain: -gain[0])  # stable: equal gains keep the order of the moves
        best_speed, best = gains[0]
        # large trees gain by many small moves: try all that touch different nodes at once, the best half of them, ...
        compatible = _compatible([move for _, move in gains], state)
        while len(compatible) > 1:
            joint = Move(
                tuple(pair for move in compatible for pair in move.removed),
                tuple(node for move in compatible for node in move.added),
            )
            speed = state.speed(joint)
            if speed > best_speed:
                best, best_speed = joint, speed
                break
            compatible = compatible[: len(compatible) // 2]
        tree = state.apply(best)
        if best_speed < start * (1 + LEAST_ROUND_GAIN):
            return tree
    return tree


class _State:
    """A tree with what its moves are costed by."""

    def __init__(
        self, tree: TokenTree, vector: NDArray[np.float64], times: StepTimes, max_budget: int, max_levels: int
    ) -> None:
        self.tree, self.times, self.max_budget = tree, times, max_budget
        self.rates = vector.tolist()
        self.depths, self.counts, self.first_child = tree.depths, tree.num_children, tree.first_child
        self.values = tree.node_values(self.rates)
        self.total = sum(self.values)
        shape = StepShape.of(tree)
        self.widths, self.branchings = list(shape.widths), list(shape.branchings)
        # further children, the most valuable first, as the nodes that would get them
        reach = min(max(self.branchings, default=1), max_budget)
        ways = [
            (-self.values[node] * self.rates[rank], node, rank)
            for node in range(tree.num_nodes)
            if self.depths[node] < max_levels - 1
            for rank in range(self.counts[node], min(self.counts[node] + reach, len(self.rates)))
        ]
        self.ways = [node for _, node, _ in sorted(ways)]

    def moves(self) -> Iterator[Move]:
        """Yield all moves."""
        if self.tree.num_nodes < self.max_budget:
            for node in dict.fromkeys(self.ways):
                yield Move((), (node,))
        for node, count in enumerate(self.counts):
            if not count:
                continue
            first = self.first_child[node]
            if self.counts[first + count - 1]:
                continue  # its last child is not a leaf
            has_leaves_only = not any(self.counts[first : first + count])
            for num_removed in sorted({1, count} if has_leaves_only else {1}):
                removed = ((node, num_removed),)
                yield Move(removed, ())
                gone = range(first + count - num_removed, first + count)
                for widening in (True, False):
                    places: list[int] = []
                    for place in self.ways:
                        if place != node and place not in gone and (widening or self.counts[place]):
                            places.append(place)
                            if len(places) == num_removed:
                                break
                    for num_added in range(1, len(places) + 1):
                        yield Move(removed, tuple(places[:num_added]))

    def speed(self, move: Move) -> float:
        """Tokens per millisecond after a move; 0 where it exceeds the budget."""
        num_nodes = self.tree.num_nodes - sum(count for _, count in move.removed) + len(move.added)
        if num_nodes > self.max_budget:
            return 0.0
        total = self.total
        widths, branchings = self.widths.copy(), self.branchings.copy()
        counts: dict[int, int] = {}
        for node, num_removed in move.removed:
            count = self.counts[node]
            counts[node] = count - num_removed
            total -= self.values[node] * sum(self.rates[count - num_removed : count])
            widths[self.depths[node]] -= num_removed == count
        for depth in {self.depths[node] for node in counts}:
            branchings[depth] = max(counts.get(node, self.counts[node]) for node in self.tree.level_nodes(depth))
        for node in move.added:
            depth, count = self.depths[node], counts.get(node, self.counts[node])
            if count >= len(self.rates):
                return 0.0  # several moves met at this node, and it has no such rank
            total += self.values[node] * self.rates[count]
            counts[node] = count + 1
            if depth == len(widths):
                widths.append(0)
                branchings.append(0)
            widths[depth] += count == 0
            branchings[depth] = max(branchings[depth], count + 1)
        if widths and widths[-1] == 0:
            widths.pop()
            branchings.pop()
        return total / self.times.step_ms(StepShape(num_nodes, tuple(widths), tuple(branchings)))

    def apply(self, move: Move) -> TokenTree:
        """Give the tree after a move."""
        counts = self.counts.copy()
        for node, num_removed in move.removed:
            counts[node] -= num_removed
        for node in move.added:
            counts[node] += 1
        parents, queue = [-1], [0]  # the old node behind each new one, -1 for a new leaf
        for index, node in enumerate(queue):
            if node < 0:
                continue
            for rank in range(counts[node]):
                parents.append(index)
                queue.append(self.first_child[node] + rank if rank < self.counts[node] else -1)
        return TokenTree(parents)


def _compatible(moves: list[Move], state: _State) -> list[Move]:
    """Keep, in order, the moves that neither change nor remove a node that an earlier one changes or removes."""
    kept: list[Move] = []
    used: set[int] = set()
    for move in moves:
        touched = set(move.added)
        for node, num_removed in move.removed:
            end = state.first_child[node] + state.counts[node]
            touched |= {node, *range(end - num_removed, end)}
            if node > 0:
                touched.add(state.tree.parents[node])  # its other children may be going
        if used.isdisjoint(touched):
            kept.append(move)
            used |= touched
    return kept
