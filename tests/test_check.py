from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from telemetryd.engine.sqlite.connection import is_damage
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.tools.check import documented_queries, examine
from telemetryd.errors import DatabaseError
from tests.conftest import StartDaemon
from tests.faults.hot_journal import cut_off_growing
from tests.http_client import get
from tests.tools.fill import make_database
from tests.tools.old_databases import make_old_database
from tests.tools.process import telemetryd


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            connection.execute(statement)


def count(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM agent_runs").fetchone()[0])


def check(path: Path, *flags: str, status: int = 0) -> Any:
    return json.loads(telemetryd("check", "--json", "--db-path", path, *flags, status=status).stdout)


def test_a_good_database_is_ok_also_while_a_daemon_runs(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 300)
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert daemon.url
    assert check(path) == {"database": str(path), "ok": True, "findings": []}
    refusal = telemetryd("check", "--repair", "--db-path", path, status=1).stderr
    assert "owns this database" in refusal
    assert refusal.endswith("; stop it first\n")
    assert daemon.stop() == 0


def test_the_queries_of_every_filter_are_examined() -> None:
    queries = list(documented_queries())
    assert len(queries) == 71
    assert len({tuple(sorted(query.filters.equal)) for query in queries}) == 20
    assert {tuple(query.filters.labels) for query in queries} == {(), ("x",), ("x", "y")}


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        ("UPDATE run_totals SET runs = runs + 1", "totals"),
        ("DELETE FROM run_minutes", "totals"),
        ("UPDATE run_stats SET runs = runs + 1 WHERE hours = 24 AND names = 1", "totals"),
        ("UPDATE agent_runs SET duration_ms = duration_ms + 50000 WHERE id = 7", "totals"),
        ("DELETE FROM run_stats_log", "totals"),
        (
            "INSERT INTO run_stats VALUES (24, 1, 24000, '', '', 'failure', 1, 1, 0, 0, 0, 0, 0, 0, x'')",
            "totals",
        ),
        ("DROP INDEX idx_runs_job", "schema"),
        ("DROP INDEX idx_runs_agent", "index usage"),
        ("DELETE FROM run_labels WHERE run = 7", "labels"),
        ("INSERT INTO run_labels VALUES ('team', 'x', '2026-01-01T00:00:00.000000Z', 7)", "labels"),
        ("DROP TRIGGER run_labels_changed; UPDATE agent_runs SET labels = NULL WHERE id = 7", "labels"),
        ("DROP TRIGGER run_labels_removed", "schema"),
    ],
)
def test_what_can_be_fixed_in_place_is(tmp_path: Path, harm: str, found: str) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 300)
    if harm.startswith("UPDATE run_stats"):
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            rollups.fold(connection.cursor())  # so few changes would wait in the log
    change(path, """UPDATE agent_runs SET labels = '{"env":"prod","team":"search"}' WHERE id % 2""", *harm.split("; "))
    findings = [(finding.check, finding.severity) for finding in examine(path)]
    assert (found, "problem") in findings
    if found == "schema":
        report = check(path, status=1)
        assert "check --repair" in report["findings"][0]["advice"]
        assert check(path, "--repair")["repaired"]
    else:
        telemetryd("check", "--repair", "--db-path", path)
    assert examine(path) == []
    assert count(path) == 300


def test_an_index_that_disagrees_is_built_again(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 300)
    with closing(sqlite3.connect(path)) as connection:
        root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'idx_runs_start'").fetchone()[0]
    # An empty index where there should be 300 entries.
    change(path, f"UPDATE sqlite_master SET sql = sql || ' WHERE start_time < ''''' WHERE rootpage = {root}")
    change(path, "REINDEX idx_runs_start")
    change(path, f"UPDATE sqlite_master SET sql = replace(sql, ' WHERE start_time < ''''', '') WHERE rootpage = {root}")
    assert [(finding.check, finding.severity) for finding in examine(path)] == [("integrity", "problem")]
    assert check(path, "--repair")["ok"]


