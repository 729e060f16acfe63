"""Types of field values: names, texts, counts, times and statuses, each with its check and stored form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from enum import Flag, StrEnum, auto
from typing import Annotated, Any, Final, get_args, get_origin

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from telemetryd import timestamps

SqlValue = str | int | None


Row = tuple[SqlValue, ...]
"""The values of one run to be stored, in the order of `STORED`."""


MAX_INTEGER: Final = 2**63 - 1


MAX_JSON_DEPTH: Final = 64


MAX_JSON_VALUES: Final = 100_000
"""Values in one JSON object of an agent's own; to look at so many takes some 20 ms, in which nobody is answered."""


MAX_ECHO: Final = 200


class Status(StrEnum):
    """How a run stands or ended."""

    RUNNING = "running"
    SUCCESS = "success"
    FAILURE = "failure"
    PARTIAL = "partial"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"


class CommitSource(StrEnum):
    """Who made the commit that a run led to."""

    MANUAL = "manual"
    LLM = "llm"
    CI = "ci"


STATUS_ALIASES: Final = {
    "failed": Status.FAILURE,
    "completed": Status.SUCCESS,
    "succeeded": Status.SUCCESS,
    "canceled": Status.CANCELLED,
}


_STATUSES: Final = {str(status): str(status) for status in Status} | {
    alias: str(status) for alias, status in STATUS_ALIASES.items()
}


def canonical_status(value: object) -> str:
    """Return the stored form of a status; case, surrounding blanks and aliases are forgiven.

    Raises:
        ValueError: with the sentence of the guide that lists the allowed values.

    """
    if isinstance(value, str):
        status = _STATUSES.get(value) or _STATUSES.get(value.strip().lower())
        if status is not None:
            return status
    raise PydanticCustomError("value_error", f"Status must be one of: {[str(s) for s in Status]}")


def _commit_source(value: str) -> str:
    if value in set(CommitSource):
        return value
    raise PydanticCustomError("value_error", f"Commit source must be one of: {[str(s) for s in CommitSource]}")


format_timestamp: Final = timestamps.format_timestamp


def utc_now() -> datetime:
    """Return the present moment; the daemon's clock unless a test passes another."""
    return datetime.now(UTC)


def canonical_timestamp(text: str) -> str:
    """Return any ISO 8601 / RFC 3339 date and time in the stored form; digits past 1 µs are cut.

    Raises:
        ValueError: if the text is no such date and time, or falls outside the years 1 to 9999 in UTC.

    """
    stored = timestamps.canonical(text)
    if stored is None:
        rule = "must be an ISO 8601 date and time such as 2025-12-24T10:00:00Z (without an offset it is taken as UTC)"
        raise PydanticCustomError("value_error", f"Timestamp {rule}")
    return stored


_TOO_MUCH: Final = f"holds more than {MAX_JSON_VALUES} keys and values"


def _is_plain(value: dict[str, Any]) -> bool:
    """Return whether an object holds a few values that can be stored, and no list or object; nearly all do."""
    if len(value) > _PLAIN_KEYS:
        return False
    for name, part in value.items():
        kind = type(part)
        if kind is str:
            if "\0" in part:
                return False
        elif kind is float:
            if part - part != 0.0:
                return False
        elif kind is dict or kind is list:
            return False
        if "\0" in name:
            return False
    return True


_PLAIN_KEYS: Final = 100


def _unstorable(value: object, depth: int, left: Iterator[int]) -> str | None:
    """Say why a decoded JSON value cannot be stored, or return None; each value in it takes one out of `left`."""
    if isinstance(value, str):
        return "holds a NUL character" if "\0" in value else None
    if isinstance(value, float):
        return None if value - value == 0.0 else "holds a number that is not finite"
    if not isinstance(value, (dict, list)):
        return None
    if depth == 0:
        return f"is nested more than {MAX_JSON_DEPTH} levels deep"
    for child in (part for item in value.items() for part in item) if isinstance(value, dict) else value:
        is_too_much = next(left, None) is None
        fault = _TOO_MUCH if is_too_much else _unstorable(child, depth - 1, left)
        if fault is not None:
            return fault
    return None


