"""Rebuilds the disk as it could be after a power cut, from a recording of everything that was done to it.

What POSIX leaves open is left open here: of the writes and truncations of a file since its last sync any may have
reached the disk, in any order, each 512-byte sector by itself; of the names made, moved and removed in a directory
since its last sync, any too. What a sync has covered is there. SQLite's own tests assume the same
(sqlite.org/atomiccommit.html, section 2).
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Final

from tests.needs import require_program

SECTOR: Final = 512
_HEAD: Final = struct.Struct("<IiiIQ")
_CREATED, _EMPTIED = 1, 2
_VOLATILE: Final = ("-shm", ".lock")
"""SQLite makes the shared memory anew after a crash; the lock file says nothing by what it holds."""

Image = Mapping[str, bytes]
"""The files of a disk by their paths."""


class Kind(IntEnum):
    """What was done; the numbers are those of recorder.c."""

    OPEN = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    RENAME = 5
    UNLINK = 6
    CLOSE = 7
    SEND = 8
    LINK = 9
    MAP = 10


@dataclass(frozen=True, slots=True)
class Record:
    """One call of a recorded process."""

    place: int
    """Where it stands in the recording."""
    kind: Kind
    descriptor: tuple[int, int]
    """The process's number, and its descriptor."""
    number: int
    data: bytes

    @property
    def paths(self) -> list[str]:
        """The paths that it names."""
        return self.data.decode().split("\0")


def build_recorder(folder: Path) -> Path:
    """Compile the library that a recorded process loads first."""
    require_program("gcc", "gcc")
    library = folder / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    flags = ("-O2", "-Wall", "-Werror", "-shared", "-fPIC")
    subprocess.run(["gcc", *flags, "-o", str(library), str(source), "-ldl"], check=True)
    return library


class Recorder:
    """Records what processes do to the files of a folder.

    Args:
        library: what `build_recorder` has made.
        folder: the files.
        log: where the recording is written.

    """

    def __init__(self, library: Path, folder: Path, log: Path) -> None:
        self._log = log
        self.folder = folder
        self.environment = {
            "LD_PRELOAD": str(library),
            "RECORD_FOLDER": str(folder),
            "RECORD_LOG": str(log),
        }
        """With these variables a process is recorded; one at a time."""

    def records(self) -> list[Record]:
        """Return what was recorded, in order."""
        return list(_parse(self._log.read_bytes()))

    def calls(self) -> list[Record]:
        """Return those of the records that `RECORDER_KILL_AT` counts."""
        return list(_counted(self.records()))

    def forget(self) -> None:
        """Begin a new recording."""
        self._log.unlink(missing_ok=True)

    def files(self) -> Image:
        """Return the files as they are."""
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file() and _counts(path)}


def _counts(path: str | Path) -> bool:
    return not str(path).endswith(_VOLATILE)


def _counted(records: Iterable[Record]) -> Iterator[Record]:
    open_files: dict[tuple[int, int], str] = {}
    for record in records:
        match record.kind:
            case Kind.OPEN:
                open_files[record.descriptor] = record.paths[0]
            case Kind.WRITE | Kind.TRUNCATE | Kind.SYNC:
                if _counts(open_files[record.descriptor]):
                    yield record
            case Kind.RENAME | Kind.LINK | Kind.UNLINK:
                if _counts(record.paths[0]):
                    yield record
            case _:
                pass


def _parse(log: bytes) -> Iterator[Record]:
    place = 0
    while place < len(log):
        kind, process, descriptor, length, number = _HEAD.unpack_from(log, place)
        end = place + _HEAD.size + length
        yield Record(place, Kind(kind), (process, descriptor), number, log[place + _HEAD.size : end])
        place = end


