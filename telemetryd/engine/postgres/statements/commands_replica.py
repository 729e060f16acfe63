"""Applies the changes of another database to its copy, with the ids and numbers that they have there."""

from __future__ import annotations

from typing import Any, Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.model import events
from telemetryd.model.commands import ApplyChanges, CopiedRun
from telemetryd.model.runs import CREATED_AT, STORED
from telemetryd.model.stats import FACTS, Facts

_FIND: Final = f"SELECT id, {', '.join(FACTS)} FROM agent_runs WHERE event_id = %s FOR UPDATE"
_DELETE: Final = ("DELETE FROM agent_runs WHERE id = %s", "DELETE FROM run_changes WHERE run = %s")
_DELETE_EVENTS: Final = "DELETE FROM run_events WHERE run = %s"
_INSERT: Final = f"""
    INSERT INTO agent_runs (id, {", ".join(STORED)}, updated_at) VALUES ({", ".join(["%s"] * (len(STORED) + 2))})
"""
_EVENT: Final = ("run", *events.COLUMNS)
_INSERT_EVENT: Final = f"INSERT INTO run_events ({', '.join(_EVENT)}) VALUES ({', '.join(['%s'] * len(_EVENT))})"
_REPLACED: Final = """
    DELETE FROM run_events WHERE id = ANY (%s::bigint[])
        OR (run, event_key) IN (SELECT * FROM unnest(%s::bigint[], %s::text[]))
"""
# When a run arrived at the primary is not reported; its last change there is no earlier. What was known first stands.
_ARRIVED: Final = """
    INSERT INTO run_arrivals (created_at, run, agent_name, arrived_at)
    SELECT created_at, id, agent_name, updated_at FROM agent_runs WHERE id = %s AND created_at > updated_at
    ON CONFLICT DO NOTHING
"""
_FORGET_ARRIVAL: Final = "DELETE FROM run_arrivals WHERE created_at = %s AND run = %s"
_NUMBER: Final = "INSERT INTO run_changes (run, seq) VALUES (%s, %s)"
_REMEMBER: Final = "INSERT INTO run_deletions (seq, event_id) VALUES (%s, %s)"
_COME: Final = """
    INSERT INTO followed_feed (epoch, seq, begun) VALUES (%s, %s, %s)
    ON CONFLICT (one) DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq, begun = excluded.begun
"""
_LAST_DRAWN: Final = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {}"
_DRAW: Final = "SELECT count(nextval(%s)) FROM generate_series(1, %s)"
_JUMP: Final = "SELECT setval(%s, %s)"
_MOST_DRAWN: Final = 100_000
"""Beyond it a sequence jumps: nobody else draws from a copy's."""


def apply_changes(plain: Plain, command: ApplyChanges) -> list[Facts]:
    """Take over changes, and how far that goes; return what was replaced. The caller has taken its turn."""
    replaced = []
    for seq, what in command.changes:
        event_id = what if isinstance(what, str) else what.event_id
        found = plain.execute(_FIND, (event_id,)).fetchone()
        if found is not None:
            for statement in _DELETE:
                plain.execute(statement, found[:1])
            if isinstance(what, str) or what.id != found[0]:
                plain.execute(_DELETE_EVENTS, found[:1])
                plain.execute(_FORGET_ARRIVAL, (found[1], found[0]))
            replaced.append(found[1:])
        if isinstance(what, CopiedRun):
            plain.execute(_INSERT, (what.id, *what.row, what.updated_at))
            if str(what.row[CREATED_AT]) > what.updated_at:
                plain.execute(_ARRIVED, (what.id,))
            plain.execute(_NUMBER, (what.id, seq))
        else:
            plain.execute(_REMEMBER, (seq, event_id))
    if command.events:
        _store(plain, command.events)
    plain.execute(_COME, (command.epoch, command.last, command.begun))
    runs = [what.id for _, what in command.changes if isinstance(what, CopiedRun)]
    _draw_up_to(plain, "numbers", max([0, command.last, *runs]))
    return replaced


def _store(plain: Plain, rows: tuple[tuple[Any, ...], ...]) -> None:
    run, id_, key = (_EVENT.index(name) for name in ("run", "id", "event_key"))
    plain.execute(_REPLACED, ([row[id_] for row in rows], [row[run] for row in rows], [row[key] for row in rows]))
    with plain.cursor() as cursor:
        cursor.executemany(_INSERT_EVENT, rows)
    _draw_up_to(plain, "event_numbers", max(row[id_] for row in rows))


def _draw_up_to(plain: Plain, sequence: str, last: int) -> None:
    """See that a sequence draws what comes after a number; drawing is safe even if somebody else draws meanwhile."""
    ((drawn,),) = plain.execute(_LAST_DRAWN.format(sequence).encode()).fetchall()
    if last - drawn > _MOST_DRAWN:
        plain.execute(_JUMP, (sequence, last))
    elif last > drawn:
        plain.execute(_DRAW, (sequence, last - drawn))
