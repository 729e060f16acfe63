"""What a scenario finds: a value, what it is compared with, and the target for the value or for their ratio."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Unit(StrEnum):
    """What values are counted in."""

    REQUESTS = "requests/s"
    ROWS = "rows/s"
    SECONDS = "s"
    BYTES = "bytes"
    MIB = "MiB"
    RATIO = "×"


@dataclass(frozen=True, slots=True)
class Target:
    """The bound that is to be reached, or not to be exceeded: by the ratio, or in another unit by the value itself.

    Bounds of a value are absolute: whether they are met depends on the machine.
    """

    bound: float
    is_floor: bool
    unit: Unit

    def is_met(self, measured: float) -> bool:
        """Tell whether a value or ratio meets it."""
        return measured >= self.bound if self.is_floor else measured <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.is_floor else '≤'} {show_value(self.bound, self.unit)}"


def at_least(bound: float, unit: Unit = Unit.RATIO) -> Target:
    """Return the target of what is to be reached."""
    return Target(bound, is_floor=True, unit=unit)


def at_most(bound: float, unit: Unit = Unit.RATIO) -> Target:
    """Return the target of what must not be exceeded."""
    return Target(bound, is_floor=False, unit=unit)


@dataclass(frozen=True, slots=True)
class Samples:
    """The values that the rounds found for one contender."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The value that counts."""
        return statistics.median(self.values)

    def to_json(self) -> dict[str, Any]:
        """Return everything about them."""
        return {"name": self.name, "median": self.median, "rounds": self.values}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Samples:
        """Return what `to_json` was made of."""
        return cls(given["name"], tuple(given["rounds"]))


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report. Some values have nothing to be compared with, and some lines only inform."""

    load: str
    unit: Unit
    reached: Samples
    reference: Samples | None = None
    target: Target | None = None

    @property
    def ratio(self) -> float | None:
        """The reached value as a multiple of the reference."""
        return self.reached.median / self.reference.median if self.reference else None

    @property
    def is_met(self) -> bool | None:
        """Tell whether the target is met, if there is one."""
        if self.target is None:
            return None
        measured = self.ratio if self.target.unit is Unit.RATIO else self.reached.median
        if measured is None:
            raise ValueError(f"{self.load}: a target for a ratio without a reference")
        return self.target.is_met(measured)

    def to_json(self) -> dict[str, Any]:
        """Return everything about it."""
        target = self.target
        return {
            "load": self.load,
            "unit": self.unit,
            "reached": self.reached.to_json(),
            "reference": self.reference and self.reference.to_json(),
            "ratio": self.ratio,
            "target": target
            and {
                "comparison": "at least" if target.is_floor else "at most",
                "bound": target.bound,
                "unit": target.unit,
            },
            "met": self.is_met,
        }

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Figure:
        """Return what `to_json` was made of."""
        reference, target = given["reference"], given["target"]
        return cls(
            given["load"],
            Unit(given["unit"]),
            Samples.from_json(given["reached"]),
            reference and Samples.from_json(reference),
            target and Target(target["bound"], target["comparison"] == "at least", Unit(target["unit"])),
        )


def show_value(value: float, unit: Unit) -> str:
    """Return a value for people: 13,850 rows/s, 1.23 ms, 3.5 KB, 84 MiB."""
    match unit:
        case Unit.SECONDS:
            return _show_seconds(value)
        case Unit.BYTES:
            return f"{value / 1000:,.1f} KB"
        case Unit.MIB:
            return f"{value:,.0f} MiB"
        case Unit.RATIO:
            return f"{value:,.2f} ×" if value < 10 else f"{value:,.1f} ×"
        case Unit.REQUESTS | Unit.ROWS:
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:,.1f} {unit}"


def _show_seconds(value: float) -> str:
    if value < 0.001:
        return f"{value * 1e6:,.0f} µs"
    if value < 0.1:
        return f"{value * 1000:,.2f} ms"
    return f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.1f} s"
