"""Faults planted into compiled kernels: each barrier, fence and wait left out in turn, or weakened.

What the emulator does not notice is either a hole in it or an instruction that the kernel does not need for this call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from support.ptx.emulator import Emulator
from support.ptx.launch import Options
from support.ptx.report import KernelStoppedError, UnsupportedError

__all__ = ["Mutant", "Outcome", "mutants", "run_mutant"]

_LEFT_OUT = {
    "barrier": r"bar\.sync\s+\d+\s*(?:,\s*\d+\s*)?;",
    "proxy fence": r"fence\.proxy\.async[\w.:]*\s*;",
    "fence of products": r"wgmma\.fence\.sync\.aligned\s*;",
    "wait for products": r"wgmma\.wait_group\.sync\.aligned\s+\w+\s*;",
    "wait for copies": r"cp\.async\.wait_group\s+\w+\s*;",
    "warp barrier": r"bar\.warp\.sync\s+[-\w]+\s*;",
    "setting up of an mbarrier": r"mbarrier\.init[\w.:]*\s[^;]*;",
    "arrival at an mbarrier": r"mbarrier\.arrive[\w.:]*\s[^;]*;",
    "arrival of copies": r"cp\.async\.mbarrier\.arrive[\w.:]*\s[^;]*;",
}
_LOOSENED = r"(cp\.async\.wait_group\s+)(\w+)(\s*;)"
_EXCHANGED = {
    "wait at an mbarrier": (r"mbarrier\.(?:test|try)_wait[\w.:]*\s+(\w+),[^;]*;", r"setp.eq.u32 \1, 0, 0;"),
    "wait for blocks": (r"ld\.acquire[\w.]*\s+(%\w+),[^;]*;", r"mov.u32 \1, -1;"),
    "acquire": (r"(ld|atom)\.acquire(\.[^;]*;)", r"\1.relaxed\2"),
    "release": (r"(red|atom|st)\.release(\.[^;]*;)", r"\1.relaxed\2"),
}
"""what stands there, and what takes its place"""


class Mutant(NamedTuple):
    """A kernel with one fault."""

    name: str
    """what was done to which one: "barrier 2 left out" """
    line: int
    ptx: str


class Outcome(NamedTuple):
    """What came of a mutant."""

    mutant: Mutant
    findings: frozenset[str]
    """kinds of faults found; empty if none"""
    is_right: bool
    """whether the results were still right"""

    @property
    def noticed(self) -> bool:
        """Whether anything told that the kernel was changed."""
        return bool(self.findings) or not self.is_right


def mutants(ptx: str) -> Iterator[Mutant]:
    """Every mutant of a PTX text."""
    for what, pattern in _LEFT_OUT.items():
        for number, found in enumerate(re.finditer(pattern, ptx)):
            changed = ptx[: found.start()] + ptx[found.end() :]
            yield Mutant(f"{what} {number} left out", _line(ptx, found.start()), changed)
    for what, (pattern, weaker) in _EXCHANGED.items():
        for number, found in enumerate(re.finditer(pattern, ptx)):
            changed = ptx[: found.start()] + found.expand(weaker) + ptx[found.end() :]
            yield Mutant(f"{what} {number} left out", _line(ptx, found.start()), changed)
    for number, found in enumerate(re.finditer(_LOOSENED, ptx)):
        looser = f"{found[1]}{int(found[2], 0) + 1}{found[3]}"
        changed = ptx[: found.start()] + looser + ptx[found.end() :]
        yield Mutant(f"wait for copies {number} loosened by a group", _line(ptx, found.start()), changed)


def run_mutant(ptx: str, mutant: Mutant, call: Callable[[Emulator], bool], options: Options) -> Outcome:
    """Make a call whose kernel `ptx` is replaced by a mutant.

    Args:
        ptx: the kernel as it was compiled.
        mutant: what runs instead.
        call: makes the call in an emulator, and tells whether its results are right.
        options: how launches run.
    """
    emulator = Emulator(options, change_text=lambda text: mutant.ptx if text == ptx else text)
    try:
        is_right = call(emulator)
    except (KernelStoppedError, UnsupportedError):
        is_right = False
    return Outcome(mutant, frozenset(emulator.report.kinds()), is_right)


def _line(ptx: str, position: int) -> int:
    return ptx.count("\n", 0, position) + 1
