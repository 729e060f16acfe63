"""Decides whether the wall clock can be trusted: by the machine's uptime, and by when it was last right."""

from __future__ import annotations

import sys
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from telemetryd.model.values import format_timestamp

_MOST_APART: Final = timedelta(days=1)
_PROCESS: Final = f"process {uuid.uuid4()}"
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the clocks of this machine say at one moment."""

    moment: str
    """The wall clock, as stored."""
    boot_id: str
    """The boot of the machine; empty if that is not known."""
    up_s: float
    """How long the machine had been up, by a clock that cannot be set."""


def read(now: datetime) -> Reading:
    """Read the clocks; `now` is what the wall clock says.

    Where the kernel's own wall clock differs from `now` (a library that fakes the time may fake every other clock as
    well), only `now` is reported.
    """
    boot_id, up_s = _uptime(now)
    return Reading(format_timestamp(now), boot_id, up_s)


def _uptime(now: datetime) -> tuple[str, float]:
    if sys.platform != "linux":  # no name for a boot: while this process runs, its own clock is enough
        return _PROCESS, time.monotonic()
    try:
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
        booted_at = next(
            int(line.split()[1])
            for line in (_PROC / "stat").read_text("ascii").splitlines()
            if line.startswith("btime")
        )
        up_s = float((_PROC / "uptime").read_text("ascii").split()[0])
    except (OSError, StopIteration):
        return "", 0.0
    if abs(now - datetime.fromtimestamp(booted_at + up_s, UTC)) > _MOST_APART:
        return "", 0.0
    return boot_id, time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps


def doubt(now: Reading, trusted: Reading | None, newest: str | None) -> str | None:
    """Say why the wall clock cannot be believed, or None.

    Within one boot the time that has passed is known, however long nobody looked. Across boots only the moment at
    which the clock was last right can tell: a longer rest of the machine looks like a jump.

    Args:
        now: What the clocks say.
        trusted: What they said when the wall clock was last known to be right, or None.
        newest: The newest committed time, which stands in for that; or None.

    """
    moment = datetime.fromisoformat(now.moment)
    if trusted is not None and now.boot_id and now.boot_id == trusted.boot_id:
        expected = datetime.fromisoformat(trusted.moment) + timedelta(seconds=now.up_s - trusted.up_s)
        if abs(moment - expected) <= _MOST_APART:
            return None
        return (
            f"The clock says {now.moment}, and by the time that this machine is up it should be "
            f"{format_timestamp(expected)}"
        )
    known = newest if trusted is None else trusted.moment
    if known is None or abs(moment - datetime.fromisoformat(known)) <= _MOST_APART:
        return None
    return f"The clock says {now.moment}, and the last time that is known to be right is {known}"
