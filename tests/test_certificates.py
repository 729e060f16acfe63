"""Death certificates: real processes, killed, watched by a real daemon."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from telemetryd import certificates, migrate, processes
from telemetryd.commands import Process
from tests.conftest import Daemon, StartDaemon, make_run
from tests.http_client import call, get, post

pytestmark = pytest.mark.skipif(processes.this_machine() is None, reason="processes cannot be watched here")

Spawn = Callable[..., "subprocess.Popen[bytes]"]
SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Return a function that starts a Python process; whatever is left of it is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str = SLEEP, prefix: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*prefix, sys.executable, "-c", code], **options)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def identity(pid: int) -> dict[str, Any]:
    """What a client tells of a process."""
    machine = processes.this_machine()
    assert machine is not None
    return {"pid": pid, "start_time": processes.start_time(pid), "boot_id": machine.boot_id}


def new_run(url: str, **fields: Any) -> str:
    run = make_run(**fields)
    assert post(url, run)[0] == 201
    return f"/api/v1/runs/{run['event_id']}"


def register(url: str, path: str, body: object, status: int = 201) -> Any:
    answer = call(url, "POST", f"{path}/process", body)
    assert answer[0] == status, answer
    return answer[1]


def wait_until_closed(url: str, path: str, seconds: float = 10) -> dict[str, Any]:
    """Wait until a run is not running any more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run: dict[str, Any] = get(url, path)[1]
        if run["status"] != "running":
            return run
        time.sleep(0.02)
    raise AssertionError("the run is still running")


def stays_running(url: str, *paths: str, seconds: float = 1.0) -> None:
    time.sleep(seconds)
    assert [get(url, path)[1]["status"] for path in paths] == ["running"] * len(paths)


def test_a_killed_process_fails_its_runs_within_a_second(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon()
    url = daemon.url
    agent, other = spawn(), spawn()
    paths = [new_run(url, start_time="2025-12-24T10:00:00Z") for _ in range(3)]
    for path in paths:
        assert register(url, path, identity(agent.pid)) == {
            "event_id": path.rpartition("/")[2],
            "pid": agent.pid,
            "watched": True,
        }
        register(url, path, identity(agent.pid))  # harmless
    alive = new_run(url)
    register(url, alive, identity(other.pid))
    assert 'telemetryd_processes_watched 2.0' in prometheus(daemon)
    totals = get(url, "/metrics")[1]["agents"]
    agent.kill()
    killed = time.monotonic()
    agent.wait()
    runs = [wait_until_closed(url, path) for path in paths]
    assert time.monotonic() - killed < 1.5  # a second, and what a busy machine adds
    for run in runs:
        assert run["status"] == "failure"
        assert run["error_summary"] in (
            f"Process {agent.pid} was killed by SIGKILL before it finished the run",
            f"Process {agent.pid} ended without finishing the run",  # where the kernel does not tell how
        )
        assert f"Death certificate of process {agent.pid}" in run["error_details"]
        assert run["end_time"] <= run["updated_at"]
        assert abs(run["duration_ms"] - milliseconds(run["start_time"], run["end_time"])) <= 1
    stays_running(url, alive, seconds=0.2)
    assert get(url, "/metrics")[1]["agents"] == totals
    failed = get(url, "/api/v1/runs?status=failure")[1]
    assert len(failed) == 3
    assert 'telemetryd_processes_watched 1.0' in prometheus(daemon)
    assert 'telemetryd_death_certificates_total 3.0' in prometheus(daemon)
    assert daemon.stop() == 0
    check_database(daemon)


def milliseconds(start: str, end: str) -> float:
    from datetime import datetime

    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() * 1000


def prometheus(daemon: Daemon) -> str:
    import urllib.request

    with urllib.request.urlopen(f"{daemon.url}/metrics?format=prometheus", timeout=10) as answer:
        return str(answer.read().decode())


def check_database(daemon: Daemon) -> None:
    from telemetryd.check import Severity, examine

    assert [finding for finding in examine(daemon.database) if finding.severity is not Severity.NOTE] == []
