"""Defects that published implementations of tree speculation have had, each as a test that it is not one of ours.

Here are those that show in a single op. Those that need the decoding loop around it (the order of commits, the model's
end-of-text ids, noise from step to step) are tested with the loop.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.chi_square import joint_probs, p_value, sequence_counts
from support.op_backends import op_backends
from support.speculative_steps import decode
from support.toy_models import chain_probs, toy_pair

from sequoia_kernels import TokenTree
from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.ops.verify_tree.reference import node_decisions
from sequoia_kernels.rng import node_coins

INF = math.inf

every_sampler = pytest.mark.parametrize("sample", op_backends("sample_without_replacement"))
every_verifier = pytest.mark.parametrize("verify", op_backends("verify_tree"))
every_attention = pytest.mark.parametrize("attend", op_backends("tree_attention"))
every_compaction = pytest.mark.parametrize("compact", op_backends("compact_kv_cache_"))


# ---- Noise drawn once a prompt and used again at every step ----


@every_sampler
def test_noise_is_new_at_every_offset(sample):
    # One request, many steps: with noise that is used again the same token wins every time.
    steps = 3000 if sample.at_scale else 40
    logits = torch.tensor([0.5, 0.0, -0.5, 1.0]).expand(steps, 4)
    repeats = math.fsum(logits[0].double().softmax(0).square().tolist())
    tokens = sample(logits, 1, 1.0, 7, torch.arange(steps)).tokens[:, 0]
    rate = float((tokens[1:] == tokens[:-1]).double().mean())
    assert abs(rate - repeats) < 4 * math.sqrt(repeats * (1 - repeats) / steps)
    assert sample(logits, 1, 1.0, 7, 0).tokens.unique().numel() == 1


@every_verifier
def test_coins_and_residual_noise_are_new_at_every_offset(verify):
    steps = 256 if verify.at_scale else 48
    tree = TokenTree([-1, 0])
    logits = torch.zeros(steps, 2, 8)
    draft_logits = torch.tensor([4.0] + [0.0] * 7).expand(steps, 2, 8)
    path = verify(torch.zeros(steps, 2, dtype=torch.int64), logits, draft_logits, tree, 1.0, 7, torch.arange(steps))
    assert set(path.num_accepted.tolist()) == {1, 2}
    assert path.next_token.unique().numel() == 8


def test_noise_that_is_used_again_fails_the_joint_test():
    def sample_with_the_first_steps_noise(logits, num_samples, temperature, seeds, offsets):
        return sample_without_replacement(logits, num_samples, temperature, seeds, offsets % 4, backend="reference")

    plain = op_backends("verify_tree")[0].values[0]
    target, draft = toy_pair("near", 4, 1, seed=2)
    expected = joint_probs(chain_probs(target, 0, 4, 1.0))
    tree = TokenTree([-1, 0, 0, 1])

    def p_value_of(sample):
        tokens = decode(tree, target, draft, 0, 4, 10_000, 1.0, sample=sample, verify=plain)
        return p_value(sequence_counts(tokens, 4), expected)

    assert p_value_of(plain.bound_to("sample_without_replacement")) > 1e-4
    assert p_value_of(sample_with_the_first_steps_noise) < 1e-6


# ---- Leftover mass that cancels (1 - p = 0) and half-precision keys: the draft runs out of tokens ----


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_peaked_row_does_not_run_out_of_draws(sample, dtype):
    logits = torch.zeros(2, 40, dtype=dtype)
    logits[:, 3] = 60.0  # float32 sees the other tokens' mass as 0 beside it
    tokens = sample(logits, 40, 1.0, torch.arange(2), 0).tokens
    assert tokens.sort(dim=1).values.tolist() == [list(range(40))] * 2


def test_a_draft_whose_mass_is_drawn_is_renormalised_from_its_logits():
    draft_logits = torch.tensor([[60.0, 0.0, 0.0, -INF]])
    target_probs = torch.tensor([[0.0, 0.1, 0.4, 0.5]])
    decisions = node_decisions(target_probs, draft_logits, torch.tensor([[0, 1, 2]]), torch.ones(1))
    assert decisions.draft_at_child.tolist() == [[1.0, 0.5, 1.0]]
    torch.testing.assert_close(decisions.acceptance(), torch.tensor([[0.0, 0.2, 0.0]]))
    torch.testing.assert_close(decisions.residual, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))


# ---- A residual of zeros: NaN, and generation ends without a word ----


@every_verifier
def test_a_residual_of_zeros_still_gives_a_token(verify):
    # The target is the draft and every token is a child: whatever is rejected leaves nothing to draw from.
    tree = TokenTree.kary(3, 2)
    batch_size = 400 if verify.at_scale else 6
    logits = torch.tensor([0.7, -0.1, 0.2]).expand(batch_size, 4, 3)
    tokens = torch.tensor([[0, 2, 0, 1]]).repeat(batch_size, 1)
    for draft_logits in (logits, logits + 3e-7, logits.to(torch.bfloat16).float()):
        path = verify(tokens, logits, draft_logits, tree, 1.0, torch.arange(batch_size), 0)
        assert bool(((path.num_accepted >= 1) & (path.num_accepted <= 2)).all())
        assert bool(((path.next_token >= 0) & (path.next_token < 3)).all())


def test_a_residual_of_zeros_becomes_the_target_outside_the_draws():
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    first = node_decisions(probs, probs.log(), torch.tensor([[0]]), torch.ones(1))
    torch.testing.assert_close(first.residual, torch.tensor([[0.0, 0.5, 0.5, 0.0]]))
    every = node_decisions(probs, probs.log(), torch.tensor([[0, 1, 2]]), torch.ones(1))
    torch.testing.assert_close(every.residual, probs)


# ---- `>=` where the coin can be 0: a token of probability 0 is accepted ----


@every_verifier
def test_a_coin_of_zero_does_not_accept_a_token_of_probability_zero(verify):
    seed = 7450826  # found by search: its coin of node 1 at offset 0 is 0
    assert float(node_coins(torch.tensor([seed]), torch.tensor([0]), 2)[0, 1]) == 0.0
    target_logits = torch.tensor([[[0.0, -INF], [0.0, 0.0]]])
    path = verify(torch.tensor([[0, 1]]), target_logits, torch.zeros(1, 2, 2), TokenTree([-1, 0]), 1.0, seed, 0)
    assert path.nodes.tolist() == [[0, -1]] and path.next_token.tolist() == [0]
    # >= would have taken it
    decisions = node_decisions(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[1]]), torch.ones(1))
    assert float(decisions.residual_at_child) >= 0.0 * float(decisions.draft_at_child)


# ---- Seeds a row that are accepted and ignored but for the first ----


@every_sampler
def test_every_row_draws_from_its_own_seed(sample):
    seeds = torch.tensor([11, 12, 13, 11])
    tokens = sample(torch.zeros(4, 1000), 8, 1.0, seeds, 0).tokens
    assert torch.equal(tokens[0], tokens[3])
    assert not any(torch.equal(tokens[0], tokens[row]) for row in (1, 2))
    for row in range(4):
        assert torch.equal(tokens[row : row + 1], sample(torch.zeros(1, 1000), 8, 1.0, int(seeds[row]), 0).tokens)


@every_verifier
def test_every_request_is_decided_by_its_own_seed(verify):
    tree = TokenTree.single()
    seeds = torch.tensor([11, 12, 13, 11])
    tokens = torch.zeros(4, 1, dtype=torch.int64)
    drawn = verify(tokens, torch.zeros(4, 1, 1000), None, tree, 1.0, seeds, 0).next_token.tolist()
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


# ---- Temperature 0 that divides by zero ----


@pytest.mark.parametrize("sample", op_backends("sample_without_replacement", "verify_tree", "warped_logsumexp"))
def test_temperature_zero_is_greedy_in_every_op(sample):
    normalise, verify = sample.bound_to("warped_logsumexp"), sample.bound_to("verify_tree")
    logits = torch.tensor([[-3e4, 5.0, 4.0, -INF], [0.0, 0.0, 0.0, 0.0]])
    drawn = sample(logits, 3, 0.0, 1, 1)
    assert drawn.tokens.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert drawn.log_normaliser.tolist() == [5.0, 0.0]
    assert [value.tolist() for value in normalise(logits, 0.0)] == [[5.0, 0.0], [5.0, 0.0]]
    tree = TokenTree([-1, 0])
    path = verify(
        torch.tensor([[0, 1], [0, 3]]),
        logits[:, None].expand(2, 2, 4),
        logits[:, None].expand(2, 2, 4),
        tree,
        0.0,
        1,
        1,
    )
    assert path.nodes.tolist() == [[0, 1], [0, -1]] and path.next_token.tolist() == [1, 0]


# ---- More than 32 nodes in a mask of 32 bits ----


def _tree_attention_inputs(num_nodes, cache_len, device, num_heads=2, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    shape = (1, cache_len + num_nodes, num_heads, head_dim)
    q = torch.randn(1, num_nodes, num_heads, head_dim, generator=generator)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    return q.to(device), k.to(device), v.to(device), torch.tensor([cache_len], dtype=torch.int32, device=device)


@every_attention
def test_every_node_of_a_large_tree_sees_its_own_ancestors_only(attend):
    tree = TokenTree([-1] + [node // 2 for node in range(76)])  # 77 nodes: the mask's bits wrap twice
    q, k, v, cache_lens = _tree_attention_inputs(77, 5, "cpu")
    out = attend(q, k, v, tree.ancestor_mask(), cache_lens).out
    for node in range(77):
        path, ancestor = [], node
        while ancestor >= 0:
            path.append(5 + ancestor)
            ancestor = tree.parents[ancestor]
        rows = list(range(5)) + path
        scores = torch.einsum("hd,shd->hs", q[0, node].double(), k[0, rows].double()) * 16**-0.5
        expected = torch.einsum("hs,shd->hd", scores.softmax(dim=1), v[0, rows].double())
        torch.testing.assert_close(out[0, node].double(), expected, rtol=1e-5, atol=1e-5)


# ---- A boolean mask added to the scores (+1 where it should be -inf) instead of applied ----


@every_attention
def test_what_a_node_must_not_see_has_no_influence(attend):
    tree = TokenTree([-1, 0, 0, 1])
    q, k, v, cache_lens = _tree_attention_inputs(4, 6, "cpu")
    expected = attend(q, k, v, tree.ancestor_mask(), cache_lens).out
    k[0, 8] = 50 * q[0, 3]  # node 2, an uncle of node 3, made as attractive to it as can be
    v[0, 8] = 1e4
    changed = attend(q, k, v, tree.ancestor_mask(), cache_lens).out
    for node in (0, 1, 3):
        torch.testing.assert_close(changed[:, node], expected[:, node], rtol=0, atol=0)
    assert not torch.allclose(changed[:, 2], expected[:, 2])


# ---- The whole cache zeroed at every step, and accepted rows that were not moved ----


@every_compaction
def test_a_commit_moves_the_accepted_rows_and_touches_nothing_else(compact):
    generator = torch.Generator().manual_seed(0)
    caches = [torch.randn(2, 12, 2, 8, generator=generator).to(compact.device) for _ in range(4)]
    before = [cache.clone() for cache in caches]
    cache_lens = torch.tensor([3, 5], dtype=torch.int32, device=compact.device)
    accepted_nodes = torch.tensor([[0, 2, 5], [0, -1, -1]], dtype=torch.int32, device=compact.device)
    num_accepted = torch.tensor([3, 1], dtype=torch.int32, device=compact.device)
    compact(caches, accepted_nodes, num_accepted, cache_lens, raw=True)
    assert cache_lens.tolist() == [6, 6]
    for cache, old in zip(caches, before, strict=True):
        expected = old.clone()
        expected[0, 3:6] = old[0, [3, 5, 8]]
        assert torch.equal(cache, expected)
