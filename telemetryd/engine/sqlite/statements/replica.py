"""SQL for replication: applies the primary's changes to a follower's database."""

from __future__ import annotations

import sqlite3
from typing import Final

from telemetryd.engine.sqlite.statements import labels
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.columns import NEWEST
from telemetryd.engine.sqlite.statements.sequence import KEEP_EVENT_NUMBERS, forget_deletions
from telemetryd.model import events
from telemetryd.model.changes import Cursor, Followed, GetFollowed, Known
from telemetryd.model.commands import ApplyChanges, CopiedRun
from telemetryd.model.runs import CREATED_AT, STORED
from telemetryd.model.stats import FACTS, Facts

_FIND: Final = f"SELECT id, {', '.join(FACTS)} FROM agent_runs WHERE event_id = ?"
_DELETE: Final = ("DELETE FROM agent_runs WHERE id = ?", "DELETE FROM run_changes WHERE run = ?")
_DELETE_EVENTS: Final = "DELETE FROM run_events WHERE run = ?"
_INSERT: Final = f"""
    INSERT INTO agent_runs (id, {", ".join(STORED)}, updated_at) VALUES ({", ".join("?" * (len(STORED) + 2))})
"""
_LABELS: Final = STORED.index("labels")
_INSERT_EVENT: Final = f"""
    INSERT OR REPLACE INTO run_events (run, {", ".join(events.COLUMNS)}) VALUES (?{", ?" * len(events.COLUMNS)})
"""
# When a run arrived at the primary is not reported; its last change there is no earlier. What was known first stands.
_ARRIVED: Final = """
    INSERT INTO run_arrivals (created_at, run, agent_name, arrived_at)
    SELECT created_at, id, agent_name, updated_at FROM agent_runs WHERE id = ? AND created_at > updated_at
    ON CONFLICT DO NOTHING
"""
_FORGET_ARRIVAL: Final = "DELETE FROM run_arrivals WHERE created_at = ? AND run = ?"
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


def apply_changes(cursor: sqlite3.Cursor, command: ApplyChanges) -> list[Facts]:
    """Take over changes with the ids and numbers that they have, and how far that goes; return what was replaced."""
    cursor.execute(KEEP_EVENT_NUMBERS)
    replaced = []
    for seq, what in command.changes:
        event_id = what if isinstance(what, str) else what.event_id
        found = cursor.execute(_FIND, (event_id,)).fetchone()
        if found is not None:
            for statement in _DELETE:
                cursor.execute(statement, found[:1])
            if isinstance(what, str) or what.id != found[0]:
                cursor.execute(_DELETE_EVENTS, found[:1])
                cursor.execute(_FORGET_ARRIVAL, (found[1], found[0]))
            replaced.append(found[1:])
        if isinstance(what, CopiedRun):
            cursor.execute(_INSERT, (what.id, *what.row, what.updated_at))
            if what.row[_LABELS] is not None:
                labels.index_one(cursor, what.id)
            if str(what.row[CREATED_AT]) > what.updated_at:
                cursor.execute(_ARRIVED, (what.id,))
            if seq != what.id:
                cursor.execute(_NUMBER, (what.id, seq))
        else:
            cursor.execute(_REMEMBER, (seq, event_id))
    cursor.executemany(_INSERT_EVENT, command.events)
    for statement, values in zip(_COME, ((), (command.epoch, command.last, command.begun)), strict=True):
        cursor.execute(statement, values)
    forget_deletions(cursor, command.last)
    return replaced


@answers(GetFollowed)
def fetch_followed(connection: sqlite3.Connection, query: GetFollowed) -> Followed:
    """Fetch how far a copy has come, and the last number and event that stand in it."""
    newest, epoch, seq, begun, last_event = connection.execute(_WHERE).fetchone()
    known = {Known(*row): None for sql in _NEWEST_KNOWN for row in connection.execute(sql)}
    return Followed(newest, None if epoch is None else Cursor(seq, epoch), begun or 0, last_event, tuple(known))
