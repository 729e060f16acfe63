"""Finds the commit since which runs fail more often or take longer: query, what is found, answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from statistics import median
from typing import Annotated, Any, Final, NamedTuple, NotRequired, cast

from pydantic import Field
from typing_extensions import TypeAliasType, TypedDict

from telemetryd.errors import InvalidRequestError
from telemetryd.git_urls import commit_url
from telemetryd.model import sketches
from telemetryd.model.answers import Moment, Number, Share
from telemetryd.model.change_points import ALPHA, MEASURES, MIN_DAYS, Change, Measure, Spell, blocks_of, find, in_order
from telemetryd.model.change_sizes import Effect, effect_of
from telemetryd.model.commit_cells import SLOT_HOURS, Cell, slot_of
from telemetryd.model.filters import FILTER_PARAMETERS, Filters, read_filters
from telemetryd.model.neighbours import Neighbours, Others
from telemetryd.model.parameters import Given, Parameter, moment
from telemetryd.model.queries import Query
from telemetryd.model.values import Status, format_timestamp, shorten

SHOWN: Final = 5
"""How many runs a finding names."""
MAX_RUNS: Final = 2000
"""How many runs on either side of a commit are read for a finding: those nearest to it."""

RegressionMeasure = TypeAliasType(
    "RegressionMeasure",
    Annotated[Measure, Field(description="What became worse: the rate of successes, or the duration.")],
)
"""A measure in answers."""
MEASURED: Final[dict[Measure, str]] = {"success_rate": "success_rate", "duration": "median_duration_ms"}
"""What a side's value is called in answers, by measure."""


class Run(NamedTuple):
    """What counts of a finished run with a commit."""

    event_id: str
    created_at: str
    commit: str
    repo: str | None
    succeeded: bool
    duration_ms: int
    """Milliseconds; 0 is taken as not known."""


def runs_of(rows: Iterable[Sequence[Any]]) -> list[Run]:
    """Return the runs with a commit of rows of event_id, created_at, commit, repository, status, duration and id."""
    return [
        Run(event_id, created_at, commit, repo, status == Status.SUCCESS, duration_ms)
        for event_id, created_at, commit, repo, status, duration_ms, _ in rows
        if commit
    ]


class Stretch(NamedTuple):
    """Some runs of a pair, which are read for a finding: finished ones with a commit, at most `MAX_RUNS` of them."""

    agent_name: str
    job_type: str
    start: str
    """The first moment of created_at, in the stored form."""
    end: str
    """The moment after the last one."""
    is_newest_first: bool
    """In which order of created_at: the first ones are read."""


FetchRuns = Callable[[Stretch], Sequence[Run]]
"""What an engine gives to read the runs that show a finding."""


@dataclass(frozen=True, slots=True)
class FindRegressions(Query["Findings"]):
    """Which runs are looked at. Answer: `Findings`."""

    filters: Filters
    """Only agents and job types in it count."""
    start: str
    """The first moment of created_at, in the stored form; the whole slot in which it lies counts."""
    end: str
    """The moment after the last one; the whole slot in which that lies counts."""

    def parameters(self) -> dict[str, str | int]:
        """Return the query as parameters, for the log."""
        return {**self.filters.parameters(), "from": self.start, "to": self.end}


@dataclass(frozen=True, slots=True)
class Side:
    """The runs before a change, or those since."""

    commits: int
    days: int
    """Days with runs."""
    runs: int
    """Finished runs for the success rate, successful ones with a duration for the duration."""
    value: float
    """Successes among them (0 to 1), or the median of their durations in ms."""


@dataclass(frozen=True, slots=True)
class Regression:
    """A commit since which one pair's runs are worse."""

    agent_name: str
    job_type: str
    measure: Measure
    first_bad_commit: str
    last_good_commit: str
    before: Side
    after: Side
    effect: Effect
    others: Others
    left_out_hours: int
    """Hours that are left out because other agents failed as well."""
    p_value: float
    """How likely such a difference would be at any commit and in either measure if no commit changed anything."""
    commit_url: str | None
    runs: tuple[str, ...]
    """The event_ids of the first runs that show it."""

    def to_json(self) -> RegressionAnswer:
        """Return the finding as it is answered."""
        name = MEASURED[self.measure]
        return {
            "agent_name": self.agent_name,
            "job_type": self.job_type,
            "measure": self.measure,
            "first_bad_commit": self.first_bad_commit,
            "last_good_commit": self.last_good_commit,
            "before": _shown(self.before, name),
            "after": _shown(self.after, name),
            "effect": _effect(self.effect),
            "others": _others(self.measure, self.others),
            "left_out_hours": self.left_out_hours,
            "p_value": self.p_value,
            "commit_url": self.commit_url,
            "runs": [*self.runs],
        }


def _shown(side: Side, name: str) -> SideAnswer:
    shown = {"commits": side.commits, "days": side.days, "runs": side.runs, name: round(side.value, 6)}
    return cast(SideAnswer, shown)


