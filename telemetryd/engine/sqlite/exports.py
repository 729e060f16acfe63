"""Copies the rows of an export out of the database, and reads the export from the copy."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.connection import Connection, connect
from telemetryd.engine.sqlite.partials import partial_file
from telemetryd.engine.sqlite.statements import export as statements
from telemetryd.errors import DatabaseError, StorageFullError, TooManyExportsError, UnavailableError, sentence
from telemetryd.model import tables
from telemetryd.model.changes import BEGINNING
from telemetryd.model.queries import ExportRuns, Format
from telemetryd.settings import JournalMode, Settings

_LEAST_PAUSE_S: Final = 0.002


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much exports take of the database and of the machine."""

    longest_s: float
    """How long one transaction may copy: in WAL mode a long one holds back checkpoints, in the other modes commits."""
    at_once: int = 2
    """How many may run at once; each holds a thread, some descriptors and room on the disk."""
    slice_rows: int = 2_000
    """Runs that are looked at in one transaction once it has taken too long to copy all of them in one."""
    rendered_bytes: int = 512 * 1024
    """How long what one step of SQLite renders of more than one run may be."""
    steps: int = 50_000
    """Steps of SQLite (some milliseconds) between two looks at whether a copy shall end."""

    @classmethod
    def of(cls, mode: JournalMode) -> Bounds:
        """Return the bounds for a journal mode."""
        return cls(60.0 if mode is JournalMode.WAL else 0.5)


@dataclass(slots=True)
class _Copying:
    """One export: everything but `stop` is done in its connection's thread."""

    query: ExportRuns
    bounds: Bounds
    rows: int = 0
    is_exact: bool = True
    _deadline: float = float("inf")
    _stopped: bool = False

    def stop(self) -> None:
        """End what is being copied or read, soon."""
        self._stopped = True

    def is_over(self) -> bool:
        """Return whether the present statement shall end."""
        return self._stopped or time.monotonic() > self._deadline

    def copy(self, connection: sqlite3.Connection, database: Path, room_bytes: int) -> Iterator[bytes]:
        """Copy what is asked for, leave the database alone from then on, and return the copy's chunks.

        Raises:
            StorageFullError: if there is no room for the copy.
            UnavailableError: if the database cannot be read.

        """
        try:
            statements.prepare(connection, database, room_bytes, self.is_over, self.bounds.steps)
            searching.add_to(connection, lambda: self._stopped)
            self._deadline = time.monotonic() + self.bounds.longest_s
            try:
                self.rows = statements.copy_at_once(connection, self.query)
            except sqlite3.OperationalError as error:
                if self._stopped or error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                    raise
                self._deadline = float("inf")
                self._copy_in_slices(connection)
            self._deadline = float("inf")
            statements.let_go(connection)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise StorageFullError(
                    "The disk has no room for the copy that an export is read from; narrow its filters"
                ) from error
            raise UnavailableError("The database cannot be read now; try again later") from error
        return self._chunks(connection)

    def _copy_in_slices(self, connection: sqlite3.Connection) -> None:
        """Copy in short transactions with pauses as long, up to the run that is the newest now."""
        self.is_exact, self.rows, after = False, 0, BEGINNING
        last = statements.last_id(connection)
        while after < last:
            started = time.monotonic()
            copied, after = statements.copy_slice(connection, self.query, after, last, self.bounds.slice_rows)
            self.rows += copied
            time.sleep(max(time.monotonic() - started, _LEAST_PAUSE_S))

    def _chunks(self, connection: sqlite3.Connection) -> Iterator[bytes]:
        longest = self.bounds.rendered_bytes
        match self.query.form:
            case Format.NDJSON if self.query.with_events:
                return statements.ndjson_chunks_with_events(connection)
            case Format.NDJSON:
                return statements.ndjson_chunks(connection, longest)
            case Format.CSV:
                return statements.csv_chunks(connection, longest)
            case Format.PARQUET:
                return tables.parquet_from_lists(statements.lists(connection, longest))


class _Copied:
    """A finished copy (`Copy`)."""

    def __init__(self, copying: _Copying, connection: Connection, chunks: Iterator[bytes]) -> None:
        self.rows = copying.rows
        self.is_exact = copying.is_exact
        self._connection = connection
        self._chunks = chunks

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the export's bytes (see `Copy.chunks`); while one chunk is sent, the next one is made."""
        ahead = self._next()
        try:
            while (chunk := await ahead) is not None:
                ahead = self._next()
                yield chunk
        except (sqlite3.Error, ValueError, MemoryError) as error:  # ValueError: pyarrow's, of a cell
            raise UnavailableError(str(error)[:2000]) from error
        finally:
            ahead.cancel()

    def _next(self) -> asyncio.Future[bytes | None]:
        return self._connection.start(lambda _: next(self._chunks, None))


class Exports:
    """The exports of one database, each with a separate connection, so that no query waits for them."""

    def __init__(self, settings: Settings, bounds: Bounds | None = None) -> None:
        self._database = settings.db_path.absolute()
        self._reserve_bytes = settings.min_free_mb << 20
        self.bounds = bounds or Bounds.of(settings.db_journal_mode)
        self._running = 0
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def are_running(self) -> bool:
        """Whether one reads the database, or the copy that it has made of it."""
        return self._running > 0

    @asynccontextmanager
    async def open(self, query: ExportRuns) -> AsyncIterator[_Copied]:
        """Copy what is asked for (see `ReadingEngine.export`)."""
        if self._running >= self.bounds.at_once:
            raise TooManyExportsError
        copying = _Copying(query, self.bounds)
        self._running += 1
        files = contextlib.ExitStack()
        connection = Connection(lambda: self._new_copy(files), 1000)
        try:
            await connection
            chunks = await connection.run(lambda plain: copying.copy(plain, self._database, self._room_bytes()))
            yield _Copied(copying, connection, chunks)
        except DatabaseError as error:
            raise UnavailableError(sentence(error)) from error
        finally:
            copying.stop()
            closing = asyncio.create_task(self._close(connection, files))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)  # which comes to its end even if the client leaves in the middle of it

    async def close(self) -> None:
        """Wait for what is closing after its client left: its thread answers the event loop, which must be there."""
        if self._closing:
            await asyncio.wait(self._closing)

    async def _close(self, connection: Connection, files: contextlib.ExitStack) -> None:
        try:
            await connection.close()
            await asyncio.to_thread(files.close)
        finally:
            self._running -= 1

    def _room_bytes(self) -> int:
        """Return how large a copy may become, so that new runs still find the room that is kept for them."""
        return shutil.disk_usage(self._database.parent).free - self._reserve_bytes

    def _new_copy(self, files: contextlib.ExitStack) -> sqlite3.Connection:
        """Open an empty file next to the database; it vanishes with the process, or when `files` is closed."""
        copy = files.enter_context(partial_file(self._database.with_name(f"{self._database.name}.export")))
        connection = connect(copy.path, "rw")
        connection.use(self._database)  # which is attached to the copy
        copy.path.unlink()  # an open file needs no name
        return connection