@dataclass(frozen=True, slots=True)
class _Change:
    """A write, or a truncation if there is no data, that no sync has covered yet."""

    place: int
    offset: int
    data: bytes | None

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            _resize(content, self.offset)
        else:
            _put(content, self.offset, self.data)

    def sectors(self) -> Iterator[tuple[int, bytes]]:
        """Cut a write at the boundaries of sectors."""
        data = self.data or b""
        begin = 0
        while begin < len(data):
            end = min(len(data), begin + SECTOR - (self.offset + begin) % SECTOR)
            yield self.offset + begin, data[begin:end]
            begin = end


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        _resize(content, offset)
    content[offset : offset + len(data)] = data


class _File:
    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        """As every process sees it."""
        self.safe = bytearray(content)
        """What is surely on the disk."""
        self.pending: list[_Change] = []

    def change(self, change: _Change) -> None:
        change.apply(self.content)
        self.pending.append(change)

    def sync(self, before: int) -> None:
        for change in self.pending:
            if change.place < before:
                change.apply(self.safe)
        self.pending = [change for change in self.pending if change.place >= before]


@dataclass(frozen=True, slots=True)
class _Naming:
    """A name that was given to a file, or taken from it (then the file is None)."""

    place: int
    names: tuple[tuple[str, _File | None], ...]
    """More than one for a rename, which is atomic."""

    def apply(self, names: dict[str, _File]) -> None:
        for name, file in self.names:
            if file is None:
                names.pop(name, None)
            else:
                names[name] = file


class Way(StrEnum):
    """How much of what no sync has covered is on the disk."""

    NONE = "nothing"
    ALL = "everything"
    PREFIX = "all until some moment, the last write torn"
    SUBSET = "some writes"
    SECTORS = "some sectors"
    GROWN = "some sectors, and the files have grown already, with garbage where nothing was written"


