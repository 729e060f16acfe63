"""Keeps a folder within size and age limits: sent files go first, then dead letters, then the oldest unsent lines."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from telemetryd.client.complaints import Complaints
from telemetryd.client.config import Config
from telemetryd.client.counters import Counters
from telemetryd.client.dead_letters import DEAD, dead_letter_files
from telemetryd.client.folder import ACTIVE, READY, SYNCED, Entry, entries, is_ours, open_regular
from telemetryd.client.streams import Stream

_ORDER: Final = {SYNCED: 0, DEAD: 1, READY: 2, ACTIVE: 2}
_LETTER: Final = b'{"time":'
"""The beginning of each dead letter."""
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a folder may hold, and for how long."""

    max_bytes: int
    max_age_s: float
    keep_s: float


Dropped = Callable[[Entry, int, str], None]
"""Gets each file with lines that were not stored and are given up: the file, its lines, and why."""


def enforce(folder: Path, bounds: Bounds, own: Stream | None, dropped: Dropped, now: float | None = None) -> None:
    """Keep a folder within its bounds, at the given time (seconds since the epoch; by default now).

    A file that is being written is never touched, nor is one that another living process sends, which does this itself.

    Raises:
        OSError: the first of what could not be done; everything else is done all the same.

    """
    now = time.time() if now is None else now
    failures: list[OSError] = []
    found = [*entries(folder), *dead_letter_files(folder)]
    excess = sum(entry.size for entry in found) - bounds.max_bytes
    for entry in sorted(found, key=lambda entry: _ORDER[entry.state]):  # and by age, as they are already
        is_old = now - entry.modified > (bounds.keep_s if entry.state == SYNCED else bounds.max_age_s)
        if not is_old and excess <= 0:
            continue
        reason = f"older than {bounds.max_age_s / 86400:g} days" if is_old else "the folder is over its bound"
        try:
            is_gone = _give_up(folder, entry, own, dropped, reason)
        except OSError as error:
            failures.append(error)
        else:
            excess -= entry.size if is_gone else 0
    if failures:
        raise failures[0]


def _give_up(folder: Path, entry: Entry, own: Stream | None, dropped: Dropped, reason: str) -> bool:
    """Delete a file of ours; return whether it is gone."""
    if entry.state != DEAD and not is_ours(Path(entry.path), entry.stream):
        return False
    if entry.state == SYNCED:
        Path(entry.path).unlink(missing_ok=True)
        return True
    try:
        lines = _drop_dead_letters(entry) if entry.state == DEAD else _drop_unsent(folder, entry, own)
    except FileNotFoundError:
        return False
    if lines is None:
        return False
    if lines:
        dropped(entry, lines, reason)
    return True


def _drop_dead_letters(entry: Entry) -> int | None:
    path = Path(entry.path)
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        if file.read(len(_LETTER)) != _LETTER:
            return None  # another program's
        lines = sum(1 for _ in file)
    path.unlink()
    return lines


def _drop_unsent(folder: Path, entry: Entry, own: Stream | None) -> int | None:
    if own is not None and own.name == entry.stream:
        return own.drop_file(entry.number)
    stream = Stream.take(folder, entry.stream, ())
    if stream is None:
        return None
    try:
        return stream.drop_file(entry.number)
    finally:
        stream.release()


def make_room(folder: Path, error: OSError) -> None:
    """Delete every sent file if an error says that the disk is full."""
    if error.errno in _NO_ROOM:
        for entry in entries(folder, (SYNCED,)):
            with contextlib.suppress(OSError):
                if is_ours(Path(entry.path), entry.stream):
                    os.unlink(entry.path)


class Upkeep:
    """Keeps a folder within its bounds, every few seconds; less often the longer it takes to look through it.

    Args:
        config: the folder, its bounds, and how often they are looked at.
        dropped: gets what was given up.

    """

    def __init__(self, config: Config, dropped: Dropped) -> None:
        self._folder = config.folder
        self._pace = config.pace
        self._bounds = Bounds(config.max_bytes, config.max_age_s, config.keep_s)
        self._dropped = dropped
        self._began, self._began_at = time.monotonic(), time.time()
        self.due = self._began + self._pace.tidy_every_s
        """When it is time again (time.monotonic)."""

    def attend(self, own: Stream | None) -> None:
        """Do it if it is time; the caller's own stream is in its hands already.

        Raises:
            OSError: the first of what could not be done; everything else is done all the same.

        """
        began = time.monotonic()
        if began < self.due:
            return
        try:
            # If somebody has set the clock, in whichever direction, nothing is older than it is by the other one.
            now = min(time.time(), self._began_at + began - self._began)
            enforce(self._folder, self._bounds, own, self._dropped, now)
        finally:
            ended = time.monotonic()
            self.due = ended + max(self._pace.tidy_every_s, self._pace.cost * (ended - began))


def counted(counters: Counters, complaints: Complaints) -> Dropped:
    """Return what counts the lines that are given up, and logs them."""

    def dropped(entry: Entry, lines: int, reason: str) -> None:
        counters.dropped += lines
        text = "%d telemetry lines that were not stored are given up, file %s deleted: %s"
        complaints.say(logging.ERROR, text, lines, Path(entry.path).name, reason)

    return dropped
