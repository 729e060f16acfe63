"""Exports: copies what is asked for out of the database in one snapshot, and streams it from the copy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.connection import Connection, connect
from telemetryd.engine.sqlite.partials import partial_file
from telemetryd.engine.sqlite.statements import export as export_rows
from telemetryd.errors import (
    DatabaseError,
    InvalidRequestError,
    StorageFullError,
    TooManyExportsError,
    UnavailableError,
    sentence,
)
from telemetryd.model import tables
from telemetryd.model.changes import BEGINNING
from telemetryd.model.queries import MEDIA_TYPES, SNAPSHOT, CountMatching, ExportRuns, Format
from telemetryd.model.values import utc_now
from telemetryd.ops.logs import log
from telemetryd.settings import JournalMode, Settings
from telemetryd.store import Store
from telemetryd.web.answers import NOTE, mark, request_id
from telemetryd.web.middleware import leaving

_LEAST_BYTES_PER_S: Final = 1024
_PATIENCE_S: Final = 60.0
"""Whoever takes longer for a chunk than this, and at this rate, is cut off."""

MAX_EXPORTS: Final = 2
"""How many may run at once; each holds a thread, some descriptors and room on the disk."""

_LONGEST_WAL_S: Final = 60.0
_LONGEST_S: Final = 0.5
"""How long one transaction may copy: in WAL mode a long one holds back checkpoints, in the other modes commits."""
_SLICE_ROWS: Final = 2_000
_LEAST_PAUSE_S: Final = 0.002


def _headers(form: Format, rows: int, *, exact: bool) -> dict[str, str]:
    return {
        "Content-Type": MEDIA_TYPES[form],
        "Content-Disposition": f'attachment; filename="runs-{utc_now():%Y%m%dT%H%M%SZ}.{form}"',
        "Cache-Control": "no-store",
        "X-Total-Count": str(rows),
        SNAPSHOT: "exact" if exact else "sliced",
    }


async def describe(request: web.Request, query: ExportRuns, store: Store) -> web.StreamResponse:
    """Answer a HEAD: the headers of an export, for which nothing is copied; the runs are counted instead.

    Raises:
        InvalidRequestError: if it cannot be answered in this form, or over HTTP/1.0.
        UnavailableError: if the database cannot be read now.

    """
    await _check_form(request, query)
    total = await store.fetch(CountMatching(query.filters))
    request[NOTE].say("Export described", query_params=query.parameters(), result_count=total.runs)
    return web.StreamResponse(headers=_headers(query.form, total.runs, exact=True))  # whose length nobody knows


async def _check_form(request: web.Request, query: ExportRuns) -> None:
    if request.version < (1, 1):
        raise InvalidRequestError("An export needs HTTP/1.1: in HTTP/1.0 one that was cut off would look whole")
    if query.form is Format.PARQUET:
        try:
            await asyncio.to_thread(tables.require_parquet)
        except tables.NoParquetError as error:
            raise InvalidRequestError(f"Invalid format: 'parquet'; {sentence(error)}") from error


@dataclass(slots=True)
class _Export:
    """One export: everything but `stop` is done in its connection's thread."""

    query: ExportRuns
    longest_s: float
    rows: int = 0
    exact: bool = True
    _deadline: float = float("inf")
    _stopped: bool = False

    def stop(self) -> None:
        """End what is being copied or read, soon."""
        self._stopped = True

    def is_over(self) -> bool:
        """Tell whether the present statement shall end."""
        return self._stopped or time.monotonic() > self._deadline

    def copy(self, connection: sqlite3.Connection, database: Path, room_bytes: int) -> Iterator[bytes]:
        """Copy what is asked for, leave the database alone from then on, and return the copy's chunks.

        Raises:
            StorageFullError: if there is no room for the copy.
            UnavailableError: if the database cannot be read.

        """
        try:
            export_rows.prepare(connection, database, room_bytes, self.is_over)
            searching.add_to(connection, lambda: self._stopped)
            self._deadline = time.monotonic() + self.longest_s
            try:
                self.rows = export_rows.copy_at_once(connection, self.query)
            except sqlite3.OperationalError as error:
                if self._stopped or error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                    raise
                self._deadline = float("inf")
                self._copy_in_slices(connection)
            self._deadline = float("inf")
            export_rows.let_go(connection)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise StorageFullError(
                    "The disk has no room for the copy that an export is read from; narrow its filters"
                ) from error
            raise UnavailableError("The database cannot be read now; try again later") from error
        return self._chunks(connection)

    def _copy_in_slices(self, connection: sqlite3.Connection) -> None:
        """Copy in short transactions with pauses as long, up to the run that is the newest now."""
        self.exact, self.rows, after = False, 0, BEGINNING
        last = export_rows.last_id(connection)
        while after < last:
            started = time.monotonic()
            copied, after = export_rows.copy_slice(connection, self.query, after, last, _SLICE_ROWS)
            self.rows += copied
            time.sleep(max(time.monotonic() - started, _LEAST_PAUSE_S))

    def _chunks(self, connection: sqlite3.Connection) -> Iterator[bytes]:
        match self.query.form:
            case Format.NDJSON:
                return export_rows.ndjson_chunks(connection, with_events=self.query.with_events)
            case Format.CSV:
                return export_rows.csv_chunks(connection)
            case Format.PARQUET:
                return tables.parquet_from_csv(export_rows.csv_chunks(connection))


