"""THE definition of a run: every field once; validation, SQL, OpenAPI and docs derive from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from enum import Flag, StrEnum, auto
from itertools import islice
from operator import itemgetter
from typing import Annotated, Any, Final, NamedTuple

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from telemetryd import timestamps
from telemetryd.errors import BodyTooLargeError, ErrorItem, InvalidBodyError
from telemetryd.git_urls import commit_url, repo_url, without_credentials

SqlValue = str | int | None
Row = tuple[SqlValue, ...]
"""The values of one run to be stored, in the order of `STORED`."""

MAX_INTEGER: Final = 2**63 - 1
MAX_JSON_DEPTH: Final = 64
MAX_JSON_VALUES: Final = 100_000
"""Values in one JSON object of an agent's own; to look at so many takes some 20 ms, in which nobody is answered."""
MAX_BODY_VALUES: Final = 1_000_000
"""Values in one JSON text; decoding takes at most about a tenth of a second for so many."""
MAX_ECHO: Final = 200
MAX_WARNINGS: Final = 100


# --- The types of values -------------------------------------------------------------------------


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
    fault = _unstorable(value, MAX_JSON_DEPTH, iter(range(MAX_JSON_VALUES)))
    if fault is not None:
        raise PydanticCustomError("value_error", f"JSON object {fault}")
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise PydanticCustomError("value_error", "JSON object holds an integer of more than 64 bits") from error


def _flag(value: object) -> bool:
    if value in (0, 1) and isinstance(value, int):
        return bool(value)
    raise PydanticCustomError("bool_type", "Input should be true or false")


def _any_case(words: Iterable[str]) -> str:
    """Return a regular expression that JSON Schema can hold: any of the words, in any case."""
    forms = ("".join(f"[{c.upper()}{c}]" for c in word) for word in words)
    return rf"^\s*({'|'.join(forms)})\s*$"


_NO_NUL: Final = r"^[^\x00]*$"
_NOT_BLANK: Final = r"^[^\x00]*[^\s\x00][^\x00]*$"

Name = Annotated[str, Field(min_length=1, max_length=255, pattern=_NOT_BLANK)]
Text = Annotated[str, Field(pattern=_NO_NUL)]
Address = Annotated[Text, AfterValidator(without_credentials)]
"""Of a repository; what may be a secret in it is not even stored."""
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Duration = Annotated[
    Count,
    BeforeValidator(lambda value: 0 if value is None else value),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}, {"type": "null"}]}),
]
Timestamp = Annotated[
    str, AfterValidator(canonical_timestamp), WithJsonSchema({"type": "string", "format": "date-time"})
]
StatusValue = Annotated[
    str,
    PlainValidator(canonical_status),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": [str(status) for status in Status]},
                {
                    "type": "string",
                    "pattern": _any_case(_STATUSES),
                    "description": "Case and surrounding blanks are ignored; "
                    + ", ".join(f"{alias} means {status}" for alias, status in STATUS_ALIASES.items()),
                },
            ]
        }
    ),
]
SourceValue = Annotated[
    str,
    AfterValidator(_commit_source),
    WithJsonSchema({"type": "string", "enum": [str(source) for source in CommitSource]}),
]
JsonObject = Annotated[
    str,
    PlainValidator(json_text),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]}),
]
Boolean = Annotated[
    bool,
    PlainValidator(_flag),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "integer", "enum": [0, 1]}]}),
]


# --- The fields ----------------------------------------------------------------------------------


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


_SET, _PATCH = Role.SET, Role.SET | Role.PATCH


def _field(default: Any, description: str, *examples: Any) -> Any:
    """Return a field's default (none if it is required), what it is, and what it may hold, the usual value first."""
    return Field(default, description=description, examples=[*examples])


