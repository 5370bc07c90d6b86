"""Recorded steps: the worth of every smaller tree in them, against the verification rules' own numbers."""

from __future__ import annotations

import types

import pytest
import torch
from support.closed_form import closed_form_decisions
from support.tiny_models import noisy_copy, tiny_llama
from support.toy_models import plain_probs

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding import RECORD_TREE, record_steps
from sequoia_kernels.decoding.recording import _Recorder
from sequoia_kernels.ops.verify_tree.op import VerifyTreeInputs
from sequoia_kernels.ops.verify_tree.traversal import traversal_chances
from sequoia_kernels.planner import estimate_acceptance

RECORDED = TokenTree([-1, 0, 0, 0, 1, 1, 1, 2, 4, 4, 5, 8, 8, 11])
WITHIN = [
    TokenTree.chain(2),
    TokenTree.chain(6),
    TokenTree([-1, 0, 0, 0]),
    TokenTree([-1, 0, 0, 1, 1, 2, 3]),
    TokenTree([-1, 0, 0, 0, 1, 1, 4, 5]),
    RECORDED,
]
STEPS, VOCAB = 40, 300


def _steps(spread, temperature, seed=0):
    """Logits of a peaked target and a related draft, and children drawn from the draft."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS, RECORDED.num_nodes, VOCAB)
    target = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    draft = target + torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    tokens = torch.full(shape[:2], -1)
    for node in range(RECORDED.num_nodes):
        children = RECORDED.children(node)
        if children and temperature:
            weights = (draft[:, node] / temperature).softmax(dim=1)
            tokens[:, children] = torch.multinomial(weights, len(children), generator=generator)
        elif children:
            tokens[:, children] = draft[:, node].topk(len(children), dim=1).indices
        else:
            draft[:, node] = torch.nan
    return tokens, target, draft


def _records(tokens, target, draft, temperature, top_k=None, top_p=None):
    recorder = _Recorder(RECORDED)
    warps = [[temperature], None if top_k is None else [top_k], None if top_p is None else [top_p]]
    for index in range(STEPS):
        recorder.begin(index // 4, *warps, torch.device("cpu"))
        one = slice(index, index + 1)
        recorder(types.SimpleNamespace(tokens=tokens[one], draft_logits=draft[one]), target[one])
    return recorder.records(estimate_acceptance(([9, 3], [6, 1]), temperature=temperature))


def _subtree(tree):
    """The recorded nodes that stand for a tree's."""
    places = [0]
    for node, parent in enumerate(tree.parents[1:], start=1):
        places.append(RECORDED.first_child[places[parent]] + node - tree.first_child[parent])
    return places


def _walked(tree, tokens, target, draft, warp):
    """Expected tokens by the rule from the root, step by step from its closed form. [S]."""
    totals = []
    for step in range(len(tokens)):
        reached = [1.0] + [0.0] * (tree.num_nodes - 1)
        for node in range(tree.num_nodes):
            children = tree.children(node)
            probs = plain_probs(target[step, node, None], *warp)[0]
            drafted = tokens[step, children].tolist()
            if warp[0] == 0:
                chances = [float(probs[token]) for token in drafted]
            else:
                chances, _ = closed_form_decisions(probs, draft[step, node], drafted, warp[0])
            left = reached[node]
            for child, chance in zip(children, chances):
                reached[child] = left * chance
                left *= 1 - chance
        totals.append(sum(reached))
    return torch.tensor(totals, dtype=torch.float64)


def _traversed(tree, tokens, target, draft, warp):
    """Expected tokens by the rule from the leaves, from the reference's chances. [S]."""
    shape, rows = tree.tensors(), len(tokens)
    warps = [
        None if value is None else torch.full((rows,), value, dtype=dtype)
        for value, dtype in zip(warp, (torch.float32, torch.int32, torch.float32))
    ]
    zeros = torch.zeros(rows, dtype=torch.int64)
    chances = traversal_chances(
        VerifyTreeInputs(
            tokens, target, draft, shape.first_child, shape.num_children, shape.num_levels, shape.max_branching,
            warps[0], zeros, zeros, *warps[1:], "traversal",
        )
    )  # fmt: skip
    order = chances.turn.argsort(dim=1)
    chance = chances.chance.gather(1, order)
    failed = torch.cat((torch.ones(rows, 1, dtype=torch.float64), (1 - chance).cumprod(dim=1)[:, :-1]), dim=1)
    depths = torch.tensor(tree.depths)[order] + 1
    return (chance * failed * depths).sum(dim=1)


