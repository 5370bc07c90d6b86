"""Instructions that each thread does for itself, on its registers: arithmetic, comparisons, conversions, moves."""

from __future__ import annotations

import numpy as np
from support.ptx.parser import TYPE_BYTES, Instruction, Operand
from support.ptx.report import UnsupportedError
from support.ptx.translation import KINDS, SHARED_WINDOW, Translator, text_of, translates

__all__: list[str] = []

_PACKED = {"f16x2": "half", "bf16x2": "bfloat16"}
_SHORT = {"f16": "half", "bf16": "bfloat16"}
_ROUNDINGS = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def _is_float(type_: str) -> bool:
    return type_[0] == "f" or type_.startswith("bf")


# arithmetic -----------------------------------------------------------------------------------------------------------


def _arithmetic(t: Translator, ins: Instruction, name: str) -> None:
    """An operation of NumPy's that means the same in PTX."""
    target, *sources = ins.operands
    if ins.type in _PACKED or ins.type in _SHORT:
        _half_precision(t, ins, name)
    elif ins.type in ("s16x2", "u16x2"):
        kind = "int16" if ins.type[0] == "s" else "uint16"
        rows = [f"np.ascontiguousarray({t.spread(source, 'u32')}).view(T_{kind})" for source in sources]
        t.write(target, "u32", f"{name}({', '.join(rows)}).view(T_uint32)")
    elif ins.has("sat"):
        raise UnsupportedError(ins.text)
    elif ins.has("ftz"):
        flushed = ", ".join(f"flush({t.read(source, ins.type)})" for source in sources)
        t.write(target, ins.type, f"flush({name}({flushed}))")
    else:
        t.function(name, target, ins.type, *(t.read(source, ins.type) for source in sources))


def _half_precision(t: Translator, ins: Instruction, name: str) -> None:
    target, *sources = ins.operands
    kind = _PACKED.get(ins.type) or _SHORT[ins.type]
    if ins.type in _PACKED:
        pairs = (f"float_from_{kind}(halves({t.read(source, 'u32')}, C.num_threads))" for source in sources)
        t.write(target, "u32", f"packed({kind}_from_float({name}({', '.join(pairs)})))")
    else:
        numbers = (f"float_from_{kind}({t.read(source, 'u16')})" for source in sources)
        t.write(target, "u16", f"{kind}_from_float({name}({', '.join(numbers)}))")


@translates("add", "sub")
def _sum(t: Translator, ins: Instruction) -> None:
    _arithmetic(t, ins, {"add": "np.add", "sub": "np.subtract"}[ins.name])


@translates("min", "max")
def _extremum(t: Translator, ins: Instruction) -> None:
    if ins.has("relu"):
        if ins.name != "min" or ins.type != "s32":
            raise UnsupportedError(ins.text)
        t.write(
            ins.operands[0], "s32", f"min_relu({t.spread(ins.operands[1], 's32')}, {t.read(ins.operands[2], 's32')})"
        )
        return
    ignores_nan = _is_float(ins.type) and not ins.has("NaN")
    names = {"min": ("np.minimum", "np.fmin"), "max": ("np.maximum", "np.fmax")}
    _arithmetic(t, ins, names[ins.name][ignores_nan])


@translates("and", "or", "xor", "not")
def _logic(t: Translator, ins: Instruction) -> None:
    name = {"and": "np.bitwise_and", "or": "np.bitwise_or", "xor": "np.bitwise_xor", "not": "np.invert"}[ins.name]
    t.function(name, ins.operands[0], ins.type, *(t.read(source, ins.type) for source in ins.operands[1:]))


@translates("neg", "abs")
def _sign(t: Translator, ins: Instruction) -> None:
    target, source = ins.operands
    bits = {"f16x2": 0x80008000, "bf16x2": 0x80008000, "f16": 0x8000, "bf16": 0x8000}.get(ins.type)
    if bits is None:
        t.function({"neg": "np.negative", "abs": "np.abs"}[ins.name], target, ins.type, t.read(source, ins.type))
        return
    word = "u32" if ins.type in _PACKED else "u16"
    if ins.name == "neg":
        t.write(target, word, f"{t.read(source, word)} ^ {t.integer(bits, word)}")
    else:
        t.write(target, word, f"{t.read(source, word)} & {t.integer(~bits, word)}")


def _twice(type_: str) -> str:
    return f"{type_[0]}{2 * int(type_[1:])}"


