"""PTX text as kernels of instructions.

Reads what Triton and nvcc write: entries with their parameters, registers, shared variables, labels and instructions,
each with its line in the text and the source line that the last ``.loc`` named. Functions other than entries, debug
sections and directives that change nothing on a CPU are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Union

__all__ = ["TYPE_BYTES", "Address", "Instruction", "Kernel", "Label", "Module", "Operand", "Parameter", "parse"]

TYPE_BYTES = {
    "pred": 0,
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16", "e4m3x2", "e5m2x2"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32", "s16x2", "u16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
    "b128": 16,
}
"""bytes of a value; predicates are rows of booleans and count as 0"""


class Address(NamedTuple):
    """An operand in brackets."""

    base: str
    """a register or a variable"""
    offset: int


Operand = Union[str, Address, "tuple[str, ...]"]
"""a register, constant or variable; an address; a vector in braces"""


@dataclass(frozen=True)
class Instruction:
    """One instruction, with where it stands."""

    name: str
    """without modifiers: ``ld``"""
    modifiers: tuple[str, ...]
    """``("global", "v4", "b32")``"""
    operands: tuple[Operand, ...]
    guard: str | None
    """the predicate in front of it"""
    guard_negated: bool
    text: str
    line: int
    location: str

    @property
    def type(self) -> str:
        """The last modifier, which is the type of what is computed."""
        return self.modifiers[-1]

    def has(self, modifier: str) -> bool:
        """Whether it has this modifier."""
        return modifier in self.modifiers


class Label(NamedTuple):
    """A place that branches name."""

    name: str


class Parameter(NamedTuple):
    """A parameter of a kernel."""

    name: str
    num_bytes: int
    alignment: int


@dataclass
class Kernel:
    """An entry."""

    name: str
    parameters: list[Parameter]
    registers: dict[str, int] = field(default_factory=dict)
    """name -> bytes of a thread's value, 0 for predicates"""
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    """variable -> bytes, alignment"""
    body: list[Instruction | Label] = field(default_factory=list)


@dataclass
class Module:
    """A PTX file."""

    target: str
    kernels: dict[str, Kernel]
    external_shared: dict[str, int]
    """variable whose size the launch decides -> alignment"""
    constants: list[str]
    """initialised global variables: texts of assertions"""


_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_VARIABLE = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_STATEMENT = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_LABEL = re.compile(r"([$%\w]+):(?!:)")
_ADDRESS = re.compile(r"([%\w$@]+)\s*(?:\+\s*(-?\w+))?")
_NAME = re.compile(r"[%\w$]+")


