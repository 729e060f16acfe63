"""One queue, one task, one write connection: group what waits, commit it, tell each caller its own outcome."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from telemetryd.database import Connection
from telemetryd.errors import (
    CommandFailedError,
    DatabaseBusyError,
    DatabaseError,
    DatabaseSuspectError,
    QueueFullError,
    StoppingError,
    StorageFullError,
    TelemetrydError,
    UnavailableError,
    WriteFailedError,
    WriterDeadError,
    sentence,
)
from telemetryd.flow import Flow
from telemetryd.logs import log
from telemetryd.metrics import Metrics

QUEUE_BYTES: Final = 128 * 1024 * 1024
"""A queue bounded in commands alone could hold 10,000 bodies of 16 MiB."""

GROUP_ROWS: Final = 5_000
"""A group commit takes in what waits up to about so many rows; the rest goes into the next one."""

_PROBLEM_S: Final = 60

REST_AFTER_S: Final = 5.0
"""Without a commit for so long, the writer tidies up."""

_PRIMARY_CODE: Final = 0xFF
_SUSPECT: Final = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
"""After these nobody knows what the disk holds: nothing is taken until the database is open again and verified."""

_PAUSES_S: Final = (0.1, 0.5, 1, 2, 5)
"""The pauses between attempts to open the database again; the last one repeats."""


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
T = TypeVar("T")
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


class _Queue(Generic[C, R]):
    """What waits, in order, and the sums over it: whatever comes in or goes out, they are those of what is in it."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.bytes = self.rows = 0
        self._entries: asyncio.Queue[_Waiting[C, R] | None] = asyncio.Queue(most)

    def __len__(self) -> int:
        return self._entries.qsize()

    def is_full(self, size: int) -> bool:
        """Tell whether there is no room for a command of so many bytes; a first one may have any size."""
        return self._entries.full() or (self.bytes + size > self.most_bytes and len(self) > 0)

    def put(self, entry: _Waiting[C, R]) -> None:
        """Let a command wait."""
        self._entries.put_nowait(entry)
        self.bytes += entry.command.size
        self.rows += entry.command.cost

    def wake(self) -> None:
        """Let `get` return, even if nothing waits."""
        if not len(self):
            self._entries.put_nowait(None)

    async def get(self) -> _Waiting[C, R] | None:
        """Return the next command as soon as there is one, or None after `wake`."""
        return self._without(await self._entries.get())

    def get_nowait(self) -> _Waiting[C, R] | None:
        """Return the next command, or None in the place of a `wake`; there must be one of them."""
        return self._without(self._entries.get_nowait())

    def drain(self) -> Iterator[_Waiting[C, R]]:
        """Take out everything that waits."""
        while len(self):
            entry = self.get_nowait()
            if entry is not None:
                yield entry

    def _without(self, entry: _Waiting[C, R] | None) -> _Waiting[C, R] | None:
        if entry is not None:
            self.bytes -= entry.command.size
            self.rows -= entry.command.cost
        return entry


