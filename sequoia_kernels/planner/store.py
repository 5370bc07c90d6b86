"""What was measured, kept from process to process: hardware profiles and acceptance evidence, a file each.

The folder is `$SEQUOIA_CACHE_DIR`, or `sequoia-kernels` in `$XDG_CACHE_HOME`, or in `~/.cache`; `SEQUOIA_CACHE=0` keeps
nothing on disk. Every file says in full what it belongs to. One that is broken, of another version or of something else
is passed over with a line in the log, and so is a folder that cannot be written: a cache never fails a caller. Files
are replaced whole; of two processes that write the same one, the later wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sequoia_kernels.documents import read_text, write_text
from sequoia_kernels.planner.evidence import AcceptanceEvidence
from sequoia_kernels.planner.profile import HardwareProfile

__all__ = [
    "StoredFile",
    "cache_folder",
    "clear_cache",
    "list_cache",
    "load_evidence",
    "load_profile",
    "save_evidence",
    "save_profile",
]

logger = logging.getLogger("sequoia_kernels")

Key = Mapping[str, Any]  # what a file belongs to: plain JSON values
KEY_SETTING = "kept_for"  # the field of a profile's settings that holds it
MOST_FILES = 256  # the ones that were written longest ago go first


class StoredFile(NamedTuple):
    """A file of the cache."""

    path: Path
    kind: str  # "profile" or "acceptance"
    num_bytes: int
    modified: float  # when it was written, in seconds since 1970
    key: Key | None  # what it belongs to; None where the file cannot be read


def cache_folder() -> Path | None:
    """Give the folder, which need not exist; None where nothing is kept on disk."""
    if os.environ.get("SEQUOIA_CACHE", "1").strip().lower() in ("0", "off", "false", "no"):
        return None
    own = os.environ.get("SEQUOIA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sequoia-kernels"
    except RuntimeError:  # nobody's home, or that of nobody
        return None


def load_profile(key: Key) -> HardwareProfile | None:
    """Read the profile that was kept for a key; None where there is none."""
    return _load("profile", key)


def save_profile(key: Key, profile: HardwareProfile) -> None:
    """Keep a profile for a key."""
    profile = dataclasses.replace(profile, settings={**profile.settings, KEY_SETTING: dict(key)})
    _save("profile", key, profile.to_json())


def load_evidence(key: Key) -> AcceptanceEvidence | None:
    """Read the evidence that was kept for a key; None where there is none."""
    return _load("acceptance", key)


def save_evidence(key: Key, evidence: AcceptanceEvidence) -> None:
    """Keep evidence for a key."""
    _save("acceptance", key, evidence.to_json(dict(key)))


def list_cache() -> list[StoredFile]:
    """List the files of the cache, the newest first."""
    found = []
    for path in _paths():
        kind = path.name.split("-")[0]
        try:
            status, (_, key) = path.stat(), _read(kind, path)
        except (OSError, ValueError):
            key = None
            if not path.exists():
                continue
            status = path.stat()
        found.append(StoredFile(path, kind, status.st_size, status.st_mtime, key))
    return sorted(found, key=lambda entry: (-entry.modified, entry.path.name))


def clear_cache() -> int:
    """Delete the files of the cache, and the folder if nothing else is in it. Returns how many they were."""
    paths = _paths()
    for path in paths:
        path.unlink(missing_ok=True)
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):  # not there, or not empty: perhaps by now
            folder.rmdir()
    return len(paths)


def key_digest(key: Key) -> str:
    """Give the digest that names a key's file."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:20]


def _paths() -> list[Path]:
    folder = cache_folder()
    if folder is None or not folder.is_dir():
        return []
    return sorted(path for kind in ("profile", "acceptance") for path in folder.glob(f"{kind}-*.json"))


def _path(kind: str, key: Key) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"{kind}-{key_digest(key)}.json"


def _read(kind: str, path: Path) -> tuple[Any, Any]:
    """What a file holds, and what it belongs to."""
    if kind == "profile":
        profile = HardwareProfile.load(path)
        return profile, profile.settings.get(KEY_SETTING)
    return AcceptanceEvidence.from_json(read_text(path), str(path))


def _load(kind: str, key: Key) -> Any | None:
    path = _path(kind, key)
    if path is None:
        return None
    try:
        content, found = _read(kind, path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as reason:
        logger.warning("a file of the cache is passed over: %s (%s)", path, reason)
        return None
    if found == json.loads(json.dumps(dict(key))):  # tuples are lists there
        return content
    logger.warning("a file of the cache is passed over: %s belongs to something else", path)
    return None


def _save(kind: str, key: Key, text: str) -> None:
    path = _path(kind, key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        paths = _paths()
        if len(paths) > MOST_FILES:
            for old in sorted(paths, key=lambda entry: entry.stat().st_mtime)[: len(paths) - MOST_FILES]:
                old.unlink(missing_ok=True)
    except OSError as reason:
        logger.warning("what was measured is not kept: %s cannot be written (%s)", path, reason)
