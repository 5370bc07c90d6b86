"""Verification of a step's trees: which drafted tokens are accepted, for requests that stand anywhere in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sequoia_kernels.ops import VerifiedPath, verify_tree
from sequoia_kernels.vllm.cut_trees import first_nodes
from sequoia_kernels.vllm.drafting import DraftedBatch

__all__ = ["PADDING", "Warping", "emitted_tokens", "verify_drafted"]

PADDING = -1  # what vLLM takes out of sampled_token_ids
SMALLEST_TOP_P = float(torch.finfo(torch.float32).tiny)  # holds the most probable token alone, as all smaller ones do


class Warping(NamedTuple):
    """Cuts of one request's distribution.

    Attributes:
        top_k: 0 is off.
        top_p: 1 is off.
    """

    top_k: int
    top_p: float

    @classmethod
    def of(cls, top_k: int, top_p: float, vocab_size: int) -> Warping:
        """Read a request's parameters, of which vLLM lets pass what int32 and float32 cannot hold.

        Example:
            >>> Warping.of(-1, 0.5, 100), Warping.of(2**31, 1e-50, 100).top_k, Warping.of(0, 1e-50, 100).top_p > 0
            (Warping(top_k=0, top_p=0.5), 0, True)
        """
        return cls(top_k if 0 < top_k < vocab_size else 0, max(top_p, SMALLEST_TOP_P))


def verify_drafted(
    drafted: DraftedBatch,
    places: Sequence[int],
    num_nodes: int,
    target_logits: torch.Tensor,
    warping: Sequence[Warping],
    rule: str,
) -> VerifiedPath:
    """Verify trees of one size.

    Args:
        drafted: the trees.
        places: rows of the requests in it. [B]
        num_nodes: nodes that were scheduled of each tree, the first ones.
        target_logits: of these nodes. [B, num_nodes, vocab].
        warping: cuts of the requests. [B]
        rule: verification rule.

    Returns:
        The accepted paths.
    """
    device = target_logits.device
    columns = (drafted.tokens, drafted.draft_logits, drafted.temperature, drafted.seeds, drafted.offsets)
    if list(places) != list(range(len(drafted.place))):
        index = torch.tensor(places, device=device)
        columns = tuple(column.index_select(0, index) for column in columns)  # type: ignore[assignment]
    tokens, draft_logits, temperature, seeds, offsets = columns
    top_k = top_p = None
    if any(entry.top_k for entry in warping):
        top_k = torch.tensor([entry.top_k for entry in warping], dtype=torch.int32, device=device)
    if any(entry.top_p < 1 for entry in warping):
        top_p = torch.tensor([entry.top_p for entry in warping], dtype=torch.float32, device=device)
    return verify_tree(
        tokens[:, :num_nodes],
        target_logits,
        draft_logits[:, :num_nodes],
        first_nodes(drafted.tree, num_nodes),
        temperature,
        seeds,
        offsets,
        top_k=top_k,
        top_p=top_p,
        rule=rule,
    )


def emitted_tokens(
    tokens: np.ndarray, first_nodes: np.ndarray, nodes: np.ndarray, next_tokens: np.ndarray
) -> np.ndarray:
    """Give what paths emit: the accepted tokens, then the one behind them, then padding.

    Args:
        tokens: tokens of the nodes of all trees, one behind the other. Integers.
        first_nodes: places of the roots in it; a root's token is not read, so the place may be another node's. [B]
        nodes: the accepted paths, -1 behind. [B, levels]
        next_tokens: the tokens behind them. [B]

    Returns:
        [B, levels] int64.

    Example:
        >>> nodes = np.array([[0, 2, -1], [0, -1, -1]])
        >>> emitted_tokens(np.array([4, 5, 6, 4, 5, 6]), np.array([0, 3]), nodes, np.array([7, 8])).tolist()
        [[6, 7, -1], [8, -1, -1]]
    """
    below = nodes[:, 1:]
    emitted = np.full(nodes.shape, PADDING, dtype=np.int64)
    accepted = below >= 0
    emitted[:, :-1][accepted] = tokens[(first_nodes[:, None] + below)[accepted]]
    emitted[np.arange(len(nodes)), accepted.sum(1)] = next_tokens
    return emitted
