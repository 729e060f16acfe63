"""How the rules of alerts are asked of SQLite, and how what is firing and what is to be delivered are kept."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, Final

import orjson

from telemetryd import alerts
from telemetryd.alerts import (
    Delivery,
    EvaluateRules,
    Evaluation,
    Finding,
    Firing,
    Kept,
    ListDeliveries,
    Running,
    Subject,
)
from telemetryd.commands import AlertChange, AlertCommand, ConfirmDelivery, KeepAlerts, RecordAlerts
from telemetryd.errors import InvalidRequestError, sentence
from telemetryd.regressions import in_order
from telemetryd.rules import FailureRate, Regression, Rule, Silent, Slow, Stale, matcher
from telemetryd.runs import format_timestamp
from telemetryd.statements import rollups
from telemetryd.statements.choosing import stale_runs, together
from telemetryd.statements.regressing import fetch_pairs
from telemetryd.statements.sequence import NEWEST

MAX_WAITING: Final = 1000
"""Deliveries that may wait for one webhook; beyond it the oldest are given up."""

_STAND: Final = f"SELECT {NEWEST}, (SELECT coalesce(max(epoch), '') FROM change_feed)"  # noqa: S608 - our own words
_FIRING: Final = """
    SELECT rule, since, seq, summary, details, agent_name, job_type, measure, first_bad_commit FROM alert_states
    ORDER BY rule, agent_name, job_type, measure, first_bad_commit
"""
_AGENTS: Final = "SELECT DISTINCT agent_name FROM run_totals WHERE runs > 0"
# Neither the clock of an agent nor our own, if it was ahead for a time, may make one heard of that has fallen silent.
_LAST_ARRIVED: Final = """
    SELECT nullif(max(
        coalesce((
            SELECT created_at FROM agent_runs INDEXED BY idx_runs_agent_created
            WHERE agent_name = :agent_name AND created_at <= :now AND NOT EXISTS (
                SELECT 1 FROM run_arrivals AS a WHERE a.created_at = agent_runs.created_at AND a.run = agent_runs.id
            )
            ORDER BY created_at DESC LIMIT 1
        ), ''),
        coalesce((SELECT max(arrived_at) FROM run_arrivals WHERE agent_name = :agent_name AND arrived_at <= :now), '')
    ), '')
"""
_LAST_CHANGED: Final = """
    SELECT max(updated_at) FROM agent_runs INDEXED BY idx_runs_agent_status_created
    WHERE agent_name = :agent_name AND status = 'running' AND updated_at <= :now
"""
_AT_WORK: Final = "SELECT agent_name, job_type FROM run_totals WHERE status = 'running' AND runs > 0"
# Beside a lone min() SQLite takes the other columns from the row that has it (sqlite.org/lang_select.html).
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
    DELETE FROM alert_deliveries WHERE webhook = ?1 AND number <= (
        SELECT number FROM alert_deliveries WHERE webhook = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2
    )
"""
_FORGET_RULES: Final = "DELETE FROM alert_states WHERE rule NOT IN (SELECT value FROM json_each(?))"
_FORGET_WEBHOOKS: Final = "DELETE FROM alert_deliveries WHERE webhook NOT IN (SELECT value FROM json_each(?))"


def evaluate(connection: sqlite3.Connection, query: EvaluateRules) -> Evaluation:
    """Evaluate every rule in one snapshot."""
    connection.execute("BEGIN")
    try:
        seq, epoch = connection.execute(_STAND).fetchone()
        firing = _fetch_firing(connection)
        found = {rule.name: _find(connection, rule, query, firing) for rule in query.rules}
        return Evaluation(query.now, found, firing, seq, epoch)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _find(
    connection: sqlite3.Connection, rule: Rule, query: EvaluateRules, firing: tuple[Firing, ...]
) -> tuple[Finding, ...] | str:
    try:
        match rule:
            case Silent():
                return alerts.silent(rule, query.now, dict(_heard(connection, rule, query)))
            case FailureRate():
                groups = rollups.fetch_stats(connection, alerts.window_of(rule, query.now))
                return alerts.failure_rate(rule, groups)
            case Slow():
                return tuple(_slow(connection, rule, query))
            case Stale():
                return tuple(_stale(connection, rule, query))
            case Regression():
                fired = [each for each in firing if each.rule == rule.name]
                return tuple(_regressions(connection, rule, query, fired))
    except InvalidRequestError as error:  # too many groups
        return sentence(error)


