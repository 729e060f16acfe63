"""SQL for what a run's age decides: which runs are to be pruned, and which are stale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.predicates import Values, one
from telemetryd.engine.registry import always
from telemetryd.model.queries import MAX_LIMIT, CountPrunable, CountStale, Prunable


@dataclass(frozen=True, slots=True)
class Walk:
    """One way to some of the runs that are older than `before`."""

    source: str
    """What stands after FROM, with the conditions."""
    moment: str
    """The column, or name, that says from when the age of these runs counts."""

    @property
    def in_order(self) -> str:
        """The source with the oldest runs first, where an index has that order."""
        return f"{self.source} ORDER BY created_at, id" if self.moment == "created_at" else self.source


# A run is as old as its created_at says, unless that lay ahead of its arrival: then it is as old as the arrival. No run
# is in both walks.
_AHEAD: Final = """(
    SELECT run AS ahead, arrived_at AS arrived FROM run_arrivals
    WHERE created_at >= %(before)s AND arrived_at < %(before)s
) AS early JOIN agent_runs ON agent_runs.id = ahead"""


def _old_runs(command: CountPrunable) -> tuple[list[Walk], Values]:
    """Return the walks that find the runs to prune, and what is bound to their names."""
    equal, also = asked_for(command, "agent_name", "job_type", "status")
    values: Values = {**equal, "before": command.created_before}
    return _walks(also), values


def stale_runs(command: CountStale) -> tuple[list[Walk], Values]:
    """Return the walks that find the stale runs, and what is bound to their names."""
    equal, also = asked_for(command, "agent_name", "job_type")
    return _walks(f"{also} AND status = 'running' AND updated_at < %(before)s"), {
        **equal,
        "before": command.stale_before,
    }


def asked_for(command: object, *names: str) -> tuple[Values, str]:
    """Return what of these names a command or a query asks for, and as conditions."""
    equal: Values = {name: value for name in names if (value := getattr(command, name)) is not None}
    return equal, "".join(f" AND {name} = %({name})s" for name in equal)


def _walks(also: str) -> list[Walk]:
    return [
        Walk(f"agent_runs WHERE created_at < %(before)s{also}", "created_at"),
        Walk(f"{_AHEAD} WHERE true{also}", "arrived"),
    ]


def together(walks: list[Walk], *columns: str) -> str:
    """Return the SQL text of all runs on these walks, with columns of theirs and the moment from which they age."""
    named = ", ".join(columns)
    return " UNION ALL ".join(f"SELECT {named}, {walk.moment} AS since FROM {walk.source}" for walk in walks)


@answers(CountPrunable, is_long=always)
def count_prunable(plain: Plain, query: CountPrunable) -> Prunable:
    """Count the runs that pruning would delete."""
    walks, values = _old_runs(query)
    runs, oldest = one(plain, f"SELECT count(*), min(since) FROM ({together(walks, 'id')}) AS old", values)
    ahead = plain.execute(f"SELECT event_id FROM {walks[-1].source} LIMIT {MAX_LIMIT}", values)
    return Prunable(runs, oldest, tuple(event_id for (event_id,) in ahead))


@answers(CountStale)
def count_stale(plain: Plain, query: CountStale) -> int:
    """Count the runs that reaping would cancel."""
    walks, values = stale_runs(query)
    return int(one(plain, f"SELECT count(*) FROM ({together(walks, 'id')}) AS stale", values)[0])
