"""One session of each daemon that looks around: what others have committed, who leads, and what is due once for all.

One daemon leads, the one whose session holds a lock. It may have lost that without having noticed; so whatever a leader
does is right even if two do it: each piece of work takes a lock for its own transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import psycopg

from telemetryd.engine.postgres.connection import Connection, Plain, Target, connect, first_line, writing_session
from telemetryd.engine.postgres.groups import transact
from telemetryd.engine.postgres.schema import CLASS, LEADING
from telemetryd.engine.postgres.statements import deltas
from telemetryd.engine.postgres.statements.numbers import NEWEST, forget_deletions
from telemetryd.errors import DatabaseError, DatabaseSuspectError, TelemetrydError, sentence
from telemetryd.ops.logs import log

T = TypeVar("T")

_STAND: Final = f"SELECT {NEWEST}, (SELECT epoch FROM change_feed)"
_LEAD: Final = "SELECT pg_try_advisory_lock(%s, %s)"
_HOLDS: Final = """
    SELECT EXISTS (
        SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND objid = %s AND pid = pg_backend_pid()
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    )
"""
_LEAD_EVERY_S: Final = 2.0
_FOLD_EVERY_S: Final = 5.0
_COUNT_EVERY_S: Final = 1.0
_FORGET_EVERY_S: Final = 60.0
_MANY: Final = 50_000
"""So many changes any daemon adds up: the leader seems to be gone."""
_AGAIN_S: Final = 1.0
_LEASE_S: Final = 10.0
"""For so long a daemon leads without having seen again that it does."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the commit sequence stands."""

    newest: int
    epoch: str

    def lacks_what_was(self, before: Stand) -> bool:
        """Return whether commits are gone that were there before."""
        return self.epoch == before.epoch and self.newest < before.newest


def stand(plain: Plain) -> Stand:
    """Return where the commit sequence stands."""
    return Stand(*plain.execute(_STAND).fetchall()[0])


def make_epoch(plain: Plain, seen: Stand) -> Stand:
    """Begin a new epoch, after every number that was seen: commits that subscribers know of are lost."""
    plain.execute("SELECT telemetryd_take_turn(false)")
    plain.execute(
        "UPDATE change_feed SET epoch = left(replace(gen_random_uuid()::text, '-', ''), 12), "
        "floor = greatest(floor, %(newest)s), horizon = greatest(horizon, %(newest)s)",
        {"newest": seen.newest},
    )
    plain.execute("SELECT setval('numbers', greatest(nextval('numbers'), %s + 1))", (seen.newest,))
    return stand(plain)


