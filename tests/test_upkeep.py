from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from backports import zstd
from click.testing import CliRunner
from pydantic import SecretStr

from telemetryd.cli import main, target
from telemetryd.cli.reach import RefusedError, Request, Where, session
from telemetryd.client.config import Config
from telemetryd.engine import budget
from telemetryd.engine.factory import count_wrong
from telemetryd.engine.sqlite.connection import connect
from telemetryd.errors import InvalidRequestError
from telemetryd.model.chores import Chore
from telemetryd.model.clocks import Reading, doubt
from telemetryd.model.commands import CreateEvents, CreateRuns
from telemetryd.model.runs import parse_run
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.ops.metrics import Metrics
from telemetryd.services import admin as admin_commands
from telemetryd.services.upkeep import Upkeep
from telemetryd.settings import Settings, Sync
from telemetryd.store import Store
from telemetryd.web.answers import error_response
from tests.conftest import Api, Daemon, MakeApi, StartDaemon, make_run
from tests.needs import require_program
from tests.tools.fill import make_database
from tests.tools.forks import popen
from tests.tools.process import telemetryd

TOKEN = "a-token-of-24-characters"


def ago(**span: float) -> str:
    return format_timestamp(datetime.now(UTC) - timedelta(**span))


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(connect(path, "ro")) as connection:
        return connection.execute(sql).fetchall()


def execute(where: Api | Daemon, sql: str) -> list[tuple[Any, ...]]:
    return [*where.execute(sql)]


def totals_are_right(where: Api | Daemon | Path) -> None:
    if isinstance(where, Path):
        path = where
    elif (url := database_url(where)) is not None:
        assert count_wrong(Settings(db_url=SecretStr(url), db_sync=Sync.NONE), repair=False) == 0
        return
    else:
        path = where.settings.db_path if isinstance(where, Api) else where.database
    assert rows(
        path, "SELECT agent_name, job_type, status, runs FROM run_totals WHERE runs > 0 ORDER BY 1, 2, 3"
    ) == rows(path, "SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY 1, 2, 3 ORDER BY 1, 2, 3")
    assert rows(path, "SELECT minute, runs FROM run_minutes ORDER BY 1") == rows(
        path, "SELECT substr(created_at, 1, 16), count(*) FROM agent_runs GROUP BY 1 ORDER BY 1"
    )


def database_url(where: Api | Daemon) -> str | None:
    if isinstance(where, Daemon):
        return where.database_url
    url = where.settings.db_url
    return None if url is None else url.get_secret_value()


async def fill(api: Api) -> None:
    old = [make_run(created_at=ago(days=100), status=status) for status in ("success", "failed", "running") * 200]
    new = [make_run(created_at=ago(days=1), agent_name="other") for _ in range(50)]
    assert (await api.batch([*old, *new]))["inserted"] == 650


# --- The endpoints -------------------------------------------------------------------------------


async def authorised(make_api: MakeApi, **values: Any) -> Api:
    api = await make_api(api_auth_enabled=True, api_auth_token=TOKEN, **values)
    api.client.session.headers["X-API-Key"] = TOKEN
    return api


async def test_admin_needs_authentication(make_api: MakeApi) -> None:
    api = await make_api()
    for word in ("prune", "reap", "backup"):
        answer = await api.call("POST", f"/api/v1/admin/{word}", json={"older_than": "1d"}, status=403)
        assert "TELEMETRY_API_AUTH_ENABLED" in answer["detail"]
        await api.call("POST", f"/api/v1/%61dmin/{word}", json={"older_than": "1d"}, status=403)


async def test_admin_needs_the_token(make_api: MakeApi) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token=TOKEN)
    await api.call("POST", "/api/v1/admin/prune", json={"older_than": "1d"}, status=401)


@pytest.mark.sqlite
async def test_prune_deletes_a_slice_and_keeps_the_totals_right(make_api: MakeApi) -> None:
    api = await authorised(make_api)
    await fill(api)
    path = api.settings.db_path
    assert (await admin(api, "prune", older_than="90d", dry_run=True))["matching"] == 600
    answer = await admin(api, "prune", older_than="90d", limit=100.0)
    assert (answer["pruned"], answer["more"]) == (100, True)
    totals_are_right(path)
    assert (await admin(api, "prune", older_than="90d", limit=1000, status="failed"))["pruned"] in range(150, 201)
    totals_are_right(path)
    answer = await admin(api, "prune", older_than="90d", limit=1000, agent_name="hugo-translator")
    assert answer["pruned"] > 0
    slices = 0
    while answer["more"]:
        answer = await admin(api, "prune", older_than="90d", limit=1000)
        slices += 1
    assert slices < 5  # free pages go back many at a time
    assert await count(api) == 50
    assert rows(path, "PRAGMA freelist_count") == [(0,)]
    totals_are_right(path)
    assert (await api.get("/metrics"))["agents"] == {"other": 50}


