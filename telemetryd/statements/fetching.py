"""How each query is said to SQLite, and what its rows become."""

from __future__ import annotations

import sqlite3
from operator import itemgetter
from typing import Final

from telemetryd import events
from telemetryd.commands import (
    Process,
)
from telemetryd.errors import InvalidRequestError
from telemetryd.events import EventPage
from telemetryd.queries import (
    TIME_BOUNDS,
    CountPrunable,
    Counts,
    CountStale,
    GetRun,
    ListEvents,
    ListRuns,
    Page,
    Position,
)
from telemetryd.runs import (
    COLUMNS,
    TEXTS,
    Row,
    SqlValue,
    Status,
)
from telemetryd.statements.choosing import INDEXES, old_runs, select_stale
from telemetryd.statements.transaction import MINUTE, PROCESS

_SELECT_EVENTS: Final = f"""
    SELECT {", ".join(events.COLUMNS)} FROM run_events INDEXED BY idx_events_time
    WHERE run = ? ORDER BY timestamp, id LIMIT ? OFFSET ?
"""  # noqa: S608 - names from the definition of an event
_EVENT_PAYLOAD: Final = events.COLUMNS.index("payload")
_SELECT_PROCESSES: Final = f"""
    SELECT {", ".join(PROCESS[:-1])}, max({PROCESS[-1]}) FROM run_processes INDEXED BY idx_processes_waiting
    WHERE certified_at IS NULL GROUP BY pid, start_time, boot_id, pid_namespace
"""  # noqa: S608 - names from the definition of a process
_SELECT: Final = f"SELECT {', '.join(COLUMNS)} FROM agent_runs"  # noqa: S608 - names from the definition
_NEWEST_FIRST: Final = "ORDER BY created_at DESC, id DESC"


_SPAN_OF_HOURS: Final = """
    SELECT min(hour), max(hour) || ';' FROM run_hours
    WHERE last_start >= coalesce(:start_time_from, '') AND first_start <= coalesce(:start_time_to, '~')
"""
"""The hours in which runs that started in a range can have been created; ';' is the character behind ':'."""

Span = tuple[SqlValue, SqlValue]


def select_page(query: ListRuns, created: Span | None = None) -> tuple[str, dict[str, SqlValue]]:
    """Return the SQL text and the parameters that fetch a page, and one row more to see if others follow.

    `created` is a span of created_at outside of which nothing can match.
    """
    index, merge_statuses = INDEXES[frozenset(query.equal)]
    values: dict[str, SqlValue] = {**query.equal, **query.bounds, "rows": query.limit + 1, "offset": query.offset}
    conditions = [f"{name} = :{name}" for name in query.equal]
    for name, (column, comparison) in TIME_BOUNDS.items():
        if name in query.bounds and column != "created_at":
            conditions.append(f"{column} {comparison} :{name}")
    walks = _walks(query, created, values)
    statuses = [f"status = '{status}'" for status in Status] if merge_statuses else []
    arms = []
    for walk in walks:
        for status in statuses or [""]:
            where = " AND ".join(filter(None, [status, *conditions, walk]))
            arms.append(f"{_SELECT} INDEXED BY {index}" + (f" WHERE {where}" if where else ""))
    return f"{' UNION ALL '.join(arms)} {_NEWEST_FIRST} LIMIT :rows OFFSET :offset", values


def _walks(query: ListRuns, created: Span | None, values: dict[str, SqlValue]) -> list[str]:
    """Return the conditions on created_at for each walk down an index: one bound at each end, for it uses only one.

    A walk that goes on behind a cursor has two parts: the rest of the runs created at the same moment, and all
    runs created before it. A comparison of pairs would only use the moment, and read all of its runs again.
    """
    lower, upper, end = query.bounds.get("created_after"), query.bounds.get("created_before"), ""
    if created is not None and (lower is None or created[0] is None or str(created[0]) > lower):
        end, values["span_from"] = "created_at >= :span_from", created[0]
    elif lower is not None:
        end = "created_at > :created_after"
    if created is not None and created[1] is not None:
        upper = min(upper or "~", str(created[1]))
    if query.after is not None and (upper is None or query.after.created_at < upper):
        values |= {"moment": query.after.created_at, "after_id": query.after.id}
        # The plus keeps the index to the one moment, in which its rows are in the order of their ids.
        parts = [["created_at = :moment", "id < :after_id", end and f"+{end}"], ["created_at < :moment", end]]
    elif upper is not None:
        values["upper"] = upper
        parts = [["created_at < :upper", end]]
    else:
        parts = [[end]]
    return [" AND ".join(filter(None, part)) for part in parts]


