"""Draw tokens without replacement in Triton: one read of the logits, exact keys only for the few that can win.

Computes
    key(x) = logit(x) / T + gumbel(x), the tokens of the k largest keys in falling order (ties: lower token first), and
    log sum exp(logit / T). A row at temperature 0 takes its largest logits. Inputs and outputs as in reference.py.

Parallel plan: what one program owns
    `bound_keys_kernel`, one program for each row and chunk of the vocabulary: reads its logits once and keeps, for each
    of its lanes, the largest upper bound of a key, and the sum of exponentials. Philox gives noise for four tokens at a
    time, so a lane takes four neighbours a tile, and the same lane of SPAN_TILES tiles in a row is a group of 4 *
    SPAN_TILES tokens. What leaves the kernel is one bound a lane and one (peak, mass) a chunk.
    `draw_kernel`, one program a row: takes the k + k / 4 + 2 groups (128 at most) of largest bounds, computes the exact
    keys of their tokens and draws the k largest. If a group that was left out has a bound at or above the k-th key,
    another round follows with the next groups; so the result is exact, and one round is nearly always enough. Adds up
    the chunks' sums.
    The order of every sum and comparison is fixed: results repeat bit for bit.

Memory: bytes read and written
    Reads the logits once, and the candidates' again from L2 (64 tokens a group); writes and reads 4 bytes for each lane
    of a chunk (1/16 of a byte for a token in chunks of 16 tiles). Floor for 64 rows x 128256 bf16: 16.4 MB, 3.8 us at
    4.3 TB/s.

Numerics
    The bound is -log2 of u + u^2 / 2 <= -log(1 - u) by the hardware's approximate logarithm, so it needs one logarithm
    where the key needs two precise ones; a margin that covers the rounding is added when bounds meet keys. Exact keys
    take the reference's steps (noise in float32 by the library logarithm, without fused multiply-adds; quotient and sum
    in float64, or small temperatures would round the noise away) and equal it bit for bit on a CUDA device. Sums of
    exponentials are relative to a running maximum of the lane.
    Instructions a token of `bound_keys_kernel`, counted in its sm_90 code: about 30, of which Philox takes 11 and the
    special-function unit 2.25 (logarithm, exponential, and a rescaling for every fourth token). 64 x 128256 tokens at
    full issue rate of 132 multiprocessors are about 8 us, so this kernel is bound by arithmetic, at twice the read.
    `draw_kernel` is bound by latency: k + k / 4 + 2 rounds of a block-wide maximum, then k of a maximum and a minimum,
    6 to 8 us for k = 16; a candidate costs one float64 division, some 1400 a row.
    All this is counted, not measured: not run on a GPU.

Source
    Gumbel-top-k (Kool, van Hoof, Welling 2019, arXiv 1903.06059). The threshold rule that stops the rounds is that of
    Fagin, Lotem, Naor, "Optimal aggregation algorithms for middleware", 2001.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sequoia_kernels.ops import triton_device, triton_streams, triton_warping

__all__ = ["LaunchConfig", "run", "supports", "unavailable"]

# tuning table --------------------------------------------------------------------------------------------------------

# Chosen by compiling (no spills) and by counting instructions. No device has timed these yet;
# bench/ops/bench_sample_without_replacement.py will.
_MOST_LANES = 512
_LANES_PER_WARP = 64
_SPAN_TILES = 16
_PROGRAMS_PER_SM = 3.5
"""programs of 8 warps that a multiprocessor should get before chunks become longer than a tile"""
_MOST_TAKEN = 128
_DRAW_WARPS = 8
"""warps of a drawing program; with 16 the float64 keys of 128 groups do not fit a thread's registers"""

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


# launch configuration ------------------------------------------------------------------------------------------------


class LaunchConfig(NamedTuple):
    """Everything about a launch that the device and the shapes decide."""

    lanes: int
    """of a tile; a lane takes four tokens"""
    tiles: int
    """of a chunk"""
    num_chunks: int
    num_groups: int
    """of a row: spans * lanes"""
    num_taken: int
    """groups whose tokens get exact keys in a round"""
    num_warps: int


