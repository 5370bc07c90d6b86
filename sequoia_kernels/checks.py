"""Argument checks: cheap on the way through, one wording when they fail.

A message reads ``<op>: <arg> must <rule>, got <actual>``. Structure (types, dtypes, shapes, devices) is checked on
every call and on every device. Values are checked where that costs no device sync: on CPU tensors always, elsewhere
under ``debug``. Nothing is formatted unless a check fails.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from sequoia_kernels.documents import is_integer, is_number

__all__ = [
    "FINITE",
    "FLOAT_DTYPES",
    "MIN_TEMPERATURE",
    "NOT_NEGATIVE",
    "TEMPERATURE",
    "TIME",
    "TOP_P",
    "Rule",
    "at_least",
    "check_device",
    "check_dtype",
    "check_logits",
    "check_memory",
    "check_number",
    "check_options",
    "check_out",
    "check_row_values",
    "check_rows",
    "check_shape",
    "check_streams",
    "check_temperature_values",
    "check_tensor",
    "check_top_p_values",
    "fail_range",
    "number_from",
    "real_number",
    "row_values",
    "shape_text",
    "whole_number",
    "within",
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


def check_options(op: str, backend: Any, **flags: Any) -> None:
    """Raise TypeError unless the backend is named by a string and every flag is a bool."""
    if not isinstance(backend, str):
        raise TypeError(f"{op}: backend must be a string, got {type(backend).__name__}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


class Rule(NamedTuple):
    """What the values of an argument must obey."""

    text: str
    """as in ``<arg> must <text>``"""
    holds: Callable[[float], bool]


FINITE = Rule("be finite", math.isfinite)
TEMPERATURE = Rule(
    f"be 0 or a finite number of at least {MIN_TEMPERATURE}",
    lambda value: value == 0.0 or _TEMPERATURE_FLOOR <= value < math.inf,
)
TOP_P = Rule("be in (0, 1]", lambda value: 0.0 < value <= 1.0)
TIME = Rule("be a finite time >= 0", lambda value: value >= 0)


def number_from(least: float) -> Rule:
    """The rule of a number that has a lower limit."""
    return Rule(f"be a finite number >= {least}", lambda value: least <= value < math.inf)


NOT_NEGATIVE = number_from(0)


def at_least(least: int) -> Rule:
    """The rule of an integer that has a lower limit."""
    return Rule(f"be at least {least}", lambda value: value >= least)


def within(least: int, most: int) -> Rule:
    """The rule of an integer in a range, both ends included."""
    return Rule(f"be in {least}..{most}", lambda value: least <= value <= most)


def check_number(where: str, name: str, value: Any, rule: Rule) -> Any:
    """Check a setting, a finite number, and return it as it is; what is no number raises the rule's ValueError too."""
    if not is_number(value) or not rule.holds(value):
        fail_range(where, name, rule.text, repr(value))
    return value


def real_number(op: str, name: str, value: Any, rule: Rule, kind: str = "a number") -> Any:
    """Check a number and return it as a float, NumPy's numbers, integers and fractions included."""
    if type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool)):
        try:
            number = float(value)
        except OverflowError:  # an integer or fraction beyond float64, perhaps of thousands of digits
            fail_range(op, name, "fit into float32", "a number beyond float64")
        if not rule.holds(number):
            fail_range(op, name, rule.text, number)
        return number
    if isinstance(value, (torch.SymFloat, torch.SymInt)):  # traced: there is no value yet
        return value
    raise TypeError(f"{op}: {name} must be {kind}, got {type(value).__name__}")


def whole_number(
    where: str,
    name: str,
    value: Any,
    dtype: torch.dtype | None = None,
    kind: str = "an integer",
    rule: Rule | None = None,
    show_value: bool = False,
) -> Any:
    """Check an integer and return it as an int, NumPy's included; booleans are refused, they are masks by mistake.

    Args:
        where: function named in the messages.
        name: name of the argument.
        value: the argument.
        dtype: what it must fit into, where it goes into a tensor.
        kind: what it must be, in words.
        rule: what it must obey.
        show_value: say what came, not only of which type, where it is no integer.

    Raises:
        TypeError: not an integer.
        ValueError: it breaks the rule, or does not fit.
    """
    if is_integer(value):
        number = int(value)
        if dtype is not None and not torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max:
            shown = number if number.bit_length() <= 128 else f"an integer of {number.bit_length()} bits"
            fail_range(where, name, f"fit into {_dtype_text(dtype)}", shown)
        if rule is not None and not rule.holds(number):
            fail_range(where, name, rule.text, number)
        return number
    if isinstance(value, torch.SymInt):  # traced: there is no value yet
        return value
    shown = f"{value!r} of type " if show_value else ""
    raise TypeError(f"{where}: {name} must be {kind}, got {shown}{type(value).__name__}")


