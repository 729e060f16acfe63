"""Incomplete files: created next to their destination, renamed when complete, removed if left over."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal

from telemetryd.engine.sqlite.descriptors import HeldFile, give_back, hold, identity_of
from telemetryd.engine.sqlite.files import APPLICATION_ID, SIDE_FILES
from telemetryd.errors import DatabaseError
from telemetryd.ops.files import Owner, hand_over, owner_to_keep, sync_directory
from telemetryd.ops.mounts import network_file_system

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_PARTIAL: Final = ".partial"
_NAME: Final = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")
_OF_A_DATABASE: Final = r"\.{name}\.(restored|salvaged|export)\.[0-9a-f]{{8}}\.partial(-wal|-shm|-journal)?"
_ABANDONED_S: Final = 86_400
_BEGUN_S: Final = 60
"""An empty file may have been made a moment ago, and its lock not yet taken."""
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_SQLITE: Final = b"SQLite format 3\0"
_PARQUET: Final = b"PAR1"
_HEADER: Final = 100
_APPLICATION: Final = slice(68, 72)
_LINE: Final = 65_536


@dataclass(frozen=True, slots=True)
class Partial:
    """A file that is not whole yet.

    Another user who may write to its folder can put another file, or a link to one, in the place of its name. So it
    is written through the descriptor that came with it, and its name is only good as long as it leads to the same file.
    """

    path: Path
    _held: HeldFile

    @property
    def descriptor(self) -> int:
        """A descriptor of it, for reading and writing; never close it."""
        return self._held.descriptor

    def open(self, mode: Literal["rb", "wb", "ab"]) -> IO[bytes]:
        """Open it without its name, at its beginning or its end; only one at a time, for all share one position."""
        file = open(self.descriptor, mode, closefd=False)  # noqa: SIM115 - the caller closes it
        if mode != "ab":
            file.seek(0)
        return file

    def open_for_later(self) -> IO[bytes]:
        """Open it to be read, also when it is whole and has its name."""
        file = open(os.dup(self.descriptor), "rb")  # noqa: SIM115 - the caller closes it
        file.seek(0)
        return file

    def check(self, name: Path | None = None) -> None:
        """Make sure that a name, by default its own, leads to this very file and not by way of a link.

        Raises:
            DatabaseError: if it does not.

        """
        name = name or self.path
        try:
            is_it = identity_of(name.lstat()) == self._held.identity
        except FileNotFoundError:
            is_it = False
        if not is_it:
            raise DatabaseError(f"Somebody has put something else in the place of {name} while it was being written")


_at_work: Final[dict[Path, Partial]] = {}
"""What this process is making."""


def check_partial(path: Path) -> None:
    """Check a file that this process is making; any other is as it may be.

    Raises:
        DatabaseError: as `Partial.check`.

    """
    if (partial := _at_work.get(path)) is not None:
        partial.check()


@contextmanager
def partial_file(destination: Path, like: str | None = None, owner: Owner | None = None) -> Iterator[Partial]:
    """Make a file of mode 0600 next to its destination for as long as it is not whole; remove what is left of it.

    It is locked meanwhile. What an earlier run of the same command left when it was killed is removed first.

    Args:
        destination: the name that it gets when it is whole.
        like: the names of destinations of the same command, as a regular expression; by default that one.
        owner: whose file it will be if root makes it; by default that of the destination, else of its folder.

    Raises:
        DatabaseError: if it cannot be made or written, as on a full disk.

    """
    path = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}{_PARTIAL}")
    held: HeldFile | None = None
    try:
        held = _make(path, owner or owner_to_keep(destination))
        partial = _at_work[path] = Partial(path, held)
        is_locked = _lock(path, held.descriptor)
        _forget_abandoned(partial, re.compile(like or re.escape(destination.name)), is_locked=is_locked)
    except OSError as error:
        _remove(path, held)
        raise DatabaseError(f"Cannot write to {destination.parent}: {error.strerror}") from error
    try:
        yield partial
    except OSError as error:
        raise DatabaseError(f"Cannot write {destination}: {error.strerror or error}") from error
    finally:
        _remove(path, held)


def _make(path: Path, owner: Owner | None) -> HeldFile:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    hand_over(descriptor, owner)
    return hold(descriptor)


def _lock(path: Path, descriptor: int) -> bool:
    """Lock a file for as long as it is open; return whether that is possible here."""
    if network_file_system(path) is not None:  # there it would be a lock on what SQLite locks
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(path: Path, held: HeldFile | None = None) -> None:
    _at_work.pop(path, None)
    for suffix in ("", *SIDE_FILES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    if held is not None:
        give_back(held)


def _forget_abandoned(fresh: Partial, like: re.Pattern[str], *, is_locked: bool) -> None:
    """Remove files that were killed while they were made: those of the same command, and any that are a day old.

    The disk's clock may be another one than ours, so files are compared with each other.
    """
    now = os.fstat(fresh.descriptor).st_mtime
    for path in fresh.path.parent.glob(f".*{_PARTIAL}"):
        name = _NAME.fullmatch(path.name)
        if path in _at_work or name is None or path.is_symlink():
            continue
        with suppress(FileNotFoundError):
            status = path.stat()
            age = now - status.st_mtime
            is_same = is_locked and like.fullmatch(name[1]) is not None
            is_old = age > (_BEGUN_S if is_same and not status.st_size else _ABANDONED_S)
            may_go = is_old or (is_same and status.st_size > 0)
            if may_go and (_may_be_ours(path) if is_same else _holds_ours(path)) and _is_nobodys(path):
                _remove(path)


def forget_abandoned(folder: Path, like: str) -> None:
    """Remove what killed commands left of files with such names, for a command that makes none itself."""
    if network_file_system(folder) is not None:
        return
    for path in folder.glob(f".*{_PARTIAL}"):
        name = _NAME.fullmatch(path.name)
        if name is None or path in _at_work or path.is_symlink() or not re.fullmatch(like, name[1]):
            continue
        with suppress(FileNotFoundError):
            if path.stat().st_size and _may_be_ours(path) and _is_nobodys(path):
                _remove(path)


def _is_nobodys(path: Path) -> bool:
    """Return whether no process is making a file any more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _may_be_ours(path: Path) -> bool:
    """Return whether a file with a name of ours may have been begun by telemetryd, however little is written of it."""
    head = first_bytes(path, _LINE)
    if head.startswith(_SQLITE):  # a copy of a database of the replaced service is nobody's by its header
        return is_header_of_ours(head) or not any(head[_APPLICATION])
    with path.open("rb") as file:
        begin = file.read(_HEADER)
    return not any(begin) or begin.startswith((_ZSTD, _PARQUET)) or b"event_id" in head.partition(b"\n")[0]


