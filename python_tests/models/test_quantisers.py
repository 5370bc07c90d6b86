"""Models quantised by the libraries themselves decode as they do alone; each is skipped where it is not installed.

`python python_tests/versions.py --set quantisers` makes an environment that has them all.
"""

from __future__ import annotations

import copy
import importlib
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from support.plain_decoding import TREES, assert_is_own_text, assert_trees_decode_as_alone
from support.tiny_families import tiny_model
from torch import nn

import sequoia_kernels.decoding.auto as auto
import sequoia_kernels.demo as demo
from sequoia_kernels import adapt, generate
from sequoia_kernels.demo import held_out_prompts, load_demo_pair
from sequoia_kernels.models import load_model

TARGET = Path(demo.__file__).parent / "pair" / "target"
DTYPES = [torch.float32, torch.bfloat16]
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
}


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes logs a line for every layer of every float32 forward."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def torchao(model: Any, bits: int) -> None:
    quantization = importlib.import_module("torchao.quantization")
    if bits == 8:
        config = quantization.Int8WeightOnlyConfig()
    else:
        config = importlib.import_module("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(
            group_size=32
        )
    quantization.quantize_(model, config)


def quanto(model: Any, bits: int) -> None:
    library = importlib.import_module("optimum.quanto")
    library.quantize(model, weights=library.qint8 if bits == 8 else library.qint4)
    library.freeze(model)
    model.eval()  # its layers begin in training mode


def bitsandbytes(model: Any, bits: int) -> None:
    library = importlib.import_module("bitsandbytes.nn")
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name == "lm_head":
            continue
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        if bits == 8:
            layer = library.Linear8bitLt(*sizes, has_fp16_weights=False)
            layer.weight = library.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            layer = library.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4")
            layer.weight = library.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        if linear.bias is not None:
            layer.bias = linear.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.to("cpu").eval())


class Form(NamedTuple):
    library: str
    quantise: Any
    bits: int
    runs: str = "modules"
    reason: str = ""  # why it is not native
    rounds_rows: bool = False  # quantises activations as well, which turns a rounding into a step


FORMS = {
    "torchao int8": Form("torchao", torchao, 8, runs="native"),
    "torchao int4": Form("torchao", torchao, 4, runs="native"),
    "quanto int8": Form("optimum.quanto", quanto, 8, reason="optimum.quanto.nn.qlinear.QLinear"),
    "quanto int4": Form("optimum.quanto", quanto, 4, reason="optimum.quanto.nn.qlinear.QLinear"),
    "bitsandbytes int8": Form("bitsandbytes", bitsandbytes, 8, reason="Linear8bitLt", rounds_rows=True),
    "bitsandbytes nf4": Form("bitsandbytes", bitsandbytes, 4, reason="Linear4bit"),
}


def quantised(model: Any, form: str) -> Any:
    entry = FORMS[form]
    pytest.importorskip(entry.library)
    entry.quantise(model, entry.bits)
    return model


@cache
def pair(dtype: torch.dtype) -> Any:
    return load_demo_pair(dtype)


@cache
def quantised_target(form: str, dtype: torch.dtype) -> Any:
    """Shared between tests: nothing may be changed in it."""
    return quantised(load_demo_pair(dtype).target, form)


@cache
def prompts() -> list[torch.Tensor]:
    tokenizer = pair(torch.float32).tokenizer
    texts = held_out_prompts(2, 200)
    return [
        tokenizer(text, return_tensors="pt").input_ids[:, :length] for text, length in zip(texts, (16, 7), strict=True)
    ]


def tiny(family: str, form: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(family, seed=1, **SIZES[family]).to(dtype)
    return model if form is None else quantised(model, form)


def tiny_prompt() -> torch.Tensor:
    return torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(3))


def is_exact(form: str, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and not FORMS[form].rounds_rows


@pytest.mark.parametrize(
    ("form", "dtype"),
    # the slower ones in bfloat16 by a smaller model, below
    [(form, dtype) for form in FORMS for dtype in DTYPES if dtype == torch.float32 or FORMS[form].runs == "native"],
    ids=str,
)
def test_text_of_a_quantised_target_is_its_own(form, dtype):
    target = quantised_target(form, dtype)
    steps = assert_trees_decode_as_alone(
        target, target, pair(dtype).draft, prompts(), is_exact(form, dtype), num_tokens=8
    )
    assert steps["chain"] > 1.5 and steps["tree"] > 1.5 and steps["star"] > 1.3


@pytest.mark.parametrize("form", FORMS)
def test_what_runs_a_quantised_model_and_why(form):
    model = adapt(quantised_target(form, torch.float32))
    assert model.runs == FORMS[form].runs
    assert FORMS[form].reason in model.not_native and (model.runs == "native") == (model.not_native == "")


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].runs == "native"])
def test_modules_of_what_runs_natively(form):
    target = tiny("llama", form)
    by_modules = adapt(target, forward="modules")
    assert_trees_decode_as_alone(by_modules, target, tiny("llama"), [tiny_prompt()], exactly=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_draft_changes_no_text(form):
    both = pair(torch.float32)
    draft = quantised(load_demo_pair(torch.float32).draft, form)
    steps = assert_trees_decode_as_alone(both.target, both.target, draft, prompts(), exactly=True, num_tokens=8)
    assert steps["tree"] > 1.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_families(form, family, dtype):
    model = tiny(family, form, dtype)
    steps = assert_trees_decode_as_alone(
        model, model, tiny(family, None, dtype), [tiny_prompt(), tiny_prompt()[:, :4]], is_exact(form, dtype)
    )
    assert steps["tree"] > 1.2


@pytest.mark.parametrize("form", FORMS)
def test_the_tree_that_is_chosen_by_itself(form, monkeypatch):
    """The default, which tells models apart by some of their numbers: those of target and draft."""
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.2)
    target, draft = tiny("llama", form), tiny("llama", form)
    text = generate(target, draft, tiny_prompt(), max_new_tokens=12, eos_token_id=()).new_tokens[0]
    assert_is_own_text(target, tiny_prompt(), text, is_exact(form, torch.float32))


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_told_apart_and_have_memory(form):
    other = quantised(tiny_model("llama", seed=2, **SIZES["llama"]), form)
    models = [adapt(model) for model in (tiny("llama", form), tiny("llama", form), other)]
    digests = [auto._weights_digest(model) for model in models]
    assert digests[0] == digests[1] != digests[2]
    assert all(weight.data_ptr() for weight in models[0].weights())


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_those_that_the_numbers_stand_for(form):
    assert adapt(tiny("llama", form)).num_parameters == adapt(tiny("llama")).num_parameters


