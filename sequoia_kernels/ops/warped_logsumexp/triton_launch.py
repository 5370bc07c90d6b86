"""warped_logsumexp in Triton: no sort, two readings of each row by many programs.

Inputs and outputs as in op.py. The kernels are in triton_kernels.py; here they are configured and launched.

Computes
    log_normaliser = log sum of exp(logit / T) over the tokens that top-k and top-p keep, and the smallest logit kept.
    How the cut is found is told in triton_warping.py.

Parallel plan: what one program owns
    `row_chunks_kernel`, one program for each row and chunk of the vocabulary: its peak, mass and smallest logit; where
    top-k or top-p is on, the largest logit of every 512 tokens, too.
    `collect_rows_kernel`, as many programs, only with top-k or top-p: copies the logits that may be the cut, or above
    it, into the row's scratch. Their places are counted by an atomic, which the first launch sets back.
    `warp_rows_kernel`, one program a row: adds the chunks up; where top-k or top-p is on, searches the cut among the
    collected logits. A row without either is finished at once. The order of every sum is fixed, or does not matter:
    results repeat bit for bit.

Memory: bytes read and written
    Reads the logits once from memory, and with top-k or top-p once more from L2; writes 12 bytes a chunk, 4 for every
    512 tokens and up to 16 KiB of candidates a row that is cut. Floor for 64 x 128256 bf16: 16.4 MB, 3.8 us at
    4.3 TB/s.
    Estimate for that with top-p: first reading 5 us, second 3.5 (16.4 MB from L2, a scan of each chunk, a launch),
    search 4 to 5 (a launch, 25 halvings of about 100 cycles; with top-k as many more): 13 us. Before, one program a row
    did the searching, in three to six readings of 6 us and a copy: 20 to 40 us by estimate on top of the first reading.
    An H100 with other work on it took 110 us for all that, and 10.7 us without a cut
    (`bench/results/nvidia-h100-80gb-hbm3/warped_logsumexp.json`). It is still what happens where more than 4096 logits
    may be the cut (flat rows), and with top-k above the number of 512 tokens in the vocabulary that have an unmasked
    one among them (251 of 128256). The launch that collects has not run on a GPU.

Numerics
    Sums in float32 relative to the row's peak. The cut is one of the row's logits, exactly. At a boundary of top-p that
    rounding decides, two orders of summation may disagree; nothing else can differ from the reference.

Source
    As reference.py. The search replaces the sort: selection by bisection, with an early end on few candidates.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sequoia_kernels.ops import triton_device, triton_warping

from .op import WarpedNormaliser, WarpInputs
from .triton_kernels import collect_rows_kernel, row_chunks_kernel, warp_rows_kernel

__all__ = ["LaunchConfig", "run", "supports", "unavailable"]

# tuning table --------------------------------------------------------------------------------------------------------

# Chosen by compiling (no spills). Not tuned on a device.
_MOST_CHUNK = 4096
_LEAST_CHUNK = 512
_CHUNK_TOKENS_PER_WARP = 512
_ROW_TILE = 4096
"""tokens that the program of a row reads at a time"""
_ROW_TOKENS_PER_WARP = 256


# launch configuration ------------------------------------------------------------------------------------------------


class LaunchConfig(NamedTuple):
    """Everything about a launch that the device and the shapes decide."""

    chunk: int
    """tokens that one program of the first kernel reads"""
    num_chunks: int
    chunk_warps: int
    row_tile: int
    """tokens that the program of a row reads at a time"""
    row_warps: int
    candidates: int = triton_warping.MAX_CANDIDATES
    """room for the logits of a row among which a search ends"""


@functools.lru_cache(maxsize=1024)
def _launch_config(num_rows: int, vocab: int, traits: triton_device.DeviceTraits) -> LaunchConfig:
    """Choose the launch of a call from its shapes and its device."""
    chunk = min(_MOST_CHUNK, max(_LEAST_CHUNK, triton.next_power_of_2(vocab)))
    while chunk > _LEAST_CHUNK and num_rows * triton.cdiv(vocab, chunk) < 2 * traits.num_sms:
        chunk //= 2
    row_tile = min(_ROW_TILE, max(_LEAST_CHUNK, triton.next_power_of_2(vocab)))
    return LaunchConfig(
        chunk,
        triton.cdiv(vocab, chunk),
        max(2, chunk // _CHUNK_TOKENS_PER_WARP),
        row_tile,
        row_tile // _ROW_TOKENS_PER_WARP,
        candidates=min(row_tile, triton_warping.MAX_CANDIDATES),  # they stay in registers of as many warps
    )


unavailable = triton_device.unavailable_reason


def supports(inputs: WarpInputs) -> str | None:
    """Whether the kernels can run this call."""
    if inputs.logits.dtype == torch.float64:
        return "takes float32, bfloat16 and float16"
    return triton_device.device_reason(inputs.logits.device)


def run(inputs: WarpInputs, outputs: WarpedNormaliser, config: LaunchConfig | None = None) -> None:
    """Write the outputs. ``config`` overrules the launch configuration, for tests and tuning."""
    logits, temperature, top_k, top_p = inputs
    log_normaliser, cut = outputs
    num_rows, vocab = logits.shape
    if vocab == 1:
        top_k = top_p = None  # they leave a single token; find_cut takes two and more
    if config is None:
        config = _launch_config(num_rows, vocab, triton_device.device_traits(logits.device))

    num_records = num_rows * config.num_chunks
    peaks, masses, lowest = logits.new_empty(3, triton.cdiv(num_records, 4) * 4, dtype=torch.float32).unbind()
    is_cut = top_k is not None or top_p is not None
    group = min(config.chunk, triton_warping.PEAK_TOKENS)
    group_peaks = num_collected = scratch = None
    if is_cut:
        group_peaks = logits.new_empty(num_records * (config.chunk // group), dtype=torch.float32)
        num_collected = logits.new_empty(num_rows, dtype=torch.int32)
        scratch = logits.new_empty(num_rows * config.candidates, dtype=torch.float32)
    block_chunks = triton.next_power_of_2(config.num_chunks)
    flags = {"HAS_TOP_K": top_k is not None, "HAS_TOP_P": top_p is not None}
    with triton_device.launching_on(logits.device):
        row_chunks_kernel[(num_records,)](
            logits, temperature,
            peaks, masses, lowest, group_peaks, num_collected,
            vocab, config.num_chunks,
            *_row_strides(num_rows, logits, temperature),
            CUT=is_cut,
            CHUNK=config.chunk,
            GROUP=group,
            num_warps=config.chunk_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        if is_cut:
            collect_rows_kernel[(num_records,)](
                logits, temperature, top_k, top_p, peaks, masses, group_peaks,
                num_collected, scratch,
                vocab, config.num_chunks,
                *_row_strides(num_rows, logits, temperature, top_k, top_p),
                **flags,
                BLOCK_CHUNKS=block_chunks,
                CHUNK=config.chunk,
                GROUP=group,
                CANDIDATES=config.candidates,
                num_warps=config.chunk_warps,
                maxnreg=triton_device.most_registers(config.chunk_warps),
                enable_fp_fusion=True,
            )  # fmt: skip
        warp_rows_kernel[(num_rows,)](
            logits, temperature, top_k, top_p, peaks, masses, lowest, num_collected,
            log_normaliser, cut, scratch,
            vocab, config.num_chunks,
            *_row_strides(num_rows, logits, temperature, top_k, top_p, log_normaliser, cut),
            **flags,
            BLOCK_CHUNKS=block_chunks,
            TILE=config.row_tile,
            CANDIDATES=config.candidates,
            num_warps=config.row_warps,
            maxnreg=triton_device.most_registers(config.row_warps),
            enable_fp_fusion=True,
        )  # fmt: skip


def _row_strides(num_rows: int, *tensors: Tensor | None) -> tuple[int, ...]:
    """Distances between rows, 0 where there is one row, whose stride is arbitrary and would compile more variants."""
    return tuple(0 if tensor is None or num_rows == 1 else tensor.stride(0) for tensor in tensors)
