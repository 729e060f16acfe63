"""Inspects a database file and its sidecar files without changing them."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.descriptors import CountedConnection, borrowed, copy_to
from telemetryd.engine.sqlite.file_lock import FileLock
from telemetryd.errors import DatabaseError
from telemetryd.ops.files import hand_over, owner_to_keep, sync_directory

APPLICATION_ID: Final = 0x746C6D64
"""`PRAGMA application_id` of our files: the letters "tlmd"."""


SIDE_FILES: Final = ("-wal", "-shm", "-journal")
"""What SQLite may keep next to a database file; with it they are one database and move together."""


_HEADER_BYTES: Final = 100


MAGIC: Final = b"SQLite format 3\0"
"""How each SQLite file begins (sqlite.org/fileformat2.html, section 1.3)."""


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
    """Return what a file is, or its header if only SQLite can decide.

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
            header = os.pread(descriptor, _HEADER_BYTES, 0)
    except FileNotFoundError:
        return FileState(Kind.MISSING, 0)
    except OSError as error:
        raise DatabaseError(f"Cannot read {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise DatabaseError(f"{path} is not writable for this user")
    if not header:
        return FileState(Kind.EMPTY, 0)
    if len(header) < _HEADER_BYTES or not header.startswith(MAGIC):
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
    except OSError:  # opening it will report that
        return
    if status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
        raise DatabaseError(
            f"{path} has {status.st_nlink} hard links{_other_names(path, status)}; SQLite can corrupt a database "
            "that is opened by two names (sqlite.org/howtocorrupt.html): remove the others"
        )


def _other_names(path: Path, status: os.stat_result) -> str:
    """Say which other names of a file stand next to it, and who uses it by them."""
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
    """Return what a database is from what a connection sees, which includes a write-ahead log."""
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
    """Return from the header alone whether telemetryd made a file; SQLite opens nothing."""
    try:
        with borrowed(path) as descriptor:
            header = os.pread(descriptor, _HEADER_BYTES, 0)
    except OSError:
        return False
    return _application_id(header) == APPLICATION_ID


def _application_id(header: bytes) -> int:
    return int.from_bytes(header[68:72], "big")  # sqlite.org/fileformat2.html, section 1.3


@contextmanager
def looking(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a file only to look at it; it does not change.

    `immutable` keeps SQLite from locking, and from making a shared-memory file next to a database in WAL
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
    """Give a path where a database may be looked at without a trace: a temporary copy if a journal is next to it."""
    if not is_unfinished(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="telemetryd-") as folder:
        copy = Path(folder) / path.name
        try:
            with borrowed(path) as descriptor:
                copy_to(descriptor, copy)
            for suffix in ("-wal", "-journal"):  # not the index of the log, which holds locks, and is made anew
                if sidecar_path(path, suffix).exists():
                    shutil.copyfile(sidecar_path(path, suffix), sidecar_path(copy, suffix))
        except OSError as error:
            raise DatabaseError(f"Cannot copy {path} to look at it: {error.strerror}") from error
        yield copy


def refuse_strange_side_files(path: Path) -> None:
    """Stop if something else than a file of its own stands where SQLite keeps its journal, its log or their index.

    It would wait for a pipe for ever, and write into a file that has another name elsewhere.

    Raises:
        DatabaseError: that names it.

    """
    for side in (sidecar_path(path, suffix) for suffix in SIDE_FILES):
        try:
            status = side.lstat()
        except OSError:  # nothing is there, or what is wrong with the folder will be reported of the database itself
            continue
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            what = next((name for is_it, name in _STRANGE if is_it(status.st_mode)), "device")
            raise DatabaseError(
                f"{side} is a {what}, but SQLite keeps a file of the database there; nothing was changed: move it away"
            )


_STRANGE: Final = (
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISLNK, "symbolic link"),
    (stat.S_ISREG, "hard link"),
)


def is_unfinished(path: Path) -> bool:
    """Return whether a transaction was cut off: SQLite recovers it on opening; until then the file is in between."""
    return _has_hot_journal(path) or wal_bytes(path) > 0  # a program that has only read leaves an empty one


def _has_hot_journal(path: Path) -> bool:
    refuse_strange_side_files(path)
    try:
        with sidecar_path(path, "-journal").open("rb") as journal:
            return journal.read(1) not in (b"", b"\0")  # SQLite's own test; PERSIST leaves a blank one
    except FileNotFoundError:
        return False


def sidecar_path(path: Path, suffix: str) -> Path:
    """Return where SQLite keeps one of a database's `SIDE_FILES`."""
    real = path.resolve()  # where SQLite puts it, too
    return real.with_name(real.name + suffix)


def wal_bytes(path: Path) -> int:
    """Return the size of the write-ahead log, 0 if there is none; the file is not opened."""
    try:
        return sidecar_path(path, "-wal").stat().st_size
    except FileNotFoundError:
        return 0


def forget_cached(path: Path) -> None:
    """Let the next look at a database be at what the disk holds, as far as no connection has it in its own memory.

    After a failed sync the kernel keeps pages that it could not write, marked as if it had (danluu.com/fsyncgate).

    Raises:
        DatabaseError: if a file cannot be opened.

    """
    for place in (path, sidecar_path(path, "-wal"), sidecar_path(path, "-journal")):
        try:
            with borrowed(place) as descriptor:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DatabaseError(f"Cannot read {place}: {error.strerror}") from error


IF_DAMAGED: Final = (
    "restore a backup, or look at it with: telemetryd check; save what can be read with: telemetryd check --repair"
)


def corrupt(path: Path, finding: str, advice: str = IF_DAMAGED) -> DatabaseError:
    """Return the error for a damaged file, with what was found and what to do."""
    return DatabaseError(f"{path} is damaged ({' '.join(finding.split())}); nothing was changed: {advice}")


def _make_directory(path: Path) -> None:
    """Make a directory of mode 0700; if root makes it, it belongs to the owner of the one that it is in."""
    path.mkdir(mode=0o700)
    descriptor = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        hand_over(descriptor, owner_to_keep(path.parent))
    finally:
        os.close(descriptor)


def prepare_directory(database: Path) -> None:
    """Make the database's directory (mode 0700) if only that last step of its path is missing.

    A deeper gap is refused: it is more often a typo or a disk that is not mounted, and a
    database made in the wrong place is data lost from sight.

    Raises:
        DatabaseError: if the directory cannot be made or written to.

    """
    directory = database.absolute().parent
    try:
        if not directory.exists():
            with suppress(FileExistsError):
                _make_directory(directory)
            sync_directory(directory.parent)  # or a power cut may take it away, with everything in it
    except FileNotFoundError as error:
        raise DatabaseError(
            f"The directory {directory} does not exist; if it is the right one, make it: mkdir -p {directory}"
        ) from error
    except OSError as error:
        raise DatabaseError(f"Cannot make the directory {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise DatabaseError(f"The directory {directory} is not writable for this user")
