"""A level's children given out, and their chances once they are drawn, in Triton; `shaping.py` is the specification.

Computes
    what `LevelShape.give_out` and `LevelShape.note_draws` do: the places of the largest worths, ties to the lower one,
    topology and masks that follow from them; then the reach of the children that were drawn.

Parallel plan: what one program owns
    `row_masses_kernel`: a chunk of a row of logits, its peak and its mass. `give_out_kernel`: a request; it merges the
    chunks, finds the worth of every place in registers, and the least worth that gets a child by halving the range of
    its bits (the C largest of W K numbers, without a sort). Children of a node are its first ranks, so that a count a
    node says it all. `note_draws_kernel`: a request. Three launches a level; shapes are fixed and nothing waits for the
    device, so a step can be captured. Levels of more than 4096 places (nodes times children of a node, each rounded up
    to a power of 2) are left to torch.

Memory: bytes read and written
    Reads the logits once; what is left is as small as the tree.

Numerics
    float32, in the specification's steps; which numbers a sum adds up first is fixed by the vocabulary. A probability
    within rounding of an edge between two bins may fall into the other one: another tree, which is as exact. Otherwise
    topology, masks and places are the specification's.
    Not measured, and not run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sequoia_kernels.drafts import triton_rows
from sequoia_kernels.ops import triton_device, triton_warping
from sequoia_kernels.tree import Topology

__all__ = ["Level", "give_out", "note_draws", "supports"]

BITS_OF_ONE = tl.constexpr(0x3F800000)

# tuning table --------------------------------------------------------------------------------------------------------

# Chosen by compiling (no spills); not tuned on a device.
_CHUNK = 4096
_CHUNK_WARPS = 8
_MOST_PLACES = 4096
"""places of a level, in blocks: 16 of each of 256 threads; twice as many spill registers"""
_PLACES_PER_WARP = 512
_CHUNKS_AT_ONCE = 64
"""of a level of few nodes; of one of many, as many fewer"""


# jit helpers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _divisor(temperature):
    """What logits are divided by: 1 where the temperature is 0."""
    return tl.where(temperature == 0.0, 1.0, temperature)


@triton.jit
def _below(peak, higher):  # fp32
    """peak - higher, and no NaN where both are -inf."""
    return peak - tl.where(higher == float("-inf"), 0.0, higher)


@triton.jit
def _bins(probabilities, edges_ptr, NUM_EDGES: tl.constexpr):  # fp32 [n]
    """As `torch.bucketize` to the right: edges belong to the bin above. NaN goes behind all of them."""
    bins = tl.zeros_like(probabilities).to(tl.int32)
    for edge in tl.static_range(NUM_EDGES):
        bins += ((tl.load(edges_ptr + edge) > probabilities) == 0).to(tl.int32)
    return bins


# kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def row_masses_kernel(
    # inputs
    logits_ptr,  # [B, width, vocab] float
    temperature_ptr,  # [B] fp32
    # outputs
    peaks_ptr,  # [B * width, num_chunks] fp32 contiguous
    masses_ptr,  # [B * width, num_chunks] fp32 contiguous
    # sizes
    width,
    vocab,
    # strides, in elements
    stride_logits_request,
    stride_logits_row,
    stride_logits_token,
    stride_temperature,
    # blocks
    CHUNK: tl.constexpr,
):
    row, request, row_ptr = triton_rows.program_row(logits_ptr, width, stride_logits_request, stride_logits_row)
    chunk = tl.program_id(1)
    scale = triton_warping.exponent_scale(_divisor(tl.load(temperature_ptr + request * stride_temperature)))
    logits = triton_rows.read_chunk(row_ptr, chunk, vocab, stride_logits_token, CHUNK)[1]
    peak, mass = triton_warping.peak_and_mass(logits.to(tl.float32), scale)
    record = row * tl.num_programs(1) + chunk
    tl.store(peaks_ptr + record, peak)
    tl.store(masses_ptr + record, mass)


@triton.jit(do_not_specialize=["first", "num_children", "num_chunks"])
def give_out_kernel(
    # inputs
    temperature_ptr,  # [B] fp32
    peaks_ptr,  # [B, width, num_chunks] fp32 contiguous
    masses_ptr,  # [B, width, num_chunks] fp32 contiguous
    reach_ptr,  # [B, num_nodes] fp32 contiguous
    undrawn_ptr,  # [ranks, NUM_EDGES + 1] fp32 contiguous
    edges_ptr,  # [NUM_EDGES] fp32
    # inputs and outputs, contiguous
    parents_ptr,  # [B, num_nodes] int32
    ranks_ptr,  # [B, num_nodes] int32
    first_child_ptr,  # [B, num_nodes] int32
    num_children_ptr,  # [B, num_nodes] int32
    mask_ptr,  # [B, num_nodes, num_words] int32
    # outputs, contiguous
    log_normaliser_ptr,  # [B, width] fp32
    places_ptr,  # [B, num_children] int64
    own_mask_ptr,  # [B, num_children, num_words] int32, or None
    # sizes
    first,  # node of the level
    width,
    num_children,
    max_children,  # of a node
    num_nodes,
    num_words,
    num_chunks,
    # strides, in elements
    stride_temperature,
    # blocks
    NUM_EDGES: tl.constexpr,
    BLOCK_NODES: tl.constexpr,  # >= width
    BLOCK_RANKS: tl.constexpr,  # >= max_children
    BLOCK_CHUNKS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, BLOCK_NODES)
    is_node = nodes < width
    divisor = _divisor(tl.load(temperature_ptr + request * stride_temperature))
    scale = triton_warping.exponent_scale(divisor)

    peak = tl.full([BLOCK_NODES], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_NODES], tl.float32)
    for start in range(0, num_chunks, BLOCK_CHUNKS):
        chunks = start + tl.arange(0, BLOCK_CHUNKS)
        records = (request * width + nodes)[:, None] * num_chunks + chunks[None, :]
        is_chunk = is_node[:, None] & (chunks < num_chunks)[None, :]
        peaks = tl.load(peaks_ptr + records, mask=is_chunk, other=float("-inf"))
        masses = tl.load(masses_ptr + records, mask=is_chunk, other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, 1))
        mass = mass * tl.exp2(_below(peak, higher) * scale)
        mass += tl.sum(masses * tl.exp2(_below(peaks, higher[:, None]) * scale), 1)
        peak = higher
    scaled_peak = tl.div_rn(peak, divisor + tl.zeros_like(peak))
    log_normaliser = scaled_peak + tl.log(tl.where(is_node, mass, 1.0))
    tl.store(log_normaliser_ptr + request * width + nodes, log_normaliser, mask=is_node)

    # What every place is worth. Numbers that are not negative are in the order of their bits.
    bins = _bins(tl.exp(scaled_peak - log_normaliser), edges_ptr, NUM_EDGES)
    ranks = tl.arange(0, BLOCK_RANKS)
    is_place = is_node[:, None] & (ranks < max_children)[None, :]
    undrawn = tl.load(undrawn_ptr + ranks[None, :] * (NUM_EDGES + 1) + bins[:, None], mask=is_place, other=0.0)
    reach = tl.load(reach_ptr + request * num_nodes + first + nodes, mask=is_node, other=0.0)
    worths = tl.where(is_place, (reach[:, None] * undrawn).to(tl.int32, bitcast=True), -1)
    least = tl.full([], 0, tl.int32)  # at least num_children are worth so much
    too_much = tl.full([], BITS_OF_ONE + 1, tl.int32)
    while too_much - least > 1:
        middle = (least + too_much) >> 1
        is_enough = tl.sum(tl.sum((worths >= middle).to(tl.int32), 1), 0) >= num_children
        least = tl.where(is_enough, middle, least)
        too_much = tl.where(is_enough, too_much, middle)

    # All places above it, and the first of those that are worth just that: of a node its first ranks.
    num_above = tl.sum((worths > least).to(tl.int32), 1)
    num_tied = tl.sum((worths == least).to(tl.int32), 1)
    tied_left = num_children - tl.sum(num_above, 0) - (tl.cumsum(num_tied, 0) - num_tied)
    counts = num_above + tl.minimum(tl.maximum(tied_left, 0), num_tied)
    starts = tl.cumsum(counts, 0) - counts
    level = request * num_nodes + first + nodes
    tl.store(num_children_ptr + level, counts, mask=is_node)
    tl.store(first_child_ptr + level, tl.where(counts > 0, first + width + starts, -1), mask=is_node)

    is_chosen = ranks[None, :] < counts[:, None]
    children = starts[:, None] + ranks[None, :]
    child_nodes = first + width + children
    children_at = request * num_nodes + child_nodes
    tl.store(
        places_ptr + request * num_children + children,
        (nodes[:, None] * max_children + ranks[None, :]).to(tl.int64),
        mask=is_chosen,
    )
    tl.store(parents_ptr + children_at, (first + nodes)[:, None] + tl.zeros_like(children), mask=is_chosen)
    tl.store(ranks_ptr + children_at, ranks[None, :] + tl.zeros_like(children), mask=is_chosen)
    for word in range(num_words):
        seen = tl.load(mask_ptr + level * num_words + word, mask=is_node, other=0)
        own = tl.where(child_nodes // 32 == word, tl.full([], 1, tl.int32) << (child_nodes % 32), 0)
        tl.store(mask_ptr + children_at * num_words + word, seen[:, None] | own, mask=is_chosen)
        if own_mask_ptr is not None:
            rows = (request * num_children + children) * num_words + word
            tl.store(own_mask_ptr + rows, seen[:, None] | own, mask=is_chosen)


@triton.jit(do_not_specialize=["first", "first_child", "num_children"])
def note_draws_kernel(
    # inputs
    logits_ptr,  # [B, width, vocab] float
    temperature_ptr,  # [B] fp32
    tokens_ptr,  # [B, num_nodes] int64, -1 where none could be drawn
    log_normaliser_ptr,  # [B, width] fp32 contiguous
    places_ptr,  # [B, num_children] int64 contiguous
    drawn_ptr,  # [num_ranks, NUM_EDGES + 1] fp32 contiguous
    edges_ptr,  # [NUM_EDGES] fp32
    # inputs and outputs
    reach_ptr,  # [B, num_nodes] fp32 contiguous
    # sizes
    first,  # node of the level
    width,
    first_child,
    num_children,
    max_children,  # of a node
    num_nodes,
    num_ranks,
    # strides, in elements
    stride_logits_request,
    stride_logits_row,
    stride_logits_token,
    stride_temperature,
    stride_tokens_request,
    stride_tokens_node,
    # numbers
    least_reach,
    # blocks
    NUM_EDGES: tl.constexpr,
    BLOCK_CHILDREN: tl.constexpr,  # >= num_children
):
    request = tl.program_id(0).to(tl.int64)
    children = tl.arange(0, BLOCK_CHILDREN)
    is_child = children < num_children
    places = tl.load(places_ptr + request * num_children + children, mask=is_child, other=0)
    rows = places // max_children
    tokens = tl.load(
        tokens_ptr + request * stride_tokens_request + (first_child + children) * stride_tokens_node,
        mask=is_child,
        other=-1,
    )
    logits = tl.load(
        logits_ptr + request * stride_logits_request + rows * stride_logits_row + tokens * stride_logits_token,
        mask=tokens >= 0,
        other=0.0,
    ).to(tl.float32)
    log_normaliser = tl.load(log_normaliser_ptr + request * width + rows, mask=is_child, other=0.0)
    divisor = _divisor(tl.load(temperature_ptr + request * stride_temperature))
    chances = tl.exp(tl.div_rn(logits, divisor + tl.zeros_like(logits)) - log_normaliser)
    chances = tl.where(tokens >= 0, chances, 0.0)
    ranks = tl.minimum(places % max_children, num_ranks - 1)
    bins = _bins(chances, edges_ptr, NUM_EDGES)
    drawn = tl.load(drawn_ptr + ranks * (NUM_EDGES + 1) + bins, mask=is_child, other=0.0)
    nodes_ptr = reach_ptr + request * num_nodes
    reach = tl.load(nodes_ptr + first + rows, mask=is_child, other=0.0)
    tl.store(nodes_ptr + first_child + children, tl.maximum(reach * drawn, least_reach), mask=is_child)


# launches ------------------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """A level whose children are given out, as `LevelShape` has it."""

    topology: Topology
    reach: Tensor  # [B, N] float32
    drawn: Tensor  # [ranks, bins] float32
    undrawn: Tensor  # [ranks, bins] float32
    edges: Tensor  # [bins - 1] float32
    places: Tensor  # [B, C] int64
    own_mask: Tensor | None  # [B, C, words] int32
    first: int
    width: int
    max_children: int


class _Blocks(NamedTuple):
    """Sizes of a level's program."""

    nodes: int
    ranks: int
    chunks: int
    num_warps: int


