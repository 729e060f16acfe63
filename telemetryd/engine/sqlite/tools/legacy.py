"""Migrates a database of an older layout to the current schema in one transaction, or reports what that would do."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from telemetryd.engine.sqlite.connection import connect, lenient_text
from telemetryd.engine.sqlite.files import APPLICATION_ID, corrupt, is_unfinished
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.tools import foreign, migrate
from telemetryd.engine.sqlite.tools.backup import Watch, ignore_progress
from telemetryd.engine.sqlite.tools.conversion import Converter, EventConverter, Original, Tally
from telemetryd.errors import DatabaseError
from telemetryd.model.events import STORED
from telemetryd.model.runs import COLUMNS
from telemetryd.ops.files import sync_directory

FIRST_VERSION: Final = 8
"""The first schema version of telemetryd; what is older belonged to the service it replaced."""

_OLD_RUNS: Final = "telemetryd_migration_runs"
_OLD_LOG: Final = "telemetryd_migration_log"
_RUN_IDS: Final = "telemetryd_migration_run_ids"
_SLICE: Final = 2000
_HIGHEST_ID: Final = 2**62
_ROW_NUMBER: Final = ("rowid", "_rowid_", "oid")
"""What SQLite calls the number of a row, as far as a table has no column of that name."""
_INCREMENTAL: Final = 2
_HIDDEN: Final = 1
"""In `PRAGMA table_xinfo`, a column that `SELECT *` does not show; 2 and 3 are generated ones, which it shows."""

_INSERT_RUN: Final = f"INSERT INTO agent_runs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
_EVENTS: Final = "run_events"
# Only a run_id says whose event it was; where runs share one, the newest is meant.
_INSERT_OLD_EVENT: Final = f"""
    INSERT INTO run_events (run, {", ".join(STORED)})
    SELECT id, :event_key, :event_type, coalesce(:timestamp, created_at), :payload FROM agent_runs
    WHERE run_id = :run_id ORDER BY id DESC LIMIT 1
"""
_INDEX_RUN_IDS: Final = f"CREATE INDEX {_RUN_IDS} ON agent_runs (run_id)"
_DROP_RUN_IDS: Final = f"DROP INDEX {_RUN_IDS}"
_INSERT_ORIGINAL: Final = "INSERT OR IGNORE INTO unconverted_values (run, field, reason, original) VALUES (?, ?, ?, ?)"


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
            listed = ", ".join(f"{name} ({rows} rows)" for name, rows in self.kept.items())
            steps.append(f"Keep these tables as they are: {listed}")
        steps += self._steps_aside()
        if self.triggers:
            steps.append(f"Drop the triggers of the old table: {', '.join(self.triggers)}")
        return [*steps, f"Update schema version to {new}"]

    def _steps_aside(self) -> list[str]:
        served = {_EVENTS: ", and serve its events where they name a run and a type"}
        return [
            f"Keep the table {name} ({rows} rows) as {migrate.aside(name)}{served.get(name, '')}"
            for name, rows in self.aside.items()
        ]


@dataclass(slots=True)
class Migration:
    """What a migration did, or what a dry run would do."""

    layout: Layout
    tally: Tally
    rows: int = 0
    compacted: bool = False
    remarks: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, list[dict[str, str | int]]]:
        """Return how many values of each kind were normalised, and how many went to the side table."""
        return {
            name: [
                {"field": where, "kind": kind, "values": values}
                for (where, kind), values in sorted(counter.items(), key=lambda item: (item[0][0], -item[1]))
            ]
            for name, counter in (("normalised", self.tally.changed), ("kept_aside", self.tally.replaced))
        }


# --- Looking -------------------------------------------------------------------------------------


def preview(path: Path, watch: Watch = ignore_progress) -> Migration:
    """Say what a migration of an `undisturbed` database would do; neither it nor what is next to it changes.

    Raises:
        DatabaseError: if it cannot be read, or is not a telemetry database.

    """
    mode = "ro&immutable=1" if not is_unfinished(path) else "rw"
    with contextlib.closing(_connect(path, mode)) as connection, _as_database_error(path):
        layout = look(connection, path)
        _refuse_harmful(connection, layout, path)
        tally = Tally()
        if layout.is_legacy:
            converter = Converter(layout.columns)
            for _ in _converted(connection, "agent_runs", layout, converter, watch):
                pass
            tally = converter.tally
        return Migration(layout, tally, layout.rows)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = connect(path, mode)
    connection.text_factory = lenient_text
    return connection


@contextmanager
def _as_database_error(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DatabaseError(f"{path} is in use by another process; stop it first") from error
        raise DatabaseError(f"Cannot migrate {path}: {error}; it is as before") from error
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise corrupt(path, str(error)) from error
        raise DatabaseError(f"Cannot migrate {path}: {error}; it is as before") from error


def look(connection: sqlite3.Connection, path: Path) -> Layout:
    """Tell which layout a database has.

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
    columns = _columns(connection, "agent_runs")
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
        rows=_count(connection, "agent_runs"),
        kept={name: _count(connection, name) for name in kept},
        aside={name: _count(connection, name) for name in aside},
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
        _OLD_RUNS,
        _OLD_LOG,
        _RUN_IDS,
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


