"""`telemetryd tail`: against the real daemon, across its death; and the line that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.cli.stream import Message, read_messages
from telemetryd.cli.tail import _columns, cut, fitted, line
from tests.conftest import StartDaemon, make_run
from tests.tools.forks import popen


def send(url: str, path: str, body: object, method: str = "POST") -> None:
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request) as response:
        assert response.status in (200, 201)


@contextmanager
def tailing(url: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    command = [sys.executable, "-m", "telemetryd", "tail", "--url", url, *flags]
    with popen(command, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(url: str, *flags: str) -> tuple[int, str, str]:
    with tailing(url, *flags) as process:
        out, errors = process.communicate(timeout=60)
        return process.returncode, out, errors


def test_it_prints_the_last_runs_that_match(start_daemon: StartDaemon) -> None:
    url = start_daemon().url
    for number in range(4):
        send(url, "/api/v1/runs", make_run(event_id=f"event-{number}", status="failure" if number == 1 else "success"))
    status, out, errors = finish(url, "-n", "2", "--json")
    assert [json.loads(text)["event_id"] for text in out.splitlines()] == ["event-2", "event-3"]
    assert (status, errors) == (0, "")
    status, out, _ = finish(url, "--status", "failed", "--status", "timeout", "--agent", "hugo-*")
    assert out.split() == [out.split()[0], "failure", "hugo-translator", "translate_directory", "-", "event-1"]
    assert "\x1b" not in out
    status, out, _ = finish(url, "--filter", "metrics.tokens=7")
    assert (status, out) == (0, "")
    for comparison in ("metrics.tokens>7", "metrics.tokens>=7", "metrics.tokens<7"):
        assert finish(url, "--filter", comparison)[:2] == (0, "")
    status, _, errors = finish(url, "--status", "nope")
    assert status == 1
    assert "The daemon answered 400: Invalid status: 'nope'" in errors
    assert finish(url, "--filter", "x")[0] == 2
    for more in ((), ("-f",)):
        errors = finish("http://127.0.0.1:1", *more)[2]
        assert "Cannot reach the daemon: 127.0.0.1:1: Connection refused" in errors


def test_it_follows_across_the_daemons_death_without_a_gap_or_a_repeat(
    start_daemon: StartDaemon, free_port: int
) -> None:
    variables = {"TELEMETRY_API_PORT": str(free_port), "TELEMETRY_DB_JOURNAL_MODE": "WAL"}
    daemon = start_daemon(**variables)
    url = daemon.url
    send(url, "/api/v1/runs", make_run(event_id="before"))
    with tailing(url, "-f", "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["event_id"] == "before"
        send(url, "/api/v1/runs", make_run(event_id="a"))
        assert json.loads(process.stdout.readline())["event_id"] == "a"
        send(url, "/api/v1/runs/a", {"status": "success"}, "PATCH")
        assert json.loads(process.stdout.readline())["status"] == "success"
        daemon.process.kill()
        daemon.wait()
        assert process.stderr.readline().startswith("telemetryd: ")
        daemon = start_daemon(**variables)
        for event_id in ("b", "c"):
            send(daemon.url, "/api/v1/runs", make_run(event_id=event_id))
        assert [json.loads(process.stdout.readline())["event_id"] for _ in range(2)] == ["b", "c"]


def answered(**fields: Any) -> dict[str, Any]:
    return {
        "updated_at": "2025-12-24T10:05:00.000000Z",
        "status": "success",
        "agent_name": "hugo-translator",
        "job_type": "translate_directory",
        "duration_ms": 61_500,
        "items_succeeded": 98,
        "items_failed": 2,
        "error_summary": "2 pages failed",
        "output_summary": None,
        "item_name": None,
        "event_id": "x",
        **fields,
    }


def test_a_line_holds_what_matters() -> None:
    words = "10:05:00 success hugo-translator translate_directory 61.5s 98 done, 2 failed: 2 pages failed"
    assert " ".join(line(answered(), 120, coloured=False).split()) == words
    assert "\x1b[32msuccess  \x1b[0m" in line(answered(), 120, coloured=True)
    for milliseconds, text in ((0, "-"), (250, "250ms"), (150_000, "2m"), (7_300_000, "2h")):
        assert f" {text} " in line(answered(duration_ms=milliseconds), 120, coloured=False)


@given(st.text(), st.text(), st.text(), st.integers(40, 200))
def test_a_line_fits_and_controls_no_terminal(agent: str, job: str, error: str, width: int) -> None:
    text = line(answered(agent_name=agent, job_type=job, error_summary=error), width, coloured=False)
    assert _columns(text) <= width
    assert text.isprintable()


@given(st.text(), st.integers(1, 30))
def test_what_is_fitted_is_as_wide_as_it_should_be(text: str, columns: int) -> None:
    assert _columns(fitted(text, columns)) == columns
    assert cut("\x1b[31mred", 10) == " [31mred"


@pytest.mark.parametrize("size", [1, 2, 7, 20, 100])
async def test_a_stream_may_come_in_pieces_of_any_size(size: int) -> None:
    text = b"retry: 2000\nid: e-1\n\nid: e-2\nevent: run\ndata: {}\n\n:\nid: e-3\n\nid: e-4\nevent: run\nda"

    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(text), size):
            yield text[begin : begin + size]

    assert [message async for message in read_messages(pieces())] == [
        Message("message", b"", "e-1"),
        Message("run", b"{}", "e-2"),
        Message("message", b"", "e-3"),
    ]