def json_text(value: object) -> str | None:
    """Return a decoded JSON object as the text that is stored: `{"tokens":5}`.

    Raises:
        ValueError: with the reason why it cannot be stored.

    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "Input should be a JSON object")
    fault = None if _is_plain(value) else _unstorable(value, MAX_JSON_DEPTH, iter(range(MAX_JSON_VALUES)))
    if fault is not None:
        raise PydanticCustomError("value_error", f"JSON object {fault}")
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise PydanticCustomError("value_error", "JSON object holds an integer of more than 64 bits") from error


MAX_LABELS: Final = 32
"""Labels of one run."""
MAX_LABEL_KEY: Final = 63
MAX_LABEL_VALUE: Final = 255
LABEL_KEY: Final = r"^[a-z0-9][a-z0-9_.-]*$"
LABEL_KEYS: Final = f"1 to {MAX_LABEL_KEY} characters of a-z, 0-9, _, . and -, the first one a letter or a digit"


def _few(value: object) -> object:
    """Look at how many labels there are before each of them is looked at."""
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "Input should be a JSON object")
    if len(value) > MAX_LABELS:
        raise PydanticCustomError("too_long", f"A run has at most {MAX_LABELS} labels")
    return value


def labels_text(labels: Mapping[str, str | None]) -> str | None:
    """Return labels as the text that is stored, in the order of their keys; None if there are none."""
    given = {key: value for key, value in sorted(labels.items()) if value is not None}
    return orjson.dumps(given).decode() if given else None


def _label_changes(labels: Mapping[str, str | None]) -> str | None:
    return orjson.dumps(labels).decode() if labels else None


def merge_labels(stored: str | None, changes: str) -> str | None:
    """Return labels after a JSON Merge Patch (RFC 7396): null removes a key, other keys stay as they are."""
    return labels_text({**orjson.loads(stored or "{}"), **orjson.loads(changes)})


def count_labels(stored: SqlValue) -> int:
    """Return how many labels there are."""
    return len(orjson.loads(str(stored or "{}")))


def _hex_id(digits: int) -> AfterValidator:
    """Return the check of an id of W3C Trace Context."""
    is_id = re.compile(rf"(?!0+$)[0-9a-f]{{{digits}}}", re.ASCII).fullmatch

    def check(text: str) -> str:
        if is_id(text) is None:
            rule = f"must be {digits} lower-case hexadecimal digits, not all of them 0"
            raise PydanticCustomError("value_error", f"Id {rule} (W3C Trace Context)")
        return text

    return AfterValidator(check)


def _flag(value: object) -> bool:
    if value in (0, 1) and isinstance(value, int):
        return bool(value)
    raise PydanticCustomError("bool_type", "Input should be true or false")


COMPONENT: Final = "x-component"
"""The key under which a schema has the name of the OpenAPI document's component that it stands for, and its schema."""


