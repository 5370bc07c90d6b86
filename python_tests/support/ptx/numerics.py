"""Arithmetic of PTX on rows of numbers, where NumPy's own differs from it or has none.

Rows are one-dimensional arrays with an element a thread; scalars (constants) broadcast. Brain floats are carried as
uint16, packed pairs as uint32.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

__all__ = [
    "Approximation",
    "bfloat16_from_float",
    "bit_field",
    "bit_reverse",
    "count_leading_zeros",
    "divide",
    "e4m3_values",
    "exact_fma",
    "float_from_bfloat16",
    "float_from_half",
    "float_to_int",
    "flush",
    "funnel_shift",
    "fused",
    "half_from_float",
    "halves",
    "high_product",
    "insert_bits",
    "int_to_int",
    "logic3",
    "min_relu",
    "packed",
    "permute_bytes",
    "pick_bits",
    "remainder",
    "round_to_tf32",
    "shift_left",
    "shift_right",
]  # fmt: skip

Row = Any
"""an array with an element a thread, or a NumPy scalar"""

_LOW_28_BITS = np.uint64((1 << 28) - 1)


# integers -------------------------------------------------------------------------------------------------------------


def divide(left: Row, right: Row) -> Row:
    """Quotients rounded towards zero; all bits set where the divisor is zero."""
    left, right = np.broadcast_arrays(left, right)
    by_zero = right == 0
    divisor = np.where(by_zero, right.dtype.type(1), right)
    quotient = left // divisor
    if quotient.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * divisor != left))  # // rounds down
    return np.where(by_zero, ~np.zeros_like(quotient), quotient)


def remainder(left: Row, right: Row) -> Row:
    """What `divide` leaves, with the sign of the dividend."""
    return left - divide(left, right) * right


def high_product(left: Row, right: Row, wide: type | None) -> Row:
    """The upper half of products, computed in `wide`, or exactly where no type is wide enough."""
    bits = np.asarray(left).dtype.itemsize * 8
    if wide is not None:
        return np.multiply(left, right, dtype=wide) >> wide(bits)
    left, right = np.broadcast_arrays(left, right)
    upper = [(int(one) * int(other)) >> bits for one, other in zip(left, right)]
    return np.array(upper, dtype=left.dtype)


def shift_left(value: Row, amount: Row) -> Row:
    """Shifts by uint32 amounts; zero from the type's width on."""
    value, amount = np.broadcast_arrays(value, amount)
    bits = value.dtype.itemsize * 8
    shifted = np.left_shift(value, np.minimum(amount, bits - 1).astype(value.dtype))
    return np.where(amount < bits, shifted, value.dtype.type(0))


def shift_right(value: Row, amount: Row) -> Row:
    """The same to the right; signed types fill up with their sign."""
    value, amount = np.broadcast_arrays(value, amount)
    bits = value.dtype.itemsize * 8
    shifted = np.right_shift(value, np.minimum(amount, bits - 1).astype(value.dtype))
    return shifted if value.dtype.kind == "i" else np.where(amount < bits, shifted, value.dtype.type(0))


def funnel_shift(low: Row, high: Row, amount: Row, right: bool, wrap: bool) -> Row:
    """32 bits out of 64, shifted by an amount that wraps around or is clamped at 32."""
    both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | low
    amount = np.asarray(amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
    return ((both >> amount) if right else ((both << amount) >> np.uint64(32))).astype(np.uint32)


def _low_bits(count: Row) -> Row:
    """Words of 64 bits whose lowest `count` are set."""
    count = np.asarray(count, np.uint64)
    return np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1))


def bit_field(value: Row, start: Row, length: Row, signed: bool) -> Row:
    """bfe: a field of an unsigned number, extended by its top bit if signed."""
    value = np.asarray(value)
    bits = value.dtype.itemsize * 8
    start, length = np.asarray(start).astype(np.uint64) & 255, np.asarray(length).astype(np.uint64) & 255
    wide = value.astype(np.uint64)
    field = np.where(start < bits, wide >> np.minimum(start, np.uint64(63)), np.uint64(0)) & _low_bits(length)
    if signed:
        top = np.minimum(start + np.maximum(length, np.uint64(1)) - np.uint64(1), np.uint64(bits - 1))
        negative = ((wide >> top) & np.uint64(1)).astype(bool) & (length > 0)
        # Past the number's own top bit the field goes on with the sign.
        known = np.minimum(length, np.uint64(bits) - np.minimum(start, np.uint64(bits)))
        field = np.where(negative, field | ~_low_bits(known), field)
    return field.astype(value.dtype)


