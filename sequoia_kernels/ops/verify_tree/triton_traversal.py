"""The kernels of the rule "traversal" between those that both rules share. Launched by triton_launch.py.

Computes
    The accepted path of each request; the rule, its corners and their reasons are in traversal.py. At a node with the
    target's probabilities t(x), the draft's d(x) and the tokens S drawn and failed so far, the residual is
    max(t(x) - g d(x), 0) / f outside S, as in triton_launch.py, and p is the node's chance. With
        f = F(g) = sum outside S of max(t - g d, 0),   D = sum outside S of d,   at first  g = 0, f = 1,
    a child x enters with the chance min(1, p max(t(x) - g d(x), 0) / f / (d(x) / D)), and after it has failed
        g' = g + f / (p D),   f' = F(g') without x,   Z = p f' / f,   p' = Z / (Z + 1 - p).
    So the state of a node is (p, g, f), and one sum over the vocabulary takes it from child to child.
    There draft_i is d / D, and g' comes from p residual - draft_i = (p / f) (t - g d) - d / D. The draft_i of a certain
    child is 1 at x, which joins S, and 0 elsewhere: it enters with the chance min(1, p max(t(x) - g d(x), 0) / f), and
    after it has failed g' = g, with f', Z and p' as above. Of either kind Z is p at most, and so is p'.

Parallel plan: what one program owns
    Chances are no random numbers: a node's state after its i-th failure follows from its chance at entry and its
    first i children, and from nothing that happens below them. So no tree is walked here: a child can be tried once
    its left sibling was, or its parent if it is the first. The number of nodes that so come before it is its *wave*:
    its ancestors but the root, the left siblings of these and its own. Trees that are worth drafting have few waves,
    about as many as the larger of levels and branching: 9 for the optimal tree of 64 nodes, 13 for 128, 16 for 512. A
    walk would drop one child after the other. Between the kernels for rows and the draw, which triton_launch.py tells
    of, are
    1. `place_nodes_kernel`, a program a node: its parent, level and wave, and the numbers of its rows from their
       chunks, so that what follows has short chains of loads. At temperature 0 the decision.
    2. `try_children_kernel`, once a wave, a program for each child of the wave, chunk of the vocabulary and request:
       brings the parent's state up to date from the sums of the wave before (all programs of a child alike, so none
       waits for another), gives the child its chance, and sums F at the new g over its chunk, if it matters: not if
       the child will not fail (its chance is 1, or it is a leaf and its coin accepts it), and then no later sibling
       matters; nor behind the last child, if the node's chance is 1 and will stay so, or its coin rejects it as it is,
       since no chance ever rises. Chances of 0 are handed down without a look at the rows.
       A node comes right before two others at most, its next sibling and its first child: wave w has at most 2^w
       children, and at most num_nodes - 1 - w. Where it has more than the grid has room for, programs take several.
    3. `try_children_kernel` once more, one program a request, only for trees with more waves than have launches: the
       children left, in the order of their ids, in a loop.
    4. `leave_nodes_kernel`, a program a node: its chance at the end, against its coin.
    5. `choose_path_kernel`, a program a request: the first node, depth first, that its coin accepted, and the
       decisions on the path to it, which the draw follows.
    All that is kept belongs to one child or node and is written once, by a launch before those that read it; the order
    of every sum is fixed, there are no atomics, no waiting programs: results repeat bit for bit.

Memory: bytes read and written
    Both rows of a node once from memory, and once more from L2 for each of its children whose failure matters; maps and
    flags as in triton_launch.py. Writes 24 bytes a chunk and node, and 76 bytes a node.
    Estimate for the tree of 64 nodes x 128256 on an H100, not timed on one: first reads 5 us, places 2 us, nine waves
    that do work at about 2.2 us and four launches that find none at 1.3 us, leaving and choosing 4 us, the draw 3.5 us,
    the end 2 us: about 42 us in a CUDA graph, 50 us for 128 nodes. A walk, one drop after the other, would take 63
    launches of which some 38 do work: about 130 us.

Numerics
    float32 throughout, as in triton_launch.py: g d(reference) as a logarithm, weights relative to the row's peak.
    Chances below the smallest normal number are 0. Coins within a rounding error of their chance may fall the other
    way than in the reference; the probability of that is about 1e-6 a node.

Source
    Traversal verification (arXiv 2505.12398) for children drawn without replacement, unrolled as above.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_streams, triton_warping

from . import triton_nodes
from .triton_nodes import NO_TOKEN, NONE_ACCEPTED, TARGET_LEFT

__all__ = ["choose_path_kernel", "leave_nodes_kernel", "place_nodes_kernel", "try_children_kernel"]

ACCEPT_TAG = triton_streams.ACCEPT_TAG
NO_NODE = NO_TOKEN
SMALLEST_NORMAL = triton_warping.SMALLEST_NORMAL


# jit helpers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _coin(seed, offset, node):
    return triton_streams.coin(triton_streams.stream_words(seed, offset, ACCEPT_TAG, node)[0])


@triton.jit
def _state_behind(
    chance,  # state that was noted when the child was tried
    log_ratio,  # log2 of g d(reference)
    residual_mass,  # 0: nothing is left of residual and target, and the target itself takes their place
    has_sums,  # whether its failure has changed that state
    sums_ptr,  # of the child: [2, num_chunks] fp32, read if so
    num_chunks,
    child_target,  # [children] fp32 target logits of the node's children
    child_draft,  # [children] fp32
    is_left,  # [children] those not drawn: neither the child nor siblings before it
    target_peak,
    target_mass,
    cut,
    reference,
    scale,
    BLOCK_CHUNKS: tl.constexpr,
):
    """The state of a node, (chance, log_ratio, residual_mass), once a child of it has failed."""
    if has_sums:
        chunks = tl.arange(0, BLOCK_CHUNKS)
        outside_residual = tl.sum(tl.load(sums_ptr + chunks, mask=chunks < num_chunks, other=0.0), 0)
        outside_target = tl.sum(tl.load(sums_ptr + num_chunks + chunks, mask=chunks < num_chunks, other=0.0), 0)
        target = triton_nodes.target_weights(child_target, target_peak, cut, scale) / target_mass
        residual = triton_nodes.residual_weights(target, child_draft, reference, log_ratio, 0.0, scale)
        left_mass = outside_residual / target_mass + tl.sum(tl.where(is_left, residual, 0.0), 0)
        if chance == 1.0:  # it stays 1, whatever a quotient of rounded numbers would say
            if left_mass <= 0.0:
                left_mass = outside_target / target_mass + tl.sum(tl.where(is_left, target, 0.0), 0)
                log_ratio = tl.full([], float("-inf"), tl.float32)
        else:
            wanted = chance * (left_mass / residual_mass)
            chance = wanted / (wanted + (1.0 - chance))
            chance = tl.where(chance >= SMALLEST_NORMAL, chance, 0.0)
        residual_mass = left_mass
    return chance, log_ratio, residual_mass


@triton.jit
def _try_child(
    child,
    first_request_node,  # int64: where the request's nodes begin in what is kept of nodes
    is_writer,  # whether this program is the one that notes what comes out
    # inputs and outputs as in try_children_kernel; the first four of the request
    tokens_ptr,
    first_child_ptr,
    num_children_ptr,
    certain_ptr,
    parents_ptr,
    numbers_ptr,
    child_target_ptr,
    child_draft_ptr,
    is_drawn_ptr,
    chances_ptr,
    states_ptr,
    sums_ptr,
    # sizes
    vocab,
    num_chunks,
    # scalars
    scale,
    seed,
    offset,
    # strides, in elements
    stride_certain_node,
    # flags
    HAS_CERTAIN: tl.constexpr,
    # blocks
    BLOCK_CHILDREN: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Try one child: note its chance, whether it is a draw, and its parent's state but for the sums.

    Return whether they are to be taken, and what that needs: the parent, the tokens of its children, the peak, mass and
    cut of its target, the reference of its draft, and the new log_ratio.
    """
    request_child = first_request_node + child
    node = tl.load(parents_ptr + request_child)
    request_node = first_request_node + node
    first_child = tl.load(first_child_ptr + node)
    num_children = tl.load(num_children_ptr + node)
    rank = child - first_child
    children = tl.arange(0, BLOCK_CHILDREN)
    is_child = children < num_children
    tokens = triton_nodes.child_tokens(tokens_ptr + first_child, children, is_child, vocab)
    child_nodes = first_request_node + first_child + children
    numbers_ptr += request_node * 5
    target_peak = tl.load(numbers_ptr)
    target_mass = tl.load(numbers_ptr + 1)
    cut = tl.load(numbers_ptr + 2)
    outside_peak = tl.load(numbers_ptr + 3)
    outside_mass = tl.load(numbers_ptr + 4)
    child_target = tl.load(child_target_ptr + child_nodes, mask=is_child, other=float("-inf"))
    child_draft = tl.load(child_draft_ptr + child_nodes, mask=is_child, other=float("-inf"))
    is_left = tl.load(is_drawn_ptr + child_nodes, mask=children < rank, other=0) == 0
    reference = triton_nodes.draft_reference(outside_peak, child_draft)

    # The state behind the sibling before this one; that in which the node was entered for the first child.
    is_first = rank == 0
    last_state_ptr = states_ptr + (request_child - 1) * 4
    chance, log_ratio, residual_mass = _state_behind(
        tl.where(
            is_first,
            tl.load(chances_ptr + request_node, mask=is_first & (node > 0), other=1.0),
            tl.load(last_state_ptr, mask=rank > 0, other=0.0),
        ),
        tl.load(last_state_ptr + 1, mask=rank > 0, other=float("-inf")),
        tl.load(last_state_ptr + 2, mask=rank > 0, other=1.0),
        tl.load(last_state_ptr + 3, mask=rank > 0, other=0.0) != 0.0,
        sums_ptr + (request_child - 1) * 2 * num_chunks,
        num_chunks,
        child_target,
        child_draft,
        is_left,
        target_peak,
        target_mass,
        cut,
        reference,
        scale,
        BLOCK_CHUNKS,
    )

    # All fails below a chance of 0, and every child of a node that only the target itself is left of.
    child_chance = tl.full([], 0.0, tl.float32)
    is_draw = child < 0
    needs_sums = child < 0
    if (chance > 0.0) & (residual_mass > 0.0):
        is_tested = children == rank
        target = triton_nodes.target_weights(child_target, target_peak, cut, scale) / target_mass
        residual = triton_nodes.residual_weights(target, child_draft, reference, log_ratio, 0.0, scale)
        draft, draft_mass, base = triton_nodes.draft_left(child_draft, is_left, outside_peak, outside_mass, scale)
        tested_residual = tl.sum(tl.where(is_tested, residual, 0.0), 0) / residual_mass
        tested_draft = tl.sum(tl.where(is_tested, draft, 0.0), 0) / draft_mass
        if HAS_CERTAIN:
            is_certain = tl.load(certain_ptr + child.to(tl.int64) * stride_certain_node)
            tested_draft = tl.where(
                is_certain, triton_nodes.certain_draw(is_tested, child_target, child_draft), tested_draft
            )
        is_draw = tested_draft > 0.0
        if is_draw:
            child_chance = tl.minimum(chance * tested_residual / tested_draft, 1.0)
            child_chance = tl.where(child_chance >= SMALLEST_NORMAL, child_chance, 0.0)
            added = tl.log2(residual_mass) - tl.log2(chance) + (reference - base) * scale - tl.log2(draft_mass)
            higher = tl.maximum(log_ratio, added)
            failed_ratio = higher + tl.log2(tl.exp2(log_ratio - higher) + tl.exp2(added - higher))
            if HAS_CERTAIN:
                failed_ratio = tl.where(is_certain, log_ratio, failed_ratio)
            log_ratio = failed_ratio
            is_leaf = tl.load(num_children_ptr + child) == 0
            is_last = rank + 1 == num_children
            is_over = (child_chance == 1.0) | (is_leaf & (_coin(seed, offset, child) < child_chance))
            is_over = is_over | (is_last & (chance < 1.0) & (_coin(seed, offset, node) >= chance))
            needs_sums = (is_over == 0) & ((is_last == 0) | (chance < 1.0))
            chance = tl.where(is_over, 0.0, chance)
    if is_writer:
        tl.store(chances_ptr + request_child, child_chance)
        tl.store(is_drawn_ptr + request_child, tl.where(is_draw, 1, 0))
        state_ptr = states_ptr + request_child * 4
        tl.store(state_ptr, chance)
        tl.store(state_ptr + 1, log_ratio)
        tl.store(state_ptr + 2, residual_mass)
        tl.store(state_ptr + 3, tl.where(needs_sums, 1.0, 0.0))
    return needs_sums, node, tokens, target_peak, target_mass, cut, reference, log_ratio


# kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_nodes", "num_chunks"])
def place_nodes_kernel(
    # inputs
    tokens_ptr,  # [batch, num_nodes] int64
    first_child_ptr,  # [num_nodes] int32 contiguous, requests stride_topology apart
    num_children_ptr,  # likewise
    temperature_ptr,  # [batch] fp32
    target_peaks_ptr,  # [batch, num_nodes, num_chunks] fp32 contiguous, as the five below
    target_masses_ptr,
    warped_ptr,  # [batch, num_nodes, 3] fp32, read if WARPED
    draft_peaks_ptr,
    draft_masses_ptr,
    best_tokens_ptr,  # int32, read at temperature 0
    # outputs, all contiguous
    parents_ptr,  # [batch, num_nodes] int32; at temperature 0 only decisions are written
    levels_ptr,  # [batch, num_nodes] int32, -1 of what the root is no ancestor of
    waves_ptr,  # [batch, num_nodes] int32, -1 of the root, too
    numbers_ptr,  # [batch, num_nodes, 5] fp32: peak, mass and cut of the target, peak and mass of the draft outside
    decisions_ptr,  # [batch, num_nodes] int32, written at temperature 0, of nodes with children
    # sizes
    vocab,
    num_nodes,
    num_chunks,
    # strides, in elements
    stride_topology,  # 0 for a tree that all requests share
    stride_tokens_batch,
    stride_temperature_batch,
    # flags
    WARPED: tl.constexpr,
    # blocks
    BLOCK_NODES: tl.constexpr,  # >= num_nodes
    BLOCK_CHILDREN: tl.constexpr,  # >= children of any node
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
):
    node = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    first_child_ptr += batch * stride_topology
    num_children_ptr += batch * stride_topology
    request_node = batch * num_nodes + node
    num_children = tl.load(num_children_ptr + node)
    temperature = tl.load(temperature_ptr + batch * stride_temperature_batch)
    if temperature == 0.0:
        if num_children > 0:
            first_child = tl.load(first_child_ptr + node)
            children = tl.arange(0, BLOCK_CHILDREN)
            tokens = triton_nodes.child_tokens(
                tokens_ptr + batch * stride_tokens_batch + first_child, children, children < num_children, vocab
            )
            first_chunk = request_node * num_chunks
            decision = triton_nodes.greedy_decision(
                tokens, first_child, target_peaks_ptr + first_chunk, best_tokens_ptr + first_chunk,
                num_chunks, BLOCK_CHUNKS,
            )  # fmt: skip
            tl.store(decisions_ptr + request_node, decision)
        return

    if num_children > 0:
        scale = triton_warping.exponent_scale(temperature)
        target_peak, target_mass, cut = triton_nodes.target_numbers(
            target_peaks_ptr, target_masses_ptr, warped_ptr, request_node, num_chunks, scale, WARPED, BLOCK_CHUNKS
        )
        outside_peak, outside_mass = triton_warping.row_numbers(
            draft_peaks_ptr, draft_masses_ptr, request_node, num_chunks, scale, BLOCK_CHUNKS
        )
        numbers_ptr += request_node * 5
        tl.store(numbers_ptr, target_peak)
        tl.store(numbers_ptr + 1, target_mass)
        tl.store(numbers_ptr + 2, cut)
        tl.store(numbers_ptr + 3, outside_peak)
        tl.store(numbers_ptr + 4, outside_mass)

    # Upwards to the root; nodes lie behind their parents.
    nodes = tl.arange(0, BLOCK_NODES)
    first_children = tl.load(first_child_ptr + nodes, mask=nodes < num_nodes, other=-1)
    ends = first_children + tl.load(num_children_ptr + nodes, mask=nodes < num_nodes, other=0)
    ancestor = node
    level = 0
    wave = -1
    while ancestor > 0:
        is_parent = (nodes < ancestor) & (first_children <= ancestor) & (ancestor < ends)
        parent = tl.max(tl.where(is_parent, nodes, -1), 0)
        wave += 1 + ancestor - tl.max(tl.where(is_parent, first_children, -1), 0)
        level += 1
        if ancestor == node:
            tl.store(parents_ptr + request_node, parent)
        ancestor = parent
    if node == 0:
        tl.store(parents_ptr + request_node, -1)
    tl.store(levels_ptr + request_node, tl.where(ancestor < 0, -1, level))
    tl.store(waves_ptr + request_node, tl.where(ancestor < 0, -1, wave))


