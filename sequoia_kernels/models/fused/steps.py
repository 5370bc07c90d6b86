"""The three steps between the matrix products of a decoder layer: what they compute, and their launches.

    residual_norm_      adds what a branch gives to the residual stream and norms the stream for the next product
    rotate_and_store_   norms and rotates queries and keys, and writes keys and values into their cache rows
    gated_activation    act(gate) * up

They are the inside of `FusedForward`, which has checked what they are given; for a step of one's own the ops are the
door. `reference.py` is their specification.

Parallel plan: what one program owns
    `residual_norm_kernel`: a row. `rotate_and_store_kernel`: some heads of a row, queries or keys with their values.
    `gated_activation_kernel`: a stretch of a row.

Memory: bytes read and written
    Each input once, each output once. At one row of Llama-2-7B a launch moves 8 to 44 KB, so its time is a launch's, 2
    to 3 us; at 128 rows 1 to 8 MB, most of it in L2.

Numerics
    float32 inside, rounded where transformers' modules round. The order of every sum is fixed by the width, so a row's
    numbers do not depend on the other rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sequoia_kernels.ops import triton_device

from .triton_kernels import gated_activation_kernel, residual_norm_kernel, rotate_and_store_kernel

__all__ = ["Heads", "Norm", "RowPlaces", "gated_activation", "residual_norm_", "rotate_and_store_"]

MAX_WIDTH = 32768
"""of a row that one program norms"""


class Norm(NamedTuple):
    """A norm over the last dimension."""

    kind: int  # `description.RMS_NORM` or `LAYER_NORM`
    weight: Tensor | None  # [width]
    bias: Tensor | None  # [width]
    eps: float
    offset: float  # added to the weight


class Heads(NamedTuple):
    """Where a row of the projections holds its heads, in elements."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    first_query: int
    first_key: int
    first_value: int
    stride: int  # from head to head
    rotated_dims: int  # first dims of a head; 0 for none


class RowPlaces(NamedTuple):
    """Where the rows of a forward are in their texts and go in the caches."""

    cache_lens: Tensor  # [B] int32
    depths: Tensor  # [N] int32: positions behind the committed rows
    node_ids: Tensor  # [N] int32: cache rows behind the committed ones
    last_position: int  # what lies behind it is fed there


