"""Weights of 8 and 4 bits as quantisers leave them in a model: where their tensors are and how those lie.

What is recognised, and by what:

- torchao's weight-only int8, a row's numbers times the row's scale: a parameter of class `Int8Tensor`.
- torchao's weight-only int4 on CPUs, in the blocks that torch packs for its own kernel there: `Int4OpaqueTensor`.
- GPTQ's 4 bits: a module with tensors `qweight`, `qzeros`, `scales` and `g_idx` whose shapes and types fit together,
  and whose forward gives, for inputs of a single 1, the weights that these tensors say. That tells the two kinds of
  zeros apart (one less than they are, or as they are), and a module that makes something else of the same tensors.

Names are trusted only so far: `adapt` compares the whole model's logits with its modules' own before it uses anything.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["ELEMENT_TYPES", "GPTQ_TENSORS", "NotNativeError", "QuantisedWeight", "TensorPlace", "quantised_weight"]

# Codes shared with csrc/host/rows.h and csrc/host/forward/model.h.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_INT8_ROWS, _INT4_WORDS, _INT4_BLOCKS = 1, 2, 3

GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_WORD = 8  # numbers in an int32


class NotNativeError(Exception):
    """Why a model's forward cannot be a native one."""


class TensorPlace(NamedTuple):
    """Where a tensor is looked up at every call: `owner[name]`, or None from `owner.get(name)`."""

    owner: Any
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """What is there now."""
        tensor: torch.Tensor = self.owner[self.name]
        return tensor


class QuantisedWeight(NamedTuple):
    """A weight [rows, columns] of few bits; csrc/host/forward/model.h says how each packing lies."""

    packing: int
    rows: int
    columns: int
    data: TensorPlace
    scales: TensorPlace
    zeros: TensorPlace | None = None
    order: TensorPlace | None = None  # the group of each column
    group: int = 0  # columns of a group
    block: int = 0  # rows of a block
    zero_shift: int = 0  # from what lies there to the zero
    bits: int = 8


def quantised_weight(module: nn.Module) -> QuantisedWeight | None:
    """Describe a linear layer's weight if it is of few bits; None for all others.

    Raises:
        NotNativeError: it is a quantiser's, in a form that native forwards do not read; the message says which.
    """
    if all(_place(module, name) is not None for name in GPTQ_TENSORS):
        return _gptq(module)
    weight = module._parameters.get("weight")
    kind = type(weight).__name__
    if type(module) is not nn.Linear or weight is None or kind not in _TORCHAO:
        return None
    for name in ("act_quant_kwargs", "act_pre_scale", "act_mapping_type"):
        if getattr(weight, name, None) is not None:
            raise NotNativeError(f"a weight is a {kind} with {name}: activations are quantised or scaled, too")
    if weight.dim() != 2:
        raise NotNativeError(f"a weight is a {kind} of {weight.dim()} dimensions")
    return _TORCHAO[kind](weight, _Inside(module._parameters, "weight", type(weight)))


