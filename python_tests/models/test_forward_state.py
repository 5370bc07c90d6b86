"""What a forward depends on, and that plans follow it."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.adapters import add_adapters
from support.sequential import tree_logits
from support.tiny_families import tiny_model
from support.tiny_models import tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import sequoia_kernels.models.adapter as adapter
import sequoia_kernels.models.forward_state as forward_states
from sequoia_kernels import TokenTree, generate
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import adapt, causal_step
from sequoia_kernels.models.forward_state import Same, forward_state

PROMPT = torch.tensor([[5, 9, 11, 3, 60, 22, 8, 41]])
TREE = TokenTree([-1, 0, 0, 1])


def own_tokens(plain: Any) -> list[int]:
    """What the model's own loop generates."""
    tokens = plain.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    return tokens[0, PROMPT.shape[1] :].tolist()


def our_tokens(plain: Any) -> list[int]:
    return generate(plain, plain, PROMPT, tree=TREE, max_new_tokens=12, eos_token_id=()).new_tokens[0]


def with_adapters() -> Any:
    plain = tiny_model("llama")
    add_adapters(plain)
    return plain.eval()


def attention(plain: Any) -> Any:
    return plain.model.layers[0].self_attn


CHANGES: dict[str, Callable[[Any], object]] = {
    "another adapter": lambda plain: attention(plain).q_proj.active.__setitem__(0, "b"),
    "no adapter": lambda plain: attention(plain).q_proj.active.clear(),
    "a merged adapter": lambda plain: attention(plain).q_proj.merge(),
    "its scaling": lambda plain: attention(plain).q_proj.scaling.update(a=0.5),
    "another adapter library's module": lambda plain: add_adapters(plain, ("c",)),
    "a forward hook": lambda plain: attention(plain).register_forward_hook(lambda *_: None),
    "a hook before the forward": lambda plain: plain.model.register_forward_pre_hook(lambda *_: None),
    "another forward": lambda plain: setattr(attention(plain), "forward", lambda **_: None),
    "another class": lambda plain: setattr(attention(plain), "__class__", type("Other", (type(attention(plain)),), {})),
    "a setting of the configuration": lambda plain: setattr(plain.config, "sliding_window", 7),
    "a setting of a module": lambda plain: setattr(plain.model.layers[1].mlp.act_fn, "slope", 0.1),
    "the attention function": lambda plain: plain.set_attn_implementation("eager"),
    "fewer layers": lambda plain: setattr(plain.model, "layers", plain.model.layers[:1]),
    "a layer's dtype": lambda plain: plain.model.layers[0].to(torch.bfloat16),
    "what the model returns": lambda plain: setattr(plain.config, "return_dict", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_forward_changes_its_state(change: str) -> None:
    plain = with_adapters()
    before = forward_state(plain)
    assert forward_state(plain) == before
    assert hash(forward_state(plain)) == hash(before)
    CHANGES[change](plain)
    assert forward_state(plain) != before


def test_running_a_model_changes_nothing() -> None:
    plain = with_adapters()
    model = adapt(plain)
    before = forward_state(plain)
    our_tokens(plain)
    own_tokens(plain)
    assert model.forward_state() == before


def test_a_new_function_at_an_old_address_is_not_the_old_one() -> None:
    functions = [lambda: 1, lambda: 2]
    first, again, second = Same(functions[0]), Same(functions[0]), Same(functions[1])
    second._hash = first._hash  # as if it had come to lie there
    assert first == again != second
    functions.clear()
    assert first != again


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def test_values_without_weak_references_are_compared_by_what_they_hold() -> None:
    plain = with_adapters()
    for make in (
        lambda value: slice(0, value),
        lambda value: SimpleNamespace(value=value, same=plain),
        lambda value: bytearray([value]),
        lambda value: range(value),
        lambda value: Slots(value),
        lambda value: {value: 0}.keys(),
    ):
        kept = make(1), make(2)
        attention(plain).setting = kept[0]
        before = forward_state(plain)
        assert forward_state(plain) == before
        assert hash(forward_state(plain)) == hash(before)
        attention(plain).setting = kept[1]
        assert forward_state(plain) != before


def test_a_setting_may_hold_itself() -> None:
    plain = tiny_model("llama")
    setting: dict[str, Any] = {"value": 1}
    setting["self"] = [setting]
    attention(plain).setting = setting
    before = forward_state(plain)
    assert forward_state(plain) == before
    setting["value"] = 2
    assert forward_state(plain) != before


def test_a_state_keeps_nothing_alive() -> None:
    plain = with_adapters()
    attention(plain).setting = Slots(plain)
    attention(plain).forward = attention(plain).forward  # a bound method, which holds the module
    plain.model.register_forward_hook(lambda *_, model=plain: None)
    state, alive = forward_state(plain), weakref.ref(plain)
    adapt(plain)
    del plain
    gc.collect()
    assert alive() is None
    assert hash(state)


@pytest.mark.parametrize(("before", "after"), [(3, 5), (None, 3), (3, None)])
def test_a_window_changed_after_the_first_call(before: int | None, after: int | None) -> None:
    plain = tiny_model("mistral", sliding_window=before)
    assert our_tokens(plain) == own_tokens(plain)
    plain.config.sliding_window = after
    twin = tiny_model("mistral", sliding_window=after)
    twin.load_state_dict(plain.state_dict())
    assert adapt(plain)._plan.specs == adapt(twin)._plan.specs
    assert our_tokens(plain) == own_tokens(twin) == own_tokens(plain)


@pytest.mark.parametrize("in_the_configuration", [True, False])
def test_a_layer_cut_off_after_the_first_call(in_the_configuration: bool) -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    our_tokens(plain)
    plain.model.layers = plain.model.layers[:1]
    if in_the_configuration:
        plain.config.num_hidden_layers = 1
    assert our_tokens(plain) == own_tokens(plain)
    assert len(model.new_cache(1, 4).layers) == model.num_layers == 1


def test_layers_that_are_not_run_need_not_be_removed() -> None:
    plain = tiny_model("llama")
    our_tokens(plain)
    plain.config.num_hidden_layers = 1
    assert our_tokens(plain) == own_tokens(plain)


def test_plans_are_kept_for_adapters_that_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = with_adapters()
    layer = attention(plain).q_proj
    texts = {}
    for name in ("a", "b"):
        layer.active = [name]
        texts[name] = our_tokens(plain)
        assert texts[name] == own_tokens(plain)
    assert texts["a"] != texts["b"]
    monkeypatch.setattr(adapter, "_make_plan", lambda *_: pytest.fail("probed again"))
    for name in ("a", "b"):
        layer.active = [name]
        assert our_tokens(plain) == texts[name]


def test_dropout_in_a_submodule_is_refused() -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    cache, lens = model.new_cache(1, 4), torch.zeros(1, dtype=torch.int32)
    add_adapters(plain, dropout=0.5)
    assert not plain.training
    refusal = r"got training mode in model\.layers\.0\.self_attn\.q_proj; call model\.eval\(\)"
    for call in (
        lambda: adapt(plain),
        lambda: model.new_cache(1, 4),
        lambda: model.forward(torch.tensor([[1]]), cache, lens, causal_step(1)),
        lambda: our_tokens(plain),
    ):
        with pytest.raises(ValueError, match=refusal):
            call()
    plain.eval()
    assert our_tokens(plain) == own_tokens(plain)


def test_torchs_layers_without_dropout_may_be_in_training_mode() -> None:
    """As whatever resizes, cuts or quantises a model leaves them."""
    plain = tiny_model("llama")
    wanted = own_tokens(plain)
    plain.lm_head.training = plain.model.layers.training = plain.model.embed_tokens.training = True
    assert our_tokens(plain) == wanted
    model = adapt(plain)
    cache, lens = model.new_cache(1, 4), torch.zeros(1, dtype=torch.int32)
    for kind in (torch.nn.Dropout(0.1), torch.nn.BatchNorm1d(2), torch.nn.MultiheadAttention(4, 2)):
        plain.lm_head.add_module("more", kind)  # below one that had none, or in the place of another one
        for call in (lambda: adapt(plain), lambda: model.forward(torch.tensor([[1]]), cache, lens, causal_step(1))):
            with pytest.raises(ValueError, match=r"got training mode in lm_head\.more"):
                call()


def test_code_of_others_may_ask_a_linear_layer_for_its_mode() -> None:
    def dropout(module: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, 0.5, module.training)

    def patched(layer: Any) -> None:
        own = layer.forward
        layer.forward = lambda input: dropout(layer, own(input))

    for change in (
        patched,
        torch.nn.utils.spectral_norm,
        lambda layer: layer.register_forward_hook(lambda module, _, output: dropout(module, output)),
    ):
        plain = tiny_model("llama").requires_grad_(False)
        adapt(plain)
        change(plain.lm_head)
        plain.lm_head.train()
        with pytest.raises(ValueError, match="got training mode in lm_head; call"):
            adapt(plain)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: torch.compile(module, backend="eager"),
        torch.jit.script,
        lambda module: torch.jit.trace(module, torch.ones(2, 2)),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_scripted_submodules(wrap: Callable[[Any], Any]) -> None:
    plain = tiny_model("llama")
    wanted = own_tokens(plain)
    mlp = plain.model.layers[0].mlp
    mlp.act_fn = wrap(torch.nn.SiLU().eval())
    assert our_tokens(plain) == wanted
    mlp.act_fn = wrap(torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.0)).train())
    with pytest.raises(ValueError, match=r"got training mode in model\.layers\.0\.mlp\.act_fn"):
        adapt(plain)


