"""The spool's folder: names, ownership, and the files that wait in it.

A *stream* is what one process writes: numbered files, each of them `.active` while it is written, `.ready` when it is
closed, `.synced` when every line of it has been acknowledged:

    20251231T153045Z-4711-a1b2c3d4.000000.jsonl.synced
    20251231T153045Z-4711-a1b2c3d4.000001.jsonl.active
    20251231T153045Z-4711-a1b2c3d4.lock

The holder of the lock (flock(2)) of the `.lock` file sends the stream: its process while that lives, if it sends at
all, else the next one. The lock file also records how far sending has come. Because a stream is sent by one process and
in order, a run's start goes out before whatever is said of it later. A `.jsonl.ready` file with another name (the
replaced client's) is a stream too.

A file's writer holds that file's own lock, alive or not: once the lock can be had, nothing is added any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ACTIVE: Final = ".active"
READY: Final = ".ready"
SYNCED: Final = ".synced"
UNSENT: Final = (ACTIVE, READY)
STATES: Final = (ACTIVE, READY, SYNCED)
LOCK: Final = ".lock"
_FILE: Final = re.compile(
    r"(?P<stem>(?P<stream>.+?)(?:\.(?P<number>\d{6}|[1-9]\d{6,}))?\.jsonl)(?P<state>\.active|\.ready|\.synced)",
    re.DOTALL,
)
_ASIDE: Final = "aside-"
OWN_STREAM: Final = re.compile(rf"(?:{_ASIDE})?\d{{8}}T\d{{6}}Z-\d+-[0-9a-f]{{8}}", re.ASCII)
CHUNK: Final = 1 << 16
_POSITION: Final = re.compile(rb"-?\d+ -?\d+\n?")
_LONGEST_POSITION: Final = 64
_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the folder that belongs to a stream."""

    path: str
    stream: str
    number: int
    state: str
    size: int
    modified: float


def make_folder(folder: Path) -> None:
    """Make the folder, for this user only.

    Raises:
        OSError: if it cannot be made.

    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)


def entries(folder: Path, states: tuple[str, ...] = STATES) -> list[Entry]:
    """Return the streams' files that are in one of some states, the oldest first."""
    return look_through(folder, lambda name: _read_name(name) if name.endswith(states) else None)


def aside_entries(folder: Path, states: tuple[str, ...] = STATES) -> list[Entry]:
    """Return the files of what is set aside, in some states; costs next to nothing where there are none."""
    return look_through(
        folder, lambda name: _read_name(name) if name.startswith(_ASIDE) and name.endswith(states) else None
    )


def look_through(folder: Path, read_name: Callable[[str], tuple[str, int, str] | None]) -> list[Entry]:
    """Return the files whose names say their stream, number and state, the oldest first.

    Args:
        folder: where to look.
        read_name: returns the three, or None for a file that is not wanted: most are not, and are not worth a stat.

    """
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listing:
        for item in listing:
            named = read_name(item.name)
            if named is None:
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed or deleted meanwhile
                facts = item.stat(follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode):  # else no process of ours has made it, whatever it is
                    found.append(Entry(item.path, *named, facts.st_size, facts.st_mtime))
    return sorted(found, key=lambda entry: (entry.modified, entry.stream, entry.number))


def no_files(folder: Path) -> list[str]:
    """Return the names of what is called like a file to be sent but is none: a link, a pipe, a folder.

    Raises:
        OSError: if the folder cannot be read.

    """
    ends = tuple(f".jsonl{state}" for state in UNSENT)
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listing:
        return sorted(
            item.name for item in listing if item.name.endswith(ends) and not item.is_file(follow_symlinks=False)
        )
    return []


def _read_name(name: str) -> tuple[str, int, str] | None:
    """Return the stream, the number and the state of a file of this name; None if it belongs to no stream."""
    match = _FILE.fullmatch(name)
    if match is None:
        return None
    if match["number"] is not None and OWN_STREAM.fullmatch(match["stream"]):
        return match["stream"], int(match["number"]), match["state"]
    if match["state"] == ACTIVE:
        return None  # the replaced client's; it closes them itself
    return match["stem"].removesuffix(".jsonl"), 0, match["state"]


