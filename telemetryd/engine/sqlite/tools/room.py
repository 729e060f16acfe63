"""Estimates how much room a migration takes on the disk, and refuses one for which there is too little."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.connection import quoted
from telemetryd.engine.sqlite.tools import conversion, layouts, migrate
from telemetryd.errors import DatabaseError

_SAMPLE: Final = 2000
_MIB: Final = 1 << 20
_EVENT: Final = 250
"""Bytes of an event and its entries in two indexes, besides what its run and its payload are."""
_SORTED: Final = 3
"""The largest index is at most this part of a database; SQLite sorts it in a temporary file."""
_TEMPORARY: Final = ("SQLITE_TMPDIR", "TMPDIR")
_FOLDERS: Final = ("/var/tmp", "/usr/tmp", "/tmp")  # noqa: S108 - where SQLite looks (os_unix.c, unixTempFileDir)


@dataclass(frozen=True, slots=True)
class Room:
    """What a migration needs for a moment, besides what the database takes already, and what there is."""

    needed: int
    free: int
    temporary: int
    """What SQLite needs for temporary files on another disk; 0 if they are on the same one."""
    temporary_free: int
    temporary_folder: Path

    def refuse_too_little(self, path: Path) -> None:
        """Stop before anything is written if there is too little.

        Raises:
            DatabaseError: that says how much is needed and where.

        """
        if self.needed > self.free:
            raise DatabaseError(
                f"The migration of {path} needs up to {_mib(self.needed)} MiB on its disk, which has "
                f"{self.free // _MIB} MiB free; nothing was changed: make room, or make a backup elsewhere "
                "(telemetryd backup) and add --no-backup"
            )
        if self.temporary > self.temporary_free:
            raise DatabaseError(
                f"The migration of {path} needs up to {_mib(self.temporary)} MiB for temporary files in "
                f"{self.temporary_folder}, which has {self.temporary_free // _MIB} MiB free; nothing was changed: make "
                "room, or set SQLITE_TMPDIR to a folder that has it"
            )


def _mib(count: int) -> int:
    return -(-count // _MIB)


def estimate(connection: sqlite3.Connection, layout: layouts.Layout, path: Path, *, with_backup: bool) -> Room:
    """Return how much room a migration takes at most.

    Args:
        connection: is open on the old database, or a copy of it.
        layout: what stands in it.
        path: where the database is.
        with_backup: whether a backup will be made next to it.

    """
    pages, page_size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    old = pages * page_size
    new = old + (_growth(connection, layout) if layout.is_legacy else 0) + _events(connection, layout)
    rebuilding = old if layout.is_legacy else 0  # the journal of the VACUUM at the beginning
    at_once = max(rebuilding, new + old // 2)
    temporary = max(rebuilding, new // _SORTED)
    backup = old if with_backup else 0
    folder = _temporary_folder()
    is_same = os.stat(folder).st_dev == os.stat(path.parent).st_dev
    if is_same:
        at_once, temporary = max(rebuilding * 2, new + old // 2 + new // _SORTED), 0
    free, temporary_free = shutil.disk_usage(path.parent).free, shutil.disk_usage(folder).free
    return Room(backup + at_once, free, temporary, temporary_free, folder)


def _growth(connection: sqlite3.Connection, layout: layouts.Layout) -> int:
    """Return by how much the runs take more room in the new schema: what some take, in memory, times their number."""
    converter = conversion.Converter(layout.columns)
    names = ", ".join(quoted("id" if name == "legacy id" else name) for name in layout.columns)
    rows = connection.execute(f"SELECT {names} FROM agent_runs LIMIT {_SAMPLE}").fetchall()
    if not rows:
        return 0
    before = sum(len(str(value).encode("utf-8", "replace")) for row in rows for value in row if value is not None)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as memory:
        migrate.create(memory, "")
        empty = _size(memory)
        indexes = migrate.drop_indexes(memory)
        converted = converter.convert(range(1, len(rows) + 1), rows)
        memory.executemany(migrate.INSERT_RUN, converted.rows())
        memory.executemany(migrate.INSERT_ORIGINAL, converted.side_rows())
        without_indexes = _size(memory)
        for sql in indexes:
            with contextlib.suppress(sqlite3.IntegrityError):  # of two equal event_ids
                memory.execute(sql)
        migrate.derive(memory)
        grown = (_size(memory) - without_indexes) + max(without_indexes - empty - before, 0)
    return grown * layout.rows // len(rows)


def _size(memory: sqlite3.Connection) -> int:
    pages, page_size = (memory.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages * page_size)


def _events(connection: sqlite3.Connection, layout: layouts.Layout) -> int:
    """Return how much room the events take that are served from an older table, which stays as well."""
    if not layout.aside.get(layouts.EVENTS):
        return 0
    rows = connection.execute(f"SELECT * FROM {layouts.EVENTS} LIMIT {_SAMPLE}").fetchall()
    content = sum(len(str(value).encode("utf-8", "replace")) for row in rows for value in row)
    return (content // len(rows) + _EVENT) * layout.aside[layouts.EVENTS]


def _temporary_folder() -> Path:
    named = (os.environ.get(name) for name in _TEMPORARY)
    folders = [Path(name) for name in (*named, *_FOLDERS) if name]
    return next((folder for folder in folders if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)), Path())
