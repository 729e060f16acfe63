"""Access to the data: submit commands, answer queries, report health, close."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

from telemetryd.engine.factory import open_engine
from telemetryd.engine.interface import BackupMade, Copy, Engine, Introduction
from telemetryd.flow import Flow
from telemetryd.model.changes import Changes, ListChanges
from telemetryd.model.chores import Chore
from telemetryd.model.commands import Command
from telemetryd.model.queries import CountRuns, Counts, ExportRuns, Query
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.writer import GROUP_ROWS, Writer

R = TypeVar("R")
A = TypeVar("A")

_LOOK_EVERY_S: Final = 1.0
_RECENT: Final = timedelta(hours=24)
_MINUTE: Final = len("2025-12-24T10:00")


@dataclass(frozen=True, slots=True)
class Health:
    """How the store is; `problem` is None while it is well."""

    description: Mapping[str, str]
    """Where the database is, and how it keeps what it is given."""
    figures: Mapping[str, int]
    """How its storage is, in bytes; about a second old."""
    durable: bool
    queue_depth: int
    problem: str | None
    groups: int
    """Groups that the writer has finished; while it is not idle, a number that stands still means it is stuck."""
    idle: bool
    oldest_s: float
    """The seconds for which the oldest command waits to be durable."""
    last_commit: datetime | None
    counts: Mapping[str, Any]
    """Whether the totals and statistics agree with the runs."""
    warning: str | None
    """What an operator should know although everything works."""


class Store:
    """One open database: the queue and the writer before its writing half, and its reading half.

    Args:
        opened: the engine; its writing half is handed on to the writer, and kept nowhere else.
        settings: bounds of the queue, and the target of a commit's time.
        metrics: where the writer counts.
        clock: gives the moment.

    """

    def __init__(
        self, opened: Engine, settings: Settings, metrics: Metrics, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._reading = opened.reading
        self._clock = clock
        self._listeners: list[Callable[[], None]] = []
        self._writer = Writer(
            opened.writing,
            committed=self._notify,
            busy_timeout_s=settings.db_busy_timeout_ms / 1000,
            queue_max=settings.queue_max,
            flow=Flow(settings.commit_target_ms / 1000, min(settings.max_batch, GROUP_ROWS)),
            metrics=metrics,
        )
        self.writing = asyncio.create_task(self._writer.run(), name="writer")
        """The writer's task; it ends only after `close`, or with the error that killed it."""
        self._watching = asyncio.create_task(self._watch(), name="watch")
        self._counted: tuple[str, Counts] | None = None
        self._changes = 0
        opened.reading.watch(self._notify)

    @classmethod
    async def open(
        cls,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], datetime] = utc_now,
        *,
        full_text: bool | None = None,
        may_lead: bool = True,
    ) -> Store:
        """Open the database that the settings name, made if it is not there.

        Only the daemon decides whether there is a full-text index (`full_text`); commands leave it as it is. A command
        that works next to daemons must not lead (`may_lead`): it does not do what is due once for a database.

        Raises:
            DatabaseError: if it is not, or not yet, a database of this version. Nothing is written then.
            DatabaseOwnedError: if another process owns it.

        """
        return cls(
            await open_engine(settings, metrics, clock, full_text=full_text, may_lead=may_lead),
            settings,
            metrics,
            clock,
        )

    async def _watch(self) -> None:
        """Notice within a second or so when the database is not what it was, even if nobody writes."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if (suspicion := await self._reading.look()) is not None:
                self._writer.suspect(suspicion)
            self._writer.rest()

    def check_open(self) -> None:
        """See that changes are taken at all, before anything is spent on reading one.

        Raises:
            UnavailableError: if `submit` would raise it now, whatever the change.

        """
        self._writer.check_open()

    async def submit(self, command: Command[R]) -> R:
        """Queue a change and wait until it is durable; return its outcome.

        Raises:
            UnavailableError: if it was not stored, or may not have been; the same change may be repeated.
            CommandFailedError: if the database refused this change alone.

        """
        if not command.makes_room:
            self._reading.check_room()
        return await self._writer.submit(command)

    async def fetch(self, query: Query[A]) -> A:
        """Answer a query; it sees every change that was acknowledged before it.

        Raises:
            UnavailableError: if the answer takes too long, or the database cannot be read.

        """
        return await self._reading.read(query)

    async def fetch_news(self, query: ListChanges) -> Changes:
        """Answer a query of the feed, which waits for no query of anybody else.

        Raises:
            UnavailableError: if the database cannot be read.

        """
        return await self._reading.read_news(query)

    async def counts(self) -> Counts:
        """Return the totals, read again only if something was changed or a minute has passed since the last time."""
        now = self._clock()
        since, until = format_timestamp(now - _RECENT), format_timestamp(now)
        if self._counted is not None and self._counted[0] == until[:_MINUTE]:
            return self._counted[1]
        changes = self._changes
        counts = await self.fetch(CountRuns(since, until))
        if changes == self._changes:  # else they may be from before the change
            self._counted = until[:_MINUTE], replace(counts, is_remembered=True)
        return counts

    @property
    def is_shared(self) -> bool:
        """Whether other daemons may use the same database."""
        return self._reading.is_shared

    def leads(self, chore: Chore) -> bool:
        """Return whether this daemon does what is to be done once for a database (see `ReadingEngine.leads`)."""
        return self._reading.leads(chore)

    def resign(self, chore: Chore) -> None:
        """Leave a chore to other daemons."""
        self._reading.resign(chore)

    def export(self, query: ExportRuns) -> AbstractAsyncContextManager[Copy]:
        """Copy what is asked for, to be read inside the block (see `ReadingEngine.export`)."""
        return self._reading.export(query)

    async def back_up(self, *, compress: bool = True) -> BackupMade:
        """Make a verified backup (see `ReadingEngine.back_up`)."""
        return await self._reading.back_up(self._clock(), compress=compress)

    def on_commit(self, listener: Callable[[], None]) -> None:
        """Call a function after each commit, in the event loop; it has to be quick."""
        self._listeners.append(listener)

    def _notify(self) -> None:
        self._counted = None
        self._changes += 1
        for listener in self._listeners:
            listener()

    def flow(self) -> str:
        """Return at once how much writers should send and how long they should pause: the Telemetry-Flow header."""
        return self._writer.advice()

    def introduction(self) -> Introduction:
        """Return what an operator should know of the engine (see `ReadingEngine.introduction`)."""
        return self._reading.introduction()

    def health(self) -> Health:
        """Return the store's state at once: without the queue, a connection, or a call that a slow disk could block."""
        writer, database = self._writer, self._reading.health()
        return Health(
            description=database.description,
            figures=database.figures,
            durable=database.durable,
            queue_depth=writer.depth,
            problem=writer.problem or database.problem,
            groups=writer.groups,
            idle=writer.idle,
            oldest_s=writer.oldest_s,
            last_commit=None if writer.last_commit is None else datetime.fromtimestamp(writer.last_commit, UTC),
            counts=database.counts,
            warning=database.warning,
        )

    async def close(self) -> None:
        """Commit what is queued, and close the database."""
        self._watching.cancel()
        await self._writer.stop()
        await asyncio.wait((self.writing, self._watching))
        self.writing.exception()  # the daemon waits for the task and gets it; asyncio need not report it as well
        await self._writer.close()
