"""Converts runs and events of an older layout to the current schema, and reports what was changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import orjson
from pydantic import TypeAdapter

from telemetryd import timestamps
from telemetryd.errors import InvalidBodyError
from telemetryd.git_urls import without_credentials
from telemetryd.model.bodies import parse_json
from telemetryd.model.runs import COLUMNS, TABLE, NewRun, columns
from telemetryd.model.values import (
    MAX_INTEGER,
    CommitSource,
    Role,
    SqlValue,
    Status,
    canonical_status,
    json_text,
)
from telemetryd.uuids import new_uuid

RawValue = str | int | float | bytes | None
"""What SQLite gives for a value of any type; text that is not UTF-8 comes as bytes."""

EPOCH: Final = "1970-01-01T00:00:00.000000Z"
UNKNOWN: Final = "unknown"
_NO_CHARACTER: Final = "\N{REPLACEMENT CHARACTER}"
NO_SUCH_FIELD: Final = "no such field any more"
_SCHEMA_VERSION: Final = "schema_version"
_OLD_VERSIONS: Final = range(1, 8)
"""What the replaced service wrote there, the same in each run; `schema_migrations` says it once."""


class _Changed(NamedTuple):
    """The same value in the form of today; nothing of it is lost."""

    value: SqlValue
    kind: str


class _Replaced(NamedTuple):
    """A substitute for a value that has no form of today; the original goes to the side table."""

    value: SqlValue
    reason: str


_Result = SqlValue | _Changed | _Replaced


@dataclass(slots=True)
class Tally:
    """What the conversion of many rows did: how many values of each kind, by (field, kind)."""

    changed: Counter[tuple[str, str]] = field(default_factory=Counter)
    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)


class Original(NamedTuple):
    """A value for the side table: whose it was, and why it could not stay."""

    field: str
    reason: str
    value: RawValue


# --- One value -----------------------------------------------------------------------------------


def _text(raw: RawValue) -> _Result:
    if raw is None or (isinstance(raw, str) and "\0" not in raw):
        return raw
    if isinstance(raw, (int, float)):
        return _Changed(str(raw), "number to text")
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    if "\0" in text:
        return _Replaced(text.replace("\0", _NO_CHARACTER), "holds a NUL character")
    return _Changed(text, "blob to text") if text.encode() == raw else _Replaced(text, "not UTF-8")


def _address(raw: RawValue) -> _Result:
    """Leave out what may be a secret; the side table would keep it, so it does not go there."""
    result = _text(raw)
    text = _plain(result)
    kept = without_credentials(text) if isinstance(text, str) else None
    return result if kept == text else _Changed(kept, "without credentials")


def _name(raw: RawValue) -> _Result:
    return _Changed(UNKNOWN, f"NULL to {UNKNOWN}") if raw is None else _text(raw)


def _event_id(raw: RawValue) -> _Result:
    if raw is None:
        return _Changed(new_uuid(), "UUID made")
    result = _text(raw)
    if isinstance(result, _Replaced) or not 1 <= len(str(_plain(result))) <= 255:
        return _Replaced(new_uuid(), "not 1 to 255 characters of text")
    return result


# Python refuses to read a number of thousands of digits.
_DIGITS: Final = re.compile(r"\s*\d{1,19}\s*", re.ASCII)


def _count(raw: RawValue) -> _Result:
    if isinstance(raw, int) and raw >= 0:
        return raw
    if raw is None:
        return _Changed(0, "NULL to 0")
    if isinstance(raw, float) and raw.is_integer() and 0 <= raw < MAX_INTEGER:
        return _Changed(int(raw), "real to integer")
    if isinstance(raw, str) and _DIGITS.fullmatch(raw) and int(raw) <= MAX_INTEGER:
        return _Changed(int(raw), "text to integer")
    return _Replaced(0, "not a count")


def _flag(raw: RawValue) -> _Result:
    result = _count(raw)
    number = result[0] if isinstance(result, tuple) else result
    return result if number in (0, 1) and not isinstance(result, _Replaced) else _Replaced(0, "not 0 or 1")


def _status(raw: RawValue) -> _Result:
    if raw is None:
        return _Changed(str(Status.RUNNING), f"NULL to {Status.RUNNING}")
    try:
        status = canonical_status(raw)
    except ValueError:
        return _Replaced(str(Status.PARTIAL), "unknown status")
    assert isinstance(raw, str)  # noqa: S101 - no other type is a status
    return status if status == raw else _Changed(status, f"{raw} to {status}")


def _timestamp(raw: RawValue) -> _Result:
    if raw is None:
        return None
    if isinstance(raw, str):
        canonical = timestamps.canonical(raw)
        if canonical is None:
            text = raw.strip()
            if not text:
                return _Changed(None, "empty to NULL")
            canonical = timestamps.canonical(text) or timestamps.canonical(f"{text}T00:00:00")  # a date without a time
        if canonical is not None:
            return raw if canonical == raw else _Changed(canonical, "to UTC, canonical form")
    return _Replaced(None, "not a timestamp")


def _json_object(raw: RawValue) -> _Result:
    if raw is None:
        return None
    text = _text(raw)
    if isinstance(text, _Replaced):
        return _Replaced(None, text.reason)
    inner = str(_plain(text))
    if not inner.strip():
        return _Changed(None, "empty to NULL")
    try:
        value = parse_json(inner)
        if value is None:
            return _Changed(None, "JSON null to NULL")
        is_object = isinstance(value, dict)
        json_text(value if is_object else {"value": value})
    except (InvalidBodyError, ValueError) as error:
        return _Replaced(None, "not JSON" if isinstance(error, InvalidBodyError) else str(error))
    return text if is_object else _Changed(f'{{"value":{inner}}}', "put into an object")


def _payload(raw: RawValue) -> _Result:
    result = _json_object(raw)
    if isinstance(result, _Replaced):  # no JSON that may be stored, so text that somebody wrote
        return _Replaced(orjson.dumps({"value": _plain(_text(raw))}).decode(), result.reason)
    return result


def _commit_source(raw: RawValue) -> _Result:
    if raw is None or raw in set(CommitSource):
        return None if raw is None else str(raw)
    word = raw.strip().lower() if isinstance(raw, str) else ""
    if word in set(CommitSource):
        return _Changed(word, "case and blanks")
    return _Changed(None, "empty to NULL") if raw == "" else _Replaced(None, "unknown commit source")


def _checked(name: str) -> Callable[[RawValue], _Result]:
    """Return the converter of a field that no older layout has: what a request could bring stays."""
    kind: TypeAdapter[SqlValue] = TypeAdapter(NewRun.model_fields[name].rebuild_annotation())
    is_json = name in columns(Role.JSON)

    def convert(raw: RawValue) -> _Result:
        if raw is None:
            return None
        try:
            value = kind.validate_python(
                parse_json(raw) if is_json and isinstance(raw, (str, bytes)) else raw, strict=True
            )
        except (InvalidBodyError, ValueError):
            return _Replaced(None, f"no value of {name}")
        return value if value == raw else _Changed(value, "canonical form")

    return convert


_TIMESTAMPS: Final = (
    "created_at", "updated_at", "start_time", "end_time", "api_posted_at", "git_commit_timestamp", "expected_by",
)  # fmt: skip
_COUNTS: Final = (
    "items_discovered",
    "items_succeeded",
    "items_failed",
    "items_skipped",
    "duration_ms",
    "api_retry_count",
)
_CONVERTERS: Final[dict[str, Callable[[RawValue], _Result]]] = {
    **dict.fromkeys(COLUMNS, _text),
    **dict.fromkeys(("run_id", "agent_name", "job_type"), _name),
    **dict.fromkeys(_TIMESTAMPS, _timestamp),
    **dict.fromkeys(_COUNTS, _count),
    **dict.fromkeys(columns(Role.JSON), _json_object),
    **dict.fromkeys(columns(Role.BOOLEAN), _flag),
    "event_id": _event_id,
    "git_repo": _address,
    "status": _status,
    "git_commit_source": _commit_source,
    **{name: _checked(name) for name in ("labels", "attempt", "trace_id", "span_id")},
}


PLAIN_TEXTS: Final = tuple(name for name in COLUMNS[1:] if _CONVERTERS[name] in (_text, _name, _address, _event_id))
"""The fields of a run that hold whatever somebody wrote."""


def replacement(name: str, stored: str) -> tuple[SqlValue, str] | None:
    """Return what replaces a value (of a plain text, or of JSON) that no request could bring, and the reason."""
    result = (_payload if name == "payload" else _CONVERTERS[name])(stored)
    return (result.value, result.reason) if isinstance(result, _Replaced) else None


# --- Runs ----------------------------------------------------------------------------------------

_REQUIRED_TIMES: Final = ("created_at", "start_time", "updated_at")
_TIME_PLACES: Final = tuple(COLUMNS.index(name) for name in _REQUIRED_TIMES)
_EVENT_ID_PLACE: Final = COLUMNS.index("event_id")
_FIELDS: Final = COLUMNS[1:]
"""Every field but the id, which is the row's number and comes on its own."""


