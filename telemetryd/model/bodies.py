"""Parses a request body into a validated model, or reports all its errors at once."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from telemetryd.errors import BodyTooLargeError, ErrorItem, InvalidBodyError
from telemetryd.model.values import LABEL_KEY, LABEL_KEYS, NO_BLANKS, NO_NUL, NOT_BLANK, kind_of, shorten

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
        raise InvalidBodyError([_item(_path(fault), _message(fault), fault["type"]) for fault in details]) from error


def validate_leniently(model: type[BaseModel], value: object) -> tuple[Any, tuple[str, ...]]:
    """Check a decoded body against a model, and take what 3.x took as well: nulls, whole floats, numbers as texts.

    Return what the body is, and what is to be said of the texts that were taken. Only what is wrong as it stands is
    looked at again, so it costs nothing elsewhere.

    Raises:
        InvalidBodyError: with every fault that is left.

    """
    try:
        return validate(model, value), ()
    except InvalidBodyError:
        if not isinstance(value, dict):
            raise
        return validate(model, _loosened(model, value)), _texts_in(model, value)


def _texts_in(model: type[BaseModel], value: dict[str, Any]) -> tuple[str, ...]:
    """Say which counts and truth values of a valid body were given as texts."""
    return tuple(
        f"Text taken as {'a number' if kind is int else 'true or false'}: {name}"
        for name, kind in _kinds(model).items()
        if type(value.get(name)) is str
    )


def _loosened(model: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """Return a body without what is not given, and with counts and truth values in the one form that is checked."""
    kinds = _kinds(model)
    known = {name: given for name, given in value.items() if given is not None or name not in model.model_fields}
    for name in known.keys() & kinds.keys():
        given = known[name]
        if kinds[name] is bool:
            known[name] = _TRUTHS.get(given.lower(), given) if isinstance(given, str) else given
        elif (isinstance(given, float) and given.is_integer()) or (isinstance(given, str) and _WHOLE.fullmatch(given)):
            known[name] = int(given)
    return known


_WHOLE: Final = re.compile(r"-?\d{1,19}", re.ASCII)
_TRUTHS: Final = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


@cache
def _kinds(model: type[BaseModel]) -> dict[str, type]:
    """Return the fields of a model that are counts or truth values."""
    kinds = {name: kind_of(field) for name, field in model.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if kind is not str}


_PATTERN_MESSAGES: Final = {
    NO_NUL: "String must not hold NUL characters",
    NOT_BLANK: "String must not be blank and must not hold NUL characters",
    NO_BLANKS: "String must not hold blanks or NUL characters",
    LABEL_KEY: f"The key of a label must be {LABEL_KEYS}",
}


def _message(fault: ErrorDetails) -> str:
    if fault["type"] == "model_type":
        return "Input should be a JSON object"
    if fault["type"] == "string_pattern_mismatch":
        return _PATTERN_MESSAGES[fault["ctx"]["pattern"]]
    return fault["msg"]


def _path(fault: ErrorDetails) -> list[str | int]:
    """Return where a fault is; a key of the client's own may be long, and that it is a key the message says."""
    loc = fault["loc"][:-1] if fault["loc"][-1:] == ("[key]",) else fault["loc"]
    return [shorten(part) if isinstance(part, str) else part for part in loc]


def _item(loc: list[str | int], message: str, kind: str) -> ErrorItem:
    return {"loc": ["body", *loc], "msg": message, "type": kind}


def under(error: InvalidBodyError, *place: str | int) -> list[ErrorItem]:
    """Return the faults of one item with their paths from the root of the whole body: `["body", 3, "status"]`."""
    return [_item([*place, *item["loc"][1:]], item["msg"], item["type"]) for item in error.errors]
