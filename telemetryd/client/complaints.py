"""Rate-limits the client's log lines: each kind once a minute, with a count of those left out."""

from __future__ import annotations

import logging
import time
from typing import Final

logger: Final = logging.getLogger("telemetryd.client")

_EVERY_S: Final = 60.0


class Complaints:
    """Remembers what was said when."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[float, int]] = {}

    def say(self, level: int, text: str, *values: object) -> None:
        """Log a line, unless one with the same text and other values was logged within the last minute."""
        now = time.monotonic()
        last, unsaid = self._said.get(text, (float("-inf"), 0))
        if now - last < _EVERY_S:
            self._said[text] = (last, unsaid + 1)
            return
        self._said[text] = (now, 0)
        more = f" (and {unsaid} more like it in between)" if unsaid else ""
        logger.log(level, text + more, *values)
