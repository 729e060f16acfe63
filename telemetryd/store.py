"""The only door to the data: submit a command, fetch the answer to a query, tell the health, close."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, overload

from telemetryd import migrate
from telemetryd.alerts import Delivery, EvaluateRules, Evaluation, Kept, ListDeliveries, ListFiring
from telemetryd.changes import Changes, Followed, GetFollowed, ListChanges
from telemetryd.commands import (
    AlertCommand,
    Applied,
    ApplyChanges,
    Command,
    Created,
    CreateEvents,
    CreateRuns,
    EndProcess,
    EventsCreated,
    Indexed,
    IndexTexts,
    Outcome,
    Process,
    ProcessEnded,
    Pruned,
    PruneRuns,
    Reaped,
    ReapRuns,
    RegisterProcess,
    Registration,
    Updated,
    UpdateRun,
    UpkeepCommand,
)
from telemetryd.database import (
    LOG_BYTES,
    Connection,
    Modes,
    beside,
    bytes_not_written_back,
    check_after_crash,
    check_quickly,
    checkpoint_passively,
    forget_cached,
    identify,
    inspect_before_opening,
    is_unfinished,
    looking,
    open_writer,
    prepare_directory,
    quick_check,
    refuse_hard_links,
    sync_directory,
    wal_bytes,
)
from telemetryd.database import Kind as FileKind
from telemetryd.disk import Disk, LogWatch, Look
from telemetryd.errors import DatabaseError, DatabaseSuspectError, UnavailableError, sentence
from telemetryd.events import EventPage
from telemetryd.flow import Flow
from telemetryd.logs import log
from telemetryd.metrics import Metrics
from telemetryd.ownership import Ownership
from telemetryd.queries import (
    Confirmed,
    CountMatching,
    CountPrunable,
    CountRuns,
    Counts,
    CountStale,
    GetConfirmed,
    GetRun,
    ListEvents,
    ListProcesses,
    ListRuns,
    Order,
    Page,
    Prunable,
    Total,
)
from telemetryd.reader import Lane, Readers
from telemetryd.recount import Counts as KeptCounts
from telemetryd.recount import Recount
from telemetryd.regressions import Findings, FindRegressions
from telemetryd.runs import Row, format_timestamp, utc_now
from telemetryd.settings import Settings
from telemetryd.statements import (
    alerting,
    choosing,
    confirming,
    copying,
    counting,
    fetching,
    following,
    foreign,
    full_text,
    regressing,
    rollups,
)
from telemetryd.statements.transaction import MINUTE
from telemetryd.stats import GetStats
from telemetryd.writer import GROUP_ROWS, Writer

Query = (
    ListRuns
    | GetRun
    | ListEvents
    | ListProcesses
    | ListChanges
    | GetFollowed
    | CountRuns
    | CountPrunable
    | GetConfirmed
    | CountStale
    | CountMatching
    | GetStats
    | FindRegressions
    | EvaluateRules
    | ListFiring
    | ListDeliveries
)
Answer = (
    Page
    | Total
    | Row
    | EventPage
    | tuple[Row, EventPage]
    | list[Process]
    | Changes
    | Followed
    | Counts
    | Prunable
    | Confirmed
    | Findings
    | int
    | list[dict[str, Any]]
    | Evaluation
    | Kept
    | list[Delivery]
    | None
)

_READERS: Final[Mapping[type[Query], Callable[..., Answer]]] = {
    ListRuns: fetching.fetch_page,
    GetRun: fetching.fetch_run,
    ListEvents: fetching.fetch_events,
    ListProcesses: lambda connection, query: fetching.fetch_processes(connection),
    ListChanges: following.fetch_changes,
    GetFollowed: lambda connection, query: copying.fetch_followed(connection),
    CountPrunable: fetching.count_prunable,
    CountStale: fetching.count_stale,
    GetConfirmed: lambda connection, query: confirming.fetch_confirmed(connection),
    CountMatching: counting.count_matching,
    GetStats: rollups.fetch_stats,
    FindRegressions: regressing.fetch_regressions,
    EvaluateRules: alerting.evaluate,
    ListFiring: lambda connection, query: alerting.fetch_kept(connection),
    ListDeliveries: alerting.fetch_deliveries,
}
"""What answers each query, given a connection and the query, in a reader's thread."""


