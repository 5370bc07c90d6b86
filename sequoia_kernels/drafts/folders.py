"""Folders of published drafts: a config.json, named weights read one by one, and which format a folder is of.

A format is one `register_format` in the file of its source. Weights are taken by name: what is missing, of another
shape or left over is an error that names the folder, since a draft that lacks a weight would be wrong without a sign.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from sequoia_kernels import checks
from sequoia_kernels.documents import is_count
from sequoia_kernels.drafts.source import DraftSource
from sequoia_kernels.models import TreeModel
from sequoia_kernels.models.loading import local_folder

__all__ = [
    "MAX_LAYERS",
    "DraftFolder",
    "DraftFormat",
    "check_layer_config",
    "draft_from_folder",
    "format_of",
    "register_format",
]

MAX_LAYERS = 1000  # of a draft: transformers makes a list of as many entries as a config says

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # each alone, or as an index of shards
_MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")  # as their trainer names them
_DOWNLOADED = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json",
    "medusa_lm_head.pt",
)  # fmt: skip


class DraftFolder:
    """A folder with a config.json and weights; made by `open`.

    Attributes:
        path: the folder.
        config: what its config.json holds.
        keys: names of its weights.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self.path, self.config = path, config
        self._tensors = tensors
        self._taken: set[str] = set()

    @classmethod
    def open(cls, path_or_id: str | os.PathLike[str], where: str = "draft_from_folder") -> DraftFolder:
        """Read the config, and which weights there are; no weight yet.

        Args:
            path_or_id: a folder, or a hub id such as "organisation/name", whose files are downloaded once.
            where: function named in the messages.

        Raises:
            FileNotFoundError: no such folder, none with a config.json and weights, or the id is neither cached nor
                reachable.
            ValueError: a file cannot be read.
        """
        path = local_folder(path_or_id, where) or _downloaded(os.fspath(path_or_id), where)
        return cls(path, _read_json(path / "config.json", where), _find_tensors(path, where))

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the weights."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a weight, which does not count as taken by that."""
        return tuple(self._tensors[name]().shape)

    def take(
        self, name: str, *aliases: str, shape: Sequence[int | None] | None = None, optional: bool = False
    ) -> torch.Tensor | None:
        """Read one weight.

        Args:
            name: its name.
            aliases: other names of the same weight.
            shape: what its shape must be; None in it allows any size.
            optional: whether it may be missing.

        Returns:
            The weight on the CPU, in the dtype of the file. None where it is missing and may be.

        Raises:
            ValueError: it is missing, there under two names, or of another shape.
        """
        present = [key for key in (name, *aliases) if key in self._tensors]
        if len(present) > 1:
            raise ValueError(f"{self}: must hold {name} under one name, got {' and '.join(present)}")
        if not present:
            if optional:
                return None
            known = f" (or {', '.join(aliases)})" if aliases else ""
            raise ValueError(f"{self}: must hold {name}{known}, got {_listed(sorted(self._tensors))}")
        weight = self._tensors[present[0]]()
        if shape is not None and (
            weight.dim() != len(shape) or any(size not in (None, found) for size, found in zip(shape, weight.shape))
        ):
            wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
            raise ValueError(f"{self}: {present[0]} must have shape {wanted}, got {checks.shape_text(weight.shape)}")
        self._taken.add(present[0])
        return weight

    def need(self, name: str, *aliases: str, shape: Sequence[int | None] | None = None) -> torch.Tensor:
        """Read one weight that must be there; see `take`."""
        weight = self.take(name, *aliases, shape=shape)
        assert weight is not None  # `take` has raised
        return weight

    def check_all_taken(self, unused: Collection[str] = ()) -> None:
        """Raise ValueError where a weight was not taken: a part of the draft that nobody computes.

        Args:
            unused: names of weights that are known to take no part.
        """
        surplus = sorted(self._tensors.keys() - self._taken - set(unused))
        if surplus:
            raise ValueError(f"{self}: must hold no weights beside those of its format, got {_listed(surplus)}")

    def __str__(self) -> str:
        return f"draft folder {self.path}"


