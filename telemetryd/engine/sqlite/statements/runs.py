"""SQL for queries of runs: builds each statement, and converts its rows to answers."""

from __future__ import annotations

import sqlite3
from functools import lru_cache, partial
from typing import Final

import orjson

from telemetryd.engine import pages
from telemetryd.engine.columns import MINUTE, PROCESS
from telemetryd.engine.indexes import MANY, MAX_ARMS, Values, choose
from telemetryd.engine.pages import Span, check_size, ends, is_within, named, walks_far
from telemetryd.engine.registry import always
from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.statements import full_text, json_rows
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.predicates import (
    CHOSEN,
    CHOSEN_LABEL,
    arms_of,
    choose_label,
    conditions,
    glob,
    match_expression,
    old_runs,
    stale_runs,
    together,
)
from telemetryd.model import events
from telemetryd.model.event_queries import ListEvents
from telemetryd.model.events import EventPage
from telemetryd.model.filters import TIME_BOUNDS, Filters, label_parameter
from telemetryd.model.processes import Process
from telemetryd.model.queries import (
    DEFAULT_LIMIT,
    MAX_LIMIT,
    MAX_NAMES,
    CountPrunable,
    CountRuns,
    Counts,
    CountStale,
    GetAgents,
    GetOthers,
    GetRun,
    ListProcesses,
    ListRuns,
    Other,
    Page,
    Position,
    Prunable,
)
from telemetryd.model.runs import COLUMNS, DIGEST
from telemetryd.model.values import Row, SqlValue

_EVENTS: Final = f"SELECT {', '.join(events.COLUMNS)} FROM run_events INDEXED BY idx_events_time WHERE run = :run"
_EVENTS_AFTER: Final = " AND (timestamp, id) > (:timestamp, :id)"
_EVENTS_BEFORE: Final = " AND (timestamp, id) < (:timestamp, :id)"
_EVENTS_UPWARDS: Final = " ORDER BY timestamp, id LIMIT :limit OFFSET :offset"
_EVENTS_DOWNWARDS: Final = " ORDER BY timestamp DESC, id DESC LIMIT :limit OFFSET :offset"
_EVENT_PAYLOAD: Final = events.COLUMNS.index("payload")
_ID: Final = COLUMNS.index("id")
_SELECT_PROCESSES: Final = f"""
    SELECT {", ".join(PROCESS[:-1])}, max({PROCESS[-1]}) FROM run_processes INDEXED BY idx_processes_waiting
    WHERE certified_at IS NULL GROUP BY pid, start_time, boot_id, pid_namespace
"""
_SELECT_RUN: Final = f"SELECT {', '.join(COLUMNS)} FROM agent_runs WHERE event_id = ?"

_MEETS: Final = "last_start >= coalesce(:start_time_from, '') AND first_start <= coalesce(:start_time_to, '~')"
_SPAN_OF_HOURS: Final = f"""
    SELECT
        (SELECT hour FROM run_hours WHERE hour >= first_day AND {_MEETS} ORDER BY hour LIMIT 1),
        (SELECT hour || ';' FROM run_hours WHERE hour < last_day || 'U' AND {_MEETS} ORDER BY hour DESC LIMIT 1)
    FROM (SELECT min(day) AS first_day, max(day) AS last_day FROM run_days WHERE {_MEETS})
"""
"""The hours in which runs that started in a range can have been created; ';' is the character after ':', U after T.

The days come first, because a year has many hours.
"""


