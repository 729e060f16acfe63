"""Carries out one group of commands in one transaction, in the write connection's thread."""

from __future__ import annotations

import sqlite3
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol, TypeVar

from telemetryd.errors import (
    CommandFailedError,
    DatabaseBusyError,
    DatabaseSuspectError,
    StorageFullError,
    TelemetrydError,
    WriteFailedError,
)
from telemetryd.model.commands import Command

_PRIMARY_CODE: Final = 0xFF
_SUSPECT: Final = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
"""After these it is unknown what the disk holds: nothing is taken until the database is open again and verified."""

T = TypeVar("T")
Outcome = Any | CommandFailedError


class Transaction(Protocol):
    """What carries out commands between BEGIN and COMMIT."""

    def apply(self, commands: Sequence[Command[Any]]) -> Sequence[Any]:
        """Carry out commands in order, and return the outcome of each."""

    def savepoint(self) -> AbstractContextManager[None]:
        """Undo what is applied inside the block if the block fails."""

    def finish(self) -> None:
        """Do what is due once for the whole group, right before COMMIT."""


class Groups:
    """Writes groups.

    Args:
        begin: makes the transaction object for one group, given the plain connection and the moment.
        clock: gives that moment, one for each group, as stored text.
        check_place: called after each COMMIT, before any caller gets its outcome; raises OSError if the files that were
            written are not those that the next owner will find.

    """

    def __init__(
        self,
        begin: Callable[[sqlite3.Connection, str], Transaction],
        clock: Callable[[], str],
        check_place: Callable[[], None],
    ) -> None:
        self._begin = begin
        self._clock = clock
        self._check_place = check_place

    def write(self, connection: sqlite3.Connection, commands: Sequence[Command[Any]]) -> list[Outcome]:
        """Commit one group, and return the outcome of each command.

        A group in which every command works needs no savepoints. If one fails, the group is rolled back and
        done again with a savepoint around each command, so that only the failing ones are undone.

        Raises:
            TelemetrydError: if the whole group failed, as `WritingEngine.write` says.

        """
        with translated(connection):
            try:
                return self._transact(connection, lambda: self._carry_out(connection, commands, isolated=False))
            except CommandFailedError:
                return self._transact(connection, lambda: self._carry_out(connection, commands, isolated=True))

    def transact(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do something else in a separate transaction.

        Raises:
            TelemetrydError: if it failed, as `WritingEngine.write` says.

        """
        with translated(connection):
            return self._transact(connection, lambda: work(connection))

    def _carry_out(
        self, connection: sqlite3.Connection, commands: Sequence[Command[Any]], *, isolated: bool
    ) -> list[Outcome]:
        transaction = self._begin(connection, self._clock())
        outcomes: list[Outcome]
        if isolated:
            outcomes = [_apply_alone(connection, transaction, command) for command in commands]
        else:
            outcomes = [*_apply(connection, transaction, commands)]
        transaction.finish()
        return outcomes

    def _transact(self, connection: sqlite3.Connection, work: Callable[[], T]) -> T:
        connection.execute("BEGIN IMMEDIATE")
        try:
            outcomes = work()
            connection.execute("COMMIT")
        except BaseException:
            # SQLite may have rolled back by itself (disk full, I/O error): then there is nothing left to undo.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._check_place()
        return outcomes


@contextmanager
def translated(connection: sqlite3.Connection) -> Iterator[None]:
    """Return what an error of SQLite or of the disk means for the callers that wait.

    Raises:
        TelemetrydError: with the error as its cause.

    """
    try:
        yield
    except (sqlite3.Error, MemoryError) as error:
        # The frames hold cursors, with which the connection would not really close.
        traceback.clear_frames(error.__traceback__)
        if connection.in_transaction:
            raise DatabaseSuspectError(f"A transaction could not be ended: {error}") from error
        raise translate(error) from error
    except OSError as error:  # the file is not at its place any more
        traceback.clear_frames(error.__traceback__)
        raise DatabaseSuspectError(str(error)) from error


def _apply_alone(connection: sqlite3.Connection, transaction: Transaction, command: Command[Any]) -> Outcome:
    try:
        with transaction.savepoint():
            return _apply(connection, transaction, [command])[0]
    except CommandFailedError as error:
        return error


def _apply(connection: sqlite3.Connection, transaction: Transaction, commands: Sequence[Command[Any]]) -> Sequence[Any]:
    """Carry out commands; what is wrong with one of them alone becomes a `CommandFailedError`."""
    try:
        return transaction.apply(commands)
    except (
        sqlite3.IntegrityError,
        sqlite3.DataError,
        sqlite3.ProgrammingError,
        OverflowError,
        ValueError,
    ) as error:
        if not connection.in_transaction:
            raise WriteFailedError from error
        raise CommandFailedError(f"The database refused the change: {error}") from error


def translate(error: sqlite3.Error | MemoryError) -> TelemetrydError:
    """Return what a failure of the whole group means for the callers that wait."""
    extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    code = extended & _PRIMARY_CODE
    if code in _SUSPECT or extended == sqlite3.SQLITE_READONLY_DBMOVED:
        return DatabaseSuspectError(f"The last write failed: {error}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DatabaseBusyError()
    if code == sqlite3.SQLITE_FULL:
        return StorageFullError()
    return WriteFailedError()
