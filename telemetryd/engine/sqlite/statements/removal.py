"""Removes a single run, or what fields of it hold, so that not even the database file keeps the text."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

import orjson

from telemetryd.engine.sqlite.statements import full_text, thinning
from telemetryd.engine.sqlite.statements.sequence import KEEP_EVENT_NUMBERS
from telemetryd.engine.sqlite.statements.sequence import Sequence as CommitSequence
from telemetryd.model.commands import DeleteRun, RedactRun, Removed
from telemetryd.model.stats import FACTS, Facts

_FIND: Final = f"SELECT id, {', '.join(FACTS)}, event_id FROM agent_runs WHERE event_id = ?"
_EVENTS: Final = "SELECT count(*) FROM run_events INDEXED BY idx_events_time WHERE run = ?"
_WITH_PAYLOAD: Final = """
    SELECT id FROM run_events INDEXED BY idx_events_time WHERE run = ? AND payload IS NOT NULL
    ORDER BY timestamp, id LIMIT ?
"""
_REDACT_EVENT: Final = "UPDATE run_events SET id = ?, payload = NULL WHERE id = ?"
_FORGET_ORIGINALS: Final = """
    DELETE FROM unconverted_values WHERE run = ? AND field IN (SELECT value FROM json_each(?))
"""
_SET_ASIDE: Final = """
    SELECT m.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c
    WHERE m.type = 'table' AND m.name GLOB 'legacy_*' AND c.name = 'event_id'
"""
"""Tables of the service that was replaced, kept under another name, which may hold the same texts."""


def delete_run(
    cursor: sqlite3.Cursor, sequence: CommitSequence, command: DeleteRun, now: str
) -> tuple[Removed | None, list[Facts]]:
    """Delete a run with all that belongs to it, or a slice of its events; return what was deleted, too."""
    found = cursor.execute(_FIND, (command.event_id,)).fetchone()
    if found is None:
        return None, []
    budget = thinning.Budget()
    if full_text.is_there(cursor.connection):
        _clear(cursor, found[0], full_text.SEARCHED, now)
        sequence.changed(found[0])
        if not full_text.forget(cursor, again=command.again, is_over=lambda: budget.is_spent):
            return Removed(0, more=True), []
    cursor.execute(KEEP_EVENT_NUMBERS)
    before = cursor.execute(_EVENTS, found[:1]).fetchone()[0]
    done = thinning.delete(cursor, [found], budget)
    left = 0 if done else cursor.execute(_EVENTS, found[:1]).fetchone()[0]
    if done:
        _forget_aside(cursor, command.event_id)
        sequence.deleted(found[:1], [command.event_id])
    return Removed(before - left, more=not done), [row[1:-1] for row in done]


def redact_run(
    cursor: sqlite3.Cursor, sequence: CommitSequence, command: RedactRun, now: str
) -> tuple[Removed | None, list[Facts]]:
    """Remove what fields of a run hold, and what a slice of its events hold; no total or statistic counts that.

    Each of these events gets the id of a new one, so that who follows takes it in the place of the old one.
    """
    found = cursor.execute(_FIND, (command.event_id,)).fetchone()
    if found is None:
        return None, []
    run = found[0]
    events: Sequence[tuple[int]] = ()
    _clear(cursor, run, command.fields, now)
    sequence.changed(run)
    cursor.execute(_FORGET_ORIGINALS, (run, orjson.dumps(command.fields).decode()))
    if not {*full_text.SEARCHED}.isdisjoint(command.fields) and full_text.is_there(cursor.connection):
        budget = thinning.Budget()
        if not full_text.forget(cursor, again=command.again, is_over=lambda: budget.is_spent):
            return Removed(0, more=True), []
    if command.payloads:
        events = cursor.execute(_WITH_PAYLOAD, (run, command.limit)).fetchall()
        numbers = sequence.event_ids(len(events))
        cursor.executemany(_REDACT_EVENT, [(number, event) for number, (event,) in zip(numbers, events, strict=True)])
        _forget_aside(cursor, command.event_id)
    return Removed(len(events), more=len(events) == command.limit), []


def _clear(cursor: sqlite3.Cursor, run: int, fields: Sequence[str], now: str) -> None:
    assignments = "".join(f", {name} = NULL" for name in fields)
    cursor.execute(f"UPDATE agent_runs SET updated_at = ?{assignments} WHERE id = ?", (now, run))


def _forget_aside(cursor: sqlite3.Cursor, event_id: str) -> None:
    for (name,) in cursor.execute(_SET_ASIDE).fetchall():
        quoted = name.replace('"', '""')
        cursor.execute(f'DELETE FROM "{quoted}" WHERE event_id = ?', (event_id,))
