"""SQL for statistics: keeps, aggregates, reads, verifies and rebuilds the rollups.

Each group of commands appends one row to `run_stats_log`: what it changed, by hour, agent, job type and status. When
the log stands for `FOLD_AT` changes, they are added to `run_stats` at once: then a cell is read and written once for
many runs, and the many are few steps of SQLite.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, groupby, product
from operator import add
from typing import Any, Final

import orjson

from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.predicates import conditions
from telemetryd.model import sketches, stats
from telemetryd.model.sketches import bin_of, pack, unpack
from telemetryd.model.stats import DAY, EVERY, FACTS, IMPLIED, NAMES, SUMS, Cell, Facts, GetStats, Named, hour_number
from telemetryd.model.values import MAX_INTEGER, Status

FOLD_AT: Final = 10_000
"""How many changes may wait in the log: a query reads them in some 15 ms, and adding them up takes about as long."""

_LOGGED: Final = len(FACTS) - len(NAMES)
_HOUR: Final = len("2025-12-24T10")
_DATE: Final = len("2025-12-24")
_Place = tuple[int, str, str, str]
"""Where a row stands among those of its span and level: its first hour since 1970, agent, job type and status."""
SPANS: Final = (1, 6, DAY)
"""How many hours a row stands for."""
_AGENT: Final = 1
_JOB: Final = 2
LEVELS: Final = range(_AGENT + _JOB + 1)
"""Which names a row keeps apart, each a bit."""

Summary = dict[tuple[str, str, str, str], tuple[list[int], dict[int, int]]]
"""The sums of a cell, and the durations in each bin, by hour (2025-12-24T10), agent, job type and status."""
CellKey = tuple[int, int, int, str, str, str]
"""The key of a row of `run_stats`."""
_Rows = dict[_Place, Cell]
"""The rows of one span and one level."""

LOGGED: Final = "coalesce((SELECT total FROM run_stats_log ORDER BY id DESC LIMIT 1), 0)"
"""How many changes wait in the log."""
_LOG: Final = "'[' || group_concat(changes) || ']' FROM run_stats_log"
_KEY: Final = ("hours", "names", "start", "agent_name", "job_type", "status")
_CELL: Final = (*SUMS, "bins")
_SAME_KEY: Final = " AND ".join(f"s.{name} = json_extract(k.value, '$[{n}]')" for n, name in enumerate(_KEY))

# In one step of SQLite, because Python gives the interpreter's lock away for each (see `transaction.Transaction`).
_READ: Final = f"""
    SELECT json_group_array(json_array(k.key, {", ".join(f"s.{name}" for name in SUMS)}, hex(s.bins)))
    FROM json_each(?) AS k CROSS JOIN run_stats AS s ON {_SAME_KEY}
"""
_DROP: Final = f"""
    DELETE FROM run_stats WHERE ({", ".join(_KEY)}) IN (
        SELECT {", ".join(f"json_extract(value, '$[{n}]')" for n in range(len(_KEY)))} FROM json_each(?)
    )
"""
_ROWS_AT_ONCE: Final = 256
_COLUMNS: Final = (*_KEY, *_CELL)
_PARAMETERS: Final = f"({', '.join('?' * len(_COLUMNS))})"

_SELECT_FACTS: Final = f"""
    SELECT {", ".join(FACTS)} FROM agent_runs INDEXED BY idx_runs_created_desc ORDER BY created_at
"""
_SELECT_ROWS: Final = f"""
    SELECT {", ".join(_COLUMNS)} FROM run_stats WHERE hours = ? AND names = ? AND start >= ? AND start < ?
