"""Native forwards on weights of few bits: what their numbers say, as they lie, the same bits however a node is fed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from support.native_models import CASES, behind, case_model, decode, lens_of, path_to, score_tree, small_case
from support.quantised_models import (
    FORMS,
    BlocksOf64,
    GPTQLinear,
    Int4OpaqueTensor,
    Int8Tensor,
    dequantised,
    quantise,
)
from support.tiny_families import tiny_model
from torch import nn

import sequoia_kernels.decoding.auto as auto
from sequoia_kernels import _host
from sequoia_kernels.models import adapt, quantised
from sequoia_kernels.models.native import INSTRUCTION_SET_VARIABLE
from sequoia_kernels.models.tree_step import TreeStep

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT4_FORMS = [form for form in FORMS if form != "int8"]
VOCAB = 112  # one block of torch's that is not whole

# Sizes that fill no block, and several; groups that fill a chunk, part of one, and more than one.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True},
    "gemma2": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "phi3": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 192},  # a split projection
    "gpt_neox": {"num_attention_heads": 6, "rotary_pct": 0.5},  # biases, interleaved
    "starcoder2": {"num_attention_heads": 6, "num_key_value_heads": 2, "use_bias": True},  # a plain MLP
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 224, "max_position_embeddings": 512
}  # fmt: skip


@pytest.fixture(autouse=True)
def same_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def few_bits(form: str, dtype: torch.dtype = torch.float32, name: str = "llama", group: int = 32, **sizes: Any) -> Any:
    model = tiny_model(name, seed=len(form), **{**COMMON, **SIZES[name], **sizes}).to(dtype)
    assert quantise(model, form, group) >= 5
    return model


@cache
def native_of(form: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Shared between tests: nothing may be changed in it."""
    return adapt(few_bits(form, dtype, **sizes), forward="native")


def assert_close(native, exact, seeds=(0, 1)):
    for seed in seeds:
        case = small_case(seed)
        expected = score_tree(exact, *case)
        error = (score_tree(native, *case) - expected).abs().max() / max(1.0, float(expected.std()))
        assert float(error) <= 1e-4


# ---- what the numbers say ----


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_weights_in_float32(form, name):
    model = few_bits(form, name=name)
    native = adapt(model, forward="native")
    assert ("int8" if form == "int8" else "int4") in native._own.weight_forms
    assert_close(native, adapt(dequantised(model), forward="modules"))


@pytest.mark.parametrize("name", [name for name, (family, _) in CASES.items() if family != "gpt2"])
def test_int8_in_every_family(name):
    model = case_model(name)
    assert quantise(model, "int8")
    assert_close(adapt(model, forward="native"), adapt(dequantised(model), forward="modules"), seeds=(3,))


@pytest.mark.parametrize(
    ("form", "group"), [("int4", 64), ("gptq", 16), ("gptq", 48), ("gptq", -1), ("gptq-order", 16)]
)
def test_groups_of_any_size(form, group):
    sizes = {"hidden_size": 384, "intermediate_size": 576, "head_dim": 64}
    if form == "gptq" and group == -1:
        sizes["intermediate_size"] = 584  # one group, that ends in the middle of a chunk and of a vector
    model = few_bits(form, group=group, **sizes)
    assert_close(adapt(model, forward="native"), adapt(dequantised(model), forward="modules"))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_errs_no_more_than_the_modules(form, dtype):
    model = few_bits(form, dtype)
    exact = adapt(dequantised(model), forward="modules")
    errors = []
    for own in (adapt(model, forward="native"), adapt(model, forward="modules")):
        scored = [(score_tree(own, *small_case(seed)), score_tree(exact, *small_case(seed))) for seed in range(2)]
        assert scored[0][0].dtype == dtype
        errors.append(torch.cat([(given.float() - expected).abs().flatten() for given, expected in scored]))
    assert errors[0].mean() <= errors[1].mean() and errors[0].max() <= errors[1].max()


# ---- the same bits ----


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_trees_are_the_bits_of_their_paths(form, dtype):
    """For every number of nodes that is treated in a way of its own: one, a few, one block and more."""
    native = native_of(form, dtype, intermediate_size=1216)  # enough for threads
    prompt, tree, nodes = small_case(10, nodes=60)
    torch.set_num_threads(2)
    scored = score_tree(native, prompt, tree, nodes)
    cache = behind(native, prompt)
    path = path_to(tree, tree.num_nodes - 1)
    torch.set_num_threads(1)
    assert torch.equal(decode(native, cache, prompt.shape[1], nodes[0, path]), scored[path])
    topology = tree.tensors()
    for count in (2, 3, 4, 5, 6, 7, 9, 13):
        first = list(range(min(count, tree.num_nodes)))
        logits = native.forward(nodes[:, first], cache, lens_of(prompt.shape[1]), TreeStep.of(topology, first))
        assert torch.equal(logits[0], scored[first])


