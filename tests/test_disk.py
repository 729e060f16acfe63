"""The look at the disk: a reserve that new runs leave free, figures for /health and /metrics, and a disk that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.engine.sqlite.disk import Disk, LogWatch, Look
from telemetryd.errors import LowDiskError
from telemetryd.ops.logs import LOGGER_NAME
from telemetryd.ops.metrics import Metrics
from telemetryd.ops.mounts import network_file_system
from tests.conftest import (
    PATIENCE_S,
    Api,
    Daemon,
    MakeApi,
    StartDaemon,
    eventually,
    make_run,
    reading,
    require_program,
    small_file_system,
)
from tests.contract.wire import RUNS, check_error, send
from tests.http_client import call, get, post, wait_for_health
from tests.tools.process import telemetryd

RESERVE = 100_000_000


def disk_of(sizes: list[int]) -> Disk:
    remaining = iter(sizes)
    return Disk(lambda: Look(next(remaining), 0, None), RESERVE, Metrics())


# --- The reserve ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2 * RESERVE), min_size=1, max_size=30))
def test_it_is_low_below_the_reserve_until_there_is_a_quarter_more(sizes: list[int]) -> None:
    watched = disk_of(sizes)
    is_low = False
    for free in sizes:
        asyncio.run(watched.look())
        is_low = free < (RESERVE * 1.25 if is_low else RESERVE)
        assert (watched.problem is not None) is is_low
        if is_low:
            with pytest.raises(LowDiskError):
                watched.check_room()
        else:
            watched.check_room()


async def test_what_was_displaced_before_the_database_was_opened_again_is_reported_no_more() -> None:
    """Also by a look that had begun before, and sees it only afterwards."""
    seen = threading.Event()

    def look() -> Look:
        seen.wait(PATIENCE_S)
        return Look(RESERVE * 2, 0, "The database file was moved")

    watched = Disk(look, RESERVE, Metrics())
    seen.set()
    await watched.look()
    assert watched.problem == "The database file was moved"
    seen.clear()
    late = asyncio.create_task(watched.look())
    await asyncio.sleep(0)
    watched.forget_displaced()
    assert watched.problem is None
    seen.set()
    await late
    assert watched.problem is None
    await watched.look()
    assert watched.problem == "The database file was moved"


async def test_each_change_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    watched = disk_of([RESERVE * 2, RESERVE - 1, 5, RESERVE - 2, RESERVE + 1, RESERVE * 2, RESERVE * 2, 0])
    for _ in range(8):
        await watched.look()
    assert [record.message for record in caplog.records] == [
        "The disk is almost full: writes are refused",
        "The disk has room again: writes are taken",
        "The disk is almost full: writes are refused",
    ]


async def test_without_a_reserve_it_is_never_low() -> None:
    watched = Disk(lambda: Look(0, 0, None), 0, Metrics())
    await watched.look()
    watched.check_room()
    assert watched.problem is None


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    with small_file_system(tmp_path / "volume", "8m") as path:
        yield path


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_a_disk_that_fills_up_refuses_runs_before_sqlite_fails_and_recovers_alone(
    start_daemon: StartDaemon, small_volume: Path, journal_mode: str
) -> None:
    path = small_volume / "telemetry.sqlite"
    unix = str(small_volume.parent / "socket")
    daemon = start_daemon(
        TELEMETRY_DB_PATH=str(path),
        TELEMETRY_DB_JOURNAL_MODE=journal_mode,
        TELEMETRY_MIN_FREE_MB="6",
        TELEMETRY_API_UNIX=unix,
    )
    old = [make_run(created_at="2020-01-01T00:00:00Z") for _ in range(300)]
    assert call(daemon.url, "POST", "/api/v1/runs/batch", old)[1]["inserted"] == 300
    acknowledged = 300
    deadline = time.monotonic() + 60
    while (answer := post(daemon.url, make_run(error_details=os.urandom(16_000).hex())))[0] == 201:
        acknowledged += 1
        assert time.monotonic() < deadline
        time.sleep(0.05)  # as fast as a disk fills up between two looks
    assert answer[0] == 503
    assert "TELEMETRY_MIN_FREE_MB" in answer[1]["detail"]
    assert shutil.disk_usage(small_volume).free > 3 << 20, "SQLite still had room"
    refused = make_run()
    assert call(daemon.url, "POST", "/api/v1/runs/batch", [refused])[0] == 503
    assert call(daemon.url, "PATCH", f"/api/v1/runs/{old[0]['event_id']}", {"status": "failed"})[0] == 503
    health = wait_for_health(daemon.url, 503)
    assert health["detail"].startswith("The disk is almost full: ")
    assert get(daemon.url, "/metrics")[1]["total_runs"] == acknowledged, "reads are answered, and nothing was lost"

    # Pruning makes room, so it may use the reserve.
    assert "300" in telemetryd("prune", "--older-than", "365d", "--unix", unix, "--db-path", path).stdout
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_volume)], check=True)
    wait_for_health(daemon.url, 200)
    assert post(daemon.url, refused)[0] == 201
    assert daemon.stop() == 0
    told = [line["message"] for line in daemon.lines if line["message"].startswith("The disk")]
    assert told == ["The disk is almost full: writes are refused", "The disk has room again: writes are taken"]
    assert "StorageFullError" not in json.dumps(daemon.lines)
    assert "database or disk is full" not in json.dumps(daemon.lines)


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_on_a_full_disk_it_starts_and_answers_reads(
    start_daemon: StartDaemon, small_volume: Path, journal_mode: str
) -> None:
    variables = {
        "TELEMETRY_DB_PATH": str(small_volume / "telemetry.sqlite"),
        "TELEMETRY_DB_JOURNAL_MODE": journal_mode,
        "TELEMETRY_LOCK_FILE": str(small_volume / "configured.lock"),
        "TELEMETRY_API_UNIX": str(small_volume / "s"),
        "TELEMETRY_API_PORT": "0",
        "TELEMETRY_MIN_FREE_MB": "0",
    }
    require_program("curl", "curl")
    first = start_daemon(**variables)
    run = make_run()
    assert call_over(small_volume / "s", first, "POST", "/api/v1/runs", run)[0] == 201
    assert first.stop() == 0
    with (small_volume / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    assert shutil.disk_usage(small_volume).free == 0
    for lock in ("telemetry.sqlite.lock", "other.lock"):  # one that is there, and one that is new
        again = start_daemon(**variables | {"TELEMETRY_LOCK_FILE": str(small_volume / lock)})
        assert call_over(small_volume / "s", again, "GET", f"/api/v1/runs/{run['event_id']}")[0] == 200
        assert again.stop() == 0
    killed = start_daemon(**variables)
    assert killed.wait_for_line("Serving")
    killed.stop(signal.SIGKILL)
    after = start_daemon(**variables)
    assert call_over(small_volume / "s", after, "GET", f"/api/v1/runs/{run['event_id']}")[0] == 200
    (small_volume / "filler").unlink()
    assert call_over(small_volume / "s", after, "POST", "/api/v1/runs", make_run())[0] == 201


def call_over(path: Path, daemon: Daemon, method: str, target: str, body: object = None) -> tuple[int, Any]:
    """Send a request over a daemon's Unix socket, once it serves."""
    daemon.wait_for_line("Serving")
    command = ["curl", "-s", "-w", "\n%{http_code}", "--unix-socket", str(path), "-X", method]
    if body is not None:
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    text = subprocess.run([*command, f"http://localhost{target}"], capture_output=True, text=True, check=True).stdout
    answer, _, status = text.rpartition("\n")
    return int(status), json.loads(answer)


