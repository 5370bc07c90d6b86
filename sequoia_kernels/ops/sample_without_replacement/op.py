"""sample_without_replacement: contract, checks and dispatch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops.operators import Buffer, Operator
from sequoia_kernels.ops.warping import compute_dtype

__all__ = ["MAX_SAMPLES", "SampleInputs", "SampledTokens", "check_values", "sample_without_replacement"]

OP = "sample_without_replacement"
MAX_SAMPLES = 128


class SampleInputs(NamedTuple):
    """What the op takes.

    Attributes:
        logits: [R, vocab], float; rows strided at will.
        num_samples: 1..128.
        temperature: [R], float32.
        seeds: [R], int64.
        offsets: [R], int64.
    """

    logits: Tensor
    num_samples: int
    temperature: Tensor
    seeds: Tensor
    offsets: Tensor


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
        offsets: position in that stream. A pair of seed and offset must not be used twice: one offset a node, so that
            node j of a step's tree draws its children at the request's offset + j, and the next step begins behind
            them, at offset + N. Rows that share a pair share their noise, and what is decoded from them is no longer
            distributed like the target, without a sign of it. Integer, for one row or temperature 0, or [R] int64.
        out: buffers to write into instead of new ones, of the shapes and dtypes of SampledTokens, strided at will. They
            share no memory with one another or an input.
        backend: name of a backend, or "auto".
        debug: check values on a GPU too, and on every device that no two rows above temperature 0 share a pair of seed
            and offset. Waits for the device.

    Returns:
        SampledTokens(tokens [R, num_samples] int64, log_normaliser [R]). A row with fewer unmasked tokens than
        `num_samples` ends in -1; no token is ever repeated.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, layout or range is wrong; on a CPU or under `debug` if a row of logits holds NaN
            or +inf or only -inf, or a temperature is out of range; under `debug` if rows share their noise. Nothing has
            been written then.
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
    checks.check_tensor(OP, "logits", logits)
    checks.check_rows(OP, "logits", logits, "rows, vocab")
    row_values = functools.partial(checks.row_values, OP, num_rows=logits.shape[0], device=logits.device)
    inputs = SampleInputs(
        logits,
        checks.whole_number(OP, "num_samples", num_samples, torch.int64),
        row_values("temperature", temperature, dtype=torch.float32, rule=checks.TEMPERATURE),
        row_values("seeds", seeds, dtype=torch.int64),
        row_values("offsets", offsets, dtype=torch.int64),
    )
    return OPERATOR(inputs, out, backend, debug)


def check(inputs: SampleInputs) -> None:
    """Check dtypes, shapes, layouts, devices and the number of samples."""
    logits, num_samples = inputs.logits, inputs.num_samples
    checks.check_dtype(OP, "logits", logits, *checks.FLOAT_DTYPES)
    checks.check_rows(OP, "logits", logits, "rows, vocab")
    num_rows, vocab = logits.shape
    if vocab == 0:
        checks.fail_range(OP, "logits", "have at least one token", checks.shape_text(logits.shape))
    if not 1 <= num_samples <= MAX_SAMPLES:
        checks.fail_range(OP, "num_samples", f"be in 1..{MAX_SAMPLES}", num_samples)
    checks.check_row_values(OP, "temperature", inputs.temperature, num_rows, torch.float32, logits.device)
    checks.check_row_values(OP, "seeds", inputs.seeds, num_rows, torch.int64, logits.device)
    checks.check_row_values(OP, "offsets", inputs.offsets, num_rows, torch.int64, logits.device)


def buffers(inputs: SampleInputs) -> tuple[Buffer, Buffer]:
    """Describe the outputs."""
    num_rows = inputs.logits.shape[0]
    return (
        Buffer((num_rows, inputs.num_samples), torch.int64, "rows, num_samples"),
        Buffer((num_rows,), compute_dtype(inputs.logits.dtype), "rows"),
    )


def check_values(inputs: SampleInputs) -> None:
    """Check temperatures and logits. Reads values."""
    checks.check_temperature_values(OP, inputs.temperature)
    checks.check_logits(OP, "logits", inputs.logits)


def check_use(inputs: SampleInputs) -> None:
    """No two rows share their noise. Reads values."""
    hint = "pass one offset a node: (offsets[:, None] + nodes).flatten(), and a seed of its own for each request"
    checks.check_streams(OP, inputs.seeds, inputs.offsets, inputs.temperature, "rows", hint)


OPERATOR = Operator(
    OP,
    SampleInputs,
    SampledTokens,
    package=__package__,
    check=check,
    buffers=buffers,
    check_values=check_values,
    check_use=check_use,
    out_rule="be a pair (tokens, log_normaliser)",
)
