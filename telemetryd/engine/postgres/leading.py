"""One session of each daemon that looks around: what others have committed, who leads, and what is due once for all.

One daemon leads, the one whose session holds a lock. It may have lost that without having noticed; so whatever a leader
does is right even if two do it: each piece of work takes a lock for its own transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from telemetryd.engine.postgres import deltas
from telemetryd.engine.postgres.connection import Connection, Plain, Target, connect, first_line, writing_session
from telemetryd.engine.postgres.groups import transact
from telemetryd.engine.postgres.schema import CLASS, LEADING
from telemetryd.engine.postgres.statements.numbers import NEWEST, forget_deletions
from telemetryd.errors import DatabaseError, DatabaseSuspectError, TelemetrydError, sentence
from telemetryd.ops.logs import log

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


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the commit sequence stands."""

    newest: int
    epoch: str


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

    """

    def __init__(self, target: Target, poll_s: float) -> None:
        self._target, self._poll_s = target, poll_s
        self._connection: Connection | None = None
        self.leads = False
        """Whether this daemon does what is due once."""
        self.seen: Stand | None = None
        """The furthest stand that was seen."""
        self._due: dict[str, float] = {}

    async def open(self) -> Connection:
        """Connect, and return the connection for others to look at before `run` is begun.

        Raises:
            DatabaseError: if that is not possible.

        """
        values = {**writing_session(self._target), "idle_in_transaction_session_timeout": "60s"}
        self._connection = await connect(self._target, "session", values)
        self.leads = await self._connection.run(_try_to_lead)
        return self._connection

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
                self.leads = False
                reason = sentence(error) if isinstance(error, DatabaseError) else first_line(error)
                lost(DatabaseSuspectError(f"The connection to PostgreSQL was lost: {reason}"))
                await self.drop()
                await asyncio.sleep(_AGAIN_S)

    async def drop(self) -> None:
        """Close the connection at once, and with it give up leading."""
        self.leads = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.cut()
            await connection.close()

    async def _look_around(self, connection: Connection, changed: Callable[[], None]) -> None:
        while True:
            found = await connection.run(stand)
            if found != self.seen:
                self.seen = found
                changed()
            if self._is_due("lead", _LEAD_EVERY_S):
                self.leads = await connection.run(_try_to_lead)
            await self._do_chores(connection)
            await asyncio.sleep(self._poll_s)

    async def _do_chores(self, connection: Connection) -> None:
        try:
            if self._is_due("count", _COUNT_EVERY_S):
                waiting = await connection.run(deltas.waiting)
                if waiting >= (deltas.DUE if self.leads else _MANY) or (
                    waiting and self.leads and self._is_due("fold", _FOLD_EVERY_S)
                ):
                    await connection.run(_fold_everything)
            if self.leads and self._is_due("forget", _FORGET_EVERY_S):
                await connection.run(_forget_everything)
        except DatabaseSuspectError:
            raise psycopg.OperationalError("a chore was cut off") from None
        except TelemetrydError as error:
            reason = sentence(error.__cause__ or error)
            log.warning("Upkeep postponed", extra={"task": "counts", "error_message": reason})

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


def _fold_everything(plain: Plain) -> None:
    while transact(plain, deltas.fold):
        pass


def _forget_everything(plain: Plain) -> None:
    def forget(inside: Plain) -> bool:
        inside.execute("SELECT telemetryd_take_turn(false)")
        return forget_deletions(inside)

    while transact(plain, forget):
        pass


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
