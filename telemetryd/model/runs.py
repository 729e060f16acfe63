"""THE definition of a run: every field once; validation, SQL, OpenAPI and docs derive from it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from operator import itemgetter
from typing import Annotated, Any, Final, NamedTuple

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    create_model,
)
from pydantic.fields import FieldInfo

from telemetryd.errors import ErrorItem
from telemetryd.git_urls import commit_url, repo_url, without_credentials
from telemetryd.model.bodies import validate, validate_leniently
from telemetryd.model.values import (
    LABEL_KEYS,
    MAX_LABEL_VALUE,
    MAX_LABELS,
    NO_BLANKS,
    Attempt,
    Boolean,
    Count,
    JsonObject,
    LabelChanges,
    Labels,
    Name,
    Role,
    Row,
    SourceValue,
    SpanId,
    SqlValue,
    StatusValue,
    Text,
    Timestamp,
    TraceId,
    has_role,
    kind_of,
    names,
    new_field,
    shorten,
)
from telemetryd.traces import Span

MAX_WARNINGS: Final = 100


# --- The types of values -------------------------------------------------------------------------


Address = Annotated[Text, AfterValidator(without_credentials)]
"""The address of a repository; what may be a secret in it is not even stored."""


# --- The fields ----------------------------------------------------------------------------------


_SET, _PATCH = Role.SET, Role.SET | Role.PATCH


def _field(default: Any, description: str, *examples: Any) -> Any:
    """Return a field's default (none if it is required), what it is, and what it may hold, the usual value first."""
    return Field(default, description=description, examples=[*examples])


