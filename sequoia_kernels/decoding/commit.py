"""Commit: keep the accepted rows of both caches, advance the state, and lay out the emitted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sequoia_kernels.decoding.draft import TokenBuffers
from sequoia_kernels.decoding.layout import TreeLayout
from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.decoding.stats import StageClock
from sequoia_kernels.ops import CacheTable, VerifiedPath, compact_kv_cache_


class EmittedTokens(NamedTuple):
    """What one step gives to the host.

    Attributes:
        tokens: accepted tokens and the bonus token behind them, -1 behind the end. [B, levels] int64.
        nodes: the accepted path, for the statistics. [B, levels] int32.
        num_tokens: tokens emitted, 0 for an ended request. [B] int32.
    """

    tokens: torch.Tensor
    nodes: torch.Tensor
    num_tokens: torch.Tensor


def commit_path(
    path: VerifiedPath,
    layout: TreeLayout,
    state: DecodingState,
    buffers: TokenBuffers,
    caches: Sequence[tuple[Sequence[CacheTable], torch.Tensor]],
    clock: StageClock,
    backend: str = "auto",
) -> EmittedTokens:
    """Move the accepted rows behind the committed prefix and advance the state in place.

    Each group of caches, with a table for every device, comes with the lengths of the state that count its rows. The
    emitted tokens are gathered before anything is overwritten. No host sync.
    """
    with clock.stage("commit"):
        num_accepted = path.num_accepted * state.active
        num_nodes = layout.tree.num_nodes
        if num_nodes == 1:  # plain decoding: the root's row is in place already
            tokens = path.next_token[:, None]
            last_tokens = buffers.tokens[:, 0]
            for _, cache_lens in caches:
                cache_lens += num_accepted
        else:
            path_tokens = buffers.tokens.gather(1, path.nodes.clamp(min=0).to(torch.int64))
            end = (path.num_accepted - 1).to(torch.int64)[:, None]
            last_tokens = path_tokens.gather(1, end)[:, 0]
            tokens = torch.full_like(path_tokens, -1)
            tokens[:, :-1] = torch.where(path.nodes[:, 1:] >= 0, path_tokens[:, 1:], -1)
            tokens.scatter_(1, end, path.next_token[:, None])
            for tables, cache_lens in caches:
                compact_kv_cache_(tables, path.nodes, num_accepted, cache_lens, backend=backend)
        state.last_tokens.copy_(last_tokens)
        state.root_tokens.copy_(path.next_token)
        state.offsets += num_nodes
        return EmittedTokens(tokens, path.nodes, num_accepted)
