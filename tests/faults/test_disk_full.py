"""A full disk: 503 and never a false 201; with room again it goes on without a restart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon, make_run, small_file_system
from tests.faults.ledger import Ledger
from tests.faults.load import count_server_errors
from tests.faults.told import Told
from tests.http_client import call, get


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 4 MiB."""
    with small_file_system(tmp_path / "disk", "4m") as path:
        yield path


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_a_full_disk_is_503_and_then_it_goes_on(
    start_daemon: StartDaemon, small_disk: Path, journal_mode: str, ledger: Ledger
) -> None:
    daemon = start_daemon(
        TELEMETRY_DB_PATH=str(small_disk / "telemetry.sqlite"),
        TELEMETRY_DB_JOURNAL_MODE=journal_mode,
        TELEMETRY_MIN_FREE_MB="0",
    )
    url = daemon.url
    told = Told(url)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    sent: dict[str, bool] = {}
    refused: list[Any] = []
    for number in range(400):
        runs = [make_run(output_summary=os.urandom(400).hex()) for _ in range(1 if number % 3 else 40)]
        path, body = ("/api/v1/runs", runs[0]) if len(runs) == 1 else ("/api/v1/runs/batch", runs)
        status, headers, answer = told.call("POST", path, body)
        assert status in (200, 201, 503), answer
        sent |= {run["event_id"]: status != 503 for run in runs}
        if status == 503:
            refused.append(runs)
            assert answer["detail"].startswith("The disk is full")
            assert headers["Retry-After"] == "10", "a disk is not emptied in a second"
            if len(refused) >= 6:
                break
    assert len(refused) >= 6
    assert sum(sent.values()) > 50
    status, health = get(url, "/health")
    assert (status, health["detail"]) == (503, "The last write failed: database or disk is full")
    assert get(url, "/metrics")[1]["total_runs"] == sum(sent.values()), "stored is what was acknowledged"

    ballast.unlink()
    for runs in refused:
        assert call(url, "POST", "/api/v1/runs/batch", runs)[1]["inserted"] == len(runs)
    assert get(url, "/health")[0] == 200
    assert daemon.stop() == 0
    lines = [line for line in daemon.lines if line.get("error_type") == "StorageFullError"]
    assert [(line["level"], line["status"], line["error_cause"]) for line in lines] == [
        ("ERROR", 503, "database or disk is full")
    ] * len(refused)
    told.acknowledged |= sent.keys()
    counted = told.compare(small_disk / "telemetry.sqlite")
    counted["server_errors"] += count_server_errors(daemon.lines)
    ledger.record(fault="the disk is full", mode=journal_mode, rounds=1, **counted)


@pytest.mark.parametrize("lock_has_room", [False, True])
def test_no_room_for_a_new_database_is_one_clear_line(
    start_daemon: StartDaemon, small_disk: Path, lock_has_room: bool
) -> None:
    (small_disk / "telemetry.sqlite.lock").write_text("1234567\n" if lock_has_room else "")
    ballast = os.open(small_disk / "ballast", os.O_CREAT | os.O_WRONLY)
    with contextlib.suppress(OSError):
        while os.write(ballast, bytes(4096)):
            pass
    os.close(ballast)
    if lock_has_room:
        os.truncate(small_disk / "ballast", (small_disk / "ballast").stat().st_size - 4096)
    status, errors = start_daemon(TELEMETRY_DB_PATH=str(small_disk / "telemetry.sqlite")).wait()
    assert status == 1
    assert len(errors.splitlines()) == 1, errors
    assert str(small_disk) in errors
    assert "full" in errors or "No space left" in errors
