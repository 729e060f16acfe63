"""The commands dead-letters list, show and retry."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client.dead_letters import (
    DEAD_LETTERS,
    bury,
    close_letters,
    letter_files,
    read_letters,
    wait_until_left,
)
from telemetryd.client.lines import encode
from tests.conftest import PATIENCE_S, StartDaemon, make_run
from tests.http_client import get
from tests.tools.process import telemetryd

FAULTY = "1 is no agent's name"


def line_of(run: object) -> bytes:
    return encode(run).rstrip()  # type: ignore[arg-type]


def ids(folder: Path) -> list[str]:
    return [letter.id for path in letter_files(folder) for letter in read_letters(path)]


def test_dead_letters_are_listed_shown_and_sent_again(start_daemon: StartDaemon, tmp_path: Path) -> None:
    buffer = tmp_path / "buffer"
    place = ("--buffer-dir", str(buffer))
    good, still_bad, other = make_run(), make_run(agent_name=None), make_run()
    fault = [{"loc": ["body", 3, "agent_name"], "msg": FAULTY, "type": "value_error"}]
    bury(buffer, [line_of(good)], 422, fault)
    close_letters(buffer)
    bury(buffer, [line_of(still_bad), b"no JSON \x1b[31m"], 422, "bad")
    bury(
        buffer,
        [encode({"op": "event", "event_id": good["event_id"], "event": {"event_type": "step"}}).rstrip()],
        404,
        "?",
    )
    bury(buffer, [line_of(other)], None, "other")
    assert len(letter_files(buffer)) == 2

    listed = json.loads(telemetryd("dead-letters", "list", *place, "--json").stdout)
    assert [each["event_id"] for each in listed] == [
        good["event_id"],
        still_bad["event_id"],
        None,
        good["event_id"],
        other["event_id"],
    ]
    assert [each["kind"] for each in listed] == ["run", "run", "run", "event", "run"]
    assert (listed[0]["reason"], listed[0]["status"]) == (f"agent_name: {FAULTY}", 422)
    told = telemetryd("dead-letters", "list", *place).stdout
    assert told.count("\n") == 5
    assert "\x1b" not in told

    first = listed[0]["id"]
    shown = telemetryd("dead-letters", "show", first, *place).stdout
    assert f"agent_name: {FAULTY}" in shown
    assert good["run_id"] in shown
    (whole,) = json.loads(telemetryd("dead-letters", "show", first, *place, "--json").stdout)
    assert whole["line"]["event_id"] == good["event_id"]
    assert "no dead letter 12345678 in" in telemetryd("dead-letters", "show", "12345678", *place, status=1).stderr

    daemon = start_daemon()
    again = ("dead-letters", "retry", *place, "--url", daemon.url)
    assert telemetryd(*again, status=2).returncode == 2  # neither named nor all
    assert telemetryd(*again, first).stdout.startswith("1 dead letter sent again: 0 refused again")
    assert get(daemon.url, f"/api/v1/runs/{good['event_id']}")[0] == 200
    assert len(ids(buffer)) == 4

    done = json.loads(telemetryd(*again, "--all", "--json", status=1).stdout)
    assert (done["sent"], done["stored"], done["refused"]) == (4, 1, 2)
    assert len(get(daemon.url, f"/api/v1/runs/{good['event_id']}/events")[1]) == 1
    left = json.loads(telemetryd("dead-letters", "list", *place, "--json").stdout)
    assert {each["event_id"] for each in left} == {still_bad["event_id"], None}
    assert all(each["reason"] not in ("bad", "") for each in left)  # that of today
    assert {each["id"] for each in left} == {listed[1]["id"], listed[2]["id"]}
    assert [path.name for path in buffer.iterdir() if path.name.startswith(".")] == []


def test_what_is_refused_again_or_not_sent_stays(tmp_path: Path, free_port: int) -> None:
    bury(tmp_path, [line_of(make_run()), line_of(make_run())], 422, "bad")
    before = ids(tmp_path)
    url = f"http://127.0.0.1:{free_port}"
    done = telemetryd(
        "dead-letters", "retry", "--all", "--buffer-dir", tmp_path, "--url", url, "--retry-for", "0", status=1
    )
    assert "Connection refused" in done.stderr
    assert ids(tmp_path) == before
    assert telemetryd("dead-letters", "list", "--buffer-dir", tmp_path).stdout.count("\n") == 2


def test_no_dead_letters_are_no_fault(tmp_path: Path) -> None:
    assert (
        telemetryd("dead-letters", "list", "--buffer-dir", tmp_path).stdout
        == f"There is no dead letter in {tmp_path}\n"
    )
    none = str(tmp_path / "none")
    wrong: dict[str, Any] = {"TELEMETRY_API_PORT": "0", "TELEMETRY_TIMEOUT_S": "x"}
    wrong |= dict.fromkeys(("TELEMETRY_API_URL", "TELEMETRY_API_AUTH_TOKEN_FILE", "TELEMETRY_API_CA_FILE"), none)
    done = telemetryd("dead-letters", "list", "--buffer-dir", tmp_path, "--json", **wrong)
    assert done.stdout == "[]\n"
    assert telemetryd("sync", "--dry-run", "--buffer-dir", tmp_path, **wrong).stdout.startswith("Nothing is left")


def test_a_letter_that_comes_while_its_file_is_closed_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed file may just be written anew, without it."""
    bury(tmp_path, [b"first"], 422, "bad")
    lock: Callable[..., None] = fcntl.flock
    closed: list[Path] = []

    def close_and_lock(file: int, kind: int) -> None:
        if not closed:
            close_letters(tmp_path)
            closed.extend(letter_files(tmp_path))
        lock(file, kind)

    monkeypatch.setattr(fcntl, "flock", close_and_lock)
    bury(tmp_path, [b"second"], 422, "bad")
    assert [letter.line for letter in read_letters(tmp_path / DEAD_LETTERS)] == [b"second"]
    assert [letter.line for letter in read_letters(closed[0])] == [b"first"]


def test_a_file_is_not_written_anew_while_somebody_writes_to_it(tmp_path: Path) -> None:
    bury(tmp_path, [b"first"], 422, "bad")
    writing = os.open(tmp_path / DEAD_LETTERS, os.O_WRONLY | os.O_APPEND)
    fcntl.flock(writing, fcntl.LOCK_SH)
    close_letters(tmp_path)
    (closed,) = letter_files(tmp_path)
    waiting = threading.Thread(target=wait_until_left, args=(closed,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    os.close(writing)
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
