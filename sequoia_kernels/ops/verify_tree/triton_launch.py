"""verify_tree in Triton: all nodes at once from their logits, then a short walk. Inputs and outputs as in op.py.

The kernels are in triton_kernels.py; here they are configured and launched.

Computes
    The accepted path and the next token of each request; the rule, its corners and their reasons are in reference.py.
    At a node, with the target's probabilities t(x), the draft's d(x) and the tokens S drawn and rejected so far, the
    residual is max(t(x) - g d(x), 0) / f outside S: one number g says all about the past, because
        f = sum outside S of max(t - g d, 0),   D = sum outside S of d,   and a rejection takes g to g + f / D.
    So the vocabulary is needed for one sum only, F(g) = sum of max(t - g d, 0) over the tokens that are no child of the
    node; the children still left are added one by one. Likewise D is the mass outside the children, taken once, plus
    the children left: no difference of nearly equal sums occurs, and g and D are kept as logarithms, so that a draft
    whose first token holds all mass that float32 can see is no special case.
    A certain child x is proposed with all mass: it is accepted where its coin is below its residual. A rejection leaves
    max(residual - [is x], 0), which is the residual without x: x joins S, g stays, f = F(g) without it and D without
    d(x) follow. So what a child is says only whether g moves. Without a draft, d is 0 and all children that were not
    certain are no draws.
    A draft of a smaller vocabulary has d(x) at the place of x in its row, and 0 where it has none: wherever a row is
    read, `target_to_draft` is read first.
    A token that several children have is one child's: of the first that can be a draw, since it is certain or the draft
    has a logit for it. The others are passed over.

Parallel plan: what one program owns
    1. `node_chunks_kernel`, a program for each node with children, chunk of the vocabulary and request: peak and mass
       of the target's row, and of the draft's outside the children. At temperature 0 the target's largest logit.
       With top-k or top-p the largest logit of every 512 tokens, too.
    2. Only with top-k or top-p: `collect_nodes_kernel`, as many programs, copies the logits that may be the cut or
       above it; `warp_nodes_kernel`, a program a node, finds the cut among them, and the mass above it. How is told in
       triton_warping.py.
    The next two decide by the rule "sequoia"; those of the rule "traversal" are told in triton_traversal.py.
    3. `decide_kernel`, once for each rank up to MAX_RANK_LAUNCHES: adds up F from the chunks, tests the child of that
       rank (all programs of a node alike, so none waits for another), and if it is rejected, sums F at the new g over
       its chunk.
       Decided nodes, most of them after one rank, leave at once; and only (nodes - 1) / (rank + 1) of them can have a
       child of that rank, so that the grid shrinks.
    4. `decide_kernel` once more, one program a node, only for trees with more children than that: the ranks left, in a
       loop.
    5. `draw_kernel`, a program for each chunk and request: walks the decisions from the root to the last accepted node
       (every program for itself, a few cached loads) and finds the chunk's best token of the residual there. Only this
       one node's noise is ever needed.
    6. `finish_kernel`, a program a request: the best of the chunks.
    The order of every sum is fixed, or does not matter; there are no waiting programs, and none that read what others
    of their launch write; atomics only hand out places to candidates. Results repeat bit for bit.

Memory: bytes read and written
    Target and draft rows of nodes with children once from memory, and once more from L2 for each rejection after which
    there is another child; leaves' rows are not read, but for the one that a path ends in (all target rows with top-k
    or top-p). Writes 24 bytes a chunk and node, nothing of vocabulary size. With a map, each read of a draft row is one
    of 4 bytes a token of the target's vocabulary (the same for all nodes, so from L2: 513 kB of 128256 tokens) and a
    gather of the row, whose neighbours are read together where the map rises; certain children take a byte each.
    Without a draft no row of it is read. Floor (both tensors once, bf16, 4.3 TB/s):
    64 x 128256 7.6 us, 128 x 128256 15.3 us.
    Estimate for a tree of 64 nodes, 30 of them with children, 8 at most: 16 MB of first reads 5 us, the first
    rejections 4 us, six further ranks at about 2 us, the draw 3.5 us, the end 2 us: 27 to 30 us in a CUDA graph, of
    which half is launches; 128 nodes 38 us. With top-k or top-p add 8 us for the cuts of ordinary rows (a second
    reading from L2 3.5, the search 4 to 5), which no GPU has run yet, and 20 to 40 for rows that a program must read by
    itself. An H100 with other work on it took 55 us for the 64 nodes
    (`bench/results/nvidia-h100-80gb-hbm3/verify_tree.json`).

Numerics
    float32 throughout; weights are relative to the row's peak. Sums run over chunks, so coins within a rounding error
    of their threshold may fall the other way than in the reference; the probability of that is about 1e-6 a node. The
    draw takes the reference's steps for the noise.

Source
    Sequoia (arXiv 2402.12374), algorithm 2, unrolled as above; Gumbel-max for the draw.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sequoia_kernels.ops import triton_device, triton_warping

from .op import VerifiedPath, VerifyTreeInputs, rule_reason
from .triton_kernels import (
    collect_nodes_kernel,
    decide_kernel,
    draw_kernel,
    finish_kernel,
    node_chunks_kernel,
    warp_nodes_kernel,
)
from .triton_traversal import (
    choose_path_kernel,
    leave_nodes_kernel,
    place_nodes_kernel,
    try_children_kernel,
)

__all__ = ["LaunchConfig", "run", "supports", "unavailable"]

# tuning table --------------------------------------------------------------------------------------------------------

# Chosen by compiling (no spills) and by the estimate above. Not tuned on a device.
_MOST_CHUNK = 4096
_LEAST_CHUNK = 512
_CHUNK_TOKENS_PER_WARP = 512
_ROW_TILE = 4096
"""tokens that the program of a node reads at a time"""
_ROW_TOKENS_PER_WARP = 256
MAX_RANK_LAUNCHES = 8
"""ranks with a launch of their own; further children, which few nodes have and fewer come to, share one"""
MAX_WAVE_LAUNCHES = 24
"""waves of the rule "traversal" with a launch of their own; further ones share one"""
_SPARE_WAVES = 3
"""more launches than most optimal trees need; each that finds nothing to do costs a microsecond"""
_MOST_OF_MEAN = 3
"""programs of a wave for so many times the children that a wave has in the mean"""
_NODES_PER_WARP = 256
_REST = 0
"""in place of a number of children: all waves that are left"""


# launch configuration ------------------------------------------------------------------------------------------------


class LaunchConfig(NamedTuple):
    """Everything about a launch that the device and the shapes decide."""

    chunk: int
    """tokens of a program that shares a row with others"""
    num_chunks: int
    chunk_warps: int
    row_tile: int
    """tokens that a program which has a row for itself reads at a time"""
    row_warps: int
    rank_launches: int = MAX_RANK_LAUNCHES
    wave_launches: int = MAX_WAVE_LAUNCHES
    candidates: int = triton_warping.MAX_CANDIDATES
    """room for the logits among which the search of a cut ends"""


@functools.lru_cache(maxsize=1024)
def _launch_config(batch_size: int, num_nodes: int, vocab: int, traits: triton_device.DeviceTraits) -> LaunchConfig:
    """Choose the launch of a call from its shapes and its device."""
    padded_vocab = max(_LEAST_CHUNK, triton.next_power_of_2(vocab))
    chunk = min(_MOST_CHUNK, padded_vocab)
    while chunk > _LEAST_CHUNK and batch_size * num_nodes * triton.cdiv(vocab, chunk) < 4 * traits.num_sms:
        chunk //= 2
    row_tile = min(_ROW_TILE, padded_vocab)
    return LaunchConfig(
        chunk,
        triton.cdiv(vocab, chunk),
        max(2, chunk // _CHUNK_TOKENS_PER_WARP),
        row_tile,
        row_tile // _ROW_TOKENS_PER_WARP,
        candidates=min(row_tile, triton_warping.MAX_CANDIDATES),  # they stay in registers of as many warps
    )


def _wave_launches(num_nodes: int, num_levels: int, max_branching: int, most: int) -> list[int]:
    """Give the children that each launch of the rule "traversal" has programs for; the last one may be `_REST`.

    Optimal trees have about as many waves as the larger of levels and branching, since a node is worth no more than
    those that it has before it; others, such as full ones, up to their product.
    """
    num_waves = min(num_nodes - 1, (num_levels - 1) * max_branching)
    usual = max(num_levels - 1, max_branching)
    num_launches = min(num_waves, most, usual + _SPARE_WAVES)
    room = triton.cdiv(_MOST_OF_MEAN * (num_nodes - 1), usual)
    launches = [min(2**wave, num_nodes - 1 - wave, room) for wave in range(num_launches)]
    return [*launches, _REST] if num_launches < num_waves else launches


unavailable = triton_device.unavailable_reason


def supports(inputs: VerifyTreeInputs) -> str | None:
    """Whether the kernels can run this call."""
    if torch.float64 in (tensor.dtype for tensor in inputs[1:3] if tensor is not None):
        return "takes float32, bfloat16 and float16"
    if inputs.tokens.shape[0] > 65535:
        return "takes up to 65535 requests"
    return rule_reason(inputs, ("sequoia", "traversal")) or triton_device.device_reason(inputs.tokens.device)


def run(inputs: VerifyTreeInputs, outputs: VerifiedPath, config: LaunchConfig | None = None) -> None:
    """Write the outputs. ``config`` overrules the launch configuration, for tests and tuning."""
    tokens, target_logits = inputs[:2]
    num_levels, max_branching, temperature, seeds, offsets, top_k, top_p, rule = inputs[5:13]
    nodes, num_accepted, next_token = outputs
    batch_size, num_nodes, vocab = target_logits.shape
    if vocab == 1:
        top_k = top_p = None  # they leave a single token; find_cut takes two and more
    if config is None:
        config = _launch_config(batch_size, num_nodes, vocab, triton_device.device_traits(tokens.device))
    if max_branching == 0:  # only a root, behind which nothing was drafted: one variant of the kernels for all forms
        inputs = inputs._replace(draft_logits=target_logits, target_to_draft=None, certain=None)
    draft = _draft_form(inputs)
    draft_logits = target_logits if inputs.draft_logits is None else inputs.draft_logits  # not read in place of None
    first_child, num_children = inputs.first_child.contiguous(), inputs.num_children.contiguous()
    inputs = inputs._replace(draft_logits=draft_logits, first_child=first_child, num_children=num_children)

    num_chunks = config.num_chunks
    request_nodes = batch_size * num_nodes
    records = request_nodes * num_chunks
    is_warped = top_k is not None or top_p is not None
    group = min(config.chunk, triton_warping.PEAK_TOKENS)
    (
        target_peaks, target_masses, target_lowest, target_groups, draft_peaks, draft_masses,
        warped, child_target, child_draft, last_ratio, keys, scratch,
    ) = _workspace(
        target_logits, torch.float32,
        records, records, records if is_warped else 0, records * (config.chunk // group) if is_warped else 0,
        records, records,
        3 * request_nodes, request_nodes, request_nodes, request_nodes, 4 * batch_size * num_chunks,
        request_nodes * config.candidates if is_warped else 0,
    )  # fmt: skip
    best_tokens, is_drawn, decisions, next_ranks, key_tokens, num_collected = _workspace(
        target_logits, torch.int32,
        records, request_nodes, request_nodes, 2 * request_nodes, 3 * batch_size * num_chunks,
        request_nodes if is_warped else 0,
    )  # fmt: skip
    buffers = _NodeBuffers(
        target_peaks, target_masses, warped, draft_peaks, draft_masses, best_tokens, child_target, child_draft,
        is_drawn, decisions, last_ratio, next_ranks,
    )  # fmt: skip
    row_strides = (
        num_nodes if first_child.dim() == 2 and batch_size > 1 else 0,
        _stride(tokens), _stride(target_logits), _stride(target_logits, 1), _stride(draft_logits),
        _stride(draft_logits, 1), _stride(temperature),
    )  # fmt: skip
    blocks = {
        "BLOCK_CHILDREN": triton.next_power_of_2(max(1, max_branching)),
        "BLOCK_CHUNKS": triton.next_power_of_2(num_chunks),
    }
    with triton_device.launching_on(tokens.device):
        node_chunks_kernel[(num_chunks, num_nodes, batch_size)](
            tokens, target_logits, draft_logits, draft.target_to_draft, first_child, num_children, draft.certain,
            temperature,
            target_peaks, target_masses, target_lowest, target_groups, num_collected,
            draft_peaks, draft_masses, best_tokens,
            child_target, child_draft, is_drawn, decisions, next_ranks,
            vocab, draft.vocab, num_nodes, num_chunks,
            *row_strides, *draft.certain_strides,
            WARPED=is_warped,
            HAS_CERTAIN=draft.certain is not None,
            **draft.row_flags,
            BLOCK_CHILDREN=blocks["BLOCK_CHILDREN"],
            CHUNK=config.chunk,
            GROUP=group,
            num_warps=config.chunk_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        if is_warped:
            target_strides = _stride(target_logits), _stride(target_logits, 1)
            warp_strides = *target_strides, _stride(temperature), _stride(top_k), _stride(top_p)
            warps = {
                "HAS_TOP_K": top_k is not None,
                "HAS_TOP_P": top_p is not None,
                "BLOCK_CHUNKS": blocks["BLOCK_CHUNKS"],
                "CANDIDATES": config.candidates,
            }
            collect_nodes_kernel[(num_chunks, num_nodes, batch_size)](
                target_logits, temperature, top_k, top_p, target_peaks, target_masses, target_groups,
                num_collected, scratch,
                vocab, num_nodes, num_chunks,
                *warp_strides,
                **warps,
                CHUNK=config.chunk,
                GROUP=group,
                num_warps=config.chunk_warps,
                maxnreg=triton_device.most_registers(config.chunk_warps),
                enable_fp_fusion=True,
            )  # fmt: skip
            warp_nodes_kernel[(num_nodes, batch_size)](
                target_logits, temperature, top_k, top_p, target_peaks, target_masses, target_lowest, num_collected,
                warped, scratch,
                vocab, num_nodes, num_chunks,
                *warp_strides,
                **warps,
                TILE=config.row_tile,
                num_warps=config.row_warps,
                maxnreg=triton_device.most_registers(config.row_warps),
                enable_fp_fusion=True,
            )  # fmt: skip
        if max_branching > 0:  # else there is only the root
            decide = _traverse if rule == "traversal" else _decide_nodes
            decide(inputs, config, draft, buffers, row_strides, blocks, is_warped)
        draw_kernel[(num_chunks, batch_size)](
            tokens, target_logits, draft_logits, draft.target_to_draft, first_child, num_children, temperature,
            seeds, offsets,
            target_peaks, target_masses, warped, draft_peaks, draft_masses, child_draft, is_drawn, decisions,
            last_ratio,
            nodes, num_accepted, keys, key_tokens,
            vocab, draft.vocab, num_nodes, num_levels, num_chunks,
            *row_strides, _stride(seeds), _stride(offsets),
            _stride(nodes), _stride(nodes, 1), _stride(num_accepted),
            WARPED=is_warped,
            **draft.row_flags,
            BLOCK_LEVELS=triton.next_power_of_2(num_levels),
            CHUNK=config.chunk,
            **blocks,
            num_warps=config.chunk_warps,
            maxnreg=triton_device.most_registers(config.chunk_warps),
            enable_fp_fusion=False,  # the noise is to equal the reference's
        )  # fmt: skip
        finish_kernel[(batch_size,)](
            temperature, keys, key_tokens,
            next_token,
            num_chunks,
            _stride(temperature), _stride(next_token),
            BLOCK_CHUNKS=blocks["BLOCK_CHUNKS"],
            num_warps=1,
            enable_fp_fusion=True,
        )  # fmt: skip


class _DraftForm(NamedTuple):
    """How a call's children were proposed, as the kernels take it.

    Tensors and numbers that a call does not have are None: Triton compiles a kernel without such an argument.
    """

    row_flags: dict[str, bool]
    """how a row of the draft is read"""
    target_to_draft: Tensor | None
    vocab: int | None
    """width of the draft's rows, if they have a map"""
    certain: Tensor | None
    certain_strides: tuple[int | None, int | None]
    """from request to request and from node to node"""


