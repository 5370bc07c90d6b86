"""The shared argument checks. What the ops do with them is tested with the ops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sequoia_kernels import checks

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", sorted(checks.FLOAT_DTYPES, key=str))
def test_good_logits_pass(dtype):
    logits = torch.randn(3, 4, 9).to(dtype)
    logits[0, 0, 1:] = -math.inf
    checks.check_logits("op", "logits", logits)
    checks.check_logits("op", "logits", logits[:0])
    largest = torch.full((5, 3), torch.finfo(dtype).max, dtype=dtype)  # their sum overflows; they are finite
    checks.check_logits("op", "logits", largest)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"op: logits must hold neither NaN nor \+inf, got nan in row \[1, 2\]"),
        (math.inf, r"op: logits must hold neither NaN nor \+inf, got inf in row \[1, 2\]"),
        (-math.inf, r"op: logits must have a finite entry in every row, got only -inf in row \[1, 2\]"),
    ],
)
def test_bad_rows_are_found_among_good_ones(value, message):
    logits = torch.zeros(2, 3, 4)
    logits[1, 2] = value
    logits[0, 0, 0] = -math.inf
    with pytest.raises(ValueError, match=message):
        checks.check_logits("op", "logits", logits)
    if value != -math.inf:
        logits[1, 2, 1:] = 0
        with pytest.raises(ValueError, match=message):
            checks.check_logits("op", "logits", logits)


def test_an_infinity_of_each_sign_does_not_cancel():
    logits = torch.tensor([[math.inf, 0.0], [-math.inf, -math.inf]])
    with pytest.raises(ValueError, match="op: logits must hold neither NaN nor"):
        checks.check_logits("op", "logits", logits)


@pytest.mark.parametrize("value", [0, 0.0, -0.0, 1e-5, 1, 1e30])
def test_good_temperatures(value):
    checks.check_temperature_values("op", checks.row_values("op", "temperature", value, 2, torch.float32, CPU))


@pytest.mark.parametrize("value", [-1e-9, 9e-6, -1, math.inf, -math.inf, math.nan])
def test_bad_temperatures(value):
    with pytest.raises(ValueError, match="op: temperature must be 0 or a finite number of at least 1e-05, got"):
        checks.check_temperature_values("op", checks.row_values("op", "temperature", value, 2, torch.float32, CPU))


def test_row_values_repeat_numbers_and_pass_tensors_through():
    repeated = checks.row_values("op", "seeds", 2**63 - 1, 3, torch.int64, CPU)
    assert repeated.tolist() == [2**63 - 1] * 3
    given = torch.tensor([1.0, 2.0])
    assert checks.row_values("op", "top_p", given, 2, torch.float32, CPU) is given
    with pytest.raises(ValueError, match="op: seeds must fit into int64, got 9223372036854775808"):
        checks.row_values("op", "seeds", 2**63, 3, torch.int64, CPU)
    with pytest.raises(ValueError, match=r"op: top_p must fit into float32, got 1e\+39"):
        checks.row_values("op", "top_p", 1e39, 3, torch.float32, CPU)
    assert checks.row_values("op", "seeds", np.int64(5), 1, torch.int64, CPU).tolist() == [5]
    assert checks.row_values("op", "top_p", np.float32(0.5), 1, torch.float32, CPU).tolist() == [0.5]
    with pytest.raises(TypeError, match=r"op: seeds must be an integer or a tensor \[rows\], got float"):
        checks.row_values("op", "seeds", 1.0, 3, torch.int64, CPU)


def test_messages_name_op_argument_rule_and_actual():
    tensor = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^op: x must have shape \[batch, nodes\] = \[2, 4\], got \[2, 3\]$"):
        checks.check_shape("op", "x", tensor, (2, 4), "batch, nodes")
    with pytest.raises(TypeError, match=r"^op: x must have dtype float16 or int32, got float32$"):
        checks.check_dtype("op", "x", tensor, torch.int32, torch.float16)
    with pytest.raises(ValueError, match=r"^op: x must be on meta, got cpu$"):
        checks.check_device("op", "x", tensor, torch.device("meta"))
    with pytest.raises(TypeError, match=r"^op: y must be a tensor, got NoneType$"):
        checks.check_tensors("op", x=tensor, y=None)