def select_page(
    query: ListRuns,
    created: Span | None = None,
    agents: tuple[str, ...] | None = None,
    *,
    is_rare: bool = False,
    label: str | None = None,
) -> tuple[str, Values]:
    """Return the SQL text and the parameters that fetch a page, and one row more to see if others follow.

    `created` is a span of created_at outside of which nothing can match, `agents` the names that the patterns stand
    for, `is_rare` says that few runs have the words that are searched for, and `label` is the one whose runs are
    walked.
    """
    filters = query.filters if agents is None else named(query.filters, agents)
    if label is None:
        source, columns, arms = _source(query, filters, is_rare=is_rare)
        moment, number, select = query.order.column, "id", _select(query.columns)
    else:
        source, columns, arms = CHOSEN, CHOSEN_LABEL, arms_of(label, filters.labels[label])
        moment, number, select = "chosen.created", "chosen.run", _select_chosen(query.columns)
    bounds = {name for name, (column, _) in TIME_BOUNDS.items() if column == query.order.column}
    alone = [*columns, *(["q"] if is_rare else []), *([] if label is None else [label_parameter(label)])]
    found, values = conditions(filters, {*alone, *bounds})
    # Where many conditions leave hardly a row, as SQLite guesses, it would rather sort than walk an index backwards.
    found = [f"likelihood({condition}, 1.0)" for condition in found]
    values |= {"rows": query.limit + 1, "offset": query.offset}
    if is_rare:
        values["q"] = match_expression(filters.words or "")
    walks = _walks(query, created, values, moment, number)
    texts = []
    for place_of_arm, arm in enumerate(arms):
        places = {f"{name.replace('.', '_')}_{place_of_arm}": name for name in columns}
        values |= {place: arm[name] for place, name in places.items()}
        equal = [f"{name} = :{place}" for place, name in places.items()]
        for walk in walks:
            where = " AND ".join(filter(None, [*equal, *found, walk]))
            texts.append(f"{select} FROM {source}" + (f" WHERE {where}" if where else ""))
    direction = "DESC" if query.order.descending else "ASC"
    order = f"ORDER BY {query.order.column} {direction}, id {direction}"
    return f"{' UNION ALL '.join(texts)} {order} LIMIT :rows OFFSET :offset", values


FOUND: Final = (
    "(SELECT rowid AS found FROM runs_text WHERE runs_text MATCH :q) CROSS JOIN agent_runs NOT INDEXED ON id = found"
)
"""The runs with the words that are searched for, one by one."""


def _source(query: ListRuns, filters: Filters, *, is_rare: bool) -> tuple[str, tuple[str, ...], list[Values]]:
    """Return where runs come from, the columns that have one value in each walk, and these values for each of them."""
    if is_rare:
        return FOUND, (), [{}]
    if query.order.column != "created_at":
        return "agent_runs INDEXED BY idx_runs_start", (), [{}]
    # A search for words would be done again in each arm.
    index, columns, arms = choose({} if filters.patterns else filters.equal, MAX_ARMS if filters.words is None else 1)
    return f"agent_runs INDEXED BY {index}", columns, arms


@lru_cache(maxsize=64)
def _select(columns: tuple[str, ...]) -> str:
    return f"SELECT {', '.join(columns)}"


_OF_CHOSEN: Final = {"created_at": "chosen.created AS created_at", "id": "chosen.run AS id"}


@lru_cache(maxsize=64)
def _select_chosen(columns: tuple[str, ...]) -> str:
    """Return the same of a walk through the runs of a label, in whose order the columns of its index are."""
    return f"SELECT {', '.join(_OF_CHOSEN.get(name, name) for name in columns)}"


def _walks(query: ListRuns, created: Span | None, values: Values, column: str, number: str) -> list[str]:
    """Return the conditions on the order's column for each walk of an index: one bound at each end, it uses only one.

    A walk that continues after a cursor has two parts: the rest of the runs of the same moment, and all runs beyond
    it. A comparison of pairs would only use the moment, and read all of its runs again. `column` and `number` are what
    the index calls the order's column and the id.
    """
    after = query.after
    lower, upper = ends(query, created)
    near, far, beyond = (upper, lower, "<") if query.order.descending else (lower, upper, ">")
    end = ""
    if far is not None:
        end, values["far"] = f"{column} {far[0]} :far", far[1]
    if after is not None and (near is None or is_within(after.moment, near)):
        values |= {"moment": after.moment, "after_id": after.id}
        # The plus keeps the index to the one moment, in which its rows are in the order of their ids.
        parts = [
            [f"{column} = :moment", f"{number} {beyond} :after_id", end and f"+{end}"],
            [f"{column} {beyond} :moment", end],
        ]
    elif near is not None:
        values["near"] = near[1]
        parts = [[f"{column} {near[0]} :near", end]]
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


def find_agents(connection: sqlite3.Connection, filters: Filters) -> tuple[str, ...] | None:
    """Return the agents that the filters' patterns stand for; None if there are no patterns, or too many agents."""
    return pages.find_agents(
        filters, lambda pattern, bound: connection.execute(_AGENTS, {**bound, "pattern": glob(pattern)})
    )


_COUNT_SOME: Final = "SELECT count(*) FROM (SELECT 1 FROM runs_text WHERE runs_text MATCH ? LIMIT ?)"