def component(name: str, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a JSON Schema that stands for a component of the document; one that is made elsewhere has only a name."""
    return {COMPONENT: {name: schema}}


NO_NUL: Final = r"^[^\x00]*$"


NOT_BLANK: Final = r"^[^\x00]*[^\s\x00][^\x00]*$"


NO_BLANKS: Final = r"^[^\s\x00]+$"


Name = Annotated[str, Field(min_length=1, max_length=255, pattern=NOT_BLANK)]


Text = Annotated[str, Field(pattern=NO_NUL)]


Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


Timestamp = Annotated[
    str, AfterValidator(canonical_timestamp), WithJsonSchema({"type": "string", "format": "date-time"})
]


STATUS_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "string",
    "enum": [str(status) for status in Status],
    "description": "How a run stands or ended. Requests may also write it in another case and with blanks around it; "
    + ", ".join(f"{alias} means {status}" for alias, status in STATUS_ALIASES.items())
    + ".",
}
SOURCE_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "string",
    "enum": [str(source) for source in CommitSource],
    "description": "Who made a commit.",
}
OBJECT_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "additionalProperties": True,
    "description": f"An object of the agent's own, at most {MAX_JSON_DEPTH} levels deep.",
}


LABELS_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "maxProperties": MAX_LABELS,
    "propertyNames": {"pattern": LABEL_KEY, "maxLength": MAX_LABEL_KEY},
    "additionalProperties": {"type": "string", "minLength": 1, "maxLength": MAX_LABEL_VALUE, "pattern": NOT_BLANK},
    "description": "Labels: keys with texts.",
}
_GIVEN_LABELS_SCHEMA: Final[Mapping[str, Any]] = component(
    "GivenLabels",
    {
        **LABELS_SCHEMA,
        "additionalProperties": {"anyOf": [LABELS_SCHEMA["additionalProperties"], {"type": "null"}]},
        "description": "Labels as requests give them (JSON Merge Patch, RFC 7396): null removes a key, and keys "
        "that are not named stay as they are.",
    },
)


STATUSES_PATTERN: Final = "^({0})(,({0}))*$".format("|".join(Status))
"""Several statuses with commas between them."""


StatusValue = Annotated[str, PlainValidator(canonical_status), WithJsonSchema(component("Status", STATUS_SCHEMA))]


SourceValue = Annotated[str, AfterValidator(_commit_source), WithJsonSchema(component("CommitSource", SOURCE_SCHEMA))]


JsonObject = Annotated[str, PlainValidator(json_text), WithJsonSchema(component("JsonObject", OBJECT_SCHEMA))]


LabelKey = Annotated[str, Field(max_length=MAX_LABEL_KEY, pattern=LABEL_KEY)]
LabelValue = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_VALUE, pattern=NOT_BLANK)]
Labels = Annotated[dict[LabelKey, LabelValue], WithJsonSchema(component("Labels", LABELS_SCHEMA))]
"""Labels as they are answered."""


_GivenLabels = Annotated[dict[LabelKey, LabelValue | None], BeforeValidator(_few), WithJsonSchema(_GIVEN_LABELS_SCHEMA)]


NewLabels = Annotated[_GivenLabels, AfterValidator(labels_text)]
"""Labels of a new run; null stands for one that is not given."""


LabelChanges = Annotated[_GivenLabels, AfterValidator(_label_changes)]
"""A JSON Merge Patch for labels."""


Attempt = Annotated[int, Field(ge=1, le=MAX_INTEGER)]


TraceId = Annotated[str, _hex_id(32), WithJsonSchema({"type": "string", "pattern": "^(?!0+$)[0-9a-f]{32}$"})]


SpanId = Annotated[str, _hex_id(16), WithJsonSchema({"type": "string", "pattern": "^(?!0+$)[0-9a-f]{16}$"})]


Boolean = Annotated[bool, PlainValidator(_flag), WithJsonSchema({"type": "boolean"})]


def new_field(field: FieldInfo) -> tuple[Any, Any]:
    """Return a field of a new record, as `create_model` takes it: null means the same as not given."""
    kind, default = NewLabels | None if has_role(field, Role.LABELS) else field.rebuild_annotation(), field.default
    if not field.is_required() and default is not None:
        kind = Annotated[kind | None, AfterValidator(lambda value: default if value is None else value)]
    return kind, Field(default, description=field.description, examples=field.examples)


class Role(Flag):
    """What may be done with a field over HTTP."""

    SERVER = auto()
    """Only the daemon writes it."""
    SET = auto()
    """May be given when a run is created."""
    PATCH = auto()
    """May be changed by PATCH."""
    COMMIT = auto()
    """Is set by associate-commit."""
    FILTER = auto()
    """Requests filter by its exact value, which an index in the order of created_at answers."""
    JSON = auto()
    """Is stored as text and answered as a JSON object."""
    BOOLEAN = auto()
    """Is stored as 0 or 1 and answered as false or true."""
    LABELS = auto()
    """Holds labels: PATCH merges it, and an index knows each of its members."""


def names(model: type[BaseModel], role: Role | None = None) -> tuple[str, ...]:
    """Return the names of a definition's fields, or of those that have a role, in the order in which they stand."""
    return tuple(name for name, field in model.model_fields.items() if role is None or has_role(field, role))


def has_role(field: FieldInfo, role: Role) -> bool:
    """Return whether a field has a role."""
    return any(role in mark for mark in field.metadata if isinstance(mark, Role))


def kind_of(field: FieldInfo) -> type:
    """Return what a stored field holds, unless it is null: int, bool or str."""
    for part in get_args(field.annotation) or (field.annotation,):
        kind = get_args(part)[0] if get_origin(part) is Annotated else part
        if kind in (int, bool):
            return kind  # type: ignore[no-any-return]
    return str


def shorten(text: str) -> str:
    """Cut a client's own words to what an answer or a log line may echo."""
    return text if len(text) <= MAX_ECHO else text[: MAX_ECHO - 1] + "…"
