"""Commands that change data, and their results, as frozen data without SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Generic, TypeVar

from telemetryd.model.changes import Cursor, Known
from telemetryd.model.clocks import Reading
from telemetryd.model.processes import Process
from telemetryd.model.runs import EVENT_ID
from telemetryd.model.values import Row, SqlValue

R = TypeVar("R")


class Command(Generic[R]):
    """A change of what is stored, which gives an `R` when it is done.

    The writer carries it out without knowing what it is: only an engine's statements do.
    """

    __slots__ = ()

    makes_room: ClassVar[bool] = False
    """Whether it is also taken while the disk is almost full, because it frees more than it takes."""

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return 1

    @property
    def size(self) -> int:
        """About how many bytes it holds while it waits."""
        return 0


class SliceCommand(Command[R]):
    """A command that does one slice of its work, of at most `limit` rows."""

    __slots__ = ()

    limit: int

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return self.limit


@dataclass(frozen=True, slots=True)
class CreateRuns(Command["Created"]):
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
    """Whether each row of a `CreateRuns` was new, in their order."""

    new: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class UpdateRun(Command["Updated | TooManyLabels | None"]):
    """Change fields of one run. Outcome: `Updated`, or None if there is no such run.

    Labels are changes to those that are stored; if there would be too many, nothing is changed: `TooManyLabels`.
    """

    event_id: str
    changes: Mapping[str, SqlValue]
    size: int = 0
    """About how many bytes the changes hold."""


@dataclass(frozen=True, slots=True)
class Updated:
    """The run that an `UpdateRun` changed."""

    run_id: str


@dataclass(frozen=True, slots=True)
class TooManyLabels:
    """How many labels a run would have after an `UpdateRun`."""

    labels: int


@dataclass(frozen=True, slots=True)
class CreateEvents(Command["EventsCreated | None"]):
    """Store events of a run, each unless its key is known. Outcome: `EventsCreated`, or None if there is no run."""

    event_id: str
    rows: tuple[Row, ...]
    """In the order of `events.STORED`."""
    size: int = 0
    """About how many bytes the rows hold: those of the body that they came in."""

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class EventsCreated:
    """How many of a `CreateEvents` were new."""

    inserted: int


@dataclass(frozen=True, slots=True)
class RegisterProcess(Command["Registration"]):
    """Note which process works on a run, in the place of any earlier one. Outcome: `Registration`."""

    event_id: str
    process: Process


class Registration(StrEnum):
    """What came of a `RegisterProcess`."""

    DONE = "done"
    NO_RUN = "no run"
    NOT_RUNNING = "not running"


@dataclass(frozen=True, slots=True)
class Death:
    """What is known of a process's end, in the words that its runs get."""

    ended_at: str
    error_summary: str
    error_details: str


