"""Turns filters into SQL predicates; selects the runs of a prune or a reap."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import orjson

from telemetryd.engine.indexes import INDEXES, MANY, MAX_ARMS, Values
from telemetryd.engine.sqlite import searching
from telemetryd.model.commands import PruneRuns, ReapRuns
from telemetryd.model.filters import (
    TIME_BOUNDS,
    WILDCARD,
    Comparison,
    Filters,
    Pattern,
    label_parameter,
)
from telemetryd.model.queries import CountPrunable, CountStale
from telemetryd.model.runs import FILTERS
from telemetryd.model.values import Status


def conditions(filters: Filters, but: Collection[str] = ()) -> tuple[list[str], Values]:
    """Return what the filters are in SQL, to be joined by AND, and the values that are bound to them.

    Columns stand without their table's name, and what is bound is named after its parameter. `but` are names of
    parameters that the caller sees to.
    """
    found: list[str] = []
    values: Values = {}
    for name in FILTERS:
        if name not in but:
            _any_of(name, filters.equal.get(name, ()), filters.patterns if name == WILDCARD else (), found, values)
    for name, moment in filters.bounds.items():
        if name not in but:
            column, comparison = TIME_BOUNDS[name]
            found.append(f"{column} {comparison} :{name}")
            values[name] = moment
    if filters.min_duration_ms is not None:
        found.append("duration_ms >= :min_duration_ms")
        values["min_duration_ms"] = filters.min_duration_ms
    if filters.error is not None:
        in_summary, bound = searching.condition("error_summary", filters.error)
        in_details, _ = searching.condition("error_details", filters.error)
        found.append(f"({in_summary} OR {in_details})")
        values |= bound
    found += [_metric(number, metric, values) for number, metric in enumerate(filters.metrics)]
    for number, (key, wanted) in enumerate(filters.labels.items()):
        if label_parameter(key) not in but:
            of_label = _bound_label(number, key, wanted)
            found.append(f"EXISTS (SELECT 1 FROM {labelled(of_label)} AND created = created_at AND run = id)")
            values |= of_label
    if filters.words is not None and "q" not in but:
        # The plus keeps the walk to its index, whose order it would give up for the rows by their ids.
        found.append("+id IN (SELECT rowid FROM runs_text WHERE runs_text MATCH :q)")
        values["q"] = match_expression(filters.words)
    return found, values


def _bound_label(number: int, key: str, wanted: tuple[str, ...]) -> Values:
    """Return what is bound for a label: its key first, then its values."""
    return {f"label_{number}": key, **{f"label_{number}_{place}": value for place, value in enumerate(wanted)}}


def labelled(bound: Values) -> str:
    """Return the rows of the index of labels that have a key and one of some values, as `_bound_label` names them."""
    key, *places = bound
    return f"run_labels WHERE key = :{key} AND value IN ({', '.join(f':{place}' for place in places)})"


CHOSEN: Final = "run_labels AS chosen CROSS JOIN agent_runs NOT INDEXED ON id = chosen.run"
"""The runs of a label, which have its key and its value in the columns of `CHOSEN_LABEL`."""
CHOSEN_LABEL: Final = ("chosen.key", "chosen.value")


def choose_label(connection: sqlite3.Connection, filters: Filters, most: int = MAX_ARMS) -> str | None:
    """Return the key of the label whose runs are to be walked: that with fewest; None if another index is better.

    Another one is that of event_id, which finds one run; or any, if even that label has many runs.
    """
    if "event_id" in filters.equal:
        return None
    counted = {
        key: connection.execute(
            f"SELECT count(*) FROM (SELECT 1 FROM {labelled(bound)} LIMIT {MANY})", bound
        ).fetchone()[0]
        for number, (key, wanted) in enumerate(filters.labels.items())
        if len(wanted) <= most and (bound := _bound_label(number, key, wanted))
    }
    if not counted:
        return None
    rarest = min(counted, key=counted.__getitem__)
    return None if counted[rarest] == MANY and (filters.equal or filters.patterns) else rarest


def runs_of_labels(filters: Filters) -> list[str]:
    """Return the condition by which SQLite finds the runs of labels in any order; `conditions` binds what it names."""
    bound = [_bound_label(number, key, wanted) for number, (key, wanted) in enumerate(filters.labels.items())]
    return [f"id IN (SELECT run FROM {labelled(each)})" for each in bound[:1]]


def arms_of(key: str, wanted: tuple[str, ...]) -> list[Values]:
    """Return the values of `CHOSEN_LABEL` for each walk through the runs of a label."""
    return [dict(zip(CHOSEN_LABEL, (key, value), strict=True)) for value in wanted]


def _any_of(name: str, equal: tuple[str, ...], patterns: tuple[Pattern, ...], found: list[str], values: Values) -> None:
    bound = {f"{name}_{number}": value for number, value in enumerate(equal)}
    globs = {f"{name}_glob_{number}": glob(pattern) for number, pattern in enumerate(patterns)}
    either = [f"{name} GLOB :{place}" for place in globs]
    if len(bound) == 1:
        either.insert(0, f"{name} = :{name}_0")
    elif bound:
        either.insert(0, f"{name} IN ({', '.join(f':{place}' for place in bound)})")
    if either:
        found.append(either[0] if len(either) == 1 else f"({' OR '.join(either)})")
        values |= bound | globs


def glob(pattern: Pattern) -> str:
    """Return a pattern as SQLite's GLOB has it, in which `?` and `[` are special as well."""
    return "*".join("".join(f"[{sign}]" if sign in "*?[" else sign for sign in piece) for piece in pattern)


