"""Counts by appending: each group of commands adds one row of what it changed, and one daemon adds the rows up.

So no group ever waits for a total that another one has changed. Who reads adds the rows that are not added up yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import add
from typing import Any, Final

import orjson

from telemetryd.engine import commit_log
from telemetryd.engine.columns import MINUTE
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.schema import CLASS, COMMITS, FOLDING
from telemetryd.engine.postgres.statements import commit_cells
from telemetryd.engine.postgres.statements.arrays import by_column
from telemetryd.engine.postgres.statements.totals import MINUTES, TOTALS
from telemetryd.engine.stats_log import (
    CellKey,
    Summary,
    add_to,
    cell_of,
    cells_of,
    read_log,
    split,
    spread,
    summarize,
    to_log,
)
from telemetryd.model.sketches import pack
from telemetryd.model.stats import FACTS, SUMS, Cell, Facts, Named, hour_number

AT_ONCE: Final = 500
"""Rows that are added up in one transaction."""
DUE: Final = 10_000
"""After so many changes they are added up; by then they cost each query of statistics 15 ms."""

_CREATED_AT: Final = FACTS.index("created_at")
_DATE: Final = len("2025-12-24")
_KEY: Final = ("hours", "names", "start", "agent_name", "job_type", "status")
_CELL: Final = (*SUMS, "bins")
_KINDS: Final = ("bigint", "bigint", "bigint", "text", "text", "text")
_KEYS: Final = ", ".join(f"%s::{kind}[]" for kind in _KINDS)
_VALUES: Final = ", ".join(f"%s::{'bytea' if name == 'bins' else 'numeric'}[]" for name in _CELL)

_APPEND: Final = "INSERT INTO run_deltas (changes, facts, minutes) VALUES (%s, %s, %s)"
_TRY_TURN: Final = "SELECT pg_try_advisory_xact_lock(%s, %s)"
_TURN: Final = "SELECT pg_advisory_xact_lock(%s, %s)"
_TAKE: Final = f"""
    WITH taken AS (
        DELETE FROM run_deltas WHERE id IN (SELECT id FROM run_deltas ORDER BY id LIMIT {AT_ONCE})
        RETURNING facts, minutes
    )
    SELECT count(*), '[' || string_agg(facts, ',') || ']', '[' || string_agg(minutes, ',') || ']' FROM taken
"""
_WAITING: Final = "SELECT coalesce(sum(changes), 0) FROM (SELECT changes FROM run_deltas LIMIT 5000) AS waiting"

_READ: Final = f"""
    SELECT {", ".join(f"s.{name}" for name in (*_KEY, *_CELL))}
    FROM unnest({_KEYS}) AS k ({", ".join(_KEY)}) JOIN run_stats AS s USING ({", ".join(_KEY)})
"""
_DROP: Final = f"DELETE FROM run_stats WHERE ({', '.join(_KEY)}) IN (SELECT * FROM unnest({_KEYS}))"
_WRITE: Final = f"""
    INSERT INTO run_stats ({", ".join((*_KEY, *_CELL))}) SELECT * FROM unnest({_KEYS}, {_VALUES})
    ON CONFLICT ({", ".join(_KEY)}) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in _CELL)}
"""
_ADD_TO_TOTALS: Final = """
    INSERT INTO run_totals AS t (agent_name, job_type, status, runs)
    SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::bigint[])
    ON CONFLICT (agent_name, job_type, status) DO UPDATE SET runs = t.runs + excluded.runs
"""
_ADD_TO_MINUTES: Final = """
    INSERT INTO run_minutes AS m (minute, runs) SELECT * FROM unnest(%s::text[], %s::bigint[])
    ON CONFLICT (minute) DO UPDATE SET runs = m.runs + excluded.runs
"""
# A total that has drifted (a row changed by hand) is no reason to stop.
_DROP_TOTALS: Final = """
    DELETE FROM run_totals USING unnest(%s::text[], %s::text[], %s::text[]) AS k (agent_name, job_type, status)
    WHERE runs <= 0 AND run_totals.agent_name = k.agent_name AND run_totals.job_type = k.job_type
        AND run_totals.status = k.status
