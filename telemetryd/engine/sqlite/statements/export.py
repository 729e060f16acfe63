"""SQL for exports: copies matching rows out of the database, and formats the copy as lines."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Final

from telemetryd.engine.indexes import Values, choose
from telemetryd.engine.sqlite.connection import connect
from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.statements.json_rows import json_object, json_value
from telemetryd.engine.sqlite.statements.predicates import conditions, runs_of_labels
from telemetryd.model import events, runs
from telemetryd.model.changes import BEGINNING
from telemetryd.model.filters import TIME_BOUNDS, WILDCARD
from telemetryd.model.queries import ExportRuns
from telemetryd.model.runs import COLUMNS
from telemetryd.model.tables import CHUNK_BYTES, CSV_HEADER, join_pieces
from telemetryd.model.values import MAX_INTEGER, Role

_MOST_ROWS: Final = 128
"""Runs that are rendered in one step of SQLite; each step takes the interpreter's lock twice, which ingest needs."""
_PAGE_BYTES: Final = 4096
_EVENT: Final = events.STORED
_COPIED_EVENT: Final = ("run", "timestamp", "id", *(name for name in _EVENT if name != "timestamp"))

# The copy has no index but its keys, and no types: values stay as they are.
_TABLES: Final = (
    f"CREATE TABLE runs ({', '.join('id INTEGER PRIMARY KEY' if name == 'id' else name for name in COLUMNS)})",
    f"CREATE TABLE events ({', '.join(_COPIED_EVENT)}, PRIMARY KEY (run, timestamp, id)) WITHOUT ROWID",
)
_COPY_RUNS: Final = f"INSERT INTO runs SELECT {', '.join(COLUMNS)} FROM source.agent_runs"
_COPY_EVENTS: Final = f"""
    INSERT INTO events SELECT {", ".join(f"e.{name}" for name in _COPIED_EVENT)}
    FROM runs CROSS JOIN source.run_events AS e INDEXED BY idx_events_time ON e.run = runs.id
"""
_SLICE_END: Final = """
    SELECT max(id) FROM (SELECT id FROM source.agent_runs WHERE id > ? AND id <= ? ORDER BY id LIMIT ?)
"""
# A range of the table's own key is read in its order, and so the aggregates see the runs in it.
_NEXT_RUNS: Final = f"""
    id > :after AND
    id <= coalesce((SELECT id FROM runs WHERE id > :after ORDER BY id LIMIT 1 OFFSET :more), {MAX_INTEGER})
"""


# --- The copy ------------------------------------------------------------------------------------


def prepare(
    connection: sqlite3.Connection, database: Path, room_bytes: int, ended: Callable[[], bool], steps: int
) -> None:
    """Make an empty copy fit to take runs in, and attach the database as `source`, which cannot be written so.

    Args:
        connection: is open on the copy, an empty file that no other program knows.
        database: what is copied from.
        room_bytes: how large the copy may become; beyond it SQLite says SQLITE_FULL.
        ended: is asked from time to time; once it says yes, statements end with SQLITE_INTERRUPT.
        steps: how many steps of SQLite are done between two of these questions.

    """
    with closing(connect(database, "ro")) as source:
        (encoding,) = source.execute("PRAGMA encoding").fetchone()
    connection.execute(f"PRAGMA encoding = '{encoding}'")  # of an older service's file maybe UTF-16; both must be alike
    for pragma in (
        f"page_size = {_PAGE_BYTES}",
        "journal_mode = MEMORY",  # it only ever holds the few pages that are there before a transaction
        "synchronous = OFF",
        "locking_mode = EXCLUSIVE",
        "cache_size = -8192",
        f"max_page_count = {max(room_bytes // _PAGE_BYTES, 1)}",
    ):
        connection.execute(f"PRAGMA main.{pragma}").fetchall()  # what is attached later keeps its own
    connection.execute("ATTACH ? AS source", (f"{database.resolve().as_uri()}?mode=ro",))
    connection.execute("PRAGMA trusted_schema = OFF")
    for table in _TABLES:
        connection.execute(table)
    connection.set_progress_handler(ended, steps)


