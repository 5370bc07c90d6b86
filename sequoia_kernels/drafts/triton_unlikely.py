"""A draft's unlikely tokens behind the others, in Triton; `unlikely.py` has the rule and is its specification.

Computes
    below(n) = sum of exp((logit - peak) / T) over the logits below peak - n T ln 2, for n in 1 .. 32; the smallest n
    for which below(n) is at most (1 - top_p) / 2 of the sum over all; a row whose logits below that bound are lowered.

Parallel plan: what one program owns
    A chunk of a row, in three launches: `chunk_peaks_kernel`, its largest logit; `sums_below_kernel`, its 32 sums,
    relative to the peak of the row; `set_back_kernel`, which adds the chunks' sums up, finds the bound and writes the
    chunk. The bounds are those of the row's own peak, so the sums need it first: the peaks of two chunks differ by no
    whole number of halvings. Rows at temperature 0 or top_p 1 end the first two launches at once and are copied by the
    third. Nothing waits for the device, and shapes are fixed: a step can be captured.

Memory: bytes read and written
    Reads the logits three times and writes them once; 16 rows of 32000 in bfloat16 are 4.1 MB, all of it in L2. Beside
    them 136 bytes a chunk of 2048 or 4096 logits.

Numerics
    float32. Bounds, comparisons and lowered logits take the specification's steps, without fused multiply-adds, so that
    a row is changed as the specification changes it unless a sum is within rounding of the limit. The order of every
    sum is fixed by the vocabulary: results repeat bit for bit, and do not depend on the other rows.
    A logit takes 32 comparisons, selections and sums, and a part of what the 32 sums of all lanes take: 136
    instructions in the sm_90 code, 116 in that for more than 65536 tokens. At full issue rate of 132 multiprocessors of
    1.7 GHz that is 2.4 us for 16 x 32000. So a level takes about 10 us by estimate: three launches of 2 us, 1 us of
    reads and writes, the sums. Seven levels are 0.07 ms, 1.0 % of a captured 7B/68M step of 7 ms; of 151936 tokens they
    would be 0.15 ms. Not measured, and not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sequoia_kernels.drafts import triton_rows
from sequoia_kernels.ops import triton_device, triton_warping

__all__ = ["run", "supports"]

LN_2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)

# tuning table --------------------------------------------------------------------------------------------------------

# Chosen by compiling (no spills) and by counting; not tuned on a device.
_LANES = 256
"""logits of a tile: a thread has one of them, and its 32 sums in registers"""
_NUM_WARPS = 8


# jit helpers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _finite(logits):  # fp32
    """As `Tensor.nan_to_num`."""
    return tl.minimum(tl.maximum(tl.where(logits == logits, logits, 0.0), -LARGEST), LARGEST)


@triton.jit
def _settings(temperature_ptr, top_p_ptr, request, stride_temperature, stride_top_p):
    """A request's temperature and top_p, and whether its rows are changed."""
    temperature = tl.load(temperature_ptr + request * stride_temperature)
    top_p = tl.load(top_p_ptr + request * stride_top_p)
    return temperature, top_p, (temperature > 0.0) & (top_p < 1.0)


@triton.jit
def _row_peak(peaks_ptr, num_chunks, BLOCK_CHUNKS: tl.constexpr):
    chunks = tl.arange(0, BLOCK_CHUNKS)
    return tl.max(tl.load(peaks_ptr + chunks, mask=chunks < num_chunks, other=-LARGEST), 0)


# kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def chunk_peaks_kernel(
    # inputs
    logits_ptr,  # [B, width, vocab] fp32, bf16, fp16
    temperature_ptr,  # [B] fp32
    top_p_ptr,  # [B] fp32
    # outputs
    peaks_ptr,  # [B * width, num_chunks] fp32 contiguous; not written for rows that are left
    # sizes
    width,
    vocab,
    # strides, in elements
    stride_logits_request,
    stride_logits_row,
    stride_logits_token,
    stride_temperature,
    stride_top_p,
    # blocks
    CHUNK: tl.constexpr,
):
    row, request, row_ptr = triton_rows.program_row(logits_ptr, width, stride_logits_request, stride_logits_row)
    is_changed = _settings(temperature_ptr, top_p_ptr, request, stride_temperature, stride_top_p)[2]
    if is_changed:
        chunk = tl.program_id(1)
        logits = triton_rows.read_chunk(row_ptr, chunk, vocab, stride_logits_token, CHUNK)[1]
        tl.store(peaks_ptr + row * tl.num_programs(1) + chunk, tl.max(_finite(logits.to(tl.float32)), 0))


@triton.jit
def sums_below_kernel(
    # inputs
    logits_ptr,  # [B, width, vocab] fp32, bf16, fp16
    temperature_ptr,  # [B] fp32
    top_p_ptr,  # [B] fp32
    peaks_ptr,  # [B * width, num_chunks] fp32 contiguous
    # outputs, not written for rows that are left
    sums_ptr,  # [B * width, num_chunks, CUTS] fp32 contiguous
    masses_ptr,  # [B * width, num_chunks] fp32 contiguous
    # sizes
    width,
    vocab,
    # strides, in elements
    stride_logits_request,
    stride_logits_row,
    stride_logits_token,
    stride_temperature,
    stride_top_p,
    # blocks
    CUTS: tl.constexpr,
    TILES: tl.constexpr,  # of a chunk
    LANES: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
):
    row, request, row_ptr = triton_rows.program_row(logits_ptr, width, stride_logits_request, stride_logits_row)
    temperature, _, is_changed = _settings(temperature_ptr, top_p_ptr, request, stride_temperature, stride_top_p)
    if is_changed:
        chunk = tl.program_id(1)
        num_chunks = tl.num_programs(1)
        peak = _row_peak(peaks_ptr + row * num_chunks, num_chunks, BLOCK_CHUNKS)
        scale = triton_warping.exponent_scale(temperature)
        halvings = tl.arange(0, CUTS)
        cuts = peak - (halvings + 1).to(tl.float32) * (temperature * LN_2)
        sums = tl.zeros([CUTS, LANES], tl.float32)
        mass = tl.zeros([LANES], tl.float32)
        for tile in range(TILES):
            tokens, logits = triton_rows.read_chunk(row_ptr, chunk * TILES + tile, vocab, stride_logits_token, LANES)
            logits = _finite(logits.to(tl.float32))
            # Bounded, so that no scale makes it overflow.
            weights = tl.where(tokens < vocab, tl.exp2(tl.maximum(logits - peak, -1e30) * scale), 0.0)
            mass += weights
            sums += tl.where(logits[None, :] < cuts[:, None], weights[None, :], 0.0)
        record = row * num_chunks + chunk
        tl.store(sums_ptr + record * CUTS + halvings, tl.sum(sums, 1))
        tl.store(masses_ptr + record, tl.sum(mass, 0))