def row_values(
    op: str,
    name: str,
    value: Any,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    legend: str = "rows",
    rule: Rule = FINITE,
) -> Tensor:
    """Turn a per-row argument into a tensor: a Python number is repeated; a tensor is left to `check_row_values`.

    Args:
        op: name of the op.
        name: name of the argument.
        value: a Python number (an integer if ``dtype`` is one), or a tensor.
        num_rows: rows of the call.
        dtype: what the op takes.
        device: where the op runs.
        legend: word for the rows in messages.
        rule: what a number must obey that is no integer, on any device.

    Returns:
        [num_rows] of ``dtype``, or the tensor.

    Raises:
        TypeError: neither a tensor nor a number of that kind.
        ValueError: a number that breaks the rule or does not fit the dtype.
    """
    if isinstance(value, Tensor):
        return value
    number: float | int
    if dtype.is_floating_point:
        number = real_number(op, name, value, rule, f"a number or a tensor [{legend}]")
        # What rounds to 0, or to a subnormal number that a GPU may take for 0, does not fit either.
        limits = torch.finfo(dtype)
        if number != 0 and not limits.tiny <= abs(number) <= limits.max:
            fail_range(op, name, f"fit into {_dtype_text(dtype)}", number)
    else:
        number = whole_number(op, name, value, dtype, f"an integer or a tensor [{legend}]")
    return torch.full((num_rows,), number, dtype=dtype, device=device)


def check_row_values(
    op: str,
    name: str,
    values: Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    legend: str = "rows",
) -> None:
    """Check a per-row tensor: exactly this dtype, [num_rows], on this device. None is an option that is off."""
    if values is not None:
        check_dtype(op, name, values, dtype)
        check_shape(op, name, values, (num_rows,), legend)
        check_device(op, name, values, device)


def check_temperature_values(op: str, temperature: Tensor) -> None:
    """Raise ValueError unless every temperature is 0 or at least ``MIN_TEMPERATURE``. Reads values."""
    _check_values(op, "temperature", temperature, TEMPERATURE)


def check_top_p_values(op: str, top_p: Tensor | None) -> None:
    """Raise ValueError unless every top_p is in (0, 1]. Reads values."""
    if top_p is not None:
        _check_values(op, "top_p", top_p, TOP_P)


def _check_values(op: str, name: str, values: Tensor, rule: Rule) -> None:
    for value in values.tolist():
        if not rule.holds(value):
            fail_range(op, name, rule.text, value)


def check_streams(op: str, seeds: Tensor, offsets: Tensor, temperature: Tensor, legend: str, hint: str) -> None:
    """Raise ValueError if rows share a seed and an offset, and so their noise. Reads values.

    Rows at temperature 0 draw no noise and may share what they like.

    Args:
        op: name of the op.
        seeds: [rows], int64.
        offsets: [rows], int64.
        temperature: [rows], float32.
        legend: word for the rows in the message.
        hint: what to pass instead.
    """
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, (seed, offset, row_temperature) in enumerate(zip(seeds.tolist(), offsets.tolist(), temperature.tolist())):
        if row_temperature != 0:
            rows_of.setdefault((seed, offset), []).append(row)
    for (seed, offset), rows in rows_of.items():
        if len(rows) > 1:
            shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            actual = f"offset {offset} of seed {seed} in {legend} [{shown}], which would share their noise; {hint}"
            fail_range(op, "offsets", f"differ between {legend} of one seed above temperature 0", actual)


def check_memory(op: str, outputs: Mapping[str, Tensor | None], inputs: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError if an element of an output lies where another element, of it or of another tensor, lies.

    Strided buffers may interleave. One look at each tensor, as long as their ranges of addresses do not meet.
    """
    spans = []
    for is_output, tensors in ((True, outputs), (False, inputs)):
        for name, tensor in tensors.items():
            if tensor is None or tensor.numel() == 0 or tensor.is_meta:
                continue
            if is_output and not _is_unfolded(tensor):
                fail_range(
                    op, name, "have memory of its own for each element", f"strides {shape_text(tensor.stride())}"
                )
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            start = tensor.data_ptr()
            spans.append((start, start + (reach + 1) * tensor.element_size(), is_output, name, tensor))
    spans.sort(key=lambda span: span[0])
    open_spans: list[tuple[int, int, bool, str, Tensor]] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[1] > span[0]]
        for other in open_spans:
            if (span[2] or other[2]) and _share_memory(span[4], other[4]):
                output, second = (other, span) if other[2] else (span, other)
                fail_range(op, output[3], f"share no memory with {second[3]}", "buffers that overlap")
        open_spans.append(span)


def _is_unfolded(tensor: Tensor) -> bool:
    """Whether each dimension steps over all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


class _Layout:
    """Where a tensor's elements lie, for NumPy, which looks at addresses only: they may be those of a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"|V{size}",
        }


def _share_memory(first: Tensor, second: Tensor) -> bool:
    try:
        return np.shares_memory(np.asarray(_Layout(first)), np.asarray(_Layout(second)), max_work=10**6)  # type: ignore[arg-type]
    except RuntimeError:  # too hard to tell: layouts that nothing here makes
        return True


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
