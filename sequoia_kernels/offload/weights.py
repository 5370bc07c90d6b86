"""Where weights come from: a checkpoint's files, or a function that makes them up."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

__all__ = ["MadeWeights", "WeightSource", "normal_weights"]

Fill = Callable[[str, torch.Tensor], None]

# Numbers that are drawn at a time: 64 MiB of float32 at most beside the tensor that is filled.
_DRAWN_AT_ONCE = 1 << 24


class WeightSource(ABC):
    """Tensors by name; `Checkpoint` reads them from files."""

    @abstractmethod
    def copy_into(self, name: str, destination: torch.Tensor) -> None:
        """Write a tensor into a contiguous one of its shape, in host memory or on the device."""

    def read_ahead(self, name: str) -> None:  # noqa: B027
        """Say that a tensor is wanted soon."""

    def forget(self, name: str) -> None:  # noqa: B027
        """Say that a tensor has been copied elsewhere."""

    def close(self) -> None:  # noqa: B027
        """Let go of files. Idempotent."""


class MadeWeights(WeightSource):
    """Weights that `fill(name, tensor)` writes when they are wanted; nothing is kept."""

    def __init__(self, fill: Fill) -> None:
        self._fill = fill

    def copy_into(self, name: str, destination: torch.Tensor) -> None:
        """Make a tensor."""
        self._fill(name, destination)


def normal_weights(seed: int = 0, std: float = 0.02, device: torch.device | str = "cpu") -> Fill:
    """Return a function that fills tensors with reproducible random weights, as a new model has them.

    Args:
        seed: of all of them. A tensor's numbers depend on the seed and its name, not on what was filled before it.
        std: standard deviation of matrices. Vectors named "weight", the gains of norms, are 1, other vectors 0.
        device: where numbers are drawn; another type of device draws others.

    Returns:
        `fill(name, tensor)`.

    Example:
        >>> weight = torch.empty(2, 3)
        >>> normal_weights(seed=1)("layers.0.proj.weight", weight)
        >>> bool((weight.abs() < 1).all())
        True
    """
    device = torch.device(device)

    def fill(name: str, tensor: torch.Tensor) -> None:
        if tensor.ndim < 2 or not tensor.is_floating_point():
            tensor.fill_(1 if name.endswith("weight") else 0)
            return
        # 32 bits: torch's generator on the CPU ignores the upper half of a seed
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        for part in tensor.view(-1).split(_DRAWN_AT_ONCE):
            part.copy_(torch.empty(part.shape, device=device).normal_(0.0, std, generator=generator))

    return fill