def _columns(connection: sqlite3.Connection, table: str) -> list[_Column]:
    """Return the columns that `SELECT *` shows, generated ones, too; in small letters, as SQLite compares them."""
    return [
        _Column(_small(name), kind.upper(), bool(key))
        for _, name, kind, _, _, key, hidden in connection.execute(f"PRAGMA table_xinfo({_quoted(table)})")
        if hidden != _HIDDEN
    ]


def _small(name: str) -> str:
    """Return a name as SQLite compares names: only the letters of ASCII have a case for it."""
    return "".join(letter.lower() if letter.isascii() else letter for letter in name)


def _is_sequence(connection: sqlite3.Connection, number: str) -> bool:
    """Tell whether the rows' numbers can begin the commit sequence, which counts from 1 and needs room to go on."""
    low, high = connection.execute(
        f"SELECT (SELECT min({number}) FROM agent_runs), (SELECT max({number}) FROM agent_runs)"
    ).fetchone()
    return low is None or (low >= 1 and high <= _HIGHEST_ID)


def _guess_version(columns: tuple[str, ...]) -> int:
    return 5 if "event_id" not in columns else 7 if "git_commit_source" in columns else 6


def _recorded_version(connection: sqlite3.Connection) -> int | None:
    columns = {column.name for column in _columns(connection, "schema_migrations")}
    key = "version" if "version" in columns else "id" if "id" in columns else None
    if key is None:
        return None
    found = connection.execute(f"SELECT max(CAST({key} AS INTEGER)) FROM schema_migrations").fetchone()[0]
    return None if found is None else int(found)


