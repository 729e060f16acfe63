"""Stores what fires and what is to be delivered: once, whichever daemon has found it."""

from __future__ import annotations

from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.model import alerts
from telemetryd.model.commands import AlertChange, ConfirmDelivery, KeepAlerts, RecordAlerts

_KEY: Final = ("rule", "agent_name", "job_type", "measure", "first_bad_commit")
_FIRE: Final = f"""
    INSERT INTO alert_states ({", ".join(_KEY)}, since, seq, summary, details)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT ({", ".join(_KEY)}) DO NOTHING
"""
_RESOLVE: Final = f"DELETE FROM alert_states WHERE {' AND '.join(f'{name} = %s' for name in _KEY)}"
_DELIVER: Final = "INSERT INTO alert_deliveries (webhook, id, created_at, body) VALUES (%s, %s, %s, %s)"
_GIVE_UP: Final = """
    DELETE FROM alert_deliveries WHERE webhook = %(webhook)s AND number <= (
        SELECT number FROM alert_deliveries WHERE webhook = %(webhook)s ORDER BY number DESC LIMIT 1 OFFSET %(kept)s
    )
"""
_FORGET_TOO_MANY: Final = f"""
    DELETE FROM alert_states WHERE ({", ".join(_KEY)}) IN (
        SELECT {", ".join(_KEY)} FROM (
            SELECT *, row_number() OVER (PARTITION BY rule ORDER BY {", ".join(_KEY[1:])}) AS place FROM alert_states
        ) AS numbered WHERE place > %s
    )
"""
_FORGET_RULES: Final = "DELETE FROM alert_states WHERE rule <> ALL (%s::text[])"
_FORGET_WEBHOOKS: Final = "DELETE FROM alert_deliveries WHERE webhook <> ALL (%s::text[])"


def apply(plain: Plain, command: RecordAlerts | ConfirmDelivery | KeepAlerts, now: str) -> int:
    """Carry a command out; return how many rows were given up, confirmed or forgotten."""
    match command:
        case RecordAlerts(changes):
            return _record(plain, changes, now)
        case ConfirmDelivery(number):
            return plain.execute("DELETE FROM alert_deliveries WHERE number = %s", (number,)).rowcount
        case KeepAlerts(rules, webhooks):
            gone = plain.execute(_FORGET_RULES, ([*rules],)).rowcount
            gone += plain.execute(_FORGET_TOO_MANY, (alerts.MAX_FIRING,)).rowcount
            return gone + plain.execute(_FORGET_WEBHOOKS, ([*webhooks],)).rowcount


def _record(plain: Plain, changes: tuple[AlertChange, ...], now: str) -> int:
    stored = set()
    # In one order, or two daemons that store the same could each wait for the other.
    for change in sorted(changes, key=lambda change: (change.rule, *change.subject)):
        key = (change.rule, *change.subject)
        if change.firing:
            done = plain.execute(_FIRE, (*key, change.since, change.seq, change.summary, change.details))
        else:
            done = plain.execute(_RESOLVE, key)
        if done.rowcount:  # else another daemon has stored it, and what is to be delivered as well
            stored.add(key)
    for change in changes:
        if (change.rule, *change.subject) in stored:
            for webhook in change.webhooks:
                plain.execute(_DELIVER, (webhook, change.id, now, change.body))
    webhooks = {webhook for change in changes for webhook in change.webhooks}
    kept = [{"webhook": webhook, "kept": alerts.MAX_WAITING} for webhook in sorted(webhooks)]
    return sum(plain.execute(_GIVE_UP, values).rowcount for values in kept)
