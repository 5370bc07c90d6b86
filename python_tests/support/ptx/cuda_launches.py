"""csrc/cuda/compact_kv_cache.cu: nvcc's PTX in the emulator, launched by the file's own host code.

The file is compiled as it is and linked to a runtime (cuda_runtime.cpp) that hands every launch to Python. So what runs
is the choice of template and grid, the packing of arguments and the kernel.

Example:
    >>> emulator = Emulator()
    >>> with native_kernels(emulator, 90):
    ...     compact_kv_cache_(caches, nodes, num_accepted, cache_lens, backend="cuda")
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from support.processes import run_process
from support.ptx.emulator import Emulator
from support.ptx.triton_launches import asked_anew

import sequoia_kernels
from sequoia_kernels.ops import backends
from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs

__all__ = ["native_kernels"]

_SOURCES = Path(__file__).resolve().parents[3] / "csrc"
_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


@contextlib.contextmanager
def native_kernels(emulator: Emulator, capability: int) -> Iterator[None]:
    """Within this, compact_kv_cache_ has a backend "cuda" that takes CPU tensors.

    Args:
        emulator: runs the launches and keeps what it finds.
        capability: for which nvcc compiles.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        library, ptx = _build(Path(folder), capability)
        module = ModuleType("sequoia_kernels._cuda")
        module.compact_kv_cache = _HostCode(library, ptx, emulator)  # type: ignore[attr-defined]
        stack.enter_context(mock.patch.dict(sys.modules, {module.__name__: module}))
        stack.enter_context(mock.patch.object(sequoia_kernels, "_cuda", module, create=True))
        stream = SimpleNamespace(cuda_stream=0)
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda device=None: stream))
        from sequoia_kernels.ops.compact_kv_cache_ import cuda

        stack.enter_context(mock.patch.object(cuda, "_cuda", module))  # that of its first import is another one

        def supports(inputs: CompactInputs) -> str | None:
            fits = inputs.accepted_nodes.shape[1] <= cuda.MAX_LEVELS
            return None if fits else f"takes up to {cuda.MAX_LEVELS} levels"

        def run(inputs: CompactInputs, outputs: None = None) -> None:
            # The table is made now, so that the launch finds it among the tensors that may be touched.
            whole = inputs._replace(entries=inputs.table())
            caches = [(f"cache {number}", cache) for number, cache in enumerate(inputs.caches)]
            others = ("entries", "accepted_nodes", "num_accepted", "cache_lens", "block_table")
            emulator.reachable = [*caches, *((name, getattr(whole, name)) for name in others)]
            cuda.run(whole)

        stack.enter_context(asked_anew("cuda"))
        backends.register_backend("compact_kv_cache_", "cuda", supports, run)
        yield


def _build(folder: Path, capability: int) -> tuple[Path, str]:
    """The launch code as a library, and the PTX of the same compilation: names of kernels hang on it."""
    source, runtime = _SOURCES / "cuda" / "compact_kv_cache.cu", Path(__file__).with_name("cuda_runtime.cpp")
    library = folder / "launches.so"
    architecture = f"arch=compute_{capability},code=compute_{capability}"
    run_process(
        [
            "nvcc", "-std=c++17", "-gencode", architecture, "-shared", "-cudart", "none", "-Xcompiler", "-fPIC",
            f"-I{_SOURCES}", "--keep", "--keep-dir", folder, "-o", library, source, runtime,
        ]
    )  # fmt: skip
    return library, next(folder.glob("compact_kv_cache*.ptx")).read_text()


class _HostCode:
    """`launch_compact_kv_cache` of the compiled file, with the arguments of its binding."""

    def __init__(self, library: Path, ptx: str, emulator: Emulator) -> None:
        self._ptx, self._emulator = ptx, emulator
        self._error: BaseException | None = None
        binding = (_SOURCES / "cuda" / "module.cpp").read_text().split("&sequoia::launch_compact_kv_cache", 1)[1]
        self._names = re.findall(r'py::arg\("(\w+)"\)', binding.split(");", 1)[0])
        loaded = ctypes.CDLL(str(library))
        # int device, then int64 each
        self._function = loaded[f"_ZN7sequoia23launch_compact_kv_cacheEi{'l' * (len(self._names) - 1)}"]
        self._function.argtypes = [ctypes.c_int, *[ctypes.c_int64] * (len(self._names) - 1)]
        self._function.restype = None
        self._callback = _ON_LAUNCH(self._launch)  # must live as long as the library may call it
        loaded.sequoia_on_launch(self._callback)

    def __call__(self, **arguments: Any) -> None:
        if set(arguments) != set(self._names):
            raise TypeError(f"compact_kv_cache: arguments must be {self._names}, got {list(arguments)}")
        arguments["device"] = 0
        self._error = None
        self._function(*(arguments[name] for name in self._names))
        if self._error is not None:
            raise self._error

    def _launch(self, kernel: bytes, grid: Any, block: Any, shared_bytes: int, arguments: Any) -> int:
        try:
            program = self._emulator.program(self._ptx, kernel.decode())
            sizes = [num_bytes for _, num_bytes in program.layout.parameters.values()]
            values = [ctypes.string_at(arguments[number], size) for number, size in enumerate(sizes)]
            shape, extents = (block[0], block[1], block[2]), (grid[0], grid[1], grid[2])
            self._emulator.launch(self._ptx, extents, shape, shared_bytes, values, [], kernel.decode())
        except BaseException as error:  # C++ lies between here and the caller
            self._error = error
            return 1
        return 0