class Exports:
    """The exports of one daemon, each with a connection of its own, so that no query waits for them."""

    def __init__(self, settings: Settings) -> None:
        self._database = settings.db_path.absolute()
        self._reserve_bytes = settings.min_free_mb << 20
        self._longest_s = _LONGEST_WAL_S if settings.db_journal_mode is JournalMode.WAL else _LONGEST_S
        self._running = 0
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def are_running(self) -> bool:
        """Whether one reads the database, or the copy that it has made of it."""
        return self._running > 0

    async def answer(self, request: web.Request, query: ExportRuns) -> web.StreamResponse:
        """Stream an export; one that cannot be brought to its end is cut, so that nobody takes it for whole.

        Raises:
            InvalidRequestError: if it cannot be answered in this form, or over HTTP/1.0.
            UnavailableError: if it cannot be made now.

        """
        await _check_form(request, query)
        async with self._open(query) as (export, connection, chunks):
            response = web.StreamResponse(headers=_headers(query.form, export.rows, exact=export.exact))
            mark(response, request_id(request))
            response.enable_chunked_encoding()
            request[NOTE].say("Runs exported", query_params=query.parameters(), result_count=export.rows)
            await response.prepare(request)
            try:
                with leaving(request):
                    while (chunk := await connection.run(lambda _: next(chunks, None))) is not None:
                        async with asyncio.timeout(_PATIENCE_S + len(chunk) / _LEAST_BYTES_PER_S):
                            await response.write(chunk)
                    await response.write_eof()
            except ConnectionError:
                request[NOTE].say("Export cut off by its reader", query_params=query.parameters())
            except TimeoutError:  # or a few who read a byte now and then would keep all others from exporting
                request[NOTE].say("Export cut off: its reader is too slow", query_params=query.parameters())
                if request.transport is not None:
                    request.transport.abort()
            except (sqlite3.Error, ValueError, MemoryError) as error:  # ValueError: pyarrow's, of a cell
                log.error("Export cut off", extra={"error_message": str(error)[:2000]})
                if request.transport is not None:
                    request.transport.abort()
        return response

    @asynccontextmanager
    async def _open(self, query: ExportRuns) -> AsyncIterator[tuple[_Export, Connection, Iterator[bytes]]]:
        if self._running >= MAX_EXPORTS:
            raise TooManyExportsError
        export = _Export(query, self._longest_s)
        self._running += 1
        files = contextlib.ExitStack()
        connection = Connection(lambda: self._new_copy(files), 1000)
        try:
            await connection
            chunks = await connection.run(lambda plain: export.copy(plain, self._database, self._room_bytes()))
            yield export, connection, chunks
        except DatabaseError as error:
            raise UnavailableError(sentence(error)) from error
        finally:
            export.stop()
            closing = asyncio.create_task(self._close(connection, files))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)  # which comes to its end even if the client leaves in the middle of it

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
        """Open an empty file beside the database; it vanishes with the process, or else when `files` is closed."""
        path = files.enter_context(partial_file(self._database.with_name(f"{self._database.name}.export")))
        connection = connect(path, "rw")
        connection.use(self._database)  # which is attached to the copy
        if os.name == "posix":  # an open file needs no name there
            path.unlink()
        return connection
