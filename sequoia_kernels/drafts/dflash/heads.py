"""DSpark's heads: what a node's own token adds to the row of its depth, and how likely its next token is accepted.

With h the hidden state of a depth's slot, e = w1[token] of the node and s the state of its parent (0 above the root):

    vanilla   m = e
    gated     m = sigmoid(gate_proj [h; e]) * e
    rnn       g, c, o = joint_proj [s; e; h];  s' = sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c);  m = tanh(o)
    row       logits of the slot + w2 m
    accepted  sigmoid(proj [h; e])

What a projection does to h is the same for all nodes of a depth: it is computed once a step, for all slots together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sequoia_kernels.drafts.dflash.forms import DFlashForm
from sequoia_kernels.models import FewRowsLinear

__all__ = ["DSparkHeads", "NodeRows"]


class NodeRows(NamedTuple):
    """What the heads give for the nodes of a level.

    Attributes:
        logits: of the nodes. [B, W, vocab].
        states: of the nodes, which their children go on from; None where there are none. [B, W, rank].
    """

    logits: torch.Tensor
    states: torch.Tensor | None


class DSparkHeads:
    """The Markov head, of rank r, and the confidence head; either may be absent.

    Args:
        form: what the draft is.
        weights: `markov_head.*` and `confidence_head.*`.

    Attributes:
        kind: of the Markov head, "vanilla", "gated", "rnn", or None without one.
        rank: r.
        has_confidence: whether there is a confidence head.
        w1: numbers of each token in the Markov head. [tokens, r].
        w2: multiplies them to logits.
        slot_width: numbers of each slot that `slot_rows` gives.
    """

    def __init__(self, form: DFlashForm, weights: Mapping[str, torch.Tensor]) -> None:
        self.kind, self.rank = form.markov_kind, form.markov_rank
        self.w1 = weights.get("markov_head.markov_w1.weight")
        self.w2 = None if self.w1 is None else FewRowsLinear(weights["markov_head.markov_w2.weight"])
        width, rank = form.config.hidden_size, self.rank
        self._mixing: FewRowsLinear | None = None  # what a projection does to [s; e] or e
        of_slots, biases = [], []
        if self.kind == "gated":
            weight = weights["markov_head.gate_proj.weight"]
            of_slots.append(weight[:, :width])
            biases.append(weights["markov_head.gate_proj.bias"])
            self._mixing = FewRowsLinear(weight[:, width:].contiguous())
        elif self.kind == "rnn":
            weight = weights["markov_head.joint_proj.weight"]
            of_slots.append(weight[:, 2 * rank :])
            biases.append(weights["markov_head.joint_proj.bias"])
            self._mixing = FewRowsLinear(weight[:, : 2 * rank].contiguous())
        self._confidence: torch.Tensor | None = None  # what its projection does to e. [r]
        self.has_confidence = form.has_confidence
        if form.has_confidence:
            weight = weights["confidence_head.proj.weight"]
            of_slots.append(weight[:, :width])
            biases.append(weights["confidence_head.proj.bias"])
            if form.confidence_reads_token:
                self._confidence = weight[0, width:].contiguous()
        self._slots = FewRowsLinear(torch.cat(of_slots), torch.cat(biases)) if of_slots else None
        self.slot_width = 0 if self._slots is None else self._slots.weight.shape[0]

    @property
    def weights(self) -> list[torch.Tensor]:
        """Everything that it reads."""
        linears = (self.w2, self._mixing, self._slots)
        kept = [tensor for linear in linears if linear is not None for tensor in linear.tensors]
        return kept + [weight for weight in (self.w1, self._confidence) if weight is not None]

    @property
    def mixing(self) -> torch.Tensor | None:
        """What a head that reads hidden states does to [s; e] (3r outputs), or to e (r outputs)."""
        return None if self._mixing is None else self._mixing.weight

    @property
    def confidence_weight(self) -> torch.Tensor | None:
        """What the confidence head multiplies a token's numbers with. [r]. None where it reads none."""
        return self._confidence

    @property
    def mixes_hidden(self) -> bool:
        """Whether the Markov head reads hidden states."""
        return self.kind in ("gated", "rnn")

    @property
    def num_tokens(self) -> int:
        """Tokens that the Markov head knows."""
        return 0 if self.w1 is None else self.w1.shape[0]

    def slot_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project the hidden states of a block. [B, block_size, hidden_size] -> [B, block_size, slot_width]."""
        assert self._slots is not None  # who has a slot width
        return self._slots(hidden)

    def rows(
        self, tokens: torch.Tensor, logits: torch.Tensor, slot: torch.Tensor | None, states: torch.Tensor | None
    ) -> NodeRows:
        """Give the logits of a level's nodes.

        Args:
            tokens: of the nodes. [B, W] int64.
            logits: of their depth's slot. [B, 1, vocab].
            slot: what `slot_rows` gives of it, where `slot_width` is not 0. [B, 1, slot_width].
            states: of the nodes' parents, for "rnn". [B, W, r].
        """
        if self.kind is None:
            return NodeRows(logits.expand(-1, tokens.shape[1], -1), None)
        assert self.w1 is not None and self.w2 is not None
        mixed, states = self.mix(F.embedding(tokens, self.w1), slot, states)
        return NodeRows(self.w2(mixed).add_(logits), states)

    def mix(
        self, embedded: torch.Tensor, slot: torch.Tensor | None, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Give what w2 multiplies, and the nodes' states. [B, W, r] each."""
        if self.kind == "vanilla":
            return embedded, None
        assert slot is not None and self._mixing is not None
        if self.kind == "gated":
            gate = torch.sigmoid(self._mixing(embedded) + slot[..., : self.rank])
            return gate * embedded, None
        assert states is not None
        together = torch.cat((states, embedded), dim=-1)
        gate, candidate, output = (self._mixing(together) + slot[..., : 3 * self.rank]).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * states + (1.0 - gate) * torch.tanh(candidate)

    def rows_states(self, tokens: torch.Tensor, slot: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Give the nodes' states alone, of an "rnn" head; arguments as in `rows`."""
        assert self.w1 is not None
        moved = self.mix(F.embedding(tokens, self.w1), slot, states)[1]
        assert moved is not None
        return moved

    def confidence(self, tokens: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """Give how likely the token behind each node is accepted. [B, W] float32; arguments as in `rows`."""
        logits = slot[..., -1].to(torch.float32)  # [B, 1]
        if self._confidence is not None and self.w1 is not None:
            embedded = F.embedding(tokens, self.w1).flatten(0, 1)
            logits = logits + torch.mv(embedded, self._confidence).view(tokens.shape)
        return torch.sigmoid(logits).expand(tokens.shape)
