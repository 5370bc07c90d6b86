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
    `draw_kernel` is bound by latency: k + k / 4 + 2 rounds of a block-wide maximum, then k of a maximum and a minimum;
    a candidate costs one float64 division, some 1400 a row. Its sm_90 code for k = 16, issued in order at latencies of
    5 cycles for arithmetic, 24 for shuffles and shared memory, 280 for L2 and 600 for what comes first, takes 43000
    cycles, 24 us at 1.8 GHz.
    Together 32 us for the 64 rows, 8.5 times one read.
    All this is counted. An H100 with other work on it took 44.4 us for the 64 rows, 31.7 us for greedy ones and 29.5
    us for a single row (`bench/results/nvidia-h100-80gb-hbm3/sample_without_replacement.json`).

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
_DRAW_WARPS = 8
"""warps of a drawing program; with 16 the float64 keys of 128 groups do not fit a thread's registers"""


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