class Run(BaseModel):
    """A run: one execution of one job by one agent."""

    id: Annotated[int, Role.SERVER] = _field(0, "Row number, ascending in order of arrival.", 1)
    event_id: Annotated[Name, _SET] = _field(
        ...,
        "Unique id of the run's record; makes retries harmless.",
        "translate-2025-12-24-001",
        "translate-2025-12-24-002",
    )
    run_id: Annotated[Name, _SET | Role.FILTER] = _field(
        ..., "The agent's own id of the run.", "20251224T100000Z-hugo-translator-a1b2c3d4"
    )
    created_at: Annotated[Timestamp, _SET] = _field(
        "", "When the record was made; default: on arrival.", "2025-12-24T10:00:00Z"
    )
    updated_at: Annotated[Timestamp, Role.SERVER] = _field("", "When the record last changed.", "2025-12-24T10:05:00Z")
    start_time: Annotated[Timestamp, _SET] = _field(..., "When the run began.", "2025-12-24T10:00:00Z")
    end_time: Annotated[Timestamp | None, _PATCH] = _field(None, "When the run ended.", "2025-12-24T10:05:00Z")
    agent_name: Annotated[Name, _SET | Role.FILTER] = _field(..., "Which agent ran.", "hugo-translator")
    job_type: Annotated[Name, _SET | Role.FILTER] = _field(..., "What kind of job it ran.", "translate_directory")
    status: Annotated[StatusValue, _PATCH | Role.FILTER] = _field(
        "running", "How the run stands.", "running", "success"
    )
    product: Annotated[Text | None, _SET | Role.FILTER] = _field(None, "Product worked on.", "words")
    product_family: Annotated[Text | None, _SET] = _field(None, "Family of the product.", "words-family")
    platform: Annotated[Text | None, _SET] = _field(None, "Platform worked on.", "python")
    subdomain: Annotated[Text | None, _SET] = _field(None, "Subdomain worked on.", "docs")
    website: Annotated[Text | None, _SET | Role.FILTER] = _field(None, "Website worked on.", "example.com")
    website_section: Annotated[Text | None, _SET] = _field(None, "Section of the website.", "blog")
    item_name: Annotated[Text | None, _SET] = _field(None, "The single item worked on.", "index.md")
    items_discovered: Annotated[Count, _SET] = _field(0, "Items found.", 100)
    items_succeeded: Annotated[Count, _PATCH] = _field(0, "Items done.", 98)
    items_failed: Annotated[Count, _PATCH] = _field(0, "Items failed.", 2)
    items_skipped: Annotated[Count, _PATCH] = _field(0, "Items left out.", 0)
    duration_ms: Annotated[Duration, _PATCH] = _field(0, "Duration in milliseconds.", 300000)
    input_summary: Annotated[Text | None, _SET] = _field(None, "What went in.", "100 pages in English")
    output_summary: Annotated[Text | None, _PATCH] = _field(None, "What came out.", "98 pages in German")
    source_ref: Annotated[Text | None, _SET] = _field(None, "Where the input was.", "content/en")
    target_ref: Annotated[Text | None, _SET] = _field(None, "Where the output went.", "content/de")
    error_summary: Annotated[Text | None, _PATCH] = _field(None, "The error in one line.", "2 pages failed")
    error_details: Annotated[Text | None, _PATCH] = _field(
        None, "The error in full.", "a.md: not UTF-8; b.md: not UTF-8"
    )
    git_repo: Annotated[Address | None, _SET] = _field(
        None,
        "Address of the repository; user, password, query and fragment are not stored.",
        "https://github.com/acme/website.git",
    )
    git_branch: Annotated[Text | None, _SET] = _field(None, "Branch.", "main")
    git_commit_hash: Annotated[Text | None, _SET | Role.COMMIT | Role.FILTER] = _field(
        None, "Commit of the run.", "3f2a91c"
    )
    git_run_tag: Annotated[Text | None, _SET] = _field(None, "Tag of the run.", "nightly")
    host: Annotated[Text | None, _SET | Role.FILTER] = _field(None, "Machine that ran it.", "build-07")
    environment: Annotated[Text | None, _SET | Role.FILTER] = _field(None, "Environment, such as prod or dev.", "prod")
    trigger_type: Annotated[Text | None, _SET] = _field(None, "What started the run.", "schedule")
    metrics_json: Annotated[JsonObject | None, _PATCH | Role.JSON] = _field(
        None, "The agent's own figures.", {"tokens": 48211}
    )
    context_json: Annotated[JsonObject | None, _PATCH | Role.JSON] = _field(
        None, "The agent's own context.", {"language": "de"}
    )
    api_posted: Annotated[Boolean, _SET | Role.BOOLEAN] = _field(False, "Posted to another API as well.", False)
    api_posted_at: Annotated[Timestamp | None, _SET] = _field(None, "When it was posted there.", "2025-12-24T10:05:01Z")
    api_retry_count: Annotated[Count, _SET] = _field(0, "How often that was tried again.", 0)
    insight_id: Annotated[Text | None, _SET | Role.FILTER] = _field(None, "Insight that led to the run.", "insight-42")
    parent_run_id: Annotated[Text | None, _SET | Role.FILTER] = _field(
        None, "run_id of the run that started this one.", "20251224T095900Z-nightly-0001"
    )
    git_commit_source: Annotated[SourceValue | None, _PATCH | Role.COMMIT] = _field(None, "Who made the commit.", "llm")
    git_commit_author: Annotated[Text | None, _PATCH | Role.COMMIT] = _field(
        None, "Author of the commit.", "Hugo Translator <hugo@example.com>"
    )
    git_commit_timestamp: Annotated[Timestamp | None, _PATCH | Role.COMMIT] = _field(
        None, "When the commit was made.", "2025-12-24T10:05:00Z"
    )


