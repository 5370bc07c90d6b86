"""The demo's corpus: the standard library of the running interpreter, split into training and held-out files."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

HELD_OUT_ONE_IN = 16
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "__pycache__"})


def corpus_files(stdlib: Path | None = None) -> tuple[list[Path], list[Path]]:
    """List the standard library's own .py files as (training files, held-out files), each sorted by path."""
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    training: list[Path] = []
    held_out: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder) / name
                digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
                (held_out if digest[0] % HELD_OUT_ONE_IN == 0 else training).append(path)
    return training, held_out


def read_texts(files: list[Path]) -> list[str]:
    """Read the files that are valid UTF-8."""
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


def held_out_prompts(num_prompts: int, num_characters: int = 400) -> list[str]:
    """Cut prompts out of the held-out files: text from the middle of each, up to the end of a line.

    Args:
        num_prompts: how many. The files are taken in order of their size, largest first, again from another place when
            there are fewer files than prompts.
        num_characters: length of a prompt before it is cut back to its last complete line.

    Returns:
        The prompts, the same for one Python version.

    Raises:
        ValueError: num_prompts or num_characters is below 1, or no held-out file is that long.
    """
    if num_prompts < 1 or num_characters < 1:
        raise ValueError(
            "held_out_prompts: num_prompts and num_characters must be at least 1, "
            f"got {num_prompts} and {num_characters}"
        )
    texts = [text for text in read_texts(corpus_files()[1]) if len(text) >= 4 * num_characters]
    if not texts:
        raise ValueError(f"held_out_prompts: no held-out file has {4 * num_characters} characters")
    texts.sort(key=len, reverse=True)
    prompts = []
    for index in range(num_prompts):
        turn, place = divmod(index, len(texts))
        text = texts[place]
        start = text.index("\n", len(text) * (turn + 1) // (num_prompts // len(texts) + 3)) + 1
        piece = text[start : start + num_characters]
        prompts.append(piece[: piece.rfind("\n") + 1] or piece)
    return prompts
