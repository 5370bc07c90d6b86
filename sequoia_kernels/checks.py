"""Argument checks of the ops: cheap on the way through, one wording when they fail.

A message reads ``<op>: <arg> must <rule>, got <actual>``. Structure (types, dtypes, shapes, devices) is checked on
every call and on every device. Values are checked where that costs no device sync: on CPU tensors always, elsewhere
under ``debug``. Nothing is formatted unless a check fails.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "FLOAT_DTYPES",
    "MIN_TEMPERATURE",
    "check_device",
    "check_dtype",
    "check_logits",
    "check_out",
    "check_rows",
    "check_shape",
    "check_temperature_values",
    "check_tensor",
    "check_tensors",
    "check_top_p_values",
    "fail_range",
    "row_values",
    "shape_text",
]

FLOAT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))

# Below this, logit / T of ordinary logits leaves the range in which float32 exponents mean anything. The floor allows
# for the rounding of the constant to float32.
MIN_TEMPERATURE = 1e-5
_TEMPERATURE_FLOOR = MIN_TEMPERATURE * (1 - 2.0**-20)


def shape_text(shape: Sequence[int]) -> str:
    """A shape as the messages write it: ``[2, 64, 32000]``."""
    return "[" + ", ".join(str(int(size)) for size in shape) + "]"


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fail_range(op: str, name: str, rule: str, actual: object) -> NoReturn:
    """Raise the ValueError of a broken rule."""
    raise ValueError(f"{op}: {name} must {rule}, got {actual}")


def check_tensor(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_tensors(op: str, **values: Any) -> None:
    """Raise TypeError unless every value is a tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            check_tensor(op, name, value)


def check_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless the dtype is one of those allowed."""
    if tensor.dtype not in allowed:
        names = " or ".join(sorted({_dtype_text(dtype) for dtype in allowed}))
        raise TypeError(f"{op}: {name} must have dtype {names}, got {_dtype_text(tensor.dtype)}")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], legend: str) -> None:
    """Raise ValueError unless the shape is the expected one; ``legend`` names the sizes, e.g. "batch, nodes"."""
    if tensor.shape != expected:
        fail_range(op, name, f"have shape [{legend}] = {shape_text(expected)}", shape_text(tensor.shape))


def check_rows(op: str, name: str, tensor: Tensor, legend: str) -> None:
    """Raise ValueError unless a tensor has the dimensions of the legend and its last one is contiguous."""
    if tensor.dim() != legend.count(",") + 1:
        fail_range(op, name, f"have shape [{legend}]", shape_text(tensor.shape))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail_range(op, name, "be contiguous in its last dimension", f"strides {shape_text(tensor.stride())}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor is on the device of the op's first tensor."""
    if tensor.device != device:
        fail_range(op, name, f"be on {device}", tensor.device)


def check_out(
    op: str, name: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, legend: str
) -> None:
    """Check a caller's output buffer: a tensor of exactly this dtype, shape and device, any strides."""
    check_tensor(op, name, tensor)
    check_dtype(op, name, tensor, dtype)
    check_shape(op, name, tensor, shape, legend)
    check_device(op, name, tensor, device)


def row_values(
    op: str, name: str, value: Any, num_rows: int, dtype: torch.dtype, device: torch.device, legend: str = "rows"
) -> Tensor:
    """Turn a per-row argument into a tensor: a Python number is repeated, a tensor must fit exactly.

    Args:
        op: name of the op.
        name: name of the argument.
        value: a Python number (an integer if ``dtype`` is one), or a tensor [num_rows] of ``dtype`` on ``device``.
        num_rows: rows of the call.
        dtype: what the op takes.
        device: where the op runs.
        legend: word for the rows in messages.

    Returns:
        [num_rows] of ``dtype``.

    Raises:
        TypeError: neither a tensor of that dtype nor a number of that kind.
        ValueError: wrong shape or device, or an integer that does not fit the dtype.
    """
    if isinstance(value, Tensor):
        check_dtype(op, name, value, dtype)
        check_shape(op, name, value, (num_rows,), legend)
        check_device(op, name, value, device)
        return value
    number: float | int
    if dtype.is_floating_point and isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)  # NumPy's scalars included
    elif not dtype.is_floating_point and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
    else:
        kind = "a number" if dtype.is_floating_point else "an integer"
        raise TypeError(f"{op}: {name} must be {kind} or a tensor [{legend}], got {type(value).__name__}")
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if not limits.min <= number <= limits.max and math.isfinite(number):
        fail_range(op, name, f"fit into {_dtype_text(dtype)}", value)
    return torch.full((num_rows,), number, dtype=dtype, device=device)


def check_temperature_values(op: str, temperature: Tensor) -> None:
    """Raise ValueError unless every temperature is 0 or at least ``MIN_TEMPERATURE``. Reads values."""
    for value in temperature.tolist():
        if value != 0.0 and not _TEMPERATURE_FLOOR <= value < math.inf:
            fail_range(op, "temperature", f"be 0 or a finite number of at least {MIN_TEMPERATURE}", value)


def check_top_p_values(op: str, top_p: Tensor) -> None:
    """Raise ValueError unless every top_p is in (0, 1]. Reads values."""
    for value in top_p.tolist():
        if not 0.0 < value <= 1.0:
            fail_range(op, "top_p", "be in (0, 1]", value)


def check_logits(op: str, name: str, logits: Tensor) -> None:
    """Raise ValueError if a row of logits holds NaN or +inf, or nothing but -inf. Reads values.

    A row's maximum is finite exactly if the row is fine: NaN and +inf carry over to the maximum, and so does a row of
    all -inf. One pass, no temporary of the size of the logits.
    """
    if logits.numel() == 0:
        return
    row_max = logits.amax(dim=-1)
    if math.isfinite(float(row_max.sum(dtype=torch.float64))):  # infinities and NaN survive a sum
        return
    bad_rows = torch.nonzero(~torch.isfinite(row_max)).tolist()
    if not bad_rows:  # float64 maxima whose sum overflows
        return
    bad_row = tuple(bad_rows[0])
    worst = float(row_max[bad_row])
    if worst == -math.inf:
        fail_range(op, name, "have a finite entry in every row", f"only -inf in row {shape_text(bad_row)}")
    fail_range(op, name, "hold neither NaN nor +inf", f"{worst} in row {shape_text(bad_row)}")
