"""Signals between the agent's threads and the background thread: wake, flush, alive."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import Protocol


class LiveRun(Protocol):
    """A run of this process that has begun and not ended."""

    event_id: str
    heartbeat_s: float | None

    def elapsed_ms(self) -> int:
        """Return how long it has been running."""


class Bell:
    """Wakes a thread. A signal handler may ring it at any moment, even in the middle of another ring.

    `threading.Event` takes a lock that is not re-entrant for this; `SimpleQueue.put` is re-entrant.
    """

    def __init__(self) -> None:
        self._rings: SimpleQueue[None] = SimpleQueue()

    def ring(self) -> None:
        """Wake the waiting thread, now or next."""
        self._rings.put(None)

    def wait(self, timeout_s: float) -> bool:
        """Return True at once if it has been rung since `quieten`, else when it is; False after the time-out."""
        try:
            self._rings.get(timeout=max(timeout_s, 0.0))
        except Empty:
            return False
        self._rings.put(None)
        return True

    def quieten(self) -> None:
        """Forget what was rung so far."""
        try:
            while True:
                self._rings.get_nowait()
        except Empty:
            return


class Flush:
    """A thread that waits until everything so far has been sent."""

    def __init__(self, *, is_last: bool) -> None:
        self.is_last = is_last
        """Whether one failure is enough: the process is about to end."""
        self.done = threading.Event()
        self.succeeded = False

    @property
    def is_open(self) -> bool:
        """Whether the thread still waits. It leaves the list only when it gets its turn."""
        return not self.done.is_set()

    def end(self, *, succeeded: bool) -> None:
        """Let the waiting thread continue."""
        self.succeeded = succeeded
        self.done.set()


class Signals(Protocol):
    """What the agent's threads share with the thread that sends."""

    wake: Bell
    hurry: Bell
    """Wakes the thread from its pauses as well."""
    flushes: list[Flush]
    """The flushes that wait now; each of them leaves by itself."""
    stopping: bool
    is_idle: bool
    """Whether the next line has to wake the thread."""
    live: dict[str, LiveRun]
    """Runs that have begun and not ended, by event_id."""