class Writer(Generic[C, R]):
    """Owns the write connection; nothing else may write.

    Args:
        connection: the only read-write connection.
        begin: makes the transaction object for one group, given the plain connection and the moment.
        clock: gives that moment, one for each group, as stored text.
        make_durable: called after each COMMIT, before anybody is told.
        at_rest: called once when nothing has come for a while after a COMMIT.
        committed: called in the event loop after each COMMIT, when everybody is told; it has to be quick.
        reopen: closes everything that is open on the database, opens it again, verifies it, and returns the
            new write connection; called until it raises no `DatabaseError` any more.
        busy_timeout_s: how long a group is tried again while another process has the database locked, in
            attempts as long as the connection's own busy timeout. A stop ends that sooner.
        queue_max: how many commands may wait.
        queue_bytes: how many bytes they may hold together, besides a first one of any size.
        flow: learns from each group what to advise to those who send.
        metrics: where group sizes and commit times are counted.

    """

    def __init__(
        self,
        connection: Connection,
        *,
        begin: Callable[[sqlite3.Connection, str], Transaction[C, R]],
        clock: Callable[[], str],
        make_durable: Callable[[], None],
        reopen: Callable[[], Awaitable[Connection]],
        busy_timeout_s: float,
        at_rest: Callable[[sqlite3.Connection], None] = lambda _: None,
        committed: Callable[[], None] = lambda: None,
        queue_max: int,
        queue_bytes: int = QUEUE_BYTES,
        flow: Flow,
        metrics: Metrics,
    ) -> None:
        self._connection = connection
        self._begin = begin
        self._clock = clock
        self._make_durable = make_durable
        self._at_rest = at_rest
        self._committed = committed
        self._reopen = reopen
        self._busy_timeout_s = busy_timeout_s
        self._queue: _Queue[C, R] = _Queue(queue_max, queue_bytes)
        self._flow = flow
        self._metrics = metrics
        self._stopping = asyncio.Event()
        self._suspicion: DatabaseSuspectError | None = None
        self.groups = 0
        """How many groups are finished, well or not, and how often the database was opened again."""
        self.idle = True
        """Whether it waits for work."""
        self.failure: str | None = None
        """Why nothing is taken: the writer has died, or the database is being opened again. None while it is well."""
        self.last_commit: float | None = None
        """When the last group was committed, in seconds since 1970, or None."""
        self._problem: tuple[str, float] | None = None
        self._oldest: float | None = None
        self._untidy_since: float | None = None
        metrics.watch_queue(self._queue.__len__, lambda: self.oldest_s)

    @property
    def depth(self) -> int:
        """How many commands wait."""
        return len(self._queue)

    @property
    def oldest_s(self) -> float:
        """For how many seconds the oldest command waits; that is the first of the group being committed."""
        return 0.0 if self._oldest is None else time.monotonic() - self._oldest

    @property
    def problem(self) -> str | None:
        """Why writes are not taken, or not stored: `failure`, or the failure of the last group.

        A failure is told for a minute at most, or nobody might dare to try again.
        """
        if self.failure is None and self._problem is not None:
            text, since = self._problem
            return text if time.monotonic() - since < _PROBLEM_S else None
        return self.failure

    def check_open(self, size: int = 0) -> None:
        """Raise what `submit` raises for a command of so many bytes, if it would not be taken now."""
        if self._suspicion is not None:
            raise DatabaseSuspectError
        if self.failure is not None:
            raise WriterDeadError
        if self._stopping.is_set():
            raise StoppingError
        if self._queue.is_full(size):
            self._flow.refuse()
            raise QueueFullError

    def submit(self, command: C) -> asyncio.Future[R]:
        """Queue a command; the future gets its own outcome or error once its group is committed.

        Raises:
            QueueFullError: if too many commands wait.
            StoppingError: if the daemon is shutting down.
            DatabaseSuspectError: until the database is open again after a failure.
            WriterDeadError: if the writer has died.

        """
        self.check_open(command.size)
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.put(_Waiting(command, future))
        return future

    def advice(self) -> str:
        """Return what to tell those who send; made once for each group, so that it costs an answer nothing."""
        return self._flow.text(is_idle=self.idle)

    def suspect(self, error: DatabaseSuspectError) -> None:
        """Take nothing more until the database is open again and verified."""
        if self._suspicion is None and self.failure is None:
            self._suspicion = error
            self._queue.wake()

    async def run(self) -> None:
        """Commit group after group until `stop`; never cancel it, a cancelled await does not stop the thread.

        Raises:
            DatabaseSuspectError: if it is stopped while the state of the disk is unknown.

        """
        waiting: list[_Waiting[C, R]] = []
        try:
            while not self._stopping.is_set() or self._queue:
                waiting = await self._next_group()
                if waiting and self._suspicion is None:
                    self._oldest = waiting[0].since
                    await self._commit(waiting)
                    self._oldest = None
                elif not waiting and self._suspicion is None and not self._stopping.is_set():
                    await self._tidy()
                if self._suspicion is not None:
                    _refuse([*waiting, *self._queue.drain()], self._suspicion)
                    await self._recover(self._suspicion)
                self.groups += 1
        except BaseException as error:
            self.failure = sentence(error)
            self._suspicion = None
            _refuse([*waiting, *self._queue.drain()], WriterDeadError())
            raise

    def rest(self) -> None:
        """Let the writer tidy up if it has had nothing to do for a while; call it from time to time."""
        since = self._untidy_since
        if self.idle and since is not None and time.monotonic() - since > REST_AFTER_S:
            self._queue.wake()

    async def between_groups(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do something in a transaction of its own, as soon as the group that is being committed is through.

        Raises:
            UnavailableError: if that is not possible now; nothing was changed then.

        """
        return await self._visit(lambda plain: self._transact_alone(plain, work))

    async def ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Ask the write connection something, in no transaction, as soon as no group holds it.

        Raises:
            UnavailableError: if that is not possible now.

        """
        return await self._visit(lambda plain: self._ask(plain, question))

    async def _visit(self, visit: Callable[[sqlite3.Connection], T]) -> T:
        if self._suspicion is not None or self.failure is not None:
            raise DatabaseSuspectError
        try:
            return await self._connection.run(visit)
        except DatabaseSuspectError as error:
            self.suspect(error)
            raise
        except ValueError as error:  # it was closed meanwhile
            raise DatabaseSuspectError from error

    async def stop(self) -> None:
        """Refuse new commands, and let `run` end after everything that waits is committed."""
        if not self._stopping.is_set():
            self._stopping.set()
            if self.failure is None:
                self._queue.wake()

    async def _recover(self, error: DatabaseSuspectError) -> None:
        """Refuse everything until the database is open again and verified, however often that takes."""
        self.failure = sentence(error)
        log.critical("Writes are refused until the database is open again and verified", extra={"reason": self.failure})
        started = time.monotonic()
        attempt = 0
        while True:
            if self._stopping.is_set():
                raise error
            try:
                self._connection = await self._reopen()
            except DatabaseError as refusal:
                if self.failure != sentence(refusal):
                    self.failure = sentence(refusal)
                    log.error("The database could not be opened again", extra={"reason": self.failure})
            else:
                break
            self.groups += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PAUSES_S[min(attempt, len(_PAUSES_S) - 1)]):
                    await self._stopping.wait()
            attempt += 1
        log.warning(
            "The database is open again and verified; writes are taken",
            extra={"reason": sentence(error), "duration_ms": round((time.monotonic() - started) * 1000)},
        )
        self.failure = self._problem = self._suspicion = None

    async def _next_group(self) -> list[_Waiting[C, R]]:
        group: list[_Waiting[C, R]] = []
        self.idle = not self._queue
        entry = await self._queue.get()
        self.idle = False
        rows = 0
        while True:
            if entry is not None:
                group.append(entry)
                rows += entry.command.cost
            if rows >= GROUP_ROWS or not self._queue:
                return group
            entry = self._queue.get_nowait()

    async def _commit(self, group: list[_Waiting[C, R]]) -> None:
        commands = [entry.command for entry in group]
        started = time.perf_counter()
        try:
            outcomes = await self._write_in_time(commands)
        except DatabaseSuspectError as error:
            self._suspicion = error
            return
        except DatabaseBusyError:  # somebody else's doing, which passes
            _refuse([*group, *self._queue.drain()] if self._stopping.is_set() else group, DatabaseBusyError())
            return
        except TelemetrydError as error:
            self._problem = f"The last write failed: {sentence(error.__cause__ or error)}", time.monotonic()
            _refuse(group, error)
            return
        self._problem = None
        seconds = time.perf_counter() - started
        self._learn(group, seconds)
        self._metrics.commit_seconds.observe(seconds)
        self._metrics.group_commands.observe(len(group))
        self.last_commit = time.time()
        self._metrics.last_commit.set(self.last_commit)
        self._untidy_since = time.monotonic()
        for entry, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, CommandFailedError):
                _fail(entry, outcome)
            elif not entry.future.done():  # its caller may have left
                entry.future.set_result(outcome)
        self._committed()

    def _learn(self, group: list[_Waiting[C, R]], seconds: float) -> None:
        costs = [entry.command.cost for entry in group]
        rows = sum(costs)
        self._flow.measure(rows, seconds, time.monotonic() - group[0].since)
        commands = len(group) + self.depth
        size = sum(entry.command.size for entry in group) + self._queue.bytes
        fullness = max(commands / self._queue.most, size / self._queue.most_bytes)
        self._flow.advise(commands, rows + self._queue.rows, max(costs), fullness)

    async def _tidy(self) -> None:
        self._untidy_since = None
        try:
            await self._connection.run(self._rest)
        except DatabaseSuspectError as error:
            self._suspicion = error
        except UnavailableError:  # nothing was lost: the next commit's or rest's turn
            self._untidy_since = time.monotonic()

    async def _write_in_time(self, commands: list[C]) -> list[R | CommandFailedError]:
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                return await self._connection.run(lambda plain: self._write(plain, commands))
            except DatabaseBusyError:
                if self._stopping.is_set() or time.monotonic() >= deadline:
                    raise

    # Below this line everything runs in the connection's thread.

    def _rest(self, connection: sqlite3.Connection) -> None:
        try:
            self._at_rest(connection)
        except sqlite3.Error as error:
            traceback.clear_frames(error.__traceback__)
            raise _translate(error) from error

    def _write(self, connection: sqlite3.Connection, commands: list[C]) -> list[R | CommandFailedError]:
        """Commit one group in one hop.

        A group in which every command works needs no savepoints. If one fails, the group is rolled back and
        done again with a savepoint around each command, so that only the failing ones are undone.
        """
        with _translated(connection):
            try:
                return self._transact(connection, lambda: self._carry_out(connection, commands, isolated=False))
            except CommandFailedError:
                return self._transact(connection, lambda: self._carry_out(connection, commands, isolated=True))

    def _carry_out(
        self, connection: sqlite3.Connection, commands: list[C], *, isolated: bool
    ) -> list[R | CommandFailedError]:
        transaction = self._begin(connection, self._clock())
        outcomes: list[R | CommandFailedError]
        if isolated:
            outcomes = [_apply_alone(connection, transaction, command) for command in commands]
        else:
            outcomes = [*_apply(connection, transaction, commands)]
        transaction.finish()
        return outcomes

    def _transact(self, connection: sqlite3.Connection, work: Callable[[], T]) -> T:
        connection.execute("BEGIN IMMEDIATE")
        try:
            outcomes = work()
            connection.execute("COMMIT")
        except BaseException:
            # SQLite may have rolled back by itself (disk full, I/O error): then there is nothing left to undo.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._make_durable()
        return outcomes

    def _transact_alone(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
        with _translated(connection):
            return self._transact(connection, lambda: work(connection))

    def _ask(self, connection: sqlite3.Connection, question: Callable[[sqlite3.Connection], T]) -> T:
        with _translated(connection):
            return question(connection)


@contextlib.contextmanager
def _translated(connection: sqlite3.Connection) -> Iterator[None]:
    """Say what an error of SQLite or of the disk means for those who wait.

    Raises:
        TelemetrydError: with the error as its cause.

    """
    try:
        yield
    except (sqlite3.Error, MemoryError) as error:
        # The frames hold cursors, with which the connection would not really close when it is told to.
        traceback.clear_frames(error.__traceback__)
        if connection.in_transaction:
            raise DatabaseSuspectError(f"A transaction could not be ended: {error}") from error
        raise _translate(error) from error
    except OSError as error:  # the file is not at its place any more
        traceback.clear_frames(error.__traceback__)
        raise DatabaseSuspectError(str(error)) from error


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


def _translate(error: sqlite3.Error | MemoryError) -> TelemetrydError:
    """Say what a failure of the whole group means for those who wait."""
    extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    code = extended & _PRIMARY_CODE
    if code in _SUSPECT or extended == sqlite3.SQLITE_READONLY_DBMOVED:
        return DatabaseSuspectError(f"The last write failed: {error}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DatabaseBusyError()
    if code == sqlite3.SQLITE_FULL:
        return StorageFullError()
    return WriteFailedError()


def _refuse(waiting: list[_Waiting[C, R]], error: TelemetrydError) -> None:
    for entry in waiting:
        _fail(entry, error)


def _fail(entry: _Waiting[C, R], error: TelemetrydError) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
        entry.future.exception()  # a caller who left does not read it; that is no accident to report
