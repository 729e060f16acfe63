"""Cursors into the commit sequence, and queries for the changes after one, as frozen data without SQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import Annotated, Any, Final, NotRequired

import orjson
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from telemetryd.errors import CursorGoneError
from telemetryd.model import events, filters
from telemetryd.model.answers import EventOfRun, Number, StoredRun
from telemetryd.model.filters import Filters
from telemetryd.model.parameters import Given, Parameter, integer, refuse
from telemetryd.model.queries import DEFAULT_LIMIT, MAX_LIMIT, Query
from telemetryd.model.values import MAX_INTEGER, Row, shorten, utc_now

MAX_WAIT_S: Final = 60

PAGE_BYTES: Final = 8 * 1024 * 1024
"""About how much of runs, and as much again of events, one answer may hold; the rest comes with the next one."""

LEAST_PAGE_BYTES: Final = 64 * 1024

BEGINNING: Final = -(2**63)
"""After no number: where a client that wants everything begins."""

_CURSOR: Final = re.compile(r"(?:([0-9a-f]{12})-)?([0-9]{1,19})", re.ASCII)
_ANY_CURSOR: Final = f"an integer from 0 to {MAX_INTEGER}, or the id of an event of the stream"


@dataclass(frozen=True, slots=True)
class Cursor:
    """A number of the commit sequence, and the epoch in which it was given; None if that is not known."""

    seq: int
    epoch: str | None = None

    def __str__(self) -> str:
        """Return it as it stands in a request and in an event's id."""
        return str(self.seq) if self.epoch is None else f"{self.epoch}-{self.seq}"


@dataclass(frozen=True, slots=True)
class Known:
    """One of the newest changes that a copy has: the original must hold it, or have changed it since."""

    seq: int
    event_id: str
    id: int | None = None
    """Of the run; None if it was deleted."""
    updated_at: str = ""


@dataclass(frozen=True, slots=True)
class ListChanges(Query["Changes"]):
    """What comes after a number, in the order of the commits: of each run only its newest change. Answer: `Changes`."""

    after: int = BEGINNING
    limit: int = DEFAULT_LIMIT
    filters: tuple[Filters, ...] = ()
    """The answer says which of the runs match each of these."""
    events_after: int | None = None
    """The id after which events are wanted, if any are."""
    most_bytes: int = PAGE_BYTES
    """About how much of runs, and as much again of events, the answer may hold, besides a single one."""
    known: tuple[Known, ...] = ()
    """What a copy has that goes up to `after`."""


Deleted = str
"""The event_id of a run that is gone."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything after a number up to and including `last`."""

    found: list[tuple[int, Row | Deleted]]
    """Numbers with the runs as they are now (in the order of `runs.COLUMNS`), or with what was deleted."""
    last: int
    newest: int
    """The last number that was given."""
    epoch: str
    horizon: int
    """Deletions up to this number are forgotten."""
    matching: tuple[frozenset[int], ...] = ()
    """The ids of the runs that match, for each of the query's filters."""
    events: list[Row] | None = None
    """If events are wanted, those after the id in their order: the run's id, and what is in `events.COLUMNS`.

    They come with the page that has the last change there is, so that a client that gets one knows its run.
    """
    more_events: bool = False
    unknown: Known | None = None
    """What of the query's `known` is not, and never was, in this database."""

    @property
    def more(self) -> bool:
        """Whether there is more after `last`, or after the last event."""
        return self.last < self.newest or self.more_events

    def check(self, after: Cursor, begun: int | None) -> None:
        """Check that a client that read from one cursor, and began at another, has learnt of every deletion.

        Raises:
            CursorGoneError: if not, or if this is not the database that gave the cursor.

        """
        if after.epoch not in (None, self.epoch) or after.seq > self.newest:
            raise CursorGoneError("The database was restored from a backup since; begin again, without after")
        if self.unknown is not None:
            raise CursorGoneError(
                f"Number {self.unknown.seq} was something else here ({shorten(self.unknown.event_id)!r} for you): the "
                "database was put back from an older copy since; begin again, without after"
            )
        if after.seq != BEGINNING and max(after.seq, begun or 0) < self.horizon:
            raise CursorGoneError(
                f"Deletions up to {self.horizon} are forgotten, and after is {after.seq}; begin again, without after"
            )


@dataclass(frozen=True, slots=True)
class GetFollowed(Query["Followed"]):
    """How far this database has come as a copy of another one. Answer: `Followed`."""

    source: str | None = None
    """Of several databases that are followed into this one, the name of the one that is meant."""


@dataclass(frozen=True, slots=True)
class Followed:
    """How far a copy has come."""

    newest: int
    """The last number that stands in the copy."""
    cursor: Cursor | None
    """The cursor up to which it has taken over the other database's changes; None if it has taken nothing."""
    begun: int
    """Where the other sequence stood when it began."""
    last_event: int
    """The highest id of an event in the copy: there is nothing to be had up to it."""
    known: tuple[Known, ...] = ()
    """The newest run, the run that was changed last, and what was deleted last."""


@dataclass(frozen=True, slots=True)
class ChangesRequest:
    """What `GET /api/v1/changes` asks for."""

    after: Cursor
    begun: int | None
    limit: int
    wait_s: int
    events_after: int | None = None
    most_bytes: int = PAGE_BYTES
    known: tuple[Known, ...] = ()

    @property
    def query(self) -> ListChanges:
        """What is to be read."""
        return ListChanges(
            self.after.seq,
            self.limit,
            events_after=self.events_after,
            most_bytes=self.most_bytes,
            known=self.known,
        )


