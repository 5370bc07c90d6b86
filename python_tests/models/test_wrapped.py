"""Wrappers and layers of adapter libraries, by stand-ins; `test_peft.py` runs the library itself where it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.adapters import AdaptedLinear, add_adapters
from support.plain_decoding import TREES, assert_trees_decode_as_alone, own_text
from support.tiny_families import tiny_model
from torch import nn

from sequoia_kernels import adapt, generate
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.wrapped import unwrapped

PROMPTS = [torch.tensor([[5, 9, 11, 3, 60, 22, 8, 41]]), torch.tensor([[7, 2, 33]])]


class BaseTuner(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)


class TwiceTuner(BaseTuner):
    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)


class Wrapper(nn.Module):
    """What a `PeftModel` shows of itself."""

    def __init__(self, model: nn.Module, tuner: type[BaseTuner] = BaseTuner, **settings: Any) -> None:
        super().__init__()
        self.base_model = tuner(model)
        self.peft_config = {"one": SimpleNamespace(peft_type="LORA", **settings)}

    def get_base_model(self) -> nn.Module:
        return self.base_model.model


def test_the_model_inside_a_wrapper_is_adapted() -> None:
    plain = tiny_model("llama")
    adapters = add_adapters(plain)
    wrapper = Wrapper(plain).eval()
    assert adapt(wrapper).model is plain
    for name in ("a", "b", "a"):
        for adapter in adapters:
            adapter.active = [name]
        assert_trees_decode_as_alone(wrapper, plain, wrapper, PROMPTS, exactly=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"is_prompt_learning": True}, "puts virtual tokens in front of the prompt"),
        ({"alora_invocation_tokens": [1]}, "begins at tokens that are looked for"),
        ({"tuner": TwiceTuner}, r"runs the model by a forward of its own \(TwiceTuner.forward\)"),
    ],
)
def test_wrappers_that_do_more_are_refused(settings: dict[str, Any], reason: str) -> None:
    wrapper = Wrapper(tiny_model("llama"), **settings).eval()
    with pytest.raises(UnsupportedModelError, match=f"got a Wrapper whose adapter 'one' .LORA. {reason}"):
        adapt(wrapper)


def test_other_models_are_left_as_they_are() -> None:
    plain = tiny_model("llama")
    assert unwrapped(plain) is plain
    plain.peft_config = {"one": SimpleNamespace(peft_type="LORA", is_prompt_learning=True)}  # transformers' own way
    assert unwrapped(plain) is plain
    assert unwrapped(None) is None and unwrapped("llama") == "llama"


def set_all(adapters: list[AdaptedLinear], **attributes: Any) -> None:
    for adapter in adapters:
        for name, value in attributes.items():
            setattr(adapter, name, value)


def test_adapters_that_add_nothing_run_native() -> None:
    """Merged or disabled, not both: then the next forward takes the update out of the weight again."""
    plain, base = tiny_model("llama"), tiny_model("llama")
    adapters = add_adapters(plain)
    held = adapt(plain.eval())
    settings = {"tree": TREES["tree"], "max_new_tokens": 12}
    adapted = own_text(plain, PROMPTS[0], 12)
    assert held.runs == "modules" and "support.adapters.AdaptedLinear" in held.not_native
    for attributes, runs in (({"active": [], "disable_adapters": True}, "native"), ({"merged": ["a"]}, "modules")):
        set_all(adapters, **attributes)
        text = generate(held, base, PROMPTS[0], **settings).new_tokens[0]
        assert held.runs == runs
        assert text == own_text(base, PROMPTS[0], 12) != adapted
    set_all(adapters, active=["a"], merged=[], disable_adapters=False)
    assert generate(held, base, PROMPTS[0], **settings).new_tokens[0] == adapted and held.runs == "modules"
    for adapter in adapters:
        adapter.merge()
    assert generate(held, base, PROMPTS[0], **settings).new_tokens[0] == adapted and held.runs == "native"


def test_a_layer_that_says_it_is_merged_and_still_adds_something_is_left_to_its_modules() -> None:
    plain = tiny_model("llama")
    adapters = add_adapters(plain)
    plain.eval()
    for adapter in adapters:
        adapter.__class__ = type("Liar", (AdaptedLinear,), {"merged": True, "forward": _still_adds})
        del adapter.__dict__["merged"]
    model = adapt(plain)
    assert model.runs == "modules" and "logits differ from the modules'" in model.not_native


def _still_adds(self: Any, input: torch.Tensor) -> torch.Tensor:
    return self.base_layer(input) + self.up["a"](self.down["a"](input))


class AdaptedEmbedding(nn.Module):
    """An embedding with an update, in the place of torch's."""

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.base_layer, self.update = base_layer, nn.Embedding(base_layer.num_embeddings, base_layer.embedding_dim)
        self.in_features = base_layer.num_embeddings  # as such layers say

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.base_layer(input) + self.update(input)


def test_adapted_embeddings_run_by_modules() -> None:
    plain = tiny_model("llama")
    torch.manual_seed(0)
    plain.model.embed_tokens = AdaptedEmbedding(plain.model.embed_tokens).eval()
    model = adapt(plain)
    assert model.runs == "modules" and "AdaptedEmbedding, not torch's Embedding" in model.not_native
    assert_trees_decode_as_alone(plain, plain, tiny_model("llama"), PROMPTS, exactly=True)
