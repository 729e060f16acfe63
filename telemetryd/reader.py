"""A small pool of read-only connections: run one query before its deadline, or interrupt it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from telemetryd.database import Connection, open_reader
from telemetryd.errors import QueryTimeoutError, UnavailableError

T = TypeVar("T")


class Readers:
    """Connections that cannot write; each runs one query at a time."""

    def __init__(self, connections: list[Connection], timeout_s: float) -> None:
        self._all = connections
        self._idle: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        for connection in connections:
            self._idle.put_nowait(connection)
        self._timeout_s = timeout_s

    @classmethod
    async def open(cls, path: Path, count: int, timeout_s: float, busy_timeout_ms: int) -> Readers:
        """Open the pool on an existing database."""
        connections: list[Connection] = []
        try:
            for _ in range(count):
                connections.append(await open_reader(path, busy_timeout_ms))
        except BaseException:
            for connection in connections:
                await connection.close()
            raise
        return cls(connections, timeout_s)

    async def fetch(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a query in the thread of an idle connection; waiting for one counts towards the deadline.

        Raises:
            QueryTimeoutError: if there is no answer when the deadline comes; the query is interrupted.
            UnavailableError: if SQLite cannot read.

        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._idle.get()
        except TimeoutError:
            raise QueryTimeoutError("Too many slow queries are running; try again later") from None
        # The query is shielded: if its caller leaves, the connection still must not be handed on before it ends.
        answer = asyncio.ensure_future(connection.run(query))
        answer.add_done_callback(lambda _: self._idle.put_nowait(connection))
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.shield(answer)
        except TimeoutError:
            await connection.interrupt()
            raise QueryTimeoutError(
                f"The query took longer than {self._timeout_s:g} s and was interrupted; narrow its filters"
            ) from None
        except asyncio.CancelledError:
            await connection.interrupt()
            raise
        except sqlite3.Error as error:
            raise UnavailableError(f"The database cannot be read now: {error}") from error

    async def close(self) -> None:
        """Interrupt what runs, and close every connection."""
        for connection in self._all:
            await connection.interrupt()
        for connection in self._all:
            await connection.close()
