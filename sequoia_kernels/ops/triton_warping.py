"""Temperature, top-k and top-p inside Triton kernels: two rooms warp logits and may not import one another.

Only ``triton_*.py`` files import this. The definition is that of ``warping.py``: top-k keeps x if fewer than k
tokens have a larger logit, top-p keeps x if the tokens of larger logit hold less than top_p of what top-k left. Both
keep a row's logits down to a threshold, the cut, and the cut is the largest value v for which the logits >= v are
enough: k of them, or a mass of top_p. That is a monotone question, so no sort is needed: `find_cut` asks it for one
value after the other.

Numerics: float32. Weights are exp2((logit - peak) * scale) with scale = log2(e) / T, so no temperature overflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["MAX_CANDIDATES", "exponent_scale", "find_cut", "merged_peak_and_mass", "peak_and_mass"]

LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)

MAX_CANDIDATES = 4096
"""logits that `find_cut` copies into its scratch once the cut is known to be among so few; tests take fewer"""

# Steps by value close in on a cut among ordinary logits; after so many, steps by rank among the floats end any search.
_VALUE_STEPS = tl.constexpr(16)


@triton.jit
def exponent_scale(temperature):  # fp32
    """log2(e) / T, and 1 for a greedy row. Never 0, which would make NaN of masked logits."""
    is_greedy = temperature == 0.0
    # A statement of its own: triton 3.7's interpreter cannot pass on what a constexpr as the left operand gives.
    scale = LOG2_E / tl.where(is_greedy, 1.0, temperature)
    return tl.where(is_greedy, 1.0, tl.maximum(scale, SMALLEST_NORMAL))


@triton.jit
def peak_and_mass(logits, scale):  # fp32 [n], masked entries -inf
    """The largest logit and the sum of exp2((logit - peak) * scale); -inf and 0 where all are masked."""
    peak = tl.max(logits, 0)
    return peak, tl.sum(tl.exp2((logits - tl.where(peak == float("-inf"), 0.0, peak)) * scale), 0)


@triton.jit
def merged_peak_and_mass(peaks, masses, scale):  # fp32 [n], -inf and 0 where there is nothing
    """Peak and mass of a whole from those of its parts."""
    peak = tl.max(peaks, 0)
    return peak, tl.sum(masses * tl.exp2((peaks - tl.where(peak == float("-inf"), 0.0, peak)) * scale), 0)


@triton.jit
def _rank(value):  # fp32 -> int64
    """Position among the floats in rising order."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(rank):  # int64 -> fp32
    bits = rank.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kept(logits_ptr, size, threshold, peak, scale, TILE: tl.constexpr, STAGES: tl.constexpr):
    """Number and mass of the logits >= threshold, the smallest of them, and the largest of the others."""
    count = tl.zeros([TILE], tl.int32)
    mass = tl.zeros([TILE], tl.float32)
    smallest = tl.full([TILE], float("inf"), tl.float32)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    for start in tl.range(0, size, TILE, num_stages=STAGES):
        ids = start + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
        is_kept = (logits >= threshold) & (ids < size)
        count += is_kept.to(tl.int32)
        mass += tl.where(is_kept, tl.exp2((logits - peak) * scale), 0.0)
        smallest = tl.minimum(smallest, tl.where(is_kept, logits, float("inf")))
        largest = tl.maximum(largest, tl.where(is_kept, float("-inf"), logits))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.min(smallest, 0), tl.max(largest, 0)


@triton.jit
def _narrow(
    logits_ptr,
    size,
    low,
    high,
    count,  # of the logits >= low
    mass,
    enough_count,
    enough_mass,
    few,
    first_step,
    peak,
    scale,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Narrow the ranks low <= cut < high until they are neighbours, or at most `few` logits are >= low.

    The logits >= low are enough, those >= high are not. Goes down from the peak by doubling steps until something is
    enough, then halves the interval; both ends move on to the next logit that there is.
    """
    step = first_step
    is_descending = True
    turn = 0
    while (high - low > 1) & (count > few):
        if turn >= _VALUE_STEPS:
            middle = (low + high) >> 1
        elif is_descending:
            middle = _rank(peak - step)
            step *= 2.0
        else:
            middle = _rank(_value(low) * 0.5 + tl.minimum(_value(high), peak) * 0.5)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        kept_count, kept_mass, smallest, largest = _kept(logits_ptr, size, _value(middle), peak, scale, TILE, STAGES)
        if (kept_count >= enough_count) & (kept_mass >= enough_mass):
            low = tl.maximum(middle, _rank(smallest))
            count = kept_count
            mass = kept_mass
            is_descending = False
        else:
            high = tl.minimum(middle, _rank(largest) + 1)
        turn += 1
    return low, high, count, mass


@triton.jit
def _collect(logits_ptr, size, threshold, scratch_ptr, TILE: tl.constexpr):
    """Copy the logits >= threshold into the scratch, in order."""
    num_collected = 0
    for start in range(0, size, TILE):
        ids = start + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
        is_kept = (logits >= threshold) & (ids < size)
        places = num_collected + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        tl.store(scratch_ptr + places, logits, mask=is_kept)
        num_collected += tl.sum(is_kept.to(tl.int32), 0)
    tl.debug_barrier()  # the program's own threads read it next
    return num_collected


@triton.jit
def find_cut(
    logits_ptr,  # [vocab] fp32, bf16, fp16: one row
    scratch_ptr,  # [CANDIDATES] fp32, this program's own
    vocab,  # at least 2
    peak,  # the row's largest logit, finite
    lowest,  # its smallest
    mass,  # of all its logits
    temperature,  # above 0
    scale,
    top_k,  # int32; off below 1 and from vocab on
    top_p,  # fp32; off from 1 on
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The smallest logit that is kept, and the mass of what is kept. One program reads the row a few times.

    Each reading asks whether the logits above some value are enough. Once at most CANDIDATES are left above the
    value that is, they are copied together, and the search ends among them. Ordinary rows take three to six readings.
    """
    # Triton makes a constant of a size of 1. By it triton 3.6 proves that the loops never turn, and then fails on the
    # loads inside, which its analysis has left out; and there is no cut to search.
    tl.static_assert(isinstance(vocab, tl.tensor), "find_cut takes vocabularies of 2 tokens and more")
    low = _rank(lowest)
    count = vocab
    num_candidates = 0
    has_top_k = (top_k > 0) & (top_k < vocab)
    if has_top_k:
        high = _rank(peak) + 1
        low, high, count, mass = _narrow(
            logits_ptr, vocab, low, high, count, mass, top_k, 0.0, CANDIDATES, 8.0, peak, scale, TILE, 3
        )
        if high - low > 1:
            num_candidates = _collect(logits_ptr, vocab, _value(low), scratch_ptr, TILE)
            low, high, count, mass = _narrow(
                scratch_ptr, num_candidates, low, high, count, mass, top_k, 0.0, 0, 8.0, peak, scale, TILE, 1
            )
    if top_p < 1.0:
        high = _rank(peak) + 1
        enough = mass * top_p
        step = temperature * 8.0
        if num_candidates == 0:
            low, high, count, mass = _narrow(
                logits_ptr, vocab, low, high, count, mass, 0, enough, CANDIDATES, step, peak, scale, TILE, 3
            )
            if high - low > 1:
                num_candidates = _collect(logits_ptr, vocab, _value(low), scratch_ptr, TILE)
        if num_candidates > 0:
            low, high, count, mass = _narrow(
                scratch_ptr, num_candidates, low, high, count, mass, 0, enough, 0, step, peak, scale, TILE, 1
            )
    return _value(low), mass
