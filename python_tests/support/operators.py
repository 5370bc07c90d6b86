"""Checks that hold for every torch operator of the package."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def check_fake_matches_real(operator, *arguments):
    """The operator's fake outputs have the shape, dtype, device and strides of the real ones."""
    real = operator(*arguments)
    mode = FakeTensorMode()

    def fake(value):
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value)
        return [fake(item) for item in value] if isinstance(value, (list, tuple)) else value

    with mode:
        predicted = operator(*[fake(argument) for argument in arguments])
    for got, want in zip(_flat(predicted), _flat(real), strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert got.device == want.device
        assert got.stride() == want.stride()


def _flat(outputs):
    if outputs is None:
        return []
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
