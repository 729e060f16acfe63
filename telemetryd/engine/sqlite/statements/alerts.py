"""SQL for alerts: evaluates the rules, and stores what fires and what is to be delivered."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Final

import orjson

from telemetryd.engine.indexes import Values
from telemetryd.engine.registry import always
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.engine.sqlite.statements.columns import NEWEST
from telemetryd.engine.sqlite.statements.predicates import glob, stale_runs, together
from telemetryd.engine.sqlite.statements.regressions import fetch_cells, fetch_runs
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
from telemetryd.model.commands import AlertChange, ConfirmDelivery, KeepAlerts, RecordAlerts
from telemetryd.model.queries import CountStale
from telemetryd.model.rules import FailureRate, Regression, Rule, Silent, Slow, Stale, matcher
from telemetryd.model.values import format_timestamp

_STAND: Final = f"SELECT {NEWEST}, (SELECT coalesce(max(epoch), '') FROM change_feed)"
_FIRING: Final = """
    SELECT rule, since, seq, summary, details, agent_name, job_type, measure, first_bad_commit FROM alert_states
    ORDER BY rule, agent_name, job_type, measure, first_bad_commit
"""
# Neither the clock of an agent nor our own, if it was ahead for a time, may make one heard of that has fallen silent.
# An agent that is named need not be there; of others it is asked when they were last heard of, which costs two steps
# down an index for each. SQLite bounds what comes out, and counts the rest: there may be any number of agents. With a
# limit, a subquery is not merged into the one around it, which would ask for each moment up to five times.
_SILENT: Final = """
    SELECT name, nullif(heard, '') FROM (
        SELECT name, iif(created >= :before, created, max(created, coalesce((
            SELECT max(updated_at) FROM agent_runs INDEXED BY idx_runs_agent_status_created
            WHERE agent_name = name AND status = 'running' AND updated_at <= :now
        ), ''))) AS heard
        FROM (
            SELECT name, max(
                coalesce((
                    SELECT created_at FROM agent_runs INDEXED BY idx_runs_agent_created
                    WHERE agent_name = name AND created_at <= :now AND NOT EXISTS (
                        SELECT 1 FROM run_arrivals AS a
                        WHERE a.created_at = agent_runs.created_at AND a.run = agent_runs.id
                    )
                    ORDER BY created_at DESC LIMIT 1
                ), ''),
                coalesce((SELECT max(arrived_at) FROM run_arrivals WHERE agent_name = name AND arrived_at <= :now), '')
            ) AS created
            FROM (
                SELECT agent_name AS name FROM run_totals WHERE runs > 0 AND ({patterns})
                UNION SELECT value FROM json_each(:named)
            )
            LIMIT -1
        )
        LIMIT -1
    )
    WHERE heard < :before
"""
_MOST: Final = """
    SELECT *, count(*) OVER () FROM ({found})
    ORDER BY {agent} IN (SELECT value FROM json_each(:fired)) DESC, {agent} LIMIT :most
"""
"""Those first that fire already, and in each row how many there are in all."""
_IS_AT_WORK: Final = "SELECT EXISTS (SELECT 1 FROM run_totals WHERE status = 'running' AND runs > 0)"
_AT_WORK: Final = "SELECT agent_name, job_type FROM run_totals WHERE status = 'running' AND runs > 0"
# Next to a lone min() SQLite takes the other columns from the row that has it (sqlite.org/lang_select.html).
_RUNNING_LONG: Final = """
    SELECT count(*), event_id, min(start_time) FROM agent_runs INDEXED BY idx_runs_agent
    WHERE agent_name = ? AND job_type = ? AND status = 'running' AND start_time < ?
