"""Which pages of the draft's pool belong to which request."""

from __future__ import annotations

__all__ = ["PagePool"]


class PagePool:
    """Pages of equal size that requests take as they grow and give back when they end.

    Args:
        num_pages: pages in all.
        page_size: rows of a page.

    Attributes:
        num_free: pages that nobody has.

    Example:
        >>> pool = PagePool(num_pages=3, page_size=16)
        >>> mine = []
        >>> pool.grow(mine, num_rows=20), mine, pool.num_free
        (True, [0, 1], 1)
        >>> pool.grow([], num_rows=40), pool.num_free
        (False, 1)
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def grow(self, pages: list[int], num_rows: int) -> bool:
        """Let a request's pages hold so many rows; False, and nothing changes, where not enough are free."""
        missing = -(-num_rows // self.page_size) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.pop())
        return True

    def give_back(self, pages: list[int]) -> None:
        """Take a request's pages back; the list is empty then."""
        self._free.extend(reversed(pages))
        pages.clear()
