"""What can be asked about the events of one run, and how it is read from a query string."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from telemetryd.model.events import EventPage
from telemetryd.model.parameters import TEXT, Given, Parameter, read_text, refuse
from telemetryd.model.queries import DEFAULT_LIMIT, LIMIT, OFFSET, Query
from telemetryd.model.values import MAX_INTEGER, utc_now

TIMESTAMP: Final = "timestamp"
"""The field by which events are sorted, before their ids."""
EventCursor = tuple[str, int]
"""Where an event stands among those of its run: its timestamp and its id."""
_EVENT_CURSOR: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z),(\d{1,19})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ListEvents(Query[EventPage | None]):
    """The events of the run with an event_id. Answer: an `EventPage`, or None if there is no such run."""

    event_id: str
    limit: int = DEFAULT_LIMIT
    offset: int = 0
    is_descending: bool = False
    """Whether the last ones come first."""
    after: EventCursor | None = None
    """After which event, in that order, the page begins."""
    by_cursor: bool = False
    """Whether the next page is addressed by a cursor, so that this one may be shorter than asked for."""
    text: str | None = None
    """What the type or the payload holds, in any case."""

    def next_page(self, path: str, last: EventCursor) -> str:
        """Return the path and query of the page after the one that ends with an event."""
        text = "" if self.text is None else f"text={quote(self.text, safe='')}&"
        if not self.by_cursor:
            return f"{path}?{text}limit={self.limit}&offset={self.offset + self.limit}"
        sort = f"sort=-{TIMESTAMP}&" if self.is_descending else ""
        return f"{path}?{text}{sort}limit={self.limit}&cursor={last[0]},{last[1]}"


EVENT_LIMIT: Final = LIMIT.described("Events in one answer.")
EVENT_OFFSET: Final = OFFSET.described("Events to skip; following the Link header is surer.")


def _read_order_of_events(name: str, value: str, now: datetime) -> bool:
    if value not in (TIMESTAMP, f"-{TIMESTAMP}"):
        raise refuse(name, value, f"{TIMESTAMP} or -{TIMESTAMP}")
    return value.startswith("-")


def _read_event_cursor(name: str, value: str, now: datetime) -> EventCursor:
    if (match := _EVENT_CURSOR.fullmatch(value)) is None or (id_ := int(match[2])) > MAX_INTEGER:
        raise refuse(
            name, value, "the timestamp and the id of an event, with a comma between them, as in a Link header"
        )
    return match[1], id_


EVENT_SORT: Final = Parameter(
    "sort",
    "In which order; a minus means the last ones first.",
    {"type": "string", "enum": [TIMESTAMP, f"-{TIMESTAMP}"]},
    _read_order_of_events,
)
EVENT_CURSOR: Final = Parameter(
    "cursor",
    "Where to go on: timestamp and id of an event, as in the Link header.",
    {"type": "string"},
    _read_event_cursor,
)
EVENT_TEXT: Final = Parameter(
    "text", "Only events whose event_type or payload (as JSON) holds this text, in any case.", TEXT, read_text
)
LIST_EVENTS: Final[tuple[Parameter[Any], ...]] = (EVENT_LIMIT, EVENT_OFFSET, EVENT_SORT, EVENT_CURSOR, EVENT_TEXT)
"""The parameters of `GET /api/v1/runs/{event_id}/events`."""


def parse_event_list(query_string: str, event_id: str, clock: Callable[[], datetime] = utc_now) -> ListEvents:
    """Read the query string of `GET /api/v1/runs/{event_id}/events`.

    Raises:
        InvalidRequestError: with a sentence for each fault that names the parameter, the value and what is allowed.

    """
    given = Given(query_string, LIST_EVENTS, clock())
    query = ListEvents(
        event_id,
        given.value(EVENT_LIMIT, DEFAULT_LIMIT),
        given.value(EVENT_OFFSET, 0),
        given.value(EVENT_SORT, False),
        given.get(EVENT_CURSOR),
        not given.texts.keys().isdisjoint((EVENT_SORT.name, EVENT_CURSOR.name)),
        given.get(EVENT_TEXT),
    )
    if query.after is not None and query.offset:
        given.faults.append("Use either cursor or offset, not both: a cursor already says where to go on")
    given.finish()
    return query
