"""Migrates a database of an older layout to the current schema in one transaction, or reports what that would do."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from telemetryd.engine.sqlite.connection import connect, lenient_text, quoted
from telemetryd.engine.sqlite.files import corrupt, is_unfinished
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.tools import foreign, migrate, room
from telemetryd.engine.sqlite.tools.backup import Watch, ignore_progress
from telemetryd.engine.sqlite.tools.conversion import Converted, Converter, EventConverter, Tally
from telemetryd.engine.sqlite.tools.layouts import (
    EVENTS,
    FIRST_VERSION,
    OLD_LOG,
    OLD_RUNS,
    RUN_IDS,
    Layout,
    columns_of,
    count_rows,
    look,
)
from telemetryd.errors import DatabaseError
from telemetryd.model.events import STORED
from telemetryd.model.runs import COLUMNS
from telemetryd.model.values import SqlValue
from telemetryd.ops.files import sync_directory
from telemetryd.uuids import new_uuid

_SLICE: Final = 2000
_INCREMENTAL: Final = 2
_RETURNED_AT_ONCE: Final = 512
"""Pages that are given back in one transaction, whose journal stays small."""

# Only a run_id says whose event it was; where runs share one, the newest is meant.
_INSERT_OLD_EVENT: Final = f"""
    INSERT INTO run_events (run, {", ".join(STORED)})
    SELECT id, :event_key, :event_type, coalesce(:timestamp, created_at), :payload FROM agent_runs
    WHERE run_id = :run_id ORDER BY id DESC LIMIT 1
"""
_INDEX_RUN_IDS: Final = f"CREATE INDEX {RUN_IDS} ON agent_runs (run_id)"
_DROP_RUN_IDS: Final = f"DROP INDEX {RUN_IDS}"


@dataclass(slots=True)
class Migration:
    """What a migration did, or what a dry run would do."""

    layout: Layout
    tally: Tally
    rows: int = 0
    compacted: bool = False
    room: room.Room | None = None
    """What a dry run has found out about the disk."""
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


def preview(path: Path, place: Path, watch: Watch = ignore_progress, *, with_backup: bool) -> Migration:
    """Say what a migration of an `undisturbed` database would do; neither it nor what is next to it changes.

    Args:
        path: the database, or a copy of it.
        place: where the database is.
        watch: is called with the progress.
        with_backup: whether the migration would begin with a backup.

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
        needed = room.estimate(connection, layout, place, with_backup=with_backup)
        return Migration(layout, tally, layout.rows, room=needed)


def refuse_too_little_room(path: Path, *, with_backup: bool) -> None:
    """Stop if the disk has too little room for a migration; the caller owns the database.

    Raises:
        DatabaseError: then.

    """
    with contextlib.closing(_connect(path, "ro")) as connection, _as_database_error(path):
        layout = look(connection, path)
        room.estimate(connection, layout, path, with_backup=with_backup).refuse_too_little(path)


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


# --- Converting ----------------------------------------------------------------------------------


def _converted(
    connection: sqlite3.Connection, table: str, layout: Layout, converter: Converter, watch: Watch
) -> Iterator[tuple[Sequence[Any], Converted]]:
    """Yield the runs of an older table in slices, converted, in the order in which they arrived, and the rows' numbers.

    Where rows have no numbers, these are None.
    """
    names = ", ".join(quoted("id" if name == "legacy id" else name) for name in layout.columns)
    number, order = (layout.row_number, f"ORDER BY {layout.row_number}") if layout.row_number else ("NULL", "")
    rows = connection.execute(f"SELECT {number}, {names} FROM {quoted(table)} {order}")
    done = 0
    while raw := rows.fetchmany(_SLICE):
        numbers = [row[0] for row in raw]
        ids = numbers if layout.keeps_row_numbers else range(done + 1, done + len(raw) + 1)
        yield numbers, converter.convert(ids, [row[1:] for row in raw])
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
        # Pages that become free would be overwritten with zeros otherwise, and so stand in the journal.
        connection.execute("PRAGMA secure_delete = FAST").fetchall()
        _prepare_space(connection, path, watch)
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
    path.chmod(0o600)  # as every database of ours; the replaced service let others read it
    return done