async def test_prune_by_version_spares_what_changed(make_api: MakeApi) -> None:
    api = await authorised(make_api)
    created = [make_run(created_at=ago(days=100)) for _ in range(3)]
    await api.batch(created)
    runs = await api.list()
    await api.call("PATCH", f"/api/v1/runs/{runs[0]['event_id']}", json={"status": "success"}, status=200)
    versions = [{"id": run["id"], "updated_at": run["updated_at"]} for run in runs[:2]]
    unknown = {"id": 999, "updated_at": runs[0]["updated_at"]}
    answer = await admin(api, "prune", older_than="90d", versions=[*versions, unknown])
    assert answer["pruned"] == 1
    assert {run["event_id"] for run in await api.list()} == {runs[0]["event_id"], runs[2]["event_id"]}


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"older_than": "soon"},
        {"older_than": "1d", "created_before": "2025-01-01T00:00:00Z"},
        *(
            {"older_than": "1d", **wrong}
            for wrong in (
                {"limit": 0},
                {"x": 1},
                {"status": "gone"},
                {"agent_name": "agent-*"},
                {"job_type": "*"},
                {"versions": [{"id": -1, "updated_at": "2025-01-01T00:00:00Z"}]},
            )
        ),
    ],
)
async def test_a_wrong_body_is_422(make_api: MakeApi, body: object) -> None:
    api = await authorised(make_api)
    await api.call("POST", "/api/v1/admin/prune", json=body, status=422)


@pytest.mark.parametrize("field", ["agent_name", "job_type"])
async def test_what_prune_and_reap_choose_is_no_pattern(make_api: MakeApi, field: str) -> None:
    """They found no run by one, and reported success, where the list finds many."""
    api = await authorised(make_api)
    for command in ("prune", "reap"):
        body = {"older_than": "1d", field: "agent-*"}
        answer = await api.call("POST", f"/api/v1/admin/{command}", json=body, status=422)
        assert [fault["loc"][-1] for fault in answer["detail"]] == [field]
        flag = f"--{field.removesuffix('_name').replace('_', '-')}"
        said = CliRunner().invoke(main, [command, "--older-than", "1d", flag, "agent-*", "--dry-run"])
        assert said.exit_code == 2
        assert "'agent-*': must be an exact name" in said.stderr


async def test_reap_gives_the_guides_values_and_spares_heartbeats(make_api: MakeApi) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    api = await authorised(make_api, clock=lambda: moment)
    stale, alive, done = (
        make_run(created_at="2025-12-24T10:00:00Z"),
        make_run(created_at="2025-12-24T10:00:00Z"),
        make_run(created_at="2025-12-24T10:00:00Z", status="success"),
    )
    await api.batch([stale, alive, done])
    moment += timedelta(hours=5)
    await api.call("PATCH", f"/api/v1/runs/{alive['event_id']}", json={"items_succeeded": 5}, status=200)
    moment += timedelta(minutes=30)
    before = {"created_before": format_timestamp(moment - timedelta(hours=1))}
    assert (await admin(api, "reap", **before, dry_run=True))["matching"] == 1
    for nobody in ({"agent_name": "nobody"}, {"job_type": "nothing"}, {"agent_name": "a", "job_type": "nothing"}):
        assert await admin(api, "reap", **before, **nobody) == {"reaped": 0, "more": False, **before}
        assert (await admin(api, "prune", **before, **nobody, dry_run=True))["matching"] == 0
    assert await admin(api, "reap", **before) == {"reaped": 1, "more": False, **before}
    run = await api.get(f"/api/v1/runs/{stale['event_id']}")
    assert run["status"] == "cancelled"
    assert run["end_time"] == run["updated_at"] == format_timestamp(moment)
    assert run["error_summary"] == "Stale run cleaned up on startup (created at 2025-12-24T10:00:00.000000Z)"
    assert run["output_summary"] == "Process did not complete - cleanup on restart"
    assert (await api.get(f"/api/v1/runs/{alive['event_id']}"))["status"] == "running"
    totals_are_right(api)


