"""Reference of warped_logsumexp: the definition in plain torch, on any device.

Inputs (of ``supports`` and ``run``, in this order):
    logits       [R, V] float, rows strided
    temperature  [R] float32
    top_k        [R] int32 or None
    top_p        [R] float32 or None
Outputs:
    log_normaliser, cut   [R] float32 (float64 for float64 logits)

Definition, in the order of transformers' warpers. With scaled = logit / T:
    top-k   keeps x if fewer than k tokens have a larger logit
    top-p   keeps x if the tokens with a larger logit hold less than top_p of the probability that top-k left
    log_normaliser = log sum over the kept x of exp(scaled(x)),   cut = the smallest kept logit
Both rules look at strictly larger logits only, so tokens of equal logits stay or go together: the result is a threshold
on the logit and does not depend on how a sort orders ties. (transformers keeps ties in top-k and breaks them in top-p.)

Numerics: logits minus the row's maximum before the division, so no exponential overflows at any temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor


def supports(logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> str | None:
    return None


def run(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    log_normaliser: Tensor | None,
    cut: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num_rows, vocab = logits.shape
    compute_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = logits.to(compute_dtype).sort(dim=-1, descending=True).values  # [R, V]
    row_max = values[:, :1]
    greedy = temperature.unsqueeze(-1) == 0
    # A greedy row divides by 1 and is replaced at the end.
    divisor = torch.where(greedy, 1.0, temperature.unsqueeze(-1)).to(compute_dtype)
    scaled = (values - row_max) / divisor

    # A token stays exactly if the first token of its logit's run in the sorted row stays.
    run_start = torch.ones_like(values, dtype=torch.bool)
    run_start[:, 1:] = values[:, 1:] != values[:, :-1]
    position = torch.arange(vocab, device=logits.device).expand(num_rows, vocab)
    num_larger = torch.where(run_start, position, 0).cummax(dim=-1).values  # tokens of strictly larger logit

    kept = torch.ones_like(run_start)
    if top_k is not None:
        active_k = torch.where(top_k > 0, top_k, vocab).unsqueeze(-1)  # k <= 0 is off
        kept = num_larger < active_k
    if top_p is not None:
        weights = torch.where(kept, scaled, -torch.inf).exp()
        inclusive = weights.cumsum(dim=-1)
        exclusive = torch.cat([torch.zeros_like(inclusive[:, :1]), inclusive[:, :-1]], dim=-1)
        mass_larger = exclusive.gather(-1, num_larger) / inclusive[:, -1:]
        # Compared with the caller's top_p itself, not with 1 - top_p. A top_p of 1 is off: the sums may round to 1 early.
        limit = top_p.unsqueeze(-1)
        kept = kept & ((mass_larger < limit) | (limit >= 1))

    num_kept = kept.sum(dim=-1, keepdim=True)  # the kept tokens lead the sorted row
    smallest_kept = values.gather(-1, num_kept - 1)
    log_sum = torch.where(kept, scaled, -torch.inf).logsumexp(dim=-1, keepdim=True) + row_max / divisor
    result = torch.where(greedy, row_max, log_sum).squeeze(-1)
    threshold = torch.where(greedy, row_max, smallest_kept).squeeze(-1)
    return _into(log_normaliser, result), _into(cut, threshold)


def _into(buffer: Tensor | None, value: Tensor) -> Tensor:
    return value if buffer is None else buffer.copy_(value)
