"""Intervals for what few observations show: Wilson's for a share, and Student's quantile."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist
from typing import Final

CERTAINTY: Final = 0.95
"""How often an interval holds the true value."""
_Z: Final = NormalDist().inv_cdf((1 + CERTAINTY) / 2)


def wilson(rate: float, runs: float, z: float = _Z) -> tuple[float, float]:
    """Return the bounds of a share that was seen in so many runs, at least one (Wilson 1927).

    Args:
        rate: the share that was seen, from 0 to 1.
        runs: how many independent ones.
        z: the quantile for the interval; 95 % by default.

    """
    middle = (rate + z * z / (2 * runs)) / (1 + z * z / runs)
    reach = z / (1 + z * z / runs) * sqrt(rate * (1 - rate) / runs + z * z / (4 * runs * runs))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def student(freedom: int) -> float:
    """Return the quantile of Student's t for the interval (Cornish and Fisher's expansion); freedom is 1 or more."""
    terms = (
        _Z,
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
    )
    return sum(term / float(freedom) ** power for power, term in enumerate(terms))
