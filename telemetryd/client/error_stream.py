"""Passes a program's standard error on, and keeps its last bytes; lines of it may become events of the run."""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from telemetryd.client.ending_signals import is_ending

if TYPE_CHECKING:
    from telemetryd.client.run import Run

_PIECE: Final = 65_536
_LONGEST_LINE: Final = 4096
_LOOK_S: Final = 0.2
"""How often we look, while the last of it is passed on, whether we are to end."""
_GRACE_S: Final = 0.2
"""How long we read on after the program's end, if a process that it has left behind keeps the pipe open."""


class ErrorStream:
    """A pipe that becomes a program's standard error.

    Args:
        run: the run that gets events.
        tail_bytes: how many of the last bytes are kept.
        most_events: how many lines become events.

    """

    def __init__(self, run: Run, tail_bytes: int, most_events: int) -> None:
        self._run = run
        self._tail_bytes = tail_bytes
        self._events_left = most_events
        self._tail = bytearray()
        self._line = bytearray()
        self._is_at_end = False
        with contextlib.ExitStack() as opened:
            self._reading_end, self.writing_end = _pipe(opened)
            self._stopped, self._stop = _pipe(opened)
            self._thread = threading.Thread(target=self._pass_on, name="telemetryd-stderr", daemon=True)
            self._thread.start()
            opened.pop_all()

    @classmethod
    def begin(cls, run: Run, tail_bytes: int, most_events: int) -> Self | None:
        """Return a stream; None if this process may not open or start so much: the program then keeps our own."""
        try:
            return cls(run, tail_bytes, most_events)
        except (OSError, RuntimeError):  # descriptors; threads
            return None

    def end(self) -> bytes:
        """Stop when everything that the program has written is passed on; return the last bytes.

        If a process that it has left behind still writes, a helper goes on passing that on. While nobody reads our
        standard error we wait, until a blocked signal comes that ends us.
        """
        os.close(self.writing_end)
        os.close(self._stop)
        while self._thread.is_alive():
            self._thread.join(_LOOK_S)
            if is_ending():  # nobody reads our standard error, and somebody ends us
                return self._kept()
        if not self._is_at_end:
            # It lives until the last writer has ended; without it their next line would kill them (SIGPIPE).
            with contextlib.suppress(OSError):
                actions = [(os.POSIX_SPAWN_DUP2, self._reading_end, 0), (os.POSIX_SPAWN_DUP2, 2, 1)]
                os.posix_spawnp("cat", ["cat"], os.environ, file_actions=actions, setpgroup=0)
        os.close(self._reading_end)
        os.close(self._stopped)
        return self._kept()

    def _kept(self) -> bytes:
        return bytes(self._tail[-self._tail_bytes :])

    def _pass_on(self) -> None:
        waiting = select.poll()
        waiting.register(self._reading_end, select.POLLIN)
        waiting.register(self._stopped, select.POLLIN)
        until = math.inf
        while (rest_s := until - time.monotonic()) > 0:
            ready = dict(waiting.poll(None if rest_s == math.inf else rest_s * 1000))
            if self._stopped in ready:
                waiting.unregister(self._stopped)
                until = time.monotonic() + _GRACE_S
            if self._reading_end in ready:
                piece = os.read(self._reading_end, _PIECE)
                if not piece:
                    self._is_at_end = True
                    break
                self._take(piece)
        self._say(bytes(self._line))

    def _take(self, piece: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more, which is no reason to disturb the program
            _write(piece)
        self._tail += piece
        if len(self._tail) > 2 * self._tail_bytes:
            del self._tail[: -self._tail_bytes]
        if self._events_left:
            *lines, begun = bytes(self._line + piece).split(b"\n")
            for line in lines:
                self._say(line)
            self._line = bytearray(begun[:_LONGEST_LINE])

    def _say(self, line: bytes) -> None:
        if self._events_left and line.strip():
            self._events_left -= 1
            self._run.event("stderr", line=line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip("\r"))
            if not self._events_left:
                self._run.event("stderr", line="Further lines are left out.")


def _pipe(opened: contextlib.ExitStack) -> tuple[int, int]:
    """Return both ends of a new pipe, which are closed with what is opened."""
    ends = os.pipe()
    for end in ends:
        opened.callback(os.close, end)
    return ends


def _write(piece: bytes) -> None:
    """Write to our standard error, which another process may have made non-blocking."""
    rest = memoryview(piece)
    while rest:
        try:
            rest = rest[os.write(2, rest) :]
        except BlockingIOError:
            select.select((), (2,), ())