@dataclass(frozen=True, slots=True)
class Converted:
    """Some runs in the form of today."""

    columns: list[Sequence[SqlValue]]
    """The values of each field, in the order of `COLUMNS`."""
    kept: frozenset[str]
    """The fields whose values are all as they were."""
    originals: list[list[Original]]
    """What of each run goes to the side table."""

    def rows(self) -> list[tuple[SqlValue, ...]]:
        """Return the values of each run, in the order of `COLUMNS`."""
        return [*zip(*self.columns, strict=True)]

    def side_rows(self) -> list[tuple[SqlValue, str, str, RawValue]]:
        """Return what goes to the side table, with the ids of the runs."""
        return [(run, *original) for run, of in zip(self.columns[0], self.originals, strict=True) for original in of]


class Converter:
    """Converts rows whose values stand in the order of an older layout's columns, many at a time.

    It goes through them column by column, because most columns hold few different values, or none that has to change.
    """

    def __init__(self, old_columns: Sequence[str]) -> None:
        self.tally = Tally()
        self._width = len(old_columns)
        place = {name: index for index, name in enumerate(old_columns)}
        self._present = [(COLUMNS.index(name), name, place[name]) for name in _FIELDS if name in place]
        self._extra = [(name, index) for name, index in place.items() if name not in TABLE]
        self._makes_event_id = "event_id" not in place
        absent = dict.fromkeys(_FIELDS) | dict.fromkeys(_COUNTS + columns(Role.BOOLEAN), 0)
        absent |= dict.fromkeys(("run_id", "agent_name", "job_type"), UNKNOWN) | {"status": str(Status.RUNNING)}
        self._absent: list[SqlValue] = [absent[name] for name in _FIELDS]

    def convert(self, numbers: Sequence[int], rows: Sequence[Sequence[RawValue]]) -> Converted:
        """Return runs in the form of today, whose ids are `numbers`."""
        originals: list[list[Original]] = [[] for _ in rows]
        made: list[Sequence[SqlValue]] = [numbers, *([value] * len(rows) for value in self._absent)]
        raw: list[Sequence[Any]] = [*zip(*rows, strict=True)] or [()] * self._width
        for index, name, place in self._present:
            made[index] = self._column(name, raw[place], originals)
        for name, place in self._extra:
            self._leave_out(name, raw[place], originals)
        if self._makes_event_id:
            made[_EVENT_ID_PLACE] = [new_uuid() for _ in rows]
            self.tally.changed["event_id", "UUID made"] += len(rows)
        if any(None in made[index] for index in _TIME_PLACES):
            self._complete_times(made)
        kept = frozenset(name for index, name, place in self._present if made[index] is raw[place])
        return Converted(made, kept, originals)

    def _column(self, name: str, raw: Sequence[Any], originals: list[list[Original]]) -> Sequence[SqlValue]:
        """Return the values of one field, and add what is replaced to each row's originals."""
        convert = _CONVERTERS[name]
        if name == "event_id" or float in {*map(type, raw)}:  # no UUID is made twice; and 1.0 is equal to 1
            results = [convert(value) for value in raw]
        else:
            result_of = {value: convert(value) for value in {*raw}}
            if not any(isinstance(result, tuple) for result in result_of.values()):
                return raw
            results = [result_of[value] for value in raw]
        for kind, number in Counter(result.kind for result in results if isinstance(result, _Changed)).items():
            self.tally.changed[name, kind] += number
        for row, result in enumerate(results):
            if isinstance(result, _Replaced):
                self._keep(originals[row], name, result.reason, raw[row])
        return [result.value if isinstance(result, tuple) else result for result in results]

    def _leave_out(self, name: str, raw: Sequence[RawValue], originals: list[list[Original]]) -> None:
        """Keep the values of a field that is none any more, but those that say nothing."""
        for row, value in enumerate(raw):
            if name == _SCHEMA_VERSION and value in _OLD_VERSIONS:
                self.tally.changed[name, "left out: it says nothing of the run"] += 1
            elif value is not None:
                self._keep(originals[row], name, NO_SUCH_FIELD, value)

    def _keep(self, originals: list[Original], name: str, reason: str, value: RawValue) -> None:
        originals.append(Original(name, reason, value))
        self.tally.replaced[name, reason] += 1

    def _complete_times(self, made: list[Sequence[SqlValue]]) -> None:
        """Fill a required moment that is missing with another one of the same run, at worst with the epoch."""
        times = [made[index] for index in _TIME_PLACES]
        known = [next((time for time in of if time is not None), EPOCH) for of in zip(*times, strict=True)]
        for name, index in zip(_REQUIRED_TIMES, _TIME_PLACES, strict=True):
            missing = made[index].count(None)
            if missing:
                made[index] = [other if time is None else time for time, other in zip(made[index], known, strict=True)]
                self.tally.changed[name, "missing, taken from the run's other times"] += missing


