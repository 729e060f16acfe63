"""Watches the database's disk from a thread: free space, size of the write-ahead log, files moved or replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from telemetryd.errors import LowDiskError
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics

_ENOUGH: Final = 1.25
"""Writes are taken again when there is a quarter more room than the reserve, or they would go on and off."""


@dataclass(frozen=True, slots=True)
class Look:
    """What there was to see."""

    free_bytes: int
    wal_bytes: int
    displaced: str | None
    """Which file is not at its place any more, in a sentence, or None."""


class Disk:
    """Remembers the last look at the disk, so that nobody on the event loop waits for it.

    Args:
        look: takes a look; it may block, and raises OSError if there is nothing to see.
        reserve_bytes: with less room than that, no new writes are taken.
        metrics: where the figures are shown.
        patience_s: a disk that has not answered for so long is itself a problem.

    """

    def __init__(
        self, look: Callable[[], Look], reserve_bytes: int, metrics: Metrics, patience_s: float = 10.0
    ) -> None:
        self._look = look
        self._reserve_bytes = reserve_bytes
        self._metrics = metrics
        self.patience_s = patience_s
        self._asked: float | None = None
        self._opened_again = 0
        self._failure: str | None = None
        self._is_low = False
        self.last = Look(0, 0, None)
        """The last look that succeeded."""

    async def look(self) -> None:
        """Take a look in a thread, however long that takes."""
        self._asked, opened_again = time.monotonic(), self._opened_again
        try:
            look = await asyncio.to_thread(self._look)
        except OSError as error:
            self._failure = f"Cannot look at the disk: {error}"
            return
        finally:
            self._asked = None
        self._failure = None
        self.last = look if opened_again == self._opened_again else replace(look, displaced=None)
        self._metrics.show_disk(look.free_bytes, look.wal_bytes)
        self._weigh(look.free_bytes)

    def _weigh(self, free_bytes: int) -> None:
        is_low = free_bytes < self._reserve_bytes * (_ENOUGH if self._is_low else 1)
        if is_low is self._is_low:
            return
        self._is_low = is_low
        sizes = {"free_bytes": free_bytes, "reserve_bytes": self._reserve_bytes, "setting": "TELEMETRY_MIN_FREE_MB"}
        if is_low:
            log.error("The disk is almost full: writes are refused", extra=sizes)
        else:
            log.info("The disk has room again: writes are taken", extra=sizes)

    def forget_displaced(self) -> None:
        """Forget which file was not at its place, also what a look says of it that has begun: it is opened again."""
        self._opened_again += 1
        self.last = replace(self.last, displaced=None)

    def check_room(self) -> None:
        """Raise LowDiskError while there is less room than the reserve."""
        if self._is_low:
            raise LowDiskError

    @property
    def problem(self) -> str | None:
        """Why writes are not taken, or should not be trusted, or None."""
        if self._asked is not None and (silent_s := time.monotonic() - self._asked) > self.patience_s:
            return f"The disk has not answered for {silent_s:.0f} s"
        if self._is_low:
            free, least = self.last.free_bytes >> 20, self._reserve_bytes >> 20
            return f"The disk is almost full: {free} MiB are left, and {least} are kept free (TELEMETRY_MIN_FREE_MB)"
        return self.last.displaced or self._failure


class LogWatch:
    """Reports what keeps the write-ahead log from being written back, and which process it is if that is known.

    The size alone says nothing: a long write of our own makes a long log, which is written back when it is committed,
    and cut off with the commit after that.

    Args:
        longest: how long the log may become without a word.
        measure: finds out in the writer's thread, between two commits, how many bytes could not be written back; None
            if that cannot be asked now.
        is_reading: whether queries or exports of our own are at work.

    """

    def __init__(
        self, longest: int, measure: Callable[[], asyncio.Future[int] | None], is_reading: Callable[[], bool]
    ) -> None:
        self._longest = longest
        self._measure = measure
        self._is_reading = is_reading
        self._asked: asyncio.Future[int] | None = None
        self._was_kept = False
        self._told = False

    def look(self, size: int) -> None:
        """Take in the size of the log; call it again and again."""
        if size <= self._longest:
            if self._told:
                log.info("The write-ahead log is short again", extra={"wal_bytes": size})
            self._was_kept = self._told = False
        elif not self._told:
            if self._asked is None:
                self._asked = self._measure()
            elif self._asked.done():  # if not, a write of our own is at work
                self._judge(self._asked, size)
                self._asked = None

    def _judge(self, answer: asyncio.Future[int], size: int) -> None:
        is_kept = answer.exception() is None and answer.result() > self._longest // 2
        if is_kept and self._was_kept:  # twice: a query of a moment is none that holds the log up
            holder = "a query or an export of this daemon" if self._is_reading() else "another program"
            log.warning(
                f"The write-ahead log grows: {holder} holds a snapshot of the database", extra={"wal_bytes": size}
            )
            self._told = True
        self._was_kept = is_kept
