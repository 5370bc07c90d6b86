"""The kernels of a layer for few rows; few_rows.py says what they compute and launches them.

Every number is rounded where transformers' modules round it, as in triton_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sequoia_kernels.ops import triton_device

from .triton_kernels import activated, rounded

__all__ = ["add_product_kernel", "attend_kernel", "normed_product_kernel"]

LAYER_NORM = tl.constexpr(2)
INTERPRETED = tl.constexpr(triton_device.INTERPRETED)

# jit helpers ----------------------------------------------------------------------------------------------------------


@triton.jit
def _fetch_to_l2(first_ptr, outputs, num_outputs, stride_output, WIDTH: tl.constexpr, LINES: tl.constexpr):
    """Ask for rows of weights that are read next, a line of 128 bytes at a time; nothing waits for them."""
    PER_LINE: tl.constexpr = 1024 // first_ptr.dtype.element_ty.primitive_bitwidth
    columns = tl.minimum(tl.arange(0, LINES) * PER_LINE, WIDTH - 1)
    rows = tl.minimum(outputs, num_outputs - 1).to(tl.int64) * stride_output
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0",
        "=r,l",
        [(first_ptr + rows[:, None] + columns[None, :]).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _dot(left, right, acc):
    """acc + left @ right. The interpreter would multiply the bits of bfloat16 as integers, so it is given float32."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    else:
        return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _columns_of(first, SLICES: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr):  # [SLICES, BLOCK], and if real
    within = first + tl.arange(0, BLOCK)
    columns = (tl.arange(0, SLICES) * SLICE)[:, None] + within[None, :]
    return columns, (within < SLICE)[None, :] & (columns >= 0)


@triton.jit
def _sums_of_rows(values):  # [SLICES, BLOCK, ROWS] -> [ROWS]
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def _product(
    acc,  # [SLICES, OUTPUTS, ROWS] fp32
    rows,  # [SLICES, BLOCK, ROWS]
    weight_ptr,
    outputs,  # [OUTPUTS]
    output_is_real,
    columns,  # [SLICES, BLOCK]
    column_is_real,
    stride_output,
    EVEN: tl.constexpr,
):
    pointers = weight_ptr + outputs[None, :, None].to(tl.int64) * stride_output + columns[:, None, :]
    if EVEN:
        weight = tl.load(pointers)
    else:
        weight = tl.load(pointers, mask=output_is_real[None, :, None] & column_is_real[:, None, :], other=0.0)
    return _dot(weight, rows, acc)


