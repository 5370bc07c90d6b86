"""Packed linear layers: the same products, never stale ones, and a way back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.models import adapt, pack_linear_layers, packing, unpack_linear_layers

TOKENS = torch.tensor([[5, 9, 2, 100, 40, 7]])


def model(dtype=torch.bfloat16, **fields):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=None, attention_bias=True, **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def packed_model(**fields):
    made = model(**fields)
    try:
        pack_linear_layers(made)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return made


@torch.no_grad()
def logits(of):
    return of(TOKENS).logits.float()


def assert_same(found, wanted):
    """Up to a few roundings of bfloat16."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) * 2**-6)


def test_products_are_those_of_the_plain_layers():
    plain, packed = model(), packed_model()
    assert pack_linear_layers(packed) == 2 * 7 + 1 == pack_linear_layers(adapt(packed))
    assert_same(logits(packed), logits(plain))
    with torch.inference_mode():
        assert_same(packed(TOKENS).logits.float(), logits(plain))
    assert all(torch.equal(one, other) for one, other in zip(packed.state_dict().values(), plain.state_dict().values()))


def test_changed_weights_are_packed_again():
    packed = packed_model()
    before = logits(packed)
    with torch.no_grad():
        packed.lm_head.weight.mul_(2)
    assert_same(logits(packed), 2 * before)
    packed.lm_head.weight = nn.Parameter(torch.zeros_like(packed.lm_head.weight))
    assert not logits(packed).any()
    assert logits(packed.to(torch.float32)).dtype == torch.float32  # torch's own way


def test_gradients_take_torchs_own_way():
    packed = packed_model()
    packed(TOKENS).logits.sum().backward()
    assert packed.lm_head.weight.grad is not None


def test_unpacked_layers_are_torchs_again():
    packed = packed_model()
    wanted = logits(packed)
    twin = copy.deepcopy(packed)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not logits(twin).any() and torch.equal(logits(packed), wanted)  # a copy packs its own
    unpack_linear_layers(packed)
    assert not any("forward" in layer.__dict__ for layer in packed.modules())
    unpack_linear_layers(packed)
    assert torch.equal(logits(packed), logits(model()))


def test_other_layers_are_left_alone():
    other = model()

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    other.lm_head.__class__ = Doubled
    other.model.layers[0].mlp.up_proj.forward = lambda input: input.new_zeros(*input.shape[:-1], 96)
    wanted = logits(other)
    try:
        assert pack_linear_layers(other) == 2 * 7 - 1
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert_same(logits(other), wanted)


def test_trees_decode_as_token_by_token():
    target, draft = packed_model(), packed_model(rope_theta=20000.0)
    options = {"max_new_tokens": 24, "eos_token_id": ()}
    tree = TokenTree([-1, 0, 0, 1])
    plain = generate(target, None, TOKENS, **options).new_tokens
    speculated = generate(target, draft, TOKENS, tree=tree, **options).new_tokens
    part = next((n for n, pair in enumerate(zip(plain[0], speculated[0])) if pair[0] != pair[1]), None)
    if part is not None:  # bfloat16: at a near-tie only
        text = torch.cat((TOKENS, torch.tensor([plain[0][:part]], dtype=torch.int64)), dim=1)
        with torch.no_grad():
            best, second = target(text).logits[0, -1].float().topk(2).values.tolist()
        assert best - second <= 2**-6 * abs(best)


def test_what_gains_nothing_or_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="must have linear layers in bfloat16 or float16 on a CPU, got none"):
        pack_linear_layers(model(torch.float32))
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        pack_linear_layers(nn.Linear(2, 2))
    monkeypatch.setattr(packing, "_SUPPORTED", {torch.bfloat16: "_no_such_operator"})
    with pytest.raises(BackendUnavailableError, match="this torch "):
        pack_linear_layers(model())
