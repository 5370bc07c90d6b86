"""Families that cannot decode trees are refused by name, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from support.tiny_families import REFUSED_YET, tiny_model

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import adapt
from sequoia_kernels.models.families import position_limit

STATE = "recurrent state instead of keys and values"
INTERFACE = "does not follow transformers' attention interface"
BOTH_WAYS = "it attends in both directions"
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def from_config(name: str, **arguments: Any) -> Any:
    config = getattr(transformers, name)(**arguments)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def encoder_decoder() -> Any:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config).eval()


def multimodal() -> Any:
    text = {**_SIZES, "head_dim": 8, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def embedding_model() -> Any:
    return transformers.LlamaModel(transformers.LlamaConfig(**_SIZES)).eval()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (lambda: from_config("BloomConfig", vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    "mpt": (lambda: from_config("MptConfig", vocab_size=64, d_model=32, n_layers=2, n_heads=4), "ALiBi"),
    "falcon": (
        lambda: from_config("FalconConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        INTERFACE,
    ),
    **{family: (partial(tiny_model, family), INTERFACE) for family in REFUSED_YET},
    "gpt_neo": (
        lambda: from_config(
            "GPTNeoConfig",
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
        ),
        INTERFACE,
    ),
    "t5": (encoder_decoder, "it is an encoder-decoder"),
    "bart": (
        lambda: from_config(
            "BartConfig",
            vocab_size=64,
            d_model=32,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            is_encoder_decoder=False,
            is_decoder=True,
        ),
        "its forward takes no position_ids",
    ),
    "mamba": (lambda: from_config("MambaConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2), STATE),
    "rwkv": (lambda: from_config("RwkvConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2), STATE),
    "recurrent_gemma": (
        lambda: from_config("RecurrentGemmaConfig", **{**_SIZES, "num_hidden_layers": 3}, lru_width=32),
        STATE,
    ),
    "falcon_h1": (
        lambda: from_config(
            "FalconH1Config",
            **_SIZES,
            num_key_value_heads=2,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
        ),
        STATE,
    ),
    "qwen3_next": (
        lambda: from_config(
            "Qwen3NextConfig",
            **_SIZES,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        STATE,
    ),
    "lfm2": (
        lambda: from_config("Lfm2Config", **_SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
        STATE,
    ),
    "gemma3": (multimodal, "it is a multimodal wrapper; load its text model alone"),
    "llama": (embedding_model, "LlamaModel has no language-modelling head"),
    "bert": (lambda: from_config("BertConfig", **_SIZES), BOTH_WAYS),
    "diffllama": (
        lambda: from_config("DiffLlamaConfig", **_SIZES, num_key_value_heads=2),
        "each of its layers attends twice",
    ),
    "hrm_text": (lambda: from_config("HrmTextConfig", **_SIZES), "must run once in each of"),
    "gemma3_text": (
        lambda: tiny_model("gemma3_text", use_bidirectional_attention=True),
        BOTH_WAYS,
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name_with_the_reason(family: str) -> None:
    build, reason = REFUSED[family]
    model = build()
    settings = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    with pytest.raises(UnsupportedModelError, match=f"adapt: family {family} cannot decode trees: .*{reason}"):
        adapt(model)
    # A refusal leaves the model as it was.
    after = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert after == settings


def test_out_of_memory_is_not_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model("llama")

    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(plain.model.layers[0], "forward", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        adapt(plain)


@pytest.mark.parametrize(
    ("family", "rope", "limit"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, 128),
        ("llama", {"rope_type": "linear", "factor": 2.0}, None),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
            },
            32,
        ),
    ],
)
def test_rotary_embeddings_that_change_with_length_limit_positions(
    family: str, rope: dict[str, Any], limit: int | None
) -> None:
    parameters = {"rope_theta": 10000.0, **rope}
    extra = {"original_max_position_embeddings": 32} if family == "phi3" else {}
    assert adapt(tiny_model(family, rope_parameters=parameters, **extra)).max_positions == limit


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("CTRLConfig", {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 32}),  # sines in a buffer
        ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 32}),
        ("CodeGenConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 32}),
        ("OPTConfig", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "max_position_embeddings": 32, "word_embed_proj_dim": 32}),
    ],
)  # fmt: skip
def test_a_table_of_positions_ends(name: str, fields: dict[str, Any]) -> None:
    model = from_config(name, vocab_size=64, **fields)
    assert position_limit(model, []) == 32
    tokens = torch.ones(1, 32, dtype=torch.int64)
    model(tokens)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 33, dtype=torch.int64))
