"""Weights in the layout that oneDNN multiplies: for half-precision models on a CPU.

torch's linear layer hands oneDNN a row-major weight, which oneDNN brings into its own blocked layout before it
multiplies, at every call: with the few rows of a decoding step that takes longer than reading the weight and
multiplying. Packed, it happens once. (The layout is the one that `torch.compile`'s freezing on CPUs uses, through the
same operators.)
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.models.adapter import TreeModel

__all__ = ["pack_linear_layers", "unpack_linear_layers"]

logger = logging.getLogger("sequoia_kernels")

_WHERE = "pack_linear_layers"


def pack_linear_layers(model: PreTrainedModel | TreeModel) -> int:
    """Keep a copy of every half-precision linear weight in oneDNN's layout, and multiply by that.

    Args:
        model: a model on a CPU, in bfloat16 or float16; a `TreeModel` stands for the model in it.

    Returns:
        The number of layers that are packed, earlier ones included.

    Raises:
        TypeError: `model` is neither.
        ValueError: it has no linear layer of such a dtype on a CPU.
        BackendUnavailableError: torch or the CPU cannot multiply in that dtype.

    Notes:
        Mutates the model: linear layers get a `forward` of their own, which serves every caller, transformers'
        `generate` included; `unpack_linear_layers` takes it back. The weights stay, so they take their memory twice;
        those that lie in a mapped file are brought into memory of their own.

        A layer whose weight is exchanged, moved, cast or written, in whatever way (in place, through `.data` as
        adapters are merged, in inference mode, through numpy), takes torch's own way from its next call on, and so do
        copies of the model; one warning says so. Call this function again to pack them again. Whatever asks torch for a
        weight's address counts as a writer, saving included. What torch cannot notice are writes through an array or
        address that was taken before packing.

        Calls that need gradients, or whose input has another dtype, take torch's own way as well. Products may differ
        from torch's in the last bit.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        >>> pack_linear_layers(model)
        8
        >>> unpack_linear_layers(model)
    """
    layers = [layer for layer in _linear_layers(model) if layer.weight.is_cpu and layer.weight.dtype in _SUPPORTED]
    if not layers:
        raise ValueError(
            f"{_WHERE}: model must have linear layers in bfloat16 or float16 on a CPU, got none; others gain nothing"
        )
    for dtype in {layer.weight.dtype for layer in layers}:
        if (reason := _unavailable_reason(dtype)) is not None:
            raise BackendUnavailableError(f"{_WHERE}: {reason}")
    warned: list[bool] = []
    for layer in layers:
        forward = layer.__dict__.get("forward")
        if not isinstance(forward, _PackedForward) or forward.current() is None:
            layer.__dict__["forward"] = _PackedForward(layer, warned)
    return len(layers)


def unpack_linear_layers(model: PreTrainedModel | TreeModel) -> None:
    """Undo `pack_linear_layers`: free the copies and give the layers their own forward back."""
    for module in _plain_model(model).modules():
        if isinstance(module.__dict__.get("forward"), _PackedForward):
            del module.__dict__["forward"]


def _plain_model(model: Any) -> PreTrainedModel:
    module = model.model if isinstance(model, TreeModel) else model
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"{_WHERE}: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    return module


def _linear_layers(model: Any) -> list[nn.Linear]:
    # Subclasses may compute something else, their weights (quantised or distributed ones) hold something else, and a
    # layer may have been given a forward by somebody else.
    return [
        layer
        for layer in _plain_model(model).modules()
        if type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and isinstance(layer.__dict__.get("forward"), (type(None), _PackedForward))
    ]


_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def _unavailable_reason(dtype: torch.dtype) -> str | None:
    operators = _operators()
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    for name in ("_reorder_linear_weight", "_linear_pointwise", _SUPPORTED[dtype]):
        if not hasattr(operators, name):
            return f"this torch has no operator mkldnn::{name}"
    if not hasattr(torch, "_lazy_clone") or not hasattr(torch._C, "_data_address"):
        return "this torch has no lazy clones, which notice when a weight is written"
    if not getattr(operators, _SUPPORTED[dtype])():
        return f"oneDNN has no fast {dtype} products on this CPU"
    return None


class _PackedForward:
    """The forward of one linear layer.

    A lazy clone shares the weight's memory until either of them is written, by whomever and however: the writer gets
    memory of its own first. So while the weight lies where the clone does, what was packed is what it holds.
    """

    __slots__ = ("__weakref__", "clone", "layer", "packed", "warned")

    def __init__(self, layer: nn.Linear, warned: list[bool]) -> None:
        self.layer, self.warned = layer, warned
        weight = layer.weight
        self.clone: torch.Tensor | None
        self.packed: torch.Tensor | None
        with torch.inference_mode(False), torch.no_grad():
            try:
                self.clone = torch._lazy_clone(weight.detach())
            except RuntimeError:  # only memory of torch's own can be shared like this
                weight.data = weight.detach().clone()
                self.clone = torch._lazy_clone(weight.detach())
            # A copy, since packing asks for the address of what it reads as a writer does.
            contiguous = weight.detach().clone(memory_format=torch.contiguous_format)
            self.packed = _operators()._reorder_linear_weight(contiguous, None)

    def __getstate__(self) -> tuple[nn.Linear]:
        return (self.layer,)  # what is packed can neither be copied nor stored

    def __setstate__(self, state: tuple[nn.Linear]) -> None:
        (self.layer,) = state
        self.clone = self.packed = None

    def current(self) -> torch.Tensor | None:
        """Return what was packed, None if it is not what the layer's weight holds. Then it is given up."""
        weight, clone, packed = self.layer.weight, self.clone, self.packed
        if packed is None or clone is None:
            return None
        if type(weight) is nn.Parameter and _place(weight) == _place(clone):
            return packed
        self.clone = self.packed = None
        if not self.warned:
            self.warned.append(True)
            logger.warning(
                "%s: packed weights were changed, their layers multiply as torch does; pack the model again", _WHERE
            )
        return None

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer, weight = self.layer, self.layer.weight
        packed = self.current()
        needs_gradients = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if packed is None or needs_gradients or input.dtype != weight.dtype:
            return F.linear(input, weight, layer.bias)
        product: torch.Tensor = _operators()._linear_pointwise(input, packed, layer.bias, "none", [], "")
        return product


def _place(tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    """Return where and how a tensor lies. `data_ptr` would count as a writer."""
    address = torch._C._data_address(tensor)  # type: ignore[attr-defined]
    return address, tensor.dtype, tensor.shape, tensor.stride()


def _operators() -> Any:
    return torch.ops.mkldnn