def insert_bits(field: Row, into: Row, start: Row, length: Row) -> Row:
    """bfi: put the lowest bits of `field` into another number."""
    into = np.asarray(into)
    start, length = np.asarray(start).astype(np.uint64) & 255, np.asarray(length).astype(np.uint64) & 255
    mask = np.where(start < 64, _low_bits(length) << np.minimum(start, np.uint64(63)), np.uint64(0))
    moved = np.asarray(field).astype(np.uint64) << np.minimum(start, np.uint64(63))
    return ((moved & mask) | (into.astype(np.uint64) & ~mask)).astype(into.dtype)


def permute_bytes(low: Row, high: Row, selector: Row) -> Row:
    """prmt: four bytes out of eight; bit 3 of a selector takes the sign of its byte instead."""
    both = np.asarray(low).astype(np.uint64) | (np.asarray(high).astype(np.uint64) << np.uint64(32))
    selector = np.asarray(selector).astype(np.uint64)
    result = np.uint64(0)
    for place in range(4):
        chosen = selector >> np.uint64(4 * place)
        byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        byte = np.where(chosen & np.uint64(8), sign, byte)
        result = result | (byte << np.uint64(8 * place))
    return result.astype(np.uint32)


def logic3(first: Row, second: Row, third: Row, table: int) -> Row:
    """lop3: any function of three bits, by its truth table."""
    result = np.uint32(0)
    for row in range(8):
        if table >> row & 1:
            terms = [word if row >> place & 1 else ~word for word, place in ((first, 2), (second, 1), (third, 0))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def count_leading_zeros(value: Row) -> Row:
    """clz of unsigned numbers."""
    value = np.asarray(value).copy()
    bits = value.dtype.itemsize * 8
    for shift in (16, 8, 4, 2, 1) if bits == 32 else (32, 16, 8, 4, 2, 1):
        value |= value >> value.dtype.type(shift)
    return (bits - np.bitwise_count(value)).astype(np.uint32)


def bit_reverse(value: Row) -> Row:
    """brev of 32 bits."""
    swapped = np.ascontiguousarray(np.atleast_1d(value)).view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(swapped, axis=1, bitorder="little"), axis=1).view(">u4").reshape(-1).astype("<u4")


def int_to_int(value: Row, to: type, saturate: bool) -> Row:
    """cvt between integers."""
    if saturate:
        bounds = np.iinfo(to)
        return np.array([min(max(int(one), bounds.min), bounds.max) for one in np.atleast_1d(value)]).astype(to)
    return np.asarray(value).astype(to)


def pick_bits(value: Row, count: int) -> Row:
    """The parts of wide numbers, [threads, count], lowest first."""
    value = np.ascontiguousarray(value)
    return value.view(f"u{value.dtype.itemsize // count}").reshape(-1, count)


def min_relu(left: Row, right: Row) -> Row:
    """min.relu.s32: the smaller one, but not less than zero."""
    return np.maximum(np.minimum(left, right), left.dtype.type(0))


# floats ---------------------------------------------------------------------------------------------------------------


def flush(value: Row) -> Row:
    """float32 with subnormal numbers made zeros of their sign."""
    value = np.asarray(value, np.float32)
    small = np.abs(value) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), value), value) if small.any() else value


def fused(left: Row, right: Row, addend: Row) -> Row:
    """float32 left * right + addend, rounded once."""
    product = np.multiply(left, right, dtype=np.float64)  # exact
    total = np.atleast_1d(product + addend)
    # Rounding to float64 first matters only where that is a midpoint of two floats: its low 28 bits are then zero.
    doubtful = (total.view(np.uint64) & _LOW_28_BITS) == 0
    if doubtful.any():
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        doubtful &= np.isfinite(total) & (error != 0)
        if doubtful.any():
            total = np.where(doubtful, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)


def exact_fma(left: Row, right: Row, addend: Row) -> Row:
    """Products and sums of half-precision numbers, in float64."""
    return np.multiply(left, right, dtype=np.float64) + addend


