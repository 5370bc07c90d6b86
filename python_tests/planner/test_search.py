"""Optimal trees against brute force, against a plain dynamic programme, and against one another."""

from __future__ import annotations

import math
import signal
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import all_parents

from sequoia_kernels.planner.search import OptimalTrees, optimal_tree, optimal_values
from sequoia_kernels.tree import MAX_NODES, TokenTree

MAX_BRUTE_NODES = 8


@lru_cache(maxsize=1)
def every_small_tree():
    """Parents, ranks (padded with nodes that are worth nothing), sizes and levels of all trees of 1..8 nodes."""
    parents, ranks, sizes, levels = [], [], [], []
    for num_nodes in range(1, MAX_BRUTE_NODES + 1):
        for tree_parents in all_parents(num_nodes):
            tree = TokenTree(tree_parents)
            padding = MAX_BRUTE_NODES - num_nodes
            parents.append([0, *tree_parents[1:]] + [0] * padding)
            ranks.append([tree.rank(node) for node in range(num_nodes)] + [MAX_BRUTE_NODES] * padding)
            sizes.append(num_nodes)
            levels.append(tree.num_levels)
    return np.array(parents), np.array(ranks), np.array(sizes), np.array(levels)


def brute_force_values(vector):
    """Best value of at most n nodes on at most l levels, over every tree. [9, 9]"""
    parents, ranks, sizes, levels = every_small_tree()
    rates = np.zeros(MAX_BRUTE_NODES + 1)
    rates[: min(len(vector), MAX_BRUTE_NODES)] = vector[:MAX_BRUTE_NODES]
    values = np.ones(parents.shape)
    for node in range(1, MAX_BRUTE_NODES):
        values[:, node] = values[np.arange(len(parents)), parents[:, node]] * rates[ranks[:, node]]
    totals = values.sum(axis=1)
    best = np.zeros((MAX_BRUTE_NODES + 1, MAX_BRUTE_NODES + 1))
    for n in range(1, MAX_BRUTE_NODES + 1):
        for l in range(1, MAX_BRUTE_NODES + 1):  # noqa: E741 (the symbol of the formula)
            best[n, l] = totals[(sizes <= n) & (levels <= l)].max()
    return best


def plain_programme(vector, max_budget, max_levels):
    """The recurrence as the paper states it, exact sizes, one (n, l, b) at a time but for the maximum."""
    num_branches = min(len(vector), max_budget - 1)
    best = np.full((max_budget + 1, max_levels + 1), -np.inf)
    best[1, 1:] = 1.0
    for levels in range(2, max_levels + 1):
        partial = np.full(max_budget + 1, -np.inf)
        partial[1] = 1.0
        for rate in vector[:num_branches]:
            below = best[:, levels - 1]
            child = np.multiply(rate, below, out=np.full(max_budget + 1, -np.inf), where=np.isfinite(below))
            extended = np.full(max_budget + 1, -np.inf)
            for n in range(2, max_budget + 1):
                extended[n] = (partial[1:n] + child[n - 1 : 0 : -1]).max()
            partial = extended
            best[:, levels] = np.maximum(best[:, levels], partial)
    best[0] = 0.0
    best[:, 0] = 0.0
    return np.maximum.accumulate(best, axis=0)  # at most n nodes


def check_tree(tree, vector, budget, levels, value):
    """A returned tree keeps the limits, has the promised value, and uses the budget where that is worth anything."""
    rates = np.asarray(vector, dtype=float)
    assert tree.num_nodes <= budget
    assert tree.num_levels <= levels
    assert math.isclose(tree.expected_tokens(rates), value, rel_tol=1e-12)
    ranks = [tree.rank(node) for node in range(tree.num_nodes)]
    for node in range(tree.num_nodes):
        children = tree.children(node)
        # a child of acceptance 0 may only open the way to a later one
        assert not children or rates[ranks[children[-1]]] > 0.0
        assert node == 0 or not children or rates[ranks[node]] > 0.0
    if tree.num_nodes < budget:
        for node, (depth, next_rank) in enumerate(zip(tree.depths, tree.num_children, strict=True)):
            room = depth + 1 < levels and next_rank < len(rates)
            alive = node == 0 or rates[ranks[node]] > 0.0
            assert not (room and alive and rates[next_rank] > 0.0)