def residual_norm_(
    stream: Tensor,
    update: Tensor | None,
    norm: Norm | None,
    *,
    update_norm: Norm | None = None,
    update_scale: float = 1.0,
) -> Tensor:
    """Add an update, normed and scaled, to the stream, in place; return the norm of the sum.

    Args:
        stream: residual stream. [rows, width], written where there is an update.
        update: what a branch adds, or None. [rows, width].
        norm: of the sum; None returns the stream itself.
        update_norm: of the update, before it is added.
        update_scale: what the update is multiplied by.

    Returns:
        The normed rows, [rows, width].
    """
    rows, width = stream.shape
    normed = torch.empty_like(stream) if norm is not None else None
    block = triton.next_power_of_2(width)
    with triton_device.launching_on(stream.device):
        residual_norm_kernel[(rows,)](
            stream, update, normed,
            *_weights(update_norm), *_weights(norm),
            width, stream.stride(0), 0 if update is None else update.stride(0),
            0 if normed is None else normed.stride(0),
            update_scale, _eps(update_norm), _eps(norm),
            OFFSET=_offset(norm, update_norm),
            UPDATE_KIND=0 if update_norm is None else update_norm.kind,
            KIND=0 if norm is None else norm.kind,
            SCALED=update_scale != 1.0,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return stream if normed is None else normed


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
    """Norm and rotate the queries in place, and write normed and rotated keys, and values, into their cache rows.

    Args:
        projected: queries, keys and values of the rows that are fed. [B * N, width]; the queries are changed.
        keys: a layer's cache, of the strides of `values`. [B, S, Hkv, D].
        values: likewise.
        places: where the rows belong. Rows for which a cache has no room are not written.
        heads: where heads are in a row.
        table: cosines and sines by position. [positions, rotated dims] float32, None where nothing is rotated.
        query_norm: of each head of the queries.
        key_norm: of each head of the keys.

    Returns:
        The queries, a view of `projected`. [B, N, Hq, D].
    """
    batch_size, num_nodes = places.cache_lens.shape[0], places.depths.shape[0]
    last_position = places.last_position if table is None else min(places.last_position, table.shape[0] - 1)
    heads_at_once = _heads_at_once(projected.shape[0], heads.num_heads, triton_device.device_traits(projected.device))
    rest = heads.head_dim - heads.rotated_dims
    num_blocks = triton.cdiv(heads.num_heads, heads_at_once) + triton.cdiv(heads.num_kv_heads, heads_at_once)
    with triton_device.launching_on(projected.device):
        rotate_and_store_kernel[(projected.shape[0], num_blocks)](
            projected, keys, values,
            places.cache_lens, places.depths, places.node_ids, table,
            *_weights(query_norm), *_weights(key_norm),
            num_nodes, heads.num_heads, heads.num_kv_heads, keys.shape[1], last_position,
            heads.first_query, heads.first_key, heads.first_value, heads.stride,
            projected.stride(0), *(keys.stride(dim) for dim in range(3)),
            _eps(query_norm), _eps(key_norm),
            OFFSET=_offset(query_norm, key_norm),
            HEAD_DIM=heads.head_dim,
            ROTATED=heads.rotated_dims,
            BLOCK_HALF=triton.next_power_of_2(max(heads.rotated_dims // 2, 1)),
            BLOCK_REST=triton.next_power_of_2(max(rest, 1)),
            BLOCK_DIM=triton.next_power_of_2(heads.head_dim),
            QUERY_KIND=0 if query_norm is None else query_norm.kind,
            KEY_KIND=0 if key_norm is None else key_norm.kind,
            HEADS=heads_at_once,
            num_warps=max(1, min(4, heads_at_once * triton.next_power_of_2(heads.head_dim) // 256)),
        )  # fmt: skip
    queries = projected.as_strided(
        (batch_size, num_nodes, heads.num_heads, heads.head_dim),
        (num_nodes * projected.stride(0), projected.stride(0), heads.stride, 1),
        projected.storage_offset() + heads.first_query,
    )
    return queries


def gated_activation(projected: Tensor, gated: bool, activation: int) -> Tensor:
    """Apply the activation of a gated layer, or of one without gates.

    Args:
        projected: gates, then what they multiply, [rows, 2 * width]; or [rows, width] without gates.
        gated: which of the two.
        activation: place in `description.ACTIVATIONS`.

    Returns:
        [rows, width].
    """
    rows, width = projected.shape[0], projected.shape[1] // 2 if gated else projected.shape[1]
    out = projected.new_empty(rows, width)
    block = 1024 if rows * triton.cdiv(width, 1024) >= 264 else 256
    with triton_device.launching_on(projected.device):
        gated_activation_kernel[(rows, triton.cdiv(width, block))](
            projected, out, width, projected.stride(0), out.stride(0),
            GATED=gated, ACTIVATION=activation, BLOCK=block, num_warps=block // 256,
        )  # fmt: skip
    return out


@functools.lru_cache(maxsize=256)
def _heads_at_once(rows: int, num_heads: int, traits: triton_device.DeviceTraits) -> int:
    """Heads of one program: as few as keep every multiprocessor busy, more where there are programs enough."""
    heads = 1
    while heads < 8 and rows * triton.cdiv(num_heads, 2 * heads) >= 4 * traits.num_sms:
        heads *= 2
    return heads


def _weights(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)


def _eps(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.eps


def _offset(*norms: Norm | None) -> float:
    """What all of them add to their weights: a family's norms are alike."""
    offsets = {norm.offset for norm in norms if norm is not None}
    assert len(offsets) <= 1
    return offsets.pop() if offsets else 0.0
