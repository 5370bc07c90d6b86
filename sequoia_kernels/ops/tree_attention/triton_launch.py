"""tree_attention in Triton: split-KV flash attention under a packed ancestor mask. Inputs and outputs as in op.py.

The kernels are in triton_kernels.py; here they are configured and launched.

Computes
    out[b, i, h] = sum over visible slots s of softmax_s(score(q[b, i, h], k[b, s, h // group])) v[b, s, h // group]
    where score = scale * q.k, soft-capped if asked. Row i sees the committed prefix s < cache_lens[b] and the tree
    slots s = cache_lens[b] + j whose bit j is set in its mask. A sliding window hides what lies `window` or more
    positions back; the position of a row is cache_lens[b] + popcount(mask row) - 1. Set bits stand in depth order, so
    the window comes down to one number a row, the first visible slot, found once per program.

Parallel plan: what one program owns
    `tree_attention_kernel`, grid (row blocks * splits, kv heads, batch): BLOCK_ROWS query rows of one kv head against
    one split of the slots. Rows are packed over nodes x group (row r is node r // group, head r % group), so a key or
    value tile is read once for all heads that share it. The slots that a row block can see, prefix and tree, are one
    stretch of the cache. Its tiles are dealt evenly to the splits; the last split holds the tree. Tiles inside every
    row's visible prefix need no mask and have a loop of their own, the others go through a second loop in smaller
    tiles, since mask bits take registers. The number of splits comes from shapes alone and the borders between them
    from the lengths on the device, so one captured graph serves every length.
    `merge_splits_kernel`, grid (row blocks, kv heads, batch): adds the partial results, weighted by their log-sum-exp,
    in the order of the splits. A single split writes the output itself. No atomics: results repeat bit for bit.

Memory: bytes read and written
    Reads the visible keys and values once per row block (from L2 after the first) and q once per split; with more than
    one split, writes and reads back rows * splits * (Dv + 1) float32. Floor: visible slots * kv heads * (D + Dv) *
    itemsize bytes a request at copy bandwidth, or 2 * nodes * heads * visible slots * (D + Dv) operations at the matrix
    rate, whichever takes longer. H200 (4.3 TB/s, 788 TFLOP/s bf16), Llama-3-8B heads, 8k context: 33.5 MB, 7.8 us a
    layer for up to 46 nodes; from there on arithmetic takes longer (64 nodes: 8.6 GFLOP, 10.9 us).
    Estimate for 16 nodes behind 8k there: first loads 2 us (lengths, masks, then the first tiles), the bytes 7.8, what
    the last programs end with 0.5, the merge 2.5 (a launch, 8.7 MB from L2): 12.8 us, 61 % of the bandwidth; for 64
    nodes arithmetic takes 10.9 us and all 16, 49 %. So 80 % is out of reach with these parts.
    The merge stays a launch. In the last program of a row block to arrive it would read all splits by one
    multiprocessor, some 64 bytes a cycle: 16 nodes in 33 splits are 1.06 MB, 9.7 us; 64 nodes in 8 splits 0.5 MB, 4.7
    us; a single node 67 KB, 0.6 us, and with fences and a counter no less than the 1.8 us that an H100 took for the
    launch (2.7 for 128 nodes, docs/gpu.md). Programs that wait for each other and share the merge out would take about
    1 us less, but must all be on the device at once.

Numerics
    Scores, softmax and sums in float32, exponentials in base 2 with the scale folded in. float16 and bfloat16 products
    accumulate in float32, and probabilities are rounded to that type for the second product. float32 products are exact
    float32 (input_precision "ieee", never tf32). float8 keys and values become q's type in registers, which is exact,
    and their scales multiply scores and output in float32. Devices older than compute capability 8.9 have no float8
    conversion; there the bits are shifted into float16, and a float8 NaN becomes 480. Rows that see nothing give 0 and
    -inf. Slots that no row of a block sees may hold anything, NaN included.

Source
    Split and merge: flash-decoding (Dao, Haziza, Massa, Sizov 2023). Inner loop: FlashAttention-2 (arXiv 2307.08691).
    Tree mask: SpecInfer (arXiv 2305.09781), here packed and kept to the tree's own columns. Deviation: the tail of the
    prefix and the tree share tiles instead of having a tile each, so the mask is cut at any bit.

Compiled for every case of docs/triton_resources.md, run in Triton's interpreter and on an H100. There, with other work
on it, 8192 committed slots of Llama-3-8B heads took 24.8 us for 16 nodes, 38.7 for 64 and 106 for 256: 45, 30 and 12 %
of the copy bandwidth (`bench/results/nvidia-h100-80gb-hbm3/tree_attention.json`), so there is room.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sequoia_kernels.ops import triton_device

from .op import TreeAttentionInputs, TreeAttentionOutput
from .triton_kernels import merge_splits_kernel, tree_attention_kernel

# tuning table --------------------------------------------------------------------------------------------------------


class TileShape(NamedTuple):
    """How one program walks the slots."""

    block_slots: int
    """slots of a tile without a mask"""
    masked_slots: int
    """slots of a tile with a mask; divides block_slots"""
    num_warps: int
    num_stages: int
    """software-pipelining depth of the loop without masks"""
    masked_stages: int
    programs_per_sm: int
    """programs that run on a multiprocessor at a time; the number of splits is chosen to fill them"""


# Chosen by compiling (no spills, shared memory within the device's, docs/triton_resources.md) and by reasoning: enough
# bytes in flight for few rows, enough warps for many. Not tuned on a device; bench/tools/tune_tree_attention.py does.
# family -> (block_rows, padded head dim) -> tile, by rising block_rows. "fp32" serves float32 on every device.
_TILES: dict[str, dict[tuple[int, int], TileShape]] = {
    "sm_80": {
        (16, 64): TileShape(128, 64, 4, 3, 3, 2),
        (32, 64): TileShape(128, 64, 4, 3, 3, 2),
        (64, 64): TileShape(64, 32, 4, 3, 2, 2),
        (128, 64): TileShape(64, 32, 4, 3, 2, 1),
        (16, 128): TileShape(64, 64, 4, 3, 3, 2),
        (32, 128): TileShape(64, 32, 4, 3, 3, 2),
        (64, 128): TileShape(64, 32, 4, 3, 2, 1),
        (128, 128): TileShape(32, 32, 8, 4, 2, 1),
        (16, 256): TileShape(32, 32, 4, 3, 2, 1),
        (32, 256): TileShape(32, 32, 8, 2, 2, 1),
        (64, 256): TileShape(32, 32, 8, 2, 2, 1),
    },
    "sm_90": {
        (16, 64): TileShape(128, 64, 4, 3, 3, 2),
        (32, 64): TileShape(128, 64, 4, 3, 3, 2),
        (64, 64): TileShape(128, 64, 4, 3, 2, 2),
        (128, 64): TileShape(128, 64, 8, 3, 2, 1),
        (16, 128): TileShape(64, 64, 4, 3, 3, 2),
        (32, 128): TileShape(64, 32, 4, 3, 3, 2),
        (64, 128): TileShape(64, 32, 4, 3, 2, 2),
        (128, 128): TileShape(128, 32, 8, 2, 2, 1),
        (16, 256): TileShape(32, 32, 4, 3, 2, 1),
        (32, 256): TileShape(32, 32, 8, 2, 2, 1),
        (64, 256): TileShape(64, 32, 8, 2, 2, 1),
        (128, 256): TileShape(64, 32, 8, 2, 1, 1),
    },
    "fp32": {
        (16, 64): TileShape(32, 32, 4, 2, 1, 2),
        (32, 64): TileShape(32, 32, 4, 2, 1, 2),
        (16, 128): TileShape(32, 32, 4, 2, 1, 2),
        (32, 128): TileShape(32, 32, 8, 2, 1, 2),
        (16, 256): TileShape(32, 32, 8, 2, 1, 1),
    },
}

_TILES["sm_100"] = {**_TILES["sm_90"], (128, 256): TileShape(64, 32, 8, 2, 2, 1)}

MAX_SPLITS = 128
_LOG2_E = 1.4426950408889634


# launch configuration ------------------------------------------------------------------------------------------------


class LaunchConfig(NamedTuple):
    """Everything about a launch that the device and the shapes decide."""

    block_rows: int
    tile: TileShape
    num_splits: int
    dim_chunk: int
    """head dims that one product of the scores takes; the padded head dim except for float32"""
    merge_rows: int
    merge_chunk: int
    """partial results whose loads a program of the merge has in flight"""


def _padded_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _dim_chunk(block_dim: int, item_bytes: int) -> int:
    """Exact float32 products keep both operands in registers, so they take a few dims at a time."""
    return min(32, block_dim) if item_bytes == 4 else block_dim


def shared_bytes(
    block_rows: int,
    tile: TileShape,
    block_dim: int,
    block_value_dim: int,
    item_bytes: int,
    cache_item_bytes: int,
    paged: bool,
    capability: int,
) -> int:
    """An upper bound of the shared memory that one program needs. The compile report holds it against the compiler."""
    result = block_rows * block_value_dim * 4  # on its way to memory
    if item_bytes == 4:  # a chunk of dims at a time, nothing in flight
        dim_chunk = _dim_chunk(block_dim, item_bytes)
        operands = (block_rows + tile.block_slots) * dim_chunk + tile.block_slots * (block_rows + block_value_dim)
        return max(operands * item_bytes, result) + 1024  # for reductions and scans between its warps
    converts = cache_item_bytes != item_bytes
    # From 64 rows on, Hopper and Blackwell multiply out of shared memory, and a tile's buffer is busy one turn longer.
    busy = 0 if capability >= 90 and block_rows >= 64 and not converts else 1

    def buffers(num_stages: int) -> int:
        return max(num_stages - busy, 1)

    slot_bytes = (block_dim + block_value_dim) * cache_item_bytes
    inner = buffers(tile.num_stages) * tile.block_slots * slot_bytes
    inner += tile.block_slots * (block_dim + block_value_dim) * item_bytes if converts else 0
    edge = buffers(tile.masked_stages) * tile.masked_slots * slot_bytes
    edge += tile.masked_slots * (block_value_dim + (block_dim if converts else 0)) * item_bytes
    words = tile.masked_stages * (tile.masked_slots // 32 + 1) * 2 * block_rows * 4
    pages = 2 * (tile.num_stages - 1) * tile.block_slots * 4 if paged else 0  # page ids, for keys and for values
    barriers = 1024 if capability >= 100 else 0
    query = block_rows * block_dim * item_bytes
    probabilities = block_rows * tile.block_slots * item_bytes * busy
    return max(query + probabilities + max(inner, edge + words) + pages, result) + barriers


def _family(capability: int) -> str:
    """Devices that share a column of the table: by their matrix instructions and their shared memory."""
    if capability == 90:
        return "sm_90"
    if capability // 10 in (10, 11):
        return "sm_100"
    return "sm_80"


def _num_splits(num_programs: int, num_tiles: int, num_slots: int, partial_tiles: float) -> int:
    """The number of splits that should take least time, counted in tiles of one program.

    Args:
        num_programs: programs of the grid before splitting.
        num_tiles: tiles of the whole cache.
        num_slots: programs that the device runs at a time.
        partial_tiles: time to write and read back one partial result.
    """

    def cost(num_splits: int) -> float:
        waves = math.ceil(num_programs * num_splits / num_slots)
        merging = 1.0 + waves * partial_tiles if num_splits > 1 else 0.0
        return waves * (math.ceil(num_tiles / num_splits) + 1.0) + merging

    # More than two waves of programs never pay, and the merge has registers for so many splits.
    most = min(num_tiles, MAX_SPLITS, max(1, 2 * num_slots // num_programs))
    return min(range(1, most + 1), key=cost)


@functools.lru_cache(maxsize=4096)
def _launch_config(
    batch_size: int,
    num_nodes: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    value_dim: int,
    item_bytes: int,
    cache_item_bytes: int,
    max_slots: int,
    paged: bool,
    traits: triton_device.DeviceTraits,
) -> LaunchConfig:
    """Choose the launch of a call from its shapes and its device: never from lengths, which only the device knows."""
    num_rows = num_nodes * group
    block_dim, block_value_dim = _padded_dim(head_dim), _padded_dim(value_dim)
    family = "fp32" if item_bytes == 4 else _family(traits.capability)
    widest = max(block_dim, block_value_dim, 64)
    blocks = [rows for rows, dim in _TILES[family] if dim == widest]
    block_rows = next((rows for rows in blocks if rows >= num_rows), blocks[-1])
    tile = _TILES[family][block_rows, widest]
    if num_rows <= block_rows == 128 and tile.block_slots == 128:
        # A single block of rows is bound by memory, and half the tile leaves splits less unequal.
        tile = tile._replace(block_slots=64, num_stages=3)
    if cache_item_bytes != item_bytes and block_rows >= 64:
        # Conversion takes registers, most of all with wide heads.
        is_wide = widest > 128
        fewer = min(tile.block_slots, 64 if traits.capability >= 90 and not is_wide else 32)
        stages = 1 if is_wide else tile.masked_stages
        tile = tile._replace(block_slots=fewer, masked_slots=32, masked_stages=stages)

    def needed(tile: TileShape) -> int:
        return shared_bytes(
            block_rows, tile, block_dim, block_value_dim, item_bytes, cache_item_bytes, paged, traits.capability
        )

    while needed(tile) > traits.shared_bytes and tile.num_stages > 1:
        fewer = tile.num_stages - 1
        tile = tile._replace(num_stages=fewer, masked_stages=min(fewer, tile.masked_stages))
    while needed(tile) > traits.shared_bytes and tile.block_slots > 32:
        fewer = tile.block_slots // 2
        tile = tile._replace(block_slots=fewer, masked_slots=min(fewer, tile.masked_slots))

    reserved = 1024  # what the driver keeps of each program's shared memory
    fitting = (traits.shared_bytes + reserved) // (needed(tile) + reserved)
    programs_per_sm = max(1, min(tile.programs_per_sm, fitting))
    num_programs = triton.cdiv(num_rows, block_rows) * num_kv_heads * batch_size
    tile_bytes = tile.block_slots * (head_dim + value_dim) * cache_item_bytes
    num_splits = _num_splits(
        num_programs,
        triton.cdiv(max_slots, tile.block_slots),
        traits.num_sms * programs_per_sm,
        2 * 4 * min(block_rows, num_rows) * value_dim / tile_bytes,
    )
    # A wave of single rows while there are few, so that every load starts at once; else rows enough for wide loads.
    few_rows = num_rows * num_kv_heads * batch_size <= 16 * traits.num_sms
    merge_chunk = min(triton.next_power_of_2(num_splits), 32 if few_rows else 8)
    return LaunchConfig(
        block_rows,
        tile,
        num_splits,
        dim_chunk=_dim_chunk(block_dim, item_bytes),
        merge_rows=1 if few_rows else 4,
        merge_chunk=merge_chunk if block_value_dim <= 128 else max(1, merge_chunk // 2),
    )


unavailable = triton_device.unavailable_reason


def supports(inputs: TreeAttentionInputs) -> str | None:
    """Whether the kernels can run this call."""
    q, k_cache, v_cache = inputs[:3]
    if q.dtype == torch.float64:
        return "takes float32, bfloat16 and float16"
    head_dim, value_dim = q.shape[3], v_cache.shape[3]
    if head_dim % 8 or value_dim % 8 or not 8 <= head_dim <= 256 or not 8 <= value_dim <= 256:
        return "takes head dims from 8 to 256 that are multiples of 8"
    if max(q.shape[0], k_cache.shape[2]) > 65535:
        return "takes up to 65535 requests and kv heads"
    return triton_device.device_reason(q.device)


def run(inputs: TreeAttentionInputs, outputs: TreeAttentionOutput, config: LaunchConfig | None = None) -> None:
    """Write the outputs. ``config`` overrules the launch configuration, for tests and tuning."""
    q, k_cache, v_cache, tree_mask, cache_lens, scale, softcap, sliding_window = inputs[:8]
    sinks, block_table, k_scale, v_scale = inputs[8:12]
    out, lse = outputs
    batch_size, num_nodes, num_heads, head_dim = q.shape
    num_kv_heads, value_dim = k_cache.shape[2], v_cache.shape[3]
    group = num_heads // num_kv_heads
    max_slots = block_table.shape[1] * k_cache.shape[1] if block_table is not None else k_cache.shape[1]
    traits = triton_device.device_traits(q.device)
    if config is None:
        config = _launch_config(
            batch_size, num_nodes, num_kv_heads, group, head_dim, value_dim,
            q.element_size(), k_cache.element_size(), max_slots, block_table is not None, traits,
        )  # fmt: skip
    tile, num_splits = config.tile, config.num_splits

    def stages(num_stages: int) -> int:
        # A page must be known before its slots can be fetched: twice the depth keeps as many tiles in flight.
        return num_stages if block_table is None else 2 * num_stages - 1

    partial_out = partial_lse = None
    if num_splits > 1:
        partial_shape = (batch_size, num_kv_heads, num_splits, num_nodes * group)
        partial_out = q.new_empty((*partial_shape, value_dim), dtype=torch.float32)
        partial_lse = q.new_empty(partial_shape, dtype=torch.float32)

    fp8 = k_cache.dtype == torch.float8_e4m3fn
    fp8_as_bits = fp8 and traits.capability < 89
    score_scale, output_scale = scale, 1.0
    if fp8_as_bits:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
        score_scale, output_scale = scale * 256.0, 256.0
    # The exponent's scale must be positive, since it also multiplies maxima; what may not be goes into the scores.
    prescaled = softcap is not None or fp8 or scale <= 0
    exponent_scale = _LOG2_E if prescaled else scale * _LOG2_E
    softcap_kind = 0
    if softcap is not None:
        # The fast tanh errs by 1e-7 of the soft-cap, which a wide one makes felt.
        softcap_kind = 2 if q.dtype == torch.float32 or softcap > 100 else 1
        score_scale, exponent_scale = score_scale / softcap, softcap * _LOG2_E

    mask_words = tree_mask.shape[-1]
    key_strides, value_strides = _strides(k_cache)[:3], _strides(v_cache)[:3]
    lse_strides = _strides(lse) if lse is not None else (0, 0, 0)
    with triton_device.launching_on(q.device):
        tree_attention_kernel[
            (triton.cdiv(num_nodes * group, config.block_rows) * num_splits, num_kv_heads, batch_size)
        ](
            q, k_cache, v_cache, tree_mask, cache_lens, block_table, k_scale, v_scale, sinks,
            out, lse, partial_out, partial_lse,
            num_nodes, mask_words, max_slots, num_splits,
            *_strides(q)[:3], key_strides[0], key_strides[2], value_strides[0], value_strides[2],
            num_nodes * mask_words if tree_mask.dim() == 3 else 0,
            block_table.shape[1] if block_table is not None else 0,
            sinks.stride(0) if sinks is not None else 0,
            *_strides(out), *lse_strides,
            score_scale, exponent_scale, output_scale, min(sliding_window or 0, 2**31 - 1),
            SPLIT=num_splits > 1,
            PAGE_SIZE=k_cache.shape[1] if block_table is not None else 0,
            SLIDING=sliding_window is not None,
            PRESCALED=prescaled,
            SOFTCAP=softcap_kind,
            KEY_SCALED=k_scale is not None,
            VALUE_SCALED=v_scale is not None,
            HAS_SINKS=sinks is not None,
            WRITE_LSE=lse is not None,
            FP8_AS_BITS=fp8_as_bits,
            STRIDES_OF_8=all(stride % 8 == 0 for stride in (*key_strides, *value_strides)),
            KEY_SLOT_STRIDE=k_cache.stride(1),
            VALUE_SLOT_STRIDE=v_cache.stride(1),
            GROUP=group,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_ROWS=config.block_rows,
            BLOCK_SLOTS=tile.block_slots,
            MASKED_SLOTS=tile.masked_slots,
            MASKED_STAGES=stages(tile.masked_stages),
            BLOCK_DIM=_padded_dim(head_dim),
            DIM_CHUNK=config.dim_chunk,
            BLOCK_VALUE_DIM=_padded_dim(value_dim),
            BLOCK_WORDS=max(2, triton.next_power_of_2(mask_words)),
            num_warps=tile.num_warps,
            num_stages=stages(tile.num_stages),
            maxnreg=255,  # else ptxas spills a few registers for an occupancy that nobody asked for
            enable_fp_fusion=True,
        )  # fmt: skip
        if num_splits > 1:
            merge_splits_kernel[(triton.cdiv(num_nodes * group, config.merge_rows), num_kv_heads, batch_size)](
                partial_out, partial_lse, sinks,
                out, lse,
                num_nodes, num_splits,
                sinks.stride(0) if sinks is not None else 0,
                *_strides(out), *lse_strides,
                HAS_SINKS=sinks is not None,
                WRITE_LSE=lse is not None,
                GROUP=group,
                VALUE_DIM=value_dim,
                BLOCK_ROWS=config.merge_rows,
                BLOCK_SPLITS=triton.next_power_of_2(num_splits),
                CHUNK=config.merge_chunk,
                BLOCK_VALUE_DIM=_padded_dim(value_dim),
                num_warps=4,
                maxnreg=255,
                enable_fp_fusion=True,
            )  # fmt: skip


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 for dimensions of one element, whose strides are arbitrary and would compile more variants."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride()))
