"""The command record: records a run that has ended already."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from telemetryd.cli.basics import EXIT_FAILURE, DurationType, F, PairType
from telemetryd.cli.recording import end, quiet_client
from telemetryd.client import units
from telemetryd.client.context import parent_span
from telemetryd.timestamps import format_timestamp
from telemetryd.traces import Span

_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_TOO_LARGE: Final = 2**63
"""No integer of so much fits into the 64 bits of SQLite and of many parsers."""
_STATUSES: Final = ("success", "failure", "partial", "timeout", "cancelled")


def _count(name: str) -> Callable[[F], F]:
    return click.option(f"--items-{name}", type=click.IntRange(0), help=f"How many items were {name}.")


@click.command(
    help=r"""Record a run that has ended already.

    The run is in the client's spool when the command ends, also while the daemon is down. Exit status 1 if the spool
    cannot be written.

    \b
    Examples:
      telemetryd record --agent backup --job-type nightly --status success --duration 12m --metric bytes=73400320
      telemetryd record --agent sync --status failure --error-summary "no route to host"
      ExecStopPost=-/usr/bin/telemetryd record --from-systemd        # in the [Service] section of a unit
    """,
)
@click.option("--agent", help="The agent's name.  [default with --from-systemd: the unit's name]")
@click.option("--job-type", help="What kind of job it is.  [default: command; with --from-systemd: unit]")
@click.option("--status", type=click.Choice(_STATUSES), help="How it ended.  [default: success]")
@click.option("--duration", "duration_s", type=DurationType(), help="How long it took, until now: 90s, 12m.")
@_count("discovered")
@_count("succeeded")
@_count("failed")
@_count("skipped")
@click.option("--metric", "metrics", multiple=True, type=PairType(), metavar="K=V", help="A figure of metrics_json.")
@click.option("--label", "labels", multiple=True, type=PairType(), metavar="K=V", help="A label.")
@click.option("--error-summary", help="The error in one line.")
@click.option("--event-id", help="Unique id of the run's record: sent again, it is stored once.  [default: a new one]")
@click.option(
    "--from-systemd",
    is_flag=True,
    help="Take all from the variables that systemd gives to ExecStopPost=; the event_id is systemd:<invocation>.",
)
def record(
    *,
    agent: str | None,
    job_type: str | None,
    status: str | None,
    duration_s: float | None,
    metrics: tuple[tuple[str, str], ...],
    labels: tuple[tuple[str, str], ...],
    error_summary: str | None,
    event_id: str | None,
    from_systemd: bool,
    **items: int | None,
) -> None:
    """Record a finished run."""
    if agent is None and not from_systemd:
        raise click.UsageError("Missing option '--agent'.")
    now = datetime.now(UTC)
    begun = now - timedelta(seconds=duration_s or 0.0)
    found: dict[str, Any] = {"start_time": format_timestamp(begun), "end_time": format_timestamp(now)}
    try:
        found |= units.run_of(os.environ) if from_systemd else {"job_type": "command", "status": "success"}
    except ValueError as error:
        raise click.UsageError(f"--from-systemd {error}.") from None
    if duration_s is not None:
        found |= {"start_time": format_timestamp(begun), "duration_ms": round(duration_s * 1000)}
    if metrics:
        found["metrics_json"] = {**found.get("metrics_json", {}), **{key: _figure(text) for key, text in metrics}}
    span = Span.begin(parent) if (parent := parent_span()) is not None else None
    given = {
        "agent_name": agent,
        "job_type": job_type,
        "status": status,
        "error_summary": error_summary,
        "event_id": event_id,
        "labels": dict(labels) or None,
        **items,
        **({} if span is None else {"trace_id": span.trace_id, "span_id": span.span_id}),
    }
    client = quiet_client()
    recorded = client.record({**found, **{name: value for name, value in given.items() if value is not None}})
    end(client)
    if recorded is None and not client.stats()["sent"]:
        click.echo(f"telemetryd record: the spool in {client.config.folder} cannot be written", err=True)
        sys.exit(EXIT_FAILURE)


def _figure(text: str) -> Any:
    """Return a metric's value: a number if it is one that JSON can hold, else the text."""
    if not _NUMBER.fullmatch(text) or not math.isfinite(number := float(text)):
        return text
    return int(text) if text.lstrip("+-").isdigit() and abs(number) < _TOO_LARGE else number
