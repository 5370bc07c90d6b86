"""Nodes behind which nothing may come: an error where a request gets there, and of no concern elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["DeadEnds"]


class DeadEnds:
    """Remembers, for each request, the dead ends of its newest tree.

    A hook gives their rows some token all the same, since the op wants one, and asks here as the text goes on.
    """

    def __init__(self) -> None:
        self._noted: dict[int, list[tuple[int, list[int]]]] = {}

    def note(self, request: int, num_new: int, path: Sequence[int]) -> None:
        """Remember one behind so many new tokens, the last of which are `path`, from the tree's root on."""
        self._noted.setdefault(request, []).append((num_new, list(path)))

    def reached(self, request: int, new_tokens: Sequence[int]) -> int | None:
        """Forget a request's dead ends. Returns how many new tokens stand before the one that it went past, if any."""
        for num_new, path in self._noted.pop(request, ()):
            if num_new < len(new_tokens) and list(new_tokens[num_new - len(path) : num_new]) == path:
                return num_new
        return None
