"""SQL for the change feed: what comes after a number of the commit sequence."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any, Final

import orjson

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import full_text
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.numbers import NEWEST
from telemetryd.engine.postgres.statements.predicates import conditions, may_be_stored, one
from telemetryd.model import events
from telemetryd.model.changes import Changes, Cursor, Deleted, Followed, GetFollowed, Known, ListChanges
from telemetryd.model.filters import Filters
from telemetryd.model.runs import COLUMNS, TEXTS
from telemetryd.model.values import Row, SqlValue

_STAND: Final = f"SELECT epoch, horizon, {NEWEST} FROM change_feed"
_CHANGED: Final = "SELECT seq, run FROM run_changes WHERE seq > %s AND seq <= %s ORDER BY seq LIMIT %s"
_DELETED: Final = "SELECT seq, event_id FROM run_deletions WHERE seq > %s AND seq <= %s ORDER BY seq LIMIT %s"

_ID: Final = COLUMNS.index("id")
_SIZE_OF_RUN: Final = " + ".join(f"coalesce(length({name}::text), 0)" for name in TEXTS)
# What does not fit is not sent, besides the first run that does not: the page ends there. One is answered in any case.
_RUNS: Final = f"""
    SELECT {", ".join(COLUMNS)}, size FROM (
        SELECT *, sum(size) OVER (ORDER BY place) AS total FROM (
            SELECT agent_runs.*, place, {_SIZE_OF_RUN} AS size
            FROM unnest(%s::bigint[]) WITH ORDINALITY AS given (number, place) JOIN agent_runs ON id = number
        ) AS sized
    ) AS measured
    WHERE place <= 2 OR total - size <= %s ORDER BY place
"""
_EVENTS: Final = f"""
    SELECT run, {", ".join(events.COLUMNS)}, size FROM (
        SELECT *, sum(size) OVER (ORDER BY id) AS total, row_number() OVER (ORDER BY id) AS place FROM (
            SELECT *, coalesce(length(payload::text), 0) AS size FROM run_events WHERE id > %s ORDER BY id LIMIT %s
        ) AS sized
    ) AS measured
    WHERE place <= 2 OR total - size <= %s ORDER BY id
"""
_AS_IT_IS: Final = "SELECT id, seq, updated_at FROM agent_runs JOIN run_changes ON run = id WHERE event_id = %s"
_WAS_DELETED: Final = "SELECT 1 FROM run_deletions WHERE seq > %s AND event_id = %s LIMIT 1"
_DELETED_AT: Final = "SELECT event_id FROM run_deletions WHERE seq = %s"

_FOLLOWED: Final = f"""
    SELECT {NEWEST}, epoch, seq, begun, (SELECT coalesce(max(id), 0) FROM run_events)
    FROM (SELECT 1) AS always LEFT JOIN followed_feed ON true
