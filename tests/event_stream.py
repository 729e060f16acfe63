"""Reads server-sent events, as a browser does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse


@dataclass
class Sent:
    """One event, and the last id when it came."""

    event: str
    data: Any
    id: str


class Reader:
    """Takes in lines; remembers the last id, also that of an event without data."""

    def __init__(self) -> None:
        self.last_id = ""
        self.comments = 0
        self._event, self._data = "message", ""

    def feed(self, lines: Iterable[str]) -> list[Sent]:
        found = []
        for line in lines:
            name, _, value = line.partition(": ")
            if line == "":
                if self._data:
                    found.append(Sent(self._event, json.loads(self._data), self.last_id))
                self._event, self._data = "message", ""
            elif line.startswith(":"):
                self.comments += 1
            elif name == "id":
                self.last_id = value
            elif name == "event":
                self._event = value
            elif name == "data":
                self._data += value
            else:
                assert name == "retry", line
        return found


async def events_of(response: ClientResponse, reader: Reader | None = None) -> AsyncIterator[Sent]:
    """Yield the events of an answer that never ends."""
    reader = reader or Reader()
    while line := await response.content.readline():
        for sent in reader.feed([line.decode().removesuffix("\n")]):
            yield sent


async def take(events: AsyncIterator[Sent], count: int) -> list[Sent]:
    """Return the next events."""
    return [await anext(events) for _ in range(count)]