class DraftFormat(NamedTuple):
    """A way in which drafts are published.

    Attributes:
        name: such as "eagle3".
        matches: tells by the config whether a folder is of the format.
        load: makes the source of a folder, for a target.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    load: Callable[[DraftFolder, TreeModel], DraftSource]


_formats: dict[str, DraftFormat] = {}


def register_format(draft_format: DraftFormat) -> None:
    """Make a format known by its name. It replaces one of the same name."""
    _formats[draft_format.name] = draft_format


def draft_from_folder(path_or_id: str | os.PathLike[str], target: TreeModel) -> DraftSource | None:
    """Load a published draft.

    Args:
        path_or_id: its folder, or a hub id.
        target: the target that it was trained for, which says on which device and in which dtype it runs.

    Returns:
        The source; None where the folder is of no format that is known here, as a whole language model is.

    Raises:
        FileNotFoundError: as in `DraftFolder.open`.
        ValueError: a file cannot be read, a weight is missing, left over or of another shape, an option is not
            understood, or the draft does not fit the target.
    """
    found = format_of(path_or_id)
    return None if found is None else found.load(DraftFolder.open(path_or_id), target)


def format_of(path_or_id: str | os.PathLike[str]) -> DraftFormat | None:
    """Tell by its config which format a folder is of; None for none that is known here.

    Args:
        path_or_id: the folder, or a hub id, of which nothing but the config is downloaded.

    Raises:
        FileNotFoundError: as in `DraftFolder.open`.
        ValueError: the config cannot be read.
    """
    where = "draft_from_folder"
    path = local_folder(path_or_id, where) or _downloaded(os.fspath(path_or_id), where, ("config.json",))
    config = _read_json(path / "config.json", where)
    return next((known for known in _formats.values() if known.matches(config)), None)


def check_layer_config(config: Any, where: str) -> None:
    """Refuse numbers that transformers takes as they are and then fails at, or computes nonsense by.

    Args:
        config: transformers' configuration of layers of the families Llama or Qwen3.
        where: what messages begin with, such as the folder.

    Raises:
        ValueError: a number is out of range, or rotary embeddings cannot be made of rope_parameters.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    checks.check_number(where, "rms_norm_eps", config.rms_norm_eps, checks.NOT_NEGATIVE)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if slides and not (is_count(config.sliding_window, 1) and config.sliding_window < 1 << 31):
        checks.fail_range(where, "sliding_window", "be an integer in [1, 2^31)", f"{config.sliding_window!r:.60}")
    try:
        rotary = LlamaRotaryEmbedding(config)
        frequencies, scaling = rotary.inv_freq.tolist(), float(rotary.attention_scaling)
    except Exception as error:  # what arithmetic says of its operands
        actual = f"{config.rope_parameters!r:.200}: {error}"
        raise ValueError(f"{where}: rope_parameters must be those of a rotary embedding, got {actual}") from error
    if not all(map(math.isfinite, (*frequencies, scaling))):
        checks.fail_range(where, "rope_parameters", "give finite frequencies", f"{config.rope_parameters!r:.200}")


def _downloaded(name: str, where: str, files: Sequence[str] = _DOWNLOADED) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # of the connection and of the hub; a name that can be no id
        raise FileNotFoundError(
            f"{where}: {name!r} must be an existing folder or a hub id that can be reached or is cached, got: {error}"
        ) from error


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {path} must be a readable JSON file, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {path} must hold a JSON object, got {type(value).__name__}")
    return value


def _find_tensors(folder: Path, where: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Give how to read each weight, by its name."""
    for name in (*_WEIGHT_FILES, *_MEDUSA_FILES):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = {name}
        elif index.is_file():
            shards = _read_json(index, where).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{where}: {index} must map weights to files as weight_map, got {shards!r:.60}")
            files = set(shards.values())
        else:
            continue
        read = _safetensors if name.endswith(".safetensors") else _pickled
        found: dict[str, Callable[[], torch.Tensor]] = {}
        for file in sorted(files):
            try:
                found |= read(folder / Path(file).name)
            except Exception as error:  # safetensors and pickle raise classes of their own for damaged files
                raise ValueError(f"{where}: {folder / file} must hold readable weights, got: {error}") from error
        return found
    raise FileNotFoundError(f"{where}: path_or_id must be a folder with {' or '.join(_WEIGHT_FILES)}, got {folder}")


def _safetensors(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    def read(name: str) -> torch.Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except SafetensorError as error:
            raise ValueError(f"{path} must hold a readable {name}, got: {error}") from error

    with safe_open(path, framework="pt") as file:
        return {name: partial(read, name) for name in file.keys()}  # noqa: SIM118  # it is no mapping


def _pickled(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    # weights_only: a pickle of a stranger's could run code. Mapped, so that a weight is read when it is taken.
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise ValueError("not a mapping of names to tensors")
    return {str(name): weight.detach for name, weight in weights.items()}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "no weights") + more
