"""Which tree a step gets: the best by costs and acceptance, none under load, and what is learned on the way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sequoia_kernels.planner.evidence import AcceptanceEvidence
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm.load_plan import (
    MARGIN,
    PATIENCE,
    PROBE_EVERY,
    PROBE_STEPS,
    Curve,
    LoadPlan,
    StepCosts,
    batch_bucket,
)
from sequoia_kernels.vllm.settings import trees_from

TREES = [TokenTree(parents) for parents in trees_from("auto", 24)[0]]
MS = 1e-3


def costs(free_rows: int = 16, per_row: float = 1 * MS, per_level: float = 0.2 * MS) -> StepCosts:
    """A target that takes as long for so many rows as for one, and longer for every further one."""
    forward = Curve({1: 10 * MS, free_rows: 10 * MS, free_rows + 1000: 10 * MS + 1000 * per_row})
    level = Curve({1: per_level, 1001: per_level + 1000 * 0.01 * MS})
    return StepCosts(forward, Curve({0: 0.0, 1000: 0.1 * MS}), level, level)


def plan_of(table: StepCosts | None = None, trees: list[TokenTree] = TREES, rule: str = "sequoia") -> LoadPlan:
    return LoadPlan(trees, rule, table)


def decode(plan: LoadPlan, num_steps: int, num_requests: int, seconds, accept=None, context: float = 100.0):
    """Let a plan choose and see its steps; `accept` maps a tree to an accepted path. Returns the choices."""
    choices = []
    for _ in range(num_steps):
        tree = plan.choose(num_requests, num_requests, context)
        choices.append(tree)
        plan.observe_step(num_requests, context, tree, seconds(tree))
        if tree is not None and accept is not None:
            nodes = accept(tree)
            plan.observe_path(tree, [(nodes, len(nodes))] * num_requests, True)
    return choices


def rejected(tree: TokenTree) -> list[int]:
    return [0]


def first_children(tree: TokenTree) -> list[int]:
    path = [0]
    while tree.num_children[path[-1]]:
        path.append(tree.first_child[path[-1]])
    return path


# ---- the table ----


def test_buckets_hold_at_most_an_eighth_more():
    buckets = [batch_bucket(number) for number in range(1, 2000)]
    assert buckets == sorted(buckets)
    for number, bucket in enumerate(buckets, 1):
        assert number <= bucket <= number * 9 / 8
        assert batch_bucket(bucket) == bucket
    assert buckets[:16] == [*range(1, 17)]


def test_a_curve_is_straight_between_its_points_and_behind_the_last():
    curve = Curve({4: 2.0, 1: 1.0, 8: 4.0})
    np.testing.assert_allclose(curve([0, 1, 2.5, 4, 6, 8, 12]), [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert curve([[1, 8], [4, 4]]).shape == (2, 2)
    assert Curve({3: 0.5})([1, 3, 900]).tolist() == [0.5, 0.5, 0.5]


def test_more_work_never_takes_less_time():
    curve = Curve({1: 2.0, 2: 1.5, 4: 3.0, 8: 2.9})
    assert curve([1, 2, 3, 4, 8, 100]).tolist() == [2.0, 2.0, 2.5, 3.0, 3.0, 3.0]


def test_costs_add_up_by_hand():
    table = StepCosts(
        forward=Curve({1: 1.0, 101: 11.0}),  # 0.9 + 0.1 a row
        attention=Curve({0: 0.0, 1000: 2.0}),
        draft_root=Curve({1: 0.5, 11: 1.5}),
        draft_level=Curve({1: 0.3, 11: 0.5}),
    )
    # eight nodes; one node of level 1 and two of level 2 have children
    tree = TokenTree([-1, 0, 0, 1, 1, 3, 3, 4])
    levels = [len(tree.internal_nodes(level)) for level in (1, 2)]
    assert levels == [1, 2]
    plan = plan_of(table, [tree])
    draft = 0.8 + (0.3 + 3 * 0.02) + (0.3 + 7 * 0.02)
    expected = 0.9 + 0.1 * 32 + 0.002 * 32 * 50 + draft
    np.testing.assert_allclose(plan.seconds(4, 50), [0.9 + 0.4 + 0.4, expected])


@pytest.mark.parametrize("num_requests", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("per_row", [0.01 * MS, 0.3 * MS, 2 * MS])
def test_the_choice_is_the_most_tokens_a_second(num_requests, per_row):
    table = costs(per_row=per_row)
    vector = AcceptanceEvidence().vector
    speeds = [num_requests / (table.forward(num_requests) + table.attention(num_requests * 100))]
    for tree in TREES:
        widths = [len(tree.internal_nodes(level)) for level in range(1, tree.num_levels - 1)]
        seconds = table.without_attention(num_requests, np.array([tree.num_nodes]), np.array([widths]))[0]
        seconds += table.attention(num_requests * tree.num_nodes * 100)
        speeds.append(num_requests * tree.expected_tokens(vector) / seconds)
    best = int(np.argmax(speeds))
    assert plan_of(table).choose(num_requests, 0, 100) == (None if best == 0 else TREES[best - 1])


def test_trees_shrink_with_load_down_to_none():
    sizes = []
    for num_requests in (1, 2, 4, 8, 16, 32, 64):
        tree = plan_of(costs()).choose(num_requests, num_requests, 100)
        sizes.append(1 if tree is None else tree.num_nodes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] >= 8 and sizes[-1] == 1


def test_a_long_context_makes_rows_dear():
    table = costs()
    table.attention = Curve({0: 0.0, 1000: 2 * MS})
    near, far = (plan_of(table).choose(1, 1, context) for context in (10, 20_000))
    assert near is not None and (far is None or far.num_nodes < near.num_nodes)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule"):
        plan_of(costs(), rule="nonsense")


# ---- what is learned ----


def test_without_a_table_steps_alone_decide():
    plan = plan_of()
    slow_trees = decode(plan, 300, 2, lambda tree: 10 * MS if tree is None else 100 * MS)
    assert all(tree is None for tree in slow_trees[100:])
    plan = plan_of()
    cheap_trees = decode(plan, 300, 2, lambda tree: 10 * MS, first_children)
    assert sum(tree is not None for tree in cheap_trees[100:]) > 180


def test_steps_that_take_longer_than_the_table_says_end_trees():
    plan = plan_of(costs())
    assert plan.choose(1, 1, 100) is not None
    choices = decode(plan, 200, 1, lambda tree: 10 * MS if tree is None else 80 * MS)
    assert all(tree is None for tree in choices[50:])


def test_what_is_learned_of_a_number_of_requests_goes_for_its_neighbours():
    plan = plan_of(costs())
    decode(plan, 100, 4, lambda tree: 12 * MS if tree is None else 200 * MS)
    assert plan.choose(5, 5, 100) is None
    assert plan_of(costs()).choose(5, 5, 100) is not None


def test_a_draft_that_is_never_right_ends_trees_and_one_that_always_is_makes_them_deep():
    table = costs(per_level=1.0 * MS)

    def seconds(plan):
        return lambda tree: float(plan.seconds(1, 100)[0 if tree is None else 1 + TREES.index(tree)])

    bad, good = plan_of(table), plan_of(table)
    choices = decode(bad, 200, 1, seconds(bad), rejected)
    assert choices[0] is not None and all(tree is None for tree in choices[60:100])
    assert bad.shifts[True] < -1
    choices = decode(good, 200, 1, seconds(good), first_children)
    assert good.shifts[True] > 1
    last = next(tree for tree in reversed(choices) if tree is not None)
    assert last.num_levels > choices[0].num_levels


def test_greedy_and_sampled_requests_have_shifts_of_their_own():
    plan = plan_of(costs())
    tree = TREES[0]
    for _ in range(60):
        plan.observe_path(tree, [(first_children(tree), tree.num_levels)] * 4, True)
        plan.observe_path(tree, [([0], 1)] * 4, False)
    greedy, sampled = plan.choose(2, 2, 100), plan.choose(3, 0, 100)
    assert plan.shifts[True] > 1 and plan.shifts[False] < -1
    assert greedy is not None and (sampled is None or sampled.num_levels < greedy.num_levels)


def test_trees_are_tried_again_after_a_while():
    plan = plan_of(costs(per_level=1.0 * MS))
    for _ in range(200):
        plan.observe_path(TREES[0], [([0], 1)], True)
    choices = [plan.choose(1, 1, 100) for _ in range(20_000)]
    assert choices[0] is None and any(tree is not None for tree in choices)


def test_no_tree_is_probed_and_then_seldom():
    plan = plan_of(costs())
    choices = decode(plan, 3 * PROBE_EVERY, 1, lambda tree: 10 * MS if tree is None else 11 * MS, first_children)
    runs = [(is_none, len([*steps])) for is_none, steps in itertools.groupby(choices, lambda tree: tree is None)]
    assert [length for is_none, length in runs if is_none] == [PROBE_STEPS] * 3
    assert runs[0] == (False, 2 * PROBE_STEPS)


def test_a_probe_that_taught_nothing_is_not_repeated_at_once():
    """Where requests come and go, or decode unlike one another, no step is clean enough to be timed."""
    plan = plan_of(costs())
    choices = [plan.choose(1, 1, 100) for _ in range(PROBE_EVERY)]
    assert sum(tree is None for tree in choices) <= 2 * PROBE_STEPS


def test_a_choice_is_kept_for_some_steps():
    plan = plan_of(costs())
    first = plan.choose(1, 1, 100)
    # From here on trees look terrible; the first one is decoded with until patience is over all the same.
    for tree in [first, *TREES]:
        plan.observe_step(1, 100, tree, 3.0)
    plan.observe_step(1, 100, None, 10 * MS)
    choices = [plan.choose(1, 1, 100) for _ in range(PATIENCE + 1)]
    assert choices == [first] * PATIENCE + [None]


def test_a_small_gain_changes_nothing():
    small, large = TokenTree([-1, 0, 0]), TokenTree([-1, 0, 0, 1])
    vector = AcceptanceEvidence().vector
    ratio = large.expected_tokens(vector) / small.expected_tokens(vector)
    for gain, moves in ((0.5 * MARGIN, False), (2 * MARGIN, True)):
        plan = plan_of(costs(), [small, large])
        plan.observe_step(1, 100, None, 1.0)
        plan.observe_step(1, 100, small, 10 * MS)
        plan.observe_step(1, 100, large, 1.0)
        assert plan.choose(1, 0, 100) == small
        # now both are equally fast but for the gain
        plan.observe_step(1, 100, large, 1.0)
        plan._beyond[1][1] += 10 * MS * ratio / (1 + gain) - float(plan.seconds(1, 100)[2])
        choices = [plan.choose(1, 0, 100) for _ in range(PATIENCE + 1)]
        assert (choices[-1] == large) == moves


def test_an_interrupted_step_is_not_learned_from():
    plan = plan_of(costs())
    tree = plan.choose(1, 1, 100)
    for _ in range(5):
        plan.observe_step(1, 100, tree, 11 * MS)
    before = plan.seconds(1, 100)
    plan.observe_step(1, 100, tree, 5.0)
    np.testing.assert_array_equal(plan.seconds(1, 100), before)


@pytest.mark.parametrize("num_trees", [1, 3, len(TREES)])
def test_a_first_step_that_was_interrupted_does_not_end_trees_for_good(num_trees):
    plan = plan_of(costs(), TREES[:num_trees])
    taken = iter([2.0])
    choices = decode(plan, 3000, 1, lambda tree: 10 * MS if tree is None else next(taken, 11 * MS), first_children)
    assert sum(tree is not None for tree in choices[2000:]) > 900


def test_the_report_is_plain_values():
    plan = plan_of(costs())
    decode(plan, 30, 2, lambda tree: 10 * MS, first_children)
    decode(plan, 30, 64, lambda tree: 10 * MS if tree is None else 1.0, context=0.0)
    report = plan.report()
    assert set(report) == {"shift_greedy", "shift_sampled", "by_requests"}
    assert report["shift_greedy"] > 0 and report["shift_sampled"] == 0
    assert report["by_requests"]["2"]["nodes"] > 1
    assert report["by_requests"]["64"] == {"nodes": 1, "levels": 1, "plain_ms": 10.0, "step_ms": 10.0}
