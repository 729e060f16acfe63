"""The background thread: sends this process's stream and what dead processes left, and says that runs are alive."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

from telemetryd.client.complaints import Complaints
from telemetryd.client.config import Config
from telemetryd.client.context import ProcessIdentity
from telemetryd.client.counters import Counters
from telemetryd.client.folder import Bounds, Entry, Stream, bury, enforce, make_room, waiting
from telemetryd.client.lines import encode
from telemetryd.client.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from telemetryd.client.courier import Courier
    from telemetryd.client.delivery import Delivery, RetryError
    from telemetryd.client.transport import Answer, Transport

_BACKOFF_FIRST_S: Final = 0.25
_BACKOFF_MOST_S: Final = 30.0
_REFUSAL_S: Final = 60.0
"""How slowly we ask again where only a change of the configuration can help (a token, an address)."""
_LOOK_AROUND_S: Final = 15.0
_FIRST_LOOK_S: Final = 2.0
_TIDY_S: Final = 5.0
_REFUSALS: Final = 3
_PASSING: Final = (408, 429, 500, 502, 503, 504)


class LiveRun(Protocol):
    """A run of this process that has begun and not ended."""

    event_id: str
    heartbeat_s: float | None

    def elapsed_ms(self) -> int:
        """Return how long it has been running."""


class Backoff:
    """Exponential back-off with full jitter: each pause is random between nothing and twice the last bound.

    Full jitter spreads the clients that lost the same daemon at the same moment (Brooker, AWS Architecture Blog 2015).
    """

    def __init__(self, first_s: float = _BACKOFF_FIRST_S, most_s: float = _BACKOFF_MOST_S) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._failures = 0

    def pause_s(self, error: RetryError) -> float:
        """Return how long to wait after a failure, never less than the daemon asked for."""
        bound = min(self._first_s * 2**self._failures, self._most_s)
        self._failures = min(self._failures + 1, 30)
        jitter = random.uniform(0, bound)  # noqa: S311 - no secret
        if error.is_refusal:
            return max(error.wait_s, _REFUSAL_S) * random.uniform(0.5, 1.0)  # noqa: S311
        return error.wait_s + jitter

    def reset(self) -> None:
        """Note a success."""
        self._failures = 0


class _Flush:
    """Somebody who waits until everything so far has been sent."""

    def __init__(self, *, is_last: bool) -> None:
        self.is_last = is_last
        """Whether one failure is enough: the process is about to end."""
        self.done = threading.Event()
        self.succeeded = False

    def end(self, *, succeeded: bool) -> None:
        self.succeeded = succeeded
        self.done.set()


class Sender:
    """Sends what a spool holds from a thread of its own.

    Args:
        config: the client's settings.
        spool: this process's stream.
        counters: where is counted what becomes of lines.

    """

    def __init__(self, config: Config, spool: Spool, counters: Counters) -> None:
        self._config = config
        self._folder = config.folder
        self._spool = spool
        self._counters = counters
        self._complaints = Complaints()
        self._reset()

    def _reset(self) -> None:
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._flushes: list[_Flush] = []
        self._stopping = False
        self.is_idle = True
        """Whether the next line has to wake the thread."""
        self.live: dict[str, LiveRun] = {}
        """Runs that have begun and not ended, by event_id."""
        self._registered: set[str] = set()
        self._beats: dict[str, float] = {}
        self._certifies = True
        self._refusals: int | None = 0
        """How often we were refused since the beginning; None when it has once been granted."""
        self._identity: ProcessIdentity | None = None
        self._transport: Transport | None = None
        self._delivery: Delivery | None = None
        self._backoff = Backoff()
        self._own: Courier | None = None
        self._orphan: Courier | None = None
        now = time.monotonic()
        self._next_look = now + _FIRST_LOOK_S * random.uniform(0.5, 1.5)  # noqa: S311
        self._next_tidy = now + _TIDY_S
        self._quiet_until = 0.0

    # --- Any thread ------------------------------------------------------------------------------

    def notice(self) -> None:
        """Say that there is something to send; costs next to nothing while the thread is busy."""
        if self.is_idle:
            self.is_idle = False
            if self._thread is None:
                self._start()
            self._wake.set()

    def _start(self) -> None:
        if not self._config.send:
            return
        with self._starting:
            if self._thread is None and not self._stopping:
                thread = threading.Thread(target=self._work, name="telemetryd-client", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter is shutting down: the spool keeps it
                    thread.start()
                    self._thread = thread

    def flush(self, timeout_s: float, *, is_last: bool = False) -> bool:
        """Wait until everything recorded so far has been acknowledged; return whether it has."""
        if self._thread is None and self._spool.stream is None and not self._spool.holds:
            return True
        self._start()
        if self._thread is None:
            return False
        flush = _Flush(is_last=is_last)
        self._flushes.append(flush)
        self._hurry.set()
        self._wake.set()
        flush.done.wait(timeout_s)
        return flush.succeeded

    def stop(self, timeout_s: float) -> bool:
        """End the thread; return whether nobody works on the stream any more."""
        self._stopping = True
        self._hurry.set()
        self._wake.set()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def after_fork(self) -> None:
        """In a forked process: begin without a thread, and without the parent's connection and locks."""
        if self._transport is not None:
            self._transport.close()
        if self._orphan is not None:
            self._orphan.stream.forget()
        self._reset()

    # --- The thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        # Imported here, because an agent that never sends need not load an HTTP client.
        from telemetryd.client.delivery import Delivery  # noqa: PLC0415
        from telemetryd.client.transport import Transport  # noqa: PLC0415

        self._transport = Transport(self._config)
        self._delivery = Delivery(self._transport, self._bury, self._counters)
        try:
            while not self._stopping:
                self._wait()
                if self._stopping:
                    break
                self._turn(self._delivery)
        finally:
            self._transport.close()
            self._release_orphan()
            for flush in self._flushes:
                flush.end(succeeded=False)

    def _wait(self) -> None:
        """Sleep until there is something to do; then let a batch gather."""
        now = time.monotonic()
        if self._quiet_until > now:  # backing off: only a flush may hurry us
            self._hurry.wait(self._quiet_until - now)
        elif not self._flushes:
            if self.is_idle:
                due = min([self._next_look, self._next_tidy, *self._beats.values()])
                self._wake.wait(max(due - now, 0.01))
            if not self.is_idle:
                self._hurry.wait(self._config.linger_s)
        self._wake.clear()
        self._hurry.clear()

    def _turn(self, delivery: Delivery) -> None:
        from telemetryd.client.delivery import RetryError, WaitError  # noqa: PLC0415

        flushes, self._flushes = self._flushes, []
        live = list(self.live.values())  # their starts are in the spool, so they will have been sent
        try:
            self._send_all(delivery)
            self._attend(live)
        except WaitError as error:
            self._quiet_until = time.monotonic() + error.wait_s
        except RetryError as error:
            self._quiet_until = time.monotonic() + self._backoff.pause_s(error)
            self._counters.retries += 1
            self._counters.problem = str(error)
            self._complaints.say(logging.WARNING, "Telemetry cannot be sent now and stays in the spool: %s", error)
        except OSError as error:
            self._quiet_until = time.monotonic() + 1.0
            self._counters.problem = str(error)
            self._complaints.say(logging.WARNING, "The spool in %s cannot be read or written: %s", self._folder, error)
            with contextlib.suppress(OSError):
                make_room(self._folder)
        else:
            self._quiet_until = 0.0
            self._backoff.reset()
            self._counters.problem = None
            for flush in flushes:
                flush.end(succeeded=True)
            return
        for flush in flushes:
            if flush.is_last:
                flush.end(succeeded=False)
            else:
                self._flushes.append(flush)

    def _send_all(self, delivery: Delivery) -> None:
        now = time.monotonic()
        if now >= self._next_tidy:
            self._next_tidy = now + _TIDY_S
            self._spool.rotate_if_old()
            self._tidy()
        self._spool.write_held()
        self._send_own(delivery)
        if self._orphan is not None:
            self._send_orphan(delivery, self._orphan)
        if now >= self._next_look:
            self._next_look = now + _LOOK_AROUND_S * random.uniform(0.5, 1.5)  # noqa: S311
            self._send_orphans(delivery)

    def _send_own(self, delivery: Delivery) -> None:
        from telemetryd.client.courier import Courier  # noqa: PLC0415

        self.is_idle = True  # from here on a line wakes us again
        end = self._spool.end()
        stream = self._spool.stream
        if stream is not None:
            if self._own is None or self._own.stream is not stream:
                self._own = Courier(stream, delivery, self._counters)
            while (lines := self._own.carry()) and not self._stopping:
                # Less than a batch beyond what there was when we began may gather first.
                if lines < delivery.rows and (stream.number, stream.offset) >= end:
                    break
                self._breathe(delivery)
        while self._spool.holds and not self._stopping:
            self._send_held(delivery)

    def _send_orphans(self, delivery: Delivery) -> None:
        """Send what processes that are gone have left."""
        from telemetryd.client.courier import Courier  # noqa: PLC0415

        for name in waiting(self._folder):
            own = self._spool.stream
            if self._stopping:
                return
            stream = None if own is not None and own.name == name else Stream.take(self._folder, name)
            if stream is not None:
                self._orphan = Courier(stream, delivery, self._counters)
                self._send_orphan(delivery, self._orphan)

    def _send_orphan(self, delivery: Delivery, orphan: Courier) -> None:
        while not self._stopping and orphan.carry():
            self._breathe(delivery)
            if not self.is_idle:  # our own lines go first
                self._send_own(delivery)
        self._release_orphan()

    def _release_orphan(self) -> None:
        if self._orphan is not None:
            with contextlib.suppress(OSError):
                self._orphan.stream.release()
            self._orphan = None

    def _send_held(self, delivery: Delivery) -> None:
        from telemetryd.client.delivery import Parcel  # noqa: PLC0415

        lines = self._spool.take_held(delivery.rows)
        sent = False
        try:
            delivery.send(Parcel.of(lines))
            sent = True
        finally:
            self._spool.give_back(sent=sent)

    def _breathe(self, delivery: Delivery) -> None:
        if delivery.pause_s and not self._stopping:
            self._hurry.wait(delivery.pause_s)

    def _bury(self, lines: list[bytes], status: int | None, reason: object) -> None:
        bury(self._folder, lines, status, reason)

    # --- Bounds ----------------------------------------------------------------------------------

    def _tidy(self) -> None:
        config = self._config
        bounds = Bounds(config.max_bytes, config.max_age_s, config.keep_s)
        enforce(self._folder, bounds, self._spool.stream, self._dropped)

    def _dropped(self, entry: Entry, lines: int, reason: str) -> None:
        self._counters.dropped += lines
        text = "%d unsent telemetry lines given up, file %s deleted: %s"
        self._complaints.say(logging.ERROR, text, lines, entry.path.name, reason)

    # --- Runs that are alive ---------------------------------------------------------------------

    def _attend(self, live: Iterable[LiveRun]) -> None:
        """Register runs for a death certificate, and send the heartbeats that are due.

        Both go past the spool: that a run is alive is no news later.
        """
        for run in live:
            if self._certifies and run.event_id in self.live and run.event_id not in self._registered:
                self._register(run)
            if run.heartbeat_s is not None:
                self._beat(run, run.heartbeat_s)
        self._registered &= self.live.keys()
        self._beats = {event_id: due for event_id, due in self._beats.items() if event_id in self.live}

    def _register(self, run: LiveRun) -> None:
        if self._identity is None:
            is_local = self._transport is not None and self._transport.is_local
            self._identity = ProcessIdentity.own() if is_local else None
            if self._identity is None:
                self._certifies = False
                return
        identity = self._identity
        body = {"pid": identity.pid, "start_time": identity.start_time, "boot_id": identity.boot_id}
        answer = self._tell("POST", run.event_id, "/process", body)
        if answer is None or answer.status in _PASSING:
            return
        self._registered.add(run.event_id)
        if answer.status in (200, 201):
            self._refusals = None
        elif self._refusals is not None:
            # Perhaps this run has just ended; but if it is always so, then it is another machine, another PID
            # namespace, or a daemon without the feature: heartbeats remain.
            self._refusals += 1
            self._certifies = self._refusals < _REFUSALS

    def _beat(self, run: LiveRun, every_s: float) -> None:
        now = time.monotonic()
        if now >= self._beats.setdefault(run.event_id, now + every_s):
            self._beats[run.event_id] = now + every_s
            # Any field will do; this one cannot bring a run back that somebody else has ended.
            self._tell("PATCH", run.event_id, "", {"duration_ms": run.elapsed_ms()})

    def _tell(self, method: str, event_id: str, suffix: str, body: dict[str, object]) -> Answer | None:
        from telemetryd.client.transport import UnreachableError, run_path  # noqa: PLC0415

        assert self._transport is not None  # noqa: S101 - for the type checker
        try:
            return self._transport.request(method, run_path(event_id) + suffix, encode(body))
        except UnreachableError:
            return None