@dataclass
class Disk:
    """A disk that a recording is played to."""

    names: dict[str, _File] = field(default_factory=dict)
    _safe_names: dict[str, _File] = field(default_factory=dict)
    _pending: list[_Naming] = field(default_factory=list)
    _open: dict[tuple[int, int], str | _File] = field(default_factory=dict)
    """The file, or the directory's path, behind each descriptor."""

    @classmethod
    def holding(cls, files: Image) -> Disk:
        """Return a disk on which some files are safe already."""
        disk = cls()
        disk.names = {path: _File(content) for path, content in files.items()}
        disk._safe_names = dict(disk.names)
        return disk

    def play(self, record: Record) -> None:
        """Do what was recorded."""
        place = record.place
        match record.kind:
            case Kind.OPEN:
                self._play_open(record)
            case Kind.CLOSE:
                self._open.pop(record.descriptor, None)
            case Kind.RENAME:
                old, new = record.paths
                self._name(place, (old, None), (new, self.names[old]))
            case Kind.LINK:
                old, new = record.paths
                self._name(place, (new, self.names[old]))
            case Kind.UNLINK:
                self._name(place, (record.paths[0], None))
            case Kind.MAP | Kind.WRITE | Kind.TRUNCATE | Kind.SYNC:
                self._play_on_descriptor(record)
            case Kind.SEND:
                pass

    def _play_open(self, record: Record) -> None:
        (path,) = record.paths
        if not _counts(path):
            return
        if record.number & _CREATED:
            self._name(record.place, (path, _File()))
        if path not in self.names:
            self._open[record.descriptor] = path
            return
        self._open[record.descriptor] = file = self.names[path]
        if record.number & _EMPTIED and file.content:
            file.change(_Change(record.place, 0, None))

    def _play_on_descriptor(self, record: Record) -> None:
        match self._open.get(record.descriptor), record.kind:
            case _File() as file, Kind.WRITE:
                file.change(_Change(record.place, record.number, record.data))
            case _File() as file, Kind.TRUNCATE:
                file.change(_Change(record.place, record.number, None))
            case _File() as file, Kind.SYNC:
                file.sync(record.number)
            case _File(), Kind.MAP:
                raise AssertionError("a mapped file can change without a call that is recorded")
            case str() as directory, Kind.SYNC:
                self._sync_names(directory, record.number)
            case _:
                pass  # what a power cut takes away

    def _name(self, place: int, *names: tuple[str, _File | None]) -> None:
        if all(_counts(name) for name, _ in names):
            naming = _Naming(place, names)
            naming.apply(self.names)
            self._pending.append(naming)

    def _sync_names(self, directory: str, before: int) -> None:
        def covered(naming: _Naming) -> bool:
            return naming.place < before and all(os.path.dirname(name) == directory for name, _ in naming.names)

        for naming in filter(covered, self._pending):
            naming.apply(self._safe_names)
        self._pending = [naming for naming in self._pending if not covered(naming)]

    def live(self) -> Image:
        """Return the files as a process sees them."""
        return {name: bytes(file.content) for name, file in self.names.items()}

    def cut(self, way: Way, chance: random.Random) -> Image:
        """Return the files as they could be if the power went off now."""
        share = chance.choice((0.1, 0.5, 0.9))
        files = {id(file): file for file in [*self.names.values(), *self._safe_names.values()]}
        places = [change.place for file in files.values() for change in file.pending]
        last = chance.choice([*places, *(naming.place for naming in self._pending)] or [0])

        def is_kept(place: int) -> bool:
            match way:
                case Way.NONE:
                    return False
                case Way.ALL:
                    return True
                case Way.PREFIX:
                    return place < last
                case _:
                    return chance.random() < share

        names = dict(self._safe_names)
        for naming in self._pending:
            if is_kept(naming.place):
                naming.apply(names)
        return {name: self._content(file, way, is_kept, last, chance) for name, file in names.items()}

    @staticmethod
    def _content(file: _File, way: Way, is_kept: Callable[[int], bool], last: int, chance: random.Random) -> bytes:
        content = bytearray(file.safe)
        if way is Way.GROWN:
            content += chance.randbytes(max(0, len(file.content) - len(content)))
        for change in file.pending:
            is_torn = way in (Way.SECTORS, Way.GROWN) or (way is Way.PREFIX and change.place == last)
            if is_torn and change.data is not None:
                for offset, part in change.sectors():
                    if chance.random() < 0.5:
                        _put(content, offset, part)
            elif is_kept(change.place):
                change.apply(content)
        return bytes(content)


def places_to_cut(records: Sequence[Record], images: int, chance: random.Random) -> dict[int, list[Way]]:
    """Spread a number of images over the moments of a recording: for each place, the ways to cut there."""
    moments = [record.place for record in records if record.kind is not Kind.CLOSE]
    ways: dict[int, list[Way]] = {}
    while images > 0:
        chosen = chance.sample(moments, min(len(moments), images))
        for number, place in enumerate(chosen):
            ways.setdefault(place, []).append(list(Way)[(images + number) % len(Way)])
        images -= len(chosen)
    return ways


def calls_to_kill_at(calls: Sequence[Record], rounds: int, chance: random.Random) -> list[str]:
    """Spread kills over the calls of a recording, as values of `RECORDER_KILL_AT`; none falls outside of its work.

    Every other one is before its call, every other pair at one of the few calls that are no plain writes.
    """
    kills = []
    for number in range(rounds):
        when = ("before", "after")[number % 2]
        inside = range(2, len(calls) + 1) if when == "before" else range(1, len(calls))
        rare = [place for place in inside if calls[place - 1].kind is not Kind.WRITE]
        among = rare if number // 2 % 2 else inside
        share = (number // 4 + chance.random()) / (rounds / 4 + 1)
        kills.append(f"{when} {among[int(share * len(among))]}")
    return kills


def write(image: Image, old: Path, folder: Path) -> None:
    """Put the files of an image into a folder, emptied before, in which they stand as they did in the old one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in image.items():
        path = folder / Path(name).relative_to(old)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
