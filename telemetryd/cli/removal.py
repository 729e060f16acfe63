"""The commands that remove what should never have been stored: delete, redact."""

from __future__ import annotations

import asyncio
from typing import Any

import click
from click.shell_completion import CompletionItem

from telemetryd.cli.options import counted, failing, json_flag, print_json
from telemetryd.cli.reach import Where, target_flags
from telemetryd.cli.target import Body, find_target
from telemetryd.model.runs import REDACTABLE


class EventIdType(click.ParamType[str]):
    """The event_id of a run, which is anything but blank."""

    name = "event_id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the event_id."""
        if not str(value).strip():
            self.fail("no run has a blank event_id", param, ctx)
        return str(value)


@click.command(
    help=r"""Delete one run with its events.

    It goes from the totals, statistics, searches, changes and exports as well; copies made by `telemetryd follow` lose
    it with their next page. The database overwrites its space; remains may stay in unused gaps of the file until it is
    rebuilt (`sqlite3 FILE VACUUM` while the daemon is stopped). Backups, archives and exports that were made before
    keep it, and an agent that sends the same event_id again creates it again: `telemetryd redact` keeps the run,
    without what should not have been sent.

    \b
    Examples:
      telemetryd delete translate-2025-12-24-001
      telemetryd delete translate-2025-12-24-001 --unix /run/telemetryd/telemetryd.sock
    """
)
@click.argument("event_id", type=EventIdType())
@json_flag
@target_flags
def delete(*, event_id: str, as_json: bool, where: Where) -> None:
    with failing():
        answer = asyncio.run(_delete(where, event_id))
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{event_id} deleted with {counted(answer['events'], 'event')}")


async def _delete(where: Where, event_id: str) -> Body:
    async with find_target(where, changes=True) as target:
        return await target.delete(event_id)


class FieldType(click.ParamType[str]):
    """A field that a run may lack."""

    name = "field"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the field's name."""
        if value not in REDACTABLE:
            self.fail(f"{value!r} is not one of {', '.join(REDACTABLE)}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the fields."""
        return [CompletionItem(name) for name in REDACTABLE if name.startswith(incomplete)]


@click.command(
    help=r"""Remove what fields of a run hold, such as a leaked secret.

    The fields become null; with --events, so do the payloads of all events of the run. The run itself stays with the
    keys and types of its events, so that an agent that sends them again finds them known; if such a key is the secret,
    delete the run. An event that was sent without a key has one derived from its type, time and payload (`content-…`):
    a reader of it can confirm a guess, so a short secret in a payload also calls for `telemetryd delete`.

    Copies made by `telemetryd follow` lose the texts with their next page.
    The database overwrites their space; remains may stay in unused gaps of the file until it is rebuilt
    (`sqlite3 FILE VACUUM` while the daemon is stopped). Backups, archives and exports that were made before keep the
    texts.

    \b
    Examples:
      telemetryd redact translate-2025-12-24-001 error_details context_json
      telemetryd redact translate-2025-12-24-001 --events
    """
)
@click.argument("event_id", type=EventIdType())
@click.argument("fields", nargs=-1, type=FieldType())
@click.option("--events", is_flag=True, help="Remove the payloads of the run's events, too.")
@json_flag
@target_flags
def redact(*, event_id: str, fields: tuple[str, ...], events: bool, as_json: bool, where: Where) -> None:
    if not fields and not events:
        raise click.UsageError("Name at least one field, or give --events")
    with failing():
        answer = asyncio.run(_redact(where, {"event_id": event_id, "fields": [*fields], "events": events}))
    if as_json:
        print_json(answer)
    else:
        removed = [*answer["redacted"], *([f"payloads of {counted(answer['events'], 'event')}"] if events else [])]
        click.echo(f"{event_id} redacted: {', '.join(removed)}")


async def _redact(where: Where, body: Body) -> Body:
    async with find_target(where, changes=True) as target:
        return await target.redact(body)
