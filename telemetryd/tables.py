"""Runs as tables, CSV and Parquet: how the columns are typed, and how such files are written and read again."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

import orjson

from telemetryd import runs
from telemetryd.errors import TelemetrydError
from telemetryd.runs import COLUMNS, Role, format_timestamp

INSTALL: Final = "Parquet needs the package pyarrow, beside telemetryd: pip install pyarrow"
GROUP_BYTES: Final = 4 * 1024 * 1024
"""How much CSV becomes one row group of a Parquet file; so much is in memory a few times over."""

_JSON: Final = frozenset(runs.columns(Role.JSON))
_BOOLEANS: Final = frozenset(runs.columns(Role.BOOLEAN))
_SCHEMAS: Final = runs.Run.model_json_schema()["properties"]
TIMESTAMPS: Final = tuple(name for name in COLUMNS if "date-time" in str(_SCHEMAS[name]))
"""The fields that hold a moment."""
_INTEGERS: Final = frozenset(COLUMNS) - frozenset(runs.TEXTS) - _BOOLEANS

Fault = str
"""What is wrong with a record that cannot be read."""
Record = tuple[int, dict[str, Any] | Fault]
"""Where a record stands in its file (line or row, from 1), and a run's fields as JSON holds them; nulls left out."""


class NoParquetError(TelemetrydError):
    """Parquet needs the package pyarrow, which the extra `parquet` brings."""


# --- CSV -----------------------------------------------------------------------------------------

# Possessive, or the interpreter would remember each quote of a long text to come back to it.
_FIELD: Final = re.compile(r'(?:"((?:[^"]++|"")*+)"|([^",]*+))(,|$)')

MAX_RECORD: Final = 64 * 1024 * 1024
"""Characters of one record of CSV: more than the daemon takes as one run, however many quotes are doubled."""


def read_csv(file: IO[bytes]) -> Iterator[Record]:
    """Yield the records of CSV (RFC 4180) with a header; a field that is empty and has no quotes is null.

    Raises:
        OSError: if a record is longer than `MAX_RECORD`: no run is so long, but a text whose quote is not closed.

    """
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    header: list[str] | None = None
    try:
        for number, line in _csv_lines(text):
            fields = _csv_fields(line)
            if header is None:
                header = [name or "" for name in fields or ()]
            elif fields is None:
                yield number, "A quote stands where none may be"
            elif len(fields) != len(header):
                yield number, f"It has {len(fields)} fields, the header has {len(header)}"
            else:
                yield (
                    number,
                    {
                        name: _from_text(name, value)
                        for name, value in zip(header, fields, strict=True)
                        if value is not None
                    },
                )
    finally:
        text.detach()


def _csv_lines(text: IO[str]) -> Iterator[tuple[int, str]]:
    """Yield each record, without its line end, with the number of its first line; quoted fields hold line breaks."""
    parts: list[str] = []
    first = 1
    length = 0
    is_open = False
    for number, line in enumerate(iter(lambda: text.readline(MAX_RECORD + 1), ""), 1):
        if not parts:
            first, length = number, 0
        parts.append(line)
        length += len(line)
        if length > MAX_RECORD:
            raise OSError(f"The record that begins in line {first} does not end; is a quote not closed?")
        is_open ^= bool(line.count('"') % 2)
        if not is_open:
            record = "".join(parts).rstrip("\r\n")
            parts = []
            if record:
                yield first, record
    if parts:
        yield first, "".join(parts)


def _csv_fields(record: str) -> list[str | None] | None:
    """Return the fields of a record, or None if its quotes are wrong."""
    fields: list[str | None] = []
    at = 0
    while True:
        match = _FIELD.match(record, at)
        if match is None:
            return None
        quoted, bare, end = match.groups()
        fields.append(quoted.replace('""', '"') if quoted is not None else bare or None)
        if not end:
            return fields
        at = match.end()


