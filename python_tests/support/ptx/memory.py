"""Global and shared memory, with a state for every byte.

A byte's state says whether any tensor has it and whether anybody has written it. Accesses outside, misaligned ones and
loads of unwritten bytes are reported and then left out: such a load gives zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from support.ptx.races import Access, AccessLog
from support.ptx.report import Report

__all__ = ["FOREIGN", "GATE", "UNWRITTEN", "Allocation", "GlobalMemory", "MakeLog", "Region", "SharedMemory"]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""bytes -> type of a word"""

FOREIGN, UNWRITTEN, GATE = 1, 2, 4
"""bits of a byte's state: it belongs to no tensor; nobody has written it; an mbarrier is there. 0: it may be read"""

MakeLog = Callable[[int, int, str, str, int, Report], AccessLog]
"""makes the log of a memory"""


def _words_of(state: int) -> dict[int, Any]:
    return {width: kind(int.from_bytes(bytes([state] * width), "little")) for width, kind in UNSIGNED.items()}


_FOREIGN_WORD, _GATE_WORD, _KEPT_WORD = _words_of(FOREIGN), _words_of(GATE), _words_of(FOREIGN | GATE)
_ALIGNMENT = 16


class Region:
    """Bytes with their states and, where races are looked for, their stamps.

    Args:
        raw: [bytes] uint8, a multiple of 16.
        start: the first byte that counts, which the report calls 0.
        space: "global" or "shared".
        name: for the report.
        log: None where races are not looked for.
    """

    def __init__(
        self, raw: np.ndarray, start: int, space: str, name: str, report: Report, log: AccessLog | None
    ) -> None:
        self.words = {width: raw.view(kind) for width, kind in UNSIGNED.items()}
        states = np.zeros(raw.size, np.uint8)
        self.states = {width: states.view(kind) for width, kind in UNSIGNED.items()}
        self.start, self.space, self.name, self.report, self.log = start, space, name, report, log

    def read(
        self, access: Access, offsets: np.ndarray, width: int, count: int, strong: bool = False, logged: bool = True
    ) -> list[np.ndarray]:
        """Load `count` words of `width` bytes for each thread from aligned offsets inside."""
        index = offsets // width
        words, states = self.words[width], self.states[width]
        values = []
        for part in range(count):
            place = index + part if part else index
            values.append(words[place])
            state = states[place]
            if state.any():
                self._report_state(access, state, place, width)
        if self.log is not None and logged:
            self.log.read(access, self.log.rows(offsets, width * count), strong)
        return values

    def write(self, access: Access, offsets: np.ndarray, width: int, values: list[np.ndarray]) -> None:
        """Store words for each thread at aligned offsets inside."""
        places = [offsets // width + part for part in range(len(values))]
        words, states = self.words[width], self.states[width]
        if self.log is not None:
            unchanged = np.ones(offsets.size, bool)
            for place, value in zip(places, values):
                unchanged &= (words[place] == value) & (states[place] == 0)
            self.log.write(access, self.log.rows(offsets, width * len(values)), unchanged)
        for place, value in zip(places, values):
            state = states[place]
            if state.any():
                kept = state & _KEPT_WORD[width]
                if kept.any():
                    self._report_state(access, kept, place, width)
                states[place] = kept
            words[place] = value
            if self.log is not None and not (words[place] == value).all():
                self.report.add(
                    f"{self.space} race in one instruction", access.instruction, f"threads store different {self.name}"
                )

    def _report_state(self, access: Access, states: np.ndarray, places: np.ndarray, width: int) -> None:
        outside = (states & _FOREIGN_WORD[width]) != 0
        gate = ((states & _GATE_WORD[width]) != 0) & ~outside
        unwritten = (states != 0) & ~(outside | gate)
        found = ((outside, "out of bounds"), (gate, "mbarrier used as memory"), (unwritten, "uninitialised"))
        for wrong, kind in found:
            if wrong.any():
                first = int(np.flatnonzero(wrong)[0])
                place = int(places[first]) * width - self.start
                self.report.add(
                    f"{self.space} {kind}" if kind == "uninitialised" else kind,
                    access.instruction,
                    f"{self.name}{place:+d}, {width} bytes, thread {int(access.lanes[first])} of block "
                    f"{access.block.number}",
                )


class Allocation(Region):
    """Global memory of one storage, at its own address."""

    def __init__(
        self,
        address: int,
        num_bytes: int,
        name: str,
        granule: int | None,
        report: Report,
        make_log: MakeLog = AccessLog,
    ) -> None:
        self.address, self.num_bytes = address, num_bytes
        self.aligned = address // _ALIGNMENT * _ALIGNMENT
        length = -(-(address + num_bytes - self.aligned) // _ALIGNMENT) * _ALIGNMENT
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.aligned))
        start = address - self.aligned
        log = None if granule is None else make_log(length, granule, "global", name, start, report)
        super().__init__(raw, start, "global", name, report, log)
        self.states[1][:start] = FOREIGN
        self.states[1][start + num_bytes :] = FOREIGN

    @property
    def state(self) -> np.ndarray:
        """[bytes] the states of the storage's own bytes."""
        return self.states[1][self.start : self.start + self.num_bytes]


