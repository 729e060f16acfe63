"""A database on PostgreSQL as one side of a move: read as one snapshot, or filled in one transaction."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Final

import psycopg
from psycopg import sql

from telemetryd.engine.moving import BIG, STATS, TABLES, Drawn, Fetch, Row, Table, Watch
from telemetryd.engine.postgres import opening, schema
from telemetryd.engine.postgres.connection import Plain, Target, connect_plainly, first_line, refusing, writing_session
from telemetryd.engine.postgres.groups import transact
from telemetryd.engine.postgres.schema import CLASS, COMMITS, LEADING
from telemetryd.engine.postgres.statements import deltas
from telemetryd.engine.postgres.statements.numbers import NEWEST
from telemetryd.errors import DatabaseError
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.settings import Settings

_TRY: Final = "SELECT pg_try_advisory_lock(%s, %s)"
_WHO: Final = """
    SELECT min(application_name) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND application_name ~ '^telemetryd/.*/(writer|move)$'
"""
_DRAWN: Final = f"""
    SELECT {NEWEST}, greatest(
        (SELECT coalesce(max(id), 0) FROM run_events), (SELECT last_value FROM event_numbers WHERE is_called)
    )
"""
_OURS: Final = """
    SELECT relname FROM pg_class
    WHERE relnamespace = %s::regnamespace AND relkind = 'r' AND relname = ANY (%s) ORDER BY relname
"""
_INDEXES: Final = """
    SELECT c.relname, pg_get_indexdef(i.indexrelid) FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_class AS t ON t.oid = i.indrelid
    WHERE t.relnamespace = %s::regnamespace AND t.relname = ANY (%s) AND NOT i.indisprimary ORDER BY c.relname
"""
_LABELS: Final = """
    INSERT INTO run_labels (key, value, created, run)
    SELECT label.key, label.value #>> '{}', created_at, id FROM agent_runs, json_each(labels) AS label
    WHERE labels IS NOT NULL AND json_typeof(label.value) = 'string' ON CONFLICT DO NOTHING
"""
_ADVANCE: Final = "SELECT setval(%s, %s)"
_ADVANCE_DELIVERIES: Final = """
    SELECT setval(pg_get_serial_sequence('alert_deliveries', 'number'), max(number))
    FROM alert_deliveries HAVING max(number) > 0
"""
_LARGE: Final = frozenset({"agent_runs", "run_events"})
"""Tables whose indexes are made when they are filled: to sort once is faster."""
_MEMORY: Final = "256MB"
_PATIENCE_S: Final = 5.0
"""For so long a session that has just been ended may still be there."""
_PAUSE_S: Final = 0.1


class Database:
    """A database that nobody else writes to, through a connection in a transaction."""

    def __init__(self, plain: Plain, target: Target) -> None:
        self._plain = plain
        self._target = target
        self._indexes: list[str] = []
        self._numbers = itertools.count()

    @property
    def name(self) -> str:
        """How messages call it."""
        return self._target.name

    def count(self) -> int:
        """Return how many runs it has."""
        with refusing(self._target):
            return int(self._plain.execute("SELECT count(*) FROM agent_runs").fetchall()[0][0])

    def drawn(self) -> Drawn:
        """Return which numbers were drawn last."""
        with refusing(self._target):
            return Drawn(*self._plain.execute(_DRAWN).fetchall()[0])

    @contextmanager
    def reading(self, table: Table) -> Iterator[Fetch]:
        """Read a table in the order of its key, inside the block."""
        columns = [f"{name}::text" if table is STATS and name in BIG else name for name in table.columns]
        statement = f"SELECT {', '.join(columns)} FROM {table.name} ORDER BY {', '.join(table.key)}"
        with refusing(self._target), self._plain.cursor(f"moving_{next(self._numbers)}") as cursor:
            cursor.execute(statement.encode())

            def fetch(most: int) -> Sequence[Row]:
                with refusing(self._target):
                    return cursor.fetchmany(most)

            yield fetch

    # --- Filling it ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make ready for what comes: the tables are empty, and the large ones have no indexes.

        Raises:
            DatabaseError: if anything is in them.

        """
        if _is_filled(self._plain):
            raise DatabaseError(f"{self.name} holds something already; give the move a database without runs")
        tables = [table for step in schema.steps() for table in step.tables]
        place = f'"{self._target.schema}"'
        names = [sql.Identifier(name) for (name,) in self._plain.execute(_OURS, (place, tables))]
        self._plain.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(names)))
        self._plain.execute("ALTER TABLE agent_runs DISABLE TRIGGER USER")  # labels are indexed at once
        for name, statement in self._plain.execute(_INDEXES, (place, [*_LARGE])).fetchall():
            self._plain.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(name)))
            self._indexes.append(statement)

    def store(self, table: Table, slices: Iterator[Sequence[Row]]) -> None:
        """Store all rows of a table (see `Target.store`)."""
        copying = f"COPY {table.name} ({', '.join(table.columns)}) FROM STDIN (FREEZE)"
        try:
            with refusing(self._target), self._plain.cursor() as cursor, cursor.copy(copying.encode()) as copy:
                for rows in slices:
                    for row in rows:
                        copy.write_row(row)
        except DatabaseError as error:
            if isinstance(error.__cause__, psycopg.DataError | psycopg.IntegrityError):
                raise DatabaseError(
                    f"{self.name} does not take a row of {table.name}: {first_line(error.__cause__)}; "
                    "telemetryd check --repair replaces what no request could bring"
                ) from error
            raise

    def complete(self, drawn: Drawn, watch: Watch) -> None:
        """Make what is counted and indexed (see `Target.complete`)."""
        with refusing(self._target):
            for number, statement in enumerate(self._indexes):
                watch("Making indexes", number, len(self._indexes))
                self._plain.execute(statement.encode())
            watch("Making indexes", len(self._indexes), len(self._indexes))
            self._plain.execute("ALTER TABLE agent_runs ENABLE TRIGGER USER")
            for number, name in ((drawn.number, "numbers"), (drawn.event, "event_numbers")):
                if number:
                    self._plain.execute(_ADVANCE, (name, number))
            self._plain.execute(_ADVANCE_DELIVERIES)
            watch("Counting", 0, 2)
            self._plain.execute(_LABELS)
            schema.derive(self._plain)
            watch("Counting", 1, 2)
            self._plain.execute("ANALYZE")
            watch("Counting", 2, 2)


