from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.ops.journal import ErrorLines, is_journal, marked
from telemetryd.ops.logs import JsonLines, Line, LogFormat, LogLevel, ReadableLines, log, logging_to, write_line
from tests.conftest import PATIENCE_S, Api, StartDaemon, make_run
from tests.tools.forks import popen

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)
UNSAFE = "a\nb\rc\x1b[31md\x00e\x7ff\x85g\x9b31mh\u2028i\u2029j\u202ek\ufeffl\U000e0041m\u00adn\ue000o"


@contextlib.contextmanager
def written(level: LogLevel = LogLevel.INFO, form: LogFormat = LogFormat.AUTO) -> Iterator[list[str]]:
    """Collect the raw lines that are logged inside the block; they are there when it has ended."""
    stream, lines = io.StringIO(), list[str]()
    with logging_to(stream, level, form):
        yield lines
    assert stream.getvalue().endswith("\n") or not stream.getvalue()
    lines += stream.getvalue().split("\n")[:-1]


def record(message: str = "Query executed", **fields: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "telemetry_api", "levelname": "INFO", "msg": message, **fields})


# --- JSON lines ----------------------------------------------------------------------------------


def test_a_line_has_the_guides_fields_in_the_guides_order_and_spacing() -> None:
    fields = {"endpoint": "/api/v1/runs", "query_params": {"agent_name": "hugo", "limit": 100}, "result_count": 5}
    with written() as lines:
        log.info("Query executed", extra={**fields, "duration_ms": 0.45, "is_slow": False})
    (line,) = lines
    timestamp = json.loads(line)["timestamp"]
    assert TIMESTAMP.fullmatch(timestamp)
    assert abs((datetime.fromisoformat(timestamp) - datetime.now(UTC)).total_seconds()) < 60
    assert line == (
        f'{{"timestamp": "{timestamp}", "level": "INFO", "logger": "telemetry_api", "message": "Query executed", '
        '"endpoint": "/api/v1/runs", "query_params": {"agent_name":"hugo","limit":100}, "result_count": 5, '
        '"duration_ms": 0.45, "is_slow": false}'
    )


@pytest.mark.parametrize(
    ("created", "shown"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1766570400.0009, "2025-12-24T10:00:00.000Z"),
        (1766570400.9999, "2025-12-24T10:00:00.999Z"),
    ],
)
def test_a_timestamp_has_milliseconds_and_is_never_in_the_future(created: float, shown: str) -> None:
    assert json.loads(JsonLines().format(record(created=created, msecs=created % 1 * 1000)))["timestamp"] == shown


@pytest.mark.parametrize("formatter", [JsonLines(), ReadableLines()], ids=["json", "text"])
def test_nothing_that_is_logged_can_break_or_paint_its_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record(UNSAFE, event_id=UNSAFE, nested={UNSAFE: [UNSAFE]}))
    assert len(line.splitlines()) == 1
    own_colours = re.sub(r"\x1b\[(0|2|3[0-7]|9[0-7])m", "", line) if isinstance(formatter, ReadableLines) else line
    assert own_colours.isprintable()
    assert "\\u2028" in line


@given(
    st.dictionaries(
        st.text(st.sampled_from('ab":,\\\\ \n'), min_size=1).filter(lambda name: name not in record().__dict__),
        st.recursive(
            st.text(st.sampled_from('ab":,\\\\ \n')) | st.integers(0, 9) | st.none(),
            lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text("a:,", min_size=1), part, max_size=3),
        ),
        max_size=5,
    )
)
def test_blanks_stand_between_the_fields_and_nowhere_else(fields: dict[str, object]) -> None:
    plain = record()
    vars(plain).update(fields)
    line = JsonLines().format(plain)
    known = {name: json.loads(line)[name] for name in ("timestamp", "level", "logger", "message")}
    expected = [f"{orjson.dumps(name).decode()}: {orjson.dumps(value).decode()}" for name, value in known.items()]
    expected += [f"{orjson.dumps(name).decode()}: {orjson.dumps(value).decode()}" for name, value in fields.items()]
    assert line == "{" + ", ".join(expected) + "}"


@given(
    st.floats(0, 4e9, allow_nan=False),
    st.sampled_from([logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR]),
    st.text(),
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name not in record().__dict__ and name not in ("message", "asctime")),
        st.text() | st.integers() | st.floats() | st.booleans() | st.none() | st.just(Path("/x")),
        max_size=5,
    ),
)
def test_a_line_without_a_record_is_the_line_of_its_record(
    created: float, level: int, message: str, fields: dict[str, object]
) -> None:
    line = Line(created, level, message, fields)
    for formatter in (JsonLines(), ReadableLines()):
        assert formatter.format_line(line) == formatter.format(line.record())


