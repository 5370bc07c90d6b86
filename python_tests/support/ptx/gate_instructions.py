"""mbarrier, and the copies that tell one: the lines call the block, which knows its gates."""

from __future__ import annotations

from support.ptx.parser import Instruction
from support.ptx.report import UnsupportedError
from support.ptx.translation import Translator, translates

__all__ = ["translate_gate_copy", "uses_gate"]

_ARRIVALS = {"arrive", "expect_tx", "noinc", "shared", "shared::cta", "b64", "release", "relaxed", "cta"}
_TESTS = {"test_wait", "try_wait", "parity", "shared", "shared::cta", "b64", "acquire", "cta"}
_BULK = {"async", "bulk", "shared::cluster", "shared::cta", "global", "mbarrier::complete_tx::bytes"}


def uses_gate(ins: Instruction) -> bool:
    """Whether an instruction has to do with an mbarrier."""
    return ins.name == "mbarrier" or (ins.name == "cp" and (ins.has("mbarrier") or ins.has("bulk")))


def _require(ins: Instruction, known: set[str]) -> None:
    if not set(ins.modifiers) <= known:
        raise UnsupportedError(f"line {ins.line}: {ins.text}")


@translates("mbarrier")
def _gate(t: Translator, ins: Instruction) -> None:
    what = ins.modifiers[0]
    if what in ("init", "inval"):
        _require(ins, {what, "shared", "shared::cta", "b64"})
        address, *counts = ins.operands
        values = [t.address(address, False), *(t.read(count, "u32") for count in counts)]
        t.line(f"C.{'set_gate_up' if what == 'init' else 'take_gate_down'}({t.site}, {', '.join(values)}, {t.mask})")
    elif what in ("arrive", "expect_tx"):
        _arrive(t, ins)
    elif what in ("test_wait", "try_wait"):
        _require(ins, _TESTS)
        target, address, phase = ins.operands[:3]  # behind them may be how long a thread would like to sleep
        phases = t.read(phase, "u32" if ins.has("parity") else "u64")
        t.line(f"ended = C.test_gate({t.site}, {t.address(address, False)}, {phases}, {ins.has('parity')}, {t.mask})")
        t.write(target, "pred", "ended")
    else:
        raise UnsupportedError(f"line {ins.line}: {ins.text}")


def _arrive(t: Translator, ins: Instruction) -> None:
    _require(ins, _ARRIVALS - {"noinc"})
    arrives, expects = ins.has("arrive"), ins.has("expect_tx")
    if ins.has("relaxed") == arrives and (arrives or ins.has("release")):
        raise UnsupportedError(f"line {ins.line}: {ins.text}")
    target, address, *number = ins.operands if arrives else ("_", *ins.operands)
    amount = t.read(number[0], "u32") if number else t.integer(1, "u32")
    one, none = t.integer(int(arrives), "u32"), t.integer(0, "u32")
    counts, num_bytes = (one, amount) if expects else (amount, none)
    t.line(
        f"phases = C.arrive_at_gate({t.site}, {t.address(address, False)}, {counts}, {num_bytes}, {arrives}, {t.mask})"
    )
    t.write(target, "u64", "phases")


def translate_gate_copy(t: Translator, ins: Instruction) -> None:
    """cp.async.bulk from global to shared memory, and cp.async.mbarrier.arrive."""
    if ins.has("mbarrier"):
        _require(ins, _ARRIVALS | {"async", "mbarrier"})
        t.line(f"C.announce_copies({t.site}, {t.address(ins.operands[0], False)}, {not ins.has('noinc')}, {t.mask})")
        return
    _require(ins, _BULK)
    if len(ins.operands) != 4:
        raise UnsupportedError(f"line {ins.line}: {ins.text}")
    target, source, size, gate = ins.operands
    t.line(
        f"C.copy_in_bulk({t.site}, {t.address(target, False)}, {t.address(source, True)}, {t.read(size, 'u32')}, "
        f"{t.address(gate, False)}, {t.mask})"
    )