def _count(connection: sqlite3.Connection, table: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {_quoted(table)}").fetchone()[0])


def _is_unique(connection: sqlite3.Connection, column: str) -> bool:
    indexes = connection.execute("SELECT name FROM pragma_index_list('agent_runs') WHERE \"unique\" AND NOT partial")
    return any(
        [_small(row[2] or "") for row in connection.execute(f"PRAGMA index_info({_quoted(name)})")] == [column]
        for (name,) in indexes.fetchall()
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# --- Converting ----------------------------------------------------------------------------------

_Slice = list[tuple[list[str | int | None], list[Original]]]


def _converted(
    connection: sqlite3.Connection, table: str, layout: Layout, converter: Converter, watch: Watch
) -> Iterator[_Slice]:
    """Yield the runs of an older table in slices, converted, in the order in which they arrived."""
    names = ", ".join(_quoted("id" if name == "legacy id" else name) for name in layout.columns)
    number, order = (layout.row_number, f"ORDER BY {layout.row_number}") if layout.row_number else ("NULL", "")
    rows = connection.execute(f"SELECT {number}, {names} FROM {_quoted(table)} {order}")
    done = 0
    while raw := rows.fetchmany(_SLICE):
        yield [
            converter.convert(row[0] if layout.keeps_row_numbers else place, row[1:])
            for place, row in enumerate(raw, done + 1)
        ]
        done += len(raw)
        watch("Reading rows", done, layout.rows)


def migrate_file(path: Path, now: str, watch: Watch = ignore_progress) -> Migration:
    """Bring a database to the current schema; the caller owns it.

    Everything happens in one transaction, synced with `synchronous=EXTRA`: killed at any moment, the file
    has the old schema or the new one, and may be migrated again. Memory is bounded: rows stream through.

    Raises:
        DatabaseError: if that is not possible; the database is as before.

    """
    with contextlib.closing(_connect(path, "rw")) as connection, _as_database_error(path):
        # With a write-ahead log this one transaction would be written twice.
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.execute("PRAGMA synchronous = EXTRA")
        # Else a rename would change the references of the tables that stay, and a drop would delete from them.
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA legacy_alter_table = ON")
        connection.execute("BEGIN EXCLUSIVE")
        try:
            layout = look(connection, path)
            _refuse_harmful(connection, layout, path)
            done = _rebuild(connection, layout, now, watch) if layout.is_legacy else _step(connection, layout, now)
            watch("Committing", 0, 1)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        sync_directory(path.parent)
        watch("Committing", 1, 1)
        _compact(connection, done, watch)
    return done


def _refuse_harmful(connection: sqlite3.Connection, layout: Layout, path: Path) -> None:
    """Stop at what would work on our writes; of the replaced service's tables nothing but the rows is kept."""
    if not layout.is_legacy:
        foreign.refuse_harmful(connection, path, is_current=False)


def _step(connection: sqlite3.Connection, layout: Layout, now: str) -> Migration:
    done = Migration(layout, Tally(), layout.rows)
    _set_neighbours_aside(connection, layout)
    migrate.run_steps(connection, now, after=layout.version)
    rollups.rebuild(connection)
    _serve_old_events(connection, done)
    return done


def _rebuild(connection: sqlite3.Connection, layout: Layout, now: str, watch: Watch) -> Migration:
    done = Migration(layout, Tally())
    _set_aside(connection)
    _set_neighbours_aside(connection, layout)
    migrate.run_steps(connection, now, after=0)
    indexes = _drop_indexes(connection)
    converter = Converter(layout.columns)
    done.tally = converter.tally
    _copy_rows(connection, layout, converter, watch)
    done.rows = _count(connection, "agent_runs")
    if done.rows != layout.rows:
        raise DatabaseError(f"{done.rows} rows were copied instead of {layout.rows}; the database is as before")
    if not layout.event_id_is_unique and "event_id" in layout.columns:
        _separate_equal_event_ids(connection, converter.tally)
    for number, sql in enumerate(indexes):
        watch("Creating indexes", number, len(indexes))
        connection.execute(sql)
    watch("Creating indexes", len(indexes), len(indexes))
    migrate.derive(connection)
    rollups.rebuild(connection)
    _serve_old_events(connection, done)
    _keep_log(connection)
    connection.execute(f"DROP TABLE {_OLD_RUNS}")
    if layout.triggers:
        done.remarks.append(f"Dropped the triggers of the old table: {', '.join(layout.triggers)}")
    return done


def _set_aside(connection: sqlite3.Connection) -> None:
    """Rename the old tables, and drop the old indexes, whose names ours may have."""
    named = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = 'agent_runs' AND sql IS NOT NULL"
    ).fetchall()
    for (name,) in named:
        connection.execute(f"DROP INDEX {_quoted(name)}")
    connection.execute(f"ALTER TABLE agent_runs RENAME TO {_OLD_RUNS}")
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_migrations'").fetchone():
        connection.execute(f"ALTER TABLE schema_migrations RENAME TO {_OLD_LOG}")


def _set_neighbours_aside(connection: sqlite3.Connection, layout: Layout) -> None:
    """Rename the tables whose names the schema needs; of their indexes only those go whose names it needs, too."""
    ours = migrate.expected_schema()
    for name in layout.aside:
        connection.execute(f"ALTER TABLE {_quoted(name)} RENAME TO {_quoted(migrate.aside(name))}")
        found = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL",
            (migrate.aside(name),),
        )
        for (index,) in found.fetchall():
            if index in ours:
                connection.execute(f"DROP INDEX {_quoted(index)}")


