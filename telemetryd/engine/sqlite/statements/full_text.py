"""The full-text index over the texts of runs: create, drop, verify, query."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final, TypeVar

from telemetryd.errors import InvalidRequestError, UnavailableError
from telemetryd.model.commands import IndexTexts
from telemetryd.model.filters import Filters

T = TypeVar("T")

SEARCHED: Final = ("input_summary", "output_summary", "error_summary", "error_details")
"""The fields that are searched."""

_TABLE: Final = "runs_text"
_COLUMNS: Final = ", ".join(SEARCHED)
_TOKENS: Final = "columnsize = 0, tokenize = 'unicode61 remove_diacritics 2'"
_OLD: Final = ", ".join(f"old.{name}" for name in SEARCHED)
_NEW: Final = ", ".join(f"new.{name}" for name in SEARCHED)
_DIFFERS: Final = " OR ".join(f"old.{name} IS NOT new.{name}" for name in SEARCHED)

_CREATE: Final = f"""CREATE VIRTUAL TABLE {_TABLE} USING fts5 (
    {_COLUMNS}, content = agent_runs, content_rowid = id, {_TOKENS}
)"""


def _triggers(new_is_indexed: str = "", old_is_indexed: str = "") -> dict[str, str]:
    """Return the triggers by which the index follows changes, of all runs or of those that are indexed already.

    The texts stand in agent_runs only; so FTS5 must be given the old text when a text changes. Triggers do that
    within the statement itself, whichever command it belongs to, and a run without texts costs one comparison.
    """
    return {
        f"{_TABLE}_created": f"""CREATE TRIGGER {_TABLE}_created AFTER INSERT ON agent_runs
WHEN coalesce({_NEW}) IS NOT NULL{new_is_indexed} BEGIN
    INSERT INTO {_TABLE} (rowid, {_COLUMNS}) VALUES (new.id, {_NEW});
END""",
        f"{_TABLE}_changed": f"""CREATE TRIGGER {_TABLE}_changed AFTER UPDATE OF {_COLUMNS} ON agent_runs
WHEN {f"({_DIFFERS})" if old_is_indexed else _DIFFERS}{old_is_indexed} BEGIN
    INSERT INTO {_TABLE} ({_TABLE}, rowid, {_COLUMNS}) SELECT 'delete', old.id, {_OLD}
        WHERE coalesce({_OLD}) IS NOT NULL;
    INSERT INTO {_TABLE} (rowid, {_COLUMNS}) SELECT new.id, {_NEW} WHERE coalesce({_NEW}) IS NOT NULL;
END""",
        f"{_TABLE}_deleted": f"""CREATE TRIGGER {_TABLE}_deleted AFTER DELETE ON agent_runs
WHEN coalesce({_OLD}) IS NOT NULL{old_is_indexed} BEGIN
    INSERT INTO {_TABLE} ({_TABLE}, rowid, {_COLUMNS}) VALUES ('delete', old.id, {_OLD});
END""",
    }


_OBJECTS: Final = {_TABLE: _CREATE, **_triggers()}
"""The table and its triggers, which make it complete; they are made last."""

_PROGRESS: Final = f"{_TABLE}_progress"
"""While the index is built, the table of one row that holds up to which id runs are indexed."""
_IS_INDEXED: Final = f" AND {{row}}.id <= (SELECT last FROM {_PROGRESS})"
_UNFINISHED: Final = {
    _PROGRESS: f"CREATE TABLE {_PROGRESS} (last INTEGER NOT NULL) STRICT",
    _TABLE: _CREATE,
    **_triggers(_IS_INDEXED.format(row="new"), _IS_INDEXED.format(row="old")),
}
"""What there is of it while it is built; what is indexed already follows changes, the rest is still to come."""

_FIRST_RUN: Final = -(2**63)
"""After which the first slice begins."""
_SLICE: Final = 2_000
"""Runs that are indexed in one transaction at most."""
_NEXT: Final = f"""
    SELECT id, {" + ".join(f"coalesce(length({name}), 0)" for name in SEARCHED)} FROM agent_runs NOT INDEXED
    WHERE id > ? ORDER BY id LIMIT {_SLICE}