def _is_rare(connection: sqlite3.Connection, filters: Filters) -> bool:
    """Return whether few runs have the words that are searched for."""
    if filters.words is None:
        return False
    found = connection.execute(_COUNT_SOME, (match_expression(filters.words), MANY)).fetchone()[0]
    return bool(found < MANY)


def _label(connection: sqlite3.Connection, query: ListRuns, *, is_rare: bool) -> str | None:
    """Return the label whose runs are walked, if the answer is in the order of their index."""
    if is_rare or query.order.column != "created_at":
        return None
    return choose_label(connection, query.filters, MAX_ARMS if query.filters.words is None else 1)


@answers(ListRuns, is_long=walks_far)
def fetch_page(connection: sqlite3.Connection, query: ListRuns) -> Page:
    """Fetch one page of runs.

    Raises:
        InvalidRequestError: if they hold more than `PAGE_BYTES`. A shorter page would lose runs to clients that page
            by offset.

    """
    full_text.require(connection, query.filters)
    agents = find_agents(connection, query.filters)
    if agents == ():
        return Page([], None)
    is_rare = _is_rare(connection, query.filters)
    label = _label(connection, query, is_rare=is_rare)
    select = select_page(query, _created_span(connection, query), agents, is_rare=is_rare, label=label)
    render = partial(json_rows.render, connection, select, query.answered, query.order.column)
    try:
        runs, places = render(pages.PAGE_BYTES)
    except json_rows.TooLargeError:
        check_size([size for (size,) in connection.execute(*json_rows.sizes(select, query.answered))], query.limit)
        runs, places = render(None)
    shown = runs[: query.limit]
    if query.with_events:
        shown = _with_events(connection, shown, [run for run, _ in places])
    if len(runs) <= query.limit:
        return Page(shown, None)
    run, moment = places[query.limit - 1]
    return Page(shown, Position(moment, run))


def _with_events(connection: sqlite3.Connection, shown: list[str], ids: list[int]) -> list[str]:
    """Return runs, each a JSON object, with their first events, which hold about `PAGE_BYTES` together."""
    room = pages.PAGE_BYTES
    whole: list[str] = []
    for run, id_ in zip(shown, ids, strict=False):
        page, room = _read_events(connection, ListEvents("", DEFAULT_LIMIT), id_, room, is_first=not whole)
        whole.append(f"{run[:-1]},{orjson.dumps(events.page_fields(page)).decode()[1:]}")
    return whole


def _created_span(connection: sqlite3.Connection, query: ListRuns) -> Span | None:
    started = {name: query.filters.bounds.get(name) for name in ("start_time_from", "start_time_to")}
    if not any(started.values()):
        return None
    span: Span = connection.execute(_SPAN_OF_HOURS, started).fetchone()
    return span


_SELECT_OTHERS: Final = f"""
    SELECT {", ".join(COLUMNS)}, {DIGEST}
    FROM (SELECT json_extract(value, '$[0]') AS asked, json_extract(value, '$[1]') AS its_digest FROM json_each(?))
        CROSS JOIN agent_runs INDEXED BY idx_runs_event_id ON event_id = asked
    WHERE {DIGEST} IS NOT its_digest
"""


@answers(GetOthers)
def fetch_others(connection: sqlite3.Connection, query: GetOthers) -> list[Other]:
    """Fetch the runs whose first body has not the digest that is asked for."""
    rows = connection.execute(_SELECT_OTHERS, (orjson.dumps(query.digests).decode(),))
    return [Other(tuple(row), digest) for *row, digest in rows]


_SELECT_AGENTS: Final = """
    SELECT event_id, agent_name FROM json_each(?) AS asked
        CROSS JOIN agent_runs INDEXED BY idx_runs_event_id ON event_id = asked.value
"""


@answers(GetAgents)
def fetch_agents(connection: sqlite3.Connection, query: GetAgents) -> dict[str, str]:
    """Fetch the agents of runs."""
    return dict(connection.execute(_SELECT_AGENTS, (orjson.dumps(query.event_ids).decode(),)).fetchall())


@answers(GetRun)
def fetch_run(connection: sqlite3.Connection, query: GetRun) -> tuple[Row, EventPage] | None:
    """Fetch the run with an event_id, and its first events."""
    row: Row | None = connection.execute(_SELECT_RUN, (query.event_id,)).fetchone()
    if row is None:
        return None
    if not query.events:
        return row, EventPage([], more=False)
    return row, _read_events(connection, ListEvents(query.event_id, query.events), row[_ID], pages.PAGE_BYTES)[0]


