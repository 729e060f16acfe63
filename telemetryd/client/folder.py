"""The spool's folder: names, ownership, the lines that wait in it, and its bounds.

A *stream* is what one process writes: numbered files, each of them `.active` while it is written, `.ready` when it is
closed, `.synced` when every line of it has been acknowledged:

    20251231T153045Z-4711-a1b2c3d4.000000.jsonl.synced
    20251231T153045Z-4711-a1b2c3d4.000001.jsonl.active
    20251231T153045Z-4711-a1b2c3d4.lock

Whoever holds the lock (flock(2)) of a stream sends it: its process while it lives, then whoever comes next. The lock
file also tells how far sending has come. Because a stream is sent by one process and in order, a run's start goes out
before whatever is said of it later. A `.jsonl.ready` file with another name (the replaced client's) is a stream too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import re
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from telemetryd.client.context import timestamp
from telemetryd.client.lines import After, dead_letter

ACTIVE: Final = ".active"
READY: Final = ".ready"
SYNCED: Final = ".synced"
DEAD_LETTERS: Final = "dead-letter.jsonl"
_DEAD_LETTERS_BYTES: Final = 16 << 20
_LOCK: Final = ".lock"
_FILE: Final = re.compile(
    r"(?P<stem>(?P<stream>.+?)(?:\.(?P<number>\d{6}|[1-9]\d{6,}))?\.jsonl)(?P<state>\.active|\.ready|\.synced)"
)
_OWN_STREAM: Final = re.compile(r"\d{8}T\d{6}Z-\d+-[0-9a-f]{8}")
_CHUNK: Final = 1 << 16
_USUAL_LINE: Final = 1024
"""No more than so much is read ahead for each line that is asked for."""
_LONGEST_LINE: Final = 256 << 20
"""A line beyond that is no line of ours: it is read, and left out, in pieces."""
_LARGEST: Final = 2**62
_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700

Position = tuple[int, int]
"""A file's number, and an offset in it."""


class Live(Protocol):
    """The process's own end of a stream that is still being written."""

    def settled(self, number: int) -> bool:
        """Tell whether nobody writes to this file any more."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the folder that belongs to a stream."""

    path: Path
    stream: str
    number: int
    state: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Window:
    """Whole lines that follow each other in a file of a stream."""

    lines: list[bytes]
    number: int
    start: int
    """Where the first line begins in the file of that number."""
    torn: bytes = b""
    """What stands behind the last newline of a file that nobody writes any more, or a piece of what has no newline."""

    @property
    def end(self) -> Position:
        """Where the next window begins."""
        return self.number, self.start + sum(map(len, self.lines)) + len(self.lines) + len(self.torn)


def make_folder(folder: Path) -> None:
    """Make the folder, for this user only.

    Raises:
        OSError: if it cannot be made.

    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)


def entries(folder: Path) -> list[Entry]:
    """Return the streams' files, the oldest first."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listing:
        for item in listing:
            match = _FILE.fullmatch(item.name)
            if match is None:
                continue
            own = match["number"] is not None and _OWN_STREAM.fullmatch(match["stream"])
            if not own and match["state"] == ACTIVE:
                continue  # the replaced client's; it closes them itself
            stream = match["stream"] if own else match["stem"].removesuffix(".jsonl")
            with contextlib.suppress(FileNotFoundError):  # renamed or deleted meanwhile
                facts = item.stat(follow_symlinks=False)
                if not stat.S_ISREG(facts.st_mode):
                    continue  # whatever it is, no process of ours has made it
                number = int(match["number"]) if own else 0
                found.append(Entry(Path(item.path), stream, number, match["state"], facts.st_size, facts.st_mtime))
    return sorted(found, key=lambda entry: (entry.modified, entry.stream, entry.number))


def waiting(folder: Path) -> list[str]:
    """Return the names of the streams that have unsent files, the oldest first, and of those with a lock only.

    Such a lock is left if a process dies after the last acknowledgement; to take the stream tidies it up.
    """
    names = dict.fromkeys(entry.stream for entry in entries(folder) if entry.state != SYNCED)
    with contextlib.suppress(FileNotFoundError):
        names |= dict.fromkeys(path.name.removesuffix(_LOCK) for path in folder.glob(f"*{_LOCK}"))
    return list(names)


