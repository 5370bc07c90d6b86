"""warped_logsumexp in Triton: no sort, a few readings of each row.

Inputs and outputs as in op.py. The kernels are in triton_kernels.py; here they are configured and launched.

Computes
    log_normaliser = log sum of exp(logit / T) over the tokens that top-k and top-p keep, and the smallest logit kept.
    The search for the cut is `find_cut` of triton_warping.py.

Parallel plan: what one program owns
    `row_chunks_kernel`, one program for each row and chunk of the vocabulary: its peak, mass and smallest logit.
    `warp_rows_kernel`, one program a row: adds the chunks up; where top-k or top-p is on, searches the cut. A row
    without either is finished at once. The order of every sum is fixed: results repeat bit for bit.

Memory: bytes read and written
    Reads the logits once from memory; each step of a search reads a row once more from L2, by one program. Writes 12
    bytes a chunk and up to 16 KiB of candidates a row that is cut. Floor for 64 x 128256 bf16: 16.4 MB, 3.8 us at
    4.3 TB/s. A search reads its row three to six times at about 6 us (the exponentials of 128256 tokens by one
    multiprocessor), so 20 to 40 us for any number of rows up to the number of multiprocessors. An H100
    with other work on it took 10.7 us without a cut and 110 us with top-p
    (`bench/results/nvidia-h100-80gb-hbm3/warped_logsumexp.json`).

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
from .triton_kernels import row_chunks_kernel, warp_rows_kernel

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
    """room for the logits among which a search ends"""


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
    scratch = logits.new_empty(num_rows * config.candidates, dtype=torch.float32) if is_cut else None
    with triton_device.launching_on(logits.device):
        row_chunks_kernel[(num_records,)](
            logits, temperature,
            peaks, masses, lowest,
            vocab, config.num_chunks,
            *_row_strides(num_rows, logits, temperature),
            CHUNK=config.chunk,
            num_warps=config.chunk_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        warp_rows_kernel[(num_rows,)](
            logits, temperature, top_k, top_p, peaks, masses, lowest,
            log_normaliser, cut, scratch,
            vocab, config.num_chunks,
            *_row_strides(num_rows, logits, temperature, top_k, top_p, log_normaliser, cut),
            HAS_TOP_K=top_k is not None,
            HAS_TOP_P=top_p is not None,
            BLOCK_CHUNKS=triton.next_power_of_2(config.num_chunks),
            TILE=config.row_tile,
            CANDIDATES=config.candidates,
            num_warps=config.row_warps,
            maxnreg=triton_device.most_registers(config.row_warps),
            enable_fp_fusion=True,
        )  # fmt: skip


def _row_strides(num_rows: int, *tensors: Tensor | None) -> tuple[int, ...]:
    """Distances between rows, 0 where there is one row, whose stride is arbitrary and would compile more variants."""
    return tuple(0 if tensor is None or num_rows == 1 else tensor.stride(0) for tensor in tensors)
