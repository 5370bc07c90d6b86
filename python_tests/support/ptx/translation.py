"""Instructions as lines of Python on rows of numbers.

Every register is a row, an element a thread. An instruction becomes a few lines that compute a row and put it in place
where the thread mask holds. Each piece of a kernel is translated at most twice: for all threads, without masks, and for
some. The modules of instructions register what they translate with `translates`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from support.ptx import numerics
from support.ptx.parser import TYPE_BYTES, Address, Instruction, Kernel, Module, Operand
from support.ptx.report import UnsupportedError

__all__ = ["KINDS", "PLAIN_NAMES", "SHARED_WINDOW", "Layout", "Translator", "text_of", "translates"]

KINDS: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "tf32": np.uint32, "e4m3x2": np.uint16,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
"""type -> NumPy's type that carries it"""

SHARED_WINDOW = 1 << 60
"""the generic address of shared memory's first byte; others are those of global memory"""

_LETTERS = {
    "bool": "P", "uint8": "B", "uint16": "H", "int16": "I", "float16": "E", "uint32": "U", "int32": "S", "float32": "F",
    "uint64": "L", "int64": "J", "float64": "D",
}  # fmt: skip
"""NumPy's type -> first letter of a row's name"""

_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_HEX_FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])|%(laneid|warpid)")

PLAIN_NAMES: dict[str, Any] = {
    "np": np,
    **{f"T_{np.dtype(kind).name}": kind for kind in {*KINDS.values(), np.uint8, np.int8}},
    **{name: getattr(numerics, name) for name in numerics.__all__},
}
"""what translated lines may name besides rows, constants and the block"""

_TRANSLATIONS: dict[str, Callable[[Translator, Instruction], None]] = {}


def translates(*names: str) -> Callable[[Callable[[Translator, Instruction], None]], Any]:
    """Register a function that translates the instructions of these names."""

    def register(function: Callable[[Translator, Instruction], None]) -> Callable[[Translator, Instruction], None]:
        for name in names:
            _TRANSLATIONS[name] = function
        return function

    return register


def text_of(operand: Operand) -> str:
    """An operand that must be a register, constant or variable."""
    if not isinstance(operand, str):
        raise UnsupportedError(f"operand {operand}")
    return operand


