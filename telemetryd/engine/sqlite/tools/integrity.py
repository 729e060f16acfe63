"""SQL for checks, salvage and repair of a database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from telemetryd.engine.sqlite.connection import quoted
from telemetryd.engine.sqlite.statements import rollups, sequence
from telemetryd.engine.sqlite.statements.sequence import KEEP_EVENT_NUMBERS, KEEP_NUMBERS, MAKE_FEED
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.engine.sqlite.tools.conversion import PLAIN_TEXTS, RawValue, replacement
from telemetryd.git_urls import without_credentials
from telemetryd.model.runs import columns
from telemetryd.model.values import Role, SqlValue

_WRONG_TOTALS: Final = """
    WITH counted AS (
        SELECT agent_name || char(0) || job_type || char(0) || status AS place, count(*) AS runs
            FROM agent_runs GROUP BY agent_name, job_type, status
        UNION ALL
        SELECT substr(created_at, 1, 16), count(*) FROM agent_runs GROUP BY 1
    ), kept AS (
        SELECT agent_name || char(0) || job_type || char(0) || status AS place, runs FROM run_totals WHERE runs <> 0
        UNION ALL
        SELECT minute, runs FROM run_minutes WHERE runs <> 0
    )
    SELECT count(DISTINCT place) FROM (
        SELECT place FROM (SELECT * FROM counted EXCEPT SELECT * FROM kept)
        UNION ALL
        SELECT place FROM (SELECT * FROM kept EXCEPT SELECT * FROM counted)
        UNION ALL
        SELECT c.hour FROM (
            SELECT substr(created_at, 1, 13) AS hour, min(start_time) AS first, max(start_time) AS last
            FROM agent_runs GROUP BY 1
        ) AS c LEFT JOIN run_hours AS k ON k.hour = c.hour
        WHERE k.hour IS NULL OR k.first_start > c.first OR k.last_start < c.last
        UNION ALL
        SELECT c.day FROM (
            SELECT substr(hour, 1, 10) AS day, min(first_start) AS first, max(last_start) AS last
            FROM run_hours GROUP BY 1
        ) AS c LEFT JOIN run_days AS k ON k.day = c.day
        WHERE k.day IS NULL OR k.first_start > c.first OR k.last_start < c.last
    )
"""

SAVE_RUN: Final = f"{migrate.INSERT_RUN} ON CONFLICT DO NOTHING"

_OF_RUNS: Final = ("unconverted_values", "run_events", "run_processes", "run_arrivals")

BESIDE_RUNS: Final = (*_OF_RUNS, "alert_states", "alert_deliveries")
"""The tables of the schema whose rows a salvage copies as they are."""

_ABOUT_RUNS: Final = (*_OF_RUNS, "run_changes")
"""The tables whose rows refer to runs. A salvage makes a new sequence, in which no run has changed yet."""

IS_SAVED: Final = "SELECT 1 FROM agent_runs WHERE id = ? AND event_id = ?"
KEYS_OF_RUNS: Final = {
    "unconverted_values": ("id", "run = ?"),
    "run_arrivals": ("created_at, id", "created_at = ? AND run = ?"),
}
"""Of tables without row numbers that are about runs: which columns of a run find its rows, and how."""


def make_alike(source: sqlite3.Connection, name: str, target: sqlite3.Connection, new: str) -> None:
    """Make a table with the columns of another one, of any type, under a new name."""
    columns = [quoted(row[1]) for row in source.execute(f"PRAGMA table_info({quoted(name)})")]
    target.execute(f'CREATE TABLE "{new}" ({", ".join(columns)})')


class Filling:
    """Inserts rows that may be damaged into a table, except those that are there already."""

    def __init__(self, connection: sqlite3.Connection, name: str, columns: list[str]) -> None:
        self._connection = connection
        self._json = columns.index("payload") if name == "run_events" else None
        listed, places = ", ".join(map(quoted, columns)), ", ".join("?" * len(columns))
        self._insert = f"INSERT INTO {quoted(name)} ({listed}) VALUES ({places})"
        table = connection.execute(f"PRAGMA table_info({quoted(name)})").fetchall()
        texts = {row[1] for row in table if row[2] == "TEXT"}
        self._texts = [place for place, column in enumerate(columns) if column in texts]

    def add(self, rows: Sequence[Sequence[RawValue]]) -> tuple[int, int]:
        """Insert some; return how many were stored, and how many the table refuses for another reason than that."""
        stored = refused = 0
        for row in rows:
            try:
                self._connection.execute(self._insert, self._readable(row))
            except sqlite3.IntegrityError as error:
                refused += error.sqlite_errorcode not in _THERE_ALREADY
            else:
                stored += 1
        return stored, refused

    def _readable(self, row: Sequence[RawValue]) -> Sequence[RawValue]:
        """Replace what is no text, or no JSON, any more where it has to be."""
        values = list(row)
        for place in self._texts:
            value = values[place]
            if isinstance(value, bytes):
                values[place] = value.decode("utf-8", "replace")
        if self._json is not None and isinstance(payload := values[self._json], str):
            found = replacement("payload", payload)
            values[self._json] = payload if found is None else found[0]
        return values


_THERE_ALREADY: Final = (
    sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
    sqlite3.SQLITE_CONSTRAINT_UNIQUE,
    sqlite3.SQLITE_CONSTRAINT_ROWID,
)


_STRAYS: Final = "FROM {table} WHERE run NOT IN (SELECT id FROM agent_runs)"


def count_strays(connection: sqlite3.Connection) -> dict[str, int]:
    """Count the rows that refer to runs that are gone, in each table that has some."""
    counted = ((table, f"SELECT count(*) {_STRAYS.format(table=table)}") for table in _ABOUT_RUNS)
    found = ((table, int(connection.execute(sql).fetchone()[0])) for table, sql in counted)
    return {table: rows for table, rows in found if rows}


def delete_strays(connection: sqlite3.Connection) -> dict[str, int]:
    """Delete the rows that refer to runs that are gone: a new run could get the number of theirs. Return how many."""
    for statement in (MAKE_FEED, KEEP_NUMBERS, KEEP_EVENT_NUMBERS):
        connection.execute(statement)
    deleted = ((table, f"DELETE {_STRAYS.format(table=table)}") for table in _ABOUT_RUNS)
    done = ((table, connection.execute(sql).rowcount) for table, sql in deleted)
    return {table: rows for table, rows in done if rows}


_NULS: Final = f"""
    SELECT id, {", ".join(PLAIN_TEXTS)} FROM agent_runs
    WHERE {" OR ".join(f"instr({name}, char(0))" for name in PLAIN_TEXTS)}
