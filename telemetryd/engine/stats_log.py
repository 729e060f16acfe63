"""The statistics as plain numbers: sums up what commands change, spreads it over rows, and reads what is logged.

Both engines log what each group of commands changed as one text, by hour, agent, job type, status and commit. When it
is long, they add it up to rows of several spans and levels of names, and to the cells of commits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from operator import add
from typing import Any, Final, TypeVar

import orjson

from telemetryd.model import sketches
from telemetryd.model.sketches import bin_of, unpack
from telemetryd.model.stats import DAY, EVERY, IMPLIED, ITEMS, Cell, Facts, GetStats, Named, hour_number
from telemetryd.model.values import MAX_INTEGER, Status

K = TypeVar("K")

_SUMS: Final = ("runs", *ITEMS, "duration_ms", "seconds")
"""What is logged of some runs; the last sum is of how many seconds after its hour's begin each was created."""
_HOUR: Final = len("2025-12-24T10")
_MINUTE: Final = slice(_HOUR + 1, len("2025-12-24T10:00:00"))
_LONGEST_COMMIT: Final = 64
"""Characters of the longest hash of git (SHA-256). A longer text names no commit: it could not be part of a key."""
Place = tuple[int, str, str, str]
"""Where a row stands among those of its span and level: its first hour since 1970, agent, job type and status."""
SPANS: Final = (1, 6, DAY)
"""How many hours a row stands for."""
AGENT: Final = 1
JOB: Final = 2
LEVELS: Final = range(AGENT + JOB + 1)
"""Which names a row keeps apart, each a bit."""

Summary = dict[tuple[str, str, str, str, str], tuple[list[int], dict[int, int]]]
"""The sums of some runs, and the durations in each bin, by hour (2025-12-24T10), agent, job type, status and commit."""
CellKey = tuple[int, int, int, str, str, str]
"""The key of a row: its span, its level, and its place."""
Rows = dict[Place, Cell]
"""The rows of one span and one level."""


def summarize(summary: Summary, runs: Iterable[Facts], sign: int = 1) -> None:
    """Count runs in (or with a sign of -1 out of) a summary."""
    running = str(Status.RUNNING)
    for created_at, agent_name, job_type, status, discovered, succeeded, failed, skipped, duration, text, *_ in runs:
        commit = text if text and len(text) <= _LONGEST_COMMIT else ""
        key = created_at[:_HOUR], agent_name, job_type, status, commit
        cell = summary.get(key)
        if cell is None:
            cell = summary[key] = [0] * len(_SUMS), {}
        sums, bins = cell
        sums[0] += sign
        if discovered:
            sums[1] += sign * discovered
        if succeeded:
            sums[2] += sign * succeeded
        if failed:
            sums[3] += sign * failed
        if skipped:
            sums[4] += sign * skipped
        sums[6] += sign * _second(created_at[_MINUTE])
        if duration and status != running:
            sums[5] += sign * duration
            number = bin_of(duration)
            bins[number] = bins.get(number, 0) + sign


@lru_cache(maxsize=3600)
def _second(text: str) -> int:
    """Return how many seconds of an hour are over (12:34); what somebody has stored by hand may be no time."""
    minute, _, second = text.partition(":")
    return int(minute) * 60 + int(second) if minute.isdecimal() and second.isdecimal() else 0


def to_log(summary: Summary) -> str:
    """Return a summary as it is logged: the members of a JSON array, so that many texts are joined to one array."""
    entries = [[*names, storable(sums), [*bins.items()], commit] for (*names, commit), (sums, bins) in summary.items()]
    return orjson.dumps(entries).decode()[1:-1]


def storable(sums: list[int]) -> Sequence[int | str]:
    """Return sums in the form in which JSON and SQLite hold them: one beyond 64 bits is a text."""
    if min(sums) >= -MAX_INTEGER and max(sums) <= MAX_INTEGER:
        return sums
    return [value if -MAX_INTEGER <= value <= MAX_INTEGER else str(value) for value in sums]


def read_log(text: str | None) -> Summary:
    """Return what a log holds, a JSON array, added up."""
    summary: Summary = {}
    for hour, agent_name, job_type, status, sums, bins, commit in orjson.loads(text or "[]"):
        _count_in(summary, (hour, agent_name, job_type, status, commit), map(int, sums), bins)
    return summary


