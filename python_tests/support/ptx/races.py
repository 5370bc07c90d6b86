"""Who accessed which bytes last, and whether anything puts two accesses in order.

Each granule of a memory keeps the stamp of its last write and of its last read. A stamp is one word: the block, how
many barriers the block had passed (its epoch), how many ``bar.warp.sync`` the thread had passed since, and the thread.
Two accesses of one block are in order if a barrier lies between them, two of one warp also if a warp barrier does. Two
of different blocks are in order only through atomics, acquire, release and fences, which `BlockOrder` follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from support.ptx.parser import Instruction
from support.ptx.report import Report

if TYPE_CHECKING:
    from support.ptx.block import Block

__all__ = ["MAX_BLOCKS", "Access", "AccessLog", "BlockOrder", "first_stamp", "thread_of"]

_SYNC, _EPOCH, _BLOCK = np.uint64(12), np.uint64(24), np.uint64(44)  # where a stamp's fields begin; the thread is at 0
_FIELD = np.uint64(0xFFF)
_EPOCHS = np.uint64(0xFFFFF)
_IN_WARP = np.uint64(0x400)  # several threads of the warp in the lowest bits
_SEVERAL = np.uint64(0x7FF)  # threads of several warps
_SEVERAL_BLOCKS = np.uint64(0xFFFFF)

MAX_BLOCKS = 0xFFFFE


class Access(NamedTuple):
    """Which threads of which block do what."""

    instruction: Instruction
    block: Block
    lanes: np.ndarray
    """[accesses] the threads"""


def first_stamp(block: int, epoch: int) -> int:
    """The stamp of thread 0 of a block that has passed `epoch` barriers and no warp barrier since."""
    return ((block + 1) << 44) | ((epoch & 0xFFFFF) << 24)


def thread_of(stamps: np.ndarray) -> np.ndarray:
    """The threads of stamps of writes."""
    return (stamps & _FIELD).astype(np.int64)


def _warp(threads: np.ndarray) -> np.ndarray:
    """The warp of a stamp's thread field."""
    return np.where(threads & _IN_WARP, threads & np.uint64(31), threads >> np.uint64(5))


