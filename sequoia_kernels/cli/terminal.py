"""Where a command writes, and how it says that its arguments do not go together."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["BadUsage", "Terminal"]

# Texts from files, folders and errors are shown as they are, whatever brackets and colons they hold.
_plain_console = functools.partial(Console, highlight=False, markup=False, emoji=False)


class BadUsage(Exception):
    """Arguments that do not go together; shown without a traceback, exit status 2."""


class Terminal:
    """Where a command writes: results on standard output, everything else on standard error."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.out = _plain_console(soft_wrap=True)
        self.err = _plain_console(stderr=True, quiet=quiet)

    def result(self, document: dict[str, Any], show: Callable[[], None]) -> None:
        """Print the JSON document with --json, else show it for people."""
        if self.as_json:
            self.out.file.write(json.dumps(document, indent=2) + "\n")  # nowhere if standard output is closed
        else:
            show()

    def text(self, text: str) -> None:
        """Print a text as it is."""
        self.out.file.write(text)

    def problem(self, text: str) -> None:
        """Say why the command failed, quiet or not."""
        _plain_console(stderr=True, soft_wrap=True).print(text, style="bold red")

    def note(self, text: str) -> None:
        """Say something that is not a result."""
        self.err.print(text, style="dim")

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, left: Sequence[str] = ()
    ) -> None:
        """Show a table: in a terminal folded to its width, but within no word; elsewhere as wide as it is.

        Columns of text are set to the left, the others to the right.
        """
        table = Table(title=title)
        for column in columns:
            table.add_column(column, justify="left" if column in left else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        measured = self.out.measure(table, options=self.out.options.update(width=100_000))
        width = max(self.out.width, measured.minimum) if self.out.is_terminal else measured.maximum
        _plain_console(width=width).print(table)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[..., None]]:
        """Show a bar; the yielded function takes (done, total, what)."""
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim", markup=False),
        )  # fmt: skip
        with Progress(*columns, console=self.err, transient=False) as bar:
            task = bar.add_task(label, total=None, what="")

            def advance(done: int, total: int, what: str = "") -> None:
                bar.update(task, completed=done, total=total, what=what)

            yield advance
