"""Prefill: commit the prompts to both caches and draw each request's first token from the target."""

from __future__ import annotations

import torch

from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.models import TreeCache, TreeModel, prefill
from sequoia_kernels.ops import verify_tree
from sequoia_kernels.tree import TokenTree


def prefill_prompts(
    target: TreeModel,
    draft: TreeModel | None,
    target_cache: TreeCache,
    draft_cache: TreeCache | None,
    prompts: torch.Tensor,  # [B, longest] int64, right-padded
    prompt_lens: torch.Tensor,  # [B] int32
    state: DecodingState,
    backend: str = "auto",
) -> torch.Tensor:
    """Run the prompts through the models; afterwards the first emitted token is the root. Returns it. [B] int64.

    Mutates both caches and the state. The first token is the bonus token of a tree of one node, so it follows the same
    warping and random streams as every later one.
    """
    logits = prefill(target, target_cache, prompts, prompt_lens)  # [B, 1, vocab]
    if draft is not None and draft_cache is not None:
        prefill(draft, draft_cache, prompts, prompt_lens)
    last_tokens = prompts.gather(1, (prompt_lens.to(torch.int64) - 1)[:, None])
    path = verify_tree(
        last_tokens,
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
