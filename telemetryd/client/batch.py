"""The requests that some lines of the spool ask for, and what is rejected of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from telemetryd.client.lines import EventItem, Json, RunItem, event_id_of, plan, read_object, said
from telemetryd.client.old_lines import translate
from telemetryd.client.transport import is_addressable

MAX_EVENTS: Final = 1000
"""Events in one request."""
NO_ADDRESS: Final = "This event_id cannot stand in the address of a run"

T = TypeVar("T")


@dataclass(slots=True)
class Runs:
    """Runs to be created."""

    items: list[RunItem]
    tries: int = 0
    postponed: str = ""
    """Why the daemon takes none of them now, until that has made the sender wait."""

    @property
    def lines(self) -> list[bytes]:
        """The lines that it comes from."""
        return [line for item in self.items for line in item.lines]

    @property
    def event_id(self) -> str:
        """The event_id of its run, or of its first one."""
        return self.items[0].event_id or event_id_of(self.items[0].body)

    def parts(self) -> Sequence[Step]:
        """Return the smaller requests that ask for the same, if there are any."""
        return [Runs(half) for half in halves(self.items)] if len(self.items) > 1 else []


class _OfEvents:
    """A request about some events."""

    __slots__ = ()
    items: list[EventItem]

    @property
    def lines(self) -> list[bytes]:
        """The lines that it comes from."""
        return [item.line for item in self.items]


@dataclass(slots=True)
class Events(_OfEvents):
    """Events of one run."""

    items: list[EventItem]
    tries: int = 0

    @property
    def event_id(self) -> str:
        """The event_id of its run, or of its first one."""
        return self.items[0].event_id

    def parts(self) -> Sequence[Step]:
        """Return the smaller requests that ask for the same, if there are any."""
        return [Events(half) for half in halves(self.items)] if len(self.items) > 1 else []


@dataclass(slots=True)
class Update:
    """Changes to one run."""

    event_id: str
    fields: Json
    lines: list[bytes]
    tries: int = 0

    def parts(self) -> Sequence[Step]:
        """Return the smaller requests that ask for the same, if there are any."""
        return updates_of(self.event_id, self.lines) if len(self.lines) > 1 else []


@dataclass(slots=True)
class Nameless(_OfEvents):
    """Events of which only the run_id of their run is known, so that the daemon has to be asked for its event_id."""

    run_id: str
    items: list[EventItem]
    tries: int = 0

    @property
    def event_id(self) -> str:
        """Nothing yet."""
        return ""

    def parts(self) -> Sequence[Step]:
        """Return nothing: the question is the same for all of them."""
        return []


Step = Runs | Events | Update | Nameless
"""One request; `parts` are the smaller ones that ask for the same, if there are any."""


def events_of(found: Mapping[str, list[EventItem]]) -> list[Events]:
    """Return one request for each run and each thousand of its events."""
    return [
        Events(events[at : at + MAX_EVENTS]) for events in found.values() for at in range(0, len(events), MAX_EVENTS)
    ]


def updates_of(event_id: str, lines: list[bytes]) -> list[Update]:
    """Return one update for each line of the spool that asks for a change."""
    asked = [(said((read_object(line) or {})["fields"]), line) for line in lines]
    return [Update(event_id, fields, [line]) for fields, line in asked if fields]


@dataclass(slots=True)
class Batch:
    """Lines on their way: the requests that are still to be sent, and the lines that are rejected for good."""

    lines: list[bytes]
    steps: deque[Step] = field(default_factory=deque)
    dead: list[tuple[list[bytes], int | None, object]] = field(default_factory=list)
    aside: dict[str, list[bytes]] = field(default_factory=dict)
    """event_id → lines that do not come through, and those of the same run after them."""
    stored: int = 0
    duplicates: int = 0
    events: int = 0
    refused: int = 0
    """What has become of its lines so far, which counts when all of them have come to their end."""
    was_aside: bool = False
    """Whether the lines come from such a stream, and so wait for nothing but themselves."""
    origins: dict[bytes, bytes] = field(default_factory=dict)
    """Line → the line of the replaced client that it was made from, which is what is rejected in its place."""

    @classmethod
    def of(cls, lines: list[bytes], *, was_aside: bool = False) -> Batch:
        """Lay out the requests for some lines: starts, then events, then changes."""
        translated = translate(lines)
        wanted = plan(translated.lines)
        batch = cls(lines, was_aside=was_aside, origins=translated.origins)
        if wanted.runs:
            batch.steps.append(Runs(wanted.runs))
        for event_id, events in wanted.events.items():
            if not is_addressable(event_id):
                batch.refuse([item.line for item in events], None, NO_ADDRESS)
                continue
            batch.steps.extend(events_of({event_id: events}))
        for run_id, events in wanted.nameless.items():
            batch.steps.append(Nameless(run_id, events))
        for update in wanted.updates.values():
            if not update.fields:
                continue  # nothing but nulls, which PATCH leaves alone
            if is_addressable(update.event_id):
                batch.steps.append(Update(update.event_id, update.fields, update.lines))
            else:
                batch.refuse(update.lines, None, NO_ADDRESS)
        batch.refuse(wanted.unreadable, None, "The line cannot be read")
        return batch

    def refuse(self, lines: list[bytes], status: int | None, reason: object) -> None:
        """Send lines to the dead-letter file; those of the replaced client as often as they stand in the batch."""
        if self.origins:
            buried = {line for dead, _, _ in self.dead for line in dead}
            new = dict.fromkeys(origin for line in lines if (origin := self.origins.get(line, line)) not in buried)
            lines = [line for line in new for _ in range(max(self.lines.count(line), 1))]
        if lines:
            self.dead.append((lines, status, reason))


def halves(items: list[T]) -> list[list[T]]:
    """Return a list in two parts of about the same length."""
    middle = len(items) // 2
    return [items[:middle], items[middle:]]
