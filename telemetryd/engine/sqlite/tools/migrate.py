"""Creates the current schema step by step, and detects whether a database has it."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.connection import quoted
from telemetryd.engine.sqlite.files import APPLICATION_ID, FileState, Kind
from telemetryd.errors import DatabaseError
from telemetryd.model.runs import COLUMNS

_STEP_NAME: Final = re.compile(r"(\d{4})_(\w+)\.sql")

INSERT_RUN: Final = f"INSERT INTO agent_runs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
INSERT_ORIGINAL: Final = "INSERT OR IGNORE INTO unconverted_values (run, field, reason, original) VALUES (?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Step:
    """One file of `migrations/`."""

    version: int
    description: str
    sql: str

    def statements(self) -> Iterator[str]:
        """Yield the file's statements one by one (sqlite3's `executescript` would commit in between)."""
        statement = ""
        for line in self.sql.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                yield statement
                statement = ""
        if re.sub(r"--.*", "", statement).strip():
            raise ValueError(f"migration {self.version} ends in an unfinished statement")

    def names(self, kind: str) -> list[str]:
        """Return the names that the step gives to objects of a kind (`TABLE` or `INDEX`), if only until its end."""
        return re.findall(rf"^(?:CREATE (?:UNIQUE )?{kind}|ALTER {kind} \w+ RENAME TO) (\w+)", self.sql, re.MULTILINE)


@cache
def steps() -> tuple[Step, ...]:
    """Return every step, oldest first."""
    found = []
    for file in resources.files("telemetryd.migrations").iterdir():
        if match := _STEP_NAME.fullmatch(file.name):
            found.append(Step(int(match[1]), match[2].replace("_", " "), file.read_text("utf-8")))
    return tuple(sorted(found, key=lambda step: step.version))


def current_version() -> int:
    """Return the schema version that this telemetryd writes."""
    return steps()[-1].version


def claimed(after: int, kind: str = "TABLE") -> tuple[str, ...]:
    """Return the names of the tables (or indexes) that are needed after a version and not before."""
    first: dict[str, int] = {}
    for step in steps():
        for name in step.names(kind):
            first.setdefault(name, step.version)  # a later step may make one anew
    return tuple(name for name, version in first.items() if version > after)


def aside(name: str) -> str:
    """Return the name under which another program's table is kept when the schema needs its name."""
    return f"legacy_{name}"


def refuse_unless_usable(path: Path, state: FileState) -> None:
    """Stop before anything is written to a database that this telemetryd cannot serve.

    Raises:
        DatabaseError: with one sentence that says what was found and which command to run.

    """
    newest = current_version()
    if state.kind is Kind.FOREIGN:
        raise DatabaseError(
            f"{path} is a SQLite database of another program (it has no table agent_runs); "
            "point TELEMETRY_DB_PATH at another file"
        )
    if state.kind is Kind.LEGACY or (state.kind is Kind.OURS and state.version < newest):
        found = f"schema version {state.version}" if state.version else "an older schema"
        raise DatabaseError(
            f"{path} has {found}, this telemetryd needs {newest}; nothing was changed: run telemetryd migrate"
        )
    if state.kind is Kind.OURS and state.version > newest:
        raise DatabaseError(
            f"{path} has schema version {state.version}, this telemetryd knows only {newest}; "
            "nothing was changed: install the newer telemetryd"
        )


def create(connection: sqlite3.Connection, now: str) -> None:
    """Bring an empty database to the current schema, in one transaction."""
    connection.execute("BEGIN EXCLUSIVE")
    try:
        run_steps(connection, now, after=0)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def run_steps(connection: sqlite3.Connection, now: str, *, after: int) -> None:
    """Run every step after a version, inside the caller's transaction, and record them."""
    for step in steps():
        if step.version > after:
            for statement in step.statements():
                connection.execute(statement)
            connection.execute(
                "INSERT INTO schema_migrations (version, description, applied_at) VALUES (?, ?, ?)",
                (step.version, step.description, now),
            )
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {current_version()}")


def derive(connection: sqlite3.Connection) -> None:
    """Run what the steps derive from the runs once more, inside the caller's transaction, into empty tables.

    A migration that brings the runs along later, and a repair, need it: in the step itself there were none yet.
    """
    for step in steps():
        for statement in step.statements():
            if re.search(r"^INSERT INTO.*\bFROM agent_runs\b", statement, re.MULTILINE | re.DOTALL):
                connection.execute(statement)


def drop_indexes(connection: sqlite3.Connection, but: Container[str] = ()) -> list[str]:
    """Drop the indexes of the runs while many are copied, and return how to make them: sorting once is faster."""
    found = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'agent_runs' AND sql IS NOT NULL"
    ).fetchall()
    dropped = [(name, sql) for name, sql in found if name not in but]
    for name, _ in dropped:
        connection.execute(f"DROP INDEX {quoted(name)}")
    return [sql for _, sql in dropped]


def schema_of(connection: sqlite3.Connection) -> dict[str, str]:
    """Return the objects of a database by name, but SQLite's own, each with the statement that made it.

    Tables come first, then indexes and triggers, so that they can be made again in this order.
    """
    return dict(
        connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT GLOB 'sqlite_*' "
            "ORDER BY type = 'trigger', type DESC, name"
        )
    )


@cache
def expected_schema() -> dict[str, str]:
    """Return the current schema as a fresh database has it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        create(connection, "")
        return schema_of(connection)
    finally:
        connection.close()


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Compare a database's schema with the expected one; tables and indexes of the user's own are allowed.

    Raises:
        DatabaseError: naming every table and index that is missing or different.

    """
    actual = schema_of(connection)
    wrong = [name for name, sql in expected_schema().items() if actual.get(name) != sql]
    if wrong:
        raise DatabaseError(
            f"The schema of {path} is not that of version {current_version()}: missing or different are "
            f"{', '.join(wrong)}; nothing was changed: restore a backup, or re-create them as in schema/telemetry.sql"
        )