def _serve_old_events(connection: sqlite3.Connection, done: Migration) -> None:
    """Copy what the old table of events holds into the new one, where it names a run and a type.

    The old table stays as well: its layout was never fixed, so only it still has everything.
    """
    if _EVENTS not in done.layout.aside:
        return
    old = migrate.aside(_EVENTS)
    converter = EventConverter([column.name for column in _columns(connection, old)])
    served = number = 0
    rows = connection.execute(f"SELECT * FROM {_quoted(old)}")
    connection.execute(_INDEX_RUN_IDS)
    while part := rows.fetchmany(_SLICE):
        converted = [converter.convert(number + place, raw) for place, raw in enumerate(part, 1)]
        served += connection.executemany(_INSERT_OLD_EVENT, [event for event in converted if event]).rowcount
        number += len(part)
    connection.execute(_DROP_RUN_IDS)
    done.remarks.append(f"{served} of {number} old events are served; all are kept in {old}")


def _drop_indexes(connection: sqlite3.Connection) -> list[str]:
    """Drop the new indexes for the time of the copy, and return how to make them: sorting once is faster."""
    found = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'agent_runs' AND sql IS NOT NULL"
    ).fetchall()
    for name, _ in found:
        connection.execute(f"DROP INDEX {_quoted(name)}")
    return [sql for _, sql in found]


def _copy_rows(connection: sqlite3.Connection, layout: Layout, converter: Converter, watch: Watch) -> None:
    for part in _converted(connection, _OLD_RUNS, layout, converter, watch):
        connection.executemany(_INSERT_RUN, [values for values, _ in part])
        originals = [(values[0], *original) for values, kept in part for original in kept]
        connection.executemany(_INSERT_ORIGINAL, originals)


def _separate_equal_event_ids(connection: sqlite3.Connection, tally: Tally) -> None:
    """Give all but the first of the runs with one event_id a new one; their old one goes to the side table."""
    connection.create_function("new_uuid", 0, lambda: str(uuid.uuid4()))
    connection.execute(
        "CREATE TEMP TABLE surplus AS SELECT id, event_id FROM (SELECT id, event_id, "
        "row_number() OVER (PARTITION BY event_id ORDER BY id) AS place FROM agent_runs) WHERE place > 1"
    )
    connection.execute(
        "INSERT OR IGNORE INTO unconverted_values (run, field, reason, original) "
        "SELECT id, 'event_id', 'not unique', event_id FROM surplus"
    )
    changed = connection.execute("UPDATE agent_runs SET event_id = new_uuid() WHERE id IN (SELECT id FROM surplus)")
    if changed.rowcount:
        tally.replaced["event_id", "not unique"] += changed.rowcount
    connection.execute("DROP TABLE temp.surplus")


def _keep_log(connection: sqlite3.Connection) -> None:
    """Keep what the old schema_migrations said, whatever its columns were, and drop it."""
    columns = [column.name for column in _columns(connection, _OLD_LOG)]
    if not columns:
        return
    key = next((name for name in ("version", "id") if name in columns), None)
    if key is not None:
        description = "description" if "description" in columns else "NULL"
        applied_at = "applied_at" if "applied_at" in columns else "NULL"
        connection.execute(
            "INSERT OR IGNORE INTO schema_migrations (version, description, applied_at) "
            f"SELECT CAST({key} AS INTEGER), CAST(coalesce({description}, 'schema of the replaced service') AS TEXT), "
            f"CAST(coalesce({applied_at}, '') AS TEXT) FROM {_OLD_LOG} WHERE CAST({key} AS INTEGER) BETWEEN 1 AND ?",
            (FIRST_VERSION - 1,),
        )
    connection.execute(f"DROP TABLE {_OLD_LOG}")


def _compact(connection: sqlite3.Connection, done: Migration, watch: Watch) -> None:
    """Give the old table's space back; the migration itself is over."""
    watch("Returning space", 0, 1)
    try:
        compact(connection)
    except sqlite3.OperationalError as error:
        done.remarks.append(
            f"The file was migrated but not compacted ({error}); telemetryd check --repair does that, if there is room"
        )
    else:
        done.compacted = True
    watch("Returning space", 1, 1)


def is_compact(connection: sqlite3.Connection) -> bool:
    """Tell whether a database gives its free space back in slices, as one that we made does."""
    return bool(connection.execute("PRAGMA auto_vacuum").fetchone()[0] == _INCREMENTAL)


def compact(connection: sqlite3.Connection) -> None:
    """Give all free space back, and let later space be given back in slices, if it is not so yet.

    VACUUM is a transaction of its own: killed in it, the database is as before, only larger than it need be.
    """
    if not is_compact(connection):
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("VACUUM")
