"""Parses the daemon's responses; any part may be missing, of the wrong type, or absurdly large."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final

from telemetryd.client.transport import Answer

DEFAULT_ROWS: Final = 1000
MAX_ROWS: Final = 10_000
_MAX_PAUSE_S: Final = 60.0
_MAX_RETRY_AFTER_S: Final = 3600.0
_LONGEST_NUMBER: Final = 12
"""More digits than any number of ours has; Python refuses to read some thousands of them."""
_SECONDS: Final = re.compile(r"\d+(?:\.\d*)?(?:e\d{1,3})?", re.ASCII | re.IGNORECASE)
_MAX_SHOWN: Final = 500
_WRONG_BODY: Final = 422
FLOW_HEADER: Final = "telemetry-flow"


class UnclearError(Exception):
    """An answer does not account for what was sent."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """What is wrong with an item of a batch."""

    status: int
    """The answer that it would get by itself."""
    detail: Any


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch."""

    inserted: int
    duplicates: int
    errors: list[Any]
    details: dict[int, Rejected] | None
    """Index of the item → what is wrong with it; None if the daemon does not say."""


def _count(body: object, name: str) -> int:
    """Return a count; a negative one, `true` or a text is none."""
    value = body.get(name) if isinstance(body, dict) else None
    if type(value) is not int or value < 0:
        raise UnclearError(f"The answer holds no count of {name}")
    return value


def read_batch(answer: Answer, sent: int) -> BatchResult:
    """Read what became of a batch of so many runs.

    Raises:
        UnclearError: if the answer does not account for each run that was sent.

    """
    body = answer.body
    inserted, duplicates = _count(body, "inserted"), _count(body, "duplicates")
    errors, reported = body.get("errors"), body.get("error_details")
    if not isinstance(errors, list) or not isinstance(reported, list | None):
        raise UnclearError("The answer to a batch cannot be read")
    details: dict[int, Rejected] | None = None
    if reported is not None:
        details = {_count(item, "index"): Rejected(_status(item), item.get("detail")) for item in reported}
        if len(details) != len(errors) or not all(index < sent for index in details):
            raise UnclearError("The answer to a batch names other errors than it counts")
    if inserted + duplicates + len(errors) != sent:
        raise UnclearError(f"The answer to a batch of {sent} accounts for {inserted + duplicates + len(errors)}")
    return BatchResult(inserted, duplicates, errors, details)


def _status(item: Any) -> int:
    """Return the status of a rejected item; one that says none, or nonsense, is a wrong body."""
    status = item.get("status")
    return status if type(status) is int and 400 <= status < 600 else _WRONG_BODY


def accounts_for(answer: Answer, sent: int) -> bool:
    """Return whether an answer accounts for so many events."""
    try:
        return _count(answer.body, "inserted") + _count(answer.body, "duplicates") == sent
    except UnclearError:
        return False


def named_fields(detail: object) -> set[str]:
    """Return the fields that a 422 complains about."""
    names: set[str] = set()
    for fault in detail if isinstance(detail, list) else ():
        place = fault.get("loc") if isinstance(fault, dict) else None
        if isinstance(place, list) and len(place) >= 2:
            names.add(str(place[1]))
    return names


def shown(answer: Answer) -> str:
    """Return an answer in few words."""
    who = "The daemon" if answer.is_daemons else "Something that is not telemetryd"
    detail = "" if answer.detail is None else f": {answer.detail}"
    return f"{who} answered {answer.status}{detail}"[:_MAX_SHOWN]


def retry_after_s(answer: Answer) -> float:
    """Return the seconds for which an answer asks us to wait, or 0."""
    return seconds_of(answer.headers.get("retry-after", ""))


def seconds_of(text: str) -> float:
    """Return the seconds of Retry-After (RFC 9110, 10.2.3: seconds or a date), or 0; never more than an hour."""
    text = text.strip()
    try:
        is_number = _SECONDS.fullmatch(text) is not None
        seconds = float(text) if is_number else parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError, OSError):  # no date, or one that no clock will show
        return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)


def parse_flow(text: str) -> tuple[int, float]:
    """Return the batch size and the pause in seconds of `batch=<rows>, pause=<milliseconds>`.

    What is missing or makes no sense counts as the default.
    """
    rows, pause_s = DEFAULT_ROWS, 0.0
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        digits = value.strip().lstrip("0") or "0"
        if value.strip().isascii() and value.strip().isdigit():
            number = int(digits[:_LONGEST_NUMBER])
            if name.strip() == "batch":
                rows = min(max(number, 1), MAX_ROWS)
            elif name.strip() == "pause":
                pause_s = min(number / 1000, _MAX_PAUSE_S)
    return rows, pause_s
