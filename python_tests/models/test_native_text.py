"""Greedy text of trained models is the same by native forwards and by the modules."""

from __future__ import annotations

import pytest
import torch

from sequoia_kernels import adapt, generate
from sequoia_kernels.demo import held_out_prompts, load_demo_pair

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 50, 48, 32


@pytest.fixture(scope="module")
def pair():
    return load_demo_pair(torch.float32)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_greedy_text_of_fifty_prompts_is_the_modules(pair, role):
    model = getattr(pair, role)
    texts = held_out_prompts(NUM_PROMPTS, 400)
    tokens = torch.stack([pair.tokenizer(text, return_tensors="pt").input_ids[0, :PROMPT_TOKENS] for text in texts])
    assert tokens.shape == (NUM_PROMPTS, PROMPT_TOKENS)
    found = {
        forward: generate(
            adapt(model, forward=forward), None, tokens, max_new_tokens=NEW_TOKENS, temperature=0.0, eos_token_id=()
        ).new_tokens
        for forward in ("native", "modules")
    }
    assert found["native"] == found["modules"]
    assert len({tuple(text) for text in found["native"]}) > NUM_PROMPTS // 2
