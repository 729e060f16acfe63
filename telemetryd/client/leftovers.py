"""Sends what processes that are gone have left in the spool, for a process that ends before its thread looks for it."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace

from telemetryd.client.aside import Aside
from telemetryd.client.config import Config
from telemetryd.client.counters import Counters
from telemetryd.client.dead_letters import bury
from telemetryd.client.delivery import Delivery, RetryError, WaitError
from telemetryd.client.folder import is_aside, waiting
from telemetryd.client.streams import Stream
from telemetryd.client.transport import Transport
from telemetryd.client.uploader import Uploader


def send_leftovers(config: Config, within_s: float) -> None:
    """Send streams that no other process sends, within about so long; what cannot be sent now stays where it is.

    Lines that were set aside are left to processes that live longer.
    """
    until = time.monotonic() + within_s
    counters = Counters()  # of nobody's interest: the process that recorded the lines is gone
    transport = Transport(replace(config, timeout_s=min(config.timeout_s, within_s)))

    def bury_here(lines: list[bytes], status: int | None, reason: object) -> None:
        bury(config.folder, lines, status, reason)

    delivery = Delivery(transport, bury_here, counters, Aside(config.folder))
    try:
        for name, numbers in waiting(config.folder).items():
            if time.monotonic() >= until:
                break
            with suppress(WaitError, OSError):  # it comes after a stream that is being sent, or is another user's
                stream = None if is_aside(name) else Stream.take(config.folder, name, numbers)
                if stream is not None:
                    _send(Uploader(stream, delivery, counters), until)
    except (RetryError, OSError):
        pass  # the daemon is away again, or the folder is: telemetryd sync says what waits, and why
    finally:
        transport.close()


def _send(uploader: Uploader, until: float) -> None:
    stream = uploader.stream
    try:
        end = stream.end()
        while (stream.number, stream.offset) < end and time.monotonic() < until and uploader.send_next():
            pass
        stream.window(1, 1)  # marks a file that has been sent whole
    finally:
        stream.release()
