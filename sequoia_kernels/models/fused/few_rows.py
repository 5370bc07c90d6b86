"""A layer in five launches, where few rows pass through small layers: what each computes, and its launch.

    normed_product    norm of the stream, the product that reads it, and the activation behind it
    attend            rotation, cache rows and attention along the tree
    add_product_      a product, added to the residual stream

A level of a draft is such a forward. Its layers take less time than the launches between them, so what matters is how
few there are and how short the way through each. `reference.py` is the specification; `FusedForward` has checked what
they are given.

Parallel plan: what one program owns
    Products: some outputs of all rows. Its warps share the width out, so that each adds up a part of it, and their sums
    are added in their order. Norms are computed by every program anew. `attend`: a head of keys of a request, all its
    nodes, all slots one tile behind the other; no partial results to merge.

Memory: bytes read and written
    Each weight once; rows and norms once a program, from L2. Where launches can be chained (compute capability 9.0 and
    newer), a program begins before the launch in front of it has ended, and asks for its weights meanwhile: only what
    depends on that launch waits (programmatic dependent launch).

Numerics
    float32 inside, rounded where transformers' modules round. The order of every sum is fixed by the sizes, so a row's
    numbers do not depend on the other rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
from torch import Tensor

from sequoia_kernels.models.fused.steps import Heads, Norm, RowPlaces
from sequoia_kernels.ops import triton_device

from .triton_few_rows import add_product_kernel, attend_kernel, normed_product_kernel

__all__ = ["MAX_ROWS", "MAX_WEIGHTS", "add_product_", "attend", "attends", "normed_product"]

MAX_ROWS = 32
"""that a forward may feed, of all requests together"""
MAX_WEIGHTS = 64 << 20
"""of a layer; larger ones are left to torch's products"""
MAX_SLOTS = 2048
"""of a cache whose attention is one launch, since one program walks through it"""
MAX_HEAD_ROWS = 64
"""rows times heads that share keys, likewise"""

_LOG2_E = 1.4426950408889634
_BYTES_IN_FLIGHT = 96 << 10  # of a program


class _Blocks(NamedTuple):
    slices: int
    block_width: int
    block_outputs: int
    num_stages: int


def normed_product(
    rows: Tensor,
    norm: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gated: bool = False,
    activation: int | None = None,
) -> Tensor:
    """Multiply the normed rows by a weight.

    Args:
        rows: [rows, width], at most `MAX_ROWS`, whose columns lie one behind the other.
        norm: of the rows; None for none.
        weight: [outputs, width], or [2 * outputs, width] of gates and what they multiply. Columns likewise.
        bias: of the weight's rows, or None.
        gated: whether the first half of the weight's rows are gates.
        activation: of the product, or of the gates; place in `description.ACTIVATIONS`, None for none.

    Returns:
        [rows, outputs].
    """
    num_rows, width = rows.shape
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = rows.new_empty(num_rows, num_outputs)
    blocks = _blocks(width, num_outputs, num_rows, gated, triton_device.device_traits(rows.device))
    with triton_device.launching_on(rows.device):
        normed_product_kernel[(triton.cdiv(num_outputs, blocks.block_outputs),)](
            rows, None if norm is None else norm.weight, None if norm is None else norm.bias, weight, bias, out,
            num_rows, num_outputs, rows.stride(0), weight.stride(0), out.stride(0),
            0.0 if norm is None else norm.eps,
            OFFSET=0.0 if norm is None else norm.offset,
            KIND=0 if norm is None else norm.kind,
            GATED=gated,
            ACTIVATION=-1 if activation is None else activation,
            **_options(rows, width, num_outputs, blocks),
        )  # fmt: skip
    return out


