"""SQL for counts: how many runs match, counted or taken from totals."""

from __future__ import annotations

from typing import Final

from telemetryd.engine.columns import MINUTE
from telemetryd.engine.pages import named
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import full_text
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.predicates import (
    CHOSEN,
    Arm,
    Values,
    arms_of,
    arms_of_label,
    choose_label,
    conditions,
    conditions_of_arm,
    one,
)
from telemetryd.engine.postgres.statements.runs import find_agents
from telemetryd.engine.postgres.statements.totals import MINUTES, TOTALS
from telemetryd.engine.registry import always
from telemetryd.model.filters import Filters, label_parameter
from telemetryd.model.queries import MAX_NAMES, Accuracy, Count, CountMatching, CountRuns, Counts, Total

_KEPT: Final = frozenset({"agent_name", "job_type", "status"})
"""The fields that totals are kept for."""
_MOST: Final = 10_000
"""Runs that an estimate counts at most."""


@answers(CountMatching, is_long=always)
def count_matching(plain: Plain, query: CountMatching) -> Total:
    """Count the runs that match, or estimate how many they are."""
    full_text.require(plain, query.filters)
    agents = find_agents(plain, query.filters)
    if agents == ():
        return Total(0)
    filters = query.filters if agents is None else named(query.filters, agents)
    if query.count is Count.EXACT:
        return Total(_count(plain, filters, None))
    total = _from_totals(plain, filters)
    if total is None:
        runs = _count(plain, filters, _MOST)
        total = Total(runs, Accuracy.EXACT if runs < _MOST else Accuracy.AT_LEAST)
    return total


def _count(plain: Plain, filters: Filters, most: int | None) -> int:
    label = None if filters.words is not None else choose_label(plain, filters)
    with full_text.by_index(plain, filters):
        return int(one(plain, *select_count(filters, most, label))[0])


def select_count(filters: Filters, most: int | None = None, label: str | None = None) -> tuple[str, Values]:
    """Return the SQL text and the parameters that count the runs that match.

    They are counted up to a bound if there is one; `label` is the one whose runs are walked.
    """
    source, arms = "agent_runs", [Arm()]
    alone: tuple[str, ...] = ()
    if label is not None:
        source, arms, alone = CHOSEN, arms_of_label(label, filters.labels[label]), (label_parameter(label),)
    elif filters.words is None:
        alone, arms = arms_of(filters)
    found, values = conditions(filters, alone)
    texts = []
    for number, arm in enumerate(arms):
        where = " AND ".join([*conditions_of_arm(number, arm, values), *found]) or "true"
        texts.append(f"SELECT 1 FROM {source} WHERE {where}")
    values["most"] = most  # a limit of null is none
    return f"SELECT count(*) FROM ({' UNION ALL '.join(texts)} LIMIT %(most)s) AS found", values


def _from_totals(plain: Plain, filters: Filters) -> Total | None:
    """Return the number from the totals, if they have it.

    Of a span of time they have the number of runs of all agents; for some agents that is a share.
    """
    kept = Filters(filters.equal, {n: m for n, m in filters.bounds.items() if n.startswith("created_")})
    if kept != filters or not filters.equal.keys() <= _KEPT:
        return None
    runs = _sum(plain, TOTALS, *conditions(Filters(filters.equal)))
    if not filters.bounds:
        return Total(runs)
    found, values = [], {}
    for name, comparison in (("created_after", ">="), ("created_before", "<=")):
        if name in filters.bounds:
            found.append(f"minute {comparison} %({name})s")
            values[name] = filters.bounds[name][:MINUTE]
    within = _sum(plain, MINUTES, found, values)
    everything = _sum(plain, TOTALS, [], {})
    return Total(round(runs * within / max(everything, 1)), Accuracy.ESTIMATE)


def _sum(plain: Plain, table: str, found: list[str], values: Values) -> int:
    where = f" WHERE {' AND '.join(found)}" if found else ""
    return int(one(plain, f"SELECT greatest(coalesce(sum(runs), 0), 0) FROM {table}{where}", values)[0])


_COUNTS: Final = f"""
    WITH totals AS MATERIALIZED (
        SELECT agent_name, job_type, sum(runs) AS runs FROM (
            SELECT agent_name, job_type, status, sum(runs) AS runs FROM {TOTALS}
            GROUP BY agent_name, job_type, status HAVING sum(runs) > 0
        ) AS kept GROUP BY agent_name, job_type
    ), agents AS (
        SELECT agent_name, sum(runs)::bigint AS runs FROM totals GROUP BY agent_name
        ORDER BY sum(runs) DESC, agent_name LIMIT {MAX_NAMES}
    ), jobs AS (
        SELECT DISTINCT job_type FROM totals ORDER BY job_type LIMIT {MAX_NAMES}
    )
    SELECT
        (SELECT array_agg(agent_name ORDER BY runs DESC, agent_name) FROM agents),
        (SELECT array_agg(runs ORDER BY runs DESC, agent_name) FROM agents),
        (SELECT array_agg(job_type ORDER BY job_type) FROM jobs),
        (SELECT coalesce(sum(runs), 0)::bigint FROM {MINUTES} WHERE minute BETWEEN %(since)s AND %(until)s),
        coalesce(sum(runs), 0)::bigint, count(DISTINCT agent_name), count(DISTINCT job_type)
    FROM totals
"""


@answers(CountRuns)
def fetch_counts(plain: Plain, query: CountRuns) -> Counts:
    """Read the totals; their cost does not grow with the number of runs.

    `recent` are the runs created in the minutes from that of `since` to that of `until`.
    """
    minutes = {"since": query.since[:MINUTE], "until": query.until[:MINUTE]}
    agents, runs, job_types, *numbers = one(plain, _COUNTS, minutes)
    return Counts(dict(zip(agents or (), runs or (), strict=True)), tuple(job_types or ()), *numbers)
