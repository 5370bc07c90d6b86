"""Draft: grow the token tree, one forward of the draft model and one draw without replacement a level."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sequoia_kernels.decoding.layout import DraftLevel, TreeLayout
from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.decoding.stats import StageClock
from sequoia_kernels.models import TreeCache, TreeModel
from sequoia_kernels.ops import sample_without_replacement


@dataclass
class TokenBuffers:
    """What the draft leaves for the target. N nodes, allocated once a tree and batch.

    Attributes:
        tokens: token of every node. [B, N] int64.
        draft_logits: the draft's logits at every internal node, as wide as the target's; tokens that the draft does not
            know hold -inf, rows of leaves are never read. [B, N, vocab], the dtype of its logits. None without a draft.
        draft_lacks_tokens: whether the draft may meet tokens of the target that it has no embedding of.
    """

    tokens: torch.Tensor
    draft_logits: torch.Tensor | None
    draft_lacks_tokens: bool = False

    @classmethod
    def allocate(cls, layout: TreeLayout, batch_size: int, target: TreeModel, draft: TreeModel | None) -> TokenBuffers:
        """Allocate the buffers of a tree and batch on the target's device."""
        num_nodes = layout.tree.num_nodes
        tokens = torch.zeros(batch_size, num_nodes, dtype=torch.int64, device=target.device)
        if draft is None or layout.root_level is None:
            return cls(tokens, None)
        shape = (batch_size, num_nodes, target.vocab_size)
        return cls(
            tokens,
            torch.full(shape, -torch.inf, dtype=draft.logits_dtype, device=target.device),
            draft.num_embeddings < max(target.num_embeddings, target.vocab_size),
        )


def grow_tree(
    draft: TreeModel,
    cache: TreeCache,
    layout: TreeLayout,
    state: DecodingState,
    buffers: TokenBuffers,
    clock: StageClock,
    backend: str = "auto",
) -> None:
    """Fill the buffers with a tree of tokens drawn from the draft, level by level; leaves are never fed.

    A token that the draft has no embedding of is fed as the last one that it has: what grows behind it is a worse
    guess, and verified like any other. Mutates the buffers and the draft's cache rows behind the committed ones. No
    host sync.
    """
    buffers.tokens[:, 0].copy_(state.root_tokens)
    if layout.root_level is None:
        return
    with clock.stage("draft"):
        fed = torch.stack((state.last_tokens, state.root_tokens), dim=1)
        if buffers.draft_lacks_tokens:
            fed.clamp_(max=draft.num_embeddings - 1)
        logits = draft.forward(fed, cache, state.draft_lens - 1, layout.root_step)[:, 1:]
    _draw_children(layout.root_level, logits, state, buffers, clock, backend)
    for level in layout.levels:
        with clock.stage("draft"):
            fed = buffers.tokens.index_select(1, level.nodes)
            fed.clamp_(0, draft.num_embeddings - 1)  # one that could not be drawn is -1
            logits = draft.forward(fed, cache, state.draft_lens, level.step)
        _draw_children(level, logits, state, buffers, clock, backend)


def _draw_children(
    level: DraftLevel,
    logits: torch.Tensor,  # [B, width, draft vocab]
    state: DecodingState,
    buffers: TokenBuffers,
    clock: StageClock,
    backend: str,
) -> None:
    assert buffers.draft_logits is not None  # allocated with every tree that has a level to draw
    with clock.stage("sample"):
        batch_size, width, _ = logits.shape
        vocab = min(logits.shape[2], buffers.draft_logits.shape[2])
        # drawn from the very numbers that are kept for the verification
        logits = logits[:, :, :vocab].to(buffers.draft_logits.dtype)
        if level.step.first_node is not None:
            kept = buffers.draft_logits.narrow(1, level.step.first_node, width).narrow(2, 0, vocab)
            kept.copy_(logits)
        else:
            buffers.draft_logits[:, :, :vocab].index_copy_(1, level.nodes, logits)
        offsets = (state.offsets[:, None] + level.nodes).flatten()
        drawn = sample_without_replacement(
            logits.flatten(0, 1),
            level.num_samples,
            state.temperature.repeat_interleave(width),
            state.seeds.repeat_interleave(width),
            offsets,
            backend=backend,
        ).tokens.view(batch_size, -1)
        children = buffers.tokens.narrow(1, level.first_child, level.num_children)
        torch.index_select(drawn, 1, level.drawn, out=children) if batch_size == 1 else children.copy_(
            drawn.index_select(1, level.drawn)
        )
