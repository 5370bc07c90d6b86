"""What happens between two matrix products of a decoder layer, in three kernels; steps.py launches them.

Every number is rounded where transformers' modules round it, since a target's distribution is that of its modules.
Only the rotation of queries and keys is rounded once instead of three times, by angles that are not rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_device

__all__ = ["gated_activation_kernel", "residual_norm_kernel", "rotate_and_store_kernel"]

RMS_NORM = tl.constexpr(1)
LAYER_NORM = tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)

# jit helpers ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scaled_by_weight(
    values, weight_ptr, bias_ptr, columns, mask, OFFSET: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr
):
    """The end of a norm: weight and bias, rounded as the modules do."""
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if KIND == LAYER_NORM:
        values *= weight
        if bias_ptr is not None:
            values += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        return triton_device.rounded(values, DTYPE)
    if OFFSET != 0.0:  # Gemma's, all in float32
        return triton_device.rounded(values * (weight + OFFSET), DTYPE)
    return triton_device.rounded(triton_device.rounded(values, DTYPE) * weight, DTYPE)


@triton.jit
def _normed_row(
    row, weight_ptr, bias_ptr, columns, mask, width, eps, OFFSET: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr
):  # fp32 [BLOCK], 0 where masked
    if KIND == LAYER_NORM:
        mean = tl.sum(row, 0) / width
        row = tl.where(mask, row - mean, 0.0)
    scale = tl.rsqrt(tl.sum(row * row, 0) / width + eps)
    return _scaled_by_weight(row * scale, weight_ptr, bias_ptr, columns, mask, OFFSET, KIND, DTYPE)


@triton.jit
def _activated(values, ACTIVATION: tl.constexpr):  # codes are the places in `description.ACTIVATIONS`
    if ACTIVATION == 0:  # SiLU
        return values / (1.0 + tl.exp2(-values * LOG2_E))
    if ACTIVATION == 1:  # GELU by tanh, 0.5 (1 + tanh z) = sigmoid(2 z)
        inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        return values / (1.0 + tl.exp2(inner * (-2.0 * LOG2_E)))
    if ACTIVATION == 2:  # GELU
        return 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    positive = tl.maximum(values, 0.0)
    return positive if ACTIVATION == 3 else positive * positive


# kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def residual_norm_kernel(
    # inputs and outputs
    stream_ptr,  # [rows, width]; written where there is an update
    update_ptr,  # [rows, width] or None
    normed_ptr,  # [rows, width] or None
    # weights
    update_weight_ptr,  # [width] or None, with its bias likewise: the norm of the update
    update_bias_ptr,
    weight_ptr,  # [width] or None
    bias_ptr,
    # sizes and strides, in elements
    width,
    stride_stream_row,
    stride_update_row,
    stride_normed_row,
    # numbers
    update_scale,
    update_eps,
    eps,
    # what is done
    OFFSET: tl.constexpr,  # what is added to weights
    UPDATE_KIND: tl.constexpr,  # 0, RMS_NORM or LAYER_NORM
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    dtype: tl.constexpr = stream_ptr.dtype.element_ty
    stream = tl.load(stream_ptr + row * stride_stream_row + columns, mask=mask, other=0.0).to(tl.float32)
    if update_ptr is not None:
        update = tl.load(update_ptr + row * stride_update_row + columns, mask=mask, other=0.0).to(tl.float32)
        if UPDATE_KIND != 0:
            update = _normed_row(
                update, update_weight_ptr, update_bias_ptr, columns, mask, width, update_eps, OFFSET, UPDATE_KIND, dtype
            )
        if SCALED:
            update = triton_device.rounded(update * update_scale, dtype)
        stream = triton_device.rounded(stream + update, dtype)
        tl.store(stream_ptr + row * stride_stream_row + columns, stream.to(dtype), mask=mask)
    if KIND != 0:
        normed = _normed_row(stream, weight_ptr, bias_ptr, columns, mask, width, eps, OFFSET, KIND, dtype)
        tl.store(normed_ptr + row * stride_normed_row + columns, normed.to(dtype), mask=mask)


@triton.jit
def _rotated_heads(
    source_ptr,  # of the first head
    target_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,  # this position's row: cosines, then sines
    heads,  # [HEADS] numbers of heads
    num_heads,
    stride_source_head,
    stride_target_head,
    may_write,
    eps,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,  # dims, 0 for none
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    KIND: tl.constexpr,
):
    """Norm and rotate some heads of a row. The rotated dims are two halves; the dims behind them stay."""
    dtype: tl.constexpr = source_ptr.dtype.element_ty
    HALF: tl.constexpr = ROTATED // 2
    REST: tl.constexpr = HEAD_DIM - ROTATED
    is_head = heads[:, None] < num_heads
    sources = source_ptr + heads[:, None].to(tl.int64) * stride_source_head
    targets = target_ptr + heads[:, None].to(tl.int64) * stride_target_head
    may_store = is_head & may_write
    half, rest = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    in_half, in_rest = is_head & (half < HALF), is_head & (rest < REST)
    total = tl.zeros([heads.shape[0]], tl.float32)
    squares = tl.zeros([heads.shape[0]], tl.float32)
    if ROTATED > 0:
        first = tl.load(sources + half, mask=in_half, other=0.0).to(tl.float32)
        second = tl.load(sources + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        total += tl.sum(first, 1) + tl.sum(second, 1)
        squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
    if REST > 0:
        behind = tl.load(sources + ROTATED + rest, mask=in_rest, other=0.0).to(tl.float32)
        total += tl.sum(behind, 1)
        squares += tl.sum(behind * behind, 1)
    if KIND != 0:
        mean = tl.zeros([heads.shape[0]], tl.float32)
        if KIND == LAYER_NORM:
            mean = total / HEAD_DIM
            squares = tl.zeros([heads.shape[0]], tl.float32)  # about the mean, not as a difference of large numbers
            if ROTATED > 0:
                first = tl.where(in_half, first - mean[:, None], 0.0)
                second = tl.where(in_half, second - mean[:, None], 0.0)
                squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
            if REST > 0:
                behind = tl.where(in_rest, behind - mean[:, None], 0.0)
                squares += tl.sum(behind * behind, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        if ROTATED > 0:
            first = _scaled_by_weight(first * scale, weight_ptr, bias_ptr, half, half < HALF, OFFSET, KIND, dtype)
            upper = HALF + half
            second = _scaled_by_weight(second * scale, weight_ptr, bias_ptr, upper, half < HALF, OFFSET, KIND, dtype)
        if REST > 0:
            last = ROTATED + rest
            behind = _scaled_by_weight(behind * scale, weight_ptr, bias_ptr, last, rest < REST, OFFSET, KIND, dtype)
    if ROTATED > 0:
        cosine = tl.load(table_ptr + half, mask=half < HALF, other=0.0)
        sine = tl.load(table_ptr + HALF + half, mask=half < HALF, other=0.0)
        out_first, out_second = first * cosine - second * sine, second * cosine + first * sine
        tl.store(targets + half, triton_device.rounded(out_first, dtype).to(dtype), mask=may_store & (half < HALF))
        tl.store(
            targets + HALF + half, triton_device.rounded(out_second, dtype).to(dtype), mask=may_store & (half < HALF)
        )
    if REST > 0:
        tl.store(targets + ROTATED + rest, behind.to(dtype), mask=may_store & (rest < REST))


@triton.jit(do_not_specialize=["num_nodes", "num_slots", "last_position"])
def rotate_and_store_kernel(
    # inputs and outputs
    projected_ptr,  # [rows, width]: queries, which are changed in place, keys and values of each row
    keys_ptr,  # [B, S, Hkv, D]
    values_ptr,  # [B, S, Hkv, D]
    # where rows go and are
    cache_lens_ptr,  # [B] int32
    depths_ptr,  # [N] int32
    node_ids_ptr,  # [N] int32
    table_ptr,  # [positions, ROTATED] fp32, or None
    # weights of norms of heads, [HEAD_DIM] or None
    query_weight_ptr,
    query_bias_ptr,
    key_weight_ptr,
    key_bias_ptr,
    # sizes
    num_nodes,
    num_heads,
    num_kv_heads,
    num_slots,
    last_position,
    # places in a row of the projections, in elements
    first_query,
    first_key,
    first_value,
    stride_head,
    # strides, in elements
    stride_projected_row,
    stride_cache_request,
    stride_cache_slot,
    stride_cache_head,
    # numbers
    query_eps,
    key_eps,
    # what is done
    OFFSET: tl.constexpr,  # what is added to weights
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    QUERY_KIND: tl.constexpr,
    KEY_KIND: tl.constexpr,
    HEADS: tl.constexpr,  # heads of one program
):
    row = tl.program_id(0).to(tl.int64)
    request, node = row // num_nodes, row % num_nodes
    length = tl.load(cache_lens_ptr + request)
    position = tl.minimum(length + tl.load(depths_ptr + node), last_position)
    angles = table_ptr
    if ROTATED > 0:
        angles = table_ptr + tl.maximum(position, 0).to(tl.int64) * ROTATED
    source = projected_ptr + row * stride_projected_row
    num_query_blocks = tl.cdiv(num_heads, HEADS)
    block = tl.program_id(1)
    if block < num_query_blocks:
        heads = block * HEADS + tl.arange(0, HEADS)
        _rotated_heads(
            source + first_query, source + first_query, query_weight_ptr, query_bias_ptr, angles,
            heads, num_heads, stride_head, stride_head, True, query_eps, OFFSET,
            HEAD_DIM, ROTATED, BLOCK_HALF, BLOCK_REST, QUERY_KIND,
        )  # fmt: skip
    else:
        heads = (block - num_query_blocks) * HEADS + tl.arange(0, HEADS)
        slot = length + tl.load(node_ids_ptr + node)
        fits = (slot >= 0) & (slot < num_slots)  # nothing else may be written, whatever a length says
        target = request * stride_cache_request + slot.to(tl.int64) * stride_cache_slot
        _rotated_heads(
            source + first_key, keys_ptr + target, key_weight_ptr, key_bias_ptr, angles,
            heads, num_kv_heads, stride_head, stride_cache_head, fits, key_eps, OFFSET,
            HEAD_DIM, ROTATED, BLOCK_HALF, BLOCK_REST, KEY_KIND,
        )  # fmt: skip
        _rotated_heads(
            source + first_value, values_ptr + target, None, None, None,
            heads, num_kv_heads, stride_head, stride_cache_head, fits, 0.0, 0.0,
            HEAD_DIM, 0, 1, BLOCK_DIM, 0,
        )  # fmt: skip


@triton.jit
def gated_activation_kernel(
    projected_ptr,  # [rows, 2 * width], the gates in front, or [rows, width]
    out_ptr,  # [rows, width]
    width,
    stride_projected_row,
    stride_out_row,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    dtype: tl.constexpr = projected_ptr.dtype.element_ty
    source = projected_ptr + row * stride_projected_row + columns
    activated = _activated(tl.load(source, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        activated = triton_device.rounded(activated, dtype) * tl.load(source + width, mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + row * stride_out_row + columns, triton_device.rounded(activated, dtype).to(dtype), mask=mask)
