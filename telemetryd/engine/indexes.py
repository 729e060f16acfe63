"""The indexes of the runs, which are the same in every engine: which one serves which filters, in how many walks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Final

from telemetryd.model.filters import MAX_VALUES
from telemetryd.model.runs import FILTERS
from telemetryd.model.values import SqlValue, Status

Values = dict[str, SqlValue | float]
"""What is bound to the names of a statement."""

# Every index goes on with created_at and the id (that of event_id need not, for it finds one run), so a walk backwards
# is already in order. Where an index has the status but the query has not, the walk is a merge of one ordered arm for
# each of the six statuses.
INDEXES: Final[dict[frozenset[str], tuple[str, bool]]] = {
    frozenset(names.split()): (index, merge_statuses)
    for names, index, merge_statuses in (
        ("", "idx_runs_created_desc", False),
        ("status", "idx_runs_status", False),
        ("agent_name", "idx_runs_agent_created", False),
        ("agent_name status", "idx_runs_agent_status_created", False),
        ("agent_name job_type", "idx_runs_agent", True),
        ("agent_name job_type status", "idx_runs_agent", False),
        ("job_type", "idx_runs_job", True),
        ("job_type status", "idx_runs_job", False),
    )
}
"""For each set of equality filters its index, and whether the walk merges the statuses."""
INDEXES.update((frozenset({name}), (f"idx_runs_{name}", False)) for name in FILTERS if frozenset({name}) not in INDEXES)

_CHOICE: Final = (
    "event_id", "run_id", "retry_of", "trace_id", "parent_run_id", "conversation_id", "insight_id", "git_commit_hash",
    "agent_name job_type status",
    "agent_name job_type", "agent_name status", "agent_name", "website", "host", "product", "job_type status",
    "job_type", "status", "environment", "",
)  # fmt: skip
"""The filters that an index serves, those first which usually leave fewest runs."""

MAX_ARMS: Final = MAX_VALUES * len(Status)
"""Ordered walks that one statement merges; after a cursor they are twice as many, and SQLite takes 500."""

MANY: Final = 10_000
"""Runs that are better sorted, or looked up, than found on a walk through all of them."""


def choose(equal: Mapping[str, tuple[str, ...]], most: int = MAX_ARMS) -> tuple[str, tuple[str, ...], list[Values]]:
    """Return the index that serves these values best, its columns, and the values of these for each of its walks.

    One filter may have several values: each, and each combination of them, is a walk in order of its own. Where that
    would be more than `most`, fewer columns are taken.
    """
    for names in _CHOICE:
        columns = tuple(names.split())
        if not all(equal.get(name) for name in columns):
            continue
        index, merge_statuses = INDEXES[frozenset(columns)]
        values = {name: equal[name] for name in columns}
        if merge_statuses:
            values["status"] = equal.get("status") or tuple(map(str, Status))
        arms = [dict(zip(values, arm, strict=True)) for arm in product(*values.values())]
        if len(arms) <= most:
            return index, tuple(values), [{**arm} for arm in arms]
    raise AssertionError("a walk through all runs takes one arm")
