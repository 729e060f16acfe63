"""The PostgreSQL engine: one write connection, a pool of readers, and a session that looks around."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Final, NoReturn, TypeVar

from telemetryd.engine.interface import BackupMade, Copy, Engine, EngineHealth, Introduction
from telemetryd.engine.postgres import opening, schema, words
from telemetryd.engine.postgres.connection import Connection, Plain, Target, connect, refusing, writing_session
from telemetryd.engine.postgres.exports import Exports
from telemetryd.engine.postgres.groups import Groups, Notices, Outcome
from telemetryd.engine.postgres.leading import Session, Stand, check_for_pooler, make_epoch, stand
from telemetryd.engine.postgres.reading import Readers
from telemetryd.errors import DatabaseError, DatabaseSuspectError, InvalidRequestError, UnavailableError
from telemetryd.model.changes import Changes, ListChanges
from telemetryd.model.commands import Command
from telemetryd.model.queries import ExportRuns, Query
from telemetryd.model.values import format_timestamp
from telemetryd.ops.logs import log
from telemetryd.settings import Settings, Sync

A = TypeVar("A")

_LOOK_EVERY_S: Final = 1.0
"""How often it is seen whether the server still answers the writer."""
_MOST_APART_S: Final = 1.0
_OWN_TOOLS: Final = (
    "PostgreSQL has tools of its own for this: back it up with pg_dump or pgBackRest, and check it with pg_amcheck"
)


async def open_postgres(settings: Settings, clock: Callable[[], datetime], *, full_text: bool | None) -> Engine:
    """Connect, look at the server, make the schema if the database is empty, and open what reads (see `open_engine`).

    Raises:
        DatabaseError: if runs cannot be kept there; nothing is written then.

    """
    database = await _Database.open(settings, clock, full_text=full_text)
    return Engine(Writing(database), Reading(database))


async def open_postgres_read_only(settings: Settings) -> Neighbour:
    """Open a database next to the daemons that write to it.

    Raises:
        DatabaseError: if it cannot be read, or is not of this version.

    """
    target = Target.of(settings)
    connection = await connect(target, "reader", {})
    try:
        with refusing(target):
            await connection.run(lambda plain: schema.check(plain, target))
    finally:
        await connection.close()
    return Neighbour(Readers(target, 1, settings.query_timeout_s))


class Neighbour:
    """A database that others write to, read through a small pool (`QueryingEngine`)."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def read(self, query: Query[A]) -> A:
        """Answer a query."""
        return await self._readers.read(query)

    async def close(self) -> None:
        """Close the connections."""
        await self._readers.close()


class _Opened:
    """What is open on the database."""

    def __init__(self, connection: Connection, notices: Notices, readers: Readers, server: Mapping[str, Any]) -> None:
        self.connection, self.notices, self.readers, self.server = connection, notices, readers, server

    @classmethod
    async def open(cls, target: Target, settings: Settings, clock: Callable[[], datetime], *, make: bool) -> _Opened:
        """Connect, look at the server and the schema, which is made if there is none and it may be.

        Raises:
            DatabaseError: if runs cannot be kept there.

        """
        async with contextlib.AsyncExitStack() as undo:
            connection = await connect(target, "writer", writing_session(target))
            undo.push_async_callback(connection.drop)
            with refusing(target):
                server = await connection.run(lambda plain: opening.look(plain, target))
                await connection.run(lambda plain: opening.compare_clocks(plain, clock(), _MOST_APART_S))
                if make:
                    now = format_timestamp(clock())
                    await connection.run(lambda plain: schema.make(plain, target, now, count_anew=None))
                await connection.run(lambda plain: schema.check(plain, target))
                await connection.run(lambda plain: opening.check_grants(plain, target))
            undo.pop_all()
        readers = Readers(target, settings.db_readers, settings.query_timeout_s)
        return cls(connection, Notices(connection.plain), readers, server)

    async def close(self) -> None:
        """Close every connection."""
        await self.readers.close()
        await self.connection.close()

    async def drop(self) -> None:
        """Break the write connection, which may hang, and close all."""
        await self.connection.drop()
        await self.readers.close()