# kernels --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "num_outputs"])
def normed_product_kernel(
    # inputs and outputs
    rows_ptr,  # [rows, WIDTH]
    norm_weight_ptr,  # [WIDTH] or None
    norm_bias_ptr,  # [WIDTH] or None
    weight_ptr,  # [outputs, WIDTH], or [2 * outputs, WIDTH] of gates and what they multiply
    bias_ptr,  # likewise, or None
    out_ptr,  # [rows, outputs]
    # sizes and strides, in elements
    num_rows,
    num_outputs,
    stride_row,
    stride_output,
    stride_out_row,
    # numbers
    eps,
    # what is done
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,  # what is added to the norm's weights
    KIND: tl.constexpr,  # 0, RMS_NORM or LAYER_NORM
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,  # -1 for none
    CHAINED: tl.constexpr,  # may begin before the launch in front has ended
    EVEN: tl.constexpr,  # blocks hold real numbers only
    # blocks
    SLICES: tl.constexpr,  # of the width, each a warp's
    BLOCK_WIDTH: tl.constexpr,  # columns of a slice that are multiplied at once
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    LINES: tl.constexpr,  # of 128 bytes in a row of weights, as a power of 2
):
    SLICE: tl.constexpr = (WIDTH + SLICES - 1) // SLICES
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    output_is_real = outputs < num_outputs
    up_ptr = weight_ptr + num_outputs.to(tl.int64) * stride_output
    if CHAINED:
        gdc_launch_dependents()
        _fetch_to_l2(weight_ptr, outputs, num_outputs, stride_output, WIDTH, LINES)
        if GATED:
            _fetch_to_l2(up_ptr, outputs, num_outputs, stride_output, WIDTH, LINES)
        gdc_wait()
    rows = tl.arange(0, BLOCK_ROWS)
    row_is_real = rows < num_rows
    row_ptrs = rows_ptr + rows.to(tl.int64) * stride_row

    scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    mean = tl.zeros([BLOCK_ROWS], tl.float32)
    if KIND == LAYER_NORM:
        for first in tl.range(0, SLICE, BLOCK_WIDTH):
            columns, column_is_real = _columns_of(first, SLICES, SLICE, BLOCK_WIDTH)
            is_real = (column_is_real & (columns < WIDTH))[:, :, None] & row_is_real[None, None, :]
            part = tl.load(row_ptrs[None, None, :] + columns[:, :, None], mask=is_real, other=0.0).to(tl.float32)
            mean += _sums_of_rows(part)
        mean = mean / WIDTH
    if KIND != 0:
        squares = tl.zeros([BLOCK_ROWS], tl.float32)
        for first in tl.range(0, SLICE, BLOCK_WIDTH):
            columns, column_is_real = _columns_of(first, SLICES, SLICE, BLOCK_WIDTH)
            is_real = (column_is_real & (columns < WIDTH))[:, :, None] & row_is_real[None, None, :]
            part = tl.load(row_ptrs[None, None, :] + columns[:, :, None], mask=is_real, other=0.0).to(tl.float32)
            part = tl.where(is_real, part - mean[None, None, :], 0.0)
            squares += _sums_of_rows(part * part)
        scale = tl.rsqrt(squares / WIDTH + eps)

    acc = tl.zeros([SLICES, BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    up = tl.zeros([SLICES, BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for first in tl.range(0, SLICE, BLOCK_WIDTH):
        columns, column_is_real = _columns_of(first, SLICES, SLICE, BLOCK_WIDTH)
        column_is_real = column_is_real & (columns < WIDTH)
        is_real = column_is_real[:, :, None] & row_is_real[None, None, :]
        part = tl.load(row_ptrs[None, None, :] + columns[:, :, None], mask=is_real, other=0.0)
        if KIND != 0:
            wide = (part.to(tl.float32) - mean[None, None, :]) * scale[None, None, :]
            weight = tl.full([SLICES, BLOCK_WIDTH], 1.0, tl.float32)
            if norm_weight_ptr is not None:
                weight = tl.load(norm_weight_ptr + columns, mask=column_is_real, other=0.0).to(tl.float32)
            if KIND == LAYER_NORM:
                wide *= weight[:, :, None]
                if norm_bias_ptr is not None:
                    bias = tl.load(norm_bias_ptr + columns, mask=column_is_real, other=0.0).to(tl.float32)
                    wide += bias[:, :, None]
            elif OFFSET != 0.0:  # Gemma's, all in float32
                wide *= weight[:, :, None] + OFFSET
            else:
                wide = rounded(wide, dtype) * weight[:, :, None]
            part = rounded(wide, dtype).to(dtype)
            if not EVEN:
                part = tl.where(column_is_real[:, :, None], part, 0.0)  # a norm's bias behind the width
        acc = _product(
            acc, part, weight_ptr, outputs, output_is_real, columns, column_is_real, stride_output, EVEN
        )  # fmt: skip
        if GATED:
            up = _product(up, part, up_ptr, outputs, output_is_real, columns, column_is_real, stride_output, EVEN)

    out = tl.sum(acc, 0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + outputs, mask=output_is_real, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION >= 0:
        out = activated(rounded(out, dtype), ACTIVATION)
    if GATED:
        multiplied = tl.sum(up, 0)
        if bias_ptr is not None:
            up_bias = tl.load(bias_ptr + num_outputs + outputs, mask=output_is_real, other=0.0)
            multiplied += up_bias.to(tl.float32)[:, None]
        out = rounded(out, dtype) * rounded(multiplied, dtype)
    is_real = output_is_real[:, None] & row_is_real[None, :]
    out_ptrs = out_ptr + rows[None, :].to(tl.int64) * stride_out_row + outputs[:, None]
    tl.store(out_ptrs, rounded(out, dtype).to(dtype), mask=is_real)


@triton.jit(do_not_specialize=["num_rows", "num_outputs"])
def add_product_kernel(
    # inputs and outputs
    stream_ptr,  # [rows, outputs], which the product is added to
    rows_ptr,  # [rows, WIDTH]
    weight_ptr,  # [outputs, WIDTH]
    bias_ptr,  # [outputs] or None
    # sizes and strides, in elements
    num_rows,
    num_outputs,
    stride_stream_row,
    stride_row,
    stride_output,
    # what is done
    WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
    EVEN: tl.constexpr,
    # blocks
    SLICES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    LINES: tl.constexpr,
):
    SLICE: tl.constexpr = (WIDTH + SLICES - 1) // SLICES
    dtype: tl.constexpr = stream_ptr.dtype.element_ty
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    output_is_real = outputs < num_outputs
    if CHAINED:
        gdc_launch_dependents()
        _fetch_to_l2(weight_ptr, outputs, num_outputs, stride_output, WIDTH, LINES)
        gdc_wait()
    rows = tl.arange(0, BLOCK_ROWS)
    row_is_real = rows < num_rows
    row_ptrs = rows_ptr + rows.to(tl.int64) * stride_row
    acc = tl.zeros([SLICES, BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for first in tl.range(0, SLICE, BLOCK_WIDTH):
        columns, column_is_real = _columns_of(first, SLICES, SLICE, BLOCK_WIDTH)
        column_is_real = column_is_real & (columns < WIDTH)
        is_real = column_is_real[:, :, None] & row_is_real[None, None, :]
        part = tl.load(row_ptrs[None, None, :] + columns[:, :, None], mask=is_real, other=0.0)
        acc = _product(
            acc, part, weight_ptr, outputs, output_is_real, columns, column_is_real, stride_output, EVEN
        )  # fmt: skip
    out = tl.sum(acc, 0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + outputs, mask=output_is_real, other=0.0).to(tl.float32)[:, None]
    is_real = output_is_real[:, None] & row_is_real[None, :]
    stream_ptrs = stream_ptr + rows[None, :].to(tl.int64) * stride_stream_row + outputs[:, None]
    stream = tl.load(stream_ptrs, mask=is_real, other=0.0).to(tl.float32)
    tl.store(stream_ptrs, rounded(stream + rounded(out, dtype), dtype).to(dtype), mask=is_real)


@triton.jit
def _rotated(source_ptrs, angle_ptrs, is_real, HALF: tl.constexpr):
    """Rotate heads by the angles of their rows. Both halves, [rows, HALF], in the type that is stored."""
    dtype: tl.constexpr = source_ptrs.dtype.element_ty
    half = tl.arange(0, HALF)[None, :]
    first = tl.load(source_ptrs[:, None] + half, mask=is_real[:, None], other=0.0).to(tl.float32)
    second = tl.load(source_ptrs[:, None] + HALF + half, mask=is_real[:, None], other=0.0).to(tl.float32)
    cosine = tl.load(angle_ptrs[:, None] + half, mask=is_real[:, None], other=0.0)
    sine = tl.load(angle_ptrs[:, None] + HALF + half, mask=is_real[:, None], other=0.0)
    out_first, out_second = first * cosine - second * sine, second * cosine + first * sine
    return rounded(out_first, dtype).to(dtype), rounded(out_second, dtype).to(dtype)


@triton.jit(
    do_not_specialize=[
        *("num_nodes", "num_words", "num_tree_rows", "num_slots", "last_position"),
        *("first_query", "first_key", "first_value", "stride_mask_request"),
    ]
)
def attend_kernel(
    # inputs and outputs
    projected_ptr,  # [B * N, width]: queries, keys and values of each row
    keys_ptr,  # [B, S, Hkv, HEAD_DIM]
    values_ptr,  # [B, S, Hkv, HEAD_DIM]
    out_ptr,  # [B * N, heads * HEAD_DIM]
    # where rows go and are, and what they see
    cache_lens_ptr,  # [B] int32
    depths_ptr,  # [N] int32
    node_ids_ptr,  # [N] int32
    tree_mask_ptr,  # [N, words] or [B, N, words] int32
    table_ptr,  # [positions, HEAD_DIM] fp32
    # sizes
    num_nodes,
    num_words,
    num_tree_rows,
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
    stride_mask_request,
    stride_out_row,
    # numbers
    exponent_scale,  # log2(e) included
    # what is done
    GROUP: tl.constexpr,  # query heads of a head of keys
    HEAD_DIM: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = projected_ptr.dtype.element_ty
    kv_head, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(cache_lens_ptr + request)
    first_row = projected_ptr + request * num_nodes * stride_projected_row

    # This head's keys and values, into their cache rows.
    nodes = tl.arange(0, BLOCK_NODES)
    node_is_real = nodes < num_nodes
    slots = length + tl.load(node_ids_ptr + nodes, mask=node_is_real, other=0)
    fits = node_is_real & (slots >= 0) & (slots < num_slots)  # nothing else may be written, whatever a length says
    position = tl.minimum(length + tl.load(depths_ptr + nodes, mask=node_is_real, other=0), last_position)
    angles = table_ptr + tl.maximum(position, 0).to(tl.int64) * HEAD_DIM
    sources = first_row + nodes.to(tl.int64) * stride_projected_row + kv_head * stride_head
    first_half, second_half = _rotated(sources + first_key, angles, node_is_real, HALF)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    value_rows = tl.load(sources[:, None] + first_value + dims, mask=node_is_real[:, None], other=0.0)
    cache_rows = request * stride_cache_request + kv_head.to(tl.int64) * stride_cache_head
    targets = (cache_rows + slots.to(tl.int64) * stride_cache_slot)[:, None]
    half = tl.arange(0, HALF)
    tl.store(keys_ptr + targets + half[None, :], first_half, mask=fits[:, None])
    tl.store(keys_ptr + targets + HALF + half[None, :], second_half, mask=fits[:, None])
    tl.store(values_ptr + targets + dims, value_rows, mask=fits[:, None])

    # Its queries: row r is node r // GROUP.
    rows = tl.arange(0, BLOCK_ROWS)
    row_nodes, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    row_is_real = row_nodes < num_nodes
    position = tl.minimum(length + tl.load(depths_ptr + row_nodes, mask=row_is_real, other=0), last_position)
    angles = table_ptr + tl.maximum(position, 0).to(tl.int64) * HEAD_DIM
    sources = first_row + row_nodes.to(tl.int64) * stride_projected_row + heads * stride_head
    query_first, query_second = _rotated(sources + first_query, angles, row_is_real, HALF)
    mask_rows = tree_mask_ptr + request * stride_mask_request + row_nodes.to(tl.int64) * num_words

    length = tl.minimum(tl.maximum(length, 0), num_slots)  # a wrong one must not reach foreign memory
    end = tl.minimum(length + num_tree_rows, num_slots)
    keys_ptr += cache_rows
    values_ptr += cache_rows
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
    tl.debug_barrier()  # the rows that were stored are read by other threads of this program
    for first_slot in tl.range(0, end, BLOCK_SLOTS):
        seen_slots = first_slot + tl.arange(0, BLOCK_SLOTS)
        slot_is_real = seen_slots < end
        slot_rows = seen_slots.to(tl.int64) * stride_cache_slot
        keys = keys_ptr + slot_rows[None, :] + half[:, None]
        scores = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], tl.float32)
        scores = _dot(query_first, tl.load(keys, mask=slot_is_real[None, :], other=0.0), scores)
        scores = _dot(query_second, tl.load(keys + HALF, mask=slot_is_real[None, :], other=0.0), scores)
        bits = (seen_slots - length)[None, :]  # below 0 in the prefix
        is_tree = row_is_real[:, None] & (bits >= 0) & slot_is_real[None, :]
        words = tl.load(mask_rows[:, None] + (bits >> 5), mask=is_tree & (bits < 32 * num_words), other=0)
        is_visible = row_is_real[:, None] & slot_is_real[None, :] & ((bits < 0) | (((words >> (bits & 31)) & 1) != 0))
        scores = tl.where(is_visible, scores * exponent_scale, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - pivot[:, None])
        decay = tl.exp2(row_max - pivot)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        value_ptrs = values_ptr + slot_rows[:, None] + dims
        values = tl.load(value_ptrs, mask=slot_is_real[:, None], other=0.0)
        is_seen = tl.max(is_visible.to(tl.int32), 0) != 0
        values = tl.where(is_seen[:, None], values, 0.0)  # what nobody sees may be NaN
        acc = _dot(weights.to(dtype), values, acc * decay[:, None])
        row_max = new_max

    acc = acc / tl.where(row_sum != 0.0, row_sum, 1.0)[:, None]
    out_rows = (request * num_nodes + row_nodes) * stride_out_row + heads * HEAD_DIM
    tl.store(out_ptr + out_rows[:, None] + dims, rounded(acc, dtype).to(dtype), mask=row_is_real[:, None])