class Layout:
    """Where a kernel's registers, parameters and shared variables lie.

    Attributes:
        registers: name -> bytes of a value (0: predicate), number among those of its size.
        counts: bytes -> registers of that size.
        shared: variable -> address in shared memory.
        static_shared_bytes: of the variables whose size the kernel decides.
        parameters: name -> offset, bytes.
    """

    def __init__(self, module: Module, kernel: Kernel) -> None:
        self.registers: dict[str, tuple[int, int]] = {}
        self.counts = dict.fromkeys((0, 1, 2, 4, 8), 0)
        for name, num_bytes in kernel.registers.items():
            self.registers[name] = (num_bytes, self.counts[num_bytes])
            self.counts[num_bytes] += 1
        self.shared: dict[str, int] = {}
        end = 0
        for name, (num_bytes, alignment) in kernel.shared.items():
            self.shared[name] = -(-end // alignment) * alignment
            end = self.shared[name] + num_bytes
        self.static_shared_bytes = end
        for name, alignment in module.external_shared.items():
            self.shared[name] = -(-end // alignment) * alignment
        self.parameters: dict[str, tuple[int, int]] = {}
        end = 0
        for parameter in kernel.parameters:
            start = -(-end // parameter.alignment) * parameter.alignment
            self.parameters[parameter.name] = (start, parameter.num_bytes)
            end = start + parameter.num_bytes
        self.parameter_bytes = end
        self.texts = frozenset(module.constants)


class Translator:
    """Collects the lines of one piece of a kernel.

    Attributes:
        lines: what has been translated.
        rows: (letter, number) of rows that the lines name.
        constants: name -> value, shared by all pieces of a kernel.
        mask: what holds where the current instruction runs: "True", "w" or "g".
        site: number of the current instruction.
    """

    def __init__(self, layout: Layout, constants: dict[str, Any], masked: bool) -> None:
        self.layout = layout
        self.lines: list[str] = []
        self.rows: set[tuple[str, int]] = set()
        self.constants = constants
        self.masked = masked
        self.mask = "True"
        self.site = 0

    def translate(self, instruction: Instruction, site: int) -> None:
        """Append the lines of an instruction.

        Raises:
            UnsupportedError: nobody translates it, or not in this form.
        """
        self.site = site
        self.mask = "w" if self.masked else "True"
        if instruction.guard is not None:
            guard = ("~" if instruction.guard_negated else "") + self.row(instruction.guard, "pred")
            self.line(f"g = w & {guard}" if self.masked else f"g = {guard}")
            self.mask = "g"
        try:
            _TRANSLATIONS[instruction.name](self, instruction)
        except (KeyError, IndexError, StopIteration, ValueError) as error:
            raise UnsupportedError(f"line {instruction.line}: {instruction.text} ({error!r})") from error

    def line(self, text: str) -> None:
        """Append a line."""
        self.lines.append(text)

    # operands ---------------------------------------------------------------------------------------------------------

    def row(self, register: str, type_: str) -> str:
        """A register as a type of its own width."""
        _, number = self.layout.registers[register]
        letter = "P" if type_ == "pred" else _LETTERS[np.dtype(KINDS[type_]).name]
        self.rows.add((letter, number))
        return f"{letter}{number}"

    def constant(self, value: np.generic) -> str:
        """The name of a NumPy scalar."""
        name = f"K_{value.dtype.name}_{value.tobytes().hex()}"
        self.constants[name] = value
        return name

    def constant_for(self, what: str, key: tuple[str, ...], value: np.ndarray) -> str:
        """The name of an array that all instructions of this key share."""
        name = "_".join(["K", what, *key])
        self.constants.setdefault(name, value)
        return name

    def integer(self, value: int, type_: str) -> str:
        """A constant of a type, cut to its width."""
        bits = np.dtype(KINDS[type_]).itemsize * 8
        word = np.array(value & ((1 << bits) - 1), f"u{bits // 8}")
        return self.constant(word.view(KINDS[type_])[()])

    def read(self, operand: Operand, type_: str) -> str:
        """An expression for the value of an operand as a type; the low part of a wider register."""
        name = text_of(operand)
        if type_ == "pred":
            return self._read_predicate(name)
        num_bytes = TYPE_BYTES[type_]
        if name in self.layout.registers:
            stored = self.layout.registers[name][0]
            if stored == num_bytes and num_bytes > 1:
                return self.row(name, type_)
            if stored < num_bytes:
                raise ValueError(f"{name} is narrower than {type_}")
            kind = np.dtype(KINDS[type_])
            low = f"{self.row(name, f'u{stored * 8}' if stored > 1 else 'b8')}.astype(T_uint{num_bytes * 8})"
            return low if kind.kind == "u" else f"{low}.view(T_{kind.name})"
        if (special := _SPECIAL.fullmatch(name)) is not None:
            value = f"{special[1]}_{special[2]}" if special[1] else special[3]
            return value if num_bytes == 4 else f"{value}.astype(T_{np.dtype(KINDS[type_]).name})"
        if _HEX_FLOAT.fullmatch(name):
            word = np.array(int(name[2:], 16), np.uint32 if len(name) == 10 else np.uint64)
            return self.constant(word.view(KINDS[type_])[()])
        if _INTEGER.fullmatch(name):
            return self.integer(int(name.rstrip("U"), 0), type_)
        if name in self.layout.shared:
            return self.integer(self.layout.shared[name], type_)
        if name in self.layout.parameters:
            return self.integer(self.layout.parameters[name][0], type_)  # its place among them
        if name in self.layout.texts:
            return self.integer(0, type_)  # the text of an assertion, which nobody reads
        raise UnsupportedError(f"operand {name} of type {type_}")

    def _read_predicate(self, name: str) -> str:
        if name in ("0", "1", "-1"):
            return "np.False_" if name == "0" else "np.True_"
        return f"~{self.row(name[1:], 'pred')}" if name[0] == "!" else self.row(name, "pred")

    def spread(self, operand: Operand, type_: str) -> str:
        """The same, as a row even where all threads have one number."""
        value = self.read(operand, type_)
        return value if operand in self.layout.registers else f"np.broadcast_to({value}, C.num_threads)"

    def vector(self, operand: Operand) -> tuple[str, ...]:
        """The registers of a vector operand; one alone makes one."""
        return operand if isinstance(operand, tuple) else (text_of(operand),)

    def address(self, operand: Operand, wide: bool) -> str:
        """An expression for a row of addresses, uint64 of global or uint32 of shared memory."""
        if not isinstance(operand, Address):
            raise UnsupportedError(f"address {operand}")
        type_ = "u64" if wide else "u32"
        base = self.read(operand.base, type_)
        return base if not operand.offset else f"{base} + {self.integer(operand.offset, type_)}"

    # results ----------------------------------------------------------------------------------------------------------

    def write(self, register: Operand, type_: str, value: str) -> None:
        """Put a value into a register; into a wider one extended by its type's sign."""
        name = text_of(register)
        if name == "_":
            return
        stored = self.layout.registers[name][0]
        if type_ != "pred" and stored > TYPE_BYTES[type_]:
            type_ = f"{'s' if type_[0] == 's' else 'u'}{stored * 8}"
        row = self.row(name, type_)
        if self.mask == "True":
            self.line(f"{row}[...] = {value}")
        else:
            self.line(f"np.copyto({row}, {value}, where={self.mask}, casting='unsafe')")

    def function(self, name: str, register: Operand, type_: str, *values: str, wide: Any = None) -> None:
        """Put what one of NumPy's functions computes straight into a register; `wide`: compute in this type."""
        row = self.row(text_of(register), type_)
        options = "" if self.mask == "True" else f", where={self.mask}"
        if wide is not None:
            options += f", dtype=T_{np.dtype(wide).name}"
        # In third place the result costs less than by name, which NumPy wants for these two.
        out = f"out={row}" if name in ("np.minimum", "np.maximum") else row
        self.line(f"{name}({', '.join(values)}, {out}{options})")
