"""Versioned JSON documents of the planner: written with a format name, refused when they are something else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["dump_document", "is_number", "load_document", "parse_document"]


def dump_document(fields: Mapping[str, Any], format_name: str, version: int) -> str:
    """Give a document's JSON text, its format name and version first. NaN and infinity are refused by `json`."""
    return json.dumps({"format": format_name, "version": version, **fields}, indent=1, allow_nan=False) + "\n"


def parse_document(
    text: str, format_name: str, version: int, where: str, error: type[ValueError] = ValueError
) -> dict[str, Any]:
    """Parse a document and check that it is of this format and version.

    Args:
        text: the JSON text.
        format_name: what its "format" field must be.
        version: what its "version" field must be.
        where: file or function named in the message.
        error: exception raised for anything that is not such a document.
    """
    if not isinstance(text, str):
        raise TypeError(f"{where}: text must be a str, got {type(text).__name__}")
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise error(f"{where}: the document must be JSON, got brackets nested too deeply") from None
    except ValueError as reason:
        raise error(f"{where}: the document must be JSON, got text that is not ({reason})") from None
    if not isinstance(document, dict) or "format" not in document:
        raise error(f'{where}: the document must have a "format" field saying "{format_name}", got none')
    if document["format"] != format_name:
        raise error(f'{where}: "format" must be "{format_name}", got {document["format"]!r}')
    found = document.get("version")
    if isinstance(found, bool) or found != version:
        raise error(
            f'{where}: "version" must be {version}, got {found!r}; '
            "make the file again with this version of sequoia-kernels"
        )
    return document


def load_document(
    path: str | os.PathLike[str], format_name: str, version: int, where: str, error: type[ValueError] = ValueError
) -> dict[str, Any]:
    """Read and parse a document. A file that cannot be opened raises the ordinary OSError, which names it."""
    where = f"{where}: {os.fspath(path)}"
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise error(f"{where}: the document must be JSON text, got bytes that are not UTF-8") from None
    return parse_document(text, format_name, version, where, error)


def is_number(value: object) -> bool:
    """Tell a finite JSON number from everything else; true and false are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
