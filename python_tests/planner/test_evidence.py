"""What calls have shown of acceptance: shrunk, discounted by request, fading, and what the first plans make of it."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from support.synthetic_profile import synthetic_profile

from sequoia_kernels.planner import AcceptanceEvidence, CostModel, plan_from_evidence, plan_tree
from sequoia_kernels.planner.evidence import (
    MOST_VISITS,
    PRIOR_HAZARDS,
    PRIOR_VISITS,
    REQUEST_CORRELATION,
    REQUEST_SPREAD,
)
from sequoia_kernels.tree import TokenTree

NODE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# a small pair on one CPU thread: verification of a node takes a good part of a pass
TARGET_MS = (9.5, 10.5, 10.8, 11, 11.5, 12.2, 13.2, 14.5, 15.8, 17.6, 21.5, 25)


@pytest.fixture(scope="module")
def profile():
    times = synthetic_profile(
        lambda nodes, context: float(np.interp(nodes, NODE_COUNTS, TARGET_MS)),
        lambda rows, context: 0.7 + 0.02 * rows,
        node_counts=NODE_COUNTS,
    )
    return times.with_overhead(0.4, 0.1)


def test_without_evidence_it_is_the_prior():
    nothing = AcceptanceEvidence()
    np.testing.assert_allclose(nothing.hazards, PRIOR_HAZARDS)
    np.testing.assert_allclose(nothing.vector[:2], [0.65, 0.35 * 0.3])
    assert nothing.spread == pytest.approx(1 / np.sqrt(PRIOR_VISITS * PRIOR_HAZARDS[0] * (1 - PRIOR_HAZARDS[0])))


def test_a_request_that_accepted_everything_does_not_promise_that():
    weight = 1 / (1 + 59 * REQUEST_CORRELATION)
    lucky = AcceptanceEvidence().with_run([60], [60])
    expected = (60 * weight + PRIOR_VISITS * PRIOR_HAZARDS[0]) / (60 * weight + PRIOR_VISITS)
    assert lucky.vector[0] == pytest.approx(expected)
    assert expected < 0.85
    np.testing.assert_allclose(lucky.hazards[1:], PRIOR_HAZARDS[1:])


def test_one_long_request_tells_less_than_many():
    long = AcceptanceEvidence().with_run([3200], [1600])
    assert long.visited[0] < 1 / REQUEST_CORRELATION
    many = AcceptanceEvidence()
    for _ in range(50):
        many = many.with_run([64], [32])
    assert many.visited[0] == pytest.approx(50 * 64 / (1 + 63 * REQUEST_CORRELATION))
    assert many.num_visits == long.num_visits == 3200
    assert many.spread < long.spread < AcceptanceEvidence().spread


def test_a_batch_counts_as_its_requests():
    together = AcceptanceEvidence().with_run([256, 64], [192, 16], num_requests=4)
    apart = AcceptanceEvidence()
    for _ in range(4):
        apart = apart.with_run([64, 16], [48, 4])
    np.testing.assert_allclose(together.visited, apart.visited)
    np.testing.assert_allclose(together.accepted, apart.accepted)


def test_runs_may_know_more_or_fewer_ranks_and_none_changes_nothing():
    some = AcceptanceEvidence().with_run([10, 5, 2], [5, 3, 0])
    assert some.with_run([], []) is some
    assert some.with_run([0, 0], [0, 0]) is some
    more = some.with_run([10], [5]).with_run([10, 5, 4, 3], [5, 1, 1, 1])
    assert len(more.visited) == len(more.accepted) == 4
    wide = AcceptanceEvidence().with_run(list(range(12, 0, -1)), [1] * 12)
    assert len(wide.hazards) == 12


@pytest.mark.parametrize(
    ("run", "rule"),
    [
        (([10], [11]), "accepted must count at most what visited counts"),
        (([10, 5], [3]), "accepted must count at most"),
        (([10], [-1]), "accepted must count at most"),
        (([float("nan")], [0]), "accepted must count at most"),
        (([float("inf")], [0]), "accepted must count at most"),
        (([10], [5], 0), "num_requests must be at least 1, got 0"),
    ],
)
def test_counts_that_cannot_be_are_refused(run, rule):
    with pytest.raises(ValueError, match=f"AcceptanceEvidence.with_run: {rule}"):
        AcceptanceEvidence().with_run(*run)


def test_counts_may_be_arrays():
    run = np.array([10, 5]), np.array([4, 1])
    assert AcceptanceEvidence().with_run(*run) == AcceptanceEvidence().with_run([10, 5], [4, 1])


def test_what_was_seen_long_ago_fades():
    evidence = AcceptanceEvidence()
    for _ in range(400):
        evidence = evidence.with_run([60], [54])
    assert evidence.visited[0] == pytest.approx(MOST_VISITS)
    assert evidence.vector[0] == pytest.approx(0.9, abs=0.01)
    for _ in range(400):
        evidence = evidence.with_run([60], [12])
    assert evidence.vector[0] == pytest.approx(0.2, abs=0.02)


def test_it_survives_its_document():
    evidence = AcceptanceEvidence().with_run([60, 20], [40, 5])
    key = {"target": "one", "sampling": [[0.0, 0, 1.0]]}
    assert AcceptanceEvidence.from_json(evidence.to_json(key)) == (evidence, key)


# The first plans


def expected_speed(tree, hazard, model, context_len=256):
    """Tokens per millisecond where the first child has this chance and later ones the prior's."""
    hazards = np.array([hazard, *PRIOR_HAZARDS[1:]])
    vector = hazards * np.concatenate(([1.0], np.cumprod(1 - hazards)[:-1]))
    return tree.expected_tokens(vector.tolist()) / model.step_ms(tree, context_len)