"""
_INDEX: Final = f"""
    INSERT INTO {_TABLE} (rowid, {_COLUMNS})
    SELECT id, {_COLUMNS} FROM agent_runs WHERE id > ? AND id <= ? AND coalesce({_COLUMNS}) IS NOT NULL ORDER BY id
"""
_MERGE: Final = f"INSERT INTO {_TABLE} ({_TABLE}, rank) VALUES ('merge', ?)"
_MERGED_PAGES: Final = 64
"""Pages that one step merges; a negative number begins with the whole index (sqlite.org/fts5.html)."""
_CHANGES_OF_NOTHING: Final = 1
"""What a merge that finds nothing to do adds to the number of changes."""
_HOW_FAR: Final = f"SELECT last, (SELECT max(id) FROM {{schema}}.agent_runs) FROM {{schema}}.{_PROGRESS}"

_INDEX_AGAIN: Final = (
    f"CREATE VIRTUAL TABLE temp.text_again USING fts5 ({_COLUMNS}, content = '', {_TOKENS})",
    f"INSERT INTO temp.text_again (rowid, {_COLUMNS}) SELECT id, {_COLUMNS} FROM agent_runs",
    "CREATE VIRTUAL TABLE temp.words_again USING fts5vocab (temp, text_again, col)",
    f"CREATE VIRTUAL TABLE temp.words_kept USING fts5vocab (main, {_TABLE}, col)",
)
_WRONG_WORDS: Final = """
    SELECT count(*) FROM (
        SELECT term, col FROM (SELECT * FROM temp.words_again EXCEPT SELECT * FROM temp.words_kept)
        UNION
        SELECT term, col FROM (SELECT * FROM temp.words_kept EXCEPT SELECT * FROM temp.words_again)
    )
