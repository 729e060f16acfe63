"""Saves what can be read of a damaged database into a new one, and counts what was lost."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.connection import connect, lenient_text
from telemetryd.engine.sqlite.descriptors import borrowed
from telemetryd.engine.sqlite.partials import partial_file
from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.tools import foreign, integrity, migrate, rescue
from telemetryd.engine.sqlite.tools.backup import Watch, ignore_progress, replace, verify
from telemetryd.engine.sqlite.tools.btree import TableFile
from telemetryd.engine.sqlite.tools.conversion import Converted, Converter, RawValue, Tally
from telemetryd.errors import DatabaseError
from telemetryd.model.runs import COLUMNS, TABLE
from telemetryd.model.values import SqlValue, format_timestamp
from telemetryd.ops.files import owner_to_keep

_RUNS: Final = "agent_runs"
_RESTORE: Final = "restore a backup (telemetryd restore)"


@dataclass(slots=True)
class Saved:
    """What became of one table."""

    table: str
    there: int | None = None
    """How many rows it had, or None if nobody knows."""
    is_estimate: bool = False
    """Whether that is computed from the pages that are left."""
    saved: int = 0

    @property
    def lost(self) -> int | None:
        """How many rows could not be saved, or None if nobody knows."""
        return None if self.there is None else max(self.there - self.saved, 0)

    def __str__(self) -> str:
        """Return it as a line of a report."""
        if self.there is None:
            return f"table {self.table}: {self.saved} rows saved, an unknown number lost"
        if self.is_estimate:
            return (
                f"table {self.table}: {self.saved} rows saved; how many were lost is not certain, an estimate by the "
                f"pages that are left is {self.lost}"
            )
        return f"table {self.table}: {self.saved} of {self.there} rows saved, {self.lost} lost"


@dataclass(slots=True)
class Salvage:
    """What was saved and what was not."""

    tables: list[Saved] = field(default_factory=list)
    """What became of each table, that of the runs first; what is counted of the runs is counted again."""
    rejected: int = 0
    """Rows that were read but are no runs any more, or have the event_id of another one."""
    is_schema_whole: bool = True
    """Whether it is known which tables there were."""
    aside: Path | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def runs(self) -> Saved:
        """What became of the runs."""
        return self.tables[0]


def salvage(path: Path, moment: datetime, watch: Watch = ignore_progress) -> Salvage:
    """Put a new database with every readable run in the place of a damaged one, which is kept next to it.

    The caller owns the database.

    Raises:
        DatabaseError: if not even the schema can be read, or no run; the database is as before.

    """
    done = Salvage()
    with partial_file(path.with_name(f"{path.name}.salvaged"), owner=owner_to_keep(path)) as new:
        try:
            with (
                borrowed(path) as descriptor,
                contextlib.closing(_open_damaged(path)) as source,
                contextlib.closing(connect(new.path, "rw")) as target,
            ):
                target.execute("PRAGMA auto_vacuum = INCREMENTAL")
                target.execute("PRAGMA synchronous = OFF")  # the whole file is synced before it gets its name
                migrate.create(target, format_timestamp(moment))
                target.execute("BEGIN EXCLUSIVE")
                page_size = source.execute("PRAGMA page_size").fetchone()[0]
                _Copier(source, TableFile(descriptor, page_size), target, done, watch).copy(path)
                target.execute("COMMIT")
        except sqlite3.Error as error:
            raise DatabaseError(f"Nothing can be saved of {path} ({error}); it is as before: {_RESTORE}") from error
        watch("Verifying", 0, 1)
        verify(new.path)
        watch("Verifying", 1, 1)
        done.aside = replace(path, new, moment)
    return done


def _open_damaged(path: Path) -> sqlite3.Connection:
    connection = connect(path, "ro")
    connection.text_factory = lenient_text
    connection.execute("PRAGMA query_only = ON")
    # Else SQLite refuses a file that is shorter than its first page says (btree.c, lockBtree); nothing is written.
    connection.execute("PRAGMA writable_schema = ON")
    return connection


@dataclass(slots=True)
class _Copier:
    source: sqlite3.Connection
    file: TableFile
    target: sqlite3.Connection
    done: Salvage
    watch: Watch

    def copy(self, path: Path) -> None:
        """Copy every table.

        Raises:
            DatabaseError: if no run can be read.
            sqlite3.Error: if the schema cannot.

        """
        schema, self.done.is_schema_whole = rescue.read_schema(self.source, self.file)
        entry = next((entry for entry in schema if entry.name == _RUNS), None)
        if entry is None:
            raise DatabaseError(f"The table of runs cannot be found in {path}; it is as before: {_RESTORE}")
        runs = rescue.look(self.source, entry)
        indexes = migrate.drop_indexes(self.target, but=("idx_runs_event_id",))
        self._copy_runs(runs)
        if not self.done.runs.saved and not runs.is_whole:
            raise DatabaseError(f"No run of {path} can be read; it is as before: {_RESTORE}")
        for number, sql in enumerate(indexes):
            self.watch("Creating indexes", number, len(indexes))
            self.target.execute(sql)
        self.watch("Creating indexes", len(indexes), len(indexes))
        integrity.recount_totals(self.target)
        self._copy_neighbours(schema)

    def _copy_runs(self, table: rescue.Table) -> None:
        converter = Converter([column.name for column in table.columns])
        self.done.tally = converter.tally
        self.done.tables.append(saved := Saved(_RUNS))
        expected = _total(self.source)
        is_ours = tuple(column.name for column in table.columns) == TABLE
        for rows in rescue.read(self.source, self.file, table):
            numbers, raw = [], []
            for number, *values in rows:
                assert isinstance(number, int)  # noqa: S101 - it is the row number
                if is_ours and not _is_run(values):
                    self.done.rejected += 1
                else:
                    numbers.append(number)
                    raw.append(values)
            saved.saved += self._store(converter.convert(numbers, raw))
            self.watch("Saving rows", saved.saved, max(expected or 0, saved.saved))
        if expected is not None:
            table.estimates.append(expected)
        table.is_whole = table.is_whole and not self.done.rejected
        saved.there, saved.is_estimate = table.there(saved.saved)

    def _store(self, converted: Converted) -> int:
        """Store runs, and return how many; one that is there already was read twice."""
        rows = converted.rows()
        self.target.execute("SAVEPOINT part")
        try:
            stored = self.target.executemany(integrity.SAVE_RUN, rows).rowcount
        except sqlite3.IntegrityError:
            self.target.execute("ROLLBACK TO part")
            stored = sum(map(self._store_one, rows))
        self.target.execute("RELEASE part")
        if stored < len(rows):
            for values, originals in zip(rows, converted.originals, strict=True):
                if self.target.execute(integrity.IS_SAVED, values[:2]).fetchone() is None:
                    self.done.rejected += 1
                    originals.clear()
        self.target.executemany(migrate.INSERT_ORIGINAL, converted.side_rows())
        return stored

    def _store_one(self, values: Sequence[SqlValue]) -> int:
        try:
            return self.target.execute(integrity.SAVE_RUN, values).rowcount
        except sqlite3.IntegrityError:
            return 0

    def _copy_neighbours(self, schema: list[rescue.Entry]) -> None:
        known = migrate.expected_schema()
        left = self._harmful(schema)
        for entry in schema:
            name, sql = entry.name, entry.sql
            if (name in known and name not in integrity.BESIDE_RUNS) or full_text.is_ours(name) or name in left:
                continue
            is_table = sql.startswith("CREATE TABLE")
            new = name if name not in known or known[name] == sql else migrate.aside(name)
            try:
                if new != name:  # of an older layout, before a migration: nothing but its name is ours
                    integrity.make_alike(self.source, name, self.target, new)
                elif name not in known:
                    self.target.execute(sql)
            except sqlite3.Error:  # what cannot be made stays in the old file only
                if is_table:
                    self.done.tables.append(Saved(new))
                continue
            if is_table:
                self._copy_neighbour(entry, new)
        if self.source.execute("PRAGMA user_version").fetchone()[0] == migrate.current_version():
            found = {entry.name for entry in schema}
            self.done.tables += [Saved(name) for name in integrity.BESIDE_RUNS if name not in found]
        strays = integrity.delete_strays(self.target)
        for saved in self.done.tables:
            saved.saved -= strays.get(saved.table, 0)

    def _harmful(self, schema: list[rescue.Entry]) -> set[str]:
        """Return what would work on the rows of the copy, such as a trigger; it stays in the old file only."""
        try:
            return {found.name for found in foreign.find_foreign(self.source) if found.harm is not None}
        except sqlite3.DatabaseError:  # so nobody knows what it does
            return {entry.name for entry in schema if entry.kind != "table"}

    def _copy_neighbour(self, entry: rescue.Entry, new: str) -> None:
        self.done.tables.append(saved := Saved(new))
        read = 0
        try:
            table = rescue.look(self.source, entry)
            fill = integrity.Filling(self.target, new, [column.name for column in table.columns])
            for rows in itertools.chain(rescue.read(self.source, self.file, table), self._read_of_runs(table)):
                stored, refused = fill.add([row[1:] for row in rows])
                saved.saved += stored
                read += stored + refused
                self.watch(f"Saving {new}", saved.saved, saved.saved)
            saved.there, saved.is_estimate = table.there(read)
        except sqlite3.Error:  # the rest of it stays in the old file only
            return

    def _read_of_runs(self, table: rescue.Table) -> Iterator[list[rescue.Row]]:
        """Yield what can be read by the runs that were saved, of a table that could not be read otherwise."""
        if table.is_whole or table.name not in integrity.KEYS_OF_RUNS:
            return
        columns, where = integrity.KEYS_OF_RUNS[table.name]
        keys: Iterable[tuple[object, ...]] = self.target.execute(f"SELECT {columns} FROM agent_runs")
        yield from rescue.read_of_runs(self.source, table, keys, where)


def _is_run(values: Sequence[RawValue]) -> bool:
    """Return whether a row of our layout is one of ours: a page of another table may have taken the place of one."""
    return isinstance(values[_EVENT_ID], (str, bytes)) and any(isinstance(values[place], str) for place in _TIMES)


_EVENT_ID: Final = COLUMNS.index("event_id")
_TIMES: Final = [COLUMNS.index(name) for name in ("created_at", "updated_at", "start_time")]


def _total(source: sqlite3.Connection) -> int | None:
    """Return how many runs there were by the totals, as far as they can be read."""
    with contextlib.suppress(sqlite3.DatabaseError):
        total = source.execute("SELECT sum(runs) FROM run_totals").fetchone()[0]
        return int(total) if isinstance(total, (int, float)) else None
    return None
