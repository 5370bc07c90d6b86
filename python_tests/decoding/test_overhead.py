"""measure_overhead: it stays within what was measured and within the positions."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from sequoia_kernels.decoding import measure_overhead, overhead
from sequoia_kernels.measure import measure_profile

FAST = {"seconds": 0.0, "min_repeats": 1, "max_repeats": 1, "bandwidth": False, "context_lens": [8]}


@pytest.fixture
def decoded(monkeypatch):
    """The calls of the loop that it makes: (nodes of the tree, tokens of the prompts, new tokens)."""
    calls = []
    plain = overhead.decode

    def noted(target, draft, tree, arguments):
        calls.append((tree.num_nodes, arguments.prompts.shape[1], arguments.max_new_tokens))
        return plain(target, draft, tree, arguments)

    monkeypatch.setattr(overhead, "decode", noted)
    return calls


@pytest.mark.parametrize("largest", [1, 4, 16, 64])
def test_the_tree_is_no_larger_than_what_was_measured(decoded, largest):
    target, draft = tiny_llama(0), tiny_llama(1, num_layers=1)
    profile = measure_profile(target, draft, node_counts=[1, largest], **FAST)
    found = measure_overhead(target, draft, profile, num_tokens=8, num_runs=1)
    assert decoded == [(min(largest, 24), 64, 8), (min(largest, 4), 64, 8), (1, 64, 8)] * 2
    assert found.step_overhead_ms >= 0 and found.draft_overhead_ms >= 0


@pytest.mark.parametrize(("positions", "expected"), [(256, (64, 96)), (100, (50, 50)), (40, (20, 20)), (4, (2, 2))])
def test_prompt_and_text_fit_the_positions(decoded, positions, expected):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=positions, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    target, draft = GPT2LMHeadModel(config).eval(), tiny_llama(1, num_layers=1)
    profile = measure_profile(target, draft, node_counts=[1, 2], **{**FAST, "context_lens": [1]})
    measure_overhead(target, draft, profile)
    assert [call[1:] for call in decoded] == [expected] * 12
