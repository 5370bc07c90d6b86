"""Compile the Triton kernels for GPUs that are not there, exactly as an op would launch them.

An op's `run` is called with tensors of the meta device while launches are intercepted: each kernel is compiled with the
very arguments, specialisations and options of that launch, and its resources are read from the compiled code. Which
calls those are says `triton_cases.py`.

Triton must not be interpreted in the process, so tests run this as a program:

    python -m support.triton_compile --capability 90 --quick     JSON on standard output, as `Compiled` has it
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from support.processes import run_process
from triton.backends.compiler import GPUTarget

from sequoia_kernels.ops import triton_device

__all__ = ["DEVICES", "CompileCase", "Compiled", "CompilingDriver", "compile_case", "misread_reductions"]

DEVICES = {
    80: triton_device.DeviceTraits(80, 108, 166912),  # A100
    89: triton_device.DeviceTraits(89, 128, 101376),  # RTX 4090; RTX 30 and 50 have as much shared memory
    90: triton_device.DeviceTraits(90, 132, 232448),  # H100, H200
    100: triton_device.DeviceTraits(100, 148, 232448),  # B200
}
"""capability -> what launch configurations know of such a device"""


class CompileCase(NamedTuple):
    """One call of an op, to be compiled."""

    op: str
    name: str
    """what is particular about the call: dtype, sizes, options"""
    launch: Callable[[], Any]
    """calls the op's `run` with tensors of the meta device"""
    devices: tuple[int, ...] = (80, 90, 100)
    """capabilities, keys of `DEVICES`, for which the report has it"""
    quick: tuple[int, ...] = ()
    """those of them for which the test suite compiles it"""
    shared_bound: Callable[[triton_device.DeviceTraits], int] | None = None
    """the launch configuration's own upper bound of the shared memory of `bounded_kernel`, if it has one"""
    bounded_kernel: str = ""


class Compiled(NamedTuple):
    """Resources of one kernel, as one case launches it on one device."""

    op: str
    case: str
    capability: int
    kernel: str
    registers: int
    """a thread"""
    stack_bytes: int
    """a thread; 0 means that no register was spilled"""
    shared_bytes: int
    """a program"""
    num_warps: int
    num_stages: int
    shared_bound: int | None
    """the launch configuration's estimate; None if it makes none"""


class CompilingDriver:
    """Stands in for a GPU driver: enough for Triton to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device, so each architecture is a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


_LINEAR_LAYOUT = re.compile(r"^#(\w+) = #ttg\.linear<\{.*\blane = \[(\[.*?\])\], warp = ", re.MULTILINE)
_REDUCTION = re.compile(r'"tt\.reduce"\([^)]*\) <\{axis = (\d+) : i32\}> .*?\}\) : \((tensor<[^)]*)\) ->', re.DOTALL)


def misread_reductions(ttgir: str) -> list[str]:
    """Tensors of a kernel whose reductions triton 3.7.1 takes from the wrong lanes.

    It counts the bits of a lane's number that tell entries along the axis apart, and takes so many from the lowest of
    them on. Where other bits lie between, which tell entries of another axis apart or none, it leaves entries out, and
    the lanes of a warp have different results: a loop that asks for one has no end that they come to together.
    """
    layouts = {name: ast.literal_eval(f"[{lanes}]") for name, lanes in _LINEAR_LAYOUT.findall(ttgir)}
    misread = []
    for axis, tensor in _REDUCTION.findall(ttgir):
        lanes = layouts.get(re.findall(r"#(\w+)", tensor)[-1])
        if lanes is None:
            continue
        place = int(axis)
        for removed in re.findall(r"dim = (\d+)", tensor):  # axes that slices of the layout have no more
            place += place >= int(removed)
        bits = "".join("x" if lane[place] else "-" for lane in lanes)
        if "-" in bits.strip("-"):
            misread.append(f"axis {axis} of {tensor}, bits of lanes {bits}")
    return misread


def compile_case(case: CompileCase, capability: int) -> list[Compiled]:
    """Compile every kernel that one call launches on a device of `DEVICES`, without running any.

    Raises:
        RuntimeError: a kernel has a reduction that is taken from the wrong lanes.
    """
    bound = None if case.shared_bound is None else case.shared_bound(DEVICES[capability])
    kernels: list[tuple[str, Any]] = []
    with _intercepted(capability, kernels):
        case.launch()
    compiled: list[Compiled] = []
    for kernel, name in _distinct(kernels):
        if misread := misread_reductions(kernel.asm["ttgir"]):
            raise RuntimeError(f"{name} reduces over lanes that lie apart: {'; '.join(misread)}")
        compiled.append(
            Compiled(
                case.op,
                case.name,
                capability,
                name,
                *_registers_and_stack(kernel),
                kernel.metadata.shared,
                kernel.metadata.num_warps,
                kernel.metadata.num_stages,
                bound if name == case.bounded_kernel else None,
            )
        )
    return compiled


def _distinct(kernels: list[tuple[str, Any]]) -> Iterator[tuple[Any, str]]:
    """Each compiled kernel once; a second variant of a kernel in the same call gets a number behind its name."""
    seen: dict[str, list[Any]] = {}
    for name, kernel in kernels:
        variants = seen.setdefault(name, [])
        if all(kernel.hash != other.hash for other in variants):
            variants.append(kernel)
            yield kernel, name if len(variants) == 1 else f"{name}, variant {len(variants)}"


@contextlib.contextmanager
def _intercepted(capability: int, kernels: list[tuple[str, Any]]) -> Iterator[None]:
    if triton_device.INTERPRETED:
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    run, device_traits = triton.JITFunction.run, triton_device.device_traits

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((self.__name__, kernel))
        return kernel

    driver = triton.runtime.driver
    previous = driver._active
    driver.set_active(CompilingDriver(capability))
    triton.JITFunction.run = compile_only
    triton_device.device_traits = lambda device: DEVICES[capability]
    try:
        yield
    finally:
        triton.JITFunction.run = run
        triton_device.device_traits = device_traits
        driver._active = previous


def _registers_and_stack(kernel: Any) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = run_process([tool, "-res-usage", cubin]).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told no registers: {usage}")
    return int(found[1]), int(found[2])


def main(arguments: Iterable[str] | None = None) -> None:
    """Compile the cases of one device and write their resources as JSON."""
    from support.triton_cases import CASES

    parser = argparse.ArgumentParser(prog="python -m support.triton_compile")
    parser.add_argument("--capability", type=int, choices=sorted(DEVICES), required=True)
    parser.add_argument("--quick", action="store_true", help="only what the test suite compiles for this device")
    parser.add_argument("--op", help="only the cases of this op")
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    chosen = [
        case
        for case in CASES
        if options.op in (None, case.op) and options.capability in (case.quick if options.quick else case.devices)
    ]
    compiled, failures = [], []
    for case in chosen:
        try:
            compiled += [kernel._asdict() for kernel in compile_case(case, options.capability)]
        except Exception as error:  # whatever a compiler raises: the others are still to be compiled
            failures.append(f"sm_{options.capability} {case.op} ({case.name}): {error!r}"[:500])
    json.dump({"triton": triton.__version__, "kernels": compiled, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
