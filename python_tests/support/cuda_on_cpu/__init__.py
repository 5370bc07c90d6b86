"""CUDA kernels on a CPU: a kernel's own source, compiled for the CPU, its threads being fibers (lanes.h)."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from sequoia_kernels.models.fused.few_rows import FewRowsCall

__all__ = ["COMPILER", "few_rows_on_cpu"]

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
COMPILER = shutil.which("g++")


@functools.cache
def _library(change: tuple[str, str] | None) -> Callable[..., int]:
    """Compile the kernel, with a piece of its text exchanged for another if asked."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (SOURCES / "few_rows_kernel.h", SOURCES / "few_rows.h", HERE / "lanes.h", HERE / "few_rows.cpp"):
            text = path.read_text()
            if change is not None and path.name == "few_rows_kernel.h":
                assert text.count(change[0]) >= 1, change
                text = text.replace(*change)
            Path(folder, path.name).write_text(text)
        library = Path(folder, "few_rows.so")
        command = [str(COMPILER), "-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
        subprocess.run([*command, str(Path(folder, "few_rows.cpp")), "-o", str(library)], check=True)
        function: Callable[..., int] = ctypes.CDLL(str(library)).few_rows_on_cpu
        return function


def few_rows_on_cpu(
    call: FewRowsCall,
    *,
    together: bool = True,
    num_blocks: int = 3,
    seed: int = 0,
    change: tuple[str, str] | None = None,
) -> None:
    """Do what `few_rows.launch` does, on CPU tensors.

    Args:
        call: the launch.
        together: one launch whose blocks meet; else one for each phase.
        num_blocks: blocks of a launch.
        seed: of the order of the threads.
        change: text of the kernel, and what takes its place.

    Raises:
        RuntimeError: all threads wait for each other.
    """

    def array(numbers: list[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(numbers))(*numbers)

    hangs = _library(change)(
        array(call.layers), len(call.layers) // 8, array(call.addresses), array(call.strides), array(call.sizes),
        ctypes.c_double(call.eps), ctypes.c_double(call.scale), int(call.is_float16), int(together), num_blocks, seed,
    )  # fmt: skip
    if hangs:
        raise RuntimeError("few_rows: all threads wait for each other")
