"""Queries, as frozen data without SQL, and how each is parsed from a query string."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar
from urllib.parse import urlencode

import orjson

from telemetryd.model import clocks, filters
from telemetryd.model.clocks import Reading
from telemetryd.model.events import EventPage
from telemetryd.model.filters import Filters
from telemetryd.model.parameters import Given, Parameter, integer, refuse, word
from telemetryd.model.processes import Process
from telemetryd.model.runs import ANSWERED, COLUMNS, needed
from telemetryd.model.values import MAX_INTEGER, Row, canonical_timestamp, utc_now

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000
_CURSOR_VERSION: Final = 1
_ANY_CURSOR: Final = "a cursor from the Link header of an earlier answer"

EVENTS: Final = "events"
"""What `include` may ask for besides the run itself."""

SORTED: Final = ("created_at", "start_time")
"""The fields in whose order runs can be answered: those with an index in that order."""


A = TypeVar("A")


class Query(Generic[A]):
    """A question about what is stored, which is answered by an `A`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Order:
    """The order of the runs in an answer; the id decides between equals, in the same direction."""

    column: str = "created_at"
    """One of `SORTED`."""
    descending: bool = True

    def parameter(self) -> str:
        """Return the order as `sort` has it."""
        return f"-{self.column}" if self.descending else self.column


class Count(StrEnum):
    """How the number of matching runs is reported."""

    EXACT = "exact"
    """Counted, however long it takes, within the deadline of a query."""
    ESTIMATED = "estimated"
    """From the totals where they have the number, else counted up to a bound."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page ended: the position of its last run in the order of the answer."""

    moment: str
    """Its value of the column that the order is by."""
    id: int