def _effect(effect: Effect) -> EffectAnswer:
    return {"value": round(effect.value, 6), "low": _rounded(effect.low), "high": _rounded(effect.high)}


def _others(measure: Measure, others: Others) -> OthersAnswer:
    was, became = _rounded(others.was), _rounded(others.became)
    before: OthersSideAnswer = {"runs": others.before}
    after: OthersSideAnswer = {"runs": others.after}
    shown: OthersAnswer = {"agents": others.agents, "before": before, "after": after, "as_well": others.as_well}
    if measure == "success_rate":
        before["success_rate"], after["success_rate"] = was, became
    else:
        shown["factor"] = became
    return shown


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found, the most certain first, and in how many pairs it was looked for."""

    regressions: tuple[Regression, ...]
    too_early: tuple[Regression, ...]
    """What looks like one, with too few days on one of its sides to tell."""
    pairs: int
    """Pairs of agent and job type with runs of at least two commits."""


_ANY_MOMENT: Final = "An ISO 8601 date and time, a time before now such as -30d, or now."
_IN_SLOTS: Final = f"The {SLOT_HOURS} hours of UTC in which it lies count as a whole."
FROM: Final = moment("from", f"{_ANY_MOMENT} The first moment of created_at. {_IN_SLOTS}", "-30d")
TO: Final = moment("to", f"{_ANY_MOMENT} Not included. {_IN_SLOTS}", "now")
PARAMETERS: Final[tuple[Parameter[Any], ...]] = (
    FILTER_PARAMETERS["agent_name"],
    FILTER_PARAMETERS["job_type"],
    FROM,
    TO,
)
"""The parameters of `GET /api/v1/regressions`."""


def parse(query_string: str, now: datetime) -> FindRegressions:
    """Read the query string of `GET /api/v1/regressions`.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, its value and what is allowed.

    """
    given = Given(query_string, PARAMETERS, now)
    filters = read_filters(given)
    start, end = given.get(FROM), given.get(TO)
    if start is not None and end is not None and start >= end and not given.faults:
        begin, until = (shorten(str(given.texts.get(each.name, each.default))) for each in (FROM, TO))
        raise InvalidRequestError(f"Invalid from: {begin!r}; it must be before to ({until!r})")
    given.finish()
    return FindRegressions(filters, str(start), str(end))


class SideAnswer(TypedDict):
    """The runs on one side of a commit."""

    commits: Number
    days: Annotated[Number, Field(description="Days of UTC with such runs.")]
    runs: Number
    success_rate: NotRequired[Share]
    median_duration_ms: NotRequired[float]


class EffectAnswer(TypedDict):
    """How large a change is, and between which bounds it lies with 95 % certainty."""

    value: Annotated[
        float,
        Field(
            description="The success rate since minus that before (-0.35: 35 points less), or the factor of the "
            "durations."
        ),
    ]
    low: float | None
    high: float | None


class OthersSideAnswer(TypedDict):
    """The runs of other agents on one side of a commit."""

    runs: Number
    success_rate: NotRequired[Share | None]


class OthersAnswer(TypedDict):
    """How other agents did at the same time."""

    agents: Annotated[Number, Field(description="Other agents with runs on both sides.")]
    before: OthersSideAnswer
    after: OthersSideAnswer
    factor: NotRequired[
        Annotated[float | None, Field(description="Of their durations, each pair compared with itself.")]
    ]
    as_well: Annotated[
        bool, Field(description="Whether they became worse by half as much or more: then it is hardly one commit.")
    ]


class RegressionAnswer(TypedDict):
    """A commit since which runs are worse."""

    agent_name: str
    job_type: str
    measure: RegressionMeasure
    first_bad_commit: str
    last_good_commit: Annotated[str, Field(description="The commit before it.")]
    before: SideAnswer
    after: SideAnswer
    effect: EffectAnswer
    others: OthersAnswer
    left_out_hours: Annotated[
        Number, Field(description="Hours on both sides that do not count, because other agents failed as well.")
    ]
    p_value: Annotated[
        Share,
        Field(
            description="How likely such a difference would be, at any commit and in either measure, if no commit "
            "changed anything; at most alpha."
        ),
    ]
    commit_url: str | None
    runs: Annotated[list[str], Field(max_length=SHOWN, description="event_id of the first runs that show it.")]


RegressionReport = TypedDict(
    "RegressionReport",
    {
        "from": Moment,
        "to": Moment,
        "alpha": Annotated[
            Share, Field(description="How often a pair in which no commit changes anything gives a finding.")
        ],
        "min_days": Annotated[Number, Field(description="Days with runs that a finding has on each side at least.")],
        "pairs": Annotated[Number, Field(description="Pairs of agent and job type with runs of at least two commits.")],
        "regressions": list[RegressionAnswer],
        "too_early": Annotated[
            list[RegressionAnswer],
            Field(
                description="What looks like one, but has too few days on one of its sides: it is too early to tell "
                "a bad commit from an outage."
            ),
        ],
    },
)


def to_json(query: FindRegressions, findings: Findings) -> RegressionReport:
    """Return the whole answer."""
    return {
        "from": query.start,
        "to": query.end,
        "alpha": ALPHA,
        "min_days": MIN_DAYS,
        "pairs": findings.pairs,
        "regressions": [regression.to_json() for regression in findings.regressions],
        "too_early": [regression.to_json() for regression in findings.too_early],
    }


def gather(query: FindRegressions, cells: Iterable[Cell], fetch: FetchRuns) -> Findings:
    """Look for regressions in each pair that is meant.

    Args:
        query: which pairs are meant.
        cells: of every pair, as `Cell` says, in any order.
        fetch: reads runs, for what is found.

    """
    pairs, neighbours = by_pair(cells)
    is_meant = query.filters.lets_through("agent_name", "job_type")
    found: list[Regression] = []
    early: list[Regression] = []
    examined = 0
    for pair, own in sorted(pairs.items()):
        if not is_meant(*pair):
            continue
        commits = in_order(own)
        if len(commits) < 2:
            continue
        examined += 1
        for measure in MEASURES:
            for change in changes_of(pair, measure, commits, neighbours):
                (early if change.is_early else found).append(
                    complete(pair, measure, change, neighbours=neighbours, fetch=fetch)
                )
    for several in (found, early):
        several.sort(key=attrgetter("p_value", "agent_name", "job_type", "measure", "first_bad_commit"))
    return Findings(tuple(found), tuple(early), examined)


def by_pair(cells: Iterable[Cell]) -> tuple[dict[tuple[str, str], list[Cell]], Neighbours]:
    """Return the cells of each pair, and how everyone did in each slot."""
    pairs: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        pairs[cell[:2]].append(cell)
    return pairs, Neighbours(pairs)


def changes_of(
    pair: tuple[str, str], measure: Measure, commits: Sequence[Sequence[Cell]], neighbours: Neighbours
) -> list[Change]:
    """Return the changes for the worse of a pair, whose commits are as `in_order` returns them."""
    return find(measure, blocks_of(measure, commits, neighbours.outages_of(pair[0])))


def complete(
    pair: tuple[str, str], measure: Measure, change: Change, *, neighbours: Neighbours, fetch: FetchRuns
) -> Regression:
    """Return a change with what is read from the runs themselves: medians, and which of them show it."""
    before, since = change.before, change.since
    left_out = neighbours.outages_of(pair[0]) if measure == "success_rate" else frozenset[int]()
    bad, good = since.blocks[0].commit, before.blocks[-1].commit
    border = since.blocks[0].slots[0][0]
    older, newer = {block.commit for block in before.blocks}, {block.commit for block in since.blocks}
    later = [
        run
        for run in fetch(Stretch(*pair, begin_of(border), begin_of(since.slots[-1][0] + 1), is_newest_first=False))
        if run.commit in newer and slot_of(run.created_at) not in left_out
    ]
    repo = next((run.repo for run in later if run.commit == bad and run.repo is not None), None)
    if measure == "success_rate":
        values = 1 - before.mean, 1 - since.mean
        showing = [run.event_id for run in later if not run.succeeded]
    else:
        stretch = Stretch(*pair, begin_of(before.slots[0][0]), begin_of(border + 1), is_newest_first=True)
        earlier = [run for run in fetch(stretch) if run.commit in older]
        values = _median(earlier, before), _median(later, since)
        showing = [run.event_id for run in later if run.succeeded and run.duration_ms > values[0]]
    return Regression(
        agent_name=pair[0],
        job_type=pair[1],
        measure=measure,
        first_bad_commit=bad,
        last_good_commit=good,
        before=_side(before, values[0]),
        after=_side(since, values[1]),
        effect=effect_of(measure, before, since),
        others=neighbours.meanwhile(pair[0], measure, before, since),
        left_out_hours=SLOT_HOURS * sum(before.slots[0][0] <= slot <= since.slots[-1][0] for slot in left_out),
        p_value=change.p_value,
        commit_url=commit_url(repo, bad),
        runs=tuple(showing[:SHOWN]),
    )


def _side(spell: Spell, value: float) -> Side:
    return Side(len(spell.blocks), len(spell.days), spell.runs, value)


def _median(runs: Iterable[Run], spell: Spell) -> float:
    """Return the median duration; if other commits' runs took all the room there is to read, nearly that."""
    durations = [run.duration_ms for run in runs if run.succeeded and run.duration_ms > 0]
    return median(durations) if durations else sketches.value_of(round(spell.mean))


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def begin_of(slot: int) -> str:
    """Return the moment at which a slot begins, in the stored form."""
    return format_timestamp(_EPOCH + timedelta(hours=SLOT_HOURS * slot))
