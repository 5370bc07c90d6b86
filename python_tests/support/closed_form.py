"""The residual after any number of rejections from two scalars a node: the form that the kernels use.

The specification carries a whole residual [vocab] through the rejections. Unrolled, after rejecting the set S of drawn
tokens, it is

    residual(x) = max(a * target(x) - c * draft(x), 0) outside S, 0 in S,      draft(x) = exp(logit(x) / T - log_left),

where log_left is the log-sum-exp of logit / T outside S. A node starts at a = 1, c = 0; rejecting x, with S' = S + {x},

    Z = sum outside S' of max(a * target - (c + 1) * draft, 0),
    a <- a / Z,    c <- (c + 1) / Z * exp(log_left' - log_left).

Why: max(max(u, 0) - v, 0) = max(u - v, 0) for v >= 0, so the maxima of earlier rejections vanish into the last one, and
the draft of S' is the draft of S times a constant outside S'.

The corners of the specification in these terms: a child with draft(x) = 0 or in S is passed over; for Z = 0, a becomes
1 / (target mass outside S') and c = 0; where that mass is 0 as well, a = c = 0, and the next token is drawn from the
target.
"""

from __future__ import annotations

import math

import torch

__all__ = ["closed_form_decisions"]


def closed_form_decisions(
    target_probs: torch.Tensor, draft_logits: torch.Tensor, children: list[int], temperature: float
) -> tuple[list[float], torch.Tensor]:
    """Decide one node at a temperature above 0.

    Args:
        target_probs: [vocab] float64.
        draft_logits: [vocab] float64.
        children: tokens in draw order.

    Returns:
        (acceptance probability of each child once its earlier siblings were rejected, residual [vocab] after them all).
    """
    scaled = (draft_logits - draft_logits.max()) / temperature
    outside = torch.ones_like(scaled, dtype=torch.bool)
    log_left = float(scaled.logsumexp(0))
    a, c = 1.0, 0.0
    acceptance = []
    for token in children:
        if token < 0 or not outside[token] or scaled[token] == -math.inf:
            acceptance.append(0.0)
            continue
        draft = torch.exp(scaled - log_left)
        residual_at_child = max(a * float(target_probs[token]) - c * float(draft[token]), 0.0)
        acceptance.append(min(1.0, residual_at_child / float(draft[token])))
        outside[token] = False
        mass = float((a * target_probs - (c + 1) * draft).clamp(min=0)[outside].sum())
        log_left_after = float(scaled[outside].logsumexp(0)) if bool(outside.any()) else -math.inf
        if mass > 0:
            a, c = a / mass, (c + 1) / mass * math.exp(log_left_after - log_left)
        else:
            undrawn_mass = float(target_probs[outside].sum())
            a, c = (1 / undrawn_mass if undrawn_mass > 0 else 0.0), 0.0
        log_left = log_left_after
    if a == 0:
        return acceptance, target_probs
    draft = torch.exp(scaled - log_left) if log_left > -math.inf else torch.zeros_like(scaled)
    residual = (a * target_probs - c * draft).clamp(min=0)
    return acceptance, residual.masked_fill(~outside, 0)
