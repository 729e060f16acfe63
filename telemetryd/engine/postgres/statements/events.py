"""SQL for the events of a run."""

from __future__ import annotations

from typing import Final

from telemetryd.engine import pages
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.predicates import Values, any_case, may_be_stored
from telemetryd.model import events
from telemetryd.model.event_queries import ListEvents
from telemetryd.model.events import EventPage
from telemetryd.model.values import Row

_COLUMNS: Final = ", ".join(events.COLUMNS)
_FITTING: Final = ", ".join(
    "CASE WHEN total <= %(room)s OR (place = 1 AND %(is_first)s) THEN payload END" if name == "payload" else name
    for name in events.COLUMNS
)


@answers(ListEvents, is_long=lambda query: query.text is not None)
def fetch_events(plain: Plain, query: ListEvents) -> EventPage | None:
    """Fetch the events of a run, about `pages.PAGE_BYTES` of them at most."""
    if not may_be_stored(query.event_id):
        return None
    run = plain.execute("SELECT id FROM agent_runs WHERE event_id = %s", (query.event_id,)).fetchone()
    return None if run is None else read_events(plain, query, run[0], pages.PAGE_BYTES)[0]


def read_events(
    plain: Plain, query: ListEvents, run: int, room: int, *, is_first: bool = True
) -> tuple[EventPage, int]:
    """Return the events of a run that fit into so much room, or one if it `is_first`, and the room that is left."""
    sql, values = select_events(query, run)
    # The first that does not fit is sent as well, without its payload.
    bounded = f"""
        SELECT {_FITTING}, size FROM (
            SELECT *, row_number() OVER (ROWS UNBOUNDED PRECEDING) AS place,
                sum(size) OVER (ROWS UNBOUNDED PRECEDING) AS total
            FROM (SELECT *, coalesce(length(payload::text), 0) AS size FROM ({sql}) AS e OFFSET 0) AS s
        ) AS measured
        WHERE total - size <= %(room)s OR place <= 2
    """
    rows: list[Row] = []
    for *row, size in plain.execute(bounded, {**values, "room": room, "is_first": is_first}):
        room -= size
        if len(rows) == query.limit or (room < 0 and (rows or not is_first)):
            return EventPage(rows, more=True), room
        rows.append(tuple(row))
    return EventPage(rows, more=False), room


def select_events(query: ListEvents, run: int) -> tuple[str, Values]:
    """Return the SQL text and the parameters that fetch a page of events, and one more to see if others follow."""
    values: Values = {"run": run, "rows": query.limit + 1, "offset": query.offset}
    found = ["run = %(run)s"]
    direction, beyond = ("DESC", "<") if query.is_descending else ("ASC", ">")
    if query.after is not None:
        found.append(f"(timestamp, id) {beyond} (%(timestamp)s, %(after_id)s)")
        values |= dict(zip(("timestamp", "after_id"), query.after, strict=True))
    if query.text is not None:
        found.append("(event_type ~ %(text)s OR payload::text ~ %(text)s)")
        values["text"] = any_case(query.text)
    return (
        f"SELECT {_COLUMNS} FROM run_events WHERE {' AND '.join(found)} "
        f"ORDER BY timestamp {direction}, id {direction} LIMIT %(rows)s OFFSET %(offset)s"
    ), values