VECTORS = {
    "ordinary": [0.51, 0.14, 0.06, 0.036, 0.028, 0.026, 0.02, 0.015],
    "second rank better": [0.1, 0.6, 0.05, 0.2],
    "rising": [0.05, 0.1, 0.2, 0.3],
    "zero first": [0.0, 0.5, 0.3],
    "two zeros, then all": [0.0, 0.0, 1.0],
    "zero between": [0.5, 0.0, 0.3],
    "trailing zeros": [0.6, 0.1, 0.0, 0.0],
    "all zero": [0.0, 0.0],
    "one child only": [0.8],
    "certain": [1.0, 0.0],
    "certain by rounding": [1.0 + 5e-10],
    "equal": [0.25, 0.25, 0.25, 0.25],
    "tiny": [1e-300, 1e-300],
    "more ranks than nodes": [0.05] * 20,
}


def test_there_are_as_many_trees_as_catalan_says():
    sizes = every_small_tree()[2]
    assert np.bincount(sizes).tolist() == [0, 1, 1, 2, 5, 14, 42, 132, 429]


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS.keys())
@pytest.mark.parametrize("method", ["auto", "dynamic_programme"])
def test_brute_force_on_named_vectors(vector, method):
    expected = brute_force_values(vector)
    trees = OptimalTrees(vector, MAX_BRUTE_NODES, MAX_BRUTE_NODES, method=method)
    np.testing.assert_allclose(trees.values, expected, rtol=1e-13, atol=0.0)
    for budget in range(1, MAX_BRUTE_NODES + 1):
        for levels in range(1, MAX_BRUTE_NODES + 1):
            check_tree(trees.tree(budget, levels), vector, budget, levels, expected[budget, levels])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    weights=st.lists(
        st.sampled_from([0.0, 0.01, 0.1, 0.2, 0.5, 0.7, 1.0, 3.0]) | st.floats(0, 1), min_size=1, max_size=9
    ),
    total=st.floats(0.05, 1.0),
    monotone=st.booleans(),
)
def test_brute_force_on_random_vectors(weights, total, monotone):
    vector = np.array(sorted(weights, reverse=True) if monotone else weights)
    vector = vector / vector.sum() * total if vector.sum() > 1e-200 else np.zeros(len(vector))
    expected = brute_force_values(vector)
    np.testing.assert_allclose(optimal_values(vector, MAX_BRUTE_NODES, MAX_BRUTE_NODES), expected, rtol=1e-13)
    for budget in (3, 6, MAX_BRUTE_NODES):
        for levels in (1, 2, 3, 5, None):
            limit = budget if levels is None else levels
            value = expected[budget, limit]
            check_tree(optimal_tree(vector, budget, levels), vector, budget, limit, value)