"""
_PLACE: Final = "SELECT epoch, seq, begun, last_event, known FROM followed_feeds WHERE source = %s AND epoch <> ''"
_NEWEST_KNOWN: Final = (
    "SELECT seq, event_id, id, updated_at FROM run_changes JOIN agent_runs ON id = run ORDER BY seq DESC LIMIT 1",
    "SELECT seq, event_id, id, updated_at FROM run_changes JOIN agent_runs ON id = run ORDER BY id DESC LIMIT 1",
    "SELECT seq, event_id, NULL, '' FROM run_deletions ORDER BY seq DESC LIMIT 1",
)
"""What was changed last, created last and deleted last."""

_Found = list[tuple[int, int | Deleted]]


def _searches(query: ListChanges) -> bool:
    return any(filters.is_search for filters in query.filters)


@answers(ListChanges, is_long=_searches)
def fetch_changes(plain: Plain, query: ListChanges) -> Changes:
    """Fetch what comes after a number, from one snapshot: two walks, neither of which goes past the other's end.

    Raises:
        InvalidRequestError: if a filter needs the full-text index, and there is none.

    """
    for filters in query.filters:
        full_text.require(plain, filters)
    with plain.transaction():
        epoch, horizon, newest = one(plain, _STAND)
        unknown = next((each for each in query.known if not _holds(plain, query.after, horizon, each)), None)
        found, last = _find(plain, query, newest) if query.after < newest else ([], newest)
        changes, last = _load(plain, found, last, query.most_bytes)
        ids = [what[_ID] for _, what in changes if isinstance(what, tuple)]
        matching = tuple(_matching(plain, ids, filters) if ids else frozenset() for filters in query.filters)
        happened, more = None, False
        if query.events_after is not None:
            happened, more = _happened(plain, query, query.events_after) if last == newest else ([], False)
        return Changes(changes, last, newest, epoch, horizon, matching, happened, more, unknown)


def _holds(plain: Plain, after: int, horizon: int, known: Known) -> bool:
    """Return whether a change that a copy has up to `after` was one of this database, be it the newest still or not."""
    if known.id is None:
        deleted = plain.execute(_DELETED_AT, (known.seq,)).fetchone()
        return known.seq <= horizon if deleted is None else bool(deleted[0] == known.event_id)
    if not may_be_stored(known.event_id):
        return after < horizon
    found = plain.execute(_AS_IT_IS, (known.event_id,)).fetchone()
    if found is not None:
        number, seq, updated_at = found
        if seq == known.seq:
            return bool(number == known.id and updated_at == known.updated_at)
        if seq <= after:
            return False
        if number == known.id:
            return True
    return after < horizon or plain.execute(_WAS_DELETED, (after, known.event_id)).fetchone() is not None


def _find(plain: Plain, query: ListChanges, newest: int) -> tuple[_Found, int]:
    """Return the numbers after the query's, with the run's id or the deleted event_id, and how far they go."""
    found: _Found = []
    last = newest
    for statement in (_CHANGED, _DELETED):
        rows = plain.execute(statement, (query.after, last, query.limit + 1)).fetchall()
        if len(rows) > query.limit:
            last = rows.pop()[0] - 1
        found += rows
    found = sorted((place for place in found if place[0] <= last), key=itemgetter(0))
    if len(found) > query.limit:
        last = found[query.limit][0] - 1
    return found[: query.limit], last


def _load(plain: Plain, found: _Found, last: int, most_bytes: int) -> tuple[list[tuple[int, Row | Deleted]], int]:
    """Return the runs as they are, as many as may be held, and how far they go."""
    ids = [what for _, what in found if isinstance(what, int)]
    rows: dict[int, Row] = {}
    size = 0
    for *row, its_size in plain.execute(_RUNS, (ids, most_bytes)) if ids else ():
        size += its_size
        if size > most_bytes and rows:
            last = next(seq for seq, what in found if what == row[0]) - 1
            break
        rows[row[0]] = tuple(row)
    return [
        (seq, rows[what] if isinstance(what, int) else what)
        for seq, what in found
        if seq <= last and (not isinstance(what, int) or what in rows)
    ], last


def _happened(plain: Plain, query: ListChanges, after: int) -> tuple[list[Row], bool]:
    """Return the events after an id, as many as may be held, and whether there are more."""
    rows: list[Row] = []
    room = query.most_bytes
    for *row, size in plain.execute(_EVENTS, (after, query.limit + 1, room)):
        room -= size
        if len(rows) == query.limit or (room < 0 and rows):
            return rows, True
        rows.append(tuple(row))
    return rows, False


def _matching(plain: Plain, ids: Iterable[SqlValue], filters: Filters) -> frozenset[int]:
    found, values = conditions(filters)
    statement = f"SELECT id FROM agent_runs WHERE {' AND '.join(['id = ANY(%(ids)s::bigint[])', *found])}"
    bound: dict[str, Any] = {**values, "ids": [*ids]}
    return frozenset(run for (run,) in plain.execute(statement, bound))


@answers(GetFollowed)
def fetch_followed(plain: Plain, query: GetFollowed) -> Followed:
    """Fetch how far a copy has come, and the last number and event that stand in it."""
    if query.source is not None:
        return _fetch_place(plain, query.source)
    newest, epoch, seq, begun, last_event = one(plain, _FOLLOWED)
    known = {Known(*row): None for statement in _NEWEST_KNOWN for row in plain.execute(statement)}
    return Followed(newest, None if epoch is None else Cursor(seq, epoch), begun or 0, last_event, tuple(known))


def _fetch_place(plain: Plain, source: str) -> Followed:
    row = plain.execute(_PLACE, (source,)).fetchone()
    if row is None:
        return Followed(0, None, 0, 0)
    epoch, seq, begun, last_event, known = row
    return Followed(seq, Cursor(seq, epoch), begun, last_event, tuple(Known(*each) for each in orjson.loads(known)))