@pytest.mark.parametrize("form", FORMS)
def test_threads_and_requests_change_no_bit(form):
    native = native_of(form, torch.bfloat16, intermediate_size=1216)
    prompt, tree, nodes = small_case(21)
    scored = []
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        scored.append(score_tree(native, prompt, tree, nodes))
    assert all(torch.equal(scored[0], other) for other in scored)
    lens = lens_of(prompt.shape[1], 3)
    cache, step = native.new_cache(2, 224), TreeStep.of(tree.tensors())
    alone = behind(native, prompt)
    for mine, other in zip(cache.tensors(), alone.tensors(), strict=True):
        mine[:, : other.shape[1]] = other
    together = native.forward(nodes.repeat(2, 1), cache, lens, step)
    assert torch.equal(together[0], scored[0])
    assert torch.equal(together[1], native.forward(nodes, alone, lens_of(3), step)[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_instruction_set(monkeypatch, form):
    model, case = few_bits(form), small_case(40)
    exact = adapt(dequantised(model), forward="modules")
    for instruction_set in _host.forward_instruction_sets():
        monkeypatch.setenv(INSTRUCTION_SET_VARIABLE, instruction_set)
        native = adapt(few_bits(form), forward="native")
        assert native._own.instruction_set == instruction_set
        assert_close(native, exact, seeds=(40,))
        prompt, tree, nodes = case
        path = path_to(tree, tree.num_nodes - 1)
        scored = score_tree(native, *case)
        assert torch.equal(decode(native, behind(native, prompt), prompt.shape[1], nodes[0, path]), scored[path])


def test_blocks_of_wider_vectors(monkeypatch):
    """As torch packs them on other CPUs: every instruction set reads them."""
    monkeypatch.setattr(quantised, "_rows_of_torchs_blocks", lambda: 64)
    kind = type("Int4OpaqueTensor", (BlocksOf64,), {})
    for instruction_set in _host.forward_instruction_sets():
        monkeypatch.setenv(INSTRUCTION_SET_VARIABLE, instruction_set)
        model = few_bits("int8")
        for module in model.modules():
            if type(module) is nn.Linear:
                weight = kind.of(module.weight.exact())
                module.weight = nn.Parameter(weight, requires_grad=False)
        native = adapt(model, forward="native")
        assert native._own.weight_forms == "int4"
        assert_close(native, adapt(dequantised(model), forward="modules"))


# ---- the model's own weights ----


def assert_follows(native, model, before=None):
    case = small_case(50)
    scored = score_tree(native, *case)
    expected = score_tree(adapt(dequantised(model), forward="modules"), *case)
    assert float((scored - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.std()))
    assert before is None or float((scored - before).abs().max()) > 1e-2
    return scored


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_changed_parts_are_seen_by_the_next_forward(form):
    model = few_bits(form)
    native = adapt(model, forward="native")
    scored = assert_follows(native, model)
    layer = model.model.layers[1].self_attn.q_proj
    kind = Int8Tensor if form == "int8" else Int4OpaqueTensor
    with torch.no_grad():
        getattr(layer.weight, kind.tensors[1]).mul_(-1.5)
        scored = assert_follows(native, model, scored)
        layer.weight = nn.Parameter(kind.of(torch.randn(96, 96) * 0.3), requires_grad=False)
        scored = assert_follows(native, model, scored)
        layer.weight.qdata = layer.weight.qdata.flip(0).contiguous()
        assert_follows(native, model, scored)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_weights_that_are_made_of_others_are_looked_at_by_those(form):
    """By the digest that tells models apart, which knows no operators of such weights, in inference mode as well."""
    model = few_bits(form)
    native = adapt(model, forward="native")
    before = auto._weights_digest(native)
    with torch.inference_mode():
        assert auto._weights_digest(native) == before
    assert all(weight.data_ptr() for weight in native.weights())
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.qdata = weight.qdata.flip(0).contiguous()
    assert auto._weights_digest(native) != before


def test_changed_buffers_are_seen_by_the_next_forward():
    """The order of the columns as well, whose way of being multiplied it changes."""
    model = few_bits("gptq")
    native = adapt(model, forward="native")
    scored = assert_follows(native, model)
    layer = model.model.layers[0].mlp.gate_proj
    layer.scales.mul_(2.0)
    scored = assert_follows(native, model, scored)
    layer.qzeros = layer.qzeros.flip(1).contiguous()
    scored = assert_follows(native, model, scored)
    layer.g_idx.copy_(layer.g_idx.flip(0))
    assert_follows(native, model, scored)


def test_columns_of_no_group_read_nothing_else():
    model = few_bits("gptq")
    native = adapt(model, forward="native")
    model.model.layers[0].mlp.gate_proj.g_idx[5] = -7
    model.model.layers[0].mlp.up_proj.g_idx[5] = 1 << 30
    assert bool(score_tree(native, *small_case(2)).isfinite().all())


def test_a_plain_weight_in_the_place_of_one_of_few_bits():
    """Refused by the next forward, and noticed by a new cache, though shape and dtype are the same."""
    model = few_bits("int8")
    native = adapt(model, forward="native")
    prompt, tree, nodes = small_case(2)
    kept = behind(native, prompt)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.exact(), requires_grad=False)
    with pytest.raises(ValueError, match="forward: qdata must keep its shape"):
        native.forward(nodes, kept, lens_of(prompt.shape[1]), TreeStep.of(tree.tensors()))
    assert_follows(native, model)


def test_nothing_is_copied():
    """Every tensor that a call reads is one of the model's."""
    model = few_bits("gptq")
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    table = adapt(model, forward="native")._own.look_up_weights()
    assert set(table.tolist()) <= own


# ---- refusals ----


def refused(model: Any) -> str:
    native = adapt(model)
    assert native.runs == "modules"
    return native.not_native


def first_layer(model: Any) -> Any:
    return model.model.layers[0].self_attn.q_proj


def test_quantised_activations_are_refused():
    model = few_bits("int8")
    first_layer(model).weight.act_quant_kwargs = {"granularity": "row"}
    assert "Int8Tensor with act_quant_kwargs" in refused(model)


def test_a_scale_for_several_rows_is_refused():
    model = few_bits("int8")
    weight = first_layer(model).weight
    weight.block_size, weight.scale = [96, 96], weight.scale[:1].clone()
    assert "a scale for every block of [96, 96]" in refused(model)


def test_columns_of_a_weight_that_lie_together_are_refused():
    model = few_bits("int8")
    weight = first_layer(model).weight
    weight.qdata = weight.qdata.t().contiguous().t()
    assert "qdata is [96, 96]" in refused(model) and "row by row" in refused(model)


class OtherGPTQ(GPTQLinear):
    def forward(self, states):
        return super().forward(states) * 1.5


def test_a_module_that_computes_something_else_from_the_same_buffers_is_refused():
    model = few_bits("gptq")
    first_layer(model).__class__ = OtherGPTQ
    assert "OtherGPTQ does not compute what its tensors say" in refused(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "bits", 3), "has 3 bits"),
        (lambda layer: setattr(layer, "group_size", 64), "has 3 groups of 96 inputs"),
        (lambda layer: setattr(layer, "scales", layer.scales.double()), "scales is"),
        (lambda layer: layer.add_module("adapter", nn.Identity()), "has modules of its own"),
    ],
)
def test_other_forms_of_gptq_are_refused(change, reason):
    model = few_bits("gptq")
    change(first_layer(model))
    assert reason in refused(model)