def copy_at_once(connection: sqlite3.Connection, query: ExportRuns) -> int:
    """Copy all that matches in one transaction, which is one snapshot; return how many runs that is.

    Raises:
        InvalidRequestError: if words are searched for, and the database has no index of them.

    """
    full_text.require(connection, query.filters, "source")
    with _transaction(connection):
        copied = connection.execute(*_select(query)).rowcount
        if query.with_events:
            connection.execute(_COPY_EVENTS)
    return copied


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Read and copy in one snapshot."""
    connection.execute("BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def last_id(connection: sqlite3.Connection) -> int:
    """Return the id of the newest run, 0 if there is none."""
    return int(connection.execute("SELECT coalesce(max(id), 0) FROM source.agent_runs").fetchone()[0])


def copy_slice(connection: sqlite3.Connection, query: ExportRuns, after: int, last: int, rows: int) -> tuple[int, int]:
    """Copy what matches among the next `rows` runs after an id, in one short transaction.

    Returns how many runs were copied, and the id up to which that was; `last` when it is done.
    """
    with _transaction(connection):
        end = connection.execute(_SLICE_END, (after, last, rows)).fetchone()[0]
        copied = 0
        if end is not None:
            statement, values = _select(query, "id > :after_id AND id <= :end_id")
            copied = connection.execute(statement, {**values, "after_id": after, "end_id": end}).rowcount
            if query.with_events:
                connection.execute(f"{_COPY_EVENTS} WHERE runs.id > ? AND runs.id <= ?", (after, end))
    return copied, last if end is None else int(end)


def let_go(connection: sqlite3.Connection) -> None:
    """Leave the database, which nothing is read from any more."""
    connection.execute("DETACH source")


def _select(query: ExportRuns, ids: str = "") -> tuple[str, Values]:
    found, values = conditions(query.filters)
    equal = {
        name: wanted
        for name, wanted in query.filters.equal.items()
        if not (name == WILDCARD and query.filters.patterns)
    }
    is_by_time = any(TIME_BOUNDS[name][0] == "created_at" for name in query.filters.bounds)
    # Slices are short walks by id; and without a filter that an index knows, reading all is soonest by id, too.
    by = f"INDEXED BY {choose(equal)[0]}" if (equal or is_by_time) and not ids else "NOT INDEXED"
    if ids:
        found.append(ids)
    elif not equal:
        found += runs_of_labels(query.filters)
    where = " AND ".join(found)
    return f"{_COPY_RUNS} {by}" + (f" WHERE {where}" if where else ""), values


# --- Lines of the copy ---------------------------------------------------------------------------


def _csv_field(name: str) -> str:
    """Return a field as CSV: texts in quotes, numbers and truth values without, nothing at all for null.

    The comma after it is part of each constant: of as many `||` again a line would take half as long again.
    """
    end = "" if name == COLUMNS[-1] else ","
    if name in runs.columns(Role.BOOLEAN):
        return f"iif({name}, 'true{end}', 'false{end}')"
    if name in runs.TEXTS:
        return f"""coalesce('"' || replace({name}, '"', '""') || '"{end}', '{end}')"""
    return f"coalesce({name} || '{end}', '{end}')"


# Not printf(), which would end a text at a NUL, and leave its quote open.
_CSV_LINE: Final = " || ".join(map(_csv_field, COLUMNS))
_CSV: Final = f"group_concat({_CSV_LINE}, char(13, 10))"
_NDJSON: Final = f"group_concat({json_object(COLUMNS)}, char(10))"
_LIST_MEMBERS: Final = (f"'{name}', json_group_array({json_value(name)})" for name in COLUMNS)
_LISTS: Final = f"json_object({', '.join(_LIST_MEMBERS)})"
_LINES: Final = f"SELECT id, {json_object(COLUMNS)} FROM runs ORDER BY id"
_EVENT_MEMBERS: Final = (f"'{name}', {f'json({name})' if name == 'payload' else name}" for name in _EVENT)
_EVENTS: Final = f"""
    SELECT run, json_object({", ".join(_EVENT_MEMBERS)})
    FROM events ORDER BY run, timestamp, id
"""


def ndjson_chunks(connection: sqlite3.Connection, longest: int) -> Iterator[bytes]:
    """Yield the copy's runs in the order of their ids, one JSON object a line, in pieces of about `CHUNK_BYTES`.

    No step of SQLite makes more than `longest` bytes of more than one run, here and below.
    """
    return join_pieces((lines + b"\n" for lines in _rendered(connection, _NDJSON, longest)), CHUNK_BYTES)


def ndjson_chunks_with_events(connection: sqlite3.Connection) -> Iterator[bytes]:
    """Yield the same, each run with all its events under `events`, oldest first.

    A run with very many is yielded in pieces.
    """
    return join_pieces(_lines_with_events(connection), CHUNK_BYTES)


def _lines_with_events(connection: sqlite3.Connection) -> Iterator[bytes]:
    connection.text_factory = bytes
    happened = connection.execute(_EVENTS)
    event = happened.fetchone()
    for run, line in connection.execute(_LINES):
        yield line[:-1] + b',"events":['
        separator = b""
        while event is not None and event[0] == run:
            yield separator + event[1]
            separator = b","
            event = happened.fetchone()
        yield b"]}\n"


def csv_chunks(connection: sqlite3.Connection, longest: int) -> Iterator[bytes]:
    """Yield the copy's runs in the order of their ids as CSV with a header, in whole lines of about `CHUNK_BYTES`."""
    parts = (lines + b"\r\n" for lines in _rendered(connection, _CSV, longest))
    return chain([CSV_HEADER], join_pieces(parts, CHUNK_BYTES))


def lists(connection: sqlite3.Connection, longest: int) -> Iterator[bytes]:
    """Yield the copy's runs in the order of their ids, some at a time: a JSON object with a list for each field."""
    return _rendered(connection, _LISTS, longest)


def _rendered(connection: sqlite3.Connection, aggregate: str, longest: int) -> Iterator[bytes]:
    """Yield what an aggregate makes of the next few runs, until there are none."""
    connection.text_factory = bytes
    any_length = connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
    statement = f"SELECT max(id), {aggregate} FROM runs WHERE {_NEXT_RUNS}"
    after, rows = BEGINNING, _MOST_ROWS
    while True:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, any_length if rows == 1 else longest)
        try:
            last, text = connection.execute(statement, {"after": after, "more": rows - 1}).fetchone()
        except sqlite3.DataError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_TOOBIG or rows == 1:
                raise
            rows //= 4 if rows >= 4 else 2
            continue
        if last is None:
            return
        yield text
        after = last
        if len(text) < longest // 4:
            rows = min(rows * 2, _MOST_ROWS)