def _is_long(query: Query) -> bool:
    """Tell whether a query may read many runs to answer few."""
    if isinstance(query, ListRuns):
        walked = choosing.INDEXES.keys() if query.order == Order() else (frozenset(),)
        return query.filters.is_search or frozenset(query.filters.equal) not in walked or query.offset > _FAR
    if isinstance(query, ListChanges):
        return any(filters.is_search for filters in query.filters)
    return isinstance(query, CountMatching | CountPrunable | FindRegressions | EvaluateRules)


_FAR: Final = 10_000
"""Runs that an offset has to walk over before the page begins."""

T = TypeVar("T")

_LOOK_EVERY_S: Final = 1.0
_BUSY_SLICE_MS: Final = 2_000
"""SQLite waits for a lock so long at a time; between two slices the writer sees whether it is to stop."""


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
    oldest_s: float
    """For how many seconds the oldest command waits to be durable."""
    last_commit: datetime | None
    wal_bytes: int
    counts: KeptCounts
    """Whether the counts agree with the runs."""
    free_bytes: int
    """Room left on the disk, like the size of the write-ahead log about a second old."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """What is open on the database, and the files that it holds by name and inode."""

    connection: Connection
    modes: Modes
    readers: Readers
    logs: Mapping[Path, tuple[int, int] | None]
    """The write-ahead log and its index, which SQLite goes on using when their names are gone."""

    @classmethod
    async def open(
        cls, settings: Settings, clock: Callable[[], datetime], *, may_create: bool, after_crash: bool
    ) -> _Opened:
        """Look at the file, make the schema if it is new (and may be), and open the connections.

        Raises:
            DatabaseError: if the file is not, or not yet, a database of this version. Nothing is written then.

        """
        path = settings.db_path.absolute()
        async with contextlib.AsyncExitStack() as undo:
            state = inspect_before_opening(path)
            migrate.refuse_unless_usable(path, state)
            if state.kind is FileKind.OURS:
                check_quickly(path)
                if not is_unfinished(path):
                    with looking(path) as plain:
                        _check_schema(plain, path)  # before opening may change the journal mode in the file
            elif not may_create:
                raise DatabaseError(f"{path} is not a telemetryd database any more")
            connection, modes = await open_writer(
                path, settings.db_journal_mode, settings.db_synchronous, settings.db_busy_timeout_ms
            )
            undo.push_async_callback(connection.close)
            try:
                state = await connection.run(identify)  # again: opening has undone what was cut off
                migrate.refuse_unless_usable(path, state)
                if state.kind is not FileKind.OURS and may_create:
                    await connection.run(lambda plain: migrate.create(plain, format_timestamp(clock())))
                    sync_directory(path.resolve().parent)
                elif after_crash:
                    await _look_for_damage(connection, path)
                await connection.run(lambda plain: _check_schema(plain, path))
                slice_ms = min(settings.db_busy_timeout_ms, _BUSY_SLICE_MS)
                await connection.run(lambda plain: plain.execute(f"PRAGMA busy_timeout = {slice_ms}").fetchall())
                readers = await Readers.open(
                    path, settings.db_readers, settings.query_timeout_s, settings.db_busy_timeout_ms
                )
            except (sqlite3.Error, OSError) as error:
                raise DatabaseError(f"Cannot use {path}: {error}") from error
            undo.pop_all()
        suffixes = ("-wal", "-shm") if modes.journal_mode == "WAL" else ()
        logs = {place: _identity(place) for place in (beside(path, suffix) for suffix in suffixes)}
        return cls(connection, modes, readers, logs)

    def lost_log(self) -> Path | None:
        """Return the log file that was deleted or replaced, or None."""
        return next((place for place, identity in self.logs.items() if _identity(place) != identity), None)

    async def close(self) -> None:
        """Write the write-ahead log back, and close every connection."""
        await self.readers.close()
        if self.modes.journal_mode == "WAL":
            with contextlib.suppress(sqlite3.Error):  # the next start recovers the log just as well
                await self.connection.run(_checkpoint)
        await self.connection.close()

    async def drop(self) -> None:
        """Close every connection without a sync, after a failure.

        The write connection is closed before the readers: so it does not checkpoint. After a failed sync nothing
        must be synced again as it is, because the kernel may have dropped what it could not write, and would
        report success now.
        """
        await self.connection.close()
        await self.readers.close()


class Store:
    """One open database: its lock, its writer, its readers. Make it with `open`."""

    def __init__(
        self,
        settings: Settings,
        *,
        opened: _Opened,
        ownership: Ownership,
        recount: Recount,
        metrics: Metrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._path = settings.db_path.absolute()
        self._identity = ownership.identity
        self._durable = settings.durable
        self._modes = opened.modes
        self._clock = clock
        self._opened: _Opened | None = opened
        self._ownership = ownership
        self._committed: Callable[[], None] = lambda: None
        self._writer: Writer[Command, Outcome] = Writer(
            opened.connection,
            begin=recount.begin,
            clock=lambda: format_timestamp(clock()),
            make_durable=self._confirm,
            at_rest=checkpoint_passively if opened.modes.journal_mode == "WAL" else lambda _: None,
            committed=self._tell_of_commit,
            reopen=self._reopen,
            busy_timeout_s=settings.db_busy_timeout_ms / 1000,
            queue_max=settings.queue_max,
            flow=Flow(settings.commit_target_ms / 1000, min(settings.max_batch, GROUP_ROWS)),
            metrics=metrics,
        )
        self.writing = asyncio.create_task(self._writer.run(), name="writer")
        """The writer's task; it ends only after `close`, or with the error that killed it."""
        self._counted: tuple[tuple[int, KeptCounts, str], Counts] | None = None
        self._is_read_elsewhere: Callable[[], bool] = lambda: False
        self._log = LogWatch(2 * LOG_BYTES, self._measure_log, self._is_reading)
        self._disk = Disk(self._look, settings.min_free_mb << 20, metrics)
        self._recount = recount
        self._chores = {
            asyncio.create_task(self._watch(), name="watch"),
            asyncio.create_task(recount.run(self._writer, self._tell_of_commit), name="recount"),
        }

    @classmethod
    async def open(cls, settings: Settings, metrics: Metrics, clock: Callable[[], datetime] = utc_now) -> Store:
        """Take the lock, look at the file, make the schema if it is new, and open the connections.

        Raises:
            DatabaseError: if the file is not, or not yet, a database of this version. Nothing is written then.
            DatabaseOwnedError: if another process owns it.

        """
        path = settings.db_path.absolute()
        prepare_directory(path)
        refuse_hard_links(path)  # whose message tells more than that of a lock
        with contextlib.ExitStack() as undo:
            ownership = Ownership(path, settings.lock_file)
            ownership.acquire(create=True)
            undo.callback(ownership.release)
            after_crash = ownership.was_dropped or is_unfinished(path)
            opened = await _Opened.open(settings, clock, may_create=True, after_crash=after_crash)
            undo.pop_all()
        recount = Recount(partial(_check_schema, path=path), clock)
        await opened.connection.run(recount.start)
        if after_crash:
            await opened.connection.run(recount.compare_anyway)
        elif ownership.was_changed:
            recount.notice()
        store = cls(settings, opened=opened, ownership=ownership, recount=recount, metrics=metrics, clock=clock)
        await store._disk.look()
        return store

    @property
    def _readers(self) -> Readers:
        if self._opened is None:
            raise UnavailableError("The database is being opened again; try again shortly")
        return self._opened.readers

    async def _reopen(self) -> Connection:
        """Close everything, let SQLite recover, and verify the whole file as the disk holds it.

        As long as the database file is not at its place, everything stays open: that may be the only way to it.

        Raises:
            DatabaseError: if the database is not at its place, is somebody else's, cannot be opened, or is damaged.

        """
        if (misplaced := self._misplaced()) is not None:
            raise DatabaseError(misplaced)
        try:
            if self._opened is not None:
                opened, self._opened = self._opened, None
                # A log whose name is gone is written back, or what stands only there would be lost.
                await (opened.drop() if opened.lost_log() is None else opened.close())
            self._ownership.take_again()
            forget_cached(self._path)
            self._opened = opened = await _Opened.open(self._settings, self._clock, may_create=False, after_crash=False)
            await opened.connection.run(self._recount.start)
            await opened.connection.run(lambda plain: quick_check(plain, self._path))
            self._disk.forget_displaced()
        except (OSError, sqlite3.Error, MemoryError) as error:
            raise DatabaseError(f"Cannot use {self._path}: {sentence(error)}") from error
        return opened.connection

    async def _watch(self) -> None:
        """Notice within a second or so when a file is taken away, even if nobody writes."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self._disk.look()
            # Asked again, because the database may have been opened again during the look.
            if self._disk.last.displaced is not None and (displaced := self._displaced()) is not None:
                self._writer.suspect(DatabaseSuspectError(displaced))
            self._writer.rest()
            self._log.look(self._disk.last.wal_bytes)

    def _measure_log(self) -> asyncio.Future[int] | None:
        if self._opened is None:
            return None
        with contextlib.suppress(ValueError):  # it is being closed
            return self._opened.connection.start(bytes_not_written_back)
        return None

    def _is_reading(self) -> bool:
        return (self._opened is not None and self._opened.readers.are_at_work) or self._is_read_elsewhere()

    def _look(self) -> Look:
        return Look(shutil.disk_usage(self._path.parent).free, wal_bytes(self._path), self._displaced())

    def _confirm(self) -> None:
        self._recount.confirm()
        if (displaced := self._displaced()) is not None:
            raise OSError(displaced)

    def _misplaced(self) -> str | None:
        if _identity(self._path) == self._identity:
            return None
        return (
            f"The database file {self._path} was deleted or replaced while in use; put it back, "
            "or restart telemetryd to go on with what is there"
        )

    def _displaced(self) -> str | None:
        """Say if the database, its log or a lock is not at its place any more, where another owner may find it."""
        if (misplaced := self._misplaced()) is not None:
            return misplaced
        opened = self._opened  # which may change meanwhile: the look at the disk is taken in a thread
        if opened is not None and (lost := opened.lost_log()) is not None:
            return f"The file {lost} was deleted or replaced while in use; it is part of the database"
        if (lock := self._ownership.missing()) is not None:
            return f"The lock file {lock} was deleted or replaced while in use; nothing may remove it"
        return None

    def check_open(self) -> None:
        """See that changes are taken at all, before anything is spent on reading one.

        Raises:
            UnavailableError: if `submit` would raise it now, whatever the change.

        """
        self._writer.check_open()

    @overload
    async def submit(self, command: CreateRuns) -> Created: ...

    @overload
    async def submit(self, command: UpdateRun) -> Updated | None: ...

    @overload
    async def submit(self, command: CreateEvents) -> EventsCreated | None: ...

    @overload
    async def submit(self, command: RegisterProcess) -> Registration: ...

    @overload
    async def submit(self, command: EndProcess) -> ProcessEnded: ...

    @overload
    async def submit(self, command: PruneRuns) -> Pruned: ...

    @overload
    async def submit(self, command: ApplyChanges) -> Applied: ...

    @overload
    async def submit(self, command: ReapRuns) -> Reaped: ...

    @overload
    async def submit(self, command: UpkeepCommand) -> None: ...

    @overload
    async def submit(self, command: IndexTexts) -> Indexed | None: ...

    @overload
    async def submit(self, command: AlertCommand) -> int: ...

    async def submit(self, command: Command) -> Outcome:
        """Queue a change and wait until it is durable; return its outcome.

        Raises:
            UnavailableError: if it was not stored, or may not have been; the same change may be repeated.
            CommandFailedError: if the database refused this change alone.

        """
        if not isinstance(command, PruneRuns):  # which makes room, and may use the reserve for it
            self._disk.check_room()
        return await self._writer.submit(command)

    @overload
    async def fetch(self, query: ListRuns) -> Page: ...

    @overload
    async def fetch(self, query: CountMatching) -> Total: ...

    @overload
    async def fetch(self, query: GetRun) -> tuple[Row, EventPage] | None: ...

    @overload
    async def fetch(self, query: ListEvents) -> EventPage | None: ...

    @overload
    async def fetch(self, query: ListProcesses) -> list[Process]: ...

    @overload
    async def fetch(self, query: GetFollowed) -> Followed: ...

    @overload
    async def fetch(self, query: ListChanges) -> Changes: ...

    @overload
    async def fetch(self, query: CountRuns) -> Counts: ...

    @overload
    async def fetch(self, query: CountPrunable) -> Prunable: ...

    @overload
    async def fetch(self, query: GetConfirmed) -> Confirmed: ...

    @overload
    async def fetch(self, query: CountStale) -> int: ...

    @overload
    async def fetch(self, query: GetStats) -> list[dict[str, Any]]: ...

    @overload
    async def fetch(self, query: FindRegressions) -> Findings: ...

    @overload
    async def fetch(self, query: EvaluateRules) -> Evaluation: ...

    @overload
    async def fetch(self, query: ListFiring) -> Kept: ...

    @overload
    async def fetch(self, query: ListDeliveries) -> list[Delivery]: ...

    async def fetch(self, query: Query) -> Answer:
        """Answer a query; it sees every change that was acknowledged before it.

        Raises:
            UnavailableError: if the answer takes too long, or the database cannot be read.

        """
        if isinstance(query, CountRuns):
            return await self._count_runs()
        lane = Lane.LONG if _is_long(query) else Lane.QUICK
        return await self._readers.fetch(partial(_READERS[type(query)], query=query), lane)

    async def fetch_news(self, query: ListChanges) -> Changes:
        """Answer a query of the feed, which waits for no query of anybody else.

        Raises:
            UnavailableError: if the database cannot be read.

        """
        return await self._readers.fetch(partial(following.fetch_changes, query=query), Lane.FEED)

    async def _count_runs(self) -> Counts:
        """Return the totals, read again only if they were changed or a minute has passed since the last time."""
        now = self._clock()
        since, until = format_timestamp(now - timedelta(hours=24)), format_timestamp(now)
        moment = (self._writer.groups, self._recount.counts, until[:MINUTE])
        if self._counted is not None and self._counted[0] == moment:
            return self._counted[1]
        counts = await self._readers.fetch(partial(fetching.fetch_counts, recent_since=since, now=until))
        self._counted = moment, replace(counts, is_remembered=True)
        return counts

    def watch_commits(self, committed: Callable[[], None]) -> None:
        """Call a function after each commit, in the event loop; it has to be quick."""
        self._committed = committed

    def watch_reads(self, are_at_work: Callable[[], bool]) -> None:
        """Ask a function whether connections of our own that the store does not know of read the database."""
        self._is_read_elsewhere = are_at_work

    def _tell_of_commit(self) -> None:
        self._committed()

    async def keep_full_text(self) -> None:
        """Begin the full-text index or drop it, as the setting says; call it before anything is submitted.

        What is begun is built by `IndexTexts`, slice by slice, also after a restart; until then there is no search.

        Raises:
            DatabaseError: if that is not possible.

        """
        if self._opened is None:
            return
        connection, wanted = self._opened.connection, self._settings.full_text
        try:
            if not wanted and await connection.run(full_text.is_there):
                started = time.monotonic()
                log.info("Dropping the full-text index")
                await _at_once(connection, full_text.drop)
                took = {"duration_ms": round((time.monotonic() - started) * 1000, 3)}
                log.info("The full-text index is dropped", extra=took)
            elif wanted and not await connection.run(lambda it: full_text.is_complete(it) or full_text.is_begun(it)):
                log.info("Building the full-text index")
                await _at_once(connection, full_text.begin)
        except sqlite3.Error as error:
            raise DatabaseError(f"Cannot change the full-text index of {self._path}: {error}") from error

    def flow(self) -> str:
        """Tell writers how much to send and how long to pause (the value of the Telemetry-Flow header), at once."""
        return self._writer.advice()

    def health(self) -> Health:
        """Tell how the database is, at once: without the queue, a connection, or a call that a disk could hold up."""
        writer, disk = self._writer, self._disk
        return Health(
            path=self._path,
            modes=self._modes,
            durable=self._durable,
            queue_depth=writer.depth,
            problem=writer.problem or disk.problem,
            groups=writer.groups,
            idle=writer.idle,
            oldest_s=writer.oldest_s,
            last_commit=None if writer.last_commit is None else datetime.fromtimestamp(writer.last_commit, UTC),
            wal_bytes=disk.last.wal_bytes,
            counts=self._recount.counts,
            free_bytes=disk.last.free_bytes,
        )

    async def close(self) -> None:
        """Commit what is queued, checkpoint the write-ahead log, close every connection, and give up the lock."""
        for chore in self._chores:
            chore.cancel()
        await self._writer.stop()
        if self._writer.failure is not None and self._opened is not None:
            self._opened.connection.interrupt_now()  # it may be verifying a large file
        await asyncio.wait((self.writing, *self._chores))
        if self._opened is not None:
            await (self._opened.close() if self._writer.failure is None else self._opened.drop())
        if self._writer.failure is None:
            self._ownership.settle()
        self._ownership.release()


def _check_schema(plain: sqlite3.Connection, path: Path) -> None:
    migrate.check_schema(plain, path)
    foreign.refuse_harmful(plain, path)


async def _at_once(connection: Connection, step: Callable[[sqlite3.Connection], T]) -> T:
    return await connection.run(partial(full_text.at_once, step=step))


async def _look_for_damage(connection: Connection, path: Path) -> None:
    started = time.monotonic()
    is_done = await connection.run(lambda plain: check_after_crash(plain, path))
    log.warning(
        "Recovered after an unclean stop",
        extra={
            "db_path": str(path),
            "quick_check": "ok" if is_done else "skipped, the file is large; run: telemetryd check",
            "duration_ms": round((time.monotonic() - started) * 1000, 3),
        },
    )


def _checkpoint(plain: sqlite3.Connection) -> None:
    plain.execute("PRAGMA busy_timeout = 0")  # a reader of somebody else's may hold it up, which is no reason to wait
    plain.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
