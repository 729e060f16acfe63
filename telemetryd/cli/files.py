"""Run files on their way to the daemon: parsing in any format, sending in batches, reporting each refusal by line."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import sys
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, cast

import click

from telemetryd.cli.documents import read_document
from telemetryd.cli.forms import Form, check_columns, recognise
from telemetryd.cli.options import Progress
from telemetryd.client.batch import Batch
from telemetryd.client.context import timestamp
from telemetryd.client.counters import Counters
from telemetryd.client.dead_letters import line_of
from telemetryd.client.delivery import MAX_BYTES, Delivery, Requests, RetryError, WaitError
from telemetryd.client.lines import dead_letter, encode, read_object, unfold
from telemetryd.client.worker import Backoff
from telemetryd.errors import ErrorItem, TelemetrydError, describe
from telemetryd.model import tables
from telemetryd.model.bodies import holds_more_values
from telemetryd.ops.logs import printable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

T = TypeVar("T")

_SHOWN: Final = 20
_KEPT: Final = 1000
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_GZIP: Final = b"\x1f\x8b"
_PARQUET: Final = b"PAR1"

READ_ERRORS: Final = (OSError, EOFError, UnicodeDecodeError, zlib.error, zstd.ZstdError, TelemetrydError)
"""What reading a file may raise."""

LONGEST_LINE_MIB: Final = 64
"""Four times what the daemon takes as one request by default: a run may be followed by its events."""

_BYTES_PER_VALUE: Final = 16
"""A line may hold one JSON value for so many bytes of the longest line: decoded, each takes several times as much."""

_PIECE: Final = 1 << 16


class Patience:
    """Repeats what may succeed later, until nothing has got on for too long or somebody stops us.

    Args:
        seconds: how long nothing may get on; None means for ever.
        stopped: is set when the work shall end.

    """

    def __init__(self, seconds: float | None, stopped: threading.Event) -> None:
        self._seconds = seconds
        self._stopped = stopped
        self._backoff = Backoff()

    def attempt(self, step: Callable[[], T], stopped: T) -> T:
        """Return what a step returns, or the other value if we were stopped.

        Raises:
            RetryError: if it failed for too long.

        """
        since = time.monotonic()
        while not self._stopped.is_set():
            try:
                done = step()
            except WaitError:
                raise
            except RetryError as error:
                waited = time.monotonic() - since
                if self._seconds is not None and waited >= self._seconds:
                    raise
                pause = self._backoff.pause_s(error)
                self._stopped.wait(pause if self._seconds is None else min(pause, self._seconds - waited))
            else:
                self._backoff.reset()
                return done
        return stopped


class Refusals:
    """Reports rejected lines on standard error, the first ones in full, and keeps them if a file is given."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._reported = 0
        self.places: dict[bytes, deque[tuple[str, int]]] = defaultdict(deque)
        """Where the lines that are on their way stand: the file, and the line or row in it, for each line so worded."""
        self.kept: list[dict[str, object]] = []
        """The first refusals, for a summary."""

    def add(self, lines: list[bytes], status: int | None, reason: object) -> None:
        """Take in refused lines."""
        places = [self.places[line].popleft() for line in lines if self.places.get(line)]
        name, number = places[0] if places else ("", 0)
        text = "; ".join(reasons(reason))
        if len(self.kept) < _KEPT:
            self.kept.append({"file": name or None, "line": number or None, "status": status, "reason": f"{text:.300}"})
        if self._reported < _SHOWN:
            self._reported += 1
            place = f"{name} line {number}: " if number else ""
            shown = lines[0].decode("utf-8", "replace")
            answer = "" if status is None else f" ({status})"
            click.echo(printable(f"telemetryd: {place}refused{answer}: {text:.300}: {shown:.200}"), err=True)
        if self._file is not None:
            with open(self._file, "ab", opener=_open_no_link) as out:
                out.write(b"".join(dead_letter(line, status, reason, timestamp()) for line in lines))


def _open_no_link(path: str, flags: int) -> int:
    """Open a file that may stand in another user's folder, where a link could lead to any file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def reasons(reason: object) -> list[str]:
    """Return each fault that a daemon's refusal names, in words."""
    return [_reason(fault) for fault in (reason if isinstance(reason, list) else [reason])]


def _reason(fault: object) -> str:
    """Say a fault without the line's number in its request, which nobody has seen."""
    if not (isinstance(fault, dict) and isinstance(fault.get("loc"), list) and "msg" in fault):
        return str(fault)
    place = [part for part in fault["loc"] if not isinstance(part, int)]
    return describe(cast("ErrorItem", {**fault, "loc": place}))


