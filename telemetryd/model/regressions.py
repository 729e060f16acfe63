"""Finds the commit since which runs fail more often or take longer: query, statistics, answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import accumulate, groupby, pairwise
from math import erfc, exp, lgamma, sqrt
from operator import attrgetter
from statistics import median
from typing import Annotated, Any, Final, Literal, NamedTuple, NotRequired, cast

from pydantic import Field
from typing_extensions import TypeAliasType, TypedDict

from telemetryd.errors import InvalidRequestError
from telemetryd.git_urls import commit_url
from telemetryd.model.answers import Moment, Number, Share
from telemetryd.model.filters import FILTER_PARAMETERS, Filters, read_filters
from telemetryd.model.parameters import Given, Parameter, moment
from telemetryd.model.queries import Query
from telemetryd.model.values import shorten

ALPHA: Final = 0.01
"""How likely it is at most that a pair of agent and job type in which no commit changes anything gives a finding."""
MAX_RUNS: Final = 2000
"""How many runs of a pair are looked at, the newest ones."""
MIN_RUNS: Final = 5
"""Runs that there must be on each side of a commit."""
MIN_FALL: Final = 0.05
"""The smallest fall of the success rate, however certain it is, that is worth a finding."""
MIN_GROWTH: Final = 1.2
"""The smallest factor of the median duration, however certain it is, that is worth a finding."""
PARTS: Final = 3
"""The number of parts of the runs since a commit, each of which must be worse."""
ALERT_ALPHA: Final = 0.001
"""How unlikely a finding must be to raise an alert: alerts look again and again, and each look may err."""
FIX_ALPHA: Final = 0.5
"""How unlikely by chance a fix must be to keep a commit from being reported: hardly, so that none is reported anew."""
SHOWN: Final = 5
"""How many runs a finding names."""

Measure = Literal["success_rate", "duration"]
RegressionMeasure = TypeAliasType(
    "RegressionMeasure",
    Annotated[Measure, Field(description="What became worse: the rate of successes, or the duration.")],
)
"""The same in answers."""
MEASURES: Final[tuple[Measure, ...]] = ("success_rate", "duration")

MEASURED: Final[Mapping[Measure, str]] = {"success_rate": "success_rate", "duration": "median_duration_ms"}
"""What a side's value is called in answers, by measure."""

Split = tuple[int, float]
"""The index of the block with which a change begins, and how likely it would be without a change."""


class Run(NamedTuple):
    """What counts of a finished run with a commit."""

    event_id: str
    created_at: str
    commit: str
    repo: str | None
    succeeded: bool
    duration_ms: int
    """Milliseconds; 0 is taken as not known."""


@dataclass(frozen=True, slots=True)
class FindRegressions(Query["Findings"]):
    """Which runs are looked at. Answer: `Findings`."""

    filters: Filters
    """Only agents and job types in it count."""
    start: str
    """The first moment of created_at, in the stored form."""
    end: str
    """The moment after the last one."""

    def parameters(self) -> dict[str, str | int]:
        """Return the query as parameters, for the log."""
        return {**self.filters.parameters(), "from": self.start, "to": self.end}


@dataclass(frozen=True, slots=True)
class Side:
    """The runs before a change, or those since."""

    commits: int
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
    p_value: float
    """How likely such a difference would be at any commit and in either measure if no commit changed anything."""
    commit_url: str | None
    runs: tuple[str, ...]
    """The event_ids of the first runs that show it."""

    def to_json(self) -> RegressionAnswer:
        """Return the finding as it is answered."""
        name = MEASURED[self.measure]
        sides = {"before": _shown(self.before, name), "after": _shown(self.after, name)}
        return cast(RegressionAnswer, {**asdict(self), **sides})


def _shown(side: Side, name: str) -> dict[str, Any]:
    return {"commits": side.commits, "runs": side.runs, name: round(side.value, 6)}


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found, the most certain first, and in how many pairs it was looked for."""

    regressions: tuple[Regression, ...]
    pairs: int
    """Pairs of agent and job type with runs of at least two commits."""


_ANY_MOMENT: Final = "An ISO 8601 date and time, a time before now such as -30d, or now."
FROM: Final = moment("from", f"{_ANY_MOMENT} The first moment of created_at.", "-30d")
TO: Final = moment("to", f"{_ANY_MOMENT} Not included.", "now")
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
    runs: Number
    success_rate: NotRequired[Share]
    median_duration_ms: NotRequired[float]


class RegressionAnswer(TypedDict):
    """A commit since which runs are worse."""

    agent_name: str
    job_type: str
    measure: RegressionMeasure
    first_bad_commit: str
    last_good_commit: Annotated[str, Field(description="The commit before it.")]
    before: SideAnswer
    after: SideAnswer
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
        "pairs": Annotated[Number, Field(description="Pairs of agent and job type with runs of at least two commits.")],
        "regressions": list[RegressionAnswer],
    },
)


def to_json(query: FindRegressions, findings: Findings) -> RegressionReport:
    """Return the whole answer."""
    return {
        "from": query.start,
        "to": query.end,
        "alpha": ALPHA,
        "pairs": findings.pairs,
        "regressions": [regression.to_json() for regression in findings.regressions],
    }


def gather(pairs: Iterable[tuple[str, str, Sequence[Run]]]) -> Findings:
    """Look for regressions in each pair's runs: its agent, its job type, and the runs in any order."""
    found: list[Regression] = []
    examined = 0
    for agent_name, job_type, runs in pairs:
        commits = in_order(runs)
        if len(commits) > 1:
            examined += 1
            found += find(agent_name, job_type, commits)
    found.sort(key=attrgetter("p_value", "agent_name", "job_type", "measure", "first_bad_commit"))
    return Findings(tuple(found), examined)


