"""What can be asked, as frozen data without SQL, and how it is read from a query string."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import orjson
from pydantic import TypeAdapter, ValidationError

from telemetryd.errors import InvalidRequestError
from telemetryd.runs import FILTERS, MAX_INTEGER, Name, Row, Status, canonical_status, canonical_timestamp, shorten

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000
_MAX_PARAMETERS: Final = 32
_MAX_TOLD: Final = 5
"""Unknown parameters that an error names."""
_CURSOR_VERSION: Final = 1
_ANY_CURSOR: Final = "a cursor from the Link header of an earlier answer"

TIME_BOUNDS: Final = {
    "created_before": ("created_at", "<"),
    "created_after": ("created_at", ">"),
    "start_time_from": ("start_time", ">="),
    "start_time_to": ("start_time", "<="),
}
"""Each time parameter with the field and the comparison that it stands for."""

EVENTS: Final = "events"
"""What `include` may ask for besides the run itself."""

PARAMETERS: Final = (*FILTERS, *TIME_BOUNDS, "limit", "offset", "cursor", "include")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page ended: the place of its last run in the order of every answer."""

    created_at: str
    id: int


@dataclass(frozen=True, slots=True)
class ListRuns:
    """Runs that match every filter, newest first (created_at, then id, both descending)."""

    equal: Mapping[str, str]
    bounds: Mapping[str, str]
    limit: int = DEFAULT_LIMIT
    offset: int = 0
    after: Position | None = None
    with_events: bool = False
    """Whether the answer shows the runs' events as well."""

    def parameters(self) -> dict[str, str | int]:
        """Return the query as parameters with canonical values, for the log and the next page."""
        page: dict[str, str | int] = {**self.equal, **self.bounds, "limit": self.limit}
        if self.offset:
            page["offset"] = self.offset
        if self.with_events:
            page["include"] = EVENTS
        return page

    def cursor(self, last: Position) -> str:
        """Return the opaque cursor of the page that follows the one which ended at `last`."""
        packed = orjson.dumps([_CURSOR_VERSION, self._fingerprint(), last.created_at, last.id])
        return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()

    def next_page(self, path: str, last: Position) -> str:
        """Return the relative address of the page that follows the one which ended at `last`."""
        page = {**self.parameters(), "cursor": self.cursor(last)}
        page.pop("offset", None)
        return f"{path}?{urlencode(page)}"

    def _fingerprint(self) -> str:
        filters = orjson.dumps([dict(self.equal), dict(self.bounds)], option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(filters, digest_size=6).hexdigest()

    def position(self, cursor: str) -> Position:
        """Read a cursor that an answer to the same filters gave out.

        Raises:
            InvalidRequestError: if it is none, or belongs to other filters.

        """
        try:
            padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
            version, fingerprint, created_at, run = orjson.loads(base64.b64decode(padded, b"-_", validate=True))
            position = Position(canonical_timestamp(created_at), run)
            is_whole = version == _CURSOR_VERSION and isinstance(run, int) and 0 <= run <= MAX_INTEGER
        except (ValueError, TypeError, binascii.Error) as error:
            raise _refuse("cursor", cursor, _ANY_CURSOR) from error
        if not is_whole:
            raise _refuse("cursor", cursor, _ANY_CURSOR)
        if fingerprint != self._fingerprint():
            raise _refuse("cursor", cursor, "one that was given for the same filters")
        return position


@dataclass(frozen=True, slots=True)
class Page:
    """The rows of one page (in the order of `runs.COLUMNS`), and where it ended if more follow."""

    rows: list[Row]
    end: Position | None


class Format(StrEnum):
    """The forms of an export, the usual one first."""

    NDJSON = "ndjson"
    CSV = "csv"
    PARQUET = "parquet"


MEDIA_TYPES: Final = {
    Format.NDJSON: "application/x-ndjson",
    Format.CSV: "text/csv",
    Format.PARQUET: "application/vnd.apache.parquet",
}


SNAPSHOT: Final = "Telemetry-Snapshot"
"""The header that says what an export is: exact, one snapshot; or sliced, each run at some moment of the copying."""


@dataclass(frozen=True, slots=True)
class ExportRuns:
    """All runs that match every filter, in the order of their arrival."""

    equal: Mapping[str, str]
    bounds: Mapping[str, str]
    form: Format = Format.NDJSON
    with_events: bool = False

    def parameters(self) -> dict[str, str]:
        """Return the query as parameters with canonical values, for the log."""
        events = {"include": EVENTS} if self.with_events else {}
        return {**self.equal, **self.bounds, "format": str(self.form), **events}


@dataclass(frozen=True, slots=True)
class GetRun:
    """The one run with an event_id. Answer: its `Row`, or None."""

    event_id: str


@dataclass(frozen=True, slots=True)
class ListEvents:
    """The events of the runs with these event_ids, for each oldest first. Answer: an `EventPage` for each there is.

    `limit` and `offset` count for each run by itself.
    """

    event_ids: tuple[str, ...]
    limit: int = DEFAULT_LIMIT
    offset: int = 0


@dataclass(frozen=True, slots=True)
class ListProcesses:
    """The processes that are registered with runs and have no certificate yet. Answer: a list of `Process`."""


@dataclass(frozen=True, slots=True)
class CountRuns:
    """The totals that the writer keeps. Answer: `Counts`."""


@dataclass(frozen=True, slots=True)
class CountPrunable:
    """How many runs a `PruneRuns` without ids and limit would delete. Answer: int."""

    created_before: str
    agent_name: str | None = None
    status: str | None = None


@dataclass(frozen=True, slots=True)
class CountStale:
    """How many runs a `ReapRuns` without limit would cancel. Answer: int."""

    stale_before: str
    agent_name: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Runs per agent, the job types there are, and how many runs were created in the last 24 hours."""

    agents: Mapping[str, int]
    job_types: tuple[str, ...]
    recent: int

    @property
    def total(self) -> int:
        """How many runs there are."""
        return sum(self.agents.values())


def parse_list(query_string: str) -> ListRuns:
    """Read the query string of `GET /api/v1/runs`.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given, faults = _split(query_string, PARAMETERS)

    def read(name: str, parse: Callable[..., Any], *bounds: int) -> Any:
        try:
            return parse(name, given[name], *bounds)
        except InvalidRequestError as error:
            faults.append(str(error))
            return None

    equal = {name: read(name, _FILTER_PARSERS.get(name, _name)) for name in FILTERS if name in given}
    times = {name: read(name, _timestamp) for name in TIME_BOUNDS if name in given}
    limit = read("limit", _integer, 1, MAX_LIMIT) if "limit" in given else DEFAULT_LIMIT
    offset = read("offset", _integer, 0, MAX_INTEGER) if "offset" in given else 0
    with_events = read("include", _include) if "include" in given else False
    if "cursor" in given and offset:
        faults.append("Use either cursor or offset, not both: a cursor already says where to go on")
    if faults:
        raise InvalidRequestError(". ".join(faults))
    query = ListRuns(equal, times, limit, offset, with_events=with_events)
    if "cursor" not in given:
        return query
    return replace(query, after=query.position(given["cursor"]))


EXPORT_PARAMETERS: Final = (*FILTERS, *TIME_BOUNDS, "format", "include")


def parse_export(query_string: str, accept: str) -> ExportRuns:
    """Read the query string of `GET /api/v1/runs/export`; without a format there, the Accept header chooses it.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given, faults = _split(query_string, EXPORT_PARAMETERS)
    form, wanted = given.pop("format", None), given.pop("include", None)
    if form is None:
        form = next((form for form in Format if MEDIA_TYPES[form] in accept.lower()), Format.NDJSON)
    filters = ListRuns({}, {})
    try:
        if form not in list(Format):
            raise _refuse("format", form, f"one of {', '.join(Format)}")
        if wanted is not None and _include("include", wanted) and form != Format.NDJSON:
            raise _refuse("include", wanted, f"left out with format={form}: only ndjson has room for events")
    except InvalidRequestError as error:
        faults.append(str(error))
    try:
        filters = parse_list(urlencode(given))
    except InvalidRequestError as error:
        faults.append(str(error))
    if faults:
        raise InvalidRequestError(". ".join(faults))
    return ExportRuns(filters.equal, filters.bounds, Format(form), with_events=wanted is not None)


def parse_event_list(query_string: str, event_id: str) -> ListEvents:
    """Read the query string of `GET /api/v1/runs/{event_id}/events`.

    Raises:
        InvalidRequestError: with one sentence that names the parameter, the value and what is allowed.

    """
    given = parse_parameters(query_string, ("limit", "offset"))
    return ListEvents(
        (event_id,),
        _integer("limit", given.get("limit", str(DEFAULT_LIMIT)), 1, MAX_LIMIT),
        _integer("offset", given.get("offset", "0"), 0, MAX_INTEGER),
    )


def parse_include(query_string: str) -> bool:
    """Read the query string of `GET /api/v1/runs/{event_id}`; tell whether it asks for the events.

    Raises:
        InvalidRequestError: with one sentence that names the parameter, the value and what is allowed.

    """
    given = parse_parameters(query_string, ("include",))
    return "include" in given and _include("include", given["include"])


def _include(name: str, value: str) -> bool:
    if value != EVENTS:
        raise _refuse(name, value, EVENTS)
    return True


def parse_parameters(query_string: str, allowed: tuple[str, ...]) -> dict[str, str]:
    """Split a query string strictly: valid UTF-8, known names, each once.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter and what is allowed.

    """
    given, faults = _split(query_string, allowed)
    if faults:
        raise InvalidRequestError(". ".join(faults))
    return given


def _split(query_string: str, allowed: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Return the parameters that are known, and what is wrong with the others."""
    try:
        pairs = parse_qsl(query_string, keep_blank_values=True, errors="strict", max_num_fields=_MAX_PARAMETERS)
    except UnicodeDecodeError as error:
        raise InvalidRequestError("The query string must be percent-encoded UTF-8") from error
    except ValueError as error:
        raise InvalidRequestError(f"The query string must not hold more than {_MAX_PARAMETERS} parameters") from error
    given: dict[str, str] = {}
    unknown: dict[str, None] = {}
    repeated: dict[str, None] = {}
    for name, value in pairs:
        if name not in allowed:
            unknown[repr(shorten(name))] = None
        elif name in given:
            repeated[name] = None
        else:
            given[name] = value
    for name in repeated:
        del given[name]  # which of its values was meant?
    faults = [f"Query parameter {name} is given more than once; give it once" for name in repeated]
    if unknown:
        known = ", ".join(allowed) or "none"
        faults.append(f"Unknown query parameter {', '.join(islice(unknown, _MAX_TOLD))}; known are: {known}")
    return given, faults


def _refuse(name: str, value: str, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid {name}: {shorten(value)!r}; it must be {allowed}")


_NAME: Final = TypeAdapter(Name)


def _name(name: str, value: str) -> str:
    try:
        return _NAME.validate_python(value)
    except ValidationError as error:
        raise _refuse(name, value, "1 to 255 characters, not only blanks, without NUL") from error


def _status(name: str, value: str) -> str:
    try:
        return canonical_status(value)
    except ValueError as error:
        raise _refuse(name, value, f"one of {', '.join(Status)}") from error


_FILTER_PARSERS: Final = {"status": _status}

# A "+" that was not percent-encoded arrives as a blank: "…T10:00:00 00:00" can only mean "+00:00".
_LOST_PLUS: Final = re.compile(r"([Tt ]\d\d[\d:.,]*) (\d\d:?\d\d)", re.ASCII)


def _timestamp(name: str, value: str) -> str:
    try:
        return canonical_timestamp(_LOST_PLUS.sub(r"\1+\2", value))
    except ValueError as error:
        raise _refuse(name, value, "an ISO 8601 date and time such as 2025-12-24T10:00:00Z") from error


def _integer(name: str, value: str, low: int, high: int) -> int:
    if re.fullmatch(r"[0-9]{1,19}", value) is None or not low <= int(value) <= high:
        raise _refuse(name, value, f"an integer from {low} to {high}")
    return int(value)
