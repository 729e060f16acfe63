"""Reads the items of a batch one by one, and keeps the faults of the bad ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from telemetryd.errors import InvalidBodyError
from telemetryd.model import bodies, runs, values

_SLICE_S: Final = 0.002
"""How long items are checked before the event loop gets its turn."""


_TOLD_IN_FULL: Final = 1000
"""Errors of one batch that are all told; of items beyond, each tells its first error and how many more it has."""


class _Batch:
    """The rows of a batch, and the faults of what is not in them."""

    def __init__(self, size: int) -> None:
        self.size = size
        """How many bytes it came in."""
        self.rows: list[values.Row] = []
        self.errors: list[str] = []
        self.error_details: list[dict[str, Any]] = []
        self.is_readable = False
        self._told = 0
        self.ignored: dict[str, None] = {}
        self.total = 0

    def add(self, read: Callable[[], object]) -> None:
        """Take in the next item, or its faults."""
        item = None
        try:
            item = read()
            self.is_readable = True
            parsed = runs.parse_run(item)
        except InvalidBodyError as error:
            event_id = item.get("event_id") if isinstance(item, dict) else None
            self._tell(error, values.shorten(event_id) if isinstance(event_id, str) else None)
        else:
            self.rows.append(parsed.row)
            self.ignored.update(dict.fromkeys(parsed.ignored))
        self.total += 1

    def _tell(self, error: InvalidBodyError, event_id: str | None) -> None:
        told = error.errors if self._told < _TOLD_IN_FULL else error.errors[:1]
        self._told += len(told)
        if left_out := len(error.errors) - len(told):
            more = f"and {left_out} more errors in this item"
            told = [*told, {"loc": ["body"], "msg": more, "type": "more_errors"}]
        shown = InvalidBodyError(told)
        named = f" (event_id {event_id})" if event_id is not None else ""
        self.errors.append(f"Item {self.total}{named}: {shown}")
        self.error_details.append(
            {"index": self.total, "event_id": event_id, "detail": bodies.under(shown, self.total)}
        )


_LINES: Final = re.compile(rb"[^ \t\r\n][^\n]*")
"""The lines of NDJSON that are not blank."""


def _as_it_is(item: object) -> object:
    return item


def _items(decoded: object, batch: _Batch) -> list[object]:
    if isinstance(decoded, dict) and isinstance(decoded.get("runs"), list):
        batch.ignored.update(dict.fromkeys(str(name) for name in decoded if name != "runs"))
        decoded = decoded["runs"]
    if not isinstance(decoded, list):
        message = 'A batch must be an array of runs, or an object {"runs": [...]}'
        raise InvalidBodyError([{"loc": ["body"], "msg": message, "type": "list_type"}])
    return decoded
