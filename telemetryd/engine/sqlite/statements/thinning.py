"""Deletes, cancels and fails runs in slices bounded in runs, bytes and time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import orjson

from telemetryd.engine.budget import Budget
from telemetryd.engine.indexes import Values
from telemetryd.engine.sqlite.statements.predicates import old_runs, stale_runs
from telemetryd.engine.sqlite.statements.sequence import KEEP_EVENT_NUMBERS
from telemetryd.engine.sqlite.statements.sequence import Sequence as CommitSequence
from telemetryd.model.commands import Pruned, PruneRuns, ReapRuns
from telemetryd.model.runs import TEXTS
from telemetryd.model.stats import FACTS, Facts

_PORTION: Final = 50
"""Runs that are chosen and worked on at once; between portions the time is looked at."""
_EVENTS: Final = 5_000
"""Events that one slice deletes at most."""
_EVENT_PORTION: Final = 100

BYTES: Final = " + ".join(f"coalesce(length(agent_runs.{name}), 0)" for name in TEXTS)
"""About how many bytes a run holds, in words of SQL."""

_EVENT_SIZES: Final = f"""
    SELECT json_group_array(json_array(id, size)) FROM (
        SELECT run_events.id AS id, 100 + coalesce(length(payload), 0) AS size
        FROM json_each(?) CROSS JOIN run_events INDEXED BY idx_events_time ON run = value LIMIT {_EVENT_PORTION}
    )
"""
_DELETE_EVENTS: Final = "DELETE FROM run_events WHERE id IN (SELECT value FROM json_each(?))"
_WITHOUT_EVENTS: Final = """
    SELECT value FROM json_each(?) WHERE NOT EXISTS (SELECT 1 FROM run_events WHERE run = value)
"""
_DELETE_RUNS: Final = (
    *(
        f"DELETE FROM {table} WHERE {key} IN (SELECT json_extract(value, '$[0]') FROM json_each(?))"
        for table, key in (
            ("agent_runs", "id"),
            ("run_processes", "run"),
            ("run_changes", "run"),
            ("unconverted_values", "run"),
        )
    ),
    """
    DELETE FROM run_arrivals WHERE (created_at, run) IN (
        SELECT json_extract(value, '$[1]'), json_extract(value, '$[0]') FROM json_each(?)
    )
    """,
)

# The guide's values for a stale run; a run that was changed lately (a heartbeat by PATCH) is not stale.
_CANCEL: Final = f"""
    UPDATE agent_runs SET
        status = 'cancelled', end_time = :now, updated_at = :now,
        error_summary = 'Stale run cleaned up on startup (created at ' || created_at || ')',
        output_summary = 'Process did not complete - cleanup on restart'
    WHERE id IN (SELECT value FROM json_each(:runs))
    RETURNING id, {", ".join(FACTS)}
"""

_VACUUM_PAGES: Final = 256
"""Pages that one slice returns to the file system at most: 1 MiB, a few milliseconds."""
_INCREMENTAL: Final = 2


def prune(cursor: sqlite3.Cursor, sequence: CommitSequence, command: PruneRuns) -> tuple[Pruned, list[Facts]]:
    """Delete a slice of old runs with all that belongs to them, then return some space.

    Returns what was deleted, too.
    """
    budget = Budget()
    deleted: list[Facts] = []
    is_cut = False
    columns = f"agent_runs.id, {', '.join(FACTS)}, event_id, {BYTES}"
    walks, values = old_runs(command)
    statements = [f"SELECT {columns} FROM {walk.in_order} LIMIT :most" for walk in walks]
    for chosen in _portions(_fetch_with(cursor, values), statements, command.limit, budget):
        if not deleted:
            cursor.execute(KEEP_EVENT_NUMBERS)
        done = delete(cursor, chosen, budget)
        sequence.deleted((row[0] for row in done), [row[-1] for row in done])
        deleted += [row[1:-1] for row in done]
        if len(done) < len(chosen):
            is_cut = True
            break
    is_cut = is_cut or budget.is_spent or len(deleted) == command.limit
    return Pruned(len(deleted), is_cut or _return_space(cursor) > 0), deleted


_Fetch = Callable[[str, int], Iterable[tuple[Any, ...]]]


def _fetch_with(cursor: sqlite3.Cursor, values: Values) -> _Fetch:
    return lambda statement, most: cursor.execute(statement, {**values, "most": most})


def _portions(fetch: _Fetch, statements: Iterable[str], limit: int, budget: Budget) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the runs of a slice, a portion at a time; a caller that asks for the next one has dealt with those before.

    Args:
        fetch: runs a statement for at most so many rows.
        statements: each finds some of the runs; the next one is run when it finds no more.
        limit: how many runs there may be.
        budget: what they may take; the first portion begins whatever is left of it.

    """
    left = limit
    for statement in statements:
        while left > 0 and not (budget.is_spent and left < limit):
            chosen = budget.take(fetch(statement, min(left, _PORTION)))
            if not chosen:
                break
            left -= len(chosen)
            yield chosen


def delete(cursor: sqlite3.Cursor, chosen: list[tuple[Any, ...]], budget: Budget) -> list[tuple[Any, ...]]:
    """Delete runs, given as their ids and created_at first.

    Those whose events are too many for this slice stay, with the events that are left.
    """
    ids = orjson.dumps([row[0] for row in chosen]).decode()
    left = _EVENTS
    while events := orjson.loads(cursor.execute(_EVENT_SIZES, (ids,)).fetchone()[0]):
        if left <= 0 or (budget.is_spent and left < _EVENTS):
            without = {run for (run,) in cursor.execute(_WITHOUT_EVENTS, (ids,))}
            chosen = [row for row in chosen if row[0] in without]
            break
        taken = budget.take(events)
        cursor.execute(_DELETE_EVENTS, (orjson.dumps([event for (event,) in taken]).decode(),))
        left -= len(taken)
    pairs = orjson.dumps([row[:2] for row in chosen]).decode()
    for statement in _DELETE_RUNS:
        cursor.execute(statement, (pairs,))
    return chosen


def reap(
    cursor: sqlite3.Cursor, sequence: CommitSequence, command: ReapRuns, now: str
) -> tuple[list[tuple[Any, ...]], bool]:
    """Cancel a slice of stale runs; return the id and the new facts of each, and whether there may be more."""
    budget = Budget()
    reaped: list[tuple[Any, ...]] = []
    walks, values = stale_runs(command)
    statements = [f"SELECT agent_runs.id, {BYTES} FROM {walk.in_order} LIMIT :most" for walk in walks]
    for chosen in _portions(_fetch_with(cursor, values), statements, command.limit, budget):
        runs = orjson.dumps([run for (run,) in chosen]).decode()
        cancelled = cursor.execute(_CANCEL, {"runs": runs, "now": now}).fetchall()
        for run, *_ in cancelled:
            sequence.changed(run)
        reaped += cancelled
    return reaped, budget.is_spent or len(reaped) == command.limit


def _return_space(cursor: sqlite3.Cursor) -> int:
    """Give some free pages back to the file system; return how many more can be."""
    if cursor.execute("PRAGMA auto_vacuum").fetchone()[0] != _INCREMENTAL:
        return 0
    for _ in range(min(_free_pages(cursor), _VACUUM_PAGES)):
        # Each page is a step without columns, and sqlite3 takes one step of such a statement, whatever N is.
        cursor.execute("PRAGMA incremental_vacuum(1)")
    return _free_pages(cursor)


def _free_pages(cursor: sqlite3.Cursor) -> int:
    return int(cursor.execute("PRAGMA freelist_count").fetchone()[0])
