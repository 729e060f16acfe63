"""JSON log lines (or readable ones on a terminal), written off the event loop."""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple, TextIO

import click
import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from telemetryd.errors import error_type
from telemetryd.ops.journal import is_journal, marked

LOGGER_NAME: Final = "telemetry_api"
log: Final = logging.getLogger(LOGGER_NAME)
"""The one logger of the daemon; the name is the guide's."""

_BACKLOG: Final = 20_000
"""Lines that may wait for a slow sink before new ones are dropped (and counted)."""

_GATHER_S: Final = 0.01
"""How long the writing thread lets lines gather: woken for each, it would compete with the event loop."""

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class Line(NamedTuple):
    """A line of our own that carries no exception: what a `logging.LogRecord` of it would hold."""

    created: float
    level: int
    message: str
    fields: Mapping[str, Any]

    def record(self) -> logging.LogRecord:
        """Return the record that `logging` would have made."""
        named = {"name": LOGGER_NAME, "levelno": self.level, "levelname": logging.getLevelName(self.level)}
        moment = {"created": self.created, "msecs": self.created % 1 * 1000}
        return logging.makeLogRecord({**self.fields, **named, **moment, "msg": self.message})


def write_line(level: int, message: str, fields: Mapping[str, Any]) -> None:
    """Log as `log.log(level, message, extra=fields)` does, for a fraction of its time; call it if that level is on.

    There is a line for each request, and to make a record takes longer than most of what else is done for one.
    """
    backlog = _root.handlers[0] if _root.handlers else None
    if isinstance(backlog, _Backlog):
        backlog.take(Line(time.time(), level, message, fields))
    else:
        log.log(level, message, extra=fields)


_root: Final = logging.getLogger()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a record carries beyond its message: its extra fields, and its exception."""
    fields = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
    if record.exc_info and record.exc_info[1] is not None:
        fields.setdefault("error_type", error_type(record.exc_info[1]))
        fields.setdefault("error_message", str(record.exc_info[1]))
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


class JsonLines(OrjsonFormatter):
    """One JSON object a line, in the guide's field names and its spacing.

    The guide's commands search for `"level": "ERROR"`, with a blank after the colon, which orjson does
    not write; so the blanks are put in afterwards.
    """

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        """Fill in the line's fields in the guide's order."""
        log_data["timestamp"] = f"{_second(int(record.created))}.{int(record.msecs):03d}Z"
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        log_data["message"] = record.getMessage()
        log_data.update(message_dict)
        log_data.update(_fields(record))

    def format_line(self, line: Line) -> str:
        """Return the same as `format` does of the line's record."""
        begin = {
            "timestamp": f"{_second(int(line.created))}.{int(line.created % 1 * 1000):03d}Z",
            "level": logging.getLevelName(line.level),
            "logger": LOGGER_NAME,
            "message": line.message,
        }
        return self.jsonify_log_record({**begin, **line.fields})

    def jsonify_log_record(self, log_data: dict[str, Any]) -> str:
        """Serialise one line; what JSON lacks is written as its text."""
        try:
            line = orjson.dumps(log_data).decode()
        except TypeError:
            line = ""
        # Each name ends in a quotation mark and a colon, each of the values but the last in a comma before the
        # next name. If the line holds no more of these, none stands in a value, where no blank may be added.
        if line.count('":') == len(log_data) == line.count(',"') + 1 and line.isprintable():
            return line.replace('":', '": ').replace(',"', ', "')
        return "{" + ", ".join([f"{_name(name)}: {_dumps(value)}" for name, value in log_data.items()]) + "}"


