"""The cells of commits as plain numbers: what a log adds to them, and which of them are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import add, itemgetter
from typing import Any, Final

from telemetryd.engine.stats_log import Summary
from telemetryd.model.commit_cells import MAX_CELLS, SLOT_HOURS, Cell, slot_of
from telemetryd.model.regressions import FindRegressions, begin_of
from telemetryd.model.stats import hour_number
from telemetryd.model.values import Status

_HOUR_S: Final = 3600
KEY: Final = ("agent_name", "job_type", "git_commit_hash", "slot")
"""The columns that name a cell, in the order of `Cell`."""
SUMS: Final = ("runs", "failures", "timed", "bins", "seconds")
"""Those that count its runs; they follow in that order."""
FINISHED: Final = tuple(str(status) for status in Status if status is not Status.RUNNING)
"""The statuses of the runs that count."""
Key = tuple[str, str, str, int]
Sums = tuple[int, ...]


_SLOT: Final = KEY.index("slot")
_pair_of: Final = itemgetter(0, 1)


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


def slots_of(query: FindRegressions) -> tuple[int, int]:
    """Return the first slot of a query, and the one after that in which the moment before its end lies."""
    last = slot_of(query.end)
    return slot_of(query.start), last + (query.end > begin_of(last))


def merge(log: Summary, first: int, end: int, slots: Iterable[Sequence[Sequence[Any]]]) -> Iterator[Cell]:
    """Yield cells as they are with the log, of each pair those of the newest slots until they are `MAX_CELLS`.

    Args:
        log: what is not added up yet.
        first: the first slot that is wanted.
        end: the slot after the last one.
        slots: the cells without the log, a slot at a time, the newest one first.

    """
    waiting: dict[int, dict[Key, Sums]] = {}
    for key, sums in cells_of(log).items():
        if first <= key[-1] < end:
            waiting.setdefault(key[-1], {})[key] = sums
    taken: Counter[tuple[str, str]] = Counter()
    for slot in _together(waiting, slots):
        rows = slot
        pairs = Counter(map(_pair_of, rows))
        if full := {pair for pair in pairs if taken[pair] >= MAX_CELLS}:
            rows = [row for row in rows if _pair_of(row) not in full]
        taken.update(pairs)
        yield from map(Cell._make, rows)


def _together(
    waiting: dict[int, dict[Key, Sums]], slots: Iterable[Sequence[Sequence[Any]]]
) -> Iterator[Sequence[Sequence[Any]]]:
    """Yield the cells of each slot that is stored or waits to be, the newest one first."""
    for stored in slots:
        place = stored[0][_SLOT]
        for newer in sorted((slot for slot in waiting if slot > place), reverse=True):
            yield _with_added((), waiting.pop(newer))
        yield _with_added(stored, waiting.pop(place)) if place in waiting else stored
    for left in sorted(waiting, reverse=True):
        yield _with_added((), waiting[left])


def _with_added(stored: Iterable[Sequence[Any]], added: Mapping[Key, Sums]) -> list[tuple[Any, ...]]:
    kept: dict[Key, Sums] = {(row[0], row[1], row[2], row[3]): (*row[len(KEY) :],) for row in stored}
    return [(*key, *sums) for key, sums in with_log(kept, added).items() if sums[0] > 0]


def differences(expected: Mapping[Key, Sums], kept: Mapping[Key, Sums]) -> int:
    """Return how many cells are not what they should be."""
    return sum(expected.get(key) != kept.get(key) for key in {*expected, *kept})


def with_log(kept: Mapping[Key, Sums], log: Mapping[Key, Sums]) -> dict[Key, Sums]:
    """Return cells as they will be when the log is added up."""
    together = {**kept}
    for key, sums in log.items():
        together[key] = (*map(add, kept[key], sums),) if key in kept else sums
    return {key: sums for key, sums in together.items() if any(sums)}
