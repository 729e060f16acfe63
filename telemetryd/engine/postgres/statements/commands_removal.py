"""Removes a single run, or what fields of it hold, in slices; the run is held by the caller."""

from __future__ import annotations

from typing import Any, Final

from psycopg import sql

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import commands_thinning as thinning
from telemetryd.engine.postgres.statements.numbers import Numbers
from telemetryd.model.commands import RedactRun, Removed
from telemetryd.model.runs import DIGEST

_EVENTS: Final = "SELECT count(*) FROM run_events WHERE run = %s"
_WITH_PAYLOAD: Final = """
    SELECT id FROM run_events WHERE run = %s AND payload IS NOT NULL ORDER BY timestamp, id LIMIT %s
"""
_FORGET_ORIGINALS: Final = "DELETE FROM unconverted_values WHERE run = %s AND field = ANY (%s::text[])"


def delete(plain: Plain, numbers: Numbers, run: int, event_id: str) -> Removed:
    """Delete a run with all that belongs to it, or a slice of its events."""
    ((before,),) = plain.execute(_EVENTS, (run,)).fetchall()
    done = thinning.delete(plain, [(run,)])
    left = 0 if done else plain.execute(_EVENTS, (run,)).fetchall()[0][0]
    if done:
        numbers.deleted([run], [event_id])
    return Removed(before - left, more=not done)


def redact(plain: Plain, numbers: Numbers, run: int, command: RedactRun, now: str) -> Removed:
    """Set fields of a run to null, in a later slice only what was written to them since, and the payloads of events."""
    _clear(plain, numbers, run, command, now)
    if not command.payloads:
        return Removed(0, more=False)
    found = [event for (event,) in plain.execute(_WITH_PAYLOAD, (run, command.limit))]
    numbers.redacted(found)
    return Removed(len(found), more=len(found) == command.limit)


def _clear(plain: Plain, numbers: Numbers, run: int, command: RedactRun, now: str) -> None:
    # From the digest of a body somebody who knows the rest of it could find a short secret.
    names = [sql.Identifier(name) for name in ((*command.fields, DIGEST) if command.fields else ())]
    statement = sql.SQL("UPDATE agent_runs SET updated_at = %s{} WHERE id = %s AND (NOT %s{})").format(
        sql.Composed([sql.SQL(", {} = NULL").format(name) for name in names]),
        sql.Composed([sql.SQL(" OR {} IS NOT NULL").format(name) for name in names[: len(command.fields)]]),
    )
    values: tuple[Any, ...] = (now, run, command.again)
    if plain.execute(statement, values).rowcount:
        numbers.changed(run)
        plain.execute(_FORGET_ORIGINALS, (run, [*command.fields]))
