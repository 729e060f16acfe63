"""Tells since which commit one pair's runs are worse, by whole days, because runs of a day resemble each other."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import log, sqrt
from operator import mul
from random import Random
from typing import Final, Literal, NamedTuple

from telemetryd.model.commit_cells import SLOT_HOURS, Cell

Measure = Literal["success_rate", "duration"]
MEASURES: Final[tuple[Measure, ...]] = ("success_rate", "duration")

ALPHA: Final = 0.01
"""How likely it is at most that a pair of agent and job type in which no commit changes anything gives a finding."""
SHUFFLES: Final = 999
"""In how many orders of the days a difference is looked for, besides the one that there was."""
MOST_KEPT: Final = 512
"""Slots or days, the orders of which are kept in memory: of four months, or of more than a year."""
MIN_RUNS: Final = 5
"""Runs that there must be on each side of a commit."""
MIN_DAYS: Final = 4
"""Days with runs that there must be on each side of a commit, or it is too early to tell."""
OUTAGE: Final = 72 // SLOT_HOURS
"""Slots in a row that do not count as proof: nobody can tell an agent's own outage of three days from a bad commit."""
SLOTS_OF_DAY: Final = 24 // SLOT_HOURS
MIN_FALL: Final = 0.05
"""The smallest fall of the success rate, however certain it is, that is worth a finding."""
MIN_GROWTH: Final = 1.2
"""The smallest factor of the median duration, however certain it is, that is worth a finding."""
BIN: Final = log(1.01 / 0.99)
"""What two neighbouring bins of `sketches` differ by, as a logarithm."""
PARTS: Final = 3
"""The number of parts of the runs since a commit, each of which must be worse."""
LASTING: Final = 0.5
"""The part of the difference that must be left without three days of outage."""
SUDDEN: Final = 1 / 3
"""The part of the difference that the days next to the commit must show."""
BESIDE: Final = 3.5
"""By how many standard errors a step must remain next to a straight line."""
BETTER: Final = 12.0
"""By how many variances of a run a step must describe the days better than a straight line."""
NEAR: Final = 3
"""Days on either side of a commit that must differ as well: what changes slowly does not."""


class Block(NamedTuple):
    """The runs of a commit that count for a measure: what `worse` sums up is more when they are worse."""

    commit: str
    slots: tuple[tuple[int, int, int], ...]
    """Each slot, its runs, and their badness: the failures, or the bins of the durations."""
    runs: int
    badness: int


