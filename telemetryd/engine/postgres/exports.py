"""Copies the lines of an export out of the database, from one snapshot, and reads the export from the copy."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import IO, Final

import psycopg
from psycopg.types.string import ByteaBinaryLoader

from telemetryd.engine.postgres.connection import Connection, Plain, Target, connect, reading_session
from telemetryd.engine.postgres.statements import export as statements
from telemetryd.engine.postgres.statements import full_text
from telemetryd.engine.postgres.statements.predicates import Values
from telemetryd.errors import DatabaseError, StorageFullError, TooManyExportsError, UnavailableError
from telemetryd.model import tables
from telemetryd.model.queries import ExportRuns, Format
from telemetryd.model.tables import CHUNK_BYTES, CSV_HEADER, join_pieces

_AT_ONCE: Final = 2
"""How many may run at once; each holds a connection, a snapshot and room on the disk."""
_FETCHED_BYTES: Final = 1024 * 1024
"""About how much is fetched at once, besides a single line of any length."""
_MOST_ROWS: Final = 1_000
_CANCEL_S: Final = 2.0
_SESSION: Final = {
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "60s",
    "cursor_tuple_fraction": "1.0",  # every row will be fetched
}
_END: Final = {Format.NDJSON: b"\n", Format.CSV: b"\r\n", Format.PARQUET: b"\n"}


def _nameless() -> IO[bytes]:
    return tempfile.TemporaryFile()


class _Copying:
    """One export: everything but `stop` is done in its connection's thread."""

    def __init__(self, query: ExportRuns, files: contextlib.ExitStack) -> None:
        self.rows = 0
        self._query = query
        self._runs: IO[bytes] = files.enter_context(_nameless())
        self._events: IO[bytes] = files.enter_context(_nameless())
        self._stopped = False

    def stop(self) -> None:
        """End what is being copied, soon."""
        self._stopped = True

    def copy(self, plain: Plain) -> Iterator[bytes]:
        """Copy what is asked for, leave the database alone from then on, and return the copy's chunks.

        Raises:
            InvalidRequestError: if words are searched for, and the database has no index of them.
            StorageFullError: if there is no room for the copy.
            UnavailableError: if the database cannot be read.

        """
        try:
            full_text.require(plain, self._query.filters)
            with plain.transaction(), full_text.by_index(plain, is_needed=self._query.filters.words is not None):
                end = _END[self._query.form]
                for (line,) in self._fetch(plain, statements.select_runs(self._query)):
                    self._runs.write(line + end)
                    self.rows += 1
                if self._query.with_events:
                    for run, event in self._fetch(plain, statements.select_events(self._query)):
                        self._events.write(run + b" " + event + b"\n")
            for file in (self._runs, self._events):
                file.seek(0)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise StorageFullError(
                "The disk has no room for the copy that an export is read from; narrow its filters"
            ) from error
        except psycopg.Error as error:
            raise UnavailableError("The database cannot be read now; try again later") from error
        return self._chunks()

    def _fetch(self, plain: Plain, select: tuple[str, Values]) -> Iterator[tuple[bytes, ...]]:
        """Yield the rows of a statement; as many are fetched at once as are about `_FETCHED_BYTES` together."""
        with plain.cursor("export", binary=True) as cursor:
            cursor.adapters.register_loader("text", ByteaBinaryLoader)
            cursor.execute(*select)
            number = 1
            while rows := cursor.fetchmany(number):
                yield from rows
                if self._stopped:
                    raise UnavailableError("The export was left")
                size = max(sum(map(len, row)) for row in rows) or 1
                number = max(1, min(2 * number, _MOST_ROWS, _FETCHED_BYTES // size))

    def _chunks(self) -> Iterator[bytes]:
        match self._query.form:
            case Format.NDJSON if self._query.with_events:
                return join_pieces(self._lines_with_events(), CHUNK_BYTES)
            case Format.PARQUET:
                return tables.parquet_from_lists(line.rstrip(b"\n") for line in self._runs)
            case Format.CSV:
                return iter(_after(CSV_HEADER, lambda: self._runs.read(CHUNK_BYTES)))
            case Format.NDJSON:
                return iter(lambda: self._runs.read(CHUNK_BYTES), b"")

    def _lines_with_events(self) -> Iterator[bytes]:
        event = self._events.readline()
        for line in self._runs:
            run = line[len(b'{"id":') : line.index(b",")] + b" "
            yield line[:-2] + b',"events":['
            separator = b""
            while event.startswith(run):
                yield separator + event[len(run) : -1]
                separator = b","
                event = self._events.readline()
            yield b"]}\n"


def _after(first: bytes, read: Callable[[], bytes]) -> Iterator[bytes]:
    yield first
    yield from iter(read, b"")


class _Copied:
    """A finished copy (`Copy`)."""

    is_exact = True

    def __init__(self, rows: int, chunks: Iterator[bytes]) -> None:
        self.rows = rows
        self._chunks = chunks

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the export's bytes (see `Copy.chunks`); while one chunk is sent, the next one is made."""
        ahead = self._next()
        try:
            while (chunk := await ahead) is not None:
                ahead = self._next()
                yield chunk
        except (OSError, ValueError, MemoryError) as error:  # ValueError: pyarrow's, of a cell
            raise UnavailableError(str(error)[:2000]) from error
        finally:
            # What goes wrong in a chunk that nobody takes any more concerns nobody.
            ahead.add_done_callback(lambda made: made.cancelled() or made.exception())
            await asyncio.wait((ahead,))

    def _next(self) -> asyncio.Future[bytes | None]:
        return asyncio.ensure_future(asyncio.to_thread(next, self._chunks, None))


class Exports:
    """The exports of one database, each with a separate connection, so that no query waits for them."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._running = 0
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def are_running(self) -> bool:
        """Whether one reads the database, or the copy that it has made of it."""
        return self._running > 0

    @asynccontextmanager
    async def open(self, query: ExportRuns) -> AsyncIterator[_Copied]:
        """Copy what is asked for (see `ReadingEngine.export`)."""
        if self._running >= _AT_ONCE:
            raise TooManyExportsError
        self._running += 1
        files = contextlib.ExitStack()
        connection: Connection | None = None
        copying: _Copying | None = None
        try:
            connection = await connect(self._target, "export", {**reading_session(0), **_SESSION})
            copying = _Copying(query, files)
            chunks = await connection.run(copying.copy)
            copied, connection = connection, None
            await copied.close()
            yield _Copied(copying.rows, chunks)
        except DatabaseError as error:
            raise UnavailableError("The database cannot be read now; try again later") from error
        finally:
            if copying is not None:
                copying.stop()
            closing = asyncio.create_task(self._close(connection, files))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)  # which comes to its end even if the client leaves in the middle of it

    async def close(self) -> None:
        """Wait for what is closing after its client left."""
        if self._closing:
            await asyncio.wait(self._closing)

    async def _close(self, connection: Connection | None, files: contextlib.ExitStack) -> None:
        try:
            if connection is not None:
                with contextlib.suppress(psycopg.Error):
                    await asyncio.to_thread(connection.plain.cancel_safe, timeout=_CANCEL_S)
                await connection.drop()
            await asyncio.to_thread(files.close)
        finally:
            self._running -= 1
