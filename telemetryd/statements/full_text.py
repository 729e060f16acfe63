"""The full-text index over what runs say of themselves: made, dropped, verified, and asked for."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final, TypeVar

from telemetryd.errors import InvalidRequestError
from telemetryd.filters import Filters

T = TypeVar("T")

SEARCHED: Final = ("input_summary", "output_summary", "error_summary", "error_details")
"""The fields that are searched."""

_TABLE: Final = "runs_text"
_COLUMNS: Final = ", ".join(SEARCHED)
_TOKENS: Final = "columnsize = 0, tokenize = 'unicode61 remove_diacritics 2'"
_OLD: Final = ", ".join(f"old.{name}" for name in SEARCHED)
_NEW: Final = ", ".join(f"new.{name}" for name in SEARCHED)
_DIFFERS: Final = " OR ".join(f"old.{name} IS NOT new.{name}" for name in SEARCHED)

# The texts stand in agent_runs only; so FTS5 must be told what stood there when a text changes. Triggers do that
# within the statement itself, whichever command it belongs to, and a run without texts costs one comparison.
_OBJECTS: Final = {
    _TABLE: f"""CREATE VIRTUAL TABLE {_TABLE} USING fts5 (
    {_COLUMNS}, content = agent_runs, content_rowid = id, {_TOKENS}
)""",
    f"{_TABLE}_created": f"""CREATE TRIGGER {_TABLE}_created AFTER INSERT ON agent_runs
WHEN coalesce({_NEW}) IS NOT NULL BEGIN
    INSERT INTO {_TABLE} (rowid, {_COLUMNS}) VALUES (new.id, {_NEW});
END""",  # noqa: S608 - our own names
    f"{_TABLE}_changed": f"""CREATE TRIGGER {_TABLE}_changed AFTER UPDATE OF {_COLUMNS} ON agent_runs
WHEN {_DIFFERS} BEGIN
    INSERT INTO {_TABLE} ({_TABLE}, rowid, {_COLUMNS}) SELECT 'delete', old.id, {_OLD}
        WHERE coalesce({_OLD}) IS NOT NULL;
    INSERT INTO {_TABLE} (rowid, {_COLUMNS}) SELECT new.id, {_NEW} WHERE coalesce({_NEW}) IS NOT NULL;
END""",
    f"{_TABLE}_deleted": f"""CREATE TRIGGER {_TABLE}_deleted AFTER DELETE ON agent_runs
WHEN coalesce({_OLD}) IS NOT NULL BEGIN
    INSERT INTO {_TABLE} ({_TABLE}, rowid, {_COLUMNS}) VALUES ('delete', old.id, {_OLD});
END""",  # noqa: S608 - our own names
}  # fmt: skip
"""The table and its triggers, which make it complete; they are made last."""

FIRST_RUN: Final = -(2**63)
"""Behind which the first slice begins."""
_SLICE: Final = 10_000
_END_OF_SLICE: Final = "SELECT max(id) FROM (SELECT id FROM agent_runs WHERE id > ? ORDER BY id LIMIT ?)"
_INDEX: Final = f"""
    INSERT INTO {_TABLE} (rowid, {_COLUMNS})
    SELECT id, {_COLUMNS} FROM agent_runs WHERE id > ? AND id <= ? AND coalesce({_COLUMNS}) IS NOT NULL ORDER BY id
"""  # noqa: S608 - our own words

_INDEX_AGAIN: Final = (
    f"CREATE VIRTUAL TABLE temp.text_again USING fts5 ({_COLUMNS}, content = '', {_TOKENS})",
    f"INSERT INTO temp.text_again (rowid, {_COLUMNS}) SELECT id, {_COLUMNS} FROM agent_runs",  # noqa: S608 - our own words
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
    """Tell whether a table or a trigger belongs to the index, in which FTS5 keeps tables of its own."""
    return name == _TABLE or name.startswith(f"{_TABLE}_")


def is_part(kind: str, name: str, sql: str) -> bool:
    """Tell whether an object is a part of the index; a trigger is one only if it says what ours says."""
    return _OBJECTS.get(name) == sql if kind == "trigger" else is_ours(name)


def require(connection: sqlite3.Connection, filters: Filters, schema: str = "main") -> None:
    """Refuse a search for words where there is no index of them.

    Raises:
        InvalidRequestError: if that is so; the sentence names the setting.

    """
    if filters.words is not None and not is_complete(connection, schema):
        raise InvalidRequestError(
            "Invalid q: this daemon keeps no full-text index; to search for words it must be started with "
            "TELEMETRY_FULL_TEXT=true"
        )


def is_there(connection: sqlite3.Connection) -> bool:
    """Tell whether a database has any part of the index."""
    return bool(_made(connection))


def is_complete(connection: sqlite3.Connection, schema: str = "main") -> bool:
    """Tell whether a database has the whole index, so that it follows every change."""
    return _made(connection, schema) == _OBJECTS


def _made(connection: sqlite3.Connection, schema: str = "main") -> dict[str, str]:
    names = ", ".join("?" * len(_OBJECTS))
    made = f"SELECT name, sql FROM {schema}.sqlite_master WHERE name IN ({names})"  # noqa: S608 - our own word, places
    return dict(connection.execute(made, [*_OBJECTS]))


def drop(connection: sqlite3.Connection) -> None:
    """Drop whatever there is of the index."""
    made = _made(connection)
    for name in reversed(_OBJECTS):
        if name in made:
            connection.execute(f"DROP {'TABLE' if name == _TABLE else 'TRIGGER'} {name}")


def begin(connection: sqlite3.Connection) -> None:
    """Make an empty index that does not follow changes yet, in the place of what there is."""
    drop(connection)
    connection.execute(_OBJECTS[_TABLE])


def index_slice(connection: sqlite3.Connection, after: int) -> int | None:
    """Index the next runs behind a row number; return the last one's, or None if there are none."""
    end: int | None = connection.execute(_END_OF_SLICE, (after, _SLICE)).fetchone()[0]
    if end is not None:
        connection.execute(_INDEX, (after, end))
    return end


def finish(connection: sqlite3.Connection) -> None:
    """Let an index that holds every run follow the changes from now on."""
    for name, sql in _OBJECTS.items():
        if name != _TABLE:
            connection.execute(sql)


def rebuild(connection: sqlite3.Connection) -> None:
    """Make the whole index anew, inside the caller's transaction."""
    begin(connection)
    last: int | None = FIRST_RUN
    while last is not None:
        last = index_slice(connection, last)
    finish(connection)


def at_once(connection: sqlite3.Connection, step: Callable[[sqlite3.Connection], T]) -> T:
    """Do one step in a transaction of its own."""
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
    """Count the words whose number of runs or places differs from what the runs say; 0 if there is no index.

    The texts are indexed again for that, in temporary tables.
    """
    if not is_there(connection):
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
