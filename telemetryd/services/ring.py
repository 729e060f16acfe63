"""A ring of the newest pages in the order of the commits, and each subscriber's cursor into it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from telemetryd.services.frames import Frame, Held

_LIST_BYTES: Final = 256
"""About how many bytes a list of frames takes in addition to their texts."""


@dataclass(frozen=True, slots=True)
class Page:
    """The frames that were handed out at once."""

    last: int
    """The last number of the sequence in it."""
    pieces: Mapping[str, Sequence[Frame]]
    """What each filter lets through, by the filter's key; nothing for those that let nothing through."""
    frames: frozenset[Frame]
    """All of them, each once."""
    size: int


@dataclass(slots=True)
class RingCursor:
    """A subscriber's position in a ring: which page comes next, and what of it was taken already."""

    key: str
    """The key of the filters that select what is taken."""
    page: int
    """Pages are numbered in their order."""
    index: int
    seq: int
    """The number up to which everything was taken; at the ring's end it may be more."""


class Ring:
    """Pages in the order of the commits: kept until all have taken them, or until there are too many bytes.

    A subscriber whose page is dropped is lapped: it gets nothing more here, and reads on from the database.

    Args:
        held: counts the frames of all pages.

    """

    def __init__(self, held: Held) -> None:
        self.last = 0
        """The number up to which everything was appended."""
        self.bytes = 0
        self._held = held
        self._pages: deque[Page] = deque()
        self._first = 0
        self._standing: Counter[int] = Counter()
        """How many cursors are at each page, and at the end."""

    @property
    def _end(self) -> int:
        return self._first + len(self._pages)

    def enter(self, key: str) -> RingCursor:
        """Return a cursor at the end: what is appended from now on has to say what the key's filters let through."""
        self._standing[self._end] += 1
        return RingCursor(key, self._end, 0, self.last)

    def leave(self, cursor: RingCursor) -> None:
        """Keep nothing more for a cursor."""
        if not self.has_lapped(cursor):
            self._standing[cursor.page] -= 1
            self._trim()

    def has_lapped(self, cursor: RingCursor) -> bool:
        """Return whether the cursor's page was dropped."""
        return cursor.page < self._first

    def position(self, cursor: RingCursor) -> int:
        """Return up to which number of the sequence a cursor has taken everything."""
        return self.last if cursor.page == self._end else cursor.seq

    def append(self, last: int, pieces: Mapping[str, Sequence[Frame]], most_bytes: int) -> None:
        """Append what was committed up to a number; if that is too much, drop what is oldest, but not this."""
        if pieces:
            frames = frozenset(chain.from_iterable(pieces.values()))
            for frame in frames:
                self._held.acquire(frame)
            size = sum(len(frame.text) for frame in frames) + _LIST_BYTES * len(pieces)
            self._pages.append(Page(last, pieces, frames, size))
            self.bytes += size
            while self.bytes > most_bytes and len(self._pages) > 1:
                self._drop()
            self._trim()  # no cursor may be at the rest
        self.last = max(self.last, last)

    def clear(self) -> None:
        """Drop everything."""
        while self._pages:
            self._drop()

    def take(self, cursor: RingCursor) -> Frame | None:
        """Return the next frame for a cursor, acquired for the caller; None at the end, or if it is lapped."""
        if self.has_lapped(cursor) or cursor.page == self._end:
            return None
        frame = self._pages[cursor.page - self._first].pieces[cursor.key][cursor.index]
        self._held.acquire(frame)
        cursor.index += 1
        cursor.seq = frame.seq
        self.advance(cursor)
        return frame

    def advance(self, cursor: RingCursor) -> None:
        """Let a cursor pass the pages that have nothing more for it."""
        while self._first <= cursor.page < self._end:
            page = self._pages[cursor.page - self._first]
            if cursor.index < len(page.pieces.get(cursor.key, ())):
                return
            self._standing[cursor.page] -= 1
            cursor.page += 1
            cursor.index = 0
            cursor.seq = page.last
            self._standing[cursor.page] += 1
            self._trim()

    def _trim(self) -> None:
        while self._pages and self._standing[self._first] <= 0:
            self._drop()

    def _drop(self) -> None:
        page = self._pages.popleft()
        self._standing.pop(self._first, None)
        self._first += 1
        self.bytes -= page.size
        for frame in page.frames:
            self._held.release(frame)