@triton.jit
def set_back_kernel(
    # inputs
    logits_ptr,  # [B, width, vocab] fp32, bf16, fp16
    temperature_ptr,  # [B] fp32
    top_p_ptr,  # [B] fp32
    peaks_ptr,  # [B * width, num_chunks] fp32 contiguous
    sums_ptr,  # [B * width, num_chunks, CUTS] fp32 contiguous
    masses_ptr,  # [B * width, num_chunks] fp32 contiguous
    # outputs
    changed_ptr,  # [B * width, vocab], contiguous, the dtype of the logits
    # sizes
    width,
    vocab,
    # strides, in elements
    stride_logits_request,
    stride_logits_row,
    stride_logits_token,
    stride_temperature,
    stride_top_p,
    # numbers
    behind,  # temperatures by which a logit is lowered
    lowest,  # number of the logits' dtype
    # blocks
    CUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
):
    row, request, row_ptr = triton_rows.program_row(logits_ptr, width, stride_logits_request, stride_logits_row)
    temperature, top_p, is_changed = _settings(temperature_ptr, top_p_ptr, request, stride_temperature, stride_top_p)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    tokens, changed = triton_rows.read_chunk(row_ptr, tl.program_id(1), vocab, stride_logits_token, CHUNK)
    if is_changed:
        num_chunks = tl.num_programs(1)
        peak = _row_peak(peaks_ptr + row * num_chunks, num_chunks, BLOCK_CHUNKS)
        chunks = tl.arange(0, BLOCK_CHUNKS)
        halvings = tl.arange(0, CUTS)
        records = row * num_chunks + chunks
        mass = tl.sum(tl.load(masses_ptr + records, mask=chunks < num_chunks, other=0.0), 0)
        sums = tl.load(
            sums_ptr + records[:, None] * CUTS + halvings[None, :], mask=chunks[:, None] < num_chunks, other=0.0
        )
        fits = tl.sum(sums, 0) <= mass * ((1.0 - top_p) * 0.5)
        first = tl.min(tl.where(fits, halvings + 1, CUTS), 0)
        cut = peak - first.to(tl.float32) * (temperature * LN_2)
        logits = changed.to(tl.float32)
        lowered = triton_device.rounded(tl.maximum(logits - temperature * behind, lowest), dtype).to(dtype)
        changed = tl.where((logits < cut) & (logits > float("-inf")), lowered, changed)
    tl.store(changed_ptr + row * vocab + tokens, changed, mask=tokens < vocab)


# launches ------------------------------------------------------------------------------------------------------------


def _tiles(vocab: int) -> int:
    """Tiles of a chunk: by the vocabulary alone, so that a row's sums do not depend on the other rows."""
    return 8 if vocab <= 65536 else 16


def supports(logits: torch.Tensor) -> bool:
    """Whether the kernels take a draft's logits."""
    in_float32 = logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return in_float32 and triton_device.device_reason(logits.device) is None


def run(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, behind: float, num_cuts: int
) -> torch.Tensor:
    """Give the changed logits; arguments as of `set_back_unlikely`.

    Args:
        logits: [B, W, vocab], strided at will.
        temperature: [B] float32.
        top_p: [B] float32.
        behind: temperatures by which an unlikely logit is lowered.
        num_cuts: bounds that are tried, a power of 2.

    Returns:
        [B, W, vocab], contiguous.
    """
    batch_size, width, vocab = logits.shape
    changed = logits.new_empty(logits.shape)
    if not changed.numel():
        return changed
    tiles = _tiles(vocab)
    chunk = tiles * _LANES
    num_rows, num_chunks = batch_size * width, triton.cdiv(vocab, chunk)
    peaks, masses = logits.new_empty(2, num_rows, num_chunks, dtype=torch.float32).unbind()
    sums = logits.new_empty(num_rows, num_chunks, num_cuts, dtype=torch.float32)
    inputs, sizes = (logits, temperature, top_p), (width, vocab)
    strides = (*logits.stride(), temperature.stride(0), top_p.stride(0))
    blocks = {"BLOCK_CHUNKS": triton.next_power_of_2(num_chunks), "num_warps": _NUM_WARPS, "enable_fp_fusion": False}
    grid = (num_rows, num_chunks)
    with triton_device.launching_on(logits.device):
        chunk_peaks_kernel[grid](*inputs, peaks, *sizes, *strides, CHUNK=chunk, num_warps=_NUM_WARPS)
        sums_below_kernel[grid](
            *inputs, peaks, sums, masses, *sizes, *strides, CUTS=num_cuts, TILES=tiles, LANES=_LANES, **blocks
        )
        set_back_kernel[grid](
            *inputs, peaks, sums, masses, changed, *sizes, *strides, behind, torch.finfo(logits.dtype).min,
            CUTS=num_cuts, CHUNK=chunk, **blocks,
        )  # fmt: skip
    return changed