"""
_DROP_MINUTES: Final = "DELETE FROM run_minutes WHERE runs <= 0 AND minute = ANY (%s::text[])"


class Deltas:
    """What one open transaction has changed of what is counted."""

    def __init__(self) -> None:
        self.created: list[Facts] = []
        self.deleted: list[Facts] = []
        self.changed: list[tuple[Facts, Facts]] = []
        """What each change found and what it left."""

    def change(self, old: Sequence[Any], new: Sequence[Any]) -> None:
        """Take note of a change, if it changes what is counted."""
        if [*new] != [*old]:
            self.changed.append((tuple(old), tuple(new)))

    def append(self, plain: Plain) -> bool:
        """Store it all as one row; return whether there was anything."""
        changes = len(self.created) + len(self.deleted) + len(self.changed)
        if not changes:
            return False
        summary: Summary = {}
        summarize(summary, self.created)
        summarize(summary, self.deleted, -1)
        summarize(summary, (old for old, _ in self.changed), -1)
        summarize(summary, (new for _, new in self.changed))
        minutes = Counter(facts[_CREATED_AT][:MINUTE] for facts in self.created)
        minutes.subtract(facts[_CREATED_AT][:MINUTE] for facts in self.deleted)
        counted = [[minute, runs] for minute, runs in minutes.items() if runs]
        plain.execute(_APPEND, (changes, to_log(summary) or None, orjson.dumps(counted).decode()[1:-1] or None))
        return True


def waiting(plain: Plain) -> int:
    """Return how many changes wait to be added up, as far as it matters."""
    row = plain.execute(_WAITING).fetchone()
    return 0 if row is None else int(row[0])


def fold(plain: Plain) -> bool:
    """Add some rows up, inside the caller's transaction; return whether there may be more.

    Exactly once, however many daemons try: taking the rows away and adding them up is one transaction, and one daemon
    at a time does it.
    """
    if not plain.execute(_TRY_TURN, (CLASS, FOLDING)).fetchall()[0][0]:
        return False
    ((rows, facts, minutes),) = plain.execute(_TAKE).fetchall()
    if rows == 0:
        return False
    summary = read_log(facts)
    commit_cells.add_up(plain, commit_log.cells_of(summary))
    named = [*cells_of(summary)]
    _add_to_stats(plain, spread(split(named)))
    _add_to_totals(plain, named)
    _add_to_minutes(plain, minutes)
    return bool(rows == AT_ONCE)


def _add_to_stats(plain: Plain, cells: dict[CellKey, Cell]) -> None:
    for *key, cell in _read(plain, cells):
        place: CellKey = tuple(key)
        cells[place] = [*map(add, cells[place], cell)]
    empty = [key for key, cell in cells.items() if cell[0] <= 0]
    if empty:
        plain.execute(_DROP, _columns(empty))
        for place in empty:
            del cells[place]
    _write(plain, cells)


def _read(plain: Plain, keys: Iterable[CellKey]) -> Iterator[tuple[Any, ...]]:
    for row in plain.execute(_READ, _columns([*keys])):
        yield *row[: len(_KEY)], cell_of(row[len(_KEY) :])


def _write(plain: Plain, cells: dict[CellKey, Cell]) -> None:
    if cells:
        rows = sorted((*key, *cell[:-1], pack(cell[-1])) for key, cell in cells.items())
        plain.execute(_WRITE, _columns(rows))


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """Return rows column by column, as `unnest` takes them."""
    return by_column(rows) if rows else [[] for _ in _KEY]


def _add_to_totals(plain: Plain, named: Iterable[Named]) -> None:
    totals: Counter[tuple[str, str, str]] = Counter()
    for _, agent_name, job_type, status, cell in named:
        totals[agent_name, job_type, status] += cell[0]
    changed = sorted((*key, runs) for key, runs in totals.items() if runs)
    if changed:
        plain.execute(_ADD_TO_TOTALS, _columns(changed))
        plain.execute(_DROP_TOTALS, _columns([total[:3] for total in changed]))


def _add_to_minutes(plain: Plain, log: str | None) -> None:
    minutes: Counter[str] = Counter()
    for minute, runs in orjson.loads(log or "[]"):
        minutes[minute] += runs
    changed = sorted((minute, runs) for minute, runs in minutes.items() if runs)
    if changed:
        plain.execute(_ADD_TO_MINUTES, _columns(changed))
        plain.execute(_DROP_MINUTES, ([minute for minute, _ in changed],))


# --- Comparing with the runs ---------------------------------------------------------------------

_FACTS_IN_ORDER: Final = f"SELECT {', '.join(FACTS)} FROM agent_runs ORDER BY created_at"
_STORED: Final = f"SELECT {', '.join((*_KEY, *_CELL))} FROM run_stats"
_WAITS: Final = "SELECT facts FROM run_deltas WHERE facts <> ''"
_KEPT: Final = f"SELECT agent_name, job_type, status, sum(runs) FROM {TOTALS} GROUP BY 1, 2, 3 HAVING sum(runs) <> 0"
_COUNTED: Final = f"""
    SELECT count(*) FROM (
        (SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY 1, 2, 3 EXCEPT {_KEPT})
        UNION ALL
        ({_KEPT} EXCEPT SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY 1, 2, 3)
    ) AS wrong
