"""mbarriers of a block: who has arrived, what is still on its way, and what those who wait then know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from support.ptx.memory import GATE, UNWRITTEN, SharedMemory
from support.ptx.races import Access
from support.ptx.thread_order import ThreadOrder

__all__ = ["Gates"]

_BYTES = 8
_MOST_ARRIVALS = (1 << 20) - 1


@dataclass
class _Gate:
    """One mbarrier."""

    arrivals: int
    """that a phase takes"""
    pending: int
    set_up: np.uint64
    """the stamp of its mbarrier.init"""
    clock: np.ndarray
    """of the arrivals of this phase"""
    opened: np.ndarray
    """of those of the phase before"""
    phase: int = 0
    num_bytes: int = 0
    """that copies have still to bring in this phase; below 0 where they came before anybody expected them"""
    fenced: bool = False
    """whether a proxy fence lies behind its mbarrier.init"""


class Gates:
    """The mbarriers in a block's shared memory.

    A phase ends when as many have arrived as were named at the beginning and all bytes that were expected have come.
    Who then sees that it has ended comes after all that those who arrived have done before.
    """

    def __init__(self, shared: SharedMemory, order: ThreadOrder) -> None:
        self._shared, self._order = shared, order
        self._gates: dict[int, _Gate] = {}

    def set_up(self, access: Access, addresses: np.ndarray, counts: np.ndarray) -> None:
        """mbarrier.init: its memory is nobody else's from now on."""
        for position, lane in enumerate(access.lanes):
            one, address, count = self._one(access, position), int(addresses[position]), int(counts[position])
            if not self._fits(one, address):
                continue
            if address in self._gates:
                self._tell(one, "mbarrier set up twice", address)
            if not 1 <= count <= _MOST_ARRIVALS:
                self._tell(one, "mbarrier for an impossible number of arrivals", address, str(count))
                continue
            place = slice(address, address + _BYTES)
            self._shared.states[1][place] = 0
            self._shared.write(one, np.array([address]), 8, [np.array([count], np.uint64)])
            self._shared.states[1][place] = GATE
            clock = self._order.new_clock()
            self._gates[address] = _Gate(count, count, self._order.stamps[lane], clock, clock.copy())

    def take_down(self, access: Access, addresses: np.ndarray) -> None:
        """mbarrier.inval: its memory may be used for something else, and holds nothing."""
        for position in range(access.lanes.size):
            address = int(addresses[position])
            if self._gate(self._one(access, position), address) is not None:
                del self._gates[address]
                self._shared.states[1][address : address + _BYTES] = UNWRITTEN

    def arrive(
        self, access: Access, addresses: np.ndarray, counts: np.ndarray, num_bytes: np.ndarray, releases: bool = True
    ) -> np.ndarray:
        """Threads arrive, or expect more bytes without arriving where counts are 0. Returns phases before."""
        phases = np.zeros(access.lanes.size, np.uint64)
        if releases:
            self._order.release(access.lanes)
        for position, lane in enumerate(access.lanes):
            one, address = self._one(access, position), int(addresses[position])
            gate = self._gate(one, address)
            if gate is None:
                continue
            phases[position] = gate.phase
            gate.num_bytes += int(num_bytes[position])
            clock = self._order.known[lane] if releases else None
            self._count(one, address, gate, int(counts[position]), clock)
        return phases

    def bring(self, access: Access, address: int, num_bytes: int, clock: np.ndarray) -> None:
        """A copy has come: its bytes do not have to be waited for any more."""
        gate = self._gates.get(address)
        if gate is not None:
            gate.num_bytes -= num_bytes
            self._count(access, address, gate, 0, clock)

    def arrive_for(self, access: Access, address: int, clock: np.ndarray) -> None:
        """All copies of a thread have come, as it has asked to be told by an arrival."""
        gate = self._gates.get(address)
        if gate is not None:
            self._count(access, address, gate, 1, clock)

    def test(self, access: Access, addresses: np.ndarray, phases: np.ndarray, by_parity: bool) -> np.ndarray:
        """Whether a phase has ended, by its parity or by what an arrival in it gave."""
        ended = np.ones(access.lanes.size, bool)
        for address in np.unique(addresses):
            chosen = np.flatnonzero(addresses == address)
            part = access._replace(lanes=access.lanes[chosen])
            gate = self._gate(part, int(address))
            if gate is not None:
                own = phases[chosen].astype(np.int64)
                ended[chosen] = (gate.phase & 1) != (own & 1) if by_parity else gate.phase != own
                self._order.acquire(part.lanes[ended[chosen]], gate.opened)
        return ended

    def is_told(self, access: Access, address: int, is_fenced: bool) -> bool:
        """Whether a copy may tell an mbarrier; what is wrong is reported. `is_fenced`: copies of the async proxy."""
        gate = self._gate(access, address)
        if gate is not None and is_fenced and not gate.fenced:
            self._tell(access, "no fence.proxy.async before cp.async.bulk", address, "of its mbarrier.init")
        return gate is not None

    def expect_arrival(self, address: int) -> None:
        """cp.async.mbarrier.arrive without .noinc: one arrival more in this phase."""
        self._gates[address].pending += 1

    def fence(self, lanes: np.ndarray) -> None:
        """fence.proxy.async of these threads."""
        for gate in self._gates.values():
            gate.fenced |= bool(self._order.anybody_knows(lanes, np.array([gate.set_up]))[0])

    def _count(self, access: Access, address: int, gate: _Gate, arrivals: int, clock: np.ndarray | None) -> None:
        gate.pending -= arrivals
        if clock is not None:
            np.maximum(gate.clock, clock, out=gate.clock)
        if gate.pending < 0:
            self._tell(access, "more arrivals than an mbarrier waits for", address)
            gate.pending = 0
        if gate.pending == 0 and gate.num_bytes == 0:
            gate.opened, gate.clock = gate.clock, self._order.new_clock()
            gate.pending = gate.arrivals
            gate.phase += 1

    def _gate(self, access: Access, address: int) -> _Gate | None:
        """The mbarrier that a thread uses; what is wrong with that is reported."""
        gate = self._gates.get(address)
        if gate is None:
            self._tell(access, "no mbarrier there", address)
        elif not self._order.know_write(access.lanes, gate.set_up):
            self._tell(access, "shared race between warps (mbarrier used before it is set up)", address)
        return gate

    def _fits(self, access: Access, address: int) -> bool:
        for wrong, kind in (
            (address % _BYTES != 0, "misaligned"),
            (address + _BYTES > self._shared.num_bytes, "out of bounds"),
        ):
            if wrong:
                self._tell(access, kind, address)
                return False
        return True

    @staticmethod
    def _one(access: Access, position: int) -> Access:
        return access._replace(lanes=access.lanes[position : position + 1])

    def _tell(self, access: Access, kind: str, address: int, detail: str = "") -> None:
        where = f"shared+{address}, thread {int(access.lanes[0])} of block {access.block.number}"
        self._shared.report.add(kind, access.instruction, f"{where}{', ' * bool(detail)}{detail}")