def assert_changed_by(change: Any, model: Any, form: str) -> None:
    draft, settings = tiny("llama"), {"tree": TREES["tree"], "max_new_tokens": 12}
    before = generate(model, draft, tiny_prompt(), **settings).new_tokens[0]
    changed = change(model)
    after = generate(changed, draft, tiny_prompt(), **settings).new_tokens[0]
    assert after != before
    assert_is_own_text(changed, tiny_prompt(), after, is_exact(form, torch.float32))


@pytest.mark.parametrize("form", [form for form in FORMS if "quanto" not in form])  # it cannot: torch's error
def test_copies(form):
    def copied(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.embed_tokens.weight.mul_(-1.5)
            other.model.layers[0].input_layernorm.weight.mul_(-1.0)
        return other

    model = tiny("llama", form)
    assert_changed_by(copied, model, form)
    assert_trees_decode_as_alone(model, model, tiny("llama"), [tiny_prompt()], is_exact(form, torch.float32))


@pytest.mark.parametrize("form", [form for form in FORMS if "bitsandbytes" not in form])  # it cannot on a CPU
def test_numbers_that_are_loaded_later(form):
    def loaded(model):
        other = quantised(tiny_model("llama", seed=2, **SIZES["llama"]), form)
        model.load_state_dict(other.state_dict())
        return model

    assert_changed_by(loaded, tiny("llama", form), form)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_is_quantised_later_is_noticed(form):
    model = tiny("llama")
    held = adapt(model)
    assert held.runs == "native"
    quantised(model, form)
    text = generate(held, tiny("llama"), tiny_prompt(), tree=TREES["tree"], max_new_tokens=12).new_tokens[0]
    assert held.runs == FORMS[form].runs
    assert_is_own_text(model, tiny_prompt(), text, is_exact(form, torch.float32))


def test_quantos_weights_follow_updates_until_they_are_frozen():
    library = pytest.importorskip("optimum.quanto")
    model = tiny("llama")
    library.quantize(model, weights=library.qint8)
    with pytest.raises(ValueError, match=r"training mode in .*call model.eval\(\)"):
        adapt(model)
    held = adapt(model.eval())
    texts = []
    for change in (lambda: None, lambda: model.model.layers[0].mlp.down_proj.weight.mul_(-2.0), None):
        with torch.no_grad():
            library.freeze(model.eval()) if change is None else change()
        model.eval()
        texts.append(generate(held, tiny("llama"), tiny_prompt(), tree=TREES["tree"], max_new_tokens=12).new_tokens[0])
        assert_is_own_text(model, tiny_prompt(), texts[-1], exactly=True)
    assert texts[0] != texts[1] == texts[2]


def test_torchaos_quantised_activations_run_by_modules():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny("llama")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    assert "activations are quantised" in adapt(model).not_native
    assert_trees_decode_as_alone(model, model, tiny("llama"), [tiny_prompt()], exactly=False)


# ---- by transformers' own door ----


def _configuration(form: str) -> Any:
    if form == "torchao int8":
        return transformers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    if form.startswith("quanto"):
        return transformers.QuantoConfig(weights=form.split()[1])
    if form == "bitsandbytes int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


@pytest.mark.parametrize("form", [form for form in FORMS if form != "torchao int4"])
def test_models_that_transformers_quantises(form, tmp_path):
    """Loaded with a quantisation configuration; and saved and loaded again, where the library can."""
    pytest.importorskip(FORMS[form].library)
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TARGET, quantization_config=_configuration(form), dtype=torch.float32, device_map="cpu"
    )
    models = [model]
    if not form.startswith("quanto"):
        model.save_pretrained(tmp_path)
        models.append(load_model(tmp_path))
    for target in models:
        assert adapt(target).runs == FORMS[form].runs
        assert adapt(target).num_parameters == adapt(pair(torch.float32).target).num_parameters
        text = generate(target, pair(torch.float32).draft, prompts()[0], tree=TREES["tree"], max_new_tokens=8)
        assert_is_own_text(model, prompts()[0], text.new_tokens[0], is_exact(form, torch.float32))
