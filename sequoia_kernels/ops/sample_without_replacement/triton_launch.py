"""sample_without_replacement in Triton: one read of the logits, exact keys only for the few that can win.

Inputs and outputs as in op.py. The kernels are in triton_kernels.py; here they are configured and launched.

Computes
    key(x) = logit(x) / T + gumbel(x), the tokens of the k largest keys in falling order (ties: lower token first), and
    log sum exp(logit / T). A row at temperature 0 takes its largest logits.

Parallel plan: what one program owns
    `bound_keys_kernel`, one program for each row and chunk of the vocabulary: reads its logits once and keeps, for each
    of its lanes, the largest upper bound of a key, and the sum of exponentials. Philox gives noise for four tokens at a
    time, so a lane takes four neighbours a tile, and the same lane of SPAN_TILES tiles in a row is a group of 4 *
    SPAN_TILES tokens. What leaves the kernel is one bound a lane and one (peak, mass) a chunk.
    `draw_kernel`, one program a row: takes twice as many groups as samples, rounded up to a power of two (8 at least,
    128 at most), of the largest bounds, then as many of their tokens (256 at most), again by bound, and only these get
    exact keys. If a token or a group that was left out has a bound at or above the k-th key, another round follows with
    the next ones; so the result is exact, and one round is nearly always enough. What is taken is found by networks
    (triton_selection.py), not by one maximum after another. Adds up the chunks' sums.
    The order of every sum and comparison is fixed: results repeat bit for bit.

Memory: bytes read and written
    Reads the logits once, and those of the groups taken again from L2 (64 tokens a group); writes and reads 4 bytes for
    each lane of a chunk (1/16 of a byte for a token in chunks of 16 tiles). Floor for 64 rows x 128256 bf16: 16.4 MB,
    3.8 us at 4.3 TB/s.

Numerics
    The bound is -log2 of u exp(u / 2) <= -log(1 - u) by the hardware's approximate logarithm, so it needs one logarithm
    and one addition where the key needs two precise logarithms; a margin that covers the rounding is added when bounds
    meet keys. Among bounds, the lowest bits make room for an id, which rounds a bound up. Exact keys take the
    reference's steps (noise in float32 by the library logarithm, without fused multiply-adds; quotient and sum in
    float64, or small temperatures would round the noise away) and equal it bit for bit on a CUDA device. Sums of
    exponentials are relative to a running maximum of the lane.
    Instructions a token of `bound_keys_kernel`, counted in its sm_90 code (triton 3.7.1): 373 in the loop for 16 tokens
    of a thread, 23 each, where it was 30. Philox takes 9.5 of them, bound and maximum 5, the exponential and its sum 4,
    the special-function unit 2.1. 64 x 128256 tokens at full issue rate of 132 multiprocessors are 6.3 us (8 before),
    so this kernel is bound by arithmetic.
    `draw_kernel` is bound by latency. Its sm_90 code for k = 16, one warp a scheduler, issued in order at latencies of
    5 cycles for arithmetic, 24 for shuffles and shared memory, 280 for L2 and 600 for what comes first, takes 8200
    cycles for a round, 4.6 us at 1.8 GHz: 1000 until the bounds are there, 1900 to take groups, 2400 for bounds of
    tokens and to take some, 1900 for exact keys and their order, 900 to see that no round follows. The same count gives
    43000 cycles, 24 us, for the 22 + 16 maxima one after another that this kernel had before.
    Together 10.9 us for the 64 rows, 2.9 times one read; before, 32 us and 8.5 times. Two reads are 7.6 us, which the
    first kernel alone nearly takes: what the definition of the draws asks of every token (Philox, one conversion,
    logarithm, exponential, maximum and sum) is some 18 instructions, 5 us, and the draws wait for each other.
    All this is counted. An H100 with other work on it took 44.4 us for the 64 rows, 31.7 us for greedy ones and 29.5
    us for a single row (`bench/results/nvidia-h100-80gb-hbm3/sample_without_replacement.json`) in the form before; this
    one has not run on a GPU.

Source
    Gumbel-top-k (Kool, van Hoof, Welling 2019, arXiv 1903.06059). The threshold rule that stops the rounds is that of
    Fagin, Lotem, Naor, "Optimal aggregation algorithms for middleware", 2001.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from sequoia_kernels.ops import triton_device

from .op import SampledTokens, SampleInputs
from .triton_kernels import bound_keys_kernel, draw_kernel

__all__ = ["LaunchConfig", "run", "supports", "unavailable"]

# tuning table --------------------------------------------------------------------------------------------------------

# Chosen by compiling (no spills) and by counting instructions; not tuned on a device.
_MOST_LANES = 512
_LANES_PER_WARP = 64
_SPAN_TILES = 16
_PROGRAMS_PER_SM = 3.5
"""programs of 8 warps that a multiprocessor should get before chunks become longer than a tile"""
_MOST_TAKEN = 128
_LEAST_SLOTS = 8
_FEW_SLOTS = 32
"""tokens up to which four warps draw, each with less to wait for; eight where more entries need more registers"""


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
    group_slots: int
    """groups that a round takes, a power of two"""
    token_slots: int
    """tokens of theirs that get exact keys at a time, a power of two"""
    num_warps: int
    draw_warps: int


@functools.lru_cache(maxsize=1024)
def _launch_config(num_rows: int, vocab: int, num_samples: int, traits: triton_device.DeviceTraits) -> LaunchConfig:
    """Choose the launch of a call from its shapes and its device."""
    lanes = min(_MOST_LANES, max(16, triton.next_power_of_2(triton.cdiv(vocab, 4 * _SPAN_TILES))))
    tiles = _SPAN_TILES
    while tiles > 1 and num_rows * triton.cdiv(vocab, 4 * lanes * tiles) < _PROGRAMS_PER_SM * traits.num_sms:
        tiles //= 2
    num_groups = triton.cdiv(vocab, 4 * lanes * _SPAN_TILES) * lanes
    token_slots = max(_LEAST_SLOTS, triton.next_power_of_2(2 * num_samples))
    return LaunchConfig(
        lanes,
        tiles,
        triton.cdiv(vocab, 4 * lanes * tiles),
        num_groups,
        min(triton.next_power_of_2(num_groups), token_slots, _MOST_TAKEN),
        token_slots,
        num_warps=max(1, lanes // _LANES_PER_WARP),
        draw_warps=4 if token_slots <= _FEW_SLOTS else 8,
    )


unavailable = triton_device.unavailable_reason


def supports(inputs: SampleInputs) -> str | None:
    """Whether the kernels can run this call."""
    if inputs.logits.dtype == torch.float64:
        return "takes float32, bfloat16 and float16"
    return triton_device.device_reason(inputs.logits.device)


def run(inputs: SampleInputs, outputs: SampledTokens, config: LaunchConfig | None = None) -> None:
    """Write the outputs. ``config`` overrules the launch configuration, for tests and tuning."""
    logits, num_samples, *rows = inputs
    tokens, log_normaliser = outputs
    num_rows, vocab = logits.shape
    if config is None:
        config = _launch_config(num_rows, vocab, num_samples, triton_device.device_traits(logits.device))

    num_records = num_rows * config.num_chunks
    bounds = logits.new_empty(num_records * config.lanes, dtype=torch.float32)
    peaks, masses = logits.new_empty(2, num_records, dtype=torch.float32).unbind()
    input_strides = [tensor.stride(0) if num_rows > 1 else 0 for tensor in (logits, *rows)]
    with triton_device.launching_on(logits.device):
        bound_keys_kernel[(num_records,)](
            logits, *rows, bounds, peaks, masses,
            vocab, config.num_chunks,
            *input_strides,
            TILES=config.tiles,
            LANES=config.lanes,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        draw_kernel[(num_rows,)](
            logits, *rows, bounds, peaks, masses,
            tokens, log_normaliser,
            vocab, config.num_chunks, num_samples,
            *input_strides,
            tokens.stride(0) if num_rows > 1 else 0,
            tokens.stride(1) if num_samples > 1 else 0,
            log_normaliser.stride(0) if num_rows > 1 else 0,
            LANES=config.lanes,
            SPAN_TILES=_SPAN_TILES,
            CHUNKS_PER_SPAN=_SPAN_TILES // config.tiles,
            BLOCK_GROUPS=triton.next_power_of_2(config.num_groups),
            BLOCK_CHUNKS=triton.next_power_of_2(config.num_chunks),
            GROUP_SLOTS=config.group_slots,
            TOKEN_SLOTS=config.token_slots,
            WARPS=config.draw_warps,
            num_warps=config.draw_warps,
            maxnreg=triton_device.most_registers(config.draw_warps),
            enable_fp_fusion=False,  # keys are to equal the reference's
        )  # fmt: skip
