"""warped_logsumexp: contract, checks and dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops import backends

OP = "warped_logsumexp"


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
    checks.check_options(OP, backend, debug=debug)
    num_rows, device = logits.shape[0], logits.device
    temperature = checks.row_values(
        OP, "temperature", temperature, num_rows, torch.float32, device, rule=checks.TEMPERATURE
    )
    if top_k is not None:
        top_k = checks.row_values(OP, "top_k", top_k, num_rows, torch.int32, device)
    if top_p is not None:
        top_p = checks.row_values(OP, "top_p", top_p, num_rows, torch.float32, device, rule=checks.TOP_P)
    if out is None:
        return WarpedNormaliser(*_operator(logits, temperature, top_k, top_p, debug, backend))
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"{OP}: out must be a WarpedNormaliser, got {type(out).__name__}")
    for name, buffer in zip(WarpedNormaliser._fields, out):
        checks.check_tensor(OP, f"out.{name}", buffer)
    _out_operator(logits, temperature, top_k, top_p, debug, backend, out[0], out[1])
    return WarpedNormaliser(*out)


def _result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _run(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    debug: bool,
    backend: str,
    log_normaliser: Tensor | None = None,
    cut: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_structure(logits, temperature, top_k, top_p, log_normaliser, cut)
    if log_normaliser is not None:
        checks.check_memory(
            OP,
            {"out.log_normaliser": log_normaliser, "out.cut": cut},
            {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p},
        )
    on_cpu = logits.is_cpu
    inputs = (logits, temperature, top_k, top_p)
    chosen = backends.choose(OP, backend, "cpu" if on_cpu else logits.device.type, inputs)
    if debug or (on_cpu and not chosen.checks_values):
        _check_values(logits, temperature, top_p)
    return chosen.run(*inputs, log_normaliser, cut)


def _run_out(*arguments: Any) -> None:
    _run(*arguments)


def _check_structure(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    log_normaliser: Tensor | None,
    cut: Tensor | None,
) -> None:
    checks.check_dtype(OP, "logits", logits, *checks.FLOAT_DTYPES)
    checks.check_rows(OP, "logits", logits, "rows, vocab")
    num_rows, vocab = logits.shape
    if vocab == 0:
        checks.fail_range(OP, "logits", "have at least one token", checks.shape_text(logits.shape))
    device = logits.device
    checks.row_values(OP, "temperature", temperature, num_rows, torch.float32, device)
    if top_k is not None:
        checks.row_values(OP, "top_k", top_k, num_rows, torch.int32, device)
    if top_p is not None:
        checks.row_values(OP, "top_p", top_p, num_rows, torch.float32, device)
    if log_normaliser is not None:
        dtype = _result_dtype(logits)
        checks.check_out(OP, "out.log_normaliser", log_normaliser, (num_rows,), dtype, device, "rows")
        checks.check_out(OP, "out.cut", cut, (num_rows,), dtype, device, "rows")


def _check_values(logits: Tensor, temperature: Tensor, top_p: Tensor | None) -> None:
    checks.check_temperature_values(OP, temperature)
    if top_p is not None:
        checks.check_top_p_values(OP, top_p)
    checks.check_logits(OP, "logits", logits)


def _fake(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, debug: bool, backend: str
) -> tuple[Tensor, Tensor]:
    _check_structure(logits, temperature, top_k, top_p, None, None)
    result = logits.new_empty(logits.shape[0], dtype=_result_dtype(logits))
    return result, torch.empty_like(result)


def _fake_out(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    _debug: bool,
    _backend: str,
    *out: Any,
) -> None:
    _check_structure(logits, temperature, top_k, top_p, *out)


backends.register_room(OP, package=__package__)

_INPUTS = "Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, bool debug, str backend"
_operator = backends.define_operator(f"{OP}({_INPUTS}) -> (Tensor, Tensor)", run=_run, fake=_fake)
_out_operator = backends.define_operator(
    f"{OP}.out({_INPUTS}, Tensor(a!) log_normaliser, Tensor(b!) cut) -> ()", run=_run_out, fake=_fake_out
)
