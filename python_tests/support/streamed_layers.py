"""Decoder layers without a model, for tests of what streams them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sequoia_kernels.offload.host_weights import HostLayer
from sequoia_kernels.offload.layers import DecoderLayer, lay_out


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 5))
        self.same = self.weight
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.empty(3, dtype=torch.int64))


def decoder_layers(num_layers: int, widths: Sequence[int] | None = None) -> list[DecoderLayer]:
    """Build layers on the meta device with a tied tensor, two float dtypes and an integer buffer."""
    with torch.device("meta"):
        modules = [_Layer(width) for width in widths or [7] * num_layers]
    return [lay_out(index, f"layers.{index}", module, "") for index, module in enumerate(modules)]


class MemoryLayer(HostLayer):
    """A block that holds the layer's index in every element; the first `failures` reads fail."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.num_bytes = layer.num_bytes
        self.failures = 0
        self.content = torch.zeros(layer.num_bytes, dtype=torch.uint8)
        for packed in layer.tensors:
            packed.view_of(self.content).fill_(layer.layer_idx)

    def write_into(self, destination: torch.Tensor) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("the disk is gone")
        destination.copy_(self.content)

    def read_ahead(self) -> None:
        pass

    def close(self) -> None:
        pass
