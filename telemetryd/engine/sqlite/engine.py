"""The SQLite engine: one write connection, a pool of readers, and the files under them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar

from telemetryd.engine.interface import BackupMade, Copy, Engine, EngineHealth, Introduction
from telemetryd.engine.lanes import Lane
from telemetryd.engine.sqlite.connection import (
    LOG_BYTES,
    bytes_not_written_back,
    checkpoint_passively,
    connect_to_read,
    empty_log,
    quick_check,
)
from telemetryd.engine.sqlite.disk import Disk, LogWatch, Look
from telemetryd.engine.sqlite.exports import Exports
from telemetryd.engine.sqlite.files import forget_cached, is_unfinished, prepare_directory, refuse_hard_links, wal_bytes
from telemetryd.engine.sqlite.groups import Groups, Outcome, translated
from telemetryd.engine.sqlite.opening import Opened, check_schema, identity_of, keep_full_text
from telemetryd.engine.sqlite.ownership import Ownership, refuse_other_name
from telemetryd.engine.sqlite.readers import Readers
from telemetryd.engine.sqlite.recount import Recount
from telemetryd.engine.sqlite.statements.answers import REGISTRY
from telemetryd.engine.sqlite.tools import backup, migrate
from telemetryd.errors import DatabaseBusyError, DatabaseError, DatabaseSuspectError, UnavailableError, sentence
from telemetryd.model.changes import Changes, ListChanges
from telemetryd.model.chores import Chore
from telemetryd.model.commands import ApplyChanges, Command, DeleteRun, RedactRun
from telemetryd.model.queries import ExportRuns, Query
from telemetryd.model.values import format_timestamp
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.ops.mounts import is_mount_point, network_file_system
from telemetryd.settings import Settings

A = TypeVar("A")

REGISTRY.load()


async def open_sqlite(
    settings: Settings, metrics: Metrics, clock: Callable[[], datetime], *, full_text: bool | None
) -> Engine:
    """Take the lock, look at the file, make the schema if it is new, and open the connections (see `open_engine`).

    Raises:
        DatabaseError: if the file is not, or not yet, a database of this version. Nothing is written then.
        DatabaseOwnedError: if another process owns it.

    """
    path = settings.db_path.absolute()
    prepare_directory(path)
    refuse_hard_links(path)  # whose message says more than that of a lock
    async with contextlib.AsyncExitStack() as undo:
        was_empty = path.is_file() and path.stat().st_size == 0  # before we make it so
        ownership = Ownership(path, settings.lock_file)
        ownership.acquire(create=True)
        undo.callback(ownership.release)
        was_cut_off = is_unfinished(path)
        after_crash = ownership.was_dropped or was_cut_off
        was_changed = ownership.was_changed  # before we change it: opening may set another journal mode
        opened = await Opened.open(settings, clock, may_create=True, after_crash=after_crash)
        undo.push_async_callback(opened.close)
        if full_text is not None:
            await keep_full_text(opened.connection, path, wanted=full_text)
        recount = Recount(partial(check_schema, path=path), clock)
        await opened.connection.run(recount.start)
        if after_crash:
            await opened.connection.run(recount.compare_anyway)
        elif was_changed:
            recount.notice()
        undo.pop_all()
    if was_empty and not was_cut_off:
        log.warning("The database file was empty: a new database is made in it", extra={"db_path": str(path)})
    database = _Database(settings, opened=opened, ownership=ownership, recount=recount, metrics=metrics, clock=clock)
    await database.disk.look()
    return Engine(Writing(database), Reading(database, settings))


def holder(settings: Settings) -> str | None:
    """Return the PID of the process that owns the database, or None; nothing is taken or made."""
    return Ownership(settings.db_path.absolute(), settings.lock_file).holder()


async def open_sqlite_read_only(settings: Settings) -> Neighbour:
    """Open a database next to the daemon that owns it.

    Raises:
        DatabaseError: if it cannot be read, or is not of this version.

    """
    path = settings.db_path.absolute()
    refuse_other_name(path)
    try:
        connection = connect_to_read(path)
    except sqlite3.Error as error:
        raise DatabaseError(f"Cannot read {path}: {error}") from error
    try:
        migrate.check_schema(connection, path)
    except BaseException:
        connection.close()
        raise
    return Neighbour(connection, settings)


class Neighbour:
    """A database that another process owns, read through one connection (`QueryingEngine`)."""

    def __init__(self, connection: sqlite3.Connection, settings: Settings) -> None:
        self._connection = connection
        self._path = settings.db_path.absolute()

    async def read(self, query: Query[A]) -> A:
        """Answer a query, however long that takes: nobody else waits for it."""
        try:
            return REGISTRY.answer(self._connection, query)
        except sqlite3.Error as error:
            raise DatabaseError(f"Cannot read {self._path}: {error}") from error

    async def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class _Database:
    """What both halves stand on: the lock, the files, and what is open on them."""

    def __init__(
        self,
        settings: Settings,
        *,
        opened: Opened,
        ownership: Ownership,
        recount: Recount,
        metrics: Metrics,
        clock: Callable[[], datetime],
    ) -> None:
        self.settings = settings
        self.path = settings.db_path.absolute()
        self.clock = clock
        self.modes = opened.modes
        self.disk = Disk(self._take_look, settings.min_free_mb << 20, metrics)
        self.opened: Opened | None = opened
        self.recount = recount
        self.groups = Groups(recount.begin, lambda: format_timestamp(clock()), self._confirm)
        self.suspicion: DatabaseSuspectError | None = None
        """Why it is unknown what the disk holds, until the database is open again; else None."""
        self.idle = True
        """Whether no group is written."""
        self.changed: Callable[[], None] = lambda: None
        self._identity = ownership.identity
        self._ownership = ownership
        self._recounting = asyncio.create_task(recount.run(self, self._notify), name="recount")
        self._recounting.add_done_callback(_tell_of_its_death)

    def _notify(self) -> None:
        self.changed()

    def readers(self) -> Readers:
        """Return the readers.

        Raises:
            UnavailableError: while the database is opened again.

        """
        if self.opened is None:
            raise UnavailableError("The database is being opened again; try again shortly")
        return self.opened.readers

    @property
    def is_read(self) -> bool:
        """Whether one of the readers is at work."""
        return self.opened is not None and self.opened.readers.are_at_work

    def measure_log(self) -> asyncio.Future[int] | None:
        """Ask the write connection how much of its log could not be written back, if it can be asked now."""
        if self.opened is None:
            return None
        with contextlib.suppress(ValueError):  # it is being closed
            return self.opened.connection.start(bytes_not_written_back)
        return None

    def _take_look(self) -> Look:
        return Look(shutil.disk_usage(self.path.parent).free, wal_bytes(self.path), self.displaced())

    def _confirm(self) -> None:
        """Take note of a commit; raise OSError if a file is not where the next owner will look for it."""
        self.recount.confirm()
        if (displaced := self.displaced()) is not None:
            raise OSError(displaced)

    def _misplaced(self) -> str | None:
        if identity_of(self.path) == self._identity:
            return None
        return (
            f"The database file {self.path} was deleted or replaced while in use; put it back, "
            "or restart telemetryd to go on with what is there"
        )

    def displaced(self) -> str | None:
        """Say if the database, its log or a lock is not at its place any more, where another owner may find it."""
        if (misplaced := self._misplaced()) is not None:
            return misplaced
        opened = self.opened  # which may change meanwhile: the look at the disk is taken in a thread
        if opened is not None and (lost := opened.lost_log()) is not None:
            return f"The file {lost} was deleted or replaced while in use; it is part of the database"
        if (lock := self._ownership.missing()) is not None:
            return f"The lock file {lock} was deleted or replaced while in use; nothing may remove it"
        return None

    def suspect(self, error: DatabaseSuspectError) -> None:
        """Change nothing more until the database is open again."""
        self.suspicion = self.suspicion or error

    async def between_groups(self, work: Callable[[sqlite3.Connection], A]) -> A:
        """Do something in a separate transaction, as soon as the present group is committed.

        Raises:
            UnavailableError: if that is not possible now; nothing was changed then.

        """
        return await self.visit(lambda plain: self.groups.transact(plain, work))

    async def ask(self, question: Callable[[sqlite3.Connection], A]) -> A:
        """Ask the write connection something, in no transaction, as soon as no group holds it.

        Raises:
            UnavailableError: if that is not possible now.

        """

        def asked(plain: sqlite3.Connection) -> A:
            with translated(plain):
                return question(plain)

        return await self.visit(asked)

    async def visit(self, visit: Callable[[sqlite3.Connection], A]) -> A:
        """Run a function in the write connection's thread.

        Raises:
            UnavailableError: if that is not possible now, or the function raises it.

        """
        if self.suspicion is not None or self.opened is None:
            raise DatabaseSuspectError
        try:
            answer = self.opened.connection.start(visit)
        except ValueError as error:  # it is being closed
            raise DatabaseSuspectError from error
        try:
            return await answer
        except DatabaseSuspectError as error:
            self.suspect(error)
            raise

    async def reopen(self) -> None:
        """Close everything, let SQLite recover, and verify the whole file as the disk holds it.

        As long as the database file is not at its place, everything stays open: that may be the only way to it.

        Raises:
            DatabaseError: if the database is missing, belongs to another program, cannot be opened, or is damaged.

        """
        if (misplaced := self._misplaced()) is not None:
            raise DatabaseError(misplaced)
        try:
            if self.opened is not None:
                opened, self.opened = self.opened, None
                # A log whose name is gone is written back, or what stands only there would be lost.
                await (opened.drop() if opened.lost_log() is None else opened.close())
            self._ownership.take_again()
            forget_cached(self.path)
            self.opened = opened = await Opened.open(self.settings, self.clock, may_create=False, after_crash=False)
            await opened.connection.run(self.recount.start)
            await opened.connection.run(lambda plain: quick_check(plain, self.path))
            self.disk.forget_displaced()
            self.suspicion = None
        except (OSError, sqlite3.Error, MemoryError) as error:
            raise DatabaseError(f"Cannot use {self.path}: {sentence(error)}") from error

    async def close(self, *, is_clean: bool) -> None:
        """Close every connection, and give up the lock."""
        self._recounting.cancel()
        await asyncio.wait((self._recounting,))
        if self.opened is not None:
            await (self.opened.close() if is_clean else self.opened.drop())
        if is_clean:
            self._ownership.mark_clean()
        self._ownership.release()


def _tell_of_its_death(recounting: asyncio.Task[None]) -> None:
    if not recounting.cancelled():
        log.critical(
            "Commits of other programs are not noticed any more, until a restart", exc_info=recounting.exception()
        )


class Writing:
    """The half that changes the database (`WritingEngine`)."""

    def __init__(self, database: _Database) -> None:
        self._database = database
        self._log_holds_removed = False
        """Whether the write-ahead log may hold what was removed for good."""

    async def write(self, commands: Sequence[Command[Any]]) -> list[Outcome]:
        """Carry out a group in one hop into the connection's thread (see `WritingEngine.write`)."""
        self._database.idle = False
        self._log_holds_removed |= any(isinstance(each, DeleteRun | RedactRun | ApplyChanges) for each in commands)
        try:
            return await self._database.visit(lambda plain: self._database.groups.write(plain, commands))
        finally:
            self._database.idle = True

    async def tidy_up(self) -> None:
        """Write the write-ahead log back as far as no reader needs it; after a removal, empty it.

        Raises:
            DatabaseBusyError: if a reader keeps it from being emptied.

        """
        if self._database.modes.journal_mode != "WAL":
            return
        if self._log_holds_removed:
            if not await self._database.ask(empty_log):
                raise DatabaseBusyError
            self._log_holds_removed = False
        else:
            await self._database.ask(checkpoint_passively)

    async def reopen(self) -> None:
        """Open the database again, and verify it (see `WritingEngine.reopen`)."""
        await self._database.reopen()

    def interrupt(self) -> None:
        """End what the connection is doing, such as verifying a large file."""
        if self._database.opened is not None:
            self._database.opened.connection.interrupt_now()

    async def close(self, *, is_clean: bool) -> None:
        """Close the database for good."""
        await self._database.close(is_clean=is_clean)


