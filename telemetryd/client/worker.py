"""The background thread: sends this process's stream and those of dead processes, and sends heartbeats.

Imports the HTTP client, so it is imported by that thread only.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Iterable
from typing import Final

from telemetryd.client.aside import Aside
from telemetryd.client.batch import Batch
from telemetryd.client.bounds import Upkeep, counted, make_room
from telemetryd.client.complaints import Complaints
from telemetryd.client.config import USUAL, Config
from telemetryd.client.context import ProcessIdentity
from telemetryd.client.counters import Counters
from telemetryd.client.dead_letters import bury
from telemetryd.client.delivery import BlockedError, Delivery, RetryError, WaitError
from telemetryd.client.descriptors import LostError
from telemetryd.client.folder import is_aside, waiting
from telemetryd.client.lines import encode
from telemetryd.client.signals import LiveRun, Signals
from telemetryd.client.spool import Spool
from telemetryd.client.streams import Position, Stream
from telemetryd.client.transport import Transport, is_addressable, run_path
from telemetryd.client.uploader import Uploader

logger: Final = logging.getLogger("telemetryd.client")

_REFUSAL_S: Final = 60.0
"""How slowly we ask again where only a change of the configuration can help (a token, an address)."""
_SETTLE_S: Final = 0.005
_REFUSALS: Final = 3


class Backoff:
    """Exponential back-off with full jitter: each pause is random between nothing and twice the last bound.

    Full jitter spreads the clients that lost the same daemon at the same moment (Brooker, AWS Architecture Blog 2015).
    """

    def __init__(self, first_s: float = USUAL.first_pause_s, most_s: float = USUAL.longest_pause_s) -> None:
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


class Worker:
    """Sends what there is to send, turn after turn.

    Args:
        config: the client's settings.
        spool: this process's stream.
        counters: where is counted what becomes of lines.
        signals: say when there is something to do.

    """

    def __init__(self, config: Config, spool: Spool, counters: Counters, signals: Signals) -> None:
        self._config = config
        self._folder = config.folder
        self._spool = spool
        self._counters = counters
        self._signals = signals
        self._complaints = Complaints()
        self._transport = Transport(config)
        self._aside = Aside(self._folder, config.pace.aside_s)
        self._delivery = Delivery(self._transport, self._bury, counters, self._aside)
        self._backoff = Backoff(config.pace.first_pause_s, config.pace.longest_pause_s)
        self._quiet_until = 0.0
        self._not_before = 0.0
        self._own: Uploader | None = None
        self._orphan: Uploader | None = None
        self._orphan_end: Position = (0, 0)
        """Where it ended when we took it; what its process, if that lives, has added since is for the next time."""
        self._left: deque[tuple[str, list[int]]] = deque()
        """Streams found at the last look around and not yet tried, with the numbers of their files."""
        now = time.monotonic()
        self._next_look = now + config.pace.first_look_s * random.uniform(0.5, 1.5)  # noqa: S311
        self._upkeep = Upkeep(config, counted(counters, self._complaints))
        self._registered: set[str] = set()
        self._beats: dict[str, float] = {}
        self._certifies = True
        self._refusals: int | None = 0
        """How often we were refused since the beginning; None when it has once been granted."""
        self._identity: ProcessIdentity | None = None
        self._is_forgotten = False
        """Whether this is a forked process, into which the fork has copied the thread, as it does with green ones."""

    def work(self) -> None:
        """Work until asked to stop."""
        try:
            while not self._has_to_end():
                may_send = self._wait()
                if self._has_to_end():
                    break
                try:
                    self._tidy()
                    if may_send:
                        self._turn()
                except Exception:
                    if self._is_forgotten:
                        break
                    self._quiet_until = time.monotonic() + self._config.pace.longest_pause_s
                    logger.exception("Telemetry could not be sent because of an error of the client itself")
        finally:
            self._release_orphan()
            self._transport.close()

    def forget(self) -> None:
        """In a forked process: close what belongs to the parent, and touch nothing of it."""
        self._is_forgotten = True
        self._transport.forget()
        if self._orphan is not None:
            self._orphan.stream.forget()

    def _has_to_end(self) -> bool:
        return self._signals.stopping or self._is_forgotten

    def _wait(self) -> bool:
        """Sleep until there is something to do; return whether it is time to send, or only to tidy up."""
        signals, now = self._signals, time.monotonic()
        if self._not_before > now:  # the daemon asked for it: not even a flush may hurry us
            signals.wake.wait(min(self._not_before, self._upkeep.due) - now)
            signals.wake.quieten()
            return False
        if self._quiet_until > now:  # backing off: only a flush may hurry us
            hurried = signals.hurry.wait(min(self._quiet_until, self._upkeep.due) - now)
            may_send = hurried or time.monotonic() >= self._quiet_until
        else:
            may_send = True
            if not self._is_awaited():
                if signals.is_idle:
                    due = min([self._next_look, self._upkeep.due, *self._beats.values()])
                    signals.wake.wait(max(due - now, 0.01))
                if not signals.is_idle:
                    signals.hurry.wait(self._config.linger_s)  # a batch gathers
        signals.wake.quieten()
        signals.hurry.quieten()
        return may_send

    def _is_awaited(self) -> bool:
        """Return whether a flush waits for us that has no result yet.

        Where threads only take turns voluntarily (gevent, eventlet), a thread with its result cannot leave before we
        wait.
        """
        return any(flush.is_open for flush in [*self._signals.flushes])

    def _turn(self) -> None:
        try:
            self._serve()
            self._send_orphans()
        except WaitError as error:
            self._quiet_until = time.monotonic() + error.wait_s
        except RetryError as error:
            now = time.monotonic()
            self._not_before = now + error.wait_s
            self._quiet_until = now + self._backoff.pause_s(error)
            self._counters.retries += 1
            self._counters.problem = str(error)
            self._complaints.say(logging.WARNING, "Telemetry cannot be sent now and stays in the spool: %s", error)
        except OSError as error:
            self._quiet_until = time.monotonic() + 1.0
            self._counters.problem = str(error)
            self._complaints.say(logging.WARNING, "The spool in %s cannot be read or written: %s", self._folder, error)
            make_room(self._folder, error)
        else:
            self._quiet_until = 0.0
            self._backoff.reset()

    # --- This process's own lines ----------------------------------------------------------------

    def _serve(self) -> None:
        """Send our own lines, end the flushes that wait for them, and report which runs are alive."""
        flushes = [flush for flush in [*self._signals.flushes] if flush.is_open]
        # Their starts are in the spool, so they will have been sent.
        live = [run for run in [*self._signals.live.values()] if is_addressable(run.event_id)]
        try:
            self._spool.write_held()
            self._send_own()
        except (RetryError, OSError) as error:
            for flush in flushes:
                if flush.is_last and not isinstance(error, WaitError):
                    flush.end(succeeded=False)
            raise
        self._counters.problem = None  # before anybody who has waited for this looks
        for flush in flushes:
            flush.end(succeeded=not self._signals.stopping and not self._aside.is_used)
        self._attend(live)

    def _send_own(self) -> None:
        self._signals.is_idle = True  # from here on a line wakes us again
        self._spool.look()
        self._spool.forget_stranded()
        end = self._spool.end()
        stream = self._spool.stream
        if stream is not None:
            if self._own is None or self._own.stream is not stream:
                self._own = Uploader(stream, self._delivery, self._counters)
            try:
                self._send_stream(self._own, end)
            except LostError:  # the agent has closed the lock, and another process sends the stream now
                self._spool.leave_stream()
        while self._spool.holds and not self._signals.stopping:
            self._send_held()

    def _send_stream(self, own: Uploader, end: Position) -> None:
        stream = own.stream
        while (lines := own.send_next()) and not self._signals.stopping:
            # Less than a batch beyond what there was when we began may gather first.
            if lines < self._delivery.rows and (stream.number, stream.offset) >= end:
                break
            self._breathe()
        if stream.number < end[0] and not self._signals.stopping:
            raise WaitError("Somebody still writes to a file that is full", _SETTLE_S)

    # --- What processes that are gone have left --------------------------------------------------

    def _send_orphans(self) -> None:
        """Send other streams, those found at the last look around; one that cannot be sent now has to wait."""
        now = time.monotonic()
        if now >= self._next_look:
            self._left = deque(waiting(self._folder).items())
            pause = max(self._config.pace.look_every_s, self._config.pace.cost * (time.monotonic() - now))
            self._next_look = now + pause * random.uniform(0.5, 1.5)  # noqa: S311
        while not self._signals.stopping and (orphan := self._orphan or self._next_orphan()) is not None:
            is_left = False
            try:
                is_left = orphan.send_next() > 0 and (orphan.stream.number, orphan.stream.offset) < self._orphan_end
                if not is_left:
                    orphan.stream.window(1, 1)  # marks a file that has been sent whole
            except BlockedError:
                self._aside.postpone(orphan.stream.name)
            except WaitError:
                pass  # it comes after a stream that another process is still sending
            except OSError as error:
                self._complain_of(orphan.stream.name, error)
            if not is_left:
                self._release_orphan()
                continue
            self._breathe()
            self._tidy()
            if not self._signals.is_idle or self._is_awaited() or self._beat_is_due():
                self._serve()

    def _next_orphan(self) -> Uploader | None:
        own = self._spool.stream
        while self._left:
            name, numbers = self._left.popleft()
            if (own is not None and own.name == name) or (is_aside(name) and not self._aside.is_due(name)):
                continue
            try:
                stream = Stream.take(self._folder, name, numbers)
                self._orphan_end = stream.end() if stream is not None else (0, 0)
            except OSError as error:  # another user's, perhaps
                self._complain_of(name, error)
                continue
            if stream is not None:
                self._orphan = Uploader(stream, self._delivery, self._counters)
                return self._orphan
        return None

    def _complain_of(self, stream: str, error: OSError) -> None:
        text = "The stream %s in %s cannot be sent: %s"
        self._complaints.say(logging.WARNING, text, stream, self._folder, error)

    def _release_orphan(self) -> None:
        if self._orphan is not None:
            with contextlib.suppress(OSError):
                self._orphan.stream.release()
            self._orphan = None

    def _send_held(self) -> None:
        lines = self._spool.take_held(self._delivery.rows)
        sent = False
        try:
            self._delivery.send(Batch.of(lines))
            sent = True
        finally:
            self._spool.give_back(sent=sent)

    def _breathe(self) -> None:
        if self._delivery.pause_s and not self._signals.stopping:
            self._signals.hurry.wait(self._delivery.pause_s)

    def _bury(self, lines: list[bytes], status: int | None, reason: object) -> None:
        bury(self._folder, lines, status, reason)

    # --- Bounds ----------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Keep the folder within its bounds, whether the daemon can be reached or not."""
        self._spool.look()
        self._spool.rotate_if_old()
        try:
            self._upkeep.attend(self._spool.stream)
        except OSError as error:
            self._complaints.say(logging.WARNING, "The spool in %s cannot be tidied up: %s", self._folder, error)

    # --- Runs that are alive ---------------------------------------------------------------------

    def _attend(self, live: Iterable[LiveRun]) -> None:
        """Register runs for a death certificate, and send the heartbeats that are due.

        Both go past the spool: that a run is alive is no news later.
        """
        for run in live:
            if self._certifies and run.event_id in self._signals.live and run.event_id not in self._registered:
                self._register(run)
            if run.heartbeat_s is not None:
                self._beat(run, run.heartbeat_s)
        self._registered &= self._signals.live.keys()
        self._beats = {event_id: due for event_id, due in self._beats.items() if event_id in self._signals.live}

    def _register(self, run: LiveRun) -> None:
        if self._identity is None:
            if self._transport.is_local is None:
                return  # nothing has been sent yet
            self._identity = ProcessIdentity.own() if self._transport.is_local else None
            if self._identity is None:
                self._certifies = False
                return
        identity = self._identity
        body = {"pid": identity.pid, "start_time": identity.start_time, "boot_id": identity.boot_id}
        answer = self._delivery.report("POST", run_path(run.event_id) + "/process", encode(body))
        if answer.status == 500:
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
            # Any field will do; this one cannot bring a run back that another client has ended.
            self._delivery.report("PATCH", run_path(run.event_id), encode({"duration_ms": run.elapsed_ms()}))
            self._beats[run.event_id] = now + every_s

    def _beat_is_due(self) -> bool:
        return bool(self._beats) and min(self._beats.values()) <= time.monotonic()
