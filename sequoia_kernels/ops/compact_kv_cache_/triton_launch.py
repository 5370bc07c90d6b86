"""Move accepted rows in Triton: all layers, keys and values, and the lengths in one launch. Inputs as in reference.py.

Computes
    row[cache_lens[b] + d] <- row[cache_lens[b] + accepted_nodes[b, d]]  for every cache, request b, d < num_accepted[b]
    and then, if the lengths are to advance, cache_lens[b] += num_accepted[b]

Parallel plan: what one program owns
    `compact_kv_cache_kernel`, grid (column slices, caches, requests): some columns of one request's rows in one cache,
    in all levels. It reads BLOCK_LEVELS rows of its columns, waits for all its threads, and writes them; nobody else
    touches these columns. Longer paths go through in blocks of levels by rising depth. A path increases, so
    accepted_nodes[d] >= d: a block writes only rows below the ones that later blocks read.
    The lengths advance in the same launch. A program reads its length by an atomic add that also counts it, in the
    high bits of the length's own word; the last one to arrive knows that all others have read, and writes the new
    length. The order of arrival decides who writes, never what: results repeat bit for bit. No workspace, and nothing
    to reset between launches.

Memory: bytes read and written
    Reads and writes moved rows * row bytes once; a row that is in place (the root always is) is not touched. Floor:
    Llama-3-8B, 32 layers, 8 accepted rows, 7 of them moved: 0.9 MB read and 0.9 MB written, under 1 us of bandwidth on
    an H200; what counts is the launch, 2 to 4 us.

Numerics
    Words are copied, of 8 bytes, or of 4, 2 or 1 where alignment asks for it; the element type does not matter.

Source
    The commit step of tree decoding; Sequoia (arXiv 2402.12374) gathers into a copy instead.

Compiled for every case of docs/triton_resources.md and run in Triton's interpreter, which cannot show races. Not run on
a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sequoia_kernels.ops import triton_device

from .cache_table import ENTRY_FIELDS, cache_entries, length_bits

# tuning table --------------------------------------------------------------------------------------------------------

# Eight words a thread in flight, and two programs for each cache of a Llama-3-8B. No device has timed this yet.
_NUM_WARPS = 4
_TILE_WORDS = 1024
_MAX_BLOCK_LEVELS = 32
_WORD_BYTES = 8

ENTRY_SIZE = tl.constexpr(len(ENTRY_FIELDS))

# jit helpers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _row_offsets(
    slots,  # [BLOCK_LEVELS]
    is_moved,
    batch,
    block_table_ptr,
    stride_table_batch,
    stride_table_page,
    stride_outer,
    stride_slot,
    PAGE_SIZE: tl.constexpr,
):
    """Byte offsets of cache rows. [BLOCK_LEVELS] int64."""
    if PAGE_SIZE > 0:
        pages = tl.load(
            block_table_ptr + batch * stride_table_batch + (slots // PAGE_SIZE).to(tl.int64) * stride_table_page,
            mask=is_moved,
            other=0,
        )
        return pages.to(tl.int64) * stride_outer + (slots % PAGE_SIZE).to(tl.int64) * stride_slot
    else:
        return batch * stride_outer + slots.to(tl.int64) * stride_slot


@triton.jit
def _move_columns(
    entry_ptr,  # [ENTRY_SIZE] int64
    accepted_nodes_ptr,  # the request's path
    block_table_ptr,
    batch,
    cache_len,
    num_moved,
    max_slots,
    stride_nodes_level,
    stride_table_batch,
    stride_table_page,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_LEVELS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    base = tl.load(entry_ptr)
    stride_outer = tl.load(entry_ptr + 1)
    stride_slot = tl.load(entry_ptr + 2)
    stride_head = tl.load(entry_ptr + 3)
    head_bytes = tl.load(entry_ptr + 5)
    num_columns = (tl.load(entry_ptr + 4) * head_bytes // WORD_BYTES).to(tl.int32)
    columns_per_head = (head_bytes // WORD_BYTES).to(tl.int32)
    first = tl.program_id(0) * BLOCK_COLUMNS
    for first_column in tl.range(first, num_columns, tl.num_programs(0) * BLOCK_COLUMNS):
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        heads = (columns // columns_per_head).to(tl.int64)
        column_offsets = heads * stride_head + (columns % columns_per_head).to(tl.int64) * WORD_BYTES
        for first_level in tl.range(0, num_moved, BLOCK_LEVELS):
            levels = first_level + tl.arange(0, BLOCK_LEVELS)
            nodes = tl.load(
                accepted_nodes_ptr + levels.to(tl.int64) * stride_nodes_level, mask=levels < num_moved, other=0
            )
            # A wrong path must not reach foreign memory.
            is_inside = (nodes >= levels) & (cache_len + nodes < max_slots)
            is_moved = (levels < num_moved) & (nodes != levels) & is_inside
            sources = _row_offsets(
                cache_len + nodes, is_moved, batch, block_table_ptr,
                stride_table_batch, stride_table_page, stride_outer, stride_slot, PAGE_SIZE,
            )  # fmt: skip
            targets = _row_offsets(
                cache_len + levels, is_moved, batch, block_table_ptr,
                stride_table_batch, stride_table_page, stride_outer, stride_slot, PAGE_SIZE,
            )  # fmt: skip
            is_word = is_moved[:, None] & (columns[None, :] < num_columns)
            source_ptrs = (base + sources[:, None] + column_offsets[None, :]).to(tl.pointer_type(WORD))
            target_ptrs = (base + targets[:, None] + column_offsets[None, :]).to(tl.pointer_type(WORD))
            words = tl.load(source_ptrs, mask=is_word, other=0)
            tl.debug_barrier()  # rows overlap: every thread has read before one writes
            tl.store(target_ptrs, words, mask=is_word)


# kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_levels", "max_slots", "stride_table_batch"])
def compact_kv_cache_kernel(
    # inputs
    entries_ptr,  # [num_caches, ENTRY_SIZE] int64 contiguous, columns as in cache_table.ENTRY_FIELDS
    accepted_nodes_ptr,  # [batch, num_levels] int32
    num_accepted_ptr,  # [batch] int32
    block_table_ptr,  # [batch, max_pages] int32, read if paged
    # inputs and outputs; the caches themselves are reached through entries_ptr
    cache_lens_ptr,  # [batch] int32; during the launch, bits from LENGTH_BITS on count the programs that have read it
    # sizes
    num_levels,
    max_slots,
    # strides, in elements
    stride_nodes_batch,
    stride_nodes_level,
    stride_num_accepted,
    stride_cache_lens,
    stride_table_batch,
    stride_table_page,
    # flags
    HAS_CACHES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0 if the caches are not paged
    # blocks
    LENGTH_BITS: tl.constexpr,  # 0 if the lengths do not advance
    BLOCK_LEVELS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    cache = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    num_accepted = tl.load(num_accepted_ptr + batch * stride_num_accepted)
    length_ptr = cache_lens_ptr + batch * stride_cache_lens
    if LENGTH_BITS == 0:
        cache_len = tl.load(length_ptr)
    else:
        # The only read of the length. Relaxed: nothing but this word passes between programs.
        word = tl.atomic_add(length_ptr, 1 << LENGTH_BITS, sem="relaxed")
        cache_len = word & ((1 << LENGTH_BITS) - 1)
        if (word >> LENGTH_BITS) == tl.num_programs(0) * tl.num_programs(1) - 1:
            tl.store(length_ptr, cache_len + num_accepted)

    if HAS_CACHES:
        entry_ptr = entries_ptr + cache.to(tl.int64) * ENTRY_SIZE
        accepted_nodes_ptr += batch * stride_nodes_batch
        num_moved = tl.minimum(num_accepted, num_levels)
        # The widest word that divides base, strides and head bytes divides every address.
        alignment = tl.load(entry_ptr) | tl.load(entry_ptr + 1) | tl.load(entry_ptr + 2) | tl.load(entry_ptr + 3)
        alignment = alignment | tl.load(entry_ptr + 5)
        if alignment % 8 == 0:
            _move_columns(
                entry_ptr, accepted_nodes_ptr, block_table_ptr, batch, cache_len, num_moved, max_slots,
                stride_nodes_level, stride_table_batch, stride_table_page,
                tl.int64, 8, PAGE_SIZE, BLOCK_LEVELS, BLOCK_COLUMNS,
            )  # fmt: skip
        elif alignment % 4 == 0:
            _move_columns(
                entry_ptr, accepted_nodes_ptr, block_table_ptr, batch, cache_len, num_moved, max_slots,
                stride_nodes_level, stride_table_batch, stride_table_page,
                tl.int32, 4, PAGE_SIZE, BLOCK_LEVELS, BLOCK_COLUMNS,
            )  # fmt: skip
        elif alignment % 2 == 0:
            _move_columns(
                entry_ptr, accepted_nodes_ptr, block_table_ptr, batch, cache_len, num_moved, max_slots,
                stride_nodes_level, stride_table_batch, stride_table_page,
                tl.int16, 2, PAGE_SIZE, BLOCK_LEVELS, BLOCK_COLUMNS,
            )  # fmt: skip
        else:
            _move_columns(
                entry_ptr, accepted_nodes_ptr, block_table_ptr, batch, cache_len, num_moved, max_slots,
                stride_nodes_level, stride_table_batch, stride_table_page,
                tl.int8, 1, PAGE_SIZE, BLOCK_LEVELS, BLOCK_COLUMNS,
            )  # fmt: skip


# launch configuration ------------------------------------------------------------------------------------------------


class LaunchConfig(NamedTuple):
    """What the shapes decide about a launch."""

    num_slices: int
    """programs that share the columns of a cache"""
    length_bits: int
    """low bits of a length's word that hold the length, the others count programs"""
    block_levels: int
    block_columns: int


