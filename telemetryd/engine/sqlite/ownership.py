"""Ownership of a database: locks on its path, on the configured lock file, and on the file itself."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.descriptors import HeldFile, Identity, give_back, take
from telemetryd.engine.sqlite.file_lock import HELD, FileLock, holder_of, lock_soon
from telemetryd.errors import DatabaseError, DatabaseOwnedError
from telemetryd.ops.files import hand_over, owner_to_keep
from telemetryd.ops.mounts import network_file_system

_SPARE_BYTES: Final = 64 * 1024
"""The index of a write-ahead log takes 32 KiB, without which nothing can be read (sqlite.org/walformat.html, 2)."""
_CLEAN: Final = "user.telemetryd.settled"
"""The extended attribute in which the size and the time of a file stand as its last owner left it."""
_OPENED: Final = "user.telemetryd.opened"
"""The extended attribute that records by which name the owner of a file has it open; after a crash it still stands."""


def _can_lock_file(path: Path) -> bool:
    """Return whether a lock of ours on the database file itself stands apart from those that SQLite takes on it.

    flock(2) and POSIX locks know nothing of each other on the local file systems of Linux. Over a network they are one
    and the same, or keep others from reading (flock(2), NOTES).
    """
    return network_file_system(path) is None


class _OwnFile:
    """The lock on the database file itself: it holds whatever names the file has, in every container of this kernel.

    Its descriptor is opened before SQLite opens the file, and closed only when SQLite has none open any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: HeldFile | None = None

    @property
    def identity(self) -> Identity | None:
        """Which file it is, or None if none is owned."""
        return None if self._file is None else self._file.identity

    def acquire(self, *, create: bool) -> None:
        """Take the lock, if there is a file; with `create` there is one afterwards, of mode 0600."""
        if create:
            create_privately(self._path)
        try:
            if not self._path.is_file():  # opening it will report what it is
                return
            file = _take_writable(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DatabaseError(f"Cannot open {self._path}: {error.strerror}") from error
        try:
            if file.is_owned:
                raise DatabaseOwnedError(f"This process (PID {os.getpid()}) owns {self._path} already by another name")
            if _can_lock_file(self._path):
                lock_soon(file.descriptor)
            _refuse_left_elsewhere(self._path)
        except OSError as error:
            if error.errno in HELD:
                holder = holder_of(file.descriptor)
                give_back(file)
                raise DatabaseOwnedError(
                    f"Another telemetryd ({holder}) owns this database: it holds the file {self._path} itself, "
                    "maybe by another name (a bind mount, a hard link, another container)"
                ) from error
        except DatabaseError:
            give_back(file)
            raise
        file.is_owned = True
        self._file = file
        _note_name(self._path)

    def holder(self) -> str | None:
        """Return who holds the file, or None; to be called while this process has no connection to it."""
        if not _can_lock_file(self._path) or not self._path.is_file():
            return None
        try:
            file = take(self._path)
        except OSError:
            return None
        try:
            if file.is_owned:
                return f"PID {os.getpid()}"
            lock_soon(file.descriptor)
            _unlock(file.descriptor)
        except OSError as error:
            return holder_of(file.descriptor) if error.errno in HELD else None
        finally:
            give_back(file)
        return None

    def was_changed(self) -> bool:
        """Return whether another process has written to the file since `mark_clean`, as far as that is known."""
        if self._file is None:
            return False
        try:
            return os.getxattr(self._path, _CLEAN) != self._mark()
        except OSError:  # no owner has marked this file, or the file system cannot keep such a mark
            return False

    def mark_clean(self) -> None:
        """Mark the file as it is now; to be called when no connection is open any more."""
        if self._file is not None:
            with suppress(OSError):
                os.setxattr(self._path, _CLEAN, self._mark())
                os.removexattr(self._path, _OPENED)

    def _mark(self) -> bytes:
        status = os.stat(self._path)
        return f"{status.st_size} {status.st_mtime_ns}".encode()

    def release(self) -> None:
        """Give the file back; its lock goes with the last connection of this process."""
        if self._file is not None:
            self._file.is_owned = False
            give_back(self._file)
            self._file = None


def _name_mark(path: Path) -> bytes:
    """Say which file it is, in which directory, and by which name; devices change when something is mounted anew."""
    return b"%d %d %b" % (os.stat(path).st_ino, os.stat(path.parent).st_ino, os.fsencode(path))


def _note_name(path: Path) -> None:
    """Mark a file with the name by which it is about to be opened, as far as the file system can keep that."""
    with suppress(OSError):
        os.setxattr(path, _OPENED, _name_mark(path))


def _refuse_left_elsewhere(path: Path) -> None:
    """Stop before a file is used whose last owner was killed and has left committed runs next to another name of it.

    They would be missing here, and when they are recovered later, they would undo what was written meanwhile
    (sqlite.org/howtocorrupt.html, section 2.4). A directory that cannot be seen from here cannot be looked at.

    Raises:
        DatabaseError: then.

    """
    if (name := _opened_name(path)) is not None and _has_left(name):
        raise DatabaseError(
            f"{path} was last opened as {name}, by a process that was killed, and what it committed last still stands "
            "next to that name; nothing was changed: start telemetryd once with that name, and stop it"
        )


def _opened_name(path: Path) -> Path | None:
    """Return the other name by which the last owner of a file had it open and was killed, if that can be seen here."""
    try:
        mark = os.getxattr(path, _OPENED)
        inode, folder, name = mark.split(b" ", 2)
        other = Path(os.fsdecode(name))
        is_of_a_copy = int(inode) != os.stat(path).st_ino
        if mark == _name_mark(path) or is_of_a_copy or int(folder) != os.stat(other.parent).st_ino:
            return None
        # Where the file was moved away from, another file with its log may be now; a mount leaves a blank.
        if other.exists() and other.stat().st_size and not other.samefile(path):
            return None
    except (OSError, ValueError):
        return None
    return other


def _has_left(path: Path) -> bool:
    """Return whether a log, or the journal of a transaction that was cut off, stands next to a name."""
    for suffix in ("-wal", "-journal"):
        side = path.with_name(path.name + suffix)
        if side.is_file():
            with suppress(OSError), side.open("rb") as file:
                if file.read(1) not in (b"", b"\0"):
                    return True
    return False


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _take_writable(path: Path) -> HeldFile:
    """Open a file as SQLite will: on an overlay the first opening for writing makes another file of it.

    Raises:
        OSError: if it cannot even be read.

    """
    try:
        return take(path, os.O_RDWR)
    except PermissionError:
        return take(path)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return take(path)


def create_privately(path: Path) -> None:
    """Make an empty file of mode 0600, whatever the umask, unless there is something at the path.

    If root makes it, it belongs to the owner of its folder, as does what SQLite puts next to it.

    Raises:
        DatabaseError: if it cannot be made.

    """
    if path.exists():
        return
    real = path.resolve()
    try:
        owner = owner_to_keep(real)
        descriptor = os.open(real, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return
    except OSError as error:
        raise DatabaseError(f"Cannot make {path}: {error.strerror}") from error
    hand_over(descriptor, owner)
    os.close(descriptor)


class Ownership:
    """The right to write to one database, whatever lock file was configured, and whatever the file is called.

    Three locks make it: the configured one, one next to the database's real path (symbolic links resolved), so that two
    daemons with different settings cannot own the same file, and one on the file itself, which a bind mount, a hard
    link or another container may give another name.
    """

    def __init__(self, database: Path, lock_file: Path | None) -> None:
        real = database.resolve()
        sidecar = real.with_name(real.name + ".lock")
        paths = [sidecar] if lock_file is None or lock_file.resolve() == sidecar else [sidecar, lock_file]
        self._locks = [FileLock(path, _SPARE_BYTES if path == sidecar else 0, real) for path in paths]
        self._file = _OwnFile(real)

    def acquire(self, *, create: bool = False) -> None:
        """Take every lock or none; with `create` the database is made, as an empty file, if there is none.

        Raises:
            DatabaseOwnedError: if another process owns the database.
            DatabaseError: if a lock file or the database cannot be made.

        """
        try:
            for lock in self._locks:
                lock.acquire()
            self._file.acquire(create=create)
        except DatabaseError:
            self.release()
            raise

    def take_again(self) -> None:
        """Take those lock files again that were deleted or replaced; the file itself is kept all the time.

        Raises:
            DatabaseOwnedError: if another process has one of them now.
            DatabaseError: if a lock file cannot be made.

        """
        for lock in self._locks:
            if not lock.is_in_place():
                lock.release()
                lock.acquire()

    @property
    def identity(self) -> Identity | None:
        """Which file is owned (device and inode), or None if there was none."""
        return self._file.identity

    @property
    def was_dropped(self) -> bool:
        """Whether the last owner ended without `mark_clean`: killed, or with an error."""
        return any(lock.was_dropped for lock in self._locks)

    @property
    def was_changed(self) -> bool:
        """Whether another process has written to the file since its last owner ended in order, as far as is known."""
        return self._file.was_changed()

    def mark_clean(self) -> None:
        """Note for the next owner that this one ended in order; call it right before `release`."""
        self._file.mark_clean()
        for lock in self._locks:
            lock.mark_clean()

    def missing(self) -> Path | None:
        """Return the path of a lock file that was deleted or replaced, or None."""
        return next((lock.path for lock in self._locks if not lock.is_in_place()), None)

    def holder(self) -> str | None:
        """Return who owns the database now ("PID 123"), or None; takes nothing and makes no file.

        To be called while this process has no connection to it.
        """
        by_name = next((who for lock in self._locks if (who := lock.holder()) is not None), None)
        return self._file.holder() if by_name is None else by_name

    def other_name_holder(self) -> str | None:
        """Return who owns the file by another name than this one, or None.

        SQLite keeps the journal next to the name that it was given, so a process that opens another name misses it
        (sqlite.org/howtocorrupt.html, section 2.4).
        """
        return None if self._locks[0].holder() is not None else self._file.holder()

    def release(self) -> None:
        """Give all locks back; that of the file itself goes with the last connection that this process has to it."""
        self._file.release()
        for lock in reversed(self._locks):
            lock.release()


def refuse_other_name(database: Path) -> None:
    """Stop before a database is read by another name than the one by which a process has it open.

    Raises:
        DatabaseOwnedError: then.

    """
    if (holder := Ownership(database, None).other_name_holder()) is not None:
        raise DatabaseOwnedError(
            f"{database} is another name of a database that a telemetryd ({holder}) has open, and what was written "
            "last stands next to the name that it uses: give that one"
        )
    _refuse_left_elsewhere(database.resolve())