@answers(ListEvents, is_long=lambda query: query.text is not None)
def fetch_events(connection: sqlite3.Connection, query: ListEvents) -> EventPage | None:
    """Fetch the events of a run, about `PAGE_BYTES` of them at most."""
    run = connection.execute("SELECT id FROM agent_runs WHERE event_id = ?", (query.event_id,)).fetchone()
    return None if run is None else _read_events(connection, query, run[0], pages.PAGE_BYTES)[0]


def _read_events(
    connection: sqlite3.Connection, query: ListEvents, run: SqlValue, room: int, *, is_first: bool = True
) -> tuple[EventPage, int]:
    """Return the events of a run that fit into so many bytes, or one if it `is_first`, and the room that is left."""
    values: Values = {"run": run, "limit": query.limit + 1, "offset": query.offset}
    sql = _EVENTS
    if query.after is not None:
        sql += _EVENTS_BEFORE if query.is_descending else _EVENTS_AFTER
        values |= dict(zip(("timestamp", "id"), query.after, strict=True))
    if query.text is not None:
        in_type, bound = searching.condition("event_type", query.text)
        in_payload, _ = searching.condition("payload", query.text)
        sql += f" AND ({in_type} OR {in_payload})"
        values |= bound
    sql += _EVENTS_DOWNWARDS if query.is_descending else _EVENTS_UPWARDS
    rows: list[Row] = []
    for row in connection.execute(sql, values):
        room -= len(row[_EVENT_PAYLOAD] or "")
        if len(rows) == query.limit or (room < 0 and (rows or not is_first)):
            return EventPage(rows, more=True), room
        rows.append(row)
    return EventPage(rows, more=False), room


@answers(ListProcesses)
def fetch_processes(connection: sqlite3.Connection, query: ListProcesses) -> list[Process]:
    """Fetch each process that is registered and not certified, with the most out-of-memory kills it is known with."""
    return [Process(*row) for row in connection.execute(_SELECT_PROCESSES)]


@answers(CountPrunable, is_long=always)
def count_prunable(connection: sqlite3.Connection, query: CountPrunable) -> Prunable:
    """Count the runs that pruning would delete."""
    walks, values = old_runs(query)
    found = connection.execute(f"SELECT count(*), min(since) FROM ({together(walks, 'agent_runs.id')})", values)
    ahead = connection.execute(f"SELECT event_id FROM {walks[-1].source} LIMIT {MAX_LIMIT}", values)
    runs, oldest = found.fetchone()
    return Prunable(runs, oldest, tuple(event_id for (event_id,) in ahead))


@answers(CountStale)
def count_stale(connection: sqlite3.Connection, query: CountStale) -> int:
    """Count the runs that reaping would cancel."""
    walks, values = stale_runs(query)
    return int(connection.execute(f"SELECT count(*) FROM ({together(walks, 'agent_runs.id')})", values).fetchone()[0])


@answers(CountRuns)
def fetch_counts(connection: sqlite3.Connection, query: CountRuns) -> Counts:
    """Read the totals that the writer keeps; their cost does not grow with the number of runs.

    `recent` are the runs created in the minutes from that of `since` to that of `until`.
    """
    agents = connection.execute(
        "SELECT agent_name, sum(runs) AS its FROM run_totals GROUP BY agent_name HAVING its > 0 "
        "ORDER BY its DESC, agent_name LIMIT ?",
        (MAX_NAMES,),
    )
    job_types = connection.execute(
        "SELECT DISTINCT job_type FROM run_totals WHERE runs > 0 ORDER BY job_type LIMIT ?", (MAX_NAMES,)
    )
    recent = connection.execute(
        "SELECT coalesce(sum(runs), 0) FROM run_minutes WHERE minute BETWEEN ? AND ?",
        (query.since[:MINUTE], query.until[:MINUTE]),
    )
    sums = connection.execute(
        "SELECT coalesce(sum(runs), 0), count(DISTINCT agent_name), count(DISTINCT job_type) "
        "FROM run_totals WHERE runs > 0"
    )
    return Counts(dict(agents), tuple(row[0] for row in job_types), recent.fetchone()[0], *sums.fetchone())
