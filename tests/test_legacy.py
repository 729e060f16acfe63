from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from telemetryd.cli import database
from telemetryd.engine.sqlite.files import Kind, inspect
from telemetryd.engine.sqlite.ownership import Ownership
from telemetryd.engine.sqlite.tools import legacy, migrate
from telemetryd.engine.sqlite.tools.legacy import migrate_file
from telemetryd.errors import DatabaseError
from telemetryd.model.runs import COLUMNS
from telemetryd.model.tables import read_csv, read_parquet
from tests.conftest import StartDaemon
from tests.faults.hot_journal import cut_off_growing
from tests.http_client import call, get
from tests.tools.old_databases import LAYOUTS, make_old_database, spoil
from tests.tools.process import telemetryd


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def migrated(path: Path) -> dict[str, Any]:
    done = migrate_file(path, "2026-01-01T00:00:00.000000Z")
    assert done.rows == 20
    return done.counts()


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        file.name: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in sorted(folder.iterdir())
    }


@pytest.mark.parametrize(
    ("layout", "log"), [*zip(LAYOUTS, ("none", "version", "id", "none", "version"), strict=True), ("v7", "id")]
)
def test_every_layout_becomes_the_schema_of_a_fresh_database(tmp_path: Path, layout: str, log: str) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout, log=log)
    report = json.loads(telemetryd("migrate", "--json", "--db-path", path).stdout)
    assert report["rows"] == 20
    assert report["from_version"] == int(layout[1])
    with closing(sqlite3.connect(path)) as connection:
        migrate.check_schema(connection, path)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        extra = set(migrate.schema_of(connection)) - set(migrate.expected_schema())
    assert extra == {"legacy_run_events", "idx_events_run", "commits", "latest"}
    assert inspect(path).kind is Kind.OURS
    assert inspect(path).version == migrate.current_version()
    assert rows(path, "SELECT run_id, event FROM legacy_run_events") == [
        ("run-1", "started"),
        ("run-1", "ended"),
        ("run-2", "started"),
    ]
    assert rows(path, "SELECT run_id, event_type FROM run_events JOIN agent_runs ON agent_runs.id = run") == [
        ("run-1", "started"),
        ("run-1", "ended"),
        ("run-2", "started"),
    ]
    assert report["aside_tables"] == {"run_events": 3}
    assert report["remarks"][0] == "3 of 3 old events are served; all are kept in legacy_run_events"
    assert rows(path, "SELECT * FROM commits") == [("abc1234", "a commit")]
    assert rows(path, "SELECT sum(runs) FROM run_totals") == [(20,)]
    assert rows(path, "SELECT sum(runs) FROM run_minutes") == [(20,)]
    assert rows(path, "PRAGMA auto_vacuum") == [(2,)]
    assert {row[0] for row in rows(path, "SELECT version FROM schema_migrations")} >= {8, migrate.current_version()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_normalised_and_counted(tmp_path: Path, layout: str) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout)
    report = migrated(path)
    found = {
        row[0]: row[1:]
        for row in rows(
            path,
            "SELECT run_id, status, job_type, duration_ms, items_failed, created_at, start_time, end_time, event_id "
            "FROM agent_runs",
        )
    }
    assert found["run-0"][:7] == (
        "failure",
        "translate",
        0,
        1,
        "2025-01-01T10:00:00.000000Z",
        "2025-01-01T08:00:00.000000Z",
        "2025-01-01T11:30:00.000000Z",
    )
    assert found["run-5"][:4] == ("success", "unknown", 0, 0)
    ids = [row[7] for row in found.values()]
    assert len(set(ids)) == 20
    if layout.startswith("v5"):
        assert all(str(uuid.UUID(event_id)) == event_id for event_id in ids)
    else:
        assert found["run-5"][7] == "event-5"
    counted = {(line["field"], line["kind"]): line["values"] for line in report["normalised"]}
    assert counted["status", "failed to failure"] == 5
    assert counted["job_type", "NULL to unknown"] == 6
    assert counted["duration_ms", "NULL to 0"] == 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_copied_slice_by_slice_as_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    names = ", ".join(name for name in COLUMNS if name != "event_id")
    found = []
    for slice_ in (3, 1000):
        path = make_old_database(tmp_path / f"{slice_}.sqlite", layout)
        spoil(path)
        if not layout.endswith("without-rowid"):
            with closing(sqlite3.connect(path)) as connection, connection:
                connection.execute("DELETE FROM agent_runs WHERE rowid IN (2, 7, 8)")
        monkeypatch.setattr(legacy, "_SLICE", slice_)
        done = migrate_file(path, "2026-01-01T00:00:00.000000Z")
        sides = rows(path, "SELECT run, field, reason, original FROM unconverted_values ORDER BY run, field")
        found.append((rows(path, f"SELECT {names} FROM agent_runs ORDER BY id"), sides, done.counts()))
    assert len(found[0][0]) == (20 if layout.endswith("without-rowid") else 17)
    assert found[0] == found[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_cannot_be_normalised_is_kept_verbatim(tmp_path: Path, layout: str) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout)
    spoil(path)
    report = migrated(path)
    number, *values = rows(
        path,
        "SELECT id, status, start_time, end_time, duration_ms, items_failed, metrics_json, context_json, api_posted "
        "FROM agent_runs WHERE run_id = 'run-3'",
    )[0]
    assert values == ["partial", "2025-01-04T10:00:00.000000Z", None, 0, 0, None, '{"value":[1, 2]}', 0]
    kept = dict(rows(path, f"SELECT field, original FROM unconverted_values WHERE run = {number}"))
    kept.pop("agent_owner", None)
    kept.pop("schema_version", None)
    assert kept == {
        "status": "exploded",
        "start_time": "yesterday",
        "end_time": "1735725600",  # the old column's own affinity made it text
        "duration_ms": -5,
        "items_failed": 1.5,
        "metrics_json": "{not json",
        "error_summary": b"\xff\xfe broken",
        "api_posted": 7,
    }
    counted = {(line["field"], line["kind"]): line["values"] for line in report["kept_aside"]}
    assert counted["status", "unknown status"] == 1
    if "agent_owner" in LAYOUTS[layout]:
        assert counted["agent_owner", "no such field any more"] == 20