@triton.jit(do_not_specialize=["num_nodes", "num_chunks", "wave"])
def try_children_kernel(
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
    parents_ptr,  # [batch, num_nodes] int32 contiguous, as all below
    waves_ptr,  # [batch, num_nodes] int32
    numbers_ptr,  # [batch, num_nodes, 5] fp32
    child_target_ptr,  # [batch, num_nodes] fp32
    child_draft_ptr,  # [batch, num_nodes] fp32
    # inputs and outputs: written of the children of this wave, read of those of waves before
    is_drawn_ptr,  # [batch, num_nodes] int32
    chances_ptr,  # [batch, num_nodes] fp32: with which a node is entered
    states_ptr,  # [batch, num_nodes, 4] fp32, of the parent: chance before the node fails, or 0 if nothing hangs on it;
    # log_ratio after that; mass of the residual before; whether sums take them to what is left after
    sums_ptr,  # [batch, num_nodes, 2, num_chunks] fp32, of the parent: residual and target outside its children
    # sizes
    vocab,
    draft_vocab,  # read if HAS_MAP
    num_nodes,
    num_chunks,
    wave,
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
    HAS_DRAFT: tl.constexpr,  # else no row of the draft is read, and no child was drawn
    HAS_MAP: tl.constexpr,
    HAS_CERTAIN: tl.constexpr,
    REST: tl.constexpr,  # also all waves behind it, one program a request, in the order of the nodes
    # blocks
    BLOCK_NODES: tl.constexpr,  # >= num_nodes
    BLOCK_CHILDREN: tl.constexpr,  # >= children of any node
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
    CHUNK: tl.constexpr,  # tokens that a program reads at a time: all of its own, if not REST
):
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    temperature = tl.load(temperature_ptr + batch * stride_temperature_batch)
    if temperature == 0.0:
        return
    first_child_ptr += batch * stride_topology
    num_children_ptr += batch * stride_topology
    tokens_ptr += batch * stride_tokens_batch
    target_logits_ptr += batch * stride_target_batch
    draft_logits_ptr += batch * stride_draft_batch
    if HAS_CERTAIN:
        certain_ptr += batch * stride_certain_batch
    first_request_node = batch * num_nodes
    scale = triton_warping.exponent_scale(temperature)
    seed = tl.load(seeds_ptr + batch * stride_seeds_batch)
    offset = tl.load(offsets_ptr + batch * stride_offsets_batch)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    nodes = tl.arange(0, BLOCK_NODES)
    waves = tl.load(waves_ptr + first_request_node + nodes, mask=nodes < num_nodes, other=-1)
    if REST:
        is_due = waves >= wave
    else:
        is_due = waves == wave
    places = tl.where(is_due, tl.cumsum(is_due.to(tl.int32), 0) - 1, -1)
    slot = tl.program_id(1)
    child = tl.max(tl.where(places == slot, nodes, -1), 0)
    while child >= 0:
        needs_sums, node, tokens, target_peak, target_mass, cut, reference, log_ratio = _try_child(
            child, first_request_node, chunk == 0,
            tokens_ptr, first_child_ptr, num_children_ptr, certain_ptr, parents_ptr, numbers_ptr, child_target_ptr,
            child_draft_ptr, is_drawn_ptr, chances_ptr, states_ptr, sums_ptr,
            vocab, num_chunks, scale, seed, offset, stride_certain_node, HAS_CERTAIN, BLOCK_CHILDREN, BLOCK_CHUNKS,
        )  # fmt: skip
        if needs_sums:
            target_row_ptr = target_logits_ptr + node.to(tl.int64) * stride_target_node
            draft_row_ptr = draft_logits_ptr + node.to(tl.int64) * stride_draft_node
            child_sums_ptr = sums_ptr + (first_request_node + child) * 2 * num_chunks
            if REST:
                outside_residual = 0.0
                outside_target = 0.0
                for first_id in range(0, vocab, CHUNK):
                    residual_sum, target_sum = triton_nodes.residual_sums(
                        target_row_ptr, draft_row_ptr, target_to_draft_ptr, first_id, vocab, draft_vocab, tokens,
                        target_peak, target_mass, cut, reference, log_ratio, scale, HAS_DRAFT, HAS_MAP, CHUNK,
                    )  # fmt: skip
                    outside_residual += residual_sum
                    outside_target += target_sum
                is_chunk = chunks < num_chunks
                tl.store(child_sums_ptr + chunks, tl.where(chunks == 0, outside_residual, 0.0), mask=is_chunk)
                child_sums_ptr += num_chunks
                tl.store(child_sums_ptr + chunks, tl.where(chunks == 0, outside_target, 0.0), mask=is_chunk)
            else:
                residual_sum, target_sum = triton_nodes.residual_sums(
                    target_row_ptr, draft_row_ptr, target_to_draft_ptr, chunk * CHUNK, vocab, draft_vocab, tokens,
                    target_peak, target_mass, cut, reference, log_ratio, scale, HAS_DRAFT, HAS_MAP, CHUNK,
                )  # fmt: skip
                tl.store(child_sums_ptr + chunk, residual_sum)
                tl.store(child_sums_ptr + num_chunks + chunk, target_sum)
        if REST:
            tl.debug_barrier()  # the program's own threads read it next
        slot += tl.num_programs(1)
        child = tl.max(tl.where(places == slot, nodes, -1), 0)


