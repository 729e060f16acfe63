"""Incomplete files: created next to their destination, renamed when complete, removed if left over."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.files import APPLICATION_ID, SIDE_FILES
from telemetryd.errors import DatabaseError
from telemetryd.ops.files import sync_directory

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_PARTIAL: Final = ".partial"
_NAME: Final = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_OF_A_DATABASE: Final = r"\.{name}\.(restored|salvaged|export)\.[0-9a-f]{{8}}\.partial(-wal|-shm|-journal)?"
_ABANDONED_S: Final = 86_400
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_SQLITE: Final = b"SQLite format 3\0"
_HEADER: Final = 100
_LINE: Final = 65_536
_at_work: Final[set[Path]] = set()
"""What this process is making."""


@contextmanager
def partial_file(destination: Path) -> Iterator[Path]:
    """Make a file of mode 0600 next to its destination for as long as it is not whole; remove what is left of it.

    Raises:
        DatabaseError: if it cannot be made or written, as on a full disk.

    """
    path = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        _at_work.add(path)
        _forget_abandoned(path)
    except OSError as error:
        _remove(path)
        raise DatabaseError(f"Cannot write to {destination.parent}: {error.strerror}") from error
    try:
        yield path
    except OSError as error:
        raise DatabaseError(f"Cannot write {destination}: {error.strerror or error}") from error
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    _at_work.discard(path)
    for suffix in ("", *SIDE_FILES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _forget_abandoned(fresh: Path) -> None:
    """Remove files that were killed while they were made: a day older than a fresh one, they are nobody's any more.

    The disk's clock may be another one than ours, so files are compared with each other.
    """
    now = fresh.stat().st_mtime
    for path in fresh.parent.glob(f".*{_PARTIAL}"):
        if path in _at_work or not _NAME.fullmatch(path.name):
            continue
        with suppress(FileNotFoundError):
            if not path.is_symlink() and now - path.stat().st_mtime > _ABANDONED_S and _holds_ours(path):
                _remove(path)


def _holds_ours(path: Path) -> bool:
    """Return whether a file was begun by telemetryd: a database of ours, packed or not, or lines of runs."""
    head = first_bytes(path, _LINE)
    if head.startswith(_SQLITE):
        return is_header_of_ours(head)
    return b"event_id" in head.partition(b"\n")[0]


def is_header_of_ours(head: bytes) -> bool:
    """Return whether a file that begins so is a database that telemetryd made (sqlite.org/fileformat2.html, 1.3)."""
    return head.startswith(_SQLITE) and int.from_bytes(head[68:72], "big") == APPLICATION_ID


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


def publish(path: Path, destination: Path, others: Iterable[Path] = ()) -> Path:
    """Give a finished file its name, durably and without replacing another file; return the name.

    Args:
        path: the finished file.
        destination: its name.
        others: names that will do as well if that one is taken, also at this very moment.

    Raises:
        DatabaseError: if no name is free.

    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    for name in (destination, *others):
        if _give_name(path, name):
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