def test_split_projections_of_int4_need_whole_blocks():
    model = few_bits("int4", name="phi3", intermediate_size=96)
    assert "split behind 96 rows" in refused(model)


# ---- descriptions ----

_INT8 = (1, 1, 0, -1, -1, 0, 16, 0, 0)
_WORDS = (2, 1, 0, 2, 3, 32, 128, 0, 0)
_BLOCKS = (3, 1, 0, -1, -1, 32, 128, 32, 0)


@pytest.mark.parametrize(
    ("matrix", "rule"),
    [
        ((0, 0, 16, 64, 0, False, *_INT8[:4]), "9 fields more"),
        ((0, 0, 16, 64, 0, False, 4, *_INT8[1:]), "packing must be in 1..3"),
        ((0, 0, 16, 64, 0, False, 1, -1, *_INT8[2:]), "must have scales"),
        ((0, 1, 16, 64, 0, False, *_INT8), "rows of its tensor"),
        ((0, 0, 16, 64, 0, True, *_INT8), "rows of its tensor"),
        ((0, 0, 64, 64, 0, False, *_WORDS[:5], 24, *_WORDS[6:]), "multiple of 16 columns"),
        ((0, 8, 64, 64, 0, False, *_WORDS), "begin at a multiple of 64 rows"),
        ((0, 0, 64, 60, 0, False, *_WORDS), "multiple of 8 columns"),
        ((0, 0, 64, 64, 0, False, *_WORDS[:3], -1, *_WORDS[4:]), "words must have zeros"),
        ((0, 0, 64, 64, 0, False, *_BLOCKS[:7], 16, 0), "blocks must be of 32 or 64 rows"),
        ((0, 0, 24, 64, 0, False, *_BLOCKS), "a multiple of 16 rows"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(matrix, rule):
    fields = {
        "width": 64, "embedding": matrix, "positions": None, "position_offset": 0, "embedding_scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=rule):
        _host.Forward(fields, "")


# ---- torchao itself ----


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_torchao(form, dtype):
    """Its classes are what the stand-ins stand for."""
    quantization = pytest.importorskip("torchao.quantization")
    if form == "int8":
        config = quantization.Int8WeightOnlyConfig()
    else:
        config = pytest.importorskip("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=32)
    model = tiny_model("llama", seed=3, **COMMON, **SIZES["llama"]).to(dtype)
    quantization.quantize_(model, config)
    native, modules = adapt(model, forward="native"), adapt(model, forward="modules")
    assert native._own.weight_forms == form
    case = small_case(1)
    expected = score_tree(modules, *case).float()
    error = (score_tree(native, *case).float() - expected).abs()
    assert float(error.max() if dtype == torch.float32 else error.mean()) <= (1e-4 if dtype == torch.float32 else 0.05)
