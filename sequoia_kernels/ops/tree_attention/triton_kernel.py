"""Tree attention in Triton: split-KV flash attention under a packed ancestor mask.

Computes
    out[b, i, h] = sum over visible slots s of softmax_s(score(q[b, i, h], k[b, s, h // group])) v[b, s, h // group]
    where score = scale * q.k, soft-capped if asked. Row i sees the committed prefix s < cache_lens[b] and the tree slots
    s = cache_lens[b] + j whose bit j is set in its mask. A sliding window hides what lies `window` or more positions
    back; the position of a row is cache_len + depth, and depth = popcount(mask row) - 1. Because bits stand in depth
    order, a window is one number per row, the first visible slot, found once per program.

Parallel plan: what one program owns
    `tree_attention_kernel`, grid (row blocks * splits, kv heads, batch): BLOCK_ROWS query rows of one kv head against one
    split of the slots. Rows are packed over nodes x group (row r is node r // group, head r % group), so a key or value
    tile is read once for all the heads that share it. The slots a row block can see, prefix and tree alike, lie in one
    stretch of the cache; its tiles are dealt evenly to the splits. The last split therefore holds the tree. Tiles that
    lie wholly in the prefix of every row need no mask and run in a loop of their own. The number of splits comes from
    shapes alone, the borders between them from the lengths on the device: one captured graph serves every length.
    `merge_splits_kernel`, grid (rows, kv heads, batch): adds the partial results, weighted by their log-sum-exp, in split
    order. A single split writes the output itself and needs no merge. No atomics: results repeat bit for bit.

Memory: bytes read and written
    Reads keys and values of the visible stretch once per row block (from L2 after the first one); a split writes
    BLOCK_ROWS * (Dv + 1) float32 that the merge reads. Floor: visible slots * kv heads * (D + Dv) * itemsize at copy
    bandwidth while rows = nodes * group <= 184 (H200: 788 TFLOP/s over 4.3 TB/s); above that 2 * rows * slots *
    kv heads * (D + Dv) operations at the matrix rate. Llama-3-8B, 8k context: 33.5 MB or 7.8 us a layer for up to 46
    nodes; 64 nodes are bound by arithmetic (10.9 us).

Numerics
    Scores, softmax and sums in float32, in base 2 with the scale folded into the exponent. Products of float16 and
    bfloat16 accumulate in float32, and the probabilities are rounded to that type for the second product. float32
    products are exact float32 ("ieee"), not tf32. float8 keys and values become the query's type in registers and their
    scales multiply scores and output in float32. Rows that see nothing give 0 and a log-sum-exp of -inf. Slots that no
    row of the block sees may hold anything, NaN included.

Source
    Flash-decoding's split and merge (Dao et al. 2023) over FlashAttention-2's loop (arXiv 2307.08691); the tree mask of
    SpecInfer (arXiv 2305.09781), packed and kept to the tree's own columns. Deviation: prefix tail and tree share tiles,
    since a tile of its own for each would read and multiply one more.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Tuning ----------------------------------------------------------------------------------------------------------------


class TileShape(NamedTuple):
    """How one program walks the slots: found by compiling, not yet by timing (see _TILES)."""

    block_slots: int
    num_warps: int
    num_stages: int
