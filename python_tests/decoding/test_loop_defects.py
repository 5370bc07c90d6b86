"""Defects of other tree decoders that live in the loop, a regression test each; test_known_defects.py has the ops'."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from scipy import stats
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.decoding.step import DecodingStep
from sequoia_kernels.drafts import DecodingState, draft_source
from sequoia_kernels.ops import VerifiedPath


def one_step(target, batch_size, **options):
    state = DecodingState.create(
        batch_size, torch.device("cpu"), seeds=range(batch_size), temperature=[0.0] * batch_size, top_k=None, top_p=None
    )
    return DecodingStep(target, None, state, 16, **options)


def test_bonus_token_is_emitted_behind_the_accepted_ones_not_over_them():
    tree = TokenTree([-1, 0, 0, 1, 2])
    step = one_step(adapt(tiny_llama(0, vocab_size=20, num_layers=1)), 2)
    state = step.state
    state.cache_lens.fill_(3)
    step.prepare(tree)[1].tokens.copy_(torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]]))
    path = VerifiedPath(
        nodes=torch.tensor([[0, 2, 4], [0, -1, -1]], dtype=torch.int32),
        num_accepted=torch.tensor([3, 1], dtype=torch.int32),
        next_token=torch.tensor([99, 98]),
    )
    for tensor in step.target_cache.tensors():
        tensor.copy_(torch.arange(2 * 16.0).view(2, 16, 1, 1))
    before = [tensor.clone() for tensor in step.target_cache.tensors()]
    emitted = step.commit_path(tree, path)
    assert emitted.tokens.tolist() == [[12, 14, 99], [98, -1, -1]]
    assert emitted.num_tokens.tolist() == [3, 1]
    assert state.last_tokens.tolist() == [14, 20]
    assert state.root_tokens.tolist() == [99, 98]
    assert state.cache_lens.tolist() == [6, 4]
    for tensor, old in zip(step.target_cache.tensors(), before, strict=True):
        assert torch.equal(tensor[0, 3:6], old[0, [3, 5, 7]])
        assert torch.equal(tensor[1], old[1])


def test_a_target_on_two_devices_commits_all_its_caches_and_advances_once(monkeypatch):
    """The meta device stands in for the second one."""
    target = adapt(tiny_llama(0, vocab_size=20))
    first, second = target._plan.specs
    specs = (first, second._replace(device=torch.device("meta")))
    monkeypatch.setattr(target, "_plan", target._plan._replace(specs=specs))
    step = one_step(target, 1, backend="reference")
    ((tables, cache_lens),) = step.cache_tables
    assert [table.entries.device.type for table in tables] == ["cpu", "meta"]

    op = importlib.import_module("sequoia_kernels.ops.compact_kv_cache_.op")
    # torch's dispatcher would only check shapes, as meta tensors ask for
    monkeypatch.setattr(op.OPERATOR, "_operator", op.OPERATOR._run_in_place)
    keys = step.target_cache.layers[0].keys.copy_(torch.arange(16.0).view(1, 16, 1, 1))
    cache_lens.fill_(3)
    tree = TokenTree([-1, 0, 0, 1, 2])
    step.prepare(tree)[1].tokens.copy_(torch.arange(5)[None])
    step.commit_path(tree, VerifiedPath(torch.tensor([[0, 2, 4]]).int(), torch.tensor([3]).int(), torch.tensor([9])))
    assert step.state.cache_lens.tolist() == [6]
    assert keys[0, :, 0, 0].tolist() == [0, 1, 2, 3, 5, 7, *range(6, 16)]


class _Bigrams(torch.nn.Module):
    """Zeroes a Llama's layers, so that the next token depends on the last one alone and its distribution is known."""

    @staticmethod
    def build(vocab_size: int):
        model = tiny_llama(5, vocab_size=vocab_size, sharpness=1.0)
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                if parameter.ndim == 2:
                    parameter.zero_()
            model.lm_head.weight.zero_()  # uniform: every token, after every token
        return model


@pytest.mark.parametrize("with_draft", [False, True])
def test_noise_is_fresh_in_every_step(with_draft):
    vocab, num_tokens = 8, 4000
    model = _Bigrams.build(vocab)
    output = generate(
        model, model if with_draft else None, torch.tensor([[0]]), tree=TokenTree([-1, 0, 0, 1]),
        max_new_tokens=num_tokens, temperature=1.0, seed=3,
    )  # fmt: skip
    tokens = output.new_tokens[0]
    repeats = sum(a == b for a, b in itertools.pairwise(tokens))
    # reused noise makes the same token win again and again; fresh noise repeats one time in `vocab`
    assert stats.binomtest(repeats, num_tokens - 1, 1 / vocab).pvalue > 1e-4
    pairs = torch.bincount(torch.tensor(tokens[:-1]) * vocab + torch.tensor(tokens[1:]), minlength=vocab**2)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-4


def test_trees_beyond_32_nodes_use_every_mask_word():
    target = tiny_llama(0)
    tree = TokenTree.kary(3, 4)  # 40 nodes, two words
    deep = TokenTree.chain(70)  # three words
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected = generate(target, None, prompt, max_new_tokens=60).new_tokens
    assert generate(target, noisy_copy(target, 0.5), prompt, tree=tree, max_new_tokens=60).new_tokens == expected
    assert generate(target, target, prompt, tree=deep, max_new_tokens=60).new_tokens == expected


def test_a_step_touches_only_its_own_cache_rows():
    target = adapt(tiny_llama(0))
    tree = TokenTree([-1, 0, 0, 1])
    state = DecodingState.create(1, target.device, seeds=[0], temperature=[1.0], top_k=None, top_p=None)
    with torch.inference_mode():
        step = DecodingStep(target, draft_source(noisy_copy(target.model, 0.5)), state, max_cache_len=40)
        step.prefill(torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([6], dtype=torch.int32))
        tensors = step.target_cache.tensors()
        for tensor in tensors:
            tensor[:, 6 + tree.num_nodes :].fill_(77.0)
        before = [tensor.clone() for tensor in tensors]
        step.run(tree)
        for tensor, old in zip(tensors, before, strict=True):
            assert torch.equal(tensor[:, :6], old[:, :6])
            assert torch.equal(tensor[:, 6 + tree.num_nodes :], old[:, 6 + tree.num_nodes :])


def test_a_repetition_penalty_counts_each_nodes_ancestors():
    target = tiny_llama(0, sharpness=4.0)
    target.generation_config.repetition_penalty = 1.7
    prompt = torch.tensor([[1, 2, 9]])
    wanted = target.generate(prompt, max_new_tokens=40, do_sample=False)
    for tree in (TokenTree.kary(2, 4), TokenTree.chain(7)):  # a draft as good as the target, so that whole paths count
        output = generate(target, target, prompt, tree=tree, max_new_tokens=40)
        assert output.sequences.tolist() == wanted.tolist()
        assert output.stats.tokens_per_step > 2
