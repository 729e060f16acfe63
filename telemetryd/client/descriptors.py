"""File descriptors that know their file, because an agent may close them and reuse the number."""

from __future__ import annotations

import errno
import os
from typing import Final

GONE: Final = "The agent has closed the descriptor"


class LostError(OSError):
    """The agent has closed a descriptor of ours; its number may belong to one of the agent's own files now."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EBADF, GONE, what)


class Descriptor:
    """An open file or socket, and what identifies it: its device and its inode."""

    __slots__ = ("_device", "_inode", "_named", "number")

    def __init__(self, number: int) -> None:
        facts = os.fstat(number)
        self.number = number
        self._device = facts.st_dev
        self._inode = facts.st_ino
        self._named = min(facts.st_nlink, 1)
        """Some file systems in user space count no names."""

    def is_ours(self) -> bool:
        """Return whether the number still means the file that we opened."""
        try:
            facts = os.fstat(self.number)
        except OSError:
            return False
        return facts.st_ino == self._inode and facts.st_dev == self._device

    def has_name(self) -> bool:
        """Return whether it is ours, and its file has a name, so that somebody can find what is written into it."""
        try:
            facts = os.fstat(self.number)
        except OSError:
            return False
        return facts.st_ino == self._inode and facts.st_dev == self._device and facts.st_nlink >= self._named

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a path leads to the very file."""
        try:
            facts = os.stat(path, follow_symlinks=False)
        except OSError:
            return False
        return facts.st_ino == self._inode and facts.st_dev == self._device

    def check(self) -> int:
        """Return the number.

        Raises:
            LostError: if it is not ours any more.

        """
        if not self.is_ours():
            raise LostError(f"descriptor {self.number}")
        return self.number

    def close(self) -> None:
        """Close it if it is still ours."""
        if self.is_ours():
            os.close(self.number)
