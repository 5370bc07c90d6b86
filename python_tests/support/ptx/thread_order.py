"""Order among single threads, for kernels in which parts of a block wait for each other.

Where all threads of a block meet at every barrier, counting barriers tells who comes after whom (`races`). Where some
meet by themselves, or at an mbarrier, each thread has a clock of its own: for every thread of the launch, and for the
copies of every block, up to which time what it did lies behind. A block's time is the number of its releases so far; an
access has the time at which it was made, and is known to whoever has acquired a later release of the same thread.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from support.ptx.races import Access, AccessLog, first_stamp
from support.ptx.report import Report, UnsupportedError

__all__ = ["MOST_BLOCKS", "ThreadLog", "ThreadOrder"]

MOST_BLOCKS = 16
"""of a launch; every thread has a number for every other one"""

_EPOCH, _BLOCK = np.uint64(24), np.uint64(44)
_THREAD, _TIME = np.uint64(0xFFF), np.uint64(0xFFFFF)
_SEVERAL = 32
_WARP = np.arange(32)


class ThreadOrder:
    """What each thread of a block knows to lie behind it.

    Args:
        number: of the block.
        num_blocks: of the grid.
        num_threads: of a block.

    Attributes:
        known: [threads, blocks * parties] up to which time of another thread; the last party of a block is its copies.
        time: releases so far, and one.
        stamps: [threads] what accesses are stamped with now.
    """

    def __init__(self, number: int, num_blocks: int, num_threads: int) -> None:
        if num_blocks > MOST_BLOCKS:
            raise UnsupportedError(f"barriers of a part of a block in a grid of more than {MOST_BLOCKS} blocks")
        self.number, self.parties = number, num_threads + 1
        self.known = np.zeros((num_threads, num_blocks * self.parties), np.int32)
        self.time = 1
        self.stamps = np.arange(num_threads, dtype=np.uint64) + np.uint64(first_stamp(number, self.time))
        self._own = number * self.parties + np.arange(num_threads)
        self._seen: dict[int, np.ndarray] = {}
        self._fenced: dict[int, np.ndarray] = {}

    def new_clock(self) -> np.ndarray:
        """A clock of somebody who knows nothing."""
        return np.zeros(self.known.shape[1], np.int32)

    def release(self, lanes: np.ndarray) -> None:
        """From now on these threads do something new: what they did before may be acquired."""
        self._advance()
        self.known[lanes, self._own[lanes]] = self.time

    def arrive(self, lanes: np.ndarray) -> np.ndarray:
        """Threads come to a barrier; a clock of what they have done and known until then."""
        self.release(lanes)
        return self.known[lanes].max(0)

    def meet_in_warps(self, lanes: np.ndarray) -> None:
        """A barrier in each warp."""
        self.release(lanes)
        for warp in np.unique(lanes // 32):
            own = lanes[lanes // 32 == warp]
            self.known[own] = self.known[own].max(0)

    def acquire(self, lanes: int | np.ndarray, clock: np.ndarray) -> None:
        """Threads come after what a clock has."""
        self.known[lanes] = np.maximum(self.known[lanes], clock)

    def stamp_of_copies(self) -> np.uint64:
        """What writes by copies are stamped with now."""
        return np.uint64(first_stamp(self.number, self.time) + self.parties - 1)

    def release_of_copies(self) -> np.ndarray:
        """A clock of what the block's copies have written so far."""
        self._advance()
        clock = self.new_clock()
        clock[self.number * self.parties + self.parties - 1] = self.time
        return clock

    def know_write(self, lanes: np.ndarray, stamp: np.uint64) -> bool:
        """Whether each of these threads made a write, or comes after it."""
        party, time = self.party_and_time(stamp)
        return bool(((self.known[lanes, party] > time) | (self._own[lanes] == party)).all())

    def anybody_knows(self, lanes: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Whether any of these threads made writes, or comes after them; also where nobody wrote."""
        known = self.known[lanes]
        known[np.arange(lanes.size), self._own[lanes]] = self.time + 1
        party, time = self.party_and_time(stamps)
        return (stamps == 0) | (known.max(0)[party] > time)

    def party_and_time(self, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Who made writes, and when; party 0 where nobody did."""
        blocks = np.maximum((stamps >> _BLOCK).astype(np.int64) - 1, 0)
        party = blocks * self.parties + (stamps & _THREAD).astype(np.int64)
        return party, ((stamps >> _EPOCH) & _TIME).astype(np.int64)

    def fence(self, lanes: Iterable[int], epoch: int) -> None:
        """fence.acq_rel or stronger, by these threads."""
        lanes = np.array(list(lanes), np.int64)
        self.release(lanes)
        for lane in lanes.tolist():
            if lane in self._seen:
                self.acquire(lane, self._seen[lane])
            self._fenced[lane] = self.known[lane].copy()

    def synchronise(self, lane: int, epoch: int, published: np.ndarray, semantics: str) -> None:
        """An atomic, strong load or strong store of one thread; `published`: the clock at its address, changed."""
        if semantics in ("release", "acq_rel", "sc"):
            self.release(np.array([lane]))
            np.maximum(published, self.known[lane], out=published)
        elif lane in self._fenced:
            np.maximum(published, self._fenced[lane], out=published)
        if semantics in ("acquire", "acq_rel", "sc"):
            self.acquire(lane, published)
        else:
            self._seen[lane] = np.maximum(self._seen.get(lane, 0), published)

    def _advance(self) -> None:
        self.time += 1
        if self.time > _TIME:
            raise UnsupportedError("too many barriers in one block")
        self.stamps += np.uint64(1 << 24)


class ThreadLog(AccessLog):
    """The stamps of one memory, with the last read of every warp.

    Args:
        num_blocks: of the grid.
        num_threads: of a block.
    """

    def __init__(
        self,
        num_bytes: int,
        granule: int,
        space: str,
        name: str,
        start: int,
        report: Report,
        *,
        num_blocks: int,
        num_threads: int,
    ) -> None:
        super().__init__(num_bytes, granule, space, name, start, report)
        self._num_warps, self._parties = num_threads // 32, num_threads + 1
        self._num_columns = self._num_warps * (num_blocks if space == "global" else 1)
        self._reads: np.ndarray | None = None
        """[granules, warps] time * 64 + lane, or 32 for several lanes; 0: none. Shared memory has its block's warps"""

    def read(self, access: Access, rows: np.ndarray, strong: bool = False) -> None:
        """Note a load; a strong one does not race with atomics."""
        skip = self.atomic[rows] if strong and self.atomic is not None else None
        self._compare_writes(access, rows, "read after write", skip)
        if self._reads is None:
            self._reads = np.zeros((self.writes.size, self._num_columns), np.int64)
        lanes = access.lanes[:, None]
        columns = self._first_column(access) + lanes // 32
        time = access.block.order.time * 64
        noted = np.broadcast_to(time + lanes % 32, rows.shape)
        before = self._reads[rows, columns]
        others = (before != 0) & (before % 64 != lanes % 32)
        if others.any():
            others &= ~self._lie_behind(access, lanes, columns, before)
            noted = np.where(others, time + _SEVERAL, noted)
        self._reads[rows, columns] = noted
        lost = self._reads[rows, columns] != noted
        if lost.any():  # several threads of this instruction read one place
            self._reads[rows[lost], np.broadcast_to(columns, rows.shape)[lost]] = time + _SEVERAL

    def write(self, access: Access, rows: np.ndarray, unchanged: np.ndarray | None, atomic: bool = False) -> None:
        """Note a store before it is done; accesses that store what is there already race with none."""
        skip = None if unchanged is None or not unchanged.any() else np.broadcast_to(unchanged[:, None], rows.shape)
        before = self.writes[rows]
        ordered = skip
        if atomic and self.atomic is not None:
            ordered = self.atomic[rows] if skip is None else skip | self.atomic[rows]
        self._compare_writes(access, rows, "write after write", ordered)
        if not atomic:
            self._compare_reads(access, rows, "write after read", skip)
        stamps = access.block.stamps[access.lanes][:, None]
        self.overwrite(rows, stamps, None if skip is None else ~skip | (before == 0), atomic)

    def compare_write(self, access: Access, rows: np.ndarray, what: str) -> None:
        """Report accesses that are not in order with a write that is to come, and stamp nothing."""
        self._compare_writes(access, rows, f"{what} after write", None)
        self._compare_reads(access, rows, f"{what} after read", None)

    def read_by_all(self, access: Access, rows: np.ndarray, what: str) -> None:
        """Reads by the tensor cores themselves are followed where all threads of a block meet."""
        raise UnsupportedError(f"wgmma beside barriers of a part of a block: {access.instruction.text}")

    def _first_column(self, access: Access) -> int:
        return access.block.number * self._num_warps if self.space == "global" else 0

    def _lie_behind(self, access: Access, lanes: np.ndarray, columns: np.ndarray, reads: np.ndarray) -> np.ndarray:
        """Whether threads come after reads, their own included."""
        known, shift = access.block.order.known, access.block.number if self.space == "shared" else 0
        first = (columns // self._num_warps + shift) * self._parties + columns % self._num_warps * 32
        first, lanes = np.broadcast_to(first, reads.shape), np.broadcast_to(lanes, reads.shape)
        times, fields = reads // 64, reads % 64
        own = access.block.number * self._parties + lanes
        party = first + np.minimum(fields, 31)
        behind = (known[lanes, party] > times) | (party == own)
        several = fields == _SEVERAL
        if several.any():
            parties = first[several][:, None] + _WARP
            everybody = known[lanes[several][:, None], parties] > times[several][:, None]
            behind[several] = (everybody | (parties == own[several][:, None])).all(1)
        return behind

    def _compare_reads(self, access: Access, rows: np.ndarray, what: str, skip: np.ndarray | None) -> None:
        if self._reads is None:
            return
        reads = self._reads[rows]  # [accesses, granules, warps]
        if not reads.any():
            return
        columns = np.arange(self._num_columns)[None, None, :]
        racing = (reads != 0) & ~self._lie_behind(access, access.lanes[:, None, None], columns, reads)
        if skip is not None:
            racing &= ~skip[..., None]
        if racing.any():
            shift = access.block.number if self.space == "shared" else 0
            threads = np.minimum(reads % 64, 31) + columns % self._num_warps * 32
            blocks = np.broadcast_to(columns // self._num_warps + shift, reads.shape)
            self._report(access, rows, racing, blocks, threads, what)

    def _compare_writes(self, access: Access, rows: np.ndarray, what: str, skip: np.ndarray | None) -> None:
        before = self.writes[rows]
        if not before.any():
            return
        order, lanes = access.block.order, access.lanes[:, None]
        party, time = order.party_and_time(before)
        own = access.block.number * self._parties + lanes
        racing = (before != 0) & (party != own) & ~(order.known[lanes, party] > time)
        if skip is not None:
            racing &= ~skip
        if racing.any():
            self._report(access, rows, racing, party // self._parties, party % self._parties, what)

    def _report(
        self,
        access: Access,
        rows: np.ndarray,
        racing: np.ndarray,
        blocks: np.ndarray,
        threads: np.ndarray,
        what: str,
    ) -> None:
        """One finding for each kind of race among [accesses, granules, ...]."""
        number = access.block.number
        own_warps = access.lanes.reshape(-1, *[1] * (racing.ndim - 1)) // 32
        of_copies = threads == self._parties - 1
        here = blocks == number
        kinds = {
            "between blocks": ~here,
            "with a copy": here & of_copies,
            "in a warp": here & ~of_copies & (threads // 32 == own_warps),
            "between warps": here & ~of_copies & (threads // 32 != own_warps),
        }
        for between, chosen in kinds.items():
            found = np.argwhere(racing & chosen)
            if found.size:
                at = tuple(found[0])
                other = "copies" if of_copies[at] else f"thread {int(threads[at])}"
                self.report.add(
                    f"{self.space} race {between} ({what})",
                    access.instruction,
                    f"{self._place(rows[at[:2]])}: thread {int(access.lanes[at[0]])} of block {number} and {other} of "
                    f"block {int(blocks[at])}",
                )