def _launch_config(num_caches: int, num_levels: int, max_row_bytes: int, max_slots: int) -> LaunchConfig | None:
    """Choose the launch, or None if no word of 31 bits can hold both a length and the number of programs."""
    block_levels = min(triton.next_power_of_2(max(num_levels, 1)), _MAX_BLOCK_LEVELS)
    block_columns = min(_TILE_WORDS // block_levels, 256)
    num_slices = min(max(1, triton.cdiv(max_row_bytes, block_columns * _WORD_BYTES)), 65535)
    word = length_bits(num_caches, num_slices, max_slots)
    return None if word is None else LaunchConfig(*word, block_levels, block_columns)


def unavailable() -> str | None:
    """Tell why no Triton kernel can run on this machine, or None."""
    return triton_device.unavailable_reason()


def supports(
    caches: Sequence[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    entries: Tensor | None,
    max_row_bytes: int,
    max_slots: int,
    advance: bool,
) -> str | None:
    """Whether the kernel can run this call."""
    if max(len(caches), accepted_nodes.shape[0]) > 65535:
        return "takes up to 65535 caches and requests"
    config = _launch_config(len(caches), accepted_nodes.shape[1], max_row_bytes, max_slots)
    if config is None:
        return "takes up to 2**30 slots times caches"
    if entries is None and cache_lens.is_cuda and torch.cuda.is_current_stream_capturing():
        return "needs a CacheTable while a CUDA graph is captured"
    return triton_device.device_reason(cache_lens.device)


def run(
    caches: Sequence[Tensor],
    accepted_nodes: Tensor,
    num_accepted: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    entries: Tensor | None,
    max_row_bytes: int,
    max_slots: int,
    advance: bool,
) -> None:
    """Move the rows and advance the lengths, in one launch."""
    batch_size, num_levels = accepted_nodes.shape
    if batch_size == 0 or num_levels == 0:
        return
    config = _launch_config(len(caches), num_levels, max_row_bytes, max_slots)
    if config is None:
        raise ValueError("compact_kv_cache_: caches must have up to 2**30 slots times caches; see supports()")
    if entries is None:
        entries = cache_entries(caches, paged=block_table is not None)
    paged = block_table is not None and len(caches) > 0
    with triton_device.launching_on(cache_lens.device):
        compact_kv_cache_kernel[(config.num_slices, max(len(caches), 1), batch_size)](
            entries, accepted_nodes, num_accepted, block_table if paged else None,
            cache_lens,
            num_levels, max_slots,
            accepted_nodes.stride(0), accepted_nodes.stride(1), num_accepted.stride(0), cache_lens.stride(0),
            block_table.stride(0) if block_table is not None else 0,
            block_table.stride(1) if block_table is not None else 0,
            HAS_CACHES=len(caches) > 0,
            PAGE_SIZE=caches[0].shape[1] if paged else 0,
            LENGTH_BITS=config.length_bits if advance else 0,
            BLOCK_LEVELS=config.block_levels,
            BLOCK_COLUMNS=config.block_columns,
            num_warps=_NUM_WARPS,
            maxnreg=255,
            enable_fp_fusion=True,
        )  # fmt: skip
