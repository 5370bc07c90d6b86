"""What the programs of an interpreted launch do to memory: the interpreter runs one after another, a GPU does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs

__all__ = ["LaunchMemory"]


class LaunchMemory:
    """Context manager that notes every load, store and atomic of interpreted kernels.

    Attributes:
        num_launches: launches seen.
        conflicts: launches in which a program read or wrote bytes that another program of it wrote, so that the result
            may hang on their order, in words. Bytes touched by an atomic are left out: that one gives them an order.
        unwritten: launches that read bytes of a ``new_empty`` which nobody had written, in words.
        outside: launches that touched bytes between or beyond their tensors, in words; of ``compact_kv_cache_``, the
            caches are among them.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.num_launches = 0
        self.conflicts: list[str] = []
        self.unwritten: list[str] = []
        self.outside: list[str] = []
        self._patch = monkeypatch
        self._accesses: dict[str, list[np.ndarray]] = {}
        self._empties: list[tuple[torch.Tensor, np.ndarray]] = []  # and which bytes have been written
        self._caches: list[torch.Tensor] = []  # that the next launch finds through a table of addresses

    def __enter__(self) -> LaunchMemory:
        builder = interpreter.interpreter_builder
        load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        run, new_empty = interpreter.GridExecutor.__call__, torch.Tensor.new_empty

        def watched_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._note("read", ptrs, mask)
            return load(ptrs, mask, *rest)

        def watched_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note("written", ptrs, mask)
            return store(ptrs, value, mask, *rest)

        def watched_atomic(operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note("atomic", ptr, mask)
            return atomic(operation, ptr, value, mask, *rest)

        def watched_run(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._accesses = {"read": [], "written": [], "atomic": []}
            run(executor, *args, **kwargs)
            values = [*args, *kwargs.values(), *self._caches]
            self._judge(executor.fn.__name__, [value for value in values if isinstance(value, torch.Tensor)])
            self._caches = []

        def watched_new_empty(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            empty = new_empty(tensor, *args, **kwargs)
            self._empties.append((empty, np.zeros(empty.untyped_storage().nbytes(), bool)))
            return empty

        table = CompactInputs.table

        def watched_table(inputs: CompactInputs) -> torch.Tensor:
            self._caches = list(inputs.caches)
            return table(inputs)

        self._patch.setattr(CompactInputs, "table", watched_table)
        self._patch.setattr(builder, "create_masked_load", watched_load)
        self._patch.setattr(builder, "create_masked_store", watched_store)
        self._patch.setattr(builder, "create_atomic_rmw", watched_atomic)
        self._patch.setattr(interpreter.GridExecutor, "__call__", watched_run)
        self._patch.setattr(torch.Tensor, "new_empty", watched_new_empty)
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.undo()

    def _note(self, kind: str, ptrs: Any, mask: Any) -> None:
        """Keep the bytes of one access, with the program that made it in the second column."""
        starts = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.int64)
        num_bytes = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        touched = np.unique(starts[:, None] + np.arange(num_bytes))
        x, y, z = interpreter.interpreter_builder.grid_idx
        self._accesses[kind].append(np.stack([touched, np.full_like(touched, (z << 40) + (y << 20) + x)], axis=1))
        for empty, is_written in self._empties:
            inside = touched - empty.untyped_storage().data_ptr()
            inside = inside[(inside >= 0) & (inside < len(is_written))]
            if kind == "written":
                is_written[inside] = True
            elif not is_written[inside].all():
                self._accesses.setdefault("unwritten", []).append(inside[~is_written[inside]])

    def _judge(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        self.num_launches += 1
        none = np.empty((0, 2), np.int64)
        touched = np.concatenate([none, *(one for kind in self._accesses.values() for one in kind if one.ndim == 2)])
        num_outside = (~_inside(np.unique(touched[:, 0]), tensors)).sum()
        if num_outside:
            self.outside.append(f"{kernel}: {num_outside} bytes outside of its tensors")
        read, written, atomic = (
            np.unique(np.concatenate([none, *self._accesses[kind]]), axis=0) for kind in ("read", "written", "atomic")
        )
        written = written[~np.isin(written[:, 0], atomic[:, 0])]
        owned, first = np.unique(written[:, 0], return_index=True)
        if len(owned) < len(written):
            self.conflicts.append(f"{kernel}: {len(written) - len(owned)} bytes written by several programs")
        read = read[np.isin(read[:, 0], owned)]
        foreign = written[first[np.searchsorted(owned, read[:, 0])], 1] != read[:, 1]
        if foreign.any():
            self.conflicts.append(f"{kernel}: {foreign.sum()} bytes read while another program writes them")
        if "unwritten" in self._accesses:
            self.unwritten.append(f"{kernel}: {sum(map(len, self._accesses['unwritten']))} bytes that nobody wrote")


def _inside(addresses: np.ndarray, tensors: list[torch.Tensor]) -> np.ndarray:
    """Whether each address lies between the first and the last byte of some tensor."""
    inside = np.zeros(addresses.shape, bool)
    for tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            offsets = addresses - tensor.data_ptr()
            inside |= (offsets >= 0) & (offsets < (last + 1) * tensor.element_size())
    return inside
