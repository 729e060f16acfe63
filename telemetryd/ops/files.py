"""Whose a new file is, and how a directory becomes durable."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

Owner = tuple[int, int]
"""A user and a group."""


def owner_to_keep(path: Path) -> Owner | None:
    """Return whose a new file at a path (or next to it) has to be if root makes it; None if we are not root.

    That is the owner of the file that is there, else of its directory: the service has to be able to open it.
    """
    if os.geteuid() != 0:
        return None
    try:
        status = path.stat()
    except FileNotFoundError:
        status = path.absolute().parent.stat()
    return status.st_uid, status.st_gid


def hand_over(descriptor: int, owner: Owner | None) -> None:
    """Give a file or a directory that was just made to its owner, if it shall have another one than this process."""
    if owner is not None:
        with suppress(OSError):  # a file system without owners
            os.fchown(descriptor, *owner)


def sync_directory(path: Path) -> None:
    """Make durable what was made or renamed in a directory; raise OSError if that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