def names(model: type[BaseModel], role: Role | None = None) -> tuple[str, ...]:
    """Return the names of a definition's fields, or of those that have a role, in the order in which they stand."""
    return tuple(
        name
        for name, field in model.model_fields.items()
        if role is None or any(role in mark for mark in field.metadata if isinstance(mark, Role))
    )


def columns(role: Role) -> tuple[str, ...]:
    """Return the names of a run's fields that have a role."""
    return names(Run, role)


COLUMNS: Final = names(Run)
"""Every field, in the order in which a run is answered."""
STORED: Final = columns(Role.SET)
"""The fields that a new run brings along."""
TEXTS: Final = tuple(name for name, field in Run.model_fields.items() if field.annotation not in (int, bool))
"""The fields that hold text."""
PATCHABLE: Final = columns(Role.PATCH)
FILTERS: Final = columns(Role.FILTER)
_JSON_COLUMNS: Final = columns(Role.JSON)
_BOOLEAN_COLUMNS: Final = columns(Role.BOOLEAN)

EVENT_ID, RUN_ID, CREATED_AT, START_TIME, AGENT_NAME, JOB_TYPE, STATUS = (
    STORED.index(name)
    for name in ("event_id", "run_id", "created_at", "start_time", "agent_name", "job_type", "status")
)
"""Where those values stand in a `Row`."""


def _optional(field: FieldInfo) -> Any:
    """Return a field's type for a partial update, where null or missing means "leave"."""
    return (field.rebuild_annotation() | None, Field(None, description=field.description, examples=field.examples))


NewRun: Final[type[BaseModel]] = create_model(
    "NewRun",
    __config__=ConfigDict(extra="allow", strict=True, title="NewRun"),
    __doc__="A run as it is created.",
    **{name: (Run.model_fields[name].rebuild_annotation(), Run.model_fields[name]) for name in STORED},  # type: ignore[call-overload]
)
RunPatch: Final[type[BaseModel]] = create_model(
    "RunPatch",
    __config__=ConfigDict(extra="allow", strict=True, title="RunPatch"),
    __doc__="Changes to a run; a field that is null or missing stays as it is.",
    **{name: _optional(Run.model_fields[name]) for name in PATCHABLE},
)


class CommitAssociation(BaseModel):
    """The commit that a run led to."""

    model_config = ConfigDict(extra="allow", strict=True)

    commit_hash: Annotated[str, Field(min_length=7, max_length=40, pattern=r"^[0-9A-Fa-f]+$")] = Field(
        description="Full or short hash.", examples=Run.model_fields["git_commit_hash"].examples
    )
    commit_source: SourceValue = Field(
        description="Who made the commit.", examples=Run.model_fields["git_commit_source"].examples
    )
    commit_author: Text | None = Field(
        None, description="Author of the commit.", examples=Run.model_fields["git_commit_author"].examples
    )
    commit_timestamp: Timestamp | None = Field(
        None, description="When the commit was made.", examples=Run.model_fields["git_commit_timestamp"].examples
    )


def example(model: type[BaseModel], names: Iterable[str] = (), number: int = 0) -> dict[str, Any]:
    """Return a body for people to start from: the `number`-th example of each field, or its last."""
    fields = {name: model.model_fields[name].examples or [] for name in names or model.model_fields}
    return {name: examples[min(number, len(examples) - 1)] for name, examples in fields.items()}


BEGUN: Final = (
    "event_id", "run_id", "agent_name", "job_type", "start_time", "status", "items_discovered", "git_repo",
    "git_branch", "host", "environment", "trigger_type", "context_json",
)  # fmt: skip
"""The fields of a run that most agents give when it begins; the documentation shows them."""
ENDED: Final = (
    "status", "end_time", "duration_ms", "items_succeeded", "items_failed", "output_summary", "metrics_json",
)  # fmt: skip
"""The fields that most agents give when it has ended."""


# --- From a body to values -----------------------------------------------------------------------