def test_space_that_a_migration_did_not_return_is_returned(tmp_path: Path) -> None:
    """It was killed in its last step, VACUUM: the runs are in their new table, and the old one's pages are free."""
    path = make_database(tmp_path / "telemetry.sqlite", 300)
    change(path, "CREATE TABLE old AS SELECT randomblob(3000) FROM agent_runs", "PRAGMA auto_vacuum = NONE", "VACUUM")
    change(path, "DROP TABLE old")
    size = path.stat().st_size
    assert [finding.check for finding in examine(path)] == ["space"]
    assert "free space returned" in check(path, "--repair")["repaired"]
    assert path.stat().st_size < size / 2
    assert count(path) == 300


def test_what_the_old_service_left_is_a_note(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7")
    (finding,) = check(path, status=1)["findings"]
    assert finding["advice"] == "run: telemetryd migrate"
    before = path.read_bytes()
    assert (
        "nothing was changed: run telemetryd migrate"
        in telemetryd("check", "--repair", "--db-path", path, status=1).stderr
    )
    assert path.read_bytes() == before
    telemetryd("migrate", "--no-backup", "--db-path", path)
    report = check(path)
    assert report["ok"]
    assert {finding["check"] for finding in report["findings"]} == {"schema", "foreign keys"}


def test_a_damaged_file_is_salvaged_and_the_loss_counted(tmp_path: Path, start_daemon: StartDaemon) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 2000)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO run_events (run, event_key, event_type, timestamp) SELECT id, 'k', 't', '' FROM agent_runs"
        )
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(os.urandom(24_000))
    report = check(path, status=1)
    assert report["findings"][0]["severity"] == "damage"
    assert "restore a backup" in report["findings"][0]["advice"]
    done = check(path, "--repair")
    assert done["ok"]
    assert 0 < done["lost"] < 1000
    assert count(path) == done["saved"] == 2000 - done["lost"]
    assert Path(done["old_file"]).exists()
    with closing(sqlite3.connect(path)) as connection:
        saved = connection.execute(
            "SELECT count(*), count(agent_runs.id) FROM run_events LEFT JOIN agent_runs ON agent_runs.id = run"
        ).fetchone()
    assert saved == (done["saved"], done["saved"])  # each has its run, none its neighbour's
    daemon = start_daemon()
    assert daemon.url
    assert daemon.stop() == 0


