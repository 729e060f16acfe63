"""The only door to the data: submit a command, fetch the answer to a query, tell the health, close."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import overload

from telemetryd import migrate, statements
from telemetryd.commands import (
    Command,
    Created,
    CreateRuns,
    Outcome,
    Pruned,
    PruneRuns,
    Reaped,
    ReapRuns,
    Updated,
    UpdateRun,
)
from telemetryd.database import (
    Connection,
    Modes,
    Ownership,
    check_quickly,
    identify,
    inspect_before_opening,
    is_unfinished,
    looking,
    open_writer,
    prepare_directory,
    sync_directory,
)
from telemetryd.database import Kind as FileKind
from telemetryd.errors import DatabaseError
from telemetryd.metrics import Metrics
from telemetryd.queries import CountPrunable, CountRuns, Counts, CountStale, GetRun, ListRuns, Page
from telemetryd.reader import Readers
from telemetryd.runs import Row, format_timestamp, utc_now
from telemetryd.settings import Settings
from telemetryd.writer import Writer


@dataclass(frozen=True, slots=True)
class Health:
    """How the database is; `problem` is None while it is well."""

    path: Path
    modes: Modes
    durable: bool
    queue_depth: int
    problem: str | None
    groups: int
    """Groups that the writer has finished; while it is not idle, a number that stands still means it is stuck."""
    idle: bool


class Store:
    """One open database: its lock, its writer, its readers. Make it with `open`."""

    def __init__(
        self,
        settings: Settings,
        *,
        connection: Connection,
        modes: Modes,
        ownership: Ownership,
        readers: Readers,
        metrics: Metrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._path = settings.db_path.absolute()
        self._identity = _identity(self._path)
        self._durable = settings.durable
        self._modes = modes
        self._clock = clock
        self._connection = connection
        self._ownership = ownership
        self._readers = readers
        self._writer: Writer[Command, Outcome] = Writer(
            connection,
            begin=statements.Transaction,
            clock=lambda: format_timestamp(clock()),
            make_durable=self._check_place,
            queue_max=settings.queue_max,
            metrics=metrics,
        )
        self.writing = asyncio.create_task(self._writer.run(), name="writer")
        """The writer's task; it ends only after `close`, or with the error that killed it."""

    @classmethod
    async def open(cls, settings: Settings, metrics: Metrics, clock: Callable[[], datetime] = utc_now) -> Store:
        """Take the lock, look at the file, make the schema if it is new, and open the connections.

        Raises:
            DatabaseError: if the file is not, or not yet, a database of this version. Nothing is written then.
            DatabaseOwnedError: if another process owns it.

        """
        path = settings.db_path.absolute()
        prepare_directory(path)
        async with contextlib.AsyncExitStack() as undo:
            ownership = Ownership(path, settings.lock_file)
            ownership.acquire()
            undo.callback(ownership.release)
            state = inspect_before_opening(path)
            migrate.refuse_unless_usable(path, state)
            if state.kind is FileKind.OURS:
                check_quickly(path)
                if not is_unfinished(path):
                    with looking(path) as plain:
                        migrate.check_schema(plain, path)  # before opening may change the journal mode in the file
            connection, modes = await open_writer(
                path, settings.db_journal_mode, settings.db_synchronous, settings.db_busy_timeout_ms
            )
            undo.push_async_callback(connection.close)
            try:
                state = await connection.run(identify)  # again: opening has undone what was cut off
                migrate.refuse_unless_usable(path, state)
                if state.kind is not FileKind.OURS:
                    await connection.run(lambda plain: migrate.create(plain, format_timestamp(clock())))
                    sync_directory(path.resolve().parent)
                await connection.run(lambda plain: migrate.check_schema(plain, path))
                readers = await Readers.open(
                    path, settings.db_readers, settings.query_timeout_s, settings.db_busy_timeout_ms
                )
            except (sqlite3.Error, OSError) as error:
                raise DatabaseError(f"Cannot use {path}: {error}") from error
            undo.pop_all()
        return cls(
            settings,
            connection=connection,
            modes=modes,
            ownership=ownership,
            readers=readers,
            metrics=metrics,
            clock=clock,
        )

    def _check_place(self) -> None:
        if (displaced := self._displaced()) is not None:
            raise OSError(displaced)

    def _displaced(self) -> str | None:
        """Say if the database or a lock is not at its place any more, where another owner may find it."""
        if _identity(self._path) != self._identity:
            return f"The database file {self._path} was deleted or replaced while in use"
        if (lock := self._ownership.missing()) is not None:
            return f"The lock file {lock} was deleted or replaced while in use; nothing may remove it"
        return None

    @overload
    async def submit(self, command: CreateRuns) -> Created: ...

    @overload
    async def submit(self, command: UpdateRun) -> Updated | None: ...

    @overload
    async def submit(self, command: PruneRuns) -> Pruned: ...

    @overload
    async def submit(self, command: ReapRuns) -> Reaped: ...

    async def submit(self, command: Command) -> Outcome:
        """Queue a change and wait until it is durable; return its outcome.

        Raises:
            UnavailableError: if it was not stored, or may not have been; the same change may be repeated.
            CommandFailedError: if the database refused this change alone.

        """
        return await self._writer.submit(command)

    @overload
    async def fetch(self, query: ListRuns) -> Page: ...

    @overload
    async def fetch(self, query: GetRun) -> Row | None: ...

    @overload
    async def fetch(self, query: CountRuns) -> Counts: ...

    @overload
    async def fetch(self, query: CountPrunable | CountStale) -> int: ...

    async def fetch(
        self, query: ListRuns | GetRun | CountRuns | CountPrunable | CountStale
    ) -> Page | Row | Counts | int | None:
        """Answer a query; it sees every change that was acknowledged before it.

        Raises:
            UnavailableError: if the answer takes too long, or the database cannot be read.

        """
        match query:
            case ListRuns():
                return await self._readers.fetch(lambda plain: statements.fetch_page(plain, query))
            case GetRun():
                return await self._readers.fetch(lambda plain: statements.fetch_run(plain, query))
            case CountRuns():
                now = self._clock()
                day = format_timestamp(now - timedelta(hours=24)), format_timestamp(now)
                return await self._readers.fetch(lambda plain: statements.fetch_counts(plain, *day))
            case CountPrunable():
                return await self._readers.fetch(lambda plain: statements.count_prunable(plain, query))
            case CountStale():
                return await self._readers.fetch(lambda plain: statements.count_stale(plain, query))

    def health(self) -> Health:
        """Tell how the database is, at once: without the queue, a connection, or opening the file."""
        problem = self._writer.problem or self._displaced()
        return Health(
            self._path, self._modes, self._durable, self._writer.depth, problem, self._writer.groups, self._writer.idle
        )

    async def close(self) -> None:
        """Commit what is queued, checkpoint the write-ahead log, close every connection, and give up the lock."""
        await self._writer.stop()
        await asyncio.wait((self.writing,))
        await self._close_connections()
        self._ownership.release()

    async def _close_connections(self) -> None:
        if self._writer.failure is not None:
            # Closed before the readers, it does not checkpoint: after a failed sync nothing must be synced again,
            # because the kernel may have dropped what it could not write, and would report success now.
            await self._connection.close()
            await self._readers.close()
            return
        await self._readers.close()
        if self._modes.journal_mode == "WAL":
            with contextlib.suppress(sqlite3.Error):  # the next start recovers the log just as well
                await self._connection.run(_checkpoint)
        await self._connection.close()


def _checkpoint(plain: sqlite3.Connection) -> None:
    plain.execute("PRAGMA busy_timeout = 0")  # a reader of somebody else's may hold it up, which is no reason to wait
    plain.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
