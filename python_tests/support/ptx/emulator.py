"""PTX on CPU tensors: what memory a launch may touch, and what is known of its bytes.

Example:
    >>> emulator = Emulator()
    >>> source, target = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    >>> tensors = [("source", source), ("target", target)]
    >>> emulator.launch(ptx, (1, 1, 1), (64, 1, 1), 0, [source.data_ptr(), target.data_ptr()], tensors)
    >>> emulator.report.findings()
    []
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from support.ptx.launch import Launch, Options, packed_parameters
from support.ptx.memory import FOREIGN, UNWRITTEN, Allocation, GlobalMemory, MakeLog
from support.ptx.parser import Kernel, Module, parse
from support.ptx.program import Program
from support.ptx.races import AccessLog
from support.ptx.report import Report

__all__ = ["Emulator", "LaunchRecord"]

EMPTY_FILL = 0xFF
"""the byte that fills tensors nobody has written: NaN as a float, -1 as an integer"""


class LaunchRecord(NamedTuple):
    """A launch that has run."""

    kernel: str
    num_blocks: int
    num_pieces: int


class _Empty(NamedTuple):
    """A storage that `new_empty` made; it is kept, so that nobody gets its address again."""

    storage: torch.UntypedStorage
    written: np.ndarray  # [bytes] bool


class Emulator:
    """Runs kernels on CPU tensors.

    Args:
        options: how launches run.
        change_text: applied to the PTX of every kernel before it is read, to plant faults.

    Attributes:
        report: what has been found.
        launches: what has run.
        reachable: names and tensors that kernels may touch besides a launch's own, through tables of addresses.
    """

    def __init__(self, options: Options | None = None, change_text: Callable[[str], str] | None = None) -> None:
        self.options = options or Options()
        self.report = Report()
        self.launches: list[LaunchRecord] = []
        self.reachable: list[tuple[str, torch.Tensor | None]] = []
        self._change_text = change_text
        self._random = np.random.default_rng(self.options.seed)
        self._programs: dict[tuple[str, str], Program] = {}
        self._empties: dict[int, _Empty] = {}

    def clear(self) -> None:
        """Forget findings, launches, which bytes are unwritten and what tables of addresses reach."""
        self.reachable = []
        self.report.clear()
        self.launches.clear()
        self._empties.clear()

    def program(self, ptx: str, kernel: str = "") -> Program:
        """The kernel whose name contains `kernel`, translated once."""
        key = (ptx, kernel)
        if key not in self._programs:
            module = parse(ptx if self._change_text is None else self._change_text(ptx))
            self._programs[key] = Program(module, _find(module, kernel))
        return self._programs[key]

    def texts(self) -> list[str]:
        """The PTX of all kernels so far, as it was compiled."""
        return [ptx for ptx, _ in self._programs]

    def launch(
        self,
        ptx: str,
        grid: tuple[int, int, int],
        block_shape: tuple[int, int, int],
        shared_bytes: int,
        arguments: list[int | float | bytes],
        tensors: Iterable[tuple[str, torch.Tensor | None]],
        kernel: str = "",
        cooperative: bool = False,
    ) -> None:
        """Run a kernel.

        Args:
            ptx: text with the kernel.
            grid: blocks along x, y and z.
            block_shape: threads along x, y and z.
            shared_bytes: dynamic shared memory of a block.
            arguments: addresses, numbers, structures.
            tensors: names and tensors that the kernel may touch; nothing else exists for it.
            kernel: part of its name, where the text has several.
            cooperative: all blocks are under way at once, and may wait for each other.

        Raises:
            KernelStoppedError: a device assertion failed, or the kernel does not come to an end.
            UnsupportedError: the kernel does something that is not emulated.
        """
        program = self.program(ptx, kernel)
        make_log = program.log_of(int(np.prod(grid)), int(np.prod(block_shape)))
        allocations = self.allocations([*tensors, *self.reachable], make_log)
        memory = GlobalMemory(allocations, self.report)
        launch = Launch(
            program, grid, block_shape, shared_bytes, packed_parameters(program, arguments), memory, self.report,
            self.options, self._random, cooperative,
        )  # fmt: skip
        try:
            num_pieces = launch.run()
        finally:
            self._remember_written(allocations)
        self.launches.append(LaunchRecord(program.name, launch.num_blocks, num_pieces))

    def watch_empty(self, tensor: torch.Tensor) -> None:
        """Treat a tensor's storage as memory that nobody has written."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            _bytes_of(storage)[:] = EMPTY_FILL
            self._empties[storage.data_ptr()] = _Empty(storage, np.zeros(storage.nbytes(), bool))

    def allocations(
        self, tensors: Iterable[tuple[str, torch.Tensor | None]], make_log: MakeLog = AccessLog
    ) -> list[Allocation]:
        """The memory of tensors, one allocation a storage, with the state of its bytes."""
        by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors:
            if tensor is not None and tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        return [self._allocation(address, views, make_log) for address, views in by_storage.items()]

    def _allocation(self, address: int, views: list[tuple[str, torch.Tensor]], make_log: MakeLog) -> Allocation:
        storage = views[0][1].untyped_storage()
        granule = min(4, *(view.element_size() for _, view in views))
        if address % granule:
            granule = 1
        name = "/".join(dict.fromkeys(name for name, _ in views))
        granule = granule if self.options.races else None
        allocation = Allocation(address, storage.nbytes(), name, granule, self.report, make_log)
        if not any(_covers(view, storage) for _, view in views):
            belongs = torch.zeros(storage.nbytes(), dtype=torch.uint8)
            for _, view in views:
                width = view.element_size()
                strides = [width * stride for stride in view.stride()]
                belongs.as_strided((*view.shape, width), (*strides, 1), view.data_ptr() - address).fill_(1)
            allocation.state[belongs.numpy() == 0] |= FOREIGN
        if address in self._empties:
            empty = self._empties[address]
            empty.written[:] |= _touched(allocation.words[1][allocation.start :][: storage.nbytes()])
            allocation.state[~empty.written] |= UNWRITTEN
        return allocation

    def _remember_written(self, allocations: list[Allocation]) -> None:
        for allocation in allocations:
            if allocation.address in self._empties:
                self._empties[allocation.address].written[allocation.state & UNWRITTEN == 0] = True


def _find(module: Module, name: str) -> Kernel:
    found = [kernel for kernel in module.kernels.values() if name in kernel.name]
    if len(found) != 1:
        raise ValueError(f"the PTX must have one kernel named {name!r}, has {len(found)} of {len(module.kernels)}")
    return found[0]


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).numpy()


def _covers(view: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether a view has every byte of its storage, none twice."""
    expected = 1
    for stride, size in sorted(zip(view.stride(), view.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return view.numel() * view.element_size() == storage.nbytes()


def _touched(raw: np.ndarray) -> np.ndarray:
    """[bytes] where something other than a kernel has written: words that no longer hold what fills empty memory."""
    changed = raw != EMPTY_FILL
    whole = raw.size // 4 * 4
    changed[:whole] = np.repeat(changed[:whole].reshape(-1, 4).any(1), 4)
    return changed
