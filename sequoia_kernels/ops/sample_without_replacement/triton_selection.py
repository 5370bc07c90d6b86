"""The largest of many entries inside a Triton kernel, by networks of compare-exchanges (Batcher's bitonic sort).

A maximum over a block costs two barriers and ten shuffles one after another, and k maxima wait for each other. In a
network, entries that one thread holds are exchanged in registers, those of a warp by shuffles, and only its last few
steps go through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_device

__all__ = ["NO_ENTRY", "largest", "largest_entries", "merged_pairs", "sorted_pairs"]

INTERPRETED = tl.constexpr(triton_device.INTERPRETED)
NO_ENTRY = tl.constexpr(-(2**31))


@triton.constexpr_function
def _log2(power_of_two):
    return power_of_two.bit_length() - 1


@triton.jit
def largest(x):  # integers
    """The maximum, which all lanes know.

    By halves: of what networks leave, some lanes hold the same between others that do not, and triton 3.7 takes a
    maximum over several bits of a lane's number as if they were next to each other.
    """
    for _ in tl.static_range(_log2(x.shape[0]) - 1):
        x = tl.max(tl.reshape(x, [2, x.shape[0] // 2]), 0)
    return tl.max(x, 0)


@triton.jit
def _partners(x):  # integers [pairs, 2, STRIDE]
    """Both entries of each pair, exchanged."""
    if INTERPRETED:  # which takes long for the reduction below
        first, second = tl.split(tl.permute(x, (0, 2, 1)))
        return tl.permute(tl.join(second, first), (0, 2, 1))
    else:
        return x ^ tl.xor_sum(x, 1, keep_dims=True)


@triton.jit
def _is_lower(COUNT: tl.constexpr, STRIDE: tl.constexpr, RUN: tl.constexpr):
    """Which places [pairs, 2, STRIDE] get the lower entry of their pair, if runs of RUN fall and rise in turns."""
    is_second = tl.arange(0, 2)[None, :, None] == 1
    rises = (tl.arange(0, COUNT // (2 * STRIDE))[:, None, None] & (RUN // (2 * STRIDE))) != 0
    return tl.broadcast_to(is_second ^ rises, [COUNT // (2 * STRIDE), 2, STRIDE])


@triton.jit
def _exchanged(x, STRIDE: tl.constexpr, RUN: tl.constexpr):  # int32
    """Exchange entries STRIDE apart so that runs of RUN fall and rise in turns."""
    COUNT: tl.constexpr = x.shape[0]
    pairs = tl.reshape(x, [COUNT // (2 * STRIDE), 2, STRIDE])
    partners = _partners(pairs)
    is_lower = _is_lower(COUNT, STRIDE, RUN)
    return tl.reshape(tl.where(is_lower, tl.minimum(pairs, partners), tl.maximum(pairs, partners)), [COUNT])


@triton.jit
def _best_of_runs(x, KEPT: tl.constexpr, RUN: tl.constexpr):  # int32
    """The KEPT largest of every RUN entries, in an order of their own."""
    for size in tl.static_range(1, _log2(KEPT) + 1):
        for step in tl.static_range(size):
            x = _exchanged(x, 2 ** (size - 1 - step), 2**size)
    for halving in tl.static_range(_log2(RUN // KEPT)):
        if halving > 0:  # what was left of two runs fell and rose once
            for step in tl.static_range(_log2(KEPT)):
                x = _exchanged(x, KEPT // 2 ** (step + 1), KEPT)
        # Of a falling and a rising run, the larger ones place by place are the best of both.
        x = tl.reshape(tl.max(tl.reshape(x, [x.shape[0] // (2 * KEPT), 2, KEPT]), 1), [x.shape[0] // 2])
    return x


@triton.jit
def largest_entries(x, COUNT: tl.constexpr, WARPS: tl.constexpr):  # int32, no two alike but for NO_ENTRY
    """COUNT large entries in any order, nearly always the largest, and all others, NO_ENTRY in the places of these.

    Where a thread has many entries, only its largest few take part.
    """
    SIZE: tl.constexpr = x.shape[0]
    THREADS: tl.constexpr = WARPS * 32
    KEPT: tl.constexpr = 4 if COUNT <= 32 else 8
    LANES: tl.constexpr = min(COUNT // 2, 16)
    if SIZE == COUNT:
        taken = x
        left = tl.full([SIZE], NO_ENTRY, tl.int32)
    elif SIZE > THREADS * KEPT and COUNT <= THREADS * KEPT:
        # As tensors ordinarily lie: four neighbours in a thread, then the threads, then further registers.
        EACH: tl.constexpr = SIZE // THREADS
        rows = tl.permute(tl.reshape(x, [EACH // 4, THREADS, 4]), (1, 0, 2))
        kept = _best_of_runs(tl.reshape(rows, [SIZE]), KEPT, EACH)
        least = tl.min(tl.reshape(kept, [THREADS, KEPT]), 1)
        # Each half of every warp has half of what is taken, in runs across its lanes. What further registers have is
        # compared with them first, what other warps have last.
        kept = tl.permute(tl.reshape(kept, [WARPS, 2, 16 // LANES, LANES, KEPT]), (1, 0, 2, 4, 3))
        taken = _best_of_runs(tl.reshape(kept, [THREADS * KEPT]), COUNT // 2, THREADS * KEPT // 2)
        least_taken = tl.min(tl.reshape(taken, [2, COUNT // 2]), 1)
        least_taken = tl.broadcast_to(least_taken[None, :, None], [WARPS, 2, 16])
        least = tl.maximum(least, tl.reshape(least_taken, [THREADS]))
        least = tl.reshape(tl.broadcast_to(least[None, :, None], [EACH // 4, THREADS, 4]), [SIZE])
        left = tl.where(x < least, x, NO_ENTRY)
    else:
        taken = _best_of_runs(x, COUNT, SIZE)
        left = tl.where(x < tl.min(taken, 0), x, NO_ENTRY)
    return taken, left


@triton.jit
def _exchanged_pairs(keys, tokens, STRIDE: tl.constexpr, RUN: tl.constexpr):  # int64, int32
    COUNT: tl.constexpr = keys.shape[0]
    keys = tl.reshape(keys, [COUNT // (2 * STRIDE), 2, STRIDE])
    tokens = tl.reshape(tokens, [COUNT // (2 * STRIDE), 2, STRIDE])
    other_keys = _partners(keys)
    other_tokens = _partners(tokens)
    precedes = (keys > other_keys) | ((keys == other_keys) & (tokens < other_tokens))
    is_moved = precedes == _is_lower(COUNT, STRIDE, RUN)
    return (
        tl.reshape(tl.where(is_moved, other_keys, keys), [COUNT]),
        tl.reshape(tl.where(is_moved, other_tokens, tokens), [COUNT]),
    )


@triton.jit
def sorted_pairs(keys, tokens):  # int64, int32
    """Both by falling key, of equal ones the lower token first."""
    for size in tl.static_range(1, _log2(keys.shape[0]) + 1):
        for step in tl.static_range(size):
            keys, tokens = _exchanged_pairs(keys, tokens, 2 ** (size - 1 - step), 2**size)
    return keys, tokens


@triton.jit
def _swapped(x, STRIDE: tl.constexpr):
    """Entries STRIDE apart, exchanged."""
    return tl.reshape(_partners(tl.reshape(x, [x.shape[0] // (2 * STRIDE), 2, STRIDE])), [x.shape[0]])


@triton.jit
def _reversed(x):
    for step in tl.static_range(_log2(x.shape[0])):
        x = _swapped(x, 2**step)
    return x


@triton.jit
def merged_pairs(keys, tokens, more_keys, more_tokens):  # int64, int32, both sorted
    """The first half of what sorting both together gives."""
    # Reversed, the others rise: place by place, the preceding ones are the first half, and fall and rise once.
    more_keys = _reversed(more_keys)
    more_tokens = _reversed(more_tokens)
    precedes = (keys > more_keys) | ((keys == more_keys) & (tokens < more_tokens))
    keys = tl.where(precedes, keys, more_keys)
    tokens = tl.where(precedes, tokens, more_tokens)
    for step in tl.static_range(_log2(keys.shape[0])):
        keys, tokens = _exchanged_pairs(keys, tokens, keys.shape[0] // 2 ** (step + 1), keys.shape[0])
    return keys, tokens
