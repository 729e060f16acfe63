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
from telemetryd.engine.postgres.statements.predicates import Values, equals, is_short, plain_name
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

    def conditions(self, fixed: Mapping[str, str], *, is_alone: bool) -> list[str]:
        """Return the conditions that lead to a walk; `fixed` are the columns of one value, and what that is in SQL.

        If these are all that is asked for (`is_alone`), the walk may go past its end: see `rest`.
        """
        if fixed.keys() == {"event_id"}:  # its index finds one run, and has no order
            return [equals("event_id", fixed["event_id"]), *self._compared({})]
        short = [*filter(None, map(is_short, fixed))]
        if self.goes_on(fixed, is_alone=is_alone):
            return [*short, *self._compared(fixed)[:1]]
        if is_alone or not self._passes(fixed):
            return [*short, *self._compared(fixed)]
        (first, value), *others = fixed.items()
        return [*short, f"{first} = ANY(ARRAY[{value}])", *self._compared(dict(others))]

    def goes_on(self, fixed: Mapping[str, str], *, is_alone: bool) -> bool:
        """Return whether a walk goes on after its end until it has given as many runs as it may.

        Of a comparison of several columns only the first one ends a walk (PostgreSQL 15 to 17), so one that stops there
        would pass over all others with the same first value.
        """
        return is_alone and fixed.keys() != {"event_id"} and self._passes(fixed)

    def _passes(self, fixed: Mapping[str, str]) -> bool:
        """Return whether more than the first column tells where a walk ends."""
        return bool(fixed) and (len(fixed) > 1 or not self.ends[1].is_open)

    def rest(self, fixed: Mapping[str, str]) -> list[str]:
        """Return the conditions, on what was selected from a walk, that tell its runs from those after its end."""
        end = self.ends[1]
        compared = [] if end.is_open else [f"moment {end.comparison} %({end.places[0]})s"]
        return [*(f"{plain_name(name)} = {value}" for name, value in fixed.items()), *compared]

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
