"""What is done once for a database, by one of the daemons that serve it."""

from __future__ import annotations

from enum import Enum


class Chore(Enum):
    """One kind of work that one daemon at a time leads."""

    COUNTS = "counts"
    """Adds up what was counted, and forgets old deletions."""
    ALERTS = "alerts"
    """Evaluates rules and delivers messages: only a daemon that has rules can."""
    PRUNING = "pruning"
    """Deletes runs of an age: only a daemon that is told the age can."""
    REAPING = "reaping"
    """Cancels stale runs, in the same way."""
