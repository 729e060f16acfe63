"""Pages of runs in any engine: the ends of a walk, which queries walk far, and how much one page holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final

from telemetryd.engine.indexes import INDEXES, MAX_ARMS
from telemetryd.errors import InvalidRequestError
from telemetryd.model.filters import TIME_BOUNDS, WILDCARD, Filters, Pattern
from telemetryd.model.queries import ListRuns, Order
from telemetryd.model.values import SqlValue

PAGE_BYTES: Final = 32 * 1024 * 1024
"""About how much one page may hold, which is in memory several times over while it is answered."""

BEHIND_ALL: Final = chr(0x10FFFF)
"""Comes after every other character: appended to a beginning, it is after every text that begins so."""

Bound = tuple[str, SqlValue]
"""A comparison, and what is compared with."""

_FAR: Final = 10_000
"""Runs that an offset has to walk over before the page begins."""


def walks_far(query: ListRuns) -> bool:
    """Return whether a page may have to look at many runs."""
    walked = INDEXES.keys() if query.order == Order() and not query.filters.labels else (frozenset(),)
    return query.filters.is_search or frozenset(query.filters.equal) not in walked or query.offset > _FAR


Span = tuple[SqlValue, SqlValue]
"""The first created_at that some runs can have, and the first one that is too late for all of them."""


def ends(query: ListRuns, created: Span | None) -> tuple[Bound | None, Bound | None]:
    """Return the lower and the upper bound of the column that the order is by, outside of which nothing can match.

    The filters set them, and so does `created` in the order of created_at.
    """
    bounds = query.filters.bounds
    given: dict[str, Bound] = {
        comparison[0]: (comparison, bounds[name])
        for name, (column, comparison) in TIME_BOUNDS.items()
        if column == query.order.column and name in bounds
    }
    lower, upper = given.get(">"), given.get("<")
    if created is not None and query.order.column == "created_at":
        first, last = created
        if lower is None or first is None or str(first) > str(lower[1]):
            lower = (">=", first)
        if last is not None and (upper is None or str(last) < str(upper[1])):
            upper = ("<", last)
    return lower, upper


def is_within(moment: str, bound: Bound) -> bool:
    """Return whether a moment is on the right side of a bound."""
    comparison, value = bound[0], str(bound[1])
    if moment == value:
        return comparison.endswith("=")
    return (moment < value) is comparison.startswith("<")


def named(filters: Filters, agents: tuple[str, ...]) -> Filters:
    """Return filters in which the patterns are replaced by the agents that they stand for."""
    return replace(filters, patterns=(), equal={**filters.equal, WILDCARD: agents})


def find_agents(
    filters: Filters, select: Callable[[Pattern, dict[str, str | int]], Iterable[tuple[str]]]
) -> tuple[str, ...] | None:
    """Return the agents that the filters' patterns stand for; None if there are no patterns, or too many agents.

    `select` gives the names that match a pattern, at most `most` of those from `first` to before `last`.
    """
    if not filters.patterns:
        return None
    names = set(filters.equal.get(WILDCARD, ()))
    for pattern in filters.patterns:
        prefix = pattern[0]
        bound: dict[str, str | int] = {"first": prefix, "last": prefix + BEHIND_ALL, "most": MAX_ARMS + 1}
        names.update(name for (name,) in select(pattern, bound))
    return tuple(sorted(names)) if len(names) <= MAX_ARMS else None


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