def _holds_ours(path: Path) -> bool:
    """Return whether a file was begun by telemetryd: a database of ours, packed or not, or lines of runs."""
    head = first_bytes(path, _LINE)
    if head.startswith(_SQLITE):
        return is_header_of_ours(head)
    return b"event_id" in head.partition(b"\n")[0]


def is_header_of_ours(head: bytes) -> bool:
    """Return whether a file that begins so is a database that telemetryd made (sqlite.org/fileformat2.html, 1.3)."""
    return head.startswith(_SQLITE) and int.from_bytes(head[_APPLICATION], "big") == APPLICATION_ID


def first_bytes(path: Path, size: int = _HEADER) -> bytes:
    """Return the beginning of a file, unpacked if it is compressed; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(size)
        if head.startswith(_ZSTD):
            with zstd.open(path, "rb") as packed:
                head = packed.read(size)
    except (OSError, EOFError, zstd.ZstdError):
        return b""
    return head


def forget_leftovers(database: Path) -> None:
    """Remove what a `restore` or a salvage left when it was killed; the caller owns the database.

    That is the second name of a file that is still in its place, and copies that never became whole.
    """
    is_copy = re.compile(_OF_A_DATABASE.format(name=re.escape(database.name)))
    for path in database.parent.glob(f".{database.name}.*{_PARTIAL}*"):
        if is_copy.fullmatch(path.name) and not path.is_symlink():
            path.unlink(missing_ok=True)
    try:
        status = database.stat()
    except FileNotFoundError:
        return
    for path in database.parent.glob(f"{database.name}.before-*"):
        if status.st_nlink > 1 and os.path.samestat(path.stat(), status):
            path.unlink()


def publish(partial: Partial, destination: Path, others: Iterable[Path] = ()) -> Path:
    """Give a finished file its name, durably and without replacing another file; return the name.

    Args:
        partial: the finished file.
        destination: its name.
        others: names that will do as well if that one is taken, also at this very moment.

    Raises:
        DatabaseError: if no name is free, or somebody has put another file in the place of this one.

    """
    os.fsync(partial.descriptor)
    for name in (destination, *others):
        partial.check()
        if _give_name(partial.path, name):
            try:
                partial.check(name)
            except DatabaseError:
                name.unlink(missing_ok=True)
                raise
            sync_directory(name.parent)
            return name
    raise DatabaseError(f"{destination} exists already; nothing was replaced")


def _give_name(path: Path, name: Path) -> bool:
    """Rename a file unless the new name is taken; a second name and not a rename, because that would replace a file."""
    try:
        os.link(path, name)
    except FileExistsError:
        return False
    except OSError:  # a file system without second names
        if os.path.lexists(name):
            return False
        path.rename(name)
    else:
        path.unlink()
    return True
