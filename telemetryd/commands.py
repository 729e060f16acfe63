"""What can be changed, as frozen data without SQL, and what comes of each change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from telemetryd.runs import Row, SqlValue


@dataclass(frozen=True, slots=True)
class CreateRuns:
    """Store runs, each unless its event_id is already known. Outcome: `Created`."""

    rows: tuple[Row, ...]
    size: int = 0
    """About how many bytes the rows hold: those of the body that they came in."""

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Created:
    """For each row of a `CreateRuns`, in order: whether it was new."""

    new: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class UpdateRun:
    """Change fields of one run. Outcome: `Updated`, or None if there is no such run."""

    event_id: str
    changes: Mapping[str, SqlValue]
    size: int = 0
    """About how many bytes the changes hold."""

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return 1


@dataclass(frozen=True, slots=True)
class Updated:
    """The run that an `UpdateRun` changed."""

    run_id: str


Command = CreateRuns | UpdateRun
Outcome = Created | Updated | None
