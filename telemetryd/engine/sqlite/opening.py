"""Opens a database: looks at the file, makes or checks its schema, and opens what writes and what reads."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from telemetryd.engine.sqlite.connection import Connection, Modes, check_after_crash, check_quickly, open_writer
from telemetryd.engine.sqlite.files import Kind as FileKind
from telemetryd.engine.sqlite.files import identify, inspect_before_opening, is_unfinished, looking, sidecar_path
from telemetryd.engine.sqlite.readers import Readers
from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.tools import foreign, migrate
from telemetryd.errors import DatabaseError
from telemetryd.model.values import format_timestamp
from telemetryd.ops.files import sync_directory
from telemetryd.ops.logs import log
from telemetryd.settings import Settings

T = TypeVar("T")

_BUSY_SLICE_MS: Final = 2_000
"""SQLite waits for a lock so long at a time; between two slices the writer sees whether it is to stop."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What is open on the database, and the files that it holds by name and inode."""

    connection: Connection
    modes: Modes
    readers: Readers
    logs: Mapping[Path, tuple[int, int] | None]
    """The write-ahead log and its index, which SQLite goes on using when their names are gone."""

    @classmethod
    async def open(
        cls, settings: Settings, clock: Callable[[], datetime], *, may_create: bool, after_crash: bool
    ) -> Opened:
        """Look at the file, make the schema if it is new (and may be), and open the connections.

        Raises:
            DatabaseError: if the file is not, or not yet, a database of this version. Nothing is written then.

        """
        path = settings.db_path.absolute()
        async with contextlib.AsyncExitStack() as undo:
            state = inspect_before_opening(path)
            migrate.refuse_unless_usable(path, state)
            if state.kind is FileKind.OURS:
                check_quickly(path)
                if not is_unfinished(path):
                    with looking(path) as plain:
                        check_schema(plain, path)  # before opening may change the journal mode in the file
            elif not may_create:
                raise DatabaseError(f"{path} is not a telemetryd database any more")
            connection, modes = await open_writer(
                path, settings.db_journal_mode, settings.db_synchronous, settings.db_busy_timeout_ms
            )
            undo.push_async_callback(connection.close)
            try:
                state = await connection.run(identify)  # again: opening has undone what was cut off
                migrate.refuse_unless_usable(path, state)
                if state.kind is not FileKind.OURS and may_create:
                    await connection.run(lambda plain: migrate.create(plain, format_timestamp(clock())))
                    sync_directory(path.resolve().parent)
                elif after_crash:
                    await _look_for_damage(connection, path)
                await connection.run(lambda plain: check_schema(plain, path))
                slice_ms = min(settings.db_busy_timeout_ms, _BUSY_SLICE_MS)
                await connection.run(lambda plain: plain.execute(f"PRAGMA busy_timeout = {slice_ms}").fetchall())
                readers = await Readers.open(
                    path, settings.db_readers, settings.query_timeout_s, settings.db_busy_timeout_ms
                )
            except (sqlite3.Error, OSError) as error:
                raise DatabaseError(f"Cannot use {path}: {error}") from error
            undo.pop_all()
        suffixes = ("-wal", "-shm") if modes.journal_mode == "WAL" else ()
        logs = {place: identity_of(place) for place in (sidecar_path(path, suffix) for suffix in suffixes)}
        return cls(connection, modes, readers, logs)

    def lost_log(self) -> Path | None:
        """Return the log file that was deleted or replaced, or None."""
        return next((place for place, identity in self.logs.items() if identity_of(place) != identity), None)

    async def close(self) -> None:
        """Write the write-ahead log back, and close every connection."""
        await self.readers.close()
        if self.modes.journal_mode == "WAL":
            with contextlib.suppress(sqlite3.Error):  # the next start recovers the log just as well
                await self.connection.run(_checkpoint)
        await self.connection.close()

    async def drop(self) -> None:
        """Close every connection without a sync, after a failure.

        The write connection is closed before the readers: so it does not checkpoint. After a failed sync nothing
        must be synced again as it is, because the kernel may have dropped what it could not write, and would
        report success now.
        """
        await self.connection.close()
        await self.readers.close()


async def keep_full_text(connection: Connection, path: Path, *, wanted: bool) -> None:
    """Begin the full-text index or drop it, as the setting says; call it before anything is written.

    What is begun is built by `IndexTexts`, slice by slice, also after a restart; until then there is no search.

    Raises:
        DatabaseError: if that is not possible.

    """
    try:
        if not wanted and await connection.run(full_text.is_there):
            started = time.monotonic()
            log.info("Dropping the full-text index")
            await _at_once(connection, full_text.drop)
            took = {"duration_ms": round((time.monotonic() - started) * 1000, 3)}
            log.info("The full-text index is dropped", extra=took)
        elif wanted and not await connection.run(lambda it: full_text.is_complete(it) or full_text.is_begun(it)):
            log.info("Building the full-text index")
            await _at_once(connection, full_text.begin)
    except sqlite3.Error as error:
        raise DatabaseError(f"Cannot change the full-text index of {path}: {error}") from error


def check_schema(plain: sqlite3.Connection, path: Path) -> None:
    """Stop at a database that has another schema, or in which others have put what would work on our writes.

    Raises:
        DatabaseError: then.

    """
    migrate.check_schema(plain, path)
    foreign.refuse_harmful(plain, path)


async def _at_once(connection: Connection, step: Callable[[sqlite3.Connection], T]) -> T:
    return await connection.run(partial(full_text.at_once, step=step))


async def _look_for_damage(connection: Connection, path: Path) -> None:
    started = time.monotonic()
    is_done = await connection.run(lambda plain: check_after_crash(plain, path))
    log.warning(
        "Recovered after an unclean stop",
        extra={
            "db_path": str(path),
            "quick_check": "ok" if is_done else "skipped, the file is large; run: telemetryd check",
            "duration_ms": round((time.monotonic() - started) * 1000, 3),
        },
    )


def _checkpoint(plain: sqlite3.Connection) -> None:
    plain.execute("PRAGMA busy_timeout = 0")  # another program's reader may block it, which is no reason to wait
    plain.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return which file stands at a path: its device and inode, or None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
