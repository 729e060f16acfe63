"""Query parameters: each is declared once, with how it is read and how the OpenAPI document describes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Final, Generic, TypeVar
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError

from telemetryd.errors import InvalidRequestError
from telemetryd.model.values import MAX_INTEGER, Name, canonical_timestamp, format_timestamp, shorten

T = TypeVar("T")
Schema = Mapping[str, Any]

MAX_TEXT: Final = 255
_MAX_PARAMETERS: Final = 32
_MAX_NAMED: Final = 5
"""Unknown parameters that an error names."""


@dataclass(frozen=True, slots=True)
class Parameter(Generic[T]):
    """One query parameter.

    Args:
        name: as it stands in the query string; one that ends in `.NAME` stands for all names with that beginning.
        text: what it does, for the OpenAPI document.
        schema: its JSON Schema.
        read: reads its text; given the name, the text and the moment, from which relative times count. It raises
            `InvalidRequestError` (see `refuse`) where the text is not allowed.
        default: what stands for the text where it is not given.

    """

    name: str
    text: str
    schema: Schema
    read: Callable[[str, str, datetime], T]
    default: str | None = None

    @property
    def prefix(self) -> str | None:
        """What the names begin with that it stands for, or None if it is only its own."""
        return self.name.removesuffix("NAME") if self.name.endswith(".NAME") else None

    def described(self, text: str | None = None) -> Parameter[T]:
        """Return the same parameter with another text."""
        return self if text is None else replace(self, text=text)

    def to_json(self) -> dict[str, Any]:
        """Return it as the OpenAPI document has it; one that stands for many names is an object of them all."""
        described = {
            "name": self.name,
            "in": "query",
            "required": False,
            "description": self.text,
            "schema": {**self.schema},
        }
        if self.prefix is not None:
            described |= {"name": self.prefix.rstrip("."), "style": "form", "explode": True}
        return described


class Given:
    """The parameters of one query string, and what is wrong with them: everything is reported at once, by `finish`."""

    def __init__(self, query_string: str, allowed: Sequence[Parameter[Any]], now: datetime) -> None:
        """Split a query string strictly: valid UTF-8, known names, each once.

        Raises:
            InvalidRequestError: if it cannot be split at all.

        """
        self.texts: dict[str, str] = {}
        """The text of each parameter that is given, by its name."""
        self.faults: list[str] = []
        """A sentence for each fault that names the parameter, the value and what is allowed."""
        self.prefixed: dict[str, list[str]] = {}
        """The name and the text of each prefix's parameters, with the equals sign between them."""
        self._now = now
        try:
            pairs = parse_qsl(query_string, keep_blank_values=True, errors="strict", max_num_fields=_MAX_PARAMETERS)
        except UnicodeDecodeError as error:
            raise InvalidRequestError("The query string must be percent-encoded UTF-8") from error
        except ValueError as error:
            raise InvalidRequestError(
                f"The query string must not hold more than {_MAX_PARAMETERS} parameters"
            ) from error
        names = {parameter.name for parameter in allowed}
        prefixes = tuple(parameter.prefix for parameter in allowed if parameter.prefix is not None)
        unknown: dict[str, None] = {}
        repeated: dict[str, None] = {}
        for name, text in pairs:
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is not None:
                # The sign of equality parts the name and the value; other signs may stand on either side of it.
                whole = f"{name}={text}" if text else name
                if whole in (known := self.prefixed.setdefault(prefix, [])):
                    repeated[shorten(name)] = None
                else:
                    known.append(whole)
            elif name not in names:
                unknown[repr(shorten(name))] = None
            elif name in self.texts:
                repeated[name] = None
            else:
                self.texts[name] = text
        for name in repeated:
            self.texts.pop(name, None)  # which of its values was meant?
        self.faults += map(given_twice, repeated)
        if unknown:
            listed = ", ".join(parameter.name for parameter in allowed) or "none"
            self.faults.append(f"Unknown query parameter {', '.join(islice(unknown, _MAX_NAMED))}; known are: {listed}")

    def get(self, parameter: Parameter[T]) -> T | None:
        """Return a parameter's value, or None if it is not given, has no default, or is wrong."""
        text = self.texts.get(parameter.name, parameter.default)
        return None if text is None else self.attempt(parameter.read, parameter.name, text, self._now)

    def value(self, parameter: Parameter[T], otherwise: T) -> T:
        """Return a parameter's value, or something else where `get` returns None."""
        value = self.get(parameter)
        return otherwise if value is None else value

    def each(self, parameter: Parameter[T]) -> tuple[T, ...]:
        """Return the values of all parameters that one which ends in `.NAME` stands for."""
        texts = self.prefixed.get(parameter.prefix or "", ())
        read = (self.attempt(parameter.read, parameter.name, text, self._now) for text in texts)
        return tuple(value for value in read if value is not None)

    def attempt(self, read: Callable[..., T], *arguments: Any) -> T | None:
        """Return what a function reads, or None if it refuses: then that is one of the faults."""
        try:
            return read(*arguments)
        except InvalidRequestError as error:
            self.faults.append(str(error))
            return None

    def finish(self) -> None:
        """Report every fault.

        Raises:
            InvalidRequestError: if there is one.

        """
        if self.faults:
            raise InvalidRequestError(". ".join(self.faults))


