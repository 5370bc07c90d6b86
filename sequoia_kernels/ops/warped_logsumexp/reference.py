"""Reference of warped_logsumexp: the definition in plain torch, on any device.

Inputs (of ``supports`` and ``run``, in this order):
    logits       [R, V] float, rows strided
    temperature  [R] float32
    top_k        [R] int32 or None
    top_p        [R] float32 or None
Outputs:
    log_normaliser, cut   [R] float32 (float64 for float64 logits)

The definition itself is ``sequoia_kernels.ops.warping``, which verify_tree shares:
    top-k   keeps x if fewer than k tokens have a larger logit
    top-p   keeps x if the tokens with a larger logit hold less than top_p of the probability that top-k left
    log_normaliser = log sum over the kept x of exp(logit / T),   cut = the smallest kept logit
    A row at temperature 0 has its largest logit as both.
"""

from __future__ import annotations

from torch import Tensor

from sequoia_kernels.ops.warping import compute_dtype, warped_normaliser


def supports(logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> str | None:
    """Everything in the contract is supported."""
    return None


def run(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    log_normaliser: Tensor | None,
    cut: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write and return the outputs."""
    results = warped_normaliser(logits.to(compute_dtype(logits.dtype)), temperature, top_k, top_p)
    if log_normaliser is None or cut is None:
        return results
    return log_normaliser.copy_(results[0]), cut.copy_(results[1])
