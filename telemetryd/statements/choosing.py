"""Which index serves which filters, and which runs a prune or a reap means."""

from __future__ import annotations

from typing import Final

import orjson

from telemetryd.commands import (
    PruneRuns,
)
from telemetryd.queries import (
    CountPrunable,
)
from telemetryd.runs import (
    SqlValue,
)

# Which index serves which equality filters. Every index goes on with created_at and the rowid, so a walk
# backwards is already in order. Where an index has the status but the query has not, the walk is a merge of
# one ordered arm for each of the six statuses.
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


_IS_STALE: Final = "status = 'running' AND created_at < :stale_before AND updated_at < :stale_before"


def old_runs(command: PruneRuns | CountPrunable) -> tuple[str, list[str], dict[str, SqlValue]]:
    """Return the index, the conditions and the parameters that find the runs to prune."""
    equal = {name: value for name in ("agent_name", "status") if (value := getattr(command, name)) is not None}
    index, _ = INDEXES[frozenset(equal)]
    conditions = ["created_at < :created_before", *(f"{name} = :{name}" for name in equal)]
    return index, conditions, {**equal, "created_before": command.created_before}


def select_prunable(command: PruneRuns) -> tuple[str, dict[str, SqlValue]]:
    """Return the SQL text and the parameters that find the runs of one slice to prune."""
    index, conditions, values = old_runs(command)
    source = f"agent_runs INDEXED BY {index}"
    if command.versions is not None:
        # A cross join is done in the order in which it stands: each version finds its run by the row number.
        source = "json_each(:versions) CROSS JOIN agent_runs NOT INDEXED ON agent_runs.id = json_extract(value, '$[0]')"
        conditions.append("updated_at = json_extract(value, '$[1]')")
        values["versions"] = orjson.dumps(command.versions).decode()
    return (
        "SELECT agent_runs.id, agent_name, job_type, status, created_at, event_id "  # noqa: S608 - our own words
        f"FROM {source} "
        f"WHERE {' AND '.join(conditions)} ORDER BY created_at LIMIT :limit",
        {**values, "limit": command.limit},
    )


def select_stale(what: str, stale_before: str, agent_name: str | None) -> tuple[str, dict[str, SqlValue]]:
    """Return the SQL text and the parameters that find the stale runs, or count them."""
    index, _ = INDEXES[frozenset({"status"} if agent_name is None else {"status", "agent_name"})]
    agent = "" if agent_name is None else " AND agent_name = :agent_name"
    values: dict[str, SqlValue] = {"stale_before": stale_before}
    if agent_name is not None:
        values["agent_name"] = agent_name
    return f"SELECT {what} FROM agent_runs INDEXED BY {index} WHERE {_IS_STALE}{agent}", values  # noqa: S608 - our own words
