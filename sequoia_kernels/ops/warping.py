"""How temperature, top-k and top-p turn a row of logits into the distribution that decoding must reproduce.

The definition shared by the reference backends of `warped_logsumexp` and `verify_tree`, which must warp alike and may
not import one another. Plain torch, any device, no host sync.

In the order of transformers' warpers, with scaled = logit / T:
    top-k   keeps x if fewer than k tokens have a larger logit
    top-p   keeps x if the tokens with a larger logit hold less than top_p of the probability that top-k left
    log_normaliser = log sum over the kept x of exp(scaled(x)),   cut = the smallest kept logit
Both rules look at strictly larger logits only, so tokens of equal logits stay or go together: the result is a threshold
on the logit and does not depend on how a sort orders ties. (transformers keeps ties in top-k and breaks them in top-p.)

Numerics: the row's maximum is subtracted before the division by T, so no exponential overflows at any temperature, and
small temperatures, where logit / T itself is coarse, cost no precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compute_dtype", "warped_normaliser", "warped_probs"]


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that arithmetic on such logits is done in: float64 if any of them is, otherwise float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def warped_normaliser(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the two numbers a row that say everything about its warped distribution.

    A token has probability exp(logit / T - log_normaliser) where logit >= cut, and 0 elsewhere.

    Args:
        logits: [R, vocab], float32 or float64.
        temperature: [R] float32. 0 is greedy.
        top_k: [R] integers, or None for off. Values below 1 and from vocab on are off.
        top_p: [R] float32 in (0, 1], or None for off. 1 is off.

    Returns:
        (log_normaliser [R], cut [R]) in the dtype of the logits. A greedy row has its largest logit as both.
    """
    peak = logits.amax(dim=-1, keepdim=True)
    greedy = temperature[:, None] == 0
    divisor = _divisor(logits, temperature)
    cut = _smallest_kept(logits, divisor, top_k, top_p)
    scaled = ((logits - peak) / divisor).masked_fill(logits < cut, -torch.inf)
    log_sum = scaled.logsumexp(dim=-1, keepdim=True) + peak / divisor
    return torch.where(greedy, peak, log_sum)[:, 0], torch.where(greedy, peak, cut)[:, 0]


def warped_probs(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> Tensor:
    """Return the warped distributions themselves; a greedy row is 1 at its largest logit, the lowest id on ties.

    Args: as for `warped_normaliser`.

    Returns:
        Probabilities. [R, vocab], dtype of the logits.
    """
    divisor = _divisor(logits, temperature)
    cut = _smallest_kept(logits, divisor, top_k, top_p)
    scaled = ((logits - logits.amax(dim=-1, keepdim=True)) / divisor).masked_fill(logits < cut, -torch.inf)
    greedy_probs = torch.zeros_like(logits).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(temperature[:, None] == 0, greedy_probs, scaled.softmax(dim=-1))


def _divisor(logits: Tensor, temperature: Tensor) -> Tensor:
    """The temperature to divide by: 1 in a greedy row, whose quotients are not used. [R, 1]."""
    return torch.where(temperature == 0, 1.0, temperature).to(logits.dtype)[:, None]


def _smallest_kept(logits: Tensor, divisor: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The smallest logit of each row that top-k and top-p keep. [R, 1]."""
    if top_k is None and top_p is None:
        return logits.amin(dim=-1, keepdim=True)
    num_rows, vocab = logits.shape
    values = logits.sort(dim=-1, descending=True).values

    # A token stays exactly if the first token of its logit's run in the sorted row stays.
    run_start = torch.ones_like(values, dtype=torch.bool)
    run_start[:, 1:] = values[:, 1:] != values[:, :-1]
    position = torch.arange(vocab, device=logits.device).expand(num_rows, vocab)
    num_larger = torch.where(run_start, position, 0).cummax(dim=-1).values  # tokens of strictly larger logit

    kept = torch.ones_like(run_start)
    if top_k is not None:
        kept = num_larger < torch.where(top_k > 0, top_k, vocab)[:, None]
    if top_p is not None:
        weights = ((values - values[:, :1]) / divisor).masked_fill(~kept, -torch.inf).exp()
        inclusive = weights.cumsum(dim=-1)
        exclusive = torch.cat([torch.zeros_like(inclusive[:, :1]), inclusive[:, :-1]], dim=-1)
        mass_larger = exclusive.gather(-1, num_larger) / inclusive[:, -1:]
        # Compared with the caller's top_p itself, not with 1 - top_p. A top_p of 1 is off: sums may round to 1 early.
        limit = top_p[:, None]
        kept = kept & ((mass_larger < limit) | (limit >= 1))
    num_kept = kept.sum(dim=-1, keepdim=True)  # the kept tokens lead the sorted row
    return values.gather(-1, num_kept - 1)
