"""Dead letters: lines that the daemon refuses for good, in a file next to the spool, with the reason."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from telemetryd.client.context import timestamp
from telemetryd.client.folder import Entry, look_through, make_folder, open_regular
from telemetryd.client.lines import Json, dead_letter, encode, read_object

DEAD_LETTERS: Final = "dead-letter.jsonl"
DEAD: Final = ".dead"
"""The state of a file of dead letters, as an entry of the folder."""
_MAX_BYTES: Final = 16 << 20
_CLOSED: Final = re.compile(r"dead-letter\.\d{8}T\d{6}Z-[0-9a-f]{4,8}\.jsonl")


def bury(folder: Path, lines: list[bytes], status: int | None, reason: object, *, max_bytes: int = _MAX_BYTES) -> None:
    """Append lines that will never be taken to the dead-letter file, with the reason.

    Raises:
        OSError: if the disk refuses; then the lines must stay where they are.

    """
    moment = timestamp()
    text = b"".join(dead_letter(line, status, reason, moment) for line in lines)
    make_folder(folder)
    while not _append(folder, text, max_bytes):
        pass


def _append(folder: Path, text: bytes, max_bytes: int) -> bool:
    """Append to the open file; return whether that was done: not if it was closed before we had a part in its lock."""
    path = folder / DEAD_LETTERS
    file = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        _lock(file, fcntl.LOCK_SH)
        try:
            is_open = os.path.samestat(os.fstat(file), os.lstat(path))
        except FileNotFoundError:
            is_open = False
        if is_open:
            if os.write(file, text) != len(text):
                os.write(file, b"\n")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if os.fstat(file).st_size > max_bytes:
                close_letters(folder)
    finally:
        os.close(file)
    return is_open


def _lock(file: int, kind: int) -> None:
    with contextlib.suppress(OSError):  # a file system that knows no locks
        fcntl.flock(file, kind)


def close_letters(folder: Path) -> None:
    """Give the open file of dead letters the name of a closed one; the next letter begins another.

    Raises:
        OSError: if it cannot be renamed.

    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    with contextlib.suppress(FileNotFoundError):  # another process has just done it
        (folder / DEAD_LETTERS).rename(folder / f"dead-letter.{stamp}-{os.urandom(4).hex()}.jsonl")


def dead_letter_files(folder: Path) -> list[Entry]:
    """Return the dead-letter files that are full, the oldest first; nothing is added to them any more."""
    return look_through(folder, lambda name: ("", 0, DEAD) if _CLOSED.fullmatch(name) else None)


# --- Reading them, and sending them again --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter."""

    raw: bytes
    """The line of its file."""
    time: str | None
    status: int | None
    reason: object
    line: bytes
    """What was refused."""

    @classmethod
    def read(cls, raw: bytes) -> Letter:
        """Read a line of a file of dead letters, whatever it holds."""
        letter = read_object(raw) or {}
        if not {"reason", "status", "line"} <= letter.keys():
            return cls(raw, None, None, "This line of the file is no dead letter", raw.strip())
        time, status = letter.get("time"), letter["status"]
        is_status = isinstance(status, int)
        return cls(
            raw,
            time if isinstance(time, str) else None,
            status if is_status else None,
            letter["reason"],
            line_of(letter),
        )

    @property
    def id(self) -> str:
        """What it is called by: the same as long as it is there, however often it is refused."""
        return hashlib.sha256(self.line).hexdigest()[:8]


def line_of(letter: Json) -> bytes:
    """Return the line that a dead letter holds."""
    line = letter["line"]
    return encode(line).rstrip() if isinstance(line, dict) else str(line).encode("utf-8", "surrogateescape")


def letter_files(folder: Path) -> list[Path]:
    """Return every file of dead letters, the oldest first."""
    closed = [Path(entry.path) for entry in dead_letter_files(folder)]
    return [*closed, *([folder / DEAD_LETTERS] if os.path.lexists(folder / DEAD_LETTERS) else [])]


def wait_until_left(path: Path) -> None:
    """Wait until nobody adds anything any more to a closed file, so that it may be written anew.

    Raises:
        OSError: if it cannot be opened.

    """
    file = open_regular(path, os.O_RDONLY)
    try:
        _lock(file, fcntl.LOCK_EX)  # holders of a shared lock finish; later ones see that the file is closed
    finally:
        os.close(file)


def read_letters(path: Path) -> Iterator[Letter]:
    """Yield the letters of a file.

    Raises:
        OSError: if it cannot be read.

    """
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        for raw in file:
            if raw.strip():
                yield Letter.read(raw)


def replace_letters(path: Path, letters: Iterable[bytes]) -> None:
    """Write a closed file anew; without any letter it goes.

    Raises:
        OSError: if the disk refuses; then the file is as it was.

    """
    new = path.with_name(f".{path.name}")
    kept = 0
    with contextlib.suppress(FileNotFoundError):
        new.unlink()  # of one that was killed
    try:
        with open(open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            for raw in letters:
                kept += file.write(raw.rstrip(b"\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if kept:
            new.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        new.unlink(missing_ok=True)