"""

_FIRE: Final = """
    INSERT OR REPLACE INTO alert_states
    (rule, agent_name, job_type, measure, first_bad_commit, since, seq, summary, details)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_RESOLVE: Final = """
    DELETE FROM alert_states
    WHERE rule = ? AND agent_name = ? AND job_type = ? AND measure = ? AND first_bad_commit = ?
"""
_DELIVER: Final = "INSERT INTO alert_deliveries (webhook, id, created_at, body) VALUES (?, ?, ?, ?)"
_GIVE_UP: Final = """
    DELETE FROM alert_deliveries WHERE webhook = :webhook AND number <= (
        SELECT number FROM alert_deliveries WHERE webhook = :webhook ORDER BY number DESC LIMIT 1 OFFSET :kept
    )
"""
_FORGET_TOO_MANY: Final = """
    DELETE FROM alert_states WHERE (rule, agent_name, job_type, measure, first_bad_commit) IN (
        SELECT rule, agent_name, job_type, measure, first_bad_commit FROM (
            SELECT *, row_number() OVER (
                PARTITION BY rule ORDER BY agent_name, job_type, measure, first_bad_commit
            ) AS place FROM alert_states
        ) WHERE place > ?
    )
"""
"""Versions before 4.0.0 kept any number."""
_FORGET_RULES: Final = "DELETE FROM alert_states WHERE rule NOT IN (SELECT value FROM json_each(?))"
_FORGET_WEBHOOKS: Final = "DELETE FROM alert_deliveries WHERE webhook NOT IN (SELECT value FROM json_each(?))"


@answers(EvaluateRules, is_long=always)
def evaluate(connection: sqlite3.Connection, query: EvaluateRules) -> Evaluation:
    """Evaluate every rule in one snapshot."""
    connection.execute("BEGIN")
    try:
        seq, epoch = connection.execute(_STAND).fetchone()
        firing = _fetch_firing(connection)
        found: dict[str, tuple[Finding, ...] | str] = {}
        more: dict[str, int] = {}
        for rule in query.rules:
            try:
                found[rule.name], more[rule.name] = _find(connection, rule, query, firing)
            except InvalidRequestError as error:  # too many groups
                found[rule.name] = sentence(error)
        return Evaluation(query.now, found, firing, seq, epoch, more)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _find(
    connection: sqlite3.Connection, rule: Rule, query: EvaluateRules, firing: tuple[Firing, ...]
) -> tuple[tuple[Finding, ...], int]:
    fired = {each.subject: each for each in firing if each.rule == rule.name}
    match rule:
        case Silent():
            return _silent(connection, rule, query, fired)
        case Stale():
            return _stale(connection, rule, query, fired)
        case FailureRate():
            groups = rollups.fetch_stats(connection, alerts.window_of(rule, query.now))
            return alerts.bounded(alerts.failure_rate(rule, groups), fired)
        case Slow():
            return alerts.bounded(_slow(connection, rule, query), fired)
        case Regression():
            return alerts.bounded(_regressions(connection, rule, query, [*fired.values()]), fired)


def _silent(
    connection: sqlite3.Connection, rule: Silent, query: EvaluateRules, fired: Iterable[Subject]
) -> tuple[tuple[Finding, ...], int]:
    """Find the agents that were last heard of too long ago; one that is named without a wildcard need not be there."""
    patterns, values = _is_meant("agent_name", rule)
    named = orjson.dumps([name for name in rule.agent_name if "*" not in name]).decode()
    values |= {"before": alerts.ago(query.now, rule.after_s), "now": format_timestamp(query.now), "named": named}
    rows, more = _most(connection, _SILENT.format(patterns=patterns), "name", values, fired)
    return alerts.silent(rule, query.now, dict(rows)), more


def _stale(
    connection: sqlite3.Connection, rule: Stale, query: EvaluateRules, fired: Iterable[Subject]
) -> tuple[tuple[Finding, ...], int]:
    walks, values = stale_runs(CountStale(alerts.ago(query.now, rule.after_s)))
    patterns, bound = _is_meant("agent_name", rule)
    runs = together(walks, "agent_name", "event_id")
    found = f"SELECT agent_name, count(*), event_id, min(since) FROM ({runs}) WHERE {patterns} GROUP BY agent_name"
    rows, more = _most(connection, found, "agent_name", {**values, **bound}, fired)
    return tuple(alerts.stale(rule, agent, Running(*running)) for agent, *running in rows), more


def _is_meant(column: str, rule: Rule) -> tuple[str, Values]:
    """Return the condition that a column is the name of an agent that a rule is about."""
    values: Values = {f"agent_{number}": glob(tuple(name.split("*"))) for number, name in enumerate(rule.agent_name)}
    return " OR ".join(f"{column} GLOB :{place}" for place in values), values


