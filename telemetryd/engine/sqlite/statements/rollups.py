"""SQL for statistics: keeps, aggregates, reads, verifies and rebuilds the rollups.

Each group of commands appends one row to `run_stats_log`: what it changed, by hour, agent, job type and status. When
the log stands for `FOLD_AT` changes, they are added to `run_stats` at once: then a cell is read and written once for
many runs, and the many are few steps of SQLite.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, groupby
from operator import add
from typing import Any, Final

import orjson

from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.predicates import conditions
from telemetryd.model import sketches, stats
from telemetryd.model.sketches import bin_of, pack, unpack
from telemetryd.model.stats import DAY, FACTS, ITEMS, Cell, Facts, GetStats, Named, hour_number
from telemetryd.model.values import MAX_INTEGER, Status

FOLD_AT: Final = 10_000
"""How many changes may wait in the log: a query reads them in some 15 ms, and adding them up takes about as long."""

_HOUR: Final = len("2025-12-24T10")
_DATE: Final = len("2025-12-24")
_SPANS: Final = (1, DAY)

Summary = dict[tuple[str, str, str, str], tuple[list[int], dict[int, int]]]
"""The sums of a cell, and the durations in each bin, by hour (2025-12-24T10), agent, job type and status."""
CellKey = tuple[int, int, int, str, str, str]
"""The key of a row of `run_stats`."""

_APPEND: Final = """
    INSERT INTO run_stats_log (total, changes)
    VALUES (coalesce((SELECT total FROM run_stats_log ORDER BY id DESC LIMIT 1), 0) + ?, ?) RETURNING total
"""
_LOG: Final = "'[' || group_concat(changes) || ']' FROM run_stats_log"
_KEY: Final = ("hours", "names", "start", "agent_name", "job_type", "status")
_SUMS: Final = ("runs", *ITEMS, "duration_ms")
_CELL: Final = (*_SUMS, "bins")
_SAME_KEY: Final = " AND ".join(f"s.{name} = json_extract(k.value, '$[{n}]')" for n, name in enumerate(_KEY))

# In one step of SQLite, because Python gives the interpreter's lock away for each (see `transaction.Transaction`).
_READ: Final = f"""
    SELECT json_group_array(json_array(k.key, {", ".join(f"s.{name}" for name in _SUMS)}, hex(s.bins)))
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
_SELECT_DAY: Final = f"""
    SELECT {", ".join(_COLUMNS)} FROM run_stats
    WHERE hours = ? AND names = ? AND start BETWEEN ? AND ? + 23
"""
_SELECT_AT: Final = f"SELECT {', '.join(_COLUMNS)} FROM run_stats WHERE hours = ? AND names = ? AND start = ?"
_SELECT_STRAYS: Final = f"""
    SELECT day + {{most}}, {", ".join(f"s.{name}" for name in _COLUMNS[2:])}
    FROM (SELECT start AS day, agent_name AS agent, job_type AS job, status AS state FROM run_stats WHERE {{chosen}})
    CROSS JOIN json_each('{{strays}}') AS stray CROSS JOIN run_stats AS s ON s.hours = 1 AND s.names = {{names}}
    AND s.start = day + stray.value AND s.agent_name = agent AND s.job_type = job AND s.status = state
"""
"""Those hours of days that belong to the day before or after, by a clock that is ahead of UTC or behind it."""
_SELECT_DAYS: Final = "SELECT DISTINCT start - ((start % 24) + 24) % 24 FROM run_stats"


def summarize(summary: Summary, runs: Iterable[Facts], sign: int = 1) -> None:
    """Count runs in (or with a sign of -1 out of) a summary."""
    running = str(Status.RUNNING)
    for created_at, agent_name, job_type, status, discovered, succeeded, failed, skipped, duration, *_ in runs:
        key = created_at[:_HOUR], agent_name, job_type, status
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
        if duration and status != running:
            sums[5] += sign * duration
            number = bin_of(duration)
            bins[number] = bins.get(number, 0) + sign


def record(cursor: sqlite3.Cursor, summary: Summary, changes: int) -> None:
    """Store what a group of commands changed, and add everything up if that is due."""
    entries = [[*key, _storable(sums), [*bins.items()]] for key, (sums, bins) in summary.items()]
    text = orjson.dumps(entries).decode()[1:-1]  # without brackets, so that many texts are joined to one array
    if cursor.execute(_APPEND, (changes, text)).fetchall()[0][0] >= FOLD_AT:
        fold(cursor)


def _storable(sums: list[int]) -> Sequence[int | str]:
    if min(sums) >= -MAX_INTEGER and max(sums) <= MAX_INTEGER:
        return sums
    return [value if -MAX_INTEGER <= value <= MAX_INTEGER else str(value) for value in sums]


def fold(cursor: sqlite3.Cursor) -> None:
    """Add the log to the statistics."""
    logged = cursor.execute(f"SELECT {_LOG}").fetchone()[0]
    cursor.execute("DELETE FROM run_stats_log")
    cells = _spread(_read_log(logged))
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
    for *key, sums, bins in orjson.loads(text or "[]"):
        kept_sums, kept_bins = summary.setdefault(tuple(key), ([0] * len(_SUMS), {}))
        kept_sums[:] = map(add, kept_sums, map(int, sums))
        for number, count in bins:
            kept_bins[number] = kept_bins.get(number, 0) + count
    return _cells_of(summary)


def _cells_of(summary: Summary) -> Iterator[Named]:
    for (hour, agent_name, job_type, status), (sums, bins) in summary.items():
        yield hour_number(hour), agent_name, job_type, status, [*sums, sketches.of(bins)]


