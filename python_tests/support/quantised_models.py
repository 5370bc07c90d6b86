"""Models with weights of few bits, as quantisers lay them out, without any quantiser.

Each form has a stand-in that computes what the quantiser's module does, in the model's dtype, and the weight that its
numbers stand for in float32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FORMS = ("int8", "int4", "gptq", "gptq-v1", "gptq-order")


def _in_groups(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight to numbers 0..15; give them, [rows, groups, group], and each group's scale and lowest weight."""
    grouped = weight.detach().float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15.0).clamp(min=1e-6)
    return ((grouped - low) / scale).round().clamp(0, 15).to(torch.int32), scale[..., 0], low[..., 0]


class _Wrapped(torch.Tensor):
    """A weight that is made of other tensors, as torchao's are."""

    tensors: tuple[str, ...] = ()

    @staticmethod
    def __new__(cls, shape, dtype, block_size, *tensors):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, requires_grad=False)

    def __init__(self, shape, dtype, block_size, *tensors):
        self.block_size = block_size
        for name, tensor in zip(self.tensors, tensors, strict=True):
            setattr(self, name, tensor)

    def __tensor_flatten__(self):
        return list(self.tensors), (self.shape, self.dtype, self.block_size)

    def again(self) -> _Wrapped:
        return type(self)(self.shape, self.dtype, self.block_size, *(getattr(self, name) for name in self.tensors))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            states, weight, *bias = args
            return weight.multiply(states, bias[0] if bias else (kwargs or {}).get("bias"))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0].again()
        raise NotImplementedError(f"{function} of a weight of few bits")

    def __deepcopy__(self, memo):
        copied = self.again()
        for name in self.tensors:
            setattr(copied, name, getattr(self, name).clone())
        return nn.Parameter(copied, requires_grad=False)

    __repr__ = object.__repr__


class Int8Tensor(_Wrapped):
    """torchao's weight-only int8: [rows, columns], a scale a row."""

    tensors = ("qdata", "scale", "zero_point")

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Tensor:
        scale = (weight.detach().float().abs().amax(1, keepdim=True) / 127.0).clamp(min=1e-6)
        numbers = (weight.detach().float() / scale).round().to(torch.int8)
        zeros = torch.zeros(scale.shape, dtype=torch.int8)
        return cls(weight.shape, weight.dtype, [1, weight.shape[1]], numbers, scale, zeros)

    def multiply(self, states, bias):
        product = states @ self.qdata.t().to(states.dtype) * self.scale.flatten().to(states.dtype)
        return product if bias is None else product + bias

    def exact(self):
        return self.qdata.float() * self.scale.float()


class Int4OpaqueTensor(_Wrapped):
    """torchao's weight-only int4 on CPUs: packed by torch, with torch's product."""

    tensors = ("qdata", "scale_and_zero")

    @classmethod
    def of(cls, weight: torch.Tensor, group: int = 32) -> Int4OpaqueTensor:
        numbers, scale, low = _in_groups(weight, group)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.flatten(1), 1)
        factors = torch.stack([scale, low + 8.0 * scale], -1).transpose(0, 1).to(weight.dtype).contiguous()
        return cls(weight.shape, weight.dtype, [1, group], packed, factors)

    def multiply(self, states, bias):
        flat = states.reshape(-1, states.shape[-1]).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.qdata, self.block_size[1], self.scale_and_zero)
        product = product.reshape(*states.shape[:-1], -1)
        return product if bias is None else product + bias

    def exact(self):
        ones = torch.eye(self.shape[1])
        factors = self.scale_and_zero.float()
        return (
            torch.ops.aten._weight_int4pack_mm_for_cpu(ones, self.qdata, self.block_size[1], factors).t().contiguous()
        )


