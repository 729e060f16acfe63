"""SQL for runs that are named by their event_ids."""

from __future__ import annotations

from typing import Final

from telemetryd.engine import pages
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.events import read_events
from telemetryd.engine.postgres.statements.predicates import may_be_stored
from telemetryd.model.event_queries import ListEvents
from telemetryd.model.events import EventPage
from telemetryd.model.queries import GetAgents, GetOthers, GetRun, Other
from telemetryd.model.runs import COLUMNS, DIGEST
from telemetryd.model.values import Row

_ID: Final = COLUMNS.index("id")
_SELECT_RUN: Final = f"SELECT {', '.join(COLUMNS)} FROM agent_runs WHERE event_id = %s"
_SELECT_OTHERS: Final = f"""
    SELECT {", ".join(COLUMNS)}, {DIGEST}
    FROM unnest(%s::text[], %s::bigint[]) WITH ORDINALITY AS given (asked, its_digest, place)
        JOIN agent_runs ON event_id = asked
    WHERE {DIGEST} IS DISTINCT FROM its_digest ORDER BY place
"""
_SELECT_AGENTS: Final = "SELECT event_id, agent_name FROM agent_runs WHERE event_id = ANY(%s::text[])"


@answers(GetRun)
def fetch_run(plain: Plain, query: GetRun) -> tuple[Row, EventPage] | None:
    """Fetch the run with an event_id, and its first events."""
    if not may_be_stored(query.event_id):
        return None
    row: Row | None = plain.execute(_SELECT_RUN, (query.event_id,)).fetchone()
    if row is None:
        return None
    if not query.events:
        return row, EventPage([], more=False)
    run = row[_ID]
    assert isinstance(run, int)  # noqa: S101 - the column is a bigint
    return row, read_events(plain, ListEvents(query.event_id, query.events), run, pages.PAGE_BYTES)[0]


@answers(GetOthers)
def fetch_others(plain: Plain, query: GetOthers) -> list[Other]:
    """Fetch the runs whose first body has not the digest that is asked for."""
    event_ids, digests = zip(*query.digests, strict=True) if query.digests else ((), ())
    rows = plain.execute(_SELECT_OTHERS, ([*event_ids], [*digests]))
    return [Other(tuple(row), digest) for *row, digest in rows]


@answers(GetAgents)
def fetch_agents(plain: Plain, query: GetAgents) -> dict[str, str]:
    """Fetch the agents of runs."""
    return dict(plain.execute(_SELECT_AGENTS, ([*filter(may_be_stored, query.event_ids)],)).fetchall())