def in_order(runs: Iterable[Run]) -> list[list[Run]]:
    """Return the runs of each commit, the commits by when their first run was created, as are the runs of each."""
    by_commit: dict[str, list[Run]] = {}
    for run in sorted(runs, key=attrgetter("created_at", "commit", "event_id")):
        by_commit.setdefault(run.commit, []).append(run)
    return list(by_commit.values())


def find(
    agent_name: str, job_type: str, commits: Sequence[Sequence[Run]], measures: Sequence[Measure] = MEASURES
) -> list[Regression]:
    """Return the commits since which a pair's runs are worse; `commits` as `in_order` returns them."""
    found = []
    for measure in measures:
        blocks = _blocks(measure, commits)
        changes = _changes(measure, blocks)
        borders = [0, *(place for place, _ in changes), len(blocks)]
        for (place, p_value), first, last in zip(changes, borders[:-2], borders[2:], strict=True):
            before, after = _side(measure, blocks[first:place]), _side(measure, blocks[place:last])
            since = sorted(
                (run for runs in blocks[place:last] for run in runs), key=attrgetter("created_at", "event_id")
            )
            if _is_worse(measure, before.value, after.value) and _is_steady(measure, before.value, after.value, since):
                bad = blocks[place][0]
                showing = [run.event_id for run in since if _shows(measure, run, before.value)][:SHOWN]
                repo = next((run.repo for run in blocks[place] if run.repo is not None), None)
                page = commit_url(repo, bad.commit)
                good = blocks[place - 1][0].commit
                names = agent_name, job_type, measure, bad.commit, good
                found.append(Regression(*names, before, after, p_value, page, tuple(showing)))
    return found


def lasts(
    measure: Measure,
    commits: Sequence[Sequence[Run]],
    first_bad_commit: str,
    before: float,
    after: float,
    *,
    alpha: float = ALPHA,
) -> bool:
    """Return whether a commit is still not fixed: whether at no change since it half of the difference was made good.

    Args:
        measure: In which the commit was found to be bad.
        commits: The pair's runs, as `in_order` returns them; if the commit is not among them, all are newer.
        first_bad_commit: The commit.
        before: The success rate, or the median duration in ms, that was found before it.
        after: That since it.
        alpha: How unlikely by chance a change must be to count.

    """
    begin = next((place for place, runs in enumerate(commits) if runs[0].commit == first_bad_commit), 0)
    since = _blocks(measure, commits[begin:])
    borders = [0, *(place for place, _ in _changes(measure, since, alpha)), len(since)]
    values = [_side(measure, since[first:last]).value for first, last in pairwise(borders) if first < last]
    return bool(values) and all((value - before) / (after - before) > 0.5 for value in values)


def _blocks(measure: Measure, commits: Sequence[Sequence[Run]]) -> list[list[Run]]:
    """Return the runs that count of each commit that has any.

    An agent that does not report durations, or a commit without a success, leaves nothing to compare.
    """
    taken = ([run for run in runs if _counts(measure, run)] for runs in commits)
    return [runs for runs in taken if runs]


def _counts(measure: Measure, run: Run) -> bool:
    return measure == "success_rate" or (run.succeeded and run.duration_ms > 0)


def _side(measure: Measure, blocks: Sequence[Sequence[Run]]) -> Side:
    runs = [run for block in blocks for run in block]
    return Side(len(blocks), len(runs), _value(measure, runs))


def _value(measure: Measure, runs: Sequence[Run]) -> float:
    if measure == "success_rate":
        return sum(run.succeeded for run in runs) / len(runs)
    return median(run.duration_ms for run in runs)


def _is_worse(measure: Measure, before: float, after: float) -> bool:
    return before - after >= MIN_FALL if measure == "success_rate" else after >= MIN_GROWTH * before