def decode(plan, hazard, num_tokens, generator, others=PRIOR_HAZARDS[1:]):
    """Let a follower decode a request whose children have these chances. Gives (follower, milliseconds, counts)."""
    follower = plan.follow()
    hazards = [hazard, *others]
    visited, accepted = np.zeros(8, dtype=int), np.zeros(8, dtype=int)
    tokens = milliseconds = 0
    while tokens < num_tokens:
        tree, node = follower.tree, 0
        tried, taken = [0] * 8, [0] * 8
        milliseconds += next(entry.step_ms for entry in plan.plans if entry.tree == tree)
        while True:
            tokens += 1
            child = None
            for rank in range(tree.num_children[node]):
                tried[rank] += 1
                if generator.random() < hazards[rank]:
                    child = tree.first_child[node] + rank
                    taken[rank] += 1
                    break
            if child is None:
                break
            node = child
        follower.observe(tried, taken)
        visited += tried
        accepted += taken
    return follower, milliseconds, (visited.tolist(), accepted.tolist())


SETTINGS = {"context_len": 256, "temperature": 0.0}


def test_no_first_request_leads_to_a_pick_that_is_slow_for_the_others(profile):
    """Sixteen requests that differ as those of a pair are taken to differ."""
    model = CostModel(profile, temperature=0.0)
    generator = np.random.default_rng(0)
    shifts = [NormalDist(0.5, REQUEST_SPREAD).inv_cdf((place + 0.5) / 16) for place in range(16)]
    hazards = 1 / (1 + np.exp(-np.array(shifts)))  # .35 to .83
    first = plan_from_evidence(AcceptanceEvidence(), profile, **SETTINGS)
    runs = [decode(first, hazard, 128, generator)[2] for hazard in hazards]

    def speed(tree):
        return 1 / np.mean([1 / expected_speed(tree, hazard, model) for hazard in hazards])

    everything = AcceptanceEvidence()
    for run in runs:
        everything = everything.with_run(*run)
    known = plan_from_evidence(everything, profile, **SETTINGS)
    plain, best = speed(TokenTree.single()), speed(known.plans[known.start].tree)
    assert best > 1.3 * plain
    for run in runs:
        plan = plan_from_evidence(AcceptanceEvidence().with_run(*run), profile, **SETTINGS)
        pick = plan.plans[plan.start].tree
        assert speed(pick) > 0.97 * plain
        assert speed(pick) > 0.9 * best


def test_a_lucky_first_request_does_not_lead_to_a_chain_of_thirty(profile):
    lucky = AcceptanceEvidence().with_run([64], [64])
    plan = plan_from_evidence(lucky, profile, **SETTINGS)
    naive = plan_tree([1.0], profile, context_len=256, temperature=0.0)
    assert naive.tree.num_levels > 20
    assert plan.plans[plan.start].tree.num_levels < 9


@pytest.mark.parametrize("hazard", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_the_first_call_itself_is_not_slower_than_plain_decoding(profile, hazard):
    """Twenty first calls of 128 tokens, with nothing known before."""
    generator = np.random.default_rng(1)
    plan = plan_from_evidence(AcceptanceEvidence(), profile, **SETTINGS)
    plain = CostModel(profile, temperature=0.0).step_ms(TokenTree.single(), 256)
    taken = [decode(plan, hazard, 128, generator)[1] for _ in range(20)]
    assert 128 * plain / np.mean(taken) > 0.95


def test_a_follower_grows_with_a_good_draft_and_stops_for_good_with_a_hopeless_one(profile):
    plan = plan_from_evidence(AcceptanceEvidence(), profile, **SETTINGS)
    start = plan.plans[plan.start].tree
    generator = np.random.default_rng(2)
    assert decode(plan, 0.95, 256, generator)[0].tree.num_levels > start.num_levels
    hopeless = decode(plan, 0.02, 128, generator, others=[0.01] * 7)[0]
    assert hopeless.tree == TokenTree.single()
    switches = hopeless.num_switches
    for _ in range(50):
        hopeless.observe([1], [1])
    assert hopeless.tree == TokenTree.single()
    assert hopeless.num_switches == switches


def test_what_looks_slow_is_tried_while_there_is_doubt_and_time():
    slow_draft = synthetic_profile(lambda nodes, context: 10 + 0.3 * nodes, lambda rows, context: 3.5)

    def plan(evidence, explore=True):
        return plan_from_evidence(evidence, slow_draft, explore=explore, **SETTINGS)

    doubtful = AcceptanceEvidence()
    for visits in (40, 40, 30):
        doubtful = doubtful.with_run([visits] * 3, [0] * 3)
    tried = plan(doubtful)
    assert tried.trees[0] == TokenTree.single()
    assert tried.plans[tried.start].step_ms == min(plan.step_ms for plan in tried.plans[1:])
    assert tried.follow().fastest(0.0, tried.spread)[0] == 0
    assert plan(doubtful, explore=False).trees == [TokenTree.single()]
    ruled_out = AcceptanceEvidence()
    for _ in range(60):
        ruled_out = ruled_out.with_run([60] * 8, [0] * 8)
    assert plan(ruled_out).trees == [TokenTree.single()]


def test_the_ladder_narrows_as_evidence_grows(profile):
    def shifts(evidence):
        plan = plan_from_evidence(evidence, profile, **SETTINGS)
        return plan.spread, len(plan.plans)

    nothing, much = AcceptanceEvidence(), AcceptanceEvidence()
    for _ in range(40):
        much = much.with_run([60, 24, 18], [36, 6, 3])
    assert shifts(much)[0] < 0.65 < 0.85 < shifts(nothing)[0]
    assert shifts(much)[1] <= shifts(nothing)[1]
