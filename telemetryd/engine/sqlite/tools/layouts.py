"""Layouts of older databases: recognises which one a database has, and what stands in the way of a migration."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from telemetryd.engine.sqlite.connection import quoted
from telemetryd.engine.sqlite.files import APPLICATION_ID
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.errors import DatabaseError

FIRST_VERSION: Final = 8
"""The first schema version of telemetryd; what is older belonged to the service it replaced."""
OLD_RUNS: Final = "telemetryd_migration_runs"
OLD_LOG: Final = "telemetryd_migration_log"
RUN_IDS: Final = "telemetryd_migration_run_ids"
EVENTS: Final = "run_events"
_HIGHEST_ID: Final = 2**62
_ROW_NUMBER: Final = ("rowid", "_rowid_", "oid")
"""What SQLite calls the number of a row, as far as a table has no column of that name."""
_HIDDEN: Final = 1
"""In `PRAGMA table_xinfo`, a column that `SELECT *` does not show; 2 and 3 are generated ones, which it shows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands in an older database."""

    version: int
    """5 to 7 by the columns (what the file records of itself was not always true), or a version of telemetryd."""
    recorded: int | None
    columns: tuple[str, ...]
    rows: int
    kept: dict[str, int]
    """Tables that stay as they are, with their rows."""
    aside: dict[str, int]
    """Tables whose name the current schema needs, with their rows; they are kept as legacy_…."""
    triggers: tuple[str, ...]
    row_number: str | None
    """How SQL calls the number of a row: `rowid`, unless a column has that name; None if rows have none."""
    keeps_row_numbers: bool
    """Whether a row's number becomes the run's id; otherwise the rows are numbered anew, in their order."""
    event_id_is_unique: bool

    @property
    def is_legacy(self) -> bool:
        """Whether the service before telemetryd made it."""
        return self.version < FIRST_VERSION

    def steps(self) -> list[str]:
        """Return what a migration does, one sentence a step."""
        new = migrate.current_version()
        if not self.is_legacy:
            pending = [step for step in migrate.steps() if step.version > self.version]
            return [
                *self._steps_aside(),
                *(f"Apply migration {step.version}: {step.description}" for step in pending),
                f"Update schema version to {new}",
            ]
        steps = []
        if "event_id" not in self.columns:
            steps += [
                "Add event_id column to agent_runs table (NOT NULL)",
                "Backfill event_id with UUID for all existing rows",
                "Create UNIQUE constraint on event_id (idx_runs_event_id)",
            ]
        if "id" not in self.columns:
            steps.append("Give every row an integer id in its present order; run_id is no longer the primary key")
        steps.append("Normalise values that the current schema does not admit; keep the originals of the others")
        steps.append("Create the indexes and the totals of the current schema")
        if self.kept:
            listed = ", ".join(f"{name} ({_rows(rows)})" for name, rows in self.kept.items())
            steps.append(f"Keep these tables as they are: {listed}")
        steps += self._steps_aside()
        if self.triggers:
            steps.append(f"Drop the triggers of the old table: {', '.join(self.triggers)}")
        return [*steps, f"Update schema version to {new}"]

    def _steps_aside(self) -> list[str]:
        served = {EVENTS: ", and serve its events where they name a run and a type"}
        return [
            f"Keep the table {name} ({_rows(rows)}) as {migrate.aside(name)}{served.get(name, '')}"
            for name, rows in self.aside.items()
        ]


def look(connection: sqlite3.Connection, path: Path) -> Layout:
    """Return which layout a database has.

    Raises:
        DatabaseError: if it has no runs, or something whose name a migration needs.

    """
    tables = {
        name: bool(without_rowid)
        for name, without_rowid in connection.execute(
            "SELECT name, wr FROM pragma_table_list "
            "WHERE schema = 'main' AND type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
    }
    if "agent_runs" not in tables:
        raise DatabaseError(f"{path} has no table agent_runs: it is not a telemetry database")
    columns = columns_of(connection, "agent_runs")
    is_ours = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    hidden = (name for name in _ROW_NUMBER if name not in {column.name for column in columns})
    row_number = None if tables["agent_runs"] else next(hidden, None)
    keeps_row_numbers = row_number is not None and _is_sequence(connection, row_number)
    is_id = [column[:2] for column in columns if column.is_key] == [("id", "INTEGER")] and keeps_row_numbers
    # A column "id" that does not become the run's id is a value like any other, without a place in our schema.
    names = tuple("legacy id" if column.name == "id" and not is_id else column.name for column in columns)
    log = "schema_migrations" in tables
    version = connection.execute("PRAGMA user_version").fetchone()[0] if is_ours else _guess_version(names)
    others = sorted(name for name in tables if name not in ("agent_runs", "schema_migrations"))
    needed = migrate.claimed(version if is_ours else 0)
    kept = [] if is_ours else [name for name in others if name not in needed]
    aside = [name for name in others if name in needed]
    _refuse_what_is_in_the_way(connection, path, version if is_ours else 0, aside)
    return Layout(
        version=version,
        recorded=_recorded_version(connection) if log else None,
        columns=names,
        rows=count_rows(connection, "agent_runs"),
        kept={name: count_rows(connection, name) for name in kept},
        aside={name: count_rows(connection, name) for name in aside},
        triggers=tuple(
            row[0]
            for row in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'agent_runs'"
            )
        ),
        row_number=row_number,
        keeps_row_numbers=keeps_row_numbers,
        event_id_is_unique=_is_unique(connection, "event_id"),
    )


def _refuse_what_is_in_the_way(connection: sqlite3.Connection, path: Path, version: int, aside: list[str]) -> None:
    """Stop if something that stays has a name that the current schema or the migration needs.

    Raises:
        DatabaseError: that names it, and says what to do.

    """
    needed = {
        *migrate.claimed(version),
        *migrate.claimed(version, "INDEX"),
        *map(migrate.aside, aside),
        OLD_RUNS,
        OLD_LOG,
        RUN_IDS,
    }
    moved = {*aside, *(() if version else ("agent_runs", "schema_migrations"))}
    found = connection.execute("SELECT type, name, tbl_name FROM sqlite_master WHERE type <> 'trigger' ORDER BY name")
    in_the_way = [
        f"{kind} {name}"
        for kind, name, table in found
        if _small(name) in needed and not (kind in ("table", "index") and table in moved)
    ]
    if in_the_way:
        raise DatabaseError(
            f"{path} has something of your own whose name telemetryd needs: {', '.join(in_the_way)}; "
            "rename or drop it, then run telemetryd migrate again; nothing was changed"
        )


class _Column(NamedTuple):
    name: str
    type: str
    is_key: bool


def columns_of(connection: sqlite3.Connection, table: str) -> list[_Column]:
    """Return the columns that `SELECT *` shows, generated ones, too; in small letters, as SQLite compares them."""
    return [
        _Column(_small(name), kind.upper(), bool(key))
        for _, name, kind, _, _, key, hidden in connection.execute(f"PRAGMA table_xinfo({quoted(table)})")
        if hidden != _HIDDEN
    ]


def _small(name: str) -> str:
    """Return a name as SQLite compares names: only the letters of ASCII have a case for it."""
    return "".join(letter.lower() if letter.isascii() else letter for letter in name)


def _is_sequence(connection: sqlite3.Connection, number: str) -> bool:
    """Return whether the rows' numbers can begin the commit sequence, which counts from 1 and needs room to go on."""
    low, high = connection.execute(
        f"SELECT (SELECT min({number}) FROM agent_runs), (SELECT max({number}) FROM agent_runs)"
    ).fetchone()
    return low is None or (low >= 1 and high <= _HIGHEST_ID)


def _guess_version(columns: tuple[str, ...]) -> int:
    return 5 if "event_id" not in columns else 7 if "git_commit_source" in columns else 6


def _recorded_version(connection: sqlite3.Connection) -> int | None:
    columns = {column.name for column in columns_of(connection, "schema_migrations")}
    key = "version" if "version" in columns else "id" if "id" in columns else None
    if key is None:
        return None
    found = connection.execute(f"SELECT max(CAST({key} AS INTEGER)) FROM schema_migrations").fetchone()[0]
    return None if found is None else int(found)


def count_rows(connection: sqlite3.Connection, table: str) -> int:
    """Count the rows of a table."""
    return int(connection.execute(f"SELECT count(*) FROM {quoted(table)}").fetchone()[0])


def _is_unique(connection: sqlite3.Connection, column: str) -> bool:
    indexes = connection.execute("SELECT name FROM pragma_index_list('agent_runs') WHERE \"unique\" AND NOT partial")
    return any(
        [_small(row[2] or "") for row in connection.execute(f"PRAGMA index_info({quoted(name)})")] == [column]
        for (name,) in indexes.fetchall()
    )


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"