def _heard(connection: sqlite3.Connection, rule: Silent, query: EvaluateRules) -> Iterator[tuple[str, str | None]]:
    """Yield when each agent was last heard of; an agent that is named without a wildcard need not be there."""
    is_meant, before = matcher(rule.agent_name), alerts.ago(query.now, rule.after_s)
    agents = {name for (name,) in connection.execute(_AGENTS) if is_meant(name)}
    for agent in sorted(agents | {name for name in rule.agent_name if "*" not in name}):
        values = {"agent_name": agent, "now": format_timestamp(query.now)}
        last = connection.execute(_LAST_ARRIVED, values).fetchone()[0]
        if last is not None and last < before:
            last = max(last, connection.execute(_LAST_CHANGED, values).fetchone()[0] or "")
        yield agent, last


def _slow(connection: sqlite3.Connection, rule: Slow, query: EvaluateRules) -> Iterator[Finding]:
    is_agent = matcher(rule.agent_name)
    at_work = {Subject(*row) for row in connection.execute(_AT_WORK) if is_agent(row[0])}
    if not at_work:
        return
    limits = alerts.limits(rule, rollups.fetch_stats(connection, alerts.window_of(rule, query.now)))
    for subject in sorted(at_work & limits.keys()):
        before = alerts.ago(query.now, limits[subject] / 1000)
        runs, *longest = connection.execute(_RUNNING_LONG, (subject.agent_name, subject.job_type, before)).fetchone()
        if runs:
            yield alerts.slow(subject, limits[subject], Running(runs, *longest))


def _stale(connection: sqlite3.Connection, rule: Stale, query: EvaluateRules) -> Iterator[Finding]:
    walks, values = stale_runs(alerts.ago(query.now, rule.after_s), None)
    is_meant = matcher(rule.agent_name)
    for agent, *running in connection.execute(
        f"SELECT agent_name, count(*), event_id, min(since) FROM ({together(walks, 'agent_name', 'event_id')}) "  # noqa: S608 - our own words
        "GROUP BY agent_name ORDER BY agent_name",
        values,
    ):
        if is_meant(agent):
            yield alerts.stale(rule, agent, Running(*running))


def _regressions(
    connection: sqlite3.Connection, rule: Regression, query: EvaluateRules, fired: list[Firing]
) -> Iterator[Finding]:
    for agent, job_type, runs in fetch_pairs(connection, alerts.runs_of(rule, query.now)):
        yield from alerts.regressions(rule, (agent, job_type), in_order(runs), fired, query.now)


def _fetch_firing(connection: sqlite3.Connection) -> tuple[Firing, ...]:
    return tuple(
        Firing(rule, Subject(*subject), since, seq, summary, orjson.loads(details))
        for rule, since, seq, summary, details, *subject in connection.execute(_FIRING)
    )


def fetch_kept(connection: sqlite3.Connection) -> Kept:
    """Fetch what is firing, and how many deliveries wait."""
    waiting: dict[str, int] = dict(
        connection.execute("SELECT webhook, count(*) FROM alert_deliveries GROUP BY webhook").fetchall()
    )
    return Kept(_fetch_firing(connection), waiting)


def fetch_deliveries(connection: sqlite3.Connection, query: ListDeliveries) -> list[Delivery]:
    """Fetch the oldest deliveries that wait for a webhook."""
    rows: Iterator[tuple[Any, ...]] = connection.execute(
        "SELECT number, id, created_at, body FROM alert_deliveries WHERE webhook = ? ORDER BY number LIMIT ?",
        (query.webhook, query.limit),
    )
    return [Delivery(*row) for row in rows]


def apply(cursor: sqlite3.Cursor, command: AlertCommand, now: str) -> int:
    """Carry a command out; return how many rows were given up, confirmed or forgotten."""
    match command:
        case RecordAlerts(changes):
            return _record(cursor, changes, now)
        case ConfirmDelivery(number):
            return cursor.execute("DELETE FROM alert_deliveries WHERE number = ?", (number,)).rowcount
        case KeepAlerts(rules, webhooks):
            gone = cursor.execute(_FORGET_RULES, (orjson.dumps(rules).decode(),)).rowcount
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
    return sum(cursor.execute(_GIVE_UP, (webhook, MAX_WAITING)).rowcount for webhook in sorted(webhooks))
