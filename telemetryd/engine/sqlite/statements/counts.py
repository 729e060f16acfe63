"""SQL for counts: how many runs match, counted or taken from totals."""

from __future__ import annotations

import sqlite3
from typing import Final

from telemetryd.engine import counts
from telemetryd.engine.indexes import Values, choose
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
from telemetryd.model.queries import CountMatching, Total

_MINUTES: Final = {"created_after": ">=", "created_before": "<="}


class _Counter:
    """Counts on one connection (`counts.Counter`)."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def find_agents(self, filters: Filters) -> tuple[str, ...] | None:
        return find_agents(self._connection, filters)

    def count(self, filters: Filters, most: int | None) -> int:
        label = None if filters.words is not None else choose_label(self._connection, filters)
        return self._number(*select_count(filters, -1 if most is None else most, label))

    def sum_totals(self, filters: Filters) -> int:
        return self._sum("run_totals", *conditions(filters))

    def sum_minutes(self, minutes: Filters) -> int:
        found = [f"minute {comparison} :{name}" for name, comparison in _MINUTES.items() if name in minutes.bounds]
        return self._sum("run_minutes", found, {**minutes.bounds})

    def _sum(self, table: str, found: list[str], values: Values) -> int:
        where = f" WHERE {' AND '.join(found)}" if found else ""
        return self._number(f"SELECT coalesce(sum(runs), 0) FROM {table}{where}", values)

    def _number(self, sql: str, values: Values) -> int:
        return int(self._connection.execute(sql, values).fetchone()[0])


@answers(CountMatching, is_long=always)
def count_matching(connection: sqlite3.Connection, query: CountMatching) -> Total:
    """Count the runs that match, or estimate how many they are."""
    full_text.require(connection, query.filters)
    return counts.count_matching(_Counter(connection), query)


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
