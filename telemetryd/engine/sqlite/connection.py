"""Opens SQLite: what the file is, one read-write connection, read-only ones."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import aiosqlite

from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.descriptors import CountedConnection, borrowed, copy_to, read_at
from telemetryd.engine.sqlite.ownership import FileLock, create_privately
from telemetryd.errors import DatabaseError

APPLICATION_ID: Final = 0x746C6D64
"""`PRAGMA application_id` of our files: the letters "tlmd"."""

SIDE_FILES: Final = ("-wal", "-shm", "-journal")
"""What SQLite may keep beside a database file; with it they are one database and move together."""

_MINIMUM_SQLITE: Final = (3, 37, 0)  # STRICT tables
_HEADER_BYTES: Final = 100
_QUICK_CHECK_BYTES: Final = 16 * 1024 * 1024
_CRASH_CHECK_BYTES: Final = 512 * 1024 * 1024
_READ_CACHE_KIB: Final = 4 * 1024
_WRITE_CACHE_KIB: Final = 40 * 1024
_CHECKPOINT_PAGES: Final = 8_000
"""The write-ahead log is written back at 32 MiB: rarer than SQLite's 4 MiB, so each page more seldom."""

LOG_BYTES: Final = 64 * 1024 * 1024
"""What a write-ahead log or journal keeps of its size; it is larger only while a reader holds it up."""

T = TypeVar("T")


# --- What the file is ----------------------------------------------------------------------------


class Kind(StrEnum):
    """What stands at the database's path."""

    MISSING = "missing"
    EMPTY = "empty"
    OURS = "ours"
    LEGACY = "legacy"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class FileState:
    """What a database file says of itself."""

    kind: Kind
    version: int


def inspect(path: Path) -> FileState:
    """Look at a database file without writing to it.

    Raises:
        DatabaseError: if it is not a usable SQLite file; the message says what it is and what to run.

    """
    header = _examine_file(path)
    if isinstance(header, FileState):
        return header
    with looking(path) as connection:
        return identify(connection)


def inspect_before_opening(path: Path) -> FileState:
    """Look at a database file like `inspect`, but never for long, for one who is going to open it.

    After a commit that was cut off, what the header of a file of ours says has to do: the file is between two
    states then, and to see the right one takes a copy of it. Ask `identify` again when it is open.

    Raises:
        DatabaseError: if it is not a usable SQLite file; the message says what it is and what to run.

    """
    header = _examine_file(path)
    if isinstance(header, FileState):
        return header
    if _has_hot_journal(path) and _application_id(header) == APPLICATION_ID:
        return FileState(Kind.OURS, int.from_bytes(header[60:64], "big"))
    with looking(path) as connection:
        return identify(connection)


