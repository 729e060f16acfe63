"""Runs as tables, CSV and Parquet: column types, writing and reading."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Final

import orjson

from telemetryd.errors import TelemetrydError
from telemetryd.model import runs
from telemetryd.model.runs import COLUMNS
from telemetryd.model.values import Role, format_timestamp

INSTALL: Final = "Parquet needs the package pyarrow, next to telemetryd: pip install pyarrow"
GROUP_BYTES: Final = 4 * 1024 * 1024
"""How much JSON becomes one row group of a Parquet file; so much is in memory a few times over."""

CHUNK_BYTES: Final = 256 * 1024
"""About how much of an export is in one piece, besides a single line of any length."""
CSV_HEADER: Final = (",".join(COLUMNS) + "\r\n").encode()

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

MAX_COLUMNS: Final = 10_000
"""Columns of CSV: more than any table of runs has."""

MAX_RECORD: Final = 64 * 1024 * 1024
"""Characters of one record of CSV: more than the daemon takes as one run, however many quotes are doubled."""


def read_csv(file: IO[bytes], check: Callable[[list[str]], None] = lambda _: None) -> Iterator[Record]:
    """Yield the records of CSV (RFC 4180) with a header; a field that is empty and has no quotes is null.

    Args:
        file: what to read.
        check: takes the header, and raises what is wrong with it.

    Raises:
        OSError: if a record is longer than `MAX_RECORD`: no run is so long, but a text whose quote is not closed; or if
            there are more than `MAX_COLUMNS`, or the header is no UTF-8.

    """
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    header: list[str] | None = None
    try:
        for number, line in _csv_lines(text):
            fields = _csv_fields(line)
            fault = _undecodable(line, number)
            if header is None:
                if fault is not None:
                    raise OSError(fault)
                header = [name or "" for name in fields or ()]
                if len(header) > MAX_COLUMNS:
                    raise OSError(f"It has more than {MAX_COLUMNS:,} columns")
                check(header)
            elif fault is not None:
                yield number, fault
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


def _undecodable(record: str, first: int) -> Fault | None:
    """Say where a record that begins in a line holds the first byte that is no UTF-8, if it does."""
    try:
        record.encode()
    except UnicodeEncodeError as error:
        before, byte = record[: error.start], ord(record[error.start]) & 0xFF
        number = first + before.count("\n")
        at = len(before.rpartition("\n")[2].encode()) + 1
        return (
            f"Line {number} holds the byte 0x{byte:02X} at its place {at}, which is no UTF-8: save the file as UTF-8 "
            "(iconv -f LATIN1 -t UTF-8 FILE, if it is in Latin-1)"
        )
    return None


def _csv_fields(record: str) -> list[str | None] | None:
    """Return the fields of a record, no more than are looked at, or None if its quotes are wrong."""
    fields: list[str | None] = []
    at = 0
    while True:
        match = _FIELD.match(record, at)
        if match is None:
            return None
        quoted, bare, end = match.groups()
        fields.append(quoted.replace('""', '"') if quoted is not None else bare or None)
        if not end or len(fields) > MAX_COLUMNS:
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
        import pyarrow.json  # noqa: PLC0415 - an optional package of 100 MB, which is loaded only when it is needed
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


def parquet_from_lists(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Turn runs into the chunks of a Parquet file (zstd), a row group at a time.

    Each piece is a JSON object with the values of some runs, a list for each field, as pyarrow reads it with few steps
    and without the interpreter's lock, which making Python values would hold.
    """
    import pyarrow.parquet  # noqa: PLC0415

    sink = _Sink()
    with pyarrow.parquet.ParquetWriter(sink, parquet_schema(), compression="zstd") as writer:
        for group in join_pieces((piece + b"\n" for piece in pieces), GROUP_BYTES):
            writer.write_table(_table(group))
            yield sink.take()
    yield sink.take()


def _table(lines: bytes) -> Any:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute as pc  # noqa: PLC0415
    import pyarrow.json  # noqa: PLC0415

    schema = parquet_schema()
    lists = pa.schema([pa.field(field.name, pa.list_(field.type)) for field in schema])
    read = pyarrow.json.read_json(
        io.BytesIO(lines),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
        pyarrow.json.ParseOptions(explicit_schema=lists, unexpected_field_behavior="error"),
    )
    table = pa.table([pc.list_flatten(column) for column in read.columns], schema=schema)
    table.validate(full=True)  # else text that is no UTF-8 would only be found by those who read the file
    return table


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
_PAGE_BYTES: Final = 1024 * 1024
_LARGE_BYTES: Final = 16 * 1024 * 1024
_MOST_NESTED: Final = 10_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS: Final = {"s": (1, 1_000_000), "ms": (1, 1000), "us": (1, 1), "ns": (1000, 1)}
"""The divisor and factor that turn counts of a unit into microseconds; what is finer is cut off."""


