"""Dead letters: lines that the daemon refuses for good, in a file next to the spool, with the reason."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from pathlib import Path
from typing import Final

from telemetryd.client.context import timestamp
from telemetryd.client.folder import Entry, look_through, make_folder, open_regular
from telemetryd.client.lines import dead_letter

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
    path = folder / DEAD_LETTERS
    file = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        if os.write(file, text) != len(text):
            os.write(file, b"\n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if os.fstat(file).st_size > max_bytes:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            with contextlib.suppress(FileNotFoundError):  # another process has just done it
                path.rename(folder / f"dead-letter.{stamp}-{os.urandom(4).hex()}.jsonl")
    finally:
        os.close(file)


def dead_letter_files(folder: Path) -> list[Entry]:
    """Return the dead-letter files that are full, the oldest first; nothing is added to them any more."""
    return look_through(folder, lambda name: ("", 0, DEAD) if _CLOSED.fullmatch(name) else None)
