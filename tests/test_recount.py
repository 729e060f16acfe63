"""Commits of other programs are noticed, and the counts are right again after them, whatever comes in meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from telemetryd.engine.sqlite.tools import integrity
from telemetryd.errors import CommandFailedError
from telemetryd.model.bodies import parse_json
from telemetryd.model.commands import Created, CreateRuns, UpdateRun
from telemetryd.model.runs import parse_run
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import JournalMode, Settings
from telemetryd.store import Store
from tests.conftest import Api, MakeApi, StartDaemon, eventually, make_run
from tests.http_client import call, get, post
from tests.tools.process import telemetryd

MODES = pytest.mark.parametrize("mode", ["DELETE", "WAL"])


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than once a second, and in small slices."""
    monkeypatch.setattr("telemetryd.engine.sqlite.recount._LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("telemetryd.engine.sqlite.statements.recounting.SLICE_ROWS", 7)
    monkeypatch.setattr("telemetryd.engine.sqlite.statements.rollups.FOLD_AT", 40)


def by_somebody_else(path: Path, *statements: str) -> None:
    """Change a database in a process of its own, as a script would."""
    script = (
        "import sqlite3, sys\nc = sqlite3.connect(sys.argv[1], timeout=30)\n"
        "with c:\n    [c.execute(s) for s in sys.argv[2:]]\nc.close()"
    )
    subprocess.run([sys.executable, "-c", script, str(path), *statements], check=True)


async def settled(api: Api) -> dict[str, Any]:
    """Wait until the daemon has noticed the commit and compared; return what /health says then."""
    await eventually(lambda: api.store.health().counts["foreign_commit_at"] is not None, 20)
    await eventually(lambda: api.store.health().counts["state"] == "right", 20)
    health: dict[str, Any] = await api.get("/health")
    return health


def wrong_totals(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return integrity.count_wrong_totals(connection)


def runs(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [
        make_run(
            created_at=f"2026-01-0{1 + n % 3}T0{n % 4}:{n % 60:02}:00Z",
            agent_name=f"agent-{n % 3}",
            status="success",
            duration_ms=n * 10,
            items_succeeded=n,
            git_commit_hash=f"abc000{n % 4}",
            **fields,
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("mode", "statement"),
    [
        ("DELETE", "DELETE FROM agent_runs WHERE id % 2"),
        ("WAL", "DELETE FROM agent_runs WHERE id % 2"),
        ("WAL", "DELETE FROM agent_runs"),
        ("WAL", "DELETE FROM agent_runs WHERE created_at LIKE '2026-01-02%'"),
        ("WAL", "UPDATE agent_runs SET status = 'failure', duration_ms = 7 WHERE id % 3 = 0"),
        (
            "WAL",
            "UPDATE agent_runs SET created_at = '2025-07-01T01:02:03.000000Z', "
            "start_time = '2025-01-01T00:00:00.000000Z' WHERE id < 9",
        ),
        ("WAL", "UPDATE run_totals SET runs = runs + 1"),
        ("WAL", "DELETE FROM run_stats WHERE names = 2"),
        ("WAL", "DELETE FROM run_days"),
        ("WAL", "INSERT INTO run_minutes VALUES ('2024-01-01T00:00', 5)"),
        ("WAL", "UPDATE run_stats SET start = start + 4800 WHERE names = 1"),
        ("WAL", "UPDATE run_commits SET runs = runs + 1, seconds = 7 WHERE agent_name = 'agent-1'"),
        ("WAL", "DELETE FROM run_commits"),
        ("DELETE", "INSERT INTO run_commits VALUES (7, 'a', 'j', 'abc1234', 1, 1, 0, 0, 5)"),
        ("WAL", "UPDATE agent_runs SET git_commit_hash = 'fff0000' WHERE id % 2"),
    ],
    ids=lambda text: text[:45],
)
async def test_counts_are_right_again_after_a_script(make_api: MakeApi, mode: str, statement: str) -> None:
    api = await make_api(db_journal_mode=JournalMode(mode))
    await api.batch(runs(50))
    assert (await api.get("/health"))["counts"] == {"state": "right", "foreign_commit_at": None, "corrected": 0}
    by_somebody_else(api.settings.db_path, statement)
    health = await settled(api)
    assert health["status"] == "ok"
    assert health["counts"]["state"] == "right"
    assert health["counts"]["corrected"] > 0
    assert wrong_totals(api.settings.db_path) == 0
    with closing(sqlite3.connect(api.settings.db_path)) as connection:
        (stored,) = connection.execute("SELECT count(*) FROM agent_runs").fetchone()
    assert (await api.get("/metrics?format=json"))["total_runs"] == stored


@MODES
async def test_totals_that_were_asked_for_before_are_not_remembered(make_api: MakeApi, mode: str) -> None:
    api = await make_api(db_journal_mode=JournalMode(mode))
    await api.batch(runs(50))
    assert (await api.get("/metrics?format=json"))["total_runs"] == 50
    by_somebody_else(api.settings.db_path, "DELETE FROM agent_runs WHERE id > 20")
    await settled(api)
    assert (await api.get("/metrics?format=json"))["total_runs"] == 20
    assert sum((await api.get("/metrics?format=json"))["agents"].values()) == 20


def test_it_is_said_once_and_in_health(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    assert call(daemon.url, "POST", "/api/v1/runs/batch", runs(30))[0] == 200
    by_somebody_else(tmp_path / "telemetry.sqlite", "DELETE FROM agent_runs WHERE id > 20")
    said = "Another program has committed to the database; the counts are compared with the runs"
    noticed = daemon.wait_for_line(said)
    assert noticed["level"] == "WARNING"
    line = daemon.wait_for_line("The counts agree with the runs again; telemetryd check reports what is left")
    assert line["corrected"] > 0
    health = get(daemon.url, "/health")[1]
    assert (health["status"], health["counts"]["state"]) == ("ok", "right")
    assert health["counts"]["foreign_commit_at"] is not None
    assert "warning" not in health
    assert get(daemon.url, "/metrics?format=json")[1]["total_runs"] == 20
    assert [line["message"] for line in daemon.lines].count(said) == 1
    telemetryd("check", "--db-path", tmp_path / "telemetry.sqlite")


@MODES
def test_what_was_changed_after_a_crash_is_corrected(start_daemon: StartDaemon, tmp_path: Path, mode: str) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=mode)
    assert call(daemon.url, "POST", "/api/v1/runs/batch", runs(30))[0] == 200
    daemon.stop(signal.SIGKILL)
    by_somebody_else(tmp_path / "telemetry.sqlite", "DELETE FROM agent_runs WHERE id > 20")
    again = start_daemon(TELEMETRY_DB_JOURNAL_MODE=mode)
    line = again.wait_for_line("The counts agree with the runs again; telemetryd check reports what is left")
    assert line["corrected"] > 0
    assert get(again.url, "/metrics?format=json")[1]["total_runs"] == 20
    assert get(again.url, "/health")[1]["counts"]["foreign_commit_at"] is None
    assert "Another program" not in "".join(line["message"] for line in again.lines)


def test_our_own_commands_are_no_strangers(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert post(daemon.url, make_run())[0] == 201
    telemetryd("check", "--db-path", tmp_path / "telemetry.sqlite")
    telemetryd("backup", tmp_path / "copy.sqlite", "--db-path", tmp_path / "telemetry.sqlite")
    assert post(daemon.url, make_run())[0] == 201  # whose group would notice a commit
    assert get(daemon.url, "/health")[1]["counts"]["foreign_commit_at"] is None
    assert daemon.stop() == 0
    telemetryd("check", "--repair", "--db-path", tmp_path / "telemetry.sqlite")
    again = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert post(again.url, make_run())[0] == 201
    assert get(again.url, "/health")[1]["counts"]["foreign_commit_at"] is None


@MODES
async def test_what_was_changed_while_nothing_ran_is_noticed_at_the_start(
    make_api: MakeApi, tmp_path: Path, mode: str
) -> None:
    settings = Settings(db_path=tmp_path / "telemetry.sqlite", db_journal_mode=JournalMode(mode))
    for expected in (None, None):  # also a start after which nothing was written
        store = await Store.open(settings, Metrics())
        assert store.health().counts["foreign_commit_at"] is expected
        await store.submit(CreateRuns(tuple(stored(n) for n in range(40))))
        await store.close()
    try:
        os.getxattr(settings.db_path, "user.telemetryd.settled")
    except OSError:
        pytest.skip("this file system keeps no extended attributes")
    by_somebody_else(settings.db_path, "DELETE FROM agent_runs WHERE id % 3 = 0")
    api = await make_api(db_journal_mode=JournalMode(mode))
    assert (await settled(api))["counts"]["corrected"] > 0
    assert wrong_totals(settings.db_path) == 0


@pytest.mark.parametrize("modes", [("DELETE", "WAL"), ("WAL", "DELETE")])
async def test_another_journal_mode_is_no_strangers_commit(
    tmp_path: Path, modes: tuple[JournalMode, JournalMode]
) -> None:
    for mode in modes:
        settings = Settings(db_path=tmp_path / "telemetry.sqlite", db_journal_mode=mode)
        store = await Store.open(settings, Metrics())
        await store.submit(CreateRuns((parse_run(make_run()).row,)))
        assert store.health().counts["foreign_commit_at"] is None
        await store.close()


@MODES
async def test_what_comes_in_during_the_comparison_is_counted_once(tmp_path: Path, mode: str) -> None:
    """Runs of an hour, and of those around it, come, change and go between the slices in which it is counted."""
    settings = Settings(db_path=tmp_path / "telemetry.sqlite", db_journal_mode=JournalMode(mode))
    store = await Store.open(settings, Metrics())
    api_rows = [stored(n) for n in range(200)]
    await store.submit(CreateRuns(tuple(api_rows)))
    by_somebody_else(settings.db_path, "DELETE FROM agent_runs WHERE id % 5 = 0")
    await eventually(lambda: store.health().counts["state"] != "right")
    number = 200
    while store.health().counts["state"] != "right":
        await store.submit(CreateRuns((stored(number, minute=number % 60, hour=6 + number % 9),)))
        await store.submit(UpdateRun(f"e{number - 150}", {"status": "failure", "duration_ms": number}))
        number += 1
        await asyncio.sleep(0)
    await store.close()
    assert number > 205, "or nothing came in between"
    assert wrong_totals(settings.db_path) == 0


def stored(number: int, minute: int = 30, hour: int = 10) -> tuple[Any, ...]:
    moment = f"2026-01-01T{hour:02}:{minute:02}:{number % 60:02}.{number:06}Z"
    names = {"event_id": f"e{number}", "git_commit_hash": f"abc000{number % 4}"}
    run = make_run(**names, created_at=moment, start_time=moment, status="success", duration_ms=number)
    return parse_run(parse_json(json.dumps(run).encode())).row


async def test_no_number_is_drawn_again_after_the_newest_runs_were_deleted(make_api: MakeApi) -> None:
    api = await make_api()
    await api.batch(runs(10))
    newest = (await api.get("/api/v1/changes"))["newest"]
    by_somebody_else(api.settings.db_path, "DELETE FROM agent_runs WHERE id > 5")
    run = make_run()
    await api.post(run)
    assert (await api.get(f"/api/v1/runs/{run['event_id']}"))["id"] > newest


async def test_no_number_is_drawn_again_by_a_group_that_is_done_again(
    make_api: MakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telemetryd.engine.sqlite.recount._LOOK_EVERY_S", 60)
    api = await make_api()
    await api.batch(runs(10))
    newest = (await api.get("/api/v1/changes"))["newest"]
    by_somebody_else(api.settings.db_path, "DELETE FROM agent_runs WHERE id > 5")
    wrong = api.store.submit(UpdateRun((await api.list())[0]["event_id"], {"status": "no status"}))
    created = api.store.submit(CreateRuns((stored(1),)))
    failed, done = await asyncio.gather(wrong, created, return_exceptions=True)
    assert isinstance(failed, CommandFailedError)
    assert done == Created((True,))
    assert (await api.get("/api/v1/runs/e1"))["id"] > newest


async def test_subscribers_begin_anew_as_it_is_unknown_what_was_deleted(make_api: MakeApi) -> None:
    api = await make_api()
    await api.batch(runs(10))
    page = await api.get("/api/v1/changes")
    place = f"{page['epoch']}-{page['newest']}"
    waiting = asyncio.create_task(api.get(f"/api/v1/changes?after={place}&wait=20", status=410))
    # Not the newest: that a number is gone would be noticed anyway.
    by_somebody_else(api.settings.db_path, "DELETE FROM agent_runs WHERE id <= 5")
    await settled(api)
    await waiting
    page = await api.get("/api/v1/changes")
    assert len(page["changes"]) == 5
    assert (await api.get(f"/api/v1/changes?after={page['epoch']}-{page['newest']}"))["changes"] == []


async def test_runs_with_one_time_are_one_slice(make_api: MakeApi) -> None:
    api = await make_api()
    await api.batch([make_run(created_at="2026-01-01T00:00:00Z") for _ in range(40)])
    by_somebody_else(api.settings.db_path, "DELETE FROM agent_runs WHERE id = 3")
    await settled(api)
    assert wrong_totals(api.settings.db_path) == 0
