"""What a head with a reduced vocabulary is trained to do: distributions as trees draw from them, and a loss on them.

A tree's children are drawn from the draft's distribution q without replacement, and the first is accepted with
probability sum(min(p, q)), p the target's (arXiv 2402.12374, section 3.2; 2211.17192, section 3). The later ones meet
the residual max(p - q, 0), so what is left over must be near as well. So a head is taught the whole of p, not the token
that stood in the text: the divergence of q from p brings all of q near, the share of rejected first children what is
drawn first. Both are taken at several temperatures: at a low one, p and q are what is drawn from there, and the most
probable tokens, which are all that decoding at temperature 0 looks at, weigh the most.

The target's probabilities are those of its whole vocabulary, cut: where it wants a token that the head has not, the row
counts less in the divergence and cannot be accepted, as in decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common.distillation import LOSS_ROWS, Texts
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["RowsLoss", "Wanted", "frequent_tokens", "with_normalisers"]

_PASS_ROWS = 256  # of the whole vocabulary at once


def frequent_tokens(texts: Texts, vocab_size: int, size: int, always: Sequence[int] = ()) -> VocabularyMap:
    """Give the tokens that the target wrote most often.

    Args:
        texts: what it wrote.
        vocab_size: its tokens, V.
        size: tokens wanted; ties, and those that were never written, go by id, which is by how frequent a token was
            when a byte-pair vocabulary was made.
        always: tokens that are among them in any case, such as those that end a text.

    Raises:
        ValueError: size is not in 1..V.
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(f"frequent_tokens: size must be in 1..{vocab_size}, the target's tokens, got {size}")
    asked = torch.cat([torch.arange(count) < lead for count, lead in zip(texts.lens.tolist(), texts.prompt_lens)])
    counts = texts.tokens[~asked].bincount(minlength=vocab_size)
    counts[torch.tensor(always, dtype=torch.int64)] = len(texts.tokens) + 1
    chosen = counts.argsort(descending=True, stable=True)[:size].sort().values
    return VocabularyMap.of(chosen, vocab_size)


@torch.no_grad()
def with_normalisers(texts: Texts, head: Tensor, temperatures: Sequence[float]) -> Texts:
    """Add the logarithms of the target's normalisers at temperatures, the one thing that a cut row does not tell.

    Args:
        texts: with the target's hidden states.
        head: the target's. [V, width]; products are made in its dtype.
        temperatures: above 0.

    Returns:
        The texts; places where the target did not choose have 0.
    """
    found = torch.zeros(len(texts.tokens), len(temperatures))
    for places in texts.written.nonzero()[:, 0].split(_PASS_ROWS):
        logits = (texts.hidden[places].to(head.dtype) @ head.T).float()
        for column, temperature in enumerate(temperatures):
            found[places, column] = (logits / temperature).logsumexp(-1)
    return texts._replace(log_normalisers=found)