@triton.jit(do_not_specialize=["num_nodes", "num_chunks"])
def leave_nodes_kernel(
    # inputs
    first_child_ptr,  # [num_nodes] int32 contiguous, requests stride_topology apart
    num_children_ptr,  # likewise
    temperature_ptr,  # [batch] fp32
    seeds_ptr,  # [batch] int64
    offsets_ptr,  # [batch] int64
    levels_ptr,  # [batch, num_nodes] int32 contiguous, as all below
    numbers_ptr,  # [batch, num_nodes, 5] fp32
    child_target_ptr,  # [batch, num_nodes] fp32
    child_draft_ptr,  # [batch, num_nodes] fp32
    is_drawn_ptr,  # [batch, num_nodes] int32
    chances_ptr,  # [batch, num_nodes] fp32
    states_ptr,  # [batch, num_nodes, 4] fp32
    sums_ptr,  # [batch, num_nodes, 2, num_chunks] fp32
    # outputs; not written at temperature 0
    accepted_levels_ptr,  # [batch, num_nodes] int32: level of a node whose coin accepts it once all below have failed
    decisions_ptr,  # [batch, num_nodes] int32, written of nodes with children
    last_ratio_ptr,  # [batch, num_nodes] fp32, likewise
    # sizes
    num_nodes,
    num_chunks,
    # strides, in elements
    stride_topology,  # 0 for a tree that all requests share
    stride_temperature_batch,
    stride_seeds_batch,
    stride_offsets_batch,
    # blocks
    BLOCK_CHILDREN: tl.constexpr,  # >= children of any node
    BLOCK_CHUNKS: tl.constexpr,  # >= num_chunks
):
    node = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + batch * stride_temperature_batch)
    if temperature == 0.0:
        return
    request_node = batch * num_nodes + node
    level = tl.load(levels_ptr + request_node)
    chance = tl.load(chances_ptr + request_node, mask=(node > 0) & (level >= 0), other=0.0)
    num_children = tl.load(num_children_ptr + batch * stride_topology + node)
    if num_children > 0:
        if level >= 0:
            scale = triton_warping.exponent_scale(temperature)
            first_child = batch * num_nodes + tl.load(first_child_ptr + batch * stride_topology + node)
            last_child = first_child + num_children - 1
            children = tl.arange(0, BLOCK_CHILDREN)
            is_child = children < num_children
            numbers_ptr += request_node * 5
            child_draft = tl.load(child_draft_ptr + first_child + children, mask=is_child, other=float("-inf"))
            state_ptr = states_ptr + last_child * 4
            chance, log_ratio, residual_mass = _state_behind(
                tl.load(state_ptr),
                tl.load(state_ptr + 1),
                tl.load(state_ptr + 2),
                tl.load(state_ptr + 3) != 0.0,
                sums_ptr + last_child * 2 * num_chunks,
                num_chunks,
                tl.load(child_target_ptr + first_child + children, mask=is_child, other=float("-inf")),
                child_draft,
                tl.load(is_drawn_ptr + first_child + children, mask=is_child, other=0) == 0,
                tl.load(numbers_ptr),
                tl.load(numbers_ptr + 1),
                tl.load(numbers_ptr + 2),
                triton_nodes.draft_reference(tl.load(numbers_ptr + 3), child_draft),
                scale,
                BLOCK_CHUNKS,
            )
            tl.store(last_ratio_ptr + request_node, log_ratio)
            tl.store(decisions_ptr + request_node, tl.where(residual_mass > 0.0, NONE_ACCEPTED, TARGET_LEFT))
    seed = tl.load(seeds_ptr + batch * stride_seeds_batch)
    offset = tl.load(offsets_ptr + batch * stride_offsets_batch)
    tl.store(accepted_levels_ptr + request_node, tl.where(_coin(seed, offset, node) < chance, level, -1))