@pytest.mark.sqlite
async def test_a_backup_is_made_where_the_settings_say(make_api: MakeApi, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    api = await authorised(make_api, backup_dir=folder, backup_keep=1)
    await fill(api)
    answer = await api.call("POST", "/api/v1/admin/backup", json={}, status=200)
    assert answer["rows"] == 650
    assert [str(path) for path in folder.iterdir()] == [answer["path"]]
    assert answer["path"].endswith(".sqlite.zst")
    answer = await api.call("POST", "/api/v1/admin/backup", json={"compress": False}, status=200)
    assert answer["path"].endswith(".sqlite")
    assert rows(Path(answer["path"]), "SELECT count(*) FROM agent_runs") == [(650,)]
    await api.call("POST", "/api/v1/admin/backup", json={"path": "/etc/passwd"}, status=400)
    await api.call("POST", "/api/v1/admin/backup", json={"compress": "no"}, status=422)


@pytest.mark.sqlite
async def test_without_a_directory_there_is_no_backup(make_api: MakeApi) -> None:
    api = await authorised(make_api)
    answer = await api.call("POST", "/api/v1/admin/backup", json={}, status=400)
    assert "TELEMETRY_BACKUP_DIR" in answer["detail"]


async def admin(api: Api, word: str, **body: Any) -> Any:
    return await api.call("POST", f"/api/v1/admin/{word}", json=body, status=200)


async def count(api: Api) -> int:
    return int((await api.get("/metrics"))["total_runs"])


# --- The commands --------------------------------------------------------------------------------


async def post(daemon: Daemon, runs: list[Any], **headers: str) -> None:
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{daemon.url}/api/v1/runs/batch", json=runs) as response,
    ):
        assert response.status == 200


def old_runs(number: int) -> list[Any]:
    return [make_run(created_at=ago(days=100), metrics_json={"n": n}) for n in range(number)]


@pytest.mark.sqlite
async def test_prune_goes_through_the_daemon_by_its_unix_socket(start_daemon: StartDaemon, tmp_path: Path) -> None:
    unix = tmp_path / "d.sock"
    (tmp_path / "elsewhere").mkdir()
    daemon = start_daemon(TELEMETRY_API_UNIX=str(unix), TELEMETRY_DB_JOURNAL_MODE="WAL")
    await post(daemon, [*old_runs(700), *[make_run() for _ in range(5)]])
    common = ("prune", "--older-than", "90d", "--db-path", daemon.database, "--json")
    refused = telemetryd(*common, status=1)
    assert "--unix" in refused.stderr
    elsewhere = ("prune", "--older-than", "90d", "--json", "--dry-run", "--unix", unix)
    assert json.loads(telemetryd(*elsewhere, cwd=tmp_path / "elsewhere").stdout)["matching"] == 700
    assert [*(tmp_path / "elsewhere").iterdir()] == []  # which has no database, and gets none
    dry = json.loads(telemetryd(*common, "--unix", unix, "--dry-run", "--job-type", "translate_directory").stdout)
    assert (dry["dry_run"], dry["matching"]) == (True, 700)
    assert json.loads(telemetryd(*common, "--unix", unix, "--job-type", "other").stdout)["pruned"] == 0
    archive = tmp_path / "runs.ndjson.zst"
    done = json.loads(telemetryd(*common, "--unix", unix, "--archive", archive).stdout)
    assert (done["pruned"], done["archived"]) == (700, 700)
    with zstd.open(archive, "rb") as packed:
        archived = [json.loads(line) for line in packed]
    assert sorted(run["metrics_json"]["n"] for run in archived) == list(range(700))
    assert execute(daemon, "SELECT count(*) FROM agent_runs") == [(5,)]
    totals_are_right(daemon)
    assert "exists already" in telemetryd(*common, "--unix", unix, "--archive", archive, status=1).stderr
    assert daemon.stop() == 0


@pytest.mark.sqlite
@pytest.mark.parametrize("is_running", [True, False])
async def test_runs_too_large_for_usual_pages_are_archived_in_smaller_ones(
    start_daemon: StartDaemon, tmp_path: Path, is_running: bool
) -> None:
    unix = tmp_path / "d.sock"
    daemon = start_daemon(TELEMETRY_API_UNIX=str(unix), TELEMETRY_DB_JOURNAL_MODE="WAL")
    await post(daemon, old_runs(40))
    with closing(sqlite3.connect(daemon.database)) as connection, connection:  # 40 requests would be slower
        connection.execute("UPDATE agent_runs SET error_details = ?", ("x" * 900_000,))
    if not is_running:
        assert daemon.stop() == 0
    archive = tmp_path / "runs.ndjson.zst"
    place = ("--unix", unix) if is_running else ()
    told = telemetryd(
        "prune", "--older-than", "90d", "--db-path", daemon.database, "--json", *place, "--archive", archive
    )
    assert (json.loads(told.stdout)["pruned"], json.loads(told.stdout)["archived"]) == (40, 40)


