"""Parses dates and times, and formats them in the one stored form; the client uses it as well."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

# RFC 3339 and the ISO 8601 forms that hold a date and a time. Hour 24 and second 60 exist on paper
# only: no clock of ours can store them.
_DATE_AND_TIME: Final = re.compile(
    r"\d{4}(?:-?\d\d-?\d\d|-?[Ww]\d\d-?\d)[Tt ](?:[01]\d|2[0-3])(?::?[0-5]\d(?::?[0-5]\d(?:[.,]\d+)?)?)?"
    r"(?:[Zz]|[+-](?:[01]\d|2[0-3])(?::?[0-5]\d)?)?",
    re.ASCII,
)
_MAX_CHARACTERS: Final = 64

# The forms of nearly every agent, and of SQLite and Python, which need no arithmetic to become the stored one.
_USUAL: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ]((?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d)(?:\.(\d{1,6})\d{0,30})?(?:Z|\+00:00)?", re.ASCII
)


def format_timestamp(moment: datetime) -> str:
    """Return an aware moment in the one stored form: UTC, fixed width, text order = time order."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def canonical(text: str) -> str | None:
    """Return any ISO 8601 / RFC 3339 date and time in the stored form; digits past 1 µs are cut.

    None if the text is no such date and time, or falls outside the years 1 to 9999 in UTC.
    """
    try:
        if usual := _USUAL.fullmatch(text):
            date, time, fraction = usual.groups("")
            datetime.fromisoformat(date)  # is there such a day?
            return f"{date}T{time}.{fraction:0<6}Z"
        if len(text) <= _MAX_CHARACTERS and _DATE_AND_TIME.fullmatch(text):
            moment = datetime.fromisoformat(text.upper())
            return format_timestamp(moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        pass
    return None
