"""Reference of sample_without_replacement: the specification, in plain torch on any device.

Inputs and outputs as in op.py.

Computes: key(x) = logit(x) / T + gumbel(x), with independent standard Gumbel noise for every token; the tokens with the
    k largest keys, in falling order, are k draws without replacement from softmax(logit / T) in draw order.
Numerics: keys are float64 with noise in float32: at a small temperature logit / T is large, and in float32 its rounding
    would be as large as the noise, also among tokens far below the peak, which later draws choose from. Only keys are
    compared, never probability mass that is left over, so no draw runs out by cancellation however peaked the row is.
    The log-normaliser is float32, or float64 for float64 logits; so is the question which logits overflow to -inf.
Source: the Gumbel-top-k construction (Kool, van Hoof, Welling 2019, arXiv 1903.06059, section 2.3; Vieira 2014).
"""

from __future__ import annotations

import torch

from sequoia_kernels.ops.warping import compute_dtype
from sequoia_kernels.rng import DRAFT_TAG, token_gumbel

from .op import SampledTokens, SampleInputs

__all__ = ["run", "sample_rows", "supports"]


def supports(inputs: SampleInputs) -> str | None:
    """Every call that passes the op's checks runs here."""
    return None


def run(inputs: SampleInputs, outputs: SampledTokens) -> None:
    """Write the outputs."""
    for output, result in zip(outputs, sample_rows(inputs)):
        output.copy_(result)


def sample_rows(inputs: SampleInputs) -> SampledTokens:
    """Return the draws and the normalisers.

    A row at temperature 0 takes its largest logits. Keys that tie are taken by rising token id. A row with fewer finite
    keys than samples ends in -1.
    """
    logits, num_samples, temperature, seeds, offsets = inputs
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
    return SampledTokens(tokens, log_normaliser[:, 0])
