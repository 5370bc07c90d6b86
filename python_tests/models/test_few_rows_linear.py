"""Few rows times a linear layer: torch's product, whatever multiplies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sequoia_kernels.models import FewRowsLinear
from sequoia_kernels.models import few_rows_linear as module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 100])
def test_the_product_is_torchs(dtype, has_bias, num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    weight, bias, rows = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((301, 257), (301,), (num_rows, 257))
    )
    linear = FewRowsLinear(weight, bias if has_bias else None)
    assert linear.is_native
    exact = F.linear(rows.double(), weight.double(), bias.double() if has_bias else None)
    error = (linear(rows).double() - exact).abs().max()
    eager = (F.linear(rows, weight, bias if has_bias else None).double() - exact).abs().max()
    assert error <= 2 * eager + 1e-5
    assert torch.equal(linear(rows.view(1, num_rows, 257)), linear(rows)[None])


def test_what_multiplies(monkeypatch):
    weight = torch.randn(300, 256)
    linear = FewRowsLinear(weight)
    rows = torch.randn(2, 256)
    expected = F.linear(rows, weight)
    monkeypatch.setattr(module.F, "linear", lambda *args: pytest.fail("torch multiplied"))
    torch.testing.assert_close(linear(rows), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear(rows.t().contiguous().t()), expected, rtol=1e-4, atol=1e-4)  # other strides
    with pytest.raises(ValueError, match="FewRowsLinear: rows must have 256 inputs, got 255"):
        linear(rows[:, 1:])
    monkeypatch.undo()
    for other in (weight[:8, :8].contiguous(), weight.t(), weight.double()):
        plain = FewRowsLinear(other)
        assert not plain.is_native
        few = torch.randn(2, other.shape[1], dtype=other.dtype)
        assert torch.equal(plain(few), F.linear(few, other))


def test_a_row_is_the_same_whatever_stands_beside_it():
    linear = FewRowsLinear(torch.randn(300, 256))
    rows = torch.randn(5, 256)
    together = linear(rows)
    for index in range(5):
        assert torch.equal(linear(rows[index : index + 1])[0], together[index])


def test_a_weight_that_is_written_in_place_counts():
    weight = torch.randn(300, 256)
    linear = FewRowsLinear(weight)
    rows = torch.randn(1, 256)
    before = linear(rows)
    weight.mul_(2.0)
    torch.testing.assert_close(linear(rows), 2.0 * before)