@pytest.mark.sqlite
@pytest.mark.parametrize("is_running", [True, False])
async def test_events_go_into_the_archive_and_away_with_their_runs(
    start_daemon: StartDaemon, tmp_path: Path, is_running: bool
) -> None:
    unix = tmp_path / "d.sock"
    daemon = start_daemon(TELEMETRY_API_UNIX=str(unix), TELEMETRY_DB_JOURNAL_MODE="WAL")
    runs = [*old_runs(20), make_run()]
    await post(daemon, runs)
    talkative, quiet, young = runs[3]["event_id"], runs[5]["event_id"], runs[-1]["event_id"]
    with closing(sqlite3.connect(daemon.database)) as connection, connection:  # 12 requests would be slower
        connection.executemany(
            "INSERT INTO run_events (run, event_key, event_type, timestamp, payload) "
            "SELECT id, ?, 'step', '2025-12-24T10:00:00.000000Z', '{\"n\": 1}' FROM agent_runs WHERE event_id = ?",
            [(str(number), talkative) for number in range(12_000)] + [("1", quiet), ("1", young)],
        )
    where = ("--unix", unix) if is_running else ()
    if not is_running:
        daemon.stop()
    archive = tmp_path / "runs.ndjson.zst"
    common = ("prune", "--older-than", "90d", "--db-path", daemon.database, "--json", *where)
    done = json.loads(telemetryd(*common, "--archive", archive).stdout)
    assert (done["pruned"], done["archived"]) == (20, 20)
    with zstd.open(archive, "rb") as packed:
        archived = {run["event_id"]: run["events"] for run in map(json.loads, packed)}
    assert [int(event["event_key"]) for event in archived[talkative]] == list(range(12_000))
    assert archived[talkative][0]["payload"] == {"n": 1}
    assert [len(events) for event_id, events in archived.items() if event_id not in (talkative, quiet)] == [0] * 18
    assert len(archived[quiet]) == 1
    assert execute(daemon, "SELECT count(*) FROM agent_runs") == [(1,)]
    assert execute(daemon, "SELECT count(*) FROM run_events") == [(1,)]
    totals_are_right(daemon)


async def test_a_run_that_gets_events_after_it_was_archived_stays(make_api: MakeApi) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token=TOKEN)
    token = {"Authorization": f"Bearer {TOKEN}"}
    run = old_runs(1)[0]
    await api.post(run, headers=token)
    path = f"/api/v1/runs/{run['event_id']}"
    before = await api.get(path, headers=token)
    await api.call("POST", f"{path}/events", json={"event_type": "late"}, status=201, headers=token)
    version = {"id": before["id"], "updated_at": before["updated_at"]}
    body = {"older_than": "90d", "versions": [version]}
    answer = await api.call("POST", "/api/v1/admin/prune", json=body, status=200, headers=token)
    assert answer["pruned"] == 0
    assert len(await api.get(f"{path}/events", headers=token)) == 1


