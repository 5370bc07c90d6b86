"""What the translated lines ask of a block: its memories, its warps, its copies and products in flight."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.ptx.asynchronous import CopyQueue, ProductQueue
from support.ptx.gates import Gates
from support.ptx.memory import UNSIGNED, GlobalMemory, SharedMemory
from support.ptx.parser import Instruction
from support.ptx.races import Access, BlockOrder, thread_of
from support.ptx.report import KernelStoppedError, Report, UnsupportedError
from support.ptx.tensor_cores import (
    COLUMN,
    ROW,
    MatrixDescriptor,
    accumulator_column,
    accumulator_row,
    multiply,
    operand_of_group,
    widen,
)  # fmt: skip
from support.ptx.thread_order import ThreadOrder
from support.ptx.translation import SHARED_WINDOW

__all__ = ["Operations"]

Mask = Any
"""True for all threads, or a row of booleans"""

_WARP = np.arange(32, dtype=np.uint32)
_SYNC = np.uint64(1 << 12)
_WINDOW, _LOW = np.uint64(SHARED_WINDOW), np.uint64(0xFFFFFFFF)


class Operations:
    """The part of a block that its instructions see.

    Attributes:
        number: of the block in its grid.
        num_threads: a multiple of 32.
        sites: the kernel's instructions, by the numbers that lines use.
        stamps: [threads] what each thread's accesses are stamped with now.
        epoch: barriers that the block has passed.
    """

    number: int
    num_threads: int
    sites: list[Instruction]
    semantics: list[str | None]
    stamps: np.ndarray
    epoch: int
    lanes: np.ndarray
    memory: GlobalMemory
    shared: SharedMemory
    copies: CopyQueue
    products: ProductQueue
    order: BlockOrder | ThreadOrder
    gates: Gates | None
    """of kernels that have mbarriers"""
    parameters: np.ndarray
    yielded: np.ndarray
    """[threads] who lets others run first, since it waits for them"""
    report: Report
    current_warp: int
    """the one that runs, where warps run one at a time; else 0"""
    single_warps: bool
    exited: np.ndarray

    # threads ----------------------------------------------------------------------------------------------------------

    def here(self, mask: Mask) -> np.ndarray:
        """The mask as a row."""
        return np.ones(self.num_threads, bool) if mask is True else mask

    def _lanes(self, mask: Mask) -> np.ndarray:
        return self.lanes if mask is True else np.flatnonzero(mask)

    def _chosen(self, mask: Mask, *rows: Any) -> tuple[Any, ...]:
        """The threads of a mask, and their elements of rows."""
        lanes = self.lanes if mask is True else np.flatnonzero(mask)
        if lanes.size == self.num_threads:
            return (self.lanes, *(row if np.ndim(row) else np.full(self.num_threads, row) for row in rows))
        return (lanes, *(row[lanes] if np.ndim(row) else np.full(lanes.size, row) for row in rows))

    def _spread(self, lanes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Elements of some threads as a row."""
        if lanes.size == self.num_threads:
            return values
        row = np.zeros(self.num_threads, values.dtype)
        row[lanes] = values
        return row

    def require_warps(self, site: int, members: Any, mask: Mask) -> None:
        """Report warps of which a part runs an instruction that names threads which are not there."""
        if mask is True:
            return
        here = mask.reshape(-1, 32)
        missing = ~here & ~self.exited.reshape(-1, 32)
        partial = here.any(1) & missing.any(1)
        for warp in np.flatnonzero(partial):
            named = np.broadcast_to(members, self.num_threads).reshape(-1, 32)[warp][here[warp]][0]
            if (missing[warp] & ((named >> _WARP) & np.uint32(1)).astype(bool)).any():
                self.report.add(
                    "warp instruction by a part of its warp", self.sites[site], f"warp {warp} of block {self.number}"
                )

    def synchronise_warps(self, site: int, members: Any, mask: Mask) -> None:
        """bar.warp.sync."""
        self.require_warps(site, members, mask)
        if isinstance(self.order, ThreadOrder):
            self.order.meet_in_warps(self._lanes(mask))
        else:
            self.stamps[slice(None) if mask is True else mask] += _SYNC

    def assertion_failed(self, site: int, mask: Mask) -> None:
        """__assertfail: the kernel ends here, if any thread calls it."""
        lanes = self.lanes if mask is True else np.flatnonzero(mask)
        if lanes.size:
            where = f"thread {int(lanes[0])} of block {self.number}"
            self.report.add("device assertion", self.sites[site], where)
            raise KernelStoppedError(f"{self.report.kernel}: a device assertion failed in {where}")

    # memory -----------------------------------------------------------------------------------------------------------

    def load_global(self, site: int, addresses: Any, width: int, count: int, mask: Mask) -> list[np.ndarray]:
        """`count` rows of words."""
        lanes, addresses = self._chosen(mask, addresses)
        if not lanes.size:
            return [np.zeros(self.num_threads, UNSIGNED[width])] * count
        access = Access(self.sites[site], self, lanes)
        values = self.memory.read(access, addresses, width, count, self.semantics[site])
        if self.semantics[site] is not None:
            self.yielded[lanes] = True
        return [self._spread(lanes, value) for value in values]

    def load_parameters(self, site: int, places: Any, width: int, count: int, mask: Mask) -> list[np.ndarray]:
        """`count` rows of words from computed places among the parameters."""
        lanes, places = self._chosen(mask, places)
        places = places.astype(np.int64)
        wrong = (places % width != 0) | (places < 0) | (places + width * count > self.parameters.size)
        if wrong.any():
            where = f"{width * count} bytes at {int(places[wrong][0])} of the parameters, block {self.number}"
            self.report.add("out of bounds", self.sites[site], where)
            places = np.where(wrong, 0, places)
        words = self.parameters.view(UNSIGNED[width])
        return [self._spread(lanes, words[places // width + part]) for part in range(count)]

    def _in_shared(self, addresses: Any, mask: Mask) -> tuple[Any, np.ndarray, np.ndarray]:
        """Generic addresses as those of shared memory, and the threads that go there and to global memory."""
        addresses, here = np.broadcast_to(addresses, self.num_threads), self.here(mask)
        inside = addresses >= _WINDOW
        return (addresses & _LOW).astype(np.uint32), here & inside, here & ~inside

    def load_generic(self, site: int, addresses: Any, width: int, count: int, mask: Mask) -> list[np.ndarray]:
        """`count` rows of words, each from the memory that its address belongs to."""
        offsets, in_shared, in_global = self._in_shared(addresses, mask)
        if not in_shared.any():
            return self.load_global(site, addresses, width, count, mask)
        shared = self.load_shared(site, offsets, width, count, in_shared)
        if not in_global.any():
            return shared
        others = self.load_global(site, addresses, width, count, in_global)
        return [np.where(in_shared, one, other) for one, other in zip(shared, others)]

    def store_generic(self, site: int, addresses: Any, width: int, values: list[Any], mask: Mask) -> None:
        """Rows of words, each to the memory that its address belongs to."""
        offsets, in_shared, in_global = self._in_shared(addresses, mask)
        if in_shared.any():
            self.store_shared(site, offsets, width, values, in_shared)
        if in_global.any():
            self.store_global(site, addresses, width, values, in_global)

    def atomic_generic(
        self, site: int, addresses: Any, operation: str, kind: Any, values: list[Any], mask: Mask
    ) -> Any:
        """A row of the words that were there before, in global memory."""
        if self._in_shared(addresses, mask)[1].any():
            raise UnsupportedError(f"a generic atomic of shared memory: {self.sites[site].text}")
        return self.atomic_global(site, addresses, operation, kind, values, mask)

    def load_shared(self, site: int, addresses: Any, width: int, count: int, mask: Mask) -> list[np.ndarray]:
        """`count` rows of words."""
        lanes, addresses = self._chosen(mask, addresses)
        if not lanes.size:
            return [np.zeros(self.num_threads, UNSIGNED[width])] * count
        values = self.shared.load(Access(self.sites[site], self, lanes), addresses, width, count)
        return [self._spread(lanes, value) for value in values]

    def store_global(self, site: int, addresses: Any, width: int, values: list[Any], mask: Mask) -> None:
        """Rows of words."""
        lanes, addresses, *values = self._chosen(mask, addresses, *values)
        if lanes.size:
            access = Access(self.sites[site], self, lanes)
            self.memory.write(access, addresses, width, values, self.semantics[site])

    def store_shared(self, site: int, addresses: Any, width: int, values: list[Any], mask: Mask) -> None:
        """Rows of words."""
        lanes, addresses, *values = self._chosen(mask, addresses, *values)
        if lanes.size:
            self.shared.store(Access(self.sites[site], self, lanes), addresses, width, values)

    def atomic_global(self, site: int, addresses: Any, operation: str, kind: Any, values: list[Any], mask: Mask) -> Any:
        """A row of the words that were there before."""
        lanes, addresses, *values = self._chosen(mask, addresses, *values)
        width = np.dtype(kind).itemsize
        if not lanes.size:
            return np.zeros(self.num_threads, UNSIGNED[width])
        before = self.memory.update(
            Access(self.sites[site], self, lanes),
            addresses,
            width,
            lambda old, position: _updated(operation, kind, old, [value[position] for value in values]),
            self.semantics[site] or "relaxed",
        )
        return self._spread(lanes, before)

    def atomic_shared(self, site: int, addresses: Any, operation: str, kind: Any, values: list[Any], mask: Mask) -> Any:
        """A row of the words that were there before; atomics of a block race with nothing here."""
        lanes, addresses, *values = self._chosen(mask, addresses, *values)
        width = np.dtype(kind).itemsize
        before = np.zeros(lanes.size, UNSIGNED[width])
        for position in range(lanes.size):
            access = Access(self.sites[site], self, lanes[position : position + 1])
            place = addresses[position : position + 1]
            before[position] = self.shared.load(access, place, width, 1, atomic=True)[0][0]
            new = _updated(operation, kind, before[position], [value[position] for value in values])
            if int(place[0]) + width <= self.shared.num_bytes:
                self.shared.words[width][int(place[0]) // width] = new
        return self._spread(lanes, before)

    def fence(self, mask: Mask) -> None:
        """A fence between blocks."""
        lanes = self.lanes if mask is True else np.flatnonzero(mask)
        self.order.fence(lanes.tolist(), self.epoch)

    def proxy_fence(self, mask: Mask) -> None:
        """fence.proxy.async: what these threads have stored, or anybody before the last barrier, wgmma may read."""
        log = self.shared.granules
        if self.gates is not None:
            self.gates.fence(self._lanes(mask))
        if mask is True or self.shared.log is None:
            self.shared.unfenced[:] = False
            return
        if isinstance(self.order, ThreadOrder):
            places = np.flatnonzero(self.shared.unfenced)
            self.shared.unfenced[places] = ~self.order.anybody_knows(self._lanes(mask), log.writes[places])
            return
        earlier = (log.writes >> np.uint64(24)) != (self.stamps[0] >> np.uint64(24))
        self.shared.unfenced &= ~(earlier | mask[np.minimum(thread_of(log.writes), self.num_threads - 1)])

    # copies -----------------------------------------------------------------------------------------------------------

    def copy(self, site: int, targets: Any, sources: Any, num_bytes: int, source_bytes: Any, mask: Mask) -> None:
        """cp.async."""
        lanes, targets, sources, source_bytes = self._chosen(mask, targets, sources, source_bytes)
        if lanes.size:
            access = Access(self.sites[site], self, lanes)
            self.copies.issue(access, self.current_warp, targets, sources, num_bytes, source_bytes)

    def commit_copies(self, mask: Mask) -> None:
        """cp.async.commit_group."""
        self._require_everybody(mask, "cp.async.commit_group")
        self.copies.commit(self.current_warp)

    def wait_for_copies(self, num_left: int, mask: Mask) -> None:
        """cp.async.wait_group."""
        self._require_everybody(mask, "cp.async.wait_group")
        self.copies.wait(self.current_warp, num_left)

    def _require_everybody(self, mask: Mask, what: str) -> None:
        """Groups are kept for the whole block, or for each warp where warps run one at a time."""
        if mask is not True and not (self.single_warps and mask.reshape(-1, 32)[self.current_warp].all()):
            raise UnsupportedError(f"{what} by some of the threads")

    def copy_in_bulk(self, site: int, targets: Any, sources: Any, sizes: Any, gates: Any, mask: Mask) -> None:
        """cp.async.bulk."""
        lanes, targets, sources, sizes, gates = self._chosen(mask, targets, sources, sizes, gates)
        self.copies.issue_bulk(Access(self.sites[site], self, lanes), targets, sources, sizes, gates)

    def announce_copies(self, site: int, gates: Any, counts_more: bool, mask: Mask) -> None:
        """cp.async.mbarrier.arrive."""
        lanes, gates = self._chosen(mask, gates)
        self.copies.announce(Access(self.sites[site], self, lanes), self.current_warp, gates, counts_more)

    # mbarriers --------------------------------------------------------------------------------------------------------

    def _gates(self) -> Gates:
        assert self.gates is not None
        return self.gates

    def set_gate_up(self, site: int, addresses: Any, counts: Any, mask: Mask) -> None:
        """mbarrier.init."""
        lanes, addresses, counts = self._chosen(mask, addresses, counts)
        self._gates().set_up(Access(self.sites[site], self, lanes), addresses, counts)

    def take_gate_down(self, site: int, addresses: Any, mask: Mask) -> None:
        """mbarrier.inval."""
        lanes, addresses = self._chosen(mask, addresses)
        self._gates().take_down(Access(self.sites[site], self, lanes), addresses)

    def arrive_at_gate(
        self, site: int, addresses: Any, counts: Any, num_bytes: Any, releases: bool, mask: Mask
    ) -> np.ndarray:
        """mbarrier.arrive and mbarrier.expect_tx: a row of phases."""
        lanes, addresses, counts, num_bytes = self._chosen(mask, addresses, counts, num_bytes)
        access = Access(self.sites[site], self, lanes)
        return self._spread(lanes, self._gates().arrive(access, addresses, counts, num_bytes, releases))

    def test_gate(self, site: int, addresses: Any, phases: Any, by_parity: bool, mask: Mask) -> np.ndarray:
        """mbarrier.test_wait and mbarrier.try_wait: a row of booleans."""
        lanes, addresses, phases = self._chosen(mask, addresses, phases)
        self.copies.come_perhaps()
        ended = self._gates().test(Access(self.sites[site], self, lanes), addresses, phases, by_parity)
        self.yielded[lanes[~ended]] = True
        return self._spread(lanes, ended)

    # matrices ---------------------------------------------------------------------------------------------------------

    def _matrix_rows(self, site: int, addresses: Any, count: int, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
        """Warps that are here whole, and [warps, 8 * count] addresses of rows."""
        warps = np.arange(self.num_threads // 32) if mask is True else np.flatnonzero(mask.reshape(-1, 32).all(1))
        rows = np.broadcast_to(addresses, self.num_threads).reshape(-1, 32)[warps][:, : 8 * count]
        wrong = rows & np.uint32(15) != 0
        if wrong.any():
            self.report.add("misaligned", self.sites[site], f"a matrix row at shared+{int(rows[wrong][0])}")
        return warps, rows

    def load_matrices(self, site: int, addresses: Any, count: int, transposed: bool, mask: Mask) -> list[np.ndarray]:
        """ldmatrix: `count` rows."""
        warps, rows = self._matrix_rows(site, addresses, count, mask)
        lanes = (warps[:, None] * 32 + _WARP).reshape(-1)
        access = Access(self.sites[site], self, lanes)
        result = []
        for start in range(0, 8 * count, 8):
            words = np.zeros((self.num_threads // 32, 32), np.uint32)
            if lanes.size:
                low, high = _matrix_places(rows[:, start : start + 8], transposed)
                if high is None:
                    loaded = self.shared.load(access, low, 4, 1)[0]
                else:
                    halves = [self.shared.load(access, part, 2, 1)[0].astype(np.uint32) for part in (low, high)]
                    loaded = halves[0] | halves[1] << np.uint32(16)
                words[warps] = loaded.reshape(-1, 32)
            result.append(words.reshape(-1))
        return result

    def store_matrices(self, site: int, addresses: Any, values: list[np.ndarray], transposed: bool, mask: Mask) -> None:
        """stmatrix."""
        warps, rows = self._matrix_rows(site, addresses, len(values), mask)
        lanes = (warps[:, None] * 32 + _WARP).reshape(-1)
        if not lanes.size:
            return
        access = Access(self.sites[site], self, lanes)
        for number, value in enumerate(values):
            low, high = _matrix_places(rows[:, 8 * number : 8 * number + 8], transposed)
            if high is None:
                self.shared.store(access, low, 4, [value[lanes]])
            else:
                self.shared.store(access, low, 2, [value[lanes].astype(np.uint16)])
                self.shared.store(access, high, 2, [(value[lanes] >> np.uint32(16)).astype(np.uint16)])

    def multiply(self, a: list[Any], b: list[Any], accumulators: list[Any], type_: str) -> list[np.ndarray]:
        """mma.sync."""
        fragments = (np.stack([row.reshape(-1, 32) for row in rows], 1) for rows in (a, b, accumulators))
        return multiply(*fragments, type_)

    def multiply_in_groups(
        self,
        site: int,
        accumulators: list[np.ndarray],
        left: Any,
        right: np.ndarray,
        adds: Any,
        num_columns: int,
        type_: str,
        transposed: tuple[bool, bool],
        registers: tuple[str, ...],
        sources: tuple[str, ...],
        mask: Mask,
    ) -> list[np.ndarray]:
        """wgmma.mma_async: rows of the new accumulators; `left` is a list of rows, or a row of descriptors."""
        self.require_warps(site, np.uint32(0xFFFFFFFF), mask)
        if mask is not True:
            raise UnsupportedError("wgmma by some of the threads")
        operands: list[np.ndarray] = []
        if isinstance(left, list):
            a = operand_of_group(np.stack([row.reshape(-1, 32) for row in left], 1), type_)
        else:
            a = self._operand(site, left, 64, transposed[0], type_, operands)
        b = self._operand(site, right, num_columns, transposed[1], type_, operands).transpose(0, 2, 1)
        product = np.matmul(a, b).reshape(-1, 16, num_columns)
        self.products.issue(self.sites[site], operands, registers, sources)
        result = []
        for register, row in enumerate(accumulators):
            sums = product[:, accumulator_row(register), accumulator_column(register)].reshape(-1)
            result.append((sums + np.where(adds, row, np.float32(0))).astype(np.float32))
        return result

    def _operand(
        self, site: int, descriptors: Any, num_rows: int, transposed: bool, type_: str, operands: list[np.ndarray]
    ) -> np.ndarray:
        """[groups, rows, 16] numbers of the matrices that descriptors name; appends their granules to `operands`."""
        matrices = []
        for group in range(self.num_threads // 128):
            words = np.broadcast_to(descriptors, self.num_threads)[128 * group : 128 * group + 128]
            if (words != words[0]).any():
                self.report.add("wgmma descriptor differs in its warp group", self.sites[site], f"group {group}")
            descriptor = MatrixDescriptor.decode(int(words[0]))
            if descriptor is None:
                raise UnsupportedError(f"wgmma descriptor {int(words[0]):#x}")
            access = Access(self.sites[site], self, self.lanes[128 * group : 128 * group + 1])
            numbers, rows = self.shared.matrix(access, descriptor.offsets(num_rows, transposed))
            operands.append(rows)
            matrices.append(widen(numbers, type_))
        return np.stack(matrices)

    def commit_products(self, mask: Mask) -> None:
        """wgmma.commit_group."""
        if mask is not True:
            raise UnsupportedError("wgmma.commit_group by some of the threads")
        self.products.commit()

    def wait_for_products(self, num_left: int, mask: Mask) -> None:
        """wgmma.wait_group."""
        if mask is not True:
            raise UnsupportedError("wgmma.wait_group by some of the threads")
        self.products.wait(num_left, self.stamps[0] | np.uint64(0x7FF))


def _matrix_places(rows: np.ndarray, transposed: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Addresses of each lane's pair of numbers, or of its first and its second one."""
    if not transposed:
        return (rows[:, ROW] + (2 * COLUMN).astype(np.uint32)).reshape(-1), None
    column = (2 * ROW).astype(np.uint32)
    return (rows[:, COLUMN] + column).reshape(-1), (rows[:, COLUMN + 1] + column).reshape(-1)


def _updated(operation: str, kind: Any, old: np.ndarray, values: list[Any]) -> np.ndarray:
    """The word that an atomic leaves."""
    before = np.asarray(old).view(kind)[()]
    value = values[0]
    if operation == "cas":
        new = values[1] if before == value else before
    elif operation == "inc":
        new = kind(0) if before >= value else before + kind(1)
    elif operation == "dec":
        new = value if before == 0 or before > value else before - kind(1)
    else:
        new = {
            "add": lambda: before + value,
            "min": lambda: min(before, value),
            "max": lambda: max(before, value),
            "exch": lambda: value,
            "and": lambda: before & value,
            "or": lambda: before | value,
            "xor": lambda: before ^ value,
        }[operation]()
    return np.array(new, kind).view(UNSIGNED[np.dtype(kind).itemsize])