def test_a_line_that_cannot_be_formatted_does_not_end_the_log() -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise ValueError("no words")

    with written() as lines:
        write_line(logging.INFO, "Request answered", {"value": Unspeakable()})
        write_line(logging.INFO, "Request answered", {"value": 1})
    assert [json.loads(line)["message"] for line in lines] == ["Log line not formatted", "Request answered"]


def test_json_gives_everything_back() -> None:
    line = JsonLines().format(record(UNSAFE, event_id=UNSAFE, emoji="𝄞ä", nested={UNSAFE: [UNSAFE]}))
    read = json.loads(line)
    assert read["message"] == read["event_id"] == UNSAFE
    assert read["nested"] == {UNSAFE: [UNSAFE]}
    assert '"emoji": "𝄞ä"' in line


@pytest.mark.parametrize(
    "value", [Path("/x"), {1: 2}, {None: 1}, float("nan"), b"\xff", object(), datetime(2025, 1, 1), {1, 2}]
)
def test_what_json_lacks_is_written_all_the_same(value: object) -> None:
    for formatter in (JsonLines(), ReadableLines()):
        assert formatter.format(record(value=value))
    assert "value" in json.loads(JsonLines().format(record(value=value)))


@pytest.mark.parametrize("value", ["\ud800", "a\udcff", 2**70, -(2**70)])
def test_what_orjson_refuses_is_written_all_the_same(value: object) -> None:
    with written() as lines:
        log.info("first", extra={"value": value})
        log.info("second")
    assert [json.loads(line)["message"] for line in lines] == ["first", "second"]


def test_a_call_that_cannot_be_formatted_does_not_end_all_logging() -> None:
    with written() as lines:
        logging.getLogger("some.library").warning("%d runs", "no")
        log.info("second")
    bad, second = map(json.loads, lines)
    assert (bad["logger"], bad["level"], bad["error_type"], bad["template"]) == (
        "some.library", "ERROR", "TypeError", "%d runs",
    )  # fmt: skip
    assert second["message"] == "second"


def test_an_exception_is_logged_in_fields_of_one_line() -> None:
    with written() as lines:
        try:
            int("no\nway")
        except ValueError:
            log.exception("Failed")
    (line,) = map(json.loads, lines)
    assert (line["level"], line["error_type"], line["error_message"]) == (
        "ERROR", "ValueError", "invalid literal for int() with base 10: 'no\\nway'",
    )  # fmt: skip
    assert line["traceback"].startswith("Traceback (most recent call last)")


def test_a_traceback_on_a_terminal_cannot_paint_it() -> None:
    with written(form=LogFormat.TEXT) as lines:
        try:
            int("1\x1b[2J")
        except ValueError as error:
            error.args = ("bad: \x1b[2J \x9b2J",)
            log.exception("Failed")
    assert lines[1].startswith("Traceback (most recent call last)")
    assert all(line.isprintable() for line in lines[1:])
    assert lines[-1] == "ValueError: bad: \\u001b[2J \\u009b2J"


def test_libraries_and_warnings_go_through_the_same_formatter() -> None:
    with written(LogLevel.DEBUG) as lines:
        logging.getLogger("aiohttp.server").error("Error %s", "handling", extra={"peer": "x"})
        logging.getLogger("some.library").debug("quietly")
        logging.getLogger("aiosqlite").debug("executing …")
        with warnings.catch_warnings(action="default"):
            warnings.showwarning("deprecated", DeprecationWarning, "x.py", 1)
    read = [json.loads(line) for line in lines]
    assert [(line["logger"], line["level"]) for line in read] == [
        ("aiohttp.server", "ERROR"),
        ("some.library", "DEBUG"),
        ("py.warnings", "WARNING"),
    ]
    assert (read[0]["message"], read[0]["peer"]) == ("Error handling", "x")
    assert "deprecated" in read[2]["message"]


@pytest.mark.parametrize("level", LogLevel)
def test_the_level_is_the_least_severe_that_is_written(level: LogLevel) -> None:
    with written(level) as lines:
        for name in LogLevel:
            log.log(logging.getLevelName(name.value), "x")
    assert [json.loads(line)["level"] for line in lines] == list(LogLevel)[list(LogLevel).index(level) :]


def test_logging_is_as_before_when_the_block_has_ended() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with written():
        assert root.handlers != before[0]
    assert (root.handlers[:], root.level) == before


