"""Invents runs of a month in which every day of a commit is like the other, as cells and as they are posted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from bench.facts import Fact, cells_of
from telemetryd.model.commit_cells import Cell
from telemetryd.model.regressions import FetchRuns, Run, Stretch
from telemetryd.model.values import format_timestamp
from tests.conftest import make_run

COMMIT = "{:040x}".format
REPO = "git@github.com:acme/site.git"
END = datetime(2026, 1, 3, 12, tzinfo=UTC)


class Part(NamedTuple):
    """Some days of one commit, and how many runs succeed and fail on each."""

    commit: int
    days: int
    good: int
    bad: int
    duration_ms: int = 10_000


BROKEN = (Part(0, 8, 12, 0), Part(1, 8, 12, 0), Part(2, 6, 5, 7))
"""What the third commit broke."""


def runs_of(*parts: Part, end: datetime = END, **fields: Any) -> list[dict[str, Any]]:
    """Return runs as they are posted, up to a moment, the failures of each day spread evenly."""
    begin = end - timedelta(days=sum(part.days for part in parts))
    runs = []
    for part in parts:
        for day in range(part.days):
            number = part.good + part.bad
            for place in range(number):
                fails = place * part.bad // number != (place + 1) * part.bad // number
                runs.append(
                    make_run(
                        **{
                            "agent_name": "seo",
                            "job_type": "audit",
                            "created_at": format_timestamp(begin + timedelta(days=day + (place + 0.5) / number)),
                            "status": "failure" if fails else "success",
                            "duration_ms": part.duration_ms,
                            "git_commit_hash": COMMIT(part.commit),
                            "git_repo": REPO,
                            **fields,
                        }
                    )
                )
        begin += timedelta(days=part.days)
    return runs


def cells(runs: Iterable[dict[str, Any]]) -> list[Cell]:
    """Return the cells of runs."""
    names = ("agent_name", "job_type", "git_commit_hash", "created_at", "status", "duration_ms")
    return cells_of(Fact(*(run[name] for name in names)) for run in runs)


def fetcher(runs: Sequence[dict[str, Any]]) -> FetchRuns:
    """Return what reads some of these runs, as an engine does."""

    def fetch(stretch: Stretch) -> list[Run]:
        some = [
            Run(
                run["event_id"],
                run["created_at"],
                run["git_commit_hash"],
                run["git_repo"],
                run["status"] == "success",
                run["duration_ms"],
            )
            for run in runs
            if (run["agent_name"], run["job_type"]) == stretch[:2] and stretch.start <= run["created_at"] < stretch.end
        ]
        return sorted(some, key=lambda run: run.created_at, reverse=stretch.is_newest_first)

    return fetch
