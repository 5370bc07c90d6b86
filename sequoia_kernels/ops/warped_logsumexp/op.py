"""warped_logsumexp: contract, checks and dispatch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops.operators import Buffer, Operator
from sequoia_kernels.ops.warping import compute_dtype

OP = "warped_logsumexp"


class WarpInputs(NamedTuple):
    """What the op takes.

    Attributes:
        logits: [R, V], float; rows strided at will.
        temperature: [R], float32.
        top_k: [R], int32, or None.
        top_p: [R], float32, or None.
    """

    logits: Tensor
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None


class WarpedNormaliser(NamedTuple):
    """What turns a logit into a probability: exp(logit / T - log_normaliser) where logit >= cut, else 0."""

    log_normaliser: Tensor
    """log of the sum of exp(logit / T) over the kept tokens. [R], float32 (float64 for float64 logits)."""
    cut: Tensor
    """smallest kept logit. [R], dtype as ``log_normaliser``."""


def warped_logsumexp(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    *,
    out: WarpedNormaliser | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> WarpedNormaliser:
    """Compute the normaliser and the cut of each row's distribution under temperature, top-k and top-p.

    A token's probability is exp(logit / T - log_normaliser) where logit >= cut, and 0 elsewhere: two numbers a row in
    place of a row of probabilities. The warpers apply in the order temperature, top-k, top-p, as in transformers.

    Args:
        logits: rows of logits; single entries may be -inf (masked tokens). [R, V], float32, bfloat16, float16 or
            float64, last dimension contiguous, rows strided at will.
        temperature: a number or [R] float32. 0, or at least 1e-5. A row at 0 is greedy: both results are its largest
            logit.
        top_k: a number or [R] int32; tokens to keep. None, 0 or less, and V or more keep all.
        top_p: a number or [R] float32, in (0, 1]; probability to keep. None and 1 keep all.
        out: buffers to write, of the shape and dtype of the result; they share no memory with one another or an input.
        backend: "auto" or a backend's name.
        debug: check values on devices other than the CPU, too, which syncs with the host.

    Returns:
        WarpedNormaliser(log_normaliser [R], cut [R]): float32, or float64 for float64 logits.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, layout, device or range; NaN or +inf in logits, or a row of nothing but -inf (on CPU
            tensors always, elsewhere with ``debug``).
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates ``out`` only. No host sync (without ``debug``); can be captured in a CUDA graph; deterministic.
        The log-normaliser is logit / T in size: at T = 1e-5 and logits of 20 that is 2e6, which float32 holds to 0.1
        only. Cuts and draws do not depend on it; probabilities at such temperatures want float64 logits.
        Tokens of equal logits stay or go together: top-k keeps x if fewer than k tokens have a larger logit, top-p if
        the tokens of larger logit hold less than ``top_p``. transformers breaks ties within top-p by sort order.

    Source:
        Holtzman et al., "The curious case of neural text degeneration", ICLR 2020 (top-p); Fan et al., "Hierarchical
        neural story generation", ACL 2018 (top-k).

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> log_normaliser, cut = warped_logsumexp(logits, 1.0, top_k=2)
        >>> probs = torch.where(logits >= cut[:, None], torch.exp(logits - log_normaliser[:, None]), 0.0)
        >>> [round(prob, 4) for prob in probs[0].tolist()]
        [0.7311, 0.2689, 0.0, 0.0]
    """
    checks.check_tensor(OP, "logits", logits)
    checks.check_rows(OP, "logits", logits, "rows, vocab")
    row_values = functools.partial(checks.row_values, OP, num_rows=logits.shape[0], device=logits.device)
    inputs = WarpInputs(
        logits,
        row_values("temperature", temperature, dtype=torch.float32, rule=checks.TEMPERATURE),
        None if top_k is None else row_values("top_k", top_k, dtype=torch.int32),
        None if top_p is None else row_values("top_p", top_p, dtype=torch.float32, rule=checks.TOP_P),
    )
    return OPERATOR(inputs, out, backend, debug)


def check(inputs: WarpInputs) -> None:
    """Check dtypes, shapes, layouts and devices."""
    logits, temperature, top_k, top_p = inputs
    checks.check_dtype(OP, "logits", logits, *checks.FLOAT_DTYPES)
    checks.check_rows(OP, "logits", logits, "rows, vocab")
    num_rows, vocab = logits.shape
    if vocab == 0:
        checks.fail_range(OP, "logits", "have at least one token", checks.shape_text(logits.shape))
    checks.check_row_values(OP, "temperature", temperature, num_rows, torch.float32, logits.device)
    checks.check_row_values(OP, "top_k", top_k, num_rows, torch.int32, logits.device)
    checks.check_row_values(OP, "top_p", top_p, num_rows, torch.float32, logits.device)


def buffers(inputs: WarpInputs) -> tuple[Buffer, Buffer]:
    """Describe the outputs."""
    row = Buffer((inputs.logits.shape[0],), compute_dtype(inputs.logits.dtype), "rows")
    return row, row


def check_values(inputs: WarpInputs) -> None:
    """Check temperatures, top_p and logits. Reads values."""
    checks.check_temperature_values(OP, inputs.temperature)
    checks.check_top_p_values(OP, inputs.top_p)
    checks.check_logits(OP, "logits", inputs.logits)


OPERATOR = Operator(
    OP,
    WarpInputs,
    WarpedNormaliser,
    package=__package__,
    check=check,
    buffers=buffers,
    check_values=check_values,
    out_rule="be a WarpedNormaliser",
)
