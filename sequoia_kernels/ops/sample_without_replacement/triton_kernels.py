"""The kernels of sample_without_replacement, in the order of their launch; triton_launch.py tells what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_device, triton_streams, triton_warping

from . import triton_selection

__all__ = ["bound_keys_kernel", "draw_kernel"]

INTERPRETED = tl.constexpr(triton_device.INTERPRETED)
DRAFT_TAG = triton_streams.DRAFT_TAG
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_ENTRY = triton_selection.NO_ENTRY
NO_KEY = tl.constexpr(-(2**63) + 2**52 - 1)  # of -inf, as an integer
NO_TOKEN = tl.constexpr(2**31 - 1)


# jit helpers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _fast_log2(x):
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _key_bound(logits, scale, word):  # fp32, uint32 -> fp32
    """At least the key in units of log 2 and less 32, up to the margin.

    An exponential is at least u exp(u / 2), where u is at least word / 2^32: -log(1 - u) / u = 1 + u / 2 + u^2 / 3 + ..
    has larger coefficients than the exponential function. Word 0 gives +inf.
    """
    scaled_uniform = word.to(tl.float32)
    return logits * scale - (_fast_log2(scaled_uniform) + scaled_uniform * 1.6794573e-10)  # log2(e) / 2 of 2^-32


@triton.jit
def _margin(bound):  # fp32
    """What rounding can take from a bound. A key rounds relative to its scaled logit, at most 33 below the bound."""
    return tl.abs(bound) * 9.5367431640625e-07 + 0.0009765625


@triton.jit
def _below(peak, higher):  # fp32
    """How far a peak lies below another, so bounded that no scale makes it overflow: LOWEST stands for no peak."""
    return tl.maximum(peak - higher, -1e30)


@triton.jit
def _fours(
    first_ptr,
    num_tokens,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
):
    """TILES tiles of 4 * LANES tokens as four tensors fp32 [TILES, LANES]: the i-th holds the i-th of every four."""
    lanes = tl.arange(0, TILES)[:, None, None] * (LANES * 4) + tl.arange(0, LANES)[None, :, None] * 4
    tokens = lanes + tl.arange(0, 4)[None, None, :]
    logits = tl.load(first_ptr + tokens, mask=tokens < num_tokens, other=float("-inf"))
    even, odd = tl.split(tl.reshape(logits, [TILES, LANES, 2, 2]))
    logits_0, logits_2 = tl.split(even)
    logits_1, logits_3 = tl.split(odd)
    return logits_0.to(tl.float32), logits_1.to(tl.float32), logits_2.to(tl.float32), logits_3.to(tl.float32)


@triton.jit
def _lane_bounds(
    row_ptr,
    first_token,
    vocab,
    scale,
    seed,
    offset,
    NOISY: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The bound, peak and mass of every lane of a chunk, fp32 [LANES]."""
    # Two tiles at a time: what comes once a lane then comes for every eighth token.
    PAIR: tl.constexpr = min(TILES, 2)
    blocks = tl.arange(0, PAIR)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    bound = tl.full([LANES], float("-inf"), tl.float32)
    peak = tl.full([LANES], LOWEST, tl.float32)
    mass = tl.zeros([LANES], tl.float32)
    first_ptr = row_ptr + first_token
    for _ in range(TILES // PAIR):
        logits_0, logits_1, logits_2, logits_3 = _fours(first_ptr, vocab - first_token, PAIR, LANES)
        highest = tl.max(tl.maximum(tl.maximum(logits_0, logits_1), tl.maximum(logits_2, logits_3)), 0)
        if NOISY:
            words = triton_streams.stream_words(seed, offset, DRAFT_TAG, first_token // 4 + blocks)
            bound_0 = _key_bound(logits_0, scale, words[0])
            bound_1 = _key_bound(logits_1, scale, words[1])
            bound_2 = _key_bound(logits_2, scale, words[2])
            bound_3 = _key_bound(logits_3, scale, words[3])
            bounds = tl.maximum(tl.maximum(bound_0, bound_1), tl.maximum(bound_2, bound_3))
            bound = tl.maximum(bound, tl.max(bounds, 0))
        else:
            bound = tl.maximum(bound, highest)

        highest = tl.maximum(peak, highest)
        weights_0 = tl.exp2((logits_0 - highest[None, :]) * scale) + tl.exp2((logits_1 - highest[None, :]) * scale)
        weights_1 = tl.exp2((logits_2 - highest[None, :]) * scale) + tl.exp2((logits_3 - highest[None, :]) * scale)
        mass = mass * tl.exp2(_below(peak, highest) * scale) + tl.sum(weights_0 + weights_1, 0)
        peak = highest
        first_token += PAIR * LANES * 4
        first_ptr += PAIR * LANES * 4
    if NOISY:
        bound += 32.0
    return bound, peak, mass


@triton.jit
def _packed(bound, ids, NUM_IDS: tl.constexpr):  # fp32, int32 below NUM_IDS, a power of two -> int32
    """An entry that orders by falling bound, rounded up, then by rising id; NO_ENTRY for a bound of -inf."""
    bits = bound.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered & -NUM_IDS) | (ids ^ (NUM_IDS - 1))
    return tl.where(bound == float("-inf"), NO_ENTRY, packed)


@triton.jit
def _unpacked_id(packed, NUM_IDS: tl.constexpr):  # of anything but NO_ENTRY
    return (packed & (NUM_IDS - 1)) ^ (NUM_IDS - 1)


@triton.jit
def _may_precede(left, last_key, NUM_IDS: tl.constexpr):  # int32 [n], fp64 in units of log 2
    """Whether one of the entries left may have a key that is as large."""
    best = tl.max(left, 0)
    ordered = tl.minimum(best | (NUM_IDS - 1), 0x7F800000)
    bound = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    bound = tl.where(best == NO_ENTRY, 0.0, bound)
    return (best != NO_ENTRY) & (bound + _margin(bound) >= last_key)


@triton.jit
def _token_bounds(
    row_ptr,
    taken,  # int32 [groups]: entries of them
    vocab,
    temperature,
    seed,
    offset,
    LANES: tl.constexpr,
    SPAN_TILES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,  # ids of groups
):
    """The first Philox block of each group, int32 [groups], and entries of their tokens, [groups * SPAN_TILES * 4]."""
    NUM_BLOCKS: tl.constexpr = taken.shape[0] * SPAN_TILES
    is_group = taken != NO_ENTRY
    group = tl.where(is_group, _unpacked_id(taken, NUM_GROUPS), 0)
    first_blocks = group // LANES * (SPAN_TILES * LANES) + group % LANES
    tiles = tl.arange(0, SPAN_TILES)[None, :]
    blocks = tl.reshape(first_blocks[:, None] + tiles * LANES, [NUM_BLOCKS])
    is_block = tl.reshape(is_group[:, None] & (tiles >= 0), [NUM_BLOCKS])
    tokens = blocks[:, None] * 4 + tl.arange(0, 4)[None, :]
    logits = tl.load(row_ptr + tokens, mask=is_block[:, None] & (tokens < vocab), other=float("-inf")).to(tl.float32)
    bounds = logits
    if temperature != 0.0:
        words = triton_streams.stream_words(seed, offset, DRAFT_TAG, blocks)
        words = tl.reshape(tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3])), [NUM_BLOCKS, 4])
        bounds = _key_bound(logits, triton_warping.exponent_scale(temperature), words) + 32.0
    bounds = tl.where(logits == logits, tl.maximum(bounds, LOWEST), float("inf"))  # a NaN comes first
    bounds = tl.where(logits == float("-inf"), float("-inf"), bounds)
    places = tl.arange(0, NUM_BLOCKS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    return first_blocks, tl.reshape(_packed(bounds, places, NUM_BLOCKS * 4), [NUM_BLOCKS * 4])


@triton.jit
def _exact_key(row_ptr, token, is_read, word, temperature):
    """The key of the reference, in its order of rounding. fp64; -inf for what is not read or masked."""
    logit = tl.load(row_ptr + token, mask=is_read, other=float("-inf")).to(tl.float32)
    if temperature == 0.0:
        key = logit.to(tl.float64)
    else:
        divisor = temperature + tl.zeros_like(logit)
        key = logit.to(tl.float64) / divisor.to(tl.float64) + triton_streams.gumbel(word).to(tl.float64)
        key = tl.where(tl.div_rn(logit, divisor) == float("-inf"), float("-inf"), key)
    # Nobody checks values on a device: a NaN is drawn first, as in the reference, and is a token of the vocabulary.
    return tl.where(key == key, key, float("inf"))


@triton.jit
def _ordered_key(key):  # fp64 -> int64
    """An integer that orders as the key does; 0.0 and -0.0 tie."""
    bits = tl.where(key == 0.0, 0.0, key).to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _key_of(ordered):  # int64 -> fp64
    return (ordered ^ ((ordered >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def _exact_draws(
    row_ptr,
    first_blocks,  # int32 [groups]: as `_token_bounds` returns them
    best,  # int32 [n]: entries of tokens
    temperature,
    seed,
    offset,
    LANES: tl.constexpr,
    SPAN_TILES: tl.constexpr,
):
    """The exact keys of some tokens as integers, and the tokens, both in the order of draws."""
    is_token = best != NO_ENTRY
    place = tl.where(is_token, _unpacked_id(best, first_blocks.shape[0] * SPAN_TILES * 4), 0)
    block = tl.gather(first_blocks, place // (SPAN_TILES * 4), 0) + place // 4 % SPAN_TILES * LANES
    words = triton_streams.stream_words(seed, offset, DRAFT_TAG, block)
    word = tl.where(
        place % 4 < 2, tl.where(place % 2 == 0, words[0], words[1]), tl.where(place % 2 == 0, words[2], words[3])
    )
    token = block * 4 + place % 4
    keys = _ordered_key(_exact_key(row_ptr, token, is_token, word, temperature))
    return triton_selection.sorted_pairs(keys, tl.where(keys == NO_KEY, NO_TOKEN, token))


# kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_chunks"])
def bound_keys_kernel(
    # inputs
    logits_ptr,  # [num_rows, vocab] fp32, bf16, fp16
    temperature_ptr,  # [num_rows] fp32
    seeds_ptr,  # [num_rows] int64
    offsets_ptr,  # [num_rows] int64
    # outputs
    bounds_ptr,  # [num_rows, num_chunks, LANES] fp32 contiguous
    peaks_ptr,  # [num_rows, num_chunks] fp32 contiguous
    masses_ptr,  # [num_rows, num_chunks] fp32 contiguous
    # sizes
    vocab,
    num_chunks,
    # strides, in elements
    stride_logits_row,
    stride_temperature_row,
    stride_seeds_row,
    stride_offsets_row,
    # blocks
    TILES: tl.constexpr,  # of a chunk
    LANES: tl.constexpr,  # four tokens each
):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    temperature = tl.load(temperature_ptr + row * stride_temperature_row)
    seed = tl.load(seeds_ptr + row * stride_seeds_row)
    offset = tl.load(offsets_ptr + row * stride_offsets_row)
    row_ptr = logits_ptr + row * stride_logits_row

    first_token = chunk * (TILES * LANES * 4)
    if temperature == 0.0:
        scale = 1.0
        bound, peak, mass = _lane_bounds(row_ptr, first_token, vocab, scale, seed, offset, False, TILES, LANES)
    else:
        scale = triton_warping.exponent_scale(temperature)
        bound, peak, mass = _lane_bounds(row_ptr, first_token, vocab, scale, seed, offset, True, TILES, LANES)

    record = row * num_chunks + chunk
    tl.store(bounds_ptr + record * LANES + tl.arange(0, LANES), bound)
    chunk_peak = tl.max(peak, 0)
    tl.store(peaks_ptr + record, chunk_peak)
    tl.store(masses_ptr + record, tl.sum(mass * tl.exp2(_below(peak, chunk_peak) * scale), 0))


@triton.jit(do_not_specialize=["num_chunks", "num_samples"])
def draw_kernel(
    # inputs
    logits_ptr,  # [num_rows, vocab] fp32, bf16, fp16
    temperature_ptr,  # [num_rows] fp32
    seeds_ptr,  # [num_rows] int64
    offsets_ptr,  # [num_rows] int64
    bounds_ptr,  # [num_rows, num_chunks, LANES] fp32 contiguous
    peaks_ptr,  # [num_rows, num_chunks] fp32 contiguous
    masses_ptr,  # [num_rows, num_chunks] fp32 contiguous
    # outputs
    tokens_ptr,  # [num_rows, num_samples] int64
    log_normaliser_ptr,  # [num_rows] fp32
    # sizes
    vocab,
    num_chunks,
    num_samples,
    # strides, in elements
    stride_logits_row,
    stride_temperature_row,
    stride_seeds_row,
    stride_offsets_row,
    stride_tokens_row,
    stride_tokens_sample,
    stride_log_normaliser_row,
    # blocks
    LANES: tl.constexpr,
    SPAN_TILES: tl.constexpr,
    CHUNKS_PER_SPAN: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,  # >= groups of a row
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
    GROUP_SLOTS: tl.constexpr,  # groups that a round takes
    TOKEN_SLOTS: tl.constexpr,  # >= num_samples: tokens of theirs that get exact keys at a time
    WARPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * stride_temperature_row)
    seed = tl.load(seeds_ptr + row * stride_seeds_row)
    offset = tl.load(offsets_ptr + row * stride_offsets_row)
    row_ptr = logits_ptr + row * stride_logits_row
    is_greedy = temperature == 0.0
    NUM_PLACES: tl.constexpr = GROUP_SLOTS * SPAN_TILES * 4

    # A group is a lane of a span; the chunks that a span was cut into each hold a bound of it.
    groups = tl.arange(0, BLOCK_GROUPS)
    bound = tl.full([BLOCK_GROUPS], float("-inf"), tl.float32)
    for part in tl.static_range(CHUNKS_PER_SPAN):
        chunks = groups // LANES * CHUNKS_PER_SPAN + part
        bound_ptrs = bounds_ptr + (row * num_chunks + chunks) * LANES + groups % LANES
        bound = tl.maximum(bound, tl.load(bound_ptrs, mask=chunks < num_chunks, other=float("-inf")))

    # Before the draws, while the bounds are on their way.
    chunks = tl.arange(0, BLOCK_CHUNKS)
    records = row * num_chunks + chunks
    peaks = tl.load(peaks_ptr + records, mask=chunks < num_chunks, other=LOWEST)
    masses = tl.load(masses_ptr + records, mask=chunks < num_chunks, other=0.0)
    peak = tl.max(peaks, 0)
    scale = triton_warping.exponent_scale(temperature)
    divisor = tl.where(is_greedy, 1.0, temperature)
    mass = tl.sum(masses * tl.exp2(_below(peaks, peak) * scale), 0)
    log_normaliser = tl.where(is_greedy, peak, tl.div_rn(peak, divisor) + tl.log(mass))
    tl.store(log_normaliser_ptr + row * stride_log_normaliser_row, log_normaliser)

    groups_left = _packed(bound, groups, BLOCK_GROUPS)
    drawn = tl.full([TOKEN_SLOTS], NO_KEY, tl.int64)
    drawn_tokens = tl.full([TOKEN_SLOTS], NO_TOKEN, tl.int32)
    last_key = tl.full([], float("-inf"), tl.float64)
    samples = tl.arange(0, TOKEN_SLOTS)
    is_first = True
    takes_groups = True
    while takes_groups:
        taken, groups_left = triton_selection.largest_entries(groups_left, GROUP_SLOTS, WARPS)
        first_blocks, tokens_left = _token_bounds(
            row_ptr, taken, vocab, temperature, seed, offset, LANES, SPAN_TILES, BLOCK_GROUPS
        )
        takes_tokens = True
        while takes_tokens:
            best, tokens_left = triton_selection.largest_entries(tokens_left, TOKEN_SLOTS, WARPS)
            keys, tokens = _exact_draws(row_ptr, first_blocks, best, temperature, seed, offset, LANES, SPAN_TILES)
            if is_first:
                drawn = keys
                drawn_tokens = tokens
            else:
                drawn, drawn_tokens = triton_selection.merged_pairs(drawn, drawn_tokens, keys, tokens)
            is_first = False

            # What is left out can be drawn only if its bound reaches the last key drawn, or if too few were drawn.
            last_key = _key_of(triton_selection.largest(tl.where(samples == num_samples - 1, drawn, NO_KEY)))
            last_key = last_key * tl.where(is_greedy, 1.0, LOG2_E)
            takes_tokens = _may_precede(tokens_left, last_key, NUM_PLACES)
        takes_groups = _may_precede(groups_left, last_key, BLOCK_GROUPS)

    tl.store(
        tokens_ptr + row * stride_tokens_row + samples.to(tl.int64) * stride_tokens_sample,
        tl.where(drawn == NO_KEY, -1, drawn_tokens).to(tl.int64),
        mask=samples < num_samples,
    )