def _draft_form(inputs: VerifyTreeInputs) -> _DraftForm:
    draft_logits, target_to_draft, certain = inputs.draft_logits, inputs.target_to_draft, inputs.certain
    draft_vocab: int | None = None
    if draft_logits is None:
        target_to_draft = None
    elif target_to_draft is not None:
        target_to_draft, draft_vocab = target_to_draft.contiguous(), draft_logits.shape[2]
    certain_strides: tuple[int | None, int | None] = (None, None)
    if certain is not None:
        certain = certain.expand(inputs.tokens.shape)
        certain_strides = (_stride(certain), _stride(certain, 1))
    flags = {"HAS_DRAFT": draft_logits is not None, "HAS_MAP": target_to_draft is not None}
    return _DraftForm(flags, target_to_draft, draft_vocab, certain, certain_strides)


class _NodeBuffers(NamedTuple):
    """What is known of nodes between the launches of both rules; shapes as in node_chunks_kernel."""

    target_peaks: Tensor
    target_masses: Tensor
    warped: Tensor
    draft_peaks: Tensor
    draft_masses: Tensor
    best_tokens: Tensor
    child_target: Tensor
    child_draft: Tensor
    is_drawn: Tensor
    decisions: Tensor
    last_ratio: Tensor
    next_ranks: Tensor


