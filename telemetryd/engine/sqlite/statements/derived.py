"""Maintains what is derived from runs: counts by agent and by minute, bounds of hours and days, the statistics log.

A group of commands writes all of it in one step of SQLite, because Python gives the interpreter's lock away for each,
and a busy event loop gives it back late: one row goes into a view, and the view's trigger stores what the row says.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from telemetryd.engine.columns import DAY, HOUR
from telemetryd.engine.sqlite.statements import rollups

_KEYS: Final = {"run_totals": ("agent_name", "job_type", "status"), "run_minutes": ("minute",)}
"""The tables that count runs, and the key of each; an array of a change is the key and the number of runs."""


def _elements(count: int) -> str:
    return ", ".join(f"json_extract(value, '$[{place}]')" for place in range(count))


def _add(table: str) -> str:
    key = ", ".join(_KEYS[table])
    return f"""
        INSERT INTO {table} ({key}, runs)
        SELECT {_elements(len(_KEYS[table]) + 1)} FROM json_each(new.{table}_added) WHERE true
        ON CONFLICT ({key}) DO UPDATE SET runs = runs + excluded.runs;
    """


def _take(table: str) -> str:
    key = _KEYS[table]
    is_it = " AND ".join(f"{name} = json_extract(value, '$[{place}]')" for place, name in enumerate(key))
    # A total that has drifted (a row changed by hand) is no reason to refuse what agents send.
    return f"""
        UPDATE {table} SET runs = max(runs - json_extract(value, '$[{len(key)}]'), 0)
            FROM json_each(new.{table}_taken) WHERE {is_it};
        DELETE FROM {table} WHERE runs = 0
            AND ({", ".join(key)}) IN (SELECT {_elements(len(key))} FROM json_each(new.{table}_taken));
    """


def _widen(table: str, key: str) -> str:
    return f"""
        INSERT INTO {table} ({key}, first_start, last_start)
        SELECT {_elements(3)} FROM json_each(new.{table}) WHERE true
        ON CONFLICT ({key}) DO UPDATE SET
            first_start = min(first_start, excluded.first_start), last_start = max(last_start, excluded.last_start)
            WHERE excluded.first_start < first_start OR excluded.last_start > last_start;
    """


def _drop(table: str, key: str, finer: str, finer_key: str, after: str) -> str:
    """Return the statement that drops the hours or days of which no minutes or hours are left.

    `after` is the character after the one that follows an hour (a colon) or a day (T).
    """
    length = HOUR if key == "hour" else DAY
    return f"""
        DELETE FROM {table} WHERE {key} IN (
            SELECT substr(json_extract(value, '$[0]'), 1, {length}) FROM json_each(new.run_minutes_taken)
        ) AND NOT EXISTS (SELECT 1 FROM {finer} WHERE {finer_key} >= {key} AND {finer_key} < {key} || '{after}');
    """


_COLUMNS: Final = (
    *(f"{table}_{change}" for table in _KEYS for change in ("added", "taken")),
    *("run_hours", "run_days", "changes", "log"),
)
IS_PREPARED: Final = "(SELECT count(*) FROM temp.sqlite_master WHERE name = 'derived')"
"""SQL for whether `prepare` has been called for a connection."""
_PREPARE: Final = (
    f"CREATE TEMP VIEW derived AS SELECT {', '.join(f'NULL AS {name}' for name in _COLUMNS)}",
    f"""
    CREATE TEMP TRIGGER store_derived INSTEAD OF INSERT ON derived BEGIN
        {"".join(map(_add, _KEYS))} {_widen("run_hours", "hour")} {_widen("run_days", "day")}
        INSERT INTO run_stats_log (total, changes) VALUES ({rollups.LOGGED} + new.changes, new.log);
    END
    """,
    f"""
    CREATE TEMP TRIGGER take_derived INSTEAD OF INSERT ON derived
    WHEN new.run_totals_taken <> '[]' OR new.run_minutes_taken <> '[]' BEGIN
        {"".join(map(_take, _KEYS))}
        {_drop("run_hours", "hour", "run_minutes", "minute", ";")} {_drop("run_days", "day", "run_hours", "hour", "U")}
    END
    """,
)
_STORE: Final = f"INSERT INTO derived VALUES ({', '.join('?' * len(_COLUMNS))})"


@dataclass(frozen=True, slots=True)
class Derived:
    """What a group of commands changes besides its runs."""

    totals: Sequence[tuple[str, str, str, int]]
    """By how many the runs of an agent, a job type and a status become more, or fewer."""
    minutes: Sequence[tuple[str, int]]
    """By how many the runs that were created in a minute become more, or fewer."""
    hours: Sequence[tuple[str, str, str]]
    """Between which start times the new runs lie that were created in an hour."""
    days: Sequence[tuple[str, str, str]]
    changes: int
    """How many changes the statistics' entry stands for."""
    log: str
    """That entry."""


def prepare(cursor: sqlite3.Cursor) -> None:
    """Make what `store` needs; it lasts as long as the connection, and stands in no file."""
    for statement in _PREPARE:
        cursor.execute(statement)


def store(cursor: sqlite3.Cursor, derived: Derived, logged: int) -> None:
    """Store what a group changes; where nothing is left of a total, a minute, an hour or a day, its row goes.

    The statistics are added up if that is due, after so many changes that were logged before.
    """
    totals = _more(derived.totals), _fewer(derived.totals)
    minutes = _more(derived.minutes), _fewer(derived.minutes)
    arrays = [orjson.dumps(rows).decode() for rows in (*totals, *minutes, derived.hours, derived.days)]
    cursor.execute(_STORE, (*arrays, derived.changes, derived.log))
    if logged + derived.changes >= rollups.FOLD_AT:
        rollups.fold(cursor)


def _more(changes: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [change for change in changes if change[-1] > 0]


def _fewer(changes: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(*key, -runs) for *key, runs in changes if runs < 0]