@dataclass(frozen=True)
class Spell:
    """The runs of some commits in a row."""

    blocks: Sequence[Block]

    @cached_property
    def runs(self) -> int:
        """Return how many there are."""
        return sum(block.runs for block in self.blocks)

    @cached_property
    def mean(self) -> float:
        """Return their mean badness."""
        return sum(block.badness for block in self.blocks) / self.runs

    @cached_property
    def slots(self) -> list[tuple[int, int, int]]:
        """Return the sums by slot, in order."""
        return _added(part for block in self.blocks for part in block.slots)

    @cached_property
    def days(self) -> list[tuple[int, int, int]]:
        """Return the sums by day of UTC, in order."""
        return _added((slot // SLOTS_OF_DAY, runs, badness) for slot, runs, badness in self.slots)


def _added(parts: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    sums: dict[int, list[int]] = {}
    for when, runs, badness in parts:
        kept = sums.get(when)
        if kept is None:
            sums[when] = [runs, badness]
        else:
            kept[0] += runs
            kept[1] += badness
    return [(when, runs, badness) for when, (runs, badness) in sorted(sums.items())]


@dataclass(frozen=True, slots=True)
class Change:
    """A commit since which runs are worse."""

    before: Spell
    since: Spell
    p_value: float
    """How likely such a difference would be at any commit and in either measure if days came in any order."""
    is_early: bool
    """Whether there are too few days on one of its sides to tell."""


def in_order(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Return the cells of each commit, the commits by their first slot and, within it, by when their runs came."""
    by_commit: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.commit:
            by_commit[cell.commit].append(cell)
    for several in by_commit.values():
        several.sort(key=lambda cell: cell.slot)
    return sorted(by_commit.values(), key=_begin)


def _begin(cells: Sequence[Cell]) -> tuple[object, ...]:
    first = cells[0]
    return first.slot, first.seconds / first.runs, first.runs, first.failures, first.timed, first.bins, first.commit


def blocks_of(measure: Measure, commits: Iterable[Sequence[Cell]], left_out: frozenset[int]) -> list[Block]:
    """Return the runs that count of each commit that has any, in the same order."""
    found = []
    for cells in commits:
        if measure == "success_rate":
            slots = tuple((cell.slot, cell.runs, cell.failures) for cell in cells if cell.slot not in left_out)
        else:
            slots = tuple((cell.slot, cell.timed, cell.bins) for cell in cells if cell.timed)
        if slots:
            found.append(Block(cells[0].commit, slots, sum(each[1] for each in slots), sum(each[2] for each in slots)))
    return found


def find(measure: Measure, blocks: Sequence[Block]) -> list[Change]:
    """Return the changes for the worse between commits, in order; `blocks` as `blocks_of` returns them.

    Where the last one has too few days on one of its sides, it is too early to tell.
    """
    changes = _changes(measure, blocks)
    borders = [0, *(place for place, _ in changes), len(blocks)]
    found = []
    for (place, p_value), first, last in zip(changes, borders[:-2], borders[2:], strict=True):
        before, since = Spell(blocks[first:place]), Spell(blocks[place:last])
        if _is_enough(before, since) and _is_a_commits(measure, before, since) and _is_lasting(before, since):
            found.append(Change(before, since, p_value, is_early=False))
    early = None if found and found[-1].since.blocks[-1] is blocks[-1] else _early(measure, blocks)
    return found if early is None else [*found, early]


def _early(measure: Measure, blocks: Sequence[Block]) -> Change | None:
    """Return what has been worse for some days at most, or was better for some days at most."""
    place = locate(measure, blocks, 1, is_early=True)
    if place is None:
        return None
    before, since = Spell(blocks[:place]), Spell(blocks[place:])
    if not _is_a_commits(measure, before, since):
        return None
    whole = Spell(blocks)
    p_value, is_worse = permuted([badness - runs * whole.mean for _, runs, badness in whole.slots])
    return Change(before, since, p_value, is_early=True) if is_worse and p_value <= ALPHA else None


def _is_enough(before: Spell, since: Spell) -> bool:
    return len(before.days) >= MIN_DAYS and len(since.days) >= MIN_DAYS


def _is_a_commits(measure: Measure, before: Spell, since: Spell) -> bool:
    """Return whether a change looks like one that a commit makes: large, steady, and at once."""
    return (
        is_worse(measure, before.mean, since.mean)
        and _is_steady(before, since)
        and _is_sudden(before, since)
        and _is_step(before, since)
    )


def is_worse(measure: Measure, before: float, since: float) -> bool:
    """Return whether a difference is large enough to be worth a finding."""
    return since - before >= (MIN_FALL if measure == "success_rate" else log(MIN_GROWTH) / BIN)


def _is_steady(before: Spell, since: Spell) -> bool:
    """Return whether each part of the runs since, in order, shows at least such a part of the difference."""
    least = before.mean + (since.mean - before.mean) / PARTS
    parts = [[0, 0] for _ in range(PARTS)]
    runs = 0
    for _, more, badness in since.slots:
        part = parts[min(PARTS * (2 * runs + more) // (2 * since.runs), PARTS - 1)]
        part[0] += more
        part[1] += badness
        runs += more
    return all(badness >= least * runs for runs, badness in parts)


def _is_lasting(before: Spell, since: Spell) -> bool:
    """Return whether the runs since are worse even without their worst three days in a row.

    Nobody can tell an agent's own outage of such a length from a bad commit, so it must not be all there is.
    """
    slots = since.slots
    excess = [badness - runs * before.mean for _, runs, badness in slots]
    first, current, most, worst = 0, 0.0, 0.0, (0, 0)
    for last, (slot, _, _) in enumerate(slots):
        current += excess[last]
        while slot - slots[first][0] >= OUTAGE:
            current -= excess[first]
            first += 1
        if current > most:
            most, worst = current, (first, last + 1)
    rest = slots[: worst[0]] + slots[worst[1] :]
    runs = sum(runs for _, runs, _ in rest)
    badness = sum(badness for _, _, badness in rest)
    return runs >= MIN_RUNS and badness - runs * before.mean >= runs * (since.mean - before.mean) * LASTING


def _is_sudden(before: Spell, since: Spell) -> bool:
    """Return whether the days next to the commit differ as well."""
    sides = before.days[-NEAR:], since.days[:NEAR]
    good, bad = (sum(badness for *_, badness in days) / sum(runs for _, runs, _ in days) for days in sides)
    return bad - good >= (since.mean - before.mean) * SUDDEN


def _is_step(before: Spell, since: Spell) -> bool:
    """Return whether a step describes the days better than a straight line does, and remains next to one.

    The days are weighted by their runs; the step next to a line is tested by Student's t.
    """
    parts: dict[int, list[int]] = {}
    for spell, is_since in ((before, 0), (since, 1)):
        for day, runs, badness in spell.days:
            kept = parts.setdefault(day, [0, 0, 0])
            kept[0] += runs
            kept[1] += badness
            kept[2] += runs * is_since
    total = before.runs + since.runs
    middle = sum(day * runs for day, (runs, *_) in parts.items()) / total
    mean = sum(badness for _, badness, _ in parts.values()) / total
    part = since.runs / total
    days = [
        (runs, day - middle, badness / runs - mean, new / runs - part) for day, (runs, badness, new) in parts.items()
    ]
    xx = sum(runs * x * x for runs, x, _, _ in days)
    xy = sum(runs * x * y for runs, x, y, _ in days)
    xs = sum(runs * x * s for runs, x, _, s in days)
    ss = sum(runs * s * s for runs, _, _, s in days)
    sy = sum(runs * s * y for runs, _, y, s in days)
    yy = sum(runs * y * y for runs, _, y, _ in days)
    freedom = len(days) - 3
    alone = ss - xs * xs / xx if xx else 0.0
    if freedom < 1 or alone <= 1e-9 * ss:
        return True
    step = sy - xs * xy / xx
    rest = yy - xy * xy / xx - step * step / alone
    noise = max(rest, 1e-9 * yy) / freedom
    return step > 0 and step * step / alone >= BESIDE**2 * noise and sy * sy / ss - xy * xy / xx >= BETTER * noise


def _changes(measure: Measure, blocks: Sequence[Block]) -> list[tuple[int, float]]:
    found: list[tuple[int, float]] = []
    waiting = [(0, len(blocks))]
    while waiting:
        first, last = waiting.pop()
        if last - first < 2:
            continue
        tested = _surest(measure, blocks[first:last])
        if tested is not None:
            place = first + tested[0]
            found.append((place, tested[1]))
            waiting += [(first, place), (place, last)]
    return sorted(found)


def _surest(measure: Measure, blocks: Sequence[Block]) -> tuple[int, float] | None:
    spell = Spell(blocks)
    days = spell.days
    if len(days) < 4:
        return None
    scores = [x - n * spell.mean for _, n, x in days]
    p_value, sign = permuted(scores)
    place = locate(measure, blocks, sign) if p_value <= ALPHA else None
    return None if place is None else (place, p_value)


def permuted(scores: Sequence[float], shuffles: int = SHUFFLES) -> tuple[float, int]:
    """Return how likely so large a step is in either measure if the scores come in any order, and its direction.

    The orders are always the same for as many scores. What is likelier than `ALPHA` counts as 1. The worse is 1.
    """
    size = len(scores)
    if size < 2:
        return 1.0, 0  # there is one order only
    weights = _weights(size)
    steps = [*map(mul, accumulate(scores), weights)]
    low, high = min(steps), max(steps)
    seen = max(-low, high) * (1 - 1e-9)
    if seen <= 0:
        return 1.0, 0
    sign = 1 if -low >= high else -1
    most = int(ALPHA / len(MEASURES) * (shuffles + 1)) - 1
    count = 0
    value = scores.__getitem__
    for order in _orders(size, shuffles):
        steps = [*map(mul, accumulate(map(value, order)), weights)]
        if max(steps) >= seen or -min(steps) >= seen:
            count += 1
            if count > most:
                return 1.0, sign
    return len(MEASURES) * (1 + count) / (shuffles + 1), sign


@lru_cache(maxsize=32)
def _weights(size: int) -> tuple[float, ...]:
    return tuple(1 / sqrt(place * (size - place) / size) for place in range(1, size))


def _orders(size: int, number: int) -> Iterable[Sequence[int]]:
    """Return the same orders each time, so that the same runs give the same answer."""
    return _kept_orders(size, number) if size <= MOST_KEPT else _passing_orders(size, number)


@lru_cache(maxsize=32)
def _kept_orders(size: int, number: int) -> tuple[array[int], ...]:
    random = Random(size)  # noqa: S311 - see above
    places = range(size)
    return tuple(array("H", random.sample(places, size)) for _ in range(number))


def _passing_orders(size: int, number: int) -> Iterator[Sequence[int]]:
    """Yield orders in less time and memory, of which mostly few are asked for: sorted by random numbers of 64 bits."""
    random = Random(size)  # noqa: S311 - see above
    for _ in range(number):
        yield sorted(range(size), key=memoryview(random.randbytes(8 * size)).cast("Q").__getitem__)


def locate(measure: Measure, blocks: Sequence[Block], sign: int, *, is_early: bool = False) -> int | None:
    """Return where between commits a change is likeliest.

    Args:
        measure: what changes.
        blocks: at least two.
        sign: 1 for the worse, -1 for the better.
        is_early: whether only such places count as have too few days on one of their sides.

    """
    total_n = sum(b.runs for b in blocks)
    total_x = sum(b.badness for b in blocks)
    n = x = 0
    early = _early_places(blocks) if is_early else ()
    best, where = 0.0, None
    for place, block in enumerate(blocks[:-1], 1):
        n += block.runs
        x += block.badness
        m, y = total_n - n, total_x - x
        if n < MIN_RUNS or m < MIN_RUNS:
            continue
        step = y / m - x / n
        if step * sign <= 0 or (is_early and not early[place]):
            continue
        value = _llh(x, n) + _llh(y, m) if measure == "success_rate" else step * step * n * m / total_n
        if where is None or value > best:
            best, where = value, place
    return where


def _llh(x: int, n: int) -> float:
    return (x * log(x / n) if x else 0.0) + ((n - x) * log((n - x) / n) if x < n else 0.0)


def _early_places(blocks: Sequence[Block]) -> list[bool]:
    """Return for each place whether there are too few days before it, or since."""

    def few(several: Iterable[Block]) -> list[bool]:
        days: set[int] = set()
        found = [True]
        for block in several:
            if len(days) < MIN_DAYS:
                days.update(slot // SLOTS_OF_DAY for slot, _, _ in block.slots)
            found.append(len(days) < MIN_DAYS)
        return found

    return [before or since for before, since in zip(few(blocks), reversed(few(reversed(blocks))), strict=True)]
