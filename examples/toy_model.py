"""A language model of one attention layer on plain tensors: what the examples decode with."""

from __future__ import annotations

import torch

from sequoia_kernels import Topology, tree_attention
from sequoia_kernels.interop import tree_slots


class ToyModel:
    """Random weights, float32. Caches are a pair of tensors that the caller keeps: keys and values."""

    def __init__(self, vocab: int, seed: int = 0, heads: int = 4, head_dim: int = 8) -> None:
        generator, width = torch.Generator().manual_seed(seed), heads * head_dim
        shapes = {"embedding": (vocab, width), "qkv": (width, 2 * width), "out": (width, width), "head": (width, vocab)}
        scale = {"embedding": 1.0, "qkv": 0.4, "out": 0.25, "head": 0.5}
        self.weights = {name: scale[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.heads, self.kv_heads, self.head_dim = heads, heads // 2, head_dim

    def to(self, device: str | torch.device) -> ToyModel:
        """Move the weights to a device."""
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return self

    def noisy(self, noise: float, seed: int = 1) -> ToyModel:
        """Give a model that often agrees with this one: a draft of it."""
        other = ToyModel(len(self.weights["embedding"]), seed).to(self.weights["head"].device)
        for name, weight in self.weights.items():
            other.weights[name] = weight + noise * other.weights[name]
        return other

    def bigrams(self) -> torch.Tensor:
        """Give what the model would say behind each token if it saw nothing else: a draft, [vocab, vocab] logits."""
        embedding = self.weights["embedding"][None]
        return self.read_out(embedding, torch.zeros_like(embedding)[..., None])[0]

    def new_cache(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate keys and values: shape is [batch, rows] or [pages, page_size]."""
        device = self.weights["head"].device
        keys, values = (torch.zeros(*shape, self.kv_heads, self.head_dim, device=device) for _ in range(2))
        return keys, values

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embed tokens at positions, both [B, N]. A token that could not be drawn is -1, and fed as token 0."""
        width = self.heads * self.head_dim
        frequencies = 1.0 / 50 ** (torch.arange(width, device=tokens.device) / width)
        return self.weights["embedding"][tokens.clamp(min=0)] + 0.5 * torch.sin(positions[..., None] * frequencies)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give queries, keys and values, [B, N, heads, head_dim] each."""
        projected = (hidden @ self.weights["qkv"]).unflatten(-1, (-1, self.head_dim))
        return projected.split((self.heads, self.kv_heads, self.kv_heads), dim=2)

    def read_out(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Give logits, [B, N, vocab]."""
        return torch.tanh(hidden + attended.flatten(2) @ self.weights["out"]) @ self.weights["head"]

    def forward(
        self,
        tokens: torch.Tensor,  # [B, N] int64
        topology: Topology,  # of one tree, or of one for each request
        nodes: torch.Tensor,  # which nodes of it are fed. [N] int64
        cache_lens: torch.Tensor,  # committed rows. [B] int32
        cache: tuple[torch.Tensor, torch.Tensor],
        block_table: torch.Tensor | None = None,  # pages of each request. [B, max_pages] int32
    ) -> torch.Tensor:
        """Feed some nodes of a tree behind the committed rows: write their keys and values, give their logits."""
        keys, values = cache
        # A position is counted by depth, a row by node.
        hidden = self.embed(tokens, cache_lens[:, None] + topology.depths[..., nodes])
        queries, new_keys, new_values = self.project(hidden)
        if block_table is None:
            first_rows = keys.shape[1] * torch.arange(len(tokens), device=tokens.device)
            slots = first_rows[:, None] + cache_lens[:, None] + nodes
        else:
            slots = tree_slots(block_table, cache_lens, nodes, page_size=keys.shape[1])
        keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots] = new_keys, new_values
        tree_mask = topology.ancestor_mask.index_select(-2, nodes)
        attended = tree_attention(queries, keys, values, tree_mask, cache_lens, block_table=block_table).out
        return self.read_out(hidden, attended)