class Stream:
    """The lock on one stream, and the place up to which it has been sent.

    Only one thread uses it. Use `create` or `take`.
    """

    def __init__(self, folder: Path, name: str, lock: int) -> None:
        self.folder = folder
        self.name = name
        self.live: Live | None = None
        self._lock: int | None = lock
        self._file: int | None = None
        self._path: Path | None = None
        self.number, self.offset = read_position(lock)

    @classmethod
    def create(cls, folder: Path) -> Stream:
        """Begin a new stream of this process.

        Raises:
            OSError: if the folder does not allow it.

        """
        make_folder(folder)
        while True:
            moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            name = f"{moment}-{os.getpid()}-{os.urandom(4).hex()}"
            lock = _lock(folder / (name + _LOCK), os.O_CREAT | os.O_EXCL)
            if lock is not None:  # else somebody looked for left streams just now and took it
                return cls(folder, name, lock)

    @classmethod
    def take(cls, folder: Path, name: str) -> Stream | None:
        """Take over a stream whose process is gone, or return None if somebody has it.

        Raises:
            OSError: if the folder does not allow it.

        """
        lock = _lock(folder / (name + _LOCK), os.O_CREAT)
        if lock is None:
            return None
        stream = cls(folder, name, lock)
        try:
            for entry in stream.files():
                if entry.number < stream.number:
                    _rename(entry.path, SYNCED)
                elif entry.state == ACTIVE:
                    _rename(entry.path, READY)
        except OSError:
            stream.forget()  # somebody else may get on with it
            raise
        return stream

    def files(self) -> list[Entry]:
        """Return the stream's unsent files in the order of their numbers."""
        own = [entry for entry in entries(self.folder) if entry.stream == self.name and entry.state != SYNCED]
        return sorted(own, key=lambda entry: entry.number)

    def path(self, number: int, state: str) -> Path:
        """Return the name of one of the stream's files."""
        numbered = f".{number:06d}" if _OWN_STREAM.fullmatch(self.name) else ""
        return self.folder / f"{self.name}{numbered}.jsonl{state}"

    def window(self, rows: int, max_bytes: int) -> Window | None:
        """Return the next unsent lines, at least one of any length; None if there are none (now).

        Raises:
            OSError: if a file cannot be read.

        """
        while True:
            file = self._open()
            if file is None:
                return None
            chunk = self._read(file, min(max(rows * _USUAL_LINE, _CHUNK), max_bytes))
            end = chunk.rfind(b"\n")
            if end >= 0:
                return self._cut(chunk, end, rows, max_bytes)
            if self.live is not None and len(chunk) < _LONGEST_LINE:
                if not self.live.settled(self.number):
                    return None
                if len(os.pread(file, len(chunk) + 1, self.offset)) > len(chunk):
                    continue  # somebody was just about to write
            if chunk:
                return Window([], self.number, self.offset, chunk)
            self._finish_file()

    def _read(self, file: int, size: int) -> bytes:
        """Return what comes next, with one newline at least unless there is none (within the longest line)."""
        while True:
            chunk = os.pread(file, size, self.offset)
            if b"\n" in chunk or len(chunk) < size or size >= _LONGEST_LINE:
                return chunk
            size *= 4  # a line that is longer than a chunk

    def _cut(self, chunk: bytes, end: int, rows: int, max_bytes: int) -> Window:
        lines = chunk[:end].split(b"\n", rows)
        del lines[rows:]
        size = sum(map(len, lines))
        while size > max_bytes and len(lines) > 1:
            size -= len(lines.pop())
        return Window(lines, self.number, self.offset)

    def advance(self, window: Window) -> None:
        """Note that a window has been sent."""
        self.number, self.offset = window.end
        self._save()

    def drop_file(self, number: int) -> int:
        """Delete an unsent file of which nothing is written any more; return how many lines were given up."""
        path = self.path(number, READY)
        begin = self.offset if number == self.number else 0
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            file.seek(begin)
            lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK), b""))
        if number == self.number:
            self._close_file()
            self.number, self.offset = number + 1, 0
            self._save()
        path.unlink()
        return lines

    def release(self) -> None:
        """Give the stream up; if it has been sent whole, nothing of it but `.synced` files is left."""
        self._close_file()
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        if not self.files():
            (self.folder / (self.name + _LOCK)).unlink(missing_ok=True)
        os.close(lock)

    def forget(self) -> None:
        """Close what a forked process has inherited; the lock stays with the parent."""
        self._close_file()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self) -> int | None:
        """Return the file that is to be sent now."""
        if self._file is not None:
            return self._file
        for state in (ACTIVE, READY, ACTIVE, READY):  # it may be renamed between the two
            path = self.path(self.number, state)
            with contextlib.suppress(FileNotFoundError):
                self._file = open_regular(path, os.O_RDONLY)
                self._path = path
                return self._file
        later = [entry.number for entry in self.files() if entry.number > self.number]
        if not later:
            return None
        self.number, self.offset = later[0], 0
        return self._open()

    def _finish_file(self) -> None:
        self._close_file()
        for state in (READY, ACTIVE):
            path = self.path(self.number, state)
            if path.exists():
                if path.stat().st_size == 0:
                    path.unlink()
                else:
                    _rename(path, SYNCED)
                    os.utime(self.path(self.number, SYNCED))  # kept from now on
        self.number, self.offset = self.number + 1, 0
        self._save()

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _save(self) -> None:
        assert self._lock is not None  # noqa: S101 - nobody sends what he does not own
        with contextlib.suppress(OSError):  # then some lines are sent again, which is harmless
            os.pwrite(self._lock, b"%010d %020d\n" % (self.number, self.offset), 0)


