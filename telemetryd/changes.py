"""A place in the one commit sequence, what can be asked of what lies behind it, and how both are read from a request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from telemetryd import queries
from telemetryd.errors import CursorGoneError, InvalidRequestError
from telemetryd.runs import COLUMNS, FILTERS, MAX_INTEGER, Row, shorten

MAX_WAIT_S: Final = 60
PAGE_PARAMETERS: Final = ("after", "begun", "limit", "wait")
STREAM_PARAMETERS: Final = (*FILTERS, "after")

BEGINNING: Final = -(2**63)
"""Behind no number: where whoever wants everything begins."""

_PLACE: Final = re.compile(r"(?:([0-9a-f]{12})-)?([0-9]{1,19})", re.ASCII)
_ANY_PLACE: Final = f"an integer from 0 to {MAX_INTEGER}, or the id of an event of the stream"


@dataclass(frozen=True, slots=True)
class Place:
    """A number of the sequence, and the epoch in which it was given; None if that is not known."""

    seq: int
    epoch: str | None = None

    def __str__(self) -> str:
        """Return it as it stands in a request and in an event's id."""
        return str(self.seq) if self.epoch is None else f"{self.epoch}-{self.seq}"


@dataclass(frozen=True, slots=True)
class ListChanges:
    """What lies behind a number, in the order of the commits: of each run only its newest change. Answer: `Changes`."""

    after: int = BEGINNING
    limit: int = queries.DEFAULT_LIMIT


Deleted = str
"""The event_id of a run that is gone."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything behind a number up to and including `last`."""

    found: list[tuple[int, Row | Deleted]]
    """Numbers with the runs as they are now (in the order of `runs.COLUMNS`), or with what was deleted."""
    last: int
    newest: int
    """The last number that was given."""
    epoch: str
    horizon: int
    """Deletions up to this number are forgotten."""

    @property
    def more(self) -> bool:
        """Whether there is more behind `last`."""
        return self.last < self.newest

    def check(self, after: Place, begun: int | None) -> None:
        """See that whoever asked from a place, and began at another one, has learnt of every deletion.

        Raises:
            CursorGoneError: if not, or if this is not the database that gave the place.

        """
        if after.epoch not in (None, self.epoch) or after.seq > self.newest:
            raise CursorGoneError("The database was restored from a backup since; begin again, without after")
        if after.seq != BEGINNING and max(after.seq, begun or 0) < self.horizon:
            raise CursorGoneError(
                f"Deletions up to {self.horizon} are forgotten, and after is {after.seq}; begin again, without after"
            )


Filters = frozenset[tuple[str, str]]
"""Names of fields with the values that they must have."""


def matches(row: Row, filters: Filters) -> bool:
    """Tell whether a run (in the order of `runs.COLUMNS`) passes every filter."""
    return all(row[COLUMNS.index(name)] == value for name, value in filters)


@dataclass(frozen=True, slots=True)
class ChangesRequest:
    """What `GET /api/v1/changes` asks for."""

    after: Place
    begun: int | None
    limit: int
    wait_s: int


def parse_changes(query_string: str) -> ChangesRequest:
    """Read the query string of `GET /api/v1/changes`.

    Raises:
        InvalidRequestError: with one sentence that names the parameter, the value and what is allowed.

    """
    given = queries.parse_parameters(query_string, PAGE_PARAMETERS)
    return ChangesRequest(
        _place("after", given["after"]) if "after" in given else Place(BEGINNING),
        _integer(given, "begun", 0, MAX_INTEGER) if "begun" in given else None,
        _integer(given, "limit", 1, queries.MAX_LIMIT) if "limit" in given else queries.DEFAULT_LIMIT,
        _integer(given, "wait", 0, MAX_WAIT_S) if "wait" in given else 0,
    )


def parse_stream(query_string: str, last_event_id: str | None) -> tuple[Place | None, Filters]:
    """Read the query string of `GET /api/v1/runs/stream`; the header of a browser that returns wins over `after`.

    Return where to go on, None for from now on, and the filters.

    Raises:
        InvalidRequestError: with a sentence that names the parameter or the header, the value and what is allowed.

    """
    given = queries.parse_parameters(query_string, STREAM_PARAMETERS)
    place = _place("after", given["after"]) if "after" in given else None
    if last_event_id is not None:
        place = _place("Last-Event-ID", last_event_id)
    return place, _filters({name: value for name, value in given.items() if name in FILTERS})


def _filters(given: Mapping[str, str]) -> Filters:
    return frozenset(queries.parse_list(urlencode(given)).equal.items())


def _place(name: str, value: str) -> Place:
    match = _PLACE.fullmatch(value)
    if match is None or int(match[2]) > MAX_INTEGER:
        raise InvalidRequestError(f"Invalid {name}: {shorten(value)!r}; it must be {_ANY_PLACE}")
    return Place(int(match[2]), match[1])


def _integer(given: Mapping[str, str], name: str, low: int, high: int) -> int:
    value = given[name]
    if re.fullmatch(r"[0-9]{1,19}", value) is None or not low <= int(value) <= high:
        raise InvalidRequestError(f"Invalid {name}: {shorten(value)!r}; it must be an integer from {low} to {high}")
    return int(value)


def put_beside(changes: Changes, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the answer of `GET /api/v1/changes` around its changes."""
    return {
        "changes": found,
        "last": max(changes.last, 0),
        "more": changes.more,
        "newest": changes.newest,
        "epoch": changes.epoch,
    }
