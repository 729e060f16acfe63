"""Makes UUIDs that begin with the time (version 7); the client uses them as well."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Final

_TICKS_PER_MS: Final = 4096
"""A millisecond is divided into as many ticks as 12 bits can count (RFC 9562, section 6.2, method 3)."""


class TimeOrderedUuids:
    """Makes UUIDs of version 7 (RFC 9562), each greater than the one before, whatever the clock does.

    Rows with such ids go to the end of an index, where random ids each dirty another page of it.

    Args:
        clock_ns: gives the nanoseconds since 1970.

    """

    def __init__(self, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._clock_ns = clock_ns
        self._last = 0
        self.forked()

    def forked(self) -> None:
        """Make other UUIDs than the parent process from here on; call it in a child after a fork."""
        # Our own generator: the agent may seed the shared one, and asking the system each time costs a call.
        self._random = random.Random()  # noqa: S311 - unique, not secret
        # A handler of a signal may interrupt this thread inside, and another thread may have held it at the fork.
        self._lock = threading.RLock()

    def __call__(self) -> str:
        """Return the next one, such as 019b5f3c-6d00-7a3f-9c41-0f0d5a7e2b11."""
        with self._lock:
            # A clock that stands still or goes back is left behind, one tick for each UUID (section 6.2).
            ticks = self._last = max(self._clock_ns() * _TICKS_PER_MS // 1_000_000, self._last + 1)
        milliseconds, fraction = divmod(ticks, _TICKS_PER_MS)
        number = milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | self._random.getrandbits(62)
        digits = f"{number:032x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


new_uuid: Final = TimeOrderedUuids()
"""Makes the UUIDs of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=new_uuid.forked)
