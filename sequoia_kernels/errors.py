"""Exceptions that a caller may want to catch apart from plain `TypeError` and `ValueError`.

Bad arguments raise `TypeError` (types, dtypes) or `ValueError` (shape, range, layout, device). The classes here stand
for situations in which the arguments may be fine and something else is not: a backend that cannot run on this machine,
a model family that cannot be adapted, a file that cannot be read as what it claims to be.
"""

from __future__ import annotations

__all__ = ["BackendUnavailableError", "ProfileError", "RankError", "TreeFormatError", "UnsupportedModelError"]


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message carries its reason."""


class UnsupportedModelError(ValueError):
    """A model cannot be adapted to tree decoding; the message names the family and why."""


class RankError(RuntimeError):
    """Ranks of a split model cannot go on together: one has ended or failed, or would decide otherwise."""


class ProfileError(ValueError):
    """A hardware profile file is malformed, of another format version, or of another device."""


class TreeFormatError(ValueError):
    """A tree file or string is malformed; the message names the file and the rule that it breaks."""
