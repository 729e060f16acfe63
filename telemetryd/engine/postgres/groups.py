"""Carries out one group of commands in one transaction, in the write connection's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import psycopg
from psycopg import pq

from telemetryd.engine.postgres.connection import (
    ATTEMPTS,
    Plain,
    Target,
    first_line,
    is_of_one,
    is_passing,
    translate,
)
from telemetryd.engine.postgres.statements.commands import Transaction
from telemetryd.errors import CommandFailedError, DatabaseSuspectError, TelemetrydError, UnavailableError, sentence
from telemetryd.model.commands import Command
from telemetryd.ops.logs import log

T = TypeVar("T")
Outcome = Any | CommandFailedError

_NO_STANDBY: Final = "TD001"
_NO_STANDBY_ANY_MORE: Final = "TD002"
"""What `telemetryd_require_standby` raises before and after a COMMIT."""
_NO_DISK: Final = "TD003"
"""What `telemetryd_require_disk` raises after a COMMIT."""

# In the middle of a pipeline the server does not count a session as idle (`send_ready_for_query` in postgres.c), so
# neither idle_in_transaction_session_timeout nor statement_timeout ends one whose daemon stands still.
_END_SLEEPERS: Final = """
    SELECT application_name, pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND usename = current_user AND application_name LIKE 'telemetryd/%%/writer'
        AND pid <> pg_backend_pid() AND state = 'active' AND wait_event = 'ClientRead'
        AND clock_timestamp() - state_change >= make_interval(secs => %s)
"""

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
        target: the database.

    """

    def __init__(self, clock: Callable[[], str], target: Target) -> None:
        self._clock = clock
        self._target = target
        self.since: float | None = None
        """When the transaction that is under way was begun, or None."""

    def write(self, plain: Plain, notices: Notices, commands: Sequence[Command[Any]]) -> list[Outcome]:
        """Commit one group, and return the outcome of each command.

        If the database refuses one of the commands, the group is rolled back, and written as two halves; so at last
        only what is refused is undone. Each half takes its locks in the order of all groups, which savepoints do not.

        Raises:
            TelemetrydError: if the whole group failed, as `WritingEngine.write` says.

        """
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
        begun = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            self.since = time.monotonic()
            try:
                return self._transact(plain, notices, commands)
            except psycopg.Error as error:
                # Several locks may have been waited for, one after the other.
                is_time = time.monotonic() - begun < self._target.commit_timeout_s - self._target.lock_timeout_s
                if not is_passing(error) or attempt == ATTEMPTS or not is_time:
                    raise
                if isinstance(error, psycopg.errors.LockNotAvailable):
                    self._end_sleepers(plain)
        raise AssertionError("the last attempt returns or raises")

    def _end_sleepers(self, plain: Plain) -> None:
        """End what other daemons have begun and do not go on with: they stand still, and hold what we wait for."""
        for name, _ in plain.execute(_END_SLEEPERS, (self._target.lock_timeout_s,)):
            log.warning("A daemon that stood still in the middle of a transaction was cut off", extra={"session": name})

    def _transact(self, plain: Plain, notices: Notices, commands: Sequence[Command[Any]]) -> list[Outcome]:
        notices.forget()
        with _rolled_back_unless_done(plain):
            transaction = Transaction(plain, self._clock(), self._target.sync)
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
            # As a statement it would leave the driver with names of prepared statements that never came to be.
            plain.rollback()
        raise


def _translate(error: psycopg.Error) -> Exception:
    if error.sqlstate == _NO_STANDBY:
        return UnavailableError("No synchronous standby would hold it, so it was not stored; repeat it later")
    if error.sqlstate == _NO_STANDBY_ANY_MORE:
        return DatabaseSuspectError("It is unknown whether a standby holds the last commit: none is asked for any more")
    if error.sqlstate == _NO_DISK:
        return DatabaseSuspectError("A crash may lose the last commit: fsync or full_page_writes was turned off")
    return translate(error)
