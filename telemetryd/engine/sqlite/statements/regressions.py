"""SQL for regressions: the newest runs of each agent and job type, by their index."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final

from telemetryd.engine.registry import always
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.model import regressions
from telemetryd.model.regressions import MAX_RUNS, Findings, FindRegressions, Run
from telemetryd.model.values import Status

NEXT_PAIR: Final = """
    SELECT agent_name, job_type FROM agent_runs INDEXED BY idx_runs_agent
    WHERE (agent_name, job_type) > (?, ?) ORDER BY agent_name, job_type LIMIT 1
"""
# Each arm is a walk in order; they are merged without a sort. The limit counts runs without a commit as well, so
# that no pair takes longer than another.
RUNS: Final = (
    " UNION ALL ".join(
        "SELECT event_id, created_at, git_commit_hash, git_repo, status, duration_ms "
        "FROM agent_runs INDEXED BY idx_runs_agent "
        f"WHERE agent_name = :agent_name AND job_type = :job_type AND status = '{status}' "
        "AND created_at >= :start AND created_at < :end"
        for status in Status
        if status is not Status.RUNNING
    )
    + f" ORDER BY created_at DESC LIMIT {MAX_RUNS}"
)


@answers(FindRegressions, is_long=always)
def fetch_regressions(connection: sqlite3.Connection, query: FindRegressions) -> Findings:
    """Look for regressions in every pair that is meant."""
    return regressions.gather(fetch_pairs(connection, query))


def fetch_pairs(connection: sqlite3.Connection, query: FindRegressions) -> Iterator[tuple[str, str, list[Run]]]:
    """Yield each pair that is meant, its agent and its job type, with its runs that have a commit."""
    is_meant = query.filters.lets_through("agent_name", "job_type")
    pair: tuple[str, str] = ("", "")
    while (following := connection.execute(NEXT_PAIR, pair).fetchone()) is not None:
        pair = following
        if is_meant(*pair):
            bound = dict(zip(("agent_name", "job_type"), pair, strict=True))
            rows = connection.execute(RUNS, {**bound, "start": query.start, "end": query.end})
            yield (
                *pair,
                [
                    Run(event_id, created_at, commit, repo, status == Status.SUCCESS, duration_ms or 0)
                    for event_id, created_at, commit, repo, status, duration_ms in rows
                    if commit
                ],
            )