PAGE_BYTES: Final = 32 * 1024 * 1024
"""About how much one page may hold, which is in memory several times over while it is answered."""

_texts_of: Final = itemgetter(*map(COLUMNS.index, TEXTS))


def fetch_page(connection: sqlite3.Connection, query: ListRuns) -> Page:
    """Fetch one page of runs.

    Raises:
        InvalidRequestError: if they hold more than `PAGE_BYTES`. A shorter page would lose runs to whoever pages
            by offset.

    """
    rows: list[Row] = []
    size = 0
    for row in connection.execute(*select_page(query, _created_span(connection, query))):
        size += len("".join(filter(None, _texts_of(row))))
        if size > PAGE_BYTES and 0 < len(rows) < query.limit:
            raise InvalidRequestError(
                f"Invalid limit: {query.limit}; the first {len(rows)} of these runs hold {PAGE_BYTES >> 20} MiB, "
                f"the most that one answer holds: ask for at most {len(rows)} at a time"
            )
        rows.append(row)
    if len(rows) <= query.limit:
        return Page(rows, None)
    rows.pop()
    last = dict(zip(COLUMNS, rows[-1], strict=True))
    return Page(rows, Position(str(last["created_at"]), int(last["id"] or 0)))


def _created_span(connection: sqlite3.Connection, query: ListRuns) -> Span | None:
    started = {name: query.bounds.get(name) for name in ("start_time_from", "start_time_to")}
    if not any(started.values()):
        return None
    span: Span = connection.execute(_SPAN_OF_HOURS, started).fetchone()
    return span


def fetch_run(connection: sqlite3.Connection, query: GetRun) -> Row | None:
    """Fetch the run with an event_id."""
    row: Row | None = connection.execute(f"{_SELECT} WHERE event_id = ?", (query.event_id,)).fetchone()
    return row


def fetch_events(connection: sqlite3.Connection, query: ListEvents) -> dict[str, EventPage]:
    """Fetch the events of each of the runs that there are, by event_id; all pages together hold about `PAGE_BYTES`."""
    pages: dict[str, EventPage] = {}
    room = PAGE_BYTES
    for event_id in query.event_ids:
        run = connection.execute("SELECT id FROM agent_runs WHERE event_id = ?", (event_id,)).fetchone()
        if run is None:
            continue
        rows: list[Row] = []
        more = False
        for row in connection.execute(_SELECT_EVENTS, (*run, query.limit + 1, query.offset)):
            room -= len(row[_EVENT_PAYLOAD] or "")
            more = len(rows) == query.limit or (room < 0 and bool(rows or pages))
            if more:
                break
            rows.append(row)
        pages[event_id] = EventPage(rows, more)
    return pages


def fetch_processes(connection: sqlite3.Connection) -> list[Process]:
    """Fetch each process that is registered and not certified, with the most out-of-memory kills it is known with."""
    return [Process(*row) for row in connection.execute(_SELECT_PROCESSES)]


def count_prunable(connection: sqlite3.Connection, query: CountPrunable) -> int:
    """Count the runs that pruning would delete."""
    index, conditions, values = old_runs(query)
    where = " AND ".join(conditions)
    return int(
        connection.execute(f"SELECT count(*) FROM agent_runs INDEXED BY {index} WHERE {where}", values).fetchone()[0]  # noqa: S608 - our own words
    )


def count_stale(connection: sqlite3.Connection, query: CountStale) -> int:
    """Count the runs that reaping would cancel."""
    return int(connection.execute(*select_stale("count(*)", query.stale_before, query.agent_name)).fetchone()[0])


def fetch_counts(connection: sqlite3.Connection, recent_since: str, now: str) -> Counts:
    """Read the totals that the writer keeps; their cost does not grow with the number of runs.

    `recent` are the runs created in the minutes from that of `recent_since` to that of `now`.
    """
    agents = connection.execute("SELECT agent_name, sum(runs) FROM run_totals GROUP BY agent_name HAVING sum(runs) > 0")
    job_types = connection.execute("SELECT DISTINCT job_type FROM run_totals WHERE runs > 0 ORDER BY job_type")
    recent = connection.execute(
        "SELECT coalesce(sum(runs), 0) FROM run_minutes WHERE minute BETWEEN ? AND ?",
        (recent_since[:MINUTE], now[:MINUTE]),
    )
    return Counts(dict(agents), tuple(row[0] for row in job_types), recent.fetchone()[0])