async def test_a_refusal_says_when_to_come_again_and_is_counted(make_api: MakeApi) -> None:
    api = await make_api(min_free_mb=1024 * 1024)
    answer = await send(api, "POST", RUNS, json=make_run())
    assert "nothing of this was stored" in check_error(answer, 503)
    assert answer.headers["retry-after"] == "10"
    text = (await send(api, "GET", "/metrics", params={"format": "prometheus"})).text
    assert 'telemetryd_writes_refused_total{reason="low disk"} 1.0' in text
    assert await api.list() == []


# --- What /health and /metrics tell --------------------------------------------------------------


async def gauges(api: Api) -> dict[str, float]:
    text = (await send(api, "GET", "/metrics", params={"format": "prometheus"})).text
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("telemetryd_"): float(value) for name, value in pairs}


async def test_health_tells_the_queue_the_last_commit_the_log_and_the_room_left(api: Api) -> None:
    before = await api.get("/health")
    assert list(before)[:5] == ["status", "version", "db_path", "journal_mode", "synchronous"], "the guide's, first"
    assert before["last_commit_at"] is None
    assert before["oldest_waiting_s"] == 0
    sent = datetime.now(UTC)
    await api.post(make_run())
    after = await api.get("/health")
    assert abs((datetime.fromisoformat(after["last_commit_at"]) - sent).total_seconds()) < 60
    await eventually(lambda: api.store.health().figures["wal_bytes"] > before["wal_bytes"])
    health, shown = await api.get("/health"), await gauges(api)
    assert health["wal_bytes"] == os.stat(f"{api.settings.db_path}-wal").st_size == shown["wal_bytes"]
    assert health["disk_free_bytes"] == pytest.approx(shutil.disk_usage(api.settings.db_path.parent).free, rel=0.1)
    assert shown["disk_free_bytes"] == pytest.approx(health["disk_free_bytes"], rel=0.1)
    assert shown["last_commit_timestamp_seconds"] == pytest.approx(sent.timestamp(), abs=60)
    assert shown["oldest_waiting_seconds"] == shown["queue_depth"] == 0


