"""Targets and drafts whose embeddings and heads do not have the same number of rows."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_llama

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding import overhead
from sequoia_kernels.measure import measure_profile

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 7])


def model(seed: int, num_embeddings: int, head_rows: int | None = None, num_layers: int = 1, like=None):
    """A tiny Llama; with `like` its shared rows are another one's, so that it guesses well where it knows the token."""
    built = tiny_llama(seed, vocab_size=num_embeddings, num_layers=num_layers)
    head_rows = num_embeddings if head_rows is None else head_rows
    if head_rows != num_embeddings:
        torch.manual_seed(seed)
        weight = 20.0 * built.config.initializer_range * torch.randn(head_rows, built.config.hidden_size)
        built.lm_head = torch.nn.Linear(built.config.hidden_size, head_rows, bias=False)
        built.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    if like is not None:
        with torch.no_grad():
            built.model.layers.load_state_dict(like.model.layers.state_dict())
            for mine, its in (
                (built.model.embed_tokens.weight, like.model.embed_tokens.weight),
                (built.lm_head.weight, like.lm_head.weight),
            ):
                shared = min(len(mine), len(its))
                mine[:shared] = its[:shared]
    return built.eval()


TARGET = model(0, 48, num_layers=2)
DRAFTS = {
    "fewer tokens": model(1, 40, num_layers=2, like=TARGET),
    "more tokens": model(1, 60),
    "a wider head": model(2, 48, 64),
    "a head wider than its embedding": model(3, 40, 48),
    "an embedding wider than its head": model(4, 48, 40),
    "both short and unequal": model(5, 30, 35),
}


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
def test_the_output_is_the_targets_whatever_the_draft_knows(draft):
    seen = set()
    for first in (47, 40, 39):  # known to the target; the first two not to every draft
        prompt = torch.tensor([[first, 3, 47, first]])
        expected = generate(TARGET, None, prompt, max_new_tokens=30)
        output = generate(TARGET, draft, prompt, tree=TREE, max_new_tokens=30)
        assert output.new_tokens == expected.new_tokens
        seen.update(expected.new_tokens[0])
    assert max(seen) >= 40  # it emits tokens that the smaller drafts do not know


def test_a_draft_with_fewer_tokens_is_of_use():
    prompt = torch.tensor([[47, 3, 5, 40]])
    stats = generate(TARGET, DRAFTS["fewer tokens"], prompt, tree=TREE, max_new_tokens=60).stats
    assert stats.tokens_per_step > 1.2


def test_a_target_may_predict_more_tokens_than_it_can_be_fed():
    # Padded rows of a head: never the likeliest, so that the target itself never meets them. A draft proposes them.
    target = model(0, 40, 48, num_layers=2)
    with torch.no_grad():
        target.lm_head.weight[40:] = 0.0
    draft = model(1, 48)
    with torch.no_grad():
        draft.lm_head.weight[40:] *= 5.0
    prompt = torch.tensor([[39, 3, 5]])
    ids = prompt
    with torch.inference_mode():
        for _ in range(30):
            ids = torch.cat((ids, target(input_ids=ids).logits[:, -1, :40].argmax(-1)[:, None]), dim=1)
    assert generate(target, draft, prompt, tree=TREE, max_new_tokens=30).new_tokens == [ids[0, 3:].tolist()]
    sampled = generate(target, draft, prompt, tree=TREE, max_new_tokens=200, temperature=5.0)
    assert max(sampled.new_tokens[0]) >= 40  # at such a temperature it does meet them, and goes on


def test_a_prompt_may_hold_every_token_that_the_target_can_be_fed():
    target = model(0, 48, 40, num_layers=2)
    prompt = torch.tensor([[47, 3, 44]])
    expected = generate(target, None, prompt, max_new_tokens=20).new_tokens
    assert generate(target, DRAFTS["fewer tokens"], prompt, tree=TREE, max_new_tokens=20).new_tokens == expected
    with pytest.raises(ValueError, match=r"input_ids must hold tokens in \[0, 48\), got 48"):
        generate(target, None, torch.tensor([[48]]), max_new_tokens=20)


@pytest.mark.parametrize("target", [TARGET, model(6, 40, 48)], ids=["fewer in the draft", "wide head"])
def test_measuring_feeds_no_token_that_a_model_does_not_know(target):
    draft = model(1, 30, 40)
    options = {"context_lens": [8], "node_counts": [1, 4], "draft_node_counts": [2]}
    profile = measure_profile(target, draft, seconds=0.0, min_repeats=1, max_repeats=1, bandwidth=False, **options)
    found = overhead.measure_overhead(target, draft, profile, context_len=32, num_tokens=4, num_runs=1)
    assert found.step_overhead_ms >= 0
