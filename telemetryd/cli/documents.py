"""Reads JSON that is no NDJSON: an array of runs, also under `runs`, or runs that stand over many lines each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from telemetryd.client.lines import read_object
from telemetryd.model.items import array_start

# Possessive, or the interpreter would remember each character of a long text to come back to it.
_MARK: Final = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+"|["\[\]{},]')
"""A text, or a sign that parts and encloses values; a quote that stands alone begins a text that is none."""
_BLANKS: Final = b" \t\r\n"
_SHOWN: Final = re.compile(rb"[^ \t\r\n]{1,40}")
"""The beginning of what stands between blanks, as an error shows it."""
_ONE_LINE: Final = bytes.maketrans(b"\r\n", b"  ")
_CLOSING: Final = {b"{": b"}", b"[": b"]"}


def is_document(start: bytes) -> bool:
    """Return whether a file begins as such a document: its first line is no whole value, or holds an array of runs.

    A line that is torn inside a text is one of NDJSON, and so is one of which only the beginning is given.
    """
    line, ended, _ = start.lstrip(_BLANKS).partition(b"\n")
    if array_start(line) is not None:
        return True
    depth = 0
    for mark in _MARK.finditer(line):
        if mark[0] == b'"':
            return False
        depth += (mark[0] in b"{[") - (mark[0] in b"}]")
    return bool(ended) and depth > 0


def read_document(file: BinaryIO, longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield each object with the number of its first line, as one line; all of them are in memory at once.

    Raises:
        OSError: if the document is longer than that, or no JSON from a place on.

    """
    data = file.read(longest + 1)
    if len(data) > longest:
        raise OSError(
            f"The JSON is longer than {longest >> 20} MiB; --longest-line MIB reads longer ones, and NDJSON "
            "(jq -c '.[]' FILE) may have any length"
        )
    document = _Document(data)
    start = array_start(data)
    if start is None:
        yield from document.objects()
        return
    yield from document.items(start + 1)
    around = data[:start] + b"[]" + data[document.end :]
    if data[:start].strip(_BLANKS):  # an object that holds the array
        if read_object(around) is None:
            raise OSError(f"What stands around the array, which ends in line {document.line(document.end)}, is no JSON")
    else:
        document.finish()


class _Document:
    """Walks through a text in which objects stand one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.end = 0
        """Where what has been read ends."""
        self._counted, self._number = 0, 1

    def line(self, at: int) -> int:
        """Return the number of the line of a place, which comes after that of the last call."""
        self._number += self._data.count(b"\n", self._counted, at)
        self._counted = at
        return self._number

    def objects(self) -> Iterator[tuple[int, bytes]]:
        """Yield the objects that blanks part, to the end of the text."""
        while (begin := self._next()) < len(self._data):
            yield self._object(begin)

    def items(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield the objects of the array whose first one begins here, if there are any; `end` is where it ends."""
        self.end = start
        if self._sign(self._next()) == b"]":
            self.end = self._next() + 1
            return
        while True:
            yield self._object(self._next())
            at = self._next()
            self.end = at + 1
            if self._sign(at) == b"]":
                return
            if self._sign(at) != b",":
                raise self._unexpected(at, "a comma or the end of the array")

    def finish(self) -> None:
        """Make sure that nothing but blanks follows what has been read."""
        if (at := self._next()) < len(self._data):
            raise self._unexpected(at, "the end of the file")

    def _sign(self, at: int) -> bytes:
        return self._data[at : at + 1]

    def _next(self) -> int:
        """Return where the next sign that is no blank stands."""
        found = _SHOWN.search(self._data, self.end)
        return len(self._data) if found is None else found.start()

    def _object(self, begin: int) -> tuple[int, bytes]:
        if self._sign(begin) != b"{":
            raise self._unexpected(begin, "an object")
        number = self.line(begin)
        closing: list[bytes] = []
        for mark in _MARK.finditer(self._data, begin):
            sign = mark[0]
            if sign == b'"':
                raise OSError(
                    f"In line {self.line(mark.start())} begins a text that does not end, or holds a line break or "
                    "another control character"
                )
            if sign in _CLOSING:
                closing.append(_CLOSING[sign])
            elif sign in (b"}", b"]"):
                if closing.pop() != sign:
                    raise self._unexpected(mark.start(), "another bracket")
                if not closing:
                    self.end = mark.end()
                    return number, self._data[begin : self.end].translate(_ONE_LINE)
        raise OSError(f"The object that begins in line {number} does not end")

    def _unexpected(self, at: int, expected: str) -> OSError:
        shown = _SHOWN.match(self._data, at)
        if shown is None:
            return OSError(f"The JSON ends in line {self.line(at)}, where {expected} is expected")
        return OSError(f"In line {self.line(at)} stands {shown[0]!r} where {expected} is expected")
