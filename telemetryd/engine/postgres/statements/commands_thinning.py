"""Deletes, cancels and fails runs in slices bounded in runs, events and bytes.

A run that another daemon's transaction holds is passed over: nobody waits here, so nothing can wait for us in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from telemetryd.engine import budget
from telemetryd.engine.budget import Budget
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.aging import asked_for
from telemetryd.engine.postgres.statements.numbers import Numbers
from telemetryd.model import runs
from telemetryd.model.commands import EndProcess, ProcessEnded, Pruned, PruneRuns, ReapRuns
from telemetryd.model.runs import TEXTS
from telemetryd.model.stats import FACTS, Facts
from telemetryd.model.values import Role, Status

_EVENTS: Final = 5_000
"""Events that one slice deletes at most."""

_JSON: Final = frozenset(runs.columns(Role.JSON))
BYTES: Final = " + ".join(f"coalesce(octet_length(r.{name}{'::text' if name in _JSON else ''}), 0)" for name in TEXTS)
"""About how many bytes a run `r` holds, in words of SQL."""
_FACTS: Final = ", ".join(f"r.{name}" for name in FACTS)
_STATUS: Final = FACTS.index("status")

# A run is as old as its created_at says, unless that lay ahead of its arrival: then it is as old as the arrival.
_AHEAD: Final = """
    r.id IN (SELECT run FROM run_arrivals WHERE created_at >= %(before)s AND arrived_at < %(before)s)
"""
_IS_ARCHIVED: Final = """
    (r.id, r.updated_at) IN (SELECT * FROM unnest(%(ids)s::bigint[], %(versions)s::text[]))
    AND (r.created_at < %(before)s OR EXISTS (
        SELECT 1 FROM run_arrivals AS a WHERE a.created_at = r.created_at AND a.run = r.id AND a.arrived_at < %(before)s
    ))
"""

_DELETE_EVENTS: Final = f"""
    DELETE FROM run_events WHERE id IN (
        SELECT id FROM (
            SELECT id, sum(size) OVER (ORDER BY place, id) AS total, row_number() OVER (ORDER BY place, id) AS number
            FROM (
                SELECT k.place, e.id, 100 + coalesce(octet_length(e.payload::text), 0) AS size
                FROM unnest(%s::bigint[]) WITH ORDINALITY AS k (run, place) JOIN run_events AS e USING (run)
                ORDER BY k.place, e.id LIMIT {_EVENTS}
            ) AS sized
        ) AS measured
        WHERE number = 1 OR total <= %s
    )
"""
_WITHOUT_EVENTS: Final = """
    SELECT k.run FROM unnest(%s::bigint[]) AS k (run)
    WHERE NOT EXISTS (SELECT 1 FROM run_events AS e WHERE e.run = k.run)
"""
_DELETE_RUNS: Final = tuple(
    f"DELETE FROM {table} WHERE {key} = ANY (%s::bigint[])"
    for table, key in (
        ("run_arrivals", "run"),
        ("run_processes", "run"),
        ("run_changes", "run"),
        ("unconverted_values", "run"),
        ("followed_runs", "run"),
        ("agent_runs", "id"),
    )
)

# The guide's values for a stale run; a run that was changed lately (a heartbeat by PATCH) is not stale.
_CANCEL: Final = f"""
    UPDATE agent_runs AS r SET
        status = 'cancelled', end_time = %(now)s, updated_at = %(now)s,
        error_summary = 'Stale run cleaned up on startup (created at ' || created_at || ')',
        output_summary = 'Process did not complete - cleanup on restart'
    WHERE id = ANY (%(runs)s::bigint[])
    RETURNING id, {_FACTS}
"""
_FORGET_PROCESSES: Final = "DELETE FROM run_processes WHERE run = ANY (%s::bigint[])"

_OF_PROCESS: Final = """
    FROM run_processes AS p JOIN agent_runs AS r ON r.id = p.run
    WHERE p.certified_at IS NULL AND p.pid = %(pid)s AND p.start_time = %(start_time)s AND p.boot_id = %(boot_id)s
        AND p.machine = %(machine)s AND p.pid_namespace = %(pid_namespace)s
"""
_REGISTERED: Final = f"""
    SELECT p.run, r.event_id, {_FACTS}, {BYTES} {_OF_PROCESS}
    ORDER BY r.event_id LIMIT %(limit)s FOR NO KEY UPDATE OF r SKIP LOCKED
"""
_ANY_REGISTERED: Final = f"SELECT EXISTS (SELECT 1 {_OF_PROCESS})"
# SQLite's julianday() counts whole milliseconds.
_MS: Final = "round(extract(epoch FROM {}::timestamptz) * 1000)"
_FAIL: Final = f"""
    UPDATE agent_runs AS r SET
        status = 'failure', end_time = greatest(%(ended_at)s, start_time), updated_at = %(now)s,
        duration_ms = greatest(0, {_MS.format("%(ended_at)s")} - {_MS.format("start_time")})::bigint,
        error_summary = %(error_summary)s, error_details = %(error_details)s
    WHERE id = %(run)s AND status = 'running'
    RETURNING {_FACTS}
