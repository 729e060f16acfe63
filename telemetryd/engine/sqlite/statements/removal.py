"""Removes a single run, or what fields of it hold, with the words in the full-text index."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import orjson

from telemetryd.engine.budget import Budget
from telemetryd.engine.sqlite.statements import full_text, thinning
from telemetryd.engine.sqlite.statements.sequence import KEEP_EVENT_NUMBERS
from telemetryd.engine.sqlite.statements.sequence import Sequence as CommitSequence
from telemetryd.model.commands import DeleteRun, RedactRun, Removed
from telemetryd.model.runs import DIGEST
from telemetryd.model.stats import FACTS, Facts

_FIND: Final = f"SELECT id, {', '.join(FACTS)}, event_id FROM agent_runs WHERE event_id = ?"
_EVENTS: Final = "SELECT count(*) FROM run_events INDEXED BY idx_events_time WHERE run = ?"
_WITH_PAYLOAD: Final = """
    SELECT id, length(payload) FROM run_events INDEXED BY idx_events_time WHERE run = ? AND payload IS NOT NULL
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


Removal = DeleteRun | RedactRun
"""A command of this module."""


class Done(NamedTuple):
    """What became of a slice of a command, and what the statistics have to know of it."""

    outcome: Removed | None
    deleted: list[Facts]
    changed: tuple[Facts, Facts] | None
    """What it found and what it left of a run that is not deleted, if it changed that."""


def remove(
    cursor: sqlite3.Cursor, sequence: CommitSequence, commands: Sequence[Removal], budget: Budget, now: str
) -> Iterator[Done]:
    """Carry out a slice of each command.

    The texts of all these runs go first, so that one merge of the full-text index drops the words of them all.
    """
    searched = full_text.SEARCHED if full_text.is_there(cursor.connection) else ()
    cleared, waiting, changes = [], [], []
    for command in commands:
        fields = command.fields if isinstance(command, RedactRun) else searched
        facts = _clear(cursor, sequence, command, fields, now)
        is_cleared = facts is not None
        changes.append(None if facts is None else (facts, _without(facts, fields)))
        has_words = not {*searched}.isdisjoint(fields)
        cleared.append(is_cleared and has_words)
        waiting.append((is_cleared or command.again) and has_words)
    is_merged = not any(waiting) or full_text.forget(cursor, again=not any(cleared), is_over=lambda: budget.is_spent)
    for command, waits, changed in zip(commands, waiting, changes, strict=True):
        found = cursor.execute(_FIND, (command.event_id,)).fetchone()
        if found is None:
            yield Done(None, [], None)
        elif waits and not is_merged:
            yield Done(Removed(0, more=True), [], changed)
        elif isinstance(command, DeleteRun):
            yield Done(*_delete(cursor, sequence, found, budget), changed)
        else:
            yield Done(_redact_events(cursor, sequence, command, found[0], budget), [], changed)


def _without(facts: Facts, fields: Sequence[str]) -> Facts:
    return tuple(None if name in fields else value for name, value in zip(FACTS, facts, strict=True))


def _clear(
    cursor: sqlite3.Cursor, sequence: CommitSequence, command: Removal, fields: Sequence[str], now: str
) -> Facts | None:
    """Set fields of a run to null, in a later slice only what was written to them since.

    Return what the statistics knew of the run, or None if nothing was set.
    """
    found = cursor.execute(_FIND, (command.event_id,)).fetchone()
    if found is None or (isinstance(command, DeleteRun) and not fields):
        return None
    run = found[0]
    # From the digest of a body somebody who knows the rest of it could find a short secret.
    names = (*fields, DIGEST) if fields else ()
    assignments = "".join(f", {name} = NULL" for name in names)
    is_due = " OR ".join(["NOT ?", *(f"{name} IS NOT NULL" for name in fields)])
    cursor.execute(
        f"UPDATE agent_runs SET updated_at = ?{assignments} WHERE id = ? AND ({is_due})", (now, run, command.again)
    )
    if cursor.rowcount == 0:
        return None
    sequence.changed(run)
    cursor.execute(_FORGET_ORIGINALS, (run, orjson.dumps(fields).decode()))
    facts: Facts = found[1:-1]
    return facts


def _delete(
    cursor: sqlite3.Cursor, sequence: CommitSequence, found: tuple[Any, ...], budget: Budget
) -> tuple[Removed, list[Facts]]:
    """Delete a run with all that belongs to it, or a slice of its events; return what was deleted, too."""
    cursor.execute(KEEP_EVENT_NUMBERS)
    before = cursor.execute(_EVENTS, found[:1]).fetchone()[0]
    done = thinning.delete(cursor, [found], budget)
    left = 0 if done else cursor.execute(_EVENTS, found[:1]).fetchone()[0]
    if done:
        _forget_aside(cursor, found[-1])
        sequence.deleted(found[:1], [found[-1]])
    return Removed(before - left, more=not done), [row[1:-1] for row in done]


def _redact_events(
    cursor: sqlite3.Cursor, sequence: CommitSequence, command: RedactRun, run: int, budget: Budget
) -> Removed:
    """Remove what a slice of a run's events hold; no total or statistic counts that.

    Each of these events gets the id of a new one, so that who follows takes it in the place of the old one.
    """
    if not command.payloads:
        return Removed(0, more=False)
    events = budget.take(cursor.execute(_WITH_PAYLOAD, (run, command.limit)))
    numbers = sequence.event_ids(len(events))
    cursor.executemany(_REDACT_EVENT, [(number, event) for number, (event,) in zip(numbers, events, strict=True)])
    _forget_aside(cursor, command.event_id)
    return Removed(len(events), more=bool(events) and (budget.is_spent or len(events) == command.limit))


def _forget_aside(cursor: sqlite3.Cursor, event_id: str) -> None:
    for (name,) in cursor.execute(_SET_ASIDE).fetchall():
        quoted = name.replace('"', '""')
        cursor.execute(f'DELETE FROM "{quoted}" WHERE event_id = ?', (event_id,))
