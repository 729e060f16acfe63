"""What others have put into a database: what would change or refuse our writes is not served; the rest is listed."""

from __future__ import annotations

import json
import shlex
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.engine.sqlite.tools.check import Severity, examine, repair
from telemetryd.engine.sqlite.tools.foreign import HIGHEST_NUMBER
from telemetryd.errors import DatabaseError
from telemetryd.model.bodies import parse_json
from telemetryd.model.commands import CreateRuns
from telemetryd.model.queries import GetRun
from telemetryd.model.runs import parse_run
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests.conftest import StartDaemon, make_run
from tests.http_client import get, post
from tests.tools.process import telemetryd

HARMFUL = {
    "trigger": ("CREATE TRIGGER swallow BEFORE INSERT ON agent_runs BEGIN SELECT raise(IGNORE); END", "DROP TRIGGER"),
    "trigger on a small table": (
        "CREATE TRIGGER \"my 'own'\" AFTER INSERT ON run_events BEGIN DELETE FROM run_events; END",
        "DROP TRIGGER",
    ),
    "trigger with our name": (
        "CREATE TRIGGER runs_text_created AFTER INSERT ON agent_runs BEGIN DELETE FROM agent_runs; END",
        "DROP TRIGGER",
    ),
    "unique index": ("CREATE UNIQUE INDEX one_each ON agent_runs (agent_name)", "DROP INDEX"),
    "unique index by another case": ("CREATE UNIQUE INDEX one_each ON AGENT_RUNS (agent_name)", "DROP INDEX"),
    "index on an expression": ("CREATE INDEX lengths ON agent_runs (length(agent_name))", "DROP INDEX"),
    "partial index that computes": (
        "CREATE INDEX some ON agent_runs (host) WHERE json_extract(error_summary, '$.a') = 1",
        "DROP INDEX",
    ),
    "partial index with an arrow": (
        "CREATE INDEX some ON agent_runs (host) WHERE error_summary /* ( */ ->> '$.a' = 1",
        "DROP INDEX",
    ),
}
HARMLESS = (
    "CREATE INDEX plain ON agent_runs (platform, created_at DESC)",
    "CREATE INDEX nocase ON agent_runs (platform COLLATE NOCASE)",
    "CREATE INDEX failures ON agent_runs (host) WHERE status IN ('failure', 'max(') AND NOT (host IS NULL) -- f(x)",
    "CREATE VIEW mine AS SELECT upper(agent_name) FROM agent_runs",
    "CREATE TABLE notes (run INTEGER, note TEXT UNIQUE)",
    "CREATE UNIQUE INDEX one_note ON notes (lower(note))",
    "CREATE TRIGGER copies AFTER INSERT ON notes BEGIN SELECT 1; END",
    "CREATE TRIGGER seen INSTEAD OF INSERT ON mine BEGIN SELECT 1; END",
)


