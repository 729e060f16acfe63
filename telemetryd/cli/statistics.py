"""The command that shows statistics of runs: stats."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from math import ceil, floor
from typing import Final

import click

from telemetryd.cli.options import failing, json_flag, print_json
from telemetryd.cli.reach import Where, selection_flags, target_flags
from telemetryd.cli.target import Body, ask_source
from telemetryd.ops.logs import printable

_UNITS: Final = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1000, "s"))
_HEADINGS: Final = ("runs", "success", "95% CI", "done", "failed", "skipped", "p50", "p95", "p99", "total")
_NARROWEST: Final = 6
"""Characters that a name is left at least, however narrow the terminal is."""


@click.command(
    help=r"""Show how many runs there were, and how they went.

    Times are those of created_at, in whole hours (UTC). Quantiles of durations are within 1 % of the exact ones. 95% CI
    is the confidence interval of the success rate, wide where few runs are finished; "-" means that none is. The daemon
    is asked; the database is read where none runs, and alongside one that cannot be reached.

    \b
    Examples:
      telemetryd stats
      telemetryd stats --group-by agent_name,status --from -7d
      telemetryd stats --group-by '' --bucket 1d --from -30d
      telemetryd stats --agent 'hugo-*' --bucket 1h --json --unix /run/telemetryd/telemetryd.sock
    """
)
@click.option(
    "--group-by",
    default="agent_name",
    show_default=True,
    metavar="NAMES",
    help="Some of agent_name, job_type, status, separated by commas; an empty text adds all up.",
)
@click.option("--bucket", metavar="SPAN", help="Group by time as well: 1h, 6h, 1d, 1w.")
@selection_flags(since="-24h")
@click.option("--status", metavar="STATUSES", help="Only these statuses: failure,timeout.")
@json_flag
@target_flags
def stats(
    *,
    group_by: str,
    bucket: str | None,
    begin: str,
    end: str,
    agent_name: str | None,
    job_type: str | None,
    status: str | None,
    as_json: bool,
    where: Where,
) -> None:
    given = {
        "group_by": group_by or None,
        "bucket": bucket,
        "from": begin,
        "to": end,
        "agent_name": agent_name,
        "job_type": job_type,
        "status": status,
    }
    parameters = {name: value for name, value in given.items() if value is not None}
    with failing():
        answer = ask_source(where, lambda source: source.stats(parameters))
    if as_json:
        print_json(answer)
    else:
        click.echo(table(answer, shutil.get_terminal_size((100, 24)).columns))


def table(answer: Body, width: int) -> str:
    """Return the answer as lines for people; names are cut so that the lines fit, as far as that is possible."""
    span = f"{answer['from']} to {answer['to']}"
    groups: list[Body] = answer["groups"]
    if not groups:
        return f"No runs were created from {span}"
    names = [*(["bucket"] if answer["bucket"] else []), *answer["group_by"]]
    is_whole_days = all("T00:" in group.get("bucket", "T00:") for group in groups)
    named = [[_name(group, name, is_whole_days=is_whole_days) for name in names] for group in groups]
    figures = [_figures(group) for group in groups]
    name_widths, figure_widths = _widths([names, *named]), _widths([_HEADINGS, *figures])
    room = width - sum(figure_widths) - 2 * (len(figure_widths) + len(names) - 1)
    cut = range(1 if answer["bucket"] else 0, len(names))
    while sum(name_widths) > room and max((name_widths[place] for place in cut), default=0) > _NARROWEST:
        name_widths[max(cut, key=name_widths.__getitem__)] -= 1
    lines = [
        "  ".join(
            [
                *(_cut(text, size).ljust(size) for text, size in zip(left, name_widths, strict=True)),
                *(text.rjust(size) for text, size in zip(right, figure_widths, strict=True)),
            ]
        )
        for left, right in zip([names, *named], [_HEADINGS, *figures], strict=True)
    ]
    return "\n".join([f"Runs created from {span}", *lines])


def _name(group: Body, name: str, *, is_whole_days: bool) -> str:
    if name != "bucket":
        return printable(group[name])
    date, _, time = str(group[name]).partition("T")
    return date if is_whole_days else f"{date} {time[:5]}"


def _figures(group: Body) -> Sequence[str]:
    rate, interval, times = group["success_rate"], group["success_rate_interval"], group["duration_ms"]
    return (
        f"{group['runs']:,}",
        "-" if rate is None else f"{rate:.1%}",
        "-" if interval is None else _show_interval(interval["low"], interval["high"]),
        *(f"{group[f'items_{word}']:,.0f}" for word in ("succeeded", "failed", "skipped")),
        *(show_duration(times[name]) for name in ("p50", "p95", "p99", "sum")),
    )


def _show_interval(low: float, high: float) -> str:
    """Return an interval in whole per cent, rounded outwards."""
    return f"{floor(low * 100)}-{ceil(high * 100)}%"


def show_duration(ms: float | None) -> str:
    """Return milliseconds in the unit that suits them."""
    if ms is None:
        return "-"
    for size, unit in _UNITS:
        if ms >= size:
            return f"{ms / size:.1f} {unit}"
    return f"{ms:.0f} ms"


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"
