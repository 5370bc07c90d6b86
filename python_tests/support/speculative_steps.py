"""Speculative decoding of toy models with the ops alone: thousands of requests in one batch, each one replicate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.toy_models import TableModel

from sequoia_kernels import TokenTree

__all__ = ["decode", "grow"]


def grow(
    tree: TokenTree,
    target: TableModel,
    draft: TableModel,
    tail: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    offsets: torch.Tensor,
    sample: Callable[..., Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token tree per request and score it.

    Args:
        tail: the requests' last tokens, the root last. [B, context].
        sample: sample_without_replacement, bound to a backend.

    Returns:
        (tokens [B, N], target_logits [B, N, vocab] float32, draft_logits [B, N, vocab] float32, NaN in leaf rows).
    """
    batch_size = len(tail)
    tokens = torch.full((batch_size, tree.num_nodes), -1)
    tokens[:, 0] = tail[:, -1]
    target_logits = torch.empty(batch_size, tree.num_nodes, target.vocab)
    draft_logits = torch.full((batch_size, tree.num_nodes, draft.vocab), torch.nan)
    paths = [tail]
    for node in range(tree.num_nodes):
        if node > 0:
            paths.append(torch.cat((paths[tree.parents[node]], tokens[:, node, None].clamp(min=0)), dim=1))
        target_logits[:, node] = target.logits(paths[node]).float()
        children = tree.children(node)
        if children:
            logits = draft.logits(paths[node]).float()
            draft_logits[:, node] = logits
            tokens[:, children] = sample(logits, len(children), temperature, seeds, offsets + node).tokens
    return tokens, target_logits, draft_logits


def decode(
    tree: TokenTree,
    target: TableModel,
    draft: TableModel,
    root: int,
    length: int,
    batch_size: int,
    temperature: float,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    sample: Callable[..., Any],
    verify: Callable[..., Any],
) -> torch.Tensor:
    """Decode `length` tokens behind the root for every request, in as many speculative steps as that takes.

    Args:
        sample, verify: sample_without_replacement and verify_tree, bound to a backend.

    Returns:
        Tokens. [batch_size, length].
    """
    context = max(target.context, 1)
    tail = torch.zeros(batch_size, context, dtype=torch.int64)
    tail[:, -1] = root
    seeds = torch.arange(batch_size)
    offsets = torch.zeros(batch_size, dtype=torch.int64)
    temperatures = torch.full((batch_size,), temperature)
    emitted = torch.full((batch_size, length + tree.num_levels), -1)
    num_emitted = torch.zeros(batch_size, dtype=torch.int64)
    levels = torch.arange(tree.num_levels)
    while int(num_emitted.min()) < length:
        tokens, target_logits, draft_logits = grow(tree, target, draft, tail, temperatures, seeds, offsets, sample)
        path = verify(tokens, target_logits, draft_logits, tree, temperatures, seeds, offsets, top_k=top_k, top_p=top_p)
        # the accepted nodes behind the root, then the next token
        accepted = tokens.gather(1, path.nodes[:, 1:].long().clamp(min=0))
        step = torch.cat((accepted, path.next_token[:, None]), dim=1)
        is_last = levels == path.num_accepted[:, None] - 1
        step = torch.where(is_last, path.next_token[:, None], step)
        is_emitted = levels < path.num_accepted[:, None]
        place = (num_emitted[:, None] + levels).clamp(max=emitted.shape[1] - 1)
        kept = torch.where(is_emitted, step, emitted.gather(1, place))
        emitted.scatter_(1, place, kept)
        tail = torch.cat((tail, step), dim=1).gather(1, path.num_accepted[:, None] + torch.arange(context))
        num_emitted = (num_emitted + path.num_accepted).clamp(max=length)
        offsets = offsets + tree.num_nodes
    return emitted[:, :length]