"""
_MINUTES: Final = f"SELECT left(created_at, {MINUTE}), count(*) FROM agent_runs GROUP BY 1"
_KEPT_MINUTES: Final = f"SELECT minute, sum(runs) FROM {MINUTES} GROUP BY 1 HAVING sum(runs) <> 0"
_COUNTED_MINUTES: Final = f"""
    SELECT count(*) FROM (
        ({_MINUTES} EXCEPT {_KEPT_MINUTES})
        UNION ALL
        ({_KEPT_MINUTES} EXCEPT {_MINUTES})
    ) AS wrong
"""


def count_wrong(plain: Plain) -> int:
    """Count the rows that differ from what the runs add up to, at the beginning of the caller's transaction.

    All is seen as it was at one moment, so nobody who writes meanwhile makes a count look wrong.
    """
    plain.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    kept, of_commits = _kept(plain)
    wrong = 0
    for _, summary in _days(plain):
        expected = spread(split(cells_of(summary)))
        wrong += sum(kept.pop(key, None) != cell for key, cell in expected.items())
        wrong += sum(of_commits.pop(key, None) != sums for key, sums in commit_log.cells_of(summary).items())
    for statement in (_COUNTED, _COUNTED_MINUTES):
        wrong += plain.execute(statement).fetchall()[0][0]
    return wrong + len(kept) + len(of_commits)


def _kept(plain: Plain) -> tuple[dict[CellKey, Cell], dict[commit_log.Key, commit_log.Sums]]:
    """Return the rows of statistics and the cells of commits as they are once all that waits is added up."""
    kept: dict[CellKey, Cell] = {row[: len(_KEY)]: cell_of(row[len(_KEY) :]) for row in plain.execute(_STORED)}
    waiting: Summary = {}
    for (facts,) in plain.execute(_WAITS):
        add_to(waiting, read_log(f"[{facts}]"))
    for place, cell in spread(split(cells_of(waiting))).items():
        kept[place] = [*map(add, kept[place], cell)] if place in kept else cell
    of_commits = commit_log.with_log(commit_cells.stored(plain), commit_log.cells_of(waiting))
    return {place: cell for place, cell in kept.items() if cell[0] > 0}, of_commits


def _days(plain: Plain) -> Iterator[tuple[int, Summary]]:
    """Yield each day (its first hour since 1970) on which runs were created, with what they add up to."""
    with plain.cursor("days") as cursor:
        cursor.itersize = 5_000
        cursor.execute(_FACTS_IN_ORDER)
        for date, runs in groupby(cursor, key=lambda facts: facts[_CREATED_AT][:_DATE]):
            summary: Summary = {}
            summarize(summary, runs)
            yield hour_number(f"{date}T00"), summary


_COUNTED_TABLES: Final = ("run_deltas", "run_stats", "run_commits", "run_totals", "run_minutes")
_FORGET_ALL: Final = tuple(f"DELETE FROM {table}" for table in _COUNTED_TABLES)
_COUNT_TOTALS: Final = """
    INSERT INTO run_totals (agent_name, job_type, status, runs)
    SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY 1, 2, 3
"""
_COUNT_MINUTES: Final = f"INSERT INTO run_minutes (minute, runs) {_MINUTES}"


def rebuild(plain: Plain) -> None:
    """Count everything anew, inside the caller's transaction; commits wait meanwhile."""
    plain.execute(_TURN, (CLASS, FOLDING))
    plain.execute(_TURN, (CLASS, COMMITS))
    for statement in (*_FORGET_ALL, _COUNT_TOTALS, _COUNT_MINUTES):
        plain.execute(statement)
    for _, summary in _days(plain):
        _write(plain, spread(split(cells_of(summary))))
        commit_cells.add_up(plain, commit_log.cells_of(summary))
