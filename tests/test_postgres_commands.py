"""Commands on a database that is on PostgreSQL: which work, and which say what to use instead."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from telemetryd.engine.postgres.schema import current_version
from tests.conftest import Daemon, StartDaemon, make_run, wait_until
from tests.http_client import call
from tests.postgres_cluster import Cluster
from tests.tools.process import telemetryd

pytestmark = pytest.mark.postgresql


@pytest.fixture
def place(postgres_database: str) -> dict[str, str]:
    """The variables that name a new database."""
    return {"TELEMETRY_DB_URL": postgres_database, "TELEMETRY_DB_SYNC": "none"}


@pytest.mark.parametrize("command", [("backup", "there.sqlite"), ("restore", "source")])
def test_what_the_server_has_tools_for_is_refused_in_one_sentence(
    place: dict[str, str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "source").touch()
    done = telemetryd(*command, status=1, cwd=tmp_path, **place)  # type: ignore[arg-type]
    assert done.stderr == (
        "telemetryd: TELEMETRY_DB_URL names a database on PostgreSQL, which has tools of its own for this: pg_dump or "
        "pgBackRest for backups, pg_amcheck for damage\n"
    )


def test_migrate_makes_the_tables_of_an_empty_database(cluster: Cluster, tmp_path: Path) -> None:
    name = cluster.make()
    place: dict[str, Any] = {"TELEMETRY_DB_URL": cluster.url(name), "TELEMETRY_DB_SYNC": "none"}
    newest = current_version()
    assert (
        f"would be brought from schema version 0 to {newest}"
        in telemetryd("migrate", "--dry-run", cwd=tmp_path, **place).stdout
    )
    assert f"was brought from schema version 0 to {newest}" in telemetryd("migrate", cwd=tmp_path, **place).stdout
    done = telemetryd("migrate", "--json", cwd=tmp_path, **place)
    assert json.loads(done.stdout) == {"database": cluster.url(name), "from": newest, "to": newest, "dry_run": False}
    cluster.drop(name)


def test_check_finds_wrong_counts_and_repairs_them(
    place: dict[str, Any], start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(**place)
    url = daemon.url
    for number in range(3):
        assert call(url, "POST", "/api/v1/runs", make_run(duration_ms=number, status="success"))[0] == 201
    daemon.stop()
    assert "every count is what the runs add up to" in telemetryd("check", cwd=tmp_path, **place).stdout
    with psycopg.connect(place["TELEMETRY_DB_URL"], autocommit=True) as other:
        other.execute("DELETE FROM agent_runs WHERE duration_ms = 1")
    found = json.loads(telemetryd("check", "--json", status=1, cwd=tmp_path, **place).stdout)
    assert found["wrong_counts"] > 0
    assert telemetryd("check", "--repair", cwd=tmp_path, **place).stdout.startswith("repaired: ")
    assert "every count is what the runs add up to" in telemetryd("check", cwd=tmp_path, **place).stdout


def test_commands_work_on_the_database_itself(place: dict[str, Any], start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(**place)
    call(daemon.url, "POST", "/api/v1/runs", make_run(created_at="2020-01-01T00:00:00Z"))
    done = telemetryd("prune", "--older-than", "1d", cwd=tmp_path, **place)
    assert f"telemetryd: works on the database {place['TELEMETRY_DB_URL']}" in done.stderr
    assert call(daemon.url, "GET", "/api/v1/runs")[1] == []


def test_config_shows_the_address_without_its_password(tmp_path: Path) -> None:
    done = telemetryd("config", cwd=tmp_path, TELEMETRY_DB_URL="postgresql://me:secret@db/telemetry")
    assert re.search(
        r"^TELEMETRY_DB_URL += postgresql://me:\*{8}@db/telemetry  # environment$", done.stdout, re.MULTILINE
    )
    assert "secret" not in done.stdout


def test_the_driver_is_not_imported_without_an_address_of_postgresql(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys; from telemetryd.settings import Settings; from telemetryd.store import Store; "
        "from telemetryd.ops.metrics import Metrics; import telemetryd.cli, telemetryd.daemon\n"
        "async def main():\n    await (await Store.open(Settings(db_path='x.sqlite'), Metrics())).close()\n"
        "asyncio.run(main())\n"
        "print([name for name in sys.modules if 'psycopg' in name or 'postgres' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"


def test_two_daemons_serve_the_same_runs_and_one_of_them_leads(
    place: dict[str, Any], start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemons: list[Daemon] = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        daemons.append(start_daemon(folder=folder, **place))
    one, other = (daemon.url for daemon in daemons)
    run = make_run()
    assert call(one, "POST", "/api/v1/runs", run)[0] == 201
    assert call(other, "POST", "/api/v1/runs", run)[0] == 200
    path = f"/api/v1/runs/{run['event_id']}"
    assert call(other, "PATCH", path, {"status": "success"})[0] == 200
    assert call(one, "GET", path)[1]["status"] == "success"
    changes = call(one, "GET", "/api/v1/changes")[1]
    assert changes == call(other, "GET", "/api/v1/changes")[1]
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 3"
    with psycopg.connect(place["TELEMETRY_DB_URL"], autocommit=True) as plain:
        assert plain.execute(locks).fetchone() == (1,)
        daemons[0].process.kill()
        wait_until(lambda: plain.execute(locks).fetchone() == (1,))
    assert call(other, "POST", "/api/v1/runs", make_run())[0] == 201
