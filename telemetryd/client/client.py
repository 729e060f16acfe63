"""The client: records runs in the spool, and sends them from a background thread."""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Final, Self, Unpack

from telemetryd.client.complaints import Complaints
from telemetryd.client.config import Config
from telemetryd.client.context import Surroundings, new_run_id, parent_run_id, timestamp
from telemetryd.client.counters import Counters
from telemetryd.client.fields import FIELDS, Fields
from telemetryd.client.intake import OF_THE_SERVER, Intake
from telemetryd.client.lines import After, encode
from telemetryd.client.old_variables import log_remarks
from telemetryd.client.run import Run, heartbeat_of
from telemetryd.client.sender import Sender
from telemetryd.client.spool import Spool
from telemetryd.uuids import new_uuid

logger: Final = logging.getLogger("telemetryd.client")

_STOP_S: Final = 0.5


class Client:
    """Records what an agent does, without ever being in its way.

    A recorded line is with the operating system when the call returns, so it survives the death of the process. A
    background thread sends it, again and again until the daemon has acknowledged it. Only the constructor raises.

    Args:
        url: the daemon: http://host:port, https://…, or unix:///path [TELEMETRY_API_URL; http://localhost:8765].
        token: the daemon's token [TELEMETRY_API_AUTH_TOKEN or TELEMETRY_API_AUTH_TOKEN_FILE].
        buffer_dir: the spool's folder [TELEMETRY_BUFFER_DIR; ~/.local/state/telemetryd/buffer].
        durability: "write", or "fsync" to wait for the disk at each call [TELEMETRY_BUFFER_DURABILITY].
        send: whether this process sends; if not, `telemetryd sync --watch` does [TELEMETRY_SEND; true].
        fields: fields that every run gets, such as environment="prod".
        **settings: any other field of `Config`.

    Raises:
        TypeError: if there is no such setting.
        ValueError: if a setting cannot be used.

    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        buffer_dir: str | os.PathLike[str] | None = None,
        durability: str | None = None,
        send: bool | None = None,
        fields: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        given = {"url": url, "token": token, "buffer_dir": buffer_dir, "durability": durability, "send": send}
        self._begin(Config.load(**given, **settings), fields or {})

    @classmethod
    def tolerant(cls) -> Self:
        """Return a client with those variables of the environment that can be used; the log reports the others.

        Where the address or the token is among the others, nothing is sent, and the spool keeps everything.
        """
        config, faults = Config.tolerant()
        client = cls.__new__(cls)
        client._begin(config, {})
        if faults:
            client._counters.failures = len(faults)
            client._counters.problem = "; ".join(faults)
            what = "its default is used" if config.send else "telemetry stays in the spool and is not sent"
            logger.error("A variable of the environment cannot be used, so %s: %s", what, client._counters.problem)
        return client

    def _begin(self, config: Config, fields: Mapping[str, str]) -> None:
        log_remarks()
        self.config = config
        self._surroundings = Surroundings(fields)
        self._counters = Counters()
        self._complaints = Complaints()
        self._spool = Spool(
            self.config.folder,
            sends=self.config.send,
            fsync=self.config.durability == "fsync",
            file_bytes=self.config.file_bytes,
            file_age_s=self.config.file_age_s,
        )
        self._sender = Sender(self.config, self._spool, self._counters, _close_all)
        _clients.add(self)
        _open.add(self)

    # --- Recording -------------------------------------------------------------------------------

    def run(self, agent_name: str, job_type: str, *, heartbeat: bool | float = False, **fields: Unpack[Fields]) -> Run:
        """Return a run, to be used as `with client.run(…) as run:`, as a decorator, or by its start() and finish().

        Args:
            agent_name: which agent runs.
            job_type: what kind of job it runs.
            heartbeat: True to report every minute that the run is alive; or the seconds between.
            **fields: other fields of the run, such as product="words" (docs/reference/runs.md).

        """
        return Run(self, agent_name, job_type, heartbeat_of(heartbeat, self.rejected), fields)

    def record(self, run: Mapping[str, Any]) -> str | None:
        """Record a finished run, given as POST /api/v1/runs takes it; event_id and the like are added if missing.

        What no field can take is left out and kept in context_json (docs/reference/client.md).

        Returns:
            the event_id when the run is in the spool; None if it is not, because the disk is full, say: then it is
            held in memory and sent from there, and the log says so.

        """
        try:
            intake = Intake(self.rejected)
            given: dict[Any, Any] = {**self.surroundings(), **run}  # what these lack costs no run
            for name in OF_THE_SERVER:
                given.pop(name, None)
            event_id = intake.name("event_id", given.pop("event_id", None), new_uuid)
            agent_name = intake.required("agent_name", given.pop("agent_name", None))
            line: dict[str, Any] = {
                "event_id": event_id,
                "run_id": intake.name("run_id", given.pop("run_id", None), lambda: new_run_id(agent_name)),
                "agent_name": agent_name,
                "job_type": intake.required("job_type", given.pop("job_type", None)),
            }
            if "parent_run_id" not in given:
                line["parent_run_id"] = parent_run_id()
            if given.get("status") is not None:
                given["status"] = intake.status(given["status"])
            line.update(intake.sort(given, FIELDS))
            if "start_time" not in line:
                line["start_time"] = timestamp()
            return event_id if self.write(line) else None
        except Exception:  # noqa: BLE001 - whatever it is must not reach the agent
            self.failed()
            return None

    def write(self, line: Mapping[str, Any]) -> bool:
        """Put one line into the spool (docs/reference/client.md has its forms); return whether it is there."""
        try:
            is_safe = self._spool.append(encode(line))
            if is_safe:
                self._counters.recorded += 1
            else:
                self._counters.held += 1
            self._sender.notice()
        except Exception:  # noqa: BLE001 - whatever it is must not reach the agent
            self.failed()
            return False
        return is_safe

    # --- What a run asks for ---------------------------------------------------------------------

    def surroundings(self) -> Mapping[str, str]:
        """Return the fields that every run gets by itself."""
        try:
            return self._surroundings.fields()
        except Exception:  # noqa: BLE001 - whatever it is must not reach the agent
            self.failed()
            return {}

    def begun(self, run: Run) -> None:
        """Take note that a run is alive."""
        self._sender.live[run.event_id] = run

    def ended(self, run: Run) -> None:
        """Take note that it is not any more."""
        self._sender.live.pop(run.event_id, None)

    def after(self) -> After | None:
        """Return how far the parent process's stream had come when this one was forked."""
        return self._spool.after

    def rejected(self, field: str, why: str) -> None:
        """Count and log that a value is left out, because no field can take it."""
        self._counters.rejected += 1
        # A bounded number of texts, each of which is logged once a minute.
        what = field if field in FIELDS else "a figure, a fact or an argument"
        text = f"Telemetry: what was given as {what} is left out and kept in context_json: %s %s"
        self._complaints.say(logging.WARNING, text, field, why)

    # --- Sending ---------------------------------------------------------------------------------

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until everything recorded so far has been acknowledged; return whether it has.

        What is set aside (`stats()["aside"]`) is not acknowledged, and not waited for either.
        """
        return self._sender.flush(timeout_s)

    def stats(self) -> dict[str, Any]:
        """Return what became of the lines since this client was made (`telemetryd.client.counters.Counters`)."""
        return {**asdict(self._counters), "refused": self._spool.refused}

    def close(self, timeout_s: float | None = None) -> None:
        """Send what can be sent within a bound, and leave the rest in the spool for the next process.

        Happens by itself at the end of the process.

        Args:
            timeout_s: the bound; by default the setting flush_timeout_s.

        """
        _close([self], self.config.flush_timeout_s if timeout_s is None else timeout_s)

    def failed(self) -> None:
        """Count and log, within an except clause, what went wrong inside the client."""
        self._counters.failures += 1
        if self._counters.failures in (1, 10, 100, 1000):
            logger.exception("Telemetry could not be recorded (%d times so far)", self._counters.failures)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def after_fork(self) -> None:
        """In a forked process: leave what belongs to the parent alone."""
        self._sender.after_fork()
        self._spool.after_fork()


_clients: Final[weakref.WeakSet[Client]] = weakref.WeakSet()
_open: Final[set[Client]] = set()
"""Those that are not closed, whether the agent still knows them or not: their lines are to be sent."""


def _close(clients: Sequence[Client], timeout_s: float) -> None:
    """Close clients at the same time, within one bound for all."""
    clients = [client for client in clients if client in _open]
    _open.difference_update(clients)
    end = time.monotonic() + timeout_s
    flushes = [(client._sender, client._sender.begin_flush(is_last=True)) for client in clients if client.config.send]
    for sender, flush in flushes:
        sender.end_flush(flush, end - time.monotonic())
    for client in clients:
        client._sender.stop()
    end = time.monotonic() + _STOP_S
    for client in clients:
        # Who has not stopped still works on the stream, which the end of the process frees.
        if client._sender.has_stopped(end - time.monotonic()):
            client._spool.close()


def _close_all() -> None:
    clients = [*_open]
    _close(clients, max((client.config.flush_timeout_s for client in clients), default=0.0))


def _after_fork() -> None:
    for client in list(_clients):
        client.after_fork()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
