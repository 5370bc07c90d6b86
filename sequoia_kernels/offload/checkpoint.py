"""A folder of safetensors files as one set of tensors: checked as a whole, then memory-mapped."""

from __future__ import annotations

import json
import mmap
import os
import struct
import warnings
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch

from sequoia_kernels.offload.weights import WeightSource

__all__ = ["Checkpoint", "StoredTensor"]

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_LENGTH_BYTES = 8  # little-endian length of the JSON header in front of the data
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_MAX_COUNT = (1 << 64) - 1  # of elements and bytes: the format's own limit, too
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """Where a tensor lies: `num_bytes` from byte `start` of a file."""

    path: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint(WeightSource):
    """All tensors of a model folder, by name; files are mapped on first use and unmapped by `close`.

    The folder holds `model.safetensors`, or shards with `model.safetensors.index.json`; `tensors` says where each lies.

    Raises:
        FileNotFoundError: there are no safetensors files, or a shard that the index names is missing.
        ValueError: a file is truncated or no safetensors file, or lacks a tensor that the index places in it, or the
            index names files outside of the folder.

    Notes:
        Only headers are read here, of all files, so damage is found before the first weight is loaded. What the format
        demands is checked: every byte of a file belongs to exactly one tensor.
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
            shard_of = _parse_json(index.read_bytes())["weight_map"]
            if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
                raise ValueError("weight_map does not name a file for each tensor")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"load_offloaded: {index} must be a safetensors index, got: {error!r}") from error
        for shard in sorted(set(shard_of.values())):
            path = self.folder / shard
            place = PureWindowsPath(shard)  # which knows the separators and the roots of all systems
            if place.anchor or ".." in place.parts:
                raise ValueError(f"load_offloaded: {index} must name files inside its folder, got {shard!r}")
            if not os.path.isfile(path):
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
        mapping, content = self._mapping(stored.path)
        end = stored.start + stored.num_bytes
        size = mapping.size()  # what the file has now: touching a page behind its end would kill the process
        if size < end:
            raise _truncated(stored.path, end, size)
        return content[stored.start : end]

    def _advise(self, name: str, advice: str) -> None:
        stored = self.tensors[name]
        mapping, _ = self._mapping(stored.path)
        if not hasattr(mapping, "madvise") or not hasattr(mmap, advice) or not stored.num_bytes:
            return
        first = stored.start - stored.start % mmap.PAGESIZE
        mapping.madvise(getattr(mmap, advice), first, stored.start + stored.num_bytes - first)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"load_offloaded: {path} must be a safetensors file, got {size} bytes without its header")
        text = file.read(length)
    data_start = _LENGTH_BYTES + length
    if len(text) < length:
        raise _truncated(path, data_start, size)
    try:
        found = _parse_header(path, text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_offloaded: {path} must be a safetensors file, got: {error}") from error
    end = max((stored.start + stored.num_bytes for stored in found.values()), default=data_start)
    if end > size:
        raise _truncated(path, end, size)
    if end < size:
        raise ValueError(
            f"load_offloaded: {path} must be a safetensors file, got {size - end} bytes behind its last tensor"
        )
    return found


def _parse_header(path: Path, text: bytes) -> dict[str, StoredTensor]:
    """Read where the tensors lie; together they cover everything behind the header, and no byte twice."""
    header = _parse_json(text)
    if not text.startswith(b"{"):
        raise ValueError("a header that is no object")
    if (metadata := header.pop("__metadata__", None)) is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is not text")
    data_start = _LENGTH_BYTES + len(text)
    found = {name: _parse_entry(path, data_start, name, entry) for name, entry in header.items()}
    end = data_start
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if stored.start != end:
            raise ValueError(f"{_short(name)} begins at byte {stored.start - data_start}, not at {end - data_start}")
        end += stored.num_bytes
    return found


def _parse_entry(path: Path, data_start: int, name: str, entry: Any) -> StoredTensor:
    fields: Any = entry if isinstance(entry, dict) else {}
    shape, offsets, stored_as = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and isinstance(stored_as, str)):
        raise ValueError(f"no dtype, shape and data_offsets of {_short(name)}")
    dtype = _DTYPES.get(stored_as)
    if dtype is None:
        raise ValueError(f"dtype {_short(stored_as)} of {_short(name)} is not known")
    start, end = offsets
    num_bytes = dtype.itemsize
    for extent in shape:
        num_bytes *= extent
        if num_bytes > _MAX_COUNT:
            raise ValueError(f"a shape of {_short(name)} that no file can hold")
    if end - start != num_bytes:
        raise ValueError(f"{_short(name)} has {end - start} bytes, which do not fit its shape")
    return StoredTensor(path, data_start + start, num_bytes, dtype, tuple(shape))


def _are_counts(values: Any) -> bool:
    # not by isinstance: a bool is an int as well
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _parse_json(text: bytes) -> Any:
    """Parse UTF-8 JSON in which no object has a key twice; raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key that is there twice")
        for string in (*found, *(value for value in found.values() if isinstance(value, str))):
            string.encode()  # escapes may make text that is none
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"the number {constant}")

    return json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)


def _truncated(path: Path, needed: int, size: int) -> ValueError:
    return ValueError(
        f"load_offloaded: {path} must have {needed} bytes, got {size}: the file is truncated; download it again"
    )