def _most(
    connection: sqlite3.Connection, found: str, agent: str, values: Values, fired: Iterable[Subject]
) -> tuple[list[tuple[Any, ...]], int]:
    """Return as many rows as a rule may fire for, in the order of their agents, and how many there are besides."""
    names = orjson.dumps([subject.agent_name for subject in fired]).decode()
    bound = {**values, "fired": names, "most": alerts.MAX_FIRING}
    rows = connection.execute(_MOST.format(found=found, agent=agent), bound).fetchall()
    return sorted(row[:-1] for row in rows), rows[0][-1] - len(rows) if rows else 0


def _slow(connection: sqlite3.Connection, rule: Slow, query: EvaluateRules) -> Iterator[Finding]:
    if not connection.execute(_IS_AT_WORK).fetchone()[0]:
        return
    is_agent = matcher(rule.agent_name)
    limits = alerts.limits(rule, rollups.fetch_stats(connection, alerts.window_of(rule, query.now)))
    at_work = (Subject(*row) for row in connection.execute(_AT_WORK))
    for subject in sorted(each for each in at_work if each in limits and is_agent(each.agent_name)):
        before = alerts.ago(query.now, limits[subject] / 1000)
        runs, *longest = connection.execute(_RUNNING_LONG, (subject.agent_name, subject.job_type, before)).fetchone()
        if runs:
            yield alerts.slow(subject, limits[subject], Running(runs, *longest))


def _regressions(
    connection: sqlite3.Connection, rule: Regression, query: EvaluateRules, fired: list[Firing]
) -> Iterator[Finding]:
    cells = fetch_cells(connection, commit_alerts.runs_of(rule, query.now))
    return commit_alerts.regressions(rule, query.now, cells, fired, partial(fetch_runs, connection))


def _fetch_firing(connection: sqlite3.Connection) -> tuple[Firing, ...]:
    return tuple(
        Firing(rule, Subject(*subject), since, seq, summary, orjson.loads(details))
        for rule, since, seq, summary, details, *subject in connection.execute(_FIRING)
    )


@answers(ListFiring)
def fetch_kept(connection: sqlite3.Connection, query: ListFiring) -> Kept:
    """Fetch what is firing, and how many deliveries wait."""
    waiting: dict[str, int] = dict(
        connection.execute("SELECT webhook, count(*) FROM alert_deliveries GROUP BY webhook").fetchall()
    )
    return Kept(_fetch_firing(connection), waiting)


@answers(ListDeliveries)
def fetch_deliveries(connection: sqlite3.Connection, query: ListDeliveries) -> list[Delivery]:
    """Fetch the oldest deliveries that wait for a webhook."""
    rows: Iterator[tuple[Any, ...]] = connection.execute(
        "SELECT number, id, created_at, body FROM alert_deliveries WHERE webhook = ? ORDER BY number LIMIT ?",
        (query.webhook, query.limit),
    )
    return [Delivery(*row) for row in rows]


def apply(cursor: sqlite3.Cursor, command: RecordAlerts | ConfirmDelivery | KeepAlerts, now: str) -> int:
    """Carry a command out; return how many rows were given up, confirmed or forgotten."""
    match command:
        case RecordAlerts(changes):
            return _record(cursor, changes, now)
        case ConfirmDelivery(number):
            return cursor.execute("DELETE FROM alert_deliveries WHERE number = ?", (number,)).rowcount
        case KeepAlerts(rules, webhooks):
            gone = cursor.execute(_FORGET_RULES, (orjson.dumps(rules).decode(),)).rowcount
            gone += cursor.execute(_FORGET_TOO_MANY, (alerts.MAX_FIRING,)).rowcount
            return gone + cursor.execute(_FORGET_WEBHOOKS, (orjson.dumps(webhooks).decode(),)).rowcount


def _record(cursor: sqlite3.Cursor, changes: tuple[AlertChange, ...], now: str) -> int:
    for change in changes:
        key = (change.rule, *change.subject)
        if change.firing:
            cursor.execute(_FIRE, (*key, change.since, change.seq, change.summary, change.details))
        else:
            cursor.execute(_RESOLVE, key)
        for webhook in change.webhooks:
            cursor.execute(_DELIVER, (webhook, change.id, now, change.body))
    webhooks = {webhook for change in changes for webhook in change.webhooks}
    kept = [{"webhook": webhook, "kept": alerts.MAX_WAITING} for webhook in sorted(webhooks)]
    return sum(cursor.execute(_GIVE_UP, values).rowcount for values in kept)
