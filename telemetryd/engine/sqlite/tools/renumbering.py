"""Renumbers rows whose ids leave no room for new ones, so that the database is writable again."""

from __future__ import annotations

import sqlite3
from typing import Final

from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.statements.columns import NEWEST
from telemetryd.engine.sqlite.statements.sequence import MAKE_FEED
from telemetryd.engine.sqlite.tools.foreign import HIGHEST_NUMBER

_OF_RUNS: Final = ("run_events", "run_processes", "run_changes", "run_arrivals", "unconverted_values")
_FORGET: Final = (
    "DELETE FROM run_changes WHERE seq > :highest",
    "DELETE FROM run_deletions WHERE seq > :highest",
    "DELETE FROM followed_feed WHERE max(seq, begun) > :highest",
    "UPDATE change_feed SET floor = 0, horizon = 0 WHERE max(floor, horizon) > :highest",
    "UPDATE change_feed SET event_floor = 0 WHERE event_floor > :highest",
)
_BEGIN_ANEW: Final = (
    MAKE_FEED,
    f"UPDATE change_feed SET epoch = lower(hex(randomblob(6))), floor = {NEWEST} + 1",
    "UPDATE change_feed SET horizon = floor",
)


def free_numbers(connection: sqlite3.Connection) -> int:
    """Renumber, inside the caller's transaction, and begin a new epoch; return how many rows got other numbers.

    Subscribers to the commit sequence have to begin anew; the totals and the statistics are to be counted again.
    """
    rollups.fold(connection.cursor())
    for statement in _FORGET:
        connection.execute(statement, {"highest": HIGHEST_NUMBER})
    moved = _renumber(connection, "agent_runs", "id", connection.execute(f"SELECT {_NEWEST_LOW}").fetchone()[0])
    for table in _OF_RUNS:
        connection.executemany(f"UPDATE {table} SET run = ? WHERE run = ?", moved)
    renumbered = len(moved)
    for table, key in (("run_events", "id"), ("alert_deliveries", "number")):
        low = connection.execute(f"SELECT max({key}) FROM {table} WHERE {key} <= ?", (HIGHEST_NUMBER,)).fetchone()[0]
        renumbered += len(_renumber(connection, table, key, low or 0))
    for statement in _BEGIN_ANEW:
        connection.execute(statement)
    return renumbered


_NEWEST_LOW: Final = f"""max(
    (SELECT coalesce(max(id), 0) FROM agent_runs WHERE id <= {HIGHEST_NUMBER}),
    (SELECT coalesce(max(seq), 0) FROM run_changes),
    (SELECT coalesce(max(seq), 0) FROM run_deletions),
    (SELECT coalesce(max(max(floor, horizon)), 0) FROM change_feed)
)"""


def _renumber(connection: sqlite3.Connection, table: str, key: str, last: int) -> list[tuple[int, int]]:
    """Give the rows after the highest number those after `last`; return the new and the old number of each."""
    select = f"SELECT {key} FROM {table} WHERE {key} > ? ORDER BY {key}"
    high = [number for (number,) in connection.execute(select, (HIGHEST_NUMBER,)).fetchall()]
    moved = [(last + place, number) for place, number in enumerate(high, 1)]
    connection.executemany(f"UPDATE {table} SET {key} = ? WHERE {key} = ?", moved)
    return moved
