"""SQL for the change feed: what comes after a number of the commit sequence."""

from __future__ import annotations

import sqlite3
from operator import itemgetter
from typing import Final

import orjson

from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.columns import NEWEST
from telemetryd.engine.sqlite.statements.predicates import conditions
from telemetryd.model import events
from telemetryd.model.changes import Changes, Deleted, Known, ListChanges
from telemetryd.model.filters import Filters
from telemetryd.model.runs import COLUMNS, TEXTS
from telemetryd.model.values import Row

_SCANNED: Final = 10_000
"""Runs that are looked at for one answer, which have changed since they were made and so are found elsewhere."""

_STAND: Final = f"SELECT epoch, horizon, {NEWEST} FROM change_feed"
_CHANGED: Final = """
    SELECT seq, run FROM run_changes INDEXED BY idx_changes_seq WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?
"""
_DELETED: Final = "SELECT seq, event_id FROM run_deletions WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?"
_SCAN_ENDS: Final = f"""
    SELECT id FROM agent_runs NOT INDEXED WHERE id > ? AND id <= ? ORDER BY id LIMIT 1 OFFSET {_SCANNED}
"""
_CREATED: Final = """
    SELECT id, id FROM agent_runs NOT INDEXED
    WHERE id > ? AND id <= ? AND NOT EXISTS (SELECT 1 FROM run_changes WHERE run = id) ORDER BY id LIMIT ?
"""
# A cross join is done in the order in which it stands.
_RUNS: Final = f"""
    SELECT {", ".join(COLUMNS)} FROM (SELECT value AS number FROM json_each(?)) CROSS JOIN agent_runs ON id = number
"""
_EVENTS: Final = f"""
    SELECT run, {", ".join(events.COLUMNS)} FROM run_events NOT INDEXED WHERE id > ? ORDER BY id LIMIT ?
"""
_PAYLOAD: Final = 1 + events.COLUMNS.index("payload")

_MATCHING: Final = """
    SELECT id FROM (SELECT value AS number FROM json_each(:ids)) CROSS JOIN agent_runs ON id = number WHERE
"""

_AS_IT_IS: Final = """
    SELECT id, coalesce((SELECT seq FROM run_changes WHERE run = id), id), updated_at FROM agent_runs WHERE event_id = ?
"""
_WAS_DELETED: Final = "SELECT 1 FROM run_deletions WHERE seq > ? AND event_id = ? LIMIT 1"
_DELETED_AT: Final = "SELECT event_id FROM run_deletions WHERE seq = ?"

_texts_of: Final = itemgetter(*map(COLUMNS.index, TEXTS))

_Found = list[tuple[int, int | Deleted]]


def _searches(query: ListChanges) -> bool:
    return any(filters.is_search for filters in query.filters)


@answers(ListChanges, is_long=_searches)
def fetch_changes(connection: sqlite3.Connection, query: ListChanges) -> Changes:
    """Fetch what comes after a number, from one snapshot: three walks, none of which goes past the others' ends.

    Raises:
        InvalidRequestError: if a filter needs the full-text index, and there is none.

    """
    for filters in query.filters:
        full_text.require(connection, filters)
    connection.execute("BEGIN")
    try:
        epoch, horizon, newest = connection.execute(_STAND).fetchone()
        unknown = next((each for each in query.known if not _holds(connection, query.after, horizon, each)), None)
        found, last = _find(connection, query, newest)
        changes, last = _load(connection, found, last, query.most_bytes)
        ids = orjson.dumps([what[0] for _, what in changes if isinstance(what, tuple)]).decode()
        matching = tuple(_matching(connection, ids, filters) for filters in query.filters)
        happened, more = None, False
        if query.events_after is not None:
            happened, more = _happened(connection, query) if last == newest else ([], False)
        return Changes(changes, last, newest, epoch, horizon, matching, happened, more, unknown)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _holds(connection: sqlite3.Connection, after: int, horizon: int, known: Known) -> bool:
    """Return whether a change that a copy has up to `after` was one of this database, be it the newest still or not."""
    if known.id is None:
        deleted = connection.execute(_DELETED_AT, (known.seq,)).fetchone()
        return known.seq <= horizon if deleted is None else bool(deleted[0] == known.event_id)
    found = connection.execute(_AS_IT_IS, (known.event_id,)).fetchone()
    if found is None:
        return after < horizon or connection.execute(_WAS_DELETED, (after, known.event_id)).fetchone() is not None
    number, seq, updated_at = found
    if seq == known.seq:
        return bool(number == known.id and updated_at == known.updated_at)
    return bool(seq > after and (number == known.id or number > after))


def _find(connection: sqlite3.Connection, query: ListChanges, newest: int) -> tuple[_Found, int]:
    """Return the numbers after the query's, with the run's id or the deleted event_id, and how far they go."""
    found: _Found = []
    last = newest
    for sql in (_CHANGED, _DELETED, _CREATED):
        if sql is _CREATED:
            beyond = connection.execute(_SCAN_ENDS, (query.after, last)).fetchone()
            last = last if beyond is None else beyond[0] - 1
        rows = connection.execute(sql, (query.after, last, query.limit + 1)).fetchall()
        if len(rows) > query.limit:
            last = rows.pop()[0] - 1
        found += rows
    found = sorted((place for place in found if place[0] <= last), key=itemgetter(0))
    if len(found) > query.limit:
        last = found[query.limit][0] - 1
    return found[: query.limit], last


def _load(
    connection: sqlite3.Connection, found: _Found, last: int, most_bytes: int
) -> tuple[list[tuple[int, Row | Deleted]], int]:
    """Return the runs as they are, as many as may be held, and how far they go."""
    ids = orjson.dumps([what for _, what in found if isinstance(what, int)]).decode()
    rows: dict[int, Row] = {}
    size = 0
    for row in connection.execute(_RUNS, (ids,)):
        size += len("".join(filter(None, _texts_of(row))))
        if size > most_bytes and rows:
            last = next(seq for seq, what in found if what == row[0]) - 1
            break
        rows[row[0]] = row
    return [
        (seq, rows[what] if isinstance(what, int) else what)
        for seq, what in found
        if seq <= last and (not isinstance(what, int) or what in rows)
    ], last


def _happened(connection: sqlite3.Connection, query: ListChanges) -> tuple[list[Row], bool]:
    """Return the events after the query's id, as many as may be held, and whether there are more."""
    rows: list[Row] = []
    room = query.most_bytes
    for row in connection.execute(_EVENTS, (query.events_after, query.limit + 1)):
        room -= len(row[_PAYLOAD] or "")
        if len(rows) == query.limit or (room < 0 and rows):
            return rows, True
        rows.append(row)
    return rows, False


def _matching(connection: sqlite3.Connection, ids: str, filters: Filters) -> frozenset[int]:
    found, values = conditions(filters)
    sql = f"{_MATCHING} {' AND '.join(found) or 'true'}"
    return frozenset(run for (run,) in connection.execute(sql, {**values, "ids": ids}))