@translates("mul")
def _product(t: Translator, ins: Instruction) -> None:
    target, left, right = ins.operands
    values = [t.read(source, ins.type) for source in (left, right)] if ins.type in KINDS else []
    if _is_float(ins.type):
        _arithmetic(t, ins, "np.multiply")
    elif ins.has("wide"):
        wide = _twice(ins.type)
        t.function("np.multiply", target, wide, *values, wide=KINDS[wide])
    elif ins.has("hi"):
        wide = "None" if ins.type.endswith("64") else f"T_{np.dtype(KINDS[_twice(ins.type)]).name}"
        t.write(target, ins.type, f"high_product({values[0]}, {values[1]}, {wide})")
    else:
        t.function("np.multiply", target, ins.type, *values)


@translates("mad")
def _product_and_sum(t: Translator, ins: Instruction) -> None:
    if _is_float(ins.type):
        _fused(t, ins)
        return
    if ins.has("hi"):
        raise UnsupportedError(ins.text)
    target, left, right, addend = ins.operands
    values = f"{t.read(left, ins.type)}, {t.read(right, ins.type)}"
    if ins.has("wide"):
        wide = _twice(ins.type)
        product = f"np.multiply({values}, dtype=T_{np.dtype(KINDS[wide]).name})"
        t.function("np.add", target, wide, product, t.read(addend, wide))
    else:
        t.function("np.add", target, ins.type, f"np.multiply({values})", t.read(addend, ins.type))


@translates("fma")
def _fused(t: Translator, ins: Instruction) -> None:
    target, *sources = ins.operands
    if ins.type in _PACKED or ins.type in _SHORT:
        _half_precision(t, ins, "exact_fma")
    elif ins.type == "f32" and len([m for m in ins.modifiers if m in TYPE_BYTES]) == 1 and not ins.has("sat"):
        values = [t.read(source, "f32") for source in sources]
        if ins.has("ftz"):
            t.write(target, "f32", f"flush(fused({', '.join(f'flush({value})' for value in values)}))")
        else:
            t.write(target, "f32", f"fused({', '.join(values)})")
    else:
        raise UnsupportedError(ins.text)


@translates("div", "rem")
def _division(t: Translator, ins: Instruction) -> None:
    target, left, right = ins.operands
    values = f"{t.read(left, ins.type)}, {t.read(right, ins.type)}"
    if not _is_float(ins.type):
        t.write(target, ins.type, f"{'divide' if ins.name == 'div' else 'remainder'}({values})")
    elif ins.has("full") or ins.has("approx"):
        t.write(target, "f32", f"Approximation.quotient({values})")
    else:
        t.function("np.divide", target, ins.type, values)


@translates("rcp", "sqrt", "rsqrt", "ex2", "lg2", "tanh")
def _elementary(t: Translator, ins: Instruction) -> None:
    target, source = ins.operands
    if ins.type not in ("f32", "f64"):
        raise UnsupportedError(ins.text)
    value = t.read(source, ins.type)
    if ins.name in ("ex2", "lg2"):
        name = {"ex2": "power_of_two", "lg2": "logarithm"}[ins.name]
        t.write(target, "f32", f"Approximation.{name}({value}, {ins.has('ftz')})")
    elif ins.has("approx"):
        name = {"rcp": "reciprocal", "sqrt": "root", "rsqrt": "reciprocal_root", "tanh": "tangent"}[ins.name]
        t.write(target, "f32", f"Approximation.{name}({value})")
    else:
        exact = {"rcp": f"{t.constant(KINDS[ins.type](1))} / {value}", "sqrt": f"np.sqrt({value})"}[ins.name]
        t.write(target, ins.type, exact)


# bits -----------------------------------------------------------------------------------------------------------------


@translates("shl", "shr")
def _shift(t: Translator, ins: Instruction) -> None:
    target, source, amount = ins.operands
    bits = int(ins.type[1:])
    type_ = ins.type if ins.type[0] == "s" and ins.name == "shr" else f"u{bits}"
    if text_of(amount).isdigit() and int(text_of(amount)) < bits:
        name = {"shl": "np.left_shift", "shr": "np.right_shift"}[ins.name]
        t.function(name, target, type_, t.read(source, type_), t.integer(int(text_of(amount)), type_))
    else:
        name = {"shl": "shift_left", "shr": "shift_right"}[ins.name]
        t.write(target, type_, f"{name}({t.read(source, type_)}, {t.read(amount, 'u32')})")


@translates("shf")
def _funnel_shift(t: Translator, ins: Instruction) -> None:
    target, *sources = ins.operands
    values = ", ".join(t.read(source, "u32") for source in sources)
    t.write(target, "u32", f"funnel_shift({values}, {ins.has('r')}, {ins.has('wrap')})")