def parse(text: str) -> Module:
    """Read a PTX file.

    Raises:
        ValueError: the text is not PTX as Triton and nvcc write it; the message quotes the place.
    """
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, flags=re.M))
    code = _without_comments(text)
    target = re.search(r"\.target\s+(\w+)", code)
    if target is None:
        raise ValueError(f"PTX text must name its target, got {text[:60]!r}")
    external = re.findall(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.\w+\s+([\w$]+)\[\];", code)
    constants = re.findall(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]\s*=", code)
    kernels = {}
    position = 0
    while (entry := re.compile(r"\.entry\s+([\w$]+)\s*").search(code, position)) is not None:
        opened = code.index("{", entry.end())
        closed = _closing_brace(code, opened)
        kernel = Kernel(entry[1], [_parameter(item) for item in _entry_parameters(code[entry.end() : opened])])
        _Body(kernel, files).read(code[opened + 1 : closed], code.count("\n", 0, opened) + 1)
        kernels[kernel.name] = kernel
        position = closed
    return Module(target[1], kernels, {name: int(alignment) for alignment, name in external}, constants)


def _without_comments(text: str) -> str:
    """The code alone, with all its line ends, so that lines keep their numbers."""
    text = text[: section.start()] if (section := re.search(r"^\s*\.section", text, flags=re.M)) else text
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _closing_brace(code: str, opened: int) -> int:
    depth = 0
    for brace in re.compile(r"[{}]").finditer(code, opened):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError(f"braces must be balanced, got {code[opened : opened + 60]!r}")


def _entry_parameters(head: str) -> list[str]:
    inside = re.match(r"\(([^)]*)\)", head)
    return [] if inside is None else _split(inside[1])


def _parameter(text: str) -> Parameter:
    match = _PARAMETER.match(text)
    if match is None:
        raise ValueError(f"a parameter must have a type and a name, got {text!r}")
    num_bytes = TYPE_BYTES[match[2]]
    return Parameter(match[3], num_bytes * int(match[4] or 1), int(match[1] or num_bytes))


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


class _Body:
    """Fills a kernel from the text between its braces."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel = kernel
        self.files = files
        self.location = ""
        self.scopes: list[dict[str, str]] = [{}]  # names of inner braces, and what they are called here

    def read(self, text: str, first_line: int) -> None:
        for line, statement in self._statements(text, first_line):
            if statement == "{":
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
            elif statement.endswith(":"):
                self.kernel.body.append(Label(statement[:-1]))
            elif statement.startswith("."):
                self._declare(statement)
            else:
                self.kernel.body.append(self._instruction(statement, line))

    def _statements(self, text: str, first_line: int) -> Iterator[tuple[int, str]]:
        """Statements without their semicolons, labels with their colon, and braces of scopes, with their lines."""
        begun, begun_line = "", first_line
        for number, line in enumerate(text.split("\n"), first_line):
            rest = line.strip()
            if rest.startswith(".loc"):
                self._locate(rest)
                continue
            while rest:
                if not begun:
                    begun_line = number
                    label = _LABEL.match(rest)
                    if rest[0] in "{}" or label is not None:
                        end = 1 if label is None else label.end()
                        yield number, rest[:end]
                        rest = rest[end:].lstrip()
                        continue
                part, semicolon, rest = rest.partition(";")
                begun += part + " "
                rest = rest.lstrip()
                if semicolon:
                    if begun.strip():
                        yield begun_line, " ".join(begun.split())
                    begun = ""

    def _locate(self, directive: str) -> None:
        _, file, line, *_ = directive.replace(",", " ").split()
        self.location = f"{self.files.get(file, file)}:{line}"

    def _declare(self, statement: str) -> None:
        if (match := _REGISTERS.match(statement)) is not None:
            for item in _split(match[2]):
                self._declare_registers(item, TYPE_BYTES[match[1]])
        elif (match := _VARIABLE.match(statement)) is not None:
            if match[1] == "local":
                raise ValueError(f"{self.kernel.name}: local memory is not emulated, got {statement!r}")
            num_bytes = TYPE_BYTES[match[3]]
            self.kernel.shared[match[4]] = (num_bytes * int(match[5] or 1), int(match[2] or num_bytes))

    def _declare_registers(self, item: str, num_bytes: int) -> None:
        if (family := re.fullmatch(r"([%\w$]+)<(\d+)>", item)) is not None:
            names = [f"{family[1]}{number}" for number in range(int(family[2]))]
        else:
            names = [item]
        for name in names:
            unique = name
            if len(self.scopes) > 1:
                unique = f"{name}@{len(self.kernel.registers)}"
                self.scopes[-1][name] = unique
            self.kernel.registers[unique] = num_bytes

    def _instruction(self, statement: str, line: int) -> Instruction:
        match = _STATEMENT.fullmatch(statement)
        if match is None:
            raise ValueError(f"{self.kernel.name}: line {line} must be an instruction, got {statement!r}")
        name, *modifiers = match[3].split(".")
        guard = None if match[2] is None else self._renamed(match[2])
        operands = tuple(self._operand(self._renamed(item)) for item in _split(match[4]))
        return Instruction(
            name, tuple(modifiers), operands, guard, match[1] == "!", statement, line, self.location
        )  # fmt: skip

    def _renamed(self, text: str) -> str:
        if len(self.scopes) == 1:
            return text

        def unique(name: re.Match[str]) -> str:
            return next((scope[name[0]] for scope in reversed(self.scopes) if name[0] in scope), name[0])

        return _NAME.sub(unique, text)

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return tuple(_split(text[1:-1]))
        if text[0] != "[":
            return text
        match = _ADDRESS.fullmatch(text[1:-1].strip())
        if match is None:
            raise ValueError(f"{self.kernel.name}: an address must be a base and an offset, got {text!r}")
        return Address(match[1], int(match[2], 0) if match[2] else 0)