# --- Of requests ---------------------------------------------------------------------------------


async def test_the_lines_of_requests_hold_what_the_guide_greps_for(api: Api) -> None:
    run = make_run()
    with written() as lines:
        await api.post(run)
        await api.get("/api/v1/runs?agent_name=hugo-translator&status=running&limit=100")
        await api.call("PATCH", f"/api/v1/runs/{run['event_id']}", json={"status": "cancelled"}, status=200)
        await api.get("/api/v1/runs?status=invalid_status", 400)
        await api.call("PATCH", "/api/v1/runs/abc123", json={"status": "cancelled"}, status=404)
    created, queried, updated, refused, missing = map(json.loads, lines)
    names = "timestamp level logger message endpoint"
    assert (created["message"], created["endpoint"]) == ("Run created", "/api/v1/runs")
    assert list(queried)[:9] == [*names.split(), "query_params", "result_count", "duration_ms", "is_slow"]
    assert queried["query_params"] == {"agent_name": "hugo-translator", "status": "running", "limit": 100}
    assert (queried["result_count"], queried["is_slow"]) == (1, False)
    assert list(updated)[:9] == [*names.split(), "event_id", "fields_updated", "duration_ms", "success"]
    assert (updated["message"], updated["endpoint"], updated["success"]) == (
        "Run updated",
        "/api/v1/runs/{event_id}",
        True,
    )
    assert (refused["level"], refused["error_type"]) == ("ERROR", "ValidationError")
    assert refused["message"].startswith("Error in /api/v1/runs: Invalid status: 'invalid_status'")
    assert (missing["event_id"], missing["success"]) == ("abc123", False)
    for line, searched in (
        (lines[1], '"endpoint": "/api/v1/runs"'),
        (lines[2], '"endpoint": "/api/v1/runs/{event_id}"'),
        (lines[3], '"level": "ERROR"'),
        (lines[4], '"success": false'),
        (lines[4], '"event_id": "abc123"'),
    ):
        assert searched in line


async def test_a_name_in_a_request_cannot_forge_a_line(api: Api) -> None:
    forged = 'x"}\n{"level": "INFO", "message": "all is well"}\u2028\x1b[2J'
    with written() as lines:
        await api.post(make_run(event_id=forged))
        await api.call("GET", "/api/v1/runs", params={"status": forged}, status=400)
        async with api.client.get("/nowhere/" + "%0A%1B%5B2J%E2%80%A8"):
            pass
    assert [json.loads(line)["logger"] for line in lines] == ["telemetry_api"] * 3
    assert all(line.isprintable() for line in lines)


# --- A sink that does not take its lines ---------------------------------------------------------


def test_a_blocked_sink_never_blocks_the_caller_and_what_it_drops_is_counted() -> None:
    readable, writable = os.pipe()
    total = 30_000
    received: list[str] = []
    with os.fdopen(writable, "w") as stream, os.fdopen(readable) as pipe:
        reader = threading.Thread(target=lambda: received.extend(pipe))
        with logging_to(stream, LogLevel.INFO, LogFormat.JSON):
            started = time.monotonic()
            for number in range(total):
                log.info("line", extra={"number": number, "padding": "x" * 50})
            assert time.monotonic() - started < PATIENCE_S, "it never waits for the pipe"
            reader.start()
            before = -1
            while len(received) > before:  # at the end a sink is given two seconds, which is little on a busy machine
                before = len(received)
                time.sleep(1)
        stream.close()
        reader.join(PATIENCE_S)
    lines = [json.loads(line) for line in received]
    kept = [line["number"] for line in lines if line["message"] == "line"]
    dropped = sum(line["dropped"] for line in lines if line["message"] == "Log lines dropped")
    assert dropped > 0
    assert len(kept) + dropped == total
    assert kept == sorted(set(kept))
    assert all(line["level"] == "WARNING" for line in lines if line["message"] == "Log lines dropped")


def test_the_daemon_answers_although_nobody_reads_its_log(tmp_path: Path, free_port: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    readable, writable = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "telemetryd", "serve", "--host", "127.0.0.1", "--port", str(free_port)],
        cwd=tmp_path, env={**environment, "TELEMETRY_DB_JOURNAL_MODE": "WAL"}, stdout=writable,
    )  # fmt: skip
    os.close(writable)
    try:
        connection = connect(free_port)
        for _ in range(1000):  # about 300 kB of lines; a pipe holds 64 kB
            connection.request("GET", "/api/v1/runs?limit=1")  # a blocked daemon would not answer
            response = connection.getresponse()
            response.read()
            assert response.status == 200
        connection.close()
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        received = os.read(readable, 1 << 20)
        os.close(readable)
    assert 0 < received.count(b"\n") < 500  # so the pipe really was full