# Attention functions and forwards that are not transformers' own


def distance_bias(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> Any:
    """Plain attention with a bias that grows with the distance."""
    length, start = key.shape[2], key.shape[2] - query.shape[2]
    distance = torch.arange(start, length)[:, None] - torch.arange(length)
    bias = torch.where(distance < 0, -torch.inf, -0.5 * distance)
    bias = bias[None, None].expand(query.shape[0], -1, -1, -1)
    return sdpa_attention_forward(module, query, key, value, bias, **{**options, "is_causal": False})


def the_same(module: Any, *tensors: Any, **options: Any) -> Any:
    """transformers' own attention under another name."""
    return sdpa_attention_forward(module, *tensors, **options)


@pytest.mark.parametrize("family", ["llama", "olmo3"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attention_function_of_the_users_own_is_refused_where_it_does_something_else(family: str, when: str) -> None:
    AttentionInterface.register("distance_bias", distance_bias)
    AttentionInterface.register("the_same", the_same)
    AttentionMaskInterface.register("the_same", sdpa_mask)
    plain = tiny_model(family)
    if when == "after":
        our_tokens(plain)
    plain.set_attn_implementation("distance_bias")
    refusal = f"family {family} cannot decode trees: its logits .* attention function 'distance_bias' is not transform"
    with pytest.raises(UnsupportedModelError, match=refusal):
        our_tokens(plain)
    plain.set_attn_implementation("the_same")
    assert our_tokens(plain) == own_tokens(plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_are_set_to_attend_in_both_directions_are_refused(family: str) -> None:
    plain = tiny_model(family)
    our_tokens(plain)
    for module in plain.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(UnsupportedModelError, match=f"family {family} cannot .* it attends in both directions"):
        our_tokens(plain)


def test_a_name_that_is_registered_again_is_looked_at_again() -> None:
    AttentionInterface.register("mine", the_same)
    plain = tiny_model("llama")
    plain.set_attn_implementation("mine")
    our_tokens(plain)
    AttentionInterface.register("mine", distance_bias)
    with pytest.raises(UnsupportedModelError, match="attention function 'mine' is not transformers' own"):
        our_tokens(plain)


def test_a_function_that_bears_the_name_of_what_it_wraps_is_not_transformers_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    AttentionInterface.register("mine", functools.wraps(sdpa_attention_forward)(distance_bias))
    plain = tiny_model("llama")
    plain.set_attn_implementation("mine")
    with pytest.raises(UnsupportedModelError, match="attention function 'mine' is not transformers' own"):
        our_tokens(plain)
    plain = tiny_model("llama")
    rotary = type(plain.model.rotary_emb)
    own = rotary.forward

    @torch.no_grad()
    @functools.wraps(own)
    def shifted(self: Any, hidden: Any, position_ids: Any) -> Any:
        return own(self, hidden, position_ids - position_ids[:, :1])

    monkeypatch.setattr(rotary, "forward", shifted)
    with pytest.raises(UnsupportedModelError, match="the forward of LlamaRotaryEmbedding is not transformers' own"):
        adapt(plain)


def add_the_row_before(module: Any, inputs: Any, output: Any) -> Any:
    if type(module).__name__ == "LlamaMLP":
        return output + torch.cat((output[:, :1], output[:, :-1]), dim=1)
    return None


def test_a_hook_is_compared_with_the_models_own_forward() -> None:
    plain = tiny_model("llama")
    adapt(plain)
    mlp = plain.model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda module, inputs, output: output + 0.1)  # the same for every row
    assert our_tokens(plain) == own_tokens(plain)
    handle.remove()
    handle = mlp.register_forward_hook(add_the_row_before)
    with pytest.raises(UnsupportedModelError, match="a forward hook of a LlamaMLP is not transformers' own"):
        our_tokens(plain)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(add_the_row_before)
    try:
        with pytest.raises(UnsupportedModelError, match="a forward hook of all modules is not transformers' own"):
            our_tokens(plain)
    finally:
        handle.remove()


def test_a_model_that_remembers_its_forwards_is_compared_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    make_plan = adapter._make_plan
    monkeypatch.setattr(adapter, "_make_plan", lambda *arguments: plans.append(1) or make_plan(*arguments))
    plain = tiny_model("llama")
    mlp = plain.model.layers[0].mlp
    own, mlp.num_calls, mlp.scaling = mlp.forward, 0, 1.0

    def remembering(hidden: torch.Tensor) -> torch.Tensor:
        mlp.num_calls += 1
        mlp.last_output = mlp.scaling * own(hidden)
        return mlp.last_output

    mlp.forward = remembering
    assert our_tokens(plain) == own_tokens(plain)
    assert len(plans) == 2  # once more, to see what every forward writes
    mlp.scaling = 0.5
    assert our_tokens(plain) == own_tokens(plain)
    assert len(plans) == 3


def test_what_is_not_written_by_forwards_is_compared_in_a_model_that_writes() -> None:
    plain = tiny_model("llama")
    mlp = plain.model.layers[0].mlp
    mlp.calls = []
    mlp.register_forward_hook(lambda module, inputs, output: module.calls.append(1))
    assert our_tokens(plain) == own_tokens(plain)  # a list may hold settings as well: looked at every time
    before = forward_state(plain)
    mlp.calls.append(1)
    assert forward_state(plain) != before


def test_a_patched_forward_is_compared_also_in_a_proven_family() -> None:
    plain = tiny_model("llama")
    rotary = plain.model.rotary_emb.forward
    plain.model.rotary_emb.forward = lambda hidden, position_ids: rotary(hidden, position_ids - position_ids[:, :1])
    with pytest.raises(UnsupportedModelError, match="the forward of a LlamaRotaryEmbedding is not transformers' own"):
        adapt(plain)


# Models that fail for another reason than their family


def test_a_configuration_under_which_models_fail_by_themselves_is_named() -> None:
    plain = tiny_model("llama")
    plain.config.return_dict = False
    with pytest.raises(
        UnsupportedModelError, match=r"must run by itself, got AttributeError .*; set config\.return_dict"
    ):
        adapt(plain)


def test_a_model_that_does_not_run_by_itself_is_refused_with_its_own_error() -> None:
    plain = tiny_model("llama")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no weights here")

    plain.model.layers[0].mlp.forward = broken
    with pytest.raises(
        UnsupportedModelError, match="must run by itself, got RuntimeError in its own forward: no weights here"
    ):
        adapt(plain)


class CountsVersions(torch.nn.Module):
    """A linear layer that makes a tensor whose writes are counted, as quantised weights of some libraries do."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.in_features = layer.weight, layer.in_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.weight.detach().clone()._version == 0  # raises for tensors of inference mode
        return torch.nn.functional.linear(input, self.weight)


def test_models_that_cannot_run_in_inference_mode() -> None:
    plain = tiny_model("llama")
    wanted = own_tokens(plain)
    for layer in plain.model.layers:
        layer.mlp.up_proj = CountsVersions(layer.mlp.up_proj)
    plain.eval()
    assert our_tokens(plain) == wanted
    assert not adapt(plain)._plan.inference_mode
    assert adapt(tiny_model("llama"))._plan.inference_mode
    with torch.inference_mode():  # the caller's own
        assert our_tokens(plain) == wanted
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


class BringsWeights:
    """A hook that leaves a module's weights on the meta device but while it runs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.execution_device = "cpu"
        self.weights = dict(module._parameters.items())
        self.own = module.forward
        self.module = module
        module._hf_hook = self
        self.put({name: self.meta(tensor) for name, tensor in self.weights.items()})
        module.forward = self.forward

    @staticmethod
    def meta(tensor: torch.Tensor | None) -> torch.nn.Parameter | None:
        return None if tensor is None else torch.nn.Parameter(tensor.to("meta"), requires_grad=False)

    def put(self, tensors: dict[str, Any]) -> None:
        self.module._parameters.update(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = dict(self.module._parameters.items())
        self.put(self.weights)
        try:
            return self.own(*args, **kwargs)
        finally:
            self.put(before)


def test_models_whose_weights_are_brought_by_hooks() -> None:
    plain = tiny_model("llama")
    prompt, tokens = PROMPT[0].tolist(), [7, 8, 9, 10]
    wanted = tree_logits(plain, prompt, tokens, [-1, 0, 0, 1])
    text = own_tokens(plain)
    for module in list(plain.modules()):
        if any(tensor is not None for tensor in module._parameters.values()):
            BringsWeights(module)
    model = adapt(plain)
    assert (model.device, model.capturable) == (torch.device("cpu"), False)
    assert our_tokens(plain) == text
    assert wanted.shape == (4, 64)


def test_copies_of_a_tree_model_have_a_model_and_a_switch_of_their_own() -> None:
    import pickle

    model = adapt(tiny_model("llama"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.model is not model.model
        assert our_tokens(twin) == our_tokens(model)
    assert copy.copy(model).model is model.model


def test_eos_tokens_are_those_of_now() -> None:
    model = adapt(tiny_model("llama"))
    assert model.eos_token_ids == ()
    model.model.generation_config.eos_token_id = [3, 4]
    assert model.eos_token_ids == (3, 4)


def test_a_call_describes_each_model_once_until_foreign_code_has_run(monkeypatch):
    described = []
    plain = forward_states.forward_state
    monkeypatch.setattr(forward_states, "forward_state", lambda model: (described.append(model), plain(model))[1])
    model, other = tiny_llama(0), tiny_llama(1)
    forward_states.known_state(model)
    with forward_states.described_once():
        states = [forward_states.known_state(model) for _ in range(3)]
        forward_states.known_state(other)
        assert described == [model, model, other] and states[0] == states[2] == plain(model)
        with forward_states.described_once():  # another call, made in the middle of this one
            forward_states.known_state(model)
        assert len(described) == 4
        model.model.layers[0].self_attn.scaling = 0.5
        assert forward_states.known_state(model) == states[0]
        forward_states.foreign_code_ran()
        assert forward_states.known_state(model) != states[0]
    forward_states.known_state(model)
    assert len(described) == 6