def _read_cursor(name: str, value: str, now: datetime | None = None) -> Cursor:
    match = _CURSOR.fullmatch(value)
    if match is None or int(match[2]) > MAX_INTEGER:
        raise refuse(name, value, _ANY_CURSOR)
    return Cursor(int(match[2]), match[1])


AFTER: Final = Parameter(
    "after",
    "Continue after this number of the commit sequence; with the epoch before it (as in the id of an event) the answer "
    "says if the database is another one since.",
    {"type": "string", "pattern": r"^([0-9a-f]{12}-)?[0-9]{1,18}$"},
    _read_cursor,
)
BEGUN: Final = integer(
    "begun",
    "For clients that began without after: the newest of the first answer. Deletions before it do not matter then.",
)
EVENTS_AFTER: Final = integer(
    "events_after", "Also answer the events of runs whose id is larger, in its order: 0 for all of them."
)
LIMIT: Final = integer("limit", "Changes in one answer.", 1, MAX_LIMIT, DEFAULT_LIMIT)
WAIT: Final = integer("wait", "Seconds to wait for a change if there is none after `after`.", 0, MAX_WAIT_S, 0)
MOST_BYTES: Final = integer(
    "max_bytes",
    "About how many bytes of runs, and as many again of events, one answer may hold, besides a single one; for slow "
    "links.",
    LEAST_PAGE_BYTES,
    PAGE_BYTES,
    PAGE_BYTES,
)


_LONGEST_KNOWN: Final = 512
_Whole = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
_GIVEN: Final = TypeAdapter(Annotated[list[tuple[_Whole, str, _Whole | None, str]], Field(max_length=8)])


def _read_known(name: str, value: str, now: datetime) -> tuple[Known, ...]:
    try:
        given = _GIVEN.validate_json(value)
    except ValidationError as error:
        raise refuse(name, value, "a JSON array of at most 8 times [seq, event_id, id or null, updated_at]") from error
    return tuple(Known(*each) for each in given)


_EACH: Final = r'\[[0-9]{1,18},"[^"\\\x00-\x1f]{1,255}",([0-9]{1,18}|null),"[^"\\\x00-\x1f]{0,27}"\]'


def write_known(known: Sequence[Known]) -> str:
    """Return what a copy has as the parameter `known`."""
    short = [each for each in known if len(each.event_id.encode()) <= _LONGEST_KNOWN]  # so that the address is not long
    return orjson.dumps([astuple(each) for each in short]).decode()


KNOWN: Final = Parameter(
    "known",
    "For copies: some of the newest changes that they have, as a JSON array of [seq, event_id, id or null if it was "
    "deleted, updated_at]. If this database never held one of them, it was put back from an older copy: 410.",
    {"type": "string", "pattern": rf"^\[({_EACH}(,{_EACH}){{0,7}})?\]$"},
    _read_known,
)
LIST: Final[tuple[Parameter[Any], ...]] = (AFTER, BEGUN, EVENTS_AFTER, LIMIT, WAIT, MOST_BYTES, KNOWN)
"""The parameters of `GET /api/v1/changes`."""


def parse_changes(query_string: str, clock: Callable[[], datetime] = utc_now) -> ChangesRequest:
    """Read the query string of `GET /api/v1/changes`.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given = Given(query_string, LIST, clock())
    asked = ChangesRequest(
        given.value(AFTER, Cursor(BEGINNING)),
        given.get(BEGUN),
        given.value(LIMIT, DEFAULT_LIMIT),
        given.value(WAIT, 0),
        given.get(EVENTS_AFTER),
        given.value(MOST_BYTES, PAGE_BYTES),
        given.value(KNOWN, ()),
    )
    given.finish()
    return asked


STREAM: Final[tuple[Parameter[Any], ...]] = (*filters.PARAMETERS, AFTER)
"""The query parameters of `GET /api/v1/runs/stream`."""


def parse_stream(
    query_string: str, last_event_id: str | None, clock: Callable[[], datetime] = utc_now
) -> tuple[Cursor | None, Filters]:
    """Read the query string of `GET /api/v1/runs/stream`; the header of a browser that returns wins over `after`.

    Return the cursor to continue after (None: from now on) and the filters.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given = Given(query_string, STREAM, clock())
    wanted = filters.read_filters(given)
    after = given.get(AFTER)
    given.finish()
    return after if last_event_id is None else _read_cursor("Last-Event-ID", last_event_id), wanted


class RunChanged(TypedDict):
    """A run that was created or changed, as it is now."""

    seq: int
    run: StoredRun


class RunDeleted(TypedDict):
    """A run that is gone."""

    seq: Number
    deleted: str


class ChangesAnswer(TypedDict):
    """The changes after a number of the commit sequence."""

    changes: list[RunChanged | RunDeleted]
    events: NotRequired[Annotated[list[EventOfRun], Field(description="If events_after is given.")]]
    last: Number
    more: bool
    newest: Number
    epoch: str


def answer_with(changes: Changes, found: list[RunChanged | RunDeleted]) -> ChangesAnswer:
    """Return the answer of `GET /api/v1/changes` with these changes in it."""
    rows = changes.events
    answer: ChangesAnswer = {
        "changes": found,
        "last": max(changes.last, 0),
        "more": changes.more,
        "newest": changes.newest,
        "epoch": changes.epoch,
    }
    if rows is not None:
        answer["events"] = [{"run": run, **events.to_json(tuple(row))} for run, *row in rows]
    return answer
