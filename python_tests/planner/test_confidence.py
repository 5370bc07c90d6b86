"""Confidence fitted to recorded steps, and the widths of the trees that are shaped by it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding import record_steps
from sequoia_kernels.planner import StepRecords, estimate_acceptance, fit_confidence, shape_tree
from sequoia_kernels.planner.confidence import LEAST_CONFIDENCE, PSEUDO_VISITS
from sequoia_kernels.planner.step_records import EXCESS_RATIOS, NodeRecords
from sequoia_kernels.tree import Confidence

# The root has three children, its first child two
TREE = TokenTree([-1, 0, 0, 0, 1, 1])
MODELS = tiny_llama(3, vocab_size=24, sharpness=6.0)
DRAFT = noisy_copy(MODELS, 0.4)


@pytest.fixture(scope="module")
def recorded() -> StepRecords:
    prompts = [torch.randint(24, (1, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    return record_steps(MODELS, DRAFT, prompts, max_new_tokens=40, temperature=0.7)


def greedy_records(accepted: np.ndarray, likelihood: np.ndarray, peak: np.ndarray) -> StepRecords:
    """Records at temperature 0 in which these children are the target's. accepted: [S, N] of 0 and 1."""
    steps, nodes = accepted.shape
    excess = np.zeros((steps, 2, len(EXCESS_RATIOS)), dtype=np.float32)
    parts = [part.astype(np.float32) for part in (accepted, likelihood)]
    of_draft = [part.astype(np.float32) for part in (likelihood, peak)]
    stats = generate(MODELS, DRAFT, torch.tensor([[1, 2, 3]]), tree=TREE, max_new_tokens=4).stats
    acceptance = estimate_acceptance([stats], temperature=0.0)
    assert nodes == TREE.num_nodes
    return StepRecords(
        TREE, NodeRecords(*parts, excess, excess, *of_draft), np.zeros(steps, dtype=np.int64), acceptance
    )


def test_confidence_is_accepted_over_visited_by_bin():
    steps = 4000
    generator = np.random.Generator(np.random.PCG64(0))
    likelihood = generator.choice([0.05, 0.55, 0.97], size=(steps, TREE.num_nodes))
    peak = generator.choice([0.25, 0.995], size=(steps, 2))
    # The first child of a node is the target's with its own probability of the draft, halved where the peak is low.
    accepted = np.zeros((steps, TREE.num_nodes))
    for place, node in enumerate((0, 1)):
        child = TREE.first_child[node]
        chance = likelihood[:, child] * np.where(peak[:, place] < 0.5, 0.5, 1)
        accepted[:, child] = generator.random(steps) < chance
    confidence = fit_confidence(greedy_records(accepted, likelihood, peak))
    assert confidence.max_children == 3
    for probability in (0.05, 0.55, 0.97):
        fitted = confidence.drawn[0][Confidence.bin_of(probability)]
        assert fitted == pytest.approx(0.75 * probability, abs=0.03)
    sure, unsure = (confidence.undrawn[0][Confidence.bin_of(p)] for p in (0.995, 0.25))
    mean = (0.05 + 0.55 + 0.97) / 3
    assert sure == pytest.approx(mean, abs=0.03)
    assert unsure == pytest.approx(mean / 2, abs=0.03)
    # nothing of rank 1 or 2 was ever accepted
    assert max(confidence.undrawn[1]) < 0.01


def test_noise_that_a_head_foretells_is_left_aside():
    """A constant peak has one bin and noise has all: in the steps that it was counted in, noise seems to tell more."""
    chosen = 0
    for seed in range(20):
        generator = np.random.Generator(np.random.PCG64(seed))
        likelihood, peak = np.full((40, TREE.num_nodes), 0.55), np.full((40, 2), 0.5)
        accepted = np.zeros((40, TREE.num_nodes))
        for node in (0, 1):
            accepted[:, TREE.first_child[node]] = generator.random(40) < 0.5
        noise = generator.uniform(size=(40, 2)).astype(np.float32)
        chosen += fit_confidence(
            dataclasses.replace(greedy_records(accepted, likelihood, peak), foretold=noise)
        ).foretold
    assert chosen <= 6


