"""How each query is said to SQLite, and what its rows become."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from operator import itemgetter
from typing import Final

from telemetryd import events
from telemetryd.commands import (
    Process,
)
from telemetryd.errors import InvalidRequestError
from telemetryd.events import EventPage
from telemetryd.filters import WILDCARD, Filters
from telemetryd.queries import (
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
)
from telemetryd.statements import full_text
from telemetryd.statements.choosing import MAX_ARMS, Values, choose, conditions, glob, old_runs, select_stale
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


def select_page(
    query: ListRuns, created: Span | None = None, agents: tuple[str, ...] | None = None
) -> tuple[str, Values]:
    """Return the SQL text and the parameters that fetch a page, and one row more to see if others follow.

    `created` is a span of created_at outside of which nothing can match, `agents` the names that the patterns stand
    for.
    """
    filters = query.filters if agents is None else named(query.filters, agents)
    # A search of the full text would be done again in each arm.
    index, columns, arms = choose({} if filters.patterns else filters.equal, MAX_ARMS if filters.words is None else 1)
    found, values = conditions(filters, (*columns, "created_after", "created_before"))
    values |= {"rows": query.limit + 1, "offset": query.offset}
    walks = _walks(query, created, values)
    texts = []
    for number, arm in enumerate(arms):
        places = {f"{name}_{number}": name for name in columns}
        values |= {place: arm[name] for place, name in places.items()}
        equal = [f"{name} = :{place}" for place, name in places.items()]
        for walk in walks:
            where = " AND ".join(filter(None, [*equal, *found, walk]))
            texts.append(f"{_SELECT} INDEXED BY {index}" + (f" WHERE {where}" if where else ""))
    return f"{' UNION ALL '.join(texts)} {_NEWEST_FIRST} LIMIT :rows OFFSET :offset", values


def _walks(query: ListRuns, created: Span | None, values: Values) -> list[str]:
    """Return the conditions on created_at for each walk down an index: one bound at each end, for it uses only one.

    A walk that goes on behind a cursor has two parts: the rest of the runs created at the same moment, and all
    runs created before it. A comparison of pairs would only use the moment, and read all of its runs again.
    """
    bounds = query.filters.bounds
    lower, upper, end = bounds.get("created_after"), bounds.get("created_before"), ""
    if created is not None and (lower is None or created[0] is None or str(created[0]) > lower):
        end, values["span_from"] = "created_at >= :span_from", created[0]
    elif lower is not None:
        end, values["created_after"] = "created_at > :created_after", lower
    if created is not None and created[1] is not None:
        upper = min(upper or "~", str(created[1]))
    if query.after is not None and (upper is None or query.after.moment < upper):
        values |= {"moment": query.after.moment, "after_id": query.after.id}
        # The plus keeps the index to the one moment, in which its rows are in the order of their ids.
        parts = [["created_at = :moment", "id < :after_id", end and f"+{end}"], ["created_at < :moment", end]]
    elif upper is not None:
        values["upper"] = upper
        parts = [["created_at < :upper", end]]
    else:
        parts = [[end]]
    return [" AND ".join(filter(None, part)) for part in parts]


_AGENTS: Final = """
    WITH RECURSIVE found (name) AS (
        SELECT min(agent_name) FROM agent_runs INDEXED BY idx_runs_agent_created
            WHERE agent_name >= :first AND agent_name < :last
        UNION ALL
        SELECT (SELECT min(agent_name) FROM agent_runs INDEXED BY idx_runs_agent_created
            WHERE agent_name > name AND agent_name < :last)
        FROM found WHERE name IS NOT NULL
    )
    SELECT name FROM found WHERE name GLOB :pattern LIMIT :most
"""
"""The agents of a pattern: one step down the index for each name between the ends, however many runs it has."""
_BEHIND_ALL: Final = chr(0x10FFFF)


def find_agents(connection: sqlite3.Connection, filters: Filters) -> tuple[str, ...] | None:
    """Return the agents that the filters' patterns stand for; None if there are no patterns, or too many agents."""
    if not filters.patterns:
        return None
    names = set(filters.equal.get(WILDCARD, ()))
    for pattern in filters.patterns:
        prefix = pattern[0]
        ends = {"first": prefix, "last": prefix + _BEHIND_ALL, "pattern": glob(pattern), "most": MAX_ARMS + 1}
        names.update(name for (name,) in connection.execute(_AGENTS, ends))
    return tuple(sorted(names)) if len(names) <= MAX_ARMS else None


def named(filters: Filters, agents: tuple[str, ...]) -> Filters:
    """Return filters in which the patterns are replaced by the agents that they stand for."""
    return replace(filters, patterns=(), equal={**filters.equal, WILDCARD: agents})


PAGE_BYTES: Final = 32 * 1024 * 1024
"""About how much one page may hold, which is in memory several times over while it is answered."""

_texts_of: Final = itemgetter(*map(COLUMNS.index, TEXTS))


def fetch_page(connection: sqlite3.Connection, query: ListRuns) -> Page:
    """Fetch one page of runs.

    Raises:
        InvalidRequestError: if they hold more than `PAGE_BYTES`. A shorter page would lose runs to whoever pages
            by offset.

    """
    full_text.require(connection, query.filters)
    agents = find_agents(connection, query.filters)
    if agents == ():
        return Page([], None)
    rows: list[Row] = []
    size = 0
    for row in connection.execute(*select_page(query, _created_span(connection, query), agents)):
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
    started = {name: query.filters.bounds.get(name) for name in ("start_time_from", "start_time_to")}
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
