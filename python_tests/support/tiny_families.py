"""A tiny random model of many families, with windows, soft-caps and sinks that matter at a few tokens of context."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version

VOCAB = 64
WINDOW = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_OF_GPT2_KIND = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128}
_ALTERNATING = ["sliding_attention", "full_attention"]

# family -> (configuration class, its arguments beyond the common ones, the layers' windows)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[int | None]]] = {
    "llama": ("LlamaConfig", {}, [None, None]),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 8}, [WINDOW, WINDOW]),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
        [None, WINDOW],
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, [None, None]),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        [None, None],
    ),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}, [None, None]),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}, [WINDOW, WINDOW]),
    "gemma": ("GemmaConfig", {"head_dim": 8}, [None, None]),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 12,
        },
        [WINDOW, None],
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "query_pre_attn_scalar": 12},
        [WINDOW, None],
    ),
    "gpt_neox": ("GPTNeoXConfig", {}, [None, None]),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, [None, None]),
    "gpt2": ("GPT2Config", _OF_GPT2_KIND, [None, None]),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": _ALTERNATING, **_EXPERTS},
        [WINDOW, None],
    ),
    "mixtral": ("MixtralConfig", {"sliding_window": WINDOW, **_EXPERTS}, [WINDOW, WINDOW]),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}, [WINDOW, WINDOW]),
    "stablelm": ("StableLmConfig", {}, [None, None]),
    "olmo2": ("Olmo2Config", {}, [None, None]),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.2, "logits_scaling": 0.5}, [None, None]),
    "cohere2": (
        "Cohere2Config",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "logit_scale": 0.5},
        [WINDOW, None],
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}, [None, None]),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        [None, None],
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 64,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "floor_scale": 40,
            **_EXPERTS,
        },
        [None, None],
    ),
    # families outside PROVEN_FAMILIES, which `adapt` compares with their own forward
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": _ALTERNATING * 2,
            "num_kv_shared_layers": 2,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": WINDOW,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        [WINDOW, None, WINDOW, None],
    ),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW, "layer_types": _ALTERNATING}, [WINDOW, None]),
}
# Families that follow transformers' attention interface since a version, and are refused before.
_SINCE = {"codegen": "5.24", "gptj": "5.24"}
_LATER = {
    "codegen": ("CodeGenConfig", {**_OF_GPT2_KIND, "rotary_dim": 8}, [None, None]),
    "gptj": ("GPTJConfig", {**_OF_GPT2_KIND, "rotary_dim": 8}, [None, None]),
}
REFUSED_YET = {
    family: entry for family, entry in _LATER.items() if Version(transformers.__version__) < Version(_SINCE[family])
}
FAMILIES |= {family: entry for family, entry in _LATER.items() if family not in REFUSED_YET}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return the configuration of a family's tiny model."""
    name, arguments, _ = {**FAMILIES, **REFUSED_YET}[family]
    common = _COMMON
    if "n_embd" in arguments:  # GPT-2 and its kind have names of their own
        common = {key: _COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    merged = {**common, **arguments, **overrides}
    return getattr(transformers, name)(**merged)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """Build a family's tiny model, float32, with logits of order 1 and attention that is far from uniform."""
    torch.manual_seed(seed)
    # Older versions of transformers let Gemma 2 use torch's attention, which silently leaves out the soft-cap.
    own_attention = "eager" if family == "gemma2" else None
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_config(family, **overrides), dtype=torch.float32, attn_implementation=own_attention
    ).eval()
    spread_weights(model, seed)
    return model


def spread_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw matrices at a scale that keeps activations of order 1, and move vectors off their initial 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)
