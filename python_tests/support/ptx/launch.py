"""A grid of blocks, run one after the other or interleaved."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from support.ptx.block import Block, Registers
from support.ptx.memory import GlobalMemory
from support.ptx.program import Program
from support.ptx.races import MAX_BLOCKS
from support.ptx.report import KernelStoppedError, Report, UnsupportedError

__all__ = ["Launch", "Options", "packed_parameters"]

ORDERS = ("serial", "reversed", "random")
_MOST_TOLD = 8
"""findings that tell why a kernel has no end"""


@dataclass
class Options:
    """How a launch runs, where a GPU leaves that open.

    Args:
        order: in which blocks start: "serial", "reversed" or "random". Those of a cooperative launch start together;
            there it says which of them that can go on does.
        interleave: how many blocks are under way at a time; they take turns at random. 1: one after the other.
        warps: "together", or one at a time: "first", "last" or "random"; kernels with wgmma always run together.
        seed: of what is random.
        races: whether to look for races.
        register_fill: byte that fills registers which nobody has written.
        max_pieces: of code that a launch may run.
    """

    order: str = "random"
    interleave: int = 1
    warps: str = "together"
    seed: int = 0
    races: bool = True
    register_fill: int = 0xFF
    max_pieces: int = 10**7


def packed_parameters(program: Program, values: list[int | float | bytes]) -> np.ndarray:
    """A kernel's arguments as it reads them.

    Raises:
        ValueError: there are more or fewer than it has parameters, or a structure has another size.
    """
    parameters = program.layout.parameters
    if len(values) != len(parameters):
        raise ValueError(f"{program.name}: there must be {len(parameters)} arguments, got {len(values)}")
    packed = np.zeros(-(-program.layout.parameter_bytes // 8) * 8, np.uint8)  # read as words of any size
    for (name, (start, num_bytes)), value in zip(parameters.items(), values):
        if isinstance(value, float):
            raw = struct.pack({4: "<f", 8: "<d"}[num_bytes], value)
        elif isinstance(value, bytes):
            raw = value
        else:
            raw = (value & ((1 << 8 * num_bytes) - 1)).to_bytes(num_bytes, "little")
        if len(raw) != num_bytes:
            raise ValueError(f"{program.name}: {name} must have {num_bytes} bytes, got {len(raw)}")
        packed[start : start + num_bytes] = np.frombuffer(raw, np.uint8)
    return packed


class Launch:
    """One launch of a kernel.

    Args:
        program: the kernel.
        grid: blocks along x, y and z.
        block_shape: threads along x, y and z; their product must be a multiple of 32.
        shared_bytes: of each block, besides the kernel's own variables.
        parameters: as `packed_parameters` gives them.
        memory: global memory.
        report: takes the findings.
        options: the order of things.
        random: what the order is drawn from.
        cooperative: all blocks are under way at once.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block_shape: tuple[int, int, int],
        shared_bytes: int,
        parameters: np.ndarray,
        memory: GlobalMemory,
        report: Report,
        options: Options,
        random: np.random.Generator,
        cooperative: bool = False,
    ) -> None:
        self.program, self.grid, self.block_shape = program, grid, block_shape
        self.num_threads, self.num_blocks = int(np.prod(block_shape)), int(np.prod(grid))
        self.shared_bytes = program.layout.static_shared_bytes + shared_bytes
        self.parameters, self.memory, self.report = parameters, memory, report
        self.options, self.random = options, random
        self.cooperative = cooperative
        self.num_running = self.num_blocks if cooperative else max(1, options.interleave)
        if self.num_threads % 32 or not 0 < self.num_threads <= 1024:
            raise UnsupportedError(f"{program.name}: blocks of {self.num_threads} threads")
        if self.num_blocks >= MAX_BLOCKS:
            raise UnsupportedError(f"{program.name}: a grid of {self.num_blocks} blocks")
        if options.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {options.order!r}")

    def run(self) -> int:
        """Run all blocks; returns how many pieces of code ran.

        Raises:
            KernelStoppedError: a device assertion failed, or the kernel does not come to an end.
            UnsupportedError: the kernel does something that is not emulated.
        """
        self.report.kernel = self.program.name
        waiting = list(range(self.num_blocks))
        if self.options.order == "random":
            self.random.shuffle(waiting)
        if self.options.order != "reversed":
            waiting.reverse()  # the next one is at the end
        free: list[Registers] = []
        running: list[Block] = []
        num_pieces = 0
        with np.errstate(all="ignore"):
            while waiting or running:
                while waiting and len(running) < self.num_running:
                    registers = free.pop() if free else Registers(self.program, self.block_shape)
                    running.append(Block(self, waiting.pop(), registers))
                block = self._next(running)
                num_pieces += self._turn(block)
                if num_pieces > self.options.max_pieces:
                    found = [f"\n{finding}" for finding in self.report.findings()[:_MOST_TOLD]]
                    raise KernelStoppedError(
                        f"{self.program.name} must end within {self.options.max_pieces} pieces of code, and has not"
                        + "".join(["; found until then:", *found] if found else [])
                    )
                if block.done:
                    running.remove(block)
                    free.append(block.registers)
        return num_pieces

    def _next(self, running: list[Block]) -> Block:
        """The block that comes next: one that does not wait for others, as far as it has looked."""
        able = [block for block in running if not block.resting]
        if not able:
            for block in running:
                block.resting = False
            able = running
        if len(able) == 1 or (self.cooperative and self.options.order != "random"):
            return able[0]
        return able[int(self.random.integers(len(able)))]

    def _turn(self, block: Block) -> int:
        """Let a block run: one piece where others take turns with it, else to its end; returns the number of pieces."""
        if self.num_running > 1:
            block.step()
            return 1
        num_pieces = 1
        while block.step() and num_pieces <= self.options.max_pieces:
            num_pieces += 1
        return num_pieces
