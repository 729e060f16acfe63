"""The cells of commits as plain numbers: what a log adds to them, and which of them are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import add
from typing import Any, Final

from telemetryd.engine.stats_log import Summary
from telemetryd.model.commit_cells import MAX_CELLS, SLOT_HOURS, Cell
from telemetryd.model.stats import hour_number
from telemetryd.model.values import Status

_HOUR_S: Final = 3600
KEY: Final = ("agent_name", "job_type", "git_commit_hash", "slot")
"""The columns that name a cell, in the order of `Cell`."""
SUMS: Final = ("runs", "failures", "timed", "bins", "seconds")
"""Those that count its runs; they follow in that order."""
Key = tuple[str, str, str, int]
Sums = tuple[int, ...]


def cells_of(summary: Summary) -> dict[Key, Sums]:
    """Return what a summary adds to the cells; what adds nothing is left out."""
    cells: dict[Key, list[int]] = {}
    for (hour, agent_name, job_type, status, commit), (sums, bins) in summary.items():
        if status == Status.RUNNING:
            continue
        slot, after = divmod(hour_number(hour), SLOT_HOURS)
        runs, *_, seconds = sums
        added = [runs, runs, 0, 0, after * _HOUR_S * runs + seconds]
        if status == Status.SUCCESS:
            added[1:4] = 0, sum(bins.values()), sum(number * count for number, count in bins.items())
        key = agent_name, job_type, commit, slot
        cells[key] = [*map(add, cells[key], added)] if key in cells else added
    return {key: (*sums,) for key, sums in cells.items() if any(sums)}


def merge(log: Summary, first: int, end: int, rows: Iterable[Sequence[Any]]) -> Iterator[Cell]:
    """Yield cells as they are with the log, of each pair at most `MAX_CELLS` and those that the log changes.

    Args:
        log: what is not added up yet.
        first: the first slot that is wanted.
        end: the slot after the last one.
        rows: the cells without the log, the newest slots first.

    """
    waiting = {key: sums for key, sums in cells_of(log).items() if first <= key[-1] < end}
    taken = Counter(key[:2] for key in waiting)
    for row in rows:
        sums = waiting.pop((*row[:4],), None) if waiting else None
        if sums is not None:
            cell = Cell(*row[:4], *map(add, row[4:], sums))
            if cell.runs > 0:
                yield cell
            continue
        pair = row[0], row[1]
        if taken[pair] < MAX_CELLS and row[len(KEY)] > 0:
            taken[pair] += 1
            yield Cell._make(row)
    yield from (Cell(*key, *sums) for key, sums in waiting.items() if sums[0] > 0)


def differences(expected: Mapping[Key, Sums], kept: Mapping[Key, Sums]) -> int:
    """Return how many cells are not what they should be."""
    return sum(expected.get(key) != kept.get(key) for key in {*expected, *kept})


def with_log(kept: Mapping[Key, Sums], log: Mapping[Key, Sums]) -> dict[Key, Sums]:
    """Return cells as they will be when the log is added up."""
    together = {**kept}
    for key, sums in log.items():
        together[key] = (*map(add, kept[key], sums),) if key in kept else sums
    return {key: sums for key, sums in together.items() if any(sums)}
