"""Opens database files outside SQLite, and closes them only when SQLite does not have them open.

The locks of SQLite belong to the process: when any descriptor of a file is closed, the kernel drops all POSIX locks
that the process has on it (sqlite.org/howtocorrupt.html, section 2.2). So a descriptor of a database is opened once,
shared by all its users, and closed when it has none and no connection to the file is open any more.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

Identity = tuple[int, int]
"""Device and inode: what a file is, whatever it is called."""

_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
"""A pipe that somebody has put there is not waited for."""


@dataclass(slots=True, eq=False)
class HeldFile:
    """An open file, with as many descriptors as were opened before it was known which file that is."""

    identity: Identity
    descriptors: list[int]
    users: int = 0
    is_owned: bool = False
    """Whether this process owns it: see `telemetryd.engine.sqlite.ownership`."""

    @property
    def descriptor(self) -> int:
        """One of its descriptors; never close it."""
        return self.descriptors[0]


@dataclass(slots=True)
class _Process:
    """What this process has open."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    """Taken again where a garbage collection inside of it ends a connection."""
    files: dict[Identity, HeldFile] = field(default_factory=dict)
    connections: Counter[Identity | None] = field(default_factory=Counter)
    """How many connections are open to each file; None stands for files that could not be identified."""


_process: Final = _Process()


class CountedConnection(sqlite3.Connection):
    """A connection that is counted for as long as it is open, with the files that it uses."""

    def __init__(self, path: Path, *arguments: Any, **options: Any) -> None:
        self._uses: list[Identity | None] = []
        self.use(path)
        try:
            super().__init__(*arguments, **options)
        except BaseException:
            self._discount()
            raise

    def use(self, path: Path) -> None:
        """Count a file as used by this connection; call it before the file is attached."""
        try:
            identity = identity_of(os.stat(path))
        except OSError:
            identity = None
        with _process.lock:
            self._uses.append(identity)
            _process.connections[identity] += 1

    def close(self) -> None:
        """Close it; afterwards descriptors may be closed that waited for it."""
        super().close()
        self._discount()

    def __del__(self) -> None:
        """Close it; of a connection that could not be opened there is nothing to close."""
        with suppress(sqlite3.Error):
            self.close()

    def _discount(self) -> None:
        with _process.lock:
            while self._uses:
                _process.connections[self._uses.pop()] -= 1
            _process.connections += Counter()  # keeps only what is positive
        _close_unused()


def identity_of(status: os.stat_result) -> Identity:
    """Return which file a status is of."""
    return status.st_dev, status.st_ino


def take(path: Path, flags: int = os.O_RDONLY) -> HeldFile:
    """Open a file, or share the descriptor that is open on it already; `give_back` has to follow.

    Raises:
        OSError: if it cannot be opened.

    """
    with _process.lock:
        file = _process.files.get(identity_of(os.stat(path)))
        if file is None:
            descriptor = os.open(path, flags | _FLAGS)
            identity = identity_of(os.fstat(descriptor))
            file = _process.files.setdefault(identity, HeldFile(identity, []))
            file.descriptors.append(descriptor)
        file.users += 1
        return file


def hold(descriptor: int) -> HeldFile:
    """Take over a descriptor of a file that this process has just made; `give_back` has to follow."""
    with _process.lock:
        identity = identity_of(os.fstat(descriptor))
        file = _process.files.setdefault(identity, HeldFile(identity, []))
        file.descriptors.append(descriptor)
        file.users += 1
        return file


def give_back(file: HeldFile) -> None:
    """Say that a file is not needed any more; it is closed as soon as that does no harm."""
    with _process.lock:
        file.users -= 1
    _close_unused()


@contextmanager
def borrowed(path: Path) -> Iterator[int]:
    """Give a descriptor of a file inside the block, for reading at given offsets.

    Raises:
        OSError: if it cannot be opened.

    """
    file = take(path)
    try:
        yield file.descriptor
    finally:
        give_back(file)


def _close_unused() -> None:
    with _process.lock:
        if _process.connections[None]:
            return
        unused = (identity for identity, file in _process.files.items() if not file.users)
        for identity in [identity for identity in unused if not _process.connections[identity]]:
            if (file := _process.files.pop(identity, None)) is not None:
                for descriptor in file.descriptors:
                    os.close(descriptor)


def copy_to(descriptor: int, target: Path) -> None:
    """Copy a whole file to a path.

    Raises:
        OSError: if it cannot be read or written.

    """
    with target.open("wb") as out:
        offset = 0
        while part := os.pread(descriptor, _COPIED_AT_ONCE, offset):
            out.write(part)
            offset += len(part)


_COPIED_AT_ONCE: Final = 1 << 20
