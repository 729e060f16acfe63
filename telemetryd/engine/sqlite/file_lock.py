"""An exclusive lock on a file that holds the PID of its owner."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from telemetryd.errors import DatabaseError, DatabaseOwnedError
from telemetryd.ops.files import hand_over, owner_to_keep

_TRIES: Final = 10
_PAUSE_S: Final = 0.01
"""A process that only checks whether a lock is held holds it for a moment."""
_HOLDER_READS: Final = 50
_LOCK_CONTENT: Final = re.compile(rb"\s*\d{0,10}\s*")
_LOCK_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""A link or a pipe that somebody has put there is neither written through nor waited for."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
HELD: Final = frozenset({errno.EWOULDBLOCK, errno.EACCES})
_LOCKS: Final = Path("/proc/locks")
_FLOCK: Final = re.compile(r"\d+: FLOCK +ADVISORY +\w+ +(\d+) ([0-9a-f]+:[0-9a-f]+):(\d+) ")
_UNSEEN: Final = "a process that cannot be seen from here, as in another container"


class FileLock:
    """An exclusive lock on a file that holds its owner's PID; the system frees it when the owner dies.

    The file is never deleted: a waiter that has opened the old file and a newcomer that makes a new one
    would both get their lock. Nor is it ever emptied: what is written needs no room but that which it has.

    Args:
        path: where it stands.
        spare_bytes: how large it is while it is free, so that the next owner finds this much room on a full disk.
        database: whose owner has it if root makes it, so that the service can take it later.

    """

    def __init__(self, path: Path, spare_bytes: int = 0, database: Path | None = None) -> None:
        self.path = path
        self._spare_bytes = spare_bytes
        self._database = database
        self._descriptor: int | None = None
        self.was_dropped = False
        """Whether the last owner ended without `mark_clean`."""

    def acquire(self) -> None:
        """Take the lock at once.

        Raises:
            DatabaseOwnedError: if another process holds it; the message names its PID, if it can be seen from here.
            DatabaseError: if the lock file cannot be made.

        """
        try:
            descriptor = self._open()
        except OSError as error:
            reason = "it is a symbolic link" if self.path.is_symlink() else error.strerror
            raise DatabaseError(f"Cannot open the lock file {self.path}: {reason}") from error
        content = _read_lock(descriptor)
        if content is None:
            os.close(descriptor)
            raise DatabaseError(f"{self.path} is not a lock file; nothing was changed: look at TELEMETRY_LOCK_FILE")
        try:
            lock_soon(descriptor)
        except OSError as error:
            holder = holder_of(descriptor)
            os.close(descriptor)
            if error.errno not in HELD:
                raise DatabaseError(f"Cannot lock {self.path}: {error.strerror}") from error
            raise DatabaseOwnedError(
                f"Another telemetryd ({holder}) owns this database: it holds the lock {self.path}"
            ) from error
        self._descriptor = descriptor
        self.was_dropped = bool(content.strip())
        try:
            _write(descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:
            if error.errno not in _FULL:  # the lock counts, not what stands in its file
                self.release()
                raise DatabaseError(f"Cannot write the lock file {self.path}: {error.strerror}") from error

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _LOCK_FLAGS, 0o600)
        except FileExistsError:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | _LOCK_FLAGS, 0o600)
        if self._database is not None:
            hand_over(descriptor, owner_to_keep(self._database))
        return descriptor

    def is_in_place(self) -> bool:
        """Return whether the locked file still stands at its path; if not, another process can lock another one."""
        try:
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except OSError:
            return False

    def holder(self) -> str | None:
        """Return who holds the lock ("PID 123", or that it cannot be seen from here), or None; makes no file."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | _LOCK_FLAGS)
        except OSError:
            return None
        try:
            _lock(descriptor)
        except OSError:
            return holder_of(descriptor)
        finally:
            os.close(descriptor)
        return None

    def mark_clean(self) -> None:
        """Blank the PID: everything is in order, so that the next owner need not look for what a crash left."""
        if self._descriptor is not None:
            with suppress(OSError):
                size = os.fstat(self._descriptor).st_size
                _write(self._descriptor, b" " * (size - 1) + b"\n")
                os.write(self._descriptor, b"\n" * max(self._spare_bytes - size, 0))

    def release(self) -> None:
        """Give the lock back; the file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read_lock(descriptor: int) -> bytes | None:
    """Return what a lock file says, or None if it is no lock file: a PID is not to be written into anything else."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return None
    content = os.read(descriptor, 64)
    return content if _LOCK_CONTENT.fullmatch(content) else None


def _write(descriptor: int, text: bytes) -> None:
    """Put a text in the place of another one without ever giving up its room: a full disk would not give it back."""
    size = os.fstat(descriptor).st_size
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text)
    if size > len(text):
        os.ftruncate(descriptor, len(text))


def holder_of(descriptor: int) -> str:
    """Say who holds a lock: what its file says counts only if that process holds it, seen from here.

    In another PID namespace, as of another container, the PID in the file is that of another process.
    """
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    # The list is read in pieces while other programs lock and unlock, so that one reading may miss a lock.
    for _ in range(_TRIES):
        try:
            found = _FLOCK.findall(_LOCKS.read_text("ascii"))
        except OSError:  # another system than Linux
            return f"PID {_living_holder(descriptor) or 'unknown'}"
        # On some file systems stat returns another device than this list has (btrfs, overlay): then the file helps.
        said = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        for pid, where, inode in found:
            if inode == str(status.st_ino) and (where == device or pid == said):
                return f"PID {pid}"
        time.sleep(_PAUSE_S)
    return _UNSEEN


def _living_holder(descriptor: int) -> str:
    """Read the owner's PID; one that has only just taken the lock writes it within milliseconds."""
    holder = ""
    for _ in range(_HOLDER_READS):
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
        if holder.isdigit() and _is_alive(int(holder)):
            return holder
        time.sleep(_PAUSE_S)
    return holder


def lock_soon(descriptor: int) -> None:
    """Lock a file as `_lock` does, but let those go away first who only look."""
    for tries_left in reversed(range(_TRIES)):
        try:
            return _lock(descriptor)
        except OSError as error:
            if error.errno not in HELD or not tries_left:
                raise
        time.sleep(_PAUSE_S)
    return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _lock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