async def test_health_tells_how_long_the_oldest_command_waits(make_api: MakeApi) -> None:
    api = await make_api(db_busy_timeout_ms=60_000)
    started = time.monotonic()
    with api.locked():
        first = asyncio.create_task(send(api, "POST", RUNS, json=make_run()))
        await asyncio.sleep(0.6)
        second = asyncio.create_task(send(api, "POST", RUNS, json=make_run()))
        await asyncio.sleep(0.2)
        health, shown = await api.get("/health"), await gauges(api)
        assert (health["queue_depth"], shown["queue_depth"]) == (1, 1)
        assert 0.7 < health["oldest_waiting_s"] < time.monotonic() - started
        assert shown["oldest_waiting_seconds"] >= health["oldest_waiting_s"]
    assert {(await first).status, (await second).status} == {201}
    assert (await api.get("/health"))["oldest_waiting_s"] == 0


async def test_health_makes_no_system_call_and_costs_no_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a disk that hangs would hold up the event loop here")

    for name in ("stat", "lstat", "fstat", "open", "statvfs"):
        monkeypatch.setattr(os, name, never)
    started = time.thread_time()
    for _ in range(1000):
        api.store.health()
    each_s = (time.thread_time() - started) / 1000
    monkeypatch.undo()
    assert each_s < 0.001