def _blocks(width: int, max_children: int, num_chunks: int) -> _Blocks:
    nodes, ranks = triton.next_power_of_2(width), triton.next_power_of_2(max_children)
    chunks = min(triton.next_power_of_2(num_chunks), max(1, min(_CHUNKS_AT_ONCE, 4096 // nodes)))
    num_warps = min(16, max(1, nodes * max(ranks, chunks) // _PLACES_PER_WARP))
    return _Blocks(nodes, ranks, chunks, num_warps)


def supports(level: Level) -> str | None:
    """Why no kernel gives out the children of a level, or None."""
    blocks = _blocks(level.width, level.max_children, 1)
    if blocks.nodes * blocks.ranks > _MOST_PLACES:
        return f"takes levels of up to {_MOST_PLACES} places"
    return triton_device.device_reason(level.places.device)


def give_out(level: Level, logits: Tensor, temperature: Tensor) -> Tensor:
    """Write the children into the topology; arguments as of `LevelShape.give_out`.

    Args:
        level: the level.
        logits: [B, W, vocab], strided at will.
        temperature: [B] float32.

    Returns:
        The rows' log normalisers. [B, W] float32.
    """
    batch_size, width, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, _CHUNK)
    topology, num_children = level.topology, level.places.shape[1]
    peaks, masses = logits.new_empty(2, batch_size, width, num_chunks, dtype=torch.float32).unbind()
    log_normaliser = logits.new_empty(batch_size, width, dtype=torch.float32)
    blocks = _blocks(width, level.max_children, num_chunks)
    with triton_device.launching_on(logits.device):
        row_masses_kernel[(batch_size * width, num_chunks)](
            logits, temperature, peaks, masses, width, vocab, *logits.stride(), temperature.stride(0),
            CHUNK=_CHUNK, num_warps=_CHUNK_WARPS,
        )  # fmt: skip
        give_out_kernel[(batch_size,)](
            temperature, peaks, masses, level.reach, level.undrawn, level.edges,
            topology.parents, topology.ranks, topology.first_child, topology.num_children, topology.ancestor_mask,
            log_normaliser, level.places, level.own_mask,
            level.first, width, num_children, level.max_children, level.reach.shape[1],
            topology.ancestor_mask.shape[-1], num_chunks,
            temperature.stride(0),
            NUM_EDGES=len(level.edges),
            BLOCK_NODES=blocks.nodes,
            BLOCK_RANKS=blocks.ranks,
            BLOCK_CHUNKS=blocks.chunks,
            num_warps=blocks.num_warps,
            maxnreg=triton_device.most_registers(blocks.num_warps),
            enable_fp_fusion=False,
        )  # fmt: skip
    return log_normaliser


def note_draws(
    level: Level, logits: Tensor, temperature: Tensor, tokens: Tensor, log_normaliser: Tensor, least_reach: float
) -> None:
    """Write the children's reach; arguments as of `LevelShape.note_draws`.

    Args:
        level: the level.
        logits: as given to `give_out`.
        temperature: likewise.
        tokens: [B, N] int64.
        log_normaliser: what `give_out` gave. [B, W] float32, contiguous.
        least_reach: the least that a child has.
    """
    num_children = level.places.shape[1]
    block = triton.next_power_of_2(num_children)
    with triton_device.launching_on(logits.device):
        note_draws_kernel[(logits.shape[0],)](
            logits, temperature, tokens, log_normaliser, level.places, level.drawn, level.edges, level.reach,
            level.first, level.width, level.first + level.width, num_children, level.max_children,
            level.reach.shape[1], len(level.drawn),
            *logits.stride(), temperature.stride(0), *tokens.stride(), least_reach,
            NUM_EDGES=len(level.edges),
            BLOCK_CHILDREN=block,
            num_warps=max(1, block // 128),
            enable_fp_fusion=False,
        )  # fmt: skip
