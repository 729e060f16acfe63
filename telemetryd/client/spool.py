"""Writes the spool: each line whole, by one write(2), without a lock, before the call returns.

What that promises: a line is with the kernel when `append` returns True, so it survives SIGKILL of the process at any
moment; with `fsync` it is on the disk, so it survives a power cut as well.

Why no lock: write(2) on an O_APPEND descriptor is atomic towards other writes of the same file, and gives the
interpreter's lock away. A thread that has to wait for that lock again would keep every other one waiting for ours.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from telemetryd.client.bounds import make_room
from telemetryd.client.complaints import Complaints
from telemetryd.client.descriptors import Descriptor
from telemetryd.client.folder import ACTIVE, READY, file_path, make_folder, new_stream_name, open_active
from telemetryd.client.lines import After
from telemetryd.client.streams import Position, Stream

_HELD_BYTES: Final = 8 << 20
"""How much is held in memory when the disk takes nothing more."""
_HELD_RETRY_S: Final = 0.2
_GRACE_S: Final = 0.0005
_GRACES: Final = 20
_LOOK_S: Final = 1.0
"""How often we look whether the file is still where others find it."""


def _do_nothing() -> None:
    """Stand in for a listener that wants to know of a new file."""


class Spool:
    """One process's stream, to which any thread may append.

    Args:
        folder: where the files are; made when the first line comes.
        sends: whether this process sends its stream itself. If not, anybody may, while it is being written.
        fsync: wait for the disk at each line.
        file_bytes: begin a new file when this one is so large,
        file_age_s: or so old, in seconds.

    Attributes:
        name: the stream's name; None as long as there is none.
        stream: the stream in the hands of this process's sender, if it sends itself.
        changed: is called when a new file has been begun.

    """

    def __init__(self, folder: Path, *, fsync: bool, file_bytes: int, file_age_s: float, sends: bool = True) -> None:
        self._folder = folder
        self._sends = sends
        self._fsync = fsync
        self._file_bytes = file_bytes
        self._file_age_s = file_age_s
        self.after: After | None = None
        """Where the parent's stream stood when this process was forked."""
        self._complaints = Complaints()
        self.refused = 0
        """Lines that neither the disk nor the memory had room for."""
        self.changed: Callable[[], None] = _do_nothing
        self._reset()

    def _reset(self) -> None:
        self.name: str | None = None
        self.stream: Stream | None = None
        self._lock = threading.RLock()  # a signal handler may append while this thread does
        self._file: Descriptor | None = None
        self._number = 0
        self._written = 0
        self._opened = 0.0
        self._next_look = 0.0
        self._retired: list[tuple[Descriptor, set[int]]] = []
        """Files that were full, and the tickets of those who may be writing to them still."""
        self._tickets = itertools.count()
        self._writing: set[int] = set()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._taken: list[bytes] = []
        self._torn = False
        self._next_try = 0.0
        self._stranded: list[Stream] = []
        """Streams whose files are gone; only the sender's thread may close them."""

    # --- Any thread ------------------------------------------------------------------------------

    def append(self, line: bytes) -> bool:
        """Write a line, which ends with its newline; False means that it is held in memory at best."""
        if self._held or self._taken:
            return self._append_behind_held(line)
        ticket = next(self._tickets)
        written = 0
        try:
            self._writing.add(ticket)  # before the descriptor is looked at: see _close_retired()
            file = self._file
            # An agent that closes all descriptors may have reused this number for its own file. And what is written
            # to a file without a name is found by nobody.
            if file is not None and file.has_name():
                written = os.write(file.number, line)
                if self._fsync:
                    os.fsync(file.number)
        except OSError:  # the disk refuses
            written = 0
        finally:
            self._writing.discard(ticket)
        if written != len(line):
            self._torn = self._torn or written > 0
            return self._append_behind_held(line)
        self._written += written
        now = time.monotonic()
        if self._written >= self._file_bytes or (
            not self._sends and now - self._opened >= self._file_age_s  # else the thread sees to it
        ):
            self._rotate(wait=False)
        if now >= self._next_look:
            self.look()
        if self._retired:
            self._close_retired()
        return True

    def _append_behind_held(self, line: bytes) -> bool:
        with self._lock:
            self._held.append(line)
            self._held_bytes += len(line)
            if time.monotonic() >= self._next_try and not self._taken and self._write_held():
                return True
            if self._held_bytes > _HELD_BYTES and line in self._held:
                self._held.remove(line)
                self._held_bytes -= len(line)
                self.refused += 1
                self._complaints.say(logging.ERROR, "The spool and the memory behind it are full: a line is lost")
            return False

    def write_held(self) -> None:
        """Try again to write the lines that the disk refused."""
        with self._lock:
            if self._held and not self._taken:
                self._write_held()

    def _write_held(self) -> bool:
        try:
            if self._file is not None and not self._file.has_name():
                self._leave_file()
            file = self._file or self._open()
            while self._held:
                line = self._held[0]
                text = b"\n" + line if self._torn else line
                written = os.write(file.number, text)
                if written != len(text):
                    self._torn = self._torn or written > 0
                    raise OSError("the disk took only a part of a line")  # noqa: TRY301 - one place to give up
                self._torn = False
                self._written += written
                self._held_bytes -= len(self._held.pop(0))
            if self._fsync:
                os.fsync(file.number)
        except OSError as error:
            self._next_try = time.monotonic() + _HELD_RETRY_S
            self._complaints.say(
                logging.WARNING, "The spool in %s cannot be written, lines are kept in memory: %s", self._folder, error
            )
            make_room(self._folder, error)
            return False
        self._next_try = 0.0
        if self._written >= self._file_bytes:
            self._rotate(wait=True)
        return True

    def _open(self) -> Descriptor:
        make_folder(self._folder)
        if self.name is None:
            if self._sends:
                self.stream = Stream.create(self._folder)
                self.name = self.stream.name
            else:
                self.name = new_stream_name()
            self._number = 0
        number, self._number = open_active(self._folder, self.name, self._number)
        self._file = Descriptor(number)
        self._written = 0
        self._torn = False
        self._opened = time.monotonic()
        self._next_look = self._opened + _LOOK_S
        if self._fsync:
            folder = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return self._file

    def look(self) -> None:
        """If nobody finds our file any more (deleted, or its folder replaced), begin another with what was not sent."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._next_look = time.monotonic() + _LOOK_S
            if self._file is None or self.name is None:
                return
            path = file_path(self._folder, self.name, self._number, ACTIVE)
            if not (self._file.is_ours() and self._file.is_at(path)):
                self._leave_file()
            if self._held and not self._taken:
                self._write_held()
        finally:
            self._lock.release()

    def _leave_file(self) -> None:
        """Go on without a file that the agent has closed, or that has no name any more; the lock is held."""
        file, name, number = self._file, self.name, self._number
        assert file is not None and name is not None  # noqa: S101, PT018 - the caller has looked
        self._file = None
        if not file.is_ours():  # it stays where it is, and is sent from there
            path = file_path(self._folder, name, number, ACTIVE)
            with contextlib.suppress(OSError):
                if file.is_at(path):
                    path.rename(file_path(self._folder, name, number, READY))
            self._number = number + 1
            text = "The agent has closed the spool's file; the spool in %s goes on with another"
            self._complaints.say(logging.WARNING, text, self._folder)
            return
        for _ in range(_GRACES):  # a signal handler must not wait for the thread that it interrupts
            if not self._writing:
                break
            time.sleep(_GRACE_S)
        self.name, stream, self.stream = None, self.stream, None
        unsent = self._unsent(file, number, stream)
        if stream is not None:
            self._stranded.append(stream)
        self._held[:0] = unsent
        self._held_bytes += sum(map(len, unsent))
        self._retired.append((file, set(self._writing)))
        text = "The spool's file in %s was deleted or taken away; %d line(s) that were not sent are written again"
        self._complaints.say(logging.ERROR, text, self._folder, len(unsent))

    def _unsent(self, file: Descriptor, number: int, stream: Stream | None) -> list[bytes]:
        """Return the lines of a file that were not sent; where others send, nobody knows, and all are sent again."""
        begin = 0
        if stream is not None:
            begin = stream.offset if stream.number == number else 0
        with contextlib.suppress(OSError):
            text = os.pread(file.check(), os.fstat(file.number).st_size - begin, begin)
            return [line for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True) if line.strip()]
        return []

    def _rotate(self, *, wait: bool) -> None:
        """Begin a new file, unless another thread is just doing so."""
        if not self._lock.acquire(blocking=wait):
            return
        try:
            if self._file is None or self.name is None or self._written == 0:
                return
            old, old_number = self._file, self._number
            number, self._number = open_active(self._folder, self.name, old_number + 1)
            self._file = Descriptor(number)
            self._written, self._opened = 0, time.monotonic()
            self._retired.append((old, set(self._writing)))
            file_path(self._folder, self.name, old_number, ACTIVE).rename(
                file_path(self._folder, self.name, old_number, READY)
            )
        except OSError as error:  # then this file grows on
            self._written, self._opened = 0, time.monotonic()
            self._complaints.say(logging.WARNING, "The spool in %s cannot begin a new file: %s", self._folder, error)
        finally:
            self._lock.release()
        self.changed()

    def _close_retired(self) -> None:
        """Close the files to which nobody writes any more; until then they are locked.

        A thread notes that it writes before it looks which file that is. So a thread that looked before the file was
        retired is among those that wrote at that moment, and looks here when it has written.
        """
        with self._lock:
            retired, self._retired = self._retired, []
            for file, writing in retired:
                if writing.isdisjoint(self._writing):
                    file.close()
                else:
                    self._retired.append((file, writing))

    def rotate_if_old(self) -> None:
        """Begin a new file if this one has been written for long enough."""
        if self._file is not None and time.monotonic() - self._opened >= self._file_age_s:
            self._rotate(wait=False)

    # --- The sender's thread ---------------------------------------------------------------------

    def end(self) -> Position:
        """Return where the stream ends now."""
        with self._lock:
            if self._file is None or not self._file.is_ours():
                return self._number, 0
            return self._number, os.fstat(self._file.number).st_size

    def forget_stranded(self) -> None:
        """Close the streams whose files are gone."""
        with self._lock:
            stranded, self._stranded = self._stranded, []
        for stream in stranded:
            stream.forget()

    def leave_stream(self) -> None:
        """Begin another stream with the next line: the agent has closed this one's lock, and another process has it."""
        with self._lock:
            stream, file, self.stream, self.name, self._file = self.stream, self._file, None, None, None
            if stream is not None:
                self._stranded.append(stream)
            if file is not None:
                self._retired.append((file, set(self._writing)))

    def _wait_for_writers(self) -> None:
        for ticket in tuple(self._writing):
            while ticket in self._writing:
                time.sleep(_GRACE_S)

    def take_held(self, rows: int) -> list[bytes]:
        """Take lines that the disk refused, to send them from memory; nothing is written before they are back."""
        with self._lock:
            self._taken, self._held = self._held[:rows], self._held[rows:]
            return [line.rstrip(b"\n") for line in self._taken]

    def give_back(self, *, sent: bool) -> None:
        """Say what became of the lines that were taken."""
        with self._lock:
            if sent:
                self._held_bytes -= sum(map(len, self._taken))
            else:
                self._held[:0] = self._taken
            self._taken = []

    @property
    def holds(self) -> bool:
        """Whether lines wait in memory."""
        return bool(self._held)

    def close(self) -> None:
        """Leave the stream to the next process; a line that comes later begins a new one."""
        self.look()
        with self._lock:
            if self._held and not self._taken:
                self._write_held()
            stream, name, file, number = self.stream, self.name, self._file, self._number
            self.stream, self.name, self._file = None, None, None
            retired, self._retired = self._retired, []
        self._wait_for_writers()
        if name is not None and file is not None:
            with contextlib.suppress(OSError):
                file_path(self._folder, name, number, ACTIVE).rename(file_path(self._folder, name, number, READY))
        for each in (*(old for old, _ in retired), file):
            if each is not None:
                each.close()
        self.forget_stranded()
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.seal()
                stream.window(1, 1)  # marks files that have been sent whole
            with contextlib.suppress(OSError):
                stream.release()

    # --- fork ------------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In a forked process: leave the parent's stream alone, and remember how far it had come."""
        stream, files = self.stream, (*(old for old, _ in self._retired), self._file)
        if self.name is not None:
            with contextlib.suppress(OSError):
                size = os.fstat(self._file.check()).st_size if self._file is not None else 0
                self.after = (self.name, self._number, size)
        for each in (stream, *self._stranded):
            if each is not None:
                each.forget()
        for file in files:
            if file is not None:
                file.close()
        self._reset()
