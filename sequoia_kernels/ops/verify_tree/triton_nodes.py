"""What the kernels of both verification rules share: a node's tokens, its rows, and the residual that is left of them.

Only ``triton_*.py`` files import this. Target and draft, t and d, are known by a peak and a mass, as is told in
triton_launch.py; a residual max(t - g d, 0) by `log_ratio`, the log2 of g d(reference).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels.ops import triton_warping

__all__ = [
    "NONE_ACCEPTED",
    "NO_TOKEN",
    "PENDING",
    "TARGET_LEFT",
    "certain_draw",
    "child_tokens",
    "draft_at",
    "draft_left",
    "draft_reference",
    "greedy_decision",
    "is_outside",
    "residual_sums",
    "residual_weights",
    "target_numbers",
    "target_weights",
]

NO_TOKEN = tl.constexpr(2**31 - 1)

# What is known of a node, in `decisions`: the accepted child (its node id), or
NONE_ACCEPTED = tl.constexpr(-1)
PENDING = tl.constexpr(-2)
TARGET_LEFT = tl.constexpr(-3)  # none accepted, and the next token comes from the target itself: an empty residual


@triton.jit
def child_tokens(tokens_ptr, children, is_child, vocab):
    """Tokens of a node's children, -1 for what is no token. int32."""
    tokens = tl.load(tokens_ptr + children, mask=is_child, other=-1)
    return tl.where((tokens >= 0) & (tokens < vocab), tokens, -1).to(tl.int32)


@triton.jit
def is_outside(ids, first_id, tokens, CHUNK: tl.constexpr):
    """Which of a chunk's ids are none of these tokens."""
    outside = ids >= 0
    # Few chunks hold any of them, and those hold one or two.
    last_token = tl.max(tl.where(tokens < first_id + CHUNK, tokens, -1), 0)
    while last_token >= first_id:
        outside = outside & (ids != last_token)
        last_token = tl.max(tl.where(tokens < last_token, tokens, -1), 0)
    return outside


@triton.jit
def draft_at(
    draft_row_ptr,  # of a node, as wide as draft_vocab if HAS_MAP, else as the target's
    target_to_draft_ptr,  # [vocab] int32 contiguous, read if HAS_MAP
    ids,  # of the target
    is_token,  # which of them are to be read
    draft_vocab,  # read if HAS_MAP
    HAS_DRAFT: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    """The draft's logits at ids of the target; -inf for tokens that it does not know, and without a draft. fp32."""
    if HAS_MAP:
        ids = tl.load(target_to_draft_ptr + ids, mask=is_token, other=-1)
        is_token = (ids >= 0) & (ids < draft_vocab)
    if HAS_DRAFT:
        return tl.load(draft_row_ptr + ids, mask=is_token, other=float("-inf")).to(tl.float32)
    else:
        return tl.full(ids.shape, float("-inf"), tl.float32)


@triton.jit
def certain_draw(is_tested, child_target, child_draft):
    """1.0, the probability with which a certain child was proposed; 0.0 if it is no token or repeats a sibling.

    That is where neither row has a logit for it. Nor has one for a token that both rows mask: it is never accepted,
    and nothing changes when it leaves them.
    """
    is_known = (child_target > float("-inf")) | (child_draft > float("-inf"))
    return tl.max(tl.where(is_tested & is_known, 1.0, 0.0), 0)


@triton.jit
def target_weights(logits, peak, cut, scale):
    return tl.where(logits >= cut, tl.exp2((logits - peak) * scale), 0.0)


@triton.jit
def target_numbers(
    target_peaks_ptr,
    target_masses_ptr,
    warped_ptr,
    request_node,
    num_chunks,
    scale,
    WARPED: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Peak, mass and cut of a node's target row."""
    if WARPED:
        peak = tl.load(warped_ptr + request_node * 3)
        mass = tl.load(warped_ptr + request_node * 3 + 1)
        cut = tl.load(warped_ptr + request_node * 3 + 2)
    else:
        peak, mass = triton_warping.row_numbers(
            target_peaks_ptr, target_masses_ptr, request_node, num_chunks, scale, BLOCK_CHUNKS
        )
        cut = tl.full([], float("-inf"), tl.float32)
    return peak, mass, cut


@triton.jit
def draft_reference(outside_peak, child_draft):
    """The logit that exponents of the draft are relative to: the largest outside the children, if there is any."""
    return tl.where(outside_peak == float("-inf"), tl.max(child_draft, 0), outside_peak)


@triton.jit
def residual_weights(target, draft_logits, reference, log_ratio, log_mass, scale):
    """max(t - g d, 0) times the target's mass. `target` is relative to its peak; log_ratio: log2 of g d(reference)."""
    exponent = tl.minimum((draft_logits - reference) * scale + (log_ratio + log_mass), 126.0)
    return tl.maximum(target - tl.exp2(exponent), 0.0)


@triton.jit
def residual_sums(
    target_row_ptr,
    draft_row_ptr,
    target_to_draft_ptr,
    first_id,
    vocab,
    draft_vocab,
    tokens,
    target_peak,
    target_mass,
    cut,
    reference,
    log_ratio,
    scale,
    HAS_DRAFT: tl.constexpr,
    HAS_MAP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Masses of residual and target over the chunk's tokens that are no children, relative to the target's peak."""
    ids = first_id + tl.arange(0, CHUNK)
    target_logits = tl.load(target_row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    draft_logits = draft_at(draft_row_ptr, target_to_draft_ptr, ids, ids < vocab, draft_vocab, HAS_DRAFT, HAS_MAP)
    target = target_weights(target_logits, target_peak, cut, scale)
    target = tl.where(is_outside(ids, first_id, tokens, CHUNK), target, 0.0)
    residual = residual_weights(target, draft_logits, reference, log_ratio, tl.log2(target_mass), scale)
    return tl.sum(residual, 0), tl.sum(target, 0)


@triton.jit
def draft_left(child_draft, is_left, outside_peak, outside_mass, scale):
    """The draft of the children that are left and all its mass that is left, relative to a logit; and that logit."""
    base = tl.maximum(outside_peak, tl.max(tl.where(is_left, child_draft, float("-inf")), 0))
    base = tl.where(base == float("-inf"), 0.0, base)
    draft = tl.where(is_left, tl.exp2((child_draft - base) * scale), 0.0)
    draft_mass = outside_mass * tl.exp2((outside_peak - base) * scale) + tl.sum(draft, 0)
    return draft, tl.where(draft_mass > 0.0, draft_mass, 1.0), base  # an empty draft: nothing is a draw


@triton.jit
def greedy_decision(
    tokens,  # [children] of the node, -1 for what is no token
    first_child,
    target_peaks_ptr,  # at the node's first chunk, as the one below
    best_tokens_ptr,
    num_chunks,
    BLOCK_CHUNKS: tl.constexpr,
):
    """The child that a node accepts at temperature 0, or NONE_ACCEPTED."""
    chunks = tl.arange(0, BLOCK_CHUNKS)
    peaks = tl.load(target_peaks_ptr + chunks, mask=chunks < num_chunks, other=float("-inf"))
    best_tokens = tl.load(best_tokens_ptr + chunks, mask=chunks < num_chunks, other=NO_TOKEN)
    best_token = tl.min(tl.where(peaks == tl.max(peaks, 0), best_tokens, NO_TOKEN), 0)
    accepted = tl.min(tl.where(tokens == best_token, first_child + tl.arange(0, tokens.shape[0]), NO_TOKEN), 0)
    return tl.where(accepted < NO_TOKEN, accepted, NONE_ACCEPTED)
