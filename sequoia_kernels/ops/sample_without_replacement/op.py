"""The contract of `sample_without_replacement`: checks, dispatch and torch registration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops import backends
from sequoia_kernels.ops.warping import compute_dtype

__all__ = ["MAX_SAMPLES", "SampledTokens", "sample_without_replacement"]

_OP = "sample_without_replacement"
MAX_SAMPLES = 128


class SampledTokens(NamedTuple):
    """Tokens drawn from each row, and the row's normaliser.

    Attributes:
        tokens: different tokens in draw order, -1 behind the last one where a row has too few. [R, num_samples], int64.
        log_normaliser: log-sum-exp of logit / T over the vocabulary, so that a token's probability in the first draw is
            exp(logit / T - log_normaliser); the largest logit where T is 0. [R], float32 (float64 for float64 logits).
    """

    tokens: Tensor
    log_normaliser: Tensor


def sample_without_replacement(
    logits: Tensor,
    num_samples: int,
    temperature: float | Tensor,
    seeds: int | Tensor,
    offsets: int | Tensor,
    *,
    out: SampledTokens | tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> SampledTokens:
    """Draw several different tokens from every row's softmax, in order.

    The first token is distributed as softmax(logits / T), the second as the same without the first, and so on. A row's
    draws depend on its logits, temperature, seed and offset only, not on the batch around it.

    Args:
        logits: one row per draw; -inf masks a token. [R, vocab], float32, bfloat16, float16 or float64, last dimension
            contiguous, rows strided at will.
        num_samples: tokens to draw per row. 1..128.
        temperature: 0, or at least 1e-5; 0 takes the largest logits in order, ties by rising token id. Number, or [R]
            float32.
        seeds: the request's random stream. Integer, or [R] int64.
        offsets: position in that stream. A pair of seed and offset must not be used twice. Integer, or [R] int64.
        out: buffers to write into instead of new ones, of the shapes and dtypes of SampledTokens, strided at will. They
            share no memory with one another or an input.
        backend: name of a backend, or "auto".
        debug: check values on a GPU too, which waits for it.

    Returns:
        SampledTokens. A row with fewer unmasked tokens than `num_samples` ends in -1; no token is ever repeated.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, layout or range is wrong; on a CPU or under `debug` if a row of logits holds NaN
            or +inf or only -inf, or a temperature is out of range. Nothing has been written then.
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates only `out`. No host sync unless `debug`; can be captured in a CUDA graph. The same inputs give the same
        draws on every run. What is compared to draw a token is float64, so small temperatures do not round the noise
        away. The normaliser is float32 (float64 for float64 logits), and so large at small temperatures that
        probabilities are better taken from differences to the largest logit. A logit that overflows to -inf in that
        type when divided by T counts as masked.

    Source:
        Gumbel-top-k (arXiv 1903.06059, section 2.3) in place of the sequential draws of Sequoia (arXiv 2402.12374),
        section 3.2: one read of the logits, and no leftover mass that cancels to zero.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, -torch.inf, 0.0], [0.0, 3.0, 1.0, 2.0]])
        >>> sample_without_replacement(logits, 3, temperature=0.0, seeds=7, offsets=0).tokens.tolist()
        [[0, 1, 3], [1, 3, 2]]
    """
    checks.check_tensor(_OP, "logits", logits)
    checks.check_rows(_OP, "logits", logits, "rows, vocab")
    checks.check_options(_OP, backend, debug=debug)
    num_samples = checks.whole_number(_OP, "num_samples", num_samples, torch.int64)
    num_rows, device = logits.shape[0], logits.device
    temperature = checks.row_values(
        _OP, "temperature", temperature, num_rows, torch.float32, device, rule=checks.TEMPERATURE
    )
    seeds = checks.row_values(_OP, "seeds", seeds, num_rows, torch.int64, device)
    offsets = checks.row_values(_OP, "offsets", offsets, num_rows, torch.int64, device)
    inputs = (logits, num_samples, temperature, seeds, offsets, debug, backend)
    if out is None:
        return SampledTokens(*_operator(*inputs))
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"{_OP}: out must be a pair (tokens, log_normaliser), got {type(out).__name__}")
    for name, buffer in zip(SampledTokens._fields, out, strict=True):
        checks.check_tensor(_OP, f"out.{name}", buffer)
    _out_operator(*inputs, *out)
    return SampledTokens(*out)


def _run(
    logits: Tensor,
    num_samples: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    debug: bool,
    backend: str,
    tokens: Tensor | None = None,
    log_normaliser: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = (logits, num_samples, temperature, seeds, offsets)
    _check_structure(*inputs, tokens, log_normaliser)
    if tokens is not None:
        checks.check_memory(
            _OP,
            {"out.tokens": tokens, "out.log_normaliser": log_normaliser},
            {"logits": logits, "temperature": temperature, "seeds": seeds, "offsets": offsets},
        )
    chosen = backends.choose(_OP, backend, logits.device.type, inputs)
    if debug or (logits.is_cpu and not chosen.checks_values):
        checks.check_temperature_values(_OP, temperature)
        checks.check_logits(_OP, "logits", logits)
    return chosen.run(*inputs, tokens, log_normaliser)


def _run_out(*arguments: Any) -> None:
    _run(*arguments)


def _check_structure(
    logits: Tensor,
    num_samples: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    tokens: Tensor | None,
    log_normaliser: Tensor | None,
) -> None:
    checks.check_dtype(_OP, "logits", logits, *checks.FLOAT_DTYPES)
    checks.check_rows(_OP, "logits", logits, "rows, vocab")
    num_rows, vocab = logits.shape
    if vocab == 0:
        checks.fail_range(_OP, "logits", "have at least one token", checks.shape_text(logits.shape))
    if not 1 <= num_samples <= MAX_SAMPLES:
        checks.fail_range(_OP, "num_samples", f"be in 1..{MAX_SAMPLES}", num_samples)
    device = logits.device
    checks.row_values(_OP, "temperature", temperature, num_rows, torch.float32, device)
    checks.row_values(_OP, "seeds", seeds, num_rows, torch.int64, device)
    checks.row_values(_OP, "offsets", offsets, num_rows, torch.int64, device)
    if tokens is not None:
        dtype = compute_dtype(logits.dtype)
        shape = (num_rows, num_samples)
        checks.check_out(_OP, "out.tokens", tokens, shape, torch.int64, device, "rows, num_samples")
        checks.check_out(_OP, "out.log_normaliser", log_normaliser, (num_rows,), dtype, device, "rows")


def _fake(
    logits: Tensor,
    num_samples: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    debug: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_structure(logits, num_samples, temperature, seeds, offsets, None, None)
    tokens = logits.new_empty((logits.shape[0], num_samples), dtype=torch.int64)
    return tokens, logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))


def _fake_out(
    logits: Tensor,
    num_samples: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    debug: bool,
    backend: str,
    tokens: Tensor,
    log_normaliser: Tensor,
) -> None:
    _check_structure(logits, num_samples, temperature, seeds, offsets, tokens, log_normaliser)


backends.register_room(_OP, package=__package__)

_INPUTS = "Tensor logits, SymInt num_samples, Tensor temperature, Tensor seeds, Tensor offsets, bool debug, str backend"
_operator = backends.define_operator(f"{_OP}({_INPUTS}) -> (Tensor, Tensor)", run=_run, fake=_fake)
_out_operator = backends.define_operator(
    f"{_OP}.out({_INPUTS}, Tensor(a!) tokens, Tensor(b!) log_normaliser) -> ()", run=_run_out, fake=_fake_out
)