@pytest.mark.parametrize(("max_budget", "max_levels", "num_branches"), [(75, 7, 6), (130, 5, 40), (33, 33, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_plain_programme_on_larger_tables(max_budget, max_levels, num_branches, seed):
    generator = np.random.default_rng(seed)
    vector = generator.dirichlet(np.full(num_branches + 1, 0.5))[:-1]
    if seed:
        vector[generator.integers(num_branches)] = 0.0
    expected = plain_programme(vector, max_budget, max_levels)
    trees = OptimalTrees(vector, max_budget, max_levels)
    np.testing.assert_allclose(trees.values, expected, rtol=1e-12, atol=0.0)
    np.testing.assert_allclose(optimal_values(vector, max_budget, max_levels), trees.values, rtol=0.0)
    for budget, levels in [(max_budget, max_levels), (max_budget - 1, 3), (max_budget // 2, max_levels - 1)]:
        tree = trees.tree(budget, levels)
        check_tree(tree, vector, budget, levels, expected[budget, levels])
        assert optimal_tree(vector, budget, levels).expected_tokens(vector) == pytest.approx(
            expected[budget, levels], rel=1e-12
        )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=16),
    total=st.floats(0.1, 1.0),
    max_budget=st.integers(1, 140),
    max_levels=st.integers(1, 20),
)
def test_best_first_and_programme_agree(weights, total, max_budget, max_levels):
    vector = np.array(sorted(weights, reverse=True))
    vector = vector / vector.sum() * total
    heap = OptimalTrees(vector, max_budget, max_levels)
    table = OptimalTrees(vector, max_budget, max_levels, method="dynamic_programme")
    assert (heap.method, table.method) == ("best_first", "dynamic_programme")
    np.testing.assert_allclose(heap.values, table.values, rtol=1e-12)
    for trees in (heap, table):
        assert (np.diff(trees.values, axis=0) >= 0).all()
        assert (np.diff(trees.values[1:], axis=1) >= 0).all()
        tree = trees.tree(max_budget, max_levels)
        check_tree(tree, vector, max_budget, max_levels, table.values[max_budget, max_levels])
        widths = trees.widths(max_budget, max_levels)
        assert widths.nodes == tree.widths
        assert widths.internal == [len(tree.internal_nodes(level)) for level in range(tree.num_levels)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8), budget=st.integers(1, 60))
def test_no_limit_equals_a_limit_that_is_not_felt(weights, budget):
    vector = np.array(weights) / max(1.0, sum(weights))
    without = optimal_tree(vector, budget)
    value = optimal_values(vector, budget, budget)[budget, budget]
    check_tree(without, vector, budget, budget, value)
    assert optimal_tree(vector, budget, 10**9) == without


def test_best_first_alone_would_lose_on_a_vector_that_is_not_monotone():
    # Through the worthless first child to the good second one: greedy choice never gets there with three nodes.
    vector = [0.1, 0.85]
    assert optimal_tree(vector, 3).parents == [-1, 0, 0]
    assert optimal_tree(vector, 5).parents == [-1, 0, 0, 2, 2]
    with pytest.raises(
        ValueError, match="OptimalTrees: method must not be best_first for a vector that is not non-inc"
    ):
        OptimalTrees(vector, 5, 5, method="best_first")


def test_fewer_nodes_where_more_are_worth_nothing():
    assert optimal_tree([0.5], 10, 3) == TokenTree.chain(3)
    assert optimal_tree([0.5, 0.2], 100, 3) == TokenTree.kary(2, 3)
    assert optimal_tree([0.0, 0.0], 10) == TokenTree.single()
    assert optimal_tree([0.5, 0.0, 0.0], 10, 4) == TokenTree.chain(4)
    assert optimal_tree([0.0, 0.9], 2) == TokenTree.single()
    assert optimal_tree([0.0, 0.9], 4).parents == [-1, 0, 0]
    # far below the rounding of the sum, still worth more than nothing
    assert optimal_tree([0.01], 64) == TokenTree.chain(64)
    assert optimal_tree([0.001, 0.01], 65).num_nodes == 65


def test_extremes():
    assert optimal_tree([1.0], 500) == TokenTree.chain(500)
    assert optimal_tree([0.9, 0.1], 1) == TokenTree.single()
    assert optimal_tree([0.9, 0.1], 50, 1) == TokenTree.single()
    assert optimal_tree([0.02] * 40, 41) == TokenTree.kary(40, 2)
    large = optimal_tree([0.6, 0.2, 0.1], MAX_NODES)
    assert large.num_nodes == MAX_NODES
    assert optimal_values([0.6, 0.2], 3, 10**5).shape == (4, 10**5 + 1)


def test_ties_are_broken_the_same_way_every_time():
    equal = [0.25] * 4
    heap = OptimalTrees(equal, 12, 4).tree(12, 4)
    table = OptimalTrees(equal, 12, 4, method="dynamic_programme").tree(12, 4)
    assert heap == optimal_tree(equal, 12, 4)
    assert table == OptimalTrees(equal, 12, 4, method="dynamic_programme").tree(12, 4)
    assert heap.parents == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_values_of_a_solved_object_are_read_only_and_separate():
    trees = OptimalTrees([0.1, 0.5], 6, 4)
    assert (trees.max_budget, trees.max_levels) == (6, 4)
    assert trees.value(6, 4) == trees.values[6, 4]
    with pytest.raises(ValueError, match="read-only"):
        trees.values[1, 1] = 2.0
    free = optimal_values([0.1, 0.5], 6, 4)
    free[1, 1] = 2.0
    assert trees.values[1, 1] == 1.0


def test_long_searches_can_be_interrupted():
    class Interrupted(Exception):
        pass

    def interrupt(number, frame):
        raise Interrupted

    vector = np.linspace(0.001, 0.02, 64)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupted):
            optimal_values(vector, 6000, 24)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("acceptance", "error", "message"),
    [
        ([0.9, 0.2], ValueError, "acceptance must have a sum of at most 1, got 1.1"),
        ([float("nan")], ValueError, r"acceptance must have finite entries, got acceptance\[0\] = nan"),
        ([0.2, -0.1], ValueError, r"acceptance must have entries >= 0, got acceptance\[1\] = -0.1"),
        ([], ValueError, "acceptance must have at least 1 entry, got 0"),
        ("0.5", TypeError, "acceptance must be|acceptance must have shape"),
    ],
)
def test_bad_vectors_are_refused(acceptance, error, message):
    for name, call in {
        "optimal_tree": lambda: optimal_tree(acceptance, 4),
        "optimal_values": lambda: optimal_values(acceptance, 4, 4),
        "OptimalTrees": lambda: OptimalTrees(acceptance, 4, 4),
    }.items():
        with pytest.raises((error, ValueError), match=f"{name}: {message}"):
            call()


