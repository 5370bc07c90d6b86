"""One thread block: which threads run next, which wait at a barrier, which have ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
from support.ptx.asynchronous import CopyQueue, ProductQueue
from support.ptx.gates import Gates
from support.ptx.memory import SharedMemory
from support.ptx.operations import Operations
from support.ptx.parser import Instruction
from support.ptx.program import Program, environment
from support.ptx.races import BlockOrder, first_stamp
from support.ptx.report import KernelStoppedError
from support.ptx.thread_order import ThreadOrder
from support.ptx.translation import text_of

if TYPE_CHECKING:
    from support.ptx.launch import Launch

__all__ = ["Block", "Registers"]

_VIEWS = {
    0: {"P": np.bool_}, 1: {"B": np.uint8}, 2: {"H": np.uint16, "I": np.int16, "E": np.float16},
    4: {"U": np.uint32, "S": np.int32, "F": np.float32}, 8: {"L": np.uint64, "J": np.int64, "D": np.float64},
}  # fmt: skip
_WARP_CHOICES = ("together", "random", "first", "last")
_PIECES_A_TURN = 16
"""after so many pieces another warp may come, where they take turns at random"""


class Registers:
    """The rows of a block's registers, and the kernel's pieces as functions on them; used by one block at a time."""

    def __init__(self, program: Program, block_shape: tuple[int, int, int]) -> None:
        self._program = program
        num_threads = int(np.prod(block_shape))
        counts = program.layout.counts
        self._words = {
            size: np.empty((counts[size], num_threads), next(iter(views.values()))) for size, views in _VIEWS.items()
        }
        self._rows = {
            letter: self._words[size].view(kind) for size, views in _VIEWS.items() for letter, kind in views.items()
        }
        self.environment = environment()
        thread = np.arange(num_threads, dtype=np.uint32)
        width, height, depth = (np.uint32(extent) for extent in block_shape)
        self.environment.update(
            tid_x=thread % width, tid_y=thread // width % height, tid_z=thread // (width * height),
            ntid_x=width, ntid_y=height, ntid_z=depth, laneid=thread % np.uint32(32), warpid=thread // np.uint32(32),
        )  # fmt: skip
        self._functions: dict[tuple[int, bool], FunctionType | None] = {}

    def fill(self, byte: int) -> None:
        """What registers hold that nobody has written."""
        for size, words in self._words.items():
            words.view(np.uint8).fill(byte if size else byte & 1)

    def predicate(self, name: str) -> np.ndarray:
        """The row of a predicate, perhaps negated."""
        row = self._rows["P"][self._program.layout.registers[name.lstrip("!")][1]]
        return ~row if name[0] == "!" else row

    def set(self, name: str, value: Any, where: np.ndarray) -> None:
        """Write a register."""
        size, number = self._program.layout.registers[name]
        self._words[size][number][where] = value

    def function(self, piece: int, masked: bool) -> FunctionType | None:
        """A piece on these rows; None if it does nothing."""
        key = (piece, masked)
        if key not in self._functions:
            code, rows = self._program.code(piece, masked)
            for letter, number in rows:
                self.environment[f"{letter}{number}"] = self._rows[letter][number]
            self.environment.update(self._program.constants)
            self._functions[key] = None if code is None else FunctionType(code, self.environment)
        return self._functions[key]


@dataclass
class _Meeting:
    """A barrier that some threads have come to."""

    count: int | None
    """threads that it waits for, None for all"""
    waiting: np.ndarray  # [threads] bool
    come: np.ndarray  # [threads] bool; who has come with bar.arrive does not wait
    clock: np.ndarray | None = None
    """what they had done and known then; see `ThreadOrder`"""
    reductions: list[tuple[Instruction, np.ndarray]] = field(default_factory=list)


class Block(Operations):
    """Runs a block piece by piece.

    As long as all threads are at the same place they run without masks. Apart, the threads that are furthest behind in
    the text run next, so that they come together again behind branches and loops. A thread that has read what others
    may change, or has found an mbarrier closed, lets all other warps of its block run first: else one that waits in a
    loop would wait for ever.

    Attributes:
        resting: whether all threads wait for something, as far as they have looked; other blocks should run first.
    """

    def __init__(self, launch: Launch, number: int, registers: Registers) -> None:
        program = launch.program
        self.number, self.num_threads = number, launch.num_threads
        self.report, self.memory = launch.report, launch.memory
        self.sites, self.semantics = program.sites, program.semantics
        self.registers = registers
        self.lanes = np.arange(self.num_threads)
        make_log = program.log_of(launch.num_blocks, self.num_threads)
        self.shared = SharedMemory(launch.shared_bytes, program.granule, launch.report, launch.options.races, make_log)
        self.gates = None
        if program.meets_in_parts:
            self.order = ThreadOrder(number, launch.num_blocks, self.num_threads)
            self.gates = Gates(self.shared, self.order)
        else:
            self.order = BlockOrder(number, launch.num_blocks)
        self.copies = CopyQueue(self.shared, self.memory, self.gates, launch.random)
        self.products = ProductQueue(self.shared)
        self.parameters = launch.parameters
        self.yielded, self.resting = np.zeros(self.num_threads, bool), False
        self.epoch, self.current_warp = 0, 0
        self.done = False
        self.exited = np.zeros(self.num_threads, bool)
        self._program = program
        self._launch = launch
        if launch.options.warps not in _WARP_CHOICES:
            raise ValueError(f"warps must be one of {', '.join(_WARP_CHOICES)}, got {launch.options.warps!r}")
        self._warps = "together" if program.multiplies_in_groups else launch.options.warps
        self.single_warps = self._warps != "together"
        self._together: int | None = 0
        """the piece that all threads come to next, None if they are apart"""
        self._places = np.zeros(self.num_threads, np.int64)  # the same for each thread while they are apart
        self._waiting = np.zeros(self.num_threads, bool)
        self._meetings: dict[int, _Meeting] = {}
        self._parted: dict[int, tuple[Instruction, np.ndarray]] = {}
        """threads at a barrier whose warp has not come as a whole yet, by its line"""
        self._turn = 0
        self._new_epoch(0)
        registers.fill(launch.options.register_fill)
        width, height, _ = launch.grid
        registers.environment.update(
            C=self, PARAMETERS=launch.parameters,
            ctaid_x=np.uint32(number % width), ctaid_y=np.uint32(number // width % height),
            ctaid_z=np.uint32(number // (width * height)),
            **{f"nctaid_{axis}": np.uint32(extent) for axis, extent in zip("xyz", launch.grid)},
        )  # fmt: skip

    def step(self) -> bool:
        """Run one piece; False once all threads have ended."""
        piece, mask = self._next()
        function = self.registers.function(piece, mask is not True)
        if function is not None:
            function(mask)
        self._leave(piece, mask)
        return not self.done

    # who runs ---------------------------------------------------------------------------------------------------------

    def _next(self) -> tuple[int, Any]:
        """The piece that runs now, and for which threads."""
        if self.single_warps:
            return self._next_of_one_warp()
        if self._together is not None:
            self.resting = bool(self.yielded.any())
            self.yielded[:] = False
            return self._together, True
        ready = self._ready()
        piece = int(self._places[ready].min())
        mask = ready & (self._places == piece)
        if mask.all():
            self._together = piece
            return piece, True
        return piece, mask

    def _ready(self) -> np.ndarray:
        """Threads that may run; warps of which a thread has let others run first come last, as a whole."""
        ready = ~(self._waiting | self.exited)
        if not ready.any():
            raise KernelStoppedError(
                f"{self._program.name}: all threads of block {self.number} wait at barriers that nobody else comes to"
            )
        others = ready & ~np.repeat(self.yielded.reshape(-1, 32).any(1), 32)
        self.resting = not others.any()
        if self.resting:
            self.yielded[:] = False
            return ready
        return others

    def _next_of_one_warp(self) -> tuple[int, np.ndarray]:
        self._part()
        ready = self._ready()
        warps = np.flatnonzero(ready.reshape(-1, 32).any(1))
        if self._warps == "random":
            if self._turn % _PIECES_A_TURN == 0 or self.current_warp not in warps:
                self.current_warp = int(self._launch.random.choice(warps))
        else:
            self.current_warp = int(warps[0 if self._warps == "first" else -1])
        self._turn += 1
        own = ready & (self.lanes // 32 == self.current_warp)
        piece = int(self._places[own].min())
        return piece, own & (self._places == piece)

    def _part(self) -> None:
        """From now on each thread has its own place."""
        if self._together is not None:
            self._places[:] = self._together
            self._together = None

    def _meet(self) -> None:
        """Go on together if all threads are at one place."""
        if not (self._waiting.any() or self.exited.any()) and (self._places == self._places[0]).all():
            self._together = int(self._places[0])

    def _move(self, mask: Any, places: Any) -> None:
        """Put threads at their next pieces."""
        if mask is True and not isinstance(places, np.ndarray):
            self._together = places
            return
        self._part()
        if mask is True:
            self._places[:] = places
        else:
            self._places[mask] = places[mask] if isinstance(places, np.ndarray) else places
        self._meet()

    # how a piece ends -------------------------------------------------------------------------------------------------

    def _leave(self, number: int, mask: Any) -> None:
        piece = self._program.pieces[number]
        if piece.ending == "next":
            self._move(mask, number + 1)
            return
        last = piece.last
        assert last is not None
        if piece.ending == "branch":
            self._branch(last, number, mask)
        elif piece.ending == "return":
            self._end(last, number, mask)
        else:
            self._wait(last, number, mask)

    def _guard(self, instruction: Instruction) -> np.ndarray | None:
        if instruction.guard is None:
            return None
        return self.registers.predicate(("!" if instruction.guard_negated else "") + instruction.guard)

    def _branch(self, branch: Instruction, number: int, mask: Any) -> None:
        target, taken = self._program.target(branch), self._guard(branch)
        if taken is None:
            self._move(mask, target)
            return
        chosen = taken if mask is True else taken[mask]
        if chosen.all():
            self._move(mask, target)
        elif not chosen.any():
            self._move(mask, number + 1)
        else:
            self._move(mask, np.where(taken, target, number + 1))

    def _end(self, last: Instruction, number: int, mask: Any) -> None:
        guard = self._guard(last)
        mask = self.here(mask)
        ending = mask if guard is None else mask & guard
        self._part()
        self._places[mask] = number + 1
        self.exited |= ending
        if self.exited.all():
            self.done = True
            if self.copies.unfinished():
                self.report.add("cp.async in flight at the end", last, f"block {self.number}")
            if self.products.unfinished():
                self.report.add("wgmma in flight at the end", last, f"block {self.number}")
        elif self._waiting.any():
            for barrier, come in list(self._parted.values()):
                self._arrive(barrier, come)
            for meeting in list(self._meetings):
                if meeting in self._meetings:
                    self._perhaps_pass(meeting)
        else:
            self._meet()

    def _wait(self, barrier: Instruction, number: int, mask: Any) -> None:
        named = self._program.barriers[barrier.line]
        if mask is True and named.count is None and not self._meetings:
            if barrier.has("red"):
                self._reduce([(barrier, self.here(True))])
            clock = self.order.arrive(self.lanes) if isinstance(self.order, ThreadOrder) else None
            self._pass(self.lanes, clock)
            self._together = number + 1
            return
        self._part()
        mask = self.here(mask)
        self._places[mask] = number + 1
        self._arrive(barrier, mask)

    def _arrive(self, barrier: Instruction, mask: np.ndarray) -> None:
        """Threads arrive at a barrier; at an aligned one their warps wait until they are there as a whole."""
        if barrier.name == "bar" or barrier.has("aligned"):
            mask = mask | self._parted.pop(barrier.line, (barrier, mask))[1]
            missing = (~(mask | self.exited)).reshape(-1, 32)
            parts = mask.reshape(-1, 32).any(1) & missing.any(1)
            elsewhere = (missing & self._waiting.reshape(-1, 32)).any(1) & parts
            if elsewhere.any():
                self.report.add("barrier by a part of a warp", barrier, f"block {self.number}")
            left = mask & np.repeat(parts & ~elsewhere, 32)
            if left.any():
                self._parted[barrier.line] = (barrier, left)
                self._waiting |= left
            mask = mask & ~left
            for other, come in list(self._parted.values()):  # of warps that are at two barriers: let them go on
                own = come & np.repeat(elsewhere, 32)
                if own.any():
                    self._parted[other.line] = (other, come & ~own)
                    self._come_to(other, own)
        if mask.any():
            self._come_to(barrier, mask)

    def _come_to(self, barrier: Instruction, mask: np.ndarray) -> None:
        """Whole warps arrive at a barrier."""
        named = self._program.barriers[barrier.line]
        where = f"barrier {named.number} of block {self.number}"
        if named.count is None and self.exited.any():
            self.report.add("barrier behind the end of some threads", barrier, f"block {self.number}")
        if named.number not in self._meetings:
            waiting, come = np.zeros((2, self.num_threads), bool)
            self._meetings[named.number] = _Meeting(named.count, waiting, come)
        meeting = self._meetings[named.number]
        if named.count is not None and (named.count % 32 or not 0 < named.count <= self.num_threads):
            self.report.add("barrier for an impossible number of threads", barrier, where)
        if named.count != meeting.count:
            self.report.add("barrier with different numbers of threads", barrier, where)
        if (meeting.come & mask).any():
            self.report.add("barrier that a thread comes to twice", barrier, where)
        meeting.come |= mask
        self._waiting[mask] = named.waits
        if named.waits:
            meeting.waiting |= mask
        if isinstance(self.order, ThreadOrder):
            clock = self.order.arrive(np.flatnonzero(mask))
            meeting.clock = clock if meeting.clock is None else np.maximum(meeting.clock, clock)
        if barrier.has("red"):
            meeting.reductions.append((barrier, mask.copy()))
        if meeting.count is not None and int(meeting.come.sum()) > meeting.count:
            self.report.add("barrier with more threads than it waits for", barrier, where)
        self._perhaps_pass(named.number)

    def _perhaps_pass(self, number: int) -> None:
        """Go on behind a barrier, if all have come."""
        meeting = self._meetings[number]
        if meeting.count is None:
            if not (meeting.come | self.exited).all():
                return
        elif int(meeting.come.sum()) < meeting.count:
            return
        del self._meetings[number]
        if meeting.reductions:
            self._reduce(meeting.reductions)
        self._waiting &= ~meeting.waiting
        self._pass(np.flatnonzero(meeting.waiting), meeting.clock)
        self._meet()

    def _reduce(self, arrivals: list[tuple[Instruction, np.ndarray]]) -> None:
        """bar.red: what all threads that arrived bring, given to each of them."""
        flags = [self.registers.predicate(text_of(instruction.operands[-1]))[here] for instruction, here in arrivals]
        votes = np.concatenate(flags)
        for instruction, here in arrivals:
            if instruction.has("popc"):
                result: Any = np.uint32(votes.sum())
            else:
                result = votes.any() if instruction.has("or") else votes.all()
            self.registers.set(text_of(instruction.operands[0]), result, here)

    def _pass(self, lanes: np.ndarray, clock: np.ndarray | None) -> None:
        """Threads go on behind a barrier, and behind what has been done before it."""
        if isinstance(self.order, ThreadOrder):
            self.order.acquire(lanes, clock)
            self.epoch += 1
        else:
            self._new_epoch(self.epoch + 1)

    def _new_epoch(self, epoch: int) -> None:
        """All threads have passed a barrier."""
        self.epoch = epoch
        if isinstance(self.order, ThreadOrder):
            self.stamps = self.order.stamps  # which change by themselves
            return
        self.stamps = self.lanes.astype(np.uint64) + np.uint64(first_stamp(self.number, epoch))
        self.order.barrier()
