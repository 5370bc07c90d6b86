"""Shaped trees in recorded steps: what they take there, what they are worth, and when a plan chooses one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.shaped_trees import steep_confidence
from support.synthetic_profile import synthetic_profile
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, TreePlan, generate, plan_tree
from sequoia_kernels.decoding import record_steps
from sequoia_kernels.decoding.recording import _Recorder
from sequoia_kernels.drafts import TokenBuffers
from sequoia_kernels.drafts.shaping import LevelShape, ShapedReach, shaped_topology
from sequoia_kernels.planner import StepRecords, estimate_acceptance, fit_confidence, plan_adaptive, shape_tree
from sequoia_kernels.planner.confidence import held_out_values
from sequoia_kernels.planner.cost_model import CostModel, StepShape
from sequoia_kernels.planner.shaped_steps import nodes_given_out
from sequoia_kernels.planner.step_records import EXCESS_RATIOS, NodeRecords
from sequoia_kernels.tree import ShapedTree

FULL = TokenTree.kary(3, 4)
SHAPED = ShapedTree([1, 2, 3, 4], steep_confidence())
STEPS, VOCAB = 60, 12


def _steps(temperature):
    """Logits of a target and a draft, and children of every node drawn from the draft; a few could not be drawn."""
    generator = torch.Generator().manual_seed(4)
    shape = (STEPS, FULL.num_nodes, VOCAB)
    draft = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    target = draft + torch.randn(shape, generator=generator, dtype=torch.float64)
    tokens = torch.full(shape[:2], -1)
    for node in range(FULL.num_nodes):
        if children := FULL.children(node):
            weights = (draft[:, node] / (temperature or 1)).softmax(dim=1)
            drawn = torch.multinomial(weights, len(children), generator=generator)
            tokens[:, children] = drawn if temperature else draft[:, node].topk(len(children), dim=1).indices
    tokens[::7, FULL.children(1)[2]] = -1
    return tokens, target, draft


def _recorded(temperature, foretold=None):
    tokens, target, draft = _steps(temperature)
    recorder = _Recorder(FULL)
    for step in range(STEPS):
        recorder.begin(step // 5, [temperature], None, None, torch.device("cpu"))
        one = slice(step, step + 1)
        buffers = TokenBuffers(tokens[one], draft[one], foretold=None if foretold is None else foretold[one])
        recorder(buffers, target[one])
    return recorder.records(estimate_acceptance(([9, 3, 2], [6, 1, 1]), temperature=temperature)), tokens, draft


def _taken(tokens, draft, temperature, tree=SHAPED, foretold=None):
    """The nodes of one step, given out by what decodes."""
    topology, shared = shaped_topology(tree, 1, "cpu"), ShapedReach(tree, 1, "cpu")
    temperatures = torch.tensor([temperature])
    own_tokens = torch.full((1, tree.num_nodes), -1)
    said = torch.full((1, tree.num_nodes), torch.nan)
    stands_for = [0]  # the recorded node behind each
    for level in range(tree.num_levels - 1):
        above = [stands_for[node] for node in tree.level_nodes(level)]
        logits = draft[None, above].float()
        places = torch.zeros(1, tree.widths[level + 1], dtype=torch.int64)
        shape = LevelShape(tree, level, topology, shared, places, None)
        if foretold is not None:
            said[0, list(tree.level_nodes(level))] = foretold[above]
        shape.give_out(logits, temperatures, foretold=said if foretold is not None else None)
        for place in places[0].tolist():
            parent, rank = divmod(place, shape.max_children)
            stands_for.append(FULL.first_child[above[parent]] + rank)
            own_tokens[0, len(stands_for) - 1] = tokens[stands_for[-1]]
        shape.note_draws(logits, temperatures, own_tokens)
    return stands_for


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_recorded_steps_give_out_the_same_children(temperature):
    records, tokens, draft = _recorded(temperature)
    taken = nodes_given_out(SHAPED, FULL, records.nodes.likelihood, records.nodes.peak)
    shapes = set()
    for step in range(STEPS):
        expected = sorted(_taken(tokens[step], draft[step], temperature))
        assert np.flatnonzero(taken[step]).tolist() == expected
        shapes.add(tuple(expected))
    assert len(shapes) > 4  # they do vary


def test_recorded_steps_give_out_what_a_head_foretold():
    foretold = torch.rand(STEPS, FULL.num_nodes, generator=torch.Generator().manual_seed(5))
    records, tokens, draft = _recorded(0.7, foretold)
    by_head = ShapedTree(SHAPED.widths, dataclasses.replace(SHAPED.confidence, foretold=True))
    assert records.said(SHAPED.confidence) is records.nodes.peak
    taken = nodes_given_out(by_head, FULL, records.nodes.likelihood, records.said(by_head.confidence))
    for step in range(STEPS):
        expected = _taken(tokens[step], draft[step], 0.7, by_head, foretold[step])
        assert np.flatnonzero(taken[step]).tolist() == sorted(expected)
    assert not np.array_equal(records.values(by_head), records.values(SHAPED))
    # Where nothing was foretold, the probability of the likeliest token takes its place.
    without, _, _ = _recorded(0.7)
    np.testing.assert_array_equal(without.values(by_head), without.values(SHAPED))


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_is_worth_what_its_shape_is(temperature, rule):
    records, _, _ = _recorded(temperature)
    values = records.values(SHAPED, rule)
    taken = nodes_given_out(SHAPED, FULL, records.nodes.likelihood, records.nodes.peak)
    for step in range(STEPS):
        nodes = np.flatnonzero(taken[step]).tolist()
        own = TokenTree([-1, *(nodes.index(FULL.parents[node]) for node in nodes[1:])])
        assert records.nodes_of(own) == nodes
        assert values[step] == pytest.approx(records.part(np.array([step])).values(own, rule)[0], rel=1e-12)
    assert records.tokens_per_step(SHAPED, rule) == pytest.approx(values.mean())


def test_children_that_were_not_recorded_are_nobody():
    records, _, _ = _recorded(0.7)
    wide = ShapedTree([1, 5, 3, 2, 2], steep_confidence(5))
    taken = nodes_given_out(wide, FULL, records.nodes.likelihood, records.nodes.peak)
    assert (taken[:, FULL.level_nodes(1)].sum(axis=1) == 3).all()  # of five that it would have
    assert 1 < records.tokens_per_step(wide) < 4


MODELS = tiny_llama(3, vocab_size=24, sharpness=6.0)
DRAFT = noisy_copy(MODELS, 0.4)


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_what_is_foretold_of_a_shaped_tree_is_measured(rule):
    prompts = [torch.randint(24, (1, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    records = record_steps(MODELS, DRAFT, prompts, max_new_tokens=48, temperature=0.7)
    tree = shape_tree(records, 9)
    values = held_out_values(records, tree, rule)
    lower, upper = records.interval_of(values)
    assert lower < records.mean_of(values) < upper
    others = torch.randint(24, (64, 9), generator=torch.Generator().manual_seed(99))
    stats = generate(
        MODELS, DRAFT, others, tree=tree, temperature=0.7, max_new_tokens=64, eos_token_id=(), rule=rule
    ).stats
    assert abs(stats.tokens_per_step - records.mean_of(values)) < 1.5 * (upper - lower)


def test_confidence_is_that_of_other_requests():
    records, _, _ = _recorded(0.7)
    values = held_out_values(records, SHAPED, "traversal")
    odd = records.requests % 2 == 1
    for half in (odd, ~odd):
        own, others = records.part(np.flatnonzero(half)), records.part(np.flatnonzero(~half))
        expected = own.values(ShapedTree(SHAPED.widths, fit_confidence(others)), "traversal")
        assert np.array_equal(values[half], expected)
    alone = dataclasses.replace(records, requests=np.zeros(STEPS, dtype=np.int64))
    assert len(held_out_values(alone, SHAPED, "sequoia")) == STEPS  # of one request: by halves of its steps


# Plans

# Three children of the root, and a path below each
COMB = TokenTree([-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])


def _two_kinds(tells: bool) -> StepRecords:
    """Greedy steps that accept one of the three paths; the draft tells which, once their first tokens are drawn."""
    generator = np.random.Generator(np.random.PCG64(1))
    steps = 600
    path = generator.integers(3, size=steps)
    target = np.zeros((steps, COMB.num_nodes), dtype=np.float32)
    for level in range(4):
        target[np.arange(steps), 1 + 3 * level + path] = 1
    told = path if tells else generator.integers(3, size=steps)
    internal = sum(map(bool, COMB.num_children))
    peak = np.full((steps, internal), 0.55, dtype=np.float32)
    likelihood = np.full((steps, COMB.num_nodes), 0.05, dtype=np.float32)
    likelihood[np.arange(steps), 1 + told] = 0.55
    likelihood[:, 0] = 0
    excess = np.zeros((steps, internal, len(EXCESS_RATIOS)), dtype=np.float32)
    nodes = NodeRecords(target, likelihood, excess, excess, likelihood, peak)
    acceptance = estimate_acceptance(([2400, 400, 200], [2000, 200, 200]), temperature=0.0)
    return StepRecords(COMB, nodes, np.arange(steps) // 10, acceptance)


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile(lambda nodes, context: 10.0 + 0.5 * nodes, lambda nodes, context: 0.05)


def test_a_plan_takes_a_shaped_tree_where_that_is_faster(profile):
    records = _two_kinds(tells=True)
    plan = plan_tree(records, profile, max_budget=7)
    assert plan.kind == "shaped tree" and isinstance(plan.tree, ShapedTree)
    fixed = plan_tree(records, profile, max_budget=7, shaped=False)
    assert isinstance(fixed.tree, TokenTree) and fixed.speedup < plan.speedup
    assert fixed.tree in [candidate.tree for candidate in plan.candidates]
    assert plan.tree in [candidate.tree for candidate in plan.candidates]
    assert "shaped tree" not in {candidate.kind for candidate in fixed.candidates}
    lower, upper = plan.tokens_per_step_interval
    assert lower <= plan.tokens_per_step <= upper
    assert plan.describe().startswith("Speculate with a shaped tree of 7 nodes")
    assert TreePlan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="TreePlan: tree must be a TokenTree, got ShapedTree"):
        _ = plan.token_tree


def test_a_plan_keeps_to_token_trees_where_the_draft_does_not_tell(profile):
    plan = plan_tree(_two_kinds(tells=False), profile, max_budget=7)
    assert isinstance(plan.tree, TokenTree)


def test_shaped_trees_are_not_weighed_on_other_devices(profile):
    other = dataclasses.replace(profile, device=dataclasses.replace(profile.device, type="cuda"))
    records = _two_kinds(tells=True)
    assert "shaped tree" not in {candidate.kind for candidate in plan_tree(records, other, max_budget=7).candidates}
    assert plan_tree(records, other, max_budget=7, shaped=True).kind == "shaped tree"
    with pytest.raises(TypeError, match="plan_tree: shaped must be a bool or None, got int"):
        plan_tree(records, profile, shaped=1)


def test_a_shaped_tree_that_would_be_too_deep_is_no_candidate(profile):
    plan = plan_tree(_two_kinds(tells=True), profile, max_budget=7, max_levels=3)
    assert all(candidate.tree.num_levels <= 3 for candidate in plan.candidates)


def test_the_cost_of_giving_out_is_counted(profile):
    model = CostModel(profile)
    shape = StepShape.of(SHAPED)
    assert shape == StepShape(10, (1, 2, 3), (2, 3, 3), True)
    own, fixed = (model.stages(entry, 200) for entry in (shape, dataclasses.replace(shape, is_shaped=False)))
    looks = sum(float(model.sample_ms(width, 1)) for width in (1, 2, 3))
    assert own["sample"] == pytest.approx(fixed["sample"] + looks)
    assert own == model.stages(SHAPED, 200) and {**own, "sample": 0} == {**fixed, "sample": 0}


def test_generate_takes_such_a_plan_and_adaptive_plans_none():
    prompts = [torch.randint(24, (1, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    records = _two_kinds(tells=True)
    profile = synthetic_profile(lambda nodes, context: 10.0, lambda nodes, context: 0.05)
    plan = plan_tree(records, profile, max_budget=7)
    output = generate(MODELS, DRAFT, prompts[0], tree=plan, max_new_tokens=24)
    assert output.new_tokens == generate(MODELS, None, prompts[0], max_new_tokens=24).new_tokens
    assert output.stats.tree == plan.tree
    ladder = plan_adaptive(records.acceptance, profile)
    assert all(isinstance(tree, TokenTree) for tree in ladder.trees)