async def test_a_daemon_that_goes_on_refusing_is_reported_and_given_up(
    aiohttp_server: Callable[[web.Application], Awaitable[TestServer]], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a full disk `prune` was silent for five minutes."""
    asked = 0

    async def refuse(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return error_response(503, "The disk is full", {"Retry-After": "0.1"})

    app = web.Application()
    app.router.add_post("/api/v1/admin/prune", refuse)
    server = await aiohttp_server(app)
    async with session(Config(url=str(server.make_url("/")))) as request:
        with pytest.raises(RefusedError, match="The daemon answered 503: The disk is full"):
            await target.Remote(request, patience_s=1.0).prune({"older_than": "90d"})
    assert 2 <= asked <= 11
    assert "The daemon answered 503: The disk is full; trying again in 0.1 s" in capsys.readouterr().err


async def test_reap_goes_through_the_daemon_by_its_token(start_daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    token = {"TELEMETRY_API_AUTH_ENABLED": "true", "TELEMETRY_API_AUTH_TOKEN_FILE": str(tmp_path / "token")}
    daemon = start_daemon(**token)
    await post(daemon, [make_run() for _ in range(3)], Authorization=f"Bearer {TOKEN}")
    await asyncio.sleep(1.1)
    out = telemetryd("reap", "--older-than", "1s", "--url", daemon.url, "--auth-token-file", tmp_path / "token").stdout
    assert out.startswith("3 runs created before ")
    assert execute(daemon, "SELECT DISTINCT status FROM agent_runs") == [("cancelled",)]


@pytest.mark.sqlite
async def test_without_a_daemon_they_work_on_the_database(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    await post(daemon, [*old_runs(600), *[make_run(created_at=ago(hours=2)) for _ in range(5)]])
    daemon.stop()
    path = daemon.database
    archive = tmp_path / "runs.ndjson.zst"
    assert (
        "600 runs archived"
        in telemetryd("prune", "--older-than", "90d", "--db-path", path, "--archive", archive).stdout
    )
    totals_are_right(path)
    again = json.loads(telemetryd("prune", "--older-than", "90d", "--json", "--db-path", path).stdout)
    assert again["pruned"] == 0
    reaped = json.loads(telemetryd("reap", "--older-than", "1h", "--json", "--db-path", path).stdout)
    assert reaped["reaped"] == 0  # they arrived just now, which is a sign of life
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET updated_at = created_at")
    reaped = json.loads(telemetryd("reap", "--older-than", "1h", "--json", "--db-path", path).stdout)
    assert reaped["reaped"] == 5
    totals_are_right(path)
    assert telemetryd("prune", "--older-than", "90d", "--db-path", tmp_path / "none.sqlite", status=1).stderr
    assert not (tmp_path / "none.sqlite").exists()


@pytest.mark.sqlite
async def test_a_run_that_comes_after_the_archive_was_written_is_spared(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon()
    await post(daemon, old_runs(5))
    daemon.stop()
    late = make_run(created_at=ago(days=100))
    upkeep = import_module("telemetryd.cli.upkeep")
    write_archive = upkeep._write_archive

    async def write_and_be_late(target: Any, *arguments: Any) -> Any:
        rows = await write_archive(target, *arguments)
        await target._store.submit(CreateRuns((parse_run(late).row,)))
        return rows

    monkeypatch.setattr(upkeep, "_write_archive", write_and_be_late)
    where = Where(settings={"db_path": daemon.database})
    done = await upkeep._prune(where, {"created_before": ago(days=90)}, dry_run=False, archive=tmp_path / "archive.zst")
    assert (done["archived"], done["pruned"]) == (5, 5)
    assert execute(daemon, "SELECT event_id FROM agent_runs") == [(late["event_id"],)]
    totals_are_right(daemon)


def test_a_prune_killed_at_any_moment_loses_no_run_and_can_be_repeated(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 4000)
    daemon = start_daemon(TELEMETRY_API_UNIX=str(tmp_path / "d.sock"), TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert daemon.url
    arguments = ("prune", "--older-than", "60d", "--db-path", str(path), "--unix", str(tmp_path / "d.sock"))
    for number in range(3):
        command = [sys.executable, "-m", "telemetryd", *arguments, "--archive", str(tmp_path / f"archive-{number}.zst")]
        process = popen(command, os.environ, stdout=subprocess.DEVNULL)
        time.sleep(random.uniform(0.1, 0.6))
        process.kill()
        process.wait()
    telemetryd(*arguments, "--archive", tmp_path / "archive-last.zst")
    kept = {row[0] for row in rows(path, "SELECT event_id FROM agent_runs")}
    archived = set()
    for archive in tmp_path.glob("archive-*.zst"):
        with zstd.open(archive, "rb") as packed:
            archived |= {json.loads(line)["event_id"] for line in packed}
    assert len(kept | archived) == 4000
    assert not kept & archived
    totals_are_right(path)
    assert daemon.stop() == 0


# --- By itself -----------------------------------------------------------------------------------


async def for_a_moment(api: Api, now: Callable[[], datetime] = utc_now) -> Upkeep:
    """Let the upkeep look at everything once, and do what it does."""
    # On PostgreSQL it takes a moment until a daemon leads.
    while not all([api.store.leads(chore) for chore in (Chore.PRUNING, Chore.REAPING)]):  # noqa: ASYNC110, C419 - asks each
        await asyncio.sleep(0.02)
    upkeep = Upkeep(api.store, api.settings, now)
    task = asyncio.create_task(upkeep.run())
    done: list[int] = []
    while len(done) < 10 or done[-1] != done[-10]:  # it pauses between two slices
        await asyncio.sleep(0.05)
        done.append(api.store.health().groups)
    task.cancel()
    await asyncio.wait((task,))
    return upkeep


async def confirm(api: Api, **body: Any) -> Any:
    return await admin(api, "confirm", **body)


async def test_nothing_is_deleted_by_itself_until_the_age_is_confirmed(make_api: MakeApi) -> None:
    api = await authorised(make_api, prune_after="90d")
    await fill(api)
    upkeep = await for_a_moment(api)
    assert await count(api) == 650
    assert upkeep.shown()["unconfirmed"]["would_delete"] == 600
    (notice,) = upkeep.notices()
    assert "600 runs would be deleted" in notice
    assert upkeep.shown()["unconfirmed"]["oldest"][:10] in notice
    assert notice.endswith("telemetryd prune --confirm-automatic 90d")
    answer = await confirm(api, prune_after="90d")
    assert (answer["prune_after"], answer["matching"]) == ("90d", 600)
    upkeep = await for_a_moment(api)
    assert await count(api) == 50
    assert (upkeep.shown()["unconfirmed"], upkeep.notices()) == (None, [])
    totals_are_right(api)


@pytest.mark.parametrize(
    ("confirmed", "after", "left"), [("90d", "90d", 0), ("90d", "95d", 0), ("90d", "60d", 3), ("60d", "90d", 0)]
)
async def test_only_a_shorter_age_is_confirmed_again(make_api: MakeApi, confirmed: str, after: str, left: int) -> None:
    api = await authorised(make_api, prune_after=after)
    await api.batch([make_run(created_at=ago(days=100)) for _ in range(3)])
    await confirm(api, prune_after=confirmed)
    upkeep = await for_a_moment(api)
    assert await count(api) == left
    assert bool(upkeep.notices()) is bool(left)


async def test_what_is_confirmed_is_one_thing(make_api: MakeApi) -> None:
    api = await authorised(make_api)
    for body in (
        {},
        {"prune_after": "90"},
        {"prune_after": "90d", "date": "2026-01-01"},
        {"date": "today"},
        {"date": "2001-13-01"},
    ):
        await api.call("POST", "/api/v1/admin/confirm", json=body, status=422)
    refused = await api.call("POST", "/api/v1/admin/confirm", json={"date": "2001-01-01"}, status=400)
    assert "set the clock" in refused["detail"]


async def test_nothing_is_done_by_itself_while_the_clock_is_wrong(make_api: MakeApi) -> None:
    api = await authorised(make_api, prune_after="90d", stale_after="1h")
    await api.batch([make_run(status=status) for status in ("running", "success")])
    await confirm(api, prune_after="90d")

    def wrong() -> datetime:
        return utc_now() + timedelta(days=400)

    for _ in range(2):  # the second one as after a restart, when it has been committed by the wrong clock
        upkeep = await for_a_moment(api, wrong)
        assert sorted(run["status"] for run in await api.list()) == ["running", "success"]
        assert upkeep.shown()["paused"]
        (notice,) = upkeep.notices()
        assert "telemetryd confirm-clock" in notice
        await api.store.submit(CreateEvents((await api.list())[0]["event_id"], (("k", "x", "", None),)))
    upkeep = await for_a_moment(api)
    assert not upkeep.shown()["paused"]
    with pytest.raises(InvalidRequestError):
        await admin_commands.confirm(api.store, {"date": f"{utc_now():%Y-%m-%d}"}, wrong())
    await admin_commands.confirm(api.store, {"date": f"{wrong():%Y-%m-%d}"}, wrong())
    await for_a_moment(api, wrong)
    assert await count(api) == 0


async def test_what_a_wrong_clock_commits_does_not_prove_it_right(make_api: MakeApi) -> None:
    wrong = utc_now() + timedelta(days=400)
    moments = [utc_now()]
    api = await make_api(clock=lambda: moments[-1], stale_after="1h")
    assert (await for_a_moment(api, lambda: wrong)).shown()["paused"]
    moments.append(wrong)
    await api.post(make_run())
    assert (await for_a_moment(api, lambda: wrong)).shown()["paused"]
    assert not (await for_a_moment(api, utc_now)).shown()["paused"]


@pytest.mark.parametrize(
    ("passed", "up", "is_right"),
    [
        (timedelta(days=3), timedelta(days=3), True),  # nobody used it, on a machine that went on
        (timedelta(hours=20), None, True),
        (timedelta(days=3), None, False),  # the machine was off, or the clock is wrong: who knows
        (timedelta(days=400), timedelta(minutes=1), False),
        (timedelta(days=-400), timedelta(minutes=1), False),
        (timedelta(days=-2), None, False),
    ],
)
def test_within_one_boot_a_rest_is_no_jump(passed: timedelta, up: timedelta | None, is_right: bool) -> None:
    known = datetime(2026, 1, 1, tzinfo=UTC)
    trusted = Reading(format_timestamp(known), "boot", 100.0)
    now = Reading(
        format_timestamp(known + passed),
        "boot" if up is not None else "another",
        100.0 + up.total_seconds() if up is not None else 0.0,
    )
    assert (doubt(now, trusted, None) is None) is is_right


def test_a_clock_that_was_never_asked_for_is_compared_with_what_was_committed() -> None:
    now = Reading("2026-01-03T00:00:00.000000Z", "boot", 1.0)
    assert doubt(now, None, None) is None
    assert doubt(now, None, "2026-01-02T12:00:00.000000Z") is None
    assert "2026-01-01T00:00:00" in (doubt(now, None, "2026-01-01T00:00:00.000000Z") or "")


@pytest.mark.sqlite
async def test_what_was_confirmed_is_not_restored(make_api: MakeApi, tmp_path: Path) -> None:
    api = await authorised(make_api)
    await confirm(api, prune_after="90d")
    confirmed = "SELECT after_s FROM confirmed_prune"
    assert execute(api, confirmed) == [(90 * 86_400,)]
    telemetryd("backup", tmp_path / "copy.sqlite", "--db-path", api.settings.db_path)
    telemetryd("restore", tmp_path / "copy.sqlite", "--db-path", tmp_path / "other.sqlite")
    assert rows(tmp_path / "other.sqlite", confirmed) == []


@pytest.mark.sqlite
async def test_the_daemon_does_it_by_itself_if_set_and_confirmed(start_daemon: StartDaemon) -> None:
    settings = {"TELEMETRY_PRUNE_AFTER": "90d", "TELEMETRY_STALE_AFTER": "1s", "TELEMETRY_RETENTION_DAYS": "30"}
    daemon = start_daemon(**settings)
    await post(daemon, [make_run() for _ in range(3)])
    remark = daemon.wait_for_line("Configuration remark")["remark"]
    assert remark.startswith("TELEMETRY_RETENTION_DAYS has no effect, as in 3.x")
    assert daemon.wait_for_line("Reaped")["result_count"] == 3
    await post(daemon, old_runs(3))
    daemon.stop()
    telemetryd("prune", "--confirm-automatic", "120d", "--db-path", daemon.database)
    socket = daemon.folder / "d.sock"
    daemon = start_daemon(**settings, TELEMETRY_API_UNIX=str(socket))
    reason = daemon.wait_for_line("Nothing is deleted by itself yet")["reason"]
    assert "3 runs would be deleted" in reason
    assert "confirmed are 120d" in reason
    async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/health") as answer:
        health = await answer.json()
    assert (health["status"], health["notices"]) == ("ok", [reason])
    there = ("--unix", str(socket), "--db-path", str(daemon.database))
    done = json.loads(telemetryd("prune", "--confirm-automatic", "90d", "--json", *there).stdout)
    assert done["matching"] == 3
    assert daemon.wait_for_line("Pruned")["result_count"] == 3
    totals_are_right(daemon)


@pytest.fixture
def wall_clock(tmp_path: Path) -> Path:
    """A library under which a process sees another wall clock."""
    require_program("gcc", "gcc")
    library, source = tmp_path / "wall_clock.so", Path(__file__).parent / "faults" / "wall_clock.c"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.sqlite
async def test_a_daemon_that_starts_with_a_wrong_clock_deletes_nothing(
    start_daemon: StartDaemon, tmp_path: Path, wall_clock: Path
) -> None:
    wrong = tmp_path / "clock"
    wrong.write_text(str(400 * 86_400))
    path = make_database(tmp_path / "telemetry.sqlite", 20)
    store = await Store.open(Settings(db_path=path), Metrics())
    await admin_commands.confirm(store, {"prune_after": "90d"}, utc_now())
    await store.close()
    settings = {"TELEMETRY_PRUNE_AFTER": "90d", "TELEMETRY_STALE_AFTER": "1h"}
    daemon = start_daemon(**settings, LD_PRELOAD=str(wall_clock), WALL_CLOCK=str(wrong))
    assert daemon.wait_for_line("The clock has jumped")["level"] == "ERROR"
    async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/health") as answer:
        health = await answer.json()
    assert health["automatic"]["paused"]
    assert "confirm-clock" in health["notices"][0]
    assert daemon.stop() == 0
    assert rows(path, "SELECT count(*), sum(status = 'running') FROM agent_runs") == [(20, 3)]
    daemon = start_daemon(**settings)
    assert daemon.wait_for_line("Pruned")["result_count"] == 6
    assert daemon.wait_for_line("Reaped")["result_count"] in (2, 3)
    assert daemon.stop() == 0


def test_the_clock_is_confirmed_without_a_daemon(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 3)
    assert "the clock says" in telemetryd("confirm-clock", f"{utc_now():%Y-%m-%d}", "--db-path", path).stdout
    assert len(rows(path, "SELECT * FROM trusted_clock")) == 1
    assert "set the clock" in telemetryd("confirm-clock", "2001-01-01", "--db-path", path, status=1).stderr


# --- Age -----------------------------------------------------------------------------------------


async def test_a_run_from_the_future_is_as_old_as_its_arrival(make_api: MakeApi) -> None:
    arrival = datetime.now(UTC) - timedelta(days=100)
    api = await authorised(make_api, clock=lambda: arrival)
    future = format_timestamp(arrival + timedelta(days=1000))
    await api.batch([make_run(created_at=future, agent_name=name) for name in ("a", "b")])
    await api.batch([make_run(created_at=future, agent_name="a", status="success"), make_run(agent_name="a")])
    found = await admin(api, "prune", older_than="90d", dry_run=True)
    assert (found["matching"], found["oldest"]) == (4, format_timestamp(arrival))
    assert (await admin(api, "prune", older_than="110d", dry_run=True))["matching"] == 0
    assert (await admin(api, "reap", older_than="90d", dry_run=True))["matching"] == 3
    assert (await admin(api, "reap", older_than="90d", agent_name="b"))["reaped"] == 1
    assert (await admin(api, "prune", older_than="90d", agent_name="a", status="running"))["pruned"] == 2
    assert (await admin(api, "prune", older_than="90d"))["pruned"] == 2
    assert execute(api, "SELECT count(*) FROM run_arrivals") == [(0,)]
    totals_are_right(api)


@pytest.mark.parametrize("is_remote", [False, True])
async def test_a_run_from_the_future_is_archived_like_any_other(
    make_api: MakeApi, tmp_path: Path, is_remote: bool
) -> None:
    now = datetime.now(UTC)
    moments = [now - timedelta(days=100)]
    api = await authorised(make_api, clock=lambda: moments[-1])
    created = [make_run(created_at=ago(days=days)) for days in (-1000, 200, -1000)]
    await api.batch(created[:2])
    moments.append(now)
    await api.batch(created[2:])
    await api.call("POST", f"/api/v1/runs/{created[0]['event_id']}/events", json={"event_type": "step"}, status=201)
    upkeep = import_module("telemetryd.cli.upkeep")
    url = str(api.client.make_url("")).rstrip("/")
    request = Request(url, url, api.client.session)
    there = target.Remote(request) if is_remote else target.Local(api.store)
    chosen = {"created_before": ago(days=90)}
    count = await there.prune({**chosen, "dry_run": True})
    pages = upkeep._chosen_pages(there, chosen, count["ahead"])
    archive = tmp_path / "archive.zst"
    written, file = await upkeep._write_archive(there, pages, archive, lambda rows: None)
    (versions,) = upkeep._archived_versions(file)
    assert written == 2
    assert (await there.prune({**chosen, "versions": versions}))["pruned"] == 2
    with zstd.open(archive, "rb") as packed:
        archived = {run["event_id"]: len(run["events"]) for run in map(json.loads, packed)}
    assert archived == {created[1]["event_id"]: 0, created[0]["event_id"]: 1}
    assert [run["event_id"] for run in await api.list()] == [created[2]["event_id"]]


async def test_a_batch_and_its_repeat_note_each_arrival_once(make_api: MakeApi) -> None:
    api = await make_api()
    ahead = [make_run(created_at=ago(days=-days)) for days in (1, 2)]
    for _ in range(2):
        await api.batch([*ahead, ahead[0], make_run(), make_run(created_at=ago(days=1))])
    noted = execute(
        api,
        "SELECT event_id FROM run_arrivals AS a JOIN agent_runs AS r ON r.id = a.run AND r.created_at = a.created_at "
        "AND r.updated_at = a.arrived_at AND r.agent_name = a.agent_name ORDER BY r.id",
    )
    assert noted == [(run["event_id"],) for run in ahead]


# --- Slices --------------------------------------------------------------------------------------


async def test_a_slice_is_bounded_in_bytes(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SLICE_BYTES", 80_000)
    api = await authorised(make_api)
    await api.batch([make_run(created_at=ago(days=100), error_details="x" * size * 10_000) for size in (3, 3, 3, 9, 1)])
    assert (await admin(api, "reap", older_than="1h", dry_run=True))["matching"] == 0
    api.execute("UPDATE agent_runs SET updated_at = created_at")
    for command, counted in (("reap", "reaped"), ("prune", "pruned")):
        slices: list[Any] = []
        while not slices or slices[-1]["more"]:
            slices.append(await admin(api, command, older_than="1h" if command == "reap" else "90d"))
        assert [answer[counted] for answer in slices if answer[counted]] == [2, 1, 1, 1]
    totals_are_right(api)


async def test_a_slice_is_bounded_in_the_bytes_of_events(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SLICE_BYTES", 80_000)
    api = await authorised(make_api)
    runs = [make_run(created_at=ago(days=100)) for _ in range(2)]
    await api.batch(runs)
    events = [{"event_type": "step", "event_key": str(n), "payload": {"text": "x" * 10_000}} for n in range(12)]
    await api.call("POST", f"/api/v1/runs/{runs[0]['event_id']}/events", json=events, status=201)
    answer = await admin(api, "prune", older_than="90d")
    assert answer["more"]
    assert 0 < execute(api, "SELECT count(*) FROM run_events")[0][0] < 12
    while answer["more"]:
        answer = await admin(api, "prune", older_than="90d")
    assert execute(api, "SELECT count(*) FROM run_events") == [(0,)]
    assert await count(api) == 0


def test_a_slice_ends_when_its_time_is_over() -> None:
    now = [0.0]
    left = budget.Budget(lambda: now[0])
    assert left.take([("a", 1), ("b", 1)]) == [("a",), ("b",)]
    assert not left.is_spent
    now[0] = 1.0
    assert left.is_spent


def test_an_archive_that_finds_no_room_deletes_nothing(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5000)
    command = [sys.executable, "-m", "telemetryd", "prune", "--older-than", "1d", "--db-path", str(path)]
    command += ["--archive", str(tmp_path / "archive.ndjson.zst")]
    # A file that may not become longer than 20 KiB, as on a disk that is full.
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    where, problem = done.stderr.splitlines()
    assert where == f"telemetryd: works on the database {path}"
    assert problem.startswith(f"telemetryd: Cannot write {tmp_path / 'archive.ndjson.zst'}: ")
    assert rows(path, "SELECT count(*) FROM agent_runs") == [(5000,)]
    assert not [file for file in tmp_path.iterdir() if "archive" in file.name]
