"""A small pool of read-only connections: runs each query within its deadline, or interrupts it."""

from __future__ import annotations

import asyncio
import sqlite3
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from telemetryd.engine.lanes import MOST_WAITING, Lane, share_out
from telemetryd.engine.sqlite.connection import Connection, open_reader
from telemetryd.errors import QueryTimeoutError, UnavailableError

T = TypeVar("T")

_INTERRUPT_AGAIN_S: Final = 0.02


class Readers:
    """Connections that cannot write; each runs one query at a time (`lanes.share_out`)."""

    def __init__(self, connections: list[Connection], timeout_s: float, most_waiting: int = MOST_WAITING) -> None:
        self._all = connections
        self._idle = share_out(connections)
        self._waiting = 0
        self._most_waiting = most_waiting
        self._timeout_s = timeout_s
        self._closed = False

    @classmethod
    async def open(
        cls, path: Path, count: int, timeout_s: float, busy_timeout_ms: int, *, most_waiting: int = MOST_WAITING
    ) -> Readers:
        """Open the pool on an existing database: so many connections, and that of the feed."""
        connections: list[Connection] = []
        try:
            for _ in range(1 + count):
                connections.append(await open_reader(path, min(busy_timeout_ms, round(timeout_s * 1000))))
        except BaseException:
            for connection in connections:
                await connection.close()
            raise
        return cls(connections, timeout_s, most_waiting)

    @property
    def are_at_work(self) -> bool:
        """Whether a query runs."""
        return sum(queue.qsize() for queue in set(self._idle.values())) < len(self._all)

    async def fetch(self, query: Callable[[sqlite3.Connection], T], lane: Lane = Lane.QUICK) -> T:
        """Run a query in the thread of an idle connection; waiting for one counts towards the deadline.

        Args:
            query: called with the connection.
            lane: which connections may run it.

        Raises:
            QueryTimeoutError: if there is no answer when the deadline comes (the query is interrupted), or if too
                many wait already.
            UnavailableError: if SQLite cannot read.

        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        idle = self._idle[lane]
        if self._waiting >= self._most_waiting and idle.empty():
            raise QueryTimeoutError("Too many queries are waiting; try again later")
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                connection = await idle.get()
        except TimeoutError:
            raise QueryTimeoutError("Too many slow queries are running; try again later") from None
        finally:
            self._waiting -= 1
        if self._closed:
            idle.put_nowait(connection)  # for the next waiter, which gets the same error
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
            raise UnavailableError("The database cannot be read now; try again later") from error

    async def close(self) -> None:
        """Interrupt what runs, refuse what waits, and close every connection."""
        self._closed = True
        for connection in self._all:
            closing = asyncio.ensure_future(connection.close())
            _end(connection, closing)
            await closing


def _take_back(idle: asyncio.LifoQueue[Connection], connection: Connection, ended: asyncio.Future[T]) -> None:
    if not ended.cancelled() and (error := ended.exception()) is not None:
        # The frames hold cursors: with one the connection would not really close, and while a statement of an
        # interrupted query is open, SQLite interrupts each new one too (sqlite.org/c3ref/interrupt.html).
        traceback.clear_frames(error.__traceback__)
    idle.put_nowait(connection)


def _end(connection: Connection, answer: asyncio.Future[T]) -> None:
    """Interrupt a query again and again until it has ended: before it has begun, an interrupt has no effect.

    After it has ended, the connection may be busy with another query, which must not be hit.
    """
    if not answer.done():
        connection.interrupt_now()
        asyncio.get_running_loop().call_later(_INTERRUPT_AGAIN_S, _end, connection, answer)
