"""Which form a file of runs has: what is none that we read is refused, with what it seems to be."""

from __future__ import annotations

import codecs
from collections import Counter
from enum import Enum, auto
from typing import Any, Final

import click

from telemetryd.cli.documents import is_document
from telemetryd.errors import TelemetrydError
from telemetryd.model.runs import ANSWERED, Run
from telemetryd.ops.logs import printable

_LOOKED_AT: Final = 4096
_FOREIGN: Final = (
    (
        b"SQLite format 3\0",
        "a SQLite database: write its runs to a file with telemetryd export, after telemetryd migrate if it is of 3.x",
    ),
    (b"PK\x03\x04", "a ZIP archive (or a workbook); unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\xfd7zXZ\0", "packed by xz; unpack it first (xz -dc FILE | telemetryd import -)"),
    (b"BZh", "packed by bzip2; unpack it first (bzip2 -dc FILE | telemetryd import -)"),
    (b"%PDF-", "a PDF"),
    (codecs.BOM_UTF32_LE, "text in UTF-32; save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "text in UTF-16; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "text in UTF-16; save it as UTF-8"),
)
_SEPARATORS: Final = {";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_REQUIRED: Final = tuple(name for name, about in Run.model_fields.items() if about.is_required())
_MOST_NAMED: Final = 10


class UnknownFormError(TelemetrydError):
    """A file is in no form that we read."""


class Form(Enum):
    """The forms of text; Parquet is none."""

    NDJSON = auto()
    JSON = auto()
    """An array, also under `runs`, or objects over many lines."""
    CSV = auto()


def recognise(file: Any) -> Form:
    """Return the form of a file that can be peeked at; a byte order mark of UTF-8 is read, and means nothing.

    Raises:
        UnknownFormError: if it is none that we read.

    """
    if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    start = file.peek(_LOOKED_AT)[:_LOOKED_AT]
    for mark, meaning in _FOREIGN:
        if start.startswith(mark):
            raise UnknownFormError(f"This is {meaning}")
    if b"\0" in start:  # which no text of a run holds, unlike other control characters
        raise UnknownFormError("This is a binary file; runs are read from NDJSON, JSON, CSV and Parquet")
    first = start.lstrip()[:1]
    if first == b"<":
        raise UnknownFormError("This is HTML or XML, perhaps a page that asks to log in, and holds no runs")
    if first not in (b"", b"{", b"["):
        return Form.CSV
    return Form.JSON if is_document(start) else Form.NDJSON


def check_columns(name: str, header: list[str]) -> None:
    """Report the columns of CSV that are no fields of a run, which the daemon ignores.

    Raises:
        UnknownFormError: if columns are missing that every run has, or one of a run's stands there twice.

    """
    twice = [column for column, count in Counter(header).items() if count > 1 and column in ANSWERED]
    if twice:
        raise UnknownFormError(
            f"The first line names {' and '.join(twice)} more than once; which one is meant is unknown, so rename or "
            "delete the others"
        )
    missing = [column for column in _REQUIRED if column not in header]
    if missing:
        raise UnknownFormError(
            f"The first line is not the header of a CSV file of runs: it lacks {', '.join(missing)}; "
            f"{_separator(header)}"
        )
    unknown = [column for column in header if column not in ANSWERED]
    if unknown:
        more = "" if len(unknown) <= _MOST_NAMED else f" and {len(unknown) - _MOST_NAMED} more"
        shown = ", ".join(repr(f"{column:.50}") for column in unknown[:_MOST_NAMED]) + more
        click.echo(printable(f"telemetryd: {name}: columns that are no fields of a run are ignored: {shown}"), err=True)


def _separator(header: list[str]) -> str:
    """Say which separator was found, from a header that was split at commas."""
    if len(header) > 1:
        return f"{len(header)} columns were found, separated by a comma"
    for sign, words in _SEPARATORS.items():
        if sign in header[0]:
            return f"the separator found is {words}, a comma is needed"
    return "no separator was found, a comma is needed"