def add_to(summary: Summary, other: Summary) -> None:
    """Add to a summary what another one counts."""
    for key, (sums, bins) in other.items():
        _count_in(summary, key, sums, bins.items())


def _count_in(
    summary: dict[K, tuple[list[int], dict[int, int]]], key: K, sums: Iterable[int], bins: Iterable[tuple[int, int]]
) -> None:
    kept = summary.get(key)
    if kept is None:
        summary[key] = [*sums], dict(bins)
        return
    kept_sums, kept_bins = kept
    kept_sums[:] = map(add, kept_sums, sums)
    for number, count in bins:
        kept_bins[number] = kept_bins.get(number, 0) + count


def cells_of(summary: Summary) -> Iterator[Named]:
    """Yield the cells of a summary: one for each hour, agent, job type and status."""
    together: dict[tuple[str, str, str, str], tuple[list[int], dict[int, int]]] = {}
    for (*names, _), (sums, bins) in summary.items():
        hour, agent_name, job_type, status = names
        _count_in(together, (hour, agent_name, job_type, status), sums, bins.items())
    for (hour, agent_name, job_type, status), (sums, bins) in together.items():
        runs, *others, _ = sums
        finished = runs if status != Status.RUNNING else 0
        successes = runs if status == Status.SUCCESS else 0
        cell = [runs, finished, successes, *others, sketches.of(bins)]
        yield hour_number(hour), agent_name, job_type, status, cell


def split(cells: Iterable[Named]) -> Rows:
    """Return the rows of hours, agents and job types that count these cells."""
    named = {(hour, agent, job, status): cell for hour, agent, job, status, cell in cells}
    rows = _add_up(named, lambda hour, agent, job, _: (hour, agent, job, EVERY))
    return rows | {place: cell for place, cell in named.items() if place[-1] != IMPLIED}


def spread(finest: Rows, spans: Sequence[int] = SPANS) -> dict[CellKey, Cell]:
    """Add rows of hours, agents and job types up to each of the rows of these spans."""
    by_agent = _add_up(finest, lambda start, agent, _, status: (start, agent, "", status))
    by_job = _add_up(finest, lambda start, _, job, status: (start, "", job, status))
    by_none = _add_up(by_agent, lambda start, _, __, status: (start, "", "", status))
    found: dict[CellKey, Cell] = {}
    for level, hourly in ((0, by_none), (AGENT, by_agent), (JOB, by_job), (AGENT | JOB, finest)):
        rows = hourly
        for hours in SPANS:
            if hours > 1:
                rows = _add_up(rows, lambda start, *names, span=hours: (start // span * span, *names))
            if hours in spans:
                is_whole = hours in spans_of(level, by_status=True)
                kept = rows if is_whole else {place: cell for place, cell in rows.items() if place[-1] == EVERY}
                found.update(((hours, level, *place), cell) for place, cell in kept.items())
    return found


def spans_of(level: int, *, by_status: bool) -> tuple[int, ...]:
    """Return for which spans there are rows; those of all names are many, so that six hours of them cost too much."""
    return (1, DAY) if by_status and level == AGENT | JOB else SPANS


def level_of(query: GetStats) -> int:
    """Return the level whose rows answer a query."""
    return (AGENT if "agent_name" in query.names else 0) | (JOB if "job_type" in query.names else 0)


def _add_up(rows: Rows, place_of: Callable[[int, str, str, str], Place]) -> Rows:
    added: Rows = {}
    for finer, cell in rows.items():
        place = place_of(*finer)
        kept = added.get(place)
        added[place] = cell if kept is None else [*map(add, kept, cell)]
    return added


def cell_of(columns: Sequence[Any]) -> Cell:
    """Return the cell of a stored row: its sums, and its sketch as it is packed."""
    *sums, bins = columns
    return [*map(int, sums), unpack(bins)]


def from_log(query: GetStats, log: str | None) -> Iterator[Named]:
    """Yield the cells that a log adds to the answer of a query."""
    is_meant = query.filters.lets_through("agent_name", "job_type")
    weights = query.weights
    for start, agent_name, job_type, status, cell in cells_of(read_log(log)):
        if query.start <= start < query.end and is_meant(agent_name, job_type):
            for counted_as in (EVERY, status):
                if counted_as in weights and counted_as != IMPLIED:
                    yield start, agent_name, job_type, counted_as, cell
