"""Opens SQLite connections: file identification, the one read-write connection, read-only ones."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import aiosqlite

from telemetryd.engine.sqlite import private_aiosqlite, searching
from telemetryd.engine.sqlite.descriptors import CountedConnection
from telemetryd.engine.sqlite.files import corrupt, is_unfinished, looking, refuse_strange_side_files
from telemetryd.engine.sqlite.ownership import create_privately
from telemetryd.engine.sqlite.partials import check_partial
from telemetryd.errors import DatabaseError

_MINIMUM_SQLITE: Final = (3, 37, 0)  # STRICT tables
_QUICK_CHECK_BYTES: Final = 16 * 1024 * 1024
_CRASH_CHECK_BYTES: Final = 512 * 1024 * 1024
_READ_CACHE_KIB: Final = 4 * 1024
_WRITE_CACHE_KIB: Final = 40 * 1024
_CHECKPOINT_PAGES: Final = 16_000
"""The write-ahead log is written back at 64 MiB: rarer than SQLite's 4 MiB, so each page more seldom."""

LOG_BYTES: Final = 96 * 1024 * 1024
"""What a write-ahead log or journal keeps of its size; it is larger only while a reader holds it up."""

T = TypeVar("T")


# --- What the file is ----------------------------------------------------------------------------


def recover(path: Path) -> None:
    """Let SQLite undo or finish what was cut off; the caller owns the database.

    Raises:
        DatabaseError: if that is not possible.

    """
    try:
        with closing(connect(path, "rw")) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_READONLY:
            raise DatabaseError(
                f"A commit of {path} was cut off, and this user may not write there to undo it; "
                "run the command as the daemon's user, or start the daemon"
            ) from error
        raise DatabaseError(f"Cannot open {path}: {error}") from error


def check_after_crash(connection: sqlite3.Connection, path: Path) -> bool:
    """Find damage in a recovered file, through the connection that has recovered it.

    Returns whether it was done: a larger file (at 100 MiB a second) would keep clients waiting for more than 5 s.

    Raises:
        DatabaseError: if the file is damaged.

    """
    if path.stat().st_size > _CRASH_CHECK_BYTES:
        return False
    quick_check(connection, path)
    return True


def check_quickly(path: Path) -> None:
    """Find damage inside a small file; a large one would take too long to read at every start.

    Raises:
        DatabaseError: if the file is damaged.

    """
    if is_unfinished(path):
        return
    if path.stat().st_size > _QUICK_CHECK_BYTES:
        return
    with looking(path) as connection:
        quick_check(connection, path)


def quick_check(connection: sqlite3.Connection, path: Path) -> None:
    """Read a whole file through an open connection; raise DatabaseError if it is damaged."""
    finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if finding != "ok":
        raise corrupt(path, finding)


# --- Connections ---------------------------------------------------------------------------------


