"""The response of each endpoint as typed dictionaries, from which the OpenAPI document derives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, WithJsonSchema
from typing_extensions import TypeAliasType, TypedDict

from telemetryd.errors import ErrorItem
from telemetryd.model.values import OBJECT_SCHEMA, component

Number = Annotated[int, Field(ge=0)]
Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Share = Annotated[float, Field(ge=0, le=1)]
Sum = Annotated[float, Field(ge=0)]
StoredRun = Annotated[dict[str, Any], WithJsonSchema(component("Run"))]
"""A run as it is stored, made from the definition of a run."""
ListedRun = Annotated[dict[str, Any], WithJsonSchema(component("ListedRun"))]
"""A run in a list: what `fields` chooses of it, everything by default."""
StoredEvent = Annotated[dict[str, Any], WithJsonSchema(component("Event"))]
EventOfRun = Annotated[dict[str, Any], WithJsonSchema(component("EventOfRun"))]
"""An event with the id of its run."""
FreeObject = Annotated[dict[str, Any], WithJsonSchema(component("JsonObject", OBJECT_SCHEMA))]
RunList = TypeAliasType("RunList", Annotated[list[ListedRun], Field(description="Runs in the order asked for.")])
EventList = TypeAliasType("EventList", Annotated[list[StoredEvent], Field(description="Events of one run.")])
HealthStatus = TypeAliasType(
    "HealthStatus", Annotated[Literal["ok", "error"], Field(description="With error, writes are not taken.")]
)
CountsState = TypeAliasType(
    "CountsState",
    Annotated[Literal["right", "being compared"], Field(description="Whether counts can be believed.")],
)
FullTextState = TypeAliasType(
    "FullTextState", Annotated[Literal["off", "building", "ready"], Field(description="Whether `q` finds runs.")]
)


class Warned(TypedDict):
    """What every answer to a body may hold."""

    warnings: NotRequired[
        Annotated[
            list[str],
            Field(description="Body fields that were not used, texts taken as numbers, and how a known run differs."),
        ]
    ]


class RunCreated(Warned):
    """A run that is new."""

    status: Literal["created"]
    event_id: str
    run_id: str


class RunDuplicate(Warned):
    """A run whose event_id is known."""

    status: Literal["duplicate"]
    event_id: str
    message: str


class ItemRefused(TypedDict):
    """What is wrong with an item of a batch."""

    index: Number
    event_id: str | None
    detail: list[ErrorItem]
    status: NotRequired[int]
    """The answer that the item would get by itself, if that is not 422."""


class BatchStored(Warned):
    """What became of the items of a batch."""

    inserted: Number
    duplicates: Number
    errors: list[str]
    total: Number
    error_details: NotRequired[list[ItemRefused]]


class RunUpdated(Warned):
    """Which fields of a run were changed."""

    event_id: str
    updated: bool
    fields_updated: list[str]


class CommitAssociated(Warned):
    """The commit that a run led to."""

    status: Literal["success"]
    event_id: str
    run_id: str
    commit_hash: str


class CommitPage(TypedDict):
    """The page of a run's commit."""

    commit_url: str | None


class RepoPage(TypedDict):
    """The page of a run's repository."""

    repo_url: str | None


class EventsStored(Warned):
    """How many events were new."""

    inserted: Number
    duplicates: Number


class ProcessWatched(Warned):
    """The process that is watched."""

    event_id: str
    pid: Number
    watched: Literal[True]


class NameCounts(TypedDict):
    """How many names there are."""

    agent_names: Number
    job_types: Number


class Metadata(TypedDict):
    """The agents and job types there are."""

    agent_names: list[str]
    job_types: list[str]
    counts: NameCounts
    cache_hit: bool


class Comparison(TypedDict):
    """Whether the counts agree with the runs."""

    state: CountsState
    foreign_commit_at: Moment | None
    corrected: Number


class Unconfirmed(TypedDict):
    """What would be deleted."""

    would_delete: Number
    oldest: Moment | None


class Automatic(TypedDict):
    """What the daemon does by itself."""

    prune_after: str | None
    stale_after: str | None
    paused: Annotated[bool, Field(description="Whether nothing goes on by itself, as the clock has jumped.")]
    unconfirmed: Annotated[Unconfirmed | None, Field(description="What prune_after would delete if it were confirmed.")]


class Health(TypedDict):
    """Whether writes are taken, and how the database is."""

    status: HealthStatus
    version: str
    db_path: str
    journal_mode: NotRequired[Annotated[str, Field(description="Of SQLite.")]]
    synchronous: str
    durable: bool
    durability: str
    queue_depth: Number
    oldest_waiting_s: Sum
    last_commit_at: Moment | None
    engine: NotRequired[Annotated[str, Field(description="Of PostgreSQL: its version.")]]
    primary: NotRequired[Annotated[str, Field(description="Of PostgreSQL: the server that takes the writes.")]]
    timeline: NotRequired[Annotated[int, Field(description="Of PostgreSQL: how often another server took over.")]]
    wal_bytes: NotRequired[Annotated[int, Field(ge=0, description="Of SQLite: the size of its write-ahead log.")]]
    disk_free_bytes: NotRequired[Annotated[int, Field(ge=0, description="Of SQLite: what is free on its disk.")]]
    counts: Comparison
    full_text: FullTextState
    automatic: Automatic
    notices: list[str]
    warning: NotRequired[Annotated[str, Field(description="What an operator should know although everything works.")]]
    detail: NotRequired[Annotated[str, Field(description="Why writes are not taken.")]]


class Performance(TypedDict):
    """How the database is kept, and how many writes wait."""

    db_path: str
    journal_mode: NotRequired[Annotated[str, Field(description="Of SQLite.")]]
    synchronous: str
    queue_depth: Number


class Totals(TypedDict):
    """How many runs there are."""

    total_runs: Number
    agents: dict[str, Number]
    agents_more: NotRequired[Annotated[Number, Field(description="How many are not named; missing if all are.")]]
    recent_24h: Number
    performance: Performance


class Slice(TypedDict):
    """What was done, or with dry_run what would be."""

    more: NotRequired[bool]
    dry_run: NotRequired[bool]
    matching: NotRequired[Number]
    oldest: NotRequired[Moment | None]
    ahead: NotRequired[
        Annotated[list[str], Field(description="event_ids of those whose created_at lies ahead of their arrival.")]
    ]
    created_before: Moment


class RunsPruned(Slice):
    """One slice of old runs."""

    pruned: NotRequired[Number]


class RunsReaped(Slice):
    """One slice of stale runs."""

    reaped: NotRequired[Number]


class DeletedRun(TypedDict):
    """A run that is gone."""

    event_id: str
    deleted: Literal[True]
    events: Annotated[int, Field(ge=0, description="How many events went with it.")]


class RunRedacted(TypedDict):
    """A run of which something was removed."""

    event_id: str
    redacted: list[str]
    events: Annotated[int, Field(ge=0, description="How many events lost their payload.")]


class Confirmed(TypedDict):
    """What was confirmed."""

    prune_after: NotRequired[str]
    created_before: NotRequired[Moment]
    matching: NotRequired[Number]
    oldest: NotRequired[Moment | None]
    clock: NotRequired[Moment]


class BackupMade(TypedDict):
    """A verified backup."""

    path: str
    bytes: Number
    rows: Number
    seconds: float
    removed: list[str]
