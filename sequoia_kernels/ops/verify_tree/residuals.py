"""What the references of all verification rules share: the draft that is left, and the residual of a rejection."""

from __future__ import annotations

import torch

from .op import VerifyTreeInputs

__all__ = ["draft_left", "residual_left", "with_whole_draft"]


def with_whole_draft(inputs: VerifyTreeInputs) -> VerifyTreeInputs:
    """Return the same call with rows of the draft as wide as the target's, of -inf where it does not know a token."""
    target_logits, draft_logits, target_to_draft = inputs.target_logits, inputs.draft_logits, inputs.target_to_draft
    if draft_logits is None:
        nothing = torch.full((1, 1, 1), -torch.inf, dtype=target_logits.dtype, device=target_logits.device)
        return inputs._replace(draft_logits=nothing.expand(target_logits.shape), target_to_draft=None)
    if target_to_draft is None:
        return inputs
    whole = draft_logits.index_select(2, target_to_draft.clamp(min=0).to(torch.int64))
    return inputs._replace(draft_logits=whole.masked_fill(target_to_draft < 0, -torch.inf), target_to_draft=None)


def draft_left(
    draft_logits: torch.Tensor,  # [R, vocab]
    drawn: torch.Tensor,  # [R, vocab] bool: tokens drawn before
    is_child: torch.Tensor,  # [R, vocab] bool: the token that is tested, at most one a row
    temperature: torch.Tensor,  # [R]; 0 too where the child is certain
) -> torch.Tensor:
    """Return the distribution that the next child was drawn from: the draft's without the tokens drawn before.

    Zeros, not NaN, where nothing is left. At temperature 0 the draft proposes each child with certainty, which makes
    the greedy rule (accept the target's largest logit) a case of the others. [R, vocab].

    Only differences to the largest logit that is left are divided by T: logit / T itself, and differences to a peak far
    above, are too coarse at small temperatures.
    """
    dtype = draft_logits.dtype
    divisor = torch.where(temperature == 0, 1.0, temperature).to(dtype)[:, None]
    logits = draft_logits.masked_fill(drawn, -torch.inf)
    peak = logits.amax(dim=-1, keepdim=True)
    weights = torch.exp((logits - torch.where(peak == -torch.inf, 0, peak)) / divisor)
    return torch.where((temperature == 0)[:, None], is_child.to(dtype), weights / _nonzero(weights.sum(-1, True)))


def residual_left(
    weights: torch.Tensor,  # [R, vocab]: residual less draft, of any sign
    target_probs: torch.Tensor,  # [R, vocab]
    drawn: torch.Tensor,  # [R, vocab] bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalise(max(weights, 0)) outside the drawn tokens, and its mass before that. [R, vocab], [R].

    Where the mass is 0: the target without the drawn tokens; the target itself where it has no mass there.
    """
    left = weights.clamp(min=0).masked_fill(drawn, 0)
    mass = left.sum(dim=-1, keepdim=True)
    undrawn_target = target_probs.masked_fill(drawn, 0)
    undrawn_mass = undrawn_target.sum(dim=-1, keepdim=True)
    empty_residual = torch.where(undrawn_mass > 0, undrawn_target / _nonzero(undrawn_mass), target_probs)
    return torch.where(mass > 0, left / _nonzero(mass), empty_residual), mass[:, 0]


def _nonzero(mass: torch.Tensor) -> torch.Tensor:
    """The mass as a divisor: 1 where it is 0, since the quotient is not used there."""
    return torch.where(mass > 0, mass, 1)
