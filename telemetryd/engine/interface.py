"""The interface between the daemon and a storage engine: one half writes, the other reads.

An engine is both. Only `telemetryd/writer.py` ever receives the writing half, so nothing else can change what is
stored. Whatever goes wrong comes out as an error of `telemetryd/errors.py`, never as one of a driver.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from telemetryd.errors import CommandFailedError, DatabaseSuspectError
from telemetryd.model.changes import Changes, ListChanges
from telemetryd.model.chores import Chore
from telemetryd.model.commands import Command
from telemetryd.model.queries import ExportRuns, Query

A = TypeVar("A")


class WritingEngine(Protocol):
    """The half that changes what is stored. It is used by one task, one call after the other."""

    async def write(self, commands: Sequence[Command[Any]]) -> Sequence[Any | CommandFailedError]:
        """Carry out a group of commands in one transaction, which is durable when this returns.

        Returns the outcome of each command in order; where the database refused one of them alone, the error stands
        in its place, and the others are stored.

        Raises:
            DatabaseBusyError: if another process holds the database; nothing was stored, and trying again may help.
            StorageFullError: if there is no room; nothing was stored.
            WriteFailedError: if the group as a whole failed for another reason; nothing was stored.
            DatabaseSuspectError: if it is unknown what is stored; nothing more may be written until `reopen` is done.

        """

    async def tidy_up(self) -> None:
        """Do what can wait until nobody writes.

        Raises:
            DatabaseSuspectError: as `write` does.
            UnavailableError: if it could not be done; nothing is lost.

        """

    async def reopen(self) -> None:
        """Close everything, let the database recover, and verify it as its storage holds it.

        Raises:
            DatabaseError: if that is not possible now; it may be tried again.

        """

    def interrupt(self) -> None:
        """End soon what is going on in a call that may take long, because the daemon stops."""

    async def close(self, *, is_clean: bool) -> None:
        """Close the database for good, its reading half included, in the order that its storage needs.

        Args:
            is_clean: whether everything is in order, so that the next owner need not look for damage.

        """


class Copy(Protocol):
    """What an export is read from: a copy that no longer blocks any writer."""

    @property
    def rows(self) -> int:
        """How many runs it holds."""

    @property
    def is_exact(self) -> bool:
        """Whether it is one snapshot; else each run is as it was at some moment of the copying."""

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the export's bytes in pieces of bounded size.

        Raises:
            UnavailableError: if it cannot be read to its end.

        """


class BackupMade(NamedTuple):
    """A verified backup in its place, and the older ones that were removed for it."""

    path: Path
    bytes: int
    rows: int
    seconds: float
    removed: Sequence[Path]


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """How a database is, known without asking it."""

    description: Mapping[str, str]
    """What `/health` and the log say of it: where it is, and how it keeps what it is given."""
    figures: Mapping[str, int]
    """What `/health` says of its storage, in bytes."""
    durable: bool
    """Whether an acknowledged write survives a power cut."""
    problem: str | None
    """Why it should not be trusted or takes no writes, or None."""
    counts: Mapping[str, Any]
    """Whether the totals and statistics agree with the runs, for `/health`."""
    warning: str | None = None
    """What an operator should know although everything works, or None."""


@dataclass(frozen=True, slots=True)
class Introduction:
    """What an engine says of itself at start."""

    versions: Mapping[str, str]
    """The version of the database software, for the log."""
    warnings: Sequence[tuple[str, Mapping[str, str]]]
    """Messages and fields of log lines about what the operator should change."""


class QueryingEngine(Protocol):
    """What answers queries, also next to the daemon that owns the database."""

    async def read(self, query: Query[A]) -> A:
        """Answer a query; it sees every change that was durable before it.

        Raises:
            QueryTimeoutError: if there is no answer before the deadline.
            UnavailableError: if the database cannot be read now.
            InvalidRequestError: if what is asked for is not to be had, or too large.

        """

    async def close(self) -> None:
        """End what is being read, and refuse what comes."""


class ReadingEngine(QueryingEngine, Protocol):
    """The half that all other parts may use. Nothing here changes what is stored."""

    @property
    def is_shared(self) -> bool:
        """Whether other daemons may use the same database."""

    def leads(self, chore: Chore) -> bool:
        """Return whether this daemon is the one that does what is to be done once for a database.

        Who asks can do it: from then on this daemon tries to lead.
        """

    def resign(self, chore: Chore) -> None:
        """Leave a chore to other daemons until `leads` is asked again."""

    async def read_news(self, query: ListChanges) -> Changes:
        """Answer a query of the feed as `read` does; it waits for no query of anybody else."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Call a function when the engine itself has changed what subscribers may ask for."""

    def export(self, query: ExportRuns) -> AbstractAsyncContextManager[Copy]:
        """Copy what is asked for; the copy is gone when the block ends.

        Raises:
            StorageFullError: if there is no room for the copy.
            UnavailableError: if the database cannot be read now.

        """

    async def back_up(self, now: datetime, *, compress: bool = True) -> BackupMade:
        """Make a verified backup in the configured directory, compressed or not, and remove those that are too many.

        Raises:
            InvalidRequestError: if the settings name no directory, or this engine makes no backups.
            UnavailableError: if it could not be made.

        """

    async def look(self) -> DatabaseSuspectError | None:
        """See how the database's storage is, however long that takes; return why it must not be trusted any more."""

    def check_room(self) -> None:
        """Raise LowDiskError while the storage is too full for anything but what makes room."""

    def introduction(self) -> Introduction:
        """Return, once at start, which engine it is and what an operator should know of it."""

    def health(self) -> EngineHealth:
        """Return the state of the database at once: without a connection, or a call that a slow disk could block."""


class Engine(NamedTuple):
    """One open database."""

    writing: WritingEngine
    reading: ReadingEngine