class Session:
    """Looks around for one daemon.

    Args:
        target: the database.
        poll_s: how often to look for what others have committed.
        answer_s: how long to wait for an answer of the server.
        may_lead: whether it may be the one that leads.

    """

    def __init__(self, target: Target, poll_s: float, answer_s: float, *, may_lead: bool = True) -> None:
        self._may_lead = may_lead
        self._target, self._poll_s, self._answer_s = target, poll_s, answer_s
        self._connection: Connection | None = None
        self._led_at: float | None = None
        self.seen: Stand | None = None
        """The furthest stand that we or a subscriber of ours know of."""
        self._due: dict[str, float] = {}

    async def open(self) -> Connection:
        """Connect, and return the connection for others to look at before `run` is begun.

        Raises:
            DatabaseError: if that is not possible.

        """
        values = {**writing_session(self._target), "idle_in_transaction_session_timeout": "60s"}
        self._connection = await connect(self._target, "session", values)
        await self._try_to_lead(self._connection)
        return self._connection

    @property
    def leads(self) -> bool:
        """Whether this daemon does what is due once."""
        return self._led_at is not None and time.monotonic() - self._led_at < _LEASE_S

    def note(self, found: Stand) -> None:
        """Take note of a stand that a subscriber is told of."""
        if self.seen is not None and self.seen.lacks_what_was(found):
            self.seen = found

    async def run(self, changed: Callable[[], None], lost: Callable[[DatabaseSuspectError], None]) -> None:
        """Look around for ever; cancel it to end it.

        Args:
            changed: called when something was committed, by whomever.
            lost: called with the reason when the server cannot be reached.

        """
        while True:
            try:
                connection = self._connection or await self.open()
                await self._look_around(connection, changed)
            except (psycopg.Error, DatabaseError) as error:
                reason = sentence(error) if isinstance(error, DatabaseError) else first_line(error)
                lost(DatabaseSuspectError(f"The connection to PostgreSQL was lost: {reason}"))
            finally:
                await self.drop()  # whatever has happened, somebody has to lead
            await asyncio.sleep(_AGAIN_S)

    async def drop(self) -> None:
        """Close the connection at once, and with it give up leading."""
        self._led_at = None
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.drop()

    async def _look_around(self, connection: Connection, changed: Callable[[], None]) -> None:
        told: Stand | None = None
        while True:
            before = self.seen  # as it is before the server is asked: a reader may be told more meanwhile
            found = await self._ask(connection, stand)
            if before is not None and found.lacks_what_was(before):
                raise psycopg.OperationalError("the server lacks changes that were there before")
            if self.seen is None or not found.lacks_what_was(self.seen):
                self.seen = found
            if found != told:
                told = found
                changed()
            if self._is_due("lead", _LEAD_EVERY_S):
                await self._try_to_lead(connection)
            await self._do_chores(connection)
            await asyncio.sleep(self._poll_s)

    async def _ask(self, connection: Connection, function: Callable[[Plain], T]) -> T:
        """Call a function with the connection.

        Raises:
            psycopg.Error: if the server refuses, or does not answer.

        """
        try:
            async with asyncio.timeout(self._answer_s):
                return await connection.run(function)
        except TimeoutError:
            raise psycopg.OperationalError(f"the server has not answered for {self._answer_s:g} s") from None

    async def _try_to_lead(self, connection: Connection) -> None:
        now = time.monotonic()
        self._led_at = now if self._may_lead and await self._ask(connection, _try_to_lead) else None

    async def _do_chores(self, connection: Connection) -> None:
        try:
            if self._is_due("count", _COUNT_EVERY_S):
                waiting = await self._ask(connection, deltas.waiting)
                if waiting >= (deltas.DUE if self.leads else _MANY) or (
                    waiting and self.leads and self._is_due("fold", _FOLD_EVERY_S)
                ):
                    await self._repeat(connection, deltas.fold)
            if self.leads and self._is_due("forget", _FORGET_EVERY_S):
                await self._repeat(connection, _forget)
        except DatabaseSuspectError:
            raise psycopg.OperationalError("a chore was cut off") from None
        except TelemetrydError as error:
            reason = sentence(error.__cause__ or error)
            log.warning("Upkeep postponed", extra={"task": "counts", "error_message": reason})

    async def _repeat(self, connection: Connection, work: Callable[[Plain], bool]) -> None:
        """Do something in one transaction after the other, until nothing is left of it."""
        while await self._ask(connection, partial(transact, work=work)):
            pass

    def _is_due(self, chore: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(chore, 0.0):
            return False
        self._due[chore] = now + every_s
        return True


def _try_to_lead(plain: Plain) -> bool:
    """Return whether our session holds the lock, taken only if it does not: a session may take it twice."""
    if plain.execute(_HOLDS, (CLASS, LEADING)).fetchall()[0][0]:
        return True
    return bool(plain.execute(_LEAD, (CLASS, LEADING)).fetchall()[0][0])


def _forget(plain: Plain) -> bool:
    plain.execute("SELECT telemetryd_take_turn(false)")
    return forget_deletions(plain)


def check_for_pooler(target: Target, first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    """Stop where a pooler hands one session of the server to several of ours: locks and settings would be nobody's.

    Args:
        target: the database.
        first: the server's process for one of our sessions, asked twice.
        second: that of another one, asked in between.

    Raises:
        DatabaseError: then.

    """
    if first[0] != first[1] or second[0] in first:
        raise DatabaseError(
            f"{target.name} is reached through a pooler in transaction mode, which breaks sessions up; connect to the "
            "server itself, or set pool_mode = session"
        )
