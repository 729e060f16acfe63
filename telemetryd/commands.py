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


@dataclass(frozen=True, slots=True)
class PruneRuns:
    """Delete the oldest runs created before a moment, at most `limit`. Outcome: `Pruned`.

    If there are fewer, a slice of the file's free space is returned as well.
    With `versions`, pairs of id and updated_at, only those of them that have not changed since: so a client
    deletes exactly what it has archived, whatever its clock says.
    """

    created_before: str
    limit: int
    agent_name: str | None = None
    status: str | None = None
    versions: tuple[tuple[int, str], ...] | None = None

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return self.limit

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        return 0


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many runs a `PruneRuns` deleted, and how many free pages of the file could still be returned."""

    runs: int
    free_pages: int


@dataclass(frozen=True, slots=True)
class ReapRuns:
    """Cancel running runs that were neither created nor changed since a moment, at most `limit`. Outcome: `Reaped`."""

    stale_before: str
    limit: int
    agent_name: str | None = None

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return self.limit

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        return 0


@dataclass(frozen=True, slots=True)
class Reaped:
    """How many runs a `ReapRuns` cancelled."""

    runs: int


Command = CreateRuns | UpdateRun | PruneRuns | ReapRuns
Outcome = Created | Updated | Pruned | Reaped | None
