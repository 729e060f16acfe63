"""How the other agents did: the slots in which they failed as well, and what became of them meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from statistics import median
from typing import Final

from telemetryd.model.change_points import BIN, Measure, Spell
from telemetryd.model.commit_cells import SLOT_HOURS, Cell

EXCESS: Final = 0.1
"""By how much the share of the others' runs that fail must exceed the usual one in an outage."""
DEVIATIONS: Final = 3.5
"""By how many standard deviations of a binomial count it must."""
USUAL_FOR: Final = 7 * 24 // SLOT_HOURS
"""The slots before, and those after, that tell what is usual: of them an outage is the smaller part."""
LEAST: Final = 0.1
"""The share of failures that is usual at least: where there are few runs, half of the slots have no failure."""
AS_WELL: Final = 0.5
"""The part of a change that the others' change must reach to be the same."""


@dataclass(frozen=True, slots=True)
class Others:
    """What became of the other agents while one agent's runs became worse."""

    agents: int
    """Those with runs on both sides."""
    before: int
    """Their runs: finished ones for the success rate, successful ones with a duration for the duration."""
    after: int
    was: float | None
    """Their success rate before; or 1, for durations. None if there are no others."""
    became: float | None
    """Their success rate since; or the factor of their durations, each pair compared with itself."""
    as_well: bool
    """Whether they became worse by half as much or more."""


class Neighbours:
    """How each agent and all agents did in each slot.

    Args:
        pairs: the cells of each agent and job type.

    """

    def __init__(self, pairs: Mapping[tuple[str, str], Sequence[Cell]]) -> None:
        self._pairs = pairs
        self._all: dict[int, list[int]] = {}
        self._own: dict[str, dict[int, list[int]]] = defaultdict(dict)
        for (agent_name, _), cells in pairs.items():
            own = self._own[agent_name]
            for _, _, _, slot, runs, failures, *_ in cells:
                for counts in (self._all, own):
                    kept = counts.setdefault(slot, [0, 0])
                    kept[0] += runs
                    kept[1] += failures
        self._outages: dict[str, frozenset[int]] = {}

    def outages_of(self, agent_name: str) -> frozenset[int]:
        """Return the slots in which the agents other than this one failed far more often than before and after."""
        found = self._outages.get(agent_name)
        if found is None:
            found = self._outages[agent_name] = outages(self._others_of(agent_name))
        return found

    def _others_of(self, agent_name: str) -> dict[int, tuple[int, int]]:
        own = self._own[agent_name]
        nothing = (0, 0)
        others = {}
        for slot, (runs, failures) in self._all.items():
            own_runs, own_failures = own.get(slot, nothing)
            if runs > own_runs:
                others[slot] = runs - own_runs, failures - own_failures
        return others

    def meanwhile(self, agent_name: str, measure: Measure, before: Spell, since: Spell) -> Others:
        """Return what became of the others while one agent became worse, apart from the slots that are left out."""
        left_out = self.outages_of(agent_name) if measure == "success_rate" else frozenset[int]()
        first, border, last = before.slots[0][0], since.blocks[0].slots[0][0], since.slots[-1][0]
        agents = set()
        sums = [0, 0, 0, 0]
        growth = weight = 0.0
        for (other, _), cells in self._pairs.items():
            if other == agent_name:
                continue
            own = [0, 0, 0, 0]
            for _, _, _, slot, runs, failures, timed, bins, _ in cells:
                if first <= slot <= last and slot not in left_out:
                    place = 2 if slot >= border else 0
                    own[place] += runs if measure == "success_rate" else timed
                    own[place + 1] += failures if measure == "success_rate" else bins
            if own[0] and own[2]:
                agents.add(other)
                share = own[0] * own[2] / (own[0] + own[2])
                growth += share * (own[3] / own[2] - own[1] / own[0])
                weight += share
                sums = [kept + more for kept, more in zip(sums, own, strict=True)]
        if not agents:
            return Others(0, 0, 0, None, None, as_well=False)
        step = growth / weight
        as_well = step >= AS_WELL * (since.mean - before.mean)
        if measure == "duration":
            return Others(len(agents), sums[0], sums[2], 1.0, exp(step * BIN), as_well)
        return Others(len(agents), sums[0], sums[2], 1 - sums[1] / sums[0], 1 - sums[3] / sums[2], as_well)


def outages(others: Mapping[int, tuple[int, int]]) -> frozenset[int]:
    """Return the slots in which runs fail far more often than in the week before and than in the week after.

    A change for good is no outage: after it, it is what is usual.

    Args:
        others: for each slot with any, the runs and the failures among them.

    """
    slots = sorted(others)
    rates = [others[slot][1] / others[slot][0] for slot in slots]
    found = set()
    for place, slot in enumerate(slots):
        runs, failures = others[slot]
        if rates[place] < LEAST + EXCESS:
            continue
        end = max(place, USUAL_FOR)
        begin = max(min(place + 1, len(slots) - USUAL_FOR), 0)
        weeks = rates[max(end - USUAL_FOR, 0) : end], rates[begin : begin + USUAL_FOR]
        usual = max(LEAST, *map(median, weeks))
        deviation = sqrt(runs * usual * (1 - usual))
        if rates[place] >= usual + EXCESS and failures - runs * usual >= DEVIATIONS * deviation:
            found.add(slot)
    return frozenset(found)
