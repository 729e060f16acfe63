"""How many runs match, in any engine: counted, or taken from the totals that the writer keeps."""

from __future__ import annotations

from typing import Final, Protocol

from telemetryd.engine.columns import MINUTE
from telemetryd.engine.pages import named
from telemetryd.model.filters import Filters
from telemetryd.model.queries import Accuracy, Count, CountMatching, Total

_KEPT: Final = frozenset({"agent_name", "job_type", "status"})
"""The fields that totals are kept for."""
_MOST: Final = 10_000
"""Runs that an estimate counts at most."""


class Counter(Protocol):
    """What an engine counts, all of it on one connection."""

    def find_agents(self, filters: Filters) -> tuple[str, ...] | None:
        """Return the agents that the filters' patterns stand for; None if there are none, or too many agents."""

    def count(self, filters: Filters, most: int | None) -> int:
        """Count the runs that match, up to a bound if there is one."""

    def sum_totals(self, filters: Filters) -> int:
        """Add up the totals of agents, job types and statuses."""

    def sum_minutes(self, minutes: Filters) -> int:
        """Add up the runs of the minutes that lie within the bounds of created_at, which are minutes as well."""


def are_totals(filters: Filters) -> bool:
    """Return whether totals tell how many runs match some filters."""
    return Filters(filters.equal) == filters and filters.equal.keys() <= _KEPT


def count_matching(counter: Counter, query: CountMatching) -> Total:
    """Count the runs that match, or estimate how many they are."""
    agents = counter.find_agents(query.filters)
    if agents == ():
        return Total(0)
    filters = query.filters if agents is None else named(query.filters, agents)
    if query.count is Count.EXACT:
        return Total(counter.count(filters, None))
    total = _from_totals(counter, filters)
    if total is None:
        runs = counter.count(filters, _MOST)
        total = Total(runs, Accuracy.EXACT if runs < _MOST else Accuracy.AT_LEAST)
    return total


def _from_totals(counter: Counter, filters: Filters) -> Total | None:
    """Return the number from the totals, if they have it.

    Of a span of time they have the number of runs of all agents; for some agents that is a share.
    """
    kept = Filters(filters.equal)
    bounds = {name: moment[:MINUTE] for name, moment in filters.bounds.items() if name.startswith("created_")}
    if not are_totals(kept) or Filters(filters.equal, filters.bounds) != filters or len(bounds) < len(filters.bounds):
        return None
    runs = counter.sum_totals(kept)
    if not bounds:
        return Total(runs)
    within = counter.sum_minutes(Filters(bounds=bounds))
    return Total(round(runs * within / max(counter.sum_totals(Filters()), 1)), Accuracy.ESTIMATE)
