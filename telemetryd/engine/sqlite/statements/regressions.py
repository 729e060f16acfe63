"""SQL for regressions: the cells of a time, and the runs that show a finding."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from functools import partial
from typing import Final

from telemetryd.engine.commit_log import FINISHED, slots_of
from telemetryd.engine.registry import always
from telemetryd.engine.sqlite.statements import commit_cells
from telemetryd.engine.sqlite.statements.answers import answers
from telemetryd.model import regressions
from telemetryd.model.commit_cells import Cell
from telemetryd.model.regressions import MAX_RUNS, Findings, FindRegressions, Run, Stretch, runs_of

# Each arm is a walk in order; they are merged without a sort. The limit counts runs without a commit as well, so that
# no finding takes longer than another.
RUNS: Final = (
    " UNION ALL ".join(
        "SELECT event_id, created_at, git_commit_hash, git_repo, status, duration_ms, id "
        "FROM agent_runs INDEXED BY idx_runs_agent "
        f"WHERE agent_name = :agent_name AND job_type = :job_type AND status = '{status}' "
        "AND created_at >= :start AND created_at < :end"
        for status in FINISHED
    )
    + f" ORDER BY created_at {{order}}, id {{order}} LIMIT {MAX_RUNS}"
)


@answers(FindRegressions, is_long=always)
def fetch_regressions(connection: sqlite3.Connection, query: FindRegressions) -> Findings:
    """Look for regressions in every pair that is meant."""
    return regressions.gather(query, fetch_cells(connection, query), partial(fetch_runs, connection))


def fetch_cells(connection: sqlite3.Connection, query: FindRegressions) -> Iterator[Cell]:
    """Yield the cells of every pair in the time of a query."""
    return commit_cells.fetch_cells(connection, *slots_of(query))


def fetch_runs(connection: sqlite3.Connection, stretch: Stretch) -> list[Run]:
    """Return the runs of a stretch, in its order."""
    order = "DESC" if stretch.is_newest_first else "ASC"
    return runs_of(connection.execute(RUNS.format(order=order), stretch._asdict()))
