"""PEFT's own adapters: exchanged, disabled, merged between requests, and as the wrapper that PEFT gives.

`python python_tests/versions.py --set quantisers` makes an environment that has peft.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.plain_decoding import TREES, assert_trees_decode_as_alone, own_text
from support.tiny_families import tiny_model

import sequoia_kernels.decoding.auto as auto
from sequoia_kernels import adapt, generate
from sequoia_kernels.errors import UnsupportedModelError

peft = pytest.importorskip("peft")

PROMPTS = [torch.tensor([[5, 9, 11, 3, 60, 22, 8, 41]]), torch.tensor([[7, 2, 33]])]


def with_adapters(
    family: str = "llama", names: tuple[str, ...] = ("one", "two"), seed: int = 5, **settings: Any
) -> Any:
    """A tiny model in a `PeftModel`, with adapters of random weights that are far from nothing."""
    plain = tiny_model(family)
    torch.manual_seed(seed)
    linear = {"target_modules": "all-linear", "r": 4, "lora_alpha": 16, "init_lora_weights": False}
    configuration = peft.LoraConfig(**{**linear, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(plain, configuration, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configuration)
    return model.eval()


def text_of(target: Any, draft: Any) -> list[int]:
    settings = {"tree": TREES["tree"], "max_new_tokens": 12, "eos_token_id": ()}
    return generate(target, draft, PROMPTS[0], **settings).new_tokens[0]


@pytest.fixture(params=["wrapper", "model inside"])
def given(request):
    """Give of a PEFT model what is passed to `generate`."""
    return (lambda model: model) if request.param == "wrapper" else (lambda model: model.get_base_model())


def test_each_request_has_the_adapter_that_is_set(given):
    model, draft = with_adapters(), tiny_model("llama")
    texts = {}
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert_trees_decode_as_alone(given(model), model, draft, PROMPTS, exactly=True)
        texts[name] = own_text(model, PROMPTS[0], 12)
    assert texts["one"] != texts["two"]


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_other_families(family):
    model = with_adapters(family)
    texts = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        assert_trees_decode_as_alone(model, model, tiny_model(family), PROMPTS, exactly=True)
        texts[name] = own_text(model, PROMPTS[0], 12)
    assert texts["one"] != texts["two"]


def test_low_precision():
    dtype = torch.bfloat16
    model = with_adapters().to(dtype)
    for name in ("one", "two"):
        model.set_adapter(name)
        assert_trees_decode_as_alone(model, model, tiny_model("llama").to(dtype), PROMPTS, exactly=False)


def test_adapters_of_target_and_draft(given):
    model, draft = with_adapters(), with_adapters(seed=6)
    for of_target, of_draft in (("one", "one"), ("one", "two"), ("two", "two"), ("two", "one")):
        model.set_adapter(of_target)
        draft.set_adapter(of_draft)
        assert text_of(given(model), given(draft)) == own_text(model, PROMPTS[0], 12)


def test_a_draft_with_the_targets_adapter_is_always_right():
    """Both follow the switch: another adapter than the target's proposes other tokens."""
    model, draft = with_adapters(), with_adapters()
    steps = {}
    for name in ("one", "two"):
        draft.set_adapter(name)
        output = generate(model, draft, PROMPTS[0], tree=TREES["chain"], max_new_tokens=10, eos_token_id=())
        steps[name] = output.stats.tokens_per_step
    assert steps["one"] == 5.0 > steps["two"]


def test_one_base_as_target_with_and_draft_without_adapters():
    """The same modules cannot be both at once; a copy can."""
    model = with_adapters()
    draft = copy.deepcopy(model)
    with draft.disable_adapter():
        assert text_of(model, draft) == own_text(model, PROMPTS[0], 12)


def test_several_adapters_at_once():
    model = with_adapters()
    model.base_model.set_adapter(["one", "two"])
    assert_trees_decode_as_alone(model, model, tiny_model("llama"), PROMPTS, exactly=True)
    assert own_text(model, PROMPTS[0], 12) != own_text(with_adapters(), PROMPTS[0], 12)


def test_adapters_that_add_nothing_run_native(given):
    """Disabled or merged; a tree model that is held follows."""
    model, base = with_adapters(), tiny_model("llama")
    held = adapt(given(model))
    assert held.runs == "modules" and "peft.tuners.lora.layer.Linear" in held.not_native
    with model.disable_adapter():
        assert text_of(held, base) == own_text(base, PROMPTS[0], 12) == own_text(model, PROMPTS[0], 12)
        assert held.runs == "native"
    texts = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        texts[name] = own_text(model, PROMPTS[0], 12)
        assert text_of(held, base) == texts[name] and held.runs == "modules"
        model.merge_adapter()
        assert text_of(held, base) == own_text(model, PROMPTS[0], 12) == texts[name]
        assert held.runs == "native"
        model.unmerge_adapter()
    assert text_of(held, base) == texts["two"] != texts["one"] and held.runs == "modules"


def test_adapters_that_are_merged_and_then_disabled():
    model, base = with_adapters(), tiny_model("llama")
    model.merge_adapter()
    with model.disable_adapter():
        assert text_of(model, base) == own_text(base, PROMPTS[0], 12)
    assert text_of(model, base) == own_text(model, PROMPTS[0], 12) != own_text(base, PROMPTS[0], 12)


