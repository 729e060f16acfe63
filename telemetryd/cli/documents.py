"""Reads JSON that is no NDJSON: an array of runs, or runs that stand over many lines each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

# Possessive, or the interpreter would remember each character of a long text to come back to it.
_TOKEN: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}]', re.DOTALL)
_BETWEEN: Final = b" \t\r\n,[]"
"""What may stand between the objects."""


def is_document(start: bytes) -> bool:
    """Return whether a file begins as such a document; each line of NDJSON is a whole object, if it is not torn."""
    first = start.lstrip()
    return first.startswith(b"[") or first.partition(b"\n")[0].rstrip() == b"{"


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
    number = 1
    begin = end = counted = depth = 0
    for token in _TOKEN.finditer(data):
        sign = token.group()
        if sign == b"{":
            if not depth:
                begin = token.start()
                _check_between(data, end, begin)
                number += data.count(b"\n", counted, begin)
                counted = begin
            depth += 1
        elif sign == b"}" and depth:
            depth -= 1
            if not depth:
                end = token.end()
                yield number, b"".join(line.strip() for line in data[begin:end].splitlines())
    if depth:
        raise OSError(f"The object that begins in line {number} does not end")
    _check_between(data, end, len(data))


def _check_between(data: bytes, start: int, end: int) -> None:
    rest = data[start:end].lstrip(_BETWEEN)
    if rest:
        number = data.count(b"\n", 0, end - len(rest)) + 1
        raise OSError(f"In line {number} stands {rest.split()[0][:40]!r} where an object is expected")