class Reading:
    """The half that all parts may use (`ReadingEngine`): its connections cannot write."""

    is_shared: Final = False

    def __init__(self, database: _Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._disk = database.disk
        self._path = database.path
        self._modes = database.modes
        self._exports = Exports(settings)
        self._log = LogWatch(2 * LOG_BYTES, database.measure_log, self._is_reading)

    def leads(self, chore: Chore) -> bool:
        """Return True: nobody else serves a file."""
        return True

    def resign(self, chore: Chore) -> None:
        """Do nothing: there is nobody to leave it to."""

    def _readers(self) -> Readers:
        return self._database.readers()

    def _is_reading(self) -> bool:
        return self._exports.are_running or self._database.is_read

    async def read(self, query: Query[A]) -> A:
        """Answer a query in a reader's thread (see `ReadingEngine.read`)."""
        lane = Lane.LONG if REGISTRY.is_long(query) else Lane.QUICK
        return await self._readers().fetch(partial(REGISTRY.answer, query=query), lane)

    async def read_news(self, query: ListChanges) -> Changes:
        """Answer a query of the feed through the reader that is there for it alone."""
        return await self._readers().fetch(partial(REGISTRY.answer, query=query), Lane.FEED)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call a function when counts were corrected, or numbers forgotten."""
        self._database.changed = changed

    def export(self, query: ExportRuns) -> AbstractAsyncContextManager[Copy]:
        """Copy what is asked for (see `ReadingEngine.export`)."""
        return self._exports.open(query)

    async def back_up(self, now: datetime, *, compress: bool = True) -> BackupMade:
        """Make a verified backup (see `ReadingEngine.back_up`)."""
        return await backup.make(self._settings, now, compress=compress)

    async def look(self) -> DatabaseSuspectError | None:
        """Look at the disk, and at the size of the write-ahead log."""
        await self._disk.look()
        self._log.look(self._disk.last.wal_bytes)
        # Asked again, because the database may have been opened again during the look.
        if self._disk.last.displaced is not None and (displaced := self._database.displaced()) is not None:
            self._database.suspect(DatabaseSuspectError(displaced))
        return self._database.suspicion

    def check_room(self) -> None:
        """Raise LowDiskError while there is less room than the reserve."""
        self._disk.check_room()

    def introduction(self) -> Introduction:
        """Return SQLite's version, and warnings of what weakens its promises."""
        warnings: list[tuple[str, Mapping[str, str]]] = []
        if not self._settings.durable:
            warnings.append(
                (
                    "Acknowledged writes survive a crash, not a power cut",
                    {"setting": "TELEMETRY_DB_SYNCHRONOUS=NORMAL"},
                )
            )
        if (kind := network_file_system(self._path)) is not None:
            advice = "Locks and syncs are not reliable there: move it to a local disk"
            warnings.append(("The database is on a network file system", {"file_system": kind, "advice": advice}))
        if is_mount_point(self._path):
            advice = "SQLite keeps its journal next to it, where it may be lost: mount the directory instead"
            warnings.append(("The database file is mounted by itself", {"db_path": str(self._path), "advice": advice}))
        return Introduction({"sqlite_version": sqlite3.sqlite_version}, warnings)

    def health(self) -> EngineHealth:
        """Return the state of the database at the last look."""
        description = {
            "db_path": str(self._path),
            "journal_mode": self._modes.journal_mode,
            "synchronous": self._modes.synchronous,
        }
        figures = {"wal_bytes": self._disk.last.wal_bytes, "disk_free_bytes": self._disk.last.free_bytes}
        counts = self._database.recount.counts
        return EngineHealth(
            description, figures, self._settings.durable, self._disk.problem, counts.as_json(), counts.warning
        )

    async def close(self) -> None:
        """End what is being read."""
        await self._exports.close()
        await self._readers().close()
