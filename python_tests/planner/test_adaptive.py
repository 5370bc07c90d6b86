"""Adaptive plans: the shift of an acceptance vector, the ladder of trees, and what makes the follower switch."""

from __future__ import annotations

import numpy as np
import pytest
from support.synthetic_profile import synthetic_profile

from sequoia_kernels.planner import plan_adaptive, plan_tree, shift_acceptance
from sequoia_kernels.tree import TokenTree

VECTOR = [0.6, 0.15, 0.06, 0.03]


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile(lambda n, c: 10 + 0.1 * n, lambda n, c: 0.8 + 0.01 * n)


@pytest.fixture
def plan(profile):
    return plan_adaptive(VECTOR, profile, context_len=128)


def draw_steps(follower, vector, steps, seed=0):
    """Let the follower see steps of one node each whose children are accepted by the vector."""
    generator = np.random.default_rng(seed)
    seen = []
    for _ in range(steps):
        seen.append(follower.tree)
        ranks = follower.tree.max_branching
        rank = int(generator.choice(len(vector) + 1, p=[*vector, 1 - sum(vector)]))
        tried = [int(k <= rank) for k in range(ranks)]
        follower.observe(tried, [int(k == rank) for k in range(ranks)])
    return seen


def test_a_shift_moves_conditional_chances_by_logits():
    moved = shift_acceptance([0.5, 0.25], 1.0)
    chance = 1 / (1 + np.exp(-1.0))  # both children are accepted half of the times that they are tried
    np.testing.assert_allclose(moved, [chance, (1 - chance) * chance])


@pytest.mark.parametrize("vector", [VECTOR, [0.3, 0.05, 0.25], [1.0, 0.0], [0.9, 0.1]])
def test_shifts_undo_each_other_and_keep_vectors_valid(vector):
    for shift in (-3.0, -0.5, 0.5, 3.0):
        moved = shift_acceptance(vector, shift)
        assert (moved >= 0).all() and moved.sum() <= 1 + 1e-12
        assert (moved.sum() > sum(vector)) == (shift > 0) or sum(vector) > 1 - 1e-6
        np.testing.assert_allclose(shift_acceptance(moved, -shift), vector, atol=1e-4)


def test_plans_are_the_best_ones_of_a_ladder_and_start_at_the_acceptance_given(plan, profile):
    trees = plan.trees
    assert len(set(trees)) == len(trees) > 2
    assert trees[plan.start] == plan_tree(VECTOR, profile, context_len=128).tree
    assert plan_tree(shift_acceptance(VECTOR, 2.0), profile, context_len=128).tree == trees[-1]
    rates = [entry.acceptance[0] for entry in plan.plans]
    assert rates == sorted(rates)
    assert all(str(tree.num_nodes) in plan.describe() for tree in trees)


def test_a_rung_that_would_not_speculate_becomes_its_fastest_rival(profile):
    slow_draft = synthetic_profile(lambda n, c: 10 + 0.1 * n, lambda n, c: 9.0)
    assert plan_tree([0.2], slow_draft).tree == TokenTree.single()
    assert all(tree.num_nodes > 1 for tree in plan_adaptive([0.2], slow_draft).trees)


@pytest.mark.parametrize(("shift", "direction"), [(-2.0, -1), (2.0, 1)])
def test_it_moves_to_the_tree_of_the_acceptance_that_it_sees(plan, shift, direction):
    follower = plan.follow()
    true_vector = shift_acceptance(VECTOR, shift)
    draw_steps(follower, true_vector, 300)
    assert np.sign(follower.shift) == direction
    assert abs(follower.shift - shift) < 1.0
    place = plan.trees.index(follower.tree)
    assert (place - plan.start) * direction > 0
    draw_steps(follower, VECTOR, 300)
    assert abs(plan.trees.index(follower.tree) - plan.start) < abs(place - plan.start)


def test_it_stays_while_acceptance_is_as_planned(plan):
    follower = plan.follow()
    seen = draw_steps(follower, VECTOR, 400)
    assert seen.count(plan.trees[plan.start]) > 0.8 * len(seen)


def test_patience_and_margin_hold_it_back(profile):
    patient = plan_adaptive(VECTOR, profile, context_len=128, patience=50).follow()
    assert len(set(draw_steps(patient, shift_acceptance(VECTOR, -3.0), 50))) == 1
    stubborn = plan_adaptive(VECTOR, profile, context_len=128, margin=100.0).follow()
    assert len(set(draw_steps(stubborn, shift_acceptance(VECTOR, -3.0), 200))) == 1
    assert stubborn.num_switches == 0


def test_ranks_that_the_plan_does_not_know_are_left_out(plan):
    follower = plan.follow()
    follower.observe([1] * 9, [0] * 9)
    follower.observe([], [])
    assert follower.tree == plan.trees[plan.start]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"half_life": 0}, "half_life must be a finite number >= 1, got 0"),
        ({"margin": float("nan")}, "margin must be a finite number >= 0, got nan"),
        ({"patience": "many"}, "patience must be a finite number >= 1, got 'many'"),
        ({"shifts": [5.0]}, r"shifts must lie within -4\.\.4, got 5"),
    ],
)
def test_bad_settings_are_refused(profile, options, message):
    with pytest.raises(ValueError, match=f"plan_adaptive: {message}"):
        plan_adaptive(VECTOR, profile, **options)


def test_a_budget_without_room_for_a_child_is_refused(profile):
    with pytest.raises(ValueError, match="plan_adaptive: max_budget and max_levels must allow a tree of two nodes"):
        plan_adaptive(VECTOR, profile, max_budget=1)
