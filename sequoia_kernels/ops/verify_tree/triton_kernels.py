"""The kernels of verify_tree, in the order of their launch. What they compute is told in triton_launch.py."""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_streams, triton_warping

from . import triton_nodes
from .triton_nodes import NO_TOKEN, NONE_ACCEPTED, PENDING, TARGET_LEFT

__all__ = [
    "collect_nodes_kernel",
    "decide_kernel",
    "draw_kernel",
    "finish_kernel",
    "node_chunks_kernel",
    "warp_nodes_kernel",
]

ACCEPT_TAG = triton_streams.ACCEPT_TAG
RESIDUAL_TAG = triton_streams.RESIDUAL_TAG
LN_2 = tl.constexpr(0.6931471805599453)


# jit helpers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _node_of_slot(num_children_ptr, num_nodes, rank, slot, BLOCK_NODES: tl.constexpr):
    """The slot-th node that has a child of this rank, -1 where there are not so many."""
    nodes = tl.arange(0, BLOCK_NODES)
    has_child = tl.load(num_children_ptr + nodes, mask=nodes < num_nodes, other=0) > rank
    place = tl.cumsum(has_child.to(tl.int32), 0) - 1
    return tl.max(tl.where(has_child & (place == slot), nodes, -1), 0)


@triton.jit
def _test_child(
    rank,  # which one
    children,  # [children] 0, 1, ..
    num_children,
    first_child,
    child_target,  # [children] fp32 target logits, -inf for what is no child, no token or a repeat
    child_draft,  # [children] fp32 draft logits, likewise
    is_drawn,  # [children] int32: 1 for those drawn before
    outside_residual,  # masses outside the children at log_ratio, not used if FIRST
    outside_target,
    outside_peak,  # the draft outside the children
    outside_mass,
    target_peak,
    target_mass,
    cut,
    log_ratio,  # log2 of g d(reference)
    scale,
    seed,
    offset,
    certain_ptr,  # of the request, read if HAS_CERTAIN
    stride_certain_node,
    FIRST: tl.constexpr,
    HAS_CERTAIN: tl.constexpr,
):
    """Test one child: return (what is known of the node then, whether it is a draw, the ratio after a rejection)."""
    is_tested = children == rank
    is_left = is_drawn == 0
    coin = triton_streams.coin(triton_streams.stream_words(seed, offset, ACCEPT_TAG, first_child + rank)[0])
    reference = triton_nodes.draft_reference(outside_peak, child_draft)
    target = triton_nodes.target_weights(child_target, target_peak, cut, scale) / target_mass
    draft, draft_mass, base = triton_nodes.draft_left(child_draft, is_left, outside_peak, outside_mass, scale)

    residual = triton_nodes.residual_weights(target, child_draft, reference, log_ratio, 0.0, scale)
    if FIRST:
        residual_mass = 1.0
        is_exhausted = False
    else:
        residual_mass = outside_residual / target_mass + tl.sum(tl.where(is_left, residual, 0.0), 0)
        # Empty residual: what the target has outside the draws, or the target itself, which then accepts no child.
        is_empty = residual_mass <= 0.0
        target_left = outside_target / target_mass + tl.sum(tl.where(is_left, target, 0.0), 0)
        is_exhausted = is_empty & (target_left <= 0.0)
        residual = tl.where(is_empty, target, residual)
        residual_mass = tl.where(is_empty, tl.where(is_exhausted, 1.0, target_left), residual_mass)
        log_ratio = tl.where(is_empty, float("-inf"), log_ratio)

    tested_residual = tl.sum(tl.where(is_tested, residual, 0.0), 0) / residual_mass
    tested_draft = tl.sum(tl.where(is_tested, draft, 0.0), 0) / draft_mass
    if HAS_CERTAIN:
        is_certain = tl.load(certain_ptr + (first_child + rank).to(tl.int64) * stride_certain_node)
        tested_draft = tl.where(
            is_certain, triton_nodes.certain_draw(is_tested, child_target, child_draft), tested_draft
        )
    is_draw = tested_draft > 0.0
    is_accepted = is_draw & (coin * tested_draft < tested_residual)
    if FIRST:
        rejected_ratio = (reference - base) * scale - tl.log2(draft_mass)
    else:
        is_accepted = is_accepted & (is_exhausted == 0)
        added = tl.log2(residual_mass) + (reference - base) * scale - tl.log2(draft_mass)
        higher = tl.maximum(log_ratio, added)
        rejected_ratio = higher + tl.log2(tl.exp2(log_ratio - higher) + tl.exp2(added - higher))
    if HAS_CERTAIN:
        rejected_ratio = tl.where(is_certain, log_ratio, rejected_ratio)
    decision = tl.where(rank + 1 == num_children, NONE_ACCEPTED, PENDING)
    decision = tl.where(is_exhausted, TARGET_LEFT, decision)
    decision = tl.where(is_accepted, first_child + rank, decision)
    return decision, tl.where(is_draw, 1, 0), tl.where(is_draw, rejected_ratio, log_ratio)


