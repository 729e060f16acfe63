"""Copies a live database to a verified file, and puts a verified file in a database's place."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Final, Protocol

from telemetryd.engine.interface import BackupMade
from telemetryd.engine.sqlite.connection import connect, connect_to_read
from telemetryd.engine.sqlite.files import (
    APPLICATION_ID,
    IF_DAMAGED,
    MAGIC,
    SIDE_FILES,
    corrupt,
    is_unfinished,
    sidecar_path,
)
from telemetryd.engine.sqlite.partials import Partial, partial_file, publish
from telemetryd.engine.sqlite.tools import rotation
from telemetryd.errors import DatabaseError, InvalidRequestError, UnavailableError, sentence
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.ops.files import owner_to_keep, sync_directory
from telemetryd.settings import Settings

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Watch = Callable[[str, int, int], None]
"""Called with the phase of a long work, how much of it is done, and how much there is."""

_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_IF_BACKUP_DAMAGED: Final = (
    "take another backup, or save what can be read of a copy of it with: telemetryd check --repair --db-path COPY"
)
_PAGES: Final = 2048
"""Pages copied in one step: 8 MiB at the usual page size, some milliseconds."""
_RESTARTS: Final = 3
_PAUSE_S: Final = 0.002
_CHUNK: Final = 1 << 20


def ignore_progress(_phase: str, _done: int, _total: int) -> None:
    """Watch nothing."""


@dataclass(frozen=True, slots=True)
class Backup:
    """A finished, verified backup."""

    path: Path
    bytes: int
    rows: int
    seconds: float
    blocked_writes: bool
    """Whether commits had to wait for the copy: only with a rollback journal, and only if writes never paused."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a verified database file holds."""

    rows: int
    version: int
    ours: bool


async def make(settings: Settings, now: datetime, *, compress: bool = True) -> BackupMade:
    """Make a verified backup in the configured directory, compressed or not, and rotate those that are there.

    Raises:
        InvalidRequestError: if no directory is configured.
        UnavailableError: if it could not be made.

    """
    if settings.backup_dir is None:
        raise InvalidRequestError("TELEMETRY_BACKUP_DIR is not set, so there is no place for a backup")
    try:
        return await asyncio.to_thread(
            _make, settings.db_path.absolute(), settings.backup_dir.absolute(), settings.backup_keep, now, compress
        )
    except DatabaseError as error:
        raise UnavailableError(sentence(error)) from error


def _make(database: Path, directory: Path, keep: int | None, now: datetime, compress: bool) -> BackupMade:
    done = back_up_into(directory, database, now, compress=compress)
    removed = [] if keep is None else rotation.rotate(directory, database, keep, done.path)
    return BackupMade(done.path, done.bytes, done.rows, done.seconds, removed)


def back_up_into(
    directory: Path, source: Path, moment: datetime, *, compress: bool = False, watch: Watch = ignore_progress
) -> Backup:
    """Copy a database to a file of a folder that is named by the moment, or by the next name that is free.

    Raises:
        DatabaseError: as `backup`.

    """
    first, *others = (directory / name for name in rotation.names(source, moment, compress=compress))
    return backup(source, first, others, compress=compress, watch=watch)


def backup(
    source: Path,
    destination: Path,
    others: Sequence[Path] = (),
    *,
    compress: bool = False,
    watch: Watch = ignore_progress,
) -> Backup:
    """Copy a database that may be in use; the copy gets its name only when it is whole, verified and synced.

    If the name is taken, one of the others will do.

    With a write-ahead log the copy is one snapshot, taken in steps while writes go on. With a rollback
    journal a snapshot would keep writers out, so the copy first tries to catch a moment without writes
    between its steps (SQLite starts over when the source changes), and takes the lock only as a last resort.

    Raises:
        DatabaseError: if the source cannot be read or the copy is not good; nothing is left then.

    """
    started = time.monotonic()
    if destination.exists() and not others:
        raise DatabaseError(f"{destination} exists already; a backup never replaces a file")
    like, owner = rf"(?:{re.escape(destination.name)}|{rotation.like(source)})(?:\.packed)?", owner_to_keep(source)
    with partial_file(destination, like, owner) as raw:
        try:
            blocked, expected = _copy(source, raw.path, watch)
            number = rotation.next_number(destination.parent, source)
            rotation.mark(raw.path, number, format_timestamp(utc_now()))
            watch("Verifying", 0, 1)
            content = verify(raw.path, source)
        except sqlite3.Error as error:
            raise DatabaseError(f"Cannot copy {source}: {error}") from error
        if expected is not None and content.rows != expected:
            raise DatabaseError(f"The copy of {source} has {content.rows} rows instead of {expected}; it was dropped")
        watch("Verifying", 1, 1)
        if compress:
            with partial_file(Path(f"{destination}.packed"), like, owner) as packed:
                _compress(raw, packed, watch)
                rotation.mark_packed(packed, number)
                name = publish(packed, destination, others)
        else:
            name = publish(raw, destination, others)
    return Backup(name, name.stat().st_size, content.rows, time.monotonic() - started, blocked)


