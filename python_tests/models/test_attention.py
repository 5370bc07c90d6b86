"""The attention door: a callable or a backend's name in the place of the op, in every layer of a forward."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from support.tiny_families import tiny_model

from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.models import StepContext, TreeModel, TreeStep, prefill

TREE = TokenTree([-1, 0, 0, 1, 1, 2])
PROMPT = torch.tensor([[5, 9, 2, 7]])


def plain_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: StepContext, **settings
) -> torch.Tensor:
    """Attention in plain torch, one request and one row after the other, as the protocol describes it."""
    batch_size, num_rows, num_heads, width = query.shape
    group = num_heads // keys.shape[2]
    output = torch.empty(batch_size, num_rows, num_heads, values.shape[3], dtype=query.dtype)
    for request, committed in enumerate(context.cache_lens.tolist()):
        for row, words in enumerate(context.tree_mask.tolist()):
            slots = [slot for slot in range(32 * len(words)) if words[slot // 32] >> slot % 32 & 1]
            depth = len(slots) - 1  # a node sees its ancestors and itself
            first = 0
            if (window := settings["sliding_window"]) is not None:
                first = max(0, committed + depth - window + 1)
                slots = [slot for level, slot in enumerate(slots) if level > depth - window]
            seen = [*range(first, committed), *(committed + slot for slot in slots)]
            for head in range(num_heads):
                scores = keys[request, seen, head // group].double() @ query[request, row, head].double()
                scores = scores * (settings["scale"] or 1 / math.sqrt(width))
                if (softcap := settings["softcap"]) is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if (sinks := settings["sinks"]) is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].double()])
                weights = scores.softmax(0)[: len(seen)]
                output[request, row, head] = (weights @ values[request, seen, head // group].double()).to(query.dtype)
    return output


def scored(model: TreeModel) -> torch.Tensor:
    """Logits of a tree behind a prompt, for two requests of different lengths."""
    prompts = torch.tensor([[5, 9, 2, 7, 3], [8, 1, 0, 0, 0]])
    lens = torch.tensor([5, 2], dtype=torch.int32)
    cache = model.new_cache(2, 16)
    prefill(model, cache, prompts, lens)
    tokens = torch.tensor([[4, 6, 1, 3, 2, 8], [7, 7, 2, 9, 1, 5]])
    return model.forward(tokens, cache, lens, TreeStep.of(TREE.tensors()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])  # windows, soft-caps, sinks, Dv != D
def test_an_attention_in_plain_torch_gives_the_same_logits(family: str) -> None:
    plain = tiny_model(family)
    calls = []

    def attend(*args, **settings) -> torch.Tensor:
        calls.append(settings["module"])
        return plain_attention(*args, **settings)

    model = adapt(plain, attention=attend)
    expected = scored(adapt(plain))
    assert not calls
    torch.testing.assert_close(scored(model), expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2 * model.num_layers and len(set(calls)) == model.num_layers


def test_generate_reads_the_cache_by_the_models_own_attention() -> None:
    plain, draft = tiny_model("llama"), tiny_model("llama", seed=1)
    options = {"tree": TREE, "max_new_tokens": 6, "temperature": 0.0}
    expected = generate(plain, draft, PROMPT, **options).new_tokens
    calls = []

    def attend(*args, **settings) -> torch.Tensor:
        calls.append(1)
        return plain_attention(*args, **settings)

    assert generate(adapt(plain, attention=attend), draft, PROMPT, **options).new_tokens == expected
    assert calls  # and not an engine that was kept from the call before
    calls.clear()
    assert generate(plain, draft, PROMPT, **options).new_tokens == expected
    assert not calls


def test_a_backend_by_its_name() -> None:
    plain = tiny_model("llama")
    torch.testing.assert_close(scored(adapt(plain, attention="reference")), scored(adapt(plain)), atol=1e-5, rtol=1e-5)
    assert adapt(plain, attention="auto").attention is adapt(plain).attention


def test_a_tree_model_keeps_its_attention_until_another_is_asked_for() -> None:
    model = adapt(tiny_model("llama"), attention=plain_attention)
    assert adapt(model) is model and adapt(model, attention=plain_attention) is model
    other = adapt(model, attention="auto")
    assert other is not model and other.model is model.model
    assert other.forward_state() != model.forward_state()
    compiled = adapt(model, compile=True)
    assert compiled.attention is plain_attention and adapt(compiled, attention="auto").compile_mode == "default"
    for twin in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert twin.attention is plain_attention


def test_a_wrong_attention_is_refused() -> None:
    plain = tiny_model("llama")
    with pytest.raises(ValueError, match=r"adapt: attention must be callable or one of auto, .*reference.*got 'flash'"):
        adapt(plain, attention="flash")
    with pytest.raises(TypeError, match="adapt: attention must be callable or the name of a backend, got int"):
        adapt(plain, attention=3)
