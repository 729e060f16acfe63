"""Parses a request body into a validated model, or reports all its errors at once."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from telemetryd.errors import BodyTooLargeError, ErrorItem, InvalidBodyError
from telemetryd.model.values import NO_NUL, NOT_BLANK

MAX_BODY_VALUES: Final = 1_000_000
"""Values in one JSON text; decoding takes at most about a tenth of a second for so many."""


def parse_json(text: bytes | str) -> object:
    """Decode a JSON text strictly (RFC 8259: no NaN, no lone surrogates); integers keep every digit.

    Raises:
        InvalidBodyError: one error of type `json_invalid` that says what is wrong, and where.

    """
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidBodyError([_item([], f"Invalid JSON: {error}", "json_invalid")]) from error


def parse_body(body: bytes) -> object:
    """Decode a body, or a line of one, like `parse_json`, unless it holds too much to be decoded at once.

    Raises:
        BodyTooLargeError: if it holds more than `MAX_BODY_VALUES` values.
        InvalidBodyError: one error of type `json_invalid` that says what is wrong, and where.

    """
    if holds_more_values(body, MAX_BODY_VALUES):
        raise BodyTooLargeError(f"A body must not hold more than {MAX_BODY_VALUES} JSON values; split it")
    return parse_json(body)


def holds_more_values(body: bytes, most: int) -> bool:
    """Return whether a JSON text holds more values than may be decoded at once.

    Decoding keeps the interpreter's lock, in a thread too, so everybody else would wait. Counting takes some
    hundredths of a second for 16 MiB.
    """
    if len(body) <= most or sum(map(body.count, _MARKS)) <= most:  # those inside of texts included
        return False
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 2 * most:
        return True
    outside = b"".join(plain.split(b'"')[::2])
    return sum(map(outside.count, _MARKS)) > most


_MARKS: Final = (b",", b"[", b"{")
"""One of these stands before every value except the first."""


def validate(model: type[BaseModel], value: object) -> Any:
    """Check a decoded body against a model.

    Raises:
        InvalidBodyError: with every fault of the body.

    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=False)
        raise InvalidBodyError(
            [_item(list(fault["loc"]), _message(fault), fault["type"]) for fault in details]
        ) from error


_PATTERN_MESSAGES: Final = {
    NO_NUL: "String must not hold NUL characters",
    NOT_BLANK: "String must not be blank and must not hold NUL characters",
    r"^[0-9A-Fa-f]+$": "String should hold hexadecimal digits only",
}


def _message(fault: ErrorDetails) -> str:
    if fault["type"] == "model_type":
        return "Input should be a JSON object"
    if fault["type"] == "string_pattern_mismatch":
        return _PATTERN_MESSAGES[fault["ctx"]["pattern"]]
    return fault["msg"]


def _item(loc: list[str | int], message: str, kind: str) -> ErrorItem:
    return {"loc": ["body", *loc], "msg": message, "type": kind}


def under(error: InvalidBodyError, *place: str | int) -> list[ErrorItem]:
    """Return the faults of one item with their paths from the root of the whole body: `["body", 3, "status"]`."""
    return [_item([*place, *item["loc"][1:]], item["msg"], item["type"]) for item in error.errors]