def given_twice(name: str) -> str:
    """Return the sentence about a parameter that may be given once."""
    return f"Query parameter {name} is given more than once; give it once"


def refuse(name: str, value: str, allowed: str) -> InvalidRequestError:
    """Return the error for a parameter's value, which says what would be allowed."""
    return InvalidRequestError(f"Invalid {name}: {shorten(value)!r}; it must be {allowed}")


def accept_none(query_string: str, now: datetime) -> None:
    """See that a query string is empty.

    Raises:
        InvalidRequestError: if it holds a parameter.

    """
    Given(query_string, (), now).finish()


# --- Kinds of values -----------------------------------------------------------------------------

TEXT: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
_NAME: Final = TypeAdapter(Name)


def read_text(name: str, value: str, now: datetime | None = None) -> str:
    """Read a text of some length without NUL; raise InvalidRequestError if it is none."""
    try:
        return _NAME.validate_python(value)
    except ValidationError as error:
        raise refuse(name, value, f"1 to {MAX_TEXT} characters, not only blanks, without NUL") from error


# A "+" that was not percent-encoded arrives as a blank: "…T10:00:00 00:00" can only mean "+00:00".
_LOST_PLUS: Final = re.compile(r"([Tt ]\d\d[\d:.,]*) (\d\d:?\d\d)", re.ASCII)

_DATE: Final = re.compile(r"\d{4}-?\d\d-?\d\d", re.ASCII)
_RELATIVE: Final = re.compile(r"now|-(\d{1,9})([smhdw])", re.ASCII)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def read_moment(name: str, value: str, now: datetime) -> str:
    """Read a date (midnight UTC), a date and time, or a time before now such as `-2h`, in the stored form.

    Raises:
        InvalidRequestError: if it is neither.

    """
    try:
        if relative := _RELATIVE.fullmatch(value):
            ago = timedelta(**{_UNITS[relative[2]]: int(relative[1])}) if relative[1] else timedelta()
            return format_timestamp(now - ago)
        if _DATE.fullmatch(value):
            return canonical_timestamp(f"{value}T00:00:00Z" if "-" in value else f"{value}T000000Z")
        return canonical_timestamp(_LOST_PLUS.sub(r"\1+\2", value))
    except (ValueError, OverflowError) as error:
        allowed = "an ISO 8601 date and time such as 2025-12-24T10:00:00Z, a date, an age such as -24h or -30d, or now"
        raise refuse(name, value, allowed) from error


def integer(name: str, text: str, low: int = 0, high: int = MAX_INTEGER, default: int | None = None) -> Parameter[int]:
    """Return a parameter that is an integer within bounds."""

    def read(name: str, value: str, now: datetime) -> int:
        if re.fullmatch(r"[0-9]{1,19}", value) is None or not low <= int(value) <= high:
            raise refuse(name, value, f"an integer from {low} to {high}")
        return int(value)

    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high}
    if default is not None:
        schema["default"] = default
    return Parameter(name, text, schema, read, None if default is None else str(default))


W = TypeVar("W", bound=str)


def word(name: str, text: str, allowed: Iterable[W], otherwise: str = "") -> Parameter[W]:
    """Return a parameter that is one of some words.

    Args:
        name: its name.
        text: what it does.
        allowed: the words.
        otherwise: how an error says what is allowed; else it lists the words.

    """
    words = {str(each): each for each in allowed}

    def read(name: str, value: str, now: datetime) -> W:
        if value not in words:
            raise refuse(name, value, otherwise or f"one of {', '.join(words)}" if len(words) > 1 else value_of_one)
        return words[value]

    value_of_one = next(iter(words))
    return Parameter(name, text, {"type": "string", "enum": list(words)}, read)


def moment(name: str, text: str, default: str | None = None) -> Parameter[str]:
    """Return a parameter that is a moment, read in the stored form."""
    schema = {"type": "string", "minLength": 1} if default is None else {"type": "string", "default": default}
    return Parameter(name, text, schema, read_moment, default)
