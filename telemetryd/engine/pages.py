"""Pages of runs in any engine: the ends of a walk, which queries walk far, and how much one page holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final

from telemetryd.engine.indexes import INDEXES
from telemetryd.errors import InvalidRequestError
from telemetryd.model.filters import TIME_BOUNDS, WILDCARD, Filters
from telemetryd.model.queries import ListRuns, Order
from telemetryd.model.values import SqlValue

PAGE_BYTES: Final = 32 * 1024 * 1024
"""About how much one page may hold, which is in memory several times over while it is answered."""

Bound = tuple[str, SqlValue]
"""A comparison, and what is compared with."""

_FAR: Final = 10_000
"""Runs that an offset has to walk over before the page begins."""


def walks_far(query: ListRuns) -> bool:
    """Return whether a page may have to look at many runs."""
    walked = INDEXES.keys() if query.order == Order() and not query.filters.labels else (frozenset(),)
    return query.filters.is_search or frozenset(query.filters.equal) not in walked or query.offset > _FAR


def ends(query: ListRuns) -> tuple[Bound | None, Bound | None]:
    """Return the lower and the upper bound that the filters set to the column that the order is by."""
    bounds = query.filters.bounds
    given: dict[str, Bound] = {
        comparison[0]: (comparison, bounds[name])
        for name, (column, comparison) in TIME_BOUNDS.items()
        if column == query.order.column and name in bounds
    }
    return given.get(">"), given.get("<")


def is_within(moment: str, bound: Bound) -> bool:
    """Return whether a moment is on the right side of a bound."""
    comparison, value = bound[0], str(bound[1])
    if moment == value:
        return comparison.endswith("=")
    return (moment < value) is comparison.startswith("<")


def named(filters: Filters, agents: tuple[str, ...]) -> Filters:
    """Return filters in which the patterns are replaced by the agents that they stand for."""
    return replace(filters, patterns=(), equal={**filters.equal, WILDCARD: agents})


def check_size(sizes: Sequence[int], limit: int) -> None:
    """See that the runs of a page are too large for one answer only because one of them is, or the one after them.

    Raises:
        InvalidRequestError: if it would have to be shorter than asked for. A shorter page would lose runs to clients
            that page by offset.

    """
    fitting = max(sum(total <= PAGE_BYTES for total in accumulate(sizes)), 1)
    if fitting < min(len(sizes), limit):
        raise InvalidRequestError(
            f"Invalid limit: {limit}; the first {fitting} of these runs hold {PAGE_BYTES >> 20} MiB, "
            f"the most that one answer holds: ask for at most {fitting} at a time"
        )
