"""Folders of random EAGLE-3 heads in the original form, and a head run row by row along one path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sequoia_kernels.drafts import Eagle3Draft
from sequoia_kernels.drafts.eagle3.draft import _new_cache
from sequoia_kernels.models import causal_step


def write_head(
    folder: Path, target: Any, *, layer_ids: tuple[int, ...] = (0, 1, 2), seed: int = 0, scale: float = 0.6,
    config: dict[str, Any] | None = None, drop: tuple[str, ...] = (), draft_vocab_size: int | None = None,
    num_layers: int = 1,
) -> Path:  # fmt: skip
    """Write a head for a tiny target, whose features are `layer_ids` of its hidden states.

    Args:
        folder: where to.
        target: the Hugging Face model.
        layer_ids: numbers of hidden states.
        seed: of the weights.
        scale: of the weights: larger ones give sharper guesses.
        config: further options.
        drop: weights to leave out.
        draft_vocab_size: tokens that it knows, spread over the target's; None for all.
        num_layers: its layers.
    """
    generator = torch.Generator().manual_seed(seed)
    width, vocab = target.config.hidden_size, target.config.vocab_size
    size = draft_vocab_size or vocab
    options = dict(config or {})
    eagle_config = {"eagle_aux_hidden_state_layer_ids": list(layer_ids)}
    heads, kv_heads, head_dim, inner = 4, 2, options.get("head_dim", 8), 48

    def random(*shape: int, around: float = 0.0) -> torch.Tensor:
        return around + scale * torch.randn(shape, generator=generator) / max(1, shape[-1] / 32) ** 0.5

    weights = {"fc.weight": random(width, len(layer_ids) * width), "norm.weight": random(width, around=1.0)}
    weights["lm_head.weight"], weights["embed_tokens.weight"] = random(size, width), random(vocab, width)
    for number in range(num_layers):
        prefix, inputs = ("midlayer", 2 * width) if number == 0 else (f"layers.{number}", width)
        for name, outputs, columns in (
            ("self_attn.q_proj", heads * head_dim, inputs),
            ("self_attn.k_proj", kv_heads * head_dim, inputs),
            ("self_attn.v_proj", kv_heads * head_dim, inputs),
            ("self_attn.o_proj", width, heads * head_dim),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            weights[f"{prefix}.{name}.weight"] = random(outputs, columns)
        for name in ("input_layernorm", "post_attention_layernorm", *(("hidden_norm",) if number == 0 else ())):
            weights[f"{prefix}.{name}.weight"] = random(width, around=1.0)
    if options.get("norm_before_fc"):
        weights["input_norm.weight"] = random(len(layer_ids) * width, around=1.0)
    if options.get("fc_norm"):
        weights |= {f"fc_norm.{number}.weight": random(width, around=1.0) for number in range(len(layer_ids))}
    if size < vocab:
        known = torch.randperm(vocab, generator=generator)[:size].sort().values
        weights["d2t"] = known - torch.arange(size)
        weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, known, True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight for name, weight in weights.items() if name not in drop}, folder / "model.safetensors")
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": width, "vocab_size": vocab,
        "intermediate_size": inner, "num_hidden_layers": num_layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "draft_vocab_size": size, "rms_norm_eps": 1e-5, "head_dim": head_dim,
        "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    # Hidden state i is what layer i - 1 puts out, which is how an `eagle_config` counts; the embeddings have no layer.
    if 0 in layer_ids:
        fields["eagle_aux_hidden_state_layer_ids"] = list(layer_ids)
    else:
        fields["eagle_config"] = {name: [number - 1 for number in ids] for name, ids in eagle_config.items()}
    (folder / "config.json").write_text(json.dumps(fields | options))
    return folder


def chain_logits(
    source: Eagle3Draft, features: torch.Tensor, tokens: torch.Tensor, num_known: int, num_depths: int | None = None
) -> torch.Tensor:
    """Run one chain by itself: rows with the target's features, then rows that take the outputs above them.

    Args:
        source: the head.
        features: the target's hidden states of rows 0.., as `needs` names them, side by side. [num_known, width]
        tokens: the token of each row: the text without its first one, then what is drafted. [rows]
        num_known: rows that have features; the last of them is the root's.
        num_depths: of a parallel head: rows to look at, the root's first.

    Returns:
        Logits behind the root's row and each one after it. [rows - num_known + 1, Vd]
    """
    head, (rows,) = source.head, tokens.shape
    extra = 0 if num_depths is None else num_depths - 1
    cache = _new_cache(source, 1, rows + extra)
    lens = torch.zeros(1, dtype=torch.int32)
    known = source.features(features[None].split(features.shape[1] // len(source.needs), -1))
    if num_depths is not None:
        assert rows == num_known
        tokens = torch.cat((tokens, torch.full((extra,), head.mask_token_id)))
        known = torch.cat((known, head.mask_feature.expand(1, extra, -1)), 1)
        outputs = head.forward(tokens[None], known, cache, lens, causal_step(rows + extra))
        return head.logits(outputs[0, num_known - 1 :])
    outputs = head.forward(tokens[None, :num_known], known, cache, lens, causal_step(num_known))[:, -1:]
    found = [head.logits(outputs)[0]]
    for row in range(num_known, rows):
        features = head.next_features(outputs)
        outputs = head.forward(tokens[None, row : row + 1], features, cache, lens + row, causal_step(1))
        found.append(head.logits(outputs)[0])
    return torch.cat(found)
