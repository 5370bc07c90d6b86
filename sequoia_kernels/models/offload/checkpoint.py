"""A folder of safetensors files as one set of tensors: checked as a whole, then memory-mapped."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Checkpoint", "StoredTensor"]

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_LENGTH_BYTES = 8  # little-endian length of the JSON header in front of the data
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """Where a tensor lies: `num_bytes` from byte `start` of a file."""

    path: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """All tensors of a model folder, by name; files are mapped on first use and unmapped by `close`.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`.

    Attributes:
        tensors: where each tensor lies.

    Raises:
        FileNotFoundError: there are no safetensors files, or a shard that the index names is missing.
        ValueError: a file is truncated or no safetensors file, or lacks a tensor that the index places in it.

    Notes:
        Only headers are read here, of all files, so damage is found before the first weight is loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._maps: dict[Path, tuple[mmap.mmap, torch.Tensor]] = {}
        index = folder / _INDEX_NAME
        if index.is_file():
            self._read_index(index)
        elif (folder / _SINGLE_NAME).is_file():
            self.tensors.update(_read_header(folder / _SINGLE_NAME))
        else:
            raise FileNotFoundError(
                f"load_offloaded: {folder} must hold {_SINGLE_NAME} or {_INDEX_NAME}, got neither; "
                "write them with save_pretrained"
            )

    def _read_index(self, index: Path) -> None:
        try:
            shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"load_offloaded: {index} must be a safetensors index, got: {error!r}") from error
        for shard in sorted(set(shard_of.values())):
            path = self.folder / shard
            if not path.is_file():
                missing = sum(place == shard for place in shard_of.values())
                raise FileNotFoundError(
                    f"load_offloaded: {self.folder} must hold all shards of its index, got no {shard}, which has "
                    f"{missing} tensors; download it again"
                )
            found = _read_header(path)
            self.tensors.update({name: tensor for name, tensor in found.items() if shard_of.get(name) == shard})
        absent = sorted(shard_of.keys() - self.tensors.keys())
        if absent:
            raise ValueError(
                f"load_offloaded: {self.folder / shard_of[absent[0]]} must hold {absent[0]}, as the index says, "
                "got a file without it; download it again"
            )

    def copy_into(self, name: str, destination: torch.Tensor) -> None:
        """Copy a tensor into a contiguous one of its shape, converting its dtype where they differ."""
        stored = self.tensors[name]
        source = self._bytes(stored)
        if destination.dtype == stored.dtype:
            destination.view(-1).view(torch.uint8).copy_(source)
            return
        if stored.start % stored.dtype.itemsize:
            source = source.clone()  # a view of another dtype needs an aligned start
        destination.copy_(source.view(stored.dtype).view(stored.shape))

    def read_ahead(self, name: str) -> None:
        """Ask the system to bring a tensor's pages into memory; returns at once."""
        self._advise(name, "MADV_WILLNEED")

    def forget(self, name: str) -> None:
        """Let the system take back a tensor's pages, which have been copied elsewhere."""
        self._advise(name, "MADV_DONTNEED")

    def close(self) -> None:
        """Unmap the files. Idempotent; a later `copy_into` maps them again."""
        self._maps.clear()

    def _mapping(self, path: Path) -> tuple[mmap.mmap, torch.Tensor]:
        if path not in self._maps:
            with open(path, "rb") as file, warnings.catch_warnings():
                # A read-only map cannot fail for want of memory; torch warns that writing to it would be an error.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps[path] = mapping, torch.frombuffer(mapping, dtype=torch.uint8)
        return self._maps[path]

    def _bytes(self, stored: StoredTensor) -> torch.Tensor:
        return self._mapping(stored.path)[1][stored.start : stored.start + stored.num_bytes]

    def _advise(self, name: str, advice: str) -> None:
        stored = self.tensors[name]
        mapping, _ = self._mapping(stored.path)
        if not hasattr(mapping, "madvise") or not hasattr(mmap, advice):
            return
        first = stored.start - stored.start % mmap.PAGESIZE
        mapping.madvise(getattr(mmap, advice), first, stored.start + stored.num_bytes - first)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"load_offloaded: {path} must be a safetensors file, got {size} bytes without its header")
        text = file.read(length)
    data_start = _LENGTH_BYTES + length
    if len(text) < length:
        raise _truncated(path, data_start, size)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, end = (data_start + int(offset) for offset in entry["data_offsets"])
            dtype = _DTYPES.get(entry["dtype"])
            shape = tuple(int(extent) for extent in entry["shape"])
            if dtype is None:
                raise ValueError(f"dtype {entry['dtype']} of {name} is not known")
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {end - start} bytes, which do not fit its shape")
            found[name] = StoredTensor(path, start, end - start, dtype, shape)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load_offloaded: {path} must be a safetensors file, got: {error}") from error
    needed = max((stored.start + stored.num_bytes for stored in found.values()), default=data_start)
    if needed > size:
        raise _truncated(path, needed, size)
    return found


def _truncated(path: Path, needed: int, size: int) -> ValueError:
    return ValueError(
        f"load_offloaded: {path} must have {needed} bytes, got {size}: the file is truncated; download it again"
    )
