"""One test body for every backend of an op."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sequoia_kernels.ops
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.ops import backends

__all__ = ["OpBackend", "op_backends"]


class OpBackend:
    """An op bound to one backend and one device.

    Calling it moves tensors to the device, strides and all, runs the op there and brings the results back; with
    `raw=True` nothing is moved. A call that the backend does not support skips the test with the backend's reason.
    `at_scale` tells whether thousands of rows are affordable: an interpreted kernel takes milliseconds for each.
    """

    def __init__(self, op: str, name: str, device: str, **always: Any) -> None:
        self.op = op
        self.always = always
        self.name = name
        self.device = torch.device(device)
        self.at_scale = not (name == "triton" and device == "cpu")

    def __call__(self, *args: Any, raw: bool = False, **kwargs: Any) -> Any:
        function: Callable[..., Any] = getattr(sequoia_kernels.ops, self.op)
        kwargs = {"backend": self.name, **self.always, **kwargs}
        if not raw:
            args = tuple(_to(value, self.device) for value in args)
            kwargs = {name: _to(value, self.device) for name, value in kwargs.items()}
        try:
            result = function(*args, **kwargs)
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))
        if raw:
            return result
        return type(result)(*(_to(value, torch.device("cpu")) for value in result))

    def assert_same_row(self, got: torch.Tensor, wanted: torch.Tensor) -> None:
        """Compare floats of one row from calls with different numbers of rows: the same bits, as kernels of ours give.

        torch may add up a row in another order if there are more or fewer of them, which its kernels for GPUs do.
        """
        if self.name in ("reference", "sdpa") and self.device.type == "cuda":
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(got, wanted)

    def with_always(self, **always: Any) -> OpBackend:
        """The same with arguments that every call is given which does not give its own."""
        return OpBackend(self.op, self.name, str(self.device), **always)

    def bound_to(self, op: str) -> OpBackend:
        """The same backend of another op."""
        return OpBackend(op, self.name, str(self.device))


def op_backends(*ops: str) -> list[Any]:
    """Parameters for a fixture: every backend that all these ops have; unavailable ones are skipped and say why."""
    parameters = []
    for name in backends.backend_names(ops[0]):
        if any(name not in backends.backend_names(op) for op in ops[1:]):
            continue
        reason = next((reason for op in ops if (reason := backends.unavailable_reason(op, name)) is not None), None)
        for device in _devices(name):
            skip = reason
            if skip is None and device == "cuda" and not torch.cuda.is_available():
                skip = "no CUDA device"
            marks = [] if skip is None else [pytest.mark.skip(reason=f"{name}: {skip}")]
            parameters.append(pytest.param(OpBackend(ops[0], name, device), id=f"{name}-{device}", marks=marks))
    return parameters


def _devices(name: str) -> list[str]:
    if name == "host":
        return ["cpu"]
    if name == "cuda" or (name == "triton" and os.environ.get("TRITON_INTERPRET") != "1"):
        return ["cuda"]
    if name == "triton":
        return ["cpu"]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _to(value: Any, device: torch.device) -> Any:
    """A tensor on a device with the strides that it has: `Tensor.to` would close the gaps between strided rows."""
    if not isinstance(value, torch.Tensor) or value.device.type == device.type:
        return value
    if any(stride == 0 for stride in value.stride()):  # expanded: nothing can be copied into such a tensor
        return value.to(device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