class BlocksOf64(Int4OpaqueTensor):
    """The same as torch packs it on CPUs with wider vectors."""

    @classmethod
    def of(cls, weight: torch.Tensor, group: int = 32) -> BlocksOf64:
        numbers, scale, low = _in_groups(weight, group)
        parts = []
        for block in numbers.flatten(1).split(64):
            pairs = block.unflatten(0, (2, -1)) if len(block) == 64 else block.unflatten(0, (-1, 2)).transpose(0, 1)
            parts.append((pairs[0] + 16 * pairs[1]).t().flatten())  # [columns, rows / 2]
        packed = torch.cat(parts).to(torch.uint8).reshape(weight.shape[0], -1)
        factors = torch.stack([scale, low + 8.0 * scale], -1).transpose(0, 1).to(weight.dtype).contiguous()
        return cls(weight.shape, weight.dtype, [1, group], packed, factors)

    def multiply(self, states, bias):
        product = states @ self.exact().t()
        return product if bias is None else product + bias

    def exact(self):
        columns = self.shape[1]
        parts = []
        for block in self.qdata.flatten().split(32 * columns):
            numbers = block.reshape(columns, -1).t().to(torch.float32)
            halves = numbers % 16, numbers // 16
            parts.append(torch.cat(halves) if len(numbers) == 32 else torch.stack(halves, 1).flatten(0, 1))
        scale, zero = (self.scale_and_zero[..., i].float().t()[:, :, None] for i in range(2))
        grouped = torch.cat(parts).unflatten(1, (scale.shape[1], -1))
        return ((grouped - 8.0) * scale + zero).flatten(1)


class GPTQLinear(nn.Module):
    """A linear layer of four bits with GPTQ's buffers."""

    def __init__(self, linear: nn.Linear, group: int, kept_zeros: int = 0, scattered: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size, self.kept_zeros = 4, group, kept_zeros
        generator = torch.Generator().manual_seed(self.in_features)
        columns = torch.randperm(self.in_features, generator=generator) if scattered else torch.arange(self.in_features)
        numbers, scale, low = _in_groups(linear.weight[:, columns], group if group > 0 else self.in_features)
        zeros = (-low / scale).round().clamp(1, 15).to(torch.int32) - kept_zeros  # as they lie
        order = torch.empty(self.in_features, dtype=torch.int32)
        order[columns] = torch.arange(scale.shape[1], dtype=torch.int32).repeat_interleave(numbers.shape[2])
        own = torch.empty(self.out_features, self.in_features, dtype=torch.int32)
        own[:, columns] = numbers.flatten(1)
        self.register_buffer("qweight", self._packed(own.t()))
        self.register_buffer("qzeros", self._packed(zeros).t().contiguous())
        self.register_buffer("scales", scale.t().contiguous().to(torch.float16))
        self.register_buffer("g_idx", order)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.float16))

    @staticmethod
    def _packed(numbers: torch.Tensor) -> torch.Tensor:
        """Eight rows a word, [rows / 8, columns]."""
        places = torch.arange(0, 32, 4)[:, None]
        words = (numbers.to(torch.int64).unflatten(0, (-1, 8)) << places).sum(1)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    def exact(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        places = torch.arange(0, 32, 4, dtype=torch.int32)
        numbers = (self.qweight[:, None] >> places[:, None] & 15).flatten(0, 1)
        zeros = (self.qzeros[:, :, None] >> places & 15).flatten(1) + self.kept_zeros
        group = self.g_idx.long()
        return ((numbers - zeros[group]).to(dtype) * self.scales[group].to(dtype)).t()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        product = states @ self.exact(states.dtype).t()
        return product if self.bias is None else product + self.bias.to(states.dtype)


def _quantised(linear: nn.Linear, form: str, group: int) -> nn.Module | None:
    """Return the layer in its new form; None where its shape does not fit."""
    rows, columns = linear.weight.shape
    if form in ("int8", "int4"):
        if form == "int4" and (rows % 16 or columns % group):
            return None
        weight = Int8Tensor.of(linear.weight) if form == "int8" else Int4OpaqueTensor.of(linear.weight, group)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
    if rows % 8 or columns % 8 or (group > 0 and columns % group):
        return None
    own = GPTQLinear(linear, group, kept_zeros=int(form == "gptq-v1"), scattered=form == "gptq-order")
    return own.train(linear.training)


def quantise(model: Any, form: str, group: int = 32) -> int:
    """Quantise the model's linear layers in place, as far as their shapes allow; give their number."""
    count = 0
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
            own = _quantised(module, form, group)
            if own is not None:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, own)
                count += 1
    return count


def dequantised(model: Any) -> Any:
    """Copy a model, its weights in float32 as their numbers say."""
    exact = copy.deepcopy(model)
    for name, module in list(exact.named_modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, _Wrapped):
            module.weight = nn.Parameter(weight.exact())
        elif isinstance(module, GPTQLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.exact().contiguous()
            if module.bias is not None:
                linear.bias.data = module.bias.float()
            parent, _, attribute = name.rpartition(".")
            setattr(exact.get_submodule(parent), attribute, linear)
    return exact.float()
