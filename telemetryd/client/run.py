"""One run in the agent's code: a context manager, a decorator, or explicit start and finish."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import Token
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, Self, TypeVar, Unpack

from telemetryd import traces
from telemetryd.client.context import (
    PARENT_VARIABLE,
    Enclosing,
    enclosing_run,
    new_run_id,
    parent_run_id,
    parent_span,
    timestamp,
)
from telemetryd.client.decorating import CO_COROUTINE, decorated
from telemetryd.client.fields import CHANGES, FIELDS, NAMES, Details, Fields
from telemetryd.client.intake import Complain, Intake, object_of
from telemetryd.client.values import Room, plain, summary_of
from telemetryd.traces import Span
from telemetryd.uuids import new_uuid

if TYPE_CHECKING:
    from telemetryd.client.lines import After, Json

logger: Final = logging.getLogger("telemetryd.client")

P = ParamSpec("P")
R = TypeVar("R")

HEARTBEAT_S: Final = 60.0
_AT_START: Final = FIELDS - {*NAMES}
_MAX_DETAILS: Final = 64 * 1024
_MAX_SUMMARY: Final = 500


class Recorder(Protocol):
    """What a run writes to."""

    def write(self, line: Mapping[str, Any]) -> bool:
        """Put a line into the spool; never raises."""

    def surroundings(self) -> Mapping[str, str]:
        """Return the fields that every run gets by itself."""

    def begun(self, run: Run) -> None:
        """Take note that a run is alive."""

    def ended(self, run: Run) -> None:
        """Take note that it is not any more."""

    def rejected(self, field: str, why: str) -> None:
        """Count and log that a value is left out, because no field can take it."""

    def failed(self) -> None:
        """Count and log, within an except clause, what must not reach the agent."""

    def after(self) -> After | None:
        """Return what must have been sent before a line about a run of the parent process."""


class Run:
    """One execution of one job by one agent. Make it with `Client.run`.

    None of its methods raises, waits for the network or for the disk. They may be called from any thread, from
    tasks, and from forked processes.

    Attributes:
        event_id: unique id of the run's record.
        run_id: the run's own id, such as 20251231T153045Z-hugo-translator-a1b2c3d4.
        span: its place in a distributed trace (W3C Trace Context), from its start on; None if it belongs to none.

    """

    def __init__(
        self,
        recorder: Recorder,
        agent_name: str,
        job_type: str,
        heartbeat_s: float | None,
        fields: Mapping[str, Any],
    ) -> None:
        self._recorder = recorder
        self._intake = Intake(recorder.rejected)
        self._agent_name = self._intake.required("agent_name", agent_name)
        self._job_type = self._intake.required("job_type", job_type)
        self.heartbeat_s = heartbeat_s
        self.event_id = self._intake.name("event_id", fields.get("event_id"), new_uuid)
        self.run_id = self._intake.name("run_id", fields.get("run_id"), lambda: new_run_id(self._agent_name))
        self._fields = {name: value for name, value in fields.items() if name not in ("event_id", "run_id")}
        self._lock = threading.RLock()
        self._lock_process = os.getpid()
        self._began = 0.0
        self._process = 0
        self._finished = False
        self.span: Span | None = None
        self._token: Token[Enclosing | None] | None = None

    # --- Beginning and end -----------------------------------------------------------------------

    def start(self) -> Self:
        """Record that the run has begun; once is enough."""
        with self._own_lock():
            if not self._process:
                self._began = time.monotonic()
                self._process = os.getpid()
                try:
                    self._record_start()
                except Exception:  # noqa: BLE001 - whatever it is must not reach the agent
                    self._recorder.failed()
        return self

    def _record_start(self) -> None:
        line: Json = {
            "event_id": self.event_id,
            "run_id": self.run_id,
            "agent_name": self._agent_name,
            "job_type": self._job_type,
            "start_time": timestamp(),
            "status": "running",
        }
        if "parent_run_id" not in self._fields:
            line["parent_run_id"] = parent_run_id()
        if "trace_id" not in self._fields and (parent := parent_span()) is not None:
            self.join(parent)
        if self.span is not None:
            line["trace_id"], line["span_id"] = self.span.trace_id, self.span.span_id
        line.update(self._intake.sort({**self._recorder.surroundings(), **self._fields}, _AT_START))
        self._recorder.write(line)
        self._recorder.begun(self)

    def finish(self, status: str = "success", **changes: Unpack[Details]) -> None:
        """Record that the run has ended; the first call counts.

        Args:
            status: success, failure, partial, timeout or cancelled; anything else counts as partial.
            **changes: whatever else is to be said of the run.

        """
        with self._own_lock():
            if self._finished:
                return
            self.start()
            self._finished = True
            self._recorder.ended(self)
            ending = {"end_time": timestamp(), "duration_ms": self.elapsed_ms()}
            self._update(changes, {"status": self._intake.status(status), **ending})

    def elapsed_ms(self) -> int:
        """Return how long the run has been going on, in milliseconds."""
        return max(int((time.monotonic() - self._began) * 1000), 0) if self._process else 0

    # --- In between ------------------------------------------------------------------------------

    def items(
        self,
        *,
        discovered: int | None = None,
        succeeded: int | None = None,
        failed: int | None = None,
        skipped: int | None = None,
        **more: Any,
    ) -> None:
        """Record how many items were found, done, failed and left out so far; other counts join the figures.

        The number found stands in its own field only if the run is started with it (items_discovered=…), because
        PATCH does not change it; said here, it stands in metrics_json.
        """
        counts = {
            "items_discovered": discovered,
            "items_succeeded": succeeded,
            "items_failed": failed,
            "items_skipped": skipped,
        }
        self._update({**counts, **more})

    def metrics(self, figures: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Record figures of the agent's own; they join those that were recorded before."""
        self._update({"metrics_json": figures})
        if more:
            self._update({"metrics_json": more})

    def context(self, facts: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Record facts of the agent's own; they join those that were recorded before."""
        self._update({"context_json": facts})
        if more:
            self._update({"context_json": more})

    def labels(self, labels: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Record labels, short texts by which runs are found; None removes one, and others stay as they are."""
        self._update({"labels": labels})
        if more:
            self._update({"labels": more})

    def update(self, changes: Mapping[str, Any] | None = None, /, **more: Unpack[Fields]) -> None:
        """Record other fields of the run, such as output_summary."""
        if changes is not None:
            self._update(changes)
        if more:
            self._update(more)

    def event(self, event_type: str | None = None, payload: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Record something that happened during the run: a type, and a payload (a JSON object) or its items."""
        try:
            event_type = more.pop("event_type", None) if event_type is None else event_type
            intake = Intake(self._recorder.rejected)
            event = {"event_key": new_uuid(), "timestamp": timestamp(), **intake.event(event_type, payload, more)}
            self._operation("event", "event", event)
        except Exception:  # noqa: BLE001 - whatever it is must not reach the agent
            self._recorder.failed()

    def join(self, parent: Span | None) -> None:
        """Make the run a span of its parent's trace; without a parent, of a new trace. Before the start."""
        self.span = self.span or Span.begin(parent)

    def environment(self) -> dict[str, str]:
        """Return this process's environment for a child process whose runs shall have this one as their parent."""
        trace = {} if self.span is None else {traces.VARIABLE: str(self.span)}
        return {**os.environ, PARENT_VARIABLE: self.run_id, **trace}

    def _update(self, changes: Mapping[str, Any], besides: Mapping[str, Any] = MappingProxyType({})) -> None:
        with self._own_lock():
            try:
                fields = {
                    **besides,
                    **self._intake.sort(changes if type(changes) is dict else object_of(changes), CHANGES),
                }
                if fields:
                    self._operation("update", "fields", fields)
            except Exception:  # noqa: BLE001 - whatever it is must not reach the agent
                self._recorder.failed()

    def _own_lock(self) -> threading.RLock:
        if self._lock_process != os.getpid():  # a fork may have copied the lock while another thread held it
            self._lock, self._lock_process = threading.RLock(), os.getpid()
        return self._lock

    def _operation(self, op: str, name: str, value: Json) -> None:
        if not self._process:
            self.start()
        line: Json = {"op": op, "event_id": self.event_id, name: value}
        if self._process != os.getpid() and (after := self._recorder.after()) is not None:
            line["after"] = after
        self._recorder.write(line)

    # --- with, async with, decorator -------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        self._token = enclosing_run.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.step_out()
        if self._process != os.getpid():
            return  # a forked process leaves the block on its way out; the run is the parent's
        if error is None:
            self.finish()
        else:
            self.fail(error)

    def step_out(self) -> None:
        """Go on without being the parent of the runs that begin from here on."""
        if self._token is not None:
            try:
                enclosing_run.reset(self._token)
            except ValueError:  # left in another context than it was entered in (a generator, for instance)
                enclosing_run.set(None)
            self._token = None

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def fail(self, error: BaseException) -> None:
        """Record that the run ended with an exception, with the status that suits it."""
        status = status_of(error)
        if status == "success":
            self.finish()
            return
        self.finish(status, error_summary=summary_of(error)[:_MAX_SUMMARY], error_details=_details(error))

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, async or not: each call of it is a separate run, until its work is done.

        Raises:
            TypeError: if it is no function, or a generator or a context manager: their call ends before their work.

        """
        return decorated(function, self._another)

    def _another(self) -> Run:
        return Run(self._recorder, self._agent_name, self._job_type, self.heartbeat_s, self._fields)


def status_of(error: BaseException) -> str:
    """Return how a run ended through which an exception passed."""
    if isinstance(error, BaseExceptionGroup):
        statuses = {status_of(inner) for inner in error.exceptions}
        return statuses.pop() if len(statuses) == 1 else "failure"
    if isinstance(error, GeneratorExit):
        return _status_of_one_left(error)
    if isinstance(error, KeyboardInterrupt) or any(k.__name__ in _CANCELLED for k in type(error).__mro__):
        return "cancelled"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return "success"
    return "failure"


def _status_of_one_left(error: GeneratorExit) -> str:
    """Return how a run ended whose generator nobody asks for more, or whose coroutine was closed before its end."""
    frame = error.__traceback__.tb_frame if error.__traceback__ is not None else None
    is_coroutine = frame is not None and frame.f_code.co_flags & CO_COROUTINE
    return "cancelled" if is_coroutine else "success"


_CANCELLED: Final = ("CancelledError", "Cancelled")
"""asyncio's and concurrent.futures', and trio's, none of which is imported for this."""


def heartbeat_of(asked: object, rejected: Complain) -> float | None:
    """Return the seconds between two heartbeats; what is no number of seconds is taken as the wish for some."""
    if asked is None or asked is False:
        return None
    if asked is True:
        return HEARTBEAT_S
    try:
        seconds = plain(asked, Room())
    except Exception:  # noqa: BLE001 - an agent's own class may do anything
        seconds = None
    if isinstance(seconds, (int, float)) and 0 < seconds < math.inf:
        return float(seconds)
    if seconds != 0:
        rejected("heartbeat", "must be true, false or a number of seconds")
    return HEARTBEAT_S if seconds != 0 else None


def _details(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))[-_MAX_DETAILS:]
    except Exception:  # noqa: BLE001 - as above
        return summary_of(error)