@dataclass(frozen=True, slots=True)
class ListRuns(Query["Page"]):
    """Runs that match every filter; newest first by default."""

    filters: Filters = field(default_factory=Filters)
    limit: int = DEFAULT_LIMIT
    offset: int = 0
    after: Position | None = None
    with_events: bool = False
    """Whether the answer shows the runs' events as well."""
    order: Order = Order()
    fields: tuple[str, ...] = ()
    """The fields that are answered; none means all."""
    count: Count | None = None
    """Whether the answer says how many runs match."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are fetched: for the fields that are answered, and the place where the page ends."""
        return needed((*self.answered, "id", self.order.column)) if self.fields else COLUMNS

    @property
    def answered(self) -> tuple[str, ...]:
        """The fields of each run in the page."""
        return self.fields or ANSWERED

    def parameters(self) -> dict[str, str | int]:
        """Return the query as parameters with canonical values, for the log and the next page."""
        page: dict[str, str | int] = {**self.filters.parameters(), "limit": self.limit}
        if self.order != Order():
            page["sort"] = self.order.parameter()
        if self.fields:
            page["fields"] = ",".join(self.fields)
        if self.offset:
            page["offset"] = self.offset
        if self.with_events:
            page["include"] = EVENTS
        if self.count is not None:
            page["count"] = self.count
        return page

    def cursor(self, last: Position) -> str:
        """Return the opaque cursor of the page that follows the one which ended at `last`."""
        packed = orjson.dumps([_CURSOR_VERSION, self._fingerprint(), last.moment, last.id])
        return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()

    def next_page(self, path: str, last: Position) -> str:
        """Return the relative address of the page that follows the one which ended at `last`."""
        page = {**self.parameters(), "cursor": self.cursor(last)}
        page.pop("offset", None)
        page.pop("count", None)  # the first page has reported it
        return f"{path}?{urlencode(page)}"

    def _fingerprint(self) -> str:
        packed = orjson.dumps([self.filters.parameters(), self.order.parameter()], option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(packed, digest_size=6).hexdigest()

    def position(self, cursor: str) -> Position:
        """Read a cursor that an answer to the same filters gave out.

        Raises:
            InvalidRequestError: if it is none, or belongs to other filters.

        """
        try:
            padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
            version, fingerprint, created_at, run = orjson.loads(base64.b64decode(padded, b"-_", validate=True))
            position = Position(canonical_timestamp(created_at), run)
            is_whole = version == _CURSOR_VERSION and isinstance(run, int) and -MAX_INTEGER <= run <= MAX_INTEGER
        except (ValueError, TypeError, binascii.Error) as error:
            raise refuse("cursor", cursor, _ANY_CURSOR) from error
        if not is_whole:
            raise refuse("cursor", cursor, _ANY_CURSOR)
        if fingerprint != self._fingerprint():
            raise refuse("cursor", cursor, "one that was given for the same filters")
        return position


@dataclass(frozen=True, slots=True)
class Page:
    """The runs of one page, each as a JSON object, and where it ended if more follow."""

    runs: list[str]
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

    filters: Filters = field(default_factory=Filters)
    form: Format = Format.NDJSON
    with_events: bool = False

    def parameters(self) -> dict[str, str | int]:
        """Return the query as parameters with canonical values, for the log."""
        events = {"include": EVENTS} if self.with_events else {}
        return {**self.filters.parameters(), "format": str(self.form), **events}


@dataclass(frozen=True, slots=True)
class CountMatching(Query["Total"]):
    """How many runs match. Answer: `Total`."""

    filters: Filters
    count: Count = Count.EXACT


class Accuracy(StrEnum):
    """How far a total can be believed."""

    EXACT = "exact"
    ESTIMATE = "estimate"
    AT_LEAST = "at-least"


@dataclass(frozen=True, slots=True)
class Total:
    """How many runs match, and how sure that is."""

    runs: int
    accuracy: Accuracy = Accuracy.EXACT


@dataclass(frozen=True, slots=True)
class GetOthers(Query[list["Other"]]):
    """Stored runs whose first body was another one, or is not known. Answer: a list of `Other`."""

    digests: tuple[tuple[str, int], ...]
    """The event_ids, each with the digest of the body that it has now (`runs.digest`)."""


@dataclass(frozen=True, slots=True)
class Other:
    """A stored run (in the order of `runs.COLUMNS`), and the digest of its first body, if it is known."""

    row: Row
    digest: int | None


@dataclass(frozen=True, slots=True)
class GetRun(Query[tuple[Row, EventPage] | None]):
    """The one run with an event_id. Answer: its `Row`, and its first events if any are asked for; or None."""

    event_id: str
    events: int = 0
    """How many of them."""


@dataclass(frozen=True, slots=True)
class GetAgents(Query[dict[str, str]]):
    """The agents of some runs. Answer: event_id → agent_name, without those that there are not."""

    event_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ListProcesses(Query[list[Process]]):
    """The processes that are registered with runs and have no certificate yet. Answer: a list of `Process`."""


@dataclass(frozen=True, slots=True)
class CountRuns(Query["Counts"]):
    """The totals that the writer keeps, and how many runs were created lately. Answer: `Counts`."""

    since: str
    until: str


@dataclass(frozen=True, slots=True)
class CountPrunable(Query["Prunable"]):
    """How many runs a `PruneRuns` without ids and limit would delete. Answer: `Prunable`."""

    created_before: str
    agent_name: str | None = None
    job_type: str | None = None
    status: str | None = None


@dataclass(frozen=True, slots=True)
class Prunable:
    """How many runs would be deleted, and when the oldest of them was created."""

    runs: int
    oldest: str | None
    ahead: tuple[str, ...]
    """The event_ids, `MAX_LIMIT` at most, of those whose created_at, ahead of their arrival, does not find them."""


@dataclass(frozen=True, slots=True)
class GetConfirmed(Query["Confirmed"]):
    """What the operator has confirmed, and when the clock was right. Answer: `Confirmed`."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What may be done without a command, as it is stored."""

    prune_after_s: float | None
    """Runs of that age may be deleted; None while no run may be."""
    clock: Reading | None
    """What the clocks said when the wall clock was last known to be right."""
    newest: str | None
    """The newest committed time."""

    def doubt(self, now: Reading) -> str | None:
        """Say why the clock cannot be believed now, or None."""
        return clocks.doubt(now, self.clock, self.newest)


@dataclass(frozen=True, slots=True)
class CountStale(Query[int]):
    """How many runs a `ReapRuns` without limit would cancel. Answer: int."""

    stale_before: str
    agent_name: str | None = None
    job_type: str | None = None


MAX_NAMES: Final = 10_000
"""Names of agents, or of job types, that one answer holds."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Runs per agent, the job types there are, and how many runs were created in the last 24 hours."""

    agents: Mapping[str, int]
    """Those with most runs, these first, and no more than `MAX_NAMES`."""
    job_types: tuple[str, ...]
    """The first ones, and no more than that either."""
    recent: int
    total: int
    """How many runs there are."""
    agent_names: int
    job_type_names: int
    """How many names there are."""
    is_remembered: bool = False
    """Whether they are those of an earlier answer, because nothing has changed since."""


# --- Query strings -------------------------------------------------------------------------------


def _read_order(name: str, value: str, now: datetime) -> Order:
    order = Order(value.removeprefix("-"), descending=value.startswith("-"))
    if order.column not in SORTED:
        raise refuse(name, value, f"one of {', '.join(SORTED)}, with a minus before it for the last ones first")
    return order


def _read_fields(name: str, value: str, now: datetime) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(value.split(",")))
    for field_name in asked:
        if field_name not in ANSWERED:
            raise refuse(name, field_name, "fields of a run with commas between them, such as event_id,status")
    return asked


