"""Several calls of `generate` on a GPU: graphs that stay, compiled forwards inside them, trees that change."""

from __future__ import annotations

import pytest
import torch
from support.synthetic_profile import synthetic_profile
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, generate, plan_adaptive, release_engines
from sequoia_kernels.decoding import engine as engines

pytestmark = pytest.mark.gpu

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


@pytest.fixture(scope="module")
def pair():
    target = tiny_llama(0, vocab_size=61)
    return target.cuda(), noisy_copy(target, 0.5).cuda()


@pytest.fixture(autouse=True)
def no_engines_left():
    release_engines()
    yield
    release_engines()


def prompts(length, seed=0, batch_size=2):
    return torch.randint(61, (batch_size, length), generator=torch.Generator().manual_seed(seed)).cuda()


def kept(target):
    return list(engines._kept.get(target, {}).values())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_later_calls_replay_the_first_ones_graphs(pair, temperature):
    options = {"tree": TREE, "temperature": temperature, "seed": 4, "eos_token_id": (), "max_new_tokens": 30}
    launched = [generate(*pair, prompts(9 + seed, seed), cuda_graphs=False, **options) for seed in range(4)]
    replayed = [generate(*pair, prompts(9 + seed, seed), **options) for seed in range(4)]
    assert [entry.new_tokens for entry in launched] == [entry.new_tokens for entry in replayed]
    (entry,) = kept(pair[0])
    assert set(entry.engine._graphed._captured) == {TREE}


def test_released_engines_give_their_memory_back(pair):
    generate(*pair, prompts(9), tree=TREE, max_new_tokens=10)
    release_engines()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    generate(*pair, prompts(9), tree=TREE, max_new_tokens=10, max_cache_len=1 << 10)
    assert torch.cuda.memory_reserved() >= before
    release_engines()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_compiled_forwards_can_be_captured(pair):
    options = {"tree": TREE, "eos_token_id": (), "max_new_tokens": 30}
    plain = generate(*pair, prompts(9), **options)
    compiled = generate(*pair, prompts(9), compile=True, **options)
    assert compiled.new_tokens == plain.new_tokens
    assert any(TREE in entry.engine._graphed._captured for entry in kept(pair[0]))


def test_adaptive_trees_are_all_captured_before_they_are_needed(pair):
    profile = synthetic_profile(lambda n, c: 10 + 0.1 * n, lambda n, c: 0.8 + 0.01 * n)
    plan = plan_adaptive([0.6, 0.15, 0.06], profile, context_len=32, patience=2, half_life=4)
    options = {"eos_token_id": (), "max_new_tokens": 80}
    output = generate(*pair, prompts(9), tree=plan, **options)
    assert output.new_tokens == generate(pair[0], None, prompts(9), **options).new_tokens
    captured = [set(entry.engine._graphed._captured) for entry in kept(pair[0])]
    assert any(set(plan.trees) <= trees for trees in captured)
