"""The shared argument checks. What the ops do with them is tested with the ops."""

from __future__ import annotations

import math
from fractions import Fraction

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
        checks.check_temperature_values("op", torch.tensor([0.5, value]))


def test_numbers_obey_their_rule_before_they_are_rounded_to_float32():
    def temperature(value):
        return checks.row_values("op", "temperature", value, 2, torch.float32, CPU, rule=checks.TEMPERATURE)

    assert temperature(np.float64(0.5)).tolist() == [0.5, 0.5]
    assert temperature(Fraction(1, 4)).tolist() == [0.25, 0.25]
    for value in (1e-46, -1e-46, 9e-6, math.inf, math.nan):
        with pytest.raises(ValueError, match="op: temperature must be 0 or a finite number of at least 1e-05, got"):
            temperature(value)
    for value, shown in (
        (1e39, "1e[+]39"),
        (10**400, "a number beyond float64"),
        (Fraction(10**400), "a number beyond"),
    ):
        with pytest.raises(ValueError, match=f"op: temperature must fit into float32, got {shown}"):
            temperature(value)
    for value in (1.0 + 1e-12, 0.0, 1e-330, math.nan):
        with pytest.raises(ValueError, match=r"op: top_p must be in \(0, 1\], got"):
            checks.row_values("op", "top_p", value, 2, torch.float32, CPU, rule=checks.TOP_P)
    with pytest.raises(ValueError, match="op: top_p must fit into float32, got 1e-50"):
        checks.row_values("op", "top_p", 1e-50, 2, torch.float32, CPU, rule=checks.TOP_P)
    with pytest.raises(ValueError, match="op: seeds must fit into int64, got an integer of 16610 bits"):
        checks.row_values("op", "seeds", 10**5000, 2, torch.int64, CPU)
    for value in (True, "1", None, [1.0], 1j):
        with pytest.raises(TypeError, match=r"op: temperature must be a number or a tensor \[rows\], got"):
            temperature(value)


def test_memory_is_told_apart_element_by_element():
    storage = torch.zeros(6, 8, dtype=torch.int64)
    checks.check_memory("op", {"left": storage[:, :4], "right": storage[:, 4:6]}, {"rest": storage[:, 6:]})
    checks.check_memory("op", {"even": storage[:, ::2], "odd": storage[:, 1::2]}, {"none": None, "empty": storage[:0]})
    checks.check_memory("op", {"turned": storage.t(), "absent": None}, {"other": torch.zeros(6, 8)})
    checks.check_memory("op", {}, {"one": storage, "the same": storage.expand(2, 6, 8)})
    for outputs, inputs, message in (
        ({"first": storage[:, :4], "second": storage[:, 3:]}, {}, "first must share no memory with second"),
        ({"column": storage[:, 2]}, {"row": storage[3]}, "column must share no memory with row"),
        ({"row": storage[3]}, {"all": storage.expand(2, 6, 8)}, "row must share no memory with all"),
        ({"words": storage.view(torch.int32)[:, 1::2]}, {"longs": storage}, "words must share no memory with longs"),
        ({"expanded": storage[0].expand(6, 8)}, {}, "expanded must have memory of its own for each element"),
        ({"windows": storage.flatten().unfold(0, 3, 1)}, {}, "windows must have memory of its own for each element"),
    ):
        with pytest.raises(ValueError, match=f"op: {message}"):
            checks.check_memory("op", outputs, inputs)


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
        checks.check_tensor("op", "y", None)
