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

    Runs count by their git_commit_hash, for each agent and job type. A pair in which no commit changes anything gives a
    finding in at most 1 of 100 looks. The daemon is asked; the database is read where none runs, and next to one that
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
    if not answer["regressions"]:
        return f"No commit made anything worse in {looked}"
    return "\n\n".join([*map(_paragraph, answer["regressions"]), f"Looked at: {looked}"])


def _paragraph(finding: Body) -> str:
    before, after = finding["before"], finding["after"]
    if finding["measure"] == "success_rate":
        change = f"success rate {before['success_rate']:.1%} -> {after['success_rate']:.1%}"
    else:
        times = (show_duration(side["median_duration_ms"]) for side in (before, after))
        change = f"median duration {' -> '.join(times)}"
    return "\n".join(
        printable(line)
        for line in (
            f"{finding['agent_name']} / {finding['job_type']}: {change} (p = {finding['p_value']:.1g})",
            f"  first bad commit  {finding['first_bad_commit']}  {finding['commit_url'] or ''}".rstrip(),
            f"  last good commit  {finding['last_good_commit']}",
            f"  runs              {before['runs']:,} before, {after['runs']:,} since; see {', '.join(finding['runs'])}",
        )
    )
