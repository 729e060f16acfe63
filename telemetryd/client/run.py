"""One run as the agent sees it: a context manager, a decorator, or explicit start and finish."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, Self, TypeVar, Unpack

from telemetryd.client.context import (
    PARENT_VARIABLE,
    enclosing_run_id,
    new_run_id,
    new_uuid,
    parent_run_id,
    timestamp,
)
from telemetryd.client.fields import CHANGES, FIELDS, Details, Fields

if TYPE_CHECKING:
    from telemetryd.client.lines import After, Json

logger: Final = logging.getLogger("telemetryd.client")

P = ParamSpec("P")
R = TypeVar("R")

HEARTBEAT_S: Final = 60.0
_MAX_DETAILS: Final = 64 * 1024
_MAX_SUMMARY: Final = 500
_COROUTINE: Final = 0x80
_GENERATOR: Final = 0x20 | 0x200
"""inspect.CO_COROUTINE, CO_GENERATOR and CO_ASYNC_GENERATOR, without importing inspect."""


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
        self._agent_name = agent_name
        self._job_type = job_type
        self._fields = fields
        self.heartbeat_s = heartbeat_s
        self.event_id = str(fields.get("event_id") or new_uuid())
        self.run_id = str(fields.get("run_id") or new_run_id(str(agent_name)))
        self._metrics: Json = {}
        self._context: Json = {}
        self._lock = threading.RLock()
        self._lock_process = os.getpid()
        self._began = 0.0
        self._process = 0
        self._finished = False
        self._token: Token[str | None] | None = None

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
            "parent_run_id": parent_run_id(),
            **self._recorder.surroundings(),
        }
        line.update(self._sorted(self._fields, FIELDS))
        line["event_id"], line["run_id"] = self.event_id, self.run_id
        self._recorder.write(line)
        self._recorder.begun(self)

    def finish(self, status: str = "success", **changes: Unpack[Details]) -> None:
        """Record that the run has ended; the first call counts.

        Args:
            status: success, failure, partial, timeout or cancelled.
            **changes: whatever else is to be said of the run.

        """
        with self._own_lock():
            if self._finished:
                return
            self.start()
            self._finished = True
            self._recorder.ended(self)
            ending: Json = {"status": status, "end_time": timestamp(), "duration_ms": self.elapsed_ms()}
            self._update({**ending, **changes})

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
    ) -> None:
        """Record how many items were found, done, failed and left out so far.

        The number found stands in its own field only if the run is started with it (items_discovered=…), because
        PATCH does not change it; said here, it stands in metrics_json.
        """
        counts = {
            "items_discovered": discovered,
            "items_succeeded": succeeded,
            "items_failed": failed,
            "items_skipped": skipped,
        }
        self._update({name: count for name, count in counts.items() if count is not None})

    def metrics(self, **figures: Any) -> None:
        """Record figures of the agent's own; they join those that were recorded before."""
        self._update({"metrics_json": figures})

    def context(self, **facts: Any) -> None:
        """Record facts of the agent's own; they join those that were recorded before."""
        self._update({"context_json": facts})

    def update(self, **changes: Unpack[Fields]) -> None:
        """Record other fields of the run, such as output_summary."""
        self._update(changes)

    def event(self, event_type: str, payload: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Record something that happened during the run: a type, and a payload (a JSON object) or its items."""
        try:
            event: Json = {"event_key": new_uuid(), "event_type": str(event_type), "timestamp": timestamp()}
            joined = {**_object(payload), **more}
            if joined:
                event["payload"] = joined
            self._operation("event", "event", event)
        except Exception:  # noqa: BLE001 - whatever it is must not reach the agent
            self._recorder.failed()

    def environment(self) -> dict[str, str]:
        """Return this process's environment for a child process whose runs shall have this one as their parent."""
        return {**os.environ, PARENT_VARIABLE: self.run_id}

    def _update(self, changes: Mapping[str, Any]) -> None:
        with self._own_lock():
            try:
                self._operation("update", "fields", self._sorted(changes, CHANGES))
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

    def _sorted(self, given: Mapping[str, Any], known: frozenset[str]) -> Json:
        """Return fields as the daemon takes them; what it has no field for (any more) goes to metrics or context.

        metrics_json and context_json are replaced as a whole by PATCH, so they always hold everything said so far.
        """
        fields: Json = {}
        metrics: Json = {}
        context: Json = {}
        for name, value in given.items():
            if name == "metrics_json":
                metrics.update(_object(value))
            elif name == "context_json":
                context.update(_object(value))
            elif name in known:
                fields[name] = value
            elif isinstance(value, (int, float)):
                metrics[name] = value
            else:
                context[name] = value
        if metrics:
            self._metrics = {**self._metrics, **metrics}
            fields["metrics_json"] = self._metrics
        if context:
            self._context = {**self._context, **context}
            fields["context_json"] = self._context
        return fields

    # --- with, async with, decorator -------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        self._token = enclosing_run_id.set(self.run_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            try:
                enclosing_run_id.reset(self._token)
            except ValueError:  # left in another context than it was entered in (a generator, for instance)
                enclosing_run_id.set(None)
            self._token = None
        if self._process != os.getpid():
            return  # a forked process leaves the block on its way out; the run is the parent's
        if error is None:
            self.finish()
        else:
            self.fail(error)

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
        self.finish(status, error_summary=_summary(error), error_details=_details(error))

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, async or not: each call of it is a run of its own.

        Raises:
            TypeError: if it is a generator, whose call ends before its work begins.

        """

        def another() -> Run:
            own = {name: value for name, value in self._fields.items() if name not in ("event_id", "run_id")}
            return Run(self._recorder, self._agent_name, self._job_type, self.heartbeat_s, own)

        code = getattr(function, "__code__", None)
        if code is not None and code.co_flags & _GENERATOR:
            name = getattr(function, "__qualname__", function)
            raise TypeError(f"{name} is a generator: use `with client.run(…):` within it instead of decorating it")
        if code is not None and code.co_flags & _COROUTINE:

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with another():
                    return await function(*args, **kwargs)  # type: ignore[misc]

            return awaited  # type: ignore[return-value]

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            with another():
                return function(*args, **kwargs)

        return called


def status_of(error: BaseException) -> str:
    """Return how a run ended through which an exception passed."""
    if isinstance(error, KeyboardInterrupt) or any(k.__name__ == "CancelledError" for k in type(error).__mro__):
        return "cancelled"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return "success"
    return "failure"


def _object(value: object) -> Mapping[str, Any]:
    """Return metrics or context as an object; agents of the replaced library may give its JSON text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    return value if isinstance(value, Mapping) else {} if value is None else {"value": value}


def _summary(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an agent's own __str__ may do anything
        text = "(its text cannot be made)"
    name = type(error).__name__
    return (f"{name}: {text}" if text else name)[:_MAX_SUMMARY]


def _details(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))[-_MAX_DETAILS:]
    except Exception:  # noqa: BLE001 - as above
        return _summary(error)