def test_a_closed_sink_does_not_stop_the_daemon(start_daemon: StartDaemon) -> None:
    with contextlib.closing(io.StringIO()) as stream, logging_to(stream, LogLevel.INFO, LogFormat.JSON):
        stream.close()
        log.info("into nothing")
    daemon = start_daemon(prefix=("sh", "-c", 'exec "$@" >/dev/full', "sh"))
    port = 0
    deadline = time.monotonic() + PATIENCE_S
    while not port and time.monotonic() < deadline:
        port = listening_port(daemon.process.pid)
        time.sleep(0.05)
    connection = connect(port)
    connection.request("POST", "/api/v1/runs", json.dumps(make_run()), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 201
    connection.close()
    assert daemon.stop() == 0


def connect(port: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            connection.connect()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return connection


def listening_port(pid: int) -> int:
    """The port on which a process listens, from /proc; 0 if none yet."""
    with contextlib.suppress(OSError):
        sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:
                return int(columns[1].partition(":")[2], 16)
    return 0


# --- In systemd's journal -------------------------------------------------------------------------


def journal_of(file: TextIO) -> str:
    """Return what systemd puts into JOURNAL_STREAM for a file that stands for its journal."""
    status = os.fstat(file.fileno())
    return f"{status.st_dev}:{status.st_ino}"


@pytest.mark.parametrize("form", [LogFormat.JSON, LogFormat.TEXT])
def test_in_the_journal_each_line_begins_with_its_severity_and_elsewhere_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: LogFormat
) -> None:
    def lines(name: str) -> list[str]:
        with (tmp_path / name).open("w+") as stream:
            if name == "journal":
                monkeypatch.setenv("JOURNAL_STREAM", journal_of(stream))
            with logging_to(stream, LogLevel.DEBUG, form):
                for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL, 25, 1000):
                    write_line(level, f"of {level}", {"a": 1})
                    log.log(level, "of %s", level)
                log.warning("%d", "wrong")
                try:
                    int("x")
                except ValueError:
                    log.exception("Failed")
            return (tmp_path / name).read_text().splitlines()

    theirs, plain = lines("journal"), lines("elsewhere")
    assert re.sub(r"[\d:.]+", "", "\n".join(plain)) == re.sub(r"[\d:.]+", "", "\n".join(line[3:] for line in theirs))
    assert [line[:3] for line in theirs[:14]] == [f"<{each}>" for each in (7, 7, 6, 6, 4, 4, 3, 3, 2, 2, 6, 6, 2, 2)]
    assert {line[:3] for line in theirs[14:]} == {"<3>"}
    assert (len(theirs) > 16) is (form is LogFormat.TEXT)  # a traceback of several lines


@pytest.mark.parametrize("value", ["", "1:2", "x", "1:2:3"])
def test_what_is_not_the_journal_is_not_taken_for_it(tmp_path: Path, value: str) -> None:
    with (tmp_path / "log").open("w") as stream:
        assert is_journal(stream, {"JOURNAL_STREAM": journal_of(stream)})
        assert not is_journal(stream, {"JOURNAL_STREAM": value})
        assert not is_journal(stream, {})
    assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": value})


def as_journald(text: str) -> list[str]:
    """Return the lines that journald makes of a stream: it ends them at a NUL and after 48 KiB as well."""
    lines = [line.encode() for line in text.removesuffix("\n").replace("\0", "\n").split("\n")]
    return [line[at : at + 49_152].decode() for line in lines for at in range(0, max(len(line), 1), 49_152)]


@pytest.mark.parametrize("between", ["", "\n", "\0", "x" * 60_000, "\u20ac" * 16_384 + "x" * 49_152])
def test_no_text_forges_a_severity_in_the_journal(tmp_path: Path, between: str) -> None:
    text = f"begin{between}<0>forged"
    with (tmp_path / "errors").open("wb") as file:
        lines = ErrorLines(file, "utf-8", line_buffering=True)
        print(text, file=lines)
        print(text, text, file=lines)
    for written in ((tmp_path / "errors").read_text(), marked(text, logging.ERROR)):
        assert {line[:3] for line in as_journald(written)} == {"<3>"}
        assert written.count("forged") == written.count("<0>")