_SQL_OPERATORS: Final = {"!=": "<>"}


def _metric(number: int, comparison: Comparison, values: Values) -> str:
    """Return one comparison in SQL; what JSON has of another kind is less or greater than nothing."""
    path, value = f"metric_path_{number}", f"metric_{number}"
    values[path] = "$" + "".join(f'."{key}"' for key in comparison.path)
    values[value] = comparison.value
    kinds = (
        "'true', 'false'"
        if isinstance(comparison.value, bool)
        else "'text'"
        if isinstance(comparison.value, str)
        else "'integer', 'real'"
    )
    operator = _SQL_OPERATORS.get(comparison.operator, comparison.operator)
    return (
        f"(json_type(metrics_json, :{path}) IN ({kinds}) AND json_extract(metrics_json, :{path}) {operator} :{value})"
    )


def match_expression(words: str) -> str:
    """Return words, `prefix*` and "phrases" as an expression of FTS5, quoted, so that nothing in them is syntax."""
    quoted = []
    for place, part in enumerate(words.split('"')):
        for term in [part] if place % 2 else part.split():
            is_prefix = place % 2 == 0 and term.endswith("*")
            if any(map(str.isalnum, term)):
                quoted.append(f'"{term}"' + (" *" if is_prefix else ""))
    return " ".join(quoted)


@dataclass(frozen=True, slots=True)
class Walk:
    """One way to some of the runs that are older than `:before`."""

    source: str
    """What stands after FROM, with the conditions."""
    moment: str
    """The column, or name, that says from when the age of these runs counts."""

    @property
    def in_order(self) -> str:
        """The source with the oldest runs first, which costs no sort."""
        return f"{self.source} ORDER BY {self.moment}" if self.moment == "created_at" else self.source


# A run is as old as its created_at says, unless that lay ahead of its arrival: then it is as old as the arrival. No run
# is in both walks. A cross join is done in the order in which it stands.
_AHEAD: Final = """(
    SELECT run AS ahead, arrived_at AS arrived FROM run_arrivals WHERE created_at >= :before AND arrived_at < :before
) CROSS JOIN agent_runs NOT INDEXED ON agent_runs.id = ahead"""

_IS_ARCHIVED: Final = """
    json_each(:versions) CROSS JOIN agent_runs NOT INDEXED ON agent_runs.id = json_extract(value, '$[0]')
    WHERE updated_at = json_extract(value, '$[1]') AND (created_at < :before OR EXISTS (
        SELECT 1 FROM run_arrivals AS a
        WHERE a.created_at = agent_runs.created_at AND a.run = agent_runs.id AND a.arrived_at < :before
    ))"""


def old_runs(command: PruneRuns | CountPrunable) -> tuple[list[Walk], Values]:
    """Return the walks that find the runs to prune, and what is bound to their names."""
    equal, also = _equal(command, "agent_name", "job_type", "status")
    values: Values = {**equal, "before": command.created_before}
    if isinstance(command, PruneRuns) and command.versions is not None:
        values["versions"] = orjson.dumps(command.versions).decode()
        return [Walk(f"{_IS_ARCHIVED}{also}", "")], values
    return _walks(frozenset(equal), also), values


def stale_runs(command: ReapRuns | CountStale) -> tuple[list[Walk], Values]:
    """Return the walks that find the stale runs, and what is bound to their names."""
    equal, also = _equal(command, "agent_name", "job_type")
    also += " AND status = 'running' AND updated_at < :before"
    return _walks(frozenset({"status", *equal}), also), {**equal, "before": command.stale_before}


def _equal(command: object, *names: str) -> tuple[Values, str]:
    """Return what of these names a command asks for, and as conditions."""
    equal: Values = {name: value for name in names if (value := getattr(command, name)) is not None}
    return equal, "".join(f" AND {name} = :{name}" for name in equal)


def _walks(names: frozenset[str], also: str) -> list[Walk]:
    index, merge_statuses = INDEXES[names]
    statuses = [f" AND status = '{status}'" for status in Status] if merge_statuses else [""]
    return [
        *(
            Walk(f"agent_runs INDEXED BY {index} WHERE created_at < :before{also}{status}", "created_at")
            for status in statuses
        ),
        Walk(f"{_AHEAD} WHERE true{also}", "arrived"),
    ]


def together(walks: list[Walk], *columns: str) -> str:
    """Return the SQL text of all runs on these walks, with columns of theirs and the moment from which they age."""
    named = ", ".join(columns)
    return " UNION ALL ".join(f"SELECT {named}, {walk.moment} AS since FROM {walk.source}" for walk in walks)