@functools.lru_cache(maxsize=1024)
def _launch_config(num_rows: int, vocab: int, num_samples: int, traits: triton_device.DeviceTraits) -> LaunchConfig:
    """Choose the launch of a call from its shapes and its device."""
    lanes = min(_MOST_LANES, max(16, triton.next_power_of_2(triton.cdiv(vocab, 4 * _SPAN_TILES))))
    tiles = _SPAN_TILES
    while tiles > 1 and num_rows * triton.cdiv(vocab, 4 * lanes * tiles) < _PROGRAMS_PER_SM * traits.num_sms:
        tiles //= 2
    num_groups = triton.cdiv(vocab, 4 * lanes * _SPAN_TILES) * lanes
    num_taken = min(num_groups, num_samples + num_samples // 4 + 2, _MOST_TAKEN)
    return LaunchConfig(
        lanes,
        tiles,
        triton.cdiv(vocab, 4 * lanes * tiles),
        num_groups,
        num_taken,
        num_warps=max(1, lanes // _LANES_PER_WARP),
    )


def unavailable() -> str | None:
    """Tell why no Triton kernel can run on this machine, or None."""
    return triton_device.unavailable_reason()


def supports(logits: Tensor, num_samples: int, temperature: Tensor, seeds: Tensor, offsets: Tensor) -> str | None:
    """Whether the kernels can run this call."""
    if logits.dtype == torch.float64:
        return "takes float32, bfloat16 and float16"
    return triton_device.device_reason(logits.device)


def run(
    logits: Tensor,
    num_samples: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    tokens: Tensor | None,
    log_normaliser: Tensor | None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Write and return the outputs. ``config`` overrules the launch configuration, for tests and tuning."""
    num_rows, vocab = logits.shape
    if tokens is None:
        tokens = logits.new_empty((num_rows, num_samples), dtype=torch.int64)
    if log_normaliser is None:
        log_normaliser = logits.new_empty(num_rows, dtype=torch.float32)
    if num_rows == 0:
        return tokens, log_normaliser
    if config is None:
        config = _launch_config(num_rows, vocab, num_samples, triton_device.device_traits(logits.device))

    num_records = num_rows * config.num_chunks
    bounds = logits.new_empty(num_records * config.lanes, dtype=torch.float32)
    peaks, masses = logits.new_empty(2, num_records, dtype=torch.float32).unbind()
    inputs = (logits, temperature, seeds, offsets)
    input_strides = tuple(tensor.stride(0) if num_rows > 1 else 0 for tensor in inputs)
    with triton_device.launching_on(logits.device):
        bound_keys_kernel[(num_records,)](
            *inputs, bounds, peaks, masses,
            vocab, config.num_chunks,
            *input_strides,
            TILES=config.tiles,
            LANES=config.lanes,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        draw_kernel[(num_rows,)](
            *inputs, bounds, peaks, masses,
            tokens, log_normaliser,
            vocab, config.num_chunks, num_samples, config.num_taken,
            *input_strides,
            tokens.stride(0) if num_rows > 1 else 0,
            tokens.stride(1) if num_samples > 1 else 0,
            log_normaliser.stride(0) if num_rows > 1 else 0,
            LANES=config.lanes,
            SPAN_TILES=_SPAN_TILES,
            CHUNKS_PER_SPAN=_SPAN_TILES // config.tiles,
            BLOCK_GROUPS=triton.next_power_of_2(config.num_groups),
            BLOCK_CHUNKS=triton.next_power_of_2(config.num_chunks),
            GROUP_SLOTS=triton.next_power_of_2(config.num_taken),
            SAMPLE_SLOTS=triton.next_power_of_2(num_samples),
            num_warps=_DRAW_WARPS,
            maxnreg=triton_device.most_registers(_DRAW_WARPS),
            enable_fp_fusion=False,  # keys are to equal the reference's
        )  # fmt: skip
    return tokens, log_normaliser
