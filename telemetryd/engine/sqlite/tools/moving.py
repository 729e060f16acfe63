"""A SQLite file as one side of a move: read as it is, or made anew and given its name when it is whole."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import orjson

from telemetryd.engine.moving import BIG, CHANGES, ORIGINALS, RUNS, STATS, Drawn, Fetch, Row, Table, Watch
from telemetryd.engine.sqlite.connection import connect, recover
from telemetryd.engine.sqlite.files import inspect
from telemetryd.engine.sqlite.partials import partial_file, publish
from telemetryd.engine.sqlite.statements import labels, rollups
from telemetryd.engine.sqlite.statements.columns import NEWEST, NEWEST_EVENT
from telemetryd.engine.sqlite.tools import backup, integrity, migrate
from telemetryd.errors import DatabaseError
from telemetryd.model.values import format_timestamp, utc_now

_CHANGES: Final = """
    SELECT id, coalesce((SELECT seq FROM run_changes WHERE run = id), id) FROM agent_runs NOT INDEXED ORDER BY id
"""
_STORE_CHANGE: Final = """
    INSERT INTO run_changes (run, seq) SELECT run, seq FROM (SELECT ? AS run, ? AS seq) WHERE run <> seq
"""
_ORIGINALS: Final = """
    SELECT run, field, reason, typeof(original), original FROM unconverted_values ORDER BY run, field
"""
_STORE_ORIGINAL: Final = "INSERT INTO unconverted_values (run, field, reason, original) VALUES (?, ?, ?, ?)"
_DIGITS: Final = 19
"""A number of so many digits may be larger than 64 bits."""
_ESCAPED: Final = "escaped"
"""The kind of a text that holds what not every engine can hold, and is therefore kept as JSON."""


class File:
    """One snapshot of a file, through a connection in a transaction."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self._path)

    def count(self) -> int:
        """Return how many runs it has."""
        return self._number("SELECT count(*) FROM agent_runs")

    def drawn(self) -> Drawn:
        """Return which numbers were drawn last."""
        return Drawn(self._number(f"SELECT {NEWEST}"), self._number(f"SELECT {NEWEST_EVENT}"))

    def _number(self, statement: str) -> int:
        with _failing(self._path):
            return int(self._connection.execute(statement).fetchone()[0])

    @contextmanager
    def reading(self, table: Table) -> Iterator[Fetch]:
        """Read a table in the order of its key, inside the block."""
        with _failing(self._path):
            cursor = self._connection.execute(_select(table))

        def fetch(most: int) -> Sequence[Row]:
            with _failing(self._path):
                rows = cursor.fetchmany(most)
            if table is RUNS:
                found: list[Row] = orjson.loads(f"[{','.join(row for (row,) in rows)}]")
                return found
            return [_as_text(row) for row in rows] if table is ORIGINALS else rows

        with closing(cursor):
            yield fetch

    def fold(self) -> None:
        """Add to the statistics what was logged."""
        with _failing(self._path):
            rollups.fold(self._connection.cursor())

    def store(self, table: Table, slices: Iterator[Sequence[Row]]) -> None:
        """Store all rows of a table (see `Target.store`)."""
        statement = _insert(table)
        with _failing(self._path):
            self._connection.execute(f"DELETE FROM {table.name}")  # a new database has a row or two
            for rows in slices:
                self._connection.executemany(statement, map(_as_value, rows) if table is ORIGINALS else rows)

    def complete(self, drawn: Drawn, watch: Watch) -> None:
        """Make what is counted and indexed (see `Target.complete`)."""
        with _failing(self._path):
            self._connection.execute("UPDATE change_feed SET event_floor = ?", (drawn.event,))
            indexes = [sql for name, sql in migrate.expected_schema().items() if sql.startswith("CREATE ")]
            missing = [sql for sql in indexes if sql not in {*migrate.schema_of(self._connection).values()}]
            for number, sql in enumerate(missing):
                watch("Making indexes", number, len(missing))
                self._connection.execute(sql)
            watch("Making indexes", len(missing), len(missing))
            watch("Counting", 0, 2)
            integrity.count_again(self._connection)
            watch("Counting", 1, 2)
            labels.rebuild(self._connection)
            watch("Counting", 2, 2)


def _select(table: Table) -> str:
    if table is CHANGES:
        return _CHANGES
    if table is ORIGINALS:
        return _ORIGINALS
    if table is RUNS:  # as one text: to read it takes half the time of so many columns
        return f"SELECT json_array({', '.join(table.columns)}) FROM agent_runs NOT INDEXED ORDER BY id"
    columns = [f"CAST({name} AS TEXT)" if table is STATS and name in BIG else name for name in table.columns]
    return f"SELECT {', '.join(columns)} FROM {table.name} ORDER BY {', '.join(table.key)}"


def _insert(table: Table) -> str:
    if table is CHANGES:
        return _STORE_CHANGE
    if table is ORIGINALS:
        return _STORE_ORIGINAL
    values = [
        f"CASE WHEN length(?{place}) < {_DIGITS} THEN CAST(?{place} AS INTEGER) ELSE ?{place} END"
        if table is STATS and name in BIG
        else f"?{place}"
        for place, name in enumerate(table.columns, 1)
    ]
    return f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES ({', '.join(values)})"


def _as_text(row: Row) -> Row:
    """Return the row of an original with its value as a text that every engine can hold."""
    *key, kind, value = row
    if isinstance(value, bytes):
        value = value.hex()
    elif not isinstance(value, str):
        value = repr(value)
    elif "\0" in value:
        kind, value = _ESCAPED, orjson.dumps(value).decode()
    return (*key, kind, value)


def _as_value(row: Row) -> Row:
    """Do the reverse."""
    *key, kind, text = row
    value: Any = text
    match kind:
        case "blob":
            value = bytes.fromhex(text)
        case "integer":
            value = int(text)
        case "real":
            value = float(text)
        case "escaped":
            value = orjson.loads(text)
        case _:
            pass
    return (*key, value)


@contextmanager
def _failing(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise DatabaseError(f"{path}: {error}; telemetryd check says more if it is damaged") from error


@contextmanager
def reading(path: Path) -> Iterator[File]:
    """Read a database that the caller owns, inside the block.

    Raises:
        DatabaseError: if there is none, or none of this version.

    """
    state = inspect(path)
    if not path.exists():
        raise DatabaseError(f"There is no database at {path}")
    migrate.refuse_unless_usable(path, state)
    recover(path)
    with _failing(path), closing(connect(path, "rw")) as connection:
        migrate.check_schema(connection, path)
        file = File(path, connection)
        connection.execute("BEGIN IMMEDIATE")
        file.fold()
        connection.execute("COMMIT")
        connection.execute("BEGIN")
        yield file


@contextmanager
def making(path: Path) -> Iterator[File]:
    """Make a database at a path where there is none; it gets its name at the end of the block.

    Raises:
        DatabaseError: if that is not possible; there is nothing then.

    """
    with partial_file(path) as new:
        with _failing(path), closing(connect(new.path, "rw")) as connection:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            for pragma in ("synchronous = OFF", "journal_mode = OFF", "cache_size = -131072"):  # it has no name yet
                connection.execute(f"PRAGMA {pragma}").fetchall()
            migrate.create(connection, format_timestamp(utc_now()))
            connection.execute("BEGIN EXCLUSIVE")
            migrate.drop_indexes(connection)
            yield File(path, connection)
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        backup.verify(new.path, path)
        publish(new, path)
