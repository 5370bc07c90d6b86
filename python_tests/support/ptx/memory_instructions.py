"""Loads, stores, atomics, copies, fences: the lines call the block, which knows the memories."""

from __future__ import annotations

import numpy as np
from support.ptx.gate_instructions import translate_gate_copy, uses_gate
from support.ptx.parser import TYPE_BYTES, Address, Instruction
from support.ptx.report import UnsupportedError
from support.ptx.translation import KINDS, Translator, text_of, translates

__all__ = ["is_strong", "semantics_of", "space_of"]

_SEMANTICS = ("acq_rel", "acquire", "release", "sc", "relaxed", "volatile")
_SPACES = ("global", "shared", "generic")
_ATOMICS = ("add", "max", "min", "exch", "and", "or", "xor", "inc", "dec", "cas")


def space_of(ins: Instruction) -> str:
    """The memory of an access; "generic" of one that names none."""
    for modifier in ins.modifiers:
        space = modifier.split("::")[0]
        if space in ("global", "shared", "local", "param", "const"):
            return space
    return "generic"


def semantics_of(ins: Instruction) -> str | None:
    """How a load, store or atomic takes part in the order of blocks; None for one that does not."""
    named = next((modifier for modifier in ins.modifiers if modifier in _SEMANTICS), None)
    if named == "volatile" or (named is None and ins.name in ("atom", "red")):
        return "relaxed"
    return named


def is_strong(ins: Instruction) -> bool:
    """Whether other blocks may run between the instruction before it and the one behind it."""
    if ins.name in ("atom", "red", "membar"):
        return True
    if ins.name == "fence":
        return not ins.has("proxy")
    return ins.name in ("ld", "st") and semantics_of(ins) is not None


@translates("ld")
def _load(t: Translator, ins: Instruction) -> None:
    space, num_bytes = space_of(ins), TYPE_BYTES[ins.type]
    targets = t.vector(ins.operands[0])
    address = ins.operands[1]
    kind = np.dtype(KINDS[ins.type])
    if space == "param":
        assert isinstance(address, Address)
        if address.base not in t.layout.parameters:  # its place is computed
            place = t.address(address, True)
            t.line(f"loaded = C.load_parameters({t.site}, {place}, {num_bytes}, {len(targets)}, {t.mask})")
            _put(t, ins, targets)
            return
        start = t.layout.parameters[address.base][0] + address.offset
        for number, target in enumerate(targets):
            place = start + number * num_bytes
            t.write(target, ins.type, f"PARAMETERS[{place}:{place + num_bytes}].view(T_{kind.name})[0]")
        return
    if space not in _SPACES:
        raise UnsupportedError(ins.text)
    where = t.address(address, space != "shared")
    t.line(f"loaded = C.load_{space}({t.site}, {where}, {num_bytes}, {len(targets)}, {t.mask})")
    _put(t, ins, targets)


def _put(t: Translator, ins: Instruction, targets: tuple[str, ...]) -> None:
    """Registers get what has been loaded."""
    kind = np.dtype(KINDS[ins.type])
    for number, target in enumerate(targets):
        value = f"loaded[{number}]"
        t.write(target, ins.type, value if kind.kind == "u" else f"{value}.view(T_{kind.name})")


@translates("st")
def _store(t: Translator, ins: Instruction) -> None:
    space, num_bytes = space_of(ins), TYPE_BYTES[ins.type]
    if space == "param":  # an argument of __assertfail
        return
    if space not in _SPACES:
        raise UnsupportedError(ins.text)
    word = f"u{num_bytes * 8}" if num_bytes > 1 else "b8"
    values = ", ".join(t.read(source, word) for source in t.vector(ins.operands[1]))
    where = t.address(ins.operands[0], space != "shared")
    t.line(f"C.store_{space}({t.site}, {where}, {num_bytes}, [{values}], {t.mask})")


@translates("atom", "red")
def _atomic(t: Translator, ins: Instruction) -> None:
    space = space_of(ins)
    operation = next(modifier for modifier in ins.modifiers if modifier in _ATOMICS)
    returns = ins.name == "atom"
    address, *sources = ins.operands[1 if returns else 0 :]
    if ins.type not in ("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64") or space not in _SPACES:
        raise UnsupportedError(ins.text)
    values = ", ".join(t.read(source, ins.type) for source in sources)
    where = t.address(address, space != "shared")
    kind = np.dtype(KINDS[ins.type]).name
    t.line(f"before = C.atomic_{space}({t.site}, {where}, {operation!r}, T_{kind}, [{values}], {t.mask})")
    if returns:
        t.write(ins.operands[0], ins.type, f"before.view(T_{kind})")


@translates("fence", "membar")
def _fence(t: Translator, ins: Instruction) -> None:
    t.line(f"C.{'proxy_fence' if ins.has('proxy') else 'fence'}({t.mask})")


@translates("cp")
def _copy(t: Translator, ins: Instruction) -> None:
    if ins.modifiers[0] != "async":
        raise UnsupportedError(ins.text)
    if uses_gate(ins):
        translate_gate_copy(t, ins)
    elif ins.has("commit_group"):
        t.line(f"C.commit_copies({t.mask})")
    elif ins.has("wait_group"):
        t.line(f"C.wait_for_copies({int(text_of(ins.operands[0]), 0)}, {t.mask})")
    elif ins.has("wait_all"):
        t.line(f"C.commit_copies({t.mask})")
        t.line(f"C.wait_for_copies(0, {t.mask})")
    else:
        target, source, size, *rest = ins.operands
        num_bytes = int(text_of(size), 0)
        source_bytes = t.read(rest[0], "u32") if rest else t.integer(num_bytes, "u32")
        addresses = f"{t.address(target, False)}, {t.address(source, True)}"
        t.line(f"C.copy({t.site}, {addresses}, {num_bytes}, {source_bytes}, {t.mask})")


@translates("prefetch", "discard", "applypriority", "nanosleep", "griddepcontrol")
def _nothing(t: Translator, ins: Instruction) -> None:
    """Changes nothing that a program could see."""


@translates("call")
def _call(t: Translator, ins: Instruction) -> None:
    if "__assertfail" not in ins.text:
        raise UnsupportedError(ins.text)
    t.line(f"C.assertion_failed({t.site}, {t.mask})")