@dataclass(frozen=True, slots=True)
class EndProcess(SliceCommand["ProcessEnded"]):
    """Fail the running runs of a process that has ended, at most `limit`; without a death only forget them.

    Outcome: `ProcessEnded`.
    """

    process: Process
    death: Death | None
    limit: int


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """Which runs an `EndProcess` failed (their event_ids), and whether others of that process are left."""

    failed: tuple[str, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class PruneRuns(SliceCommand["Pruned"]):
    """Delete the oldest runs created before a moment, at most `limit`. Outcome: `Pruned`.

    A run that says it was created after its arrival counts as created then. A slice that meets large runs or many
    events, or takes long, is cut short; the rest is left for the next one.
    If there are fewer runs than `limit`, a slice of the file's free space is returned as well.
    With `versions`, pairs of id and updated_at, only those of them that have not changed since: so a client
    deletes exactly what it has archived, whatever its clock says.
    """

    makes_room: ClassVar[bool] = True

    created_before: str
    limit: int
    agent_name: str | None = None
    job_type: str | None = None
    status: str | None = None
    versions: tuple[tuple[int, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many runs a `PruneRuns` deleted, and whether there is more to do: runs to delete or space to return."""

    runs: int
    more: bool


@dataclass(frozen=True, slots=True)
class DeleteRun(SliceCommand["Removed | None"]):
    """Delete one run and all that belongs to it. Outcome: `Removed`, or None if there is no such run.

    First its texts go, with the words in the full-text index; then its events, and the run with the last of them. What
    is too much for one slice is left for the next command.
    """

    makes_room: ClassVar[bool] = True

    event_id: str
    limit: int = 1_000
    again: bool = False
    """Whether this continues a command before it."""


@dataclass(frozen=True, slots=True)
class RedactRun(SliceCommand["Removed | None"]):
    """Remove for good what some fields of a run hold, and what its events hold. Outcome: as of `DeleteRun`."""

    event_id: str
    fields: tuple[str, ...]
    """Of `runs.REDACTABLE`."""
    payloads: bool
    """Whether the payloads of its events go as well, at most `limit` at once."""
    limit: int = 1_000
    again: bool = False
    """Whether this continues a command before it."""


@dataclass(frozen=True, slots=True)
class Removed:
    """How many events lost their payload or were deleted, and whether there is more to do."""

    events: int
    more: bool


@dataclass(frozen=True, slots=True)
class ReapRuns(SliceCommand["Reaped"]):
    """Cancel running runs that were neither created nor changed since a moment, at most `limit`. Outcome: `Reaped`."""

    stale_before: str
    limit: int
    agent_name: str | None = None
    job_type: str | None = None


@dataclass(frozen=True, slots=True)
class Reaped:
    """How many runs a `ReapRuns` cancelled, and whether there may be more: a slice of large runs is cut short."""

    runs: int
    more: bool


@dataclass(frozen=True, slots=True)
class ConfirmPrune(Command[None]):
    """Allow runs of an age to be deleted by themselves. Outcome: None.

    Where nothing is known of the clock yet, it is trusted as well.
    """

    after_s: float
    clock: Reading


@dataclass(frozen=True, slots=True)
class TrustClock(Command[None]):
    """Note that the clock is right, or when it last was. Outcome: None."""

    clock: Reading


@dataclass(frozen=True, slots=True)
class CopiedRun:
    """A run of another database, to be stored as it is."""

    id: int
    row: Row
    updated_at: str

    @property
    def event_id(self) -> str:
        """Its event_id."""
        return str(self.row[EVENT_ID])


@dataclass(frozen=True, slots=True)
class ApplyChanges(Command["Applied"]):
    """Take over changes of the database that this one is a copy of. Outcome: `Applied`."""

    changes: tuple[tuple[int, CopiedRun | str], ...]
    """Numbers with runs, or with the event_ids of deleted ones, in their order."""
    events: tuple[Row, ...]
    """New events of runs that are there then: the run's id, and what is in the order of `events.COLUMNS`."""
    epoch: str
    last: int
    """The number up to which these are all the changes."""
    begun: int

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return len(self.changes) + len(self.events)


@dataclass(frozen=True, slots=True)
class MergeChanges(Command["Applied"]):
    """Take over changes of one of several databases that are followed into this one. Outcome: `Applied`.

    This one keeps ids and numbers of its own; `telemetryd follow --as` sends it.
    """

    source: str
    """The name of that database."""
    changes: tuple[tuple[int, CopiedRun | str], ...]
    """As in `ApplyChanges`."""
    events: tuple[Row, ...]
    epoch: str
    last: int
    begun: int
    last_event: int
    """The id there up to which these are all the events."""
    known: tuple[Known, ...]
    """Some of the newest changes that are taken over with these."""
    stood: Cursor | None
    """How far this database had come when these were asked for; if it has come elsewhere since, nothing is done."""
    stood_event: int

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return len(self.changes) + len(self.events)


@dataclass(frozen=True, slots=True)
class Applied:
    """How many changes and events an `ApplyChanges` or a `MergeChanges` took over."""

    changes: int
    events: int


@dataclass(frozen=True, slots=True)
class AlertChange:
    """That a rule began to fire for a subject, or ceased, and the message that reports it."""

    id: str
    rule: str
    subject: tuple[str, ...]
    """What identifies it: agent_name, job_type, measure, first_bad_commit; empty where it is not about such."""
    firing: bool
    since: str
    seq: int
    summary: str
    details: str
    """JSON."""
    webhooks: tuple[str, ...]
    body: str


@dataclass(frozen=True, slots=True)
class RecordAlerts(Command[int]):
    """Store changes of alerts with the deliveries that they make. Outcome: how many old deliveries were given up."""

    changes: tuple[AlertChange, ...]

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return sum(1 + len(change.webhooks) for change in self.changes)

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        return sum(len(change.body) for change in self.changes)


@dataclass(frozen=True, slots=True)
class ConfirmDelivery(Command[int]):
    """Forget a delivery: it was confirmed, or is given up. Outcome: how many there were, 1 or 0."""

    number: int


@dataclass(frozen=True, slots=True)
class KeepAlerts(Command[int]):
    """Forget alerts of all rules but these, and deliveries to all webhooks but these. Outcome: how many there were."""

    rules: tuple[str, ...]
    webhooks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IndexTexts(Command["Indexed | None"]):
    """Go on with the full-text index that was begun. Outcome: `Indexed`, or None if there is none or it is complete."""

    most_bytes: int = 1024 * 1024
    """How many bytes of texts it indexes at most, besides a first run of any size."""

    @property
    def cost(self) -> int:
        """How many rows it touches at most."""
        return 2_000


@dataclass(frozen=True, slots=True)
class Indexed:
    """What an `IndexTexts` did: whether there is more to do."""

    more: bool
