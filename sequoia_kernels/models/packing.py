"""Weights in the layout that oneDNN multiplies: for half-precision models on a CPU.

torch's linear layer hands oneDNN a row-major weight, which oneDNN brings into its own blocked layout before it
multiplies, at every call: with the few rows of a decoding step that takes longer than reading the weight and
multiplying. Packed, it happens once. (The layout is the one that `torch.compile`'s freezing on CPUs uses, through the
same operators.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.models.adapter import TreeModel

__all__ = ["pack_linear_layers", "unpack_linear_layers"]

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
        `generate` included; `unpack_linear_layers` takes it back. The weights stay where they are, so they take their
        memory twice. A weight that is assigned or written in place is packed again at the next call; writes through
        `.data` are not seen. Calls that need gradients, or whose input has another dtype, take torch's own way.
        Products may differ from torch's in the last bit.

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
    for layer in layers:
        if not isinstance(layer.__dict__.get("forward"), _PackedForward):
            layer.__dict__["forward"] = _PackedForward(layer)
    return len(layers)


def unpack_linear_layers(model: PreTrainedModel | TreeModel) -> None:
    """Undo `pack_linear_layers`: free the copies and give the layers their own forward back."""
    for layer in _linear_layers(model):
        if isinstance(layer.__dict__.get("forward"), _PackedForward):
            del layer.__dict__["forward"]


def _linear_layers(model: Any) -> list[nn.Linear]:
    module = model.model if isinstance(model, TreeModel) else model
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"{_WHERE}: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    # subclasses may compute something else, and a layer may have been given a forward by somebody else
    return [
        layer
        for layer in module.modules()
        if type(layer) is nn.Linear and isinstance(layer.__dict__.get("forward"), (type(None), _PackedForward))
    ]


_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def _unavailable_reason(dtype: torch.dtype) -> str | None:
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    for name in ("_reorder_linear_weight", "_linear_pointwise", _SUPPORTED[dtype]):
        if not hasattr(operators, name):
            return f"this torch has no operator mkldnn::{name}"
    if not getattr(operators, _SUPPORTED[dtype])():
        return f"oneDNN has no fast {dtype} products on this CPU"
    return None


class _PackedForward:
    """The forward of one linear layer."""

    __slots__ = ("layer", "packed", "state")

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.packed: torch.Tensor | None = None
        self.state: tuple[int, torch.dtype, int] | None = None
        self._pack()

    def __getstate__(self) -> tuple[nn.Linear]:
        return (self.layer,)  # what is packed can neither be copied nor stored

    def __setstate__(self, state: tuple[nn.Linear]) -> None:
        (self.layer,) = state
        self.packed, self.state = None, None

    def _pack(self) -> None:
        weight = self.layer.weight
        self.state = _state(weight)
        with torch.inference_mode(False), torch.no_grad():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer, weight = self.layer, self.layer.weight
        needs_gradients = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if needs_gradients or input.dtype != weight.dtype or weight.dtype not in _SUPPORTED or not weight.is_cpu:
            return F.linear(input, weight, layer.bias)
        if _state(weight) != self.state:
            self._pack()
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, layer.bias, "none", [], "")
        return product


def _state(weight: torch.Tensor) -> tuple[int, torch.dtype, int]:
    """What changes when a weight is moved, cast or written in place; tensors of inference mode do not count writes."""
    return weight.data_ptr(), weight.dtype, -1 if weight.is_inference() else weight._version