def test_equal_event_ids_are_separated(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v6-id")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET event_id = 'same' WHERE id IN (3, 7, 9)")
    migrated(path)
    assert rows(path, "SELECT id FROM agent_runs WHERE event_id = 'same'") == [(3,)]
    assert rows(path, "SELECT run, original FROM unconverted_values WHERE field = 'event_id'") == [
        (7, "same"),
        (9, "same"),
    ]
    assert rows(path, "SELECT count(DISTINCT event_id) FROM agent_runs") == [(20,)]


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le"])
def test_what_no_request_could_bring_breaks_no_reader(tmp_path: Path, start_daemon: StartDaemon, encoding: str) -> None:
    path = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"PRAGMA encoding = '{encoding}'")
    make_old_database(path, "v7", neighbours=False)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(OLD_EVENTS)
        connection.execute("UPDATE run_events SET payload_json = '{\"a\": 1e999}'")
        connection.execute("UPDATE agent_runs SET metrics_json = '{\"a\": 1e999}', product = 'p' || char(0) || 'q'")
        connection.execute(
            "UPDATE agent_runs SET event_id = 'x' || char(0) || run_id, items_discovered = ?", ("9" * 5000,)
        )
    counted = {(line["field"], line["kind"]): line["values"] for line in migrated(path)["kept_aside"]}
    assert counted["product", "holds a NUL character"] == counted["items_discovered", "not a count"] == 20
    assert counted["metrics_json", "JSON object holds a number that is not finite"] == 20
    assert json.loads(telemetryd("check", "--json", "--db-path", path).stdout)["ok"]
    daemon = start_daemon()
    status, found = get(daemon.url, "/api/v1/runs?include=events")
    assert (status, len(found)) == (200, 20)
    assert {run["product"] for run in found} == {"p\ufffdq"}
    for form in ("ndjson", "csv", "parquet"):
        target = tmp_path / f"runs.{form}"
        telemetryd("export", target, "--url", daemon.url, "--format", form)
    with (tmp_path / "runs.csv").open("rb") as file:
        assert len([record for _, record in read_csv(file) if isinstance(record, dict)]) == 20
    assert len([record for _, record in read_parquet(tmp_path / "runs.parquet") if isinstance(record, dict)]) == 20
    telemetryd("follow", daemon.url, "--once", "--db-path", tmp_path / "copy.sqlite")
    for sql in ("SELECT id, event_id, product, metrics_json FROM agent_runs", "SELECT * FROM run_events"):
        assert rows(tmp_path / "copy.sqlite", sql) == rows(path, sql)
    assert daemon.stop() == 0


