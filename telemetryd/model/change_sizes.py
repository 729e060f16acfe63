"""How large a change is, with its interval: runs of a day resemble each other, so days count, not runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt
from typing import Final

from telemetryd.model.change_points import BIN, Measure, Spell
from telemetryd.model.intervals import student, wilson

_FEWEST: Final = 3
"""Days on each side without which there is no interval."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A change: the difference of success rates, or the factor of durations."""

    value: float
    low: float | None
    """The bounds between which it lies with 95 % certainty; None if there are too few days to tell."""
    high: float | None


def effect_of(measure: Measure, before: Spell, since: Spell) -> Effect:
    """Return how large a change is."""
    step = since.mean - before.mean
    sides = (before, since)
    days = min(len(side.days) for side in sides)
    low: float | None = None
    high: float | None = None
    if days < _FEWEST:
        pass
    elif measure == "success_rate":
        # Newcombe's interval (1998, method 10) of Wilson's, with as many runs as the days show to be independent.
        (worst, best), (lower, upper) = (_wilson(side) for side in sides)
        low = step - sqrt((since.mean - lower) ** 2 + (best - before.mean) ** 2)
        high = step + sqrt((upper - since.mean) ** 2 + (before.mean - worst) ** 2)
    else:
        reach = student(days - 1) * sqrt(sum(variance(side) for side in sides))
        low, high = step - reach, step + reach
    if measure == "success_rate":
        return Effect(-step, None if high is None else -high, None if low is None else -low)
    return Effect(exp(step * BIN), *(None if bound is None else exp(bound * BIN) for bound in (low, high)))


def variance(side: Spell) -> float:
    """Return the variance of a side's mean, of which each day is one sample (Cochran's for a ratio)."""
    days = len(side.days)
    deviations = sum((badness - runs * side.mean) ** 2 for _, runs, badness in side.days)
    return deviations / side.runs**2 * days / (days - 1)


def _wilson(side: Spell) -> tuple[float, float]:
    independent = side.mean * (1 - side.mean) / side.runs
    alike = max(1.0, variance(side) / independent) if independent else 1.0
    return wilson(side.mean, side.runs / alike, student(len(side.days) - 1))
