"""Instructions that the threads of a warp do together: shuffles, votes, reductions, warp barriers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from support.ptx.parser import Instruction
from support.ptx.report import UnsupportedError
from support.ptx.translation import Translator, text_of, translates

__all__ = ["reduce_warps", "shuffle_sources", "vote"]

_LANES = np.arange(32)


def shuffle_sources(mode: str, amount: Any, clamp: Any, num_threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Which thread each thread reads in a shuffle, itself where that lies outside; and whether it lies inside.

    Args:
        mode: "up", "down", "bfly" or "idx".
        amount: distance, lane mask or lane; a scalar or a row.
        clamp: as in PTX: the segment's mask above bit 8, the limit below.
        num_threads: of the block.
    """
    thread = np.arange(num_threads)
    lane = thread & 31
    amount, clamp = np.asarray(amount).astype(np.int64) & 31, np.asarray(clamp).astype(np.int64)
    limit, segment = clamp & 31, (clamp >> 8) & 31
    highest = (lane & segment) | (limit & ~segment)
    chosen = {
        "up": lane - amount,
        "down": lane + amount,
        "bfly": lane ^ amount,
        "idx": (lane & segment) | (amount & ~segment),
    }[mode]
    inside = chosen >= highest if mode == "up" else chosen <= highest
    return np.where(inside, chosen, lane) + (thread & ~31), np.broadcast_to(inside, (num_threads,))


def vote(operation: str, values: np.ndarray, here: np.ndarray) -> np.ndarray:
    """[threads] what a vote gives, among the threads that are here."""
    values, here = values.reshape(-1, 32), here.reshape(-1, 32)
    true = values & here
    if operation == "ballot":
        return np.repeat((true.astype(np.uint64) << _LANES.astype(np.uint64)).sum(1).astype(np.uint32), 32)
    every = (true | ~here).all(1)
    result = {"any": true.any(1), "all": every, "uni": every | ~true.any(1)}[operation]
    return np.repeat(result, 32)


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def reduce_warps(operation: str, values: np.ndarray, here: np.ndarray | None) -> np.ndarray:
    """[threads] what a warp's threads have, taken together; `here` are those that take part, None for all."""
    values = values.reshape(-1, 32)
    if here is not None:
        bounds = np.iinfo(values.dtype)
        neutral = {"min": bounds.max, "max": bounds.min, "and": ~values.dtype.type(0)}.get(operation, 0)
        values = np.where(here.reshape(-1, 32), values, values.dtype.type(neutral))
    return np.repeat(_REDUCTIONS[operation].reduce(values, axis=1, dtype=values.dtype), 32)


@translates("shfl")
def _shuffle(t: Translator, ins: Instruction) -> None:
    targets, source, amount, clamp, members = ins.operands
    target, _, inside = text_of(targets).partition("|")
    t.line(f"C.require_warps({t.site}, {t.read(members, 'u32')}, {t.mask})")
    mode = ins.modifiers[1]
    values = t.spread(source, "u32")
    if re.fullmatch(r"\d+", text_of(amount)) and re.fullmatch(r"\d+", text_of(clamp)):
        # Known when the kernel is translated: an index for the largest block serves all.
        sources, within = shuffle_sources(mode, int(text_of(amount)), int(text_of(clamp)), 1024)
        name = t.constant_for("shuffle", (mode, text_of(amount), text_of(clamp)), sources)
        t.write(target, "u32", f"{values}[{name}[:C.num_threads]]")
        if inside:
            flags = t.constant_for("inside", (mode, text_of(amount), text_of(clamp)), within)
            t.write(inside, "pred", f"{flags}[:C.num_threads]")
        return
    t.line(
        f"sources, inside = shuffle_sources({mode!r}, {t.read(amount, 'u32')}, {t.read(clamp, 'u32')}, C.num_threads)"
    )
    t.write(target, "u32", f"{values}[sources]")
    if inside:
        t.write(inside, "pred", "inside")


@translates("redux")
def _reduce(t: Translator, ins: Instruction) -> None:
    target, source, members = ins.operands
    if ins.type == "f32":
        raise UnsupportedError(ins.text)
    t.line(f"C.require_warps({t.site}, {t.read(members, 'u32')}, {t.mask})")
    here = "None" if t.mask == "True" else t.mask
    t.write(target, ins.type, f"reduce_warps({ins.modifiers[1]!r}, {t.spread(source, ins.type)}, {here})")


@translates("vote")
def _vote(t: Translator, ins: Instruction) -> None:
    target, source, members = ins.operands
    operation = ins.modifiers[1]
    t.line(f"C.require_warps({t.site}, {t.read(members, 'u32')}, {t.mask})")
    values = f"np.broadcast_to({t.read(source, 'pred')}, C.num_threads)"
    t.write(target, "u32" if operation == "ballot" else "pred", f"vote({operation!r}, {values}, C.here({t.mask}))")


@translates("activemask")
def _active_mask(t: Translator, ins: Instruction) -> None:
    t.write(ins.operands[0], "u32", f"vote('ballot', C.here({t.mask}), C.here({t.mask}))")


@translates("bar")
def _warp_barrier(t: Translator, ins: Instruction) -> None:
    """bar.warp.sync; the barriers of blocks end a piece of a kernel and are not translated."""
    t.line(f"C.synchronise_warps({t.site}, {t.read(ins.operands[0], 'u32')}, {t.mask})")
