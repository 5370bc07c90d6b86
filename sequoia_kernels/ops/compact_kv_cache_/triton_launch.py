"""compact_kv_cache_ in Triton: all layers, keys and values, and the lengths in one launch. Inputs as in op.py.

The kernel is in triton_kernels.py; here it is configured and launched.

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

Compiled for every case of docs/triton_resources.md, run in Triton's interpreter, which cannot show races, and by its
tests on an H100. Not timed there by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from sequoia_kernels.ops import triton_device

from .cache_table import length_bits
from .op import CompactInputs
from .triton_kernels import compact_kv_cache_kernel

__all__ = ["LaunchConfig", "run", "supports", "unavailable"]

# tuning table --------------------------------------------------------------------------------------------------------

# Eight words a thread in flight, and two programs for each cache of a Llama-3-8B. Not tuned on a device.
_NUM_WARPS = 4
_TILE_WORDS = 1024
_MAX_BLOCK_LEVELS = 32
_WORD_BYTES = 8


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


unavailable = triton_device.unavailable_reason


def supports(inputs: CompactInputs) -> str | None:
    """Whether the kernel can run this call."""
    num_caches, (batch_size, num_levels) = len(inputs.caches), inputs.accepted_nodes.shape
    if max(num_caches, batch_size) > 65535:
        return "takes up to 65535 caches and requests"
    if _launch_config(num_caches, num_levels, inputs.max_row_bytes, inputs.max_slots) is None:
        return "takes up to 2**30 slots times caches"
    if inputs.entries is None and inputs.cache_lens.is_cuda and torch.cuda.is_current_stream_capturing():
        return "needs a CacheTable while a CUDA graph is captured"
    return triton_device.device_reason(inputs.cache_lens.device)


def run(inputs: CompactInputs, outputs: None = None) -> None:
    """Move the rows and advance the lengths, in one launch."""
    accepted_nodes, num_accepted, cache_lens = inputs[1:4]
    num_caches, (batch_size, num_levels) = len(inputs.caches), accepted_nodes.shape
    if batch_size == 0 or num_levels == 0:
        return
    config = _launch_config(num_caches, num_levels, inputs.max_row_bytes, inputs.max_slots)
    assert config is not None  # supports() has asked
    with triton_device.launching_on(cache_lens.device):
        compact_kv_cache_kernel[(config.num_slices, max(num_caches, 1), batch_size)](
            inputs.table(), accepted_nodes, num_accepted, inputs.block_table if inputs.page_size else None,
            cache_lens,
            num_levels, inputs.max_slots,
            *accepted_nodes.stride(), num_accepted.stride(0), cache_lens.stride(0), *inputs.table_strides,
            HAS_CACHES=num_caches > 0,
            PAGE_SIZE=inputs.page_size,
            LENGTH_BITS=config.length_bits if inputs.advance else 0,
            BLOCK_LEVELS=config.block_levels,
            BLOCK_COLUMNS=config.block_columns,
            num_warps=_NUM_WARPS,
            maxnreg=255,
            enable_fp_fusion=True,
        )  # fmt: skip
