"""Rows of a draft's logits inside Triton kernels: what sets tokens back and what shapes trees read them alike."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["program_row", "read_chunk"]


@triton.jit
def program_row(
    logits_ptr,  # [B, width, vocab]
    width,
    stride_logits_request,
    stride_logits_row,
):
    """The row of a program whose first number counts rows: among all rows, its request, and where its logits begin."""
    row = tl.program_id(0).to(tl.int64)
    request = row // width
    return row, request, logits_ptr + request * stride_logits_request + (row % width) * stride_logits_row


@triton.jit
def read_chunk(row_ptr, chunk, vocab, stride_logits_token, CHUNK: tl.constexpr):
    """The tokens of a chunk of a row, int64 [CHUNK], and their logits, -inf behind the vocabulary."""
    tokens = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    return tokens, tl.load(row_ptr + tokens * stride_logits_token, mask=tokens < vocab, other=float("-inf"))
