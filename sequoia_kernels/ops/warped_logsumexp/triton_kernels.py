"""The kernels of warped_logsumexp, in the order of their launch; triton_launch.py tells what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_warping

__all__ = ["row_chunks_kernel", "warp_rows_kernel"]

# kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_chunks"])
def row_chunks_kernel(
    # inputs
    logits_ptr,  # [num_rows, vocab] fp32, bf16, fp16
    temperature_ptr,  # [num_rows] fp32
    # outputs
    peaks_ptr,  # [num_rows, num_chunks] fp32 contiguous
    masses_ptr,  # [num_rows, num_chunks] fp32 contiguous
    lowest_ptr,  # [num_rows, num_chunks] fp32 contiguous
    # sizes
    vocab,
    num_chunks,
    # strides, in elements
    stride_logits_row,
    stride_temperature_row,
    # blocks
    CHUNK: tl.constexpr,
):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * stride_logits_row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    scale = triton_warping.exponent_scale(tl.load(temperature_ptr + row * stride_temperature_row))
    peak, mass = triton_warping.peak_and_mass(logits, scale)
    record = row * num_chunks + chunk
    tl.store(peaks_ptr + record, peak)
    tl.store(masses_ptr + record, mass)
    tl.store(lowest_ptr + record, tl.min(tl.where(ids < vocab, logits, float("inf")), 0))


@triton.jit(do_not_specialize=["num_chunks"])
def warp_rows_kernel(
    # inputs
    logits_ptr,  # [num_rows, vocab] fp32, bf16, fp16
    temperature_ptr,  # [num_rows] fp32
    top_k_ptr,  # [num_rows] int32, read if HAS_TOP_K
    top_p_ptr,  # [num_rows] fp32, read if HAS_TOP_P
    peaks_ptr,  # [num_rows, num_chunks] fp32 contiguous
    masses_ptr,  # [num_rows, num_chunks] fp32 contiguous
    lowest_ptr,  # [num_rows, num_chunks] fp32 contiguous
    # outputs
    log_normaliser_ptr,  # [num_rows] fp32
    cut_ptr,  # [num_rows] fp32
    scratch_ptr,  # [num_rows, CANDIDATES] fp32 contiguous, used if HAS_TOP_K or HAS_TOP_P
    # sizes
    vocab,
    num_chunks,
    # strides, in elements
    stride_logits_row,
    stride_temperature_row,
    stride_top_k_row,
    stride_top_p_row,
    stride_log_normaliser_row,
    stride_cut_row,
    # flags
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    # blocks
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * stride_temperature_row)
    scale = triton_warping.exponent_scale(temperature)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    is_chunk = chunks < num_chunks
    records = row * num_chunks + chunks
    peak, mass = triton_warping.merged_peak_and_mass(
        tl.load(peaks_ptr + records, mask=is_chunk, other=float("-inf")),
        tl.load(masses_ptr + records, mask=is_chunk, other=0.0),
        scale,
    )
    log_normaliser = peak
    cut = peak
    if temperature != 0.0:
        cut = tl.min(tl.load(lowest_ptr + records, mask=is_chunk, other=float("inf")), 0)
        if HAS_TOP_K or HAS_TOP_P:
            top_k = 0
            top_p = 1.0
            if HAS_TOP_K:
                top_k = tl.load(top_k_ptr + row * stride_top_k_row)
            if HAS_TOP_P:
                top_p = tl.load(top_p_ptr + row * stride_top_p_row)
            cut, mass = triton_warping.find_cut(
                logits_ptr + row * stride_logits_row, scratch_ptr + row * CANDIDATES,
                vocab, peak, cut, mass, temperature, scale, top_k, top_p, TILE, CANDIDATES,
            )  # fmt: skip
        log_normaliser = tl.div_rn(peak, temperature) + tl.log(mass)
    tl.store(log_normaliser_ptr + row * stride_log_normaliser_row, log_normaliser)
    tl.store(cut_ptr + row * stride_cut_row, cut)
