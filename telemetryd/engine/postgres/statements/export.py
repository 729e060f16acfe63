"""SQL for exports: renders the runs that match, and their events, as the lines of an export."""

from __future__ import annotations

from typing import Final

from telemetryd.engine.postgres.statements.predicates import Values, conditions
from telemetryd.engine.postgres.statements.rendering import json_object
from telemetryd.model import events, runs
from telemetryd.model.queries import ExportRuns, Format
from telemetryd.model.runs import COLUMNS
from telemetryd.model.values import Role

_ARGUMENTS: Final = 90
"""A function takes a hundred at most (postgresql.org/docs/current/runtime-config-preset.html)."""


def _csv_field(name: str) -> str:
    """Return a field as CSV: texts in quotes, numbers and truth values without, nothing at all for null."""
    if name in runs.columns(Role.BOOLEAN):
        return f"CASE {name} WHEN 0 THEN 'false' ELSE 'true' END"
    if name in runs.TEXTS:
        return f"""'"' || replace({name}::text, '"', '""') || '"'"""
    return name


def _csv_line() -> str:
    parts: list[str] = []
    for name in COLUMNS:
        parts += ["','", _csv_field(name)]
    whole = [", ".join(parts[start : start + _ARGUMENTS]) for start in range(1, len(parts), _ARGUMENTS)]
    return " || ".join(f"concat({arguments})" for arguments in whole)


def _list(name: str) -> str:
    if name in runs.columns(Role.BOOLEAN):
        return f"ARRAY[{name} <> 0] AS {name}"
    return f"ARRAY[{name}::text] AS {name}" if name in runs.columns(Role.JSON) else f"ARRAY[{name}] AS {name}"


_LINES: Final = {
    Format.NDJSON: json_object(COLUMNS),
    Format.CSV: _csv_line(),
    # As it is read by `tables.parquet_from_lists`: a list for each field, here of one run.
    Format.PARQUET: f"row_to_json((SELECT run FROM (SELECT {', '.join(map(_list, COLUMNS))}) AS run))::text",
}
_EVENT: Final = f"row_to_json((SELECT event FROM (SELECT {', '.join(events.STORED)}) AS event))::text"


def select_runs(query: ExportRuns) -> tuple[str, Values]:
    """Return the SQL text and the parameters that fetch a line for each run, in the order of their ids."""
    found, values = _matching(query)
    # Sorted as they are stored, and rendered afterwards.
    matching = f"SELECT * FROM agent_runs WHERE {found} ORDER BY id OFFSET 0"
    return f"SELECT {_LINES[query.form]} FROM ({matching}) AS runs", values


def select_events(query: ExportRuns) -> tuple[str, Values]:
    """Return the SQL text and the parameters that fetch the events of these runs: a run's id, and an event as JSON."""
    found, values = _matching(query)
    matching = f"SELECT id FROM agent_runs WHERE {found}"
    order = "run_events.run, timestamp, run_events.id"  # by itself, `run` would be the text that is answered
    return f"SELECT run::text, {_EVENT} FROM run_events WHERE run IN ({matching}) ORDER BY {order}", values


def _matching(query: ExportRuns) -> tuple[str, Values]:
    """Return the condition that a run is meant, and what is bound to it."""
    found, values = conditions(query.filters)
    for number, _ in enumerate(query.filters.labels):
        if not query.filters.equal:  # else another index is better
            place = f"label_{number}"
            of_label = f"SELECT run FROM run_labels WHERE key = %({place})s AND value = ANY(%({place}_values)s)"
            found.append(f"id IN ({of_label})")
    return " AND ".join(found) or "true", values