class Sending:
    """Sends files of runs: NDJSON, CSV or Parquet, plain, gzip or Zstandard, as their first bytes say.

    Args:
        requests: what sends a request.
        counters: take in what became of the lines.
        refusals: take in what the daemon refuses, and what cannot be read.
        patience: how long to try again.
        longest_line: bytes of a line of NDJSON that is read at all; of a longer one nothing is kept.

    """

    def __init__(
        self,
        requests: Requests,
        counters: Counters,
        refusals: Refusals,
        patience: Patience,
        longest_line: int = LONGEST_LINE_MIB << 20,
    ) -> None:
        self._delivery = Delivery(requests, refusals.add, counters)
        self._counters = counters
        self._refusals = refusals
        self._patience = patience
        self._longest_line = longest_line

    def send(self, name: str, drawn: Progress) -> None:
        """Send one file; - is standard input.

        Raises:
            RetryError: if the daemon takes nothing.
            OSError, EOFError, ZstdError, UnicodeDecodeError, TelemetrydError: if it cannot be read.

        """
        with click.open_file(name, "rb") as raw:
            total = Path(name).stat().st_size if name != "-" else 0
            file = io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
            waiting: list[bytes] = []
            length = 0
            try:
                for number, found in _records(name, file, self._longest_line):
                    if isinstance(found, str):
                        self._refuse(name, number, found)
                        continue
                    waiting += found
                    length += sum(map(len, found))
                    for line in found:
                        self._refusals.places[line].append((name, number))
                    if len(waiting) >= self._delivery.rows or length >= MAX_BYTES:
                        self._send(waiting)
                        waiting, length = [], 0
                        if total:
                            drawn(Path(name).name, min(raw.tell(), total), total)
            except READ_ERRORS:
                self._send(waiting)  # what comes before the place that cannot be read is as good as any
                raise
            self._send(waiting)
            if total:
                drawn(Path(name).name, total, total)

    def _refuse(self, name: str, number: int, fault: str) -> None:
        self._counters.sent += 1
        self._counters.dead += 1
        letter = encode({"file": name, "line": number}).rstrip()
        self._refusals.places[letter].append((name, number))
        self._refusals.add([letter], None, fault)

    def _send(self, lines: list[bytes]) -> None:
        if lines:
            batch = Batch.of(lines)
            try:
                self._patience.attempt(lambda: self._delivery.send(batch), None)
            except RetryError:
                self._delivery.give_up(batch)
                raise
            time.sleep(self._delivery.pause_s)
        self._refusals.places.clear()


def _records(name: str, file: Any, longest_line: int) -> Iterator[tuple[int, list[bytes] | tables.Fault]]:
    """Yield the place of each record with the lines that it means, or with what is wrong with it."""
    if file.peek(4).startswith(_PARQUET):
        if name == "-":
            raise OSError("Parquet cannot be read from standard input; give the file's name")
        yield from _as_lines(tables.read_parquet(Path(name)))
        return
    plain = _plain(file)
    form = recognise(plain)
    if form is Form.CSV:
        yield from _as_lines(tables.read_csv(plain, partial(check_columns, name)))
        return
    lines = read_document if form is Form.JSON else read_lines
    for number, line in lines(plain, longest_line):
        if line is None:
            yield number, f"The line is longer than {longest_line >> 20} MiB; --longest-line MIB reads longer ones"
        elif holds_more_values(line, longest_line // _BYTES_PER_VALUE):
            yield number, f"The line holds more than {longest_line // _BYTES_PER_VALUE:,} JSON values (--longest-line)"
        elif found := [text for text in unfold(_unwrap(line.strip())) if text]:
            yield number, found


def read_lines(file: BinaryIO, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number; None in place of one that is longer, of which nothing is kept."""
    for number in itertools.count(1):
        parts: list[bytes] = []
        size = 0
        while piece := file.readline(_PIECE):
            size += len(piece)
            if size <= longest:
                parts.append(piece)
            else:
                parts.clear()
            if piece.endswith(b"\n"):
                break
        if not size:
            return
        yield number, b"".join(parts) if size <= longest else None


def _as_lines(records: Iterator[tables.Record]) -> Iterator[tuple[int, list[bytes] | tables.Fault]]:
    for number, record in records:
        yield number, record if isinstance(record, str) else [encode(record).rstrip()]


def _plain(file: Any) -> Any:
    """Return a file's bytes, unpacked if the first ones say so; they can be peeked at."""
    start = file.peek(4)[:4]
    if start.startswith(_GZIP):
        return io.BufferedReader(cast("io.RawIOBase", gzip.open(file)))
    if start == _ZSTD:
        return io.BufferedReader(cast("io.RawIOBase", zstd.open(file)))
    return file


def _unwrap(line: bytes) -> bytes:
    """Return the line that a dead letter holds; any other line as it is."""
    if line.startswith(b'{"time":'):
        letter = read_object(line) or {}
        if {"reason", "status", "line"} <= letter.keys():
            return line_of(letter)
    return line