class _Inside:
    """The tensors that a wrapped weight is made of, for as long as its module has a weight of that class."""

    __slots__ = ("kind", "name", "owner")

    def __init__(self, owner: dict[str, Any], name: str, kind: type) -> None:
        self.owner, self.name, self.kind = owner, name, kind

    def __getitem__(self, name: str) -> Any:
        weight = self.owner[self.name]
        if type(weight) is not self.kind:
            raise KeyError(name)
        return weight.__dict__[name]

    def get(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            return None


def _int8_rows(weight: Any, inside: _Inside) -> QuantisedWeight:
    rows, columns = weight.shape
    data, scales = (_inner(inside, name) for name in ("qdata", "scale"))
    if list(weight.block_size) != [1, columns] or scales.tensor.numel() != rows:
        raise NotNativeError(
            f"a weight of int8 has a scale for every block of {list(weight.block_size)}, not every row"
        )
    _expect(data, (rows, columns), torch.int8)
    return QuantisedWeight(_INT8_ROWS, rows, columns, data, scales)


def _int4_blocks(weight: Any, inside: _Inside) -> QuantisedWeight:
    rows, columns = weight.shape
    data, scales = (_inner(inside, name) for name in ("qdata", "scale_and_zero"))
    group, block = int(weight.block_size[-1]), _rows_of_torchs_blocks()
    if not block:
        raise NotNativeError("torch packs weights of int4 on this CPU in a way that is not known")
    if rows % 16 or columns % group or group % 16:
        raise NotNativeError(f"a weight of int4 is [{rows}, {columns}] in groups of {group}")
    _expect(data, (rows, columns // 2), torch.uint8)
    _expect(scales, (columns // group, rows, 2), *ELEMENT_TYPES)
    return QuantisedWeight(_INT4_BLOCKS, rows, columns, data, scales, group=group, block=block, bits=4)


_TORCHAO = {"Int8Tensor": _int8_rows, "Int4OpaqueTensor": _int4_blocks}


def _inner(inside: _Inside, name: str) -> TensorPlace:
    tensor = inside.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise NotNativeError(f"a weight is a {inside.kind.__name__} without {name}")
    if tensor.is_floating_point():
        _expect(TensorPlace(inside, name), tuple(tensor.shape), *ELEMENT_TYPES)
    return TensorPlace(inside, name)


def _expect(place: TensorPlace, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    tensor = place.tensor
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_cpu or not tensor.is_contiguous():
        raise NotNativeError(
            f"{place.name} is {list(tensor.shape)} of {tensor.dtype} on {tensor.device}, not {list(shape)} of "
            f"{' or '.join(map(str, dtypes))} row by row on the CPU"
        )


@cache
def _rows_of_torchs_blocks() -> int:
    """Rows that torch's packing of int4 puts into a block, by what it makes of some numbers; 0 if in no known way.

    It depends on the vectors that torch uses, and a packed weight does not say: one that another CPU packed is wrong
    for torch's own kernel, too.
    """
    numbers = torch.randint(0, 16, (144, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1).flatten()
    except (AttributeError, RuntimeError):
        return 0
    for block in (32, 64):
        first = numbers[:128].reshape(-1, 2, block // 2, 4).transpose(1, 3)  # [blocks, columns, half, 2]
        last = numbers[128:].reshape(1, -1, 2, 4).permute(0, 3, 1, 2)  # neighbours
        low_high = torch.tensor([1, 16], dtype=torch.int32)
        expected = torch.cat([(part * low_high).sum(-1).flatten() for part in (first, last)])
        if torch.equal(packed.to(torch.int64), expected):
            return block
    return 0


# ---- GPTQ ----


def _place(module: nn.Module, name: str) -> TensorPlace | None:
    for owner in (module._buffers, module._parameters):
        if isinstance(owner.get(name), torch.Tensor):
            return TensorPlace(owner, name)
    return None


def _gptq(module: nn.Module) -> QuantisedWeight:
    data, zeros, scales, order = (TensorPlace(*_found(_place(module, name))) for name in GPTQ_TENSORS)
    kind = type(module).__name__
    if any(True for _ in module.children()):
        raise NotNativeError(f"a {kind} has modules of its own")
    columns, rows = order.tensor.numel(), data.tensor.shape[-1]
    groups = scales.tensor.shape[0]
    if getattr(module, "bits", 4) != 4 or data.tensor.shape[0] * _WORD != columns:
        raise NotNativeError(f"a {kind} has {getattr(module, 'bits', 'not 4')} bits")
    group = int(getattr(module, "group_size", 0) or 0)
    group = group if 0 < group < columns else columns
    if groups != -(-columns // group):  # scattered ones are of any size
        raise NotNativeError(f"a {kind} has {groups} groups of {columns} inputs, not of {group} each")
    if group % 16 and group != columns:
        raise NotNativeError(f"a {kind} has groups of {group} inputs")
    _expect(data, (columns // _WORD, rows), torch.int32)
    _expect(zeros, (groups, rows // _WORD), torch.int32)
    _expect(scales, (groups, rows), *ELEMENT_TYPES)
    _expect(order, (columns,), torch.int32)
    if rows % _WORD or not 0 <= int(order.tensor.min()) <= int(order.tensor.max()) < groups:
        raise NotNativeError(f"a {kind} has {rows} outputs, or inputs of groups that it has not")
    shift = _zero_shift(module, *(place.tensor for place in (data, zeros, scales, order)))
    return QuantisedWeight(_INT4_WORDS, rows, columns, data, scales, zeros, order, group, zero_shift=shift, bits=4)


def _found(place: TensorPlace | None) -> TensorPlace:
    assert place is not None
    return place


def _zero_shift(
    module: nn.Module, data: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, order: torch.Tensor
) -> int:
    """Tell what a module adds to the zeros that lie there by what it makes of some inputs."""
    columns = sorted({0, order.numel() // 3, order.numel() - 1})
    groups = order[columns].long()
    places = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = torch.stack([data[column // _WORD] >> 4 * (column % _WORD) & 15 for column in columns])
    unpacked = (zeros[groups][:, :, None] >> places & 15).flatten(1)  # [columns, rows]
    ones = torch.zeros(len(columns), order.numel())
    ones[torch.arange(len(columns)), columns] = 1.0
    bias = _place(module, "bias")
    for dtype in dict.fromkeys((torch.float32, scales.dtype, torch.bfloat16)):
        try:
            with torch.inference_mode(False), torch.no_grad():
                given = module(ones.to(dtype)).float()
        except (RuntimeError, TypeError, NotImplementedError):  # not for inputs of this type
            continue
        if bias is not None:
            given = given - bias.tensor.float()
        for shift in (0, 1):
            expected = (numbers - unpacked - shift).float() * scales[groups].float()
            if given.shape == expected.shape and (given - expected).abs().mean() <= 0.2 * scales[groups].float().mean():
                return shift
        break
    raise NotNativeError(f"a {type(module).__name__} does not compute what its tensors say in GPTQ's way")
