"""Tiny random Llama models whose next-token distributions are far from uniform."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    seed: int,
    *,
    vocab_size: int = 32,
    num_layers: int = 2,
    hidden_size: int = 32,
    max_positions: int = 256,
    sharpness: float = 20.0,
    eos_token_id: int | None = None,
) -> LlamaForCausalLM:
    """Build a float32 Llama model; `sharpness` scales its logits."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
        model.lm_head.weight.mul_(sharpness)
    return model


def noisy_copy(model: LlamaForCausalLM, noise: float, seed: int = 0) -> LlamaForCausalLM:
    """Copy a model with noise on its head: a draft that agrees with its target often, but not always."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = copy.lm_head.weight
        weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
    return copy


def sequence_probabilities(model, prompt: torch.Tensor, length: int, warp) -> torch.Tensor:
    """Exact joint distribution of the next `length` tokens behind a prompt of shape [L].

    Args:
        warp: maps logits [rows, vocab] to probabilities [rows, vocab].

    Returns:
        Probabilities of all sequences in lexicographic order. [vocab ** length] float64.
    """
    vocab = model.config.vocab_size
    joint = torch.ones(1, dtype=torch.float64)
    prefixes = prompt[None]
    for _ in range(length):
        with torch.inference_mode():
            logits = model(input_ids=prefixes).logits[:, -1]
        joint = (joint[:, None] * warp(logits.double())).flatten()
        tokens = torch.arange(vocab).repeat(len(prefixes))[:, None]
        prefixes = torch.cat((prefixes.repeat_interleave(vocab, 0), tokens), dim=1)
    return joint
