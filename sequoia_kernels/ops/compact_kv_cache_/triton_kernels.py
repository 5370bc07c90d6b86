"""The kernel of compact_kv_cache_; triton_launch.py tells what it computes."""

from __future__ import annotations

import triton
import triton.language as tl

from .cache_table import ENTRY_FIELDS

__all__ = ["compact_kv_cache_kernel"]

ENTRY_SIZE = tl.constexpr(len(ENTRY_FIELDS))
BASE = tl.constexpr(ENTRY_FIELDS.index("base"))
STRIDE_OUTER = tl.constexpr(ENTRY_FIELDS.index("stride_outer"))
STRIDE_SLOT = tl.constexpr(ENTRY_FIELDS.index("stride_slot"))
STRIDE_HEAD = tl.constexpr(ENTRY_FIELDS.index("stride_head"))
NUM_HEADS = tl.constexpr(ENTRY_FIELDS.index("num_heads"))
HEAD_BYTES = tl.constexpr(ENTRY_FIELDS.index("head_bytes"))

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
    base = tl.load(entry_ptr + BASE)
    stride_outer = tl.load(entry_ptr + STRIDE_OUTER)
    stride_slot = tl.load(entry_ptr + STRIDE_SLOT)
    stride_head = tl.load(entry_ptr + STRIDE_HEAD)
    head_bytes = tl.load(entry_ptr + HEAD_BYTES)
    num_columns = (tl.load(entry_ptr + NUM_HEADS) * head_bytes // WORD_BYTES).to(tl.int32)
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
        alignment = tl.load(entry_ptr + BASE) | tl.load(entry_ptr + STRIDE_OUTER) | tl.load(entry_ptr + STRIDE_SLOT)
        alignment = alignment | tl.load(entry_ptr + STRIDE_HEAD) | tl.load(entry_ptr + HEAD_BYTES)
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
