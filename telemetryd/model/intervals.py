"""Computes the interval that a share lies in, given how many of some runs had a property."""

from __future__ import annotations

from math import sqrt
from typing import Final

CONFIDENCE: Final = 0.95
"""In how many of 100 such intervals the true share lies, divided by 100."""
_Z: Final = 1.959963984540054
"""How many standard deviations either side of the mean of a normal distribution hold `CONFIDENCE` of it."""

Interval = tuple[float, float]
"""The lower and the upper bound of a share, 0 to 1."""


def wilson(part: int, whole: int) -> Interval:
    """Return the interval that the true share lies in, if each of the runs decides by itself.

    Unlike the plain one (share ± 2 standard errors) it holds for few runs as well, and for shares of 0 and 1.
    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Args:
        part: How many runs have the property.
        whole: How many runs there are, at least 1.

    """
    share, weight = part / whole, _Z * _Z / whole
    middle = (share + weight / 2) / (1 + weight)
    reach = _Z / (1 + weight) * sqrt(share * (1 - share) / whole + weight / (4 * whole))
    # Rounding errors must not keep the share that was seen out of its own interval.
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))
