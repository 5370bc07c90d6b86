"""Inputs that several bench scripts share: trees and logits like those of a decoding step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.tree import TokenTree

# Meta-Llama-3-8B: what the sizes of the GPU cases are taken from.
LLAMA_3_8B = {"layers": 32, "q_heads": 32, "kv_heads": 8, "head_dim": 128}
VOCAB = 128256

# Standard deviation of what the draft's logits differ by from the target's, whose own is 3: at T = 0.6 and large
# vocabularies the first child is then accepted about as often as TYPICAL_ACCEPTANCE says.
DRAFT_NOISE = 0.8


class TreeStepInputs(NamedTuple):
    """A drafted tree with the logits of both models."""

    tokens: torch.Tensor  # [B, N] int64
    target_logits: torch.Tensor  # [B, N, vocab]
    draft_logits: torch.Tensor  # [B, N, vocab]; children were drawn from it
    temperature: torch.Tensor  # [B] float32
    seeds: torch.Tensor  # [B] int64
    offsets: torch.Tensor  # [B] int64


def internal_nodes(tree: TokenTree) -> list[int]:
    """Nodes with children: those whose draft logits are read."""
    return [node for node, count in enumerate(tree.num_children) if count]


def tree_step(
    tree: TokenTree,
    batch_size: int,
    vocab: int,
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> TreeStepInputs:
    """Logits of a draft that resembles its target, and children drawn from them without replacement."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch_size, tree.num_nodes, vocab)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    common = 3 * normal()
    draft_logits = torch.add(common, normal(), alpha=DRAFT_NOISE).to(dtype)
    target_logits = common.to(dtype)
    del common
    temperatures = torch.full((batch_size,), temperature, device=device)
    seeds = torch.arange(batch_size, device=device) + 1000 * (seed + 1)
    offsets = torch.zeros(batch_size, dtype=torch.int64, device=device)
    tokens = torch.zeros(batch_size, tree.num_nodes, dtype=torch.int64, device=device)
    for node in internal_nodes(tree):
        children = tree.children(node)
        streams: tuple[Any, ...] = (temperatures, seeds, offsets + 1 + node)  # the draft has offsets of its own
        drawn = sample_without_replacement(draft_logits[:, node], len(children), *streams, backend="reference")
        tokens[:, children[0] : children[-1] + 1] = drawn.tokens
    return TreeStepInputs(tokens, target_logits, draft_logits, temperatures, seeds, offsets)
