"""What a block has in flight: copies into shared memory, and matrix products of warp groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from support.ptx.gates import Gates
from support.ptx.memory import GlobalMemory, SharedMemory
from support.ptx.parser import Instruction
from support.ptx.races import Access
from support.ptx.thread_order import ThreadOrder

__all__ = ["CopyQueue", "ProductQueue"]


class _Copy(NamedTuple):
    """Words on their way."""

    access: Access
    rows: np.ndarray  # granules
    places: np.ndarray  # of the first words of 4 bytes
    words: list[np.ndarray]

    def of_lanes(self, chosen: np.ndarray) -> _Copy:
        """The part of some threads, [threads] bool."""
        access = self.access._replace(lanes=self.access.lanes[chosen])
        return _Copy(access, self.rows[chosen], self.places[chosen], [word[chosen] for word in self.words])


class _Announced(NamedTuple):
    """Copies that tell an mbarrier when they have come."""

    access: Access
    copies: list[_Copy]
    gate: int
    num_bytes: int | None
    """that it counts; None: it counts an arrival"""


class CopyQueue:
    """cp.async: copies of a block, in groups that each warp commits and waits for, or told to an mbarrier.

    Where a copy goes, shared memory is filled with ones until the group has been waited for, or the copy has come. The
    data are read from global memory when the copy is issued. What an mbarrier is told of comes some time later:
    whenever a thread tests an mbarrier, each of these copies comes or does not.
    """

    def __init__(
        self, shared: SharedMemory, memory: GlobalMemory, gates: Gates | None, random: np.random.Generator
    ) -> None:
        self._shared, self._memory, self._gates, self._random = shared, memory, gates, random
        self._open: dict[int, list[_Copy]] = {}
        self._groups: dict[int, list[list[_Copy]]] = {}
        self._announced: list[_Announced] = []

    def issue(
        self,
        access: Access,
        warp: int,
        targets: np.ndarray,
        sources: np.ndarray,
        num_bytes: int,
        source_bytes: np.ndarray,
    ) -> None:
        """Start a copy for each thread: `source_bytes` of them from global memory, zeros for the rest."""
        copy = self._start(access, targets, sources, num_bytes, source_bytes, "cp.async")
        if copy is not None:
            self._open.setdefault(warp, []).append(copy)

    def issue_bulk(
        self, access: Access, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, gates: np.ndarray
    ) -> None:
        """cp.async.bulk: a copy for each thread, of whole pieces of 16 bytes, that tells its mbarrier the bytes."""
        assert self._gates is not None
        for position in range(access.lanes.size):
            one = access._replace(lanes=access.lanes[position : position + 1])
            size, gate = int(sizes[position]), int(gates[position])
            if not self._gates.is_told(one, gate, True):
                continue
            if size % 16:
                self._shared.report.add("misaligned", access.instruction, f"cp.async.bulk of {size} bytes")
                continue
            places = np.arange(0, size, 16)
            whole = one._replace(lanes=np.repeat(one.lanes, places.size))
            copy = self._start(
                whole, targets[position] + places.astype(np.uint32), sources[position] + places.astype(np.uint64), 16,
                np.full(places.size, 16, np.uint32), "cp.async.bulk",
            )  # fmt: skip
            if copy is None:
                continue
            if self._shared.unfenced[copy.rows].any():
                where = f"block {access.block.number}"
                self._shared.report.add("no fence.proxy.async before cp.async.bulk", access.instruction, where)
            self._announced.append(_Announced(one, [copy], gate, size))

    def announce(self, access: Access, warp: int, gates: np.ndarray, counts_more: bool) -> None:
        """cp.async.mbarrier.arrive: threads arrive when the copies that they have begun so far have come."""
        assert self._gates is not None
        groups = [*self._groups.get(warp, []), self._open.get(warp, [])]
        begun = [copy for group in groups for copy in group]
        *self._groups[warp], self._open[warp] = (
            [copy.of_lanes(left) for copy in group if (left := ~np.isin(copy.access.lanes, access.lanes)).any()]
            for group in groups
        )
        for position, lane in enumerate(access.lanes):
            one, gate = access._replace(lanes=access.lanes[position : position + 1]), int(gates[position])
            if not self._gates.is_told(one, gate, False):
                continue
            if counts_more:
                self._gates.expect_arrival(gate)
            own = [copy.of_lanes(chosen) for copy in begun if (chosen := copy.access.lanes == lane).any()]
            self._announced.append(_Announced(one, own, gate, None))

    def come_perhaps(self) -> None:
        """Let time pass: some of the announced copies come."""
        if not self._announced:
            return
        order = self._random.permutation(len(self._announced))
        come = set(order[: int(self._random.integers(len(order) + 1))].tolist())
        announced, self._announced = self._announced, [one for n, one in enumerate(self._announced) if n not in come]
        for number in order.tolist():
            if number in come:
                self._come(announced[number])

    def _come(self, announced: _Announced) -> None:
        assert self._gates is not None
        order = announced.access.block.order
        assert isinstance(order, ThreadOrder)
        for copy in announced.copies:
            self._land(copy, order.stamp_of_copies(), announced.num_bytes is None)
        clock = order.release_of_copies()
        if announced.num_bytes is None:
            self._gates.arrive_for(announced.access, announced.gate, clock)
        else:
            self._gates.bring(announced.access, announced.gate, announced.num_bytes, clock)

    def _start(
        self,
        access: Access,
        targets: np.ndarray,
        sources: np.ndarray,
        num_bytes: int,
        source_bytes: np.ndarray,
        what: str,
    ) -> _Copy | None:
        words = self._words(access, sources, num_bytes, source_bytes)
        offsets, inside = self._shared.copy_target(access, targets, num_bytes)
        if inside is not None:
            access, words = access._replace(lanes=access.lanes[inside]), [word[inside] for word in words]
        if not offsets.size:
            return None
        shared = self._shared
        rows = shared.granules.rows(offsets, num_bytes)
        shared.check_target(access, rows)
        if shared.log is not None:
            shared.log.compare_write(access, rows, what)
        shared.arriving[rows] += 1
        shared.in_flight += offsets.size
        for part in range(len(words)):
            shared.words[4][offsets // 4 + part] = 0xFFFFFFFF
        return _Copy(access, rows, offsets // 4, words)

    def _land(self, copy: _Copy, stamps: np.uint64 | np.ndarray, unfenced: bool) -> None:
        """Put what has been copied in place."""
        shared = self._shared
        for part, word in enumerate(copy.words):
            shared.words[4][copy.places + part] = word
            shared.states[4][copy.places + part] = 0
        shared.arriving[copy.rows] -= 1
        shared.in_flight -= copy.places.size
        shared.unfenced[copy.rows] = unfenced
        if shared.log is not None:
            # Written now, not when it was issued: a barrier in between orders nothing.
            shared.log.overwrite(copy.rows, stamps)

    def _words(self, access: Access, sources: np.ndarray, num_bytes: int, source_bytes: np.ndarray) -> list[np.ndarray]:
        words = [np.zeros(sources.size, np.uint32) for _ in range(num_bytes // 4)]
        report = self._shared.report
        if (source_bytes > num_bytes).any():
            report.add("cp.async of more bytes than its size", access.instruction, f"{int(source_bytes.max())} bytes")
        if (sources & np.uint64(num_bytes - 1)).any():
            report.add("misaligned", access.instruction, f"cp.async of {num_bytes} bytes from {int(sources.max()):#x}")
        whole = np.flatnonzero(source_bytes == num_bytes)
        if whole.size:
            part = access._replace(lanes=access.lanes[whole])
            for word, loaded in zip(words, self._memory.read(part, sources[whole], 4, len(words))):
                word[whole] = loaded
        for position in np.flatnonzero((source_bytes > 0) & (source_bytes < num_bytes)):
            count = int(source_bytes[position])
            one = access._replace(lanes=np.repeat(access.lanes[position], count))
            copied = np.zeros(num_bytes, np.uint8)
            addresses = sources[position] + np.arange(count, dtype=np.uint64)
            copied[:count] = self._memory.read(one, addresses, 1, 1)[0]
            for word, value in zip(words, copied.view(np.uint32)):
                word[position] = value
        return words

    def commit(self, warp: int) -> None:
        """Close a group."""
        self._groups.setdefault(warp, []).append(self._open.pop(warp, []))

    def wait(self, warp: int, num_left: int) -> None:
        """Land the oldest groups of a warp until so many are left."""
        groups = self._groups.get(warp, [])
        while len(groups) > num_left:
            for copy in groups.pop(0):
                self._land(copy, copy.access.block.stamps[copy.access.lanes][:, None], True)

    def unfinished(self) -> bool:
        """Whether any copy has not been waited for."""
        in_groups = any(self._open.values()) or any(any(groups) for groups in self._groups.values())
        return in_groups or bool(self._announced)


class _Product(NamedTuple):
    """One wgmma."""

    rows: list[np.ndarray]  # granules of its operands in shared memory
    accumulators: frozenset[str]
    sources: frozenset[str]  # registers of its left operand


class ProductQueue:
    """wgmma: products of a block's warp groups, in groups that are committed and waited for.

    Results are there at once, but who reads or writes an accumulator, or writes a register of the left operand, before
    the wait is reported: on a GPU that register may hold anything.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self._open: list[_Product] = []
        self._groups: list[list[_Product]] = []
        self.accumulators: dict[str, int] = {}
        """registers, and how many products in flight add to them"""
        self._sources: dict[str, int] = {}
        self.unfenced: set[str] = set()
        """registers of products that other instructions have written since the last ``wgmma.fence``"""

    def issue(
        self, instruction: Instruction, rows: list[np.ndarray], accumulators: Iterable[str], sources: Iterable[str]
    ) -> None:
        """Put a product in flight."""
        product = _Product(rows, frozenset(accumulators), frozenset(sources))
        for register in sorted(self.unfenced & (product.accumulators | product.sources))[:1]:
            self._shared.report.add("no wgmma.fence before wgmma", instruction, f"{register} was written since")
        for operand in rows:
            self._shared.multiplied[operand] += 1
        self._shared.in_flight += 1
        self._count(product, 1)
        self._open.append(product)

    def _count(self, product: _Product, change: int) -> None:
        for counts, registers in ((self.accumulators, product.accumulators), (self._sources, product.sources)):
            for register in registers:
                counts[register] = counts.get(register, 0) + change
                if not counts[register]:
                    del counts[register]

    def commit(self) -> None:
        """Close a group."""
        self._groups.append(self._open)
        self._open = []

    def wait(self, num_left: int, stamp: np.uint64) -> None:
        """Finish the oldest groups until so many are left; from then on their operands count as read."""
        while len(self._groups) > num_left:
            for product in self._groups.pop(0):
                for operand in product.rows:
                    self._shared.multiplied[operand] -= 1
                    if self._shared.log is not None:
                        self._shared.log.reads[operand] = stamp
                self._shared.in_flight -= 1
                self._count(product, -1)

    def touch(self, instruction: Instruction, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
        """Report an instruction that uses registers of products in flight."""
        report = self._shared.report
        for register in reads:
            if register in self.accumulators:
                report.add("wgmma accumulator read before its wait", instruction, register)
        for register in writes:
            if register in self.accumulators:
                report.add("wgmma accumulator written before its wait", instruction, register)
            if register in self._sources:
                report.add("wgmma operand register written before its wait", instruction, register)

    def unfinished(self) -> bool:
        """Whether any product has not been waited for."""
        return bool(self._open) or any(self._groups)
