"""Uploads one stream to the daemon window by window, and marks a window as sent when all of it is done."""

from __future__ import annotations

import codecs
import logging
from typing import Final

from telemetryd.client.batch import Batch
from telemetryd.client.counters import Counters
from telemetryd.client.delivery import Delivery, WaitError, ready_lines
from telemetryd.client.folder import is_aside
from telemetryd.client.lines import read_object
from telemetryd.client.streams import Stream, Window, is_sent

logger: Final = logging.getLogger("telemetryd.client")

_WAIT_S: Final = 0.3


class Uploader:
    """Uploads the lines of a stream in their order.

    Args:
        stream: the stream, which we own.
        delivery: how lines are sent.
        counters: count what becomes of them.

    """

    def __init__(self, stream: Stream, delivery: Delivery, counters: Counters) -> None:
        self.stream = stream
        self._delivery = delivery
        self._counters = counters
        self._window: Window | None = None
        self._batch: Batch | None = None
        self.sent_bytes = 0
        """How much of the spool the last call sent."""

    def send_next(self) -> int:
        """Send the next lines; return how many (at least 1), or 0 if there are none now.

        Raises:
            RetryError: if they have to be sent again later; call again then.
            OSError: if the spool or the dead-letter file fails.

        """
        if self._window is None or self._batch is None:
            self._window = self._next_window()
            if self._window is None:
                return 0
            self._batch = Batch.of(self._lines(self._window), was_aside=is_aside(self.stream.name))
        window, batch = self._window, self._batch
        if (window.number, window.start) == (self.stream.number, self.stream.offset):  # else the file was given up
            self._delivery.send(batch)
            self.stream.advance(window)
        self.sent_bytes = window.end[1] - window.start
        self._window = self._batch = None
        return max(len(window.lines), 1)

    def _next_window(self) -> Window | None:
        window = self.stream.window(self._delivery.rows, self._delivery.bytes)
        if window is None:
            return None
        ready = ready_lines(window.lines, lambda after: is_sent(self.stream.folder, after))
        if ready < len(window.lines):
            if ready == 0:
                raise WaitError("The next lines wait for another process's stream", _WAIT_S)
            window = Window(window.lines[:ready], window.number, window.start)
        return window

    def _lines(self, window: Window) -> list[bytes]:
        if window.torn:
            if read_object(window.torn) is not None:  # only its newline is missing
                return [window.torn]
            self._counters.torn += 1
            text = "The last line of a spool file is torn and left out; its call had not returned: %r"
            logger.warning(text, window.torn[:100])
        lines = window.lines
        if not window.start and lines:
            lines = [lines[0].removeprefix(codecs.BOM_UTF8), *lines[1:]]  # an editor has left it
        return [line for line in lines if line.strip()]
