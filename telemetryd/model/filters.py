"""The one parser of filters: which runs are meant, as frozen data without SQL, read from a query string."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from itertools import islice
from typing import Any, Final
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError

from telemetryd.errors import InvalidRequestError
from telemetryd.model.runs import FILTERS
from telemetryd.model.values import (
    MAX_INTEGER,
    Name,
    Status,
    canonical_status,
    canonical_timestamp,
    format_timestamp,
    shorten,
    utc_now,
)

MAX_VALUES: Final = 32
"""Values that one filter may have."""
MAX_TEXT: Final = 255
_MAX_DEPTH: Final = 8
_MAX_PARAMETERS: Final = 32
_MAX_TOLD: Final = 5
"""Unknown parameters that an error names."""

TIME_BOUNDS: Final = {
    "created_before": ("created_at", "<"),
    "created_after": ("created_at", ">"),
    "start_time_from": ("start_time", ">="),
    "start_time_to": ("start_time", "<="),
}
"""Each time parameter with the field and the comparison that it stands for."""

WILDCARD: Final = "agent_name"
"""The filter in which `*` stands for any text."""

_METRICS: Final = "metrics."
METRIC: Final = f"{_METRICS}NAME"
"""How the documentation calls the parameters that compare a field of metrics_json."""

PARAMETERS: Final = (*FILTERS, *TIME_BOUNDS, "min_duration_ms", "error", METRIC, "q")
"""Every parameter that is a filter, in the order in which faults are told."""

Pattern = tuple[str, ...]
"""The texts before, between and behind the wildcards of a pattern: `("foo", "")` is `foo*`."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A field of metrics_json, compared with a value of its own kind: a number, a text or a truth value.

    A run whose field is missing or of another kind does not match, whatever the operator.
    """

    path: tuple[str, ...]
    operator: str
    """One of `OPERATORS`."""
    value: str | float | bool

    def parameter(self) -> tuple[str, str]:
        """Return the comparison as the name and the value of a query parameter; no other comparison has that name."""
        value = f'"{self.value}"' if isinstance(self.value, str) else repr(self.value).lower()
        return f"{_METRICS}{'.'.join(self.path)}{self.operator}{value}", ""


OPERATORS: Final = (">=", "<=", "!=", "=", ">", "<")


@dataclass(frozen=True, slots=True)
class Filters:
    """Which runs are meant: those that match every filter, for each filter any of its values."""

    equal: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values that a field may have; a field with wildcards may match one of `patterns` instead."""
    bounds: Mapping[str, str] = field(default_factory=dict)
    """Moments in the stored form, by the names of `TIME_BOUNDS`."""
    patterns: tuple[Pattern, ...] = ()
    """Patterns for `WILDCARD`."""
    min_duration_ms: int | None = None
    error: str | None = None
    """What error_summary or error_details holds, in any case."""
    metrics: tuple[Comparison, ...] = ()
    words: str | None = None
    """What is searched for in the full-text index: words, `prefix*`, "phrases"; all of them."""

    @property
    def is_search(self) -> bool:
        """Whether there is a filter that no index in the order of created_at serves: runs are looked at one by one."""
        return bool(self.min_duration_ms is not None or self.error is not None or self.metrics or self.words)

    def lets_through(self, *fields: str) -> Callable[..., bool]:
        """Return what tells whether the values of these fields, in their order, are meant; other filters do not count.

        Names are the agents' own, so patterns are matched in linear time: a regular expression could take for ever.
        """
        tests = [
            (place, self.equal.get(name, ()), self.patterns if name == WILDCARD else ())
            for place, name in enumerate(fields)
            if self.equal.get(name) or (name == WILDCARD and self.patterns)
        ]

        @cache
        def is_meant(*values: str) -> bool:
            return all(
                values[place] in equal or any(matches(pattern, values[place]) for pattern in patterns)
                for place, equal, patterns in tests
            )

        return is_meant

    def parameters(self) -> dict[str, str | int]:
        """Return the filters as query parameters with canonical values, for the log and the next page."""
        given: dict[str, str | int] = {}
        for name in FILTERS:
            values = [quoted(value) for value in self.equal.get(name, ())]
            if name == WILDCARD:
                values += ["*".join(map(quoted, pattern)) for pattern in self.patterns]
            if values:
                given[name] = ",".join(values)
        given |= self.bounds
        if self.min_duration_ms is not None:
            given["min_duration_ms"] = self.min_duration_ms
        if self.error is not None:
            given["error"] = self.error
        given |= dict(comparison.parameter() for comparison in self.metrics)
        if self.words is not None:
            given["q"] = self.words
        return given


_SPECIAL: Final = re.compile(r"\\([\\,*])|([,*])")


def quoted(value: str) -> str:
    """Return a value as it stands in a filter: a comma, an asterisk or a backslash of its own behind a backslash."""
    return re.sub(r"[\\,*]", r"\\\g<0>", value)


