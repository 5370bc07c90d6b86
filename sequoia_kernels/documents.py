"""Documents: how every tree, plan, profile and acceptance file is read, and how every file is written.

A document is a JSON object that says its format and version. `Format` writes and parses it, `Fields` reads its fields
one by one: what is missing, repeated, of the wrong kind or out of range raises the format's error, in one line that
names the field. `Document` is a value that has such a text and files. `write_text` and `write_bytes` write a file whole
or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import TypeGuard

    from typing_extensions import Self, TypeIs

__all__ = [
    "MAX_COUNT",
    "MAX_TIME_MS",
    "Document",
    "Fields",
    "Format",
    "check_writable",
    "is_count",
    "is_integer",
    "is_number",
    "is_text",
    "parse_json",
    "read_text",
    "write_bytes",
    "write_text",
]

MAX_COUNT = 2**53  # exact as a float64, and a thousand of them add up in an int64
MAX_TIME_MS = 1e12  # 30 years: sums and ratios of times stay finite
MAX_SHOWN = 60  # characters of a value that a message shows

_MISSING = object()


def is_integer(value: object) -> TypeIs[int]:
    """Tell an integer, NumPy's included, from everything else; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Tell a finite number that a float64 can hold from everything else; true and false are no numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: object, least: int = 0) -> TypeGuard[int]:
    """Tell an integer in least..MAX_COUNT from everything else."""
    return is_integer(value) and least <= value <= MAX_COUNT


def is_text(value: object) -> bool:
    """Tell a string."""
    return isinstance(value, str)


