"""Reads and writes a position in a distributed trace, as W3C Trace Context has it in TRACEPARENT and traceparent."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple, Self

VARIABLE: Final = "TRACEPARENT"
"""The variable by which a program hands its position to its children (OpenTelemetry, environment variable carriers)."""
HEADER: Final = "traceparent"
"""The header by which a client hands it to a server (W3C Trace Context, section 3.2)."""

# A later version may append fields; version ff is invalid, as are ids of zeros only (sections 3.2.2 and 4.3).
_TRACEPARENT: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII
)
_SAMPLED: Final = "01"


class Span(NamedTuple):
    """One operation of a trace."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    flags: str = _SAMPLED
    """Two hexadecimal digits, which are handed on as they come."""

    @classmethod
    def parse(cls, text: str | None) -> Self | None:
        """Return the span that a traceparent names; None if the text is missing or malformed, as the standard asks."""
        match = _TRACEPARENT.fullmatch(text.strip()) if text else None
        if match is None or (match[1] == "00" and match[5]):
            return None
        return cls(match[2], match[3], match[4])

    @classmethod
    def begin(cls, parent: Span | None = None) -> Self:
        """Return a new span of its parent's trace; without a parent, of a new trace."""
        trace_id = os.urandom(16).hex() if parent is None else parent.trace_id
        return cls(trace_id, os.urandom(8).hex(), _SAMPLED if parent is None else parent.flags)

    def __str__(self) -> str:
        """Return the traceparent."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"
