"""A small pool of read-only connections: run one query before its deadline, or interrupt it."""

from __future__ import annotations

import asyncio
import sqlite3
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from telemetryd.database import Connection, open_reader
from telemetryd.errors import QueryTimeoutError, UnavailableError

T = TypeVar("T")

_INTERRUPT_AGAIN_S: Final = 0.02


class Readers:
    """Connections that cannot write; each runs one query at a time.

    Half of them are for long queries, so that quick ones need not wait until those are through.
    """

    def __init__(self, connections: list[Connection], timeout_s: float) -> None:
        self._all = connections
        # Those that run nothing.
        self._quick: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        self._long: asyncio.LifoQueue[Connection] = asyncio.LifoQueue() if len(connections) > 1 else self._quick
        for place, connection in enumerate(connections):
            (self._long if place < len(connections) // 2 else self._quick).put_nowait(connection)
        self._timeout_s = timeout_s
        self._closed = False

    @classmethod
    async def open(cls, path: Path, count: int, timeout_s: float, busy_timeout_ms: int) -> Readers:
        """Open the pool on an existing database."""
        connections: list[Connection] = []
        try:
            for _ in range(count):
                connections.append(await open_reader(path, min(busy_timeout_ms, round(timeout_s * 1000))))
        except BaseException:
            for connection in connections:
                await connection.close()
            raise
        return cls(connections, timeout_s)

    @property
    def are_at_work(self) -> bool:
        """Whether a query runs."""
        return sum(queue.qsize() for queue in {self._quick, self._long}) < len(self._all)

    async def fetch(self, query: Callable[[sqlite3.Connection], T], *, is_long: bool = False) -> T:
        """Run a query in the thread of an idle connection; waiting for one counts towards the deadline.

        Args:
            query: called with the connection.
            is_long: whether it may read many runs, however few it answers.

        Raises:
            QueryTimeoutError: if there is no answer when the deadline comes; the query is interrupted.
            UnavailableError: if SQLite cannot read.

        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        idle = self._long if is_long else self._quick
        try:
            async with asyncio.timeout_at(deadline):
                connection = await idle.get()
        except TimeoutError:
            raise QueryTimeoutError("Too many slow queries are running; try again later") from None
        if self._closed:
            idle.put_nowait(connection)  # for the next who waits, to be told the same
            raise UnavailableError("The database is being closed; try again shortly")
        # The query is shielded: if its caller leaves, the connection still must not be handed on before it ends.
        answer = connection.start(query)
        answer.add_done_callback(lambda ended: _take_back(idle, connection, ended))
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.shield(answer)
        except TimeoutError:
            _end(connection, answer)
            raise QueryTimeoutError(
                f"The query took longer than {self._timeout_s:g} s and was interrupted; narrow its filters"
            ) from None
        except asyncio.CancelledError:
            _end(connection, answer)
            raise
        except sqlite3.Error as error:
            # The frames hold cursors, with which the connection would not really close when it is told to.
            traceback.clear_frames(error.__traceback__)
            raise UnavailableError("The database cannot be read now; try again later") from error

    async def close(self) -> None:
        """Interrupt what runs, refuse what waits, and close every connection."""
        self._closed = True
        for connection in self._all:
            closing = asyncio.ensure_future(connection.close())
            _end(connection, closing)
            await closing


def _take_back(idle: asyncio.LifoQueue[Connection], connection: Connection, ended: asyncio.Future[T]) -> None:
    if not ended.cancelled():
        ended.exception()  # a caller who left does not read it; that is no accident to report
    idle.put_nowait(connection)


def _end(connection: Connection, answer: asyncio.Future[T]) -> None:
    """Interrupt a query again and again until it has ended: before it has begun, an interrupt has no effect.

    After it has ended, the connection may be busy with somebody else's query, which must not be hit.
    """
    if not answer.done():
        connection.interrupt_now()
        asyncio.get_running_loop().call_later(_INTERRUPT_AGAIN_S, _end, connection, answer)
