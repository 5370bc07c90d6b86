"""The kernels of tree attention. What they compute and how work is divided is told in triton_launch.py, which launches.

A tile's scores, softmax and sums are in `_attend_tile`; what rows may see of a tile is in `_tile_visibility`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_device

__all__ = ["merge_splits_kernel", "tree_attention_kernel"]

INTERPRETED = tl.constexpr(triton_device.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
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
def _bit_length(words):  # uint32; 0 of 0
    for step in tl.static_range(5):
        words |= words >> (1 << step)
    return _popcount(words.to(tl.int32, bitcast=True))


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
    if SOFTCAP > 0:
        scores = _tanh(scores, SOFTCAP == 2)
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
    SOFTCAP: tl.constexpr,  # 0: none, 1: fast, 2: precise near 0
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
    # Up to the highest bit: the slots behind it may lie on pages that do not exist.
    word_ends = word_ids[None, :] * 32 + _bit_length(words.to(tl.uint32, bitcast=True))
    tree_end = tl.max(tl.max(tl.where(words != 0, word_ends, 0), 1), 0)
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
