"""SQL for alerts: evaluates the rules, and reads what fires and what is to be delivered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Final

import orjson

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.aging import stale_runs, together
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.numbers import NEWEST
from telemetryd.engine.postgres.statements.predicates import Values, like, one
from telemetryd.engine.postgres.statements.regressions import fetch_cells, fetch_runs
from telemetryd.engine.postgres.statements.stats import fetch_stats
from telemetryd.engine.postgres.statements.totals import TOTALS
from telemetryd.engine.registry import always
from telemetryd.errors import InvalidRequestError, sentence
from telemetryd.model import alerts, commit_alerts
from telemetryd.model.alerts import (
    Delivery,
    EvaluateRules,
    Evaluation,
    Finding,
    Firing,
    Kept,
    ListDeliveries,
    ListFiring,
    Running,
    Subject,
)
from telemetryd.model.queries import CountStale
from telemetryd.model.rules import FailureRate, Regression, Rule, Silent, Slow, Stale, matcher
from telemetryd.model.values import format_timestamp

_STAND: Final = f"SELECT {NEWEST}, (SELECT coalesce(max(epoch), '') FROM change_feed)"
_FIRING: Final = """
    SELECT rule, since, seq, summary, details, agent_name, job_type, measure, first_bad_commit FROM alert_states
    ORDER BY rule, agent_name, job_type, measure, first_bad_commit
"""
_AGENTS: Final = f"""
    SELECT agent_name FROM {TOTALS} WHERE {{patterns}}
    GROUP BY agent_name, job_type, status HAVING sum(runs) > 0
"""
# Neither the clock of an agent nor our own, if it was ahead for a time, may make one heard of that has fallen silent.
# An agent that is named need not be there; of others it is asked when they were last heard of, which costs two steps
# down an index for each. PostgreSQL bounds what comes out, and counts the rest: there may be any number of agents.
_SILENT: Final = f"""
    SELECT name, nullif(heard, '') AS heard FROM (
        SELECT name, CASE WHEN created >= %(before)s THEN created ELSE greatest(created, coalesce((
            SELECT max(updated_at) FROM agent_runs
            WHERE agent_name = name AND status = 'running' AND updated_at <= %(now)s
        ), '')) END AS heard
        FROM (
            SELECT name, greatest(
                coalesce((
                    SELECT created_at FROM agent_runs
                    WHERE agent_name = name AND created_at <= %(now)s AND NOT EXISTS (
                        SELECT 1 FROM run_arrivals AS a
                        WHERE a.created_at = agent_runs.created_at AND a.run = agent_runs.id
                    )
                    ORDER BY created_at DESC, id DESC LIMIT 1
                ), ''),
                coalesce((
                    SELECT max(arrived_at) FROM run_arrivals WHERE agent_name = name AND arrived_at <= %(now)s
                ), '')
            ) AS created
            FROM (
                {_AGENTS} UNION SELECT unnest(%(named)s::text[]) COLLATE "C"
            ) AS meant (name)
            OFFSET 0
        ) AS made
        OFFSET 0
    ) AS known
    WHERE heard < %(before)s
"""
_MOST: Final = """
    SELECT *, count(*) OVER () FROM ({found}) AS found
    ORDER BY {agent} = ANY(%(fired)s::text[]) DESC, {agent} LIMIT %(most)s
"""
"""Those first that fire already, and in each row how many there are in all."""
_AT_WORK: Final = f"""
    SELECT agent_name, job_type FROM {TOTALS} WHERE status = 'running'
    GROUP BY agent_name, job_type HAVING sum(runs) > 0
"""
_RUNNING_LONG: Final = """
    SELECT count(*) OVER (), event_id, start_time FROM agent_runs
    WHERE agent_name = %s AND job_type = %s AND status = 'running' AND start_time < %s
    ORDER BY start_time, created_at, id LIMIT 1
