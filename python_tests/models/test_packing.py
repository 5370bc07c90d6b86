"""Packed linear layers: the same products, never stale ones, and a way back."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapters import add_adapters
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.models import adapt, load_model, pack_linear_layers, packing, unpack_linear_layers


class StandIn:
    """oneDNN's operators on a CPU that lacks them: what is packed is a copy."""

    _is_mkldnn_bf16_supported = _is_mkldnn_fp16_supported = staticmethod(lambda: True)
    _reorder_linear_weight = staticmethod(lambda weight, batch: weight.clone())
    _linear_pointwise = staticmethod(lambda input, packed, bias, *_: torch.nn.functional.linear(input, packed, bias))


@pytest.fixture(autouse=True, params=["oneDNN", "stand-in"])
def operators(request, monkeypatch):
    if request.param == "stand-in":
        monkeypatch.setattr(packing, "_operators", StandIn)


TOKENS = torch.tensor([[5, 9, 2, 100, 40, 7]])


def model(dtype=torch.bfloat16, **fields):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=None, attention_bias=True, **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def packed_model(**fields):
    return pack_or_skip(model(**fields))


def pack_or_skip(made):
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


def packed_parts(of):
    forwards = [layer.__dict__.get("forward") for layer in of.modules()]
    return [
        forward for forward in forwards if isinstance(forward, packing._PackedForward) and forward.current() is not None
    ]


WRITERS = {
    "in place": lambda layer: layer.weight.mul_(2),
    "through a view": lambda layer: layer.weight[3:].mul_(2),
    "through detach": lambda layer: layer.weight.detach().mul_(2),
    "through data, as adapters are merged": lambda layer: setattr(layer.weight, "data", layer.weight.data.add_(1)),
    "through a view of data": lambda layer: layer.weight.data.t().mul_(2),
    "through numpy": lambda layer: layer.weight.detach().view(torch.int16).numpy().fill(0),
    "by exchanging data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "by another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight.data)),
    "by another's data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.detach()),
    "by another shape of the same": lambda layer: setattr(layer.weight, "data", layer.weight.data.t()),
    "by a load": lambda layer: layer.load_state_dict({name: 0 * t for name, t in layer.state_dict().items()}),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_writes_a_weight_is_noticed(writer, inference, caplog):
    with torch.inference_mode(inference):
        packed = packed_model()
        square = packed.model.layers[0].self_attn.q_proj
        assert square.weight.is_inference() == inference
        rows = torch.randn(3, 64, dtype=torch.bfloat16)
        before = square(rows)
        with torch.no_grad():
            WRITERS[writer](square)
            wanted = torch.nn.functional.linear(rows, square.weight, square.bias)
            assert not torch.equal(wanted, before)
            assert torch.equal(square(rows), wanted)
            assert torch.equal(square(rows), wanted)
        assert len(packed_parts(packed)) == 2 * 7
        assert caplog.text.count("packed weights were changed") == 1
        assert pack_linear_layers(packed) == 2 * 7 + 1 == len(packed_parts(packed))
        assert_same(square(rows).float(), wanted.float())


def test_a_writer_from_before_packing_is_noticed():
    packed = model()
    data = packed.lm_head.weight.data
    pack_or_skip(packed)
    data.zero_()
    assert not logits(packed).any()


def test_merged_adapters_are_noticed(caplog):
    plain, packed = model(), model()
    for of in (plain, packed):
        add_adapters(of)
        of.eval()
    pack_or_skip(packed)
    assert_same(logits(packed), logits(plain))
    for of in (plain, packed):
        for layer in of.model.layers:
            layer.self_attn.q_proj.merge()
    assert_same(logits(packed), logits(plain))
    assert caplog.text.count("packed weights were changed") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cast_takes_torchs_own_way(dtype):
    packed = packed_model().to(dtype)
    assert torch.equal(logits(packed), logits(model().to(dtype)))


def test_reading_is_not_writing():
    packed = packed_model()
    logits(packed)
    copy.deepcopy(packed)
    packed.state_dict()
    assert packed.lm_head.weight.sum().isfinite() and packed.lm_head.weight.numel()
    assert len(packed_parts(packed)) == 2 * 7 + 1


def test_a_loaded_model_is_packed(tmp_path):
    """Its weights lie in a mapped file."""
    model().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    wanted = logits(loaded)
    pack_or_skip(loaded)
    assert len(packed_parts(loaded)) == 2 * 7 + 1
    assert_same(logits(loaded), wanted)
    with torch.no_grad():
        loaded.lm_head.weight.data *= 2
    assert_same(logits(loaded), 2 * wanted)


class Quantised(torch.Tensor):
    """A weight that holds something else than its numbers."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.nn.functional.linear:
            return arguments[0].new_zeros(*arguments[0].shape[:-1], 131)
        return super().__torch_function__(function, types, arguments, options or {})


def test_weights_of_other_kinds_are_left_alone():
    def quantise(of):
        of.lm_head.weight = nn.Parameter(of.lm_head.weight.data.as_subclass(Quantised), requires_grad=False)

    other = model()
    quantise(other)
    pack_or_skip(other)
    assert len(packed_parts(other)) == 2 * 7
    packed = packed_model()
    quantise(packed)  # afterwards
    assert not logits(packed).any()
    unpack_linear_layers(packed)
    assert not any("forward" in layer.__dict__ for layer in packed.modules())


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
    assert not logits(twin).any() and torch.equal(logits(packed), wanted)
    assert not packed_parts(twin)  # until it is packed itself
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
    pack_or_skip(other)
    assert len(packed_parts(other)) == 2 * 7 - 1
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