@lru_cache(maxsize=4)
def _second(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(maxsize=1024)
def _name(name: str) -> str:
    return _dumps(name)


def _dumps(value: object) -> str:
    try:
        text = orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # a lone surrogate, an integer of more than 64 bits, too deep a nesting
        return json.dumps(str(value))
    return printable(text)


def printable(text: str) -> str:
    """Return a text in which whatever could control a terminal, or break its line, is escaped."""
    return text if text.isprintable() else _UNUSUAL.sub(_escape, text)


# JSON itself escapes what is below a blank only; terminals and viewers also act on the 8-bit controls, on
# U+2028 as a line's end, on marks that turn the direction of what follows, on tags that are not seen. Surrogates,
# which stand for bytes of a name that is not UTF-8, cannot be written.
_UNUSUAL: Final = re.compile(r"[^\x20-\x7e]")


def _escape(match: re.Match[str]) -> str:
    sign = match[0]
    return sign if sign.isprintable() else json.dumps(sign)[1:-1]


_COLOURS: Final = {
    "DEBUG": "bright_black",
    "INFO": "green",
    "WARNING": "yellow",
    "ERROR": "red",
    "CRITICAL": "magenta",
}


class ReadableLines(logging.Formatter):
    """A line for people: time, level, message, then name=value. Control characters are escaped.

    What the message or the traceback says already is not said again.
    """

    def __init__(self, *, coloured: bool = True) -> None:
        super().__init__()
        self._coloured = coloured

    def format_line(self, line: Line) -> str:
        """Return the same as `format` does of the line's record."""
        return self.format(line.record())

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback follows on separate lines."""
        fields = _fields(record)
        traceback = fields.pop("traceback", None)
        moment = datetime.fromtimestamp(record.created).astimezone()
        message = record.getMessage()
        extras = "".join(
            f" {self._paint(name, dim=True)}={_dumps(value)}"
            for name, value in fields.items()
            if value is not None and not _is_said(name, value, message, traceback)
        )
        level = self._paint(f"{record.levelname:<8}", fg=_COLOURS.get(record.levelname))
        if not message.isprintable():
            message = message.encode("unicode_escape").decode("ascii")
        line = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d} {level} {message}{extras}"
        return "\n".join([line, *map(printable, traceback.split("\n"))]) if traceback else line

    def _paint(self, text: str, **look: Any) -> str:
        return click.style(text, **look) if self._coloured else text


def _is_said(name: str, value: object, message: str, traceback: str | None) -> bool:
    if name in ("error_type", "error_message") and traceback is not None:
        return True
    return name in ("endpoint", "error_message") and str(value) in message


class JournalLines:
    """The lines of another formatter, each with its severity."""

    def __init__(self, formatter: JsonLines | ReadableLines) -> None:
        self._formatter = formatter

    def format_line(self, line: Line) -> str:
        """Return the same as `format` does of the line's record."""
        return marked(self._formatter.format_line(line), line.level)

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return marked(self._formatter.format(record), record.levelno)


_Entry = Line | logging.LogRecord | None
"""What waits to be written; None closes."""


class _Backlog(logging.handlers.QueueHandler):
    """Hands records to the writing thread; when that is stuck, drops and counts instead of waiting."""

    def __init__(self, records: queue.SimpleQueue[_Entry]) -> None:
        super().__init__(records)
        self._records = records
        self.dropped = 0
        """Lines dropped so far; it only grows, so the writing thread can read it at any time."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Leave the formatting to the writing thread."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put a record without ever waiting."""
        self.take(record)

    def take(self, entry: Line | logging.LogRecord) -> None:
        """Put a line or a record without ever waiting."""
        if self._records.qsize() >= _BACKLOG:
            self.dropped += 1
        else:
            self._records.put(entry)


class _Sink(threading.Thread):
    """Formats and writes records; everything that waits goes out in one write."""

    def __init__(
        self,
        records: queue.SimpleQueue[_Entry],
        formatter: JsonLines | ReadableLines | JournalLines,
        stream: TextIO,
        backlog: _Backlog,
    ) -> None:
        super().__init__(name="log-writer", daemon=True)
        self._records = records
        self._formatter = formatter
        self._stream = stream
        self._backlog = backlog
        self._unwritten = 0
        self._reported = 0

    def run(self) -> None:
        """Write until the closing None arrives."""
        closing = False
        while not closing:
            batch = [self._records.get()]
            if batch[0] is not None:
                time.sleep(_GATHER_S)
            while len(batch) < 1000 and not self._records.empty():
                batch.append(self._records.get())
            closing = None in batch
            lines = [self._line(entry) for entry in batch if entry is not None]
            dropped = self._backlog.dropped + self._unwritten
            if dropped > self._reported:
                lines.append(self._line(_dropped_record(dropped - self._reported)))
            try:
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._stream.flush()
            except (OSError, ValueError):
                # Nobody reads the log any more (a closed pipe, a full disk): answering matters more.
                self._unwritten += len(batch)
            else:
                self._reported = dropped

    def _line(self, entry: Line | logging.LogRecord) -> str:
        try:
            return self._formatter.format_line(entry) if isinstance(entry, Line) else self._formatter.format(entry)
        except Exception as error:  # noqa: BLE001 - one bad call of a library's must not end all logging
            record = entry.record() if isinstance(entry, Line) else entry
            bad = {"name": record.name, "levelno": logging.ERROR, "levelname": "ERROR", "msg": "Log line not formatted"}
            about = {"error_type": type(error).__name__, "error_message": str(error), "template": str(record.msg)}
            return self._formatter.format(logging.makeLogRecord({**bad, **about}))


def _dropped_record(dropped: int) -> logging.LogRecord:
    return logging.makeLogRecord(
        {
            "name": LOGGER_NAME,
            "levelno": logging.WARNING,
            "levelname": "WARNING",
            "msg": "Log lines dropped",
            "dropped": dropped,
        }
    )


@contextmanager
def logging_to(stream: TextIO, level: LogLevel, form: LogFormat) -> Iterator[None]:
    """Send every logger's lines (ours and the libraries') to one stream until the block ends."""
    terminal = stream.isatty()
    readable = form is LogFormat.TEXT or (form is LogFormat.AUTO and terminal)
    formatter = ReadableLines(coloured=terminal) if readable else JsonLines()
    marking = JournalLines(formatter) if is_journal(stream) else formatter
    records: queue.SimpleQueue[_Entry] = queue.SimpleQueue()
    backlog = _Backlog(records)
    sink = _Sink(records, marking, stream, backlog)
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    # No line shows these, and collecting them costs (docs.python.org/3/howto/logging.html#optimization).
    facts = ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks", "_srcfile")
    collected = {fact: getattr(logging, fact) for fact in facts if hasattr(logging, fact)}
    for fact in collected:
        setattr(logging, fact, None)
    root.handlers[:] = [backlog]
    set_level(level)
    logging.captureWarnings(True)
    sink.start()
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for fact, value in collected.items():
            setattr(logging, fact, value)
        root.handlers[:], level_before = before
        root.setLevel(level_before)
        records.put(None)
        sink.join(timeout=2)


def set_level(level: LogLevel) -> None:
    """Write no less severe lines from now on."""
    _root.setLevel(level.value)
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLevelName(level.value)))


class LogLevel(StrEnum):
    """The least severe log lines that are written."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class LogFormat(StrEnum):
    """How a log line looks; auto is text on a terminal and JSON elsewhere."""

    AUTO = "auto"
    JSON = "json"
    TEXT = "text"