@pytest.mark.parametrize("knows", [True, False])
def test_children_go_by_what_is_foretold_where_that_tells_more(knows, tmp_path):
    steps = 2000
    generator = np.random.Generator(np.random.PCG64(0))
    likelihood, peak = np.full((steps, TREE.num_nodes), 0.55), generator.uniform(size=(steps, 2))
    foretold = generator.uniform(size=(steps, 2))
    accepted = np.zeros((steps, TREE.num_nodes))
    for place, node in enumerate((0, 1)):
        accepted[:, TREE.first_child[node]] = generator.random(steps) < (foretold if knows else peak)[:, place]
    records = dataclasses.replace(greedy_records(accepted, likelihood, peak), foretold=foretold.astype(np.float32))
    confidence = fit_confidence(records)
    assert confidence.foretold is knows
    for probability in (0.25, 0.85):
        fitted = confidence.undrawn[0][Confidence.bin_of(probability)]
        assert fitted == pytest.approx(probability, abs=0.06)
    assert records.said(confidence) is (records.foretold if knows else records.nodes.peak)
    without = dataclasses.replace(records, foretold=None)
    assert not fit_confidence(without).foretold and without.said(confidence) is records.nodes.peak
    tree = shape_tree(records, 4)
    assert tree.confidence == confidence
    records.save(tmp_path / "steps.npz")
    loaded = StepRecords.load(tmp_path / "steps.npz")
    np.testing.assert_array_equal(loaded.foretold, records.foretold)
    half = loaded.part(np.arange(0, steps, 2))
    np.testing.assert_array_equal(half.foretold, records.foretold[::2])
    without.save(tmp_path / "steps.npz")
    assert StepRecords.load(tmp_path / "steps.npz").foretold is None
    dataclasses.replace(records, foretold=records.foretold[:, :1]).save(tmp_path / "steps.npz")
    with pytest.raises(ValueError, match=r"foretold must be \[2000, 2\] float32, got \[2000, 1\] float32"):
        StepRecords.load(tmp_path / "steps.npz")


def test_nodes_count_by_how_often_they_are_reached():
    accepted = np.zeros((2, TREE.num_nodes))
    accepted[0, [1, 4]] = 1  # accepted along the first children
    accepted[1, 5] = 1  # below a node that was not reached: not to be counted
    likelihood = np.full((2, TREE.num_nodes), 0.55)
    confidence = fit_confidence(greedy_records(accepted, likelihood, np.full((2, 2), 0.55)))
    # Visits of a first child: the root's twice, and node 1's once; accepted: once each.
    near = (2 + LEAST_CONFIDENCE / 2) / (3 + LEAST_CONFIDENCE)
    expected = (2 + PSEUDO_VISITS * near) / (3 + PSEUDO_VISITS)
    assert confidence.drawn[0][Confidence.bin_of(0.55)] == pytest.approx(expected, rel=1e-6)
    assert confidence.drawn[1][Confidence.bin_of(0.55)] < 0.01


@pytest.mark.parametrize("nodes", [2, 3, 8, 20, 50, 98])
def test_widths_add_up(recorded, nodes):
    tree = shape_tree(recorded, nodes)
    assert tree.num_nodes == nodes
    assert tree.confidence == fit_confidence(recorded)
    assert tree.even().widths == list(tree.widths)


def test_more_nodes_make_no_level_much_narrower(recorded):
    small, large = (shape_tree(recorded, nodes).widths for nodes in (8, 40))
    assert len(large) >= len(small)
    assert all(wide >= narrow for wide, narrow in zip(large, small))


def test_a_shaped_tree_decodes_greedily_as_plain(recorded):
    prompt = torch.randint(24, (2, 9), generator=torch.Generator().manual_seed(9))
    plain = generate(MODELS, None, prompt, max_new_tokens=40)
    output = generate(MODELS, DRAFT, prompt, tree=shape_tree(recorded, 12), max_new_tokens=40)
    assert output.new_tokens == plain.new_tokens


@pytest.mark.parametrize(
    ("nodes", "error", "message"),
    [
        (1, ValueError, "shape_tree: num_nodes must be"),
        (99, ValueError, "shape_tree: num_nodes must be at most the 98 nodes recorded, got 99"),
        (8.0, TypeError, "shape_tree: num_nodes must be"),
        (True, TypeError, "shape_tree: num_nodes must be"),
    ],
)
def test_sizes_that_cannot_be_are_refused(recorded, nodes, error, message):
    with pytest.raises(error, match=message):
        shape_tree(recorded, nodes)


def test_records_without_a_visit_still_give_a_confidence(recorded):
    nothing = NodeRecords(*(np.zeros_like(part[:1]) for part in recorded.nodes))
    records = dataclasses.replace(recorded, nodes=nothing, requests=recorded.requests[:1])
    confidence = fit_confidence(records)
    assert all(0 < entry <= 1 for table in (confidence.drawn, confidence.undrawn) for row in table for entry in row)
    assert shape_tree(records, 8).num_nodes == 8