def _examine_file(path: Path) -> FileState | bytes:
    """Return what a file is if SQLite is not needed to tell, or else its header.

    Raises:
        DatabaseError: if it is not a usable SQLite file.

    """
    try:
        status = path.stat()
        if not path.is_file():
            raise DatabaseError(f"{path} is not a regular file")
        refuse_strange_side_files(path)
        refuse_hard_links(path)
        with borrowed(path) as descriptor:
            header = read_at(descriptor, _HEADER_BYTES, 0)
    except FileNotFoundError:
        return FileState(Kind.MISSING, 0)
    except OSError as error:
        raise DatabaseError(f"Cannot read {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise DatabaseError(f"{path} is not writable for this user")
    if not header:
        return FileState(Kind.EMPTY, 0)
    if len(header) < _HEADER_BYTES or not header.startswith(b"SQLite format 3\0"):
        raise DatabaseError(
            f"{path} is not a SQLite database; move it away, or point TELEMETRY_DB_PATH at the right file"
        )
    _check_length(path, header, status.st_size)
    return header


def refuse_hard_links(path: Path) -> None:
    """Stop if a file has several names, and say who uses it by the others.

    Raises:
        DatabaseError: then.

    """
    try:
        status = path.stat()
    except OSError:  # whoever opens it will say so
        return
    if status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
        raise DatabaseError(
            f"{path} has {status.st_nlink} hard links{_other_names(path, status)}; SQLite can corrupt a database "
            "that is opened by two names (sqlite.org/howtocorrupt.html): remove the others"
        )


def _other_names(path: Path, status: os.stat_result) -> str:
    """Say which other names of a file stand beside it, and who uses it by them."""
    real, names = path.resolve(), []
    for other in real.parent.iterdir():
        if other != real and other.is_file() and os.path.samestat(other.stat(), status):
            holder = FileLock(other.with_name(other.name + ".lock")).holder()
            names.append(f"{other}, which {holder} owns" if holder else str(other))
    return f" (also {'; '.join(sorted(names))})" if names else ""


def _check_length(path: Path, header: bytes, actual: int) -> None:
    page_size = int.from_bytes(header[16:18], "big")
    pages = int.from_bytes(header[28:32], "big")
    is_pages_valid = header[24:28] == header[92:96]  # SQLite before 3.7 did not keep that number
    needed = pages * (65536 if page_size == 1 else page_size)
    if is_pages_valid and needed > actual and not is_unfinished(path):
        raise corrupt(path, f"it should have {pages} pages but is only {actual} bytes long")


def identify(connection: sqlite3.Connection) -> FileState:
    """Tell what a database is from what a connection sees, which includes a write-ahead log."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application == APPLICATION_ID:
        return FileState(Kind.OURS, version)
    if application:
        return FileState(Kind.FOREIGN, version)
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    kind = Kind.LEGACY if "agent_runs" in tables else Kind.FOREIGN if tables else Kind.EMPTY
    return FileState(kind, version)


def is_ours(path: Path) -> bool:
    """Tell from the header alone whether telemetryd made a file; nothing is opened by SQLite."""
    try:
        with borrowed(path) as descriptor:
            header = read_at(descriptor, _HEADER_BYTES, 0)
    except OSError:
        return False
    return _application_id(header) == APPLICATION_ID


def _application_id(header: bytes) -> int:
    return int.from_bytes(header[68:72], "big")  # sqlite.org/fileformat2.html, section 1.3


@contextmanager
def looking(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a file only to look at it; it does not change.

    `immutable` keeps SQLite from locking, and from making a shared-memory file beside a database in WAL
    mode; where a log waits, the connection has to read it (and may make that file), because even the
    header may stand only there. Where a rollback journal waits, a copy is looked at, in which SQLite can
    undo what was cut off.

    Raises:
        DatabaseError: if SQLite cannot read it.

    """
    with undisturbed(path) if _has_hot_journal(path) else nullcontext(path) as quiet:
        mode = "rw" if quiet != path else "ro" if wal_bytes(path) else "ro&immutable=1"
        yield from _look(path, f"{quiet.resolve().as_uri()}?mode={mode}")


def _look(path: Path, uri: str) -> Iterator[sqlite3.Connection]:
    try:
        with closing(CountedConnection(path, uri, uri=True)) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_BUSY:
            raise DatabaseError(f"{path} is locked by another process; nothing was changed") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise corrupt(path, str(error)) from error
        raise DatabaseError(f"Cannot read {path}: {error}") from error


@contextmanager
def undisturbed(path: Path) -> Iterator[Path]:
    """Give a path where a database may be looked at without a trace: a temporary copy if a journal is beside it."""
    if not is_unfinished(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="telemetryd-") as folder:
        copy = Path(folder) / path.name
        try:
            with borrowed(path) as descriptor:
                copy_to(descriptor, copy)
            for suffix in ("-wal", "-journal"):  # not the index of the log, which holds locks, and is made anew
                if beside(path, suffix).exists():
                    shutil.copyfile(beside(path, suffix), beside(copy, suffix))
        except OSError as error:
            raise DatabaseError(f"Cannot copy {path} to look at it: {error.strerror}") from error
        yield copy


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


def refuse_strange_side_files(path: Path) -> None:
    """Stop if something else than a file stands where SQLite keeps its journal: it would wait for a pipe for ever.

    Raises:
        DatabaseError: that names it.

    """
    for side in (beside(path, suffix) for suffix in SIDE_FILES):
        try:
            mode = side.lstat().st_mode
        except OSError:  # nothing is there, or what is wrong with the folder will be told of the database itself
            continue
        if not stat.S_ISREG(mode):
            what = next((name for is_it, name in _STRANGE if is_it(mode)), "device")
            raise DatabaseError(
                f"{side} is a {what}, but SQLite keeps a file of the database there; nothing was changed: move it away"
            )


_STRANGE: Final = (
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISLNK, "symbolic link"),
)


def is_unfinished(path: Path) -> bool:
    """Tell whether a transaction was cut off: SQLite recovers it on opening; until then the file is in between."""
    return _has_hot_journal(path) or wal_bytes(path) > 0  # a program that has only read leaves an empty one


def _has_hot_journal(path: Path) -> bool:
    refuse_strange_side_files(path)
    try:
        with beside(path, "-journal").open("rb") as journal:
            return journal.read(1) not in (b"", b"\0")  # SQLite's own test; PERSIST leaves a blank one
    except FileNotFoundError:
        return False


