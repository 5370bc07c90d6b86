"""Draw tokens without replacement from each row's softmax: the specification, in plain torch.

Computes: key(x) = logit(x) / T + gumbel(x), with independent standard Gumbel noise for every token; the tokens with the
    k largest keys, in falling order, are k draws without replacement from softmax(logit / T) in draw order.
Numerics: keys are float64 with noise in float32: at a small temperature logit / T is large, and in float32 its rounding
    would be as large as the noise, also among tokens far below the peak, which later draws choose from. Only keys are
    compared, never probability mass that is left over, so no draw runs out by cancellation however peaked the row is.
    The log-normaliser is float32, or float64 for float64 logits; so is the question which logits overflow to -inf.
Inputs, in order: logits [R, vocab], num_samples int, temperature [R] f32, seeds [R] i64, offsets [R] i64.
Outputs, in order: tokens [R, num_samples] i64, log_normaliser [R] f32 (f64 for float64 logits).
Source: the Gumbel-top-k construction (Kool, van Hoof, Welling 2019, arXiv 1903.06059, section 2.3; Vieira 2014).
"""

from __future__ import annotations

import torch

from sequoia_kernels.ops.warping import compute_dtype
from sequoia_kernels.rng import DRAFT_TAG, token_gumbel

__all__ = ["run", "sample_rows", "supports"]


def supports(*inputs: object) -> str | None:
    """Every call that passes the op's checks runs here."""
    return None


def run(
    logits: torch.Tensor,
    num_samples: int,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    offsets: torch.Tensor,
    tokens: torch.Tensor | None,
    log_normaliser: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op on the backend's inputs, into the outputs where they are given."""
    drawn, normaliser = sample_rows(logits, num_samples, temperature, seeds, offsets)
    return (
        drawn if tokens is None else tokens.copy_(drawn),
        normaliser if log_normaliser is None else log_normaliser.copy_(normaliser),
    )


def sample_rows(
    logits: torch.Tensor,  # [R, vocab]
    num_samples: int,
    temperature: torch.Tensor,  # [R]
    seeds: torch.Tensor,  # [R]
    offsets: torch.Tensor,  # [R]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens [R, num_samples] int64, log_normaliser [R]).

    A row at temperature 0 takes its largest logits. Keys that tie are taken by rising token id. A row with fewer finite
    keys than samples ends in -1.
    """
    num_rows, vocab = logits.shape
    logits = logits.to(compute_dtype(logits.dtype))
    greedy = (temperature == 0)[:, None]
    scale = torch.where(temperature == 0, 1.0, temperature).to(logits.dtype)[:, None]
    noise = token_gumbel(seeds, offsets, vocab, DRAFT_TAG)
    keys = (logits.double() / scale.double() + noise.double()).masked_fill(logits / scale == -torch.inf, -torch.inf)
    keys = torch.where(greedy, logits.double(), keys)

    num_drawn = min(num_samples, vocab)
    # A stable sort keeps equal keys in token order, which topk does not promise.
    best = keys.sort(dim=-1, descending=True, stable=True)
    drawn = best.indices[:, :num_drawn].masked_fill(best.values[:, :num_drawn] == -torch.inf, -1)
    tokens = torch.full((num_rows, num_samples), -1, dtype=torch.int64, device=logits.device)
    tokens[:, :num_drawn] = drawn

    peak = logits.amax(dim=-1, keepdim=True)
    log_mass = torch.exp((logits - peak) / scale).sum(dim=-1, keepdim=True).log()
    log_normaliser = torch.where(greedy, peak, peak / scale + log_mass)
    return tokens, log_normaliser[:, 0]
