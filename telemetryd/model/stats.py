"""Queries of statistics: how they are parsed from a query string, and how cells become an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from operator import add, itemgetter, sub
from typing import Annotated, Any, Final, NotRequired, cast

from pydantic import Field
from typing_extensions import TypeAliasType, TypedDict

from telemetryd.errors import InvalidRequestError
from telemetryd.model import sketches
from telemetryd.model.answers import Moment, Number, Share, Sum
from telemetryd.model.filters import FILTER_PARAMETERS, WILDCARD, Filters, read_filters
from telemetryd.model.intervals import CERTAINTY, wilson
from telemetryd.model.parameters import Given, Parameter, read_moment, refuse
from telemetryd.model.queries import Query
from telemetryd.model.values import MAX_INTEGER, Status, StatusValue, shorten

NAMES: Final = ("agent_name", "job_type", "status")
"""What runs can be grouped by and filtered by, in the order in which a cell is named."""
ITEMS: Final = ("items_discovered", "items_succeeded", "items_failed", "items_skipped")
SUMS: Final = ("runs", "finished", "successes", *ITEMS, "duration_ms")
"""What is counted and added up of runs."""
FACTS: Final = ("created_at", *NAMES, *ITEMS, "duration_ms", "git_commit_hash")
"""What the statistics need to know of a run."""
EVERY: Final = ""
"""The status of a cell that counts runs of every status."""
IMPLIED: Final = Status.SUCCESS
"""The status that no cell has: its runs are those of `EVERY` that no other cell has. So most runs are counted once."""
PERCENTS: Final = (50, 95, 99)
MAX_GROUPS: Final = 10_000
"""How many groups one answer holds at most."""
DAY: Final = 24
"""Hours of the longer of the two spans by which the statistics are kept."""

Cell = list[int]
"""Numbers of some runs, all of which add up: the `SUMS` and a sketch of the durations."""
Named = tuple[int, str, str, str, Cell]
"""A cell with its first hour since 1970, its agent, job type and status."""
Facts = tuple[Any, ...]
"""The values of `FACTS`."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_HOUR: Final = timedelta(hours=1)
_FIRST_HOUR: Final = (datetime(1, 1, 1, tzinfo=UTC) - _EPOCH) // _HOUR
_LAST_HOUR: Final = (datetime(9999, 12, 31, 23, tzinfo=UTC) - _EPOCH) // _HOUR
_BUCKET: Final = re.compile(r"([1-9]\d{0,4})([hdw])", re.ASCII)
_OFFSET: Final = re.compile(r"([+ -])(\d\d):00", re.ASCII)  # a plus that was not percent-encoded is a blank
_MOST_AHEAD: Final = 14
_BUCKET_HOURS: Final = {"h": 1, "d": DAY, "w": 7 * DAY}


@dataclass(frozen=True, slots=True)
class GetStats(Query[list["StatsGroup"]]):
    """Statistics of the runs that were created in some hours. Answer: `Named` cells for `answer`."""

    start: int
    """The first hour, counted since 1970."""
    end: int
    """The hour after the last one."""
    group_by: tuple[str, ...] = ()
    bucket: str | None = None
    hours: int | None = None
    """How many hours a bucket has."""
    ahead: int = 0
    """How many hours the clock by which buckets begin is ahead of UTC."""
    filters: Filters = field(default_factory=Filters)
    """Which runs are meant, by `NAMES` only."""

    @property
    def names(self) -> frozenset[str]:
        """Which names the cells must keep apart."""
        by_pattern = {WILDCARD} if self.filters.patterns else set()
        return frozenset({*self.group_by, *self.filters.equal, *by_pattern})

    @property
    def weights(self) -> dict[str, int]:
        """Of which statuses cells are needed: 1 counts them in their group, -1 takes them from that of `EVERY`."""
        asked = self.filters.equal.get("status") or tuple(Status)
        implied, apart = IMPLIED in asked, "status" in self.group_by
        weights = {EVERY: int(implied)}
        for status in Status:
            if status != IMPLIED:
                weights[status] = int(not implied or apart) if status in asked else -int(implied)
        return {status: weight for status, weight in weights.items() if weight}

    @property
    def is_rate_open(self) -> bool:
        """Whether the success rate can be anything: where runs are chosen by their outcome, it is 0 or 1 in advance."""
        outcomes = {*(self.filters.equal.get("status") or Status)} - {Status.RUNNING}
        return "status" not in self.group_by and {Status.SUCCESS} < outcomes


@lru_cache(maxsize=10_000)
def hour_name(hour: int) -> str:
    """Return an hour since 1970 as an ISO 8601 date and time."""
    return (_EPOCH + hour * _HOUR).replace(tzinfo=None).isoformat() + "Z"


@lru_cache(maxsize=10_000)
def hour_number(text: str) -> int:
    """Return the hour since 1970 of a stored time, of which the first 13 characters count (2025-12-24T10).

    What somebody has stored by hand and is no such text counts as 1970.
    """
    try:
        return (datetime.fromisoformat(f"{text[:13]}:00:00+00:00") - _EPOCH) // _HOUR
    except ValueError:
        return 0