def _assert_near(values, expected):
    """Equal but for the cubics between ratios: single tokens make corners there, which a mean levels out."""
    torch.testing.assert_close(values, expected, rtol=0, atol=0.02)
    assert abs(float((values - expected).mean())) < 1e-3


WARPS = [(0.6, None, None), (1.0, None, None), (1.0, 20, None), (0.8, None, 0.8), (0.0, None, None)]


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_every_tree_within_has_its_expected_tokens(spread, warp):
    steps = _steps(spread, warp[0])
    records = _records(*steps, *warp)
    for tree in WITHIN:
        places = _subtree(tree)
        own = [part[:, places] for part in steps]
        values = torch.from_numpy(records.values(tree, "sequoia"))
        expected = _walked(tree, *own, warp)
        _assert_near(values, expected)
        traversed = torch.from_numpy(records.values(tree, "traversal"))
        expected = _traversed(tree, *own, warp) if warp[0] else expected
        _assert_near(traversed, expected)
        assert float((traversed - values).mean()) >= -1e-6  # never less in the mean
    assert records.tokens_per_step(RECORDED, "sequoia") == pytest.approx(sum(records.node_worths))


@pytest.fixture(scope="module")
def recorded():
    target = tiny_llama(3, vocab_size=24, sharpness=6.0)
    draft = noisy_copy(target, 0.3)
    prompts = [torch.randint(0, 24, (1, 8), generator=torch.Generator().manual_seed(n)) for n in range(12)]
    return target, draft, prompts, record_steps(target, draft, prompts, temperature=1.0, max_new_tokens=48, seed=3)


def test_recording_leaves_the_output_as_it_is(recorded):
    target, draft, prompts, records = recorded
    runs = [
        generate(target, draft, ids, tree=RECORD_TREE, temperature=1.0, max_new_tokens=48, seed=3 + n, eos_token_id=(),
                 rule="sequoia").stats
        for n, ids in enumerate(prompts)
    ]  # fmt: skip
    assert len(records) == sum(run.num_steps for run in runs)
    assert records.acceptance == estimate_acceptance(runs, temperature=1.0)
    assert records.requests.tolist() == [n for n, run in enumerate(runs) for _ in range(run.num_steps)]


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_what_is_foretold_is_measured(recorded, rule):
    """On other prompts, within what the intervals say of both."""
    target, draft, _, records = recorded
    tree = TokenTree([-1, 0, 0, 1, 1, 3, 5])
    lower, upper = records.tokens_per_step_interval(tree, rule)
    assert lower < records.tokens_per_step(tree, rule) < upper
    prompts = torch.randint(0, 24, (64, 8), generator=torch.Generator().manual_seed(99))
    stats = generate(
        target, draft, prompts, tree=tree, temperature=1.0, max_new_tokens=64, eos_token_id=(), rule=rule
    ).stats
    assert abs(stats.tokens_per_step - records.tokens_per_step(tree, rule)) < 1.5 * (upper - lower)


def test_trees_that_were_not_recorded_are_refused(recorded):
    records = recorded[3]
    tree = TokenTree.kary(9, 2)
    assert not records.holds(tree) and records.holds(RECORD_TREE)
    with pytest.raises(ValueError, match=r"^StepRecords: tree must lie within the recorded tree, got one of 10 nodes"):
        records.values(tree)
    with pytest.raises(ValueError, match=r"^StepRecords.values: rule must be one of sequoia, traversal, got 'other'"):
        records.values(TokenTree.chain(3), "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be at least one"),
        ({"tree": TokenTree.single()}, "tree must have 2 to 1024 nodes, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(recorded, changes, message):
    target, draft, prompts, _ = recorded
    with pytest.raises(ValueError, match=f"^record_steps: {message}"):
        record_steps(**{"target": target, "draft": draft, "prompts": prompts} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": torch.ones(1, 3).long()}, "prompts must be a sequence of tensors, got Tensor"),
        ({"tree": "auto"}, "tree must be a TokenTree, got str"),
    ],
)
def test_arguments_of_wrong_types_are_refused(recorded, changes, message):
    target, draft, prompts, _ = recorded
    with pytest.raises(TypeError, match=f"^record_steps: {message}"):
        record_steps(**{"target": target, "draft": draft, "prompts": prompts} | changes)