async def test_a_disk_that_hangs_is_reported_and_holds_up_nobody(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    look = reading(api)._disk._look

    def hang() -> Look:
        assert release.wait(PATIENCE_S)
        return look()

    reading(api)._disk.patience_s = 0.2
    monkeypatch.setattr(reading(api)._disk, "_look", hang)
    try:
        await eventually(lambda: api.store.health().problem is not None)
        started = time.monotonic()
        answer = await send(api, "GET", "/health")
        assert time.monotonic() - started < PATIENCE_S / 4
        assert (answer.status, answer.json["status"]) == (503, "error")
        assert answer.json["detail"].startswith("The disk has not answered for ")
    finally:
        release.set()
    await eventually(lambda: api.store.health().problem is None)


async def test_a_folder_that_is_gone_is_reported(make_api: MakeApi, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    api = await make_api(db_path=folder / "telemetry.sqlite")
    folder.rename(tmp_path / "elsewhere")
    await eventually(lambda: api.store.health().problem is not None)
    answer = await send(api, "GET", "/health")
    assert (answer.status, str(folder) in answer.json["detail"]) == (503, True)
    (tmp_path / "elsewhere").rename(folder)
    await eventually(lambda: api.store.health().problem is None)


# --- The kind of file system ---------------------------------------------------------------------

MOUNTS = r"""22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /data rw,relatime shared:5 master:1 - nfs4 server:/export rw
31 30 8:2 / /data/local rw - xfs /dev/sdb1 rw
32 22 0:41 / /with\040blank rw - cifs //server/share rw
33 22 0:42 / /home rw - fuse.sshfs me@server: rw
34 22 8:3 / /covered rw - ext4 /dev/sdc1 rw
35 22 0:43 / /covered rw - 9p host rw
36 22 0:44 / /fused rw - fuse.ntfs /dev/sdd1 rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/telemetry.sqlite", None),
        ("/data", "nfs4"),
        ("/data/x/telemetry.sqlite", "nfs4"),
        ("/data/local/telemetry.sqlite", None),
        ("/database/telemetry.sqlite", None),
        ("/with blank/telemetry.sqlite", "cifs"),
        ("/home/me/telemetry.sqlite", "fuse.sshfs"),
        ("/covered/telemetry.sqlite", "9p"),
        ("/fused/telemetry.sqlite", None),
    ],
)
def test_a_network_file_system_is_known(tmp_path: Path, path: str, kind: str | None) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert network_file_system(Path(path), mounts) == kind
    assert network_file_system(Path(path), tmp_path / "nowhere") is None
    link = tmp_path / "link"
    link.symlink_to(path)
    assert network_file_system(link, mounts) == kind


def test_a_database_on_a_network_file_system_is_warned_of(start_daemon: StartDaemon, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 0:40 / {tmp_path} rw - nfs4 server:/export rw\n")
    over = 'mount --bind "$0" /proc/$$/mountinfo && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", over, str(mounts))
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    daemon = start_daemon(prefix=prefix)
    assert daemon.wait_for_line("The database is on a network file system")["file_system"] == "nfs4"
    assert daemon.stop() == 0


# --- The write-ahead log -------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("is_reading", "holder"), [(False, "another program"), (True, "a query or an export of this")])
async def test_a_log_that_is_held_up_is_reported_with_its_holder(
    caplog: pytest.LogCaptureFixture, is_reading: bool, holder: str
) -> None:
    kept = [80]

    def measure() -> asyncio.Future[int]:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        answer.set_result(kept[0])
        return answer

    with caplog.at_level(logging.INFO, LOGGER_NAME):
        watch = LogWatch(100, measure, lambda: is_reading)
        for _ in range(8):
            watch.look(200)
        (message,) = told(caplog)
        assert holder in message
        watch.look(10)
        assert told(caplog)[1:] == ["The write-ahead log is short again"]
        kept[0] = 0  # a long write of our own, all of which is written back: the file stays long until the next commit
        for _ in range(8):
            watch.look(200)
        assert len(told(caplog)) == 2


async def test_a_long_write_of_our_own_is_nobodys_snapshot(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[asyncio.Future[int]] = []

    def measure() -> asyncio.Future[int]:
        answers.append(asyncio.get_running_loop().create_future())
        return answers[-1]

    with caplog.at_level(logging.INFO, LOGGER_NAME):
        watch = LogWatch(100, measure, lambda: False)
        for _ in range(8):  # the writer's thread is at work and does not answer
            watch.look(1000)
        assert len(answers) == 1
        answers[0].set_result(1000)
        for _ in range(4):  # kept once, by a query of a moment
            watch.look(1000)
        answers[1].set_result(0)
        watch.look(1000)
        watch.look(1000)
        answers[2].set_exception(sqlite3.OperationalError("locked"))
        watch.look(1000)
        assert told(caplog) == []
