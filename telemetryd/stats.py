"""What can be asked of the statistics, how it is read from a query string, and how cells become an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from operator import add, itemgetter
from typing import Any, Final

from telemetryd import queries, sketches
from telemetryd.errors import InvalidRequestError
from telemetryd.runs import MAX_INTEGER, Status, canonical_status, canonical_timestamp, shorten
from telemetryd.settings import parse_duration

NAMES: Final = ("agent_name", "job_type", "status")
"""What runs can be grouped by and filtered by, in the order in which a cell is named."""
ITEMS: Final = ("items_discovered", "items_succeeded", "items_failed", "items_skipped")
PARAMETERS: Final = ("group_by", "bucket", "from", "to", *NAMES)
PERCENTS: Final = (50, 95, 99)
MAX_GROUPS: Final = 10_000
"""How many groups one answer holds at most."""
DAY: Final = 24
"""Hours of the longer of the two spans by which the statistics are kept."""

Cell = list[int]
"""Seven numbers of some runs, all of which add up: runs, the four `ITEMS`, durations (ms), and a sketch of these."""
Named = tuple[int, str, str, str, Cell]
"""A cell with its first hour since 1970, its agent, job type and status."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_HOUR: Final = timedelta(hours=1)
_FIRST_HOUR: Final = (datetime(1, 1, 1, tzinfo=UTC) - _EPOCH) // _HOUR
_LAST_HOUR: Final = (datetime(9999, 12, 31, 23, tzinfo=UTC) - _EPOCH) // _HOUR
_BUCKET: Final = re.compile(r"([1-9]\d{0,4})([hdw])", re.ASCII)
_BUCKET_HOURS: Final = {"h": 1, "d": DAY, "w": 7 * DAY}
_LOST_PLUS: Final = re.compile(r"([Tt ]\d\d[\d:.,]*) (\d\d:?\d\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class GetStats:
    """Statistics of the runs that were created in some hours. Answer: `Named` cells for `answer`."""

    start: int
    """The first hour, counted since 1970."""
    end: int
    """The hour behind the last one."""
    group_by: tuple[str, ...] = ()
    bucket: str | None = None
    hours: int | None = None
    """How many hours a bucket has."""
    chosen: Mapping[str, tuple[str, ...]] | None = None
    """For each name that is filtered the values that are let through; `*` stands for any text."""

    @property
    def names(self) -> frozenset[str]:
        """Which names the cells must keep apart."""
        return frozenset({*self.group_by, *(self.chosen or ())})

    @property
    def by_days(self) -> bool:
        """Whether the cells of whole days tell enough."""
        return self.hours is None or self.hours % DAY == 0

    def lets_through(self) -> Callable[[str, str, str], bool]:
        """Return what tells whether a cell with these names is meant."""
        patterns = [
            (NAMES.index(name), re.compile("|".join(map(_pattern, values)), re.DOTALL))
            for name, values in (self.chosen or {}).items()
        ]

        @cache
        def test(*names: str) -> bool:
            return all(pattern.fullmatch(names[place]) for place, pattern in patterns)

        return test


def _pattern(value: str) -> str:
    return ".*".join(map(re.escape, value.split("*")))


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


def parse(query_string: str, now: datetime) -> GetStats:
    """Read the query string of `GET /api/v1/stats`.

    Raises:
        InvalidRequestError: with a sentence that names the parameter, its value and what is allowed.

    """
    given = queries.parse_parameters(query_string, PARAMETERS)
    start, _ = _hours("from", given.get("from", "-24h"), now)
    _, end = _hours("to", given.get("to", "now"), now)
    if start >= end:
        raise InvalidRequestError(
            f"Invalid from: {shorten(given.get('from', '-24h'))!r}; it must be before to "
            f"({shorten(given.get('to', 'now'))!r})"
        )
    bucket = given.get("bucket")
    return GetStats(
        start,
        end,
        _group_by(given["group_by"]) if "group_by" in given else (),
        bucket,
        None if bucket is None else _bucket(bucket),
        {name: _values(name, given[name]) for name in NAMES if name in given},
    )


def _refuse(name: str, value: str, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid {name}: {shorten(value)!r}; it must be {allowed}")


def _hours(name: str, value: str, now: datetime) -> tuple[int, int]:
    """Return the hour of a moment, and the first one that does not begin before it."""
    try:
        if value == "now":
            moment = now
        elif value.startswith("-"):
            moment = now - timedelta(seconds=parse_duration(value[1:]))
        else:
            moment = datetime.fromisoformat(canonical_timestamp(_LOST_PLUS.sub(r"\1+\2", value)))
    except (ValueError, OverflowError) as error:
        allowed = "an ISO 8601 date and time such as 2025-12-24T10:00:00Z, an age such as -24h or -30d, or now"
        raise _refuse(name, value, allowed) from error
    since = moment - _EPOCH
    return max(since // _HOUR, _FIRST_HOUR), min(-(-since // _HOUR), _LAST_HOUR)


def _group_by(value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if not set(names) <= set(NAMES) or len(set(names)) < len(names):
        raise _refuse("group_by", value, f"some of {', '.join(NAMES)}, each once, separated by commas")
    return names


def _bucket(value: str) -> int:
    match = _BUCKET.fullmatch(value)
    if match is None:
        raise _refuse("bucket", value, "a number of hours, days or weeks such as 1h, 6h, 1d or 2w")
    return int(match[1]) * _BUCKET_HOURS[match[2]]


def _values(name: str, value: str) -> tuple[str, ...]:
    values = value.split(",")
    try:
        if name == "status":
            return tuple(dict.fromkeys(map(canonical_status, values)))
    except ValueError as error:
        raise _refuse(name, value, f"one or more of {', '.join(Status)}, separated by commas") from error
    if not all(0 < len(part) <= 255 and part.strip() and "\0" not in part for part in values):
        raise _refuse(name, value, "names of 1 to 255 characters, separated by commas; * stands for any text")
    return tuple(dict.fromkeys(values))


class _Group:
    """What is added up of one group."""

    __slots__ = ("cell", "finished", "successes")

    def __init__(self) -> None:
        self.cell: Cell = [0] * (len(ITEMS) + 3)
        self.finished = 0
        self.successes = 0


def answer(query: GetStats, cells: Iterable[Named]) -> list[dict[str, Any]]:
    """Add cells up to groups, as they are answered: the earliest bucket first, then by names.

    Raises:
        InvalidRequestError: if they are more than `MAX_GROUPS`.

    """
    groups: dict[tuple[Any, ...], _Group] = {}
    places = [NAMES.index(name) + 1 for name in query.group_by]
    names_of: Callable[[Named], tuple[Any, ...]] = _getter(places)
    hours = query.hours
    is_meant = query.lets_through()
    for named in cells:
        start, agent_name, job_type, status, cell = named
        if query.chosen and not is_meant(agent_name, job_type, status):
            continue
        names = names_of(named)
        key = names if hours is None else (start // hours * hours, *names)
        group = groups.get(key)
        if group is None:
            if len(groups) == MAX_GROUPS:
                raise InvalidRequestError(
                    f"The answer would hold more than {MAX_GROUPS} groups: ask for a longer bucket, a shorter time "
                    "between from and to, fewer names in group_by, or filter by agent_name, job_type or status"
                )
            group = groups[key] = _Group()
        group.cell[:] = map(add, group.cell, cell)
        if status != Status.RUNNING:
            group.finished += cell[0]
        if status == Status.SUCCESS:
            group.successes += cell[0]
    return [_shown(query, key, groups[key]) for key in sorted(groups) if groups[key].cell[0] > 0]


def _getter(places: Sequence[int]) -> Callable[[Named], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    if places:
        only = places[0]
        return lambda named: (named[only],)
    return lambda _: ()


def _shown(query: GetStats, key: tuple[Any, ...], group: _Group) -> dict[str, Any]:
    runs, *items, duration, sketch = group.cell
    named = key if query.hours is None else key[1:]
    shown: dict[str, Any] = dict(zip(query.group_by, named, strict=True))
    if query.hours is not None:
        shown["bucket"] = hour_name(max(key[0], _FIRST_HOUR))
    if group.finished > 0:
        quantiles: Sequence[int | None] = sketches.quantiles(sketch, group.finished, PERCENTS)
    else:
        quantiles = [None] * len(PERCENTS)
    return {
        **shown,
        "runs": runs,
        "success_rate": round(group.successes / group.finished, 6) if group.finished > 0 else None,
        **{name: _number(value) for name, value in zip(ITEMS, items, strict=True)},
        "duration_ms": {
            **{f"p{percent}": value for percent, value in zip(PERCENTS, quantiles, strict=True)},
            "sum": _number(duration),
        },
    }


def _number(value: int) -> int | float:
    """Return a sum as JSON can hold it; one beyond 64 bits as the nearest number with a fraction."""
    return value if value <= MAX_INTEGER else float(value)


def to_json(query: GetStats, groups: list[dict[str, Any]]) -> dict[str, Any]:
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
    chosen = {name: ",".join(values) for name, values in (query.chosen or {}).items()}
    return {
        "group_by": ",".join(query.group_by),
        "bucket": query.bucket,
        "from": hour_name(query.start),
        "to": hour_name(query.end),
        **chosen,
    }