# --- One event -----------------------------------------------------------------------------------

_OLD_EVENT_COLUMNS: Final = {
    "run_id": ("run_id",),
    "event_type": ("event_type", "event", "type", "name"),
    "timestamp": ("timestamp", "event_time", "ts", "created_at"),
    "payload": ("payload", "payload_json", "event_data", "data", "metadata_json", "details", "message"),
}
"""Where an older table of events may keep a value: the first of these columns that it has."""


class EventConverter:
    """Converts events of a table whose layout was never fixed; the caller keeps the originals."""

    def __init__(self, old_columns: Sequence[str]) -> None:
        place = {name: index for index, name in enumerate(old_columns)}
        self._places = {
            name: next((place[old] for old in candidates if old in place), None)
            for name, candidates in _OLD_EVENT_COLUMNS.items()
        }

    def convert(self, number: int, raw: Sequence[RawValue]) -> dict[str, SqlValue] | None:
        """Return the values of one event by name, with the run_id of its run, or None if it has no run or type."""
        given = {name: None if place is None else raw[place] for name, place in self._places.items()}
        run_id, event_type = _plain(_text(given["run_id"])), _plain(_text(given["event_type"]))
        if not isinstance(run_id, str) or not isinstance(event_type, str) or not event_type.strip():
            return None
        return {
            "run_id": run_id,
            "event_key": f"legacy-{number}",
            "event_type": event_type[:255],
            "timestamp": _plain(_timestamp(given["timestamp"])),
            "payload": _plain(_payload(given["payload"])),
        }


def _plain(result: _Result) -> SqlValue:
    return result.value if isinstance(result, tuple) else result