class AccessLog:
    """The stamps of one memory.

    Args:
        num_bytes: of the memory.
        granule: bytes that share a stamp; no smaller access is told apart.
        space: "global" or "shared", for the report.
        name: what the memory is called in the report.
        start: bytes before the one that the report calls 0.
        report: takes the races.
    """

    def __init__(self, num_bytes: int, granule: int, space: str, name: str, start: int, report: Report) -> None:
        self.granule, self.space, self.name, self.start, self.report = granule, space, name, start, report
        self.writes = np.zeros(num_bytes // granule + 1, np.uint64)
        self.reads = np.zeros_like(self.writes)
        self.atomic: np.ndarray | None = None  # whether the last write was one; None until there is any

    def rows(self, offsets: np.ndarray, num_bytes: int) -> np.ndarray:
        """The granules of accesses, [accesses, granules]."""
        first = (offsets // self.granule)[:, None]
        return first if num_bytes <= self.granule else first + np.arange(num_bytes // self.granule)

    def read(self, access: Access, rows: np.ndarray, strong: bool = False) -> None:
        """Note a load; a strong one does not race with atomics."""
        stamps = access.block.stamps[access.lanes][:, None]
        skip = self.atomic[rows] if strong and self.atomic is not None else None
        self._compare(access, rows, self.writes[rows], stamps, "read after write", skip)
        noted = self._together(self.reads[rows], stamps)
        self.reads[rows] = noted
        kept = self.reads[rows]
        lost = kept != noted
        if lost.any():  # several threads of this instruction read one place
            same_warp = _warp(kept & _FIELD) == _warp(noted & _FIELD)
            base = noted & ~_FIELD
            in_warp = lost & same_warp & ((noted & _FIELD) != _SEVERAL) & ((kept & _FIELD) != _SEVERAL)
            self.reads[rows[in_warp]] = (base | _IN_WARP | _warp(noted & _FIELD))[in_warp]
            across = lost & ~in_warp
            self.reads[rows[across]] = (base | _SEVERAL)[across]

    def write(self, access: Access, rows: np.ndarray, unchanged: np.ndarray | None, atomic: bool = False) -> None:
        """Note a store before it is done; accesses that store what is there already race with none."""
        stamps = access.block.stamps[access.lanes][:, None]
        skip = None if unchanged is None or not unchanged.any() else np.broadcast_to(unchanged[:, None], rows.shape)
        before = self.writes[rows]
        ordered = skip
        if atomic and self.atomic is not None:
            ordered = self.atomic[rows] if skip is None else skip | self.atomic[rows]
        self._compare(access, rows, before, stamps, "write after write", ordered)
        if not atomic:
            self._compare(access, rows, self.reads[rows], stamps, "write after read", skip)
        self.overwrite(rows, stamps, None if skip is None else ~skip | (before == 0), atomic)

    def overwrite(
        self, rows: np.ndarray, stamps: np.ndarray, where: np.ndarray | None = None, atomic: bool = False
    ) -> None:
        """Stamp a write without looking at what was there."""
        if atomic and self.atomic is None:
            self.atomic = np.zeros(self.writes.shape, bool)
        if where is None:
            self.writes[rows] = stamps
        else:
            self.writes[rows[where]] = np.broadcast_to(stamps, rows.shape)[where]
        if self.atomic is not None:
            self.atomic[rows if where is None else rows[where]] = atomic

    def compare_write(self, access: Access, rows: np.ndarray, what: str) -> None:
        """Report accesses that are not in order with a write that is to come, and stamp nothing."""
        stamps = access.block.stamps[access.lanes][:, None]
        self._compare(access, rows, self.writes[rows], stamps, f"{what} after write", None)
        self._compare(access, rows, self.reads[rows], stamps, f"{what} after read", None)

    def read_by_all(self, access: Access, rows: np.ndarray, what: str) -> None:
        """Note a read by the tensor cores for all threads: any write that no barrier separates is a race."""
        stamps = access.block.stamps[access.lanes]
        racing = (self.writes[rows] ^ stamps) >> _EPOCH == 0
        if racing.any():
            first = int(np.flatnonzero(racing)[0])
            self.report.add(
                f"{self.space} race between warps ({what})",
                access.instruction,
                f"{self._place(rows[first])}: thread {int(thread_of(self.writes[rows[first]]))}, "
                f"block {access.block.number}",
            )
        self.reads[rows] = (stamps & ~_FIELD) | _SEVERAL

    @staticmethod
    def _together(before: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """The stamps of reads that come to earlier reads."""
        same_epoch = (before ^ stamps) >> _EPOCH == 0
        foreign = ((before ^ stamps) >> _BLOCK != 0) & (before != 0)
        result = np.broadcast_to(stamps, before.shape)
        if same_epoch.any():
            threads, own = before & _FIELD, stamps & _FIELD
            warp = own >> np.uint64(5)
            field = np.where(_warp(threads) == warp, _IN_WARP | warp, _SEVERAL)
            field = np.where((threads == own) | (threads == _SEVERAL), threads, field)
            result = np.where(same_epoch, (stamps & ~_FIELD) | field, result)
        if foreign.any():
            epoch = np.maximum((before >> _EPOCH) & _EPOCHS, (stamps >> _EPOCH) & _EPOCHS)
            several = (_SEVERAL_BLOCKS << _BLOCK) | (epoch << _EPOCH) | _SEVERAL
            result = np.where(foreign, several, result)
        return result

    def _compare(
        self,
        access: Access,
        rows: np.ndarray,
        before: np.ndarray,
        stamps: np.ndarray,
        what: str,
        skip: np.ndarray | None,
    ) -> None:
        difference = before ^ stamps
        suspects = (difference >> _EPOCH == 0) & (difference & _FIELD != 0)
        if skip is not None:
            suspects &= ~skip
        if suspects.any():
            self._report_in_block(access, rows, before, stamps, what, suspects)
        if self.space == "global":
            foreign = (difference >> _BLOCK != 0) & (before != 0)
            if skip is not None:
                foreign &= ~skip
            if foreign.any():
                self._report_between_blocks(access, rows, before, what, foreign)

    def _report_in_block(
        self,
        access: Access,
        rows: np.ndarray,
        before: np.ndarray,
        stamps: np.ndarray,
        what: str,
        suspects: np.ndarray,
    ) -> None:
        threads = before & _FIELD
        in_warp = (threads != _SEVERAL) & (_warp(threads) == (stamps & _FIELD) >> np.uint64(5))
        across = suspects & ~in_warp
        unsynced = suspects & in_warp & ((before >> _SYNC) & _FIELD == (stamps >> _SYNC) & _FIELD)
        for races, between in ((across, "between warps"), (unsynced, "in a warp")):
            if races.any():
                at = tuple(np.argwhere(races)[0])
                other = int(threads[at])
                who = f"thread {other}" if other < _IN_WARP else "several"
                self.report.add(
                    f"{self.space} race {between} ({what})",
                    access.instruction,
                    f"{self._place(rows[at])}: thread {access.lanes[at[0]]} and {who}, block {access.block.number}",
                )

    def _report_between_blocks(
        self, access: Access, rows: np.ndarray, before: np.ndarray, what: str, foreign: np.ndarray
    ) -> None:
        blocks = (before >> _BLOCK).astype(np.int64) - 1
        epochs = ((before >> _EPOCH) & _EPOCHS).astype(np.int64)
        for at in map(tuple, np.argwhere(foreign)):
            block, lane = int(blocks[at]), int(access.lanes[at[0]])
            several = block == MAX_BLOCKS
            if not access.block.order.knows(lane, None if several else block, int(epochs[at])):
                self.report.add(
                    f"{self.space} race between blocks ({what})",
                    access.instruction,
                    f"{self._place(rows[at])}: block {access.block.number} and {'several' if several else block}",
                )
                return

    def _place(self, row: np.ndarray) -> str:
        return f"{self.name}{int(row) * self.granule - self.start:+d}"


class BlockOrder:
    """What of other blocks one block knows to lie behind it.

    A clock has a number for each block: its accesses in earlier epochs are in order. A release publishes the block's
    own clock at an address, an acquire of that address takes it over, for one thread until the block's next barrier and
    for all behind it. A fence makes a release of the thread's later relaxed atomics, and an acquire of earlier ones.
    """

    def __init__(self, number: int, num_blocks: int) -> None:
        self._number, self._num_blocks = number, num_blocks
        self._known = np.zeros(num_blocks, np.int64)
        self._acquired: dict[int, np.ndarray] = {}
        self._seen: dict[int, np.ndarray] = {}
        self._fenced: dict[int, int] = {}

    def new_clock(self) -> np.ndarray:
        """A clock of somebody who knows nothing."""
        return np.zeros(self._num_blocks, np.int64)

    def knows(self, lane: int, block: int | None, epoch: int) -> bool:
        """Whether a thread comes after what a block did in an epoch; None: what any other block did."""
        clock = np.maximum(self._known, self._acquired.get(lane, 0))
        if block is not None:
            return bool(clock[block] > epoch)
        others = np.delete(clock, self._number)
        return bool((others > epoch).all())

    def barrier(self) -> None:
        """All threads know what one has acquired."""
        for clock in self._acquired.values():
            np.maximum(self._known, clock, out=self._known)
        self._acquired.clear()

    def fence(self, lanes: Iterable[int], epoch: int) -> None:
        """fence.acq_rel or stronger, by these threads."""
        for lane in lanes:
            self._fenced[lane] = epoch
            if lane in self._seen:
                self._acquire(lane, self._seen[lane])

    def synchronise(self, lane: int, epoch: int, published: np.ndarray, semantics: str) -> None:
        """An atomic, strong load or strong store of one thread; `published`: the clock at its address, changed."""
        releases = semantics in ("release", "acq_rel", "sc")
        if releases or lane in self._fenced:
            own = np.maximum(self._known, self._acquired.get(lane, 0))
            own[self._number] = epoch if releases else self._fenced[lane]
            np.maximum(published, own, out=published)
        if semantics in ("acquire", "acq_rel", "sc"):
            self._acquire(lane, published)
        else:
            self._seen[lane] = np.maximum(self._seen.get(lane, 0), published)

    def _acquire(self, lane: int, clock: np.ndarray) -> None:
        self._acquired[lane] = np.maximum(self._acquired.get(lane, 0), clock)