def _prepare_space(connection: sqlite3.Connection, path: Path, watch: Watch) -> None:
    """Let space be given back in slices: that needs a VACUUM, which takes less room now than after the migration.

    It changes nothing of what the database holds. Where it is not possible, it is tried again at the end.
    """
    layout = look(connection, path)
    _refuse_harmful(connection, layout, path)
    watch("Preparing space", 0, 1)
    try:
        compact(connection)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise
    watch("Preparing space", 1, 1)


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
    indexes = migrate.drop_indexes(connection)
    converter = Converter(layout.columns)
    done.tally = converter.tally
    _copy_rows(connection, layout, converter, watch)
    done.rows = count_rows(connection, "agent_runs")
    if done.rows != layout.rows:
        raise DatabaseError(f"{done.rows} rows were copied instead of {layout.rows}; the database is as before")
    if "event_id" in layout.columns and (not layout.event_id_is_unique or _has_changed(converter.tally, "event_id")):
        _separate_equal_event_ids(connection, layout, converter.tally)
    for number, sql in enumerate(indexes):
        watch("Creating indexes", number, len(indexes))
        connection.execute(sql)
    watch("Creating indexes", len(indexes), len(indexes))
    migrate.derive(connection)
    rollups.rebuild(connection)
    _serve_old_events(connection, done)
    _keep_log(connection)
    connection.execute(f"DROP TABLE {OLD_RUNS}")
    if layout.triggers:
        done.remarks.append(f"Dropped the triggers of the old table: {', '.join(layout.triggers)}")
    return done


def _has_changed(tally: Tally, name: str) -> bool:
    """Return whether some values of a field are not what they were: then two that were different may be equal."""
    return any(where == name for where, _ in tally.changed)


def _set_aside(connection: sqlite3.Connection) -> None:
    """Rename the old tables, and drop the old indexes, whose names ours may have."""
    named = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = 'agent_runs' AND sql IS NOT NULL"
    ).fetchall()
    for (name,) in named:
        connection.execute(f"DROP INDEX {quoted(name)}")
    connection.execute(f"ALTER TABLE agent_runs RENAME TO {OLD_RUNS}")
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_migrations'").fetchone():
        connection.execute(f"ALTER TABLE schema_migrations RENAME TO {OLD_LOG}")


def _set_neighbours_aside(connection: sqlite3.Connection, layout: Layout) -> None:
    """Rename the tables whose names the schema needs; of their indexes only those go whose names it needs, too."""
    ours = migrate.expected_schema()
    for name in layout.aside:
        connection.execute(f"ALTER TABLE {quoted(name)} RENAME TO {quoted(migrate.aside(name))}")
        found = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL",
            (migrate.aside(name),),
        )
        for (index,) in found.fetchall():
            if index in ours:
                connection.execute(f"DROP INDEX {quoted(index)}")


def _serve_old_events(connection: sqlite3.Connection, done: Migration) -> None:
    """Copy what the old table of events holds into the new one, where it names a run and a type.

    The old table stays as well: its layout was never fixed, so only it still has everything.
    """
    if EVENTS not in done.layout.aside:
        return
    old = migrate.aside(EVENTS)
    converter = EventConverter([column.name for column in columns_of(connection, old)])
    served = number = 0
    rows = connection.execute(f"SELECT * FROM {quoted(old)}")
    connection.execute(_INDEX_RUN_IDS)
    while part := rows.fetchmany(_SLICE):
        converted = [converter.convert(number + place, raw) for place, raw in enumerate(part, 1)]
        served += connection.executemany(_INSERT_OLD_EVENT, [event for event in converted if event]).rowcount
        number += len(part)
    connection.execute(_DROP_RUN_IDS)
    done.remarks.append(f"{served} of {number} old events are served; all are kept in {old}")


def _copy_rows(connection: sqlite3.Connection, layout: Layout, converter: Converter, watch: Watch) -> None:
    copier = _Copier(connection, layout.row_number) if layout.row_number else None
    for numbers, part in _converted(connection, OLD_RUNS, layout, converter, watch):
        if copier is None:
            connection.executemany(migrate.INSERT_RUN, part.rows())
        else:
            copier.copy(numbers, part)
        connection.executemany(migrate.INSERT_ORIGINAL, part.side_rows())