def test_the_tree_that_is_chosen_by_itself(monkeypatch):
    """The default, which keeps what it learns apart for each adapter."""
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.2)
    model, digests = with_adapters(), set()
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        output = generate(model, tiny_model("llama"), PROMPTS[0], max_new_tokens=12, eos_token_id=())
        assert output.new_tokens[0] == own_text(model, PROMPTS[0], 12)
        digests.add(auto._weights_digest(adapt(model)))
    assert len(digests) == 2


def test_merged_and_unloaded():
    model = with_adapters()
    expected = own_text(model, PROMPTS[0], 12)
    merged = model.merge_and_unload()
    assert text_of(merged, tiny_model("llama")) == expected and adapt(merged).runs == "native"


def test_updates_of_an_adapter_are_seen():
    model, draft = with_adapters(), tiny_model("llama")
    held = adapt(model)
    before = text_of(held, draft)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B.one" in name:
                weight.mul_(-1.0)
    assert text_of(held, draft) == own_text(model, PROMPTS[0], 12) != before


def test_adapters_of_embeddings_and_head():
    """Of embeddings alone, which are no linear layer, and merged into them."""
    for settings in (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = with_adapters(**settings)
        assert adapt(model).runs == "modules"
        assert_trees_decode_as_alone(model, model, tiny_model("llama"), PROMPTS, exactly=True)
    model = with_adapters(target_modules=["embed_tokens", "lm_head"])
    model.merge_adapter()
    assert adapt(model).runs == "native"
    assert_trees_decode_as_alone(model, model, tiny_model("llama"), PROMPTS, exactly=True)


@pytest.mark.parametrize("kind", ["dora", "ia3", "loha", "oft"])
def test_other_kinds_of_adapters(kind):
    if kind == "dora":
        model = with_adapters(use_dora=True)
    else:
        plain, modules = tiny_model("llama"), ["k_proj", "down_proj"]
        configuration = {
            "ia3": lambda: peft.IA3Config(
                target_modules=modules, feedforward_modules=["down_proj"], init_ia3_weights=False, task_type="CAUSAL_LM"
            ),
            "loha": lambda: peft.LoHaConfig(
                target_modules=modules, init_weights=False, alpha=400, task_type="CAUSAL_LM"
            ),
            "oft": lambda: peft.OFTConfig(
                target_modules=modules, oft_block_size=8, init_weights=False, task_type="CAUSAL_LM"
            ),
        }[kind]()
        torch.manual_seed(5)
        model = peft.get_peft_model(plain, configuration).eval()
    assert own_text(model, PROMPTS[0], 12) != own_text(tiny_model("llama"), PROMPTS[0], 12)
    assert_trees_decode_as_alone(model, model, tiny_model("llama"), PROMPTS, exactly=True)


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_adapters_of_a_quantised_model(library):
    from models.test_quantisers import quantised

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    base = quantised(
        tiny_model("llama", **sizes), {"torchao": "torchao int8", "bitsandbytes": "bitsandbytes nf4"}[library]
    )
    torch.manual_seed(5)
    configuration = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    own = own_text(base, PROMPTS[0], 12)
    model = peft.get_peft_model(base, configuration).eval()
    assert own_text(model, PROMPTS[0], 12) != own
    assert_trees_decode_as_alone(model, model, tiny_model("llama", **sizes), PROMPTS, exactly=True)
    with model.disable_adapter():
        assert adapt(model).runs == ("native" if library == "torchao" else "modules")
        assert text_of(model, tiny_model("llama", **sizes)) == own


def test_saved_adapters(tmp_path):
    model = with_adapters(names=("one",))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one").eval()
    assert text_of(loaded, tiny_model("llama")) == own_text(model, PROMPTS[0], 12)


# ---- refusals ----


def test_dropout_in_training_mode_is_refused(given):
    model = with_adapters()
    model.train()
    with pytest.raises(ValueError, match=r"must be in evaluation mode.*call model.eval\(\)"):
        text_of(given(model), tiny_model("llama"))
    model.eval().add_adapter("new", peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    model.set_adapter("new")
    with pytest.raises(ValueError, match=r"training mode in model.layers.0.self_attn.q_proj.lora_dropout.new"):
        text_of(given(model), tiny_model("llama"))


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "virtual tokens"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "virtual tokens"),
        (lambda: peft.PolyConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "PolyModel.forward"),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
            "looked for in the prompt",
        ),
    ],
)
def test_wrappers_that_look_at_the_tokens_are_refused(configuration, reason):
    model = peft.get_peft_model(tiny_model("llama"), configuration()).eval()
    with pytest.raises(UnsupportedModelError, match=rf"adapt: model must .*PeftModelForCausalLM.*'default'.*{reason}"):
        adapt(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        text_of(tiny_model("llama"), model)


def test_an_adapter_for_each_row_is_no_argument():
    with pytest.raises(TypeError, match="adapter_names"):
        generate(with_adapters(), None, PROMPTS[0], adapter_names=["one"])