class Run(BaseModel):
    """A run: one execution of one job by one agent."""

    id: Annotated[int, Role.SERVER] = _field(0, "Row number, ascending in order of arrival.", 1)
    event_id: Annotated[Name, _SET | Role.FILTER] = _field(
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
    duration_ms: Annotated[Count, _PATCH] = _field(0, "Duration in milliseconds.", 300000)
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
    labels: Annotated[Labels | None, _PATCH | Role.JSON | Role.LABELS] = _field(
        None,
        f"The agent's own keys and values, at most {MAX_LABELS}: keys of {LABEL_KEYS}; values of 1 to "
        f"{MAX_LABEL_VALUE} characters. PATCH merges them: null removes a key.",
        {"team": "search", "env": "prod"},
    )
    attempt: Annotated[Attempt | None, _SET] = _field(None, "Which attempt at its job this is, from 1.", 2)
    retry_of: Annotated[Text | None, _SET | Role.FILTER] = _field(
        None, "event_id of the run that this one tries again.", "translate-2025-12-24-000"
    )
    conversation_id: Annotated[Text | None, _SET | Role.FILTER] = _field(
        None, "Conversation or session that the run belongs to.", "conversation-7"
    )
    trace_id: Annotated[TraceId | None, _SET | Role.FILTER] = _field(
        None, "Trace of the run (W3C Trace Context).", "4bf92f3577b34da6a3ce929d0e0e4736"
    )
    span_id: Annotated[SpanId | None, _SET] = _field(
        None, "Span of the run in its trace (W3C Trace Context).", "00f067aa0ba902b7"
    )
    expected_by: Annotated[Timestamp | None, _PATCH] = _field(
        None, "When the run should have ended at the latest.", "2025-12-24T11:00:00Z"
    )


def columns(role: Role) -> tuple[str, ...]:
    """Return the names of a run's fields that have a role."""
    return names(Run, role)


COLUMNS: Final = names(Run)
"""Every field, in the order in which a run is answered."""
STORED: Final = columns(Role.SET)
"""The fields that a new run brings along."""
TEXTS: Final = tuple(name for name, field in Run.model_fields.items() if kind_of(field) is str)
"""The fields that hold text."""
PATCHABLE: Final = columns(Role.PATCH)
REDACTABLE: Final = tuple(name for name, field in Run.model_fields.items() if field.default is None)
"""The fields that a run may lack, so that what they hold can be removed for good."""
FILTERS: Final = columns(Role.FILTER)
_JSON_COLUMNS: Final = columns(Role.JSON)
_BOOLEAN_COLUMNS: Final = columns(Role.BOOLEAN)

DIGEST: Final = "body_digest"
"""The column that holds the digest of the first accepted body; it is no field, and never answered."""
TABLE: Final = (*COLUMNS, DIGEST)
"""Every column of the runs, in the order of their table."""

EVENT_ID, RUN_ID, CREATED_AT, START_TIME, AGENT_NAME, JOB_TYPE, STATUS = (
    STORED.index(name)
    for name in ("event_id", "run_id", "created_at", "start_time", "agent_name", "job_type", "status")
)
"""Where those values stand in a `Row`."""


def _optional(field: FieldInfo) -> Any:
    """Return a field's type for a partial update, where null or missing means "leave"."""
    kind = LabelChanges if has_role(field, Role.LABELS) else field.rebuild_annotation()
    return (kind | None, Field(None, description=field.description, examples=field.examples))


NewRun: Final[type[BaseModel]] = create_model(
    "NewRun",
    __config__=ConfigDict(extra="allow", strict=True, title="NewRun"),
    __doc__="A run as it is created.",
    **{name: new_field(Run.model_fields[name]) for name in STORED},  # type: ignore[call-overload]
)
RunPatch: Final[type[BaseModel]] = create_model(
    "RunPatch",
    __config__=ConfigDict(extra="allow", strict=True, title="RunPatch"),
    __doc__="Changes to a run; a field that is null or missing stays as it is, and labels are merged.",
    **{name: _optional(Run.model_fields[name]) for name in PATCHABLE},
)


class CommitAssociation(BaseModel):
    """The commit that a run led to."""

    model_config = ConfigDict(
        extra="allow", strict=True, json_schema_extra={"description": "The commit that a run led to."}
    )

    commit_hash: Annotated[str, Field(min_length=4, max_length=64, pattern=NO_BLANKS)] = Field(
        description="Full or short hash; commit_url needs 7 to 64 hexadecimal digits.",
        examples=Run.model_fields["git_commit_hash"].examples,
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
_TRACE_ID: Final = STORED.index("trace_id")
_SPAN_ID: Final = STORED.index("span_id")


class ParsedRun(NamedTuple):
    """A valid run: its row, the names of body fields that were not used, and what is to be said of others."""

    row: Row
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()


class ParsedPatch(NamedTuple):
    """A valid PATCH: its changes in the body's order, and the same besides as of a run."""

    changes: dict[str, SqlValue]
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()


def parse_run(value: object) -> ParsedRun:
    """Check one decoded run and return what is to be stored.

    Raises:
        InvalidBodyError: with every fault of the run.

    """
    run, notes = validate_leniently(NewRun, value)
    return ParsedRun(_values_of(run.__dict__), tuple(run.__pydantic_extra__ or ()), notes)


def in_trace(row: Row, traceparent: str | None) -> Row:
    """Return a run as part of the trace that its request belongs to.

    What the run says itself wins. A traceparent that is malformed is ignored.
    """
    span = Span.parse(traceparent)
    return row if span is None else _in_trace(row, span.trace_id, span.span_id)


def in_trace_of(row: Row, stored: Row) -> Row:
    """Return a run as part of the stored one's trace, which a header may have named: each attempt may name another.

    Args:
        row: in the order of `STORED`.
        stored: in the order of `COLUMNS`.

    """
    return _in_trace(row, stored[_STORED_PLACES[_TRACE_ID]], stored[_STORED_PLACES[_SPAN_ID]])


def _in_trace(row: Row, trace_id: SqlValue, span_id: SqlValue) -> Row:
    if row[_TRACE_ID] is not None:
        return row
    values = list(row)
    values[_TRACE_ID], values[_SPAN_ID] = trace_id, span_id
    return tuple(values)


def parse_patch(value: object) -> ParsedPatch:
    """Check a decoded PATCH body and return what is to be changed.

    Raises:
        InvalidBodyError: with every fault of the body.

    """
    patch, notes = validate_leniently(RunPatch, value)
    assert isinstance(value, Mapping)  # noqa: S101 - the model admits nothing else
    given = {name: getattr(patch, name) for name in value if name in RunPatch.model_fields}
    changes = {name: new for name, new in given.items() if new is not None and value[name] is not None}
    return ParsedPatch(changes, tuple(patch.__pydantic_extra__ or ()), notes)


def too_many_labels(labels: int) -> ErrorItem:
    """Return the fault of a PATCH after which a run would have so many labels."""
    message = f"The run would have {labels} labels, and has at most {MAX_LABELS}; remove some with null"
    return {"loc": ["body", "labels"], "msg": message, "type": "too_long"}


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


_DEFAULTS: Final = tuple(NewRun.model_fields[name].default for name in STORED)
_STORED_PLACES: Final = tuple(COLUMNS.index(name) for name in STORED)
_JSON_PLACES: Final = tuple(map(STORED.index, _JSON_COLUMNS))
_json_of: Final = itemgetter(*_JSON_PLACES)
_NO_JSON: Final = (None,) * len(_JSON_PLACES)
_CHANGEABLE: Final = frozenset((*PATCHABLE, *columns(Role.COMMIT)))
"""The fields of a stored run that may say something else than its first body."""


def digest(row: Row) -> int:
    """Return 64 bits that two bodies share only if they say the same, in whatever form and order.

    Fields at the end that say nothing do not count, so that a later version may add fields after them.
    """
    values: Any = row
    if _json_of(row) != _NO_JSON:
        values = list(row)
        for place in _JSON_PLACES:
            if values[place] is not None:
                values[place] = orjson.loads(values[place])
    packed = orjson.dumps(values, option=orjson.OPT_SORT_KEYS).rstrip(
        b",nul]"
    )  # the nulls at the end; no value ends so
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), signed=True)


