"""The command that names the commits that broke something: regressions."""

from __future__ import annotations

import click

from telemetryd.cli.options import failing, json_flag, print_json
from telemetryd.cli.reach import Where, selection_flags, target_flags
from telemetryd.cli.statistics import show_duration
from telemetryd.cli.target import Body, ask_source
from telemetryd.ops.logs import printable


@click.command(
    help=r"""Name the commits that made runs fail or take longer.

    Runs count by their git_commit_hash, for each agent and job type. After less than four days it is too early to tell
    a bad commit from an outage; what looks like one is shown apart. A change from outside that comes with a deployment
    and stays looks like a bad commit. The daemon is asked; the database is read where none runs, and next to one that
    cannot be reached.

    \b
    Examples:
      telemetryd regressions
      telemetryd regressions --agent 'seo-*' --from -7d
      telemetryd regressions --json --unix /run/telemetryd/telemetryd.sock
    """
)
@selection_flags(since="-30d")
@json_flag
@target_flags
def regressions(
    *, begin: str, end: str, agent_name: str | None, job_type: str | None, as_json: bool, where: Where
) -> None:
    given = {"from": begin, "to": end, "agent_name": agent_name, "job_type": job_type}
    parameters = {name: value for name, value in given.items() if value is not None}
    with failing():
        answer = ask_source(where, lambda source: source.regressions(parameters))
    if as_json:
        print_json(answer)
    else:
        click.echo(text_of(answer))


def text_of(answer: Body) -> str:
    """Return the answer as lines for people, a paragraph for each finding."""
    pairs, span = answer["pairs"], f"from {answer['from']} to {answer['to']}"
    looked = f"{pairs:,} pair{'' if pairs == 1 else 's'} of agent and job type with several commits, {span}"
    found = [*map(_paragraph, answer["regressions"])]
    told = [*found, f"Looked at: {looked}"] if found else [f"No commit made anything worse in {looked}"]
    early = [f"Too early to tell:\n{_paragraph(finding)}" for finding in answer.get("too_early", [])]
    return "\n\n".join([*told, *early])


def _paragraph(finding: Body) -> str:
    before, after, effect = finding["before"], finding["after"], finding["effect"]
    if finding["measure"] == "success_rate":
        change = f"success rate {before['success_rate']:.1%} -> {after['success_rate']:.1%}"
        bounds = [f"{-100 * bound:.0f}" for bound in (effect["high"], effect["low"]) if bound is not None]
        size = f"by {' to '.join(bounds)} points" if bounds else "by an unknown number of points"
    else:
        times = (show_duration(side["median_duration_ms"]) for side in (before, after))
        change = f"median duration {' -> '.join(times)}"
        bounds = [f"{bound:.2f}" for bound in (effect["low"], effect["high"]) if bound is not None]
        size = f"x {' to '.join(bounds)}" if bounds else "by an unknown factor"
    return "\n".join(
        printable(line)
        for line in (
            f"{finding['agent_name']} / {finding['job_type']}: {change}, {size} (p = {finding['p_value']:.1g})",
            f"  first bad commit  {finding['first_bad_commit']}  {finding['commit_url'] or ''}".rstrip(),
            f"  last good commit  {finding['last_good_commit']}",
            f"  days              {before['days']:,} before, {after['days']:,} since",
            f"  runs              {before['runs']:,} before, {after['runs']:,} since; see {', '.join(finding['runs'])}",
            f"  other agents      {_others(finding)}",
        )
    )


def _others(finding: Body) -> str:
    others = finding["others"]
    if not others["agents"]:
        return "none had runs on both sides"
    if finding["measure"] == "success_rate":
        rates = " -> ".join(f"{others[side]['success_rate']:.1%}" for side in ("before", "after"))
        meanwhile = f"success rate {rates} meanwhile"
    else:
        meanwhile = f"durations x {others['factor']:.2f} meanwhile"
    return f"{meanwhile}; so it is hardly this commit alone" if others["as_well"] else meanwhile
