"""SQL for counts: how many runs match, counted or taken from totals."""

from __future__ import annotations

from typing import Final

from telemetryd.engine import counts
from telemetryd.engine.columns import MINUTE
from telemetryd.engine.pages import BEHIND_ALL, Span
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import full_text
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.predicates import (
    CHOSEN_LABEL,
    Values,
    are_short,
    choose_label,
    conditions,
    one,
)
from telemetryd.engine.postgres.statements.runs import created_span, find_agents, started
from telemetryd.engine.postgres.statements.totals import MINUTES, TOTALS
from telemetryd.engine.registry import always
from telemetryd.model.filters import Filters, label_parameter
from telemetryd.model.queries import MAX_NAMES, CountMatching, CountRuns, Counts, Total


class _Counter:
    """Counts on one connection (`counts.Counter`)."""

    def __init__(self, plain: Plain) -> None:
        self._plain = plain

    def find_agents(self, filters: Filters) -> tuple[str, ...] | None:
        return find_agents(self._plain, filters)

    def count(self, filters: Filters, most: int | None) -> int:
        if most is None and counts.are_totals(filters):
            return self.sum_totals(filters)
        if most is None and (by_minutes := select_count_of_span(filters)) is not None:
            return self._number(*by_minutes)
        label = None if filters.words is not None else choose_label(self._plain, filters)
        created = None
        if started(filters)[0]:
            created = created_span(self._plain, filters)
            if created is None:
                return 0
        has_index = bool(filters.equal or filters.labels or filters.bounds or filters.words)
        with full_text.by_index(self._plain, is_needed=has_index):
            return self._number(*select_count(filters, most, label, created))

    def sum_totals(self, filters: Filters) -> int:
        return self._sum(TOTALS, *conditions(filters))

    def sum_minutes(self, minutes: Filters) -> int:
        found = [f"minute {comparison} %({name})s" for name, comparison in _MINUTES.items() if name in minutes.bounds]
        return self._sum(MINUTES, found, {**minutes.bounds})

    def _sum(self, table: str, found: list[str], values: Values) -> int:
        where = f" WHERE {' AND '.join(found)}" if found else ""
        return self._number(f"SELECT greatest(coalesce(sum(runs), 0), 0) FROM {table}{where}", values)

    def _number(self, sql: str, values: Values) -> int:
        return int(one(self._plain, sql, values)[0])


_LOOKED_UP: Final = "SELECT 1 FROM agent_runs WHERE agent_runs.id = chosen.run"
_MINUTES: Final = {"created_after": ">=", "created_before": "<="}


@answers(CountMatching, is_long=always)
def count_matching(plain: Plain, query: CountMatching) -> Total:
    """Count the runs that match, or estimate how many they are."""
    full_text.require(plain, query.filters)
    return counts.count_matching(_Counter(plain), query)


def select_count(
    filters: Filters, most: int | None = None, label: str | None = None, created: Span | None = None
) -> tuple[str, Values]:
    """Return the SQL text and the parameters that count the runs that match.

    They are counted up to a bound if there is one; `label` is the one whose runs are looked at, and `created` a span
    of created_at outside of which nothing can match.
    """
    alone = () if label is None else (label_parameter(label),)
    found, values = conditions(filters, alone)
    found += are_short(filters.equal)
    if created is not None:
        found.append("created_at >= %(first_created)s AND created_at < %(last_created)s")
        values |= dict(zip(("first_created", "last_created"), created, strict=True))
    source = "agent_runs"
    if label is not None:
        source, (key, value) = "run_labels AS chosen", CHOSEN_LABEL
        if found:
            # Each is looked up: to join them PostgreSQL would rather read all runs that the other filters leave.
            source += f" CROSS JOIN LATERAL ({_LOOKED_UP} AND {' AND '.join(found)} OFFSET 0) AS its"
        found = [f"{key} = %(label)s AND {value} = ANY(%(label_values)s)"]
        values |= {"label": label, "label_values": [*filters.labels[label]]}
    matching = f"FROM {source} WHERE {' AND '.join(found) or 'true'}"
    if most is None:
        return f"SELECT count(*) {matching}", values
    return f"SELECT count(*) FROM (SELECT 1 {matching} LIMIT %(most)s) AS counted", {**values, "most": most}


def select_count_of_span(filters: Filters) -> tuple[str, Values] | None:
    """Return what counts the runs that were created in some time, exactly, by whole minutes; None if more is asked.

    Only those of the minutes at both ends are counted, and the whole ones between them are added up.
    """
    lower, upper = (filters.bounds.get(name, "") for name in ("created_after", "created_before"))
    if not (lower or upper) or Filters(bounds=filters.bounds) != filters or started(filters)[0]:
        return None
    if upper and lower[:MINUTE] >= upper[:MINUTE]:
        return None
    values = {"lower": lower, "upper": upper, "first": lower[:MINUTE], "last": upper[:MINUTE]}
    minutes, ends = [], []
    if lower:
        values["end"] = lower[:MINUTE] + BEHIND_ALL
        minutes.append("minute > %(first)s")
        ends.append("SELECT count(*) FROM agent_runs WHERE created_at > %(lower)s AND created_at < %(end)s")
    if upper:
        minutes.append("minute < %(last)s")
        ends.append("SELECT count(*) FROM agent_runs WHERE created_at >= %(last)s AND created_at < %(upper)s")
    whole = f"SELECT coalesce(sum(runs), 0) FROM {MINUTES} WHERE {' AND '.join(minutes)}"
    return f"SELECT {' + '.join(f'({part})' for part in (whole, *ends))}", values


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
