"""SQL for confirmations: what the operator confirmed, when the clock was right, and which runs came early."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import astuple
from typing import Final

import orjson

from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.model.clocks import Reading
from telemetryd.model.commands import ConfirmPrune, TrustClock
from telemetryd.model.queries import Confirmed, GetConfirmed
from telemetryd.model.runs import CREATED_AT, EVENT_ID
from telemetryd.model.values import Row

_TRUST: Final = "INSERT INTO trusted_clock (moment, boot_id, up_s) VALUES (?, ?, ?)"
_CLOCK: Final = "SELECT moment, boot_id, up_s FROM trusted_clock"
_NEWEST: Final = """
    SELECT max(updated_at) FROM (
        SELECT updated_at FROM agent_runs WHERE id = (SELECT max(id) FROM agent_runs)
        UNION ALL
        SELECT updated_at FROM agent_runs WHERE id = (SELECT run FROM run_changes ORDER BY seq DESC LIMIT 1)
        UNION ALL
        SELECT max(applied_at) FROM schema_migrations
    )
"""
_AHEAD: Final = """
    INSERT INTO run_arrivals (created_at, run, agent_name, arrived_at)
    SELECT created_at, agent_runs.id, agent_name, :now
        FROM json_each(:event_ids) CROSS JOIN agent_runs ON event_id = value WHERE true
    ON CONFLICT DO NOTHING
"""


def note_arrivals(cursor: sqlite3.Cursor, created: Sequence[Row], now: str) -> None:
    """Write down which of the new runs say that they were created after now; there hardly ever is one."""
    ahead = [row[EVENT_ID] for row in created if row[CREATED_AT] > now]  # type: ignore[operator]
    if ahead:
        cursor.execute(_AHEAD, {"event_ids": orjson.dumps(ahead).decode(), "now": now})


def apply(cursor: sqlite3.Cursor, command: ConfirmPrune | TrustClock, now: str) -> None:
    """Carry a command out."""
    match command:
        case ConfirmPrune(after_s, clock):
            cursor.execute("DELETE FROM confirmed_prune")
            cursor.execute("INSERT INTO confirmed_prune (after_s, confirmed_at) VALUES (?, ?)", (after_s, now))
            if cursor.execute(_CLOCK).fetchone() is None:
                cursor.execute(_TRUST, astuple(clock))
        case TrustClock(clock):
            cursor.execute("DELETE FROM trusted_clock")
            cursor.execute(_TRUST, astuple(clock))


@answers(GetConfirmed)
def fetch_confirmed(connection: sqlite3.Connection, query: GetConfirmed) -> Confirmed:
    """Fetch what is confirmed, and what is known of the clock."""
    age = connection.execute("SELECT after_s FROM confirmed_prune").fetchone()
    clock = connection.execute(_CLOCK).fetchone()
    newest = connection.execute(_NEWEST).fetchone()[0]
    return Confirmed(None if age is None else age[0], None if clock is None else Reading(*clock), newest)
