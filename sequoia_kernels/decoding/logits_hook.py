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
        active: 1 while a request decodes; what is given for an ended one does not matter. [B] int32.
        nodes: the nodes whose logits are asked for. [W] int64; None for all of them, in order.
    """

    history: torch.Tensor
    history_lens: torch.Tensor
    tokens: torch.Tensor
    topology: Topology
    active: torch.Tensor
    nodes: torch.Tensor | None = None


class LogitsHook(Protocol):
    """A penalty, a grammar, a bias: what a step's target logits are put through, once a step and once at the prefill.

    The output is distributed as if every token had been drawn from the changed logits, one by one, as long as a node's
    logits depend on nothing but the tokens before and at it.

    The draft only guesses, and is left alone. A hook with an attribute `hooks_draft` that is true is asked for the
    draft's logits as well, level by level, in the target's width: then the draft proposes what the target may say, and
    more of it is accepted. `paths.nodes` names the level's nodes, and tokens of later levels are not drawn yet. A hook
    with a method `begin(prompt_lens)` is told of the prompts' tokens, [B], before a batch's first call.
    """

    def __call__(self, paths: NodePaths, logits: torch.Tensor) -> torch.Tensor:
        """Give the logits to decide from.

        Args:
            paths: what the nodes stand for; not to be written to.
            logits: the logits behind each node. [B, N, vocab], or [B, W, vocab] of the nodes that are named; may be
                changed in place.

        Returns:
            Logits of the same shape; -inf masks a token, and one at least must be left in each row.
        """