def test_a_salvage_brings_the_neighbours_along(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7", rows=1500)
    telemetryd("migrate", "--no-backup", "--db-path", path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(os.urandom(20_000))
    done = check(path, "--repair")
    assert done["ok"]
    assert "table legacy_run_events: 3 of 3 rows saved, 0 lost" in done["repaired"]
    assert "table commits: 1 of 1 rows saved, 0 lost" in done["repaired"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM legacy_run_events").fetchone() == (3,)
        assert connection.execute("SELECT count(*) FROM run_events").fetchone() == (3,)
        assert connection.execute("SELECT count(*) FROM unconverted_values").fetchone()[0] > 0


def test_a_file_without_a_readable_schema_is_left_as_it_is(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 100)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(os.urandom(3000))
    before = path.read_bytes()
    assert "restore a backup" in telemetryd("check", "--db-path", path, status=1).stdout
    assert telemetryd("check", "--repair", "--db-path", path, status=1).stderr
    assert path.read_bytes() == before


def test_rows_whose_run_is_gone_are_found_and_deleted(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 3)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO run_events (run, event_key, event_type, timestamp) VALUES (3, 'k', 't', '')")
        connection.execute("INSERT INTO run_events (run, event_key, event_type, timestamp) VALUES (2, 'k', 't', '')")
        connection.execute("DELETE FROM agent_runs WHERE id = 3")
    report = check(path, status=1)
    assert "1 rows of run_events belong to runs that are gone" in [finding["text"] for finding in report["findings"]]
    done = check(path, "--repair")
    assert done["ok"]
    assert "1 rows of run_events deleted, whose runs are gone" in done["repaired"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT run FROM run_events").fetchall() == [(2,)]


def test_values_that_an_earlier_migration_kept_are_named_and_replaced(
    tmp_path: Path, start_daemon: StartDaemon
) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 20)
    change(
        path,
        """UPDATE agent_runs SET metrics_json = '{"a":1e999}' WHERE id = 3""",
        "UPDATE agent_runs SET agent_name = 'a' || char(0), event_id = 'e' || char(0) WHERE id = 5",
        """INSERT INTO run_events (run, event_key, event_type, timestamp, payload)
        VALUES (7, 'k', 't', '2026-01-01T00:00:00.000000Z', '[1e999]')""",
        "DELETE FROM run_stats",
    )
    texts = {finding["check"]: finding["text"] for finding in check(path, status=1)["findings"]}
    assert "metrics_json of agent_runs 3 (JSON object holds a number that is not finite)" in texts["values"]
    assert "agent_name of agent_runs 5 (holds a NUL character)" in texts["values"]
    assert "payload of run_events 1" in texts["values"]
    done = check(path, "--repair")
    assert done["ok"]
    assert any(line.startswith("4 values replaced") for line in done["repaired"])
    with closing(sqlite3.connect(path)) as connection:
        kept = connection.execute("SELECT run, field, original FROM unconverted_values ORDER BY 1, 2").fetchall()
    assert kept == [(3, "metrics_json", '{"a":1e999}'), (5, "agent_name", "a\0"), (5, "event_id", "e\0")]
    daemon = start_daemon()
    assert len(get(daemon.url, "/api/v1/runs?include=events")[1]) == 20
    telemetryd("follow", daemon.url, "--once", "--db-path", tmp_path / "copy.sqlite")
    assert daemon.stop() == 0


def test_credentials_that_an_earlier_daemon_stored_are_found_and_leave_the_file(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 20)
    change(
        path,
        "UPDATE agent_runs SET git_repo = 'ssh://user:s3cret@example.com/acme/site.git' WHERE id IN (3, 5)",
        "UPDATE agent_runs SET git_repo = 's3cret@example.com/acme' WHERE id = 7",
    )
    (finding,) = check(path, status=1)["findings"]
    assert finding["text"].startswith("2 addresses in git_repo hold more than host and path")
    assert "s3cret" not in str(finding)
    done = check(path, "--repair")
    assert done["ok"]
    assert any("of 3 runs" in line for line in done["repaired"])
    assert b"s3cret" not in path.read_bytes()
    with closing(sqlite3.connect(path)) as connection:
        kept = connection.execute("SELECT id, git_repo FROM agent_runs WHERE id IN (3, 5, 7)").fetchall()
        told = connection.execute("SELECT run FROM run_changes ORDER BY run").fetchall()
    clean = "ssh://example.com/acme/site.git"
    assert kept == [(3, clean), (5, clean), (7, None)]
    assert told == [(3,), (5,), (7,)], "who follows the changes is told"


@pytest.mark.parametrize("flags", [[], ["--repair"]])
def test_a_commit_that_was_cut_off_is_no_damage(tmp_path: Path, flags: list[str]) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 300)
    cut_off_growing(path)
    assert check(path, *flags)["ok"]
    assert count(path) == 300


def test_what_cannot_be_opened_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"Cannot examine .*: unable to open"):
        examine(tmp_path / "gone.sqlite")
    path = make_database(tmp_path / "telemetry.sqlite", 3)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with closing(sqlite3.connect(path, timeout=0)) as connection, pytest.raises(sqlite3.Error) as locked:
            connection.execute("SELECT count(*) FROM agent_runs")
        assert not is_damage(locked.value)


def test_what_is_left_of_a_file_that_was_cut_short_is_saved(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 1200)
    os.truncate(path, path.stat().st_size * 2 // 3 // 4096 * 4096)
    assert check(path, status=1)["findings"][0]["severity"] == "damage"
    done = check(path, "--repair")
    assert done["ok"]
    assert count(path) == done["saved"] > 400
    assert abs(done["lost"] - (1200 - done["saved"])) < 120  # the pages that are left say about how many there were


def test_a_file_that_is_no_database_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    path.write_bytes(b"no database" * 1000)
    assert check(path, status=1)["findings"][0]["severity"] == "damage"