def _split_values(text: str, *, wildcards: bool) -> list[Pattern]:
    """Return the values of a filter; one that is no pattern has a single piece."""
    values, begin = [[""]], 0
    for special in _SPECIAL.finditer(text):
        values[-1][-1] += text[begin : special.start()]
        begin = special.end()
        if special[2] == ",":
            values.append([""])
        elif special[2] == "*" and wildcards:
            values[-1].append("")
        else:
            values[-1][-1] += special[1] or special[2]
    values[-1][-1] += text[begin:]
    return [tuple(pieces) for pieces in values]


def matches(pattern: Pattern, text: str) -> bool:
    """Tell whether a text matches a pattern, in a time that grows only with their lengths."""
    first, *middle, last = pattern
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return False
    place, end = len(first), len(text) - len(last)
    for piece in middle:  # each as far in front as possible leaves most room for those behind it
        place = text.find(piece, place, end)
        if place < 0:
            return False
        place += len(piece)
    return True


class Parameters:
    """The parameters of one query string, and what is wrong with them: everything is told at once, by `finish`."""

    def __init__(self, query_string: str, allowed: tuple[str, ...]) -> None:
        """Split a query string strictly: valid UTF-8, known names, each once.

        Raises:
            InvalidRequestError: if it cannot be split at all.

        """
        self.given: dict[str, str] = {}
        """The value of each parameter, by its name."""
        self.faults: list[str] = []
        """A sentence for each fault that names the parameter, the value and what is allowed."""
        self._metrics: list[str] = []
        try:
            pairs = parse_qsl(query_string, keep_blank_values=True, errors="strict", max_num_fields=_MAX_PARAMETERS)
        except UnicodeDecodeError as error:
            raise InvalidRequestError("The query string must be percent-encoded UTF-8") from error
        except ValueError as error:
            raise InvalidRequestError(
                f"The query string must not hold more than {_MAX_PARAMETERS} parameters"
            ) from error
        unknown: dict[str, None] = {}
        repeated: dict[str, None] = {}
        for name, value in pairs:
            if METRIC in allowed and name.startswith(_METRICS):
                # The sign of equality parts the name and the value; ">" and "<" may stand on either side of it.
                text = f"{name}={value}" if value else name
                if text in self._metrics:
                    repeated[shorten(name)] = None
                else:
                    self._metrics.append(text)
            elif name not in allowed:
                unknown[repr(shorten(name))] = None
            elif name in self.given:
                repeated[name] = None
            else:
                self.given[name] = value
        for name in repeated:
            self.given.pop(name, None)  # which of its values was meant?
        self.faults += [f"Query parameter {name} is given more than once; give it once" for name in repeated]
        if unknown:
            known = ", ".join(allowed) or "none"
            self.faults.append(f"Unknown query parameter {', '.join(islice(unknown, _MAX_TOLD))}; known are: {known}")

    def read(self, name: str, parse: Callable[..., Any], *details: object, default: Any = None) -> Any:
        """Return a parameter's value as `parse(name, text, *details)` reads it, or the default."""
        if name not in self.given:
            return default
        try:
            return parse(name, self.given[name], *details)
        except InvalidRequestError as error:
            self.faults.append(str(error))
            return default

    def read_filters(self, clock: Callable[[], datetime] = utc_now) -> Filters:
        """Return the filters; every relative time of a request counts from one reading of the clock."""
        now = clock()
        equal: dict[str, tuple[str, ...]] = {}
        patterns: tuple[Pattern, ...] = ()
        for name in FILTERS:
            values, found = self.read(name, _values, default=((), ()))
            if values:
                equal[name] = values
            patterns += found
        bounds = {name: moment for name in TIME_BOUNDS if (moment := self.read(name, read_moment, now)) is not None}
        shortest = self.read("min_duration_ms", read_integer, 0, MAX_INTEGER)
        error = self.read("error", read_text)
        metrics = []
        for text in self._metrics:
            try:
                metrics.append(_comparison(text))
            except InvalidRequestError as fault:
                self.faults.append(str(fault))
        return Filters(equal, bounds, patterns, shortest, error, tuple(metrics), self.read("q", _words))

    def finish(self) -> None:
        """Tell every fault.

        Raises:
            InvalidRequestError: if there is one.

        """
        if self.faults:
            raise InvalidRequestError(". ".join(self.faults))


def parse_filters(
    query_string: str, others: tuple[str, ...] = (), clock: Callable[[], datetime] = utc_now
) -> tuple[Filters, dict[str, str]]:
    """Read a query string of filters and of some other parameters; return these as they are.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    parameters = Parameters(query_string, (*PARAMETERS, *others))
    filters = parameters.read_filters(clock)
    parameters.finish()
    return filters, {name: text for name, text in parameters.given.items() if name in others}


def refuse(name: str, value: str, allowed: str) -> InvalidRequestError:
    """Return the error for a parameter's value, which says what would be allowed."""
    return InvalidRequestError(f"Invalid {name}: {shorten(value)!r}; it must be {allowed}")


