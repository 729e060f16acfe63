"""Finds the leaf pages of a table in a file that may be damaged, and the numbers of the rows that stand in them.

It reads the file itself (sqlite.org/fileformat2.html, section 1.6), so it only says where to look. SQLite reads the
rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

FIRST_NUMBER: Final = -(2**63)
LAST_NUMBER: Final = 2**63 - 1
_INTERIOR: Final = 0x05
_LEAF: Final = 0x0D
_FILE_HEADER: Final = 100
"""Bytes before the header of the first page."""
_ENTRY: Final = 9
"""Bytes that a page needs for each one below it, as a rule."""
_DEEPEST: Final = 20
"""SQLite goes no deeper either."""


class Leaf(NamedTuple):
    """A leaf page, and the range of row numbers for which SQLite would look there.

    The ranges of two leaves never overlap, whatever the pages above them say.
    """

    low: int
    high: int
    """Less than `low` where the range is a lie."""
    page: int
    depth: int
    """How many pages are above it."""
    cells: int | None
    """How many rows it says that it has, or None for what is no page of a table."""

    @property
    def is_lie(self) -> bool:
        """Whether its range is a lie, so that only its own cells say which rows it has."""
        return self.low > self.high


class TableFile:
    """A database file as pages of tables.

    Args:
        descriptor: of the file, open for reading.
        page_size: as SQLite reports it.

    """

    def __init__(self, descriptor: int, page_size: int) -> None:
        self._descriptor = descriptor
        self._page_size = page_size

    def leaves(self, root: int) -> Iterator[Leaf]:
        """Yield the leaves of a table in their order, each once; what stands in the place of one counts as one."""
        seen: set[int] = set()
        waiting = [(root, FIRST_NUMBER, LAST_NUMBER, 0)]
        while waiting:
            number, low, high, depth = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            page = self._page(number)
            if page is None or depth > _DEEPEST:
                yield Leaf(low, high, number, depth, None)
            elif page.kind == _LEAF:  # only a table without rows has an empty one
                yield Leaf(low, high, number, depth, None if depth and not page.count else page.count)
            else:
                children = page.children(low, high)
                waiting += reversed([(child, first, last, depth + 1) for child, first, last in children])

    def pages_below(self, gone: Leaf, deepest: int) -> float:
        """Return how many leaves are lost with a page, if the others are so many levels deep: an estimate."""
        if gone.depth >= deepest:
            return 1
        pages: int = (self._page_size // _ENTRY) ** (deepest - gone.depth)
        return pages / 2 if gone.high == LAST_NUMBER else pages  # the last one is still being filled

    def numbers(self, leaf: Leaf) -> list[int]:
        """Return the numbers of the rows that a leaf says it has; what is damaged gives numbers of no row."""
        page = self._page(leaf.page)
        return [] if page is None or page.kind != _LEAF else list(page.numbers())

    def _page(self, number: int) -> _Page | None:
        """Return a page of a table, or None if it is none."""
        try:
            content = os.pread(self._descriptor, self._page_size, (number - 1) * self._page_size)
        except (OSError, OverflowError):  # nothing is there, or the disk cannot read it
            return None
        if not content:
            return None
        # SQLite also takes zeros for the rest of a page at which a file was cut off.
        page = _Page(content.ljust(self._page_size, b"\0"), _FILE_HEADER if number == 1 else 0)
        is_valid = (
            page.kind in (_INTERIOR, _LEAF) and page.count <= (self._page_size - 8) // 6
        )  # as btreeInt.h, MX_CELL
        return page if is_valid else None


class _Page:
    """A page, whose header begins at `start`."""

    def __init__(self, content: bytes, start: int) -> None:
        self._content = content
        self._start = start
        self.kind = content[start]
        self.count = int.from_bytes(content[start + 3 : start + 5], "big")

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of the rows of a leaf."""
        for place in self._cells(8):
            _, after = _varint(self._content, place)
            yield _signed(_varint(self._content, after)[0])

    def children(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """Yield the pages below one that is no leaf, with the range of row numbers of each.

        A key that is out of order, or out of the range of the page itself, is a lie: its range is empty.
        """
        for place in self._cells(12):
            key = _signed(_varint(self._content, place + 4)[0])
            is_lie = not low <= key <= high
            yield int.from_bytes(self._content[place : place + 4], "big"), low, low - 1 if is_lie else key
            low = low if is_lie else key + 1
        yield int.from_bytes(self._content[self._start + 8 : self._start + 12], "big"), low, high

    def _cells(self, header: int) -> Iterator[int]:
        """Yield where its cells begin."""
        first = self._start + header
        for place in range(first, first + 2 * self.count, 2):
            yield int.from_bytes(self._content[place : place + 2], "big") & (len(self._content) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number > LAST_NUMBER else number


def _varint(page: bytes, start: int) -> tuple[int, int]:
    """Return an integer of one to nine bytes, and where it ends."""
    value = 0
    for place in range(start, min(start + 8, len(page))):
        value = value << 7 | page[place] & 0x7F
        if page[place] < 0x80:
            return value, place + 1
    return value << 8 | (page[start + 8] if start + 8 < len(page) else 0), start + 9
