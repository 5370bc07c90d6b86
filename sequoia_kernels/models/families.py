"""Which model families decode trees, why the others cannot, and up to which position."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.switch import ATTENTION_FIELD, attention_configs, each_module

__all__ = ["PROVEN_FAMILIES", "cache_argument", "check_family", "family_name", "foreign_code", "position_limit"]

# Families (`config.model_type`) whose tree logits this package's tests compare with plain sequential decoding. Every
# other family that passes the structural checks is compared with its own plain forward when it is adapted.
PROVEN_FAMILIES = frozenset({
    "cohere2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama",
    "llama4_text", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
    "stablelm", "starcoder2",
})  # fmt: skip

_ALIBI = "it adds position biases (ALiBi) to the attention scores inside its own attention code"
_OWN_ATTENTION = (
    "its attention does not follow transformers' attention interface, so tree attention would never be called"
)
_STATE = "some of its layers keep a recurrent state instead of keys and values, and a state cannot branch along a tree"
_REASONS = {
    "bloom": _ALIBI,
    "falcon": f"{_OWN_ATTENTION} (it may add position biases as well)",
    "mpt": _ALIBI,
    "diffllama": "each of its layers attends twice with different values",
    "minimax": _STATE,
}
_TREE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_STATE_LAYER_TYPES = ("linear", "mamba", "conv", "recurrent", "hybrid", "ssm")
_OWN_PACKAGES = frozenset({"torch", "transformers", "sequoia_kernels"})
_POSITION_TABLES = frozenset(
    {"wpe", "embed_positions", "position_embedding", "position_embeddings", "positions_embed", "pos_encoding"}
)


def family_name(model: PreTrainedModel) -> str:
    """Return the family's name, such as "llama"."""
    return str(model.config.model_type or type(model).__name__)


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which the model's forward takes its cache: "cache" since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def check_family(model: PreTrainedModel) -> None:
    """Refuse a model whose structure cannot decode trees; UnsupportedModelError names the family and the reason."""
    reason = _refusal(model)
    if reason is not None:
        raise UnsupportedModelError(f"adapt: family {family_name(model)} cannot decode trees: {reason}")


def _refusal(model: PreTrainedModel) -> str | None:
    config, family = model.config, family_name(model)
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and only decoder-only language models are supported"
    if family in _REASONS:
        return _REASONS[family]
    if not hasattr(model, "get_output_embeddings") or not model.can_generate():
        return f"{type(model).__name__} has no language-modelling head; load it with AutoModelForCausalLM"
    if config.get_text_config(decoder=True) is not config or any(
        kind in name for name in config.sub_configs for kind in ("vision", "audio", "image", "speech")
    ):
        return "it is a multimodal wrapper; load its text model alone (the family's ...ForCausalLM class)"
    layer_types = sorted(set(getattr(config, "layer_types", None) or ()) - _TREE_LAYER_TYPES)
    if model._is_stateful or any(kind in name for name in layer_types for kind in _STATE_LAYER_TYPES):
        return _STATE
    if layer_types:
        return f"it has layers of type {', '.join(layer_types)}, which are not plain attention over keys and values"
    if not model._can_set_attn_implementation():
        return _OWN_ATTENTION
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids, and the nodes of a tree are not at consecutive positions"
    return None


def foreign_code(model: PreTrainedModel) -> str | None:
    """Name code in a model that is not transformers' own and could mix tokens in another way; None where there is none.

    An attention function that the user registered, a forward that was put into the place of a module's own, or a hook.
    Not forwards that stand for a linear layer (adapters, quantisers) and see one row at a time, and not accelerate's.
    """
    for config in attention_configs(model):
        name = getattr(config, ATTENTION_FIELD)
        if not _is_own(ALL_ATTENTION_FUNCTIONS.get(name)):
            return f"attention function {name!r}"
    if not all(map(_is_own, (*_global_forward_pre_hooks.values(), *_global_forward_hooks.values()))):
        return "a forward hook of all modules"
    classes = set()
    for module in each_module(model):
        kind = type(module)
        if not all(map(_is_own, (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))):
            return f"a forward hook of a {kind.__name__}"
        if hasattr(module, "in_features"):
            continue
        if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
            return f"the forward of a {kind.__name__}"
        if kind not in classes:
            classes.add(kind)
            eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
            if not (_is_own(kind) and _is_own(getattr(kind, "forward", None)) and _is_own(eager)):
                return f"the forward of {kind.__name__}"
    return None


def _is_own(code: Any) -> bool:
    """Tell whether code comes from one of the packages that are known. A wrapper bears the name of what it wraps."""
    while code is not None:
        homes = {getattr(code, "__module__", None), getattr(code, "__globals__", {}).get("__name__", "torch")}
        if not {str(home).partition(".")[0] for home in homes} <= _OWN_PACKAGES:
            return False
        code = getattr(code, "__wrapped__", None)
    return True


def position_limit(model: PreTrainedModel, chunks: list[int]) -> int | None:
    """Return how many positions the model serves exactly under tree decoding; None where nothing limits them.

    Four things do. A table of learned positions ends. Chunked attention (in `chunks` of so many tokens) equals full
    attention within the first chunk (Llama 4). "dynamic" and "longrope" rotary embeddings change all frequencies once a
    sequence outgrows the original length, which keys that are already cached would not follow. Llama 4's temperature
    tuning counts positions from the cache and is the identity before its first floor.
    """
    config = model.config
    limits = list(chunks)
    for module in each_module(model):
        for name in _POSITION_TABLES:
            table = getattr(module, name, None)
            if isinstance(table, torch.nn.Embedding):
                limits.append(table.num_embeddings - int(getattr(table, "offset", 0)))
            elif isinstance(table, torch.Tensor) and table.ndim == 2:  # sines, one row a position
                limits.append(table.shape[0])
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in settings.values() if isinstance(entry, dict)]  # one for each type of layer
    for rope in nested or [settings]:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            limits.append(int(rope.get("original_max_position_embeddings") or config.max_position_embeddings))
        elif "dynamic" in kind:
            limits.append(int(config.max_position_embeddings))
    if config.model_type == "llama4_text" and config.attn_temperature_tuning:
        limits.append(int(config.floor_scale) - 1)
    return min(limits, default=None)
