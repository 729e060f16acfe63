"""SQL for the cells of commits: adds to them and reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Final

from telemetryd.engine.commit_log import KEY, SUMS, Key, Sums, merge
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.arrays import by_column
from telemetryd.engine.stats_log import read_log
from telemetryd.model.commit_cells import Cell

_COLUMNS: Final = (*KEY, *SUMS)
_NUMBERS: Final = frozenset({"slot", *SUMS})
_ARRAYS: Final = {name: f"%s::{'bigint' if name in _NUMBERS else 'text'}[]" for name in _COLUMNS}
_ADD: Final = f"""
    INSERT INTO run_commits AS c ({", ".join(_COLUMNS)}) SELECT * FROM unnest({", ".join(_ARRAYS.values())})
    ON CONFLICT ({", ".join(KEY)}) DO UPDATE SET {", ".join(f"{name} = c.{name} + excluded.{name}" for name in SUMS)}
"""
_DROP: Final = f"""
    DELETE FROM run_commits USING unnest({", ".join(_ARRAYS[name] for name in KEY)}) AS k ({", ".join(KEY)})
    WHERE runs <= 0 AND {" AND ".join(f"run_commits.{name} = k.{name}" for name in KEY)}
"""
_STORED: Final = f"SELECT {', '.join(_COLUMNS)} FROM run_commits"
# One statement, so that nothing is added up between the log and the cells; the log comes first. What is made by itself
# (MATERIALIZED) keeps both in one process: parallel workers would mix their rows.
READ: Final = f"""
    WITH waiting AS MATERIALIZED (
        SELECT '[' || string_agg(facts, ',') || ']' AS log FROM run_deltas WHERE facts <> ''
    )
    SELECT {", ".join(f"NULL AS {name}" for name in _COLUMNS)}, log FROM waiting
    UNION ALL SELECT *, NULL FROM (
        {_STORED} WHERE slot >= %s AND slot < %s AND runs > 0 ORDER BY slot DESC
    ) AS stored
"""


_without_log: Final = itemgetter(slice(len(_COLUMNS)))
_slot_of: Final = itemgetter(KEY.index("slot"))


def add_up(plain: Plain, cells: Mapping[Key, Sums]) -> None:
    """Add to the cells; one of which no runs are left goes."""
    if cells:
        rows = sorted((*key, *sums) for key, sums in cells.items())
        plain.execute(_ADD, by_column(rows))
    if emptied := [key for key, (runs, *_) in cells.items() if runs <= 0]:
        plain.execute(_DROP, by_column(emptied))


def stored(plain: Plain) -> dict[Key, Sums]:
    """Return every cell, without the log."""
    return {row[: len(KEY)]: row[len(KEY) :] for row in plain.execute(_STORED)}


def fetch_cells(plain: Plain, first: int, end: int) -> Iterator[Cell]:
    """Yield the cells of the slots from the first one to that before the end, of each pair the newest ones."""
    rows = iter(plain.execute(READ, (first, end)))
    log = read_log(next(rows)[-1])
    slots = groupby(map(_without_log, rows), key=_slot_of)
    return merge(log, first, end, ([*cells] for _, cells in slots))
