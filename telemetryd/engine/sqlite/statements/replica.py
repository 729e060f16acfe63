"""SQL for replication: applies the primary's changes to a follower's database."""

from __future__ import annotations

import sqlite3
from typing import Final

import orjson

from telemetryd.engine import replica
from telemetryd.engine.replica import Plan
from telemetryd.engine.sqlite.statements import labels
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.columns import NEWEST
from telemetryd.engine.sqlite.statements.sequence import KEEP_EVENT_NUMBERS, forget_deletions
from telemetryd.model import events
from telemetryd.model.changes import Cursor, Followed, GetFollowed, Known
from telemetryd.model.commands import ApplyChanges
from telemetryd.model.runs import STORED
from telemetryd.model.stats import FACTS

_FIND: Final = f"""
    SELECT event_id, id, {", ".join(FACTS)} FROM agent_runs WHERE event_id IN (SELECT value FROM json_each(?))
"""
_DELETE: Final = ("DELETE FROM agent_runs WHERE id = ?", "DELETE FROM run_changes WHERE run = ?")
_DELETE_EVENTS: Final = "DELETE FROM run_events WHERE run = ?"
_FORGET_ARRIVAL: Final = "DELETE FROM run_arrivals WHERE run = ? AND created_at = ?"
_INSERT: Final = f"""
    INSERT INTO agent_runs (id, {", ".join(STORED)}, updated_at) VALUES ({", ".join("?" * (len(STORED) + 2))})
"""
_LABELS: Final = STORED.index("labels")
_INSERT_EVENT: Final = f"""
    INSERT OR REPLACE INTO run_events (run, {", ".join(events.COLUMNS)}) VALUES (?{", ?" * len(events.COLUMNS)})
"""
# What was known first stands.
_ARRIVED: Final = """
    INSERT INTO run_arrivals (created_at, run, agent_name, arrived_at)
    SELECT created_at, id, agent_name, updated_at FROM agent_runs WHERE id = ? ON CONFLICT DO NOTHING
"""
_NUMBER: Final = "INSERT INTO run_changes (run, seq) VALUES (?, ?)"
_REMEMBER: Final = "INSERT INTO run_deletions (seq, event_id) VALUES (?, ?)"
_COME: Final = ("DELETE FROM followed_feed", "INSERT INTO followed_feed (epoch, seq, begun) VALUES (?, ?, ?)")
_WHERE: Final = f"""
    SELECT {NEWEST}, epoch, seq, begun, (SELECT coalesce(max(id), 0) FROM run_events)
    FROM (SELECT 1) LEFT JOIN followed_feed
"""
_NEWEST_KNOWN: Final = (
    "SELECT seq, event_id, id, updated_at FROM run_changes JOIN agent_runs ON id = run ORDER BY seq DESC LIMIT 1",
    """
    SELECT coalesce((SELECT seq FROM run_changes WHERE run = id), id), event_id, id, updated_at FROM agent_runs
    ORDER BY id DESC LIMIT 1
    """,
    "SELECT seq, event_id, NULL, '' FROM run_deletions ORDER BY seq DESC LIMIT 1",
)
"""What was changed last, created last and deleted last."""


def apply_changes(cursor: sqlite3.Cursor, command: ApplyChanges) -> Plan:
    """Take over changes with the ids and numbers that they have, and how far that goes; return what was done."""
    cursor.execute(KEEP_EVENT_NUMBERS)
    found = cursor.execute(_FIND, (orjson.dumps(replica.named(command)).decode(),)).fetchall()
    plan = replica.plan(command, replica.by_event_id(found))
    for statement in _DELETE:
        cursor.executemany(statement, ((run,) for run in plan.replaced))
    cursor.executemany(_DELETE_EVENTS, ((run,) for run, _ in plan.emptied))
    cursor.executemany(_FORGET_ARRIVAL, plan.emptied)
    cursor.executemany(_INSERT, ((run.id, *run.row, run.updated_at) for run in plan.runs))
    for run in plan.runs:
        if run.row[_LABELS] is not None:
            labels.index_one(cursor, run.id)
    cursor.executemany(_ARRIVED, ((run,) for run in plan.ahead))
    cursor.executemany(_NUMBER, (number for number in plan.numbers if number[0] != number[1]))
    cursor.executemany(_REMEMBER, plan.deletions)
    cursor.executemany(_INSERT_EVENT, command.events)
    for statement, values in zip(_COME, ((), (command.epoch, command.last, command.begun)), strict=True):
        cursor.execute(statement, values)
    forget_deletions(cursor, command.last)
    return plan


@answers(GetFollowed)
def fetch_followed(connection: sqlite3.Connection, query: GetFollowed) -> Followed:
    """Fetch how far a copy has come, and the last number and event that stand in it."""
    newest, epoch, seq, begun, last_event = connection.execute(_WHERE).fetchone()
    known = {Known(*row): None for sql in _NEWEST_KNOWN for row in connection.execute(sql)}
    return Followed(newest, None if epoch is None else Cursor(seq, epoch), begun or 0, last_event, tuple(known))
