"""Alerts of bad commits: each is told once, and ends when it is fixed or has become the normal state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import accumulate
from math import sqrt
from typing import Any, Final

from telemetryd.model.alerts import Finding, Firing, Subject, ago, filters_of, span_text
from telemetryd.model.change_points import Block, Change, Measure, Spell, blocks_of, find, in_order
from telemetryd.model.commit_cells import Cell
from telemetryd.model.regressions import MEASURED, FetchRuns, FindRegressions, by_pair, complete
from telemetryd.model.regressions import Regression as CommitRegression
from telemetryd.model.rules import Regression
from telemetryd.model.sketches import bin_of
from telemetryd.model.values import format_timestamp

ALERT_ALPHA: Final = 0.002
"""How unlikely a finding must be to raise an alert: the rarest that can be told, for alerts look again and again."""
FIX_DAYS: Final = 3
"""Days in a row that must be good again for a commit to count as fixed."""
FIX_RUNS: Final = 10
"""Runs that there must be in them."""
FIX_PART: Final = 2 / 3
"""The part of the difference that must be made good in them."""
FIX_DEVIATIONS: Final = 3.0
"""By how many standard deviations of a binomial count they must be better, where runs fail."""
_LETTERS: Final = 12


def runs_of(rule: Regression, now: datetime) -> FindRegressions:
    """Return in which runs to look for bad commits."""
    return FindRegressions(filters_of(rule), ago(now, rule.window_s), format_timestamp(now))


def regressions(
    rule: Regression, now: datetime, cells: Iterable[Cell], fired: Sequence[Firing], fetch: FetchRuns
) -> Iterator[Finding]:
    """Find the commits that made a job type of an agent worse; one that fires goes on until it is fixed or too old.

    While one fires, others are looked for among the runs since it only: chance may make its neighbour likelier. What
    was fixed once never fires again, whatever comes later, so that nothing is told twice.

    Args:
        rule: the rule.
        now: the moment.
        cells: of every pair, as `Cell` says.
        fired: what the rule is firing for.
        fetch: reads runs, for what is found.

    """
    pairs, neighbours = by_pair(cells)
    is_meant = runs_of(rule, now).filters.lets_through("agent_name", "job_type")
    oldest = ago(now, rule.window_s)
    for pair, own in sorted(pairs.items()):
        if not is_meant(*pair):
            continue
        commits = in_order(own)
        for measure in rule.measure:
            standing = [
                each
                for each in fired
                if (each.subject.agent_name, each.subject.job_type, each.subject.measure) == (*pair, measure)
                and each.since >= oldest
            ]
            completed = partial(complete, pair, measure, neighbours=neighbours, fetch=fetch)
            blocks = blocks_of(measure, commits, neighbours.outages_of(pair[0]))
            yield from _of_pair((*pair, measure), blocks, _begins(commits, blocks), standing, completed)


def _begins(commits: Sequence[Sequence[Cell]], blocks: Sequence[Block]) -> dict[str, int]:
    """Return for each commit, also for one without runs that count, the first block that is not older."""
    counting = {block.commit for block in blocks}
    names = [cells[0].commit for cells in commits]
    older = accumulate((name in counting for name in names), initial=0)
    return dict(zip(names, older, strict=False))


def _of_pair(
    place: tuple[str, str, Measure],
    blocks: Sequence[Block],
    begins: Mapping[str, int],
    fired: Iterable[Firing],
    completed: Callable[[Change], CommitRegression],
) -> Iterator[Finding]:
    measure = place[2]
    newest, told = 0, set()
    for each in fired:
        begin = begins.get(each.subject.first_bad_commit, 0)
        if blocks and not is_fixed(measure, blocks[begin:], *_levels(measure, each.details)):
            newest = max(newest, begin)
            told.add(each.subject)
            yield Finding(each.subject, each.summary, each.details)
    for change in find(measure, blocks[newest:]):
        subject = Subject(*place, change.since.blocks[0].commit)
        if subject in told or change.is_early or change.p_value > ALERT_ALPHA:
            continue
        since = blocks[begins[subject.first_bad_commit] :]
        if not is_fixed(measure, since, change.before.mean, change.since.mean):
            found = completed(change)
            details: dict[str, Any] = {**found.to_json()}
            del details["agent_name"], details["job_type"]
            yield Finding(subject, _text(subject, found.before.value, found.after.value), details)


def _levels(measure: Measure, details: Mapping[str, Any]) -> tuple[float, float]:
    """Return how bad runs were before a commit that has been told, and since."""
    before, after = (details[side][MEASURED[measure]] for side in ("before", "after"))
    return (1 - before, 1 - after) if measure == "success_rate" else (bin_of(round(before)), bin_of(round(after)))


def is_fixed(measure: Measure, since: Sequence[Block], before: float, after: float) -> bool:
    """Return whether a commit has been good again for some days in a row at any time.

    Args:
        measure: in which the commit was found to be bad.
        since: the runs since the commit.
        before: the mean badness before it.
        after: the mean badness since it, as it was found.

    """
    days = Spell(since).days
    good = after - (after - before) * FIX_PART
    for place in range(len(days) - FIX_DAYS + 1):
        some = days[place : place + FIX_DAYS]
        runs, badness = (sum(each) for each in list(zip(*some, strict=True))[1:])
        if runs < FIX_RUNS or badness > runs * good:
            continue
        deviation = sqrt(after * (1 - after) / runs) if measure == "success_rate" else 0.0
        if after - badness / runs >= FIX_DEVIATIONS * deviation:
            return True
    return False


def _text(subject: Subject, before: float, after: float) -> str:
    who = f"{subject.agent_name} ({subject.job_type})"
    since = f"since commit {subject.first_bad_commit[:_LETTERS]}"
    if subject.measure == "success_rate":
        return f"{after:.1%} of the runs of {who} succeed {since}, {before:.1%} before"
    spans = span_text(after / 1000), span_text(before / 1000)
    return f"half of the runs of {who} take {spans[0]} or longer {since}, {spans[1]} before"
