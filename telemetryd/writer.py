"""One queue, one task, one write connection: group what waits, commit it, tell each caller its own outcome."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from telemetryd.database import Connection
from telemetryd.errors import (
    CommandFailedError,
    DatabaseBusyError,
    QueueFullError,
    StoppingError,
    StorageFullError,
    TelemetrydError,
    WriteFailedError,
    WriterDeadError,
    sentence,
)
from telemetryd.metrics import Metrics

QUEUE_BYTES: Final = 128 * 1024 * 1024
"""A queue bounded in commands alone could hold 10,000 bodies of 16 MiB."""

GROUP_ROWS: Final = 5_000
"""A group commit takes in what waits up to about so many rows; the rest goes into the next one."""

_PROBLEM_S: Final = 60

_PRIMARY_CODE: Final = 0xFF
_FATAL: Final = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
"""After these nobody knows what the disk holds: stop, and let the next start recover (PostgreSQL's rule)."""


class Command(Protocol):
    """A change that the writer can carry out without knowing what it is."""

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""

    @property
    def size(self) -> int:
        """About how many bytes it holds while it waits."""


C = TypeVar("C", bound=Command)
R = TypeVar("R")
C_contra = TypeVar("C_contra", bound=Command, contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class Transaction(Protocol[C_contra, R_co]):
    """What carries out commands between BEGIN and COMMIT."""

    def apply(self, commands: Sequence[C_contra]) -> Sequence[R_co]:
        """Carry out commands in order, and return the outcome of each."""

    def savepoint(self) -> AbstractContextManager[None]:
        """Undo what is applied inside the block if the block fails."""

    def finish(self) -> None:
        """Do what is due once for the whole group, right before COMMIT."""


@dataclass(slots=True)
class _Waiting(Generic[C, R]):
    """A command in the queue, and whom to tell."""

    command: C
    future: asyncio.Future[R]
    since: float = field(default_factory=time.monotonic)


class Writer(Generic[C, R]):
    """Owns the write connection; nothing else may write.

    Args:
        connection: the only read-write connection.
        begin: makes the transaction object for one group, given the plain connection and the moment.
        clock: gives that moment, one for each group, as stored text.
        make_durable: called after each COMMIT, before anybody is told.
        queue_max: how many commands may wait.
        queue_bytes: how many bytes they may hold together, besides a first one of any size.
        metrics: where group sizes and commit times are counted.

    """

    def __init__(
        self,
        connection: Connection,
        *,
        begin: Callable[[sqlite3.Connection, str], Transaction[C, R]],
        clock: Callable[[], str],
        make_durable: Callable[[], None],
        queue_max: int,
        queue_bytes: int = QUEUE_BYTES,
        metrics: Metrics,
    ) -> None:
        self._connection = connection
        self._begin = begin
        self._clock = clock
        self._make_durable = make_durable
        self._queue: asyncio.Queue[_Waiting[C, R] | None] = asyncio.Queue(queue_max)
        self._bytes_left = queue_bytes
        self._metrics = metrics
        self._stopping = False
        self.groups = 0
        """How many groups are finished, well or not."""
        self.idle = True
        """Whether it waits for work."""
        self.failure: str | None = None
        """Why the writer has died, or None while it lives."""
        self._problem: tuple[str, float] | None = None
        metrics.watch_queue(self._queue.qsize)

    @property
    def depth(self) -> int:
        """How many commands wait."""
        return self._queue.qsize()

    @property
    def problem(self) -> str | None:
        """Why writes are not taken, or not stored: the writer's death, or the failure of the last group.

        A failure is told for a minute at most, or nobody might dare to try again.
        """
        if self.failure is None and self._problem is not None:
            text, since = self._problem
            return text if time.monotonic() - since < _PROBLEM_S else None
        return self.failure

    def submit(self, command: C) -> asyncio.Future[R]:
        """Queue a command; the future gets its own outcome or error once its group is committed.

        Raises:
            QueueFullError: if too many commands wait.
            StoppingError: if the daemon is shutting down.
            WriterDeadError: if the writer has died.

        """
        if self.failure is not None:
            raise WriterDeadError
        if self._stopping:
            raise StoppingError
        if command.size > self._bytes_left and not self._queue.empty():
            raise QueueFullError
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait(_Waiting(command, future))
        except asyncio.QueueFull:
            raise QueueFullError from None
        self._bytes_left -= command.size
        return future

    async def run(self) -> None:
        """Commit group after group until `stop`; never cancel it, a cancelled await does not stop the thread.

        Raises:
            WriterDeadError: after a failure that leaves the state of the disk unknown.

        """
        waiting: list[_Waiting[C, R]] = []
        try:
            while not self._stopping or not self._queue.empty():
                waiting = await self._next_group()
                if waiting:
                    await self._commit(waiting)
                self.groups += 1
        except BaseException as error:
            self.failure = sentence(error)
            for entry in [*waiting, *self._drain()]:
                _fail(entry, WriterDeadError())
            raise

    async def stop(self) -> None:
        """Refuse new commands, and let `run` end after everything that waits is committed."""
        if not self._stopping:
            self._stopping = True
            if self.failure is None:
                await self._queue.put(None)

    async def _next_group(self) -> list[_Waiting[C, R]]:
        group: list[_Waiting[C, R]] = []
        self.idle = self._queue.empty()
        entry = await self._queue.get()
        self.idle = False
        rows = 0
        while True:
            if entry is not None:
                group.append(entry)
                rows += entry.command.cost
                self._bytes_left += entry.command.size
            if rows >= GROUP_ROWS or self._queue.empty():
                return group
            entry = self._queue.get_nowait()

    def _drain(self) -> list[_Waiting[C, R]]:
        entries = []
        while not self._queue.empty():
            entry = self._queue.get_nowait()
            if entry is not None:
                entries.append(entry)
        return entries

    async def _commit(self, group: list[_Waiting[C, R]]) -> None:
        commands = [entry.command for entry in group]
        started = time.perf_counter()
        try:
            outcomes = await self._connection.run(lambda plain: self._write(plain, commands))
        except TelemetrydError as error:
            if isinstance(error, WriterDeadError):
                raise
            if not isinstance(error, DatabaseBusyError):  # that is somebody else's doing, and passes
                self._problem = f"The last write failed: {sentence(error.__cause__ or error)}", time.monotonic()
            for entry in group:
                _fail(entry, error)
            return
        self._problem = None
        self._metrics.commit_seconds.observe(time.perf_counter() - started)
        self._metrics.group_commands.observe(len(group))
        self._metrics.last_commit.set_to_current_time()
        for entry, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, CommandFailedError):
                _fail(entry, outcome)
            elif not entry.future.done():  # its caller may have left
                entry.future.set_result(outcome)

    # Below this line everything runs in the connection's thread.

    def _write(self, connection: sqlite3.Connection, commands: list[C]) -> list[R | CommandFailedError]:
        """Commit one group in one hop.

        A group in which every command works needs no savepoints. If one fails, the group is rolled back and
        done again with a savepoint around each command, so that only the failing ones are undone.
        """
        try:
            try:
                return self._transact(connection, commands, isolated=False)
            except CommandFailedError:
                return self._transact(connection, commands, isolated=True)
        except sqlite3.Error as error:
            # The frames hold cursors, with which the connection would not really close when it is told to.
            traceback.clear_frames(error.__traceback__)
            raise _translate(error) from error
        except OSError as error:  # the file is not at its place any more
            traceback.clear_frames(error.__traceback__)
            raise WriterDeadError(f"The writer has stopped: {error}") from error

    def _transact(
        self, connection: sqlite3.Connection, commands: list[C], *, isolated: bool
    ) -> list[R | CommandFailedError]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            transaction = self._begin(connection, self._clock())
            outcomes: list[R | CommandFailedError]
            if isolated:
                outcomes = [_apply_alone(connection, transaction, command) for command in commands]
            else:
                outcomes = [*_apply(connection, transaction, commands)]
            transaction.finish()
            connection.execute("COMMIT")
        except BaseException:
            # SQLite may have rolled back by itself (disk full, I/O error): then there is nothing left to undo.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._make_durable()
        return outcomes


def _apply_alone(connection: sqlite3.Connection, transaction: Transaction[C, R], command: C) -> R | CommandFailedError:
    try:
        with transaction.savepoint():
            return _apply(connection, transaction, [command])[0]
    except CommandFailedError as error:
        return error


def _apply(connection: sqlite3.Connection, transaction: Transaction[C, R], commands: Sequence[C]) -> Sequence[R]:
    """Carry out commands; what is wrong with one of them alone becomes a `CommandFailedError`."""
    try:
        return transaction.apply(commands)
    except (
        sqlite3.IntegrityError,
        sqlite3.DataError,
        sqlite3.ProgrammingError,
        OverflowError,
        ValueError,
    ) as error:
        if not connection.in_transaction:
            raise WriteFailedError from error
        raise CommandFailedError(f"The database refused the change: {error}") from error


def _translate(error: sqlite3.Error) -> TelemetrydError:
    """Say what a failure of the whole group means for those who wait."""
    extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    code = extended & _PRIMARY_CODE
    if code in _FATAL or extended == sqlite3.SQLITE_READONLY_DBMOVED:
        return WriterDeadError(f"The writer has stopped: {error}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DatabaseBusyError()
    if code == sqlite3.SQLITE_FULL:
        return StorageFullError()
    return WriteFailedError()


def _fail(entry: _Waiting[C, R], error: TelemetrydError) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
        entry.future.exception()  # a caller who left does not read it; that is no accident to report
