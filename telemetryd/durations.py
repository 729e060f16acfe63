"""Reads and writes durations such as 90d, 12h, 30m, 45s or 2w."""

from __future__ import annotations

import re
from typing import Final

_DURATION: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", re.ASCII | re.IGNORECASE)


_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


_CENTURY_S: Final = 100 * 366 * 86_400


def parse_duration(text: object) -> float:
    """Return a duration such as 90d, 12h, 30m, 45s or 2w, in seconds.

    Raises:
        ValueError: if it is none, has no unit (for "90", days or hours may be meant), is not positive,
            or is longer than a century.

    """
    match = _DURATION.fullmatch(str(text))
    seconds = float(match[1]) * _UNIT_SECONDS[match[2].lower()] if match else 0.0
    if not 0 < seconds <= _CENTURY_S:
        raise ValueError("must be a duration with its unit, such as 90d, 12h, 30m or 45s")
    return seconds


def duration_text(seconds: float) -> str:
    """Return a duration as it may be given again: 90d, 36h, 1.5s."""
    unit, size = next(
        ((unit, size) for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)) if seconds % size == 0), ("s", 1)
    )
    return f"{seconds / size:f}".rstrip("0").rstrip(".") + unit
