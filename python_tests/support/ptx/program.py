"""A kernel as pieces that run from their first instruction to their last, each a Python function.

A piece ends at a branch, a barrier, the end of a thread, a label, and around every access by which blocks may learn of
one another, so that blocks can take turns there.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import numpy as np
from support.ptx import (
    gate_instructions,
    matrix_instructions,
    memory_instructions,
    scalar_instructions,
    warp_instructions,
)
from support.ptx.matrix_instructions import registers_of_products
from support.ptx.memory import MakeLog
from support.ptx.memory_instructions import is_strong, semantics_of, space_of
from support.ptx.parser import TYPE_BYTES, Address, Instruction, Kernel, Label, Module
from support.ptx.races import AccessLog
from support.ptx.report import UnsupportedError
from support.ptx.thread_order import ThreadLog
from support.ptx.translation import PLAIN_NAMES, Layout, Translator, text_of

__all__ = ["Barrier", "Piece", "Program", "environment"]

_GROUPS = (gate_instructions, matrix_instructions, memory_instructions, scalar_instructions, warp_instructions)
_WITHOUT_RESULT = ("st", "red", "cp", "stmatrix", "bar", "fence", "membar", "prefetch", "call")


class Piece(NamedTuple):
    """Instructions that run one after the other."""

    first_site: int
    instructions: list[Instruction]
    """without the one that ends it"""
    ending: str
    """"next", "branch", "return" or "barrier" """
    last: Instruction | None
    """the branch, return or barrier"""


class Barrier(NamedTuple):
    """What a barrier of a block names."""

    number: int
    count: int | None
    """threads that it waits for, None for all of the block"""
    waits: bool
    """whether who arrives waits for the others"""

    @classmethod
    def of(cls, instruction: Instruction) -> Barrier:
        """Read bar, or barrier.

        Raises:
            UnsupportedError: its numbers are not constants, or it is guarded.
        """
        operands = instruction.operands[1 if instruction.has("red") else 0 :]
        operands = operands[:-1] if instruction.has("red") else operands
        waits = not instruction.has("arrive")
        numbers = [int(text, 0) for text in map(text_of, operands) if text.isdigit()]
        if instruction.guard is not None or len(numbers) != len(operands) or not (2 - waits <= len(numbers) <= 2):
            raise UnsupportedError(f"line {instruction.line}: {instruction.text}")
        return cls(numbers[0], numbers[1] if len(numbers) == 2 else None, waits)


class Program:
    """A kernel, ready to run.

    Attributes:
        name: of the kernel.
        layout: registers, parameters, shared variables.
        sites: all instructions, as the translated lines number them.
        semantics: how each of them takes part in the order of blocks.
        pieces: in the order of the text.
        multiplies_in_groups: whether it has instructions that several warps run together.
        meets_in_parts: whether a part of a block may wait for another, at a barrier of its own or at an mbarrier.
        barriers: what the instructions name that are one, by their lines.
        granule: bytes of shared memory that need a stamp of their own.
    """

    def __init__(self, module: Module, kernel: Kernel) -> None:
        self.name = kernel.name
        self.layout = Layout(module, kernel)
        self.sites: list[Instruction] = []
        self.pieces: list[Piece] = []
        self.constants: dict[str, Any] = {}
        self._labels: dict[str, int] = {}
        self._cut(kernel)
        self.semantics = [semantics_of(instruction) for instruction in self.sites]
        self._product_registers = registers_of_products(self.sites)
        self.multiplies_in_groups = any(instruction.name == "wgmma" for instruction in self.sites)
        self.barriers = {i.line: Barrier.of(i) for i in self.sites if _ending(i) == "barrier"}
        self.meets_in_parts = any(barrier[:2] != (0, None) for barrier in self.barriers.values()) or any(
            gate_instructions.uses_gate(instruction) for instruction in self.sites
        )
        self.granule = min([_granule(instruction) for instruction in self.sites], default=4)
        self._codes: dict[tuple[int, bool], tuple[types.CodeType | None, set[tuple[str, int]]]] = {}

    def log_of(self, num_blocks: int, num_threads: int) -> MakeLog:
        """What keeps the accesses of a launch."""
        if not self.meets_in_parts:
            return AccessLog
        return functools.partial(ThreadLog, num_blocks=num_blocks, num_threads=num_threads)

    def target(self, instruction: Instruction) -> int:
        """The piece that a branch goes to."""
        return self._labels[text_of(instruction.operands[0])]

    def code(self, number: int, masked: bool) -> tuple[types.CodeType | None, set[tuple[str, int]]]:
        """A piece as a function of the mask `w`, and the rows that it names; no function for a piece without lines."""
        key = (number, masked)
        if key not in self._codes:
            self._codes[key] = self._translate(number, masked)
        return self._codes[key]

    def lines_run(self) -> set[int]:
        """Lines of the text that some thread has come to."""
        pieces = [self.pieces[number] for number, _ in self._codes]
        return {
            instruction.line
            for piece in pieces
            for instruction in (*piece.instructions, piece.last)
            if instruction is not None
        }

    def _cut(self, kernel: Kernel) -> None:
        begun: list[Instruction] = []

        def close(ending: str, last: Instruction | None = None) -> None:
            self.pieces.append(Piece(len(self.sites), list(begun), ending, last))
            self.sites.extend([*begun, *([] if last is None else [last])])
            begun.clear()

        for item in kernel.body:
            if isinstance(item, Label):
                if begun:
                    close("next")
                self._labels[item.name] = len(self.pieces)
                continue
            ending = _ending(item)
            if ending is not None:
                close(ending, item)
            elif is_strong(item):
                if begun:
                    close("next")
                begun.append(item)
                close("next")
            else:
                begun.append(item)
        if begun:
            close("next")

    def _translate(self, number: int, masked: bool) -> tuple[types.CodeType | None, set[tuple[str, int]]]:
        piece = self.pieces[number]
        translator = Translator(self.layout, self.constants, masked)
        for site, instruction in enumerate(piece.instructions, piece.first_site):
            self._watch_products(translator, instruction, site)
            translator.translate(instruction, site)
        if not translator.lines:
            return None, set()
        text = "def piece(w):\n" + "\n".join(f"    {line}" for line in translator.lines)
        names: dict[str, Any] = {}
        exec(compile(text, f"<{self.name}, piece {number}>", "exec"), names)
        return names["piece"].__code__, translator.rows

    def _watch_products(self, translator: Translator, instruction: Instruction, site: int) -> None:
        """Before an instruction that uses registers of wgmma: none of them may be in flight."""
        if not self._product_registers:
            return
        reads, writes = _uses(instruction)
        reads, writes = (tuple(x for x in used if x in self._product_registers) for used in (reads, writes))
        if instruction.name == "wgmma":
            accumulators = instruction.operands[0] if instruction.operands else ()
            reads, writes = tuple(x for x in reads if x not in accumulators), ()
        if writes:
            translator.line(f"C.products.unfenced.update({writes!r})")
        if reads or writes:
            translator.line(f"if C.products.accumulators: C.products.touch(C.sites[{site}], {reads!r}, {writes!r})")


def environment() -> dict[str, Any]:
    """Names that every piece may use."""
    return {
        **PLAIN_NAMES,
        "FULL_WARP": np.uint32(0xFFFFFFFF),
        "reduce_warps": warp_instructions.reduce_warps,
        "shuffle_sources": warp_instructions.shuffle_sources,
        "vote": warp_instructions.vote,
    }


def _ending(instruction: Instruction) -> str | None:
    if instruction.name == "bra":
        return "branch"
    if instruction.name in ("ret", "exit", "trap"):
        return "return"
    if instruction.name in ("bar", "barrier") and not instruction.has("warp"):
        return "barrier"
    return None


def _uses(instruction: Instruction) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Registers that an instruction reads, and that it writes."""
    parts: list[list[str]] = []
    for operand in instruction.operands:
        if isinstance(operand, Address):
            parts.append([operand.base])
        elif isinstance(operand, tuple):
            parts.append(list(operand))
        else:
            parts.append([part.strip("! ") for part in operand.split("|")])
    if instruction.name in _WITHOUT_RESULT or not parts:
        return tuple(name for part in parts for name in part), ()
    return tuple(name for part in parts[1:] for name in part), tuple(parts[0])


def _granule(instruction: Instruction) -> int:
    """The smallest place in shared memory that an instruction treats by itself."""
    if instruction.name == "wgmma" or (instruction.name in ("ldmatrix", "stmatrix") and instruction.has("trans")):
        return 2
    if instruction.name in ("ld", "st", "atom", "red") and space_of(instruction) in ("shared", "generic"):
        return min(4, TYPE_BYTES[instruction.type])
    return 4
