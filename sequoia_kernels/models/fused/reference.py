"""The steps between two products in plain torch, as transformers' modules compute them: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sequoia_kernels.models.description import ACTIVATIONS, LAYER_NORM, RMS_NORM
from sequoia_kernels.models.fused.few_rows import FewRowsModel
from sequoia_kernels.models.fused.steps import Heads, Norm, RowPlaces
from sequoia_kernels.ops import tree_attention

__all__ = ["few_rows", "gated_activation", "residual_norm_", "rotate_and_store_"]


def normed(rows: Tensor, norm: Norm) -> Tensor:
    """Norm the last dimension, in float32, rounded as the modules of `norm.kind` do."""
    wide = rows.float()
    if norm.kind == LAYER_NORM:
        weight, bias = (None if part is None else part.float() for part in (norm.weight, norm.bias))
        return F.layer_norm(wide, wide.shape[-1:], weight, bias, norm.eps).to(rows.dtype)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    assert norm.weight is not None
    if norm.offset:
        return (wide * (norm.offset + norm.weight.float())).to(rows.dtype)
    return norm.weight * wide.to(rows.dtype)


def residual_norm_(
    stream: Tensor,
    update: Tensor | None,
    norm: Norm | None,
    *,
    update_norm: Norm | None = None,
    update_scale: float = 1.0,
) -> Tensor:
    """As `steps.residual_norm_`."""
    if update is not None:
        update = update if update_norm is None else normed(update, update_norm)
        stream += update if update_scale == 1.0 else update * update_scale
    return stream if norm is None else normed(stream, norm)


def rotate_and_store_(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    places: RowPlaces,
    heads: Heads,
    table: Tensor | None,
    *,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
) -> Tensor:
    """As `steps.rotate_and_store_`."""
    batch_size, num_nodes = places.cache_lens.shape[0], places.depths.shape[0]
    positions = (places.cache_lens[:, None] + places.depths).clamp(max=places.last_position)
    slots = places.cache_lens[:, None] + places.node_ids

    def part(first: int, count: int) -> Tensor:
        shape = (batch_size, num_nodes, count, heads.head_dim)
        row = projected.stride(0)
        return projected.as_strided(shape, (num_nodes * row, row, heads.stride, 1), projected.storage_offset() + first)

    def rotated(rows: Tensor, norm: Norm | None) -> Tensor:
        rows = rows.clone() if norm is None else normed(rows, norm)
        if table is not None:
            dims = heads.rotated_dims
            cosines, sines = table[positions.clamp(0, len(table) - 1)][:, :, None].chunk(2, dim=-1)
            first, second = rows[..., :dims].float().chunk(2, dim=-1)
            turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)
            rows[..., :dims] = turned.to(rows.dtype)
        return rows

    queries = part(heads.first_query, heads.num_heads)
    queries.copy_(rotated(queries, query_norm))
    new_keys = rotated(part(heads.first_key, heads.num_kv_heads), key_norm)
    new_values = part(heads.first_value, heads.num_kv_heads)
    for request, node in (slots >= 0).logical_and(slots < keys.shape[1]).nonzero().tolist():
        keys[request, slots[request, node]] = new_keys[request, node]
        values[request, slots[request, node]] = new_values[request, node]
    return queries


def gated_activation(projected: Tensor, gated: bool, activation: int) -> Tensor:
    """As `steps.gated_activation`."""
    gate, up = projected.chunk(2, dim=-1) if gated else (projected, None)
    activated = ACTIVATIONS[activation](gate.float()).to(projected.dtype)
    return activated if up is None else activated * up


def few_rows(
    model: FewRowsModel,
    tokens: Tensor,
    caches: Sequence[tuple[Tensor, Tensor]],
    places: RowPlaces,
    tree_mask: Tensor,
    table: Tensor,
) -> Tensor:
    """A forward as `few_rows.py` launches it; inputs as in `FewRowsCall.of`. [B * N, vocab]"""

    def norm(weight: Tensor) -> Norm:
        return Norm(RMS_NORM, weight, None, model.eps, 0.0)

    keys = model.num_heads * model.head_dim
    values = keys + model.num_kv_heads * model.head_dim
    heads = Heads(model.num_heads, model.num_kv_heads, model.head_dim, 0, keys, values, model.head_dim, model.head_dim)
    stream = F.embedding(tokens.clamp(0, len(model.embedding) - 1).flatten(), model.embedding)
    for layer, (layer_keys, layer_values) in zip(model.layers, caches, strict=True):
        projected = F.linear(residual_norm_(stream, None, norm(layer.input_norm)), layer.projections)
        queries = rotate_and_store_(projected, layer_keys, layer_values, places, heads, table)
        attended = tree_attention(
            queries, layer_keys, layer_values, tree_mask, places.cache_lens, scale=model.scale, backend="reference"
        ).out
        normed_rows = residual_norm_(
            stream, F.linear(attended.flatten(0, 1).flatten(1), layer.output), norm(layer.mlp_norm)
        )
        stream += F.linear(gated_activation(F.linear(normed_rows, layer.gate_up), True, 0), layer.down)
    return F.linear(residual_norm_(stream, None, norm(model.final_norm)), model.head)
