"""Request bodies other than runs: prune, reap, redact, and the process to watch."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from telemetryd.durations import parse_duration
from telemetryd.model.runs import REDACTABLE
from telemetryd.model.values import MAX_INTEGER, Count, Name, StatusValue, Timestamp, component, format_timestamp

SLICE: Final = 250
"""Runs deleted or cancelled in one transaction by default: about 10 ms of the writer's time."""


MAX_SLICE: Final = 1000


def _age(value: object) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise PydanticCustomError("value_error", f"Duration {error}") from error


Age = Annotated[
    float,
    BeforeValidator(_age),
    WithJsonSchema({"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*[smhdwSMHDW]\s*$"}),
]


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
"""Takes 12.0 for 12: JSON Schema calls both an integer."""

Limit = Annotated[int, Field(ge=1, le=MAX_SLICE), Whole]


def exact_name(name: str) -> str:
    """Return a name of which runs are deleted or cancelled.

    Raises:
        ValueError: if it would be a pattern in the list of runs, whose reader expects all matching runs to go.

    """
    if "*" in name:
        raise ValueError("must be an exact name: a pattern with * could delete or cancel more than is meant")
    return name


def _exact_name(name: str) -> str:
    try:
        return exact_name(name)
    except ValueError as error:
        raise PydanticCustomError("value_error", f"Name {error}") from error


ExactName = Annotated[
    Name,
    AfterValidator(_exact_name),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[^*\x00]*[^*\s\x00][^*\x00]*$"}),
]
"""A name that nobody can mean as a pattern."""


class _Slice(BaseModel):
    """The runs that one request works on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    older_than: Age | None = Field(None, description="Only runs created longer ago than this, such as 90d or 1h.")
    created_before: Timestamp | None = Field(None, description="Or: only runs created before this moment.")
    agent_name: ExactName | None = Field(None, description="Only runs of this agent; * is refused.")
    job_type: ExactName | None = Field(None, description="Only runs of this job type; * is refused.")
    limit: Limit = Field(SLICE, description="Most runs in this one transaction; ask again while `more` is true.")
    dry_run: bool = Field(False, description="Only count.")

    @model_validator(mode="after")
    def _check_age(self) -> _Slice:
        if (self.older_than is None) == (self.created_before is None):
            raise PydanticCustomError("value_error", "Give either older_than or created_before")
        return self

    def before(self, now: datetime) -> str:
        """Return the moment before which a run must have been created."""
        if self.created_before is not None:
            return self.created_before
        assert self.older_than is not None  # noqa: S101 - checked above
        return moment_ago(now, self.older_than)


class RunVersion(BaseModel):
    """A run as it was at its last change."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"description": "A run as it was at its last change."}
    )

    id: Annotated[int, Field(ge=0, le=MAX_INTEGER), Whole] = Field(description="Its id.")
    updated_at: Timestamp = Field(description="When it last changed.")


class PruneRequest(_Slice):
    """Which runs to delete."""

    model_config = ConfigDict(json_schema_extra={"description": "Which runs to delete."})

    status: StatusValue | None = Field(None, description="Only runs of this status.")
    versions: Annotated[list[RunVersion], Field(max_length=MAX_SLICE)] | None = Field(
        None, description="Of those only these runs, and only if they have not changed since."
    )


class ReapRequest(_Slice):
    """Which running runs to cancel."""

    model_config = ConfigDict(json_schema_extra={"description": "Which running runs to cancel."})


class BackupRequest(BaseModel):
    """How a backup is made."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"description": "How a backup is made."})

    compress: bool = Field(
        True, description="Whether it is packed with Zstandard (.sqlite.zst); else it is a plain SQLite file."
    )


def _redactable(name: str) -> str:
    if name not in REDACTABLE:
        raise PydanticCustomError("value_error", f"Field must be one of those that a run may lack: {[*REDACTABLE]}")
    return name


RedactedField = Annotated[
    str,
    AfterValidator(_redactable),
    WithJsonSchema(
        component(
            "RedactableField",
            {"type": "string", "enum": list(REDACTABLE), "description": "A field that a run may lack."},
        )
    ),
]


class RedactRequest(BaseModel):
    """What to remove of a run for good."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"description": "What to remove of a run for good."}
    )

    event_id: Name = Field(description="Which run.", examples=["translate-2025-12-24-001"])
    fields: Annotated[list[RedactedField], Field(max_length=len(REDACTABLE))] = Field(
        [], description="The fields that become null.", examples=[["error_details", "context_json"]]
    )
    events: bool = Field(False, description="Whether the payloads of its events become null, too.", examples=[False])

    @model_validator(mode="after")
    def _check_some(self) -> RedactRequest:
        if not self.fields and not self.events:
            raise PydanticCustomError("value_error", "Give fields, or events: true, or both")
        return self


def moment_ago(now: datetime, seconds: float) -> str:
    """Return the stored form of the moment so many seconds before now."""
    return format_timestamp(now - timedelta(seconds=seconds))


class ProcessRequest(BaseModel):
    """The process that works on a run, as it sees itself."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={"description": "The process that works on a run, as it sees itself."},
    )

    pid: Annotated[int, Field(ge=1, le=2**31 - 1), Whole] = Field(description="Its process id.", examples=[4711])
    start_time: Annotated[Count, Whole] = Field(
        description="When it started: clock ticks since boot, field 22 of /proc/PID/stat.", examples=[8_675_309]
    )
    boot_id: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        description="What /proc/sys/kernel/random/boot_id holds.",
        examples=["2b1f63a1-5b0e-4e0a-9d0c-6a2f0d1c8e57"],
    )


def _noon(value: object) -> datetime:
    try:
        return datetime.combine(date.fromisoformat(str(value)), time(12), UTC)
    except ValueError as error:
        raise PydanticCustomError("value_error", "Date must be a day such as 2025-12-24") from error


Day = Annotated[datetime, BeforeValidator(_noon), WithJsonSchema({"type": "string", "format": "date"})]


class ConfirmRequest(BaseModel):
    """What the operator confirms: that runs of an age may be deleted by themselves, or that the clock is right."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "description": "What the operator confirms: that runs of an age may be deleted by themselves, "
            "or that the clock is right."
        },
    )

    prune_after: Age | None = Field(
        None, description="Runs of this age or older may be deleted in this database by themselves (90d)."
    )
    date: Day | None = Field(
        None, description="Or: the clock is right; the date of the day, with which it has to agree."
    )

    @model_validator(mode="after")
    def _check_one(self) -> ConfirmRequest:
        if (self.prune_after is None) == (self.date is None):
            raise PydanticCustomError("value_error", "Give either prune_after or date")
        return self