def _is_steady(measure: Measure, before: float, after: float, since: Sequence[Run]) -> bool:
    """Return whether the runs since are worse all the time: an outage of some hours is no commit's work.

    Each part of them, in the order in which they were created, has to show at least such a part of the difference.
    """
    parts = [since[len(since) * part // PARTS : len(since) * (part + 1) // PARTS] for part in range(PARTS)]
    return all(abs(_value(measure, part) - before) >= abs(after - before) / PARTS for part in parts)


def _shows(measure: Measure, run: Run, before: float) -> bool:
    return not run.succeeded if measure == "success_rate" else run.duration_ms > before


# --- Statistics ----------------------------------------------------------------------------------


def _changes(measure: Measure, blocks: Sequence[Sequence[Run]], alpha: float = ALPHA) -> list[Split]:
    """Return every change in order: the surest one, then those on either side of it (binary segmentation).

    Without any change only the first test can give a false alarm, so that looking further does not add to these.
    """
    split = _rate_split if measure == "success_rate" else _duration_split
    found: list[Split] = []
    waiting = [(0, len(blocks))]
    while waiting:
        first, last = waiting.pop()
        surest = split(blocks[first:last])
        if surest is None:
            continue
        place, p_value = first + surest[0], min(1.0, surest[1] * len(MEASURES))
        if p_value <= alpha:
            found.append((place, p_value))
            waiting += [(first, place), (place, last)]
    return sorted(found)


def _candidates(blocks: Sequence[Sequence[Run]]) -> list[tuple[int, int]]:
    """Return the indexes at which a change may begin, and how many runs are before each."""
    sizes = list(accumulate(map(len, blocks)))
    total = sizes[-1] if sizes else 0
    return [(place, size) for place, size in enumerate(sizes, 1) if MIN_RUNS <= size <= total - MIN_RUNS]


def _rate_split(blocks: Sequence[Sequence[Run]]) -> Split | None:
    """Return where the success rate changes most certainly, by Fisher's exact test, with Bonferroni's correction."""
    candidates = _candidates(blocks)
    failures = list(accumulate(sum(not run.succeeded for run in block) for block in blocks))
    runs = sum(map(len, blocks))
    tested = ((fisher(failures[place - 1], size, failures[-1], runs), place) for place, size in candidates)
    return _surest(tested, len(candidates))


def _duration_split(blocks: Sequence[Sequence[Run]]) -> Split | None:
    """Return where durations change most certainly, by Mann and Whitney's rank test, with Bonferroni's correction."""
    candidates = _candidates(blocks)
    if not candidates:
        return None
    durations = sorted(run.duration_ms for block in blocks for run in block)
    ranks: dict[int, float] = {}
    ties = below = 0
    for duration, equal in groupby(durations):
        count = sum(1 for _ in equal)
        ranks[duration] = below + (count + 1) / 2
        ties += count**3 - count
        below += count
    sums = list(accumulate(sum(ranks[run.duration_ms] for run in block) for block in blocks))
    tested = ((rank_sum(sums[place - 1], size, below, ties), place) for place, size in candidates)
    return _surest(tested, len(candidates))


def _surest(tested: Iterable[tuple[float, int]], candidates: int) -> Split | None:
    surest = min(tested, default=None)
    return None if surest is None else (surest[1], min(1.0, surest[0] * candidates))


def fisher(failures: int, runs: int, all_failures: int, all_runs: int) -> float:
    """Return how likely at most so uneven a share of all failures falls on some of the runs (exact, two-sided).

    The smaller tail of the hypergeometric distribution is doubled.
    """
    x, n, k, m = failures, runs, all_failures, all_runs
    if x * m > n * k:  # above the expectation: the other outcome is below it
        x, k = n - x, m - k
    term = exp(_log_choose(k, x) + _log_choose(m - k, n - x) - _log_choose(m, n))
    tail = 0.0
    while term > tail * 1e-17:
        tail += term
        term *= x * (m - k - n + x) / ((k - x + 1) * (n - x + 1))
        x -= 1
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def rank_sum(ranks: float, runs: int, all_runs: int, ties: int) -> float:
    """Return how likely a sum of ranks lies so far from the expected one (normal approximation, two-sided).

    Args:
        ranks: The sum of the midranks of some of the runs, counted from 1.
        runs: How many these are.
        all_runs: How many there are in all.
        ties: The sum of t³ - t over each number t of equal values.

    """
    others = all_runs - runs
    variance = runs * others / 12 * (all_runs + 1 - ties / (all_runs * (all_runs - 1)))
    if variance <= 0:  # all are equal
        return 1.0
    distance = abs(ranks - runs * (all_runs + 1) / 2) - 0.5
    return min(1.0, erfc(distance / sqrt(2 * variance)))
