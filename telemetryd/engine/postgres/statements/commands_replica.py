"""Applies the changes of another database to its copy, with the ids and numbers that they have there."""

from __future__ import annotations

from typing import Final

from telemetryd.engine import replica
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.arrays import arrays, by_column, selected
from telemetryd.engine.replica import Plan
from telemetryd.model import events
from telemetryd.model.commands import ApplyChanges
from telemetryd.model.runs import STORED
from telemetryd.model.stats import FACTS

_FIND: Final = f"""
    SELECT event_id, id, {", ".join(FACTS)} FROM agent_runs WHERE event_id = ANY (%s::text[])
    ORDER BY event_id FOR UPDATE
"""
_DELETE: Final = (
    "DELETE FROM agent_runs WHERE id = ANY (%s::bigint[])",
    "DELETE FROM run_changes WHERE run = ANY (%s::bigint[])",
)
_DELETE_EVENTS: Final = "DELETE FROM run_events WHERE run = ANY (%s::bigint[])"
_FORGET_ARRIVALS: Final = """
    DELETE FROM run_arrivals WHERE (run, created_at) IN (SELECT * FROM unnest(%s::bigint[], %s::text[]))
"""
_COLUMNS: Final = ("id", *STORED, "updated_at")
_INSERT: Final = f"""
    INSERT INTO agent_runs ({", ".join(_COLUMNS)})
    SELECT {selected(_COLUMNS)} FROM unnest({arrays(_COLUMNS)}) AS given ({", ".join(_COLUMNS)})
"""
_EVENT: Final = ("run", *events.COLUMNS)
_INSERT_EVENTS: Final = f"""
    INSERT INTO run_events ({", ".join(_EVENT)})
    SELECT {", ".join(_EVENT[:-1])}, payload::json
    FROM unnest(%s::bigint[], %s::bigint[]{", %s::text[]" * len(events.STORED)}) AS given ({", ".join(_EVENT)})
"""
_REPLACED: Final = """
    DELETE FROM run_events WHERE id = ANY (%s::bigint[])
        OR (run, event_key) IN (SELECT * FROM unnest(%s::bigint[], %s::text[]))
"""
# What was known first stands.
_ARRIVED: Final = """
    INSERT INTO run_arrivals (created_at, run, agent_name, arrived_at)
    SELECT created_at, id, agent_name, updated_at FROM agent_runs WHERE id = ANY (%s::bigint[]) ON CONFLICT DO NOTHING
"""
_NUMBER: Final = "INSERT INTO run_changes (run, seq) SELECT * FROM unnest(%s::bigint[], %s::bigint[])"
_REMEMBER: Final = "INSERT INTO run_deletions (seq, event_id) SELECT * FROM unnest(%s::bigint[], %s::text[])"
_COME: Final = """
    INSERT INTO followed_feed (epoch, seq, begun) VALUES (%s, %s, %s)
    ON CONFLICT (one) DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq, begun = excluded.begun
"""
_LAST_DRAWN: Final = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {}"
_DRAW: Final = "SELECT count(nextval(%s)) FROM generate_series(1, %s)"
_JUMP: Final = "SELECT setval(%s, %s)"
_MOST_DRAWN: Final = 100_000
"""Beyond it a sequence jumps: nobody else draws from a copy's."""


def apply_changes(plain: Plain, command: ApplyChanges) -> Plan:
    """Take over changes, and how far that goes; return what was done. The caller has taken its turn."""
    stored = replica.by_event_id(plain.execute(_FIND, (replica.named(command),)))
    plan = replica.plan(command, stored)
    columns = by_column(command.events) if command.events else []
    with plain.pipeline():
        if plan.replaced:
            for statement in _DELETE:
                plain.execute(statement, (plan.replaced,))
        if plan.emptied:
            runs, created = by_column(plan.emptied)
            plain.execute(_DELETE_EVENTS, (runs,))
            plain.execute(_FORGET_ARRIVALS, (runs, created))
        if plan.runs:
            plain.execute(_INSERT, by_column([(run.id, *run.row, run.updated_at) for run in plan.runs]))
            plain.execute(_NUMBER, by_column(plan.numbers))
        if plan.ahead:
            plain.execute(_ARRIVED, (plan.ahead,))
        if plan.deletions:
            plain.execute(_REMEMBER, by_column(plan.deletions))
        if columns:
            run, id_, key = (columns[_EVENT.index(name)] for name in ("run", "id", "event_key"))
            plain.execute(_REPLACED, (id_, run, key))
            plain.execute(_INSERT_EVENTS, columns)
        plain.execute(_COME, (command.epoch, command.last, command.begun))
    _draw_up_to(plain, "numbers", max(command.last, plan.last_id))
    if columns:
        _draw_up_to(plain, "event_numbers", max(columns[_EVENT.index("id")]))
    return plan


def _draw_up_to(plain: Plain, sequence: str, last: int) -> None:
    """See that a sequence draws what comes after a number; drawing is safe even if somebody else draws meanwhile."""
    ((drawn,),) = plain.execute(_LAST_DRAWN.format(sequence).encode()).fetchall()
    if last - drawn > _MOST_DRAWN:
        plain.execute(_JUMP, (sequence, last))
    elif last > drawn:
        plain.execute(_DRAW, (sequence, last - drawn))
