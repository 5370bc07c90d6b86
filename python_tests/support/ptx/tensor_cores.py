"""Matrix instructions: which thread of a warp holds which number, and the products.

Fragments are [warps, registers, 32 lanes] of uint32 for operands and float32 for accumulators. Products are added up in
float64 and rounded once, which is at least as exact as any tensor core.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from support.ptx.numerics import float_from_bfloat16, float_from_half

__all__ = ["MatrixDescriptor", "accumulator_column", "accumulator_row", "multiply", "operand_of_group", "widen"]

_LANES = np.arange(32)
ROW = _LANES // 4
"""lane -> row of an 8 by 8 matrix of 16-bit numbers"""
COLUMN = _LANES % 4 * 2
"""lane -> the first of its two columns"""


def _places(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[row, column] -> where a fragment, flattened, has that number."""
    places = np.empty((rows.max() + 1, columns.max() + 1), np.int64)
    places[rows, columns] = np.arange(rows.size).reshape(rows.shape)
    return places


def _pairs_of_a(num_registers: int) -> np.ndarray:
    register, lane, half = np.indices((num_registers, 32, 2))
    return _places(ROW[lane] + 8 * (register % 2), COLUMN[lane] + half + 8 * (register // 2))


def _pairs_of_b(num_registers: int) -> np.ndarray:
    register, lane, half = np.indices((num_registers, 32, 2))
    return _places(COLUMN[lane] + half + 8 * register, ROW[lane])


def _words_of_a(num_registers: int) -> np.ndarray:
    register, lane = np.indices((num_registers, 32))
    return _places(ROW[lane] + 8 * (register % 2), lane % 4 + 4 * (register // 2))


def _words_of_b(num_registers: int) -> np.ndarray:
    register, lane = np.indices((num_registers, 32))
    return _places(lane % 4 + 4 * register, ROW[lane])


_A = {
    ("pair", 4): _pairs_of_a(4),
    ("pair", 2): _pairs_of_a(2),
    ("word", 4): _words_of_a(4),
    ("word", 2): _words_of_a(2),
}
_B = {
    ("pair", 2): _pairs_of_b(2),
    ("pair", 1): _pairs_of_b(1),
    ("word", 2): _words_of_b(2),
    ("word", 1): _words_of_b(1),
}


def accumulator_row(register: int) -> np.ndarray:
    """[lanes] rows of a warp's accumulators."""
    return ROW + 8 * (register // 2 % 2)


def accumulator_column(register: int) -> np.ndarray:
    """[lanes] their columns; four registers make eight columns."""
    return COLUMN + register % 2 + register // 4 * 8


def widen(numbers: np.ndarray, type_: str) -> np.ndarray:
    """Bits of operands as float64: uint16 of bf16 and f16, uint32 of tf32."""
    if type_ == "tf32":
        return (numbers & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return (float_from_bfloat16 if type_ == "bf16" else float_from_half)(numbers).astype(np.float64)


def _matrix(fragment: np.ndarray, places: dict[tuple[str, int], np.ndarray], type_: str) -> np.ndarray:
    """[warps, rows, columns] float64."""
    fragment = np.ascontiguousarray(fragment)
    num_warps, num_registers, _ = fragment.shape
    kind = "word" if type_ == "tf32" else "pair"
    numbers = fragment if type_ == "tf32" else fragment.view(np.uint16)
    return widen(numbers.reshape(num_warps, -1)[:, places[kind, num_registers]], type_)


def multiply(a: np.ndarray, b: np.ndarray, accumulators: np.ndarray, type_: str) -> list[np.ndarray]:
    """mma.sync.m16n8: the four registers of the sum, [warps * 32] float32 each."""
    product = np.matmul(_matrix(a, _A, type_), _matrix(b, _B, type_))
    return [
        (product[:, accumulator_row(register), accumulator_column(register)] + accumulators[:, register])
        .astype(np.float32)
        .reshape(-1)
        for register in range(4)
    ]


def operand_of_group(fragment: np.ndarray, type_: str) -> np.ndarray:
    """The left operand of wgmma in registers: [groups, 64 rows, 16 columns] float64."""
    return _matrix(fragment, _A, type_).reshape(-1, 64, 16)


class MatrixDescriptor(NamedTuple):
    """Where wgmma finds an operand in shared memory."""

    start: int
    leading_bytes: int
    stride_bytes: int
    row_bytes: int
    """of the swizzled rows: 128, 64 or 32"""

    @classmethod
    def decode(cls, word: int) -> MatrixDescriptor | None:
        """Read a descriptor; None for one with a base offset or without swizzle."""
        row_bytes = {1: 128, 2: 64, 3: 32}.get(word >> 62)
        if row_bytes is None or word >> 49 & 7:
            return None
        start, leading, stride = ((word >> shift & 0x3FFF) * 16 for shift in (0, 16, 32))
        return cls(start, leading, stride, row_bytes)

    def offsets(self, num_rows: int, transposed: bool) -> np.ndarray:
        """[rows, 16] byte offsets of the operand's numbers; `transposed`: rows are contiguous, not columns."""
        rows, columns = np.arange(num_rows)[:, None], np.arange(16)[None, :]
        if transposed:
            per_row = self.row_bytes // 2
            offsets = self.start + rows // per_row * self.leading_bytes + rows % per_row * 2
            offsets = offsets + columns // 8 * self.stride_bytes + columns % 8 * self.row_bytes
        else:
            offsets = self.start + rows // 8 * self.stride_bytes + rows % 8 * self.row_bytes + columns * 2
        return offsets ^ (offsets >> 3 & {128: 0x70, 64: 0x30, 32: 0x10}[self.row_bytes])