@triton.jit(do_not_specialize=["num_nodes", "num_levels"])
def choose_path_kernel(
    # inputs
    temperature_ptr,  # [batch] fp32
    parents_ptr,  # [batch, num_nodes] int32 contiguous, as all below
    accepted_levels_ptr,  # [batch, num_nodes] int32
    # outputs
    decisions_ptr,  # [batch, num_nodes] int32: the child on the path, of the nodes above its end
    # sizes
    num_nodes,
    num_levels,
    # strides, in elements
    stride_temperature_batch,
    # blocks
    BLOCK_NODES: tl.constexpr,  # >= num_nodes
):
    batch = tl.program_id(0).to(tl.int64)
    if tl.load(temperature_ptr + batch * stride_temperature_batch) == 0.0:
        return
    parents_ptr += batch * num_nodes
    decisions_ptr += batch * num_nodes
    nodes = tl.arange(0, BLOCK_NODES)
    accepted_levels = tl.load(accepted_levels_ptr + batch * num_nodes + nodes, mask=nodes < num_nodes, other=-1)
    # From the deepest level up: the first node so far and its ancestor on the level, which is where it has its place
    # among the level's own nodes; one that lies above it, or to the right, is left later.
    best = tl.full([], 0, tl.int32)
    ancestor = tl.full([], NO_NODE, tl.int32)
    level = num_levels - 1
    while level > 0:
        first = tl.min(tl.where(accepted_levels == level, nodes, NO_NODE), 0)
        best = tl.where(first < ancestor, first, best)
        ancestor = tl.minimum(first, ancestor)
        ancestor = tl.load(parents_ptr + ancestor, mask=ancestor < num_nodes, other=NO_NODE)
        level -= 1
    while best > 0:
        parent = tl.load(parents_ptr + best)
        tl.store(decisions_ptr + parent, best)
        best = parent
