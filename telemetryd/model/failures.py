"""Report of failed runs by agent and job type: the query, how it is parsed, and the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, Final

from pydantic import Field
from typing_extensions import TypedDict

from telemetryd.git_urls import commit_url
from telemetryd.model.alerts import FAILED
from telemetryd.model.answers import Moment, Number
from telemetryd.model.filters import FILTER_PARAMETERS, LABEL_PARAMETER, Filters, read_filters
from telemetryd.model.parameters import Given, Parameter, moment, refuse
from telemetryd.model.queries import MAX_LIMIT, Accuracy, ListRuns, Total
from telemetryd.model.values import shorten

MOST_ERRORS: Final = 3
"""Different errors that a group shows, those of most runs first."""
MOST_COMMITS: Final = 5
"""Commits that a group shows, the newest first."""
LONGEST_ERROR: Final = 300
"""Characters of an error that a group shows; runs whose errors begin alike count as one."""
FIELDS: Final = (
    "event_id",
    "created_at",
    "agent_name",
    "job_type",
    "status",
    "error_summary",
    "git_repo",
    "git_commit_hash",
)
"""The fields of a run that the report is made from."""

_ANY_MOMENT: Final = "An ISO 8601 date and time, a time before now such as -12h, or now."
FROM: Final = moment("from", f"{_ANY_MOMENT} Only runs created since.", "-24h")
TO: Final = moment("to", f"{_ANY_MOMENT} Only runs created before.", "now")
STATUS: Final = FILTER_PARAMETERS["status"].described(
    f"What counts as failed, with commas between several statuses. Default: {','.join(FAILED)}."
)
PARAMETERS: Final[tuple[Parameter[Any], ...]] = (
    FROM,
    TO,
    FILTER_PARAMETERS["agent_name"],
    FILTER_PARAMETERS["job_type"],
    STATUS,
    FILTER_PARAMETERS["host"],
    FILTER_PARAMETERS["environment"],
    LABEL_PARAMETER,
)
"""The parameters of the report."""


@dataclass(frozen=True, slots=True)
class Failures:
    """Which failed runs are meant."""

    filters: Filters
    """With the statuses that count as failed, and without the time."""
    start: str
    """The first moment of created_at, in the stored form."""
    end: str
    """The moment after the last one."""

    def runs(self, limit: int = MAX_LIMIT) -> ListRuns:
        """Return the query for the newest of them."""
        bounds = {"created_after": self.start, "created_before": self.end}
        return ListRuns(replace(self.filters, bounds=bounds), limit, fields=FIELDS)


def parse(query_string: str, now: datetime) -> Failures:
    """Read which failed runs are meant.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, its value and what is allowed.

    """
    given = Given(query_string, PARAMETERS, now)
    filters = read_filters(given)
    start, end = given.value(FROM, ""), given.value(TO, "")
    given.finish()
    if start >= end:
        begin, until = (str(given.texts.get(each.name, each.default)) for each in (FROM, TO))
        raise refuse(FROM.name, begin, f"before to ({shorten(until)!r})")
    return Failures(replace(filters, equal={"status": FAILED, **filters.equal}), start, end)


class ErrorOfRuns(TypedDict):
    """An error, and how many runs had it."""

    error_summary: str | None
    runs: Number
    event_id: Annotated[str, Field(description="The newest of these runs.")]


class CommitOfRuns(TypedDict):
    """A commit, and how many runs failed at it."""

    git_commit_hash: str
    runs: Number
    first_at: Annotated[Moment, Field(description="created_at of the first of these failed runs.")]
    commit_url: str | None


class FailedGroup(TypedDict):
    """The failed runs of an agent and job type."""

    agent_name: str
    job_type: str
    runs: Number
    statuses: Annotated[dict[str, Number], Field(description="How many of them have each status.")]
    first_at: Moment
    last_at: Moment
    errors: Annotated[
        list[ErrorOfRuns],
        Field(max_length=MOST_ERRORS, description="Those of most runs first; long ones count by how they begin."),
    ]
    commits: Annotated[list[CommitOfRuns], Field(max_length=MOST_COMMITS, description="The newest first.")]


FailureReport = TypedDict(
    "FailureReport",
    {
        "from": Moment,
        "to": Moment,
        "failed": Annotated[Number, Field(description="How many runs failed.")],
        "failed_accuracy": Annotated[Accuracy, Field(description="How far that number can be believed.")],
        "looked_at": Annotated[Number, Field(description="How many of them, the newest, the groups are made from.")],
        "groups": Annotated[list[FailedGroup], Field(description="Those with most failed runs first.")],
    },
)


def to_json(query: Failures, total: Total, runs: Sequence[Mapping[str, Any]]) -> FailureReport:
    """Return the whole answer.

    Args:
        query: which runs were asked for.
        total: how many there are.
        runs: the newest of them, the newest first.

    """
    pairs: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        pairs.setdefault((run["agent_name"], run["job_type"]), []).append(run)
    groups = [_group(*pair, runs) for pair, runs in pairs.items()]
    return {
        "from": query.start,
        "to": query.end,
        "failed": total.runs,
        "failed_accuracy": total.accuracy,
        "looked_at": len(runs),
        "groups": sorted(groups, key=lambda group: (-group["runs"], group["agent_name"], group["job_type"])),
    }


def _group(agent_name: str, job_type: str, runs: Sequence[Mapping[str, Any]]) -> FailedGroup:
    return {
        "agent_name": agent_name,
        "job_type": job_type,
        "runs": len(runs),
        "statuses": dict(Counter(run["status"] for run in runs).most_common()),
        "first_at": runs[-1]["created_at"],
        "last_at": runs[0]["created_at"],
        "errors": _errors(runs),
        "commits": _commits(runs),
    }


def _errors(runs: Iterable[Mapping[str, Any]]) -> list[ErrorOfRuns]:
    found: dict[str | None, list[Mapping[str, Any]]] = {}
    for run in runs:
        error = run["error_summary"]
        found.setdefault(None if error is None else error[:LONGEST_ERROR], []).append(run)
    most = sorted(found.items(), key=lambda item: -len(item[1]))[:MOST_ERRORS]
    return [{"error_summary": error, "runs": len(those), "event_id": those[0]["event_id"]} for error, those in most]


def _commits(runs: Iterable[Mapping[str, Any]]) -> list[CommitOfRuns]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["git_commit_hash"] is not None:
            found.setdefault(run["git_commit_hash"], []).append(run)
    return [
        {
            "git_commit_hash": commit,
            "runs": len(those),
            "first_at": those[-1]["created_at"],
            "commit_url": commit_url(those[-1]["git_repo"], commit),
        }
        for commit, those in list(found.items())[:MOST_COMMITS]
    ]
