"""The kernels of sample_without_replacement, in the order of their launch; triton_launch.py tells what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_device, triton_streams, triton_warping

__all__ = ["bound_keys_kernel", "draw_kernel"]

INTERPRETED = tl.constexpr(triton_device.INTERPRETED)
DRAFT_TAG = triton_streams.DRAFT_TAG
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_BOUND = tl.constexpr(-(2**63))
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
def _noise_bound(word):  # uint32 -> fp32
    """At least the Gumbel noise of a word, up to the margin, in units of log 2 and less 32.

    An exponential is at least u + u^2 / 2, where u is at least word / 2^32. Word 0 gives +inf.
    """
    scaled_uniform = word.to(tl.float32)
    return -_fast_log2(scaled_uniform * (scaled_uniform * 1.1641532182693481e-10 + 1.0))


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
    row_ptr,
    first_token,
    vocab,
    LANES: tl.constexpr,
):
    """A tile of 4 * LANES tokens as four tensors fp32 [LANES]: the i-th holds the i-th token of every four."""
    tokens = first_token + tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    logits = tl.load(row_ptr + tokens, mask=tokens < vocab, other=float("-inf"))
    even, odd = tl.split(tl.reshape(logits, [LANES, 2, 2]))
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
    lanes = tl.arange(0, LANES)
    bound = tl.full([LANES], float("-inf"), tl.float32)
    peak = tl.full([LANES], LOWEST, tl.float32)
    mass = tl.zeros([LANES], tl.float32)
    for _ in range(TILES):
        logits_0, logits_1, logits_2, logits_3 = _fours(row_ptr, first_token, vocab, LANES)
        highest = tl.maximum(tl.maximum(logits_0, logits_1), tl.maximum(logits_2, logits_3))
        if NOISY:
            words = triton_streams.stream_words(seed, offset, DRAFT_TAG, first_token // 4 + lanes)
            bound_0 = logits_0 * scale + _noise_bound(words[0])
            bound_1 = logits_1 * scale + _noise_bound(words[1])
            bound_2 = logits_2 * scale + _noise_bound(words[2])
            bound_3 = logits_3 * scale + _noise_bound(words[3])
            bound = tl.maximum(bound, tl.maximum(tl.maximum(bound_0, bound_1), tl.maximum(bound_2, bound_3)))
        else:
            bound = tl.maximum(bound, highest)

        highest = tl.maximum(peak, highest)
        mass = (
            mass * tl.exp2(_below(peak, highest) * scale)
            + (tl.exp2((logits_0 - highest) * scale) + tl.exp2((logits_1 - highest) * scale))
            + (tl.exp2((logits_2 - highest) * scale) + tl.exp2((logits_3 - highest) * scale))
        )
        peak = highest
        first_token += LANES * 4
    if NOISY:
        bound += 32.0
    return bound, peak, mass


@triton.jit
def _packed(bound, group):  # fp32, int32 not negative -> int64
    """One integer that orders by falling bound, then by rising group; NO_BOUND for a bound of -inf."""
    bits = bound.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.to(tl.int64) << 32) | (group ^ NO_TOKEN).to(tl.int64)
    return tl.where(bound == float("-inf"), NO_BOUND, packed)


@triton.jit
def _unpacked_bound(packed):
    ordered = (packed >> 32).to(tl.int32)
    bound = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(packed == NO_BOUND, float("-inf"), bound)


@triton.jit
def _unpacked_group(packed):  # of anything but NO_BOUND
    return (packed & 0x7FFFFFFF).to(tl.int32) ^ NO_TOKEN


@triton.jit
def _largest_bounds(packed, count, SLOTS: tl.constexpr):
    """The `count` largest entries in falling order, [SLOTS] padded with NO_BOUND. Entries differ but for NO_BOUND."""
    slots = tl.arange(0, SLOTS)
    largest = tl.full([SLOTS], NO_BOUND, tl.int64)
    for place in range(count):
        top = tl.max(packed, 0)
        largest = tl.where(slots == place, top, largest)
        packed = tl.where(packed == top, NO_BOUND, packed)
    return largest


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
def _largest_keys(keys, tokens, count, SLOTS: tl.constexpr):
    """The `count` largest keys in falling order, of equal ones the lower token first, and their tokens."""
    slots = tl.arange(0, SLOTS)
    largest = tl.full([SLOTS], float("-inf"), tl.float64)
    largest_tokens = tl.full([SLOTS], NO_TOKEN, tl.int32)
    for place in range(count):
        top = tl.max(keys, 0)
        token = tl.min(tl.where((keys == top) & (keys > float("-inf")), tokens, NO_TOKEN), 0)
        largest = tl.where(slots == place, top, largest)
        largest_tokens = tl.where(slots == place, token, largest_tokens)
        keys = tl.where(tokens == token, float("-inf"), keys)
    return largest, largest_tokens


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


@triton.jit(do_not_specialize=["num_chunks", "num_samples", "num_taken"])
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
    num_taken,  # groups that a round takes, at most GROUP_SLOTS
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
    GROUP_SLOTS: tl.constexpr,
    SAMPLE_SLOTS: tl.constexpr,  # >= num_samples
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * stride_temperature_row)
    seed = tl.load(seeds_ptr + row * stride_seeds_row)
    offset = tl.load(offsets_ptr + row * stride_offsets_row)
    row_ptr = logits_ptr + row * stride_logits_row
    is_greedy = temperature == 0.0

    # A group is a lane of a span; the chunks that a span was cut into each hold a bound of it.
    groups = tl.arange(0, BLOCK_GROUPS)
    bound = tl.full([BLOCK_GROUPS], float("-inf"), tl.float32)
    for part in tl.static_range(CHUNKS_PER_SPAN):
        chunks = groups // LANES * CHUNKS_PER_SPAN + part
        bound_ptrs = bounds_ptr + (row * num_chunks + chunks) * LANES + groups % LANES
        bound = tl.maximum(bound, tl.load(bound_ptrs, mask=chunks < num_chunks, other=float("-inf")))
    left = _packed(tl.where(bound == 0.0, 0.0, bound), groups)  # -0.0 and 0.0 tie

    drawn = tl.full([SAMPLE_SLOTS], float("-inf"), tl.float64)
    drawn_tokens = tl.full([SAMPLE_SLOTS], NO_TOKEN, tl.int32)
    samples = tl.arange(0, SAMPLE_SLOTS)
    is_first_round = True
    unfinished = True
    while unfinished:
        if GROUP_SLOTS == BLOCK_GROUPS:
            taken = left
            left = tl.full([BLOCK_GROUPS], NO_BOUND, tl.int64)
        else:
            taken = _largest_bounds(left, num_taken, GROUP_SLOTS)
            last_taken = tl.min(tl.where(tl.arange(0, GROUP_SLOTS) < num_taken, taken, 2**63 - 1), 0)
            left = tl.where(left >= last_taken, NO_BOUND, left)
        group = _unpacked_group(taken)
        is_group = taken != NO_BOUND
        group = tl.where(is_group, group, 0)
        tiles = group[:, None] // LANES * SPAN_TILES + tl.arange(0, SPAN_TILES)[None, :]
        blocks = tl.reshape(tiles * LANES + group[:, None] % LANES, [GROUP_SLOTS * SPAN_TILES])
        is_block = tl.reshape(is_group[:, None] & (tiles >= 0), [GROUP_SLOTS * SPAN_TILES])
        words = triton_streams.stream_words(seed, offset, DRAFT_TAG, blocks)
        token_0 = blocks * 4
        token_1 = blocks * 4 + 1
        token_2 = blocks * 4 + 2
        token_3 = blocks * 4 + 3
        key_0 = _exact_key(row_ptr, token_0, is_block & (token_0 < vocab), words[0], temperature)
        key_1 = _exact_key(row_ptr, token_1, is_block & (token_1 < vocab), words[1], temperature)
        key_2 = _exact_key(row_ptr, token_2, is_block & (token_2 < vocab), words[2], temperature)
        key_3 = _exact_key(row_ptr, token_3, is_block & (token_3 < vocab), words[3], temperature)
        keys = tl.reshape(tl.join(tl.join(key_0, key_1), tl.join(key_2, key_3)), [GROUP_SLOTS * SPAN_TILES * 4])
        tokens = tl.reshape(
            tl.join(tl.join(token_0, token_1), tl.join(token_2, token_3)), [GROUP_SLOTS * SPAN_TILES * 4]
        )
        found, found_tokens = _largest_keys(keys, tokens, num_samples, SAMPLE_SLOTS)
        if is_first_round:
            drawn = found
            drawn_tokens = found_tokens
        else:
            both_keys = tl.reshape(tl.join(drawn, found), [SAMPLE_SLOTS * 2])
            both_tokens = tl.reshape(tl.join(drawn_tokens, found_tokens), [SAMPLE_SLOTS * 2])
            drawn, drawn_tokens = _largest_keys(both_keys, both_tokens, num_samples, SAMPLE_SLOTS)
        is_first_round = False

        # Whoever is left out can be drawn only if its bound reaches the last key drawn, or if too few were drawn.
        best_left = tl.maximum(_unpacked_bound(tl.max(left, 0)), LOWEST)
        last_key = tl.min(tl.where(samples < num_samples, drawn, float("inf")), 0)
        last_key = last_key * tl.where(is_greedy, 1.0, LOG2_E)
        unfinished = (best_left > LOWEST) & (best_left + _margin(best_left) >= last_key)

    tl.store(
        tokens_ptr + row * stride_tokens_row + samples.to(tl.int64) * stride_tokens_sample,
        tl.where(drawn == float("-inf"), -1, drawn_tokens).to(tl.int64),
        mask=samples < num_samples,
    )

    chunks = tl.arange(0, BLOCK_CHUNKS)
    records = row * num_chunks + chunks
    peaks = tl.load(peaks_ptr + records, mask=chunks < num_chunks, other=LOWEST)
    masses = tl.load(masses_ptr + records, mask=chunks < num_chunks, other=0.0)
    peak = tl.max(peaks, 0)
    divisor = tl.where(is_greedy, 1.0, temperature)
    mass = tl.sum(masses * tl.exp2(_below(peaks, peak) * triton_warping.exponent_scale(temperature)), 0)
    log_normaliser = tl.where(is_greedy, peak, tl.div_rn(peak, divisor) + tl.log(mass))
    tl.store(log_normaliser_ptr + row * stride_log_normaliser_row, log_normaliser)
