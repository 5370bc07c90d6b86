"""Random DFlash and DSpark drafts of tiny shapes, as what a folder of the `speculators` form holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from sequoia_kernels import adapt
from sequoia_kernels.drafts import DFlashDraft
from sequoia_kernels.drafts.dflash import load_dflash
from sequoia_kernels.drafts.folders import DraftFolder

__all__ = ["good_draft", "memory_folder", "random_config", "random_draft", "random_weights"]


def random_config(target: Any, *, kind: str = "dflash", num_layers: int = 2, **options: Any) -> dict[str, Any]:
    """Give a config.json for a Hugging Face target; `options` replace its entries."""
    config = target.config
    layers = {
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
    }
    layers |= options.pop("layers", {})
    return {
        "speculators_model_type": kind,
        "transformer_layer_config": layers,
        "draft_vocab_size": config.vocab_size,
        "block_size": 5,
        "mask_token_id": config.vocab_size - 1,
        "aux_hidden_state_layer_ids": [1, 2],
        "markov_rank": 8,
        **options,
    }


def random_weights(config: dict[str, Any], seed: int = 0, scale: float = 0.25) -> dict[str, torch.Tensor]:
    """Give the weights that a config asks for, of float32."""
    generator = torch.Generator().manual_seed(seed)
    layers = config["transformer_layer_config"]
    width, inner, head_dim = layers["hidden_size"], layers["intermediate_size"], layers["head_dim"]
    queries, keys = (layers[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, width * len(config["aux_hidden_state_layer_ids"])),
        "hidden_norm.weight": (width,),
        "norm.weight": (width,),
    }
    for index in range(layers["num_hidden_layers"]):
        attention, mlp = f"layers.{index}.self_attn.", f"layers.{index}.mlp."
        shapes |= {
            f"{attention}q_proj.weight": (queries, width),
            f"{attention}k_proj.weight": (keys, width),
            f"{attention}v_proj.weight": (keys, width),
            f"{attention}o_proj.weight": (width, queries),
            f"{attention}q_norm.weight": (head_dim,),
            f"{attention}k_norm.weight": (head_dim,),
            f"layers.{index}.input_layernorm.weight": (width,),
            f"layers.{index}.post_attention_layernorm.weight": (width,),
            f"{mlp}gate_proj.weight": (inner, width),
            f"{mlp}up_proj.weight": (inner, width),
            f"{mlp}down_proj.weight": (width, inner),
        }
        if layers.get("attention_bias"):
            shapes |= {
                f"{attention}{side}_proj.bias": (rows,) for side, rows in zip("qkvo", (queries, keys, keys, width))
            }
    vocab, draft_vocab, rank = layers["vocab_size"], config["draft_vocab_size"], config["markov_rank"]
    if config["speculators_model_type"] == "dspark":
        if rank:
            shapes |= {
                "markov_head.markov_w1.weight": (vocab, rank),
                "markov_head.markov_w2.weight": (draft_vocab, rank),
            }
        if config.get("markov_head_type") == "gated":
            shapes |= {"markov_head.gate_proj.weight": (rank, width + rank), "markov_head.gate_proj.bias": (rank,)}
        if config.get("markov_head_type") == "rnn":
            shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + width)
            shapes["markov_head.joint_proj.bias"] = (3 * rank,)
        if config.get("enable_confidence_head", True):
            reads = rank if config.get("confidence_head_with_markov", True) else 0
            shapes |= {"confidence_head.proj.weight": (1, width + reads), "confidence_head.proj.bias": (1,)}
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            weights[name] = 1.0 + 0.1 * torch.randn(shape, generator=generator)
        else:
            weights[name] = scale * torch.randn(shape, generator=generator)
            if "markov_w" in name:
                weights[name] *= 4.0
    if draft_vocab != vocab:
        ids = torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values
        weights["d2t"] = ids - torch.arange(draft_vocab)
        weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
        weights["lm_head.weight"] = torch.randn(draft_vocab, width, generator=generator)
    return weights


def memory_folder(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> DraftFolder:
    """Give a folder that is in memory only."""
    return DraftFolder(Path("of-a-test"), config, {name: partial(_same, weight) for name, weight in weights.items()})


def random_draft(target: Any, *, seed: int = 0, **options: Any) -> DFlashDraft:
    """Give a draft of random weights for a Hugging Face target; `options` as in `random_config`."""
    config = random_config(target, **options)
    return load_dflash(memory_folder(config, random_weights(config, seed)), adapt(target))


def good_draft(target: Any, kind: str | None, *, share: float = 0.3, **options: Any) -> DFlashDraft:
    """Give a draft whose Markov head holds what the target says behind each single token.

    Its backbone stays random and adds some noise to that: so a wrong context or slot changes what it says.

    Args:
        target: a Hugging Face model of few tokens.
        kind: of the Markov head; None gives the random backbone alone.
        share: of the backbone in the logits.
        options: as in `random_config`.
    """
    vocab = target.config.vocab_size
    if kind is None:
        return random_draft(target, **options)
    config = random_config(target, kind="dspark", markov_head_type=kind, markov_rank=vocab, **options)
    weights = random_weights(config)
    with torch.inference_mode():
        table = target(input_ids=torch.arange(vocab, device=target.device)[:, None]).logits[:, 0].cpu()
    weights["norm.weight"] *= share
    weights["markov_head.markov_w1.weight"] = torch.eye(vocab)
    weights["markov_head.markov_w2.weight"] = table.T.contiguous()
    if kind == "gated":
        weights["markov_head.gate_proj.bias"] += 4.0
    if kind == "rnn":  # the output's part reads the token above all
        weights["markov_head.joint_proj.weight"][2 * vocab :, vocab : 2 * vocab] += 3.0 * torch.eye(vocab)
    return load_dflash(memory_folder(config, weights), adapt(target))


def _same(weight: torch.Tensor) -> torch.Tensor:
    return weight
