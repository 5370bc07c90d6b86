"""`cache`: list what `tree="auto"` has measured and learnt on this machine, or delete it."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from sequoia_kernels.cli.arguments import add_command
from sequoia_kernels.cli.terminal import Terminal


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "cache",
        run,
        "List the measurements that are kept for tree=auto and adaptive, or delete them.",
        "sequoia-kernels cache --clear",
    )
    parser.add_argument("--clear", action="store_true", help="delete them")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels.planner.store import cache_folder, clear_cache, list_cache

    folder, files = cache_folder(), list_cache()
    cleared = clear_cache() if args.clear else 0
    document = {
        "folder": None if folder is None else str(folder),
        "files": [
            {"name": file.path.name, "kind": file.kind, "bytes": file.num_bytes, "modified": file.modified}
            | {"key": file.key}
            for file in files
        ],
        "cleared": cleared,
    }

    def show() -> None:
        if folder is None:
            terminal.out.print("nothing is kept on disk: SEQUOIA_CACHE is off")
            return
        terminal.out.print(str(folder))
        if args.clear:
            terminal.out.print(f"deleted {cleared} files")
            return
        rows = []
        for file in files:
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.modified))
            told = "cannot be read" if file.key is None else _describe(file.kind, file.key)
            rows.append((file.kind, written, str(file.num_bytes), told))
        terminal.table(("kind", "written", "bytes", "belongs to"), rows, left=("kind", "written", "belongs to"))

    terminal.result(document, show)
    return 0


def _describe(kind: str, key: Any) -> str:
    """A key in words, whatever the file says."""
    names = ("target", "draft", "context", "device") if kind == "profile" else ("target", "draft", "sampling")
    if not isinstance(key, dict):
        return json.dumps(key)
    return ", ".join(f"{name} {json.dumps(key.get(name))}" for name in names)
