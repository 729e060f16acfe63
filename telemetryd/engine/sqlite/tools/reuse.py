"""Finds a backup of a database that has not changed since, so that a repeated migration needs no other one."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, Final

from telemetryd.engine.sqlite.connection import connect
from telemetryd.engine.sqlite.descriptors import borrowed
from telemetryd.engine.sqlite.files import is_unfinished
from telemetryd.engine.sqlite.tools import rotation
from telemetryd.engine.sqlite.tools.backup import Backup, verify
from telemetryd.errors import DatabaseError

_PAGES: Final = 256
_OF_THE_COPY: Final = (slice(18, 20), slice(24, 28), slice(40, 44), slice(92, 100))
"""Bytes of the header that a copy has for itself: how it is journaled, how often it and its schema were changed."""
_MARK: Final = "SELECT rootpage FROM sqlite_master WHERE name = 'backup_mark'"


def find(directory: Path, database: Path) -> Backup | None:
    """Return a verified backup in a folder that has every page of a database; nobody may write to that meanwhile."""
    if is_unfinished(database):
        return None
    for path in sorted(rotation.named(directory, database), reverse=True):
        if path.suffix == rotation.COMPRESSED or path.stat().st_size != database.stat().st_size:
            continue
        try:
            if _are_equal(database, path):
                return Backup(path, path.stat().st_size, verify(path).rows, 0.0, blocked_writes=False)
        except (OSError, DatabaseError):  # then it is none
            continue
    return None


def _are_equal(database: Path, copy: Path) -> bool:
    with closing(connect(database, "ro")) as connection:
        page_size = connection.execute("PRAGMA page_size").fetchone()[0]
        mark = connection.execute(_MARK).fetchone()  # into which a backup writes its number
    marked = None if mark is None else mark[0] - 1
    with borrowed(database) as descriptor, copy.open("rb") as other:
        for first in range(0, database.stat().st_size // page_size, _PAGES):
            pages = _read(descriptor, other, first * page_size, _PAGES * page_size)
            if pages[0] == pages[1]:
                continue
            for start in range(0, len(pages[0]), page_size):
                one, two = (bytearray(part[start : start + page_size]) for part in pages)
                number = first + start // page_size
                if number == 0:
                    for part in _OF_THE_COPY:
                        one[part] = two[part]
                if one != two and number != marked:
                    return False
    return True


def _read(descriptor: int, other: BinaryIO, offset: int, size: int) -> tuple[bytes, bytes]:
    other.seek(offset)
    return os.pread(descriptor, size, offset), other.read(size)