"""
_CERTIFY: Final = """
    UPDATE run_processes SET
        certified_at = %(now)s, error_summary = %(error_summary)s, error_details = %(error_details)s
    WHERE run = %(run)s
"""


def _choose(plain: Plain, conditions: str, values: dict[str, Any], limit: int) -> list[tuple[Any, ...]]:
    """Hold the oldest runs that meet conditions; return the id, facts, event_id and size of each."""
    return plain.execute(
        f"""
            SELECT r.id, {_FACTS}, r.event_id, {BYTES} FROM agent_runs AS r WHERE {conditions}
            ORDER BY r.created_at, r.id LIMIT %(most)s FOR UPDATE SKIP LOCKED
        """.encode(),
        {**values, "most": limit},
    ).fetchall()


def _both_ages(plain: Plain, also: str, values: dict[str, Any], limit: int) -> list[tuple[Any, ...]]:
    """Hold the oldest runs that were created, or have arrived, before a moment."""
    found = _choose(plain, f"r.created_at < %(before)s{also}", values, limit)
    if len(found) < limit:
        found += _choose(plain, f"{_AHEAD}{also}", values, limit - len(found))
    return found


def prune(plain: Plain, numbers: Numbers, command: PruneRuns) -> tuple[Pruned, list[tuple[int, Facts]]]:
    """Delete a slice of old runs with all that belongs to them; return what was deleted, too."""
    equal, also = asked_for(command, "agent_name", "job_type", "status")
    values: dict[str, Any] = {**equal, "before": command.created_before}
    if command.versions is None:
        found = _both_ages(plain, also, values, command.limit)
    else:
        ids, versions = ([*column] for column in zip(*command.versions, strict=True)) if command.versions else ([], [])
        values |= {"ids": ids, "versions": versions}
        found = _choose(plain, f"{_IS_ARCHIVED}{also}", values, command.limit)
    chosen = Budget().take(found)
    done = delete(plain, chosen)
    numbers.deleted((row[0] for row in done), [row[-1] for row in done])
    is_cut = len(done) < len(found) or len(done) == command.limit
    return Pruned(len(done), is_cut), [(row[0], row[1:-1]) for row in done]


def delete(plain: Plain, chosen: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Delete runs that are held, given with their ids first.

    Those whose events are too many for this slice stay, with the events that are left.
    """
    ids = [row[0] for row in chosen]
    if not ids:
        return []
    if plain.execute(_DELETE_EVENTS, (ids, budget.SLICE_BYTES)).rowcount:
        ids = [run for (run,) in plain.execute(_WITHOUT_EVENTS, (ids,))]
    for statement in _DELETE_RUNS:
        plain.execute(statement, (ids,))
    gone = {*ids}
    return [row for row in chosen if row[0] in gone]


def reap(plain: Plain, numbers: Numbers, command: ReapRuns, now: str) -> tuple[list[tuple[Any, ...]], bool]:
    """Cancel a slice of stale runs; return the id and the new facts of each, and whether there may be more."""
    equal, also = asked_for(command, "agent_name", "job_type")
    also += " AND r.status = 'running' AND r.updated_at < %(before)s"
    found = _both_ages(plain, also, {**equal, "before": command.stale_before}, command.limit)
    ids = [row[0] for row in Budget().take(found)]
    if not ids:
        return [], False
    cancelled = plain.execute(_CANCEL, {"runs": ids, "now": now}).fetchall()
    plain.execute(_FORGET_PROCESSES, (ids,))
    place = {run: number for number, run in enumerate(ids)}
    cancelled.sort(key=lambda row: place[row[0]])
    for run, *_ in cancelled:
        numbers.changed(run)
    return cancelled, len(ids) < len(found) or len(ids) == command.limit


def end_process(
    plain: Plain, numbers: Numbers, command: EndProcess, now: str
) -> tuple[ProcessEnded, list[tuple[int, Facts, Facts]]]:
    """Fail a slice of the runs of a process, or only forget it; return what was changed, too."""
    process = asdict(command.process)
    failed: list[str] = []
    changed: list[tuple[int, Facts, Facts]] = []
    for run, event_id, *facts in Budget().take(plain.execute(_REGISTERED, {**process, "limit": command.limit})):
        if command.death is None or facts[_STATUS] != Status.RUNNING:
            plain.execute(_FORGET_PROCESSES, ([run],))
            continue
        values = {"run": run, "now": now, **asdict(command.death)}
        changed.append((run, tuple(facts), plain.execute(_FAIL, values).fetchall()[0]))
        plain.execute(_CERTIFY, values)
        numbers.changed(run)
        failed.append(event_id)
    more = plain.execute(_ANY_REGISTERED, process).fetchall()[0][0]
    return ProcessEnded(tuple(failed), bool(more)), changed
