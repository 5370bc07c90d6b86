"""Verify: one forward of the target over the whole tree, then every request's accepted path."""

from __future__ import annotations

from sequoia_kernels.decoding.draft import TokenBuffers
from sequoia_kernels.decoding.layout import TreeLayout
from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.decoding.stats import StageClock
from sequoia_kernels.models import TreeCache, TreeModel
from sequoia_kernels.ops import VerifiedPath, verify_tree


def verify_tokens(
    target: TreeModel,
    cache: TreeCache,
    layout: TreeLayout,
    state: DecodingState,
    buffers: TokenBuffers,
    clock: StageClock,
    backend: str = "auto",
) -> VerifiedPath:
    """Score the tree with the target and decide which path of it is accepted.

    Mutates the target's cache rows behind the committed ones. No host sync.
    """
    with clock.stage("target"):
        # A token that could not be drawn is -1: it is fed as token 0 and never accepted. One that the target has no
        # embedding of is fed as the last one that it has.
        fed = buffers.tokens.clamp(0, target.num_embeddings - 1)
        logits = target.forward(fed, cache, state.cache_lens, layout.target_step)
    with clock.stage("verify"):
        return verify_tree(
            buffers.tokens,
            logits,
            buffers.draft_logits,
            layout.tree,
            state.temperature,
            state.seeds,
            state.offsets,
            top_k=state.top_k,
            top_p=state.top_p,
            backend=backend,
        )
