"""What engines keep of the runs of each commit, by six hours: enough to tell which commit broke something."""

from __future__ import annotations

from typing import Final, NamedTuple

from telemetryd.model.stats import hour_number

SLOT_HOURS: Final = 6
"""How long a slot lasts: a day is four, and an outage that other agents share is left out by slots."""
SLOT_S: Final = SLOT_HOURS * 3600
MAX_CELLS: Final = 10_000
"""How many cells of a pair are read at most, those of the newest slots: a pair may have a commit for each run."""


class Cell(NamedTuple):
    """The finished runs of one commit in one slot, for one pair of agent and job type.

    Every number is a sum over the cell's runs, each a whole number that follows from the run alone, so that
    subtracting a run leaves exactly what the cell would be without it. A cell without runs does not exist.

    A run counts if its status is not running, by its created_at. Runs without a commit have cells of their own, under
    an empty commit: they show how an agent did while another one's runs failed.

    Engines deliver the cells of every pair, also of those that a query is not about, in any order, of each slot from
    `slot_of(start)` to that in which the moment before `end` lies; of each pair at most `MAX_CELLS`, the newest slots.
    """

    agent_name: str
    job_type: str
    commit: str
    """git_commit_hash; empty if the runs have none."""
    slot: int
    """Six hours, counted from 1970-01-01T00:00Z: the whole seconds since 1970 of created_at // `SLOT_S`."""
    runs: int
    failures: int
    """Runs with another status than success."""
    timed: int
    """Successful runs with a duration_ms of 1 or more."""
    bins: int
    """The sum of `sketches.bin_of(duration_ms)` over those: what their logarithms add up to, in whole numbers."""
    seconds: int
    """The sum of how many whole seconds after the slot's begin each run was created: the order of its commits."""


def slot_of(created_at: str) -> int:
    """Return the slot of a moment in the stored form."""
    return hour_number(created_at) // SLOT_HOURS
