"""The single writer: groups queued commands, commits each group, and reports to each caller its own outcome."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from telemetryd.engine.interface import WritingEngine
from telemetryd.errors import (
    CommandFailedError,
    DatabaseBusyError,
    DatabaseError,
    DatabaseSuspectError,
    QueueFullError,
    StoppingError,
    TelemetrydError,
    UnavailableError,
    WriterDeadError,
    sentence,
)
from telemetryd.flow import Flow
from telemetryd.model.commands import Command
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics

QUEUE_BYTES: Final = 128 * 1024 * 1024
"""A queue bounded in commands alone could hold 10,000 bodies of 16 MiB."""

GROUP_ROWS: Final = 5_000
"""A group commit takes in what waits up to about so many rows; the rest goes into the next one."""

_PROBLEM_S: Final = 60

_PAUSES_S: Final = (0.1, 0.5, 1, 2, 5)
"""The pauses between attempts to open the database again; the last one repeats."""


R = TypeVar("R")


@dataclass(slots=True)
class _Waiting:
    """A command in the queue, and the future of its outcome."""

    command: Command[Any]
    future: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)


class _Queue:
    """What waits, in order, and the sums over it: whatever comes in or goes out, they are those of what is in it."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.bytes = self.rows = 0
        self._entries: asyncio.Queue[_Waiting | None] = asyncio.Queue(most)

    def __len__(self) -> int:
        return self._entries.qsize()

    def is_full(self, size: int) -> bool:
        """Return whether there is no room for a command of so many bytes; a first one may have any size."""
        return self._entries.full() or (self.bytes + size > self.most_bytes and len(self) > 0)

    def put(self, entry: _Waiting) -> None:
        """Let a command wait."""
        self._entries.put_nowait(entry)
        self.bytes += entry.command.size
        self.rows += entry.command.cost

    def wake(self) -> None:
        """Let `get` return, even if nothing waits."""
        if not len(self):
            self._entries.put_nowait(None)

    async def get(self) -> _Waiting | None:
        """Return the next command as soon as there is one, or None after `wake`."""
        return self._without(await self._entries.get())

    def get_nowait(self) -> _Waiting | None:
        """Return the next command, or None in the place of a `wake`; there must be one of them."""
        return self._without(self._entries.get_nowait())

    def drain(self) -> Iterator[_Waiting]:
        """Take out everything that waits."""
        while len(self):
            entry = self.get_nowait()
            if entry is not None:
                yield entry

    def _without(self, entry: _Waiting | None) -> _Waiting | None:
        if entry is not None:
            self.bytes -= entry.command.size
            self.rows -= entry.command.cost
        return entry


class Writer:
    """Owns the write connection; nothing else may write.

    Args:
        engine: the writing half of the database's engine; nothing else holds it.
        committed: called in the event loop after each COMMIT, when every caller has its outcome; it has to be quick.
        busy_timeout_s: how long a group is tried again while another process has the database locked, in
            attempts as long as the connection's own busy timeout. A stop ends that sooner.
        queue_max: how many commands may wait.
        queue_bytes: how many bytes they may hold together, besides a first one of any size.
        flow: learns from each group what to advise to those who send.
        metrics: where group sizes and commit times are counted.
        rest_after_s: without a commit for so long, it tidies up.

    """

    def __init__(
        self,
        engine: WritingEngine,
        *,
        committed: Callable[[], None] = lambda: None,
        busy_timeout_s: float,
        queue_max: int,
        queue_bytes: int = QUEUE_BYTES,
        flow: Flow,
        metrics: Metrics,
        rest_after_s: float = 5.0,
    ) -> None:
        self._engine = engine
        self._committed = committed
        self._busy_timeout_s = busy_timeout_s
        self._queue: _Queue = _Queue(queue_max, queue_bytes)
        self._flow = flow
        self._metrics = metrics
        self.rest_after_s = rest_after_s
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
        """The seconds for which the oldest command waits; that is the first of the group being committed."""
        return 0.0 if self._oldest is None else time.monotonic() - self._oldest

    @property
    def problem(self) -> str | None:
        """Why writes are not taken, or not stored: `failure`, or the failure of the last group.

        A failure is reported for a minute at most, or nobody might dare to try again.
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

    def submit(self, command: Command[R]) -> asyncio.Future[R]:
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
        """Return the advice for writers; made once for each group, so that it costs an answer nothing."""
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
        waiting: list[_Waiting] = []
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
        if self.idle and since is not None and time.monotonic() - since > self.rest_after_s:
            self._queue.wake()

    async def stop(self) -> None:
        """Refuse new commands, and let `run` end after everything that waits is committed."""
        if not self._stopping.is_set():
            self._stopping.set()
            if self.failure is None:
                self._queue.wake()
            else:
                self._engine.interrupt()  # it may be verifying a large database

    async def close(self) -> None:
        """Close the engine; call it when `run` has ended."""
        await self._engine.close(is_clean=self.failure is None)

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
                await self._engine.reopen()
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

    async def _next_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
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

    async def _commit(self, group: list[_Waiting]) -> None:
        commands = [entry.command for entry in group]
        started = time.perf_counter()
        try:
            outcomes = await self._write_in_time(commands)
        except DatabaseSuspectError as error:
            self._suspicion = error
            return
        except DatabaseBusyError:  # another program's lock, which passes
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

    def _learn(self, group: list[_Waiting], seconds: float) -> None:
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
            await self._engine.tidy_up()
        except DatabaseSuspectError as error:
            self._suspicion = error
        except UnavailableError:  # nothing was lost: the next commit's or rest's turn
            self._untidy_since = time.monotonic()

    async def _write_in_time(self, commands: list[Command[Any]]) -> Sequence[Any | CommandFailedError]:
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                return await self._engine.write(commands)
            except DatabaseBusyError:
                if self._stopping.is_set() or time.monotonic() >= deadline:
                    raise


def _refuse(waiting: list[_Waiting], error: TelemetrydError) -> None:
    for entry in waiting:
        _fail(entry, error)


def _fail(entry: _Waiting, error: TelemetrydError) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
        entry.future.exception()  # a caller who left does not read it; that is no accident to report
