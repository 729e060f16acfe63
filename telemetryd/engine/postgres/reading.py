"""A small pool of connections that only read: runs each query within its deadline, or ends it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import psycopg

from telemetryd.engine.lanes import MOST_WAITING, Lane, share_out
from telemetryd.engine.postgres.connection import (
    Connection,
    Plain,
    Target,
    connect,
    is_lost,
    reading_session,
    translate_reading,
)
from telemetryd.engine.postgres.statements.answers import REGISTRY
from telemetryd.errors import DatabaseError, QueryTimeoutError, UnavailableError
from telemetryd.model.changes import Changes, ListChanges
from telemetryd.model.queries import Query

A = TypeVar("A")
T = TypeVar("T")

_CANCEL_S: Final = 2.0
"""How long a server may take to end a query; after that the connection is broken without it."""

# Without statistics (a new database has none) the planner takes every filter for so rare that it rather sorts all runs
# that match. What it must sort it still does.
_PLANS: Final = {"enable_incremental_sort": "off"}

_CANCEL_AGAIN_S: Final = 0.05
_CLOSED: Final = "The database is being closed; try again shortly"

REGISTRY.load()


def session(timeout_s: float) -> Mapping[str, str]:
    """Return the settings of a session that answers queries."""
    return {**reading_session(timeout_s), **_PLANS}


@dataclass(slots=True)
class _Place:
    """One place in the pool: its connection is opened when it is needed first, and again when it was lost."""

    connection: Connection | None = None
    ending: asyncio.Task[None] | None = None
    """What ends a query that nobody waits for any more: until that is done, nobody else is let in."""


class Readers:
    """Connections that cannot write; each runs one query at a time (`lanes.share_out`).

    Args:
        target: the database.
        count: how many connections there are, besides that of the feed.
        timeout_s: how long a query may take, with the time for which it waits.
        most_waiting: how many queries may wait.

    """

    def __init__(self, target: Target, count: int, timeout_s: float, most_waiting: int = MOST_WAITING) -> None:
        self._target = target
        self._places = [_Place() for _ in range(1 + count)]
        self._idle = share_out(self._places)
        self._sizes = {idle: idle.qsize() for idle in self._idle.values()}
        self._waiting = 0
        self._most_waiting = most_waiting
        self._timeout_s = timeout_s
        self._closed = False
        self._ending: set[asyncio.Task[None]] = set()

    async def read(self, query: Query[A]) -> A:
        """Answer a query (see `ReadingEngine.read`)."""
        return await self.fetch(partial(_answer, query), Lane.LONG if REGISTRY.is_long(query) else Lane.QUICK)

    async def read_news(self, query: ListChanges) -> Changes:
        """Answer a query of the feed through the connection that is there for it alone."""
        return await self.fetch(partial(_answer, query), Lane.FEED)

    async def fetch(self, query: Callable[[Plain], T], lane: Lane = Lane.QUICK) -> T:
        """Run a query in the thread of an idle connection; waiting for one counts towards the deadline.

        Args:
            query: called with the connection.
            lane: which connections may run it.

        Raises:
            QueryTimeoutError: if there is no answer when the deadline comes (the query is ended), or if too many wait
                already.
            UnavailableError: if PostgreSQL cannot be read.

        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        idle = self._idle[lane]
        if self._closed:
            raise UnavailableError(_CLOSED)
        if self._waiting >= self._most_waiting and idle.empty():
            raise QueryTimeoutError("Too many queries are waiting; try again later")
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                place = await idle.get()
        except TimeoutError:
            raise QueryTimeoutError("Too many slow queries are running; try again later") from None
        finally:
            self._waiting -= 1
        try:
            return await self._fetch(place, query, deadline)
        finally:
            ending, place.ending = place.ending, None
            if ending is None:
                idle.put_nowait(place)
            else:
                ending.add_done_callback(lambda _: idle.put_nowait(place))

    async def _fetch(self, place: _Place, query: Callable[[Plain], T], deadline: float) -> T:
        """Run a query; on a new connection once more if the old one turns out to be lost."""
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    was_open = place.connection is not None
                    try:
                        return await self._run(place, query)
                    except psycopg.Error as error:
                        if is_lost(error):
                            await self._drop(place)
                        if self._closed:
                            raise UnavailableError(_CLOSED) from error
                        if not (was_open and is_lost(error)):
                            raise translate_reading(error, self._timeout_s) from error
        except TimeoutError:
            raise QueryTimeoutError(
                f"The query took longer than {self._timeout_s:g} s and was interrupted; narrow its filters"
            ) from None

    async def _run(self, place: _Place, query: Callable[[Plain], T]) -> T:
        connection = place.connection
        if connection is None and not self._closed:
            connection = place.connection = await self._open(place)
        if connection is None or self._closed:
            raise UnavailableError(_CLOSED)
        answer = connection.start(query)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            # A connection that was told to end a query is not used again: the next query might be hit.
            answer.add_done_callback(lambda ended: ended.exception())  # which nobody waits for any more
            if place.connection is connection:
                place.connection, place.ending = None, self._see_to(_cancel(connection, answer))
            raise

    async def _open(self, place: _Place) -> Connection:
        opening = asyncio.create_task(connect(self._target, "reader", session(self._timeout_s)))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            place.ending = self._see_to(_close(opening))
            raise
        except DatabaseError as error:
            raise UnavailableError("The database cannot be read now; try again later") from error

    def _see_to(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Do something that comes to its end even if nobody waits for it, before everything is closed."""
        ending = asyncio.create_task(work)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return ending

    async def _drop(self, place: _Place) -> None:
        connection, place.connection = place.connection, None
        if connection is not None:
            await asyncio.shield(self._see_to(connection.drop()))

    async def close(self) -> None:
        """End what runs, refuse what waits, and close every connection; done again, it does nothing."""
        if self._closed:
            return
        self._closed = True
        for place in self._places:
            self._give_up(place)
        for idle, size in self._sizes.items():
            for _ in range(size):  # each comes back when its query has ended, and when those that wait are refused
                self._give_up(await idle.get())
        while self._ending:
            await asyncio.wait(self._ending)

    def _give_up(self, place: _Place) -> None:
        connection, place.connection = place.connection, None
        if connection is not None:
            self._see_to(_end(connection))


def _answer(query: Query[A], plain: Plain) -> A:
    return REGISTRY.answer(plain, query)


async def _close(opening: asyncio.Task[Connection]) -> None:
    """Close a connection that nobody waits for any more, as soon as it is open."""
    with contextlib.suppress(DatabaseError):
        await (await opening).close()


async def _cancel(connection: Connection, answer: asyncio.Future[T]) -> None:
    """End a query on the server, and close its connection.

    Before the query has come to the server, a cancellation has no effect; so it is sent again.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _CANCEL_S
    while not answer.done() and loop.time() < deadline:
        with contextlib.suppress(psycopg.Error):
            await asyncio.to_thread(connection.plain.cancel_safe, timeout=_CANCEL_S)
        await asyncio.wait((answer,), timeout=_CANCEL_AGAIN_S)
    await connection.drop()


async def _end(connection: Connection) -> None:
    """End what runs on a connection, if anything does, and close it."""
    with contextlib.suppress(psycopg.Error):
        await asyncio.to_thread(connection.plain.cancel_safe, timeout=_CANCEL_S)
    await connection.drop()
