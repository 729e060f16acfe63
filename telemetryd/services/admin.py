"""What an operator asks of a running daemon: prune, reap and back up, each in pieces that ingest does not feel."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from telemetryd.engine.sqlite.tools import backup as backups
from telemetryd.engine.sqlite.tools import rotation
from telemetryd.errors import DatabaseError, InvalidRequestError, UnavailableError, sentence
from telemetryd.model import clocks
from telemetryd.model.commands import ConfirmPrune, PruneRuns, ReapRuns, TrustClock
from telemetryd.model.queries import CountPrunable, CountStale
from telemetryd.model.runs import MAX_INTEGER, Name, StatusValue, Timestamp, format_timestamp, validate
from telemetryd.settings import Settings, duration_text, parse_duration
from telemetryd.store import Store

SLICE: Final = 250
"""Runs deleted or cancelled in one transaction unless told otherwise: some 10 ms of the writer's time."""
MAX_SLICE: Final = 1000

_ANY_TIME_OF_THE_DAY: Final = timedelta(hours=12 + 14)
"""How far noon of a day in UTC may be from a moment of that day in any time zone."""

Answer = dict[str, Any]


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


def _noon(value: object) -> datetime:
    try:
        return datetime.combine(date.fromisoformat(str(value)), time(12), UTC)
    except ValueError as error:
        raise PydanticCustomError("value_error", "Date must be a day such as 2025-12-24") from error


Day = Annotated[datetime, BeforeValidator(_noon), WithJsonSchema({"type": "string", "format": "date"})]
Limit = Annotated[int, Field(ge=1, le=MAX_SLICE)]


class _Slice(BaseModel):
    """The runs that one request works on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    older_than: Age | None = Field(None, description="Only runs created longer ago than this, such as 90d or 1h.")
    created_before: Timestamp | None = Field(None, description="Or: only runs created before this moment.")
    agent_name: Name | None = Field(None, description="Only runs of this agent.")
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

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[int, Field(ge=0, le=MAX_INTEGER)] = Field(description="Its id.")
    updated_at: Timestamp = Field(description="When it last changed.")


class PruneRequest(_Slice):
    """Which runs to delete."""

    status: StatusValue | None = Field(None, description="Only runs of this status.")
    versions: Annotated[list[RunVersion], Field(max_length=MAX_SLICE)] | None = Field(
        None, description="Of those only these runs, and only if they have not changed since."
    )


class ReapRequest(_Slice):
    """Which running runs to cancel."""


def moment_ago(now: datetime, seconds: float) -> str:
    """Return the stored form of the moment so many seconds before now."""
    return format_timestamp(now - timedelta(seconds=seconds))


async def prune(store: Store, body: object, now: datetime) -> Answer:
    """Delete one slice of old runs, or count them all.

    Raises:
        InvalidBodyError: with every fault of the body.
        UnavailableError: if it was not done, or may not have been; the same request may be repeated.

    """
    wanted: PruneRequest = validate(PruneRequest, body)
    before = wanted.before(now)
    if wanted.dry_run:
        found = await store.fetch(CountPrunable(before, wanted.agent_name, wanted.status))
        return {
            "dry_run": True,
            "matching": found.runs,
            "oldest": found.oldest,
            "ahead": list(found.ahead),
            "created_before": before,
        }
    versions = None if wanted.versions is None else tuple((run.id, run.updated_at) for run in wanted.versions)
    done = await store.submit(PruneRuns(before, wanted.limit, wanted.agent_name, wanted.status, versions))
    return {
        "pruned": done.runs,
        "more": done.more,
        "created_before": before,
    }


async def reap(store: Store, body: object, now: datetime) -> Answer:
    """Cancel one slice of stale runs, or count them all.

    Raises:
        InvalidBodyError: with every fault of the body.
        UnavailableError: if it was not done, or may not have been; the same request may be repeated.

    """
    wanted: ReapRequest = validate(ReapRequest, body)
    before = wanted.before(now)
    if wanted.dry_run:
        matching = await store.fetch(CountStale(before, wanted.agent_name))
        return {"dry_run": True, "matching": matching, "created_before": before}
    done = await store.submit(ReapRuns(before, wanted.limit, wanted.agent_name))
    return {"reaped": done.runs, "more": done.more, "created_before": before}


class ConfirmRequest(BaseModel):
    """What the operator confirms: that runs of an age may be deleted by themselves, or that the clock is right."""

    model_config = ConfigDict(extra="forbid", strict=True)

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


async def confirm(store: Store, body: object, now: datetime) -> Answer:
    """Write down what the operator confirms for this database.

    Raises:
        InvalidBodyError: with every fault of the body.
        InvalidRequestError: if the clock does not agree with the date.
        UnavailableError: if it was not done, or may not have been; the same request may be repeated.

    """
    wanted: ConfirmRequest = validate(ConfirmRequest, body)
    reading = clocks.read(now)
    if wanted.prune_after is not None:
        before = moment_ago(now, wanted.prune_after)
        found = await store.fetch(CountPrunable(before))
        await store.submit(ConfirmPrune(wanted.prune_after, reading))
        return {
            "prune_after": duration_text(wanted.prune_after),
            "created_before": before,
            "matching": found.runs,
            "oldest": found.oldest,
        }
    assert wanted.date is not None  # noqa: S101 - checked above
    if abs(now - wanted.date) > _ANY_TIME_OF_THE_DAY:
        raise InvalidRequestError(
            f"The clock says {reading.moment}, which is not {wanted.date:%Y-%m-%d}: set the clock of the daemon's "
            "machine right; nothing was confirmed"
        )
    await store.submit(TrustClock(reading))
    return {"clock": reading.moment}


async def back_up(settings: Settings, now: datetime) -> Answer:
    """Make a verified backup in the configured directory (never in one that a request names).

    Raises:
        InvalidRequestError: if no directory is configured.
        UnavailableError: if it could not be made.

    """
    if settings.backup_dir is None:
        raise InvalidRequestError("TELEMETRY_BACKUP_DIR is not set, so there is no place for a backup")
    try:
        done, removed = await asyncio.to_thread(
            _back_up, settings.db_path.absolute(), settings.backup_dir.absolute(), settings.backup_keep, now
        )
    except DatabaseError as error:
        raise UnavailableError(sentence(error)) from error
    return {
        "path": str(done.path),
        "bytes": done.bytes,
        "rows": done.rows,
        "seconds": round(done.seconds, 3),
        "removed": [str(path) for path in removed],
    }


def _back_up(database: Path, directory: Path, keep: int | None, now: datetime) -> tuple[backups.Backup, list[Path]]:
    done = backups.back_up_into(directory, database, now, compress=True)
    return done, [] if keep is None else rotation.rotate(directory, database, keep, done.path)
