"""Marks lines with their severity, so that `journalctl -p err` finds errors, where a stream is systemd's journal."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final, TextIO

_ERROR: Final = "<3>"
_SEVERITIES: Final = (
    (logging.CRITICAL, "<2>"),
    (logging.ERROR, _ERROR),
    (logging.WARNING, "<4>"),
    (logging.INFO, "<6>"),
)
"""The least level of each severity but the last, `<7>` (sd-daemon(3))."""
_LONGEST: Final = 12_000
"""Characters of a line, of four bytes each at most: the journal ends it after 48 KiB (LineMax=, journald.conf(5))."""


def is_journal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a stream is the one that systemd has connected to its journal (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it is no file, or closed
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def marked(text: str, level: int) -> str:
    """Return a text, each of its lines with the severity of a level."""
    severity = _severity(level)
    if len(text) <= _LONGEST and "\n" not in text and "\0" not in text:
        return severity + text
    return severity + f"\n{severity}".join(_lines(text))


def _lines(text: str) -> Iterator[str]:
    """Yield what the journal would take for lines: it reads a severity at the beginning of each."""
    for line in text.replace("\0", "\n").split("\n"):
        yield line[:_LONGEST]
        for start in range(_LONGEST, len(line), _LONGEST):
            yield line[start : start + _LONGEST]


@lru_cache(maxsize=16)
def _severity(level: int) -> str:
    return next((mark for least, mark in _SEVERITIES if level >= least), "<7>")


class ErrorLines(io.TextIOWrapper):
    """A standard error that is the journal: marks each line as an error, however many writes it comes in."""

    _begin = _ERROR
    """What comes before the next character: nothing in the middle of a line."""

    def write(self, text: str) -> int:
        """Write a text; return the number of its characters."""
        is_line = text.endswith("\n")
        if text:
            super().write(self._begin + f"\n{_ERROR}".join(_lines(text.removesuffix("\n"))) + "\n" * is_line)
            self._begin = _ERROR if is_line else ""
        return len(text)
