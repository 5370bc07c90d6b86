"""Triton's launches: compiled for a device of `DEVICES` and run in the emulator, on CPU tensors.

Example:
    >>> emulator = Emulator()
    >>> with emulated(emulator, 90):
    ...     warped_logsumexp(logits, 0.8, backend="triton")
    >>> emulator.report.findings()
    []
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from support.ptx.emulator import Emulator
from support.ptx.report import UnsupportedError
from support.triton_compile import DEVICES, CompilingDriver

from sequoia_kernels.ops import backends, triton_device
from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs

__all__ = ["asked_anew", "emulated"]


@contextlib.contextmanager
def emulated(emulator: Emulator, capability: int) -> Iterator[None]:
    """Within this, the Triton backends take CPU tensors and their kernels run in the emulator.

    Every tensor of `Tensor.new_empty` counts as unwritten until something is stored there.

    Args:
        emulator: runs the launches and keeps what it finds.
        capability: a key of `DEVICES`.

    Raises:
        RuntimeError: Triton interprets kernels in this process.
    """
    if triton_device.INTERPRETED:
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    new_empty = torch.Tensor.new_empty

    @functools.wraps(new_empty)
    def watched_empty(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        empty = new_empty(tensor, *args, **kwargs)
        if empty.device.type == "cpu":
            emulator.watch_empty(empty)
        return empty

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (triton.JITFunction, "run", _emulated_run(emulator, triton.JITFunction.run)),
            (torch.Tensor, "new_empty", watched_empty),
            (triton_device, "device_traits", lambda device: DEVICES[capability]),
            (triton_device, "unavailable_reason", lambda: None),
            (triton_device, "device_reason", lambda device: None),
            (triton.runtime.driver, "_active", CompilingDriver(capability)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_reaching_caches(emulator))
        stack.enter_context(asked_anew("triton"))
        yield


@contextlib.contextmanager
def asked_anew(name: str) -> Iterator[None]:
    """Within this, every op's backend of a name is asked again whether it can run; afterwards all is as it was."""
    with contextlib.ExitStack() as stack:
        for known in (backends._modules, backends._loaded, backends._reasons):
            for of_op in known.values():
                stack.enter_context(mock.patch.dict(of_op))
        for of_op in (*backends._loaded.values(), *backends._reasons.values()):
            of_op.pop(name, None)
        yield


@contextlib.contextmanager
def _reaching_caches(emulator: Emulator) -> Iterator[None]:
    """Let kernels of compact_kv_cache_ touch the caches, which they find through a table of addresses."""
    table = CompactInputs.table

    def watched_table(inputs: CompactInputs) -> torch.Tensor:
        emulator.reachable = [(f"cache {number}", cache) for number, cache in enumerate(inputs.caches)]
        return table(inputs)

    with mock.patch.object(CompactInputs, "table", watched_table):
        yield


def _emulated_run(emulator: Emulator, compile_or_run: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for `JITFunction.run`."""

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_or_run(function, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return kernel
        bound = _bound_arguments(function, args, kwargs)
        values, tensors = _arguments(kernel.src.signature, bound)
        extents = tuple(map(int, grid(bound) if callable(grid) else grid))
        metadata = kernel.metadata
        if getattr(metadata, "global_scratch_size", 0):
            raise UnsupportedError(f"{function.__name__} asks for global scratch memory")
        ptx = kernel.asm["ptx"]
        # Triton appends the addresses of its own scratch memory, which these kernels do not have.
        num_scratch = len(emulator.program(ptx).layout.parameters) - len(values)
        emulator.launch(
            ptx,
            (*extents, 1, 1)[:3],
            (32 * metadata.num_warps, 1, 1),
            metadata.shared,
            [*values, *[0] * num_scratch],
            tensors,
        )
        return kernel

    return run


def _bound_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The kernel's arguments by name; options of the launch are none."""
    names = inspect.signature(function.fn)
    bound = names.bind(*args, **{name: value for name, value in kwargs.items() if name in names.parameters})
    bound.apply_defaults()
    return dict(bound.arguments)


def _arguments(
    signature: dict[str, Any], bound: dict[str, Any]
) -> tuple[list[int | float | bytes], list[tuple[str, torch.Tensor | None]]]:
    """What the compiled kernel takes, and the tensors among it."""
    values: list[int | float | bytes] = []
    tensors: list[tuple[str, torch.Tensor | None]] = []
    for name, type_ in signature.items():
        if type_ == "constexpr":
            continue
        if not isinstance(type_, str):
            raise UnsupportedError(f"argument {name} of type {type_}")
        value = bound[name]
        if type_[0] == "*":
            values.append(value.data_ptr())
            tensors.append((name, value))
        else:
            values.append(float(value) if type_.startswith(("fp", "bf")) else int(value))
    return values, tensors