def waiting(folder: Path) -> dict[str, list[int]]:
    """Return the streams that have unsent files, with the files' numbers, the oldest first.

    At the end stand those of which there is a lock only, which is left if a process dies after the last
    acknowledgement; to take the stream tidies it up. Another program's lock file (poetry.lock) is none of them.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for entry in entries(folder, UNSENT):
        found[entry.stream].append(entry.number)
    for name in _names(folder):
        stream = name.removesuffix(LOCK)
        if stream != name and stream not in found and _is_our_lock(folder / name, stream):
            found[stream] = []
    return dict(found)


def _is_our_lock(path: Path, stream: str) -> bool:
    try:
        lock = open_regular(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return holds_position(lock, stream)
    finally:
        os.close(lock)


def holds_position(lock: int, stream: str) -> bool:
    """Return whether a lock file is one of ours: it holds a position, or the process died before it was written."""
    text = os.pread(lock, _LONGEST_POSITION + 1, 0)
    if not text:
        return OWN_STREAM.fullmatch(stream) is not None
    return len(text) <= _LONGEST_POSITION and _POSITION.fullmatch(text) is not None


def is_ours(path: Path, stream: str) -> bool:
    """Return whether a stream's file may be deleted: by its name, or else by its content, it is telemetry.

    Anybody may have a `something.jsonl.synced` of his own where the spool's folder is not ours alone.
    """
    if OWN_STREAM.fullmatch(stream):
        return True
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            beginning = file.read(CHUNK).lstrip()
    except OSError:
        return False
    return beginning.startswith(b"{") and b'"event_id"' in beginning


def unsent_numbers(folder: Path, stream: str) -> list[int]:
    """Return the numbers of a stream's unsent files."""
    named = (_read_name(name) for name in _names(folder) if name.startswith(stream) and name.endswith(UNSENT))
    return [each[1] for each in named if each is not None and each[0] == stream]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def new_stream_name() -> str:
    """Return a name that no other stream has."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}-{os.urandom(4).hex()}"


def new_aside_name() -> str:
    """Return a name that no other stream has, for lines that are set aside."""
    return _ASIDE + new_stream_name()


def is_aside(stream: str) -> bool:
    """Return whether a stream holds what was set aside."""
    return stream.startswith(_ASIDE) and OWN_STREAM.fullmatch(stream) is not None


def file_path(folder: Path, stream: str, number: int, state: str) -> Path:
    """Return the name of one of a stream's files."""
    numbered = f".{number:06d}" if OWN_STREAM.fullmatch(stream) else ""
    return folder / f"{stream}{numbered}.jsonl{state}"


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file; whatever else stands in its place is neither followed nor waited for, nor written to.

    A file with a second name may belong to another program, so it is not written to either. A file that root makes
    belongs to the owner of its folder, whose processes have to write to it as well.

    Raises:
        OSError: if it cannot be opened, or is another kind of file.

    """
    while flags & os.O_CREAT and not flags & os.O_EXCL:
        try:
            return open_regular(path, flags | os.O_EXCL)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                return open_regular(path, flags & ~os.O_CREAT)
    file = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, _MODE)
    if flags & os.O_CREAT and os.geteuid() == 0:
        owner = path.parent.stat()
        with contextlib.suppress(OSError):  # a file system without owners
            os.fchown(file, owner.st_uid, owner.st_gid)
    facts = os.fstat(file)
    if stat.S_ISREG(facts.st_mode) and (facts.st_nlink <= 1 or flags & os.O_ACCMODE == os.O_RDONLY):
        return file
    os.close(file)
    raise OSError(errno.EPERM, "It is not a regular file with one name", str(path))


def try_lock(file: int, kind: int) -> bool:
    """Lock an open file if nobody else has, which would be the end of it; return whether it is locked now.

    Raises:
        OSError: if the file system knows no locks.

    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_active(folder: Path, stream: str, number: int) -> tuple[int, int]:
    """Make a stream's next file, and lock it; return its descriptor and its number.

    The stream's sender may find the new file before it is locked, and put it away as an empty one: then the next
    number is taken.

    Raises:
        OSError: if it cannot be made.

    """
    while True:
        path = file_path(folder, stream, number, ACTIVE)
        # Also to be read: if it is deleted, its lines can still be had of it.
        file = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        try:
            with contextlib.suppress(FileNotFoundError):
                if try_lock(file, fcntl.LOCK_EX) and path.stat().st_ino == os.fstat(file).st_ino:
                    return file, number
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        os.close(file)
        number += 1


def summary(folder: Path, states: tuple[str, ...] = STATES) -> dict[str, dict[str, int]]:
    """Return how many files and bytes there are of each of some states."""
    totals: dict[str, dict[str, int]] = defaultdict(lambda: {"files": 0, "bytes": 0})
    for entry in entries(folder, states):
        total = totals[entry.state[1:]]
        total["files"] += 1
        total["bytes"] += entry.size
    return dict(totals)
