"""Carries out one group of commands in one transaction, in the write connection's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import psycopg
from psycopg import pq

from telemetryd.engine.postgres.connection import Plain, first_line, is_of_one, is_passing, translate
from telemetryd.engine.postgres.statements.commands import Transaction
from telemetryd.errors import CommandFailedError, DatabaseSuspectError, TelemetrydError, UnavailableError, sentence
from telemetryd.model.commands import Command

T = TypeVar("T")
Outcome = Any | CommandFailedError

_ATTEMPTS: Final = 4
_NO_STANDBY: Final = "TD001"
_NO_STANDBY_ANY_MORE: Final = "TD002"
"""What `telemetryd_require_standby` raises before and after a COMMIT."""


_WAIT_FOR_STANDBY: Final = "SyncRepWaitForLSN"
"""The function of the server (syncrep.c) that warns if it is cancelled; its words depend on the server's language."""


class Notices:
    """What the server remarks on one connection.

    A warning of the wait for the standby means that it was cancelled: the server says that the COMMIT is done, and on
    the standby it is not (patroni/patroni#1412). Other warnings mean nothing here.
    """

    def __init__(self, plain: Plain) -> None:
        self._warnings: list[str] = []
        plain.add_notice_handler(self._note)

    def _note(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.source_function == _WAIT_FOR_STANDBY:
            self._warnings.append(diagnostic.message_primary or "a warning")

    def forget(self) -> None:
        """Forget what was remarked until now."""
        self._warnings.clear()

    def check(self) -> None:
        """Raise DatabaseSuspectError if the server has warned since."""
        if self._warnings:
            raise DatabaseSuspectError(f"It is unknown whether a standby holds the last commit: {self._warnings[0]}")


class Groups:
    """Writes groups.

    Args:
        clock: gives the moment, one for each group, as stored text.
        needs_standby: whether a synchronous standby has to be there.

    """

    def __init__(self, clock: Callable[[], str], *, needs_standby: bool) -> None:
        self._clock = clock
        self._needs_standby = needs_standby
        self.since: float | None = None
        """When a group that is being written was begun, or None."""

    def write(self, plain: Plain, notices: Notices, commands: Sequence[Command[Any]]) -> list[Outcome]:
        """Commit one group, and return the outcome of each command.

        If the database refuses one of the commands, the group is rolled back, and written as two halves; so at last
        only what is refused is undone. Each half takes its locks in the order of all groups, which savepoints do not.

        Raises:
            TelemetrydError: if the whole group failed, as `WritingEngine.write` says.

        """
        self.since = time.monotonic()
        try:
            return self._write(plain, notices, commands)
        finally:
            self.since = None

    def _write(self, plain: Plain, notices: Notices, commands: Sequence[Command[Any]]) -> list[Outcome]:
        try:
            return self._transact_again(plain, notices, commands)
        except (psycopg.Error, OverflowError, ValueError) as error:
            if isinstance(error, psycopg.Error) and not is_of_one(error):
                raise _translate(error) from error
            if len(commands) == 1:
                return [CommandFailedError(f"The database refused the change: {first_line(error)}")]
        middle = len(commands) // 2
        outcomes = self._write(plain, notices, commands[:middle])
        try:
            return outcomes + self._write(plain, notices, commands[middle:])
        except DatabaseSuspectError:
            raise
        except TelemetrydError as error:
            raise DatabaseSuspectError(f"It is unknown what of a group is stored: {sentence(error)}") from error

    def _transact_again(self, plain: Plain, notices: Notices, commands: Sequence[Command[Any]]) -> list[Outcome]:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._transact(plain, notices, commands)
            except psycopg.Error as error:
                if not is_passing(error) or attempt == _ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _transact(self, plain: Plain, notices: Notices, commands: Sequence[Command[Any]]) -> list[Outcome]:
        notices.forget()
        with _rolled_back_unless_done(plain):
            transaction = Transaction(plain, self._clock(), needs_standby=self._needs_standby)
            outcomes = transaction.apply(commands)
            transaction.finish()
        notices.check()
        return outcomes


def transact(plain: Plain, work: Callable[[Plain], T]) -> T:
    """Do something else in a separate transaction.

    Raises:
        TelemetrydError: if it failed, as `WritingEngine.write` says.

    """
    try:
        with _rolled_back_unless_done(plain):
            plain.execute("BEGIN")
            done = work(plain)
            plain.execute("COMMIT")
    except psycopg.Error as error:
        raise _translate(error) from error
    return done


@contextmanager
def _rolled_back_unless_done(plain: Plain) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if not plain.closed and plain.info.transaction_status != pq.TransactionStatus.IDLE:
            plain.execute("ROLLBACK")
        raise


def _translate(error: psycopg.Error) -> Exception:
    if error.sqlstate == _NO_STANDBY:
        return UnavailableError("No synchronous standby would hold it, so it was not stored; repeat it later")
    if error.sqlstate == _NO_STANDBY_ANY_MORE:
        return DatabaseSuspectError("It is unknown whether a standby holds the last commit: none is asked for any more")
    return translate(error)
