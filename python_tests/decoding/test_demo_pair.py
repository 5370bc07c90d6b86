"""The trained pair: greedy output equals transformers' own, token for token."""

from __future__ import annotations

import pytest
import torch

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.demo import held_out_prompts, load_demo_pair

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 10])


@pytest.fixture(scope="module")
def pair():
    return load_demo_pair(torch.float32)


def test_greedy_equals_transformers_generate(pair):
    for prompt in held_out_prompts(20, 300):
        ids = pair.tokenizer(prompt, return_tensors="pt").input_ids[:, :128]
        expected = pair.target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=128, pad_token_id=0
        )
        assert torch.equal(generate(pair.target, pair.draft, ids, tree=TREE, max_new_tokens=128).sequences, expected)


def test_the_draft_is_worth_having(pair):
    ids = pair.tokenizer(held_out_prompts(1)[0], return_tensors="pt").input_ids
    output = generate(pair.target, pair.draft, ids, tree=TREE, max_new_tokens=96, temperature=1.0, seed=3)
    assert output.stats.tokens_per_step > 1.8