def bfloat16_from_float(value: Row) -> Row:
    """float32 or float64 to bfloat16, ties to even."""
    single = np.ascontiguousarray(value, np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), rounded.astype(np.uint16))


def float_from_bfloat16(value: Row) -> Row:
    """bfloat16 to float32."""
    return (np.asarray(value, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def half_from_float(value: Row) -> Row:
    """float32 or float64 to the bits of float16."""
    return np.ascontiguousarray(value).astype(np.float16).view(np.uint16)


def float_from_half(value: Row) -> Row:
    """Bits of float16 to float32."""
    return np.ascontiguousarray(value, np.uint16).view(np.float16).astype(np.float32)


def halves(value: Row, num_threads: int) -> Row:
    """Packed pairs as [threads, 2] uint16."""
    return np.ascontiguousarray(np.broadcast_to(value, num_threads)).view(np.uint16).reshape(-1, 2)


def packed(pairs: Row) -> Row:
    """[threads, 2] numbers of 16 bits as packed pairs."""
    return np.ascontiguousarray(pairs).view(np.uint32).reshape(-1)


def round_to_tf32(value: Row) -> Row:
    """The bits of float32 with 10 bits of fraction, ties away from zero."""
    return (np.ascontiguousarray(value, np.float32).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


@functools.cache
def e4m3_values() -> np.ndarray:
    """The 256 numbers of float8 e4m3, as float16."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float16)


def float_to_int(value: Row, to: type, rounding: str) -> Row:
    """cvt to an integer: clamped, and zero for NaN."""
    round_ = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
    whole = np.atleast_1d(round_(np.asarray(value, np.float64)))
    bounds = np.iinfo(to)
    low, high = whole <= float(bounds.min), whole >= float(bounds.max)
    inside = np.where(low | high | np.isnan(whole), 0.0, whole).astype(to)
    return np.where(high, to(bounds.max), np.where(low, to(bounds.min), inside))


class Approximation:
    """ex2, lg2, reciprocals and the like, whose results PTX gives to a few units in the last place only.

    Rounded from float64, or, with a seed, moved within the documented error by a hash of the argument.
    """

    seed: int | None = None

    @classmethod
    def _hash(cls, argument: Row, num_values: int) -> Row:
        assert cls.seed is not None
        bits = np.ascontiguousarray(argument, np.float32).view(np.uint32) + np.uint32(cls.seed)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x9E3779B1)
        return ((bits >> np.uint32(12)) % np.uint32(num_values)).astype(np.int32)

    @classmethod
    def _moved(cls, exact: Row, argument: Row, ulps: int) -> Row:
        result = np.ascontiguousarray(exact, np.float32)
        if cls.seed is None:
            return result
        steps = cls._hash(argument, 2 * ulps + 1) - ulps
        movable = np.isfinite(result) & (np.abs(result) > 1e-37) & (np.asarray(argument) != 0)  # ex2(0) is exact
        return np.where(movable, (result.view(np.int32) + steps).view(np.float32), result)

    @classmethod
    def power_of_two(cls, value: Row, flushed: bool) -> Row:
        value = flush(value) if flushed else value
        result = cls._moved(np.exp2(np.asarray(value, np.float64)), value, 2)
        return flush(result) if flushed else result

    @classmethod
    def logarithm(cls, value: Row, flushed: bool) -> Row:
        value = flush(value) if flushed else value
        result = np.log2(np.asarray(value, np.float64))
        if cls.seed is not None:
            shift = (cls._hash(value, 2001) / 1000.0 - 1) * 2.0**-22
            result = np.where(np.isfinite(result), result + shift, result)
        return result.astype(np.float32)

    @classmethod
    def quotient(cls, left: Row, right: Row) -> Row:
        return cls._moved(np.asarray(left, np.float64) / right, left, 2)

    @classmethod
    def reciprocal(cls, value: Row) -> Row:
        return cls._moved(1.0 / np.asarray(value, np.float64), value, 1)

    @classmethod
    def reciprocal_root(cls, value: Row) -> Row:
        return cls._moved(1.0 / np.sqrt(np.asarray(value, np.float64)), value, 2)

    @classmethod
    def root(cls, value: Row) -> Row:
        return cls._moved(np.sqrt(np.asarray(value, np.float64)), value, 1)

    @classmethod
    def tangent(cls, value: Row) -> Row:
        return cls._moved(np.tanh(np.asarray(value, np.float64)), value, 16)
