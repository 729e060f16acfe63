"""Detects commits by other programs and schedules the recount of totals between the writer's groups."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol, TypeVar

from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.statements.recounting import Found, Tally, compare, forget_numbers, keep_drawn, last_drawn
from telemetryd.errors import DatabaseError, DatabaseSuspectError, UnavailableError, sentence
from telemetryd.model.values import format_timestamp
from telemetryd.ops.logs import log

T = TypeVar("T")

_LOOK_EVERY_S: Final = 1.0
_REST: Final = 4.0
"""After each slice the writer is left alone for so many times as long as it took."""
_LEAST_PAUSE_S: Final = 0.001
_BETWEEN: Final = 10.0
"""After a comparison the next one waits for so many times as long as it took: some programs commit all the time."""
_MOST_TOTALS: Final = 10_000
_SOME_TOTALS: Final = "SELECT count(*) FROM (SELECT 1 FROM run_totals LIMIT ?)"


class _Writer(Protocol):
    """What is needed of the writer."""

    idle: bool

    async def between_groups(self, work: Callable[[sqlite3.Connection], T]) -> T: ...

    async def ask(self, question: Callable[[sqlite3.Connection], T]) -> T: ...

    def suspect(self, error: DatabaseSuspectError) -> None: ...


@dataclass(frozen=True, slots=True)
class Counts:
    """Whether the counts (totals, statistics) agree with the runs, as far as is known."""

    noticed_at: datetime | None
    """When the last commit of another program was noticed, or None."""
    is_compared: bool
    """Whether they were compared with the runs since."""
    corrected: int
    """How many were corrected after the last comparison that found wrong ones."""

    def as_json(self) -> dict[str, Any]:
        """Return what /health says of them."""
        at = None if self.noticed_at is None else format_timestamp(self.noticed_at)
        state = "right" if self.is_compared else "being compared"
        return {"state": state, "foreign_commit_at": at, "corrected": self.corrected}

    @property
    def warning(self) -> str | None:
        """What an operator should know, or None."""
        if self.is_compared or self.noticed_at is None:
            return None
        return "Another program has committed to the database; the counts are being compared with the runs"


class Recount:
    """Looks out for commits that are not the daemon's own.

    `PRAGMA data_version` changes only by commits of other connections (sqlite.org/pragma.html#pragma_data_version), and
    the daemon's other connections cannot write. (In WAL mode a checkpoint by another program may look like a commit.)

    Args:
        check: raises DatabaseError if the database cannot be served as it is now.
        clock: returns the time.

    """

    def __init__(self, check: Callable[[sqlite3.Connection], None], clock: Callable[[], datetime]) -> None:
        self._check = check
        self._clock = clock
        self._tally = Tally()
        self._version: int | None = None
        self._noticed = self._reported = self._compared = 0
        self._noticed_at: datetime | None = None
        self._corrected = 0
        self._has_to_keep = self._has_forgotten = False
        self._steps: Iterator[Found] | None = None

    @property
    def counts(self) -> Counts:
        """Whether the counts are right."""
        return Counts(self._noticed_at, self._noticed == self._compared, self._corrected)

    async def run(self, writer: _Writer, changed: Callable[[], None]) -> None:
        """Look every second, and compare when something was noticed, until it is cancelled.

        Args:
            writer: between whose groups it works.
            changed: is called when counts, or what subscribers may ask for, have changed.

        """
        not_before = 0.0
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                if writer.idle:  # else each group looks
                    await writer.ask(self._look_at_once)
                if self._noticed != self._compared and time.monotonic() >= not_before:
                    started = time.monotonic()
                    await self._compare(writer)
                    changed()
                    not_before = time.monotonic() + _BETWEEN * (time.monotonic() - started)
            except UnavailableError:  # the next second's turn; writers get the error
                continue

    async def _compare(self, writer: _Writer) -> None:
        seen = self._noticed
        if self._reported == self._compared and self._noticed_at is not None:
            self._reported = seen
            log.warning(
                "Another program has committed to the database; the counts are compared with the runs",
                extra={"noticed_at": format_timestamp(self._noticed_at)},
            )
        started = time.monotonic()
        self._steps, self._has_forgotten, found = None, False, Found()
        while True:
            began = time.monotonic()
            try:
                step = await writer.between_groups(self._step)
            except UnavailableError:
                self._tally.end()
                raise
            if step is None:
                break
            found = step
            await asyncio.sleep(max((time.monotonic() - began) * _REST, _LEAST_PAUSE_S))
        if found.corrected:
            self._corrected = found.corrected
        shown = {
            "corrected": found.corrected,
            "strays": dict(found.strays),
            "duration_ms": round((time.monotonic() - started) * 1000),
        }
        if found.corrected or found.strays:
            log.warning("The counts agree with the runs again; telemetryd check reports what is left", extra=shown)
        else:
            log.info("The counts agree with the runs", extra=shown)
        self._compared = self._reported = seen

    # Below this line everything runs in the connection's thread.

    def start(self, connection: sqlite3.Connection) -> None:
        """Begin with a connection that was just opened: what was committed before it is nothing new."""
        self._version = _data_version(connection)
        number, event = last_drawn(connection)
        self._tally.number, self._tally.event = max(number, self._tally.number), max(event, self._tally.event)

    def notice(self) -> None:
        """Take note that another program has committed; the numbers that it may have set free are kept."""
        self._noticed += 1
        self._noticed_at = self._clock()
        self._has_to_keep = True

    def compare_anyway(self, connection: sqlite3.Connection) -> None:
        """Compare without a commit that was noticed: what happened between a crash and the start is unknown.

        Not with very many agents: all counts of one hour are compared in one step, for which writes would wait.
        """
        (groups,) = connection.execute(_SOME_TOTALS, (_MOST_TOTALS + 1,)).fetchone()
        if groups <= _MOST_TOTALS:
            self._noticed += 1

    def look(self, connection: sqlite3.Connection) -> None:
        """See whether another process has committed since the last time.

        Raises:
            DatabaseSuspectError: if the database cannot be served any more as it is since then.

        """
        version = _data_version(connection)
        if version == self._version:
            return
        self._version = version
        self.notice()
        try:
            self._check(connection)
        except DatabaseError as error:
            raise DatabaseSuspectError(sentence(error)) from error

    def _look_at_once(self, connection: sqlite3.Connection) -> None:
        """Look without waiting for another process's lock, for which a group or a stop would have to wait, too."""
        (timeout_ms,) = connection.execute("PRAGMA busy_timeout").fetchone()
        connection.execute("PRAGMA busy_timeout = 0").fetchall()
        try:
            self.look(connection)
        finally:
            connection.execute(f"PRAGMA busy_timeout = {timeout_ms}").fetchall()

    def begin(self, connection: sqlite3.Connection, now: str) -> Transaction:
        """Begin a group: no run of it is stored by a schema that somebody has changed since, nor gets a used number."""
        self._tally.forget()
        self._prepare(connection)
        return Transaction(connection, now, self._tally)

    def confirm(self) -> None:
        """Take note that what was begun is committed."""
        self._tally.confirm()
        self._has_to_keep = False

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self.look(connection)
        if self._has_to_keep:  # until it is confirmed: this transaction may be rolled back
            keep_drawn(connection, self._tally.number, self._tally.event)

    def _step(self, connection: sqlite3.Connection) -> Found | None:
        self._tally.forget()
        self._prepare(connection)
        if self._steps is None:
            self._steps = compare(connection, self._tally, lambda: self._noticed)
        found = next(self._steps, None)
        if found is not None and found.corrected and not self._has_forgotten:
            forget_numbers(connection)
            self._has_forgotten = True
        return found


def _data_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA data_version").fetchone()[0])
