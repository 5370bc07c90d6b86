"""The decoder layers of a Hugging Face model: where they are, what they hold, and how it is packed into one block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.families import family_name

__all__ = ["DecoderLayer", "ModelTensor", "PackedTensor", "Place", "find_layers", "find_stored", "lay_out"]

# Offsets of tensors within a packed layer: what vectorised kernels and copies want at most.
_ALIGNMENT = 256


class Place(NamedTuple):
    """An attribute of a module that holds a tensor."""

    module: nn.Module
    attribute: str
    is_parameter: bool

    def put(self, tensor: torch.Tensor) -> None:
        """Let the module use this tensor. Goes past `nn.Module.__setattr__`, whose checks cost more than a small op."""
        (self.module._parameters if self.is_parameter else self.module._buffers)[self.attribute] = tensor  # type: ignore[assignment]


class PackedTensor(NamedTuple):
    """One tensor of a layer and where it lies in the layer's block."""

    name: str  # full name in the model
    dtype: torch.dtype
    shape: torch.Size
    offset: int  # bytes
    num_bytes: int
    places: tuple[Place, ...]  # several where the layer ties tensors
    placeholder: torch.Tensor  # on the meta device; in its places while the layer does not run

    def view_of(self, block: torch.Tensor) -> torch.Tensor:
        """View this tensor in a packed block. [num_bytes] uint8 to `shape`."""
        return block[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)

    def bindable(self, block: torch.Tensor) -> torch.Tensor:
        """View this tensor in a block, as a parameter where its places hold parameters."""
        view = self.view_of(block)
        return nn.Parameter(view, requires_grad=False) if self.places[0].is_parameter else view


class DecoderLayer(NamedTuple):
    """One decoder layer and the layout of its block."""

    layer_idx: int
    module: nn.Module
    tensors: tuple[PackedTensor, ...]
    num_bytes: int

    @property
    def layout(self) -> tuple[tuple[torch.dtype, torch.Size, int], ...]:
        """What two layers must share to be bound to the same views."""
        return tuple((tensor.dtype, tensor.shape, tensor.offset) for tensor in self.tensors)

    def bind(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Let the layer compute with these tensors, in the order of `tensors`."""
        for packed, tensor in zip(self.tensors, tensors):
            for place in packed.places:
                place.put(tensor)

    def unbind(self) -> None:
        """Put the placeholders back: a layer that runs without its weights fails instead of using another's."""
        self.bind(tuple(packed.placeholder for packed in self.tensors))


class ModelTensor(NamedTuple):
    """A parameter or stored buffer of a model and where it is: in several places where it is tied."""

    tensor: torch.Tensor
    names: list[str]
    places: list[Place]


def find_stored(modules: Iterable[tuple[str, nn.Module]]) -> list[ModelTensor]:
    """Return every parameter and stored buffer that modules, with their names, have of their own."""
    found: dict[int, ModelTensor] = {}
    for prefix, module in modules:
        buffers = (item for item in module._buffers.items() if item[0] not in module._non_persistent_buffers_set)
        for is_parameter, tensors in ((True, module._parameters.items()), (False, buffers)):
            for name, tensor in tensors:
                if tensor is not None:
                    stored = found.setdefault(id(tensor), ModelTensor(tensor, [], []))
                    stored.names.append(f"{prefix}.{name}" if prefix else name)
                    stored.places.append(Place(module, name, is_parameter))
    return list(found.values())


def find_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """Find the decoder layers of a model on the meta device, in the order in which they run, and lay them out.

    UnsupportedModelError says where there is not exactly one list of them, where a tensor belongs to several layers, or
    where a layer keeps its weights in objects of a quantisation library.
    """
    num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(any(True for _ in layer.parameters()) for layer in module)
    }
    outermost = {
        name: found for name, found in lists.items() if not any(name.startswith(f"{other}.") for other in lists)
    }
    refusal = f"load_offloaded: family {family_name(model)} cannot be offloaded: "
    if len(outermost) != 1:
        got = ", ".join(sorted(outermost)) or "none"
        raise UnsupportedModelError(f"{refusal}it must have one list of {num_layers} decoder layers, got {got}")
    [(path, modules)] = outermost.items()
    layers = [lay_out(index, f"{path}.{index}", module, refusal) for index, module in enumerate(modules)]
    owner: dict[int, str] = {}
    inside = set(modules.modules())
    for module in model.modules():
        if module not in inside:
            owner.update({id(tensor): "a module outside the layers" for tensor in module._parameters.values()})
    for layer in layers:
        for packed in layer.tensors:
            other = owner.setdefault(id(packed.placeholder), f"layer {layer.layer_idx}")
            if other != f"layer {layer.layer_idx}":
                raise UnsupportedModelError(f"{refusal}{packed.name} is shared with {other}")
    return layers


def lay_out(index: int, path: str, layer: nn.Module, refusal: str) -> DecoderLayer:
    """Lay out one layer, a module on the meta device; `refusal` begins the message of what cannot be packed."""
    tensors = []
    offset = 0
    for tensor, names, places in find_stored(layer.named_modules(prefix=path)):
        if places[0].is_parameter and type(tensor) is not nn.Parameter:
            raise UnsupportedModelError(
                f"{refusal}{names[0]} is a {type(tensor).__name__}, which holds more than its bytes"
            )
        tensors.append(PackedTensor(names[0], tensor.dtype, tensor.shape, offset, tensor.nbytes, tuple(places), tensor))
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return DecoderLayer(index, layer, tuple(tensors), offset)