def beside(path: Path, suffix: str) -> Path:
    """Return where SQLite keeps one of a database's `SIDE_FILES`."""
    real = path.resolve()  # where SQLite puts it, too
    return real.with_name(real.name + suffix)


def wal_bytes(path: Path) -> int:
    """Return the size of the write-ahead log, 0 if there is none; the file is not opened."""
    try:
        return beside(path, "-wal").stat().st_size
    except FileNotFoundError:
        return 0


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


def forget_cached(path: Path) -> None:
    """Let the next look at a database be at what the disk holds, as far as no connection has it in its own memory.

    After a failed sync the kernel keeps pages that it could not write, marked as if it had (danluu.com/fsyncgate).

    Raises:
        DatabaseError: if a file cannot be opened.

    """
    if not hasattr(os, "posix_fadvise"):
        return
    for place in (path, beside(path, "-wal"), beside(path, "-journal")):
        try:
            with borrowed(place) as descriptor:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DatabaseError(f"Cannot read {place}: {error.strerror}") from error


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


IF_DAMAGED: Final = (
    "restore a backup, or look at it with: telemetryd check; save what can be read with: telemetryd check --repair"
)


def corrupt(path: Path, finding: str, advice: str = IF_DAMAGED) -> DatabaseError:
    """Return the error for a damaged file, with what was found and what to do."""
    return DatabaseError(f"{path} is damaged ({' '.join(finding.split())}); nothing was changed: {advice}")


# --- Connections ---------------------------------------------------------------------------------


class Connection(aiosqlite.Connection):
    """An aiosqlite connection that runs a whole function in its thread: one hop, however many statements.

    `aiosqlite` hops between the event loop and the thread for every call; a hop costs about 60 µs.
    """

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Call a function with the plain connection, in the connection's own thread."""
        return await self.start(function)

    is_interrupted: bool = False
    """Whether what runs in the thread shall end: SQLite does not tell the functions that it calls."""

    def start(self, function: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Do the same at once; a task for it would wait for two more turns of a busy event loop.

        Raises:
            ValueError: if the connection is closed.

        """
        self.is_interrupted = False
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._tx.put_nowait((answer, partial(function, self._conn)))
        return answer

    def interrupt_now(self) -> None:
        """Interrupt what runs in the connection's thread, if anything does; closed ones have nothing to interrupt."""
        self.is_interrupted = True
        with suppress(ValueError, sqlite3.ProgrammingError):
            self._conn.interrupt()


@dataclass(frozen=True, slots=True)
class Modes:
    """What the write connection reports about its durability (upper case, as in /health)."""

    journal_mode: str
    synchronous: str


_SYNCHRONOUS: Final = ("OFF", "NORMAL", "FULL", "EXTRA")


async def open_writer(
    path: Path, journal_mode: str, synchronous: str, busy_timeout_ms: int
) -> tuple[Connection, Modes]:
    """Open the one read-write connection. The database and what SQLite puts beside it get mode 0600.

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
        DatabaseError: if something else than a file stands where SQLite keeps its journal.
        sqlite3.Error: if the file cannot be opened.

    """
    refuse_strange_side_files(path)
    return CountedConnection(
        path,
        f"{path.resolve().as_uri()}?mode={mode}",
        uri=True,
        timeout=busy_timeout_ms / 1000,
        isolation_level=None,
        check_same_thread=False,  # interrupt() is called from the event loop
        cached_statements=statements,
    )


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
    """Tell an error that comes from the file itself from one of whoever wants to open it (a lock, a permission)."""
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
    connection.execute("PRAGMA temp_store = MEMORY")  # an INSERT of many rows keeps a journal of its own
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


def prepare_directory(database: Path) -> None:
    """Make the database's directory (mode 0700) if only that last step of its path is missing.

    A deeper gap is refused: it is more often a typing error or a disk that is not mounted, and a
    database made in the wrong place is data lost from sight.

    Raises:
        DatabaseError: if the directory cannot be made or written to.

    """
    directory = database.absolute().parent
    try:
        if not directory.exists():
            directory.mkdir(mode=0o700, exist_ok=True)
            sync_directory(directory.parent)  # or a power cut may take it away, with everything in it
    except FileNotFoundError as error:
        raise DatabaseError(
            f"The directory {directory} does not exist; if it is the right one, make it: mkdir -p {directory}"
        ) from error
    except OSError as error:
        raise DatabaseError(f"Cannot make the directory {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise DatabaseError(f"The directory {directory} is not writable for this user")


def sync_directory(path: Path) -> None:
    """Make durable what was made or renamed in a directory; raise OSError if that fails."""
    if sys.platform == "win32":
        # Windows cannot open a directory, and SQLite does not sync one there either (os_win.c, winDelete).
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
