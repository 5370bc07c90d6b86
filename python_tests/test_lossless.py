"""Losslessness: speculative decoding emits exactly the target's distribution of token sequences.

Two kinds of proof. Exact: on tiny vocabularies every tree that the draft can draw and every way to accept it is summed
over in float64, and the joint distribution of several tokens must be the target's chain of conditionals to 1e-12.
Statistical: the real ops with their real noise, thousands of requests a batch, several steps, chi-square on the joint
counts. Joint, since a verifier can get every single token's distribution right and the sequence wrong. Verifiers broken
on purpose must fail both, or the tests would prove nothing.
"""

from __future__ import annotations

import itertools
import random
import sys

import pytest
import torch
from support.chi_square import joint_probs, p_value, sequence_counts
from support.closed_form import closed_form_decisions
from support.enumeration import emitted_distribution, ordered_draws
from support.op_backends import OpBackend, op_backends
from support.speculative_steps import decode, grow
from support.toy_models import KINDS, chain_probs, plain_probs, toy_pair

from sequoia_kernels import TokenTree
from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.ops.verify_tree import traversal
from sequoia_kernels.ops.verify_tree.reference import NodeDecisions, node_decisions
from sequoia_kernels.ops.verify_tree.residuals import draft_left, residual_left
from sequoia_kernels.ops.warping import warped_probs
from sequoia_kernels.rng import DRAFT_TAG

# (temperature, top_k, top_p)
WARPS = [
    (0.0, None, None),
    (0.1, None, None),
    (0.3, 2, None),
    (0.6, None, 0.8),
    (1.0, None, None),
    (1.0, 1, None),
    (1.0, 2, 0.6),
    (1.0, None, 0.5),
    (1.7, 3, 0.95),
]
TREES = {
    "single": [-1],
    "chain": [-1, 0, 1, 2],
    "star": [-1, 0, 0, 0],
    "binary": [-1, 0, 0, 1, 1, 2],
    "uneven": [-1, 0, 0, 0, 1, 4],
    "wider than the vocabulary": [-1, 0, 0, 0, 0, 0, 1],
}

PLAIN = OpBackend("verify_tree", "reference", "cpu")
REFERENCE = sys.modules["sequoia_kernels.ops.verify_tree.reference"]


@pytest.fixture(params=["sequoia", "traversal"])
def rule(request):
    return request.param


