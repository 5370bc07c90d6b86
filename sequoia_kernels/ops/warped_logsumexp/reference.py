"""Reference of warped_logsumexp: the specification, in plain torch on any device. Inputs and outputs as in op.py.

The definition itself is ``sequoia_kernels.ops.warping``, which verify_tree shares:
    top-k   keeps x if fewer than k tokens have a larger logit
    top-p   keeps x if the tokens with a larger logit hold less than top_p of the probability that top-k left
    log_normaliser = log sum over the kept x of exp(logit / T),   cut = the smallest kept logit
    A row at temperature 0 has its largest logit as both.
"""

from __future__ import annotations

from sequoia_kernels.ops.warping import compute_dtype, warped_normaliser

from .op import WarpedNormaliser, WarpInputs

__all__ = ["run", "supports"]


def supports(inputs: WarpInputs) -> str | None:
    """Every call that passes the op's checks runs here."""
    return None


def run(inputs: WarpInputs, outputs: WarpedNormaliser) -> None:
    """Write the outputs."""
    logits = inputs.logits.to(compute_dtype(inputs.logits.dtype))
    for output, result in zip(outputs, warped_normaliser(logits, *inputs[1:])):
        output.copy_(result)
