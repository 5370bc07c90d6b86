"""Tree attention in Triton: split-KV flash attention under a packed ancestor mask. Inputs as in reference.py.

Computes
    out[b, i, h] = sum over visible slots s of softmax_s(score(q[b, i, h], k[b, s, h // group])) v[b, s, h // group]
    where score = scale * q.k, soft-capped if asked. Row i sees the committed prefix s < cache_lens[b] and the tree
    slots s = cache_lens[b] + j whose bit j is set in its mask. A sliding window hides what lies `window` or more
    positions back; the position of a row is cache_lens[b] + popcount(mask row) - 1. Set bits stand in depth order, so
    the window comes down to one number a row, the first visible slot, found once per program.

Parallel plan: what one program owns
    `tree_attention_kernel`, grid (row blocks * splits, kv heads, batch): BLOCK_ROWS query rows of one kv head against
    one split of the slots. Rows are packed over nodes x group (row r is node r // group, head r % group), so a key or
    value tile is read once for all heads that share it. The slots that a row block can see, prefix and tree, are one
    stretch of the cache. Its tiles are dealt evenly to the splits; the last split holds the tree. Tiles inside every
    row's visible prefix need no mask and have a loop of their own, the others go through a second loop in smaller
    tiles, since mask bits take registers. The number of splits comes from shapes alone and the borders between them
    from the lengths on the device, so one captured graph serves every length.
    `merge_splits_kernel`, grid (row blocks, kv heads, batch): adds the partial results, weighted by their log-sum-exp,
    in the order of the splits. A single split writes the output itself. No atomics: results repeat bit for bit.

Memory: bytes read and written
    Reads the visible keys and values once per row block (from L2 after the first) and q once per split; with more than
    one split, writes and reads back rows * splits * (Dv + 1) float32. Floor: visible slots * kv heads * (D + Dv) *
    itemsize bytes a request at copy bandwidth, or 2 * nodes * heads * visible slots * (D + Dv) operations at the matrix
    rate, whichever takes longer. H200 (4.3 TB/s, 788 TFLOP/s bf16), Llama-3-8B heads, 8k context: 33.5 MB, 7.8 us a
    layer for up to 46 nodes; from there on arithmetic takes longer (64 nodes: 8.6 GFLOP, 10.9 us).

Numerics
    Scores, softmax and sums in float32, exponentials in base 2 with the scale folded in. float16 and bfloat16 products
    accumulate in float32, and probabilities are rounded to that type for the second product. float32 products are exact
    float32 (input_precision "ieee", never tf32). float8 keys and values become q's type in registers, which is exact,
    and their scales multiply scores and output in float32. Devices older than compute capability 8.9 have no float8
    conversion; there the bits are shifted into float16, and a float8 NaN becomes 480. Rows that see nothing give 0 and
    -inf. Slots that no row of a block sees may hold anything, NaN included.

Source
    Split and merge: flash-decoding (Dao, Haziza, Massa, Sizov 2023). Inner loop: FlashAttention-2 (arXiv 2307.08691).
    Tree mask: SpecInfer (arXiv 2305.09781), here packed and kept to the tree's own columns. Deviation: the tail of the
    prefix and the tree share tiles instead of having a tile each, so the mask is cut at any bit.

Compiled for every case of docs/triton_resources.md and run in Triton's interpreter. Not run on a GPU.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sequoia_kernels import triton_device

# tuning table --------------------------------------------------------------------------------------------------------


class TileShape(NamedTuple):
    """How one program walks the slots."""

    block_slots: int
    """slots of a tile without a mask"""
    masked_slots: int
    """slots of a tile with a mask; divides block_slots"""
    num_warps: int
    num_stages: int
    """software-pipelining depth of the loop without masks"""
    masked_stages: int
    programs_per_sm: int
    """programs that run on a multiprocessor at a time; the number of splits is chosen to fill them"""


# Chosen by compiling (no spills, shared memory within the device's, docs/triton_resources.md) and by reasoning: enough
# bytes in flight for few rows, enough warps for many. No device has timed them yet; bench/bench_tree_attention.py will.
# family -> (block_rows, padded head dim) -> tile, by rising block_rows. "fp32" serves float32 on every device.
_TILES: dict[str, dict[tuple[int, int], TileShape]] = {
    "sm_80": {
        (16, 64): TileShape(128, 64, 4, 3, 3, 2),
        (32, 64): TileShape(128, 64, 4, 3, 3, 2),
        (64, 64): TileShape(64, 32, 4, 3, 2, 2),
        (128, 64): TileShape(64, 32, 4, 3, 2, 1),
        (16, 128): TileShape(64, 64, 4, 3, 3, 2),
        (32, 128): TileShape(64, 32, 4, 3, 3, 2),
        (64, 128): TileShape(64, 32, 4, 3, 2, 1),
        (128, 128): TileShape(64, 32, 8, 3, 2, 1),
        (16, 256): TileShape(32, 32, 4, 3, 2, 1),
        (32, 256): TileShape(32, 32, 8, 2, 2, 1),
        (64, 256): TileShape(32, 32, 8, 2, 2, 1),
    },
    "sm_90": {
        (16, 64): TileShape(128, 64, 4, 3, 3, 2),
        (32, 64): TileShape(128, 64, 4, 3, 3, 2),
        (64, 64): TileShape(128, 64, 4, 3, 2, 2),
        (128, 64): TileShape(128, 64, 8, 3, 2, 1),
        (16, 128): TileShape(64, 64, 4, 3, 3, 2),
        (32, 128): TileShape(64, 32, 4, 3, 3, 2),
        (64, 128): TileShape(64, 64, 4, 3, 2, 2),
        (128, 128): TileShape(128, 32, 8, 2, 2, 1),
        (16, 256): TileShape(32, 32, 4, 3, 2, 1),
        (32, 256): TileShape(32, 32, 8, 2, 2, 1),
        (64, 256): TileShape(64, 32, 8, 2, 2, 1),
        (128, 256): TileShape(64, 32, 8, 2, 1, 1),
    },
    "sm_100": {
        (16, 64): TileShape(128, 64, 4, 3, 3, 2),
        (32, 64): TileShape(128, 64, 4, 3, 3, 2),
        (64, 64): TileShape(128, 64, 4, 3, 2, 2),
        (128, 64): TileShape(128, 64, 8, 3, 2, 1),
        (16, 128): TileShape(64, 64, 4, 3, 3, 2),
        (32, 128): TileShape(64, 32, 4, 3, 3, 2),
        (64, 128): TileShape(64, 32, 4, 3, 2, 2),
        (128, 128): TileShape(128, 32, 8, 2, 2, 1),
        (16, 256): TileShape(32, 32, 4, 3, 2, 1),
        (32, 256): TileShape(32, 32, 8, 2, 2, 1),
        (64, 256): TileShape(64, 32, 8, 2, 2, 1),
        (128, 256): TileShape(64, 32, 8, 2, 2, 1),
    },
    "fp32": {
        (16, 64): TileShape(32, 32, 4, 2, 1, 2),
        (32, 64): TileShape(32, 32, 4, 2, 1, 2),
        (16, 128): TileShape(32, 32, 4, 2, 1, 2),
        (32, 128): TileShape(32, 32, 8, 2, 1, 2),
        (16, 256): TileShape(32, 32, 8, 2, 1, 1),
    },
}

MAX_SPLITS = 128
_LOG2_E = 1.4426950408889634
INTERPRETED = tl.constexpr(triton_device.INTERPRETED)
LOG2_E = tl.constexpr(_LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)


# jit helpers ----------------------------------------------------------------------------------------------------------


@triton.jit
def _bitwise_or(left, right):
    return left | right


@triton.jit
def _popcount(words):  # int32; every shift is masked, so the sign bit may travel
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return (octets * 0x01010101) >> 24


@triton.jit
def _nth_set_bit(words, rank):  # index of the set bit with `rank` set bits below it, by halving
    index = tl.zeros_like(words)
    for step in tl.static_range(5):
        half = 16 >> step
        low_bits = _popcount((words >> index) & ((1 << half) - 1))
        is_above = rank >= low_bits
        rank = tl.where(is_above, rank - low_bits, rank)
        index = tl.where(is_above, index + half, index)
    return index


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    if PRECISE:
        # Near 0 the quotient cancels; the odd series keeps full relative precision there (x^11 term < 2e-8).
        magnitude = tl.abs(x)
        decay = tl.exp2(magnitude * (-2.0 * LOG2_E))
        quotient = (1.0 - decay) / (1.0 + decay)
        square = x * x
        series = 62.0 / 2835.0
        series = series * square - 17.0 / 315.0
        series = series * square + 2.0 / 15.0
        series = series * square - 1.0 / 3.0
        series = x + x * square * series
        return tl.where(magnitude < 0.3, series, tl.where(x < 0, -quotient, quotient))
    else:
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))


@triton.jit
def _as_type(tile, dtype: tl.constexpr, FP8_AS_BITS: tl.constexpr):
    """float8 e4m3 given as bytes lands on float16 bits with 2^-8 of its value; the caller's scale holds the 2^8."""
    if FP8_AS_BITS:
        bits = tile.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(dtype)
    else:
        return tile.to(dtype)


