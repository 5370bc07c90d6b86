"""DSpark drafts in captured steps: a block's forward, levels and the context of accepted tokens as one graph."""

from __future__ import annotations

import pytest
import torch
from support.dflash_models import good_draft
from support.tiny_models import tiny_llama

from sequoia_kernels import TokenTree, generate, release_engines
from sequoia_kernels.decoding import engine as engines

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7])


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", [None, "vanilla", "gated", "rnn"])
def test_the_captured_loop_equals_the_uncaptured_one(kind, temperature):
    target = tiny_llama(3, vocab_size=12, sharpness=4.0).cuda()
    prompts = torch.randint(12, (3, 9), generator=torch.Generator().manual_seed(1)).cuda()
    draft = good_draft(target, kind)
    tree = TREE if kind else TokenTree.chain(5)
    options = {"tree": tree, "max_new_tokens": 40, "temperature": temperature, "seed": 5, "eos_token_id": ()}
    release_engines()
    for _ in range(2):  # the second time with the engine of the first
        graphed, launched = (generate(target, draft, prompts, cuda_graphs=on, **options) for on in (True, False))
        assert graphed.new_tokens == launched.new_tokens
        assert graphed.stats.accepted_histogram == launched.stats.accepted_histogram
    (kept,) = engines._kept[target].values()
    assert kept.engine._graphed.num_captured == 1
