"""`telemetryd mcp`: the official SDK's client over standard streams, with a daemon, without, and on both engines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.cli.mcp import split
from telemetryd.mcp.endpoint import LONGEST_MESSAGE
from tests.conftest import StartDaemon, make_run
from tests.http_client import post
from tests.mcp.assistants import VERSIONS, ask, assistant_of_command, complaint
from tests.tools.process import telemetryd

META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
}


def spoken(lines: list[str], *flags: str | Path) -> list[dict[str, Any]]:
    """Write lines to `telemetryd mcp`, and return what it answers, in the order of the ids."""
    command = [sys.executable, "-m", "telemetryd", "mcp", *map(str, flags)]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(map(json.loads, done.stdout.splitlines()), key=lambda answer: str(answer["id"]))


def request(number: object, method: str, **params: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": {**params, "_meta": META}})


@pytest.mark.parametrize("mode", VERSIONS)
async def test_an_assistant_asks_the_daemon_and_without_it_the_database(start_daemon: StartDaemon, mode: str) -> None:
    daemon = start_daemon()
    post(daemon.url, make_run(event_id="run-1", status="failure", error_summary="boom"))
    place = {} if daemon.database_url is None else {"TELEMETRY_DB_URL": daemon.database_url}
    flags = () if place else ("--db-path", str(daemon.database))
    async with assistant_of_command("--url", daemon.url, mode=mode) as client:
        assert client.protocol_version == VERSIONS[mode]
        assert client.server_info is not None
        assert client.server_info.name == "telemetryd"
        assert len((await client.list_tools()).tools) == 7
        assert (await ask(client, "get_run", event_id="run-1"))["error_summary"] == "boom"
        assert await complaint(client, "get_run", event_id="nope") == "Run not found: nope"
    async with assistant_of_command(*flags, mode=mode, **place) as client:
        for is_running in (True, False):
            if not is_running:
                assert daemon.stop() == 0
            [group] = (await ask(client, "failed_runs"))["groups"]
            assert group["errors"][0]["error_summary"] == "boom"
            assert (await ask(client, "agents"))["total_runs"] == 1
            assert (await ask(client, "alerts"))["rules"] == []


async def test_the_token_of_the_environment_is_brought_along(start_daemon: StartDaemon) -> None:
    token = "correct-horse-battery"
    daemon = start_daemon(TELEMETRY_API_AUTH_ENABLED="true", TELEMETRY_API_AUTH_TOKEN=token)
    async with assistant_of_command("--url", daemon.url, TELEMETRY_API_AUTH_TOKEN=token) as client:
        assert (await ask(client, "agents"))["total_runs"] == 0
    async with assistant_of_command("--url", daemon.url) as client:
        assert (await complaint(client, "agents")).startswith("The daemon answered 401: A valid token is needed")


async def test_what_cannot_be_reached_is_said_for_each_call(tmp_path: Path) -> None:
    async with assistant_of_command("--url", "http://127.0.0.1:1") as client:
        assert "Cannot reach the daemon: 127.0.0.1:1: Connection refused" in await complaint(client, "agents")
    async with assistant_of_command("--db-path", str(tmp_path / "none.sqlite")) as client:
        assert "There is no database at" in await complaint(client, "agents")


def test_wrong_settings_are_reported_at_once() -> None:
    answer = telemetryd("mcp", "--db-path", "/tmp/x", TELEMETRY_DB_BUSY_TIMEOUT_MS="x", status=2)
    assert "TELEMETRY_DB_BUSY_TIMEOUT_MS" in answer.stderr


def test_lines_that_are_no_messages_are_answered_and_cost_the_others_nothing(tmp_path: Path) -> None:
    lines = [
        "nonsense",
        "",
        "x" * (3 * LONGEST_MESSAGE),
        "[]",
        json.dumps({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 77}}),
        json.dumps({"jsonrpc": "2.0", "id": 5, "method": "tools/list"}),
        request(6, "server/discover"),
        request(7, "ping"),
    ]
    answers = spoken(lines, "--db-path", tmp_path / "none.sqlite")
    codes = [(answer["id"], answer.get("error", {}).get("code")) for answer in answers]
    assert codes[:3] == [(5, -32602), (6, None), (7, -32601)]
    assert sorted(codes[3:], key=str) == [(None, -32600), (None, -32700), (None, -32700)]


def test_calls_that_are_cancelled_are_not_answered_however_many_wait(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and never answers
        command = [sys.executable, "-m", "telemetryd", "mcp", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            asked = [request(f"slow-{number}", "tools/call", name="agents") for number in range(40)]
            process.stdin.write("\n".join(asked) + "\n")
            process.stdin.flush()
            with silent.accept()[0]:
                for number in range(40):
                    cancelled = {"method": "notifications/cancelled", "params": {"requestId": f"slow-{number}"}}
                    process.stdin.write(json.dumps({"jsonrpc": "2.0", **cancelled}) + "\n")
                process.stdin.write(request("next", "server/discover") + "\n")
                out, _ = process.communicate(timeout=60)
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["next"]


def test_an_earlier_client_needs_no_envelope_after_initialize(tmp_path: Path) -> None:
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}
    lines = [
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}),
        json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"}),
    ]
    command = [sys.executable, "-m", "telemetryd", "mcp", "--db-path", str(tmp_path / "none.sqlite")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines.append(json.dumps({"jsonrpc": "2.0", "id": "at once", "method": "ping"}))
        process.stdin.write("\n".join(lines) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["result"]["protocolVersion"] == "2025-06-18"
        assert json.loads(process.stdout.readline()) == {"jsonrpc": "2.0", "id": "at once", "result": {}}
        for number, method in ((2, "ping"), (3, "tools/list")):
            process.stdin.write(json.dumps({"jsonrpc": "2.0", "id": number, "method": method}) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert answer["id"] == number
            assert "resultType" not in answer["result"]
        process.stdin.close()
        assert process.wait(60) == 0


@given(
    lines=st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=8),
    sizes=st.lists(st.integers(1, 9), min_size=1),
    is_ended=st.booleans(),
)
def test_lines_are_the_same_however_they_come(lines: list[bytes], sizes: list[int], is_ended: bool) -> None:
    whole = b"\n".join(lines) + (b"\n" if is_ended else b"")
    parts, place = [], 0
    for size in cycle(sizes):
        if place >= len(whole):
            break
        parts.append(whole[place : place + size])
        place += size
    expected = [None if len(line) > 8 else line for line in lines if len(line) > 8 or line.strip()]
    assert list(split(parts, 8)) == expected


def test_a_standard_input_that_cannot_be_read_is_an_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "telemetryd", "mcp", "--db-path", str(tmp_path / "none.sqlite")]
    with Path(os.devnull).open("w") as only_written:
        done = subprocess.run(command, stdin=only_written, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_ends_without_a_word_when_nobody_reads_any_more(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "telemetryd", "mcp", "--db-path", str(tmp_path / "none.sqlite")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(request(1, "server/discover") + "\n")
        process.stdin.flush()
        assert process.wait(60) == 1
        assert process.stderr.read() == ""