@triton.jit
def _dot(left, right, acc):
    """acc + left @ right. The interpreter would multiply the bits of bfloat16 as integers, so it is given float32."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    else:
        return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _load_tile(
    pointers,
    dim_is_real,
    slot_is_real,
    MASK_DIMS: tl.constexpr,
    MASK_SLOTS: tl.constexpr,
):
    if MASK_DIMS and MASK_SLOTS:
        return tl.load(pointers, mask=dim_is_real & slot_is_real, other=0.0)
    elif MASK_DIMS:
        return tl.load(pointers, mask=dim_is_real, other=0.0)
    elif MASK_SLOTS:
        return tl.load(pointers, mask=slot_is_real, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _mask_word(mask_row_ptrs, row_is_real, word, num_words, BLOCK_ROWS: tl.constexpr):
    """One word of every row's mask; all ones before the tree (the prefix), zeros behind it."""
    word_ids = tl.full([BLOCK_ROWS], word, dtype=tl.int32)
    return tl.load(
        mask_row_ptrs + word_ids,
        mask=row_is_real & (word_ids >= 0) & (word_ids < num_words),
        other=tl.where(word_ids < 0, -1, 0),
    ).to(tl.uint32, bitcast=True)


@triton.jit
def _tile_visibility(
    tile_start,
    mask_row_ptrs,  # [BLOCK_ROWS]
    row_is_real,  # [BLOCK_ROWS]
    first_visible,  # [BLOCK_ROWS]
    cache_len,
    num_words,
    SLIDING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Return the tile's mask [BLOCK_ROWS, BLOCK_SLOTS] and the slots that any row sees [BLOCK_SLOTS].

    A tile need not start at a word of the mask, so every 32 columns are cut out of two neighbouring words.
    """
    columns = tl.arange(0, BLOCK_SLOTS)
    first_bit = tile_start - cache_len
    first_word = first_bit >> 5
    shift = (first_bit & 31).to(tl.uint32)
    bits = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], dtype=tl.uint32)
    any_bits = tl.zeros([BLOCK_SLOTS], dtype=tl.uint32)
    low = _mask_word(mask_row_ptrs, row_is_real, first_word, num_words, BLOCK_ROWS)
    for block in tl.static_range(BLOCK_SLOTS // 32):
        high = _mask_word(mask_row_ptrs, row_is_real, first_word + block + 1, num_words, BLOCK_ROWS)
        # Two shifts: a shift by 32 (when shift is 0) is undefined.
        words = (low >> shift) | ((high << 1) << (31 - shift))
        if SLIDING:
            num_hidden = first_visible - (tile_start + block * 32)
            kept = tl.minimum(tl.maximum(num_hidden, 0), 31).to(tl.uint32)
            words = tl.where(num_hidden < 32, (words >> kept) << kept, 0)
        in_block = columns // 32 == block
        bits = tl.where(in_block[None, :], words[:, None], bits)
        any_bits = tl.where(in_block, tl.reduce(words, 0, _bitwise_or), any_bits)
        low = high
    bit = (columns & 31).to(tl.uint32)
    return ((bits >> bit[None, :]) & 1) != 0, ((any_bits >> bit) & 1) != 0


@triton.jit
def _scores(
    query,  # [BLOCK_ROWS, BLOCK_DIM], or pointers to the first dim of each row [BLOCK_ROWS] if DIM_CHUNK < BLOCK_DIM
    row_is_real,
    key_slot_ptrs,  # [BLOCK_SLOTS] pointers to the first dim of each key
    slot_is_real,
    MASKED: tl.constexpr,
    FP8_AS_BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DIM_CHUNK: tl.constexpr,
):
    if DIM_CHUNK == BLOCK_DIM:
        dims = tl.arange(0, BLOCK_DIM)
        keys = _load_tile(
            key_slot_ptrs[None, :] + dims[:, None],
            dims[:, None] < HEAD_DIM,
            slot_is_real[None, :],
            BLOCK_DIM > HEAD_DIM,
            MASKED,
        )
        scores = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], dtype=tl.float32)
        return _dot(query, _as_type(keys, query.dtype, FP8_AS_BITS), scores)
    else:
        scores = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], dtype=tl.float32)
        for first_dim in tl.range(0, BLOCK_DIM, DIM_CHUNK):
            dims = first_dim + tl.arange(0, DIM_CHUNK)
            part = tl.load(
                query[:, None] + dims[None, :],
                mask=row_is_real[:, None] & (dims[None, :] < HEAD_DIM),
                other=0.0,
            )
            keys = _load_tile(
                key_slot_ptrs[None, :] + dims[:, None],
                dims[:, None] < HEAD_DIM,
                slot_is_real[None, :],
                BLOCK_DIM > HEAD_DIM,
                MASKED,
            )
            scores = _dot(part, _as_type(keys, part.dtype, FP8_AS_BITS), scores)
        return scores


@triton.jit
def _attend_tile(
    acc,  # [BLOCK_ROWS, BLOCK_VALUE_DIM] fp32, not yet divided by row_sum
    row_max,  # [BLOCK_ROWS] fp32, base 2
    row_sum,  # [BLOCK_ROWS] fp32
    query,  # as in _scores
    tile,
    key_ptr,
    value_ptr,
    block_table_ptr,
    mask_row_ptrs,
    row_is_real,
    first_visible,
    cache_len,
    end_slot,
    num_words,
    stride_key_outer,
    stride_value_outer,
    score_scale,
    exponent_scale,
    dtype: tl.constexpr,
    MASKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SLIDING: tl.constexpr,
    PRESCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8_AS_BITS: tl.constexpr,
    KEY_SLOT_STRIDE: tl.constexpr,
    VALUE_SLOT_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DIM_CHUNK: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    tile_start = tile * BLOCK_SLOTS
    slot_ids = tl.arange(0, BLOCK_SLOTS)
    slots = tile_start + slot_ids
    slot_is_real = slots < end_slot
    if PAGE_SIZE > 0:
        # Clamped rather than masked: the last real slot has a page, and page ids behind it may be anything.
        known_slots = tl.minimum(slots, end_slot - 1) if MASKED else slots
        page_ids = tl.load(block_table_ptr + known_slots // PAGE_SIZE).to(tl.int64)
        in_page = (known_slots % PAGE_SIZE).to(tl.int64)
        key_slot_ptrs = key_ptr + page_ids * stride_key_outer + in_page * KEY_SLOT_STRIDE
        value_slot_ptrs = value_ptr + page_ids * stride_value_outer + in_page * VALUE_SLOT_STRIDE
    else:
        # One address a tile; with strides known to the compiler the rest becomes offsets inside the instructions.
        key_slot_ptrs = key_ptr + tile_start.to(tl.int64) * KEY_SLOT_STRIDE + slot_ids.to(tl.int64) * KEY_SLOT_STRIDE
        value_slot_ptrs = (
            value_ptr + tile_start.to(tl.int64) * VALUE_SLOT_STRIDE + slot_ids.to(tl.int64) * VALUE_SLOT_STRIDE
        )

    scores = _scores(
        query, row_is_real, key_slot_ptrs, slot_is_real,
        MASKED, FP8_AS_BITS, HEAD_DIM, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_DIM, DIM_CHUNK,
    )  # fmt: skip
    if PRESCALED:
        scores *= score_scale
    if SOFTCAP:
        scores = _tanh(scores, dtype == tl.float32)
    if MASKED:
        is_visible, is_seen = _tile_visibility(
            tile_start, mask_row_ptrs, row_is_real, first_visible, cache_len, num_words,
            SLIDING, BLOCK_ROWS, BLOCK_SLOTS,
        )  # fmt: skip
        is_visible = is_visible & slot_is_real[None, :]
        scores = tl.where(is_visible, scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1) * exponent_scale)
    if MASKED:
        # A row that has seen nothing yet keeps -inf; subtracting it from itself would be NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        pivot = new_max
    weights = tl.exp2(scores * exponent_scale - pivot[:, None])
    decay = tl.exp2(row_max - pivot)
    row_sum = row_sum * decay + tl.sum(weights, 1)

    value_dims = tl.arange(0, BLOCK_VALUE_DIM)
    values = _load_tile(
        value_slot_ptrs[:, None] + value_dims[None, :],
        value_dims[None, :] < VALUE_DIM,
        slot_is_real[:, None],
        BLOCK_VALUE_DIM > VALUE_DIM,
        MASKED,
    )
    values = _as_type(values, dtype, FP8_AS_BITS)
    if MASKED:
        # Tree slots that nobody sees may never have been written: weight 0 times NaN would still be NaN.
        values = tl.where(is_seen[:, None], values, 0.0)
    acc = _dot(weights.to(dtype), values, acc * decay[:, None])
    return acc, new_max, row_sum


# kernels --------------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "num_nodes",
        "num_words",
        "max_slots",
        "num_splits",
        "window",
        "stride_mask_batch",
        "stride_table_batch",
    ]
)
def tree_attention_kernel(
    # inputs
    query_ptr,  # [batch, num_nodes, num_heads, HEAD_DIM] fp32, bf16, fp16
    key_ptr,  # [batch, slots, kv_heads, HEAD_DIM] or [pages, PAGE_SIZE, kv_heads, HEAD_DIM], query's dtype or fp8 e4m3
    value_ptr,  # [batch, slots, kv_heads, VALUE_DIM] or [pages, PAGE_SIZE, kv_heads, VALUE_DIM], as key_ptr
    tree_mask_ptr,  # [num_nodes, num_words] or [batch, num_nodes, num_words] int32 contiguous
    cache_lens_ptr,  # [batch] int32 contiguous
    block_table_ptr,  # [batch, max_pages] int32 contiguous, read if paged
    key_scale_ptr,  # [kv_heads] fp32 contiguous, read if KEY_SCALED
    value_scale_ptr,  # [kv_heads] fp32 contiguous, read if VALUE_SCALED
    sinks_ptr,  # [num_heads] fp32 or query's dtype, read if HAS_SINKS and not SPLIT
    # outputs
    out_ptr,  # [batch, num_nodes, num_heads, VALUE_DIM] query's dtype, written if not SPLIT
    lse_ptr,  # [batch, num_nodes, num_heads] fp32, written if WRITE_LSE and not SPLIT
    partial_out_ptr,  # [batch, kv_heads, splits, num_nodes * GROUP, VALUE_DIM] fp32 contiguous, written if SPLIT
    partial_lse_ptr,  # [batch, kv_heads, splits, num_nodes * GROUP] fp32 contiguous, base 2, written if SPLIT
    # sizes
    num_nodes,
    num_words,
    max_slots,
    num_splits,
    # strides, in elements; the last dimension of query, keys and values is contiguous
    stride_query_batch,
    stride_query_node,
    stride_query_head,
    stride_key_outer,  # between requests, or between pages if paged
    stride_key_head,
    stride_value_outer,
    stride_value_head,
    stride_mask_batch,  # 0 where all requests share a mask
    stride_table_batch,
    stride_sinks_head,
    stride_out_batch,
    stride_out_node,
    stride_out_head,
    stride_out_dim,
    stride_lse_batch,
    stride_lse_node,
    stride_lse_head,
    # scalars
    score_scale,  # multiplies scores before soft-cap and exponent, if PRESCALED
    exponent_scale,  # > 0, log2(e) included
    output_scale,
    window,
    # flags
    SPLIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0 if the cache is not paged
    SLIDING: tl.constexpr,
    PRESCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEY_SCALED: tl.constexpr,
    VALUE_SCALED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    FP8_AS_BITS: tl.constexpr,
    STRIDES_OF_8: tl.constexpr,  # all strides of keys and values are multiples of 8
    # blocks
    KEY_SLOT_STRIDE: tl.constexpr,  # a model's layout decides it, whatever the lengths
    VALUE_SLOT_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    MASKED_SLOTS: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DIM_CHUNK: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,  # >= num_words, and >= 2: triton 3.6 cannot compile a scan of one
):
    num_rows = num_nodes * GROUP
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    # Neighbouring programs share a split's keys and values; the last rows see most of the tree, so they start first.
    row_block = num_row_blocks - 1 - tl.program_id(0) % num_row_blocks
    split = tl.program_id(0) // num_row_blocks
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_is_real = rows < num_rows
    nodes = (rows // GROUP).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP

    cache_len = tl.load(cache_lens_ptr + batch)
    cache_len = tl.minimum(tl.maximum(cache_len, 0), max_slots)  # a wrong length must not reach foreign memory
    mask_row_ptrs = tree_mask_ptr + batch * stride_mask_batch + nodes * num_words

    # The stretch of slots that any row of the block sees.
    word_ids = tl.arange(0, BLOCK_WORDS)
    words = tl.load(
        mask_row_ptrs[:, None] + word_ids[None, :],
        mask=row_is_real[:, None] & (word_ids[None, :] < num_words),
        other=0,
    )
    tree_end = tl.max(tl.max(tl.where(words != 0, (word_ids[None, :] + 1) * 32, 0), 1), 0)
    end_slot = tl.minimum(cache_len + tree_end, max_slots)
    num_tiles = tl.cdiv(end_slot, BLOCK_SLOTS)
    first_tile = 0
    num_window_tiles = 0  # tiles below this one hold the window's edge of some row
    first_visible = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
    if SLIDING:
        counts = _popcount(words)
        counts_through = tl.cumsum(counts, 1)
        num_visible = tl.sum(counts, 1)  # depth + 1
        num_hidden = tl.maximum(num_visible - window, 0)  # leading ancestors that fell out of the window
        # The word with the first visible bit: the first one whose running count exceeds num_hidden.
        first_word = tl.min(tl.where(counts_through > num_hidden[:, None], word_ids[None, :], BLOCK_WORDS), 1)
        is_first = word_ids[None, :] == first_word[:, None]
        hidden_before = tl.sum(tl.where(is_first, counts_through - counts, 0), 1)
        first_bit = first_word * 32 + _nth_set_bit(tl.sum(tl.where(is_first, words, 0), 1), num_hidden - hidden_before)
        first_visible = tl.where(num_hidden > 0, cache_len + first_bit, cache_len + num_visible - window)
        # Rows of padding see nothing, or a slot that only they see would count as one that somebody sees.
        first_visible = tl.where(row_is_real, tl.maximum(first_visible, 0), max_slots)
        first_tile = tl.min(first_visible, 0) // BLOCK_SLOTS
        num_window_tiles = tl.cdiv(tl.max(tl.where(row_is_real, first_visible, 0), 0), BLOCK_SLOTS)

    # This split's tiles. Rounding up gives what is left over to the first splits: the last one has masks to apply.
    num_used_tiles = tl.maximum(num_tiles - first_tile, 0)
    low_tile = first_tile + tl.cdiv(split * num_used_tiles, num_splits)
    high_tile = first_tile + tl.cdiv((split + 1) * num_used_tiles, num_splits)

    dtype: tl.constexpr = query_ptr.dtype.element_ty
    query = query_ptr + batch * stride_query_batch + nodes * stride_query_node + heads * stride_query_head
    if DIM_CHUNK == BLOCK_DIM:
        dims = tl.arange(0, BLOCK_DIM)
        query = tl.load(
            query[:, None] + dims[None, :],
            mask=row_is_real[:, None] & (dims[None, :] < HEAD_DIM),
            other=0.0,
        )
    if KEY_SCALED:
        score_scale *= tl.load(key_scale_ptr + kv_head)
    if VALUE_SCALED:
        output_scale *= tl.load(value_scale_ptr + kv_head)
    if STRIDES_OF_8:
        # Triton itself looks for multiples of 16 only; head dims such as 40 would be loaded element by element.
        stride_key_outer = stride_key_outer // 8 * 8
        stride_key_head = stride_key_head // 8 * 8
        stride_value_outer = stride_value_outer // 8 * 8
        stride_value_head = stride_value_head // 8 * 8
    key_ptr += kv_head * stride_key_head
    value_ptr += kv_head * stride_value_head
    if PAGE_SIZE > 0:
        block_table_ptr += batch * stride_table_batch
    else:
        key_ptr += batch * stride_key_outer
        value_ptr += batch * stride_value_outer

    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], dtype=tl.float32)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    # Tiles inside every row's visible prefix first, then those at its two edges: the softmax takes them in any order.
    low_inner_tile = tl.maximum(low_tile, tl.minimum(num_window_tiles, high_tile))
    high_inner_tile = tl.maximum(low_inner_tile, tl.minimum(cache_len // BLOCK_SLOTS, high_tile))
    for tile in tl.range(low_inner_tile, high_inner_tile):
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, query, tile,
            key_ptr, value_ptr, block_table_ptr, mask_row_ptrs, row_is_real, first_visible,
            cache_len, end_slot, num_words,
            stride_key_outer, stride_value_outer,
            score_scale, exponent_scale, dtype,
            False, PAGE_SIZE, SLIDING, PRESCALED, SOFTCAP, FP8_AS_BITS,
            KEY_SLOT_STRIDE, VALUE_SLOT_STRIDE, HEAD_DIM, VALUE_DIM,
            BLOCK_ROWS, BLOCK_SLOTS, BLOCK_DIM, DIM_CHUNK, BLOCK_VALUE_DIM,
        )  # fmt: skip
    parts: tl.constexpr = BLOCK_SLOTS // MASKED_SLOTS
    end_part = tl.cdiv(end_slot, MASKED_SLOTS)
    num_window_parts = tl.maximum(tl.minimum(low_inner_tile * parts, end_part) - low_tile * parts, 0)
    num_tail_parts = tl.maximum(tl.minimum(high_tile * parts, end_part) - high_inner_tile * parts, 0)
    for part in tl.range(0, num_window_parts + num_tail_parts, num_stages=MASKED_STAGES):
        if SLIDING:
            tile = tl.where(
                part < num_window_parts, low_tile * parts + part, high_inner_tile * parts + (part - num_window_parts)
            )
        else:
            tile = high_inner_tile * parts + part
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, query, tile,
            key_ptr, value_ptr, block_table_ptr, mask_row_ptrs, row_is_real, first_visible,
            cache_len, end_slot, num_words,
            stride_key_outer, stride_value_outer,
            score_scale, exponent_scale, dtype,
            True, PAGE_SIZE, SLIDING, PRESCALED, SOFTCAP, FP8_AS_BITS,
            KEY_SLOT_STRIDE, VALUE_SLOT_STRIDE, HEAD_DIM, VALUE_DIM,
            BLOCK_ROWS, MASKED_SLOTS, BLOCK_DIM, DIM_CHUNK, BLOCK_VALUE_DIM,
        )  # fmt: skip

    # Rows once more, from a zero that the compiler cannot see through: it would keep the query's addresses in registers
    # all along to use their parts again here.
    rows = row_block * BLOCK_ROWS + tl.minimum(cache_len, 0) + tl.arange(0, BLOCK_ROWS)
    row_is_real = rows < num_rows
    nodes = (rows // GROUP).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    if HAS_SINKS and not SPLIT:
        sink = tl.load(sinks_ptr + heads * stride_sinks_head, mask=row_is_real, other=0.0).to(tl.float32) * LOG2_E
        new_max = tl.maximum(row_max, sink)
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(row_max - pivot)
        acc *= decay[:, None]
        row_sum = row_sum * decay + tl.exp2(sink - pivot)
        row_max = new_max
    has_mass = row_sum != 0.0  # true for NaN, which must stay visible
    divisor = tl.where(has_mass, row_sum, 1.0)
    acc = acc * (output_scale / divisor)[:, None]
    lse = tl.where(has_mass, row_max + tl.log2(divisor), float("-inf"))

    value_dims = tl.arange(0, BLOCK_VALUE_DIM)
    is_output = row_is_real[:, None] & (value_dims[None, :] < VALUE_DIM)
    if SPLIT:
        partial_rows = ((batch * tl.num_programs(1) + kv_head) * num_splits + split) * num_rows + rows
        tl.store(partial_out_ptr + partial_rows[:, None] * VALUE_DIM + value_dims[None, :], acc, mask=is_output)
        tl.store(partial_lse_ptr + partial_rows, lse, mask=row_is_real)
    else:
        tl.store(
            out_ptr
            + batch * stride_out_batch
            + (nodes * stride_out_node + heads * stride_out_head)[:, None]
            + value_dims[None, :].to(tl.int64) * stride_out_dim,
            acc.to(out_ptr.dtype.element_ty),
            mask=is_output,
        )
        if WRITE_LSE:
            lse_ptrs = lse_ptr + batch * stride_lse_batch + nodes * stride_lse_node + heads * stride_lse_head
            tl.store(lse_ptrs, lse * LN_2, mask=row_is_real)


@triton.jit(do_not_specialize=["num_nodes", "num_splits"])
def merge_splits_kernel(
    # inputs
    partial_out_ptr,  # [batch, kv_heads, splits, num_nodes * GROUP, VALUE_DIM] fp32 contiguous
    partial_lse_ptr,  # [batch, kv_heads, splits, num_nodes * GROUP] fp32 contiguous, base 2
    sinks_ptr,  # [num_heads] floating, read if HAS_SINKS
    # outputs
    out_ptr,  # [batch, num_nodes, num_heads, VALUE_DIM] any floating dtype
    lse_ptr,  # [batch, num_nodes, num_heads] fp32, written if WRITE_LSE
    # sizes
    num_nodes,
    num_splits,
    # strides
    stride_sinks_head,
    stride_out_batch,
    stride_out_node,
    stride_out_head,
    stride_out_dim,
    stride_lse_batch,
    stride_lse_node,
    stride_lse_head,
    # flags
    HAS_SINKS: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    # blocks
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,  # >= num_splits
    CHUNK: tl.constexpr,  # splits whose loads are in flight together
    BLOCK_VALUE_DIM: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_rows = num_nodes * GROUP
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_is_real = rows < num_rows
    nodes = (rows // GROUP).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    value_dims = tl.arange(0, BLOCK_VALUE_DIM)
    is_output = row_is_real[:, None] & (value_dims[None, :] < VALUE_DIM)

    first_row = (batch * tl.num_programs(1) + kv_head) * num_splits * num_rows
    splits = tl.arange(0, BLOCK_SPLITS)
    lse = tl.load(
        partial_lse_ptr + first_row + splits[None, :].to(tl.int64) * num_rows + rows[:, None],
        mask=row_is_real[:, None] & (splits[None, :] < num_splits),
        other=float("-inf"),
    )
    row_max = tl.max(lse, 1)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads * stride_sinks_head, mask=row_is_real, other=0.0).to(tl.float32) * LOG2_E
        row_max = tl.maximum(row_max, sink)
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(tl.exp2(lse - pivot[:, None]), 1)
    if HAS_SINKS:
        row_sum += tl.exp2(sink - pivot)

    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], dtype=tl.float32)
    for first_split in range(0, num_splits, CHUNK):
        for step in tl.static_range(CHUNK):
            split = tl.full([BLOCK_ROWS], first_split + step, dtype=tl.int32)
            is_split = row_is_real & (split < num_splits)
            split_rows = first_row + split.to(tl.int64) * num_rows + rows
            weight = tl.exp2(tl.load(partial_lse_ptr + split_rows, mask=is_split, other=float("-inf")) - pivot)
            # An empty split holds zeros with weight 0, so nothing here is unwritten memory.
            acc += weight[:, None] * tl.load(
                partial_out_ptr + split_rows[:, None] * VALUE_DIM + value_dims[None, :],
                mask=is_split[:, None] & (value_dims[None, :] < VALUE_DIM),
                other=0.0,
            )

    has_mass = row_sum != 0.0  # true for NaN, which must stay visible
    divisor = tl.where(has_mass, row_sum, 1.0)
    acc = acc / divisor[:, None]
    tl.store(
        out_ptr
        + batch * stride_out_batch
        + (nodes * stride_out_node + heads * stride_out_head)[:, None]
        + value_dims[None, :].to(tl.int64) * stride_out_dim,
        acc.to(out_ptr.dtype.element_ty),
        mask=is_output,
    )
    if WRITE_LSE:
        lse_ptrs = lse_ptr + batch * stride_lse_batch + nodes * stride_lse_node + heads * stride_lse_head
        tl.store(lse_ptrs, tl.where(has_mass, pivot + tl.log2(divisor), float("-inf")) * LN_2, mask=row_is_real)


# launch configuration ------------------------------------------------------------------------------------------------


class LaunchConfig(NamedTuple):
    """Everything about a launch that the device and the shapes decide."""

    block_rows: int
    tile: TileShape
    num_splits: int
    dim_chunk: int
    """head dims that one product of the scores takes; the padded head dim except for float32"""
    merge_rows: int
    merge_chunk: int
    """partial results whose loads a program of the merge has in flight"""


def _padded_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _dim_chunk(block_dim: int, item_bytes: int) -> int:
    """Exact float32 products keep both operands in registers, so they take a few dims at a time."""
    return min(32, block_dim) if item_bytes == 4 else block_dim


def shared_bytes(
    block_rows: int,
    tile: TileShape,
    block_dim: int,
    block_value_dim: int,
    item_bytes: int,
    cache_item_bytes: int,
    paged: bool,
    capability: int,
) -> int:
    """An upper bound of the shared memory that one program needs. The compile report holds it against the compiler."""
    result = block_rows * block_value_dim * 4  # on its way to memory
    if item_bytes == 4:  # a chunk of dims at a time, nothing in flight
        dim_chunk = _dim_chunk(block_dim, item_bytes)
        operands = (block_rows + tile.block_slots) * dim_chunk + tile.block_slots * (block_rows + block_value_dim)
        return max(operands * item_bytes, result)
    converts = cache_item_bytes != item_bytes
    # From 64 rows on, Hopper and Blackwell multiply out of shared memory, and a tile's buffer is busy one turn longer.
    busy = 0 if capability >= 90 and block_rows >= 64 and not converts else 1

    def buffers(num_stages: int) -> int:
        return max(num_stages - busy, 1)

    slot_bytes = (block_dim + block_value_dim) * cache_item_bytes
    inner = buffers(tile.num_stages) * tile.block_slots * slot_bytes
    inner += tile.block_slots * (block_dim + block_value_dim) * item_bytes if converts else 0
    edge = buffers(tile.masked_stages) * tile.masked_slots * slot_bytes
    edge += tile.masked_slots * (block_value_dim + (block_dim if converts else 0)) * item_bytes
    words = tile.masked_stages * (tile.masked_slots // 32 + 1) * 2 * block_rows * 4
    pages = 2 * (tile.num_stages - 1) * tile.block_slots * 4 if paged else 0  # page ids, for keys and for values
    barriers = 1024 if capability >= 100 else 0
    query = block_rows * block_dim * item_bytes
    probabilities = block_rows * tile.block_slots * item_bytes * busy
    return max(query + probabilities + max(inner, edge + words) + pages, result) + barriers


def _family(capability: int) -> str:
    """Devices that share a column of the table: by their matrix instructions and their shared memory."""
    if capability == 90:
        return "sm_90"
    if capability // 10 in (10, 11):
        return "sm_100"
    return "sm_80"


def _num_splits(num_programs: int, num_tiles: int, num_slots: int, partial_tiles: float) -> int:
    """The number of splits that should take least time, counted in tiles of one program.

    Args:
        num_programs: programs of the grid before splitting.
        num_tiles: tiles of the whole cache.
        num_slots: programs that the device runs at a time.
        partial_tiles: time to write and read back one partial result.
    """

    def cost(num_splits: int) -> float:
        waves = math.ceil(num_programs * num_splits / num_slots)
        merging = 1.0 + waves * partial_tiles if num_splits > 1 else 0.0
        return waves * (math.ceil(num_tiles / num_splits) + 1.0) + merging

    # More than two waves of programs never pay, and the merge has registers for so many splits.
    most = min(num_tiles, MAX_SPLITS, max(1, 2 * num_slots // num_programs))
    return min(range(1, most + 1), key=cost)


@functools.lru_cache(maxsize=4096)
def _launch_config(
    batch_size: int,
    num_nodes: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    value_dim: int,
    item_bytes: int,
    cache_item_bytes: int,
    max_slots: int,
    paged: bool,
    traits: triton_device.DeviceTraits,
) -> LaunchConfig:
    """Choose the launch of a call from its shapes and its device: never from lengths, which only the device knows."""
    num_rows = num_nodes * group
    block_dim, block_value_dim = _padded_dim(head_dim), _padded_dim(value_dim)
    family = "fp32" if item_bytes == 4 else _family(traits.capability)
    widest = max(block_dim, block_value_dim, 64)
    blocks = [rows for rows, dim in _TILES[family] if dim == widest]
    block_rows = next((rows for rows in blocks if rows >= num_rows), blocks[-1])
    tile = _TILES[family][block_rows, widest]
    if num_rows <= block_rows == 128 and tile.block_slots == 128:
        # A single block of rows is bound by memory, and half the tile leaves splits less unequal.
        tile = tile._replace(block_slots=64, num_stages=3)
    if cache_item_bytes != item_bytes and block_rows >= 64:
        # Conversion takes registers.
        fewer = min(tile.block_slots, 64 if traits.capability >= 90 else 32)
        tile = tile._replace(block_slots=fewer, masked_slots=32)

    def needed(tile: TileShape) -> int:
        return shared_bytes(
            block_rows, tile, block_dim, block_value_dim, item_bytes, cache_item_bytes, paged, traits.capability
        )

    while needed(tile) > traits.shared_bytes and tile.num_stages > 1:
        fewer = tile.num_stages - 1
        tile = tile._replace(num_stages=fewer, masked_stages=min(fewer, tile.masked_stages))
    while needed(tile) > traits.shared_bytes and tile.block_slots > 32:
        fewer = tile.block_slots // 2
        tile = tile._replace(block_slots=fewer, masked_slots=min(fewer, tile.masked_slots))

    reserved = 1024  # what the driver keeps of each program's shared memory
    fitting = (traits.shared_bytes + reserved) // (needed(tile) + reserved)
    programs_per_sm = max(1, min(tile.programs_per_sm, fitting))
    num_programs = triton.cdiv(num_rows, block_rows) * num_kv_heads * batch_size
    tile_bytes = tile.block_slots * (head_dim + value_dim) * cache_item_bytes
    num_splits = _num_splits(
        num_programs,
        triton.cdiv(max_slots, tile.block_slots),
        traits.num_sms * programs_per_sm,
        2 * 4 * min(block_rows, num_rows) * value_dim / tile_bytes,
    )
    # A wave of single rows while there are few, so that every load starts at once; else rows enough for wide loads.
    few_rows = num_rows * num_kv_heads * batch_size <= 16 * traits.num_sms
    merge_chunk = min(triton.next_power_of_2(num_splits), 32 if few_rows else 8)
    return LaunchConfig(
        block_rows,
        tile,
        num_splits,
        dim_chunk=_dim_chunk(block_dim, item_bytes),
        merge_rows=1 if few_rows else 4,
        merge_chunk=merge_chunk if block_value_dim <= 128 else max(1, merge_chunk // 2),
    )


def unavailable() -> str | None:
    """Tell why no Triton kernel can run on this machine, or None."""
    return triton_device.unavailable_reason()


def supports(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree_mask: Tensor,
    cache_lens: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    return_lse: bool,
) -> str | None:
    """Whether the kernels can run this call."""
    if q.dtype == torch.float64:
        return "takes float32, bfloat16 and float16"
    head_dim, value_dim = q.shape[3], v_cache.shape[3]
    if head_dim % 8 or value_dim % 8 or not 8 <= head_dim <= 256 or not 8 <= value_dim <= 256:
        return "takes head dims from 8 to 256 that are multiples of 8"
    if max(q.shape[0], k_cache.shape[2]) > 65535:
        return "takes up to 65535 requests and kv heads"
    return triton_device.device_reason(q.device)


def run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree_mask: Tensor,
    cache_lens: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    return_lse: bool,
    out: Tensor | None,
    lse: Tensor | None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Write and return the outputs. ``config`` overrules the launch configuration, for tests and tuning."""
    batch_size, num_nodes, num_heads, head_dim = q.shape
    num_kv_heads, value_dim = k_cache.shape[2], v_cache.shape[3]
    group = num_heads // num_kv_heads
    max_slots = block_table.shape[1] * k_cache.shape[1] if block_table is not None else k_cache.shape[1]
    traits = triton_device.device_traits(q.device)
    if config is None:
        config = _launch_config(
            batch_size, num_nodes, num_kv_heads, group, head_dim, value_dim,
            q.element_size(), k_cache.element_size(), max_slots, block_table is not None, traits,
        )  # fmt: skip
    tile, num_splits = config.tile, config.num_splits

    def stages(num_stages: int) -> int:
        # A page must be known before its slots can be fetched: twice the depth keeps as many tiles in flight.
        return num_stages if block_table is None else 2 * num_stages - 1

    if out is None:
        out = q.new_empty((batch_size, num_nodes, num_heads, value_dim))
    if lse is None and return_lse:
        lse = q.new_empty((batch_size, num_nodes, num_heads), dtype=torch.float32)
    partial_out = partial_lse = None
    if num_splits > 1:
        partial_shape = (batch_size, num_kv_heads, num_splits, num_nodes * group)
        partial_out = q.new_empty((*partial_shape, value_dim), dtype=torch.float32)
        partial_lse = q.new_empty(partial_shape, dtype=torch.float32)

    fp8 = k_cache.dtype == torch.float8_e4m3fn
    fp8_as_bits = fp8 and traits.capability < 89
    score_scale, output_scale = scale, 1.0
    if fp8_as_bits:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
        score_scale, output_scale = scale * 256.0, 256.0
    # The exponent's scale must be positive, since it also multiplies maxima; what may not be goes into the scores.
    prescaled = softcap is not None or fp8 or scale <= 0
    exponent_scale = _LOG2_E if prescaled else scale * _LOG2_E
    if softcap is not None:
        score_scale, exponent_scale = score_scale / softcap, softcap * _LOG2_E

    mask_words = tree_mask.shape[-1]
    key_strides, value_strides = _strides(k_cache)[:3], _strides(v_cache)[:3]
    lse_strides = _strides(lse) if lse is not None else (0, 0, 0)
    with triton_device.launching_on(q.device):
        tree_attention_kernel[
            (triton.cdiv(num_nodes * group, config.block_rows) * num_splits, num_kv_heads, batch_size)
        ](
            q, k_cache, v_cache, tree_mask, cache_lens, block_table, k_scale, v_scale, sinks,
            out, lse, partial_out, partial_lse,
            num_nodes, mask_words, max_slots, num_splits,
            *_strides(q)[:3], key_strides[0], key_strides[2], value_strides[0], value_strides[2],
            num_nodes * mask_words if tree_mask.dim() == 3 else 0,
            block_table.shape[1] if block_table is not None else 0,
            sinks.stride(0) if sinks is not None else 0,
            *_strides(out), *lse_strides,
            score_scale, exponent_scale, output_scale, sliding_window or 0,
            SPLIT=num_splits > 1,
            PAGE_SIZE=k_cache.shape[1] if block_table is not None else 0,
            SLIDING=sliding_window is not None,
            PRESCALED=prescaled,
            SOFTCAP=softcap is not None,
            KEY_SCALED=k_scale is not None,
            VALUE_SCALED=v_scale is not None,
            HAS_SINKS=sinks is not None,
            WRITE_LSE=lse is not None,
            FP8_AS_BITS=fp8_as_bits,
            STRIDES_OF_8=all(stride % 8 == 0 for stride in (*key_strides, *value_strides)),
            KEY_SLOT_STRIDE=k_cache.stride(1),
            VALUE_SLOT_STRIDE=v_cache.stride(1),
            GROUP=group,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_ROWS=config.block_rows,
            BLOCK_SLOTS=tile.block_slots,
            MASKED_SLOTS=tile.masked_slots,
            MASKED_STAGES=stages(tile.masked_stages),
            BLOCK_DIM=_padded_dim(head_dim),
            DIM_CHUNK=config.dim_chunk,
            BLOCK_VALUE_DIM=_padded_dim(value_dim),
            BLOCK_WORDS=max(2, triton.next_power_of_2(mask_words)),
            num_warps=tile.num_warps,
            num_stages=stages(tile.num_stages),
            maxnreg=255,  # else ptxas spills a few registers for an occupancy that nobody asked for
            enable_fp_fusion=True,
        )  # fmt: skip
        if num_splits > 1:
            merge_splits_kernel[(triton.cdiv(num_nodes * group, config.merge_rows), num_kv_heads, batch_size)](
                partial_out, partial_lse, sinks,
                out, lse,
                num_nodes, num_splits,
                sinks.stride(0) if sinks is not None else 0,
                *_strides(out), *lse_strides,
                HAS_SINKS=sinks is not None,
                WRITE_LSE=lse is not None,
                GROUP=group,
                VALUE_DIM=value_dim,
                BLOCK_ROWS=config.merge_rows,
                BLOCK_SPLITS=triton.next_power_of_2(num_splits),
                CHUNK=config.merge_chunk,
                BLOCK_VALUE_DIM=_padded_dim(value_dim),
                num_warps=4,
                maxnreg=255,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 for dimensions of one element, whose strides are arbitrary and would compile more variants."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride()))
