"""Temperature, top-k and top-p inside Triton kernels: two rooms warp logits and may not import one another.

Only ``triton_*.py`` files import this. The definition is that of ``warping.py``: top-k keeps x if fewer than k
tokens have a larger logit, top-p keeps x if the tokens of larger logit hold less than top_p of what top-k left. Both
keep a row's logits down to a threshold, the cut, and the cut is the largest value v for which the logits >= v are
enough: k of them, or a mass of top_p. That is a monotone question, so no sort is needed.

A first launch reads the rows, many programs each, and leaves peaks and masses of chunks and the largest logit of every
few hundred tokens (`group_peaks`). They bound the cut from below (`cut_floor`): the k-th largest of k different tokens
is no larger than the k-th largest of all, and tokens so far below the peak that even a vocabulary of them would hold
less than half of 1 - top_p may all go. A second launch of as many programs copies what is not below the floor
(`collect_candidates`), ordinarily tens to some thousands of logits. `find_cut`, a program a row, then asks its question
of these, which stay in registers. Where the floor says too little, it reads the row itself, several times.

Numerics: float32. Weights are exp2((logit - peak) * scale) with scale = log2(e) / T, so no temperature overflows.
Candidates lie in the order in which programs came, so their weights are added up as multiples of 2^-40, which is exact:
results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "MAX_CANDIDATES",
    "PEAK_TOKENS",
    "collect_candidates",
    "exponent_scale",
    "find_cut",
    "group_peaks",
    "peak_and_mass",
    "row_cuts",
    "row_numbers",
]

LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)

MAX_CANDIDATES = 4096
"""logits of a row among which a search may end, in a scratch of so many; tests take fewer"""
PEAK_TOKENS = 512
"""tokens that share an entry of `group_peaks`: for a vocabulary of 128256, top-k up to 251 has a floor"""

# Steps by value close in on a cut among ordinary logits; after so many, steps by rank among the floats end any search.
_VALUE_STEPS = tl.constexpr(16)
# Halvings in the search for the k-th largest peak, whose interval is then a thousandth of that between all of them.
_FLOOR_STEPS = tl.constexpr(10)
_WEIGHT_UNIT = tl.constexpr(9.094947017729282e-13)  # 2^-40: sums of 4096 weights of at most 1 stay below 2^53 of it
_WEIGHT_UNITS = tl.constexpr(1099511627776.0)  # of a weight of 1


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
def row_numbers(
    peaks_ptr,  # [rows, num_chunks] fp32 contiguous, -inf where there is nothing
    masses_ptr,  # [rows, num_chunks] fp32 contiguous, 0 there
    row,  # int64
    num_chunks,
    scale,
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
):
    """Peak and mass of a row from those of its chunks."""
    chunks = tl.arange(0, BLOCK_CHUNKS)
    records = row * num_chunks + chunks
    peaks = tl.load(peaks_ptr + records, mask=chunks < num_chunks, other=float("-inf"))
    masses = tl.load(masses_ptr + records, mask=chunks < num_chunks, other=0.0)
    peak = tl.max(peaks, 0)
    return peak, tl.sum(masses * tl.exp2((peaks - tl.where(peak == float("-inf"), 0.0, peak)) * scale), 0)


@triton.jit
def row_cuts(
    top_k_ptr,  # [rows] int32, read if HAS_TOP_K
    top_p_ptr,  # [rows] fp32, read if HAS_TOP_P
    row,  # int64
    stride_top_k,
    stride_top_p,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
):
    """A row's top-k and top-p; 0 and 1 where they are off for all."""
    top_k = 0
    top_p = 1.0
    if HAS_TOP_K:
        top_k = tl.load(top_k_ptr + row * stride_top_k)
    if HAS_TOP_P:
        top_p = tl.load(top_p_ptr + row * stride_top_p)
    return top_k, top_p