@translates("bfe", "bfi")
def _bit_field(t: Translator, ins: Instruction) -> None:
    type_ = f"u{ins.type[1:]}"
    target, *sources = ins.operands
    count = 1 if ins.name == "bfe" else 2
    values = [t.read(source, type_) for source in sources[:count]]
    values += [t.read(source, "u32") for source in sources[count:]]
    if ins.name == "bfe":
        t.write(target, type_, f"bit_field({', '.join(values)}, {ins.type[0] == 's'})")
    else:
        t.write(target, type_, f"insert_bits({', '.join(values)})")


@translates("prmt", "lop3", "brev")
def _rearrangement(t: Translator, ins: Instruction) -> None:
    target, *sources = ins.operands
    if ins.modifiers != ("b32",):
        raise UnsupportedError(ins.text)
    name = {"prmt": "permute_bytes", "lop3": "logic3", "brev": "bit_reverse"}[ins.name]
    values = [t.read(source, "u32") for source in sources[:3]]
    if ins.name == "lop3":
        values.append(str(int(text_of(sources[3]), 0)))
    t.write(target, "u32", f"{name}({', '.join(values)})")


@translates("popc", "clz")
def _count_bits(t: Translator, ins: Instruction) -> None:
    name = {"popc": "np.bitwise_count", "clz": "count_leading_zeros"}[ins.name]
    t.write(ins.operands[0], "u32", f"{name}({t.read(ins.operands[1], 'u' + ins.type[1:])})")


# choices --------------------------------------------------------------------------------------------------------------

_COMPARISONS = {
    "eq": "np.equal", "ne": "np.not_equal", "lt": "np.less", "le": "np.less_equal", "gt": "np.greater",
    "ge": "np.greater_equal", "lo": "np.less", "ls": "np.less_equal", "hi": "np.greater", "hs": "np.greater_equal",
}  # fmt: skip
_OPPOSITES = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # true for NaN as well


@translates("setp")
def _compare(t: Translator, ins: Instruction) -> None:
    comparison = ins.modifiers[0]
    combined = next((m for m in ins.modifiers[1:-1] if m in ("and", "or", "xor")), None)
    target, left, right, *others = ins.operands
    if "|" in text_of(target):
        raise UnsupportedError(ins.text)
    values = _comparable(t, ins.type, comparison, left, right)
    if combined is None and (not _is_float(ins.type) or comparison != "ne") and comparison in _COMPARISONS:
        t.function(_COMPARISONS[comparison], target, "pred", *values)
        return
    result = _comparison(comparison, *values, _is_float(ins.type))
    if combined is not None:
        sign = {"and": "&", "or": "|", "xor": "^"}[combined]
        result = f"({result}) {sign} {t.read(others[0], 'pred')}"
    t.write(target, "pred", result)


def _comparable(t: Translator, type_: str, comparison: str, left: Operand, right: Operand) -> tuple[str, str]:
    if type_ in _SHORT:
        one, other = (f"float_from_{_SHORT[type_]}({t.read(operand, 'u16')})" for operand in (left, right))
        return one, other
    if comparison in ("lo", "ls", "hi", "hs"):
        type_ = f"u{type_[1:]}"
    return t.read(left, type_), t.read(right, type_)


def _comparison(comparison: str, left: str, right: str, floats: bool) -> str:
    if comparison == "num":
        return f"~(np.isnan({left}) | np.isnan({right}))"
    if comparison == "nan":
        return f"np.isnan({left}) | np.isnan({right})"
    if comparison == "neu":
        return f"np.not_equal({left}, {right})"
    if comparison == "equ":
        return f"~(({left} < {right}) | ({left} > {right}))"
    if comparison == "ne" and floats:  # false for NaN, which NumPy's is not
        return f"({left} < {right}) | ({left} > {right})"
    if comparison in _OPPOSITES:
        return f"~{_COMPARISONS[_OPPOSITES[comparison]]}({left}, {right})"
    return f"{_COMPARISONS[comparison]}({left}, {right})"


@translates("selp")
def _select(t: Translator, ins: Instruction) -> None:
    target, chosen, otherwise, predicate = ins.operands
    values = f"{t.read(predicate, 'pred')}, {t.read(chosen, ins.type)}, {t.read(otherwise, ins.type)}"
    t.write(target, ins.type, f"np.where({values})")


# moves and conversions ------------------------------------------------------------------------------------------------