class _Copier:
    """Copies runs out of the older table inside SQLite, but for the fields whose values have changed.

    That takes a third of the time of handing over each value.
    """

    def __init__(self, connection: sqlite3.Connection, row_number: str) -> None:
        self._connection = connection
        self._row_number = row_number
        self._changed: dict[str, dict[int, SqlValue]] = {name: {} for name in COLUMNS}
        for name, values in self._changed.items():
            connection.create_function(f"new_{name}", 1, values.__getitem__)

    def copy(self, numbers: Sequence[int], part: Converted) -> None:
        """Copy the runs in the rows of some ascending numbers, between which there are no others."""
        expressions = []
        for name, column in zip(COLUMNS, part.columns, strict=True):
            values = self._changed[name]
            values.clear()
            if name in part.kept:
                expressions.append(quoted(name))
            else:
                values.update(zip(numbers, column, strict=True))
                expressions.append(f"new_{name}({self._row_number})")
        self._connection.execute(
            f"INSERT INTO agent_runs ({', '.join(COLUMNS)}) SELECT {', '.join(expressions)} FROM {OLD_RUNS} "
            f"WHERE {self._row_number} BETWEEN ? AND ? ORDER BY {self._row_number}",
            (numbers[0], numbers[-1]),
        )


def _separate_equal_event_ids(connection: sqlite3.Connection, layout: Layout, tally: Tally) -> None:
    """Give all but the first of the runs with one event_id a new one; their old one goes to the side table."""
    connection.create_function("new_uuid", 0, new_uuid)
    connection.execute(
        "CREATE TEMP TABLE surplus AS SELECT id, event_id FROM (SELECT id, event_id, "
        "row_number() OVER (PARTITION BY event_id ORDER BY id) AS place FROM agent_runs) WHERE place > 1"
    )
    old, place = "event_id", "surplus"
    if layout.keeps_row_numbers:  # else nothing but its text is left of it
        old, place = "old.event_id", f"surplus JOIN {OLD_RUNS} AS old ON old.{layout.row_number} = surplus.id"
    connection.execute(
        "INSERT OR IGNORE INTO unconverted_values (run, field, reason, original) "
        f"SELECT surplus.id, 'event_id', 'not unique', {old} FROM {place}"
    )
    changed = connection.execute("UPDATE agent_runs SET event_id = new_uuid() WHERE id IN (SELECT id FROM surplus)")
    if changed.rowcount:
        tally.replaced["event_id", "not unique"] += changed.rowcount
    connection.execute("DROP TABLE temp.surplus")


def _keep_log(connection: sqlite3.Connection) -> None:
    """Keep what the old schema_migrations said, whatever its columns were, and drop it."""
    columns = [column.name for column in columns_of(connection, OLD_LOG)]
    if not columns:
        return
    key = next((name for name in ("version", "id") if name in columns), None)
    if key is not None:
        description = "description" if "description" in columns else "NULL"
        applied_at = "applied_at" if "applied_at" in columns else "NULL"
        connection.execute(
            "INSERT OR IGNORE INTO schema_migrations (version, description, applied_at) "
            f"SELECT CAST({key} AS INTEGER), CAST(coalesce({description}, 'schema of the replaced service') AS TEXT), "
            f"CAST(coalesce({applied_at}, '') AS TEXT) FROM {OLD_LOG} WHERE CAST({key} AS INTEGER) BETWEEN 1 AND ?",
            (FIRST_VERSION - 1,),
        )
    connection.execute(f"DROP TABLE {OLD_LOG}")


def _compact(connection: sqlite3.Connection, done: Migration, watch: Watch) -> None:
    """Give the old table's space back; the migration itself is over."""
    try:
        compact(connection)
        pages = connection.execute("PRAGMA freelist_count").fetchone()[0]
        for done_pages in range(0, pages, _RETURNED_AT_ONCE):
            watch("Returning space", done_pages, pages)
            # Each page is a step without columns, of which execute() would take one.
            connection.executescript(f"PRAGMA incremental_vacuum({_RETURNED_AT_ONCE})")
        watch("Returning space", pages, pages)
    except sqlite3.OperationalError as error:
        done.remarks.append(
            f"The file was migrated but not compacted ({error}); telemetryd check --repair does that, if there is room"
        )
    else:
        done.compacted = True


def is_compact(connection: sqlite3.Connection) -> bool:
    """Return whether a database gives its free space back in slices, as one that we made does."""
    return bool(connection.execute("PRAGMA auto_vacuum").fetchone()[0] == _INCREMENTAL)


def compact(connection: sqlite3.Connection) -> None:
    """Give all free space back, and let later space be given back in slices, if it is not so yet.

    VACUUM is a separate transaction: killed in it, the database is as before, only larger than it need be.
    """
    if not is_compact(connection):
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("VACUUM")