class GlobalMemory:
    """All allocations that a launch may touch."""

    def __init__(self, allocations: list[Allocation], report: Report) -> None:
        self.allocations = sorted(allocations, key=lambda allocation: allocation.address)
        self.report = report
        self._addresses = np.array([allocation.address for allocation in self.allocations], np.uint64)
        self._usual: dict[int, Allocation] = {}  # PTX line -> where its accesses went before
        self._published: dict[int, np.ndarray] = {}  # address -> clock that a release left there

    def read(
        self, access: Access, addresses: np.ndarray, width: int, count: int, semantics: str | None = None
    ) -> list[np.ndarray]:
        """Load `count` words of `width` bytes from each address; `semantics` of a strong load."""
        parts = list(self._inside(access, addresses, width * count, "load"))
        strong = semantics is not None
        if len(parts) == 1 and parts[0][1] is None:
            allocation = parts[0][0]
            values = allocation.read(access, self._offsets(allocation, addresses), width, count, strong)
        else:
            values = [np.zeros(addresses.size, UNSIGNED[width]) for _ in range(count)]
            for allocation, chosen in parts:
                part = access._replace(lanes=access.lanes[chosen])
                found = allocation.read(part, self._offsets(allocation, addresses[chosen]), width, count, strong)
                for value, loaded in zip(values, found):
                    value[chosen] = loaded
        if semantics is not None:
            self._synchronise(access, addresses, semantics)
        return values

    def write(
        self, access: Access, addresses: np.ndarray, width: int, values: list[np.ndarray], semantics: str | None = None
    ) -> None:
        """Store words at each address; `semantics` of a strong store."""
        if semantics is not None:
            self._synchronise(access, addresses, semantics)
        for allocation, chosen in self._inside(access, addresses, width * len(values), "store"):
            if chosen is None:
                allocation.write(access, self._offsets(allocation, addresses), width, values)
            else:
                part = access._replace(lanes=access.lanes[chosen])
                offsets = self._offsets(allocation, addresses[chosen])
                allocation.write(part, offsets, width, [value[chosen] for value in values])

    def update(
        self,
        access: Access,
        addresses: np.ndarray,
        width: int,
        new_value: Callable[[np.ndarray, int], np.ndarray],
        semantics: str,
    ) -> np.ndarray:
        """Atomics, one thread after the other: `new_value(old, position)`. Returns the old values."""
        before = np.zeros(addresses.size, UNSIGNED[width])
        for allocation, chosen in self._inside(access, addresses, width, "atomic"):
            for position in range(addresses.size) if chosen is None else chosen:
                one = access._replace(lanes=access.lanes[position : position + 1])
                offset = self._offsets(allocation, addresses[position : position + 1])
                before[position] = allocation.read(one, offset, width, 1, logged=False)[0][0]
                if allocation.log is not None:
                    allocation.log.write(one, allocation.log.rows(offset, width), None, atomic=True)
                allocation.words[width][offset // width] = new_value(before[position], position)
                self._synchronise(one, addresses[position : position + 1], semantics)
        return before

    def _synchronise(self, access: Access, addresses: np.ndarray, semantics: str) -> None:
        for lane, address in zip(access.lanes, addresses):
            clock = self._published.get(int(address))
            if clock is None:
                clock = self._published[int(address)] = access.block.order.new_clock()
            access.block.order.synchronise(int(lane), access.block.epoch, clock, semantics)

    @staticmethod
    def _offsets(allocation: Allocation, addresses: np.ndarray) -> np.ndarray:
        return (addresses - np.uint64(allocation.aligned)).astype(np.int64)

    def _inside(
        self, access: Access, addresses: np.ndarray, num_bytes: int, what: str
    ) -> Iterator[tuple[Allocation, np.ndarray | None]]:
        """Allocations with the positions of the accesses in them, None if all are; the others are reported."""
        usual = self._usual.get(access.instruction.line)
        aligned = addresses & np.uint64(num_bytes - 1) == 0
        if aligned.all():
            if usual is not None and usual.num_bytes >= num_bytes:
                relative = addresses - np.uint64(usual.address)  # wraps to a huge number below the allocation
                if (relative <= np.uint64(usual.num_bytes - num_bytes)).all():
                    yield usual, None
                    return
        else:
            self._report(access, "misaligned", addresses[~aligned][0], num_bytes, what)
        positions = np.flatnonzero(aligned)
        which = np.searchsorted(self._addresses, addresses[positions], side="right").astype(np.int64) - 1
        for number in np.unique(which):
            chosen = positions[which == number]
            if number < 0:
                self._report(access, "out of bounds", addresses[chosen][0], num_bytes, what)
                continue
            allocation = self.allocations[number]
            last = addresses[chosen] - np.uint64(allocation.address) + np.uint64(num_bytes)
            fits = last <= np.uint64(allocation.num_bytes)
            if not fits.all():
                self._report(access, "out of bounds", addresses[chosen[~fits]][0], num_bytes, what)
            if fits.any():
                self._usual[access.instruction.line] = allocation
                yield allocation, chosen[fits]

    def _report(self, access: Access, kind: str, address: np.uint64, num_bytes: int, what: str) -> None:
        place = f"{int(address):#x}, no memory at all"
        if self.allocations:
            nearest = min(self.allocations, key=lambda one: abs(int(address) - one.address))
            place = f"{nearest.name}{int(address) - nearest.address:+d} of {nearest.num_bytes} bytes"
        self.report.add(
            kind, access.instruction, f"{what} of {num_bytes} bytes at {place}, block {access.block.number}"
        )


class SharedMemory(Region):
    """The shared memory of one block, from address 0 on.

    Attributes:
        arriving: copies in flight to each granule.
        multiplied: matrix products in flight that read each granule.
        unfenced: granules written by ordinary stores since the last ``fence.proxy.async``.
    """

    def __init__(
        self, num_bytes: int, granule: int, report: Report, watch_races: bool, make_log: MakeLog = AccessLog
    ) -> None:
        self.num_bytes = num_bytes
        length = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        log = make_log(length, granule, "shared", "shared", 0, report)
        super().__init__(np.full(length, 0xFF, np.uint8), 0, "shared", "shared", report, log if watch_races else None)
        self.states[1][:] = UNWRITTEN
        self.granules = log
        self.arriving = np.zeros(log.writes.size, np.int16)
        self.multiplied = np.zeros(log.writes.size, np.int16)
        self.unfenced = np.zeros(log.writes.size, bool)
        self.in_flight = 0
        """copies and products; while there are none, nobody looks for them"""

    def load(
        self, access: Access, addresses: np.ndarray, width: int, count: int, atomic: bool = False
    ) -> list[np.ndarray]:
        """Load `count` words of `width` bytes from each uint32 address."""
        inside = self._inside(access, addresses, width * count, "load")
        if inside is not None:
            values = [np.zeros(addresses.size, UNSIGNED[width]) for _ in range(count)]
            if inside.size:
                part = access._replace(lanes=access.lanes[inside])
                for value, loaded in zip(values, self.load(part, addresses[inside], width, count, atomic)):
                    value[inside] = loaded
            return values
        offsets = addresses.astype(np.int64)
        if self.in_flight and self.arriving[self.granules.rows(offsets, width * count)].any():
            self.report.add("read of an unfinished cp.async", access.instruction, f"block {access.block.number}")
        return self.read(access, offsets, width, count, logged=not atomic)

    def store(self, access: Access, addresses: np.ndarray, width: int, values: list[np.ndarray]) -> None:
        """Store words at each uint32 address."""
        inside = self._inside(access, addresses, width * len(values), "store")
        if inside is not None:
            if inside.size:
                part = access._replace(lanes=access.lanes[inside])
                self.store(part, addresses[inside], width, [value[inside] for value in values])
            return
        offsets = addresses.astype(np.int64)
        rows = self.granules.rows(offsets, width * len(values))
        self.check_target(access, rows)
        self.write(access, offsets, width, values)
        self.unfenced[rows] = True

    def check_target(self, access: Access, rows: np.ndarray) -> None:
        """Report granules to be written that something in flight still writes or reads."""
        if self.in_flight:
            if self.arriving[rows].any():
                self.report.add("write to an unfinished cp.async", access.instruction, f"block {access.block.number}")
            if self.multiplied[rows].any():
                self.report.add(
                    "write to an operand of wgmma in flight", access.instruction, f"block {access.block.number}"
                )

    def copy_target(
        self, access: Access, addresses: np.ndarray, num_bytes: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """int64 offsets to which copies may go, and their positions, None for all; the others are reported."""
        inside = self._inside(access, addresses, num_bytes, "cp.async")
        return (addresses if inside is None else addresses[inside]).astype(np.int64), inside

    def matrix(self, access: Access, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of 16 bits at int64 offsets of any shape, as wgmma reads them, and the granules they lie in."""
        outside = (offsets < 0) | (offsets + 2 > self.num_bytes)
        number = access.block.number
        if outside.any():
            self.report.add(
                "out of bounds", access.instruction, f"wgmma operand at shared{offsets[outside][0]:+d}, block {number}"
            )
            offsets = np.where(outside, 0, offsets)
        unwritten = self.states[2][offsets // 2] != 0
        if unwritten.any():
            self.report.add(
                "shared uninitialised", access.instruction, f"wgmma operand at shared{offsets[unwritten][0]:+d}"
            )
        rows = np.unique(offsets // self.granules.granule)
        if self.log is not None:
            everybody = access._replace(lanes=np.full(rows.size, access.lanes[0]))
            self.log.read_by_all(everybody, rows, "wgmma after write")
            if self.unfenced[rows].any():
                self.report.add("no fence.proxy.async before wgmma", access.instruction, f"block {number}")
        if self.in_flight and self.arriving[rows].any():
            self.report.add("read of an unfinished cp.async", access.instruction, f"wgmma operand, block {number}")
        return self.words[2][offsets // 2], rows

    def _inside(self, access: Access, addresses: np.ndarray, num_bytes: int, what: str) -> np.ndarray | None:
        """Positions of the accesses that are possible, None if all are."""
        aligned = addresses & np.uint32(num_bytes - 1) == 0
        inside = addresses.astype(np.int64) + num_bytes <= self.num_bytes
        good = aligned & inside
        if good.all():
            return None
        for fine, kind in ((aligned, "misaligned"), (inside, "out of bounds")):
            if not fine.all():
                address = int(addresses[~fine][0])
                self.report.add(kind, access.instruction, self._describe(what, num_bytes, address, access.block.number))
        return np.flatnonzero(good)

    def _describe(self, what: str, num_bytes: int, address: int, block: int) -> str:
        return f"{what} of {num_bytes} bytes at shared+{address} of {self.num_bytes} bytes, block {block}"
