"""Reads git references stored in the reftable format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_HASH, _TWO_HASHES, _LINK = 1, 2, 3
"""What a record may hold; 0 says that the reference is deleted."""
_MOST_TABLES: Final = 100
MOST_BYTES: Final = 1 << 20
"""The largest table that is read; a larger one would take too much of the agent's time."""

Read = Callable[[Path], bytes | None]


def find_reference(folder: Path, name: str, read: Read) -> str | None:
    """Return what a reference of a git folder holds, as a loose file would: a hash, or `ref: ` and another name.

    Args:
        folder: the git folder, with `reftable/tables.list` in it.
        name: the reference.
        read: returns a file's content, unless it is too large or cannot be read.

    """
    listed = (read(folder / "reftable" / "tables.list") or b"").decode("ascii", "replace").split()
    wanted = name.encode("utf-8", "surrogateescape")
    for table in reversed(listed[-_MOST_TABLES:]):  # the newest stands last, and wins
        data = read(folder / "reftable" / table)
        if data is None:
            return None
        try:
            for found, value in _records(data):
                if found == wanted:
                    return value
        except IndexError:  # it ends where it should not
            return None
    return None


def _records(data: bytes) -> Iterator[tuple[bytes, str | None]]:
    """Yield the names and values of a table's references, in the order of their names."""
    if data[:4] != b"REFT":
        return
    header = 24 if data[4] == 1 else 28
    size = 32 if header == 28 and data[24:28] == b"s256" else 20
    block_size = int.from_bytes(data[5:8], "big")
    start, at = 0, header  # the first block's length counts from the header on
    while data[at : at + 1] == b"r":
        end = start + int.from_bytes(data[at + 1 : at + 4], "big")
        records_end = end - 2 - 3 * int.from_bytes(data[end - 2 : end], "big")
        yield from _of_block(data, at + 4, records_end, size)
        if end <= at:
            return
        start = at = start + block_size if block_size else end


def _of_block(data: bytes, at: int, end: int, size: int) -> Iterator[tuple[bytes, str | None]]:
    name = b""
    while at < end:
        shared, at = _number(data, at)
        rest, at = _number(data, at)
        length, kind = rest >> 3, rest & 7
        name = name[:shared] + data[at : at + length]
        _, at = _number(data, at + length)  # when it was changed
        value = None
        if kind in (_HASH, _TWO_HASHES):
            value = data[at : at + size].hex()
            at += size * kind
        elif kind == _LINK:
            length, at = _number(data, at)
            value = "ref: " + data[at : at + length].decode("utf-8", "surrogateescape")
            at += length
        yield name, value


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place after it."""
    value = data[at] & 0x7F
    while data[at] & 0x80:
        at += 1
        value = (value + 1) << 7 | (data[at] & 0x7F)
    return value, at + 1