class Wanted(NamedTuple):
    """The target's distributions at some places, cut to a reduced vocabulary."""

    probs: Tensor  # [R, Vd] float32, each row of a sum up to 1
    mass: Tensor  # that sum. [R]
    negative_entropy: Tensor  # sum of p log(p / mass). [R]
    inverse_temperatures: Tensor  # at which they are. [R]

    @classmethod
    @torch.no_grad()
    def of(cls, hidden: Tensor, head: Tensor, log_normalisers: Tensor, inverse_temperatures: Tensor) -> Wanted:
        """Make them of the target's hidden states.

        Args:
            hidden: what its head got. [R, width].
            head: its rows of the reduced vocabulary. [Vd, width]; products are made in its dtype.
            log_normalisers: at these temperatures. [R].
            inverse_temperatures: [R].
        """
        probs = torch.empty(len(hidden), len(head))
        mass, negative_entropy = torch.empty(len(hidden)), torch.empty(len(hidden))
        for start in range(0, len(hidden), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            scaled = hidden[rows] * inverse_temperatures[rows, None]
            logs = (scaled.to(head.dtype) @ head.T).float().sub_(log_normalisers[rows, None])
            torch.exp(logs, out=probs[rows])
            mass[rows] = probs[rows].sum(-1)
            total = logs.mul_(probs[rows]).sum(-1)
            negative_entropy[rows] = total - mass[rows] * mass[rows].clamp(min=1e-30).log()
        return cls(probs, mass, negative_entropy, inverse_temperatures)


class RowsLoss(torch.autograd.Function):
    """How far rows of a head are from the target, with the gradient in closed form.

    With p the target's cut row of mass m and q = softmax((head h + markov e) / T): the divergence's term
    sum(p log(p / m) - p log q) has the gradient m q - p to what is within the softmax, and that of 1 - sum(min(p, q))
    is -q (b - sum(q b)), b being 1 where q < p and else 0. So no row of the vocabulary outlives its chunk. The frozen
    head costs two products a row, one forward and one backward; the Markov head, which learns, three of its rank.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, mixed: Tensor | None, head: Tensor, markov: Tensor | None, wanted: Wanted,
        places: Tensor, row_weights: Tensor, weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Give the loss, a weighted mean over rows, and each row's `MEASURES`, [R, 3].

        Args:
            ctx: torch's.
            states: what the head gets. [R, width].
            mixed: what the Markov head multiplies. [R, rank], or None without one.
            head: [Vd, width], frozen; products are made in its dtype.
            markov: [Vd, rank], or None.
            wanted: of the target.
            places: the row of `wanted` that each row is compared with. [R] int64.
            row_weights: in the mean. [R].
            weights: of the divergence and of the share of rejected first children.
        """
        shares = row_weights / row_weights.sum()
        of_states = torch.empty_like(states, dtype=torch.float32)
        of_mixed = None if mixed is None else torch.empty_like(mixed, dtype=torch.float32)
        of_markov = None if markov is None else torch.zeros_like(markov, dtype=torch.float32)
        weight = None if markov is None else markov.detach().to(head.dtype)
        measures = torch.empty(len(states), 3)
        for start in range(0, len(states), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            chosen = places[rows]
            scale = wanted.inverse_temperatures[chosen, None]
            logits = ((states[rows] * scale).to(head.dtype) @ head.T).float()
            if mixed is not None and weight is not None:
                scaled = (mixed[rows] * scale).to(head.dtype)
                logits += scaled @ weight.T
            target, mass = wanted.probs[chosen], wanted.mass[chosen, None]
            measures[rows, 2] = (target.argmax(-1) == logits.argmax(-1)).float()
            draft = logits.log_softmax(-1)
            measures[rows, 0] = wanted.negative_entropy[chosen] - (target * draft).sum(-1)
            draft = draft.exp_()
            measures[rows, 1] = torch.minimum(target, draft).sum(-1)
            below = torch.where(draft < target, draft, 0)
            slope = draft.mul_(weights[0] * mass + weights[1] * below.sum(-1, keepdim=True))
            slope.sub_(target, alpha=weights[0]).sub_(below, alpha=weights[1])
            slope = slope.mul_(shares[rows, None]).to(head.dtype)
            of_states[rows] = (slope @ head).float() * scale
            if of_mixed is not None and of_markov is not None and weight is not None:
                of_mixed[rows] = (slope @ weight).float() * scale
                of_markov += slope.T @ scaled
        kept = (of_states.to(states.dtype), None if of_mixed is None else of_mixed.to(mixed.dtype), of_markov)
        ctx.save_for_backward(*(tensor for tensor in kept if tensor is not None))
        ctx.mark_non_differentiable(measures)
        return (shares * (weights[0] * measures[:, 0] + weights[1] * (1 - measures[:, 1]))).sum(), measures

    @staticmethod
    def backward(ctx: Any, loss: Tensor, measures: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients were made in the forward."""
        of_states, of_mixed, of_markov = (*(loss * tensor for tensor in ctx.saved_tensors), None, None)[:3]
        return of_states, of_mixed, None, of_markov, None, None, None, None
