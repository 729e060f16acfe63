"""SQL for regressions: the cells of a time, and the runs that show a finding."""

from __future__ import annotations

from functools import partial
from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.registry import always
from telemetryd.model import regressions
from telemetryd.model.commit_cells import Cell, Fact, cells_of, slot_of
from telemetryd.model.regressions import MAX_RUNS, Findings, FindRegressions, Run, Stretch, begin_of
from telemetryd.model.values import Status

_FACTS: Final = """
    SELECT agent_name, job_type, git_commit_hash, created_at, status, duration_ms FROM agent_runs
    WHERE created_at >= %(start)s AND created_at < %(end)s
"""
_RUNS: Final = """
    SELECT event_id, created_at, git_commit_hash, git_repo, status, duration_ms FROM agent_runs
    WHERE agent_name = %(agent_name)s AND job_type = %(job_type)s AND status <> 'running' AND git_commit_hash <> ''
    AND created_at >= %(start)s AND created_at < %(end)s ORDER BY created_at {order}, event_id LIMIT %(most)s
"""


@answers(FindRegressions, is_long=always)
def fetch_regressions(plain: Plain, query: FindRegressions) -> Findings:
    """Look for regressions in every pair that is meant."""
    return regressions.gather(query, fetch_cells(plain, query), partial(fetch_runs, plain))


def fetch_cells(plain: Plain, query: FindRegressions) -> list[Cell]:
    """Return the cells of every pair in the time of a query."""
    until = slot_of(query.end) + (query.end > begin_of(slot_of(query.end)))
    bound = {"start": begin_of(slot_of(query.start)), "end": begin_of(until)}
    return cells_of(Fact(*row) for row in plain.execute(_FACTS, bound))


def fetch_runs(plain: Plain, stretch: Stretch) -> list[Run]:
    """Return the runs of a stretch, in its order."""
    order = "DESC" if stretch.is_newest_first else "ASC"
    bound = {**stretch._asdict(), "most": MAX_RUNS}
    rows = plain.execute(_RUNS.format(order=order), bound)
    return [
        Run(event_id, created_at, commit, repo, status == Status.SUCCESS, duration_ms or 0)
        for event_id, created_at, commit, repo, status, duration_ms in rows
    ]