"""
_JSON: Final = (*(("agent_runs", name) for name in columns(Role.JSON)), ("run_events", "payload"))


class Unstorable(NamedTuple):
    """A stored value that no request could bring: an earlier migration let it pass."""

    table: str
    number: int
    field: str
    original: str
    value: SqlValue
    """What takes its place."""
    reason: str


def find_unstorable(connection: sqlite3.Connection) -> Iterator[Unstorable]:
    """Yield each value of a run or an event that could not come by a request, and at which readers may fail."""
    for number, *texts in connection.execute(_NULS):
        for name, text in zip(PLAIN_TEXTS, texts, strict=True):
            if text is not None and (found := replacement(name, text)):
                yield Unstorable("agent_runs", number, name, text, *found)
    for table, name in _JSON:
        rows = connection.execute(f"SELECT id, {name} FROM {table} WHERE {name} IS NOT NULL")
        for number, text in rows:
            if found := replacement(name, text):
                yield Unstorable(table, number, name, text, *found)


def replace_unstorable(connection: sqlite3.Connection) -> int:
    """Do with such values what a migration does with them today; return how many there were."""
    all_of_them = list(find_unstorable(connection))
    changes = sequence.Sequence.read(connection.cursor())
    for found in all_of_them:
        connection.execute(f"UPDATE {found.table} SET {found.field} = ? WHERE id = ?", (found.value, found.number))
        if found.table == "agent_runs":
            connection.execute(migrate.INSERT_ORIGINAL, (found.number, found.field, found.reason, found.original))
            changes.changed(found.number)
    changes.finish()
    return len(all_of_them)


_ADDRESSES: Final = "SELECT DISTINCT git_repo FROM agent_runs WHERE git_repo IS NOT NULL"
_KEEP_OF_ADDRESS: Final = "UPDATE agent_runs SET git_repo = ? WHERE git_repo = ? RETURNING id"


def find_credentials(connection: sqlite3.Connection) -> dict[str, str | None]:
    """Return each stored address of a repository that holds more than is stored today, and what is kept of it."""
    kept = {address: without_credentials(address) for (address,) in connection.execute(_ADDRESSES).fetchall()}
    return {address: rest for address, rest in kept.items() if rest != address}


def drop_credentials(connection: sqlite3.Connection) -> int:
    """Leave out of the addresses what is not stored today, and overwrite its space; return how many runs changed."""
    connection.execute("PRAGMA secure_delete = ON")
    changes = sequence.Sequence.read(connection.cursor())
    changed = 0
    for address, rest in find_credentials(connection).items():
        for (number,) in connection.execute(_KEEP_OF_ADDRESS, (rest, address)).fetchall():
            changes.changed(number)
            changed += 1
    changes.finish()
    return changed


def count_wrong_totals(connection: sqlite3.Connection) -> int:
    """Count the totals and statistics that differ from what the table holds."""
    return int(connection.execute(_WRONG_TOTALS).fetchone()[0]) + rollups.count_wrong(connection)


def recount_totals(connection: sqlite3.Connection) -> None:
    """Count every total and the statistics again, inside the caller's transaction."""
    count_again(connection)
    rollups.rebuild(connection)


def count_again(connection: sqlite3.Connection) -> None:
    """Count every total again, inside the caller's transaction; the statistics stay."""
    for table in ("run_totals", "run_minutes", "run_hours", "run_days"):
        connection.execute(f"DELETE FROM {table}")
    migrate.derive(connection)
