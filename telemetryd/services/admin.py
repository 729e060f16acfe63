"""Administration of a running daemon in slices that do not slow down ingest: prune, reap, backup, delete and redact."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from telemetryd.durations import duration_text
from telemetryd.errors import InvalidRequestError, RunNotFoundError
from telemetryd.model import clocks
from telemetryd.model.bodies import validate
from telemetryd.model.commands import ConfirmPrune, DeleteRun, PruneRuns, ReapRuns, RedactRun, TrustClock
from telemetryd.model.queries import CountPrunable, CountStale
from telemetryd.model.requests import (
    BackupRequest,
    ConfirmRequest,
    PruneRequest,
    ReapRequest,
    RedactRequest,
    moment_ago,
)
from telemetryd.model.values import shorten
from telemetryd.store import Store

_ANY_TIME_OF_THE_DAY: Final = timedelta(hours=12 + 14)
"""How far noon of a day in UTC may be from a moment of that day in any time zone."""

Answer = dict[str, Any]


async def prune(store: Store, body: object, now: datetime) -> Answer:
    """Delete one slice of old runs, or count them all.

    Raises:
        InvalidBodyError: with every fault of the body.
        UnavailableError: if it was not done, or may not have been; the same request may be repeated.

    """
    wanted: PruneRequest = validate(PruneRequest, body)
    before = wanted.before(now)
    if wanted.dry_run:
        found = await store.fetch(CountPrunable(before, wanted.agent_name, wanted.job_type, wanted.status))
        return {
            "dry_run": True,
            "matching": found.runs,
            "oldest": found.oldest,
            "ahead": list(found.ahead),
            "created_before": before,
        }
    versions = None if wanted.versions is None else tuple((run.id, run.updated_at) for run in wanted.versions)
    done = await store.submit(
        PruneRuns(before, wanted.limit, wanted.agent_name, wanted.job_type, wanted.status, versions)
    )
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
        matching = await store.fetch(CountStale(before, wanted.agent_name, wanted.job_type))
        return {"dry_run": True, "matching": matching, "created_before": before}
    done = await store.submit(ReapRuns(before, wanted.limit, wanted.agent_name, wanted.job_type))
    return {"reaped": done.runs, "more": done.more, "created_before": before}


async def delete(store: Store, event_id: str) -> Answer:
    """Delete one run with its events, slice by slice if there are many.

    Raises:
        RunNotFoundError: if there is no such run.
        UnavailableError: if it was not done to its end; the same request may be repeated.

    """
    return {"event_id": event_id, "deleted": True, "events": await _remove(store, DeleteRun(event_id))}


async def redact(store: Store, body: object) -> Answer:
    """Remove what fields of a run, or its events, hold.

    Raises:
        InvalidBodyError: with every fault of the body.
        RunNotFoundError: if there is no such run.
        UnavailableError: if it was not done to its end; the same request may be repeated.

    """
    wanted: RedactRequest = validate(RedactRequest, body)
    command = RedactRun(wanted.event_id, tuple(dict.fromkeys(wanted.fields)), wanted.events)
    return {
        "event_id": wanted.event_id,
        "redacted": list(command.fields),
        "events": await _remove(store, command),
    }


async def _remove(store: Store, command: DeleteRun | RedactRun) -> int:
    """Repeat a command until nothing is left to do; return how many events it was done to."""
    events = 0
    while True:
        done = await store.submit(command)
        if done is None:
            raise RunNotFoundError(shorten(command.event_id))
        events += done.events
        if not done.more:
            return events
        command = replace(command, again=True)


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


async def back_up(store: Store, body: object) -> Answer:
    """Make a verified backup in the configured directory (never in one that a request names).

    Raises:
        InvalidBodyError: with every fault of the body.
        InvalidRequestError: if no directory is configured.
        UnavailableError: if it could not be made.

    """
    wanted: BackupRequest = validate(BackupRequest, body)
    made = await store.back_up(compress=wanted.compress)
    return {
        "path": str(made.path),
        "bytes": made.bytes,
        "rows": made.rows,
        "seconds": round(made.seconds, 3),
        "removed": [str(path) for path in made.removed],
    }