"""
_SELECT_DAYS: Final = "SELECT DISTINCT start - ((start % 24) + 24) % 24 FROM run_stats"


def summarize(summary: Summary, runs: Iterable[Facts], sign: int = 1) -> None:
    """Count runs in (or with a sign of -1 out of) a summary."""
    running = str(Status.RUNNING)
    for created_at, agent_name, job_type, status, discovered, succeeded, failed, skipped, duration, *_ in runs:
        key = created_at[:_HOUR], agent_name, job_type, status
        cell = summary.get(key)
        if cell is None:
            cell = summary[key] = [0] * _LOGGED, {}
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
        if duration and status != running:
            sums[5] += sign * duration
            number = bin_of(duration)
            bins[number] = bins.get(number, 0) + sign


def entry(summary: Summary) -> str:
    """Return what the log keeps of a group of commands: an array without brackets, so that many become one."""
    entries = [[*key, _storable(sums), [*bins.items()]] for key, (sums, bins) in summary.items()]
    return orjson.dumps(entries).decode()[1:-1]


def _storable(sums: list[int]) -> Sequence[int | str]:
    if min(sums) >= -MAX_INTEGER and max(sums) <= MAX_INTEGER:
        return sums
    return [value if -MAX_INTEGER <= value <= MAX_INTEGER else str(value) for value in sums]


def fold(cursor: sqlite3.Cursor) -> None:
    """Add the log to the statistics."""
    logged = cursor.execute(f"SELECT {_LOG}").fetchone()[0]
    cursor.execute("DELETE FROM run_stats_log")
    cells = _spread(_split(_read_log(logged)))
    keys = [*cells]
    found = cursor.execute(_READ, (orjson.dumps(keys).decode(),)).fetchone()[0]
    for number, *sums, bins in orjson.loads(found):
        key = keys[number]
        cells[key] = [*map(add, cells[key], [*map(int, sums), unpack(bytes.fromhex(bins))])]
    empty = [key for key, cell in cells.items() if cell[0] <= 0]
    if empty:
        cursor.execute(_DROP, (orjson.dumps(empty).decode(),))
        for key in empty:
            del cells[key]
    _write(cursor, cells)


def _read_log(text: str | None) -> Iterator[Named]:
    """Yield what the log holds: one cell for each hour, agent, job type and status."""
    summary: Summary = {}
    for hour, agent_name, job_type, status, sums, bins in orjson.loads(text or "[]"):
        key = hour, agent_name, job_type, status
        kept = summary.get(key)
        if kept is None:
            summary[key] = [*map(int, sums)], dict(bins)
            continue
        kept_sums, kept_bins = kept
        kept_sums[:] = map(add, kept_sums, map(int, sums))
        for number, count in bins:
            kept_bins[number] = kept_bins.get(number, 0) + count
    return _cells_of(summary)


def _cells_of(summary: Summary) -> Iterator[Named]:
    for (hour, agent_name, job_type, status), (sums, bins) in summary.items():
        runs, *others = sums
        finished = runs if status != Status.RUNNING else 0
        successes = runs if status == Status.SUCCESS else 0
        cell = [runs, finished, successes, *others, sketches.of(bins)]
        yield hour_number(hour), agent_name, job_type, status, cell


def _split(cells: Iterable[Named]) -> _Rows:
    """Return the rows of hours, agents and job types that count these cells."""
    named = {(hour, agent, job, status): cell for hour, agent, job, status, cell in cells}
    rows = _add_up(named, lambda hour, agent, job, _: (hour, agent, job, EVERY))
    return rows | {place: cell for place, cell in named.items() if place[-1] != IMPLIED}


def _spread(finest: _Rows, spans: Sequence[int] = SPANS) -> dict[CellKey, Cell]:
    """Add rows of hours, agents and job types up to each of the rows of these spans."""
    by_agent = _add_up(finest, lambda start, agent, _, status: (start, agent, "", status))
    by_job = _add_up(finest, lambda start, _, job, status: (start, "", job, status))
    by_none = _add_up(by_agent, lambda start, _, __, status: (start, "", "", status))
    spread: dict[CellKey, Cell] = {}
    for level, hourly in ((0, by_none), (_AGENT, by_agent), (_JOB, by_job), (_AGENT | _JOB, finest)):
        rows = hourly
        for hours in SPANS:
            if hours > 1:
                rows = _add_up(rows, lambda start, *names, span=hours: (start // span * span, *names))
            if hours in spans:
                is_whole = hours in _spans(level, by_status=True)
                kept = rows if is_whole else {place: cell for place, cell in rows.items() if place[-1] == EVERY}
                spread.update(((hours, level, *place), cell) for place, cell in kept.items())
    return spread


def _spans(level: int, *, by_status: bool) -> tuple[int, ...]:
    """Return for which spans there are rows; those of all names are many, so that six hours of them cost too much."""
    return (1, DAY) if by_status and level == _AGENT | _JOB else SPANS


def _add_up(rows: _Rows, place_of: Callable[[int, str, str, str], _Place]) -> _Rows:
    added: _Rows = {}
    for finer, cell in rows.items():
        place = place_of(*finer)
        kept = added.get(place)
        added[place] = cell if kept is None else [*map(add, kept, cell)]
    return added


def _write(cursor: sqlite3.Cursor, cells: dict[CellKey, Cell]) -> None:
    # In the order of the table, of which neighbouring rows share pages. Two sizes of a statement are enough.
    rows = sorted((*key, *_storable(cell[:-1]), pack(cell[-1])) for key, cell in cells.items())
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        parameters = ", ".join([_PARAMETERS] * len(part))
        cursor.execute(
            f"INSERT OR REPLACE INTO run_stats ({', '.join(_COLUMNS)}) VALUES {parameters}",
            [*chain.from_iterable(part)],
        )


def _days(connection: sqlite3.Connection) -> Iterator[tuple[int, Summary]]:
    """Yield each day (its first hour since 1970) on which runs were created, with what they add up to."""
    for date, runs in groupby(connection.execute(_SELECT_FACTS), key=lambda facts: facts[0][:_DATE]):
        summary: Summary = {}
        summarize(summary, runs)
        yield hour_number(f"{date}T00"), summary


def rebuild(connection: sqlite3.Connection) -> None:
    """Make the statistics anew from the runs, inside the caller's transaction; memory holds one day of them."""
    cursor = connection.cursor()
    cursor.execute("DELETE FROM run_stats")
    cursor.execute("DELETE FROM run_stats_log")
    for _, summary in _days(connection):
        _write(cursor, _spread(_split(_cells_of(summary))))


