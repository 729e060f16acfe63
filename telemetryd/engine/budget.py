"""What one slice of a long work may take of the writer: bytes, and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final

SLICE_BYTES: Final = 8 * 1024 * 1024
"""About how much one slice deletes or rewrites, besides a first run of any size."""
_SLICE_S: Final = 0.1
"""How long a slice goes on, on a disk or with an index of words that takes longer than usual."""


class Budget:
    """What a slice may still take: bytes, and time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock() + _SLICE_S
        self._bytes = SLICE_BYTES

    @property
    def is_spent(self) -> bool:
        """Whether the slice has to end."""
        return self._bytes <= 0 or self._clock() >= self._until

    def take(self, rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Take rows, whose last column is their size, as far as their bytes go; a first one is taken whatever its size.

        Rows are read one by one, so that no size is looked up that is not needed.
        """
        taken: list[tuple[Any, ...]] = []
        for *row, size in rows:
            if taken and size > self._bytes:
                self._bytes = 0
                break
            self._bytes -= size
            taken.append(tuple(row))
        return taken
