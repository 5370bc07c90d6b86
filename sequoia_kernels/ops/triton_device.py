"""What the Triton backends ask of a device: can it run them, how large is it, and how to launch on it.

Only ``triton_*.py`` files import this, so that the package itself imports without triton.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "DeviceTraits",
    "device_reason",
    "device_traits",
    "launching_on",
    "most_registers",
    "rounded",
    "unavailable_reason",
]


@triton.jit
def _probe():
    tl.static_assert(True)


INTERPRETED = not isinstance(_probe, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when triton was imported: kernels then run on the host, on CPU tensors too."""
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(values, DTYPE: tl.constexpr):  # fp32 -> fp32
    """Round to the numbers of a type that is to be stored, as a device does: to the nearest, ties to even."""
    if _INTERPRETED:
        if tl.bfloat16 == DTYPE:  # the interpreter cuts off what does not fit
            bits = values.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            return bits.to(tl.float32, bitcast=True)
    return values.to(DTYPE).to(tl.float32)


class DeviceTraits(NamedTuple):
    """The numbers that launch configurations depend on."""

    capability: int
    """compute capability, major * 10 + minor"""
    num_sms: int
    """multiprocessors"""
    shared_bytes: int
    """shared memory that one program may use"""


# A stand-in where no device can be asked: under the interpreter, and when kernels are compiled for a device elsewhere.
_H200 = DeviceTraits(capability=90, num_sms=132, shared_bytes=232448)


@functools.cache
def _cuda_traits(index: int) -> DeviceTraits:
    properties = torch.cuda.get_device_properties(index)
    return DeviceTraits(
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor - 1024,  # the driver keeps 1 KiB a program
    )


def device_traits(device: torch.device) -> DeviceTraits:
    """The traits of a CUDA device; of an H200 for any other device."""
    if device.type != "cuda":
        return _H200
    return _cuda_traits(torch.cuda.current_device() if device.index is None else device.index)


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a device current while kernels are launched: Triton launches on the current one, not on its arguments'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def most_registers(num_warps: int) -> int:
    """Registers that a thread may have in a program of so many warps; a launch option, `maxnreg`.

    For programs of which few run at a time: left alone, the assembler spills some for an occupancy that nobody needs.
    """
    return min(255, 65536 // (32 * num_warps))


def unavailable_reason() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    if INTERPRETED:
        return None
    if torch.version.hip is not None:
        return "the Triton kernels have configurations for NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "no CUDA device (with TRITON_INTERPRET=1 the kernels run on the CPU, slowly)"
    return None


def device_reason(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of this device, or None."""
    if INTERPRETED:
        return None if device.type == "cpu" else "takes CPU tensors while TRITON_INTERPRET=1 is set"
    if device.type != "cuda":
        return "takes CUDA tensors (CPU tensors with TRITON_INTERPRET=1)"
    if device_traits(device).capability < 80:
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None
