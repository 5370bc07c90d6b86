"""Weights that one product reads together, laid one behind the other: the parameters stay, and are views of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from sequoia_kernels.models.quantised import NotNativeError

__all__ = ["packed_rows"]

# Of parameters that were made views: address and size of the memory that was made for them.
_homes = WeakIdKeyDictionary()

Place = tuple[dict[str, Any], str]  # the dictionary in which a tensor is looked up, and its name there


def packed_rows(places: Sequence[Place]) -> torch.Tensor:
    """Lay weights of equal width one behind the other, and make each parameter a view of its rows there.

    The parameters are the same objects with the same numbers; only their memory is another, and what they had is given
    back. Those that lie so already are left as they are.

    Args:
        places: of the weights, in order, all matrices of one width or all vectors.

    Returns:
        All rows: [rows, width], or [rows] for vectors.

    Raises:
        NotNativeError: a weight is a view of other memory, which others may hold.
    """
    weights = [owner[name] for owner, name in places]
    packed = _joined(weights)
    if packed is not None:
        return packed
    for weight in weights:
        memory = _memory(weight)
        alone = memory[1] == weight.numel() * weight.element_size() or memory == _homes.get(weight)
        if not alone or weight.is_inference():
            raise NotNativeError("weights that are read together are views of other memory")
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.cat([weight.detach() for weight in weights])
        for weight, rows in zip(weights, packed.split([weight.shape[0] for weight in weights]), strict=True):
            weight.data = rows
            _homes[weight] = _memory(packed)
    return packed


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and size of what a tensor lies in."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _joined(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Weights that lie one behind the other as one tensor, else None."""
    first = weights[0].detach()
    memory, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == memory and weight.storage_offset() == offset
        if not same or not weight.is_contiguous():
            return None
        offset += weight.numel()
    shape = (sum(weight.shape[0] for weight in weights), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())
