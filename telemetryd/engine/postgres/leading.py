"""One session of each daemon that looks around: what others have committed, who leads, and what is due once for all.

For each chore one daemon leads, the one whose session holds its lock. It may have lost that without having noticed; so
whatever a leader does is right even if two do it: each piece of work takes a lock for its own transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import psycopg

from telemetryd.engine.postgres.connection import Connection, Plain, Target, connect, first_line, writing_session
from telemetryd.engine.postgres.epochs import Stand, stand
from telemetryd.engine.postgres.groups import transact
from telemetryd.engine.postgres.schema import CLASS, LEADING, LEADING_ALERTS, LEADING_PRUNING, LEADING_REAPING
from telemetryd.engine.postgres.statements import deltas
from telemetryd.engine.postgres.statements.numbers import forget_deletions
from telemetryd.errors import DatabaseError, DatabaseSuspectError, TelemetrydError, sentence
from telemetryd.model.chores import Chore
from telemetryd.ops.logs import log

T = TypeVar("T")

_LOCKS: Final = {
    Chore.COUNTS: LEADING,
    Chore.ALERTS: LEADING_ALERTS,
    Chore.PRUNING: LEADING_PRUNING,
    Chore.REAPING: LEADING_REAPING,
}
_LEAD: Final = "SELECT pg_try_advisory_lock(%s, %s)"
_RESIGN: Final = "SELECT pg_advisory_unlock(%s, %s)"
_HELD: Final = """
    SELECT objid::int FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND pid = pg_backend_pid()
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_LEAD_NAME: Final = "lead"
_LEAD_EVERY_S: Final = 2.0
_FOLD_EVERY_S: Final = 5.0
_COUNT_EVERY_S: Final = 1.0
_FORGET_EVERY_S: Final = 60.0
_MANY: Final = 50_000
"""So many changes any daemon adds up: the leader seems to be gone."""
_AGAIN_S: Final = 1.0
_LEASE_S: Final = 10.0
"""For so long a daemon leads without having seen again that it does."""


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
        self._wanted = {Chore.COUNTS}
        self._led_at: dict[Chore, float] = {}
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

    def leads(self, chore: Chore) -> bool:
        """Return whether this daemon does what is due once; who asks can do it, and tries to lead from now on."""
        if chore not in self._wanted:
            self._wanted.add(chore)
            self._due.pop(_LEAD_NAME, None)
        led_at = self._led_at.get(chore)
        return led_at is not None and time.monotonic() - led_at < _LEASE_S

    def resign(self, chore: Chore) -> None:
        """Leave a chore to others from now on."""
        self._wanted.discard(chore)
        self._led_at.pop(chore, None)
        self._due.pop(_LEAD_NAME, None)

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
        self._led_at = {}
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
            if self._is_due(_LEAD_NAME, _LEAD_EVERY_S):
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
        now, wanted = time.monotonic(), frozenset(self._wanted if self._may_lead else ())
        led = await self._ask(connection, lambda plain: _try_to_lead(plain, wanted))
        self._led_at = dict.fromkeys(led & self._wanted, now)

    async def _do_chores(self, connection: Connection) -> None:
        try:
            if self._is_due("count", _COUNT_EVERY_S):
                waiting = await self._ask(connection, deltas.waiting)
                leads = self.leads(Chore.COUNTS)
                if waiting >= (deltas.DUE if leads else _MANY) or (
                    waiting and leads and self._is_due("fold", _FOLD_EVERY_S)
                ):
                    await self._repeat(connection, deltas.fold)
            if self.leads(Chore.COUNTS) and self._is_due("forget", _FORGET_EVERY_S):
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


def _try_to_lead(plain: Plain, wanted: frozenset[Chore]) -> set[Chore]:
    """Return the chores that our session leads; a lock is taken only if it does not hold it: it could take it twice."""
    held = {lock for (lock,) in plain.execute(_HELD, (CLASS,))}
    for chore, lock in _LOCKS.items():
        if chore in wanted and lock not in held and plain.execute(_LEAD, (CLASS, lock)).fetchall()[0][0]:
            held.add(lock)
        elif chore not in wanted and lock in held:
            plain.execute(_RESIGN, (CLASS, lock))
            held.discard(lock)
    return {chore for chore, lock in _LOCKS.items() if lock in held}


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
