"""Streamed layers on the host: one packed block a layer, page-locked for CUDA, or left in memory-mapped files."""

from __future__ import annotations

import logging
import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from sequoia_kernels.models.offload.checkpoint import Checkpoint
from sequoia_kernels.models.offload.layers import DecoderLayer
from sequoia_kernels.models.offload.memory import format_bytes

__all__ = [
    "CudaPageLock",
    "HostLayer",
    "MappedLayer",
    "PackedLayer",
    "PageLock",
    "available_host_bytes",
    "load_layer",
    "pack_layers",
]

logger = logging.getLogger("sequoia_kernels")


class HostLayer(ABC):
    """A layer's weights where a link takes them from.

    Attributes:
        num_bytes: size of the layer's block.
        block: the block itself where it is in memory as a whole. [num_bytes] uint8.
    """

    num_bytes: int
    block: torch.Tensor | None = None

    @abstractmethod
    def write_into(self, destination: torch.Tensor) -> None:
        """Write the block. [num_bytes] uint8, in host memory."""

    @abstractmethod
    def read_ahead(self) -> None:
        """Say that the layer is wanted soon."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Idempotent."""


class PageLock(Protocol):
    """Locks host memory for direct copies by a device."""

    def lock(self, block: torch.Tensor) -> None:
        """Lock a block's pages; RuntimeError where that fails."""

    def unlock(self, block: torch.Tensor) -> None:
        """Unlock them."""


class CudaPageLock:
    """Page-locks with the CUDA runtime.

    torch's own pinned allocator rounds sizes up to powers of two (a 1.7 GB layer would take 2.1 GB) and keeps what is
    freed; registering exactly the block's pages does neither.
    """

    def lock(self, block: torch.Tensor) -> None:
        """Lock a block's pages."""
        status = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel(), 0)
        if int(status) != 0:
            raise RuntimeError(f"cudaHostRegister failed with error {int(status)}")

    def unlock(self, block: torch.Tensor) -> None:
        """Unlock them."""
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


class PackedLayer(HostLayer):
    """A layer packed into one block of anonymous, page-aligned memory, so that one copy moves it.

    Args:
        layer: the layer.
        checkpoint: its weights.
        names: name of each tensor in the checkpoint.
        page_lock: locks the block, None leaves it pageable.
    """

    def __init__(
        self, layer: DecoderLayer, checkpoint: Checkpoint, names: Mapping[str, str], page_lock: PageLock | None
    ) -> None:
        self.num_bytes = layer.num_bytes
        self._page_lock: PageLock | None = None
        block = torch.frombuffer(mmap.mmap(-1, layer.num_bytes), dtype=torch.uint8)
        if page_lock is not None:
            page_lock.lock(block)
            self._page_lock = page_lock
        self.block = block
        try:
            load_layer(layer, checkpoint, names, block)
        except BaseException:
            self.close()
            raise
        for packed in layer.tensors:
            checkpoint.forget(names[packed.name])

    def write_into(self, destination: torch.Tensor) -> None:
        """Write the block."""
        if self.block is None:
            raise RuntimeError("OffloadedModel: the weights must be open, got a closed model")
        destination.copy_(self.block)

    def read_ahead(self) -> None:
        """Do nothing: the block is in memory."""

    def close(self) -> None:
        """Unlock and free the block. Idempotent."""
        block, self.block = self.block, None
        lock, self._page_lock = self._page_lock, None
        if block is not None and lock is not None:
            lock.unlock(block)

    def __del__(self) -> None:
        self.close()


class MappedLayer(HostLayer):
    """A layer that stays in its memory-mapped files; the system's page cache keeps what fits."""

    def __init__(self, layer: DecoderLayer, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self.num_bytes = layer.num_bytes
        self._layer, self._checkpoint, self._names = layer, checkpoint, names

    def write_into(self, destination: torch.Tensor) -> None:
        """Read the layer's tensors from the files."""
        load_layer(self._layer, self._checkpoint, self._names, destination)

    def read_ahead(self) -> None:
        """Let the system read the layer's pages in the background."""
        for packed in self._layer.tensors:
            self._checkpoint.read_ahead(self._names[packed.name])

    def close(self) -> None:
        """Do nothing: the maps belong to the checkpoint."""


def load_layer(layer: DecoderLayer, checkpoint: Checkpoint, names: Mapping[str, str], block: torch.Tensor) -> None:
    """Read a layer's tensors from the checkpoint into a packed block."""
    for packed in layer.tensors:
        checkpoint.copy_into(names[packed.name], packed.view_of(block))


def pack_layers(
    layers: Sequence[DecoderLayer], checkpoint: Checkpoint, names: Mapping[str, str], page_lock: PageLock | None
) -> list[HostLayer]:
    """Read layers into host memory, one block each; all or nothing.

    Raises:
        RuntimeError: the host has too little memory, or too little that can be page-locked; nothing stays allocated.
    """
    needed = sum(layer.num_bytes for layer in layers)
    available = available_host_bytes()
    advice = 'keep more layers on the device, or give host_memory="mapped" to stream from the files'
    if available is not None and needed > available:
        raise RuntimeError(
            f"load_offloaded: the host must have {format_bytes(needed)} of free memory for {len(layers)} layers, "
            f"got {format_bytes(available)}; {advice}"
        )
    packed: list[HostLayer] = []
    try:
        for layer in layers:
            packed.append(PackedLayer(layer, checkpoint, names, page_lock))
    except BaseException as error:
        done = sum(layer.num_bytes for layer in packed)
        for source in packed:
            source.close()
        if isinstance(error, (RuntimeError, OSError, MemoryError)):
            kind = "memory" if page_lock is None else "memory that can be page-locked"
            raise RuntimeError(
                f"load_offloaded: the host must have {format_bytes(needed)} of {kind} for {len(layers)} layers, "
                f"got {format_bytes(done)} ({error}); {advice}"
            ) from error
        raise
    return packed


def available_host_bytes() -> int | None:
    """Memory that the system says new allocations can have, None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        return None
    return None