# --- Values --------------------------------------------------------------------------------------

_NAME: Final = TypeAdapter(Name)


def read_text(name: str, value: str) -> str:
    """Read a text of some length without NUL; raise InvalidRequestError if it is none."""
    try:
        return _NAME.validate_python(value)
    except ValidationError as error:
        raise refuse(name, value, f"1 to {MAX_TEXT} characters, not only blanks, without NUL") from error


def _status(name: str, value: str) -> str:
    try:
        return canonical_status(value)
    except ValueError as error:
        raise refuse(name, value, f"one of {', '.join(Status)}") from error


_PARSERS: Final = {"status": _status}


def _values(name: str, text: str) -> tuple[tuple[str, ...], tuple[Pattern, ...]]:
    """Return a filter's values and its patterns, each once."""
    parse = _PARSERS.get(name, read_text)
    values: dict[str, None] = {}
    patterns: dict[Pattern, None] = {}
    split = _split_values(text, wildcards=name == WILDCARD)
    if len(split) > MAX_VALUES:
        raise refuse(name, text, f"at most {MAX_VALUES} values")
    for pieces in split:
        if len(pieces) == 1:
            values[parse(name, pieces[0])] = None
        else:
            read_text(name, "*".join(pieces))
            patterns[pieces] = None
    return tuple(values), tuple(patterns)


# A "+" that was not percent-encoded arrives as a blank: "…T10:00:00 00:00" can only mean "+00:00".
_LOST_PLUS: Final = re.compile(r"([Tt ]\d\d[\d:.,]*) (\d\d:?\d\d)", re.ASCII)

_RELATIVE: Final = re.compile(r"now|-(\d{1,9})([smhdw])", re.ASCII)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def read_moment(name: str, value: str, now: datetime) -> str:
    """Read a date and time, or a time before now such as `-2h`, in the stored form; `now` is now.

    Raises:
        InvalidRequestError: if it is neither.

    """
    try:
        if relative := _RELATIVE.fullmatch(value):
            ago = timedelta(**{_UNITS[relative[2]]: int(relative[1])}) if relative[1] else timedelta()
            return format_timestamp(now - ago)
        return canonical_timestamp(_LOST_PLUS.sub(r"\1+\2", value))
    except (ValueError, OverflowError) as error:
        allowed = "an ISO 8601 date and time such as 2025-12-24T10:00:00Z, an age such as -24h or -30d, or now"
        raise refuse(name, value, allowed) from error


def read_integer(name: str, value: str, low: int, high: int) -> int:
    """Read an integer within bounds; raise InvalidRequestError if it is none."""
    if re.fullmatch(r"[0-9]{1,19}", value) is None or not low <= int(value) <= high:
        raise refuse(name, value, f"an integer from {low} to {high}")
    return int(value)


def _words(name: str, value: str) -> str:
    text = read_text(name, value)
    if re.search(r"[^\W_]", text) is None:
        raise refuse(name, value, 'words, prefix* or "phrases" with letters or digits')
    return text


_COMPARISON: Final = re.compile(rf"([^<>=!]*)({'|'.join(OPERATORS)})(.*)", re.DOTALL)
_KEY: Final = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER: Final = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_AS_IN: Final = f"as in {_METRICS}tokens>1000"


def _comparison(text: str) -> Comparison:
    parts = _COMPARISON.fullmatch(text)
    if parts is None:
        raise refuse(shorten(text), "", f"followed by {' '.join(OPERATORS)} and a value, {_AS_IN}")
    name, operator, value = shorten(parts[1]), parts[2], parts[3]
    path = tuple(parts[1].removeprefix(_METRICS).split("."))
    if len(path) > _MAX_DEPTH or len(parts[1]) > MAX_TEXT or not all(map(_KEY.fullmatch, path)):
        raise refuse(
            name, value, f"at most {_MAX_DEPTH} keys and {MAX_TEXT} characters, without quotes or blank keys, {_AS_IN}"
        )
    return Comparison(path, operator, _metric(name, value))


def _metric(name: str, value: str) -> str | float | bool:
    if len(value) > 2 and value[0] == value[-1] == '"':
        return read_text(name, value[1:-1])
    if value in ("true", "false"):
        return value == "true"
    if len(value) > MAX_TEXT or _NUMBER.fullmatch(value) is None:
        return read_text(name, value)
    if re.fullmatch(r"-?\d{1,19}", value) and -MAX_INTEGER <= int(value) <= MAX_INTEGER:
        return int(value)
    number = float(value)
    if number - number != 0.0:
        raise refuse(name, value, "a number of 64 bits")
    return number
