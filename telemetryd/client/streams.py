"""One stream of the spool: its lock, the position up to which it was sent, and the next lines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from telemetryd.client.descriptors import Descriptor, LostError
from telemetryd.client.folder import (
    ACTIVE,
    CHUNK,
    LOCK,
    OWN_STREAM,
    READY,
    SYNCED,
    UNSENT,
    Entry,
    file_path,
    holds_position,
    is_ours,
    make_folder,
    new_stream_name,
    open_regular,
    try_lock,
    unsent_numbers,
)
from telemetryd.client.lines import After

_USUAL_LINE: Final = 1024
"""No more than so much is read ahead for each line that is asked for."""
_LONGEST_LINE: Final = 256 << 20
_LARGEST: Final = 2**62

Position = tuple[int, int]
"""A file's number, and an offset in it."""


@dataclass(frozen=True, slots=True)
class Window:
    """Whole lines that follow each other in a file of a stream."""

    lines: list[bytes]
    number: int
    start: int
    """Where the first line begins in the file of that number."""
    torn: bytes = b""
    """What stands after the last newline of a file that nobody writes any more, or a piece of what has no newline."""

    @property
    def end(self) -> Position:
        """Where the next window begins."""
        return self.number, self.start + sum(map(len, self.lines)) + len(self.lines) + len(self.torn)


