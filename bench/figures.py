"""What a scenario finds: a value, what it is compared with, and the target of the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Unit(StrEnum):
    """What values are counted in."""

    REQUESTS = "requests/s"
    ROWS = "rows/s"
    SECONDS = "s"
    MIB = "MiB"


@dataclass(frozen=True, slots=True)
class Target:
    """The ratio that is to be reached, or not to be exceeded."""

    ratio: float
    is_floor: bool

    def is_met(self, ratio: float) -> bool:
        """Tell whether a ratio meets it."""
        return ratio >= self.ratio if self.is_floor else ratio <= self.ratio

    def __str__(self) -> str:
        return f"{'≥' if self.is_floor else '≤'} {show_ratio(self.ratio, self)}"


def at_least(ratio: float) -> Target:
    """Return the target of a ratio that is to be reached."""
    return Target(ratio, is_floor=True)


def at_most(ratio: float) -> Target:
    """Return the target of a ratio that must not be exceeded."""
    return Target(ratio, is_floor=False)


@dataclass(frozen=True, slots=True)
class Samples:
    """The values that the rounds found for one contender."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The value that counts."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report."""

    load: str
    unit: Unit
    reached: Samples
    reference: Samples
    target: Target

    @property
    def ratio(self) -> float:
        """The reached value as a multiple of the reference."""
        return self.reached.median / self.reference.median

    @property
    def is_met(self) -> bool:
        """Tell whether the target is met."""
        return self.target.is_met(self.ratio)

    @property
    def headroom(self) -> float:
        """How much better than the target it is: 1 is just met, 2 is twice as good, 0.5 half as good."""
        return self.ratio / self.target.ratio if self.target.is_floor else self.target.ratio / self.ratio

    def to_json(self) -> dict[str, Any]:
        """Return everything about it."""
        return {
            "load": self.load,
            "unit": self.unit,
            "reached": {"name": self.reached.name, "median": self.reached.median, "rounds": self.reached.values},
            "reference": {
                "name": self.reference.name,
                "median": self.reference.median,
                "rounds": self.reference.values,
            },
            "ratio": self.ratio,
            "target": {"comparison": "at least" if self.target.is_floor else "at most", "ratio": self.target.ratio},
            "met": self.is_met,
        }


def constant(name: str, value: float) -> Samples:
    """Return a reference that is not measured."""
    return Samples(name, (value,))


def by_name(samples: Sequence[Samples]) -> dict[str, Samples]:
    """Return samples under their names."""
    return {sample.name: sample for sample in samples}


def show_value(value: float, unit: Unit) -> str:
    """Return a value for people: 13,850/s, 1.23 ms, 84 MiB."""
    match unit:
        case Unit.SECONDS:
            return f"{value * 1000:,.2f} ms"
        case Unit.MIB:
            return f"{value:,.0f} MiB"
        case _:
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:,.1f} {unit}"


def show_ratio(ratio: float, target: Target) -> str:
    """Return a ratio for people, as a percentage where the target is a part of something."""
    if target.ratio < 1:
        return f"{ratio * 100:.0f} %"
    return f"{ratio:,.2f} ×" if ratio < 10 else f"{ratio:,.1f} ×"
