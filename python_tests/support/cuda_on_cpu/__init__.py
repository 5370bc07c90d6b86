"""CUDA kernels on a CPU: a kernel's own source, compiled for the CPU, its threads being fibers (lanes.h)."""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from support.processes import run_process

from sequoia_kernels.models.fused.few_rows import FewRowsCall

__all__ = ["COMPILER", "few_rows_on_cpu"]

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
COMPILER = shutil.which("g++")


@functools.cache
def _library(change: tuple[str, str] | None) -> Callable[..., int]:
    """Compile the kernel, with a piece of its text exchanged for another if asked."""
    with tempfile.TemporaryDirectory() as folder:
        found = 0
        kernel = sorted(SOURCES.glob("few_rows*.h"))
        for path in (*kernel, HERE / "lanes.h", HERE / "few_rows.cpp"):
            text = path.read_text()
            if change is not None and path in kernel:
                found += text.count(change[0])
                text = text.replace(*change)
            Path(folder, path.name).write_text(text)
        assert change is None or found, change
        library = Path(folder, "few_rows.so")
        command = [str(COMPILER), "-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
        run_process([*command, Path(folder, "few_rows.cpp"), "-o", library])
        function: Callable[..., int] = ctypes.CDLL(str(library)).few_rows_on_cpu
        return function


def few_rows_on_cpu(
    call: FewRowsCall,
    *,
    num_blocks: int = 3,
    shared_bytes: int = 227 << 10,
    seed: int = 0,
    change: tuple[str, str] | None = None,
) -> None:
    """Do what `few_rows.launch` does, on CPU tensors.

    Args:
        call: the launch.
        num_blocks: blocks of a launch.
        shared_bytes: shared memory that a block may have.
        seed: of the order of the threads.
        change: text of the kernel, and what takes its place.

    Raises:
        RuntimeError: all threads wait for each other, or shared memory does not suffice.
    """

    def array(numbers: list[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(numbers))(*numbers)

    failed = _library(change)(
        array(call.layers), len(call.layers) // 8, array(call.addresses), array(call.strides), array(call.sizes),
        ctypes.c_double(call.eps), ctypes.c_double(call.scale), int(call.is_float16), num_blocks,
        ctypes.c_int64(shared_bytes), seed,
    )  # fmt: skip
    if failed:
        reasons = {1: "all threads wait for each other", 2: f"{shared_bytes} bytes of shared memory are too few"}
        raise RuntimeError(f"few_rows: {reasons[failed]}")
