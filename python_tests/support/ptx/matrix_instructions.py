"""Matrix instructions of warps and warp groups."""

from __future__ import annotations

import re

from support.ptx.parser import Instruction
from support.ptx.report import UnsupportedError
from support.ptx.translation import Translator, text_of, translates

__all__ = ["registers_of_products"]

_SHAPES = {
    ("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "f16"),
    ("m16n8k8", "tf32"), ("m16n8k4", "tf32"),
}  # fmt: skip


def registers_of_products(instructions: list[Instruction]) -> frozenset[str]:
    """Registers that some wgmma of a kernel adds to or takes its left operand from."""
    registers: set[str] = set()
    for ins in instructions:
        if ins.name == "wgmma" and ins.has("mma_async"):
            for operand in ins.operands[:2]:
                registers |= set(operand) if isinstance(operand, tuple) else set()
    return frozenset(registers)


def _count(ins: Instruction) -> int:
    return int(next(m[1:] for m in ins.modifiers if re.fullmatch(r"x[124]", m)))


@translates("ldmatrix")
def _load_matrices(t: Translator, ins: Instruction) -> None:
    targets = t.vector(ins.operands[0])
    where = t.address(ins.operands[1], False)
    t.line(f"C.require_warps({t.site}, FULL_WARP, {t.mask})")
    t.line(f"loaded = C.load_matrices({t.site}, {where}, {_count(ins)}, {ins.has('trans')}, {t.mask})")
    for number, target in enumerate(targets):
        t.write(target, "u32", f"loaded[{number}]")


@translates("stmatrix")
def _store_matrices(t: Translator, ins: Instruction) -> None:
    where = t.address(ins.operands[0], False)
    values = ", ".join(t.spread(source, "u32") for source in t.vector(ins.operands[1]))
    t.line(f"C.require_warps({t.site}, FULL_WARP, {t.mask})")
    t.line(f"C.store_matrices({t.site}, {where}, [{values}], {ins.has('trans')}, {t.mask})")


@translates("mma")
def _multiply(t: Translator, ins: Instruction) -> None:
    shape, types = ins.modifiers[2], ins.modifiers[-4:]
    if (shape, types[1]) not in _SHAPES or types[0] != "f32" or types[2] != types[1] or types[3] != "f32":
        raise UnsupportedError(ins.text)
    a, b, accumulators = (
        ", ".join(t.spread(source, type_) for source in t.vector(operand))
        for operand, type_ in zip(ins.operands[1:], ("u32", "u32", "f32"))
    )
    t.line(f"C.require_warps({t.site}, FULL_WARP, {t.mask})")
    t.line(f"product = C.multiply([{a}], [{b}], [{accumulators}], {types[1]!r})")
    for number, target in enumerate(t.vector(ins.operands[0])):
        t.write(target, "f32", f"product[{number}]")


@translates("wgmma")
def _multiply_in_group(t: Translator, ins: Instruction) -> None:
    if ins.has("fence"):
        t.line("C.products.unfenced.clear()")
        return
    if ins.has("commit_group"):
        t.line(f"C.commit_products({t.mask})")
        return
    if ins.has("wait_group"):
        t.line(f"C.wait_for_products({int(text_of(ins.operands[0]), 0)}, {t.mask})")
        return
    shape = re.fullmatch(r"m64n(\d+)k16", ins.modifiers[3])
    accumulators, left, right, adds, scale_left, scale_right, *transposed = ins.operands
    if shape is None or ins.modifiers[4] != "f32" or ins.type not in ("bf16", "f16"):
        raise UnsupportedError(ins.text)
    if (scale_left, scale_right) != ("1", "1"):
        raise UnsupportedError(ins.text)
    flags = [text_of(flag) == "1" for flag in transposed]
    if isinstance(left, tuple):
        operand = f"[{', '.join(t.spread(source, 'u32') for source in left)}]"
        sources: tuple[str, ...] = left
        flags = [False, *flags]
    else:
        operand, sources = t.read(left, "u64"), ()
    registers = t.vector(accumulators)
    rows = ", ".join(t.read(register, "f32") for register in registers)
    t.line(
        f"product = C.multiply_in_groups({t.site}, [{rows}], {operand}, {t.read(right, 'u64')}, "
        f"{t.read(adds, 'pred')}, {int(shape[1])}, {ins.type!r}, {tuple(flags)}, {registers!r}, {sources!r}, {t.mask})"
    )
    for number, register in enumerate(registers):
        t.write(register, "f32", f"product[{number}]")
