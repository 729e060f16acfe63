"""SQL for regressions: the cells of a time, and the runs that show a finding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from telemetryd.engine.commit_log import FINISHED, slots_of
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import commit_cells
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.registry import always
from telemetryd.model import regressions
from telemetryd.model.commit_cells import Cell
from telemetryd.model.regressions import MAX_RUNS, Findings, FindRegressions, Run, Stretch, runs_of

# Each arm is a walk in order; they are merged without a sort. The limit counts runs without a commit as well, so that
# no finding takes longer than another.
RUNS: Final = (
    " UNION ALL ".join(
        "(SELECT event_id, created_at, git_commit_hash, git_repo, status, duration_ms, id FROM agent_runs "
        f"WHERE agent_name = %(agent_name)s AND job_type = %(job_type)s AND status = '{status}' "
        "AND created_at >= %(start)s AND created_at < %(end)s "
        f"ORDER BY created_at {{order}}, id {{order}} LIMIT {MAX_RUNS})"
        for status in FINISHED
    )
    + f" ORDER BY created_at {{order}}, id {{order}} LIMIT {MAX_RUNS}"
)


@answers(FindRegressions, is_long=always)
def fetch_regressions(plain: Plain, query: FindRegressions) -> Findings:
    """Look for regressions in every pair that is meant."""
    return regressions.gather(query, fetch_cells(plain, query), partial(fetch_runs, plain))


def fetch_cells(plain: Plain, query: FindRegressions) -> Iterator[Cell]:
    """Yield the cells of every pair in the time of a query."""
    return commit_cells.fetch_cells(plain, *slots_of(query))


def fetch_runs(plain: Plain, stretch: Stretch) -> list[Run]:
    """Return the runs of a stretch, in its order."""
    order = "DESC" if stretch.is_newest_first else "ASC"
    return runs_of(plain.execute(RUNS.format(order=order), stretch._asdict()))