def _copy(source: Path, target: Path, watch: Watch) -> tuple[bool, int | None]:
    """Copy in steps; return whether writers were kept out, and the row count if it is known of the snapshot."""
    with contextlib.closing(connect_to_read(source)) as reading, contextlib.closing(connect(target, "rw")) as writing:
        writing.execute("PRAGMA synchronous = OFF")  # the whole file is synced once, before it gets its name
        is_wal = reading.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        if is_wal or not _copy_between_writes(reading, writing, watch):
            reading.execute("BEGIN")
            has_runs = reading.execute("SELECT 1 FROM sqlite_master WHERE name = 'agent_runs'").fetchone()
            rows = reading.execute("SELECT count(*) FROM agent_runs").fetchone()[0] if has_runs else 0
            reading.backup(writing, pages=_PAGES, progress=_report(watch), sleep=_PAUSE_S if is_wal else 0)
            reading.execute("COMMIT")
            blocked, expected = not is_wal, rows
        else:
            blocked, expected = False, None
        writing.execute("PRAGMA journal_mode = DELETE")  # one file, whatever the source's mode
    return blocked, expected


class _Restarted(Exception):  # noqa: N818 - a signal between two functions of this module
    """The source changed so often that the copy would never end."""


def _copy_between_writes(reading: sqlite3.Connection, writing: sqlite3.Connection, watch: Watch) -> bool:
    report = _report(watch)
    restarts, left = 0, sys.maxsize

    def observe(status: int, remaining: int, total: int) -> None:
        nonlocal restarts, left
        if remaining > left:
            restarts += 1
            if restarts > _RESTARTS:
                raise _Restarted
        left = remaining
        report(status, remaining, total)

    try:
        reading.backup(writing, pages=_PAGES, progress=observe, sleep=_PAUSE_S)
    except _Restarted:
        return False
    return True


def _report(watch: Watch) -> Callable[[int, int, int], None]:
    return lambda _status, remaining, total: watch("Copying pages", total - remaining, total)


def verify(path: Path, original: Path | None = None, advice: str = IF_DAMAGED) -> Content:
    """Read a database file that nobody uses from end to end; an error names the file that it is a copy of.

    Raises:
        DatabaseError: if it is no database, damaged, or holds no runs.

    """
    called = path if original is None else original
    if is_unfinished(path):
        raise DatabaseError(f"{called} has a journal next to it, so it is not a whole database by itself")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) not in (MAGIC, b""):
            raise DatabaseError(f"{called} is not a SQLite database; nothing was changed")
    with contextlib.closing(connect(path, "ro&immutable=1")) as connection:
        try:
            finding = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if finding != "ok":
                raise corrupt(called, finding, advice)
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "agent_runs" not in tables:
                raise DatabaseError(f"{called} has no table agent_runs: it is not a telemetry database")
            rows = connection.execute("SELECT count(*) FROM agent_runs").fetchone()[0]
            ours = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise corrupt(called, str(error), advice) from error
    return Content(rows, version, ours)


# --- Putting a file in the database's place ------------------------------------------------------