@dataclass(frozen=True)
class Format:
    """One kind of document."""

    name: str  # what its "format" field says
    version: int  # what its "version" field says
    error: type[ValueError] = ValueError  # raised for a text that is no such document
    hint: str = ""  # ends the message for a file that is no text at all
    indent: int | None = 1  # of its text; None writes one line

    def dump(self, fields: Mapping[str, Any]) -> str:
        """Give the JSON text of a document. NaN and infinity are refused by `json`."""
        return json.dumps(self.document(fields), indent=self.indent, allow_nan=False) + "\n"

    def document(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Give a document as plain JSON values, format and version first."""
        return {"format": self.name, "version": self.version, **fields}

    def parse(self, text: str, where: str) -> Fields:
        """Read a document that `dump` wrote.

        Args:
            text: the JSON text.
            where: function, and file if any, named in the messages.

        Raises:
            TypeError: text is not a string.
            ValueError: it is no JSON object, a field appears twice, or it is of another format or version; the class
                is `error`.
        """
        if not isinstance(text, str):
            raise TypeError(f"{where}: text must be a str, got {type(text).__name__}")
        try:
            value = parse_json(text)
        except RecursionError:
            raise self.error(f"{where}: the document must be JSON, got brackets nested too deeply") from None
        except ValueError as reason:
            raise self.error(f"{where}: the document must be JSON, got text that is not: {reason}") from None
        if not isinstance(value, dict):
            raise self.error(f"{where}: the document must be a JSON object, got {_shown(value)}")
        name, version = value.get("format", _MISSING), value.get("version", _MISSING)
        if name != self.name:
            raise self.error(f'{where}: the document must have "format": "{self.name}", got {_shown(name)}')
        if version != self.version or isinstance(version, (bool, float)):
            later = is_count(version) and version > self.version
            fix = "upgrade sequoia-kernels to read it" if later else "make the file again with this sequoia-kernels"
            raise self.error(f'{where}: the document must have "version": {self.version}, got {_shown(version)}; {fix}')
        return Fields(value, where, self.error)

    def load(self, path: str | os.PathLike[str], where: str) -> Fields:
        """Read a document from a file. One that cannot be opened raises the ordinary OSError, which names it."""
        where = f"{where}: {os.fspath(path)}"
        try:
            text = read_text(path)
        except UnicodeDecodeError:
            actual = f"bytes that are not UTF-8{self.hint}"
            raise self.error(f"{where}: the document must be JSON text, got {actual}") from None
        return self.parse(text, where)


class Document:
    """A value that is kept as a document; a subclass names the `FORMAT` and says what the fields are."""

    FORMAT: ClassVar[Format]

    def to_fields(self) -> dict[str, Any]:
        """Give the fields of the document as plain JSON values."""
        raise NotImplementedError

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Read the value from the fields of a document; the format's error names the first one that breaks its rule."""
        raise NotImplementedError

    def to_document(self) -> dict[str, Any]:
        """Give the value as what the text of its document says."""
        return self.FORMAT.document(self.to_fields())

    def to_json(self) -> str:
        """Give the value as the text of a JSON document."""
        return self.FORMAT.dump(self.to_fields())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a value from the text that `to_json` wrote.

        Raises:
            TypeError: text is not a string.
            ValueError: it is no such document of this version, or a field breaks its rule; the class is the format's
                error, the message names the field.
        """
        return cls.from_fields(cls.FORMAT.parse(text, f"{cls.__name__}.from_json"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document to a file, which appears whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a value from a file that `save` wrote.

        Raises:
            OSError: the file cannot be opened.
            ValueError: as `from_json`; the message names the file too.
        """
        return cls.from_fields(cls.FORMAT.load(path, f"{cls.__name__}.load"))


class Fields:
    """The fields of one JSON object.

    Args:
        value: the object.
        where: function, and file if any, named in the messages.
        error: raised for a field that breaks its rule.
        path: way from the document to this object, e.g. "models.llama.forwards[0]"; empty for the document itself.
    """

    def __init__(self, value: Any, where: str, error: type[ValueError], path: str = "") -> None:
        self.where, self.error, self.path = where, error, path
        if not isinstance(value, dict):
            raise error(f"{where}: {path} must be an object, got {_shown(value)}")
        self.value: dict[str, Any] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)

    def refuse(self, name: str, rule: str, actual: str | None = None) -> ValueError:
        """Give the error that names a field, its rule, and what is there instead."""
        actual = _shown(self.value.get(name, _MISSING)) if actual is None else actual
        return self.error(f"{self.where}: {self._path_of(name)} must {rule}, got {actual}")

    def get(self, name: str, accepts: Callable[[Any], bool], rule: str, optional: bool = False) -> Any:
        """Give a field's value if it is accepted; where optional, None also for one that is null or missing."""
        value = self.value.get(name)
        if (value is None and not optional) or (value is not None and not accepts(value)):
            raise self.refuse(name, f"be {rule} or null" if optional else f"be {rule}")
        return value

    def text(self, name: str, optional: bool = False) -> Any:
        """Give a string."""
        return self.get(name, is_text, "a string", optional)

    def count(self, name: str, least: int = 1, optional: bool = False) -> Any:
        """Give an integer of at least this."""
        rule = "a positive integer" if least == 1 else f"an integer >= {least}"
        return self.get(name, lambda value: is_count(value, least), rule, optional)

    def number(self, name: str, accepts: Callable[[Any], bool], rule: str, optional: bool = False) -> Any:
        """Give a number as it stands there, an integer or a float."""
        return self.get(name, lambda value: is_number(value) and accepts(value), rule, optional)

    def numbers(self, accepts: Callable[[Any], bool], rule: str) -> dict[str, float]:
        """Give all fields, each of them a number."""
        return {name: float(self.number(name, accepts, rule)) for name in self}

    def time(self, name: str) -> float:
        """Give a time in milliseconds."""
        return float(self.number(name, lambda value: 0 <= value <= MAX_TIME_MS, "a finite number >= 0 of milliseconds"))

    def entries(self, name: str, accepts: Callable[[Any], bool], rule: str, optional: bool = False) -> Any:
        """Give a list, each of whose entries is accepted; the rule is that of the whole list."""
        value = self.get(name, lambda value: isinstance(value, list), rule, optional)
        for index, entry in enumerate(value or ()):
            if not accepts(entry):
                raise self.refuse(name, f"be {rule}", f"{_shown(entry)} at {name}[{index}]")
        return value

    def inside(self, name: str) -> Fields:
        """Give the fields of an object in this one."""
        return Fields(self.value.get(name, _MISSING), self.where, self.error, self._path_of(name))

    def objects(self, name: str) -> list[Fields]:
        """Give the fields of each object of a list."""
        value = self.get(name, lambda value: isinstance(value, list), "a list of objects")
        path = self._path_of(name)
        return [Fields(entry, self.where, self.error, f"{path}[{index}]") for index, entry in enumerate(value)]

    def _path_of(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def parse_json(text: str) -> Any:
    """Read JSON text. Raises ValueError or RecursionError, also for fields that appear twice and numbers like NaN."""
    return json.loads(text, object_pairs_hook=_unique_fields, parse_constant=_refuse_number, parse_float=_finite)


def read_text(path: str | os.PathLike[str]) -> str:
    """Give a file's text. Raises the ordinary OSError, or UnicodeDecodeError for bytes that are not UTF-8."""
    return Path(path).read_bytes().decode("utf-8")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, whole or not at all.

    A regular file appears, or is replaced, at once: readers see the old content or the new one, and of several writers
    one wins. It keeps its mode and, where the system allows it, its owner and group; a name that links to it goes on
    doing so. A device, a pipe, a file that is mounted by itself (as into a container), or one that is this process's
    own output is written to and not replaced.

    Args:
        path: file to write; links are followed.
        data: its new content.

    Raises:
        OSError: the file cannot be written; the error names it, and its old content is untouched.
    """
    path = Path(path)
    present = _stat(path)
    if present is not None and not _is_replaced(present):
        with _open_through(path, present) as file:
            file.write(data)
        return
    with _new_file_beside(path, present) as (name, descriptor), open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
        try:
            os.replace(name, os.path.realpath(path))
        except OSError as error:
            if error.errno != errno.EBUSY or present is None:
                raise
            path.write_bytes(data)  # a mount, whose place nothing takes


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the OSError that writing this file would raise, and leave everything as it is: for work that takes long."""
    path = Path(path)
    present = _stat(path)
    if present is None or _is_replaced(present):
        with _new_file_beside(path, present) as (_, descriptor):
            os.close(descriptor)
    elif stat.S_ISDIR(present.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    elif _own_output(present) is None and not os.access(
        path, os.W_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _own_output(present: os.stat_result) -> int | None:
    """Give the descriptor, 1 or 2, of the output of this process that a file is; None for any other file."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(os.fstat(descriptor), present):
                return descriptor
    return None


def _is_replaced(present: os.stat_result) -> bool:
    """Tell whether a new file takes the place of this one: a regular one that nothing is being printed to."""
    return stat.S_ISREG(present.st_mode) and _own_output(present) is None


def _open_through(path: Path, present: os.stat_result) -> Any:
    """Open what is written to as it is; our own output through the open file, behind what was printed before."""
    descriptor = _own_output(present)
    if descriptor is None:
        return open(path, "wb")
    (sys.stdout if descriptor == 1 else sys.stderr).flush()
    return open(descriptor, "wb", closefd=False)


@contextlib.contextmanager
def _new_file_beside(path: Path, present: os.stat_result | None) -> Iterator[tuple[str, int]]:
    """Open a new file in the folder of the file that a path leads to; if it still has its own name then, it is removed.

    The name is random and must be new, so nobody can lay a link there beforehand, and writers do not share it. Mode,
    owner and group of what is there now are taken over.
    """
    name = os.path.join(os.path.dirname(os.path.realpath(path)), f".{secrets.token_hex(8)}.part")
    try:
        if present is not None:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # what may not be written is not replaced either
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(name, flags, 0o666 if present is None else 0o600)
        if present is not None:
            owners = (os.fchown, -1, present.st_gid), (os.fchown, present.st_uid, -1)
            for change, *values in (*owners, (os.fchmod, stat.S_IMODE(present.st_mode))):
                with contextlib.suppress(OSError):  # only root may give files away; some file systems keep no modes
                    change(descriptor, *values)
        yield name, descriptor
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None  # not the name that nobody knows
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the field {_shown(name)} appears twice")
        fields[name] = value
    return fields


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text[:MAX_SHOWN]} is not a JSON number that a float64 can hold")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _shown(value: Any) -> str:
    """Name a JSON value in a message: short, however long or deep it is."""
    if value is _MISSING:
        return "nothing"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
