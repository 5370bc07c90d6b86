"""The door between the target's forward and the verification: what changes logits before they decide."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sequoia_kernels.tree import Topology

__all__ = ["LogitsHook", "NodePaths"]


class NodePaths(NamedTuple):
    """What every node of a step stands for: the committed tokens of its request, then the path to it.

    Attributes:
        history: committed tokens. [B, S] int64.
        history_lens: how many each request has. [B] int32; `history` holds anything behind them.
        tokens: token of each node, the last emitted one at node 0; -1 where none could be drawn. [B, N] int64.
        topology: which node is whose parent.
    """

    history: torch.Tensor
    history_lens: torch.Tensor
    tokens: torch.Tensor
    topology: Topology


class LogitsHook(Protocol):
    """A penalty, a grammar, a bias: what a step's target logits are put through, once a step and once at the prefill.

    The output is distributed as if every token had been drawn from the changed logits, one by one, as long as a node's
    logits depend on nothing but the tokens before and at it. The draft is not changed: it only guesses.
    """

    def __call__(self, paths: NodePaths, logits: torch.Tensor) -> torch.Tensor:
        """Give the logits to decide from.

        Args:
            paths: what the nodes stand for; not to be written to.
            logits: the target's logits behind each node. [B, N, vocab]; may be changed in place.

        Returns:
            Logits of the same shape; -inf masks a token, and one at least must be left in each row.
        """