def differing_fields(row: Row, stored: Row, *, knows_body: bool, changes_follow: bool) -> list[str]:
    """Return the fields in which a new run says something else than the stored one that has its event_id.

    What it does not say, or says as every run does at its start (`running`, 0), may have changed since, or may be all
    that the first body said.

    Args:
        row: in the order of `STORED`.
        stored: in the order of `COLUMNS`.
        knows_body: whether the first body is known to be another one, so that what is missing counts as well, unless
            it can be changed.
        changes_follow: whether its sender is going to PATCH it, so that fields that can be changed do not count.

    """
    return [
        name
        for name, given, default, place in zip(STORED, row, _DEFAULTS, _STORED_PLACES, strict=True)
        if given != stored[place]
        and not (changes_follow and name in _CHANGEABLE)
        and (given not in (default, None) or (knows_body and name not in _CHANGEABLE and name != "created_at"))
        and not _is_same_json(name, given, stored[place])
    ]


def _is_same_json(name: str, given: SqlValue, stored: SqlValue) -> bool:
    if name not in _JSON_COLUMNS or not isinstance(given, str) or not isinstance(stored, str):
        return False
    return bool(orjson.loads(given) == orjson.loads(stored))


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
    values: dict[str, Any] = {**dict.fromkeys(STORED), **run}  # an older daemon does not know every field
    for name in _JSON_COLUMNS:
        if values[name] is not None:
            values[name] = orjson.dumps(values[name]).decode()
    for name in _BOOLEAN_COLUMNS:
        values[name] = int(values[name])
    if values["git_repo"] is not None:  # stored by a daemon that kept whatever it was given
        values["git_repo"] = without_credentials(values["git_repo"])
    return tuple(values[name] for name in STORED)