class _Database:
    """What both halves stand on."""

    def __init__(
        self, target: Target, settings: Settings, clock: Callable[[], datetime], opened: _Opened, session: Session
    ) -> None:
        self.target, self.settings, self.clock = target, settings, clock
        self.opened: _Opened | None = opened
        self.server = opened.server
        self.session = session
        self.groups = Groups(lambda: format_timestamp(clock()), needs_standby=target.sync in (Sync.STANDBY, Sync.APPLY))
        self.suspicion: DatabaseSuspectError | None = None
        """Why it is unknown what is stored, until the database is open again; else None."""
        self.changed: Callable[[], None] = lambda: None
        self._reopening: asyncio.Timeout | None = None
        """What ends an attempt to connect anew."""
        self._looking: asyncio.Task[None] | None = None
        self._indexing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, settings: Settings, clock: Callable[[], datetime], *, full_text: bool | None) -> _Database:
        """Open the database, and begin to look around.

        Raises:
            DatabaseError: if runs cannot be kept there.

        """
        target = Target.of(settings)
        async with contextlib.AsyncExitStack() as undo:
            opened = await _Opened.open(target, settings, clock, make=True)
            undo.push_async_callback(opened.close)
            session = Session(target, settings.db_poll_ms / 1000, settings.db_commit_timeout_s)
            undo.push_async_callback(session.drop)
            with refusing(target):
                connection = await session.open()
                await _check_for_pooler(target, opened.connection, connection)
                database = cls(target, settings, clock, opened, session)
                session.seen = await connection.run(stand)
                if full_text is not None:
                    await database.keep_words(wanted=full_text)
            undo.pop_all()
        database.look_around()
        return database

    def look_around(self) -> None:
        """Begin to look around."""
        self._looking = asyncio.create_task(self.session.run(self._notify, self.suspect), name="session")
        self._looking.add_done_callback(_tell_of_its_death)

    async def keep_words(self, *, wanted: bool) -> None:
        """Begin to make the full-text index, or to drop it; return when it is begun."""
        opened = self._open()
        if await opened.connection.run(words.is_made) is (True if wanted else None):
            return
        self._indexing = asyncio.create_task(words.keep(self.target, wanted=wanted), name="words")
        if wanted:
            is_over = self._indexing.done
            await opened.connection.run(lambda plain: words.wait_until_begun(plain, is_over))

    def _notify(self) -> None:
        self.changed()

    def _open(self) -> _Opened:
        if self.opened is None:
            raise UnavailableError("The database is being opened again; try again shortly")
        return self.opened

    def readers(self) -> Readers:
        """Return the readers.

        Raises:
            UnavailableError: while the database is opened again.

        """
        return self._open().readers

    def suspect(self, error: DatabaseSuspectError) -> None:
        """Change nothing more until the database is open again."""
        self.suspicion = self.suspicion or error

    async def write(self, commands: Sequence[Command[Any]]) -> list[Outcome]:
        """Write a group, and break the connection if the server does not answer in time.

        Raises:
            TelemetrydError: as `WritingEngine.write` does.

        """
        opened = self.opened
        if self.suspicion is not None or opened is None:
            raise DatabaseSuspectError
        if opened.connection.is_lost:
            error = DatabaseSuspectError("The connection to PostgreSQL was lost")
            self.suspect(error)
            raise error
        writing = opened.connection.start(lambda plain: self.groups.write(plain, opened.notices, commands))
        while not (await asyncio.wait({writing}, timeout=_LOOK_EVERY_S))[0]:
            since = self.groups.since
            if since is not None and time.monotonic() - since > self.settings.db_commit_timeout_s:
                log.error("PostgreSQL does not answer; the connection is broken off")
                opened.connection.cut()
        try:
            return await writing
        except DatabaseSuspectError as error:
            self.suspect(error)
            raise

    async def reopen(self) -> None:
        """Connect anew, and look at the server and the schema again.

        Raises:
            DatabaseError: if that is not possible.

        """
        opened, self.opened = self.opened, None
        if opened is not None:
            await opened.drop()
        try:
            async with asyncio.timeout(self.settings.db_commit_timeout_s) as self._reopening:
                again = await self._open_again()
        except TimeoutError:
            raise DatabaseError(f"{self.target.name} does not answer") from None
        finally:
            self._reopening = None
        self.opened, self.server = again, again.server
        self.suspicion = None

    async def _open_again(self) -> _Opened:
        async with contextlib.AsyncExitStack() as undo:
            again = await _Opened.open(self.target, self.settings, self.clock, make=False)
            undo.push_async_callback(again.drop)
            with refusing(self.target):
                await again.connection.run(self._check_epoch)
            undo.pop_all()
        return again

    def interrupt(self) -> None:
        """Break off what the write connection waits for, or the attempt to open another one."""
        if self.opened is not None:
            self.opened.connection.cut()
        if self._reopening is not None and not self._reopening.expired():
            self._reopening.reschedule(asyncio.get_running_loop().time())

    def _check_epoch(self, plain: Plain) -> None:
        """Begin a new epoch if commits that we have seen are gone: another server may have taken over without them."""
        seen, now = self.session.seen, stand(plain)
        if seen is None or not now.lacks_what_was(seen):
            return
        log.error(
            "The database lacks changes that were there before; subscribers begin anew",
            extra={"seen": seen.newest, "newest": now.newest},
        )
        with plain.transaction():
            make_epoch(plain, seen)

    async def close(self, *, is_clean: bool) -> None:
        """Close every connection."""
        for task in (self._looking, self._indexing):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        await self.session.drop()
        if self.opened is not None:
            await (self.opened.close() if is_clean else self.opened.drop())


