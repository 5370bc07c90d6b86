"""Optimal trees: the most accepted tokens that a number of nodes and levels can give, for any acceptance vector.

Definitions:
    A tree's value is F = sum over its nodes of the product of acceptance[rank] along the path: the mean number of
    tokens that a step emits, bonus token included. A node may have a child of rank k only with children of ranks
    0..k-1.

Two methods, both exact where they apply:
    best_first: for non-increasing vectors with entries <= 1. Nodes are taken in order of value; since no node is worth
        more than its parent or its left sibling, the n most valuable ones above any level limit form a tree.
        O(n log n).
    dynamic_programme: for any vector. best[n, l] = max over b of partial[n, l, b], where partial[n, l, b], the best
        tree of n nodes on l levels whose root has b children, is max over m of
        partial[m, l, b-1] + acceptance[b-1] * best[n-m, l-1]. O(n^2 l b); O(n^2 b) without a level limit.

Ties:
    Equal values give the same tree on every machine. best_first prefers the shallower node, then the child of the
    parent that was taken first. dynamic_programme prefers the larger tree, then the fewest children, then the smallest
    last subtree. Where the best tree is not unique the two may return different trees of equal value.

Source:
    Sequoia (arXiv 2402.12374), section 3.1; best-first in place of the programme is this package's addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sequoia_kernels import checks
from sequoia_kernels.host_module import host as _host
from sequoia_kernels.tree import MAX_NODES, TokenTree, check_acceptance

__all__ = ["METHODS", "LevelWidths", "OptimalTrees", "optimal_tree", "optimal_values"]

METHODS = ("auto", "best_first", "dynamic_programme")

# The dynamic programme keeps its whole table, so that any tree can be read from it.
MAX_TABLE_BYTES = 2**31
_BUDGET = checks.Rule(f"be in 1..{MAX_NODES} (nodes, root included)", lambda value: 1 <= value <= MAX_NODES)


class LevelWidths(NamedTuple):
    """What the cost of a tree depends on besides its number of nodes."""

    nodes: list[int]  # number of nodes on each level
    internal: list[int]  # number of those that have children: the draft model is fed these. The last level has none


class OptimalTrees:
    """The optimal trees for all budgets and level limits up to a maximum, solved at once.

    Args:
        acceptance: probability that the child of each rank is the accepted one. [max_children], each >= 0, sum <= 1.
        max_budget: largest number of nodes, root included, in 1..65536.
        max_levels: largest number of levels, at least 1.
        method: "best_first", "dynamic_programme", or "auto" for the first of them that is exact.

    Attributes:
        values: best value of at most n nodes on at most l levels at [n, l]; 0 where n or l is 0. Non-decreasing in
            both. [max_budget + 1, max_levels + 1], float64, read-only.
        method: the method in use.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, best_first is asked for a vector for which it is not exact, or the
            table would exceed 2 GiB.

    Notes:
        Trees hold no useless nodes: a tree has fewer nodes than its budget where the level limit or the vector leaves
        no room for more, or where all further nodes would be worth nothing (their rank's acceptance is 0). Solving
        runs on one core without the interpreter's lock, and Ctrl-C ends it.

    Example:
        >>> trees = OptimalTrees([0.6, 0.2], max_budget=8, max_levels=3)
        >>> trees.tree(4, 3), round(trees.value(4, 3), 2)
        (TokenTree([-1, 0, 0, 1]), 2.16)
        >>> trees.widths(4, 3)
        LevelWidths(nodes=[1, 2, 1], internal=[1, 1, 0])
    """

    def __init__(self, acceptance: Sequence[float], max_budget: int, max_levels: int, *, method: str = "auto") -> None:
        caller = "OptimalTrees"
        self._vector = check_acceptance(acceptance, caller)
        max_budget = _check_budget(max_budget, caller, "max_budget")
        max_levels = _check_levels(max_levels, caller)
        _check_bytes(8 * (max_budget + 1) * (max_levels + 1), caller)
        self.method = _choose_method(method, self._vector, caller)
        self._table: Any = None
        if self.method == "best_first":
            values = _host.best_first_values(self._vector, max_budget, max_levels)
        else:
            self._table = _solve_table(self._vector, max_budget, max_levels, caller)
            values = self._table.values()
        values.flags.writeable = False
        self.values: np.ndarray = values

    @property
    def max_budget(self) -> int:
        """Largest number of nodes in the table."""
        return self.values.shape[0] - 1

    @property
    def max_levels(self) -> int:
        """Largest number of levels in the table."""
        return self.values.shape[1] - 1

    def value(self, budget: int, levels: int) -> float:
        """Return the best value of at most `budget` nodes on at most `levels` levels: `values[budget, levels]`."""
        budget, levels = self._check_cell(budget, levels, "value")
        return float(self.values[budget, levels])

    def tree(self, budget: int, levels: int) -> TokenTree:
        """Return a tree that has this value. 0.1 ms for 128 nodes."""
        return TokenTree(self._parents(*self._check_cell(budget, levels, "tree")))

    def widths(self, budget: int, levels: int) -> LevelWidths:
        """Return the nodes and internal nodes on each level of `tree(budget, levels)`, without building the tree."""
        parents = self._parents(*self._check_cell(budget, levels, "widths"))
        return LevelWidths(*_host.level_widths(parents))

    def _parents(self, budget: int, levels: int) -> list[int]:
        if self._table is None:
            return _host.best_first_tree(self._vector, budget, levels)
        return self._table.tree(budget, levels)

    def _check_cell(self, budget: int, levels: int, method: str) -> tuple[int, int]:
        caller = f"OptimalTrees.{method}"
        return (
            checks.whole_number(caller, "budget", budget, rule=checks.within(1, self.max_budget), show_value=True),
            checks.whole_number(caller, "levels", levels, rule=checks.within(1, self.max_levels), show_value=True),
        )


def optimal_tree(acceptance: Sequence[float], budget: int, max_levels: int | None = None) -> TokenTree:
    """Return a tree with the most expected tokens per step among all trees of at most `budget` nodes.

    Args:
        acceptance: probability that the child of each rank is the accepted one, in any order of size.
            [max_children], each >= 0, sum <= 1. Element 0 belongs to the first child.
        budget: number of nodes, root included, in 1..65536.
        max_levels: largest number of levels, at least 1; None for no limit.

    Returns:
        An optimal tree; ties are broken as the module tells. It has `budget` nodes unless the level limit or the
        vector leaves no room for as many, or all further nodes would be worth nothing: [0.5] on 3 levels gives 3 nodes
        at most, [0.0] always the lone root.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or the dynamic programme's table would exceed 2 GiB.

    Source:
        Sequoia (arXiv 2402.12374), section 3.1.

    Example:
        >>> tree = optimal_tree([0.6, 0.2, 0.1], budget=6, max_levels=3)
        >>> tree.parents, round(tree.expected_tokens([0.6, 0.2, 0.1]), 2)
        ([-1, 0, 0, 1, 1, 2], 2.4)
    """
    vector = check_acceptance(acceptance, "optimal_tree")
    budget = _check_budget(budget, "optimal_tree", "budget")
    # no tree of n nodes has more than n levels
    levels = budget if max_levels is None else min(_check_levels(max_levels, "optimal_tree"), budget)
    if _is_non_increasing(vector):
        return TokenTree(_host.best_first_tree(vector, budget, levels))
    limit = levels if levels < budget else 0
    return TokenTree(_solve_table(vector, budget, limit, "optimal_tree").tree(budget, limit))


def optimal_values(acceptance: Sequence[float], max_budget: int, max_levels: int) -> np.ndarray:
    """Return the most expected tokens per step for all budgets and level limits.

    Args:
        acceptance: as in `optimal_tree`.
        max_budget: largest number of nodes, root included, in 1..65536.
        max_levels: largest number of levels, at least 1.

    Returns:
        Entry [n, l] is the best value over all trees of at most n nodes on at most l levels; row 0 and column 0, which
        stand for no tree, are 0. Non-decreasing in n and in l. [max_budget + 1, max_levels + 1], float64.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or the table would exceed 2 GiB.

    Example:
        >>> optimal_values([0.5, 0.25], max_budget=3, max_levels=2).tolist()
        [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.5], [0.0, 1.0, 1.75]]
    """
    vector = check_acceptance(acceptance, "optimal_values")
    max_budget = _check_budget(max_budget, "optimal_values", "max_budget")
    max_levels = _check_levels(max_levels, "optimal_values")
    _check_bytes(8 * (max_budget + 1) * (max_levels + 1), "optimal_values")
    if _is_non_increasing(vector):
        return _host.best_first_values(vector, max_budget, max_levels)
    return _solve_table(vector, max_budget, max_levels, "optimal_values").values()


def _is_non_increasing(vector: np.ndarray) -> bool:
    """Tell whether best-first is exact. The checks let a sum, hence an entry, exceed 1 by a rounding error."""
    return bool(vector[0] <= 1.0 and (vector[1:] <= vector[:-1]).all())


def _choose_method(method: str, vector: np.ndarray, caller: str) -> str:
    if method not in METHODS:
        raise ValueError(f"{caller}: method must be one of {', '.join(METHODS)}, got {method!r}")
    exact = _is_non_increasing(vector)
    if method == "best_first" and not exact:
        raise ValueError(
            f"{caller}: method must not be best_first for a vector that is not non-increasing, got best_first"
        )
    if method == "auto":
        return "best_first" if exact else "dynamic_programme"
    return method


def _solve_table(vector: np.ndarray, budget: int, levels: int, caller: str) -> Any:
    """Solve the dynamic programme; `levels` = 0 means no limit."""
    children = min(int(np.flatnonzero(vector)[-1]) + 1 if vector.any() else 0, budget)
    rows = 2 * (children + 1) if levels == 0 else min(levels, budget) * (children + 2)
    _check_bytes(8 * rows * (budget + 1), caller)
    return _host.TreeTable(vector, budget, levels)


def _check_bytes(num_bytes: int, caller: str) -> None:
    if num_bytes > MAX_TABLE_BYTES:
        raise ValueError(
            f"{caller}: the table must need at most {MAX_TABLE_BYTES / 2**30:g} GiB, got {num_bytes / 2**30:.1f} GiB; "
            "lower the levels or the budget, or shorten the acceptance vector"
        )


def _check_budget(budget: int, caller: str, name: str) -> int:
    return checks.whole_number(caller, name, budget, rule=_BUDGET, show_value=True)


def _check_levels(max_levels: int, caller: str) -> int:
    return checks.whole_number(caller, "max_levels", max_levels, rule=checks.at_least(1), show_value=True)
