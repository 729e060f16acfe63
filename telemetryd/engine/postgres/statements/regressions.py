"""SQL for regressions: the newest runs of each agent and job type, by their index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.registry import always
from telemetryd.model import regressions
from telemetryd.model.regressions import MAX_RUNS, Findings, FindRegressions, Run
from telemetryd.model.values import Status

NEXT_PAIR: Final = """
    SELECT agent_name, job_type FROM agent_runs WHERE (agent_name, job_type) > (%s, %s)
    ORDER BY agent_name, job_type LIMIT 1
"""
# Each arm is a walk in order; they are merged without a sort. The limit counts runs without a commit as well, so
# that no pair takes longer than another.
RUNS: Final = (
    " UNION ALL ".join(
        "(SELECT event_id, created_at, git_commit_hash, git_repo, status, duration_ms FROM agent_runs "
        f"WHERE agent_name = %(agent_name)s AND job_type = %(job_type)s AND status = '{status}' "
        f"AND created_at >= %(start)s AND created_at < %(end)s ORDER BY created_at DESC LIMIT {MAX_RUNS})"
        for status in Status
        if status is not Status.RUNNING
    )
    + f" ORDER BY created_at DESC LIMIT {MAX_RUNS}"
)


@answers(FindRegressions, is_long=always)
def fetch_regressions(plain: Plain, query: FindRegressions) -> Findings:
    """Look for regressions in every pair that is meant."""
    return regressions.gather(fetch_pairs(plain, query))


def fetch_pairs(plain: Plain, query: FindRegressions) -> Iterator[tuple[str, str, list[Run]]]:
    """Yield each pair that is meant, its agent and its job type, with its runs that have a commit."""
    is_meant = query.filters.lets_through("agent_name", "job_type")
    pair: tuple[str, ...] = ("", "")
    while (following := plain.execute(NEXT_PAIR, pair).fetchone()) is not None:
        agent_name, job_type = pair = following
        if is_meant(*pair):
            bound = {"agent_name": agent_name, "job_type": job_type, "start": query.start, "end": query.end}
            yield (
                agent_name,
                job_type,
                [
                    Run(event_id, created_at, commit, repo, status == Status.SUCCESS, duration_ms or 0)
                    for event_id, created_at, commit, repo, status, duration_ms in plain.execute(RUNS, bound)
                    if commit
                ],
            )