class Connection(aiosqlite.Connection):
    """An aiosqlite connection that runs a whole function in its thread: one hop, however many statements.

    `aiosqlite` hops between the event loop and the thread for every call; a hop costs about 60 µs.
    """

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Call a function with the plain connection, in the connection's own thread."""
        return await self.start(function)

    is_interrupted: bool = False
    """Whether what runs in the thread shall end: SQLite does not pass that to the functions that it calls."""

    def start(self, function: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Do the same at once; a task for it would wait for two more turns of a busy event loop.

        Raises:
            ValueError: if the connection is closed.

        """
        self.is_interrupted = False
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        private_aiosqlite.put(self, answer, function)
        return answer

    def interrupt_now(self) -> None:
        """Interrupt what runs in the connection's thread, if anything does; closed ones have nothing to interrupt."""
        self.is_interrupted = True
        with suppress(ValueError, sqlite3.ProgrammingError):
            private_aiosqlite.plain(self).interrupt()


@dataclass(frozen=True, slots=True)
class Modes:
    """What the write connection reports about its durability (upper case, as in /health)."""

    journal_mode: str
    synchronous: str


_SYNCHRONOUS: Final = ("OFF", "NORMAL", "FULL", "EXTRA")


async def open_writer(
    path: Path, journal_mode: str, synchronous: str, busy_timeout_ms: int
) -> tuple[Connection, Modes]:
    """Open the one read-write connection. The database and what SQLite puts next to it get mode 0600.

    Raises:
        DatabaseError: if SQLite is too old, or the file cannot be opened with these modes.

    """
    if sqlite3.sqlite_version_info < _MINIMUM_SQLITE:
        raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old; 3.37 or newer is needed")
    create_privately(path)
    connection = Connection(lambda: connect(path, "rw", busy_timeout_ms), 1000)
    try:
        await connection
        modes = await connection.run(lambda plain: _configure_writer(plain, journal_mode, synchronous))
    except sqlite3.Error as error:
        await connection.close()
        raise DatabaseError(f"Cannot open {path}: {error}") from error
    if modes != Modes(journal_mode, synchronous):
        await connection.close()
        raise DatabaseError(
            f"SQLite keeps {modes.journal_mode}/{modes.synchronous} instead of {journal_mode}/{synchronous} "
            f"for {path}; another process may have it open, or its file system cannot do it"
        )
    return connection, modes


async def open_reader(path: Path, busy_timeout_ms: int) -> Connection:
    """Open one connection that cannot write and never checkpoints."""
    connection = Connection(lambda: connect(path, "ro", busy_timeout_ms, statements=_READERS_STATEMENTS), 1000)
    await connection
    try:
        await connection.run(_configure_reader)
        await connection.run(lambda plain: searching.add_to(plain, lambda: connection.is_interrupted))
    except BaseException:
        await connection.close()
        raise
    return connection


_READERS_STATEMENTS: Final = 64
"""Prepared statements that a reader keeps: one that renders whole runs takes 28 KiB."""


def connect(path: Path, mode: str, busy_timeout_ms: int = 30_000, *, statements: int = 256) -> CountedConnection:
    """Open a plain connection without implicit transactions; `mode` is that of SQLite's URI: ro, rw or rwc.

    Raises:
        DatabaseError: if something else than a file stands where SQLite keeps its journal, or somebody has put another
            file in the place of one that this process is making.
        sqlite3.Error: if the file cannot be opened.

    """
    refuse_strange_side_files(path)
    check_partial(path)
    connection = CountedConnection(
        path,
        f"{path.resolve().as_uri()}?mode={mode}",
        uri=True,
        timeout=busy_timeout_ms / 1000,
        isolation_level=None,
        check_same_thread=False,  # interrupt() is called from the event loop
        cached_statements=statements,
    )
    try:
        check_partial(path)  # until now SQLite has only opened it
    except DatabaseError:
        connection.close()
        raise
    return connection


def quoted(name: str) -> str:
    """Return a name as it stands in SQL (sqlite.org/lang_keywords.html)."""
    return '"' + name.replace('"', '""') + '"'


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a connection that cannot write to a database that may be in use.

    Where a commit was cut off and nobody is there to finish it, SQLite undoes it first, which needs to write.

    Raises:
        DatabaseError: if that is not possible.
        sqlite3.Error: if the file cannot be opened.

    """
    connection = connect(path, "ro")
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        connection.close()
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        recover(path)
        connection = connect(path, "ro")
    return connection


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error comes from the file itself, not from how it is opened (a lock, a permission)."""
    # Errors of Python's own, such as a text that is not UTF-8, have no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)


def lenient_text(raw: bytes) -> str | bytes:
    """Return text that is not UTF-8 as it is (a `text_factory`): sqlite3 alone would fail on the whole row."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _configure(connection: sqlite3.Connection, cache_kib: int) -> None:
    # Defensive settings of sqlite.org/security.html; no memory map, which would turn a stray write or an
    # I/O error into damage or a signal.
    for pragma in ("cell_size_check = ON", "mmap_size = 0", f"cache_size = -{cache_kib}"):
        connection.execute(f"PRAGMA {pragma}")


def _configure_writer(connection: sqlite3.Connection, journal_mode: str, synchronous: str) -> Modes:
    _configure(connection, _WRITE_CACHE_KIB)
    if connection.execute("PRAGMA page_count").fetchone()[0] == 0:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # can only be chosen before the first table
    connection.execute(f"PRAGMA journal_mode = {journal_mode}")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
    # Removed rows are overwritten; copies that SQLite made when it moved rows may stay in gaps of pages until a VACUUM.
    # With Debian's SQLite that is the default.
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA temp_store = MEMORY")  # an INSERT of many rows keeps a statement journal
    modes = read_modes(connection)
    if modes == Modes("DELETE", "FULL"):
        # At FULL nothing makes the unlink of the journal durable, which is the commit: a power cut can bring the
        # journal back. It would undo an acknowledged commit, or, where the file was truncated after it, need pages
        # that are gone. EXTRA syncs the directory between the two (sqlite.org/pragma.html#pragma_synchronous).
        connection.execute("PRAGMA synchronous = EXTRA")
    return modes


def _configure_reader(connection: sqlite3.Connection) -> None:
    _configure(connection, _READ_CACHE_KIB)
    connection.execute("PRAGMA query_only = ON")
    # Not on the writer: SQLite before 3.41 refuses json_valid() in our own CHECK constraints then.
    connection.execute("PRAGMA trusted_schema = OFF")


def checkpoint_passively(connection: sqlite3.Connection) -> None:
    """Write back what no reader keeps from it, without waiting.

    Only for the write connection: before 3.51.3, two that checkpoint at the same moment could damage a
    database (sqlite.org/wal.html#walresetbug).
    """
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def empty_log(connection: sqlite3.Connection) -> bool:
    """Write everything back and empty the log, without waiting; return whether no reader kept it from that.

    Only for the write connection, too.
    """
    (patience_ms,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 0").fetchall()
    try:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {patience_ms}").fetchall()
    return not busy


def bytes_not_written_back(connection: sqlite3.Connection) -> int:
    """Write back what no reader keeps from it, and return how much is left; only for the write connection, too."""
    _, frames, done = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    page_bytes: int = connection.execute("PRAGMA page_size").fetchone()[0]
    return max(int(frames) - int(done), 0) * page_bytes


def read_modes(connection: sqlite3.Connection) -> Modes:
    """Ask a connection how it journals and syncs."""
    journal_mode: str = connection.execute("PRAGMA journal_mode").fetchone()[0]
    synchronous: int = connection.execute("PRAGMA synchronous").fetchone()[0]
    return Modes(journal_mode.upper(), _SYNCHRONOUS[synchronous])
