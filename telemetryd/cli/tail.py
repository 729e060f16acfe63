"""The command that shows the latest runs and follows new ones: tail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import unicodedata
from contextlib import aclosing
from typing import Any, Final

import click
import orjson

from telemetryd.cli.options import failing
from telemetryd.cli.reach import Renamed, Where, client_config, daemon_flags
from telemetryd.cli.stream import Daemon, reach
from telemetryd.client.config import Config
from telemetryd.model.filters import quoted
from telemetryd.model.queries import MAX_LIMIT

_COLOURS: Final = {
    "running": "cyan",
    "success": "green",
    "failure": "red",
    "partial": "yellow",
    "timeout": "magenta",
    "cancelled": "bright_black",
}
_NARROW: Final = 60
_PLAIN_WIDTH: Final = 160
"""Columns where nobody says how many there are."""

Run = dict[str, Any]


@click.command(
    help=r"""Show the last runs, and with -f those that come.

    That is each run that is created or changed, as soon as it is stored. A filter that is given several times matches
    any of its values. When the daemon is restarted, -f goes on where it was: nothing is left out, nothing is shown
    twice.

    \b
    Examples:
      telemetryd tail -n 20
      telemetryd tail -f --agent 'hugo-*' --status failure --status timeout
      telemetryd tail -f --json --filter min_duration_ms=60000 | jq .error_summary
    """
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until SIGINT.")
@click.option(
    "-n", "--lines", type=click.IntRange(0, MAX_LIMIT), default=10, metavar="N", help="Show the last N.  [default: 10]"
)
@click.option(
    "--agent",
    "agents",
    cls=Renamed,
    old=("--agent-name",),
    multiple=True,
    metavar="NAME",
    help="Only this agent; * stands for any text.",
)
@click.option("--job-type", "job_types", multiple=True, metavar="NAME", help="Only this job type.")
@click.option("--status", "statuses", multiple=True, metavar="STATUS", help="Only this status.")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any filter of GET /api/v1/runs, also metrics.tokens>1000 and label.team=search.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each run as one line of JSON.")
@daemon_flags
def tail(
    *,
    follow: bool,
    lines: int,
    agents: tuple[str, ...],
    job_types: tuple[str, ...],
    statuses: tuple[str, ...],
    filters: tuple[str, ...],
    as_json: bool,
    where: Where,
) -> None:
    parameters = {
        name: ",".join(values)
        for name, values in (
            ("agent_name", [quoted(name).replace("\\*", "*") for name in agents]),
            ("job_type", [quoted(name) for name in job_types]),
            ("status", list(statuses)),
        )
        if values
    }
    for given in filters:
        name, equals, value = given.partition("=")
        is_comparison = given.startswith("metrics.")
        if not (equals or is_comparison) or name in parameters:
            raise click.UsageError(f"--filter {given!r} must be NAME=VALUE, each name once")
        parameters[name] = value
    config = client_config(where)
    shown = _Shown(as_json=as_json)
    with failing(), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_tail(config, parameters, lines, shown, follow=follow))


async def _tail(config: Config, parameters: dict[str, str], lines: int, shown: _Shown, *, follow: bool) -> None:
    async with reach(config) as daemon:
        if not follow:
            await _show_last(daemon, parameters, lines, shown)
            return
        async with aclosing(daemon.stream(parameters, shown.say)) as messages:
            is_first = True
            async for message in messages:
                if is_first:  # the stream has begun, so that nothing comes between the list and it
                    await _show_last(daemon, parameters, lines, shown)
                    is_first = False
                if message.event == "run":
                    shown.show(message.data)
                elif message.event == "missed":
                    shown.say(f"{orjson.loads(message.data)['missed']} changes were missed")


async def _show_last(daemon: Daemon, parameters: dict[str, str], lines: int, shown: _Shown) -> None:
    if lines:
        for run in reversed(await daemon.list("/api/v1/runs", {**parameters, "limit": str(lines)}, "event_id")):
            shown.show(orjson.dumps(run), from_list=True)


class _Shown:
    """Prints runs, each state of each once."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._listed: dict[str, str] = {}
        self._is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def show(self, text: bytes, *, from_list: bool = False) -> None:
        """Print a run, unless the list has shown it in this very state."""
        run: Run = orjson.loads(text)
        if from_list:
            self._listed[run["event_id"]] = run["updated_at"]
        elif self._listed.pop(run["event_id"], None) == run["updated_at"]:
            return
        if self._as_json:
            click.echo(text)
        else:
            width = shutil.get_terminal_size((_PLAIN_WIDTH, 0)).columns if sys.stdout.isatty() else _PLAIN_WIDTH
            click.echo(line(run, width, coloured=self._is_coloured), color=self._is_coloured)
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Say what happens to the stream, where it does not disturb the data."""
        click.echo(f"telemetryd: {text}", err=True)


def line(run: Run, width: int, *, coloured: bool) -> str:
    """Return a run as one line that fits into so many columns."""
    moment = run["updated_at"][11:19] if width >= _NARROW else run["updated_at"][11:16]
    share = max(width - len(moment) - 9 - 8 - 5, 12)  # what is left for the agent, its job and what it says
    agent, job = share * 3 // 10, share * 3 // 10
    status = fitted(run["status"], 9)
    parts = [
        moment,
        click.style(status, fg=_COLOURS.get(run["status"])) if coloured else status,
        fitted(run["agent_name"], agent),
        fitted(run["job_type"], job),
        f"{_duration(run):>8}",
        cut(_words(run), share - agent - job),
    ]
    return " ".join(parts).rstrip()


def _duration(run: Run) -> str:
    milliseconds = run["duration_ms"]
    if not milliseconds:
        return "-"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    seconds = milliseconds / 1000
    if seconds < 100:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.0f}h"


def _words(run: Run) -> str:
    done, failed = run["items_succeeded"], run["items_failed"]
    items = f"{done} done, {failed} failed" if failed else f"{done} done" if done else ""
    said = run["error_summary"] or run["output_summary"] or run["item_name"] or run["event_id"]
    return ": ".join(filter(None, (items, said)))


def fitted(text: str, columns: int) -> str:
    """Return a text in exactly so many columns."""
    text = cut(text, columns)
    return text + " " * (columns - _columns(text))


def cut(text: str, columns: int) -> str:
    """Return the beginning of a text that fits; nothing in it may control the terminal."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    if _columns(text) <= columns:
        return text
    while text and _columns(text) > columns - 1:
        text = text[: max(columns - 1, 0)] if len(text) > columns else text[:-1]
    return f"{text}…" if columns > 0 else ""


def _columns(text: str) -> int:
    """Return how wide a text stands in a terminal."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )
