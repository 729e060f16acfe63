"""Names the fields for which a body is no strict JSON, and splits a batch that is none as a whole into its items."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

from telemetryd.errors import ErrorItem, InvalidBodyError

_MARK: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[\[\]{},]', re.DOTALL)
"""A string, or what parts and encloses values; of these alone the limits of an item are made.

A string that does not end takes all that follows, so that nothing is looked at twice.
"""
_BLANKS: Final = b" \t\r\n"
_RUNS: Final = re.compile(rb"\s*+:\s*+\[")
_MOST_FAULTS: Final = 50
"""Fields of one body, or of one item of a batch, that are named."""
_EXPLAINED_BYTES: Final = 1 << 20
"""The longest text that is decoded once more to name its fields: it takes memory that nobody counts, and time."""


class Items(NamedTuple):
    """The texts of a batch's items, and the text of what is around them."""

    texts: list[bytes]
    around: bytes


def split(body: bytes, most: int) -> Items | None:
    """Split an array, or an object with the array under `runs`, into its items, whatever stands inside of them.

    It takes a second for the largest body. No more than `most` and one are returned. None means that there are no items
    to be told apart: a bracket or a quote that is not closed, something after the end, or nothing between two commas.
    """
    start = array_start(body)
    if start is None:
        return None
    texts: list[bytes] = []
    begin, depth = start + 1, 0
    for mark in _MARK.finditer(body, start):
        sign = body[mark.start()]
        if sign in b"[{":
            depth += 1
        elif sign in b"]}":
            depth -= 1
        if (depth == 0 and sign in b"]}") or (depth == 1 and sign in b","):
            text = body[begin : mark.start()].strip(_BLANKS)
            begin = mark.end()
            if text or depth or texts:
                texts.append(text)
            if depth == 0 or len(texts) > most:
                around = body[:start] + b"[]" + body[begin:] if depth == 0 else b"[]"
                return Items(texts, around) if all(texts) else None
    return None


def array_start(body: bytes) -> int | None:
    """Return where the array begins: at once, or under `runs` in the object that the body begins with."""
    first = len(body) - len(body.lstrip(_BLANKS))
    if body[first : first + 1] == b"[":
        return first
    if body[first : first + 1] != b"{":
        return None
    depth = 0
    for mark in _MARK.finditer(body, first):
        sign = body[mark.start()]
        if sign in b"[{":
            depth += 1
        elif sign in b"]}":
            depth -= 1
            if not depth:
                return None
        elif depth == 1 and mark[0] == b'"runs"' and (array := _RUNS.match(body, mark.end())):
            return array.end() - 1
    return None


# --- What is wrong with a body -------------------------------------------------------------------


def explained(error: InvalidBodyError, text: bytes) -> InvalidBodyError:
    """Return an error that names the fields for which a text is no JSON.

    Strict JSON cannot hold half a surrogate pair, bad UTF-8, NaN or Infinity. If it is something else, such as a
    bracket that is missing, or the text is long, the same error is returned.
    """
    if len(text) > _EXPLAINED_BYTES:
        return error
    try:
        value = json.loads(text.decode("utf-8", "surrogateescape"), parse_constant=_NotANumber)
    except (ValueError, RecursionError):
        return error
    faults = [*islice(_faults(value), _MOST_FAULTS)]
    event_id = value.get("event_id") if isinstance(value, dict) else None
    named = event_id if isinstance(event_id, str) and is_unicode(event_id) else None
    return InvalidBodyError(faults, named) if faults else error


def _faults(value: object) -> Iterator[ErrorItem]:
    """Yield what is wrong with each field of an object, or of each object in an array."""
    for place, item in enumerate(value) if isinstance(value, list) else ((None, value),):
        fields: dict[Any, Any] = item if isinstance(item, dict) else {None: item}
        for name, held in fields.items():
            if not is_unicode(name):
                yield _fault((place, None), f"The name of a field {_NO_UNICODE}")
            elif (reason := next(filter(None, map(_reason, _values(held))), None)) is not None:
                yield _fault((place, name), reason)


_NO_UNICODE: Final = "holds half of a surrogate pair, or bytes that are not UTF-8"


class _NotANumber(str):
    """NaN, Infinity or -Infinity, which stand where only a number may."""

    __slots__ = ()


def is_unicode(text: object) -> bool:
    """Return whether a text, or whatever else it is, can be encoded."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(value: object) -> str | None:
    if isinstance(value, _NotANumber):
        return f"{value} is not a number in JSON"
    return None if not isinstance(value, str) or is_unicode(value) else f"String {_NO_UNICODE}"


def _values(value: object) -> Iterator[object]:
    """Yield everything that a value holds, its names included; without recursion, however deep it is."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value
            left += value.values()
        elif isinstance(value, list):
            left += value
        else:
            yield value


def _fault(place: tuple[int | None, str | None], message: str) -> ErrorItem:
    known = [part for part in place if part is not None]
    return {"loc": ["body", *known], "msg": message, "type": "json_invalid"}
