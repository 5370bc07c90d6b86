"""csrc/cuda: nvcc's PTX in the emulator, launched by the files' own host code.

The files are compiled as they are and linked to a runtime (cuda_runtime.cpp) that hands every launch to Python. So what
runs is the choice of template and grid, the packing of arguments and the kernel.

Example:
    >>> emulator = Emulator()
    >>> with native_kernels(emulator, 90):
    ...     compact_kv_cache_(caches, nodes, num_accepted, cache_lens, backend="cuda")
    >>> with native_few_rows(emulator, 90):
    ...     few_rows.launch(call)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from support.processes import run_process
from support.ptx.emulator import Emulator
from support.ptx.triton_launches import asked_anew

import sequoia_kernels
from sequoia_kernels.ops import backends
from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs

__all__ = ["native_few_rows", "native_kernels"]

_HERE = Path(__file__).parent
_SOURCES = _HERE.parents[2] / "csrc"
_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int,
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
    host_code = _HostCode(_built(("compact_kv_cache.cu",), capability), emulator)
    with contextlib.ExitStack() as stack:
        module = stack.enter_context(_native_module(compact_kv_cache=_compaction(host_code)))
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


@contextlib.contextmanager
def native_few_rows(
    emulator: Emulator, capability: int, *, num_blocks: int = 3, shared_bytes: int = 163 << 10
) -> Iterator[None]:
    """Within this, `few_rows.launch` takes CPU tensors; what it may touch must be in `emulator.reachable`.

    Args:
        emulator: runs the launches and keeps what it finds.
        capability: for which nvcc compiles.
        num_blocks: multiprocessors of the device, each of which has a block.
        shared_bytes: that a block may have.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it failed.
    """
    files = ("few_rows.cu", "few_rows_bfloat16.cu", "few_rows_float16.cu")
    host_code = _HostCode(_built(files, capability), emulator)
    host_code.library.sequoia_device(num_blocks, shared_bytes)
    with _native_module(few_rows=_few_rows(host_code)):
        yield


@contextlib.contextmanager
def _native_module(**functions: Callable[..., None]) -> Iterator[ModuleType]:
    """Within this, sequoia_kernels._cuda is a module of these functions."""
    module = ModuleType("sequoia_kernels._cuda")
    vars(module).update(functions)
    stream = SimpleNamespace(cuda_stream=0)
    with (
        mock.patch.dict(sys.modules, {module.__name__: module}),
        mock.patch.object(sequoia_kernels, "_cuda", module, create=True),
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: stream),
    ):
        yield module


class _Built(NamedTuple):
    """Launch code, and the PTX of the same compilation: names of kernels hang on it."""

    library: ctypes.CDLL
    texts: tuple[str, ...]

    @functools.cache  # noqa: B019 -- as long as the process
    def text_of(self, kernel: str) -> str:
        """The PTX of one kernel, without those beside it."""
        for text in self.texts:
            begins = [found.start() for found in re.finditer(r"^(\.visible |\.weak )?\.entry ", text, re.M)]
            for begin, end in zip(begins, [*begins[1:], len(text)]):
                if re.match(rf"[.\w ]*\.entry {re.escape(kernel)}\(", text[begin:end]):
                    names = re.sub(r'"[^"]*/', '"', "".join(re.findall(r"^\s*\.file\s.*\n", text, re.M)))
                    return text[: begins[0]] + names + text[begin:end]
        raise ValueError(f"there is no kernel {kernel}")


@functools.cache
def _built(files: tuple[str, ...], capability: int) -> _Built:
    architecture = f"arch=compute_{capability},code=compute_{capability}"
    sources = [*(_SOURCES / "cuda" / file for file in files), _HERE / "cuda_runtime.cpp"]
    if "few_rows.cu" in files:
        sources.append(_HERE / "few_rows_binding.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "launches.so")
        run_process(
            [
                "nvcc", "-std=c++17", "-lineinfo", "-gencode", architecture, "-shared", "-cudart", "none",
                "-Xcompiler", "-fPIC", f"-I{_SOURCES}", "--keep", "--keep-dir", folder, "-o", library, *sources,
            ]
        )  # fmt: skip
        texts = tuple(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))
        return _Built(ctypes.CDLL(str(library)), texts)


class _HostCode:
    """Launch code whose launches run in an emulator."""

    def __init__(self, built: _Built, emulator: Emulator) -> None:
        self.library = built.library
        self._built, self._emulator = built, emulator
        self._error: BaseException | None = None
        self._callback = _ON_LAUNCH(self._launch)  # must live as long as the library may call it
        self.library.sequoia_on_launch(self._callback)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the library; what its launch raised is raised here."""
        self._error = None
        self.library.sequoia_on_launch(self._callback)
        result = function(*arguments)
        if self._error is not None:
            raise self._error
        return result

    def _launch(
        self, kernel: bytes, grid: Any, block: Any, shared_bytes: int, arguments: Any, is_cooperative: int
    ) -> int:
        try:
            ptx = self._built.text_of(kernel.decode())
            program = self._emulator.program(ptx)
            sizes = [num_bytes for _, num_bytes in program.layout.parameters.values()]
            values = [ctypes.string_at(arguments[number], size) for number, size in enumerate(sizes)]
            shape, extents = (block[0], block[1], block[2]), (grid[0], grid[1], grid[2])
            self._emulator.launch(ptx, extents, shape, shared_bytes, values, [], cooperative=bool(is_cooperative))
        except BaseException as error:  # C++ lies between here and the caller
            self._error = error
            return 1
        return 0


def _compaction(host_code: _HostCode) -> Callable[..., None]:
    """`launch_compact_kv_cache` of the compiled file, with the arguments of its binding."""
    binding = (_SOURCES / "cuda" / "module.cpp").read_text().split("&sequoia::launch_compact_kv_cache", 1)[1]
    names = re.findall(r'py::arg\("(\w+)"\)', binding.split(");", 1)[0])
    # int device, then int64 each
    function = host_code.library[f"_ZN7sequoia23launch_compact_kv_cacheEi{'l' * (len(names) - 1)}"]
    function.argtypes = [ctypes.c_int, *[ctypes.c_int64] * (len(names) - 1)]
    function.restype = None

    def compact_kv_cache(**arguments: Any) -> None:
        if set(arguments) != set(names):
            raise TypeError(f"compact_kv_cache: arguments must be {names}, got {list(arguments)}")
        arguments["device"] = 0
        host_code.call(function, *(arguments[name] for name in names))

    return compact_kv_cache


def _few_rows(host_code: _HostCode) -> Callable[..., None]:
    """`launch_few_rows` of the compiled files, with the arguments of its binding."""
    function = host_code.library.launch_few_rows
    function.restype = ctypes.c_char_p

    def few_rows(
        *,
        device: int | None,
        stream: int,
        layers: list[int],
        addresses: list[int],
        strides: list[int],
        sizes: list[int],
        eps: float,
        scale: float,
        is_float16: bool,
    ) -> None:
        lists = (layers, addresses, strides, sizes)
        numbers = [number for part in lists for number in part]
        failure = host_code.call(
            function,
            (ctypes.c_int64 * len(numbers))(*numbers),
            (ctypes.c_int64 * len(lists))(*map(len, lists)),
            ctypes.c_double(eps),
            ctypes.c_double(scale),
            int(is_float16),
        )
        if failure is not None:
            raise RuntimeError(failure.decode())

    return few_rows