SORT: Final = Parameter(
    "sort",
    "In which order; a minus means the last ones first.",
    {"type": "string", "enum": [order for column in SORTED for order in (f"-{column}", column)]},
    _read_order,
)
FIELDS: Final = Parameter(
    "fields",
    "Only these fields of each run, with commas between them.",
    {"type": "string", "pattern": "^({0})(,({0}))*$".format("|".join(ANSWERED))},
    _read_fields,
)
COUNT: Final = word(
    "count",
    "Return in X-Total-Count how many runs match, and in X-Total-Count-Accuracy if that is exact, an estimate, "
    "or at-least what was counted.",
    Count,
    " or ".join(Count),
)
LIMIT: Final = integer("limit", "Runs in one answer.", 1, MAX_LIMIT, DEFAULT_LIMIT)
OFFSET: Final = integer("offset", "Runs to skip; following the Link header is surer.", 0, MAX_INTEGER, 0)
CURSOR: Final = Parameter(
    "cursor",
    "Where to go on, from the Link header of an earlier answer.",
    {"type": "string"},
    lambda _, text, now: text,
)
INCLUDE: Final = word("include", "Show each run's first events as well.", (EVENTS,))
LIST: Final[tuple[Parameter[Any], ...]] = (*filters.PARAMETERS, SORT, FIELDS, COUNT, LIMIT, OFFSET, CURSOR, INCLUDE)
"""The parameters of `GET /api/v1/runs`."""


def parse_list(query_string: str, clock: Callable[[], datetime] = utc_now) -> ListRuns:
    """Read the query string of `GET /api/v1/runs`; relative times count from one reading of the clock.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given = Given(query_string, LIST, clock())
    query = ListRuns(
        filters.read_filters(given),
        given.value(LIMIT, DEFAULT_LIMIT),
        given.value(OFFSET, 0),
        with_events=given.get(INCLUDE) is not None,
        order=given.value(SORT, Order()),
        fields=given.value(FIELDS, ()),
        count=given.get(COUNT),
    )
    cursor = given.get(CURSOR)
    if cursor is not None and query.offset:
        given.faults.append("Use either cursor or offset, not both: a cursor already says where to go on")
    given.finish()
    return query if cursor is None else replace(query, after=query.position(cursor))


CHANGES: Final = word(
    "changes",
    "With follow, the sender is going to PATCH the runs that are known already, as telemetryd.client does: no warning "
    "is given where they differ in fields that PATCH changes.",
    ("follow",),
)
CREATE: Final[tuple[Parameter[Any], ...]] = (CHANGES,)
"""The parameters of `POST /api/v1/runs/batch`."""


def changes_follow(given: str | None, clock: Callable[[], datetime] = utc_now) -> bool:
    """Return whether the sender of a batch is going to PATCH its runs; other parameters were never looked at there.

    Raises:
        InvalidRequestError: if the parameter is given and is not `follow`.

    """
    return given is not None and CHANGES.read(CHANGES.name, given, clock()) == "follow"


FORMAT: Final = word("format", "Overrules the Accept header; without either it is ndjson.", Format)
ALL_EVENTS: Final = INCLUDE.described("Show each run's events as well, all of them; only with ndjson.")
EXPORT: Final[tuple[Parameter[Any], ...]] = (*filters.PARAMETERS, FORMAT, ALL_EVENTS)
"""The parameters of `GET /api/v1/runs/export`."""


def parse_export(query_string: str, accept: str, clock: Callable[[], datetime] = utc_now) -> ExportRuns:
    """Read the query string of `GET /api/v1/runs/export`; without a format there, the Accept header chooses it.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given = Given(query_string, EXPORT, clock())
    accepted = next((form for form in Format if MEDIA_TYPES[form] in accept.lower()), Format.NDJSON)
    form = given.value(FORMAT, accepted)
    with_events = given.get(ALL_EVENTS) is not None
    if with_events and form is not Format.NDJSON:
        allowed = f"left out with format={form}: only ndjson has room for events"
        given.faults.append(str(refuse(INCLUDE.name, EVENTS, allowed)))
    query = ExportRuns(filters.read_filters(given), form, with_events=with_events)
    given.finish()
    return query


GET: Final[tuple[Parameter[Any], ...]] = (INCLUDE,)
"""The parameters of `GET /api/v1/runs/{event_id}`."""


def parse_include(query_string: str, clock: Callable[[], datetime] = utc_now) -> bool:
    """Read the query string of `GET /api/v1/runs/{event_id}`; return whether it asks for the events.

    Raises:
        InvalidRequestError: with one sentence that names the parameter, the value and what is allowed.

    """
    given = Given(query_string, GET, clock())
    with_events = given.get(INCLUDE) is not None
    given.finish()
    return with_events


METRICS_FORMAT: Final = word("format", "Overrules the Accept header.", ("json", "prometheus"), "json or prometheus")
METRICS: Final[tuple[Parameter[Any], ...]] = (METRICS_FORMAT,)
"""The parameters of `GET /metrics`."""


def parse_metrics(query_string: str, accepted: str, clock: Callable[[], datetime] = utc_now) -> str:
    """Read the query string of `GET /metrics`; without a format there, it is the one that the client accepts.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given = Given(query_string, METRICS, clock())
    form = given.value(METRICS_FORMAT, accepted)
    given.finish()
    return form