def _from_text(name: str, text: str) -> object:
    """Return what a text stands for in its column; what cannot be read stays text, which the daemon refuses."""
    if name in _JSON:
        try:
            return orjson.loads(text)
        except ValueError:
            return text
    if name in _INTEGERS and re.fullmatch(r"-?\d{1,19}", text, re.ASCII):
        return int(text)
    if name in _BOOLEANS:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    return text


# --- Parquet -------------------------------------------------------------------------------------


def require_parquet() -> None:
    """See that Parquet can be written and read.

    Raises:
        NoParquetError: if pyarrow is not installed; the message says how to install it.

    """
    try:
        import pyarrow.csv  # noqa: PLC0415 - an optional package of 100 MB, which is loaded only when it is needed
        import pyarrow.parquet  # noqa: F401, PLC0415
    except ImportError as error:
        raise NoParquetError(INSTALL) from error


def parquet_schema() -> Any:
    """Return the columns' types: int64, bool, timestamp in µs of UTC, and string, from the definition of a run."""
    import pyarrow as pa  # noqa: PLC0415

    kinds = dict.fromkeys(COLUMNS, pa.string())
    kinds |= dict.fromkeys(_INTEGERS, pa.int64())
    kinds |= dict.fromkeys(_BOOLEANS, pa.bool_())
    kinds |= dict.fromkeys(TIMESTAMPS, pa.timestamp("us", "UTC"))
    return pa.schema([pa.field(name, kinds[name]) for name in COLUMNS])


def parquet_from_csv(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Turn the chunks of a CSV of ours, whole lines each, into those of a Parquet file (zstd), a row group at a time.

    pyarrow reads the CSV without holding the interpreter's lock, which making Python values would.
    """
    import pyarrow.csv  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    schema = parquet_schema()
    sink = _Sink()
    with pyarrow.parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        for group in _groups(chunks):
            read = pyarrow.csv.ReadOptions(
                use_threads=False, block_size=len(group) + 1, column_names=list(COLUMNS), encoding="utf8"
            )
            table = pyarrow.csv.read_csv(
                io.BytesIO(group),
                read,
                pyarrow.csv.ParseOptions(newlines_in_values=True),
                pyarrow.csv.ConvertOptions(
                    column_types=schema,
                    null_values=[""],
                    true_values=["true"],
                    false_values=["false"],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            )
            writer.write_table(table)
            yield sink.take()
    yield sink.take()


def _groups(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Join chunks to row groups, without the header, which is a chunk of its own."""
    lines = iter(chunks)
    next(lines)
    return join_pieces(lines, GROUP_BYTES)


def join_pieces(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Join pieces to larger ones of `size` bytes or more; the last one may be shorter."""
    joined: list[bytes] = []
    held = 0
    for piece in pieces:
        joined.append(piece)
        held += len(piece)
        if held >= size:
            yield b"".join(joined)
            joined, held = [], 0
    if joined:
        yield b"".join(joined)


class _Sink(io.RawIOBase):
    """Collects what is written until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []
        self._written = 0

    def writable(self) -> bool:
        """Return that it can be written."""
        return True

    def write(self, data: Any) -> int:
        """Keep some bytes."""
        self._parts.append(bytes(data))
        self._written += len(data)
        return len(data)

    def tell(self) -> int:
        """Return how much was written altogether."""
        return self._written

    def take(self) -> bytes:
        """Return what was written since the last time."""
        taken = b"".join(self._parts)
        self._parts = []
        return taken


_ROWS_AT_ONCE: Final = 64
"""A few bytes of Parquet may stand for very many long texts, so few rows are unpacked at once."""


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file.

    Raises:
        NoParquetError: if pyarrow is not installed.
        OSError: if it is no whole Parquet file; one that was cut off is none.

    """
    require_parquet()
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: _from_cell(name, value) for name, value in row.items() if value is not None}
    except pa.ArrowException as error:
        raise OSError(f"{path}: is no whole Parquet file: {error}") from error


def _from_cell(name: str, value: object) -> object:
    if isinstance(value, datetime):
        return format_timestamp(value)
    return _from_text(name, value) if isinstance(value, str) else value
