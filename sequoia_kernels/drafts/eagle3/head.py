"""The arithmetic of an EAGLE-3 head in torch, on the rows of one forward; nothing here knows of trees or requests.

Computes, for a row with token y and feature g (features of the target come through `combine` first):
    combine  g = fc(f), f the target's hidden states side by side, each behind its own norm (fc_norm) or all behind
             one (norm_before_fc)
    layer 0  h = r + attention([norm(embed(y)); norm(g)]), r = g or, with norm_before_residual, norm(g)
             o = h + mlp(norm(h)); further layers are ordinary ones
    feature  o, or norm(o) with norm_output: g of the rows one level deeper
    logits   lm_head(norm(o))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding, linear

from sequoia_kernels.models import TreeCache, TreeStep
from sequoia_kernels.ops import tree_attention

__all__ = ["EagleHead", "HeadLayer", "Norm", "Projection"]


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm."""

    weight: torch.Tensor  # [width]
    eps: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Norm the last dimension, in float32 as transformers' do."""
        wide = rows.to(torch.float32) if rows.dtype != torch.float64 else rows
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(rows.dtype)


@dataclass(frozen=True)
class Projection:
    """A linear layer, or several of the same inputs side by side."""

    weight: torch.Tensor  # [outputs, inputs]
    bias: torch.Tensor | None = None  # [outputs]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows by the weight."""
        return linear(rows, self.weight, self.bias)


@dataclass(frozen=True)
class HeadLayer:
    """The weights of a decoder layer; the first one's qkv reads rows of twice the width."""

    qkv: Projection  # [(Hq + 2 Hkv) D, 2 H or H]
    output: Projection  # [H, Hq D]
    gate_up: Projection  # [2 I, H]
    down: Projection  # [H, I]
    input_norm: Norm
    mlp_norm: Norm
    query_norm: Norm | None = None  # over a head, [D]
    key_norm: Norm | None = None
    window: int | None = None  # sliding window in tokens


@dataclass(frozen=True)
class EagleHead:
    """A head's weights, which are shared with the target where its files lack them.

    Attributes:
        embed: embeddings of the target's tokens. [num_embeddings, H]
        fc: [H, num_features * Ht].
        feature_norms: one for each feature, or one for all side by side, or none.
        hidden_norm: of the first layer's feature.
        layers: its layers.
        norm: before `lm_head`.
        lm_head: [Vd, H].
        rotary: transformers' rotary embedding.
        activation: of the MLPs.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        norm_before_residual: see the file.
        norm_output: see the file.
        mask_feature: of a parallel head: what `combine` gives for a row that no target has seen. [H]
        mask_token_id: likewise the token of such a row.
    """

    embed: torch.Tensor
    fc: Projection
    feature_norms: tuple[Norm, ...]
    hidden_norm: Norm
    layers: tuple[HeadLayer, ...]
    norm: Norm
    lm_head: Projection
    rotary: Any
    activation: Any
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_before_residual: bool = False
    norm_output: bool = False
    mask_feature: torch.Tensor | None = None
    mask_token_id: int | None = None

    def combine(
        self, features: Sequence[torch.Tensor], product: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Make the head's features of the target's, by `fc` or what computes the same. [..., Ht] each -> [..., H]."""
        if len(self.feature_norms) == len(features) > 1:
            features = [norm(feature) for norm, feature in zip(self.feature_norms, features, strict=True)]
        rows = torch.cat(list(features), -1)
        if len(self.feature_norms) == 1:
            rows = self.feature_norms[0](rows)
        return (product or self.fc)(rows)

    def forward(
        self, tokens: torch.Tensor, features: torch.Tensor, cache: TreeCache, cache_lens: torch.Tensor, step: TreeStep
    ) -> torch.Tensor:
        """Run rows through the layers.

        Args:
            tokens: tokens of the rows; those that have no embedding are fed as the nearest that has. [B, N] int64.
            features: what goes with them. [B, N, H].
            cache: the head's; rows cache_lens[b] + node_ids[i] are written.
            cache_lens: rows that all of these see. [B] int32.
            step: what else each row sees, and where it goes.

        Returns:
            Outputs of the last layer, not normed. [B, N, H].
        """
        positions = (cache_lens[:, None] + step.depths).to(torch.int64)
        cosines, sines = self.rotary(features, positions)
        places = cache.flat_rows(cache_lens, step.node_ids)
        normed = self.hidden_norm(features)
        residual = normed if self.norm_before_residual else features
        embedded = embedding(tokens.clamp(0, self.embed.shape[0] - 1), self.embed)
        rows = torch.cat((self.layers[0].input_norm(embedded), normed), -1)
        query_width, width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for number, (layer, kept) in enumerate(zip(self.layers, cache.layers, strict=True)):
            if number > 0:
                rows = layer.input_norm(residual)
            parts = layer.qkv(rows).split([query_width, width, width], -1)
            query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = layer.query_norm(query), layer.key_norm(key)
            query, key = _rotated(query, cosines, sines), _rotated(key, cosines, sines)
            kept.flat_keys.index_copy_(0, places, key.flatten(0, 1))
            kept.flat_values.index_copy_(0, places, value.flatten(0, 1))
            attended = tree_attention(
                query, kept.keys, kept.values, step.tree_mask, cache_lens, sliding_window=layer.window,
                block_table=cache.block_table,
            ).out  # fmt: skip
            residual = residual + layer.output(attended.flatten(2))
            gate, up = layer.gate_up(layer.mlp_norm(residual)).chunk(2, -1)
            residual = residual + layer.down(self.activation(gate) * up)
        return residual

    def next_features(self, outputs: torch.Tensor) -> torch.Tensor:
        """Give the features of the rows behind these: [..., H] of `forward` -> [..., H]."""
        return self.norm(outputs) if self.norm_output else outputs

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Score the tokens behind rows: [..., H] of `forward` -> [..., Vd]."""
        return self.lm_head(self.norm(outputs))

    def weights(self) -> list[torch.Tensor]:
        """Give all tensors that a forward reads, those that are the target's among them."""
        found: list[torch.Tensor | None] = [self.embed, self.mask_feature, *self.rotary.buffers()]
        parts: list[Norm | Projection | None] = [self.fc, *self.feature_norms, self.hidden_norm, self.norm]
        parts.append(self.lm_head)
        for layer in self.layers:
            parts += [layer.qkv, layer.output, layer.gate_up, layer.down, layer.input_norm, layer.mlp_norm]
            parts += [layer.query_norm, layer.key_norm]
        for part in parts:
            if part is not None:
                found += [part.weight, part.bias if isinstance(part, Projection) else None]
        return [tensor for tensor in found if tensor is not None]


def _rotated(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of heads [B, N, heads, D] by angles [B, N, dims]; the others stay."""
    dims = cosines.shape[-1]
    turned, rest = heads[..., :dims], heads[..., dims:]
    first, second = turned.chunk(2, -1)
    across = torch.cat((-second, first), -1)
    turned = turned * cosines[:, :, None] + across * sines[:, :, None]
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)
