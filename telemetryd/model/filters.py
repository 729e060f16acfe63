"""The one parser of filters: selects runs from a query string, as frozen data without SQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Final

from telemetryd.model.parameters import (
    MAX_TEXT,
    TEXT,
    Given,
    Parameter,
    given_twice,
    integer,
    moment,
    read_text,
    refuse,
)
from telemetryd.model.runs import FILTERS, Run
from telemetryd.model.values import (
    LABEL_KEY,
    LABEL_KEYS,
    MAX_INTEGER,
    MAX_LABEL_KEY,
    STATUSES_PATTERN,
    Status,
    canonical_status,
    component,
    shorten,
)

MAX_VALUES: Final = 32
"""Values that one filter may have."""
_MAX_DEPTH: Final = 8

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
_LABELS: Final = "label."
LABEL: Final = f"{_LABELS}NAME"
"""How the documentation calls the parameters that choose by a label."""

Pattern = tuple[str, ...]
"""The texts before, between and after the wildcards of a pattern: `("foo", "")` is `foo*`."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A field of metrics_json, compared with a value of the same kind: a number, a text or a truth value.

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
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values that a label may have."""
    words: str | None = None
    """What is searched for in the full-text index: words, `prefix*`, "phrases"; all of them."""

    @property
    def is_search(self) -> bool:
        """Whether there is a filter that no index in the order of created_at serves: runs are looked at one by one."""
        return bool(self.min_duration_ms is not None or self.error is not None or self.metrics or self.words)

    def lets_through(self, *fields: str) -> Callable[..., bool]:
        """Return a predicate: whether the values of these fields, in order, are meant; other filters do not count.

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
        given |= {label_parameter(key): ",".join(map(quoted, values)) for key, values in self.labels.items()}
        if self.words is not None:
            given["q"] = self.words
        return given


def label_parameter(key: str) -> str:
    """Return the name of the parameter that chooses by a label."""
    return f"{_LABELS}{key}"