def restore(
    source: Path,
    database: Path,
    moment: datetime,
    watch: Watch = ignore_progress,
    refuse: Callable[[sqlite3.Connection, Content], None] = lambda _connection, _content: None,
) -> tuple[Content, Path]:
    """Put a verified copy of a backup in the database's place; the caller owns the database.

    A source may be compressed, or a file as a crash left it with its journal or log next to it; it does not change.
    `refuse` gets a connection to the verified copy, and raises DatabaseError if that must not be served.
    Returns what it holds, and where the old file is kept (a path that does not exist if there was none).

    Raises:
        DatabaseError: if the backup is not good; the database is as before.

    """
    with partial_file(database.with_name(f"{database.name}.restored"), owner=owner_to_keep(database)) as copy:
        try:
            with source.open("rb") as plain, copy.open("wb") as target:
                if plain.peek(len(_ZSTD)).startswith(_ZSTD):
                    with zstd.open(plain) as packed:
                        _pump(packed, target, watch, "Unpacking", 0)
                else:
                    _pump(plain, target, watch, "Copying", source.stat().st_size)
                    _copy_side_files(source, copy.path)
        except (OSError, EOFError, zstd.ZstdError) as error:
            raise DatabaseError(f"Cannot copy the backup {source}: {error}") from error
        _detach(copy.path)
        watch("Verifying", 0, 1)
        content = verify(copy.path, source, _IF_BACKUP_DAMAGED)
        with contextlib.closing(connect(copy.path, "ro&immutable=1")) as connection:
            refuse(connection, content)
        watch("Verifying", 1, 1)
        return content, replace(database, copy, moment)


def _copy_side_files(source: Path, copy: Path) -> None:
    """Take along what SQLite needs to see the last commits; the shared memory (-shm) it makes anew."""
    for suffix in ("-wal", "-journal"):
        with (
            contextlib.suppress(FileNotFoundError),
            sidecar_path(source, suffix).open("rb") as side,
            sidecar_path(copy, suffix).open("xb") as target,
        ):
            _pump(side, target, ignore_progress, "", 0)


def _detach(copy: Path) -> None:
    """Make a copy a single file, and drop what it knows of processes: since then they may have finished their runs.

    Numbers of the commit sequence that were drawn since may get another meaning, so it begins a new epoch. Nothing is
    deleted of it by itself until that is confirmed again: old runs may be what it was restored for.
    """
    # If there is no such table there is nothing to drop, and if the file is damaged `verify` says so.
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(connect(copy, "rw")) as connection:
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.execute("DELETE FROM run_processes WHERE certified_at IS NULL")
        connection.execute("UPDATE change_feed SET epoch = lower(hex(randomblob(6)))")
        connection.execute("DELETE FROM confirmed_prune")
        connection.execute("DELETE FROM backup_mark")


def replace(database: Path, new: Partial, moment: datetime) -> Path:
    """Put a synced new file in a database's place in one step; return the name under which the old one is kept.

    The old file gets its second name first, so that there is a database at the path at every moment. What
    its journal holds is written back before; if that fails because the file is damaged, the journal is kept
    next to the old file under its new name.

    Raises:
        DatabaseError: if somebody has put another file in the place of the new one.

    """
    os.fsync(new.descriptor)
    aside = _new_name(database.with_name(f"{database.name}.before-{moment:%Y%m%d_%H%M%S}"))
    if database.exists():
        with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(connect(database, "rw")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        os.link(database, aside)
        sync_directory(database.parent)
        for suffix in SIDE_FILES:
            side = sidecar_path(database, suffix)
            if side.exists():
                side.rename(sidecar_path(aside, suffix))
    new.check()
    new.path.replace(database)
    sync_directory(database.parent)
    new.check(database)
    return aside


def _new_name(path: Path) -> Path:
    """Return a path, or where that is taken, as by a restore in the same second, the first one with a number."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in count(2))
    return next(name for name in chain([path], numbered) if not os.path.lexists(name))


# --- Compression ---------------------------------------------------------------------------------


def _compress(raw: Partial, packed: Partial, watch: Watch) -> None:
    """Compress a file, and read the result back to see that it gives the same bytes.

    Raises:
        DatabaseError: if it does not.

    """
    with raw.open("rb") as source, packed.open("wb") as file, zstd.open(file, "wb", level=6) as target:
        expected = _pump(source, target, watch, "Compressing", os.fstat(raw.descriptor).st_size)
    with packed.open("rb") as file, zstd.open(file, "rb") as back:
        actual = _pump(back, None, ignore_progress, "", 0)
    if actual != expected:
        raise DatabaseError(f"The compressed copy {packed.path} does not give back what went in; it was dropped")


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Target(Protocol):
    def write(self, data: bytes, /) -> int: ...


def _pump(source: _Source, target: _Target | None, watch: Watch, phase: str, total: int) -> str:
    """Copy bytes in bounded memory; return their digest."""
    digest = hashlib.blake2b()
    done = 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        done += len(chunk)
        if total:
            watch(phase, done, total)
    return digest.hexdigest()
