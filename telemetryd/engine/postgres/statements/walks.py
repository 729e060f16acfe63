"""Walks of PostgreSQL down an index, in its order: where they begin and end, whatever the planner believes.

PostgreSQL takes no hints. If it is told that a field equals a value, it may as well walk all runs in the order of their
time and leave out the others, which never ends where the ones that are meant are old. So a field is compared together
with the time and the id, and is part of the order: then only the index that begins with it is in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from telemetryd.engine.pages import Span, ends, is_within
from telemetryd.engine.postgres.statements.predicates import Values, equals, is_short
from telemetryd.model.queries import ListRuns

_FIRST: Final = ""
_LAST: Final = "~"
"""Before and after every moment."""


@dataclass(frozen=True, slots=True)
class _End:
    """Where walks begin or end: a comparison, and the places of the moment, and of the id if it counts as well."""

    comparison: str
    places: tuple[str, ...]
    is_open: bool = False
    """Whether it is after all runs."""


@dataclass(frozen=True, slots=True)
class Walks:
    """The walks for the pages of a query.

    Args:
        moment: what the index calls the column of the order.
        number: what it calls the id.
        direction: ASC or DESC.
        ends: where they begin and end.
        is_sorted: whether no index shall give the order; another collation that compares alike says so.

    """

    moment: str
    number: str
    direction: str
    ends: tuple[_End, ...]
    is_sorted: bool

    @classmethod
    def of(
        cls, query: ListRuns, moment: str, number: str, values: Values, created: Span | None, *, is_sorted: bool
    ) -> Walks:
        """Return the walks of a query; what their ends compare with is added to `values`."""
        after = query.after
        lower, upper = ends(query, created)
        if query.order.descending:
            near, far, behind, direction = upper, lower, "<", "DESC"
        else:
            near, far, behind, direction = lower, upper, ">", "ASC"
        before = "><"[behind == ">"]
        first, last = (_LAST, _FIRST) if query.order.descending else (_FIRST, _LAST)
        values["far"] = last if far is None else far[1]
        end = _End(f"{before}=", ("far",), is_open=True) if far is None else _End(far[0], ("far",))
        if after is not None and (near is None or is_within(after.moment, near)):
            values |= {"near": after.moment, "after_id": after.id}
            begin = _End(behind, ("near", "after_id"))
        else:
            values["near"] = first if near is None else near[1]
            begin = _End(f"{behind}=", ("near",), is_open=True) if near is None else _End(near[0], ("near",))
        return cls(moment, number, direction, (begin, end), is_sorted)

    def conditions(self, fixed: Mapping[str, str]) -> list[str]:
        """Return the conditions that lead to a walk; `fixed` are the columns of one value, and what that is in SQL."""
        if fixed.keys() == {"event_id"}:  # its index finds one run, and has no order
            return [equals("event_id", fixed["event_id"]), *self._compared({})]
        return [*filter(None, map(is_short, fixed)), *self._compared(fixed)]

    def _compared(self, fixed: Mapping[str, str]) -> list[str]:
        found = []
        for end in self.ends:
            columns = [*fixed, self.moment, self.number][: len(fixed) + len(end.places)]
            compared = [*fixed.values(), *(f"%({each})s" for each in end.places)]
            if fixed or not end.is_open:
                found.append(f"({', '.join(columns)}) {end.comparison} ({', '.join(compared)})")
        return found

    def order(self, fixed: Mapping[str, str]) -> str:
        """Return the order of a walk, which is that of its index."""
        columns = [] if fixed.keys() == {"event_id"} else [*fixed]
        moment = f'{self.moment} COLLATE "POSIX"' if self.is_sorted else self.moment
        return ", ".join(f"{column} {self.direction}" for column in (*columns, moment, self.number))
