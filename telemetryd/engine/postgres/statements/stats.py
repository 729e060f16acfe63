"""SQL for statistics: the rows that are added up, and the changes since then, from one snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.predicates import Values, conditions
from telemetryd.engine.stats_log import cell_of, from_log, level_of, spans_of
from telemetryd.model import stats
from telemetryd.model.stats import EVERY, SUMS, GetStats, Named

_NAMED: Final = ("start", "agent_name", "job_type", "status")
_COLUMNS: Final = (*_NAMED, *SUMS, "bins")
_LOG: Final = f"""
    SELECT NULL, NULL, NULL, NULL{", NULL" * len(SUMS)}, NULL, '[' || string_agg(facts, ',') || ']'
    FROM run_deltas WHERE facts <> ''
"""


@answers(GetStats)
def fetch_stats(plain: Plain, query: GetStats) -> list[stats.StatsGroup]:
    """Fetch the groups of an answer.

    Raises:
        InvalidRequestError: if they are too many.

    """
    return stats.answer(query, _fetch_cells(plain, query))


def _fetch_cells(plain: Plain, query: GetStats) -> Iterator[Named]:
    """Yield the cells of the fewest rows that are enough; the changes come with them, from the same snapshot."""
    for *row, log in plain.execute(*select_cells(query)):
        if row[0] is not None:
            yield row[0], row[1], row[2], row[3], cell_of(row[4:])
        else:
            yield from from_log(query, log)


def select_cells(query: GetStats) -> tuple[str, Values]:
    """Return the SQL text and the parameters that fetch the cells and the changes."""
    level = level_of(query)
    weights = query.weights
    found, values = conditions(query.filters, but=("status",))
    found.append("status = ANY(%(statuses)s::text[])")
    values |= {"statuses": [*weights], "level": level, "first": query.start, "end": query.end}
    values |= {"bucket": query.hours, "ahead": query.ahead}
    spans = spans_of(level, by_status=[*weights] != [EVERY])
    arms = []
    for hours, longer in zip(spans, (*spans[1:], None), strict=True):
        place = f"span_{hours}"
        values[place] = hours
        starts = _starts(query, place, None if longer is None else f"span_{longer}")
        chosen = [f"hours = %({place})s", "names = %(level)s", f"start IN ({starts})", *found]
        arms.append(f"SELECT {', '.join(_COLUMNS)}, NULL AS log FROM run_stats WHERE {' AND '.join(chosen)}")
    return " UNION ALL ".join([*arms, _LOG]), values


def _starts(query: GetStats, hours: str, longer: str | None) -> str:
    """Return the SELECT of where rows of so many hours begin that fit, while the longer ones around them do not."""
    chosen = [f"hours = %({hours})s AND names = 0", _fits(query, "start", hours)]
    if longer is not None:
        around = f"(start - {_modulo('start', longer)})"
        chosen.append(f"NOT ({_fits(query, around, longer)})")
    return f"SELECT start FROM run_stats WHERE {' AND '.join(chosen)}"


def _fits(query: GetStats, start: str, hours: str) -> str:
    """Return the condition that a row lies within the time that is asked for, and within one bucket."""
    within = f"{start} >= %(first)s AND {start} <= %(end)s - %({hours})s"
    if query.hours is None:
        return within
    return f"{within} AND {_modulo(f'{start} + %(ahead)s', 'bucket')} <= %(bucket)s - %({hours})s"


def _modulo(number: str, place: str) -> str:
    """Return what is left of a number that may be below zero."""
    return f"mod(mod({number}, %({place})s) + %({place})s, %({place})s)"