def read_position(lock: int) -> Position:
    """Return how far a stream has been sent; what cannot be read counts as not at all."""
    try:
        number, offset = map(int, os.pread(lock, 64, 0).split())
    except (OSError, ValueError):
        return 0, 0
    return (number, offset) if 0 <= number < _LARGEST and 0 <= offset < _LARGEST else (0, 0)


def is_sent(folder: Path, after: After) -> bool:
    """Tell whether another stream has been sent up to a place."""
    name, number, size = after
    if not _OWN_STREAM.fullmatch(name):
        return True  # no process of ours wrote that
    try:
        lock = open_regular(folder / (name + _LOCK), os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        return read_position(lock) >= (number, size) or not any(entry.stream == name for entry in _unsent(folder))
    finally:
        os.close(lock)


def _unsent(folder: Path) -> Iterator[Entry]:
    return (entry for entry in entries(folder) if entry.state != SYNCED)


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file; whatever else stands in its place is neither followed nor waited for, nor written to.

    A file with a second name may be somebody else's, so it is not written to either.

    Raises:
        OSError: if it cannot be opened, or is another kind of file.

    """
    file = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, _MODE)
    facts = os.fstat(file)
    if stat.S_ISREG(facts.st_mode) and (facts.st_nlink <= 1 or flags & os.O_ACCMODE == os.O_RDONLY):
        return file
    os.close(file)
    raise OSError(errno.EPERM, "It is not a regular file with one name", str(path))


def _lock(path: Path, flags: int) -> int | None:
    """Open and lock a lock file; None if somebody else holds it, or it is deleted by the one who held it."""
    try:
        lock = open_regular(path, os.O_RDWR | flags)
    except FileExistsError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    if os.fstat(lock).st_nlink == 0:
        os.close(lock)
        return None
    return lock


def _rename(path: Path, state: str) -> None:
    path.rename(path.with_suffix(state))


def open_active(path: Path) -> int:
    """Make a stream's next file.

    Raises:
        OSError: if it cannot be made.

    """
    return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)


# --- Dead letters --------------------------------------------------------------------------------


def bury(folder: Path, lines: list[bytes], status: int | None, reason: object) -> None:
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
        if os.fstat(file).st_size > _DEAD_LETTERS_BYTES:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            path.rename(folder / f"dead-letter.{stamp}-{random.getrandbits(16):04x}.jsonl")
    finally:
        os.close(file)


# --- Bounds --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a folder may hold, and for how long."""

    max_bytes: int
    max_age_s: float
    keep_s: float


Dropped = Callable[[Entry, int, str], None]
"""Is told of each file that was given up: the file, its unsent lines, and why."""


def enforce(folder: Path, bounds: Bounds, own: Stream | None, dropped: Dropped) -> None:
    """Keep a folder within its bounds: sent files go first, then the oldest unsent ones that are closed.

    A file that is being written is never touched, nor is one of another living process, which does this itself.

    Raises:
        OSError: the first of what could not be done; everything else is done all the same.

    """
    now = time.time()
    failures: list[OSError] = []
    found = entries(folder)
    for entry in [entry for entry in found if entry.state == SYNCED and now - entry.modified > bounds.keep_s]:
        entry.path.unlink(missing_ok=True)
        found.remove(entry)
    excess = sum(entry.size for entry in found) - bounds.max_bytes
    order = {SYNCED: 0, READY: 1}
    for entry in sorted((e for e in found if e.state in order), key=lambda e: order[e.state]):
        is_old = entry.state == READY and now - entry.modified > bounds.max_age_s
        if not is_old and excess <= 0:
            continue
        if entry.state == SYNCED:
            entry.path.unlink(missing_ok=True)
        else:
            reason = f"older than {bounds.max_age_s / 86400:g} days" if is_old else "the folder is over its bound"
            try:
                if not _give_up(folder, entry, own, dropped, reason):
                    continue
            except OSError as error:
                failures.append(error)
                continue
        excess -= entry.size
    if failures:
        raise failures[0]


def _give_up(folder: Path, entry: Entry, own: Stream | None, dropped: Dropped, reason: str) -> bool:
    stream = own if own is not None and own.name == entry.stream else Stream.take(folder, entry.stream)
    if stream is None:
        return False
    try:
        dropped(entry, stream.drop_file(entry.number), reason)
    except FileNotFoundError:
        return False
    finally:
        if stream is not own:
            stream.release()
    return True


def make_room(folder: Path) -> None:
    """Delete every sent file, because the disk is full."""
    for entry in entries(folder):
        if entry.state == SYNCED:
            entry.path.unlink(missing_ok=True)


def summary(folder: Path) -> dict[str, dict[str, int]]:
    """Return how many files and bytes there are of each state."""
    totals: dict[str, dict[str, int]] = defaultdict(lambda: {"files": 0, "bytes": 0})
    for entry in entries(folder):
        total = totals[entry.state[1:]]
        total["files"] += 1
        total["bytes"] += entry.size
    return dict(totals)