def test_bad_sizes_are_refused():
    for budget in (0, -1, MAX_NODES + 1):
        with pytest.raises(ValueError, match=rf"optimal_tree: budget must be in 1\.\.{MAX_NODES} .*, got {budget}"):
            optimal_tree([0.5], budget)
        with pytest.raises(ValueError, match=rf"optimal_values: max_budget must be in 1\.\.{MAX_NODES}"):
            optimal_values([0.5], budget, 3)
    for levels in (0, -3):
        with pytest.raises(ValueError, match=f"optimal_tree: max_levels must be at least 1, got {levels}"):
            optimal_tree([0.5], 4, levels)
    for bad in (2.0, "2", None, True):
        with pytest.raises(TypeError, match="optimal_tree: budget must be an integer, got"):
            optimal_tree([0.5], bad)
    with pytest.raises(TypeError, match=r"optimal_tree: max_levels must be an integer, got 2.5 of type float"):
        optimal_tree([0.5], 4, 2.5)
    with pytest.raises(ValueError, match="OptimalTrees: method must be one of auto, best_first, dynamic_programme"):
        OptimalTrees([0.5], 4, 4, method="fast")
    with pytest.raises(ValueError, match=r"optimal_values: the table must need at most 2 GiB, got 34.2 GiB; lower"):
        optimal_values([0.5], MAX_NODES, 70_000)
    with pytest.raises(ValueError, match="OptimalTrees: the table must need at most 2 GiB"):
        OptimalTrees([0.5], 4, 2**80)
    with pytest.raises(ValueError, match=r"optimal_tree: the table must need at most 2 GiB, got .* GiB; lower"):
        optimal_tree([0.01, 0.02] * 20, MAX_NODES, 1000)


def test_cells_outside_the_table_are_refused():
    trees = OptimalTrees([0.2, 0.5], 6, 4)
    for method in ("value", "tree", "widths"):
        for budget in (0, 7):
            with pytest.raises(ValueError, match=rf"OptimalTrees.{method}: budget must be in 1\.\.6, got {budget}"):
                getattr(trees, method)(budget, 2)
        for levels in (0, 5):
            with pytest.raises(ValueError, match=rf"OptimalTrees.{method}: levels must be in 1\.\.4, got {levels}"):
                getattr(trees, method)(2, levels)
