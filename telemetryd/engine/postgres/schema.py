"""Makes the schema of a database step by step, and detects whether a database has it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

import psycopg
from psycopg import sql

from telemetryd.engine.postgres.connection import Plain, Target, first_line, is_passing
from telemetryd.errors import DatabaseError

_STEP_NAME: Final = re.compile(r"(\d{4})_(\w+)\.sql")
CLASS: Final = 7626853
"""The first half of every advisory lock of ours: so they are nobody else's."""
COMMITS, FOLDING, LEADING, MIGRATING, INDEXING = range(1, 6)
"""The second half, by what the lock is for."""

_ATTEMPTS: Final = 20
_PAUSE_S: Final = 1.0
_MAKE_LIST: Final = """
    CREATE TABLE schema_migrations (
        version integer PRIMARY KEY,
        description text NOT NULL,
        applied_at text COLLATE "C" NOT NULL,
        compatible_from integer NOT NULL
    )
"""
_NOTE: Final = (
    "INSERT INTO schema_migrations (version, description, applied_at, compatible_from) VALUES (%s, %s, %s, %s)"
)
_IS_THERE: Final = "SELECT to_regclass(%s || '.' || %s)"


@dataclass(frozen=True, slots=True)
class Step:
    """One file of `migrations/postgres/`."""

    version: int
    description: str
    sql: str

    @property
    def tables(self) -> list[str]:
        """The names of the tables that it makes."""
        return re.findall(r"^CREATE TABLE (\w+)", self.sql, re.MULTILINE)

    @property
    def compatible_from(self) -> int:
        """The oldest version whose daemons may work on a database with this step."""
        said = re.search(r"^-- Compatible from (\d+)\.$", self.sql, re.MULTILINE)
        return 1 if said is None else int(said[1])


@cache
def steps() -> tuple[Step, ...]:
    """Return every step, oldest first."""
    return tuple(sorted(_found(), key=lambda step: step.version))


def _found() -> Iterator[Step]:
    for file in (resources.files("telemetryd.migrations") / "postgres").iterdir():
        if match := _STEP_NAME.fullmatch(file.name):
            yield Step(int(match[1]), match[2].replace("_", " "), file.read_text("utf-8"))


def current_version() -> int:
    """Return the schema version that this telemetryd writes."""
    return steps()[-1].version


def version_of(plain: Plain, target: Target) -> int:
    """Return the version of a database's schema; 0 if it has none of our tables.

    Raises:
        DatabaseError: if it has another program's.

    """
    if _has(plain, target, "schema_migrations"):
        try:
            found = plain.execute("SELECT max(version) FROM schema_migrations").fetchone()
            plain.execute("SELECT compatible_from FROM schema_migrations LIMIT 0")
        except psycopg.errors.UndefinedColumn:
            raise _foreign(target, "schema_migrations") from None
        return 0 if found is None or found[0] is None else int(found[0])
    for table in steps()[0].tables:
        if _has(plain, target, table):
            raise _foreign(target, table)
    return 0


def _has(plain: Plain, target: Target, table: str) -> bool:
    found = plain.execute(_IS_THERE, (f'"{target.schema}"', table)).fetchone()
    return found is not None and found[0] is not None


def _foreign(target: Target, table: str) -> DatabaseError:
    return DatabaseError(
        f"{target.name} holds another program's table {table} in the schema {target.schema}; "
        "give telemetryd a database of its own, or set TELEMETRY_DB_SCHEMA"
    )


def check(plain: Plain, target: Target) -> None:
    """Stop at a database whose schema this telemetryd cannot use.

    Raises:
        DatabaseError: with one sentence that says what was found and what to do.

    """
    version, newest = version_of(plain, target), current_version()
    if version == 0:
        raise DatabaseError(f"{target.name} has no tables of telemetryd in the schema {target.schema}")
    if version < newest:
        raise DatabaseError(
            f"{target.name} has schema version {version}, this telemetryd needs {newest}; nothing was changed: "
            "run telemetryd migrate"
        )
    if version > newest:
        (compatible,) = plain.execute("SELECT max(compatible_from) FROM schema_migrations").fetchone() or (0,)
        if compatible > newest:
            raise DatabaseError(
                f"{target.name} has schema version {version}, this telemetryd knows only {newest}; "
                "nothing was changed: install the newer telemetryd"
            )


def make(plain: Plain, target: Target, now: str, *, count_anew: Callable[[Plain], None] | None) -> None:
    """Bring a database to the current schema; of several processes that try, one does it, and the others wait.

    Args:
        plain: a connection in no transaction.
        target: the database.
        now: when that is.
        count_anew: counts everything in the transaction that brings an older schema up to date, because what is counted
            may have changed; None leaves an older schema as it is. An empty database gets the current one in any case.

    Raises:
        DatabaseError: if that is not possible.

    """
    for attempt in range(_ATTEMPTS):
        try:
            with plain.transaction():
                plain.execute("SET LOCAL lock_timeout = '3s'")
                _run_steps(plain, target, now, count_anew)
        except psycopg.errors.InsufficientPrivilege as error:
            raise DatabaseError(
                f"The user of {target.name} may not make the tables there: {first_line(error)}; grant it CREATE on the "
                f"schema {target.schema}"
            ) from None
        except psycopg.Error as error:
            if not is_passing(error) or attempt == _ATTEMPTS - 1:
                raise DatabaseError(f"Cannot make the tables in {target.name}: {first_line(error)}") from None
            time.sleep(_PAUSE_S)
        else:
            return


def _run_steps(plain: Plain, target: Target, now: str, count_anew: Callable[[Plain], None] | None) -> None:
    plain.execute("SELECT pg_advisory_xact_lock(%s, %s)", (CLASS, MIGRATING))
    version = version_of(plain, target)
    if version >= current_version() or (version > 0 and count_anew is None):
        return
    if version == 0:
        found = plain.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (target.schema,)).fetchone()
        if found is None:
            plain.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(target.schema)))
        plain.execute(_MAKE_LIST)
    for step in steps():
        if step.version > version:
            plain.execute(step.sql.encode())
            plain.execute(_NOTE, (step.version, step.description, now, step.compatible_from))
    if version > 0 and count_anew is not None:
        count_anew(plain)
