"""The commands about alerts: alerts test."""

from __future__ import annotations

import asyncio
import sys
import uuid
from typing import Any

import click
import orjson

from telemetryd.cli.basics import EXIT_FAILURE, EXIT_USAGE, Suggesting
from telemetryd.cli.database import refuse_missing
from telemetryd.cli.options import complain, counted, failing, json_flag, load_settings, print_json, settings_flags
from telemetryd.engine.factory import open_read_only
from telemetryd.errors import ConfigurationError
from telemetryd.model.alerts import EvaluateRules, Evaluation, changes
from telemetryd.model.rules import Rules, load_rules
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.ops.logs import printable
from telemetryd.services import webhooks
from telemetryd.settings import Settings


@click.group(cls=Suggesting, help="Try out the rules of alerts (docs/how-to/alerts.md).")
def alerts() -> None:
    """Hold the commands about alerts."""


@alerts.command(
    help=r"""Evaluate the rules now, and show what would be sent; nothing is stored.

    The database is read next to the daemon that owns it. Exit status 1 if a rule cannot be evaluated, or a test message
    was not confirmed; 2 if the rule file is wrong.

    \b
    Examples:
      telemetryd alerts test --alerts-file alerts.toml
      telemetryd alerts test --send
      telemetryd alerts test --json | jq '.would_send[].summary'
    """
)
@click.option("--send", is_flag=True, help="Send one test message to each webhook.")
@json_flag
@settings_flags("alerts_file", "db_path")
def test(*, send: bool, as_json: bool, **flags: Any) -> None:
    settings = load_settings(flags).settings
    if settings.alerts_file is None:
        click.echo("telemetryd: TELEMETRY_ALERTS_FILE: must be set, or give --alerts-file", err=True)
        sys.exit(EXIT_USAGE)
    try:
        rules = load_rules(settings.alerts_file)
    except ConfigurationError as error:
        for problem in error.problems:
            complain(problem)
        sys.exit(EXIT_USAGE)
    path = settings.db_path.absolute()
    with failing():
        refuse_missing(path)
        evaluation = asyncio.run(_evaluate(settings, rules))
    would_send = [
        {**orjson.loads(change.body), "webhooks": list(change.webhooks)}
        for change in changes(evaluation, rules, lambda: str(uuid.uuid4()))
    ]
    sent = asyncio.run(_send_tests(rules)) if send else {}
    if as_json:
        print_json({"rules": _rules(evaluation, rules), "would_send": would_send, "sent": sent})
    else:
        _show(evaluation, rules, would_send, sent)
    is_wrong = any(isinstance(found, str) for found in evaluation.found.values()) or any(sent.values())
    sys.exit(EXIT_FAILURE if is_wrong else 0)


async def _evaluate(settings: Settings, rules: Rules) -> Evaluation:
    engine = await open_read_only(settings)
    try:
        return await engine.read(EvaluateRules(rules.rules, utc_now()))
    finally:
        await engine.close()


async def _send_tests(rules: Rules) -> dict[str, str | None]:
    """Send each webhook a test message; return by name what went wrong, or None."""
    async with webhooks.open_session() as session:
        names = [webhook.name for webhook in rules.webhooks]
        posts = []
        for webhook in rules.webhooks:
            message_id = str(uuid.uuid4())
            summary = "A test message of telemetryd"
            body = {"id": message_id, "state": "test", "summary": summary, "at": format_timestamp(utc_now())}
            posts.append(webhooks.post(session, webhook, message_id, orjson.dumps(body).decode()))
        return dict(zip(names, await asyncio.gather(*posts), strict=True))


def _rules(evaluation: Evaluation, rules: Rules) -> list[dict[str, Any]]:
    shown = []
    for rule in rules.rules:
        found = evaluation.found[rule.name]
        findings = () if isinstance(found, str) else found
        shown.append(
            {
                "name": rule.name,
                "kind": rule.kind,
                "state": "firing" if findings else "ok",
                "problem": found if isinstance(found, str) else None,
                "firing": [
                    {"subject": each.subject.to_json(), "summary": each.summary, "details": each.details}
                    for each in findings
                ],
                "more": evaluation.more.get(rule.name, 0),
            }
        )
    return shown


def _show(evaluation: Evaluation, rules: Rules, would_send: list[dict[str, Any]], sent: dict[str, str | None]) -> None:
    for rule in _rules(evaluation, rules):
        click.echo(f"{rule['problem'] or rule['state']:<7} {rule['name']} ({rule['kind']})")
        for firing in rule["firing"]:
            click.echo(f"        {printable(firing['summary'])}")
        if rule["more"]:
            click.echo(f"        and {rule['more']:,} more")
    click.echo(f"{counted(len(would_send), 'change')} would be sent")
    for message in would_send:
        to = ", ".join(message["webhooks"]) or "nobody"
        click.echo(printable(f"  {message['state']}: {message['rule']}: {message['summary']} → {to}"))
    for name, problem in sent.items():
        click.echo(f"{name}: {'confirmed' if problem is None else 'not confirmed: ' + problem}")