"""
_FORGET_AGAIN: Final = tuple(
    f"DROP TABLE IF EXISTS temp.{name}" for name in ("words_kept", "words_again", "text_again")
)


def is_ours(name: str) -> bool:
    """Return whether a table or a trigger belongs to the index, which includes the tables that FTS5 makes."""
    return name == _TABLE or name.startswith(f"{_TABLE}_")


def is_part(kind: str, name: str, sql: str) -> bool:
    """Return whether an object is part of the index; a trigger is only if its text is ours, be it built or not."""
    return sql in (_OBJECTS.get(name), _UNFINISHED.get(name)) if kind == "trigger" else is_ours(name)


def require(connection: sqlite3.Connection, filters: Filters, schema: str = "main") -> None:
    """Refuse a search for words where there is no index of them.

    Raises:
        InvalidRequestError: if that is so; the sentence names the setting.
        UnavailableError: if it is still being built.

    """
    if filters.words is None or is_complete(connection, schema):
        return
    if is_begun(connection, schema):
        last, newest = connection.execute(_HOW_FAR.format(schema=schema)).fetchone()
        share = max(last, 0) / max(newest or 1, 1)
        raise UnavailableError(f"The full-text index is being built, {share:.0%} of it so far; search again later")
    raise InvalidRequestError(
        "Invalid q: this daemon keeps no full-text index; to search for words it must be started with "
        "TELEMETRY_FULL_TEXT=true"
    )


def is_there(connection: sqlite3.Connection) -> bool:
    """Return whether a database has any part of the index."""
    return bool(_made(connection))


def is_complete(connection: sqlite3.Connection, schema: str = "main") -> bool:
    """Return whether a database has the whole index, so that it follows every change."""
    return _made(connection, schema) == _OBJECTS


def is_begun(connection: sqlite3.Connection, schema: str = "main") -> bool:
    """Return whether an index is being built, which `index_slice` goes on with."""
    return _made(connection, schema) == _UNFINISHED


def _made(connection: sqlite3.Connection, schema: str = "main") -> dict[str, str]:
    names = ", ".join("?" * len(_UNFINISHED))
    made = f"SELECT name, sql FROM {schema}.sqlite_master WHERE name IN ({names})"
    return dict(connection.execute(made, [*_UNFINISHED]))


def drop(connection: sqlite3.Connection) -> None:
    """Drop whatever there is of the index."""
    made = _made(connection)
    for name in reversed(_UNFINISHED):
        if name in made:
            connection.execute(f"DROP {'TABLE' if name in (_TABLE, _PROGRESS) else 'TRIGGER'} {name}")


def begin(connection: sqlite3.Connection) -> None:
    """Make an empty index in the place of what there is; it follows changes as far as it has come."""
    drop(connection)
    for sql in _UNFINISHED.values():
        connection.execute(sql)
    connection.execute(f"INSERT INTO {_PROGRESS} (last) VALUES (?)", (_FIRST_RUN,))


def index_slice(connection: sqlite3.Connection | sqlite3.Cursor, command: IndexTexts) -> bool:
    """Index the next runs of an index that is begun, inside the caller's transaction; return whether there are more.

    After the last one the index is complete.
    """
    last = end = connection.execute(f"SELECT last FROM {_PROGRESS}").fetchone()[0]
    room = command.most_bytes
    for run, size in connection.execute(_NEXT, (last,)):
        room -= size
        if room < 0 and end != last:
            break
        end = run
    if end != last:
        connection.execute(_INDEX, (last, end))
        connection.execute(f"UPDATE {_PROGRESS} SET last = ?", (end,))
        return True
    for name in _triggers():
        connection.execute(f"DROP TRIGGER {name}")
    for sql in _triggers().values():
        connection.execute(sql)
    connection.execute(f"DROP TABLE {_PROGRESS}")
    return False


def forget(cursor: sqlite3.Cursor, *, again: bool, is_over: Callable[[], bool]) -> bool:
    """Merge the whole index, which until then keeps words of texts that are gone; return whether that is done.

    FTS5 notes a removed text next to its words, and drops both where a merge brings them together. Its own option
    `secure-delete` needs SQLite 3.42, makes a file that older ones cannot read, and spares texts replaced earlier.

    Args:
        cursor: inside a transaction.
        again: whether this goes on with a merge that was cut short; what has been written meanwhile is not its matter.
        is_over: asked between portions whether to cut it short.

    """
    cursor.execute("SAVEPOINT words")  # at which FTS5 writes what it has kept in memory
    cursor.execute("RELEASE words")
    pages = _MERGED_PAGES if again else -_MERGED_PAGES
    while True:
        before = cursor.connection.total_changes
        cursor.execute(_MERGE, (pages,))
        if cursor.connection.total_changes - before <= _CHANGES_OF_NOTHING:
            return True
        if is_over():
            return False
        pages = _MERGED_PAGES


def rebuild(connection: sqlite3.Connection) -> None:
    """Make the whole index anew, inside the caller's transaction."""
    begin(connection)
    while index_slice(connection, IndexTexts()):
        pass


def at_once(connection: sqlite3.Connection, step: Callable[[sqlite3.Connection], T]) -> T:
    """Do one step in a separate transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        done = step(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return done


def count_wrong(connection: sqlite3.Connection) -> int:
    """Count the words whose number of runs or places differs from what the runs say; 0 without a finished index.

    The texts are indexed again for that, in temporary tables.
    """
    if not is_there(connection) or is_begun(connection):
        return 0
    if not is_complete(connection):
        return 1
    try:
        for statement in (*_FORGET_AGAIN, *_INDEX_AGAIN):
            connection.execute(statement)
        return int(connection.execute(_WRONG_WORDS).fetchone()[0])
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_CORRUPT_VTAB:
            raise
        return 1
    finally:
        for statement in _FORGET_AGAIN:
            connection.execute(statement)