def _exact_error(parents, kind, vocab, warp, seed=0, dtype=torch.float64, rule="sequoia"):
    tree = TokenTree(parents)
    target, draft = toy_pair(kind, vocab, context=3, seed=seed)
    emitted = emitted_distribution(tree, target, draft, 1 % vocab, *warp, dtype=dtype, rule=rule)
    expected = joint_probs(chain_probs(target, 1 % vocab, tree.num_levels, *warp))
    assert emitted.shape == expected.shape
    return float((emitted - expected).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", TREES)
def test_whole_trees_are_exact(tree, kind, rule):
    for warp, vocab in itertools.product(WARPS, (2, 3)):
        error = _exact_error(TREES[tree], kind, vocab, warp, rule=rule)
        assert error <= 1e-12, (warp, vocab, error)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_trees_are_exact_with_four_tokens(kind, rule):
    for warp in WARPS[3:6]:
        error = _exact_error([-1, 0, 0, 1, 1], kind, 4, warp, rule=rule)
        assert error <= 1e-12, (warp, error)


def test_random_trees_are_exact(rule):
    rng = random.Random(0)
    for seed in range(40):
        parents = [-1, *sorted(rng.randrange(node) for node in range(1, rng.randint(2, 6)))]
        error = _exact_error(parents, rng.choice(KINDS), rng.choice((2, 3)), rng.choice(WARPS), seed, rule=rule)
        assert error <= 1e-12, (seed, parents, error)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_arithmetic_moves_no_probability_by_more_than_its_rounding(kind, rule):
    # Errors up to 1.0e-7 were measured, as large as those of the float32 softmax itself.
    for tree, warp in itertools.product(("star", "uneven"), WARPS):
        error = _exact_error(TREES[tree], kind, 3, warp, dtype=torch.float32, rule=rule)
        assert error <= 3e-7, (tree, warp, error)


@pytest.mark.parametrize("temperature", [1e-5, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_temperatures_are_exact(temperature, dtype, rule):
    # Logits that differ in their last places only, in the draft also far below its peak: there the enumeration itself
    # has exponents of 8e6, which are 1e-9 apart in float64.
    for tree in ("star", "binary"):
        error = _exact_error(TREES[tree], "close", 3, (temperature, None, None), dtype=dtype, rule=rule)
        assert error <= (3e-7 if dtype == torch.float32 else 1e-10), (tree, error)


def test_a_vocabulary_of_one_token_is_exact(rule):
    assert _exact_error([-1, 0, 0, 1], "unrelated", 1, (1.0, None, None), rule=rule) == 0.0


def test_every_branch_of_the_decision_emits_only_what_the_target_can_emit():
    # Unreachable corners included: whatever the draws, the residual is a distribution inside the target's support.
    generator = torch.Generator().manual_seed(0)
    for kind, warp in itertools.product(KINDS, WARPS):
        target, draft = toy_pair(kind, 5, 1, seed=3)
        rows = torch.randint(5, (200,), generator=generator)
        children = torch.randint(-1, 5, (200, 6), generator=generator)  # repeats, gaps, impossible tokens
        temperature = torch.full((200,), warp[0])
        per_row = [None if value is None else torch.full((200,), value) for value in warp[1:]]
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            probs = warped_probs(target.table[rows].to(dtype), temperature, *per_row)
            decisions = node_decisions(probs, draft.table[rows].to(dtype), children, temperature)
            for numbers in decisions:
                assert bool(torch.isfinite(numbers).all()) and bool((numbers >= 0).all())
            assert bool((decisions.residual[probs == 0] == 0).all())
            torch.testing.assert_close(
                decisions.residual.sum(dim=1), torch.ones(200, dtype=dtype), rtol=0, atol=tolerance
            )
            acceptance = decisions.acceptance()
            of_child = probs.gather(1, children.clamp(min=0)).masked_fill(children < 0, 0)
            assert bool((acceptance[of_child == 0] == 0).all())


def test_two_scalars_a_node_give_the_same_decisions():
    generator = torch.Generator().manual_seed(1)
    for trial in range(300):
        vocab = int(torch.randint(2, 9, (1,), generator=generator))
        kind = KINDS[trial % len(KINDS)]
        temperature, top_k, top_p = WARPS[1 + trial % (len(WARPS) - 1)]
        target, draft = toy_pair(kind, vocab, 1, seed=trial)
        logits = draft.table[:1]
        order = torch.randperm(vocab, generator=generator)
        children = [int(token) if logits[0, token] > -torch.inf else -1 for token in order][: vocab - trial % 2]
        target_probs = plain_probs(target.table[:1], temperature, top_k, top_p)
        temperatures = torch.tensor([temperature])
        decisions = node_decisions(target_probs, logits, torch.tensor([children]), temperatures)
        acceptance, residual = closed_form_decisions(target_probs[0], logits[0], children, float(temperatures))
        # Compared as the probability of drawing these children and ending there. Rounding is amplified by one over the
        # mass that a rejection leaves, and so are draws as rare as that: what counts is the product.
        left = _draw_probability(logits[0] / temperatures.double(), children)
        for rank, chance in enumerate(acceptance):
            assert abs(left * (float(decisions.acceptance()[0, rank]) - chance)) <= 1e-12
            left *= 1 - chance
        torch.testing.assert_close(left * decisions.residual[0], left * residual, rtol=0, atol=1e-12)


def _draw_probability(scaled_logits, children):
    probability = 1.0
    for token in children:
        if token >= 0:
            probability *= float(scaled_logits.softmax(0)[token])
            scaled_logits = scaled_logits.index_fill(0, torch.tensor(token), -torch.inf)
    return probability


@pytest.fixture(params=op_backends("sample_without_replacement", "verify_tree"))
def backend(request):
    if not request.param.at_scale:
        pytest.skip("an interpreted kernel takes hours here; that it equals the reference is tested with its op")
    return request.param


def _decode_counts(backend, parents, kind, warp, vocab=5, length=3, batch_size=20_000, seed=0, rule="sequoia", **ops):
    tree = TokenTree(parents)
    target, draft = toy_pair(kind, vocab, context=2, seed=seed)
    temperature, top_k, top_p = warp
    verify = backend.bound_to("verify_tree").with_always(rule=rule)
    ops = {"sample": backend.bound_to("sample_without_replacement"), "verify": verify} | ops
    sequences = decode(tree, target, draft, 1, length, batch_size, temperature, top_k=top_k, top_p=top_p, **ops)
    expected = joint_probs(chain_probs(target, 1, length, temperature, top_k, top_p))
    return sequence_counts(sequences, vocab), expected


# Eight nodes on four levels: a chain's depth, a star's breadth and something of both.
MIXED = [-1, 0, 0, 0, 1, 1, 2, 4]


@pytest.mark.parametrize("temperature", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_joint_sequences_have_the_targets_distribution(backend, temperature, rule):
    counts, expected = _decode_counts(backend, MIXED, "near", (temperature, None, None), rule=rule)
    assert p_value(counts, expected) > 1e-4
    counts, expected = _decode_counts(
        backend, MIXED, "unrelated", (temperature, None, None), length=4, seed=5, rule=rule
    )
    assert p_value(counts, expected) > 1e-4


@pytest.mark.parametrize("temperature", [1e-5, 1e-4])
def test_joint_sequences_at_small_temperatures(backend, temperature, rule):
    counts, expected = _decode_counts(backend, MIXED, "close", (temperature, None, None), batch_size=50_000, rule=rule)
    assert p_value(counts, expected) > 1e-4


@pytest.mark.parametrize("warp", [(1.0, 3, None), (1.0, None, 0.7), (0.6, 4, 0.9), (1.0, 1, None)])
def test_joint_sequences_with_top_k_and_top_p(backend, warp, rule):
    counts, expected = _decode_counts(backend, MIXED, "unrelated", warp, vocab=7, rule=rule)
    assert p_value(counts, expected) > 1e-4


@pytest.mark.parametrize("kind", KINDS[2:])
def test_joint_sequences_with_degenerate_drafts(backend, kind, rule):
    counts, expected = _decode_counts(backend, MIXED, kind, (1.0, None, None), rule=rule)
    assert p_value(counts, expected) > 1e-4


@pytest.mark.parametrize("tree", TREES)
def test_joint_sequences_with_every_shape_of_tree(backend, tree, rule):
    counts, expected = _decode_counts(backend, TREES[tree], "unrelated", (1.0, None, None), vocab=4, rule=rule)
    assert p_value(counts, expected) > 1e-4


def test_greedy_sequences_are_the_targets_arg_maxima(backend, rule):
    for kind in KINDS:
        counts, expected = _decode_counts(backend, MIXED, kind, (0.0, None, None), batch_size=50, rule=rule)
        assert torch.equal(counts, (expected * 50).round().long())


def test_drawn_children_have_the_distribution_of_draws_without_replacement(backend):
    generator = torch.Generator().manual_seed(4)
    ordinary = torch.randn(6, generator=generator, dtype=torch.float64).float() * 1.5
    close = 20 + torch.tensor([4e7, 0, 0, 1, 2, -1]) * 2.0**-19  # but for one, units in the last place
    cases = [(ordinary, temperature) for temperature in (0.3, 1.0, 2.0)] + [(close, 1e-5), (close, 1e-4)]
    for logits, temperature in cases:
        sample = backend.bound_to("sample_without_replacement")
        drawn = sample(logits.expand(40_000, 6), 3, temperature, torch.arange(40_000), 11)
        expected = torch.zeros(6, 6, 6, dtype=torch.float64)
        scaled = (logits.double() - logits.max()) / float(torch.tensor(temperature))
        for tokens, chance in ordered_draws(scaled.tolist(), 3):
            expected[tokens] = chance
        assert abs(float(expected.sum()) - 1) < 1e-12
        assert p_value(sequence_counts(drawn.tokens, 6), expected) > 1e-4


# ---- The tests above must be able to fail ----


def _keep_draft_after_rejection(target_probs, draft_logits, children, temperature):
    """A verifier that updates the residual after a rejection and forgets to update the draft."""
    draft = torch.softmax(draft_logits.double() / temperature[:, None], dim=1).to(target_probs.dtype)
    residual = target_probs
    at_child = []
    for rank in range(children.shape[1]):
        token = children[:, rank, None]
        index = token.clamp(min=0)
        at_child.append([torch.where(token >= 0, probs.gather(1, index), 0)[:, 0] for probs in (residual, draft)])
        left = (residual - draft).clamp(min=0)
        mass = left.sum(dim=1, keepdim=True)
        residual = torch.where((mass > 0) & (token >= 0), left / mass.clamp(min=1e-30), residual)
    columns = [torch.stack([pair[side] for pair in at_child], dim=1) for side in (0, 1)] if at_child else None
    empty = torch.zeros(children.shape, dtype=target_probs.dtype)
    return NodeDecisions(*(columns or (empty, empty)), residual)


def _accept_by_target_alone(target_probs, draft_logits, children, temperature):
    """A verifier that ignores the draft: it accepts a child with the target's probability of it."""
    residual = target_probs
    decisions = node_decisions(target_probs, draft_logits, children, temperature)
    at_child = residual.gather(1, children.clamp(min=0)).masked_fill(children < 0, 0)
    return NodeDecisions(at_child, (children >= 0).to(residual.dtype), decisions.residual)


@pytest.mark.parametrize("broken", [_keep_draft_after_rejection, _accept_by_target_alone])
def test_a_broken_verifier_fails_the_exact_test(monkeypatch, broken):
    monkeypatch.setattr("support.enumeration.node_decisions", broken)
    assert _exact_error(TREES["binary"], "unrelated", 3, (1.0, None, None)) > 1e-3


@pytest.mark.parametrize("broken", [_keep_draft_after_rejection, _accept_by_target_alone])
def test_a_broken_verifier_fails_the_joint_test(monkeypatch, broken):
    monkeypatch.setattr(REFERENCE, "node_decisions", broken)
    counts, expected = _decode_counts(PLAIN, MIXED, "unrelated", (1.0, None, None))
    assert p_value(counts, expected) < 1e-6
    if broken is _keep_draft_after_rejection:
        # the first token by itself does not show this one
        assert p_value(counts.sum(dim=(1, 2)), expected.sum(dim=(1, 2))) > 1e-2


def _draft_as_at_first(draft_logits, drawn, is_child, temperature):
    """A traversal that tests siblings against the draft of the first one."""
    return draft_left(draft_logits, torch.zeros_like(drawn), is_child, temperature)


def _no_mass_lost(weights, target_probs, drawn):
    """A traversal that gives a node all of its chance back when a child fails."""
    residual, mass = residual_left(weights, target_probs, drawn)
    return residual, torch.where(mass > 0, 1e30, mass)


def _residual_blind_to_the_draft(weights, target_probs, drawn):
    """A traversal that draws the next token from the target without the tokens that failed."""
    _, mass = residual_left(weights, target_probs, drawn)
    return residual_left(target_probs, target_probs, drawn)[0], mass


BROKEN_TRAVERSALS = [
    ("draft_left", _draft_as_at_first),
    ("residual_left", _no_mass_lost),
    ("residual_left", _residual_blind_to_the_draft),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN_TRAVERSALS)
def test_a_broken_traversal_fails_both_tests(monkeypatch, name, broken):
    monkeypatch.setattr(traversal, name, broken)
    assert _exact_error(TREES["binary"], "unrelated", 3, (1.0, None, None), rule="traversal") > 1e-3
    counts, expected = _decode_counts(PLAIN, MIXED, "unrelated", (1.0, None, None), rule="traversal")
    assert p_value(counts, expected) < 1e-6


def test_with_certain_chances_the_rules_are_one():
    """Stars: below the root there is nothing that a chance could be carried to."""
    generator = torch.Generator().manual_seed(2)
    tree = TokenTree.kary(4, 2)
    logits = [torch.randn(500, 5, 6, generator=generator) for _ in range(2)]
    tokens = torch.cat([torch.zeros(500, 1), torch.multinomial(logits[1][:, 0].softmax(1), 4, generator=generator)], 1)
    arguments = (tokens.long(), *logits, tree, 1.0, torch.arange(500), 0)
    paths = [PLAIN.with_always(rule=rule)(*arguments) for rule in ("sequoia", "traversal")]
    assert all(torch.equal(one, other) for one, other in zip(*paths))
    assert len(set(paths[0].nodes[:, 1].tolist())) == 5


def test_traversal_emits_more_tokens():
    """A chain: the whole of it is accepted more often than one token after the other."""
    tree = TokenTree.chain(6)
    target, draft = toy_pair("unrelated", 6, context=2, seed=0)
    means = []
    for rule in ("sequoia", "traversal"):
        streams = (torch.ones(20_000), torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64))
        tail = torch.ones(20_000, 2, dtype=torch.int64)
        sample = PLAIN.bound_to("sample_without_replacement")
        path = PLAIN.with_always(rule=rule)(*grow(tree, target, draft, tail, *streams, sample), tree, *streams)
        means.append(float(path.num_accepted.double().mean()))
    assert means[1] > 1.05 * means[0]


def test_noise_shared_by_a_node_and_its_parent_fails_the_joint_test():
    # Each draw by itself is right, the sequence is not.
    def sample_with_the_roots_noise(logits, num_samples, temperature, seeds, offsets):
        step = offsets - offsets % len(MIXED)
        return sample_without_replacement(logits, num_samples, temperature, seeds, step, backend="reference")

    sample = sample_with_the_roots_noise
    counts, expected = _decode_counts(PLAIN, MIXED, "unrelated", (1.0, None, None), sample=sample)
    assert p_value(counts, expected) < 1e-6


def test_noise_shared_by_draft_and_residual_fails_the_joint_test(monkeypatch):
    monkeypatch.setattr(REFERENCE, "RESIDUAL_TAG", DRAFT_TAG)
    counts, expected = _decode_counts(PLAIN, MIXED, "unrelated", (1.0, None, None))
    assert p_value(counts, expected) < 1e-6