@triton.jit
def _best_token(weights, noise, ids):
    """The token with the largest log weight plus noise, the lowest of ties; a key of -inf where all weights are 0."""
    key = tl.where(weights > 0.0, tl.log(tl.where(weights > 0.0, weights, 1.0)) + noise, float("-inf"))
    best = tl.max(key, 0)
    return best, tl.min(tl.where(key == best, ids, NO_TOKEN), 0)


# kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_nodes", "num_chunks"])
def node_chunks_kernel(
    # inputs
    tokens_ptr,  # [batch, num_nodes] int64
    target_logits_ptr,  # [batch, num_nodes, vocab] fp32, bf16, fp16
    draft_logits_ptr,  # [batch, num_nodes, vocab, or draft_vocab if HAS_MAP] fp32, bf16, fp16; not of leaves
    target_to_draft_ptr,  # [vocab] int32 contiguous, read if HAS_MAP
    first_child_ptr,  # [num_nodes] int32 contiguous, requests stride_topology apart
    num_children_ptr,  # likewise
    certain_ptr,  # [batch, num_nodes] bool, read if HAS_CERTAIN
    temperature_ptr,  # [batch] fp32
    # outputs, all contiguous
    target_peaks_ptr,  # [batch, num_nodes, num_chunks] fp32
    target_masses_ptr,  # [batch, num_nodes, num_chunks] fp32
    target_lowest_ptr,  # [batch, num_nodes, num_chunks] fp32, written if WARPED
    target_groups_ptr,  # [batch, num_nodes, num_chunks, CHUNK // GROUP] fp32: peaks, written if WARPED
    num_collected_ptr,  # [batch, num_nodes] int32, set to 0 if WARPED
    draft_peaks_ptr,  # [batch, num_nodes, num_chunks] fp32, outside the children
    draft_masses_ptr,  # [batch, num_nodes, num_chunks] fp32, outside the children
    best_tokens_ptr,  # [batch, num_nodes, num_chunks] int32, written at temperature 0
    child_target_ptr,  # [batch, num_nodes] fp32: logits of a node's token in its parent's rows
    child_draft_ptr,  # [batch, num_nodes] fp32
    is_drawn_ptr,  # [batch, num_nodes] int32
    decisions_ptr,  # [batch, num_nodes] int32
    next_ranks_ptr,  # [2, batch, num_nodes] int32
    # sizes
    vocab,
    draft_vocab,  # read if HAS_MAP
    num_nodes,
    num_chunks,
    # strides, in elements; rows of logits are contiguous
    stride_topology,  # 0 for a tree that all requests share
    stride_tokens_batch,
    stride_target_batch,
    stride_target_node,
    stride_draft_batch,
    stride_draft_node,
    stride_temperature_batch,
    stride_certain_batch,
    stride_certain_node,
    # flags
    WARPED: tl.constexpr,
    HAS_DRAFT: tl.constexpr,  # else no row of the draft is read, and no child was drawn
    HAS_MAP: tl.constexpr,
    HAS_CERTAIN: tl.constexpr,
    # blocks
    BLOCK_CHILDREN: tl.constexpr,  # >= children of any node
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    chunk = tl.program_id(0)
    node = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first_child_ptr += batch * stride_topology
    num_children_ptr += batch * stride_topology
    request_node = batch * num_nodes + node
    num_children = tl.load(num_children_ptr + node)
    if chunk == 0:
        tl.store(decisions_ptr + request_node, tl.where(num_children > 0, PENDING, NONE_ACCEPTED))
        tl.store(next_ranks_ptr + request_node, 0)
        tl.store(next_ranks_ptr + tl.num_programs(2).to(tl.int64) * num_nodes + request_node, 0)
    if not WARPED:
        if num_children == 0:
            return

    temperature = tl.load(temperature_ptr + batch * stride_temperature_batch)
    scale = triton_warping.exponent_scale(temperature)
    first_id = chunk * CHUNK
    ids = first_id + tl.arange(0, CHUNK)
    record = request_node * num_chunks + chunk
    target_row_ptr = target_logits_ptr + batch * stride_target_batch + node.to(tl.int64) * stride_target_node
    target_logits = tl.load(target_row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    peak, mass = triton_warping.peak_and_mass(target_logits, scale)
    tl.store(target_peaks_ptr + record, peak)
    tl.store(target_masses_ptr + record, mass)
    if WARPED:
        tl.store(target_lowest_ptr + record, tl.min(tl.where(ids < vocab, target_logits, float("inf")), 0))
        groups = record * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        tl.store(target_groups_ptr + groups, triton_warping.group_peaks(target_logits, CHUNK, GROUP))
        if chunk == 0:
            tl.store(num_collected_ptr + request_node, 0)
    if temperature == 0.0:
        tl.store(best_tokens_ptr + record, tl.min(tl.where(target_logits == peak, ids, NO_TOKEN), 0))
    elif num_children > 0:
        first_child = tl.load(first_child_ptr + node)
        children = tl.arange(0, BLOCK_CHILDREN)
        is_child = children < num_children
        child_tokens_ptr = tokens_ptr + batch * stride_tokens_batch + first_child
        tokens = triton_nodes.child_tokens(child_tokens_ptr, children, is_child, vocab)
        draft_row_ptr = draft_logits_ptr + batch * stride_draft_batch + node.to(tl.int64) * stride_draft_node
        draft_logits = triton_nodes.draft_at(
            draft_row_ptr, target_to_draft_ptr, ids, ids < vocab, draft_vocab, HAS_DRAFT, HAS_MAP
        )
        is_outside = triton_nodes.is_outside(ids, first_id, tokens, CHUNK)
        peak, mass = triton_warping.peak_and_mass(tl.where(is_outside, draft_logits, float("-inf")), scale)
        if not HAS_DRAFT:
            peak = tl.full([], 0.0, tl.float32)  # of no mass, and a logit that others can be relative to
        tl.store(draft_peaks_ptr + record, peak)
        tl.store(draft_masses_ptr + record, mass)
        if chunk == 0:
            is_token = tokens >= 0
            if HAS_CERTAIN:
                # Of siblings with the same token, the first that can be a draw has it; the first where none can be.
                logits = triton_nodes.draft_at(
                    draft_row_ptr, target_to_draft_ptr, tokens, is_token, draft_vocab, HAS_DRAFT, HAS_MAP
                )
                certain_ptr += batch * stride_certain_batch + first_child.to(tl.int64) * stride_certain_node
                is_certain = tl.load(certain_ptr + children.to(tl.int64) * stride_certain_node, mask=is_child, other=0)
                order = children + tl.where((logits > float("-inf")) | (is_certain != 0), 0, BLOCK_CHILDREN)
                for rank in range(num_children):
                    is_same = tokens == tl.max(tl.where(children == rank, tokens, -1), 0)
                    first = tl.min(tl.where(is_same, order, 2 * BLOCK_CHILDREN), 0)
                    is_token = is_token & ((is_same == 0) | (order == first))
            else:
                for rank in range(num_children - 1):  # a repeat of an earlier sibling cannot have been drawn
                    earlier = tl.max(tl.where(children == rank, tokens, -1), 0)
                    is_token = is_token & ((tokens != earlier) | (children <= rank))
            child_nodes = batch * num_nodes + first_child + children
            logits = tl.load(target_row_ptr + tokens, mask=is_token, other=float("-inf")).to(tl.float32)
            tl.store(child_target_ptr + child_nodes, logits, mask=is_child)
            logits = triton_nodes.draft_at(
                draft_row_ptr, target_to_draft_ptr, tokens, is_token, draft_vocab, HAS_DRAFT, HAS_MAP
            )
            tl.store(child_draft_ptr + child_nodes, logits, mask=is_child)
            tl.store(is_drawn_ptr + child_nodes, tl.zeros([BLOCK_CHILDREN], tl.int32), mask=is_child)


@triton.jit(do_not_specialize=["num_nodes", "num_chunks"])
def collect_nodes_kernel(
    # inputs
    target_logits_ptr,  # [batch, num_nodes, vocab] fp32, bf16, fp16
    temperature_ptr,  # [batch] fp32
    top_k_ptr,  # [batch] int32, read if HAS_TOP_K
    top_p_ptr,  # [batch] fp32, read if HAS_TOP_P
    target_peaks_ptr,  # [batch, num_nodes, num_chunks] fp32 contiguous
    target_masses_ptr,  # [batch, num_nodes, num_chunks] fp32 contiguous
    target_groups_ptr,  # [batch, num_nodes, num_chunks, CHUNK // GROUP] fp32 contiguous
    # outputs
    num_collected_ptr,  # [batch, num_nodes] int32 contiguous, 0 before
    scratch_ptr,  # [batch, num_nodes, CANDIDATES] fp32 contiguous
    # sizes
    vocab,
    num_nodes,
    num_chunks,
    # strides, in elements
    stride_target_batch,
    stride_target_node,
    stride_temperature_batch,
    stride_top_k_batch,
    stride_top_p_batch,
    # flags
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    # blocks
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    chunk = tl.program_id(0)
    node = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    temperature = tl.load(temperature_ptr + batch * stride_temperature_batch)
    if temperature == 0.0:
        return
    scale = triton_warping.exponent_scale(temperature)
    request_node = batch * num_nodes + node
    peak, mass = triton_warping.row_numbers(
        target_peaks_ptr, target_masses_ptr, request_node, num_chunks, scale, BLOCK_CHUNKS
    )
    top_k, top_p = triton_warping.row_cuts(
        top_k_ptr, top_p_ptr, batch, stride_top_k_batch, stride_top_p_batch, HAS_TOP_K, HAS_TOP_P
    )
    num_groups = num_chunks * (CHUNK // GROUP)
    triton_warping.collect_candidates(
        target_logits_ptr + batch * stride_target_batch + node.to(tl.int64) * stride_target_node,
        target_groups_ptr + request_node * num_groups, num_collected_ptr + request_node,
        scratch_ptr + request_node * CANDIDATES, chunk, vocab, num_groups, peak, mass, scale, top_k, top_p,
        BLOCK_CHUNKS * (CHUNK // GROUP), CHUNK, CANDIDATES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_nodes", "num_chunks"])
def warp_nodes_kernel(
    # inputs
    target_logits_ptr,  # [batch, num_nodes, vocab] fp32, bf16, fp16
    temperature_ptr,  # [batch] fp32
    top_k_ptr,  # [batch] int32, read if HAS_TOP_K
    top_p_ptr,  # [batch] fp32, read if HAS_TOP_P
    target_peaks_ptr,  # [batch, num_nodes, num_chunks] fp32 contiguous
    target_masses_ptr,  # [batch, num_nodes, num_chunks] fp32 contiguous
    target_lowest_ptr,  # [batch, num_nodes, num_chunks] fp32 contiguous
    num_collected_ptr,  # [batch, num_nodes] int32 contiguous
    # outputs
    warped_ptr,  # [batch, num_nodes, 3] fp32 contiguous: peak, mass above the cut, cut
    scratch_ptr,  # [batch, num_nodes, CANDIDATES] fp32 contiguous, read and written
    # sizes
    vocab,
    num_nodes,
    num_chunks,
    # strides, in elements
    stride_target_batch,
    stride_target_node,
    stride_temperature_batch,
    stride_top_k_batch,
    stride_top_p_batch,
    # flags
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    # blocks
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    node = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + batch * stride_temperature_batch)
    if temperature == 0.0:
        return
    scale = triton_warping.exponent_scale(temperature)
    request_node = batch * num_nodes + node
    peak, mass = triton_warping.row_numbers(
        target_peaks_ptr, target_masses_ptr, request_node, num_chunks, scale, BLOCK_CHUNKS
    )
    chunks = tl.arange(0, BLOCK_CHUNKS)
    records = request_node * num_chunks + chunks
    lowest = tl.min(tl.load(target_lowest_ptr + records, mask=chunks < num_chunks, other=float("inf")), 0)
    top_k, top_p = triton_warping.row_cuts(
        top_k_ptr, top_p_ptr, batch, stride_top_k_batch, stride_top_p_batch, HAS_TOP_K, HAS_TOP_P
    )
    target_row_ptr = target_logits_ptr + batch * stride_target_batch + node.to(tl.int64) * stride_target_node
    cut, mass = triton_warping.find_cut(
        target_row_ptr, scratch_ptr + request_node * CANDIDATES, tl.load(num_collected_ptr + request_node),
        vocab, peak, lowest, mass, temperature, scale, top_k, top_p, TILE, CANDIDATES,
    )  # fmt: skip
    tl.store(warped_ptr + request_node * 3, peak)
    tl.store(warped_ptr + request_node * 3 + 1, mass)
    tl.store(warped_ptr + request_node * 3 + 2, cut)


@triton.jit(do_not_specialize=["num_nodes", "num_chunks", "rank"])
def decide_kernel(
    # inputs
    tokens_ptr,  # [batch, num_nodes] int64
    target_logits_ptr,  # [batch, num_nodes, vocab] fp32, bf16, fp16
    draft_logits_ptr,  # [batch, num_nodes, vocab, or draft_vocab if HAS_MAP] fp32, bf16, fp16
    target_to_draft_ptr,  # [vocab] int32 contiguous, read if HAS_MAP
    first_child_ptr,  # [num_nodes] int32 contiguous, requests stride_topology apart
    num_children_ptr,  # likewise
    certain_ptr,  # [batch, num_nodes] bool, read if HAS_CERTAIN
    temperature_ptr,  # [batch] fp32
    seeds_ptr,  # [batch] int64
    offsets_ptr,  # [batch] int64
    target_peaks_ptr,  # [batch, num_nodes, num_chunks] fp32 contiguous, as the five below
    target_masses_ptr,
    warped_ptr,  # [batch, num_nodes, 3] fp32, read if WARPED
    draft_peaks_ptr,
    draft_masses_ptr,
    best_tokens_ptr,  # int32, read if FIRST, at temperature 0
    child_target_ptr,  # [batch, num_nodes] fp32 contiguous, as all below
    child_draft_ptr,
    # inputs and outputs; no program reads what another one of its launch writes: ranks take turns with the halves
    is_drawn_ptr,  # [batch, num_nodes] int32: read of the ranks before, written of this one
    next_ranks_ptr,  # [2, batch, num_nodes] int32: the rank that comes next, if the node is pending
    log_ratio_ptr,  # [2, batch, num_nodes] fp32
    sums_ptr,  # [2, batch, num_nodes, num_chunks, 2] fp32: masses of residual and target outside the children
    # outputs, of nodes decided here
    decisions_ptr,  # [batch, num_nodes] int32
    last_ratio_ptr,  # [batch, num_nodes] fp32
    # sizes
    vocab,
    draft_vocab,  # read if HAS_MAP
    num_nodes,
    num_chunks,
    rank,
    # strides, in elements; rows of logits are contiguous
    stride_topology,  # 0 for a tree that all requests share
    stride_tokens_batch,
    stride_target_batch,
    stride_target_node,
    stride_draft_batch,
    stride_draft_node,
    stride_temperature_batch,
    stride_seeds_batch,
    stride_offsets_batch,
    stride_certain_batch,
    stride_certain_node,
    # flags
    WARPED: tl.constexpr,
    HAS_DRAFT: tl.constexpr,  # else no row of the draft is read, and no child was drawn
    HAS_MAP: tl.constexpr,
    HAS_CERTAIN: tl.constexpr,
    FIRST: tl.constexpr,  # rank is 0
    REST: tl.constexpr,  # also all ranks behind it, one program a node
    # blocks
    BLOCK_NODES: tl.constexpr,  # >= num_nodes
    BLOCK_CHILDREN: tl.constexpr,  # >= children of any node
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
    CHUNK: tl.constexpr,  # tokens that a program reads at a time: all of its own, if not REST
):
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first_child_ptr += batch * stride_topology
    num_children_ptr += batch * stride_topology
    if HAS_CERTAIN:
        certain_ptr += batch * stride_certain_batch
    node = _node_of_slot(num_children_ptr, num_nodes, rank, tl.program_id(1), BLOCK_NODES)
    if node < 0:
        return
    request_node = batch * num_nodes + node
    num_request_nodes = tl.num_programs(2).to(tl.int64) * num_nodes
    old_half = (rank + 1) % 2 * num_request_nodes
    new_half = rank % 2 * num_request_nodes
    if not FIRST:
        if tl.load(next_ranks_ptr + old_half + request_node) != rank:
            return

    num_children = tl.load(num_children_ptr + node)
    first_child = tl.load(first_child_ptr + node)
    temperature = tl.load(temperature_ptr + batch * stride_temperature_batch)
    scale = triton_warping.exponent_scale(temperature)
    children = tl.arange(0, BLOCK_CHILDREN)
    is_child = children < num_children
    child_nodes = batch * num_nodes + first_child + children
    tokens = triton_nodes.child_tokens(
        tokens_ptr + batch * stride_tokens_batch + first_child, children, is_child, vocab
    )
    if FIRST:
        if temperature == 0.0:
            if chunk == 0:
                first_chunk = request_node * num_chunks
                decision = triton_nodes.greedy_decision(
                    tokens, first_child, target_peaks_ptr + first_chunk, best_tokens_ptr + first_chunk,
                    num_chunks, BLOCK_CHUNKS,
                )  # fmt: skip
                tl.store(decisions_ptr + request_node, decision)
            return

    target_peak, target_mass, cut = triton_nodes.target_numbers(
        target_peaks_ptr, target_masses_ptr, warped_ptr, request_node, num_chunks, scale, WARPED, BLOCK_CHUNKS
    )
    outside_peak, outside_mass = triton_warping.row_numbers(
        draft_peaks_ptr, draft_masses_ptr, request_node, num_chunks, scale, BLOCK_CHUNKS
    )
    child_target = tl.load(child_target_ptr + child_nodes, mask=is_child, other=float("-inf"))
    child_draft = tl.load(child_draft_ptr + child_nodes, mask=is_child, other=float("-inf"))
    if FIRST:
        is_drawn = tl.zeros([BLOCK_CHILDREN], tl.int32)
        log_ratio = tl.full([], float("-inf"), tl.float32)
        outside_residual = 0.0
        outside_target = 0.0
    else:
        is_drawn = tl.load(is_drawn_ptr + child_nodes, mask=children < rank, other=0)
        log_ratio = tl.load(log_ratio_ptr + old_half + request_node)
        chunks = tl.arange(0, BLOCK_CHUNKS)
        sum_ptrs = sums_ptr + ((old_half + request_node) * num_chunks + chunks) * 2
        outside_residual = tl.sum(tl.load(sum_ptrs, mask=chunks < num_chunks, other=0.0), 0)
        outside_target = tl.sum(tl.load(sum_ptrs + 1, mask=chunks < num_chunks, other=0.0), 0)
    seed = tl.load(seeds_ptr + batch * stride_seeds_batch)
    offset = tl.load(offsets_ptr + batch * stride_offsets_batch)
    target_row_ptr = target_logits_ptr + batch * stride_target_batch + node.to(tl.int64) * stride_target_node
    draft_row_ptr = draft_logits_ptr + batch * stride_draft_batch + node.to(tl.int64) * stride_draft_node
    reference = triton_nodes.draft_reference(outside_peak, child_draft)

    decision, is_draw, log_ratio = _test_child(
        rank, children, num_children, first_child, child_target, child_draft, is_drawn, outside_residual,
        outside_target, outside_peak, outside_mass, target_peak, target_mass, cut, log_ratio, scale, seed, offset,
        certain_ptr, stride_certain_node, FIRST, HAS_CERTAIN,
    )  # fmt: skip
    if REST:
        is_drawn = tl.where(children == rank, is_draw, is_drawn)
        while decision == PENDING:
            outside_residual = 0.0
            outside_target = 0.0
            for first_id in range(0, vocab, CHUNK):
                residual_sum, target_sum = triton_nodes.residual_sums(
                    target_row_ptr, draft_row_ptr, target_to_draft_ptr, first_id, vocab, draft_vocab, tokens,
                    target_peak, target_mass, cut, reference, log_ratio, scale, HAS_DRAFT, HAS_MAP, CHUNK,
                )  # fmt: skip
                outside_residual += residual_sum
                outside_target += target_sum
            rank += 1
            decision, is_draw, log_ratio = _test_child(
                rank, children, num_children, first_child, child_target, child_draft, is_drawn, outside_residual,
                outside_target, outside_peak, outside_mass, target_peak, target_mass, cut, log_ratio, scale, seed,
                offset, certain_ptr, stride_certain_node, False, HAS_CERTAIN,
            )  # fmt: skip
            is_drawn = tl.where(children == rank, is_draw, is_drawn)
        tl.store(is_drawn_ptr + child_nodes, is_drawn, mask=is_child)
        tl.store(last_ratio_ptr + request_node, log_ratio)
        tl.store(decisions_ptr + request_node, decision)
    else:
        if chunk == 0:
            tl.store(is_drawn_ptr + child_nodes, is_draw + tl.zeros_like(children), mask=children == rank)
            if decision == PENDING:
                tl.store(next_ranks_ptr + new_half + request_node, rank + 1)
                tl.store(log_ratio_ptr + new_half + request_node, log_ratio)
            else:
                tl.store(last_ratio_ptr + request_node, log_ratio)
                tl.store(decisions_ptr + request_node, decision)
        if decision == PENDING:
            residual_sum, target_sum = triton_nodes.residual_sums(
                target_row_ptr, draft_row_ptr, target_to_draft_ptr, chunk * CHUNK, vocab, draft_vocab, tokens,
                target_peak, target_mass, cut, reference, log_ratio, scale, HAS_DRAFT, HAS_MAP, CHUNK,
            )  # fmt: skip
            sum_ptr = sums_ptr + ((new_half + request_node) * num_chunks + chunk) * 2
            tl.store(sum_ptr, residual_sum)
            tl.store(sum_ptr + 1, target_sum)


@triton.jit(do_not_specialize=["num_nodes", "num_levels", "num_chunks"])
def draw_kernel(
    # inputs
    tokens_ptr,  # [batch, num_nodes] int64
    target_logits_ptr,  # [batch, num_nodes, vocab] fp32, bf16, fp16
    draft_logits_ptr,  # [batch, num_nodes, vocab, or draft_vocab if HAS_MAP] fp32, bf16, fp16; not of leaves
    target_to_draft_ptr,  # [vocab] int32 contiguous, read if HAS_MAP
    first_child_ptr,  # [num_nodes] int32 contiguous, requests stride_topology apart
    num_children_ptr,  # likewise
    temperature_ptr,  # [batch] fp32
    seeds_ptr,  # [batch] int64
    offsets_ptr,  # [batch] int64
    target_peaks_ptr,  # [batch, num_nodes, num_chunks] fp32 contiguous, as the four below
    target_masses_ptr,
    warped_ptr,  # [batch, num_nodes, 3] fp32, read if WARPED
    draft_peaks_ptr,
    draft_masses_ptr,
    child_draft_ptr,  # [batch, num_nodes] fp32 contiguous, as all below
    is_drawn_ptr,  # [batch, num_nodes] int32
    decisions_ptr,  # [batch, num_nodes] int32
    last_ratio_ptr,  # [batch, num_nodes] fp32
    # outputs
    nodes_ptr,  # [batch, num_levels] int32
    num_accepted_ptr,  # [batch] int32
    keys_ptr,  # [batch, 4, num_chunks] fp32 contiguous: residual, target outside the draws, target; peak of the logits
    key_tokens_ptr,  # [batch, 3, num_chunks] int32 contiguous
    # sizes
    vocab,
    draft_vocab,  # read if HAS_MAP
    num_nodes,
    num_levels,
    num_chunks,
    # strides, in elements; rows of logits are contiguous
    stride_topology,  # 0 for a tree that all requests share
    stride_tokens_batch,
    stride_target_batch,
    stride_target_node,
    stride_draft_batch,
    stride_draft_node,
    stride_temperature_batch,
    stride_seeds_batch,
    stride_offsets_batch,
    stride_nodes_batch,
    stride_nodes_level,
    stride_num_accepted_batch,
    # flags
    WARPED: tl.constexpr,
    HAS_DRAFT: tl.constexpr,  # else no row of the draft is read, and no child was drawn
    HAS_MAP: tl.constexpr,
    # blocks
    BLOCK_LEVELS: tl.constexpr,  # >= num_levels
    BLOCK_CHILDREN: tl.constexpr,  # >= children of any node
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    first_child_ptr += batch * stride_topology
    num_children_ptr += batch * stride_topology
    first_request_node = batch * num_nodes
    levels = tl.arange(0, BLOCK_LEVELS)
    path = tl.where(levels == 0, 0, -1)
    num_accepted = 1
    node = tl.full([], 0, tl.int32)
    decision = tl.load(decisions_ptr + first_request_node)
    while decision >= 0:
        node = decision
        path = tl.where(levels == num_accepted, node, path)
        num_accepted += 1
        decision = tl.load(decisions_ptr + first_request_node + node)
    if chunk == 0:
        tl.store(
            nodes_ptr + batch * stride_nodes_batch + levels.to(tl.int64) * stride_nodes_level,
            path,
            mask=levels < num_levels,
        )
        tl.store(num_accepted_ptr + batch * stride_num_accepted_batch, num_accepted)

    temperature = tl.load(temperature_ptr + batch * stride_temperature_batch)
    scale = triton_warping.exponent_scale(temperature)
    request_node = first_request_node + node
    num_children = tl.load(num_children_ptr + node)
    first_id = chunk * CHUNK
    ids = first_id + tl.arange(0, CHUNK)
    target_row_ptr = target_logits_ptr + batch * stride_target_batch + node.to(tl.int64) * stride_target_node
    target_logits = tl.load(target_row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    key_ptr = keys_ptr + batch * 4 * num_chunks + chunk
    key_token_ptr = key_tokens_ptr + batch * 3 * num_chunks + chunk
    if temperature == 0.0:
        peak = tl.max(target_logits, 0)
        tl.store(key_ptr, peak)
        tl.store(key_token_ptr, tl.min(tl.where(target_logits == peak, ids, NO_TOKEN), 0))
        tl.store(key_ptr + num_chunks, float("-inf"))
        tl.store(key_ptr + 2 * num_chunks, float("-inf"))
        tl.store(key_ptr + 3 * num_chunks, 0.0)
    else:
        noise = triton_streams.token_gumbel(
            tl.load(seeds_ptr + batch * stride_seeds_batch),
            tl.load(offsets_ptr + batch * stride_offsets_batch),
            RESIDUAL_TAG,
            first_id,
            CHUNK,
        )
        if num_children > 0:
            target_peak, target_mass, cut = triton_nodes.target_numbers(
                target_peaks_ptr, target_masses_ptr, warped_ptr, request_node, num_chunks, scale, WARPED, BLOCK_CHUNKS
            )
            target = triton_nodes.target_weights(target_logits, target_peak, cut, scale)
            children = tl.arange(0, BLOCK_CHILDREN)
            first_child = tl.load(first_child_ptr + node)
            child_nodes = first_request_node + first_child + children
            is_drawn = tl.load(is_drawn_ptr + child_nodes, mask=children < num_children, other=0) != 0
            tokens = triton_nodes.child_tokens(
                tokens_ptr + batch * stride_tokens_batch + first_child, children, is_drawn, vocab
            )
            child_draft = tl.load(child_draft_ptr + child_nodes, mask=children < num_children, other=float("-inf"))
            outside_peak, _ = triton_warping.row_numbers(
                draft_peaks_ptr, draft_masses_ptr, request_node, num_chunks, scale, BLOCK_CHUNKS
            )
            draft_row_ptr = draft_logits_ptr + batch * stride_draft_batch + node.to(tl.int64) * stride_draft_node
            draft_logits = triton_nodes.draft_at(
                draft_row_ptr, target_to_draft_ptr, ids, ids < vocab, draft_vocab, HAS_DRAFT, HAS_MAP
            )
            undrawn = tl.where(triton_nodes.is_outside(ids, first_id, tokens, CHUNK), target, 0.0)
            if decision == TARGET_LEFT:
                undrawn = tl.zeros_like(target)
            log_ratio = tl.load(last_ratio_ptr + request_node)
            residual = triton_nodes.residual_weights(
                undrawn,
                draft_logits,
                triton_nodes.draft_reference(outside_peak, child_draft),
                log_ratio,
                tl.log2(target_mass),
                scale,
            )
            key, token = _best_token(undrawn, noise, ids)
            tl.store(key_ptr + num_chunks, key)
            tl.store(key_token_ptr + num_chunks, token)
            key, token = _best_token(target, noise, ids)
            tl.store(key_ptr + 2 * num_chunks, key)
            tl.store(key_token_ptr + 2 * num_chunks, token)
        else:
            # A leaf's peak is known only with top-k or top-p; else every chunk has its own, which finish_kernel levels.
            if WARPED:
                target_peak = tl.load(warped_ptr + request_node * 3)
                cut = tl.load(warped_ptr + request_node * 3 + 2)
            else:
                target_peak = tl.max(target_logits, 0)
                target_peak = tl.where(target_peak == float("-inf"), 0.0, target_peak)
                cut = tl.full([], float("-inf"), tl.float32)
            residual = triton_nodes.target_weights(target_logits, target_peak, cut, scale)
            tl.store(key_ptr + num_chunks, float("-inf"))
            tl.store(key_ptr + 2 * num_chunks, float("-inf"))
        key, token = _best_token(residual, noise, ids)
        tl.store(key_ptr, key)
        tl.store(key_token_ptr, token)
        tl.store(key_ptr + 3 * num_chunks, target_peak)


@triton.jit(do_not_specialize=["num_chunks"])
def finish_kernel(
    # inputs
    temperature_ptr,  # [batch] fp32
    keys_ptr,  # [batch, 4, num_chunks] fp32 contiguous
    key_tokens_ptr,  # [batch, 3, num_chunks] int32 contiguous
    # outputs
    next_token_ptr,  # [batch] int64
    # sizes
    num_chunks,
    # strides, in elements
    stride_temperature_batch,
    stride_next_token_batch,
    # blocks
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
):
    batch = tl.program_id(0).to(tl.int64)
    scale = triton_warping.exponent_scale(tl.load(temperature_ptr + batch * stride_temperature_batch))
    chunks = tl.arange(0, BLOCK_CHUNKS)
    is_chunk = chunks < num_chunks
    key_ptrs = keys_ptr + batch * 4 * num_chunks + chunks
    key_token_ptrs = key_tokens_ptr + batch * 3 * num_chunks + chunks
    peaks = tl.load(key_ptrs + 3 * num_chunks, mask=is_chunk, other=-3.4028234663852886e38)
    below = tl.maximum(peaks - tl.max(peaks, 0), -1e30) * scale * LN_2
    best_token = tl.full([], NO_TOKEN, tl.int32)
    # The residual; the target outside the draws if there is none; the target itself if that is empty, too.
    for choice in tl.static_range(3):
        keys = tl.load(key_ptrs + choice * num_chunks, mask=is_chunk, other=float("-inf")) + below
        key = tl.max(keys, 0)
        # Where no chunk has a key, none has a token either: of greedy rows only the first choice is written.
        has_token = is_chunk & (keys == key) & (keys > float("-inf"))
        key_tokens = tl.load(key_token_ptrs + choice * num_chunks, mask=has_token, other=NO_TOKEN)
        is_first = (best_token == NO_TOKEN) & (key > float("-inf"))
        best_token = tl.where(is_first, tl.min(key_tokens, 0), best_token)
    tl.store(next_token_ptr + batch * stride_next_token_batch, best_token.to(tl.int64))