def _spread(cells: Iterable[Named]) -> dict[CellKey, Cell]:
    """Add cells up to each of the rows that count them."""
    finest: dict[CellKey, Cell] = {(1, 3, hour, *names): cell for hour, *names, cell in cells}  # type: ignore[misc]
    days = _add_up(((DAY, 3, hour // DAY * DAY, *names), cell) for (_, _, hour, *names), cell in finest.items())
    spread = {**finest, **days}
    for rows in (finest, days):
        by_agent = _add_up(((hours, 2, n, agent, "", last), c) for (hours, _, n, agent, _, last), c in rows.items())
        by_status = _add_up(((hours, 1, n, "", "", last), c) for (hours, _, n, *_, last), c in by_agent.items())
        spread |= by_agent | by_status
    return spread


def _add_up(cells: Iterable[tuple[Any, Cell]]) -> dict[CellKey, Cell]:
    added: dict[CellKey, Cell] = {}
    for key, cell in cells:
        kept = added.get(key)
        added[key] = cell if kept is None else [*map(add, kept, cell)]
    return added


def _write(cursor: sqlite3.Cursor, cells: dict[CellKey, Cell]) -> None:
    rows = [(*key, *_storable(cell[:-1]), pack(cell[-1])) for key, cell in cells.items()]
    # In the order of the table, of which neighbouring rows share pages. Two sizes of a statement are enough.
    rows.sort(key=lambda row: row[: len(_KEY)])
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
        _write(cursor, _spread(_cells_of(summary)))


def count_wrong(connection: sqlite3.Connection) -> int:
    """Count the rows of the statistics that differ from what the runs add up to; memory holds one day of them."""
    logged: dict[int, list[Named]] = {}
    for named in _read_log(connection.execute(f"SELECT {_LOG}").fetchone()[0]):
        logged.setdefault(named[0] // DAY * DAY, []).append(named)
    unseen = {day for (day,) in connection.execute(_SELECT_DAYS)} | set(logged)
    wrong = 0
    for day, summary in _days(connection):
        unseen.discard(day)
        wrong += _differences(_spread(_cells_of(summary)), _kept(connection, day, logged.get(day, [])))
    return wrong + sum(_differences({}, _kept(connection, day, logged.get(day, []))) for day in unseen)


def _kept(connection: sqlite3.Connection, day: int, logged: list[Named]) -> dict[CellKey, Cell]:
    kept = _spread(logged)
    for hours in _SPANS:
        for names in (1, 2, 3):
            for row in connection.execute(_SELECT_DAY, (hours, names, day, day)):
                key, cell = row[: len(_KEY)], _cell(row[len(_KEY) :])
                kept[key] = [*map(add, kept[key], cell)] if key in kept else cell
    return kept


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
    expected = {key: cell for key, cell in _spread(cells).items() if key[0] == 1}
    return _correct(cursor, expected, _kept_at(cursor, 1, hour_number(hour)))


def correct_day(cursor: sqlite3.Cursor, day: int) -> int:
    """Make what is kept of one day (its first hour since 1970) what its hours add up to; return what was wrong."""
    fold(cursor)
    hours = [
        ((DAY, key[1], day, *key[3:]), cell)
        for hour in range(day, day + DAY)
        for key, cell in _kept_at(cursor, 1, hour).items()
    ]
    return _correct(cursor, _add_up(hours), _kept_at(cursor, DAY, day))


def _kept_at(cursor: sqlite3.Cursor, hours: int, start: int) -> dict[CellKey, Cell]:
    rows = (row for names in (1, 2, 3) for row in cursor.execute(_SELECT_AT, (hours, names, start)))
    return {row[: len(_KEY)]: _cell(row[len(_KEY) :]) for row in rows}


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
    """Yield the cells of the fewest rows that are enough; the log's come with them, from the same snapshot.

    A day of a clock that is ahead of UTC is made of the day of UTC in which most of it lies: the few hours in which
    they differ are taken away from that day, and counted where they belong.
    """
    names = 3 if "job_type" in query.names else 2 if "agent_name" in query.names else 1
    spans = [(1, query.start, query.end)]
    first, last = -(-query.start // DAY) * DAY, query.end // DAY * DAY
    if query.by_days and first < last:
        spans = [(1, query.start, first), (DAY, first, last), (1, last, query.end)]
    found, values = conditions(query.filters)
    most, strays = (0, range(DAY - query.ahead, DAY)) if query.ahead > 0 else (DAY - 1, range(-query.ahead))
    arms = []
    for hours, start, end in spans:
        if start < end:
            chosen = " AND ".join(
                [f"hours = {hours} AND names = {names} AND start >= {start} AND start < {end}", *found]
            )
            place = f"start + {most}" if hours == DAY else "start"
            arms.append(f"SELECT NULL, {place}, {', '.join(_COLUMNS[3:])} FROM run_stats WHERE {chosen}")
            if hours == DAY and strays:
                arms.append(_SELECT_STRAYS.format(most=most, names=names, chosen=chosen, strays=[*strays]))
    nothing = ", NULL" * (len(_COLUMNS[2:]) - 1)
    for counted_at, start, agent_name, job_type, status, *columns in connection.execute(
        f"{' UNION ALL '.join(arms)} UNION ALL SELECT NULL{nothing}, {_LOG}", values
    ):
        if start is not None:
            cell = _cell(tuple(columns))
            yield start, agent_name, job_type, status, cell
            if counted_at is not None:
                yield counted_at, agent_name, job_type, status, [-value for value in cell]
            continue
        for named in _read_log(columns[-1]):
            if query.start <= named[0] < query.end:
                yield named
