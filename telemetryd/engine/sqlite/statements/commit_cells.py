"""SQL for the cells of commits: adds to them, reads, verifies and corrects them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import itemgetter
from typing import Final

import orjson

from telemetryd.engine.commit_log import KEY, SUMS, Key, Sums, merge
from telemetryd.engine.stats_log import read_log
from telemetryd.model.commit_cells import Cell

_COLUMNS: Final = (*KEY, *SUMS)
_ROWS_AT_ONCE: Final = 256
_PARAMETERS: Final = f"({', '.join('?' * len(_COLUMNS))})"
_ADDED: Final = ", ".join(f"{name} = {name} + excluded.{name}" for name in SUMS)
_ORDER: Final = ("slot", *KEY[:-1])
"""The key in the order of the table."""
_in_order: Final = itemgetter(*map(KEY.index, _ORDER))
_NAMED: Final = f"""
    ({", ".join(_ORDER)}) IN (
        SELECT {", ".join(f"json_extract(value, '$[{KEY.index(name)}]')" for name in _ORDER)} FROM json_each(?)
    )
"""
_STORED: Final = f"SELECT {', '.join(_COLUMNS)} FROM run_commits WHERE slot >= ? AND slot < ?"
# One statement, so that nothing is added up between the log and the cells; the log comes first. In few steps of SQLite,
# because Python gives the interpreter's lock away for each: all cells of a slot come as one text.
READ: Final = f"""
    SELECT '[' || group_concat(changes) || ']' FROM run_stats_log
    UNION ALL SELECT * FROM (
        SELECT json_group_array(json_array({", ".join(_COLUMNS)})) FROM run_commits
        WHERE slot >= ? AND slot < ? AND runs > 0 GROUP BY slot ORDER BY slot DESC
    )
"""


def add_up(cursor: sqlite3.Cursor, cells: Mapping[Key, Sums]) -> None:
    """Add to the cells; one of which no runs are left goes."""
    # Neighbouring rows share pages.
    rows = sorted(((*key, *sums) for key, sums in cells.items()), key=_in_order)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        cursor.execute(
            f"INSERT INTO run_commits ({', '.join(_COLUMNS)}) VALUES {', '.join([_PARAMETERS] * len(part))} "
            f"ON CONFLICT ({', '.join(KEY)}) DO UPDATE SET {_ADDED}",
            [*chain.from_iterable(part)],
        )
    if emptied := [key for key, (runs, *_) in cells.items() if runs <= 0]:
        cursor.execute(f"DELETE FROM run_commits WHERE runs <= 0 AND {_NAMED}", (orjson.dumps(emptied).decode(),))


def stored(cursor: sqlite3.Cursor, first: int, end: int) -> dict[Key, Sums]:
    """Return the cells of the slots from the first one to that before the end, without the log."""
    return {row[: len(KEY)]: row[len(KEY) :] for row in cursor.execute(_STORED, (first, end))}


def correct(cursor: sqlite3.Cursor, slot: int, expected: Mapping[Key, Sums]) -> int:
    """Make the cells of a slot what its runs add up to; return how many were wrong. The log has been added up."""
    kept = stored(cursor, slot, slot + 1)
    wrong = [key for key in {*kept, *expected} if kept.get(key) != expected.get(key)]
    if wrong:
        cursor.execute(f"DELETE FROM run_commits WHERE {_NAMED}", (orjson.dumps(wrong).decode(),))
        add_up(cursor, {key: expected[key] for key in wrong if key in expected})
    return len(wrong)


def fetch_cells(connection: sqlite3.Connection, first: int, end: int) -> Iterator[Cell]:
    """Yield the cells of the slots from the first one to that before the end, of each pair the newest ones."""
    texts = connection.execute(READ, (first, end))
    log = read_log(next(texts)[0])
    return merge(log, first, end, (orjson.loads(text) for (text,) in texts))
