"""Tree files: versioned JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sequoia_kernels.errors import TreeFormatError

__all__ = ["FORMAT", "VERSION", "TreeFormatError", "dump_tree", "parse_tree", "read_text", "write_bytes", "write_text"]

FORMAT = "sequoia-kernels/tree"
VERSION = 1
FIELDS = ("format", "version", "parents")


def dump_tree(parents: Sequence[int]) -> str:
    """Return the JSON document of a tree."""
    return json.dumps({"format": FORMAT, "version": VERSION, "parents": list(parents)}) + "\n"


def parse_tree(text: str, where: str) -> list[int]:
    """Return the parents that a document holds. Checks the document, not the tree.

    Args:
        text: what `dump_tree` wrote.
        where: file or argument named in the messages.

    Raises:
        TreeFormatError: the text breaks a rule of the format.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise TreeFormatError(f"{where} must be a tree in JSON, got brackets nested too deeply") from None
    except ValueError as reason:
        raise TreeFormatError(f"{where} must be a tree in JSON, got text that is not: {reason}") from None
    if not isinstance(document, dict):
        raise TreeFormatError(f"{where} must be a JSON object, got {_json_kind(document)}")
    if document.get("format") != FORMAT:
        actual = repr(document["format"]) if "format" in document else "no such field"
        raise TreeFormatError(f'{where} must have "format": "{FORMAT}", got {actual}')
    version = document.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        actual = repr(version) if "version" in document else "no such field"
        raise TreeFormatError(f'{where} must have a "version" of at least 1, got {actual}')
    if version > VERSION:
        raise TreeFormatError(
            f'{where} must have a "version" of at most {VERSION}, got {version}; upgrade sequoia-kernels to read it'
        )
    unknown = sorted(set(document) - set(FIELDS))
    if unknown:
        raise TreeFormatError(f"{where} must have no fields but {', '.join(FIELDS)}, got {unknown[0]!r}")
    if "parents" not in document:
        raise TreeFormatError(f'{where} must have a "parents" field, got none')
    parents = document["parents"]
    if not isinstance(parents, list):
        raise TreeFormatError(f'{where} must have a list as "parents", got {_json_kind(parents)}')
    for node, parent in enumerate(parents):
        if isinstance(parent, bool) or not isinstance(parent, int):
            raise TreeFormatError(
                f'{where} must have integers in "parents", got {_json_kind(parent)} at parents[{node}]'
            )
    return parents


def read_text(path: str | os.PathLike[str]) -> str:
    """Return a file's text. A file that cannot be opened raises the ordinary OSError, which names it."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise TreeFormatError(
            f"TokenTree.load: {os.fspath(path)} must be JSON text, got bytes that are not UTF-8; "
            "TokenTree.from_growmap tells how to import a .pt grow map"
        ) from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, whole or not at all: under another name in its directory first, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {repeated!r} appears twice")
    return fields


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "a string" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