class Stream:
    """The lock on one stream, and the place up to which it has been sent.

    Only one thread uses it. Use `create` or `take`.

    Args:
        folder: where it is.
        name: the stream's name.
        lock: the descriptor that holds the lock.
        numbers: which files it has; None if more may come at any time.
        longest_line: a line of more bytes is no line of ours: it is read, and left out, in pieces.

    """

    def __init__(
        self, folder: Path, name: str, lock: int, numbers: Iterable[int] | None, longest_line: int = _LONGEST_LINE
    ) -> None:
        self.folder = folder
        self.name = name
        self._longest_line = longest_line
        self._lock: Descriptor | None = Descriptor(lock)
        self._is_our_lock = holds_position(lock, name)
        """Else it is another program's file of this name: it serves to lock, and is neither written nor deleted."""
        self._numbers = None if numbers is None else sorted(numbers)
        self._file: Descriptor | None = None
        self._is_complete = False
        """Whether no process writes to the open file any more."""
        self.number, self.offset = read_position(lock)
        if self._numbers and self._numbers[0] < self.number:
            # Files are put away one after the other, so what is not put away was not sent, whatever this says.
            self.number, self.offset = self._numbers[0], 0

    @classmethod
    def create(cls, folder: Path) -> Stream:
        """Begin a new stream of this process.

        Raises:
            OSError: if the folder does not allow it.

        """
        make_folder(folder)
        while True:
            name = new_stream_name()
            lock = _lock(folder, name, os.O_EXCL)
            if lock is not None:  # else somebody looked for left streams just now and took it
                return cls(folder, name, lock, None)

    @classmethod
    def take(
        cls, folder: Path, name: str, numbers: Iterable[int] | None = None, longest_line: int = _LONGEST_LINE
    ) -> Stream | None:
        """Take over a stream that nobody sends, or return None if somebody does.

        Args:
            folder: where it is.
            name: the stream's name.
            numbers: which unsent files it has, as `waiting` says; by default they are looked up.
            longest_line: a line of more bytes is read in pieces.

        Raises:
            OSError: if the folder does not allow it.

        """
        lock = _lock(folder, name)
        if lock is None:
            return None
        try:
            there = unsent_numbers(folder, name) if numbers is None else numbers
            stream = cls(folder, name, lock, there, longest_line)
        except OSError:
            os.close(lock)
            raise
        try:
            for number in stream._numbers or ():
                stream._close_left(number)
            with contextlib.suppress(OSError):  # the reader of the file reports it
                stream._open()  # which corrects a place where no line can begin
        except OSError:
            stream.forget()  # another process may get on with it
            raise
        return stream

    def _close_left(self, number: int) -> None:
        """Give a file that a dead process has left the state in which that should have left it."""
        with contextlib.suppress(FileNotFoundError):
            file = open_regular(self.path(number, ACTIVE), os.O_RDONLY)
            try:
                if try_lock(file, fcntl.LOCK_SH):
                    self._rename(number, ACTIVE, READY)
            finally:
                os.close(file)

    def seal(self) -> None:
        """Say that no more files will come."""
        self._numbers = []

    def path(self, number: int, state: str) -> Path:
        """Return the name of one of the stream's files."""
        return file_path(self.folder, self.name, number, state)

    def window(self, rows: int, max_bytes: int) -> Window | None:
        """Return the next unsent lines, at least one of any length; None if there are none (now).

        Raises:
            LostError: if the agent has closed the lock, and it is held elsewhere now.
            OSError: if a file cannot be read.

        """
        self._hold()
        while True:
            opened = self._open()
            if opened is None:
                return None
            file = opened.check()
            chunk = self._read(file, min(max(rows * _USUAL_LINE, CHUNK), max_bytes))
            end = chunk.rfind(b"\n")
            if end >= 0:
                return self._cut(chunk, end, rows, max_bytes)
            if not self._is_complete and len(chunk) < self._longest_line:
                if not try_lock(file, fcntl.LOCK_SH):
                    return None
                self._is_complete = True
                continue  # somebody may have written something just before
            if chunk:
                return Window([], self.number, self.offset, chunk)
            self._finish_file()

    def _read(self, file: int, size: int) -> bytes:
        """Return what comes next, with one newline at least unless there is none (within the longest line)."""
        while True:
            chunk = os.pread(file, size, self.offset)
            if b"\n" in chunk or len(chunk) < size or size >= self._longest_line:
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

    def end(self) -> Position:
        """Return where the last file that is known ends now.

        Raises:
            OSError: if it cannot be looked at.

        """
        for number in reversed(self._numbers or ()):
            for state in (ACTIVE, READY, ACTIVE, READY):
                with contextlib.suppress(FileNotFoundError):
                    return number, self.path(number, state).stat().st_size
        return self.number, self.offset

    def drop_file(self, number: int) -> int | None:
        """Delete an unsent file; return how many lines were given up, or None if it is still being written.

        Raises:
            OSError: if it cannot be read or deleted.

        """
        state = READY if self.path(number, READY).exists() else ACTIVE
        path = self.path(number, state)
        begin = self.offset if number == self.number else 0
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            if not try_lock(file.fileno(), fcntl.LOCK_SH):
                return None
            file.seek(begin)
            lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(CHUNK), b""))
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
        # The place matters only while the file is there to which it belongs.
        path = self.folder / (self.name + LOCK)
        is_left = any(self.path(self.number, state).exists() for state in (ACTIVE, READY))
        if self._is_our_lock and lock.is_at(path) and not is_left:
            path.unlink(missing_ok=True)
        lock.close()

    def forget(self) -> None:
        """Close what a forked process has inherited; the lock stays with the parent."""
        self._close_file()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self) -> Descriptor:
        """Return the lock; take it again if the agent has closed it.

        Raises:
            LostError: if another process has taken it since.

        """
        assert self._lock is not None  # noqa: S101 - nobody sends what it does not own
        if not self._lock.is_ours():
            lock = _lock(self.folder, self.name)
            if lock is None:
                raise LostError(self.name + LOCK)
            self._lock = Descriptor(lock)
        return self._lock

    def _open(self) -> Descriptor | None:
        """Return the file that is to be sent now."""
        if self._file is not None and not self._file.is_ours():
            self._close_file()
        while self._file is None:
            for state in (ACTIVE, READY, ACTIVE, READY):  # it may be renamed between the two
                with contextlib.suppress(FileNotFoundError):
                    file = open_regular(self.path(self.number, state), os.O_RDONLY)
                    self._file = Descriptor(file)
                    self.offset = _line_start(file, self.offset)
                    return self._file
            numbers = unsent_numbers(self.folder, self.name) if self._numbers is None else self._numbers
            later = min((number for number in numbers if number > self.number), default=None)
            if later is None:
                return None
            self.number, self.offset = later, 0
        return self._file

    def _finish_file(self) -> None:
        assert self._file is not None  # noqa: S101 - it has just been read to its end
        is_empty = os.fstat(self._file.check()).st_size == 0
        for state in (READY, ACTIVE):
            with contextlib.suppress(FileNotFoundError):
                if is_empty and OWN_STREAM.fullmatch(self.name):
                    self.path(self.number, state).unlink()
                else:
                    self._rename(self.number, state, SYNCED)
                    os.utime(self.path(self.number, SYNCED))  # kept from now on
        self._close_file()  # until here it holds the file's lock
        self.number, self.offset = self.number + 1, 0
        self._save()

    def _rename(self, number: int, state: str, new_state: str) -> None:
        source, target = self.path(number, state), self.path(number, new_state)
        if source.exists() and target.exists() and not is_ours(target, self.name):
            raise FileExistsError(errno.EEXIST, "It is in the place of a file that was sent", str(target))
        source.rename(target)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._is_complete = None, False

    def _save(self) -> None:
        with contextlib.suppress(OSError):  # then some lines are sent again, which is harmless
            lock = self._hold().check()
            if self._is_our_lock:
                os.pwrite(lock, _position(self.number, self.offset), 0)