def read_parquet(path: Path, most_nested: int = _MOST_NESTED) -> Iterator[Record]:
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
            chosen = _choose(path, file, most_nested)
            texts = [field.name for field in file.schema_arrow if field.name in chosen and _is_text(field.type)]
        # A text that is repeated stays in memory once, and pages are read one after the other.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts, buffer_size=_PAGE_BYTES) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=chosen):
                for row in _rows(batch):
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise OSError(f"{path}: is no whole Parquet file: {error}") from error


def _choose(path: Path, file: Any, most_nested: int) -> list[str]:
    """Return the columns that are fields of a run; others cannot cost one anything.

    Raises:
        OSError: if there is none, or one twice, or one whose lists hold more than can be in memory.

    """
    chosen = [field.name for field in file.schema_arrow if field.name in COLUMNS]
    if not chosen:
        raise OSError(f"{path}: has no column that is a field of a run")
    if twice := [name for name in dict.fromkeys(chosen) if chosen.count(name) > 1]:
        raise OSError(f"{path}: has more than one column of the name {twice[0]}; which one is meant is unknown")
    leaves = [file.schema.column(index).path.split(".") for index in range(len(file.schema))]
    nested = [index for index, leaf in enumerate(leaves) if len(leaf) > 1 and leaf[0] in chosen]
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    if any(group.column(index).num_values > most_nested for group in groups for index in nested):
        raise OSError(f"{path}: a row group holds more than {most_nested:,} values inside of one column")
    return chosen


def _is_text(kind: Any) -> bool:
    import pyarrow as pa  # noqa: PLC0415

    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _rows(batch: Any) -> Iterator[dict[str, Any] | Fault]:
    """Yield rows as records, one with a cell that Python cannot hold as what is wrong with it."""
    columns = [(name, _cells(column)) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    for index in range(batch.num_rows):
        row: dict[str, Any] = {}
        faults = []
        for name, cells in columns:
            try:
                if (value := _from_cell(name, cells[index])) is not None:
                    row[name] = value
            except (ValueError, OverflowError, KeyError) as error:  # KeyError: a time zone that nobody knows
                faults.append(f"{name}: cannot be read: {error}")
        yield "; ".join(faults) if faults else row


def _cells(column: Any) -> Sequence[object]:
    """Return the values of a column: all at once, or each when it is asked for, if they are large or one is odd."""
    import pyarrow as pa  # noqa: PLC0415

    if pa.types.is_timestamp(column.type):  # not by way of Arrow, which wants pandas for ns
        return _Lazy(column.cast(pa.int64()), _UNITS[column.type.unit])
    if pa.types.is_dictionary(column.type):
        if _may_be_large(column):
            return _Lazy(column)
        column = column.dictionary_decode()  # much quicker than one by one
    try:
        values: list[object] = column.to_pylist()
    except (ValueError, OverflowError, KeyError):
        return _Lazy(column)
    return values


def _may_be_large(column: Any) -> bool:
    """Return whether the texts that a column repeats may take much memory when each stands for itself."""
    import pyarrow.compute as pc  # noqa: PLC0415

    texts = column.dictionary
    if texts.nbytes <= _PAGE_BYTES or not _is_text(texts.type):
        return False
    longest = pc.max(pc.binary_length(texts)).as_py() or 0
    return bool(longest * len(column) > _LARGE_BYTES)


class _Lazy(Sequence[object]):
    """The values of a column, each made when it is asked for; counts of a unit of time become moments."""

    def __init__(self, column: Any, unit: tuple[int, int] | None = None) -> None:
        self._column = column
        self._unit = unit

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        value = self._column[index].as_py()
        if self._unit is None or value is None:
            return value
        divisor, factor = self._unit
        try:
            return _EPOCH + timedelta(microseconds=value * factor // divisor)
        except OverflowError:
            raise ValueError("it lies outside of the years 1 to 9999") from None


def _from_cell(name: str, value: object) -> object:
    if isinstance(value, datetime):
        return format_timestamp(value if value.tzinfo is not None else value.replace(tzinfo=UTC))
    if isinstance(value, date):
        return f"{value.isoformat()}T00:00:00Z"
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):  # pandas says so where a number is missing
            return None
        raise ValueError(f"{value} is no number of JSON")
    return _from_text(name, value) if isinstance(value, str) else value
