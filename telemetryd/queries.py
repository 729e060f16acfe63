"""What can be asked, as frozen data without SQL, and how it is read from a query string."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

import orjson

from telemetryd import filters
from telemetryd.filters import Filters, Parameters, read_integer, refuse
from telemetryd.runs import MAX_INTEGER, Row, canonical_timestamp, utc_now

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000
_CURSOR_VERSION: Final = 1
_ANY_CURSOR: Final = "a cursor from the Link header of an earlier answer"

EVENTS: Final = "events"
"""What `include` may ask for besides the run itself."""

PARAMETERS: Final = (*filters.PARAMETERS, "limit", "offset", "cursor", "include")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page ended: the place of its last run in the order of every answer."""

    moment: str
    """Its created_at."""
    id: int


@dataclass(frozen=True, slots=True)
class ListRuns:
    """Runs that match every filter, newest first (created_at, then id, both descending)."""

    filters: Filters = field(default_factory=Filters)
    limit: int = DEFAULT_LIMIT
    offset: int = 0
    after: Position | None = None
    with_events: bool = False
    """Whether the answer shows the runs' events as well."""

    def parameters(self) -> dict[str, str | int]:
        """Return the query as parameters with canonical values, for the log and the next page."""
        page: dict[str, str | int] = {**self.filters.parameters(), "limit": self.limit}
        if self.offset:
            page["offset"] = self.offset
        if self.with_events:
            page["include"] = EVENTS
        return page

    def cursor(self, last: Position) -> str:
        """Return the opaque cursor of the page that follows the one which ended at `last`."""
        packed = orjson.dumps([_CURSOR_VERSION, self._fingerprint(), last.moment, last.id])
        return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()

    def next_page(self, path: str, last: Position) -> str:
        """Return the relative address of the page that follows the one which ended at `last`."""
        page = {**self.parameters(), "cursor": self.cursor(last)}
        page.pop("offset", None)
        return f"{path}?{urlencode(page)}"

    def _fingerprint(self) -> str:
        packed = orjson.dumps(self.filters.parameters(), option=orjson.OPT_SORT_KEYS)
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
            is_whole = version == _CURSOR_VERSION and isinstance(run, int) and 0 <= run <= MAX_INTEGER
        except (ValueError, TypeError, binascii.Error) as error:
            raise refuse("cursor", cursor, _ANY_CURSOR) from error
        if not is_whole:
            raise refuse("cursor", cursor, _ANY_CURSOR)
        if fingerprint != self._fingerprint():
            raise refuse("cursor", cursor, "one that was given for the same filters")
        return position


@dataclass(frozen=True, slots=True)
class Page:
    """The rows of one page (in the order of `runs.COLUMNS`), and where it ended if more follow."""

    rows: list[Row]
    end: Position | None


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


def parse_list(query_string: str, clock: Callable[[], datetime] = utc_now) -> ListRuns:
    """Read the query string of `GET /api/v1/runs`; relative times count from one reading of the clock.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    parameters = Parameters(query_string, PARAMETERS)
    query = ListRuns(
        parameters.read_filters(clock),
        parameters.read("limit", read_integer, 1, MAX_LIMIT, default=DEFAULT_LIMIT),
        parameters.read("offset", read_integer, 0, MAX_INTEGER, default=0),
        with_events=parameters.read("include", _include, default=False),
    )
    cursor = parameters.given.get("cursor")
    if cursor is not None and query.offset:
        parameters.faults.append("Use either cursor or offset, not both: a cursor already says where to go on")
    parameters.finish()
    return query if cursor is None else replace(query, after=query.position(cursor))


def parse_event_list(query_string: str, event_id: str) -> ListEvents:
    """Read the query string of `GET /api/v1/runs/{event_id}/events`.

    Raises:
        InvalidRequestError: with one sentence that names the parameter, the value and what is allowed.

    """
    given = parse_parameters(query_string, ("limit", "offset"))
    return ListEvents(
        (event_id,),
        read_integer("limit", given.get("limit", str(DEFAULT_LIMIT)), 1, MAX_LIMIT),
        read_integer("offset", given.get("offset", "0"), 0, MAX_INTEGER),
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
        raise refuse(name, value, EVENTS)
    return True


def parse_parameters(query_string: str, allowed: tuple[str, ...]) -> dict[str, str]:
    """Split a query string strictly: valid UTF-8, known names, each once.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter and what is allowed.

    """
    parameters = Parameters(query_string, allowed)
    parameters.finish()
    return parameters.given
