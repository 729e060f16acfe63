"""SQL for statistics: stores, reads, verifies and rebuilds the rollups.

Each group of commands appends one row to `run_stats_log`: what it changed, by hour, agent, job type, status and commit.
When the log stands for `FOLD_AT` changes, they are added to `run_stats` and `run_commits` at once: then a cell is read
and written once for many runs, and the many are few steps of SQLite.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, groupby, product
from operator import add
from typing import Final

import orjson

from telemetryd.engine import commit_log
from telemetryd.engine.sqlite.statements import commit_cells
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.predicates import conditions
from telemetryd.engine.stats_log import (
    AGENT,
    JOB,
    LEVELS,
    SPANS,
    CellKey,
    Summary,
    cell_of,
    cells_of,
    from_log,
    level_of,
    read_log,
    spans_of,
    split,
    spread,
    storable,
    summarize,
)
from telemetryd.model import stats
from telemetryd.model.commit_cells import SLOT_HOURS
from telemetryd.model.sketches import pack, unpack
from telemetryd.model.stats import DAY, EVERY, FACTS, SUMS, Cell, GetStats, Named, hour_number

FOLD_AT: Final = 10_000
"""How many changes may wait in the log: a query reads them in some 15 ms, and adding them up takes about as long."""

_DATE: Final = len("2025-12-24")
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
_SELECT_DAYS: Final = f"""
    SELECT start - ((start % {DAY}) + {DAY}) % {DAY} FROM run_stats
    UNION SELECT start - ((start % {DAY}) + {DAY}) % {DAY} FROM (
        SELECT slot * {SLOT_HOURS} AS start FROM run_commits GROUP BY slot
    )
"""


def fold(cursor: sqlite3.Cursor) -> None:
    """Add the log to the statistics and to the cells of commits."""
    logged = cursor.execute(f"SELECT {_LOG}").fetchone()[0]
    cursor.execute("DELETE FROM run_stats_log")
    summary = read_log(logged)
    commit_cells.add_up(cursor, commit_log.cells_of(summary))
    cells = spread(split(cells_of(summary)))
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


def _write(cursor: sqlite3.Cursor, cells: dict[CellKey, Cell]) -> None:
    # In the order of the table, of which neighbouring rows share pages. Two sizes of a statement are enough.
    rows = sorted((*key, *storable(cell[:-1]), pack(cell[-1])) for key, cell in cells.items())
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
    """Make all of it anew from the runs, inside the caller's transaction; memory holds one day of them."""
    cursor = connection.cursor()
    for table in ("run_stats", "run_commits", "run_stats_log"):
        cursor.execute(f"DELETE FROM {table}")
    for _, summary in _days(connection):
        _write(cursor, spread(split(cells_of(summary))))
        commit_cells.add_up(cursor, commit_log.cells_of(summary))


def count_wrong(connection: sqlite3.Connection) -> int:
    """Count the rows that differ from what the runs add up to, of statistics and of commits; memory holds one day."""
    logged: dict[int, Summary] = {}
    for key, added in read_log(connection.execute(f"SELECT {_LOG}").fetchone()[0]).items():
        logged.setdefault(hour_number(key[0]) // DAY * DAY, {})[key] = added
    unseen = {day for (day,) in connection.execute(_SELECT_DAYS)} | set(logged)
    wrong = 0
    for day, summary in _days(connection):
        unseen.discard(day)
        wrong += _count_wrong_of(connection, day, summary, logged.get(day, {}))
    return wrong + sum(_count_wrong_of(connection, day, {}, logged.get(day, {})) for day in unseen)


def _count_wrong_of(connection: sqlite3.Connection, day: int, summary: Summary, logged: Summary) -> int:
    cursor = connection.cursor()
    kept = commit_cells.stored(cursor, day // SLOT_HOURS, (day + DAY) // SLOT_HOURS)
    of_commits = commit_log.with_log(kept, commit_log.cells_of(logged))
    wrong = commit_log.differences(commit_log.cells_of(summary), of_commits)
    return wrong + _differences(spread(split(cells_of(summary))), _kept(connection, day, cells_of(logged)))


def _kept(connection: sqlite3.Connection, day: int, logged: Iterable[Named]) -> dict[CellKey, Cell]:
    kept = spread(split(logged))
    for key, cell in _stored(connection.cursor(), day, DAY):
        kept[key] = [*map(add, kept[key], cell)] if key in kept else cell
    return kept


def _stored(
    cursor: sqlite3.Cursor, start: int, hours: int, spans: Sequence[int] = SPANS, levels: Sequence[int] = LEVELS
) -> Iterator[tuple[CellKey, Cell]]:
    """Yield the rows that begin in so many hours from a start on."""
    for span, level in product(spans, levels):
        for row in cursor.execute(_SELECT_ROWS, (span, level, start, start + hours)):
            yield row[: len(_KEY)], cell_of(row[len(_KEY) :])


def _differences(expected: dict[CellKey, Cell], kept: dict[CellKey, Cell]) -> int:
    nothing = [0] * len(_CELL)
    return sum(expected.get(key, nothing) != kept.get(key, nothing) for key in {*expected, *kept})


def correct_hour(cursor: sqlite3.Cursor, hour: str, summary: Summary) -> int:
    """Make what is kept of one hour (2025-12-24T10) what its runs add up to; return how many rows were wrong."""
    fold(cursor)
    cells = (named for named in cells_of(summary) if named[-1][0] > 0)
    return _correct(cursor, spread(split(cells), (1,)), dict(_stored(cursor, hour_number(hour), 1, (1,))))


def correct_day(cursor: sqlite3.Cursor, day: int) -> int:
    """Make what is kept of one day (its first hour since 1970) what its hours add up to; return what was wrong."""
    fold(cursor)
    hours = {key[2:]: cell for key, cell in _stored(cursor, day, DAY, (1,), (AGENT | JOB,))}
    longer = SPANS[1:]
    return _correct(cursor, spread(hours, longer), dict(_stored(cursor, day, DAY, longer)))


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
    level = level_of(query)
    weights = query.weights
    found, values = conditions(query.filters, but=("status",))
    statuses = ", ".join(f"'{status}'" for status in weights)
    found.append(f"status IN ({statuses})")
    spans = spans_of(level, by_status=[*weights] != [EVERY])
    arms = []
    for hours, longer in zip(spans, (*spans[1:], None), strict=True):
        chosen = [f"hours = {hours} AND names = {level} AND start IN ({_starts(query, hours, longer)})", *found]
        arms.append(f"SELECT {', '.join(_COLUMNS[2:])} FROM run_stats WHERE {' AND '.join(chosen)}")
    log = f"SELECT NULL{', NULL' * (len(_COLUMNS[2:]) - 2)}, {_LOG}"
    for row in connection.execute(" UNION ALL ".join([*arms, log]), values):
        if row[0] is not None:
            yield *row[:4], cell_of(row[4:])
        else:
            yield from from_log(query, row[-1])


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
