"""Turns what systemd writes into the journal about its units into runs: their start, their end, what they used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

from telemetryd.client import units
from telemetryd.client.context import timestamp

# The messages of PID 1 (systemd/sd-messages.h), which stay the same over versions and languages.
_STARTING: Final = "7d4958e842da4a758f6c1cdc7b36dcc5"
_STARTED: Final = "39f53479d3a045ac8e11786248231fbf"
_PROCESS_EXIT: Final = "98e322203f7a4ed290d09fe03c09fe15"
_SUCCESS: Final = "7ad2d189f7e94e70a38c781354912448"
_FAILURE: Final = "d9b373ed55a64feb8242e02dbe79a49c"
_SKIPPED: Final = "0e4284a0caca4bfc81c0bb6786972673"
_RESOURCES: Final = "ae8f7b866b0347b9af31fe1c80b127c0"
MESSAGES: Final = (_STARTING, _STARTED, _PROCESS_EXIT, _SUCCESS, _FAILURE, _SKIPPED, _RESOURCES)
FIELDS: Final = (
    *("MESSAGE_ID", "UNIT", "INVOCATION_ID", "EXIT_CODE", "EXIT_STATUS", "UNIT_RESULT", "COMMAND"),
    *("CPU_USAGE_NSEC", "MEMORY_PEAK", "_BOOT_ID", "_HOSTNAME", "_SOURCE_REALTIME_TIMESTAMP"),
)
"""The fields that are read of an entry, besides its cursor and time, which journalctl always gives."""
_MICROSECOND: Final = 1e-6
_USED: Final = {"CPU_USAGE_NSEC": ("cpu_s", 1e-9), "MEMORY_PEAK": ("max_memory_bytes", 1)}
_MAIN: Final = "ExecStart"
_REMEMBERED: Final = 1000
"""Ended runs that are remembered: systemd says that a oneshot unit has started only after its end."""


class Recorder(Protocol):
    """Where runs are recorded."""

    def record(self, run: Mapping[str, Any]) -> str | None:
        """Record a run; return its event_id when it is in the spool."""

    def write(self, line: Mapping[str, Any]) -> bool:
        """Put one line into the spool."""


@dataclass(slots=True)
class Invocation:
    """One run of a unit, from its first message until it is recorded as ended."""

    unit: str
    boot_id: str
    host: str | None = None
    began: float | None = None
    """Seconds since the epoch; None if we have not seen it begin."""
    exit_code: str = ""
    exit_status: str = ""
    ended: float | None = None
    result: str = ""
    used: dict[str, float] = field(default_factory=dict)


class UnitJournal:
    """Reads entries of the journal in their order, and records the runs of units.

    Args:
        recorder: where runs are recorded.
        is_meant: whether the runs of a unit, given by its name, are recorded.
        state: where reading stopped: `state()` of then; empty if it begins.

    """

    def __init__(
        self,
        recorder: Recorder,
        is_meant: Callable[[str], bool],
        state: Mapping[str, Any],
    ) -> None:
        self._recorder = recorder
        self._is_meant = is_meant
        self._open = {key: Invocation(**fields) for key, fields in state.get("open", {}).items()}
        self._ended: dict[str, None] = dict.fromkeys(state.get("ended", ()))
        self._boot_id = ""

    def state(self) -> dict[str, Any]:
        """Return the runs that have not ended, and the invocations that have ended last, as JSON holds them."""
        return {"open": {key: asdict(run) for key, run in self._open.items()}, "ended": list(self._ended)}

    def read(self, entry: Mapping[str, Any]) -> None:
        """Take one entry, as `journalctl -o json` gives it."""
        message, unit, key = (entry.get(name) for name in ("MESSAGE_ID", "UNIT", "INVOCATION_ID"))
        if not (isinstance(unit, str) and isinstance(key, str)) or not unit.endswith(".service"):
            return
        boot_id = str(entry.get("_BOOT_ID", ""))
        if boot_id != self._boot_id:
            self._boot_id = boot_id
            self._end_of_older_boots(_moment(entry))
        if key not in self._open:
            if key in self._ended or not self._is_meant(unit) or message == _RESOURCES:
                return
            host = entry.get("_HOSTNAME")
            self._open[key] = Invocation(unit, boot_id, host if isinstance(host, str) else None)
        self._apply(key, self._open[key], str(message), entry)

    def settle(self) -> None:
        """Record the ends that were held back for what the units have used, which comes right after."""
        for key in [key for key, run in self._open.items() if run.ended is not None]:
            self._finish(key)

    def _apply(self, key: str, run: Invocation, message: str, entry: Mapping[str, Any]) -> None:
        moment = _moment(entry)
        if message in (_STARTING, _STARTED) and run.began is None:
            run.began = moment
            self._recorder.record({**self._names(key, run), "status": "running"})
        elif message == _PROCESS_EXIT and (entry.get("COMMAND", _MAIN) == _MAIN or not run.exit_code):
            run.exit_code, run.exit_status = str(entry.get("EXIT_CODE", "")), str(entry.get("EXIT_STATUS", ""))
        elif message in (_SUCCESS, _FAILURE, _SKIPPED):
            run.ended = moment
            usual = {_SUCCESS: "success", _FAILURE: "failure", _SKIPPED: "exec-condition"}[message]
            run.result = str(entry.get("UNIT_RESULT") or usual)
        elif message == _RESOURCES:
            run.used |= {
                name: int(text) * factor
                for figure, (name, factor) in _USED.items()
                if isinstance(text := entry.get(figure), str) and text.isdigit()
            }
            if run.ended is not None:
                self._finish(key)

    def _names(self, key: str, run: Invocation) -> dict[str, Any]:
        began = run.ended if run.began is None else run.began
        return {
            "event_id": units.EVENT_ID.format(invocation_id=key),
            "agent_name": units.agent_of(run.unit),
            "job_type": units.JOB_TYPE,
            "start_time": timestamp(began),
            **({} if run.host is None else {"host": run.host}),
        }

    def _finish(self, key: str) -> None:
        run = self._open.pop(key)
        self._ended[key] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        fields = units.outcome(run.result, run.exit_code, run.exit_status)
        fields["metrics_json"] = {**fields.get("metrics_json", {}), **run.used}
        fields["end_time"] = timestamp(run.ended)
        if run.began is None:  # it had begun before we read
            self._recorder.record({**self._names(key, run), **fields})
            return
        if run.ended is not None:
            fields["duration_ms"] = max(round((run.ended - run.began) * 1000), 0)
        self._recorder.write({"op": "update", "event_id": units.EVENT_ID.format(invocation_id=key), "fields": fields})

    def _end_of_older_boots(self, moment: float) -> None:
        """End the runs of which nothing more can come, because the machine has started anew since."""
        for key, run in list(self._open.items()):
            if run.boot_id != self._boot_id:
                if run.ended is None:
                    run.ended, run.result = moment, "the machine was restarted"
                self._finish(key)


def _moment(entry: Mapping[str, Any]) -> float:
    """Return when an entry was written, in seconds since the epoch."""
    text = entry.get("_SOURCE_REALTIME_TIMESTAMP") or entry["__REALTIME_TIMESTAMP"]
    return int(text) * _MICROSECOND