def add_product_(stream: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add a product to the stream, in place.

    Args:
        stream: [rows, outputs], at most `MAX_ROWS`.
        rows: [rows, width], whose columns lie one behind the other.
        weight: [outputs, width], likewise.
        bias: [outputs] or None.
    """
    (num_rows, width), num_outputs = rows.shape, weight.shape[0]
    blocks = _blocks(width, num_outputs, num_rows, False, triton_device.device_traits(rows.device))
    with triton_device.launching_on(rows.device):
        add_product_kernel[(triton.cdiv(num_outputs, blocks.block_outputs),)](
            stream, rows, weight, bias,
            num_rows, num_outputs, stream.stride(0), rows.stride(0), weight.stride(0),
            **_options(rows, width, num_outputs, blocks),
        )  # fmt: skip


def attends(heads: Heads, num_nodes: int, keys: Tensor) -> bool:
    """Whether `attend` takes so many nodes: heads in two halves that are rotated, in a cache that is not too long."""
    head_dim, group = heads.head_dim, heads.num_heads // heads.num_kv_heads
    is_padded = head_dim != triton.next_power_of_2(head_dim) or not 32 <= head_dim <= 128
    is_short = keys.shape[1] <= MAX_SLOTS and num_nodes * group <= MAX_HEAD_ROWS
    return is_short and not is_padded and heads.rotated_dims == head_dim


def attend(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    places: RowPlaces,
    heads: Heads,
    table: Tensor,
    tree_mask: Tensor,
    num_tree_rows: int,
    scale: float,
) -> Tensor:
    """Rotate queries and keys, write keys and values into their cache rows, and attend along the tree.

    Args:
        projected: queries, keys and values of the rows that are fed. [B * N, width].
        keys: a layer's cache, of the strides of `values`. [B, S, Hkv, D].
        values: likewise.
        places: where the rows belong. Rows for which a cache has no room are not written.
        heads: where heads are in a row; see `attends`.
        table: cosines and sines by position. [positions, D] float32.
        tree_mask: what each row sees. [N, words] or [B, N, words] int32.
        num_tree_rows: tree slots in use; those behind them are seen by no row.
        scale: of the scores, above 0.

    Returns:
        [B * N, Hq * D].
    """
    batch_size, num_nodes = places.cache_lens.shape[0], places.depths.shape[0]
    group, num_words = heads.num_heads // heads.num_kv_heads, tree_mask.shape[-1]
    out = projected.new_empty(projected.shape[0], heads.num_heads * heads.head_dim)
    block_rows = _block_rows(num_nodes * group)
    with triton_device.launching_on(projected.device):
        attend_kernel[(heads.num_kv_heads, batch_size)](
            projected, keys, values, out,
            places.cache_lens, places.depths, places.node_ids, tree_mask, table,
            num_nodes, num_words, num_tree_rows, keys.shape[1], min(places.last_position, table.shape[0] - 1),
            heads.first_query, heads.first_key, heads.first_value, heads.stride,
            projected.stride(0), *(keys.stride(dim) for dim in range(3)),
            num_nodes * num_words if tree_mask.dim() == 3 else 0,
            out.stride(0), scale * _LOG2_E,
            GROUP=group,
            HEAD_DIM=heads.head_dim,
            BLOCK_NODES=_block_rows(num_nodes),
            BLOCK_ROWS=block_rows,
            BLOCK_SLOTS=64,
            num_warps=8 if block_rows > 32 else 4,
            num_stages=3,
            **_chaining(projected),
        )  # fmt: skip
    return out


def _block_rows(num_rows: int) -> int:
    """Rows of a block: 16 at least, which a matrix instruction takes anyway."""
    return max(16, triton.next_power_of_2(num_rows))


def _options(rows: Tensor, width: int, num_outputs: int, blocks: _Blocks) -> dict[str, Any]:
    """What both products are launched with."""
    even_width = width % (blocks.slices * blocks.block_width) == 0
    return {
        "WIDTH": width,
        "EVEN": even_width and num_outputs % blocks.block_outputs == 0,
        "SLICES": blocks.slices,
        "BLOCK_WIDTH": blocks.block_width,
        "BLOCK_ROWS": _block_rows(rows.shape[0]),
        "BLOCK_OUTPUTS": blocks.block_outputs,
        "LINES": triton.next_power_of_2(triton.cdiv(width * rows.element_size(), 128)),
        "num_warps": blocks.slices,
        "num_stages": blocks.num_stages,
        **_chaining(rows),
    }


def _chaining(tensor: Tensor) -> dict[str, Any]:
    chained = triton_device.can_chain(tensor.device)
    return {"CHAINED": chained, "launch_pdl": True} if chained else {"CHAINED": False}


@functools.lru_cache(maxsize=256)
def _blocks(width: int, num_outputs: int, num_rows: int, gated: bool, traits: triton_device.DeviceTraits) -> _Blocks:
    """Blocks of a product: as many programs as keep the device busy, and as much in flight as lets two share an SM."""
    slices = 4
    slice_width = triton.cdiv(width, slices)
    block_width = min(128, max(16, slice_width & -slice_width))
    if block_width < 64 and slice_width >= 256:
        block_width = 64  # the last block of a slice is cut off
    block_outputs = 32 if num_outputs >= 64 * traits.num_sms else 16
    stage_bytes = 2 * slices * block_width * (block_outputs * (2 if gated else 1) + _block_rows(num_rows))
    num_stages = min(triton.cdiv(slice_width, block_width) + 1, max(2, _BYTES_IN_FLIGHT // stage_bytes))
    return _Blocks(slices, block_width, block_outputs, num_stages)
