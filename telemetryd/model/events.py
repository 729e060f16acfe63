"""THE definition of a run's event: every field once; validation, SQL, OpenAPI and docs derive from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field, create_model

from telemetryd.errors import BodyTooLargeError, ErrorItem, InvalidBodyError
from telemetryd.model.bodies import under, validate_leniently
from telemetryd.model.values import JsonObject, Name, Role, Row, Timestamp, names, new_field

MAX_EVENTS: Final = 1000
"""Most events in one request, and in one answer."""


class Event(BaseModel):
    """Something that happened inside a run."""

    id: Annotated[int, Role.SERVER] = Field(0, description="Row number, ascending in order of arrival.")
    event_key: Annotated[Name, Role.SET] = Field(
        "",
        description="Unique in its run; makes retries harmless. Default: derived from what was given.",
        examples=["page-17"],
    )
    event_type: Annotated[Name, Role.SET] = Field(
        description="What kind of thing happened.", examples=["page_translated"]
    )
    timestamp: Annotated[Timestamp, Role.SET] = Field(
        "", description="When it happened; default: on arrival.", examples=["2025-12-24T10:01:30Z"]
    )
    payload: Annotated[JsonObject | None, Role.SET | Role.JSON] = Field(
        None, description="Anything about it.", examples=[{"page": 17, "seconds": 1.25}]
    )


COLUMNS: Final = names(Event)
"""Every field, in the order in which an event is answered."""
STORED: Final = names(Event, Role.SET)
"""The fields that a new event brings along."""
_JSON_COLUMNS: Final = names(Event, Role.JSON)

EVENT_KEY, EVENT_TYPE, TIMESTAMP, PAYLOAD = (
    STORED.index(name) for name in ("event_key", "event_type", "timestamp", "payload")
)
"""Where those values stand in a row of `STORED`."""

NewEvent: Final[type[BaseModel]] = create_model(
    "NewEvent",
    __config__=ConfigDict(extra="allow", strict=True, title="NewEvent"),
    __doc__="An event as it is created.",
    **{name: new_field(Event.model_fields[name]) for name in STORED},  # type: ignore[call-overload]
)


@dataclass(frozen=True, slots=True)
class ParsedEvents:
    """Valid events: their rows in the order of `STORED`, and the names of fields that were not used.

    A row without a time holds "" for it: it happened on arrival.
    """

    rows: tuple[Row, ...]
    ignored: tuple[str, ...]


def parse_events(value: object) -> ParsedEvents:
    """Check a decoded body, one event or an array, and return what is to be stored.

    Raises:
        InvalidBodyError: with every fault of every event.
        BodyTooLargeError: if there are too many.

    """
    if not isinstance(value, list):
        event, _ = validate_leniently(NewEvent, value)
        return ParsedEvents((_row(event),), tuple(event.__pydantic_extra__ or ()))
    if len(value) > MAX_EVENTS:
        raise BodyTooLargeError(f"One request must not hold more than {MAX_EVENTS} events")
    rows: list[Row] = []
    ignored: dict[str, None] = {}
    faults: list[ErrorItem] = []
    for index, item in enumerate(value):
        try:
            event, _ = validate_leniently(NewEvent, item)
        except InvalidBodyError as error:
            faults += under(error, index)
        else:
            rows.append(_row(event))
            ignored.update(dict.fromkeys(event.__pydantic_extra__ or ()))
    if faults:
        raise InvalidBodyError(faults)
    return ParsedEvents(tuple(rows), tuple(ignored))


def _row(event: Any) -> Row:
    return (event.event_key or _derived_key(event), event.event_type, event.timestamp, event.payload)


def _derived_key(event: Any) -> str:
    """Return the key of an event that brought none: equal for equal content, whatever the order of its names."""
    payload = None if event.payload is None else orjson.loads(event.payload)
    content = orjson.dumps([event.event_type, event.timestamp, payload], option=orjson.OPT_SORT_KEYS)
    return f"content-{hashlib.blake2b(content, digest_size=16).hexdigest()}"


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events of one run (rows in the order of `COLUMNS`), and whether others follow."""

    rows: list[Row]
    more: bool


def cursor(row: Row) -> tuple[str, int]:
    """Return the position of a stored row (in the order of `COLUMNS`) among the events of its run."""
    event: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
    return event["timestamp"], event["id"]


def to_json(row: Row) -> dict[str, Any]:
    """Return a stored row (in the order of `COLUMNS`) as the JSON object that answers carry."""
    event: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
    for name in _JSON_COLUMNS:
        if isinstance(text := event[name], str):
            event[name] = orjson.Fragment(text)
    return event


def stored_row(event: Mapping[str, Any]) -> Row:
    """Return an event as `to_json` gives it in the form in which it is stored (in the order of `COLUMNS`)."""
    values = dict(event)
    for name in _JSON_COLUMNS:
        if values[name] is not None:
            values[name] = orjson.dumps(values[name]).decode()
    return tuple(values[name] for name in COLUMNS)


def page_fields(page: EventPage) -> dict[str, Any]:
    """Return what the answer of a run holds besides it: its events, and whether there are more."""
    return {"events": [to_json(row) for row in page.rows], "more_events": page.more}
