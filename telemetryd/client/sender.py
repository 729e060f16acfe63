"""Starts the background thread when it is needed, wakes it, and waits for it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from telemetryd.client.bounds import Upkeep, counted
from telemetryd.client.complaints import Complaints
from telemetryd.client.config import Config
from telemetryd.client.counters import Counters
from telemetryd.client.signals import Bell, Flush, LiveRun
from telemetryd.client.spool import Spool

if TYPE_CHECKING:
    from telemetryd.client.worker import Worker

_importing: Final = threading.Lock()
"""Held while the thread imports: a process forked in the middle of that would have half a module for ever."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release
    )


def _is_started(thread: threading.Thread) -> bool:
    """Start a thread, unless the interpreter is ending: Python 3.11 would wait for ever for the thread to begin."""
    if sys.is_finalizing():
        return False
    try:
        thread.start()
    except RuntimeError:  # from Python 3.12 on it says so itself
        return False
    return True


def _at_end_of_child(close: Callable[[], None]) -> None:
    """Have this called at the end of a process of multiprocessing: os._exit may end it, without atexit handlers."""
    process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
    if process is not None and util is not None and process.parent_process() is not None:
        util.Finalize(None, close, exitpriority=-100)


class Sender:
    """The agent's side of the thread that sends.

    Args:
        config: the client's settings.
        spool: this process's stream.
        counters: where is counted what becomes of lines.
        close: what is to be called at the end of the process.

    """

    def __init__(self, config: Config, spool: Spool, counters: Counters, close: Callable[[], None]) -> None:
        self._close = close
        self._config = config
        self._spool = spool
        self._counters = counters
        self._complaints = Complaints()
        self._reset()
        if not config.send:
            spool.changed = self._tidy

    def _reset(self) -> None:
        self._thread: threading.Thread | None = None
        self._worker: Worker | None = None
        self._starting = threading.RLock()  # a signal handler may record while this thread starts it
        self._ended = False
        self.wake = Bell()
        self.hurry = Bell()
        """Wakes the thread from its pauses as well."""
        self.flushes: list[Flush] = []
        """The flushes that wait now; each of them leaves by itself."""
        self.stopping = False
        self.is_idle = True
        """Whether the next line has to wake the thread."""
        self.live: dict[str, LiveRun] = {}
        """Runs that have begun and not ended, by event_id."""
        self._upkeep = Upkeep(self._config, counted(self._counters, self._complaints))
        self._tidying: threading.Thread | None = None

    def notice(self) -> None:
        """Say that there is something to send; costs next to nothing while the thread is busy."""
        if self.is_idle:
            self.is_idle = False
            self._start()
            self.wake.ring()

    def _start(self) -> None:
        if self._thread is not None or not self._config.send:
            return
        with self._starting:
            if self._thread is None and not self.stopping:
                self._thread = threading.Thread(target=self._work, name="telemetryd-client", daemon=True)
                if _is_started(self._thread):
                    _at_end_of_child(self._close)
                else:
                    self._thread = None  # the spool keeps it

    def _tidy(self) -> None:
        """Where no thread sends: keep the folder within its bounds when a file is full, without a wait."""
        is_busy = self._tidying is not None and self._tidying.is_alive()
        if not is_busy and time.monotonic() >= self._upkeep.due:
            tidying = threading.Thread(target=self._attend, name="telemetryd-client", daemon=True)
            self._tidying = tidying if _is_started(tidying) else None

    def _attend(self) -> None:
        try:
            self._upkeep.attend(None)
        except OSError as error:
            text = "The spool in %s cannot be tidied up: %s"
            self._complaints.say(logging.WARNING, text, self._config.folder, error)

    def _work(self) -> None:
        process = os.getpid()
        try:
            with _importing:
                import encodings.idna  # noqa: F401, PLC0415 - else the first connection imports it

                from telemetryd.client.worker import Worker  # noqa: PLC0415
            self._worker = Worker(self._config, self._spool, self._counters, self)
            self._worker.work()
        finally:
            if process == os.getpid():  # else a green thread that a fork has copied
                self._ended = True
                for flush in [*self.flushes]:
                    flush.end(succeeded=False)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything recorded so far has been acknowledged; return whether it has."""
        return self.end_flush(self.begin_flush(is_last=False), timeout_s)

    def begin_flush(self, *, is_last: bool) -> Flush:
        """Have everything recorded so far sent at once; `end_flush` waits for it, and has to be called."""
        flush = Flush(is_last=is_last)
        if self._thread is None and self._spool.name is None and not self._spool.holds:
            flush.end(succeeded=True)
            return flush
        self._start()
        if self._thread is None:
            flush.end(succeeded=False)
            return flush
        self.flushes.append(flush)
        # Looked at after it is on the list, which is looked through after this is set.
        if self._ended or sys.is_finalizing():
            flush.end(succeeded=False)
        self.hurry.ring()
        self.wake.ring()
        return flush

    def end_flush(self, flush: Flush, timeout_s: float) -> bool:
        """Wait until everything recorded before the flush has been acknowledged; return whether it has."""
        try:
            flush.done.wait(max(timeout_s, 0.0))
        finally:
            if flush in self.flushes:
                self.flushes.remove(flush)
        return flush.succeeded

    def stop(self) -> None:
        """Ask the thread to end."""
        self.stopping = True
        self.hurry.ring()
        self.wake.ring()

    def has_stopped(self, timeout_s: float) -> bool:
        """Wait for the thread's end; return whether nobody works on the stream any more."""
        if self._thread is None:
            return True
        with contextlib.suppress(RuntimeError):  # the interpreter is ending (Python 3.14)
            self._thread.join(max(timeout_s, 0.0))
        return not self._thread.is_alive()

    def after_fork(self) -> None:
        """In a forked process: begin without a thread, and without the parent's connection and locks."""
        if self._worker is not None:
            self._worker.forget()
        self._reset()
