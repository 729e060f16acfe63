"""Validates the items of a batch one by one, and collects the errors of invalid ones."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, Final

from telemetryd.errors import (
    BodyTooLargeError,
    ErrorItem,
    InvalidBodyError,
    ItemRefusedError,
    QuotaExceededError,
    sentence,
)
from telemetryd.model import bodies, runs, values
from telemetryd.model.answers import ItemRefused
from telemetryd.model.items import explained, split

_SLICE_S: Final = 0.002
"""How long items are checked before the event loop gets its turn."""

_REPORTED_IN_FULL: Final = 1000
"""Errors of one batch that are all reported; of items beyond, each has its first error and how many more it has."""


class Batch:
    """The rows of a batch, and the faults of what is not in them."""

    def __init__(self, size: int, check: Callable[[values.Row], None] | None = None) -> None:
        self.size = size
        """How many bytes it came in."""
        self._check = check
        self._waits: list[ItemRefusedError] = []
        self.refused: Counter[str] = Counter()
        """How many items were refused although they are right, by the kind of the refusal."""
        self.rows: list[values.Row] = []
        self.errors: list[str] = []
        self.error_details: list[ItemRefused] = []
        self.is_readable = False
        self._reported = 0
        self.ignored: dict[str, None] = {}
        self.notes: list[str] = []
        """What else is to be said of items, each with its index."""
        self.indexes: list[int] = []
        """The index of the item that each row is."""
        self.total = 0

    def add(self, read: Callable[[], object]) -> None:
        """Take in the next item, or its faults."""
        item = None
        try:
            item = read()
            self.is_readable = True
            parsed = runs.parse_run(item)
            if self._check is not None:
                self._check(parsed.row)
        except InvalidBodyError as error:
            event_id = item.get("event_id") if isinstance(item, dict) else error.event_id
            self._report(error, values.shorten(event_id) if isinstance(event_id, str) else None)
        except ItemRefusedError as error:
            self._refuse(self.total, parsed.row, error, "agent_name")
        else:
            self.rows.append(parsed.row)
            self.indexes.append(self.total)
            self.note(self.total, parsed.notes)
            self.ignored.update(dict.fromkeys(parsed.ignored))
        self.total += 1

    def note(self, index: int, texts: Iterable[str]) -> None:
        """Take note of what is to be said of an item."""
        self.notes += [f"Item {index}: {text}" for text in texts]

    def refuse(self, refused: Mapping[int, ItemRefusedError]) -> None:
        """Report rows, by their places, which were right when they were read."""
        for place, error in refused.items():
            self._refuse(self.indexes[place], self.rows[place], error, "event_id")
        # They are reported in the order of the items.
        order = sorted(range(len(self.errors)), key=lambda at: self.error_details[at]["index"])
        self.errors = [self.errors[at] for at in order]
        self.error_details = [self.error_details[at] for at in order]

    def drop(self, refused: Mapping[int, ItemRefusedError]) -> None:
        """Report rows, by their places, which are not to be stored, and leave them out."""
        self.refuse(refused)
        kept = [place for place in range(len(self.rows)) if place not in refused]
        self.rows = [self.rows[place] for place in kept]
        self.indexes = [self.indexes[place] for place in kept]

    def raise_if_all_wait(self) -> None:
        """Raise what the first item that may come first waits for, if every item has to come again later.

        Raises:
            QuotaExceededError: if a quota lets none of them in.

        """
        if self.total and len(self._waits) == self.total:
            raise min(self._waits, key=lambda error: error.wait_s or 0.0)

    def _refuse(self, index: int, row: values.Row, error: ItemRefusedError, field: str) -> None:
        if isinstance(error, QuotaExceededError):
            self._waits.append(error)
        self.refused[error.kind] += 1
        event_id, text = values.shorten(str(row[runs.EVENT_ID])), sentence(error)
        fault: ErrorItem = {"loc": ["body", index, field], "msg": text, "type": error.kind}
        self.errors.append(f"Item {index} (event_id {event_id}): {text}")
        self.error_details.append({"index": index, "event_id": event_id, "detail": [fault], "status": error.status})

    def _report(self, error: InvalidBodyError, event_id: str | None) -> None:
        shown = error.errors if self._reported < _REPORTED_IN_FULL else error.errors[:1]
        self._reported += len(shown)
        if left_out := len(error.errors) - len(shown):
            more = f"and {left_out} more errors in this item"
            shown = [*shown, {"loc": ["body"], "msg": more, "type": "more_errors"}]
        reported = InvalidBodyError(shown)
        named = f" (event_id {event_id})" if event_id is not None else ""
        self.errors.append(f"Item {self.total}{named}: {reported}")
        self.error_details.append(
            {"index": self.total, "event_id": event_id, "detail": bodies.under(reported, self.total)}
        )


async def read_batch(
    body: bytes, limit: int, *, is_lines: bool, check: Callable[[values.Row], None] | None = None
) -> Batch:
    """Read the items of a batch, each for itself; the event loop gets its turn in between.

    Args:
        body: an array, an object with the array under `runs`, or one item a line.
        limit: how many items it may hold.
        is_lines: whether it is one item a line (NDJSON).
        check: raises ItemRefusedError for a valid row that may not be stored, or not now.

    Raises:
        BodyTooLargeError: if it holds more items.
        InvalidBodyError: if not a single item can be read.

    """
    batch = Batch(len(body), check)
    decode: Callable[[Any], object] = _parse_item
    if is_lines:
        items: list[Any] = [line[0] for line in islice(_LINES.finditer(body), limit + 1)]
    else:
        try:
            decoded = bodies.parse_body(body)
        except InvalidBodyError as error:
            items = await _split(body, batch, limit, error)
        else:
            items, decode = _items(decoded, batch), _as_it_is
    if len(items) > limit:
        raise BodyTooLargeError(f"A batch must not hold more than {limit} runs (TELEMETRY_MAX_BATCH)")
    turn = time.perf_counter()
    for item in items:
        if time.perf_counter() - turn > _SLICE_S:
            await asyncio.sleep(0)
            turn = time.perf_counter()
        batch.add(partial(decode, item))
    if batch.errors and not batch.is_readable:
        raise InvalidBodyError([error for item in batch.error_details[:100] for error in item["detail"]])
    return batch


_LINES: Final = re.compile(rb"[^ \t\r\n][^\n]*")
"""The lines of NDJSON that are not blank."""


def _as_it_is(item: object) -> object:
    return item


def _parse_item(text: bytes) -> object:
    try:
        return bodies.parse_body(text)
    except InvalidBodyError as error:
        raise explained(error, text) from None


async def _split(body: bytes, batch: Batch, limit: int, error: InvalidBodyError) -> list[bytes]:
    """Return the texts of the items of a body that is no JSON as a whole; if they cannot be told apart, that is why."""
    found = await asyncio.to_thread(split, body, limit)
    if found is None or _items(bodies.parse_json(found.around), batch):
        raise error
    return found.texts


def _items(decoded: object, batch: Batch) -> list[Any]:
    if isinstance(decoded, dict) and isinstance(decoded.get("runs"), list):
        batch.ignored.update(dict.fromkeys(str(name) for name in decoded if name != "runs"))
        decoded = decoded["runs"]
    if not isinstance(decoded, list):
        message = 'A batch must be an array of runs, or an object {"runs": [...]}'
        raise InvalidBodyError([{"loc": ["body"], "msg": message, "type": "list_type"}])
    return decoded
