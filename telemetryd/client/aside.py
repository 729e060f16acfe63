"""Sets aside lines that something between client and daemon blocks: one stream for each run.

A proxy that takes 1 MB answers 413 to a larger line. It is unknown whether the daemon would take it, so it is neither
sent again and again, with everything waiting for it, nor given up. It becomes the first line of a new stream
(`folder.is_aside`), which the sender of streams tries again later. What is said of the same run afterwards joins that
stream, so the order of a run's lines stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from pathlib import Path
from typing import Final

from telemetryd.client.config import USUAL
from telemetryd.client.folder import (
    ACTIVE,
    READY,
    UNSENT,
    aside_entries,
    file_path,
    make_folder,
    new_aside_name,
    open_active,
    open_regular,
)
from telemetryd.client.lines import event_id_of

_LONGEST_PAUSE_S: Final = 900.0
_FRESH_S: Final = 15.0
_COST: Final = 100
"""Looking through the folder takes at most one hundredth of the time; where it is asked for, a tenth."""
_TICK_NS: Final = 50_000_000
"""Two changes of a folder within so short a time may bear the same time."""


class Aside:
    """The lines that are set aside in one folder, and when they are to be tried again.

    Args:
        folder: the spool's folder.
        first_pause_s: after how long lines are tried again for the first time.

    """

    def __init__(self, folder: Path, first_pause_s: float = USUAL.aside_s) -> None:
        self._folder = folder
        self._first_pause_s = first_pause_s
        self._streams: dict[str, str] = {}
        """event_id → the stream in which the run's lines are set aside."""
        self._known: dict[str, str] = {}
        """Stream → event_id, of all that were ever read: what a stream holds does not change."""
        self._looked_at = float("-inf")
        self._took_s = 0.0
        self._changed_ns = -1
        """When the folder had last changed at the last look; while that is so, another look finds nothing new."""
        self._own: set[str] = set()
        """Whose lines this process has set aside."""
        self._pauses: dict[str, tuple[float, float]] = {}
        """Stream → when to try it again (time.monotonic), and the last pause."""

    def holds(self, event_id: str) -> bool:
        """Return whether lines of a run are set aside, so that others of it have to wait for them."""
        if time.monotonic() - self._looked_at >= max(_FRESH_S, _COST * self._took_s):
            self.look()
        return event_id in self._streams

    def look(self) -> None:
        """Learn from the folder which runs' lines are set aside, by any process."""
        began = time.monotonic()
        if began - self._looked_at < _COST / 10 * self._took_s:
            return
        self._looked_at = began
        known: dict[str, str] = {}
        with contextlib.suppress(OSError):
            changed_ns = os.stat(self._folder).st_mtime_ns
            if changed_ns == self._changed_ns and time.time_ns() - changed_ns > _TICK_NS:
                return
            self._changed_ns = changed_ns
            for entry in aside_entries(self._folder, UNSENT):
                if entry.stream not in known:
                    event_id = self._known.get(entry.stream) or self._read(Path(entry.path))
                    if event_id is not None:
                        known[entry.stream] = event_id
        self._known = known
        self._streams = {event_id: name for name, event_id in known.items()}
        self._pauses = {name: pause for name, pause in self._pauses.items() if name in known}
        self._own &= self._streams.keys()
        self._took_s = time.monotonic() - began

    def _read(self, path: Path) -> str | None:
        with contextlib.suppress(OSError), open(open_regular(path, os.O_RDONLY), "rb") as file:
            return event_id_of(file.readline().rstrip()) or None
        return None

    def put(self, event_id: str, lines: list[bytes]) -> None:
        """Set lines of a run aside, after those that are set aside already.

        Raises:
            OSError: if the disk refuses; then the lines must stay where they are.

        """
        make_folder(self._folder)
        name = self._streams.get(event_id) or new_aside_name()
        numbers = [entry.number for entry in aside_entries(self._folder) if entry.stream == name]
        file, number = open_active(self._folder, name, max(numbers, default=-1) + 1)
        path = file_path(self._folder, name, number, ACTIVE)
        try:
            text = memoryview(b"".join(line + b"\n" for line in lines))
            while text:
                text = text[os.write(file, text) :]
            os.fsync(file)  # the lines are about to be noted as done where they were
            path.rename(file_path(self._folder, name, number, READY))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        if event_id:
            self._own.add(event_id)
            self._streams[event_id] = name
            self._known[name] = event_id
        self._pauses.setdefault(name, (time.monotonic() + self._first_pause_s, self._first_pause_s))

    @property
    def is_used(self) -> bool:
        """Whether lines of this process are set aside and not sent yet."""
        if self._own:
            self.look()
        return bool(self._own)

    # --- Trying again ----------------------------------------------------------------------------

    def is_due(self, stream: str) -> bool:
        """Return whether a stream may be tried (again)."""
        return stream not in self._pauses or time.monotonic() >= self._pauses[stream][0]

    def postpone(self, stream: str) -> None:
        """Note that a stream was tried in vain; the pauses grow."""
        pause_s = min(2 * self._pauses.get(stream, (0.0, self._first_pause_s / 2))[1], _LONGEST_PAUSE_S)
        due = time.monotonic() + pause_s * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
        self._pauses[stream] = due, pause_s