@translates("mov", "cvta")
def _move(t: Translator, ins: Instruction) -> None:
    target, source = ins.operands
    type_ = "u64" if ins.name == "cvta" else ins.type
    if ins.name == "cvta" and not ins.has("global"):
        if not ins.has("shared"):
            raise UnsupportedError(ins.text)
        value, window = t.read(source, "u64"), t.integer(SHARED_WINDOW, "u64")
        t.write(target, "u64", f"{value} {'-' if ins.has('to') else '+'} {window}")
        return
    if not isinstance(target, tuple) and not isinstance(source, tuple):
        t.write(target, type_, t.read(source, type_))
        return
    count = len(target if isinstance(target, tuple) else source)
    part = f"u{TYPE_BYTES[type_] * 8 // count}"
    if not isinstance(target, tuple):
        wide = f"u{TYPE_BYTES[type_] * 8}"
        shifts = (t.integer(int(part[1:]) * number, wide) for number in range(count))
        parts = (f"({t.read(one, part)}.astype(T_uint{wide[1:]}) << {shift})" for one, shift in zip(source, shifts))
        t.write(target, wide, " | ".join(parts))
        return
    if isinstance(source, tuple):
        t.line(f"parts = [{', '.join(f'np.copy({t.read(one, part)})' for one in source)}]")
        values = [f"parts[{number}]" for number in range(count)]
    else:
        t.line(f"parts = pick_bits({t.spread(source, f'u{TYPE_BYTES[type_] * 8}')}, {count})")
        values = [f"parts[:, {number}]" for number in range(count)]
    for register, value in zip(target, values):
        t.write(register, part, value)


_FLOAT_CONVERSIONS = {
    ("bf16", "f32"): "bfloat16_from_float({})",
    ("f16", "f32"): "half_from_float({})",
    ("f32", "bf16"): "float_from_bfloat16({})",
    ("f64", "bf16"): "float_from_bfloat16({}).astype(T_float64)",
    ("f32", "f16"): "float_from_half({})",
    ("f64", "f16"): "float_from_half({}).astype(T_float64)",
    ("bf16", "f16"): "bfloat16_from_float(float_from_half({}))",
    ("tf32", "f32"): "round_to_tf32({})",
}


@translates("cvt")
def _convert(t: Translator, ins: Instruction) -> None:
    to, source_type = ins.modifiers[-2:]
    target, *sources = ins.operands
    if ins.has("relu") or (ins.has("sat") and _is_float(to) and to != "f32"):
        raise UnsupportedError(ins.text)
    if to in _PACKED:
        _convert_pair(t, ins, to, source_type)
    elif (to, source_type) in _FLOAT_CONVERSIONS:
        word = f"u{TYPE_BYTES[to] * 8}" if to in ("bf16", "f16", "tf32") else to
        carried = f"u{TYPE_BYTES[source_type] * 8}" if source_type in _SHORT else source_type
        t.write(target, word, _FLOAT_CONVERSIONS[to, source_type].format(t.read(sources[0], carried)))
    elif (_is_float(to) and to in _SHORT) or source_type in _SHORT:
        raise UnsupportedError(ins.text)
    elif _is_float(to):
        _convert_to_float(t, ins, to, source_type)
    elif _is_float(source_type):
        rounding = next(m for m in ins.modifiers if m in _ROUNDINGS)
        value = t.read(sources[0], source_type)
        t.write(target, to, f"float_to_int({value}, T_{np.dtype(KINDS[to]).name}, {rounding!r})")
    else:
        value = t.read(sources[0], source_type)
        kind = f"T_{np.dtype(KINDS[to]).name}"
        t.write(target, to, f"int_to_int({value}, {kind}, True)" if ins.has("sat") else f"{value}.astype({kind})")


def _convert_to_float(t: Translator, ins: Instruction, to: str, source_type: str) -> None:
    value = t.read(ins.operands[1], source_type)
    rounding = next((m for m in ins.modifiers if m in _ROUNDINGS), None)
    if rounding is not None and to == source_type:
        t.write(ins.operands[0], to, f"{_ROUNDINGS[rounding]}({value})")
    elif ins.has("sat"):
        zero, one = t.constant(np.float32(0)), t.constant(np.float32(1))
        t.write(ins.operands[0], to, f"np.fmin(np.fmax({value}.astype(T_float32), {zero}), {one})")
    else:
        t.write(ins.operands[0], to, f"{value}.astype(T_{np.dtype(KINDS[to]).name})")


def _convert_pair(t: Translator, ins: Instruction, to: str, source_type: str) -> None:
    target, *sources = ins.operands
    if source_type == "f32":
        high, low = (f"{_PACKED[to]}_from_float({t.spread(source, 'f32')})" for source in sources)
        t.write(target, "u32", f"packed(np.stack([{low}, {high}], 1))")
    elif source_type == "e4m3x2" and to == "f16x2":
        codes = f"pick_bits({t.spread(sources[0], 'u16')}, 2)"
        t.write(target, "u32", f"packed(e4m3_values()[{codes}])")
    else:
        raise UnsupportedError(ins.text)