def make_database(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        migrate.create(connection, "2026-01-01T00:00:00.000000Z")
        for statement in statements:
            connection.execute(statement)


def findings(path: Path, status: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(telemetryd("check", "--json", "--db-path", path, status=status).stdout)[
        "findings"
    ]
    return found


@pytest.mark.parametrize("kind", ["trigger", "unique index"])
def test_what_would_work_on_our_writes_is_neither_served_nor_restored(
    start_daemon: StartDaemon, tmp_path: Path, kind: str
) -> None:
    statement, removal = HARMFUL[kind]
    path = tmp_path / "telemetry.sqlite"
    make_database(path, statement)
    before = path.read_bytes()
    status, errors = start_daemon().wait()
    assert status == 1
    [line] = errors.splitlines()
    assert "is not telemetryd's own" in line
    assert removal in line
    assert path.read_bytes() == before
    [found] = [one for one in findings(path, 1) if one["severity"] == "problem"]
    assert removal in found["advice"]
    done = telemetryd("restore", path, "--db-path", tmp_path / "new.sqlite", status=1)
    assert removal in done.stderr
    assert not (tmp_path / "new.sqlite").exists()
    done = telemetryd("check", "--repair", "--db-path", path, status=1)
    assert removal in done.stderr
    drop = shlex.split(line[line.index("sqlite3 ") :])[2]  # the command that it gives
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(drop)
    assert post(start_daemon().url, make_run())[0] == 201


@pytest.mark.parametrize("kind", HARMFUL)
async def test_each_kind_of_harm_is_known_and_its_removal_said(tmp_path: Path, kind: str) -> None:
    statement, removal = HARMFUL[kind]
    path = tmp_path / "telemetry.sqlite"
    make_database(path, statement)
    with pytest.raises(DatabaseError, match=removal) as refusal:
        await open_store(path)
    found = [one for one in examine(path) if (one.check, one.severity) == ("schema", Severity.PROBLEM)]
    assert [removal in one.advice for one in found] == [True]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(shlex.split(str(refusal.value).partition("sqlite3 ")[2])[1])
    await (await open_store(path)).close()


async def open_store(path: Path) -> Store:
    return await Store.open(Settings(db_path=path), Metrics())


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_full_text_index_that_is_not_built_yet_is_not_foreign(
    start_daemon: StartDaemon, tmp_path: Path, end: str
) -> None:
    path = tmp_path / "telemetry.sqlite"
    daemon = start_daemon()
    assert post(daemon.url, make_run(error_summary="a word"))[0] == 201
    daemon.stop()
    with closing(sqlite3.connect(path)) as connection:  # as the first moment of a build leaves it
        for statement in full_text._UNFINISHED.values():
            connection.execute(statement)
        connection.execute(f"INSERT INTO {full_text._PROGRESS} VALUES ({full_text._FIRST_RUN})")
        connection.commit()
    telemetryd("check", "--db-path", path)
    telemetryd("backup", tmp_path / "copy.sqlite", "--db-path", path)
    telemetryd("restore", tmp_path / "copy.sqlite", "--db-path", tmp_path / "restored.sqlite")
    daemon = start_daemon(TELEMETRY_FULL_TEXT="true")
    daemon.wait_for_line("The full-text index is built")
    daemon.stop(signal.SIGKILL if end == "kill" else signal.SIGTERM)
    again = start_daemon(TELEMETRY_FULL_TEXT="true")
    assert len(get(again.url, "/api/v1/runs?q=word")[1]) == 1


def test_what_harms_nothing_is_served_and_listed(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_database(path, *HARMLESS)
    daemon = start_daemon(TELEMETRY_FULL_TEXT="true")
    assert post(daemon.url, make_run(error_summary="no json"))[0] == 201
    assert daemon.stop() == 0
    listed = next(one for one in findings(path, 0) if "not telemetryd's own" in one["text"])
    assert listed["severity"] == "note"
    for name in ("index plain on agent_runs", "view mine", "table notes", "trigger copies on notes", "trigger seen"):
        assert name in listed["text"]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO agent_runs (id, event_id, run_id, created_at, updated_at, start_time, agent_name, job_type) "
        "VALUES ({high}, 'e', 'r', '2026-01-01T00:00:00.000000Z', '2026-01-01T00:00:00.000000Z', "
        "'2026-01-01T00:00:00.000000Z', 'a', 'j')",
        "INSERT INTO run_events (id, run, event_key, event_type, timestamp) "
        "VALUES ({high}, 1, 'k', 't', '2026-01-01T00:00:00.000000Z')",
        "UPDATE change_feed SET floor = {high}",
        "UPDATE change_feed SET event_floor = {high}",
        "INSERT INTO run_deletions VALUES ({high}, 'gone')",
        "INSERT INTO run_changes VALUES (1, {high})",
        "INSERT INTO run_stats_log VALUES ({high}, 1, '')",
        "INSERT INTO alert_deliveries VALUES ({high}, 'w', 'i', 'c', 'b')",
    ],
    ids=lambda statement: " ".join(statement.split()[:5]),
)
async def test_a_file_whose_numbers_are_used_up_is_not_served_until_they_are_freed(
    tmp_path: Path, statement: str
) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_database(path, statement.format(high=HIGHEST_NUMBER + 1))
    with pytest.raises(DatabaseError, match=f"{HIGHEST_NUMBER + 1}.*check --repair"):
        await open_store(path)
    assert [one.check for one in examine(path) if one.check == "numbers"]
    repair(path)
    assert [one for one in examine(path) if one.severity is not Severity.NOTE] == []
    store = await open_store(path)
    row = parse_run(parse_json(json.dumps(make_run(event_id="new")).encode())).row
    assert (await store.submit(CreateRuns((row,)))).new == (True,)
    found = await store.fetch(GetRun("new"))
    assert found is not None
    assert int(found[0][0] or 0) < HIGHEST_NUMBER
    await store.close()


def test_what_belongs_to_a_run_follows_it_to_its_new_number(tmp_path: Path) -> None:
    path, high = tmp_path / "telemetry.sqlite", HIGHEST_NUMBER + 1
    make_database(
        path,
        "INSERT INTO agent_runs (id, event_id, run_id, created_at, updated_at, start_time, agent_name, job_type, "
        f"error_summary) VALUES ({high}, 'e', 'r', '2029-01-01T00:00:00.000000Z', '2026-02-01T00:00:00.000000Z', "
        "'2026-01-01T00:00:00.000000Z', 'a', 'j', 'needle')",
        f"INSERT INTO run_arrivals VALUES ('2029-01-01T00:00:00.000000Z', {high}, 'a', '2026-01-01T00:00:00.000000Z')",
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        full_text.at_once(connection, full_text.rebuild)
    repair(path)
    with closing(sqlite3.connect(path)) as connection:
        arrivals = connection.execute("SELECT run, arrived_at FROM run_arrivals").fetchall()
        assert arrivals == [(1, "2026-01-01T00:00:00.000000Z")]
        assert connection.execute("SELECT rowid FROM runs_text WHERE runs_text MATCH 'needle'").fetchall() == [(1,)]


def test_a_file_whose_numbers_are_used_up_is_not_restored(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_database(path, f"UPDATE change_feed SET floor = {HIGHEST_NUMBER + 1}")
    done = telemetryd("restore", path, "--db-path", tmp_path / "new.sqlite", status=1)
    assert str(HIGHEST_NUMBER + 1) in done.stderr
    assert not (tmp_path / "new.sqlite").exists()


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE agent_runs_2 AS SELECT * FROM agent_runs; DROP TABLE agent_runs; "
        "ALTER TABLE agent_runs_2 RENAME TO agent_runs",
        "ALTER TABLE agent_runs ADD COLUMN shout TEXT AS (upper(agent_name))",
        "ALTER TABLE run_events ADD COLUMN extra TEXT CHECK (extra IS NOT NULL)",
        "DROP INDEX idx_runs_status; CREATE UNIQUE INDEX idx_runs_status ON agent_runs (status, created_at)",
        "ALTER TABLE run_totals RENAME TO kept; CREATE VIEW run_totals AS SELECT * FROM kept",
    ],
    ids=["table without checks", "generated column", "another check", "index of our name", "view of our name"],
)
async def test_our_own_objects_in_another_form_are_not_served(tmp_path: Path, change: str) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_database(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(change)
    with pytest.raises(DatabaseError, match="missing or different"):
        await open_store(path)


def test_our_own_objects_in_another_form_are_not_restored(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_database(path, "ALTER TABLE run_events ADD COLUMN extra TEXT CHECK (extra IS NOT NULL)")
    done = telemetryd("restore", path, "--db-path", tmp_path / "new.sqlite", status=1)
    assert "missing or different" in done.stderr
    assert not (tmp_path / "new.sqlite").exists()


def test_migrate_refuses_what_would_work_on_its_writes(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for step in migrate.steps()[:3]:
            for statement in step.statements():
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {0x746C6D64}")
        connection.execute(f"PRAGMA user_version = {migrate.steps()[2].version}")
        connection.execute(HARMFUL["trigger"][0])
    before = path.read_bytes()
    for flags in (["--dry-run"], ["--no-backup"]):
        assert "DROP TRIGGER" in telemetryd("migrate", *flags, "--db-path", path, status=1).stderr
    assert path.read_bytes() == before


def test_a_salvage_leaves_what_would_work_on_the_copy_in_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_database(path, HARMFUL["trigger"][0], HARMFUL["unique index"][0], HARMLESS[0])
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'idx_runs_status'").fetchone()
        (table,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'run_minutes'").fetchone()
    with path.open("r+b") as file:
        for number in (page, table):
            file.seek((number - 1) * 4096)
            file.write(b"\xff" * 64)
    telemetryd("check", "--repair", "--db-path", path)
    with closing(sqlite3.connect(path)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "plain" in names
    assert not names & {"swallow", "one_each"}


def test_a_trigger_that_comes_while_it_serves_swallows_nothing(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    assert post(daemon.url, make_run())[0] == 201
    with closing(sqlite3.connect(tmp_path / "telemetry.sqlite")) as connection:
        connection.execute(HARMFUL["trigger"][0])
        run = make_run()
        assert post(daemon.url, run)[0] == 503
        line = daemon.wait_for_line("Writes are refused until the database is open again and verified")
        assert "DROP TRIGGER" in line["reason"]
        assert "DROP TRIGGER" in get(daemon.url, "/health")[1]["detail"]
        connection.execute("DROP TRIGGER swallow")
    daemon.wait_for_line("The database is open again and verified; writes are taken")
    assert post(daemon.url, run)[0] == 201
    assert get(daemon.url, f"/api/v1/runs/{run['event_id']}")[0] == 200
