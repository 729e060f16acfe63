"""Puts records of Python's logging into the run around them, as events."""

from __future__ import annotations

import logging
import weakref
from typing import Final

from telemetryd.client.context import Enclosing, enclosing_run

_EVENT: Final = "log"
_LONGEST: Final = 8192
_OWN: Final = "telemetryd.client"


class RunHandler(logging.Handler):
    """A logging handler whose records become events of the run of their task or thread.

    A record outside of a run is passed over, and so are those of the client itself. No record costs more than an event
    does, none is waited for, and none raises.

    Args:
        level: records below it are passed over.
        most: how many records of one run become events; one more says that others are left out.

    """

    def __init__(self, level: int | str = logging.WARNING, *, most: int = 1000) -> None:
        super().__init__(level)
        self._most = most
        self._taken: weakref.WeakKeyDictionary[Enclosing, int] = weakref.WeakKeyDictionary()

    def emit(self, record: logging.LogRecord) -> None:
        """Make an event of a record."""
        run = enclosing_run.get()
        if run is None or record.name == _OWN or record.name.startswith(f"{_OWN}."):
            return
        taken = self._taken.get(run, 0)
        if taken > self._most:
            return
        self._taken[run] = taken + 1
        if taken == self._most:
            run.event(_EVENT, {"level": "INFO", "logger": _OWN, "message": "Further records are left out."})
            return
        try:
            payload = {"level": record.levelname, "logger": record.name, "message": self.format(record)[:_LONGEST]}
        except Exception:  # noqa: BLE001 - logging's own way: arguments that do not fit their text cost the record only
            self.handleError(record)
            return
        run.event(_EVENT, payload)