@triton.jit
def group_peaks(logits, CHUNK: tl.constexpr, GROUP: tl.constexpr):  # fp32 [CHUNK], masked entries -inf
    """The largest logit of each GROUP tokens of a chunk. [CHUNK // GROUP]."""
    return tl.max(tl.reshape(logits, [CHUNK // GROUP, GROUP]), 1)


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
def _cut_floor(
    group_peaks_ptr,  # [num_groups] fp32
    num_groups,
    vocab,
    peak,
    mass,
    scale,
    top_k,
    top_p,
    BLOCK_GROUPS: tl.constexpr,
):
    """A value that the cut is not below, by what the first launch has left; -inf where that tells nothing."""
    floor = tl.full([], float("-inf"), tl.float32)
    if (top_k > 0) & (top_k < vocab):
        groups = tl.arange(0, BLOCK_GROUPS)
        peaks = tl.load(group_peaks_ptr + groups, mask=groups < num_groups, other=float("-inf"))
        is_there = peaks > float("-inf")
        if tl.sum(is_there.to(tl.int32), 0) >= top_k:
            floor = tl.min(tl.where(is_there, peaks, float("inf")), 0)
            high = peak
            for _ in range(_FLOOR_STEPS):
                middle = floor * 0.5 + high * 0.5
                is_enough = tl.sum((peaks >= middle).to(tl.int32), 0) >= top_k
                floor = tl.where(is_enough, middle, floor)
                high = tl.where(is_enough, high, middle)
    elif top_p < 1.0:
        # A logit at the floor has the weight (1 - top_p) mass / (2 vocab), so all below it hold less than half of what
        # may go: rounding, that of sums and of the floor itself, has the other half.
        floor = peak + tl.log2((1.0 - top_p) * 0.5 * mass / vocab) / scale
        floor -= tl.abs(floor) * 2.384185791015625e-07
    return floor


@triton.jit
def collect_candidates(
    logits_ptr,  # [vocab] fp32, bf16, fp16: one row
    group_peaks_ptr,  # [num_groups] fp32: of the row
    count_ptr,  # int32: of the row, 0 before the launch
    scratch_ptr,  # [CANDIDATES] fp32: of the row
    chunk,  # which tokens of the row are this program's
    vocab,
    num_groups,
    peak,
    mass,  # of all logits of the row
    scale,
    top_k,  # int32; off below 1 and from vocab on
    top_p,  # fp32; off from 1 on
    BLOCK_GROUPS: tl.constexpr,  # >= num_groups
    CHUNK: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Append a chunk's logits that are not below the floor to the row's scratch, as far as there is room, and count."""
    floor = _cut_floor(group_peaks_ptr, num_groups, vocab, peak, mass, scale, top_k, top_p, BLOCK_GROUPS)
    if floor > float("-inf"):
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        is_candidate = logits >= floor
        num_candidates = tl.sum(is_candidate.to(tl.int32), 0)
        if num_candidates > 0:
            # Who comes first has the first places. Which they are does not matter to the search.
            first = tl.atomic_add(count_ptr, num_candidates, sem="relaxed")
            places = first + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
            tl.store(scratch_ptr + places, logits, mask=is_candidate & (places < CANDIDATES))


@triton.jit
def _cut_among(ranks, amounts, low, high, enough):
    """The largest rank r for which the amounts of ranks >= r are enough; there is enough from `low`, not from `high`.

    It is one of the ranks, since the sum changes at these alone.
    """
    while high - low > 1:
        middle = (low + high) >> 1
        is_enough = tl.sum(tl.where(ranks >= middle, amounts, 0), 0) >= enough
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return low


@triton.jit
def _search_candidates(scratch_ptr, num_candidates, peak, mass, scale, top_k, top_p, has_top_k, CANDIDATES):
    """Whether the cut is among the candidates, the cut, and the mass of what is kept."""
    ids = tl.arange(0, CANDIDATES)
    is_there = ids < num_candidates
    logits = tl.load(scratch_ptr + ids, mask=is_there, other=float("-inf"))
    logits = tl.where(logits == 0.0, 0.0, logits)  # -0.0 and 0.0 tie
    weights = tl.where(is_there, tl.exp2((logits - peak) * scale) * _WEIGHT_UNITS, 0.0).to(tl.int64)
    ranks = tl.where(is_there, _rank(logits), _rank(float("-inf") + tl.zeros_like(logits)))
    low = tl.min(tl.where(is_there, ranks, 2**32), 0)
    high = _rank(tl.where(peak == 0.0, 0.0, peak)) + 1
    is_enough = tl.full([], True, tl.int1)
    enough = (mass * top_p * _WEIGHT_UNITS).to(tl.int64)
    if has_top_k:
        is_enough = num_candidates >= top_k
        low = _cut_among(ranks, is_there.to(tl.int32), low, high, top_k)
        kept = tl.sum(tl.where(ranks >= low, weights, 0), 0)
        enough = (kept.to(tl.float64) * top_p).to(tl.int64)
    if top_p < 1.0:
        kept = tl.sum(tl.where(ranks >= low, weights, 0), 0)
        is_enough = is_enough & (kept >= enough)
        if is_enough:
            low = _cut_among(ranks, weights, low, high, enough)
    kept = tl.sum(tl.where(ranks >= low, weights, 0), 0)
    return is_enough, low, kept.to(tl.float32) * _WEIGHT_UNIT  # a division would be approximate


@triton.jit
def _search_row(
    logits_ptr,
    scratch_ptr,
    vocab,
    peak,
    low,  # rank of the row's smallest logit
    mass,
    temperature,
    scale,
    top_k,
    top_p,
    has_top_k,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The rank of the cut, and the mass of what is kept, by reading the row."""
    # Whoever was to look at these candidates has done so.
    tl.debug_barrier()
    count = vocab
    num_candidates = 0
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
    return low, mass


@triton.jit
def find_cut(
    logits_ptr,  # [vocab] fp32, bf16, fp16: one row
    scratch_ptr,  # [CANDIDATES] fp32: of the row; the candidates that were collected, if they fit, and work space
    num_collected,  # int32: 0 where nothing was, more than CANDIDATES where they did not fit
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
    """The smallest logit that is kept, and the mass of what is kept.

    Among the candidates if they were collected. Else this program alone reads the row, three to six times as a rule:
    each reading asks whether the logits above some value are enough. Once at most CANDIDATES are left above the value
    that is, they are copied together, and the search ends among them.
    """
    # Triton makes a constant of a size of 1. By it triton 3.6 proves that the loops never turn, and then fails on the
    # loads inside, which its analysis has left out; and there is no cut to search.
    tl.static_assert(isinstance(vocab, tl.tensor), "find_cut takes vocabularies of 2 tokens and more")
    low = _rank(lowest)
    has_top_k = (top_k > 0) & (top_k < vocab)
    is_found = tl.full([], False, tl.int1)
    if (num_collected > 0) & (num_collected <= CANDIDATES):
        is_found, found, found_mass = _search_candidates(
            scratch_ptr, num_collected, peak, mass, scale, top_k, top_p, has_top_k, CANDIDATES
        )
        if is_found:
            low = found
            mass = found_mass
    if (is_found == 0) & (has_top_k | (top_p < 1.0)):
        low, mass = _search_row(
            logits_ptr, scratch_ptr, vocab, peak, low, mass, temperature, scale, top_k, top_p, has_top_k,
            TILE, CANDIDATES,
        )  # fmt: skip
    return _value(low), mass
