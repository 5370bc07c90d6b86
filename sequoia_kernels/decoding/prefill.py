"""Prefill: commit the prompts to both caches and draw each request's first token from the target."""

from __future__ import annotations

import torch

from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.models import TreeCache, TreeModel, prefill
from sequoia_kernels.ops import verify_tree
from sequoia_kernels.tree import TokenTree


def prefill_prompts(
    target: TreeModel,
    cache: TreeCache,
    prompts: torch.Tensor,  # [B, longest] int64, right-padded
    prompt_lens: torch.Tensor,  # [B] int32
    state: DecodingState,
    backend: str = "auto",
) -> torch.Tensor:
    """Run the prompts through the target; afterwards the first emitted token is the root. Returns it. [B] int64.

    Mutates the cache and the state. The first token is the bonus token of a tree of one node, so it follows the same
    warping and random streams as every later one.
    """
    logits = prefill(target, cache, prompts, prompt_lens)  # [B, 1, vocab]
    last_tokens = prompts.gather(1, (prompt_lens.to(torch.int64) - 1)[:, None])
    path = verify_tree(
        torch.zeros_like(last_tokens),  # the root's own token decides nothing, and may be one that is never predicted
        logits,
        None,
        TokenTree.single(),
        state.temperature,
        state.seeds,
        state.offsets,
        top_k=state.top_k,
        top_p=state.top_p,
        backend=backend,
    )
    state.cache_lens.copy_(prompt_lens)
    state.last_tokens.copy_(last_tokens[:, 0])
    state.root_tokens.copy_(path.next_token)
    state.offsets += 1
    return path.next_token


def prefill_draft(
    draft: TreeModel,
    cache: TreeCache,
    lanes: list[int],  # R requests of the batch, increasing
    tokens: torch.Tensor,  # [R, longest] int64, right-padded
    num_tokens: torch.Tensor,  # [R] int32
    state: DecodingState,
) -> None:
    """Let the draft's context of some requests consist of these tokens; other requests keep theirs.

    Mutates the cache and, where the draft has lengths of its own, those.
    """
    tokens = tokens.clamp(max=draft.num_embeddings - 1)  # see `grow_tree`
    if len(lanes) == cache.batch_size:
        prefill(draft, cache, tokens, num_tokens)
    else:
        part = draft.new_cache(*tokens.shape)
        prefill(draft, part, tokens, num_tokens)
        for whole, rows in zip(cache.tensors(), part.tensors(), strict=True):
            whole[lanes, : rows.shape[1]] = rows
    if state.has_own_draft_lens:
        state.draft_lens[lanes] = num_tokens
