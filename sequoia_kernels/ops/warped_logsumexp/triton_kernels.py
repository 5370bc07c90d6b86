"""The kernels of warped_logsumexp, in the order of their launch; triton_launch.py tells what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_warping

__all__ = ["collect_rows_kernel", "row_chunks_kernel", "warp_rows_kernel"]

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
    group_peaks_ptr,  # [num_rows, num_chunks, CHUNK // GROUP] fp32 contiguous, written if CUT
    num_collected_ptr,  # [num_rows] int32 contiguous, set to 0 if CUT
    # sizes
    vocab,
    num_chunks,
    # strides, in elements
    stride_logits_row,
    stride_temperature_row,
    # flags
    CUT: tl.constexpr,
    # blocks
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
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
    if CUT:
        groups = record * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        tl.store(group_peaks_ptr + groups, triton_warping.group_peaks(logits, CHUNK, GROUP))
        if chunk == 0:
            tl.store(num_collected_ptr + row, 0)


@triton.jit(do_not_specialize=["num_chunks"])
def collect_rows_kernel(
    # inputs
    logits_ptr,  # [num_rows, vocab] fp32, bf16, fp16
    temperature_ptr,  # [num_rows] fp32
    top_k_ptr,  # [num_rows] int32, read if HAS_TOP_K
    top_p_ptr,  # [num_rows] fp32, read if HAS_TOP_P
    peaks_ptr,  # [num_rows, num_chunks] fp32 contiguous
    masses_ptr,  # [num_rows, num_chunks] fp32 contiguous
    group_peaks_ptr,  # [num_rows, num_chunks, CHUNK // GROUP] fp32 contiguous
    # outputs
    num_collected_ptr,  # [num_rows] int32 contiguous, 0 before
    scratch_ptr,  # [num_rows, CANDIDATES] fp32 contiguous
    # sizes
    vocab,
    num_chunks,
    # strides, in elements
    stride_logits_row,
    stride_temperature_row,
    stride_top_k_row,
    stride_top_p_row,
    # flags
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    # blocks
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    temperature = tl.load(temperature_ptr + row * stride_temperature_row)
    if temperature == 0.0:
        return
    scale = triton_warping.exponent_scale(temperature)
    peak, mass = triton_warping.row_numbers(peaks_ptr, masses_ptr, row, num_chunks, scale, BLOCK_CHUNKS)
    top_k, top_p = triton_warping.row_cuts(
        top_k_ptr, top_p_ptr, row, stride_top_k_row, stride_top_p_row, HAS_TOP_K, HAS_TOP_P
    )
    num_groups = num_chunks * (CHUNK // GROUP)
    triton_warping.collect_candidates(
        logits_ptr + row * stride_logits_row, group_peaks_ptr + row * num_groups, num_collected_ptr + row,
        scratch_ptr + row * CANDIDATES, chunk, vocab, num_groups, peak, mass, scale, top_k, top_p,
        BLOCK_CHUNKS * (CHUNK // GROUP), CHUNK, CANDIDATES,
    )  # fmt: skip


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
    num_collected_ptr,  # [num_rows] int32 contiguous, read if HAS_TOP_K or HAS_TOP_P
    # outputs
    log_normaliser_ptr,  # [num_rows] fp32
    cut_ptr,  # [num_rows] fp32
    scratch_ptr,  # [num_rows, CANDIDATES] fp32 contiguous, read and written if HAS_TOP_K or HAS_TOP_P
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
    peak, mass = triton_warping.row_numbers(peaks_ptr, masses_ptr, row, num_chunks, scale, BLOCK_CHUNKS)
    log_normaliser = peak
    cut = peak
    if temperature != 0.0:
        chunks = tl.arange(0, BLOCK_CHUNKS)
        lowest_ptrs = lowest_ptr + row * num_chunks + chunks
        cut = tl.min(tl.load(lowest_ptrs, mask=chunks < num_chunks, other=float("inf")), 0)
        if HAS_TOP_K or HAS_TOP_P:
            top_k, top_p = triton_warping.row_cuts(
                top_k_ptr, top_p_ptr, row, stride_top_k_row, stride_top_p_row, HAS_TOP_K, HAS_TOP_P
            )
            cut, mass = triton_warping.find_cut(
                logits_ptr + row * stride_logits_row, scratch_ptr + row * CANDIDATES, tl.load(num_collected_ptr + row),
                vocab, peak, cut, mass, temperature, scale, top_k, top_p, TILE, CANDIDATES,
            )  # fmt: skip
        log_normaliser = tl.div_rn(peak, temperature) + tl.log(mass)
    tl.store(log_normaliser_ptr + row * stride_log_normaliser_row, log_normaliser)
    tl.store(cut_ptr + row * stride_cut_row, cut)