def _decide_nodes(
    inputs: VerifyTreeInputs,
    config: LaunchConfig,
    draft: _DraftForm,
    buffers: _NodeBuffers,
    row_strides: tuple[int, ...],
    blocks: dict[str, int],
    is_warped: bool,
) -> None:
    """Decide all nodes by the rule "sequoia"."""
    batch_size, num_nodes, vocab = inputs.target_logits.shape
    num_chunks = config.num_chunks
    request_nodes = batch_size * num_nodes
    sums, log_ratio = _workspace(inputs.target_logits, torch.float32, 4 * request_nodes * num_chunks, 2 * request_nodes)
    for rank in range(min(inputs.max_branching, config.rank_launches + 1)):
        is_rest = rank == config.rank_launches
        decide_kernel[(1 if is_rest else num_chunks, (num_nodes - 1) // (rank + 1), batch_size)](
            *inputs[:3], draft.target_to_draft, *inputs[3:5], draft.certain,
            inputs.temperature, inputs.seeds, inputs.offsets,
            *buffers[:9], buffers.next_ranks, log_ratio, sums,
            buffers.decisions, buffers.last_ratio,
            vocab, draft.vocab, num_nodes, num_chunks, rank,
            *row_strides, _stride(inputs.seeds), _stride(inputs.offsets), *draft.certain_strides,
            WARPED=is_warped,
            HAS_CERTAIN=draft.certain is not None,
            **draft.row_flags,
            FIRST=rank == 0,
            REST=is_rest,
            BLOCK_NODES=triton.next_power_of_2(num_nodes),
            CHUNK=config.row_tile if is_rest else config.chunk,
            **blocks,
            num_warps=config.row_warps if is_rest else config.chunk_warps,
            maxnreg=triton_device.most_registers(config.row_warps) if is_rest else None,
            enable_fp_fusion=True,
        )  # fmt: skip


def _traverse(
    inputs: VerifyTreeInputs,
    config: LaunchConfig,
    draft: _DraftForm,
    buffers: _NodeBuffers,
    row_strides: tuple[int, ...],
    blocks: dict[str, int],
    is_warped: bool,
) -> None:
    """Decide the nodes on the accepted path by the rule "traversal"."""
    batch_size, num_nodes, vocab = inputs.target_logits.shape
    num_chunks, num_levels = config.num_chunks, inputs.num_levels
    request_nodes = batch_size * num_nodes
    topology = inputs.first_child, inputs.num_children
    stride_topology, stride_tokens, stride_temperature = row_strides[0], row_strides[1], row_strides[-1]
    stream_strides = _stride(inputs.seeds), _stride(inputs.offsets)
    numbers, chances, states, sums = _workspace(
        inputs.target_logits, torch.float32,
        5 * request_nodes, request_nodes, 4 * request_nodes, 2 * request_nodes * num_chunks,
    )  # fmt: skip
    parents, levels, waves, accepted_levels = _workspace(inputs.target_logits, torch.int32, *[request_nodes] * 4)
    block_nodes = triton.next_power_of_2(num_nodes)
    node_warps = max(1, block_nodes // _NODES_PER_WARP)
    place_nodes_kernel[(num_nodes, batch_size)](
        inputs.tokens, *topology, inputs.temperature, *buffers[:6],
        parents, levels, waves, numbers, buffers.decisions,
        vocab, num_nodes, num_chunks,
        stride_topology, stride_tokens, stride_temperature,
        WARPED=is_warped,
        BLOCK_NODES=block_nodes,
        **blocks,
        num_warps=node_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    launches = _wave_launches(num_nodes, num_levels, inputs.max_branching, config.wave_launches)
    for wave, num_children in enumerate(launches):
        is_rest = num_children == _REST
        try_children_kernel[(1, 1, batch_size) if is_rest else (num_chunks, num_children, batch_size)](
            *inputs[:3], draft.target_to_draft, *topology, draft.certain,
            inputs.temperature, inputs.seeds, inputs.offsets,
            parents, waves, numbers, buffers.child_target, buffers.child_draft,
            buffers.is_drawn, chances, states, sums,
            vocab, draft.vocab, num_nodes, num_chunks, wave,
            *row_strides, *stream_strides, *draft.certain_strides,
            HAS_CERTAIN=draft.certain is not None,
            **draft.row_flags,
            REST=is_rest,
            BLOCK_NODES=block_nodes,
            CHUNK=config.row_tile if is_rest else config.chunk,
            **blocks,
            num_warps=config.row_warps if is_rest else config.chunk_warps,
            maxnreg=triton_device.most_registers(config.row_warps) if is_rest else None,
            enable_fp_fusion=True,
        )  # fmt: skip
    leave_nodes_kernel[(num_nodes, batch_size)](
        *topology, inputs.temperature, inputs.seeds, inputs.offsets,
        levels, numbers, buffers.child_target, buffers.child_draft, buffers.is_drawn, chances, states, sums,
        accepted_levels, buffers.decisions, buffers.last_ratio,
        num_nodes, num_chunks,
        stride_topology, stride_temperature, *stream_strides,
        **blocks,
        num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    choose_path_kernel[(batch_size,)](
        inputs.temperature, parents, accepted_levels,
        buffers.decisions,
        num_nodes, num_levels,
        stride_temperature,
        BLOCK_NODES=block_nodes,
        num_warps=node_warps,
        enable_fp_fusion=True,
    )  # fmt: skip


def _stride(tensor: Tensor | None, dim: int = 0) -> int:
    """0 for dimensions of one element, whose strides are arbitrary and would compile more variants."""
    return 0 if tensor is None or tensor.shape[dim] == 1 else tensor.stride(dim)


def _workspace(like: Tensor, dtype: torch.dtype, *sizes: int) -> tuple[Tensor, ...]:
    """One allocation cut into buffers of these sizes, each of which begins at a multiple of 16 bytes."""
    return like.new_empty(sum(map(_padded, sizes)), dtype=dtype).split([_padded(size) for size in sizes])


def _padded(size: int) -> int:
    return (size + 3) // 4 * 4