"""


@answers(EvaluateRules, is_long=always)
def evaluate(plain: Plain, query: EvaluateRules) -> Evaluation:
    """Evaluate every rule in one snapshot."""
    with plain.transaction():
        seq, epoch = one(plain, _STAND)
        firing = _fetch_firing(plain)
        found: dict[str, tuple[Finding, ...] | str] = {}
        more: dict[str, int] = {}
        for rule in query.rules:
            try:
                found[rule.name], more[rule.name] = _find(plain, rule, query, firing)
            except InvalidRequestError as error:  # too many groups
                found[rule.name] = sentence(error)
        return Evaluation(query.now, found, firing, seq, epoch, more)


def _find(
    plain: Plain, rule: Rule, query: EvaluateRules, firing: tuple[Firing, ...]
) -> tuple[tuple[Finding, ...], int]:
    fired = {each.subject: each for each in firing if each.rule == rule.name}
    match rule:
        case Silent():
            return _silent(plain, rule, query, fired)
        case Stale():
            return _stale(plain, rule, query, fired)
        case FailureRate():
            groups = fetch_stats(plain, alerts.window_of(rule, query.now))
            return alerts.bounded(alerts.failure_rate(rule, groups), fired)
        case Slow():
            return alerts.bounded(_slow(plain, rule, query), fired)
        case Regression():
            return alerts.bounded(_regressions(plain, rule, query, [*fired.values()]), fired)


def _silent(
    plain: Plain, rule: Silent, query: EvaluateRules, fired: Iterable[Subject]
) -> tuple[tuple[Finding, ...], int]:
    """Find the agents that were last heard of too long ago; one that is named without a wildcard need not be there."""
    values: Values = {
        "patterns": _patterns(rule),
        "before": alerts.ago(query.now, rule.after_s),
        "now": format_timestamp(query.now),
        "named": [name for name in rule.agent_name if "*" not in name],
    }
    rows, more = _most(plain, _SILENT.format(patterns="agent_name LIKE ANY(%(patterns)s)"), "name", values, fired)
    return alerts.silent(rule, query.now, dict(rows)), more


def _stale(
    plain: Plain, rule: Stale, query: EvaluateRules, fired: Iterable[Subject]
) -> tuple[tuple[Finding, ...], int]:
    walks, values = stale_runs(CountStale(alerts.ago(query.now, rule.after_s)))
    runs = together(walks, "agent_name", "event_id", "id")
    found = f"""
        SELECT agent_name, count(*) AS runs, (array_agg(event_id ORDER BY since, id))[1] AS event_id,
            min(since) AS since
        FROM ({runs}) AS stale WHERE agent_name LIKE ANY(%(patterns)s) GROUP BY agent_name
    """
    rows, more = _most(plain, found, "agent_name", {**values, "patterns": _patterns(rule)}, fired)
    return tuple(alerts.stale(rule, agent, Running(*running)) for agent, *running in rows), more


def _patterns(rule: Rule) -> list[str]:
    """Return the patterns of the agents that a rule is about."""
    return [like(tuple(name.split("*"))) for name in rule.agent_name]


def _most(
    plain: Plain, found: str, agent: str, values: Values, fired: Iterable[Subject]
) -> tuple[list[tuple[Any, ...]], int]:
    """Return as many rows as a rule may fire for, in the order of their agents, and how many there are besides."""
    bound = {**values, "fired": [subject.agent_name for subject in fired], "most": alerts.MAX_FIRING}
    rows = plain.execute(_MOST.format(found=found, agent=agent), bound).fetchall()
    return sorted(row[:-1] for row in rows), rows[0][-1] - len(rows) if rows else 0


def _slow(plain: Plain, rule: Slow, query: EvaluateRules) -> Iterator[Finding]:
    at_work = [Subject(*row) for row in plain.execute(_AT_WORK)]
    if not at_work:
        return
    is_agent = matcher(rule.agent_name)
    limits = alerts.limits(rule, fetch_stats(plain, alerts.window_of(rule, query.now)))
    for subject in sorted(each for each in at_work if each in limits and is_agent(each.agent_name)):
        before = alerts.ago(query.now, limits[subject] / 1000)
        longest = plain.execute(_RUNNING_LONG, (subject.agent_name, subject.job_type, before)).fetchone()
        if longest is not None:
            yield alerts.slow(subject, limits[subject], Running(*longest))


def _regressions(plain: Plain, rule: Regression, query: EvaluateRules, fired: list[Firing]) -> Iterator[Finding]:
    cells = fetch_cells(plain, commit_alerts.runs_of(rule, query.now))
    return commit_alerts.regressions(rule, query.now, cells, fired, partial(fetch_runs, plain))


def _fetch_firing(plain: Plain) -> tuple[Firing, ...]:
    return tuple(
        Firing(rule, Subject(*subject), since, seq, summary, orjson.loads(details))
        for rule, since, seq, summary, details, *subject in plain.execute(_FIRING)
    )


@answers(ListFiring)
def fetch_kept(plain: Plain, query: ListFiring) -> Kept:
    """Fetch what is firing, and how many deliveries wait."""
    waiting: dict[str, int] = dict(
        plain.execute("SELECT webhook, count(*) FROM alert_deliveries GROUP BY webhook").fetchall()
    )
    return Kept(_fetch_firing(plain), waiting)


@answers(ListDeliveries)
def fetch_deliveries(plain: Plain, query: ListDeliveries) -> list[Delivery]:
    """Fetch the oldest deliveries that wait for a webhook."""
    rows = plain.execute(
        "SELECT number, id, created_at, body FROM alert_deliveries WHERE webhook = %s ORDER BY number LIMIT %s",
        (query.webhook, query.limit),
    )
    return [Delivery(*row) for row in rows]
