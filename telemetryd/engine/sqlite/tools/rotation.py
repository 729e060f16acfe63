"""Keeps the newest backups of a folder, ordered by the numbers inside them, not by clocks or names."""

from __future__ import annotations

import re
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.connection import connect
from telemetryd.engine.sqlite.partials import Partial, first_bytes, is_header_of_ours

COMPRESSED: Final = ".zst"
_STAMP: Final = r"_backup_\d{8}_\d{6}(?:_\d+)?\.sqlite(?:\.zst)?"
_ONE_SECOND: Final = 1000
"""Names for backups of one second; more are not made in it."""
_FRAME: Final = struct.Struct("<II8sQ")
"""The end of a compressed backup: a frame that readers of Zstandard skip (RFC 8878, section 3.1.2)."""
_SKIPPED: Final = (0x184D2A5D, 16, b"tlmdbkup")


def names(database: Path, moment: datetime, *, compress: bool = False) -> Iterator[str]:
    """Yield names for a backup, the usual one first: telemetry.sqlite → telemetry_backup_20251224_100000.sqlite."""
    stem, end = f"{database.stem}_backup_{moment:%Y%m%d_%H%M%S}", ".sqlite" + (COMPRESSED if compress else "")
    yield f"{stem}{end}"
    for number in range(2, _ONE_SECOND):
        yield f"{stem}_{number}{end}"


def _backups(directory: Path, database: Path) -> Iterator[tuple[int, Path]]:
    """Yield the backups of a database in a folder with their numbers; what is not ours is passed over."""
    for path in named(directory, database):
        if is_header_of_ours(first_bytes(path)):
            yield _number(path), path


def like(database: Path) -> str:
    """Return the names of a database's backups, as a regular expression."""
    return re.escape(database.stem) + _STAMP


def named(directory: Path, database: Path) -> Iterator[Path]:
    """Yield the files of a folder that have the name of a database's backup."""
    is_name = re.compile(like(database))
    for path in directory.iterdir():
        if is_name.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            yield path


def _number(path: Path) -> int:
    """Return the number that a backup bears; 0 if it was made before they bore any."""
    if path.suffix == COMPRESSED:
        with path.open("rb") as file:
            file.seek(-_FRAME.size, 2)
            *skipped, number = _FRAME.unpack(file.read(_FRAME.size))
        return number if tuple(skipped) == _SKIPPED else 0
    try:
        with closing(connect(path, "ro&immutable=1")) as connection:
            return int(connection.execute("SELECT coalesce(max(number), 0) FROM backup_mark").fetchone()[0])
    except sqlite3.Error:
        return 0


def next_number(directory: Path, database: Path) -> int:
    """Return the number of the next backup of a database in a folder."""
    return max((number for number, _ in _backups(directory, database)), default=0) + 1


def mark(path: Path, number: int, made_at: str) -> None:
    """Write its number into a finished copy; one of an older schema has no place for it."""
    with closing(connect(path, "rw")) as connection:
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'backup_mark'").fetchone():
            connection.execute("DELETE FROM backup_mark")
            connection.execute("INSERT INTO backup_mark (number, made_at) VALUES (?, ?)", (number, made_at))


def mark_packed(packed: Partial, number: int) -> None:
    """Write its number after a finished copy that is compressed."""
    with packed.open("ab") as file:
        file.write(_FRAME.pack(*_SKIPPED, number))


def rotate(directory: Path, database: Path, keep: int, made: Path) -> list[Path]:
    """Delete the oldest backups of a database in a folder, except `keep`, of which the one just made is one.

    None that was made after it goes: two that make one at the same moment must not take each other's away.
    """
    found = sorted((number, path.name, path) for number, path in _backups(directory, database))
    ordered = [path for _, _, path in found]
    older = ordered[: ordered.index(made)] if made in ordered else []
    surplus = older[: max(len(ordered) - keep, 0)]
    for path in surplus:
        path.unlink(missing_ok=True)
    return surplus
