"""Weights that one product reads together, laid one behind the other: the parameters stay, and are views of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["movable", "packed_rows"]

# Memory that was made in here, by its address in torch, which a weak reference keeps from being another's. Not noted at
# the parameters: what has weak references to it cannot be exchanged by `torch.utils.swap_tensors`.
_made: dict[int, StorageWeakRef] = {}

Group = Sequence[torch.Tensor]  # weights that are read together, in their order


def movable(groups: Iterable[Group]) -> list[bool]:
    """Tell of all the groups of a model whose weights may be given other memory.

    Not if a weight is in two places, of which only one would follow it, or a view of memory that others may hold; and
    not in inference mode's tensors.
    """
    groups = list(groups)
    first: dict[int, tuple[int, ...]] = {}  # of each weight, the first group that it is in
    torn: set[int] = set()
    for group in groups:
        ids = tuple(map(id, group))
        for weight in ids:
            if first.setdefault(weight, ids) != ids or ids.count(weight) > 1:
                torn.update(ids, first[weight])
    distinct = {id(weight): weight for group in groups for weight in group}
    users = Counter(_memory(weight) for weight in distinct.values())

    def alone(weight: torch.Tensor) -> bool:
        memory = _memory(weight)
        whole = users[memory] == 1 and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        return (whole or memory in _made) and id(weight) not in torn and not weight.is_inference()

    _forget_what_is_gone()
    return [all(map(alone, group)) for group in groups]


def packed_rows(weights: Group, may_move: bool = True) -> torch.Tensor | None:
    """Lay weights of equal width one behind the other, and make each parameter a view of its rows there.

    The parameters are the same objects with the same numbers; only their memory is another, and what they had is given
    back. Those that lie so already are left as they are.

    Args:
        weights: in order, all matrices of one width or all vectors.
        may_move: whether they may be given other memory; see `movable`.

    Returns:
        All rows: [rows, width], or [rows] for vectors. None where the weights lie apart and must stay so, or there is
        no memory for them.
    """
    packed = _joined(weights)
    if packed is not None or not may_move:
        return packed
    if weights[0].is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing is copied yet when a graph has been captured
        torch.cuda.synchronize(weights[0].device)  # other streams may be reading what is given back below
    with torch.inference_mode(False), torch.no_grad():
        try:
            packed = torch.cat([weight.detach() for weight in weights])
        except torch.OutOfMemoryError:
            return None
        _made[_memory(packed)] = StorageWeakRef(packed.untyped_storage())  # first: what follows may be interrupted
        for weight, rows in zip(weights, packed.split([weight.shape[0] for weight in weights]), strict=True):
            weight.data = rows
    return packed


def _memory(tensor: torch.Tensor) -> int:
    """What a tensor lies in, for as long as that lives."""
    return int(tensor.untyped_storage()._cdata)


def _forget_what_is_gone() -> None:
    for memory, made in list(_made.items()):
        if made.expired():
            _made.pop(memory, None)


def _joined(weights: Group) -> torch.Tensor | None:
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
