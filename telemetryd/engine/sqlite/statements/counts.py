"""SQL for counts: how many runs match, counted or taken from totals."""

from __future__ import annotations

import sqlite3
from typing import Final

from telemetryd.engine.columns import MINUTE
from telemetryd.engine.indexes import Values, choose
from telemetryd.engine.pages import named
from telemetryd.engine.registry import always
from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.predicates import (
    CHOSEN,
    CHOSEN_LABEL,
    arms_of,
    choose_label,
    conditions,
)
from telemetryd.engine.sqlite.statements.runs import FOUND, find_agents
from telemetryd.model.filters import Filters, label_parameter
from telemetryd.model.queries import Accuracy, Count, CountMatching, Total

_KEPT: Final = frozenset({"agent_name", "job_type", "status"})
"""The fields that totals are kept for."""
_MOST: Final = 10_000
"""Runs that an estimate counts at most."""


@answers(CountMatching, is_long=always)
def count_matching(connection: sqlite3.Connection, query: CountMatching) -> Total:
    """Count the runs that match, or estimate how many they are."""
    full_text.require(connection, query.filters)
    agents = find_agents(connection, query.filters)
    if agents == ():
        return Total(0)
    filters = query.filters if agents is None else named(query.filters, agents)
    if query.count is Count.EXACT:
        return Total(_count(connection, filters, -1))
    total = _from_totals(connection, filters)
    if total is None:
        runs = _count(connection, filters, _MOST)
        total = Total(runs, Accuracy.EXACT if runs < _MOST else Accuracy.AT_LEAST)
    return total


def _count(connection: sqlite3.Connection, filters: Filters, most: int) -> int:
    label = None if filters.words is not None else choose_label(connection, filters)
    return int(connection.execute(*select_count(filters, most, label)).fetchone()[0])


def select_count(filters: Filters, most: int = -1, label: str | None = None) -> tuple[str, Values]:
    """Return the SQL text and the parameters that count the runs that match.

    They are counted up to a bound if it is not negative; `label` is the one whose runs are walked.
    """
    columns: tuple[str, ...] = ()
    arms: list[Values] = [{}]
    alone: tuple[str, ...] = ("q",)
    if label is not None:
        source, columns, arms = CHOSEN, CHOSEN_LABEL, arms_of(label, filters.labels[label])
        alone = ("q", label_parameter(label))
    elif filters.words is None:
        index, columns, arms = choose({} if filters.patterns else filters.equal)
        source = f"agent_runs INDEXED BY {index}"
    else:
        source = FOUND
    found, values = conditions(filters, (*columns, *alone))
    if filters.words is not None:
        values |= conditions(Filters(words=filters.words))[1]
    texts = []
    for number, arm in enumerate(arms):
        places = {f"{name.replace('.', '_')}_{number}": name for name in columns}
        values |= {place: arm[name] for place, name in places.items()}
        where = " AND ".join([*(f"{name} = :{place}" for place, name in places.items()), *found])
        texts.append(f"{source}" + (f" WHERE {where}" if where else ""))
    if most < 0:
        counted = " UNION ALL ".join(f"SELECT count(*) AS runs FROM {text}" for text in texts)
        return f"SELECT sum(runs) FROM ({counted})", values
    listed = " UNION ALL ".join(f"SELECT 1 FROM {text}" for text in texts)
    return f"SELECT count(*) FROM ({listed} LIMIT :most)", {**values, "most": most}


def _from_totals(connection: sqlite3.Connection, filters: Filters) -> Total | None:
    """Return the number from the totals, if they have it.

    Of a span of time they have the number of runs of all agents; for some agents that is a share.
    """
    plain = Filters(filters.equal, {n: m for n, m in filters.bounds.items() if n.startswith("created_")})
    if plain != filters or not filters.equal.keys() <= _KEPT:
        return None
    runs = _sum(connection, "run_totals", *conditions(Filters(filters.equal)))
    if not filters.bounds:
        return Total(runs)
    found, values = [], {}
    for name, comparison in (("created_after", ">="), ("created_before", "<=")):
        if name in filters.bounds:
            found.append(f"minute {comparison} :{name}")
            values[name] = filters.bounds[name][:MINUTE]
    within = _sum(connection, "run_minutes", found, {**values})
    everything = _sum(connection, "run_totals", [], {})
    return Total(round(runs * within / max(everything, 1)), Accuracy.ESTIMATE)


def _sum(connection: sqlite3.Connection, table: str, found: list[str], values: Values) -> int:
    where = f" WHERE {' AND '.join(found)}" if found else ""
    return int(connection.execute(f"SELECT coalesce(sum(runs), 0) FROM {table}{where}", values).fetchone()[0])
