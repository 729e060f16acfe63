"""What changes of another database do to its copy, as plain data: the same on every engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final

from telemetryd.model import runs
from telemetryd.model.commands import ApplyChanges, CopiedRun
from telemetryd.model.runs import STORED
from telemetryd.model.stats import FACTS, Facts

Stored = Mapping[str, tuple[int, Facts]]
"""The ids and the facts of runs that a copy has, by event_id."""

_CREATED_AT: Final = FACTS.index("created_at")
_facts_of: Final = itemgetter(*map(STORED.index, FACTS))


@dataclass(slots=True)
class Plan:
    """What is to be deleted of a copy, and then to be stored in it."""

    replaced: list[int] = field(default_factory=list)
    """The ids of the runs that go, be it for their next state."""
    emptied: list[tuple[int, str]] = field(default_factory=list)
    """The ids and the created_at of those that go with their events, and with when they arrived."""
    runs: list[CopiedRun] = field(default_factory=list)
    numbers: list[tuple[int, int]] = field(default_factory=list)
    """The ids of these runs, and the numbers of their last changes."""
    deletions: list[tuple[int, str]] = field(default_factory=list)
    """Numbers, and the event_ids that were deleted then."""
    taken: list[Facts] = field(default_factory=list)
    """What counted of the runs that go."""
    added: list[Facts] = field(default_factory=list)
    """What counts of the runs that come."""

    @property
    def ahead(self) -> list[int]:
        """The ids of the runs that say that they were created after their last change.

        When a run arrived at the primary is not reported; its last change there is no earlier.
        """
        return [run.id for run in self.runs if str(run.row[runs.CREATED_AT]) > run.updated_at]

    @property
    def last_id(self) -> int:
        """The highest id of a run that comes, or 0."""
        return max((run.id for run in self.runs), default=0)


def named(command: ApplyChanges) -> list[str]:
    """Return the event_ids that changes are about, each once, in the order of the alphabet."""
    return sorted({_event_id(what) for _, what in command.changes})


def plan(command: ApplyChanges, stored: Stored) -> Plan:
    """Return what changes do to a copy.

    Args:
        command: the changes. Of a run they hold the last state, after deletions of runs that had its event_id before.
        stored: the runs of these event_ids that the copy has.

    """
    found = Plan()
    last: dict[str, tuple[int, CopiedRun | str]] = {}
    deleted = set()
    for seq, what in command.changes:
        last[_event_id(what)] = seq, what
        if isinstance(what, str):
            deleted.add(what)
            found.deletions.append((seq, what))
    for event_id, (seq, what) in last.items():
        if event_id in stored:
            run, facts = stored[event_id]
            found.replaced.append(run)
            found.taken.append(facts)
            if event_id in deleted or (isinstance(what, CopiedRun) and what.id != run):
                found.emptied.append((run, facts[_CREATED_AT]))
        if isinstance(what, CopiedRun):
            found.runs.append(what)
            found.numbers.append((what.id, seq))
            found.added.append(_facts_of(what.row))
    return found


def by_event_id(rows: Iterable[tuple[Any, ...]]) -> Stored:
    """Return rows of an event_id, an id and the facts of a run as `plan` takes them."""
    return {event_id: (run, tuple(facts)) for event_id, run, *facts in rows}


def _event_id(what: CopiedRun | str) -> str:
    return what if isinstance(what, str) else what.event_id