def _position(number: int, offset: int) -> bytes:
    return b"%010d %020d\n" % (number, offset)


def _line_start(file: int, offset: int) -> int:
    """Return an offset in a file if a line can begin there; else 0, as the place was not noted by us.

    A torn line ends with its file, so after the last byte the next one may begin in any case.
    """
    size = os.fstat(file).st_size
    is_place = offset == size or (0 < offset < size and os.pread(file, 1, offset - 1) == b"\n")
    return offset if is_place else 0


def read_position(lock: int) -> Position:
    """Return how far a stream has been sent; what cannot be read counts as not at all."""
    try:
        number, offset = map(int, os.pread(lock, 64, 0).split())
    except (OSError, ValueError):
        return 0, 0
    return (number, offset) if 0 <= number < _LARGEST and 0 <= offset < _LARGEST else (0, 0)


def unsent_lines(folder: Path, entry: Entry) -> int:
    """Count the lines of a file from the place on up to which its stream has been sent, as far as it can be read."""
    begin = lines = 0
    last = b"\n"
    with contextlib.suppress(OSError):
        lock = open_regular(folder / (entry.stream + LOCK), os.O_RDONLY)
        try:
            number, offset = read_position(lock)
        finally:
            os.close(lock)
        begin = offset if number == entry.number else 0
    with contextlib.suppress(OSError), open(open_regular(Path(entry.path), os.O_RDONLY), "rb") as file:
        file.seek(begin)
        for chunk in iter(partial(file.read, CHUNK), b""):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last != b"\n")


def is_sent(folder: Path, after: After) -> bool:
    """Return whether another stream has been sent up to a place."""
    name, number, size = after
    if not OWN_STREAM.fullmatch(name):
        return True  # no process of ours wrote that
    with contextlib.suppress(FileNotFoundError):  # then nobody has begun to send it, or it has been sent whole
        lock = open_regular(folder / (name + LOCK), os.O_RDONLY)
        try:
            position = read_position(lock)
            if position >= (number, size) and not _is_beyond(folder, name, position):
                return True
        finally:
            os.close(lock)
    return all(unsent > number for unsent in unsent_numbers(folder, name))


def _is_beyond(folder: Path, stream: str, position: Position) -> bool:
    """Return whether a position is one that its stream cannot have reached."""
    number, offset = position
    for state in UNSENT:
        with contextlib.suppress(OSError):
            return file_path(folder, stream, number, state).stat().st_size < offset
    return False


def _lock(folder: Path, stream: str, flags: int = 0) -> int | None:
    """Open and lock a stream's lock file, which is made if there is none.

    Returns:
        its descriptor; None if the lock is held elsewhere, or the file was deleted.

    Raises:
        OSError: if it cannot be opened.

    """
    path = folder / (stream + LOCK)
    try:
        lock = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.pwrite(lock, _position(0, 0), 0)  # from here on it can be told to be ours
    except FileExistsError:
        if flags & os.O_EXCL:
            return None
        try:
            lock = open_regular(path, os.O_RDWR)
        except FileNotFoundError:
            return None
    try:
        if try_lock(lock, fcntl.LOCK_EX) and os.fstat(lock).st_nlink > 0:
            held, lock = lock, -1
            return held
    finally:
        if lock >= 0:
            os.close(lock)
    return None