def test_generated_columns_are_columns(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript("""
            CREATE TABLE agent_runs (id INTEGER PRIMARY KEY, event_id TEXT, run_id TEXT, agent_name TEXT,
                job_type TEXT AS ('job of ' || agent_name) VIRTUAL, label TEXT AS (run_id || '!') STORED,
                start_time TEXT, created_at TEXT);
            INSERT INTO agent_runs (id, event_id, run_id, agent_name, start_time)
                VALUES (1, 'e', 'r', 'a', '2025-01-01');
            CREATE TABLE run_events (id INTEGER PRIMARY KEY, twice INTEGER AS (id * 2), run_id TEXT, event_type TEXT);
            INSERT INTO run_events (run_id, event_type) VALUES ('r', 'step');
        """)
    migrate_file(path, "2026-01-01T00:00:00.000000Z")
    assert rows(path, "SELECT job_type FROM agent_runs") == [("job of a",)]
    assert rows(path, "SELECT field, original FROM unconverted_values") == [("label", "r!")]
    assert rows(path, "SELECT run, event_type FROM run_events") == [(1, "step")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_case_of_a_column_is_none_of_its_name(tmp_path: Path, layout: str) -> None:
    path, usual = tmp_path / "telemetry.sqlite", make_old_database(tmp_path / "usual.sqlite", layout)
    shutil.copyfile(usual, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA legacy_alter_table = ON")
        connection.execute("DROP VIEW latest")
        for table in ("agent_runs", "run_events", "schema_migrations"):
            for (name,) in connection.execute(f"SELECT name FROM pragma_table_info('{table}')").fetchall():
                connection.execute(f'ALTER TABLE {table} RENAME COLUMN "{name}" TO "{name.title()}"')
    assert migrated(path) == migrated(usual)
    everything = f"SELECT {', '.join(name for name in COLUMNS if name != 'event_id')} FROM agent_runs"
    for sql in (everything, "SELECT * FROM unconverted_values", "SELECT * FROM run_events"):
        assert rows(path, sql) == rows(usual, sql)


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ("CREATE VIEW run_changes AS SELECT 1", "view run_changes"),
        ("CREATE TABLE idx_runs_job (x)", "table idx_runs_job"),
        ("CREATE INDEX idx_runs_job ON commits (hash)", "index idx_runs_job"),
        ("CREATE TABLE telemetryd_migration_runs (x)", "table telemetryd_migration_runs"),
        ("CREATE VIEW legacy_run_events AS SELECT 1", "view legacy_run_events"),
        ("CREATE TABLE alert_states (x); CREATE TABLE legacy_alert_states (x)", "table legacy_alert_states"),
        ("CREATE TABLE Alert_States (x)", "table Alert_States"),
        ("CREATE VIEW old_alert_states AS SELECT 1", "view old_alert_states"),
    ],
)
def test_what_is_in_the_way_of_a_migration_is_named(tmp_path: Path, own: str, named: str) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7")
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(own)
    before = snapshot(tmp_path)
    for flags in (["--dry-run"], ["--no-backup"]):
        told = telemetryd("migrate", *flags, "--db-path", path, status=1).stderr
        assert f"whose name telemetryd needs: {named}; rename or drop it, then run telemetryd migrate again" in told
    assert before["telemetry.sqlite"][2] == path.read_bytes()


def test_what_is_in_the_way_of_new_steps_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_version_9(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE VIEW unconverted_values AS SELECT 1")
    told = telemetryd("migrate", "--no-backup", "--db-path", path, status=1).stderr
    assert "whose name telemetryd needs: view unconverted_values" in told


def test_a_column_may_be_called_rowid(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v5")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("ALTER TABLE agent_runs ADD COLUMN RowId TEXT")
        connection.execute("UPDATE agent_runs SET RowId = 'mine' WHERE run_id = 'run-3'")
    migrated(path)
    assert rows(
        path, "SELECT run_id, original FROM unconverted_values JOIN agent_runs ON id = run WHERE field = 'rowid'"
    ) == [("run-3", "mine")]
    assert rows(path, "SELECT id FROM agent_runs WHERE run_id = 'run-3'") == [(4,)]


@pytest.mark.parametrize("number", [-3, 0, 2**63 - 1])
@pytest.mark.parametrize("layout", ["v5", "v7"])
def test_rows_whose_numbers_cannot_go_on_are_numbered_anew_in_their_order(
    tmp_path: Path, layout: str, number: int
) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET rowid = ? WHERE run_id = 'run-7'", (number,))
    in_order = rows(path, "SELECT run_id FROM agent_runs ORDER BY rowid")
    migrated(path)
    assert rows(path, "SELECT run_id FROM agent_runs ORDER BY id") == in_order
    assert rows(path, "SELECT min(id), max(id) FROM agent_runs") == [(1, 20)]
    old = rows(path, "SELECT original FROM unconverted_values JOIN agent_runs ON id = run WHERE field = 'legacy id'")
    assert ((number,) in old) == (layout == "v7")


@pytest.mark.parametrize("layout", ["v5", "v7"])
def test_rows_that_were_numbered_anew_can_be_changed_and_followed(
    tmp_path: Path, start_daemon: StartDaemon, layout: str
) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET rowid = ? WHERE run_id = 'run-7'", (2**63 - 1,))
    migrated(path)
    daemon = start_daemon()
    last = rows(path, "SELECT event_id FROM agent_runs ORDER BY id DESC LIMIT 1")[0][0]
    assert call(daemon.url, "PATCH", f"/api/v1/runs/{last}", {"status": "timeout"})[0] == 200
    copy = tmp_path / "copy.sqlite"
    telemetryd("follow", daemon.url, "--once", "--db-path", copy)
    both = "SELECT id, event_id, status, updated_at FROM agent_runs"
    assert rows(copy, both) == rows(path, both)
    assert daemon.stop() == 0


@pytest.mark.parametrize("wal", [False, True])
def test_a_dry_run_leaves_no_trace(tmp_path: Path, wal: bool) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v5", wal=wal)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    before = snapshot(tmp_path)
    out = telemetryd("migrate", "--dry-run", "--db-path", path).stdout
    assert snapshot(tmp_path) == before
    assert f"Database: {path}\nDry run: True\nCurrent schema version: 5\nTotal rows to migrate: 20\n" in out
    assert "[DRY RUN] Would perform the following changes:\n  1. Add event_id column to agent_runs table" in out
    assert "2. Backfill event_id with UUID for all existing rows" in out


def test_a_dry_run_of_a_database_with_an_open_log_leaves_no_trace(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7", wal=True)
    script = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
        "c.execute(\"UPDATE agent_runs SET status = 'timeout'\"); c.commit(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert (tmp_path / "telemetry.sqlite-wal").stat().st_size > 0
    before = snapshot(tmp_path)
    assert "Total rows to migrate: 20" in telemetryd("migrate", "--dry-run", "--db-path", path).stdout
    assert snapshot(tmp_path) == before
    telemetryd("migrate", "--db-path", path)
    assert rows(path, "SELECT DISTINCT status FROM agent_runs") == [("timeout",)]


def test_the_daemon_serves_what_was_migrated(tmp_path: Path, start_daemon: StartDaemon) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v5")
    refused = start_daemon()
    status, errors = refused.wait()
    assert status == 1
    assert "run telemetryd migrate" in errors
    out = telemetryd("migrate", "--db-path", path).stdout
    assert "[OK] Verified backup of 20 rows" in out
    assert "[SUCCESS] Migration completed successfully! 20 rows" in out
    backup = next(tmp_path.glob("telemetry_backup_*.sqlite"))
    assert rows(backup, "SELECT count(*) FROM agent_runs") == [(20,)]
    assert inspect(backup).kind is Kind.LEGACY
    daemon = start_daemon()
    assert daemon.url
    assert daemon.stop() == 0
    assert "nothing to do" in telemetryd("migrate", "--db-path", path).stdout


def take_back_runs(version: int, connection: sqlite3.Connection) -> None:
    """Take back what later steps make of agent_runs: triggers, indexes and columns."""
    for step in (step for step in migrate.steps() if step.version > version):
        for name in re.findall(r"^CREATE TRIGGER (\w+)", step.sql, re.MULTILINE):
            connection.execute(f"DROP TRIGGER {name}")
        for name in re.findall(r"^CREATE INDEX (\w+) ON agent_runs", step.sql, re.MULTILINE):
            connection.execute(f"DROP INDEX {name}")
        for name in re.findall(r"^ALTER TABLE agent_runs ADD COLUMN (\w+)", step.sql, re.MULTILINE):
            connection.execute(f"ALTER TABLE agent_runs DROP COLUMN {name}")


def make_version_9(path: Path) -> None:
    """Make a database without runs as the telemetryd of that version had it, as far as the next step needs it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        migrate.create(connection, "")
        take_back_runs(9, connection)
        connection.execute("DROP TABLE unconverted_values")
        connection.execute("DELETE FROM schema_migrations WHERE version > 9")
        connection.execute("PRAGMA user_version = 9")


def test_a_database_of_an_earlier_telemetryd_gets_the_missing_steps(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_version_9(path)
    report = json.loads(telemetryd("migrate", "--json", "--db-path", path).stdout)
    assert report["from_version"] == 9
    with closing(sqlite3.connect(path)) as connection:
        migrate.check_schema(connection, path)
    assert inspect(path).version == migrate.current_version()


def test_it_refuses_while_another_owns_the_database(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v5")
    owner = Ownership(path, None)
    owner.acquire()
    try:
        done = telemetryd("migrate", "--db-path", path, status=1)
    finally:
        owner.release()
    assert f"PID {os.getpid()}" in done.stderr
    assert inspect(path).kind is Kind.LEGACY


def test_it_refuses_while_the_old_service_writes(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v5", wal=True)
    with closing(sqlite3.connect(path)) as other:
        other.execute("SELECT * FROM agent_runs").fetchone()
        done = telemetryd("migrate", "--no-backup", "--db-path", path, status=1, timeout_s=60)
    assert "in use by another process" in done.stderr
    assert inspect(path).kind is Kind.LEGACY


@pytest.mark.parametrize("layout", ["v5", "v7"])
def test_a_file_in_the_middle_of_a_commit_is_recovered_first(
    start_daemon: StartDaemon, tmp_path: Path, layout: str
) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout, rows=300)
    cut_off_growing(path)
    before = path.read_bytes()
    assert "telemetryd migrate" in start_daemon().wait()[1]
    assert json.loads(telemetryd("migrate", "--dry-run", "--json", "--db-path", path).stdout)["rows"] == 300
    assert path.read_bytes() == before
    telemetryd("migrate", "--db-path", path)
    assert rows(path, "SELECT count(*) FROM agent_runs") == [(300,)]


def test_a_migration_cut_off_in_its_commit_is_not_taken_for_done(tmp_path: Path) -> None:
    """The first page is that of the new schema already, and the journal undoes it."""
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7", rows=300)
    old, journal = path.read_bytes(), path.with_name("telemetry.sqlite-journal")
    cut_off_growing(path)
    log = journal.read_bytes()
    journal.unlink()
    path.write_bytes(old)
    telemetryd("migrate", "--no-backup", "--db-path", path)
    new_first_page = path.read_bytes()[:4096]
    path.write_bytes(new_first_page + old[4096:])
    journal.write_bytes(log)
    assert json.loads(telemetryd("migrate", "--json", "--db-path", path).stdout)["migrated"] is True
    assert rows(path, "SELECT count(*) FROM agent_runs") == [(300,)]


OLD_EVENTS = """
    CREATE TABLE run_events (
        id TEXT PRIMARY KEY, run_id TEXT, event_type TEXT, timestamp TEXT, payload_json TEXT, level INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX idx_events_time ON run_events (timestamp);
    CREATE INDEX idx_own ON run_events (level);
    INSERT INTO run_events VALUES ('a', 'run-1', 'step', '2025-01-01 10:00:00', '{"n": 1}', 3),
        ('b', 'run-1', 'step', NULL, '[1]', 3), ('c', 'run-1', 'step', 'soon', 'in words', 3),
        ('d', 'nobody', 'step', NULL, NULL, 3), ('e', 'run-1', NULL, NULL, NULL, 3), ('f', NULL, 'step', NULL, NULL, 3);
"""


@pytest.mark.parametrize("is_ours", [False, True])
def test_old_events_are_served_where_they_name_a_run_and_a_type(
    tmp_path: Path, start_daemon: StartDaemon, is_ours: bool
) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7", neighbours=False)
    if is_ours:  # a migration by an earlier telemetryd has kept the table under its own name
        migrated(path)
        with closing(sqlite3.connect(path)) as connection, connection:
            take_back_runs(10, connection)
            for table in migrate.claimed(10):
                connection.execute(f"DROP TABLE IF EXISTS {table}")
            connection.execute("PRAGMA user_version = 10")
            connection.execute("DELETE FROM schema_migrations WHERE version > 10")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(OLD_EVENTS)
    before = rows(path, "SELECT * FROM run_events")
    dry = json.loads(telemetryd("migrate", "--dry-run", "--json", "--db-path", path).stdout)
    assert any("Keep the table run_events (6 rows) as legacy_run_events" in step for step in dry["steps"])
    report = json.loads(telemetryd("migrate", "--json", "--no-backup", "--db-path", path).stdout)
    assert report["steps"] == dry["steps"]
    assert "3 of 6 old events are served; all are kept in legacy_run_events" in report["remarks"]
    assert rows(path, "SELECT * FROM legacy_run_events") == before
    with closing(sqlite3.connect(path)) as connection:
        migrate.check_schema(connection, path)
        assert set(migrate.schema_of(connection)) - set(migrate.expected_schema()) == {"legacy_run_events", "idx_own"}
    daemon = start_daemon()
    status, found = get(daemon.url, "/api/v1/runs/event-1/events")
    created_at = "2025-01-02T10:00:00.000000Z"
    assert status == 200
    assert [(event["event_key"], event["timestamp"], event["payload"]) for event in found] == [
        ("legacy-1", "2025-01-01T10:00:00.000000Z", {"n": 1}),
        ("legacy-2", created_at, {"value": [1]}),
        ("legacy-3", created_at, {"value": "in words"}),
    ]
    assert daemon.stop() == 0


def test_credentials_in_an_address_are_kept_nowhere(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET git_repo = 'https://user:s3cret@example.com/acme/site'")
    counts = migrated(path)
    assert {"field": "git_repo", "kind": "without credentials", "values": 20} in counts["normalised"]
    assert rows(path, "SELECT DISTINCT git_repo FROM agent_runs") == [("https://example.com/acme/site",)]
    assert b"s3cret" not in path.read_bytes()


def test_a_migration_that_fails_again_and_again_keeps_one_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise DatabaseError("it is as before")

    path = make_old_database(tmp_path / "telemetry.sqlite", "v7", wal=True)
    left = tmp_path / ".telemetry_backup_20260101_000000.sqlite.00000001.partial"
    shutil.copyfile(path, left)
    with monkeypatch.context() as patched:
        patched.setattr(legacy, "migrate_file", fail)
        for _ in range(3):
            with pytest.raises(DatabaseError):
                database._migrate(path, with_backup=True, as_json=False)
            assert "[OK] Verified backup of 20 rows" in capsys.readouterr().out
    assert not left.exists()
    (made,) = tmp_path.glob("telemetry_backup_*.sqlite")
    telemetryd("migrate", "--db-path", path)
    assert [*tmp_path.glob("telemetry_backup_*.sqlite")] == [made]
    assert rows(made, "SELECT count(*) FROM agent_runs") == [(20,)]


def test_the_version_of_the_schema_is_not_kept_once_per_run(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET schema_version = 'seven' WHERE run_id = 'run-1'")
    counts = migrated(path)
    assert {"field": "schema_version", "kind": "left out: it says nothing of the run", "values": 19} in counts[
        "normalised"
    ]
    kept = rows(path, "SELECT original FROM unconverted_values WHERE field = 'schema_version'")
    assert kept == [("seven",)]
    assert (7,) in rows(path, "SELECT version FROM schema_migrations")


def test_event_ids_that_differ_only_by_type_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("""
            CREATE TABLE agent_runs (id INTEGER PRIMARY KEY, event_id NOT NULL UNIQUE, run_id, start_time, agent_name);
            INSERT INTO agent_runs (id, event_id, run_id) VALUES
                (1, 'dup-1', 'a'), (2, CAST('dup-1' AS BLOB), 'b'), (3, 5, 'c'), (4, '5', 'd'), (5, 'own', 'e');
        """)
    done = migrate_file(path, "2026-01-01T00:00:00.000000Z")
    assert {"field": "event_id", "kind": "not unique", "values": 2} in done.counts()["kept_aside"]
    event_ids = dict(rows(path, "SELECT run_id, event_id FROM agent_runs"))
    assert (event_ids["a"], event_ids["c"], event_ids["e"]) == ("dup-1", "5", "own")
    assert all(uuid.UUID(event_ids[name]) for name in "bd")
    assert rows(path, "SELECT run, original FROM unconverted_values ORDER BY run") == [(2, b"dup-1"), (4, "5")]


@pytest.mark.parametrize("layout", ["v5", "v7"])
def test_a_migration_takes_no_more_room_than_it_says(tmp_path: Path, layout: str) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout, rows=4000)
    old = path.stat().st_size
    said = json.loads(telemetryd("migrate", "--dry-run", "--json", "--no-backup", "--db-path", path).stdout)
    seen: list[int] = []

    def look(*_: object) -> None:
        seen.append(sum(file.stat().st_size for file in tmp_path.iterdir()))

    done = migrate_file(path, "2026-01-01T00:00:00.000000Z", look)
    assert done.compacted
    assert rows(path, "PRAGMA freelist_count") == [(0,)]
    assert max(seen) - old < said["needs_bytes"] < 5 * old
    assert max(seen) < 4.5 * old


def test_a_migration_for_which_there_is_no_room_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7")
    before = snapshot(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    told = r"needs up to \d+ MiB on its disk, which has 0 MiB free; nothing was changed: .* add --no-backup"
    with pytest.raises(DatabaseError, match=told):
        database._migrate(path, with_backup=True, as_json=False)
    assert snapshot(tmp_path) == before