async def _check_for_pooler(target: Target, one: Connection, another: Connection) -> None:
    """See that each of our sessions is one of the server's.

    Raises:
        DatabaseError: if not.

    """

    def process(plain: Plain) -> int:
        return int(plain.execute("SELECT pg_backend_pid()").fetchall()[0][0])

    first = await one.run(process)
    second = await another.run(process)
    check_for_pooler(target, (first, await one.run(process)), (second,))


def _tell_of_its_death(looking: asyncio.Task[None]) -> None:
    if not looking.cancelled():
        log.critical("Changes of other daemons are not noticed any more, until a restart", exc_info=looking.exception())


class Writing:
    """The half that changes the database (`WritingEngine`)."""

    def __init__(self, database: _Database) -> None:
        self._database = database

    async def write(self, commands: Sequence[Command[Any]]) -> list[Outcome]:
        """Carry out a group in one hop into the connection's thread (see `WritingEngine.write`)."""
        return await self._database.write(commands)

    async def tidy_up(self) -> None:
        """Do nothing: PostgreSQL tidies up by itself, and the leader adds up what was counted."""

    async def reopen(self) -> None:
        """Connect again, and look at everything (see `WritingEngine.reopen`)."""
        await self._database.reopen()

    def interrupt(self) -> None:
        """Break off what the connection waits for."""
        self._database.interrupt()

    async def close(self, *, is_clean: bool) -> None:
        """Close the database for good."""
        await self._database.close(is_clean=is_clean)


class Reading:
    """The half that all parts may use (`ReadingEngine`): its connections cannot write."""

    is_shared: Final = True

    def __init__(self, database: _Database) -> None:
        self._database = database
        self._exports = Exports(database.target)

    @property
    def leads(self) -> bool:
        """Whether this daemon's session holds the lock of the leader."""
        return self._database.session.leads

    async def read(self, query: Query[A]) -> A:
        """Answer a query in a reader's thread (see `ReadingEngine.read`)."""
        answer = await self._database.readers().read(query)
        if isinstance(answer, Changes):
            self._note(answer)
        return answer

    async def read_news(self, query: ListChanges) -> Changes:
        """Answer a query of the feed through the reader that is there for it alone."""
        changes = await self._database.readers().read_news(query)
        self._note(changes)
        return changes

    def _note(self, changes: Changes) -> None:
        self._database.session.note(Stand(changes.newest, changes.epoch))

    def watch(self, changed: Callable[[], None]) -> None:
        """Call a function when another daemon has committed."""
        self._database.changed = changed

    def export(self, query: ExportRuns) -> AbstractAsyncContextManager[Copy]:
        """Copy what is asked for (see `ReadingEngine.export`)."""
        return self._exports.open(query)

    async def back_up(self, now: datetime, *, compress: bool = True) -> BackupMade:
        """Refuse: a server has tools of its own.

        Raises:
            InvalidRequestError: always.

        """
        _refuse()

    async def look(self) -> DatabaseSuspectError | None:
        """Return why the database must not be written to now, as the session has found it."""
        return self._database.suspicion

    def check_room(self) -> None:
        """Do nothing: how full its disk is only the server knows, and says so when it is."""

    def introduction(self) -> Introduction:
        """Return the server's version, and warnings of what weakens its promises."""
        warnings: list[tuple[str, Mapping[str, str]]] = []
        if not self._is_durable:
            advice = {"setting": "TELEMETRY_DB_SYNC=none"}
            warnings.append(("Acknowledged writes may not survive a crash of the server", advice))
        if self._database.target.is_exposed:
            advice = {"advice": "add sslmode=verify-full to TELEMETRY_DB_URL"}
            warnings.append(("The connection to PostgreSQL is not encrypted", advice))
        return Introduction({"postgresql_version": self._database.server["version"]}, warnings)

    @property
    def _is_durable(self) -> bool:
        return self._database.target.sync is not Sync.NONE

    def health(self) -> EngineHealth:
        """Return the state of the database as it was last seen."""
        server, target = self._database.server, self._database.target
        description = {
            "db_path": target.name,
            "journal_mode": "WAL",
            "synchronous": target.sync.upper(),
            "engine": f"PostgreSQL {server['version']}",
            "primary": server["primary"],
        }
        suspicion = self._database.suspicion
        problem = None if suspicion is None else str(suspicion) or suspicion.message
        counts = {"state": "right", "foreign_commit_at": None, "corrected": 0}
        return EngineHealth(description, {"timeline": server["timeline"]}, self._is_durable, problem, counts)

    async def close(self) -> None:
        """End what is being read."""
        await self._exports.close()
        if self._database.opened is not None:
            await self._database.opened.readers.close()


def _refuse() -> NoReturn:
    raise InvalidRequestError(_OWN_TOOLS)