def count_wrong(connection: sqlite3.Connection) -> int:
    """Count the rows of the statistics that differ from what the runs add up to; memory holds one day of them."""
    logged: dict[int, list[Named]] = {}
    for named in _read_log(connection.execute(f"SELECT {_LOG}").fetchone()[0]):
        logged.setdefault(named[0] // DAY * DAY, []).append(named)
    unseen = {day for (day,) in connection.execute(_SELECT_DAYS)} | set(logged)
    wrong = 0
    for day, summary in _days(connection):
        unseen.discard(day)
        wrong += _differences(_spread(_split(_cells_of(summary))), _kept(connection, day, logged.get(day, [])))
    return wrong + sum(_differences({}, _kept(connection, day, logged.get(day, []))) for day in unseen)


def _kept(connection: sqlite3.Connection, day: int, logged: list[Named]) -> dict[CellKey, Cell]:
    kept = _spread(_split(logged))
    for key, cell in _stored(connection.cursor(), day, DAY):
        kept[key] = [*map(add, kept[key], cell)] if key in kept else cell
    return kept


def _stored(
    cursor: sqlite3.Cursor, start: int, hours: int, spans: Sequence[int] = SPANS, levels: Sequence[int] = LEVELS
) -> Iterator[tuple[CellKey, Cell]]:
    """Yield the rows that begin in so many hours from a start on."""
    for span, level in product(spans, levels):
        for row in cursor.execute(_SELECT_ROWS, (span, level, start, start + hours)):
            yield row[: len(_KEY)], _cell(row[len(_KEY) :])


def _cell(columns: tuple[Any, ...]) -> Cell:
    *sums, bins = columns
    return [*map(int, sums), unpack(bins)]


def _differences(expected: dict[CellKey, Cell], kept: dict[CellKey, Cell]) -> int:
    nothing = [0] * len(_CELL)
    return sum(expected.get(key, nothing) != kept.get(key, nothing) for key in {*expected, *kept})


def correct_hour(cursor: sqlite3.Cursor, hour: str, summary: Summary) -> int:
    """Make what is kept of one hour (2025-12-24T10) what its runs add up to; return how many rows were wrong."""
    fold(cursor)
    cells = (named for named in _cells_of(summary) if named[-1][0] > 0)
    return _correct(cursor, _spread(_split(cells), (1,)), dict(_stored(cursor, hour_number(hour), 1, (1,))))


def correct_day(cursor: sqlite3.Cursor, day: int) -> int:
    """Make what is kept of one day (its first hour since 1970) what its hours add up to; return what was wrong."""
    fold(cursor)
    hours = {key[2:]: cell for key, cell in _stored(cursor, day, DAY, (1,), (_AGENT | _JOB,))}
    longer = SPANS[1:]
    return _correct(cursor, _spread(hours, longer), dict(_stored(cursor, day, DAY, longer)))


def _correct(cursor: sqlite3.Cursor, expected: dict[CellKey, Cell], kept: dict[CellKey, Cell]) -> int:
    wrong = {key: cell for key, cell in expected.items() if kept.get(key) != cell}
    surplus = [*(kept.keys() - expected.keys())]
    if surplus:
        cursor.execute(_DROP, (orjson.dumps(surplus).decode(),))
    _write(cursor, wrong)
    return len(wrong) + len(surplus)


@answers(GetStats)
def fetch_stats(connection: sqlite3.Connection, query: GetStats) -> list[stats.StatsGroup]:
    """Fetch the groups of an answer.

    Raises:
        InvalidRequestError: if they are too many.

    """
    # Closed also when the answer is refused: an error holds on to what it has seen, and so to a snapshot.
    with closing(_fetch_cells(connection, query)) as cells:
        return stats.answer(query, cells)


def _fetch_cells(connection: sqlite3.Connection, query: GetStats) -> Generator[Named, None, None]:
    """Yield the cells of the fewest rows that are enough; the log's come with them, from the same snapshot."""
    level = (_AGENT if "agent_name" in query.names else 0) | (_JOB if "job_type" in query.names else 0)
    weights = query.weights
    found, values = conditions(query.filters, but=("status",))
    statuses = ", ".join(f"'{status}'" for status in weights)
    found.append(f"status IN ({statuses})")
    spans = _spans(level, by_status=[*weights] != [EVERY])
    arms = []
    for hours, longer in zip(spans, (*spans[1:], None), strict=True):
        chosen = [f"hours = {hours} AND names = {level} AND start IN ({_starts(query, hours, longer)})", *found]
        arms.append(f"SELECT {', '.join(_COLUMNS[2:])} FROM run_stats WHERE {' AND '.join(chosen)}")
    log = f"SELECT NULL{', NULL' * (len(_COLUMNS[2:]) - 2)}, {_LOG}"
    is_meant = query.filters.lets_through("agent_name", "job_type")
    for row in connection.execute(" UNION ALL ".join([*arms, log]), values):
        if row[0] is not None:
            yield *row[:4], _cell(row[4:])
            continue
        for start, agent_name, job_type, status, cell in _read_log(row[-1]):
            if query.start <= start < query.end and is_meant(agent_name, job_type):
                for counted_as in (EVERY, status):
                    if counted_as in weights and counted_as != IMPLIED:
                        yield start, agent_name, job_type, counted_as, cell


def _starts(query: GetStats, hours: int, longer: int | None) -> str:
    """Return the SELECT of where rows of so many hours begin that fit, while the longer ones around them do not."""
    chosen = [f"hours = {hours} AND names = 0", _fits(query, "start", hours)]
    if longer is not None:
        chosen.append(f"NOT ({_fits(query, f'(start - (start % {longer} + {longer}) % {longer})', longer)})")
    return f"SELECT start FROM run_stats WHERE {' AND '.join(chosen)}"


def _fits(query: GetStats, start: str, hours: int) -> str:
    """Return the condition that a row lies within the time that is asked for, and within one bucket."""
    within = f"{start} >= {query.start} AND {start} <= {query.end - hours}"
    if query.hours is None:
        return within
    place = f"(({start} + {query.ahead}) % {query.hours} + {query.hours}) % {query.hours}"
    return f"{within} AND {place} <= {query.hours - hours}"
