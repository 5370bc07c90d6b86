"""Streamed layers on the host: one packed block a layer, page-locked for CUDA, or left in memory-mapped files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from sequoia_kernels.offload.host_memory import HostBlock, PageLock, available_host_bytes, fill_all
from sequoia_kernels.offload.layers import DecoderLayer
from sequoia_kernels.offload.memory import format_bytes
from sequoia_kernels.offload.weights import WeightSource

__all__ = ["HostLayer", "MappedLayer", "PackedLayer", "load_layer", "pack_layers"]


class HostLayer(ABC):
    """A layer's weights where a link takes them from."""

    num_bytes: int
    block: torch.Tensor | None = None  # the layer where it is in memory as a whole. [num_bytes] uint8

    @abstractmethod
    def write_into(self, destination: torch.Tensor) -> None:
        """Write the block. [num_bytes] uint8, in host memory."""

    def read_ahead(self) -> None:  # noqa: B027
        """Say that the layer is wanted soon."""

    def close(self) -> None:  # noqa: B027
        """Give the memory back, if it is the layer's own. Idempotent."""


class PackedLayer(HostBlock, HostLayer):
    """A layer packed into one block of memory, page-locked or not, so that one copy moves it."""

    def __init__(self, layer: DecoderLayer, page_lock: PageLock | None) -> None:
        super().__init__(layer.num_bytes, page_lock)
        self._layer = layer

    def load(self, weights: WeightSource, names: Mapping[str, str]) -> PackedLayer:
        """Allocate the block and fill it from where the weights are, by the name of each tensor there."""
        load_layer(self._layer, weights, names, self.allocate())
        for packed in self._layer.tensors:
            weights.forget(names[packed.name])
        return self

    def write_into(self, destination: torch.Tensor) -> None:
        """Write the block."""
        if self.block is None:
            raise RuntimeError("OffloadedModel: the weights must be open, got a closed model")
        destination.copy_(self.block)


class MappedLayer(HostLayer):
    """A layer that stays in its memory-mapped files; the system's page cache keeps what fits."""

    def __init__(self, layer: DecoderLayer, weights: WeightSource, names: Mapping[str, str]) -> None:
        self.num_bytes = layer.num_bytes
        self._layer, self._weights, self._names = layer, weights, names

    def write_into(self, destination: torch.Tensor) -> None:
        """Read the layer's tensors from the files."""
        load_layer(self._layer, self._weights, self._names, destination)

    def read_ahead(self) -> None:
        """Let the system read the layer's pages in the background."""
        for packed in self._layer.tensors:
            self._weights.read_ahead(self._names[packed.name])


def load_layer(layer: DecoderLayer, weights: WeightSource, names: Mapping[str, str], block: torch.Tensor) -> None:
    """Write a layer's tensors into a packed block."""
    for packed in layer.tensors:
        weights.copy_into(names[packed.name], packed.view_of(block))


def pack_layers(
    layers: Sequence[DecoderLayer], weights: WeightSource, names: Mapping[str, str], page_lock: PageLock | None
) -> list[HostLayer]:
    """Bring layers into host memory, all or nothing: a block each, or one for those that have the same tensors."""
    keys = [tuple(names[packed.name] for packed in layer.tensors) for layer in layers]
    distinct = dict(zip(keys, layers))
    needed = sum(layer.num_bytes for layer in distinct.values())
    available = available_host_bytes()
    advice = 'keep more layers on the device, or give host_memory="mapped" to stream from the files'
    if available is not None and needed > available:
        raise RuntimeError(
            f"load_offloaded: the host must have {format_bytes(needed)} of free memory for {len(distinct)} layers, "
            f"got {format_bytes(available)}; {advice}"
        )
    blocks = {key: PackedLayer(layer, page_lock) for key, layer in distinct.items()}
    kind = "memory" if page_lock is None else "memory that can be page-locked"
    fill_all(
        blocks.values(),
        lambda block: block.load(weights, names),
        lambda done, error: (
            f"load_offloaded: the host must have {format_bytes(needed)} of {kind} for {len(distinct)} layers, "
            f"got {format_bytes(done)} ({error}); {advice}"
        ),
    )
    return [blocks[key] for key in keys]