def for_log(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with keys that nobody can invent: all comparisons of metrics_json are values of one.

    So are all labels.
    """
    plain: dict[str, Any] = {}
    for name, value in parameters.items():
        prefix = next((prefix for prefix in (_METRICS, _LABELS) if name.startswith(prefix)), None)
        if prefix is None:
            plain[name] = value
        else:
            text = f"{name}={value}" if value else name
            plain.setdefault(prefix.rstrip("."), []).append(text.removeprefix(prefix))
    return plain


_SPECIAL: Final = re.compile(r"\\([\\,*])|([,*])")


def quoted(value: str) -> str:
    """Return a value as it stands in a filter: a comma, an asterisk or a backslash in it is escaped."""
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
    """Return whether a text matches a pattern, in a time that grows only with their lengths."""
    first, *middle, last = pattern
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return False
    place, end = len(first), len(text) - len(last)
    for piece in middle:  # each as far in front as possible leaves most room for those after it
        place = text.find(piece, place, end)
        if place < 0:
            return False
        place += len(piece)
    return True


# --- Values --------------------------------------------------------------------------------------


def _status(name: str, value: str) -> str:
    try:
        return canonical_status(value)
    except ValueError as error:
        raise refuse(name, value, f"one of {', '.join(Status)}") from error


_PARSERS: Final = {"status": _status}


def _read_values(name: str, text: str, now: datetime) -> Values:
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


def _read_words(name: str, value: str, now: datetime) -> str:
    text = read_text(name, value)
    if re.search(r"[^\W_]", text) is None:
        raise refuse(name, value, 'words, prefix* or "phrases" with letters or digits')
    return text


_COMPARISON: Final = re.compile(r"([^<>=!]*)([<>=!]+)(.*)", re.DOTALL)
_SIGNS: Final = {
    **{operator: operator for operator in OPERATORS},
    **{f"{operator}=": operator for operator in (">=", "<=", "!=", "=")},  # the operator ends the name
    **{f"={operator}": operator for operator in OPERATORS},  # the operator begins the value
    "===": "=",
}
"""What may stand between a name and a value: libraries send a key and a value, and put an equals sign between them."""
_KEY: Final = re.compile(r'(?!\s)[^"\\\x00-\x1f]+(?<!\s)')
_NUMBER: Final = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_AS_IN: Final = f"as in {_METRICS}tokens>1000"
_AS_LABEL: Final = f"{_LABELS}team=search"


def _comparison(text: str) -> Comparison:
    parts = _COMPARISON.fullmatch(text)
    if parts is None:
        raise refuse(shorten(text), "", f"followed by {' '.join(OPERATORS)} and a value, {_AS_IN}")
    name, operator, value = shorten(parts[1]), _SIGNS.get(parts[2]), parts[3].strip()
    if operator is None:
        raise refuse(
            name,
            parts[2] + value,
            f"one of {' '.join(OPERATORS)} and a value, {_AS_IN}; a text that begins with such a sign stands in quotes",
        )
    path = tuple(parts[1].removeprefix(_METRICS).split("."))
    if len(path) > _MAX_DEPTH or len(parts[1]) > MAX_TEXT or not all(map(_KEY.fullmatch, path)):
        raise refuse(
            name,
            value,
            f"at most {_MAX_DEPTH} keys and {MAX_TEXT} characters, without quotes or blanks around a key, {_AS_IN}",
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


_LABEL_KEY: Final = re.compile(rf"(?=.{{1,{MAX_LABEL_KEY}}}$){LABEL_KEY}", re.ASCII)


def _label(name: str, text: str, now: datetime) -> tuple[str, tuple[str, ...]]:
    given, _, value = text.partition("=")
    key = given.removeprefix(_LABELS)
    if _LABEL_KEY.fullmatch(key) is None:
        raise refuse(shorten(given), value, f"{_LABELS} and the key of a label ({LABEL_KEYS}), as in {_AS_LABEL}")
    return key, _read_values(label_parameter(key), value, now)[0]


# --- The parameters that are filters -------------------------------------------------------------

Values = tuple[tuple[str, ...], tuple[Pattern, ...]]
"""The values of a filter, and its patterns."""


def _filter_parameter(name: str) -> Parameter[Values]:
    """Return the parameter that chooses by the value of a field."""
    wildcards = ", in which * stands for any text" if name == WILDCARD else ""
    own = "comma, asterisk or backslash" if name == WILDCARD else "comma or backslash"
    escapes = "" if name == "status" else rf" A {own} of the value's own is escaped with a backslash: a\,b."
    text = (
        f"Only this {name}, or one of several with commas between them{wildcards}.{escapes} "
        f"{Run.model_fields[name].description}"
    )
    one: dict[str, Any] = (
        {"type": "string", "pattern": STATUSES_PATTERN, "examples": ["failure,timeout"]}
        if name == "status"
        else {"type": "string", "minLength": 1}
    )
    return Parameter(name, text, one, _read_values)


METRIC_PARAMETER: Final[Parameter[Comparison]] = Parameter(
    METRIC,
    "Only runs with such a value in metrics_json. NAME is its key (with dots for keys inside of keys), and the "
    f"sign may also be another one of {' '.join(OPERATORS)}: metrics.tokens>1000. Where a library takes keys and "
    "values, the value begins with the sign: metrics.tokens and >1000.",
    component(
        "MetricFilters",
        {
            "type": "object",
            "propertyNames": {"pattern": rf"^{re.escape(_METRICS)}[^<>=!]+"},
            "additionalProperties": TEXT,
            "examples": [{f"{_METRICS}tokens": "1000"}],
            "description": "Values in metrics_json, by the names of query parameters, which keep their beginning.",
        },
    ),
    lambda name, text, now: _comparison(text),
)
LABEL_PARAMETER: Final[Parameter[tuple[str, tuple[str, ...]]]] = Parameter(
    LABEL,
    f"Only runs whose label NAME has this value, or one of several with commas between them: {_AS_LABEL}.",
    component(
        "LabelFilters",
        {
            "type": "object",
            "propertyNames": {"pattern": rf"^{re.escape(_LABELS)}[a-z0-9]"},
            "additionalProperties": TEXT,
            "examples": [{label_parameter("team"): "search"}],
            "description": "Values of labels, by the names of query parameters, which keep their beginning.",
        },
    ),
    _label,
)
FILTER_PARAMETERS: Final = {name: _filter_parameter(name) for name in FILTERS}
"""The parameters that choose by the value of a field, by the field's name."""
BOUNDING: Final = {
    name: moment(name, f"Only runs with {column} {comparison} this: a moment, now, or a time ago such as -2h.")
    for name, (column, comparison) in TIME_BOUNDS.items()
}
MIN_DURATION: Final = integer("min_duration_ms", "Only runs that took so many milliseconds or more.")
ERROR: Final = Parameter(
    "error", "Only runs whose error_summary or error_details holds this text, in any case.", TEXT, read_text
)
WORDS: Final = Parameter(
    "q", 'Only runs with these words, prefix* and "phrases" in their summaries or errors.', TEXT, _read_words
)

PARAMETERS: Final[tuple[Parameter[Any], ...]] = (
    *FILTER_PARAMETERS.values(),
    *BOUNDING.values(),
    MIN_DURATION,
    ERROR,
    METRIC_PARAMETER,
    LABEL_PARAMETER,
    WORDS,
)
"""Every parameter that is a filter, in the order in which errors are reported."""


def read_filters(given: Given) -> Filters:
    """Return the filters that a query string holds."""
    equal: dict[str, tuple[str, ...]] = {}
    patterns: tuple[Pattern, ...] = ()
    for name, parameter in FILTER_PARAMETERS.items():
        values, found = given.value(parameter, ((), ()))
        if values:
            equal[name] = values
        patterns += found
    bounds = {name: moment for name, bound in BOUNDING.items() if (moment := given.get(bound)) is not None}
    shortest, error = given.get(MIN_DURATION), given.get(ERROR)
    compared = given.each(METRIC_PARAMETER)
    labels: dict[str, tuple[str, ...]] = {}
    for key, wanted in given.each(LABEL_PARAMETER):
        if key in labels:
            given.faults.append(given_twice(label_parameter(key)))
        labels[key] = wanted
    return Filters(equal, bounds, patterns, shortest, error, compared, labels, given.get(WORDS))
