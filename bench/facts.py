"""Makes the cells of commits from runs, one by one: what engines must keep, for simulations and tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from telemetryd.model.commit_cells import SLOT_HOURS, Cell, slot_of
from telemetryd.model.sketches import bin_of
from telemetryd.model.values import Status


class Fact(NamedTuple):
    """What cells are made of: a run as it is stored."""

    agent_name: str
    job_type: str
    commit: str | None
    created_at: str
    status: str
    duration_ms: int | None


def cells_of(facts: Iterable[Fact]) -> list[Cell]:
    """Return the cells that these runs make."""
    sums: dict[tuple[str, str, str, int], list[int]] = {}
    for agent_name, job_type, commit, created_at, status, duration_ms in facts:
        if status == Status.RUNNING:
            continue
        cell = sums.setdefault((agent_name, job_type, commit or "", slot_of(created_at)), [0] * 5)
        cell[0] += 1
        if status != Status.SUCCESS:
            cell[1] += 1
        elif duration_ms:
            cell[2] += 1
            cell[3] += bin_of(duration_ms)
        cell[4] += seconds_of(created_at)
    return [Cell(*place, *numbers) for place, numbers in sums.items()]


def seconds_of(created_at: str) -> int:
    """Return how many whole seconds after the begin of its slot a moment in the stored form is."""
    hour, minute, second = (int(created_at[place : place + 2]) for place in (11, 14, 17))
    return hour % SLOT_HOURS * 3600 + minute * 60 + second