def _own(plain: Plain, target: Target) -> None:
    """Keep others from leading and from committing until the session ends.

    Raises:
        DatabaseError: if a daemon serves the database, or another command writes to it.

    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        ((who,),) = plain.execute(_WHO).fetchall()
        are_ours = [plain.execute(_TRY, (CLASS, lock)).fetchall()[0][0] for lock in (LEADING, COMMITS)]
        if who is None and all(are_ours):
            return
        if time.monotonic() > deadline:
            raise DatabaseError(
                f"{target.name} is in use by {who or 'a daemon'}; stop every daemon on it first, or let telemetryd "
                "follow keep a copy in step"
            )
        time.sleep(_PAUSE_S)


@contextmanager
def _session(settings: Settings) -> Iterator[tuple[Plain, Target]]:
    target = Target.of(settings)
    # A slice of the other side may take long.
    values = {**writing_session(target), "idle_in_transaction_session_timeout": "0", "maintenance_work_mem": _MEMORY}
    with closing(connect_plainly(target, "move", values)) as plain, refusing(target):
        opening.look(plain, target)
        _own(plain, target)
        yield plain, target


@contextmanager
def reading(settings: Settings) -> Iterator[Database]:
    """Read a database as one snapshot, inside the block, while no daemon serves it.

    Raises:
        DatabaseError: if there is none of this version, or a daemon serves it.

    """
    with _session(settings) as (plain, target):
        schema.check(plain, target)
        while transact(plain, deltas.fold):
            pass
        plain.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield Database(plain, target)
        plain.execute("ROLLBACK")


def is_filled(settings: Settings) -> bool:
    """Return whether there is anything in a database that a move would have to replace.

    Raises:
        DatabaseError: if it cannot be used.

    """
    with _session(settings) as (plain, target):
        if schema.version_of(plain, target) == 0:
            return False
        schema.check(plain, target)
        return _is_filled(plain)


def _is_filled(plain: Plain) -> bool:
    asked = (f"EXISTS (SELECT 1 FROM {table.name})" for table in TABLES if table.name not in _OF_A_START)
    return bool(plain.execute(f"SELECT {' OR '.join(asked)}".encode()).fetchall()[0][0])


_OF_A_START: Final = frozenset({"change_feed", "trusted_clock"})
"""What a database holds that was started once."""


@contextmanager
def making(settings: Settings) -> Iterator[Database]:
    """Fill a database in one transaction, which is committed at the end of the block.

    Raises:
        DatabaseError: if that is not possible; it is as before.

    """
    with _session(settings) as (plain, target):
        plain.execute("BEGIN")
        schema.run_steps(plain, target, format_timestamp(utc_now()), None)
        schema.check(plain, target)
        database = Database(plain, target)
        database.prepare()
        yield database
        plain.execute("COMMIT")