def _hour(name: str, value: str, now: datetime) -> int:
    """Return the hour that a moment is in."""
    return max((datetime.fromisoformat(read_moment(name, value, now)) - _EPOCH) // _HOUR, _FIRST_HOUR)


def _next_hour(name: str, value: str, now: datetime) -> int:
    """Return the first hour that does not begin before a moment."""
    return min(-((_EPOCH - datetime.fromisoformat(read_moment(name, value, now))) // _HOUR), _LAST_HOUR)


def _group_by(name: str, value: str, now: datetime) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if not set(names) <= set(NAMES) or len(set(names)) < len(names):
        raise refuse(name, value, f"some of {', '.join(NAMES)}, each once, separated by commas")
    return names


def _offset(name: str, value: str, now: datetime) -> int:
    match = _OFFSET.fullmatch(value)
    if match is None or int(match[2]) > _MOST_AHEAD:
        raise refuse(name, value, f"whole hours from -{_MOST_AHEAD}:00 to +{_MOST_AHEAD}:00 such as +01:00")
    return -int(match[2]) if match[1] == "-" else int(match[2])


def _bucket(name: str, value: str, now: datetime) -> int:
    match = _BUCKET.fullmatch(value)
    if match is None:
        raise refuse(name, value, "a number of hours, days or weeks such as 1h, 6h, 1d or 2w")
    return int(match[1]) * _BUCKET_HOURS[match[2]]


_ANY_MOMENT: Final = "An ISO 8601 date and time, an age such as -24h or -30d, or now."
FROM: Final = Parameter(
    "from", f"{_ANY_MOMENT} Rounded down to the hour.", {"type": "string", "default": "-24h"}, _hour, "-24h"
)
TO: Final = Parameter(
    "to",
    f"{_ANY_MOMENT} Rounded up to the hour; not included.",
    {"type": "string", "default": "now"},
    _next_hour,
    "now",
)
GROUP_BY: Final = Parameter(
    "group_by",
    f"Some of {', '.join(NAMES)}, separated by commas; without it there is one group.",
    {"type": "string", "pattern": "^({0})(,({0}))*$".format("|".join(NAMES))},
    _group_by,
)
BUCKET: Final = Parameter(
    "bucket",
    "Groups by time as well: a number of hours, days or weeks. Buckets are counted from 1970-01-01T00:00:00Z.",
    {"type": "string", "pattern": "^[1-9][0-9]{0,4}[hdw]$"},
    _bucket,
)
UTC_OFFSET: Final = Parameter(
    "utc_offset",
    "Buckets of days and weeks begin at midnight of a clock that is so far ahead of UTC, in whole hours.",
    {"type": "string", "pattern": r"^[+-][0-9]{2}:00$", "default": "+00:00"},
    _offset,
    "+00:00",
)
PARAMETERS: Final[tuple[Parameter[Any], ...]] = (
    GROUP_BY,
    BUCKET,
    UTC_OFFSET,
    FROM,
    TO,
    *(FILTER_PARAMETERS[name] for name in NAMES),
)
"""The parameters of `GET /api/v1/stats`."""


def parse(query_string: str, now: datetime) -> GetStats:
    """Read the query string of `GET /api/v1/stats`.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given = Given(query_string, PARAMETERS, now)
    query = GetStats(
        given.value(FROM, _FIRST_HOUR),
        given.value(TO, _LAST_HOUR),
        given.value(GROUP_BY, ()),
        given.texts.get(BUCKET.name),
        given.get(BUCKET),
        given.value(UTC_OFFSET, 0),
        read_filters(given),
    )
    given.finish()
    if query.start >= query.end:
        begin, end = (given.texts.get(each.name, each.default) for each in (FROM, TO))
        raise refuse(FROM.name, str(begin), f"before to ({shorten(str(end))!r})")
    return query


def answer(query: GetStats, cells: Iterable[Named]) -> list[StatsGroup]:
    """Add cells up to groups, as they are answered: the earliest bucket first, then by names.

    Raises:
        InvalidRequestError: if they are more than `MAX_GROUPS`.

    """
    groups: dict[tuple[Any, ...], Cell] = {}
    names_of = _getter([NAMES.index(name) + 1 for name in query.group_by])
    hours, ahead = query.hours, query.ahead
    for named in _weighed(query.weights, cells):
        key = names_of(named)
        if hours is not None:
            key = (named[0] + ahead) // hours * hours - ahead, *key
        cell = groups.get(key)
        if cell is not None:
            groups[key] = [*map(add, cell, named[4])]
        elif len(groups) < 2 * MAX_GROUPS:  # those of `EVERY` may turn out to be empty
            groups[key] = named[4]
        else:
            raise _too_many()
    if "status" in query.group_by:
        groups = _imply(groups, (hours is not None) + query.group_by.index("status"))
    found = [key for key in sorted(groups) if groups[key][0] > 0]
    if len(found) > MAX_GROUPS:
        raise _too_many()
    return [_shown(query, key, groups[key]) for key in found]


def _imply(groups: dict[tuple[Any, ...], Cell], place: int) -> dict[tuple[Any, ...], Cell]:
    """Make those groups whose key says `EVERY` in this place the groups of the status that is left."""
    implied = {(*key[:place], IMPLIED, *key[place + 1 :]): cell for key, cell in groups.items() if key[place] == EVERY}
    others = {key: cell for key, cell in groups.items() if key[place] != EVERY}
    for key, cell in others.items():
        left = *key[:place], IMPLIED, *key[place + 1 :]
        if left in implied:
            implied[left] = [*map(sub, implied[left], cell)]
    return implied | others


def _weighed(weights: Mapping[str, int], cells: Iterable[Named]) -> Iterator[Named]:
    for named in cells:
        yield named if weights[named[3]] > 0 else (*named[:3], EVERY, [-value for value in named[4]])


def _too_many() -> InvalidRequestError:
    return InvalidRequestError(
        f"The answer would hold more than {MAX_GROUPS} groups: ask for a longer bucket, a shorter time "
        "between from and to, fewer names in group_by, or filter by agent_name, job_type or status"
    )


def _getter(places: Sequence[int]) -> Callable[[Named], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    if places:
        only = places[0]
        return lambda named: (named[only],)
    return lambda _: ()


def _shown(query: GetStats, key: tuple[Any, ...], cell: Cell) -> StatsGroup:
    runs, finished, successes, *items, duration, sketch = cell
    named = key if query.hours is None else key[1:]
    shown: dict[str, Any] = dict(zip(query.group_by, named, strict=True))
    if query.hours is not None:
        shown["bucket"] = hour_name(max(key[0], _FIRST_HOUR))
    if finished > 0:
        quantiles: Sequence[int | None] = sketches.quantiles(sketch, finished, PERCENTS)
    else:
        quantiles = [None] * len(PERCENTS)
    interval: Bounds | None = None
    if finished > 0 and query.is_rate_open:
        # Where somebody has changed runs by hand, there may be more or fewer successes than there can be.
        low, high = wilson(min(max(successes, 0), finished) / finished, finished)
        interval = {"low": round(low, 6), "high": round(high, 6)}
    answered: dict[str, Any] = {
        **shown,
        "runs": runs,
        "finished": max(finished, 0),
        "success_rate": round(successes / finished, 6) if finished > 0 else None,
        "success_rate_interval": interval,
        **{name: _number(value) for name, value in zip(ITEMS, items, strict=True)},
        "duration_ms": {
            **{f"p{percent}": value for percent, value in zip(PERCENTS, quantiles, strict=True)},
            "sum": _number(duration),
        },
    }
    return cast(StatsGroup, answered)  # whose fields are those of NAMES, ITEMS and PERCENTS


def _number(value: int) -> int | float:
    """Return a sum as JSON can hold it; one beyond 64 bits as the nearest number with a fraction."""
    return value if value <= MAX_INTEGER else float(value)


_QUANTILE: Final = f"Within {sketches.ERROR:.0%} of the exact one, in whole ms; null if no run is finished."
Quantile = Annotated[Number | None, Field(description=_QUANTILE)]
_INTERVAL: Final = (
    f"Wilson's interval of the success rate at {CERTAINTY:.0%} confidence. null if no run is finished, and where runs "
    "are chosen by status so that the rate is 0 or 1 in any case."
)


class Bounds(TypedDict):
    """Between which bounds a share lies."""

    low: Share
    high: Share


class Durations(TypedDict):
    """How long runs took."""

    p50: Quantile
    p95: Quantile
    p99: Quantile
    sum: Sum


class StatsGroup(TypedDict):
    """The figures of one group of runs."""

    agent_name: NotRequired[str]
    job_type: NotRequired[str]
    status: NotRequired[StatusValue]
    bucket: NotRequired[Moment]
    runs: Number
    finished: Annotated[Number, Field(description="Those of the runs that are over.")]
    success_rate: Annotated[Share | None, Field(description="Successes among the finished runs; null if none is.")]
    success_rate_interval: Annotated[Bounds | None, Field(description=_INTERVAL)]
    items_discovered: Sum
    items_succeeded: Sum
    items_failed: Sum
    items_skipped: Sum
    duration_ms: Durations


GroupName = TypeAliasType(
    "GroupName", Annotated[str, Field(json_schema_extra={"enum": list(NAMES)}, description="What runs are grouped by.")]
)
Stats = TypedDict(
    "Stats",
    {
        "from": Moment,
        "to": Moment,
        "bucket": str | None,
        "group_by": list[GroupName],
        "groups": list[StatsGroup],
    },
)


def to_json(query: GetStats, groups: list[StatsGroup]) -> Stats:
    """Return the whole answer."""
    return {
        "from": hour_name(query.start),
        "to": hour_name(query.end),
        "bucket": query.bucket,
        "group_by": list(query.group_by),
        "groups": groups,
    }


def parameters(query: GetStats) -> dict[str, Any]:
    """Return the query as parameters, for the log."""
    return {
        "group_by": ",".join(query.group_by),
        "bucket": query.bucket,
        "utc_offset": query.ahead,
        "from": hour_name(query.start),
        "to": hour_name(query.end),
        **query.filters.parameters(),
    }
