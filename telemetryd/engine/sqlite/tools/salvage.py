"""Saves what can be read of a damaged database into a new one, and counts what was lost."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.connection import connect, lenient_text
from telemetryd.engine.sqlite.partials import partial_file
from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.tools import foreign, integrity, migrate
from telemetryd.engine.sqlite.tools.backup import Watch, ignore_progress, replace, verify
from telemetryd.engine.sqlite.tools.conversion import Converter, Original, RawValue, Tally
from telemetryd.errors import DatabaseError
from telemetryd.model.values import SqlValue, format_timestamp

_SLICE: Final = 500
_Raw = tuple[RawValue, ...]


@dataclass(slots=True)
class Salvage:
    """What was saved and what was not."""

    saved: int = 0
    expected: int | None = None
    """How many runs the damaged file says it had, if it can still say so."""
    rejected: int = 0
    """Rows that were read but could not be stored: their event_id was there already."""
    neighbours: dict[str, int] = field(default_factory=dict)
    """Rows saved of the tables that hold neither runs nor totals."""
    aside: Path | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def lost(self) -> int | None:
        """How many runs could not be saved, or None if that is unknown."""
        return None if self.expected is None else max(self.expected - self.saved, 0)


def salvage(path: Path, moment: datetime, watch: Watch = ignore_progress) -> Salvage:
    """Put a new database with every readable run in the place of a damaged one, which is kept next to it.

    The caller owns the database.

    Raises:
        DatabaseError: if not even the table's beginning can be found; the database is as before.

    """
    done = Salvage()
    with partial_file(path.with_name(f"{path.name}.salvaged")) as new:
        with (
            contextlib.closing(_open_damaged(path)) as source,
            contextlib.closing(connect(new, "rw")) as target,
        ):
            target.execute("PRAGMA auto_vacuum = INCREMENTAL")
            migrate.create(target, format_timestamp(moment))
            done.expected = _expected(source)
            target.execute("BEGIN EXCLUSIVE")
            _copy(source, target, done, watch)
            integrity.recount_totals(target)
            _copy_neighbours(source, target, done)
            target.execute("COMMIT")
        verify(new)
        done.aside = replace(path, new, moment)
    return done


def _open_damaged(path: Path) -> sqlite3.Connection:
    connection = connect(path, "ro")
    connection.text_factory = lenient_text
    connection.execute("PRAGMA query_only = ON")
    # Else SQLite refuses a file that is shorter than its first page says (btree.c, lockBtree); nothing is written.
    connection.execute("PRAGMA writable_schema = ON")
    return connection


def _expected(source: sqlite3.Connection) -> int | None:
    """Ask whatever may still know how many runs there were: the totals, or one of the indexes."""
    for counted in integrity.COUNTS_OF_RUNS:
        with contextlib.suppress(sqlite3.DatabaseError):
            return int(source.execute(counted).fetchone()[0] or 0)
    return None


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, done: Salvage, watch: Watch) -> None:
    try:
        columns = [row[1] for row in source.execute("PRAGMA table_info(agent_runs)")]
    except sqlite3.DatabaseError as error:
        raise DatabaseError(f"Not even the schema can be read ({error}); restore a backup") from error
    converter = Converter(columns)
    done.tally = converter.tally
    for rows in _readable(source):
        for number, *raw in rows:
            assert isinstance(number, int)  # noqa: S101 - it is the row number
            values, originals = converter.convert(number, raw)
            if _store(target, values, originals):
                done.saved += 1
            else:
                done.rejected += 1
        watch("Saving rows", done.saved, max(done.expected or 0, done.saved))


def _copy_neighbours(source: sqlite3.Connection, target: sqlite3.Connection, done: Salvage) -> None:
    known = migrate.expected_schema()
    # What works on our tables, such as a trigger, would work on the copy, too; it stays in the old file only.
    left = {found.name for found in foreign.find_foreign(source) if found.harm is not None}
    for name, sql in migrate.schema_of(source).items():
        if (name in known and name not in integrity.BESIDE_RUNS) or full_text.is_ours(name) or name in left:
            continue
        with contextlib.suppress(sqlite3.DatabaseError):  # what cannot be made or read stays in the old file only
            new = name
            if name not in known:
                target.execute(sql)
            elif known[name] != sql:  # of an older layout, before a migration: nothing but its name is ours
                new = migrate.aside(name)
                integrity.make_alike(source, name, target, new)
            if sql.startswith("CREATE TABLE"):
                done.neighbours[new] = 0
                for rows in integrity.read_table(source, name):
                    done.neighbours[new] += integrity.fill_table(target, new, rows)
    for name, rows_of_lost_runs in integrity.delete_strays(target).items():
        done.neighbours[name] -= rows_of_lost_runs


def _store(target: sqlite3.Connection, values: Sequence[SqlValue], originals: list[Original]) -> bool:
    if target.execute(integrity.SAVE_RUN, values).rowcount != 1:
        return False
    target.executemany(integrity.KEEP_ORIGINAL, [(values[0], *original) for original in originals])
    return True


def _readable(source: sqlite3.Connection) -> Iterator[list[_Raw]]:
    """Yield every row that can be read: from the front, from the back, and what lies between bit by bit."""
    last = integrity.FIRST_NUMBER
    for rows in _walk(source, "front", last):
        yield rows
        last = int(rows[-1][0] or 0)
    first = integrity.LAST_NUMBER
    for rows in _walk(source, "back", first):
        fresh = [row for row in rows if int(row[0] or 0) > last]
        if fresh:
            yield fresh
            first = int(fresh[-1][0] or 0)
        if len(fresh) < len(rows):
            return  # the two walks have met
    yield from _between(source, last, first)


def _walk(source: sqlite3.Connection, end: str, start: int) -> Iterator[list[_Raw]]:
    """Yield slices from one end until the damage; a slice that cannot be read is tried with fewer rows."""
    sql, size = integrity.WALK_FROM[end], _SLICE
    while True:
        try:
            rows: list[_Raw] = source.execute(sql, (start, size)).fetchall()
        except sqlite3.DatabaseError:
            if size == 1:
                return
            size = max(size // 8, 1)
            continue
        if not rows:
            return
        yield rows
        start = int(rows[-1][0] or 0)


def _between(source: sqlite3.Connection, low: int, high: int) -> Iterator[list[_Raw]]:
    """Yield what lies between the two ends of the damage, by the row numbers that the indexes still know."""
    numbers: set[int] = set()
    for sql in integrity.NUMBERS_IN_INDEXES:
        with contextlib.suppress(sqlite3.DatabaseError):
            numbers.update(row[0] for row in source.execute(sql, (low, high)))
    for number in sorted(numbers):
        with contextlib.suppress(sqlite3.DatabaseError):
            row = source.execute(integrity.READ_BY_NUMBER, (number,)).fetchone()
            if row is not None:
                yield [row]