_values_of: Final = itemgetter(*STORED)


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
    """Tell whether a JSON text holds more values than may be decoded at once.

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


class ParsedRun(NamedTuple):
    """A valid run: its row, and the names of body fields that were not used."""

    row: Row
    ignored: tuple[str, ...]


def parse_run(value: object) -> ParsedRun:
    """Check one decoded run and return what is to be stored.

    Raises:
        InvalidBodyError: with every fault of the run.

    """
    run = validate(NewRun, value)
    return ParsedRun(_values_of(run.__dict__), tuple(run.__pydantic_extra__ or ()))


def parse_patch(value: object) -> tuple[dict[str, SqlValue], tuple[str, ...]]:
    """Check a decoded PATCH body; return the changes in the body's order, and the ignored names.

    Raises:
        InvalidBodyError: with every fault of the body.

    """
    patch = validate(RunPatch, value)
    assert isinstance(value, Mapping)  # noqa: S101 - the model admits nothing else
    given = {name: getattr(patch, name) for name in value if name in RunPatch.model_fields}
    changes = {name: new for name, new in given.items() if new is not None and value[name] is not None}
    return changes, tuple(patch.__pydantic_extra__ or ())


def parse_commit(value: object) -> tuple[dict[str, SqlValue], tuple[str, ...]]:
    """Check a decoded associate-commit body; return the changes it makes, and the ignored names.

    Raises:
        InvalidBodyError: with every fault of the body.

    """
    commit = validate(CommitAssociation, value)
    changes: dict[str, SqlValue] = {
        "git_commit_hash": commit.commit_hash,
        "git_commit_source": commit.commit_source,
        "git_commit_author": commit.commit_author,
        "git_commit_timestamp": commit.commit_timestamp,
    }
    given: dict[str, SqlValue] = {name: new for name, new in changes.items() if new is not None}
    return given, tuple(commit.__pydantic_extra__ or ())


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
    _NO_NUL: "String must not hold NUL characters",
    _NOT_BLANK: "String must not be blank and must not hold NUL characters",
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
    """Return the faults of one item with their places told from the whole body: `["body", 3, "status"]`."""
    return [_item([*place, *item["loc"][1:]], item["msg"], item["type"]) for item in error.errors]


def shorten(text: str) -> str:
    """Cut a client's own words to what an answer or a log line may echo."""
    return text if len(text) <= MAX_ECHO else text[: MAX_ECHO - 1] + "…"


def ignored_field_warnings(names: Collection[str]) -> list[str]:
    """Say which body fields were not used, and why; of very many, the first ones and how many more."""
    server_fields = columns(Role.SERVER)
    warnings = [
        f"Field is set by the server, ignored: {name}"
        if name in server_fields
        else f"Unknown field ignored: {shorten(name)}"
        for name in islice(names, MAX_WARNINGS)
    ]
    if len(names) > MAX_WARNINGS:
        warnings.append(f"{len(names) - MAX_WARNINGS} more fields ignored")
    return warnings


# --- From a row to an answer ---------------------------------------------------------------------


ANSWERED: Final = (*COLUMNS, "commit_url", "repo_url")
"""What an answered run has, in this order."""
_MADE_FROM: Final = {"commit_url": ("git_repo", "git_commit_hash"), "repo_url": ("git_repo",)}


def needed(fields: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that some fields of an answered run are made from, in the order of `COLUMNS`."""
    columns = {column for name in fields for column in _MADE_FROM.get(name, (name,))}
    return tuple(name for name in COLUMNS if name in columns)


def to_json(row: Row) -> dict[str, Any]:
    """Return a stored row (in the order of `COLUMNS`) as the JSON object that answers carry."""
    run: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
    for name in _JSON_COLUMNS:
        text = run[name]
        if isinstance(text, str):
            run[name] = orjson.Fragment(text)
    for name in _BOOLEAN_COLUMNS:
        run[name] = bool(run[name])
    repo, commit = run["git_repo"], run["git_commit_hash"]
    run["commit_url"] = commit_url(repo, commit)
    run["repo_url"] = repo_url(repo)
    return run


def stored_row(run: Mapping[str, Any]) -> Row:
    """Return a run as `to_json` gives it in the form in which it is stored (in the order of `STORED`)."""
    values = dict(run)
    for name in _JSON_COLUMNS:
        if values[name] is not None:
            values[name] = orjson.dumps(values[name]).decode()
    for name in _BOOLEAN_COLUMNS:
        values[name] = int(values[name])
    if values["git_repo"] is not None:  # stored by a daemon that kept whatever it was given
        values["git_repo"] = without_credentials(values["git_repo"])
    return tuple(values[name] for name in STORED)
