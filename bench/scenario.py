"""What every scenario is given, and how contenders take turns."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.figures import Samples, Unit, show_value
from bench.seeding import Seeds
from bench.workplace import Workplace

Measure = Callable[[], float]
"""Measures one contender once, from a fresh start to the check of what it stored."""


@dataclass(frozen=True, slots=True)
class Options:
    """How thoroughly to measure: seconds of each load, rounds, and the sizes of the databases."""

    seconds: float = 2
    rounds: int = 5
    large: bool = False
    runs: int = 100_000

    @property
    def big(self) -> int:
        """Runs in the database that is called big."""
        return 100 * self.runs if self.large else self.runs

    @property
    def small(self) -> int:
        """Runs in the database that the big one is compared with."""
        return self.runs if self.large else self.runs // 10

    @property
    def export(self) -> int:
        """Runs that are exported or migrated at once: a million of ten."""
        return self.big // 10

    @property
    def few(self) -> int:
        """Rounds of what takes long."""
        return min(self.rounds, 3)

    @property
    def full_load_s(self) -> float:
        """How long memory is watched: ten minutes, or 20 s in the short benchmark, by default."""
        return self.seconds * (300 if self.large else 10)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a scenario works with."""

    options: Options
    place: Workplace
    seeds: Seeds
    say: Callable[[str], None]

    def alternate(self, unit: Unit, contenders: Mapping[str, Measure], rounds: int | None = None) -> dict[str, Samples]:
        """Measure the contenders in turn, round after round, so that what drifts hits all of them."""
        values: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds or self.options.rounds):
            for name, measure in contenders.items():
                os.sync()  # what one contender left to be written must not slow down the next
                values[name].append(measure())
                self.say(f"round {number + 1}: {name} {show_value(values[name][-1], unit)}")
        return {name: Samples(name, tuple(found)) for name, found in values.items()}


def new_nonce() -> str:
    """Return what makes the ids of one load its own: the last 12 digits of a UUID."""
    return secrets.token_hex(6)


def thousands(rows: int) -> str:
    """Return a number of rows for people: 10 k, 10 M."""
    return f"{rows // 1_000_000} M" if rows >= 1_000_000 else f"{rows // 1000} k"
