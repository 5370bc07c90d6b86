"""Acceptance vectors: checks, the product-limit estimate on simulated censored runs, its intervals, files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sequoia_kernels.planner.acceptance import (
    AcceptanceEstimate,
    estimate_acceptance,
    validate_acceptance,
)
from sequoia_kernels.planner.value import tree_values
from sequoia_kernels.tree import TokenTree

TRUTH = np.array([0.508, 0.142, 0.062, 0.036, 0.028, 0.026, 0.020, 0.015])
BUSHY = TokenTree([-1] + [0] * 8 + [1] * 3 + [2] * 2 + [3] + [9] * 2 + [10] + [12])
NARROW = TokenTree([-1, 0, 0, 1, 1, 2, 3, 3, 6])


def simulate(tree: TokenTree, vector: np.ndarray, num_steps: int, generator: np.random.Generator) -> SimpleNamespace:
    """Counts of `num_steps` walks down a tree whose child of rank k is the accepted one with probability vector[k]."""
    children = [tree.children(node) for node in range(tree.num_nodes)]
    visited, accepted = np.zeros(len(vector), int), np.zeros(len(vector), int)
    cumulative = np.cumsum(vector)
    for _ in range(num_steps):
        node = 0
        while children[node]:
            drawn = int(np.searchsorted(cumulative, generator.random(), side="right"))
            num_children = len(children[node])
            visited[: min(drawn + 1, num_children)] += 1
            if drawn >= num_children:  # the accepted rank was not among the children: censored
                break
            accepted[drawn] += 1
            node = children[node][drawn]
    return SimpleNamespace(visited_by_rank=visited.tolist(), accepted_by_rank=accepted.tolist())


# ---- validate_acceptance ----


@pytest.mark.parametrize("vector", [[0.6, 0.2], (1,), np.array([0.5]), torch.tensor([0.5, 0.25]), [0.0, 0.0]])
def test_valid_vectors_come_back_as_float64(vector):
    checked = validate_acceptance(vector)
    assert checked.dtype == np.float64
    assert checked.tolist() == [float(entry) for entry in vector]


def test_the_result_is_a_copy():
    vector = np.array([0.5, 0.1])
    validate_acceptance(vector)[0] = 0
    assert vector[0] == 0.5


def test_a_sum_of_one_up_to_rounding_is_allowed():
    assert validate_acceptance([0.1] * 10).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        ([], ValueError, "at least 1 entry"),
        ([[0.5]], ValueError, "shape"),
        ([0.5, -0.1], ValueError, r"acceptance\[1\] = -0.1"),
        ([0.5, float("nan")], ValueError, "finite"),
        ([float("inf")], ValueError, "finite"),
        ([0.6, 0.5], ValueError, "sum"),
        (["a"], TypeError, "numbers"),
        ("0.5", ValueError, "shape"),
        (None, ValueError, "shape"),
    ],
)
def test_bad_vectors_are_refused_by_name(vector, error, message):
    with pytest.raises(error, match=f"plan_tree: acceptance must .*{message}"):
        validate_acceptance(vector, "plan_tree")


# ---- the estimate ----


def test_product_limit_by_hand():
    estimate = estimate_acceptance(([100, 30, 10], [60, 12, 1]))
    assert estimate.vector == pytest.approx([0.6, 0.4 * 0.4, 0.4 * 0.6 * 0.1])
    assert estimate.hazards == pytest.approx([0.6, 0.4, 0.1])
    assert (estimate.visited, estimate.accepted) == ((100, 30, 10), (60, 12, 1))


def test_censored_runs_on_different_trees_recover_the_truth():
    generator = np.random.default_rng(0)
    runs = [simulate(tree, TRUTH, 20000, generator) for tree in (BUSHY, NARROW, TokenTree.chain(6))]
    estimate = estimate_acceptance(runs, confidence=0.999)
    assert len(estimate) == len(TRUTH)
    assert np.all(np.asarray(estimate.lower) < TRUTH)
    assert np.all(np.asarray(estimate.upper) > TRUTH)
    assert np.abs(np.asarray(estimate.vector) - TRUTH).max() < 0.01
    # the share of acceptances at rank 1 without regard to censoring is far off: half the nodes had one child only
    naive = sum(run.accepted_by_rank[1] for run in runs) / sum(run.visited_by_rank[0] for run in runs)
    assert naive < 0.8 * TRUTH[1]


@pytest.mark.parametrize("num_steps", [40, 400])
def test_intervals_cover_about_as_often_as_they_say(num_steps):
    generator = np.random.default_rng(num_steps)
    truth = tree_values(BUSHY, TRUTH[None])[0]
    num_trials = 200
    covered, tree_covered = np.zeros(3), 0
    for _ in range(num_trials):
        estimate = estimate_acceptance(simulate(BUSHY, TRUTH, num_steps, generator), confidence=0.9)
        covered += [estimate.lower[rank] <= TRUTH[rank] <= estimate.upper[rank] for rank in range(3)]
        lower, upper = estimate.tokens_per_step_interval(BUSHY)
        tree_covered += lower <= truth <= upper
    # 200 trials: a standard deviation of 0.02 around 0.9
    assert np.all(covered / num_trials > 0.82)
    assert np.all(covered / num_trials < 0.98)
    assert 0.82 < tree_covered / num_trials < 0.98


def test_tree_interval_holds_the_estimate_and_narrows_with_counts():
    widths = []
    for scale in (1, 100):
        estimate = estimate_acceptance(([100 * scale, 40 * scale, 15 * scale], [60 * scale, 10 * scale, 0]))
        lower, upper = estimate.tokens_per_step_interval(NARROW)
        assert lower < estimate.tokens_per_step(NARROW) < upper
        widths.append(upper - lower)
    assert widths[1] == pytest.approx(widths[0] / 10, rel=0.1)


def test_tree_value_is_the_trees_own():
    estimate = estimate_acceptance(([100, 30, 10], [60, 12, 1]))
    for tree in (BUSHY, NARROW, TokenTree.chain(5), TokenTree.single()):
        assert estimate.tokens_per_step(tree) == pytest.approx(tree.expected_tokens(estimate.vector))
    assert estimate.tokens_per_step_interval(TokenTree.single()) == (1.0, 1.0)


def test_ranks_never_visited_are_dropped():
    estimate = estimate_acceptance(([100, 30, 0, 0], [70, 30, 0, 0]))
    assert estimate.vector == pytest.approx([0.7, 0.3])
    assert estimate.visited == (100, 30)


def test_a_visited_rank_without_acceptance_is_zero_with_an_upper_end():
    estimate = estimate_acceptance(([50, 20, 20], [30, 0, 5]))
    assert estimate.vector[1] == 0
    assert estimate.lower[1] == 0
    assert 0 < estimate.upper[1] < 0.1


@pytest.mark.parametrize("accepted", [0, 50])
def test_trials_that_all_went_one_way_keep_an_interval(accepted):
    estimate = estimate_acceptance(([50], [accepted]))
    assert estimate.lower[0] <= accepted / 50 <= estimate.upper[0]
    assert estimate.upper[0] - estimate.lower[0] > 0.01
    lower, upper = estimate.tokens_per_step_interval(TokenTree.chain(3))
    assert upper - lower > 0.01


def test_nothing_in_the_estimate_is_random():
    counts = ([100, 40], [60, 10])
    assert estimate_acceptance(counts) == estimate_acceptance(counts)


def test_a_higher_confidence_widens_every_interval():
    counts = ([100, 40], [60, 10])
    narrow, wide = (estimate_acceptance(counts, confidence) for confidence in (0.8, 0.99))
    assert all(left > right for left, right in zip(narrow.lower, wide.lower, strict=True))
    assert all(left < right for left, right in zip(narrow.upper, wide.upper, strict=True))


def test_draws_are_acceptance_vectors():
    estimate = estimate_acceptance(([30, 12, 5], [18, 4, 1]), extrapolate_to=12)
    draws = estimate.draw_vectors(500)
    assert draws.shape == (500, 12)
    assert draws.min() >= 0
    assert draws.sum(axis=1).max() <= 1 + 1e-9


def test_runs_that_differ_more_than_chance_widen_the_intervals():
    generator = np.random.default_rng(3)
    alike = [simulate(NARROW, TRUTH, 200, generator) for _ in range(30)]
    assert estimate_acceptance(alike).dispersion < 1.6
    mixed = []
    for _ in range(30):
        scale = generator.uniform(0.4, 1.4)
        mixed.append(simulate(NARROW, TRUTH * scale, 200, generator))
    estimate = estimate_acceptance(mixed)
    assert estimate.dispersion > 3
    total = estimate_acceptance((estimate.visited, estimate.accepted))
    ratio = (estimate.upper[0] - estimate.lower[0]) / (total.upper[0] - total.lower[0])
    assert ratio == pytest.approx(estimate.dispersion**0.5, rel=0.1)


def test_few_runs_say_nothing_on_dispersion():
    runs = [([100], [20]), ([100], [80])]
    objects = [{"visited_by_rank": visited, "accepted_by_rank": accepted} for visited, accepted in runs]
    assert estimate_acceptance(objects).dispersion == 1


# ---- extrapolation ----


def test_no_tail_unless_asked_for():
    assert len(estimate_acceptance(([1000, 400, 200], [600, 200, 100]))) == 3


def test_a_geometric_tail_continues_a_geometric_vector():
    vector = 0.5 * 0.5 ** np.arange(6)
    visited = [1 << (20 - rank) for rank in range(6)]
    accepted = [count // 2 for count in visited]
    estimate = estimate_acceptance((visited, accepted), extrapolate_to=10)
    assert estimate.num_extrapolated == 4
    assert estimate.vector[:6] == pytest.approx(vector)
    assert estimate.vector[6:] == pytest.approx(0.5 * 0.5 ** np.arange(6, 10), rel=1e-6)
    assert estimate.lower[6:] == (0.0,) * 4
    assert all(upper >= value for upper, value in zip(estimate.upper, estimate.vector, strict=True))


def test_a_tail_takes_no_more_than_is_left():
    estimate = estimate_acceptance(([100, 50, 10], [50, 40, 9]), extrapolate_to=40)
    assert sum(estimate.vector) <= 1 + 1e-12
    validate_acceptance(estimate)


def test_a_tail_needs_two_accepted_ranks():
    assert estimate_acceptance(([100], [50]), extrapolate_to=3).vector[1:] == (0.0, 0.0)


# ---- merging ----


def test_merging_estimates_is_estimating_from_all_counts():
    left = estimate_acceptance(([100, 40], [60, 10]), temperature=0.6)
    right = estimate_acceptance(([50], [20]), temperature=0.6)
    merged = estimate_acceptance([left, right])
    assert (merged.visited, merged.accepted) == ((150, 40), (80, 10))
    assert merged.temperature == 0.6
    assert merged.num_runs == 2


def test_estimates_at_different_temperatures_are_not_mixed_silently():
    left = estimate_acceptance(([100], [60]), temperature=0.0)
    right = estimate_acceptance(([100], [60]), temperature=1.0)
    with pytest.raises(ValueError, match="runs must agree on temperature"):
        estimate_acceptance([left, right])
    assert estimate_acceptance([left, right], temperature=0.5).temperature == 0.5


def test_an_output_with_stats_is_a_run():
    output = SimpleNamespace(stats=SimpleNamespace(visited_by_rank=[10, 3], accepted_by_rank=[7, 1]))
    assert estimate_acceptance(output).visited == (10, 3)
    assert estimate_acceptance([output, output]).visited == (20, 6)


def test_arrays_and_tensors_are_counts():
    assert estimate_acceptance((np.array([10, 3]), torch.tensor([7, 1]))).accepted == (7, 1)


# ---- refusals ----


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        (5, TypeError, "visited_by_rank"),
        ("runs", TypeError, "visited_by_rank"),
        ([], ValueError, "at least one run"),
        ([SimpleNamespace()], TypeError, "visited_by_rank"),
        (([10], [11]), ValueError, "at most visited"),
        (([10, 5], [6, 1]), ValueError, "rejected every child before"),
        (([10, 4], [6]), ValueError, "one count a rank"),
        (([-1], [0]), ValueError, ">= 0"),
        (([2**53 + 1], [0]), ValueError, "<= 2"),
        (([1.5], [1]), TypeError, "integers"),
        (([True], [False]), TypeError, "integers"),
        (([0, 0], [0, 0]), ValueError, "at least once"),
        (([], []), ValueError, "at least once"),
        ((["1"], [1]), TypeError, "integers"),
    ],
)
def test_bad_counts_are_refused(runs, error, message):
    with pytest.raises(error, match=f"estimate_acceptance: .*{message}"):
        estimate_acceptance(runs)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"temperature": -1}, "temperature must be a finite number >= 0, got -1"),
        ({"temperature": float("inf")}, "temperature must be a finite number >= 0, got inf"),
        ({"top_k": 1.5}, "top_k must be an integer >= 0, got 1.5"),
        ({"top_p": 0}, r"top_p must be a number in \(0, 1\], got 0"),
        ({"target": 3}, "target must be a string, got 3"),
    ],
)
def test_bad_settings_are_refused(setting, rule):
    with pytest.raises(ValueError, match=f"estimate_acceptance: {rule}"):
        estimate_acceptance(([10], [5]), **setting)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, float("nan")])
def test_bad_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
        estimate_acceptance(([10], [5]), confidence)


def test_bad_extrapolation_is_refused():
    with pytest.raises(ValueError, match="extrapolate_to must be >= 1"):
        estimate_acceptance(([10], [5]), extrapolate_to=0)
    with pytest.raises(TypeError, match="extrapolate_to must be an integer"):
        estimate_acceptance(([10], [5]), extrapolate_to=2.5)


# ---- files ----


@pytest.fixture
def estimate():
    return estimate_acceptance(
        ([100, 40, 12], [60, 10, 2]),
        0.9,
        temperature=0.6,
        top_k=50,
        top_p=0.9,
        target="big",
        draft="small",
        extrapolate_to=5,
    )


def test_saved_and_loaded_is_the_same(estimate, tmp_path):
    path = tmp_path / "acceptance.json"
    estimate.save(path)
    assert AcceptanceEstimate.load(path) == estimate
    assert [entry.name for entry in tmp_path.iterdir()] == ["acceptance.json"]


def test_json_is_versioned(estimate):
    document = json.loads(estimate.to_json())
    assert (document["format"], document["version"]) == ("sequoia-kernels/acceptance", 1)
    assert AcceptanceEstimate.from_json(estimate.to_json()) == estimate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "sequoia-kernels/tree"}, 'must have "format": "sequoia-kernels/acceptance"'),
        ({"version": 2}, 'must have "version": 1, got 2; upgrade'),
        ({"version": True}, 'must have "version": 1, got true'),
        ({"visited": None}, "visited must be a list"),
        ({"visited": []}, "visited must be a list of positive counts"),
        ({"visited": [100, 40, 0]}, r"visited must be a list of positive counts, got 0 at visited\[2\]"),
        ({"accepted": [60, 10]}, "one count a rank"),
        ({"accepted": [101, 10, 2]}, "at most visited"),
        ({"accepted": [59, 10, 2]}, "vector must follow from"),
        ({"vector": "x"}, "vector must be a list of numbers"),
        ({"confidence": 2}, r"confidence must be a number in \(0, 1\), got 2"),
        ({"confidence": "high"}, "confidence must be a number"),
        ({"dispersion": 0.5}, "dispersion must be a number >= 1"),
        ({"num_runs": 0}, "num_runs must be a positive integer"),
        ({"num_extrapolated": -1}, "num_extrapolated must be an integer >= 0"),
        ({"temperature": "warm"}, 'temperature must be a finite number >= 0 or null, got "warm"'),
        ({"target": 3}, "target must be a string or null, got 3"),
        ({"temperature": -1}, "temperature must be a finite number >= 0 or null, got -1"),
        ({"temperature": 10**400}, "temperature must be a finite number >= 0 or null, got 1000"),
        ({"top_k": -5}, "top_k must be an integer >= 0 or null"),
        ({"top_k": 2.5}, "top_k must be an integer >= 0 or null"),
        ({"top_p": 7}, r"top_p must be a number in \(0, 1\] or null"),
        ({"visited": [10**400, 40, 10]}, r"visited must be a list of positive counts, got 1000"),
        ({"visited": [100.0, 40, 10]}, r"visited must be a list of positive counts, got 100.0 at visited\[0\]"),
        ({"visited": [[100], 40, 10]}, r"visited must be a list of positive counts, got a list of 1"),
        ({"accepted": [60, "10", 2]}, r'accepted must be a list of counts, got "10" at accepted\[1\]'),
        ({"vector": [10**30, 0.1, 0.1]}, "vector must follow from"),
        ({"num_runs": 1.5}, "num_runs must be a positive integer, got 1.5"),
    ],
)
def test_foreign_and_broken_files_are_refused(estimate, change, message, tmp_path):
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps({**json.loads(estimate.to_json()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        AcceptanceEstimate.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"format": NaN}', "[" * 100000])
def test_text_that_is_no_document_is_refused(text):
    with pytest.raises(ValueError, match=r"AcceptanceEstimate\.from_json: the document must"):
        AcceptanceEstimate.from_json(text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        AcceptanceEstimate.load(tmp_path / "file")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        AcceptanceEstimate.load(tmp_path / "none")


def test_a_write_that_fails_leaves_the_old_file(estimate, tmp_path, monkeypatch):
    path = tmp_path / "acceptance.json"
    path.write_text("old")

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        estimate.save(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["acceptance.json"]