def test_what_stands_on_standard_error_is_an_error_in_the_journal(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    command = [sys.executable, "-m", "telemetryd", "serve", "--port", "x", "--queue-max", "0"]
    texts = []
    for is_theirs in (True, False):
        with (tmp_path / "errors").open("w+") as errors:
            stream = journal_of(errors) if is_theirs else "1:1"
            process = popen(command, {**environment, "JOURNAL_STREAM": stream}, cwd=tmp_path, stderr=errors)
            assert process.wait(PATIENCE_S) == 2
            texts.append((tmp_path / "errors").read_text())
    assert texts[1].count("\n") == 2
    assert texts[0] == re.sub("^(?=.)", "<3>", texts[1], flags=re.MULTILINE)


# --- On a terminal -------------------------------------------------------------------------------


def test_on_a_terminal_the_lines_are_for_people(tmp_path: Path, free_port: int) -> None:
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    command = [sys.executable, "-m", "telemetryd", "serve", "--host", "127.0.0.1", "--port", str(free_port)]
    process = popen(command, environment, cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        connection = connect(free_port)
        connection.request("GET", "/api/v1/runs?status=%1B%5B2Jno")
        assert connection.getresponse().read()
        connection.close()
    finally:
        process.terminate()
        status = process.wait(PATIENCE_S)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while chunk := os.read(ours, 65536):
            seen += chunk
    os.close(ours)
    assert status == 0
    lines = seen.decode().splitlines()
    (serving,) = [line for line in lines if "Serving" in line]
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3} \x1b\[32mINFO    \x1b\[0m Serving \x1b\[2maddresses\x1b\[0m=\[", serving)
    assert f"http://127.0.0.1:{free_port}" in serving
    assert (
        f"telemetryd: ready; try http://127.0.0.1:{free_port}/. Authentication is off: this machine only. Ctrl-C stops."
    ) in lines
    (refused,) = [line for line in lines if "\x1b[31mERROR" in line]
    assert "\x1b[2J" not in refused
    assert "Error in /api/v1/runs: Invalid status" in refused
    assert not [line for line in lines if line.startswith("{")]


def test_a_line_for_people_says_nothing_twice() -> None:
    with written(form=LogFormat.TEXT) as lines:
        extra = {"endpoint": "/x", "error_type": "Refused", "error_message": "no token", "method": "GET"}
        log.warning("Error in /x: no token", extra=extra)
        try:
            int("x")
        except ValueError:
            log.exception("Failed", extra={"endpoint": "/x"})
    assert lines[0].endswith('WARNING  Error in /x: no token error_type="Refused" method="GET"')
    assert lines[1].endswith('ERROR    Failed endpoint="/x"')
    assert lines[-1].startswith("ValueError: ")


def test_text_is_coloured_on_a_terminal_only() -> None:
    with written(form=LogFormat.TEXT) as lines:
        log.info("plain", extra={"field": 1})
    assert lines[0].isprintable()


def test_no_locale_can_stop_the_log(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "log"
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    daemon = start_daemon(
        "--log-format", "text", "--unix", "sock", prefix=("sh", "-c", f'exec "$@" >{path}', "sh"), **narrow
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "sock").exists() or not listening_port(daemon.process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    connection = connect(listening_port(daemon.process.pid))
    for query in ("status=%C3%BC", "%ED%A0%80=1"):
        connection.request("GET", f"/api/v1/runs?{query}")
        connection.getresponse().read()
    connection.close()
    assert daemon.stop() == 0
    lines = path.read_text("utf-8").splitlines()
    assert "Error in /api/v1/runs: Invalid status: 'ü'" in "".join(lines)
    assert lines[-1].endswith("Stopped")


def test_it_starts_with_its_standard_output_closed(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--unix", "sock", prefix=("sh", "-c", 'exec "$@" >&-', "sh"))
    deadline = time.monotonic() + PATIENCE_S
    while not (daemon.folder / "sock").exists():
        assert daemon.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    assert daemon.stop() == 0


@pytest.mark.parametrize(("form", "is_json"), [(LogFormat.JSON, True), (LogFormat.TEXT, False), (LogFormat.AUTO, True)])
def test_the_form_can_be_chosen(form: LogFormat, is_json: bool) -> None:
    with written(form=form) as lines:
        log.warning("Look", extra={"name_": "x", "nothing": None})
    assert lines[0].startswith("{") == is_json
    if not is_json:
        plain = re.sub(r"\x1b\[\d*m", "", lines[0])
        assert re.fullmatch(r'\d\d:\d\d:\d\d\.\d{3} WARNING  Look name_="x"', plain)
