"""One way to the current schema; and a file that is not of it is refused without being touched."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from telemetryd.cli import main
from telemetryd.engine.sqlite.files import APPLICATION_ID, Kind, inspect
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.engine.sqlite.tools.integrity import count_wrong_totals
from telemetryd.engine.sqlite.tools.legacy import migrate_file
from telemetryd.errors import DatabaseError
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests.conftest import MakeApi, StartDaemon, make_run
from tests.http_client import get, post
from tests.tools.process import telemetryd
from tests.tools.schema import SCHEMA, render

_INSERT = "INSERT INTO agent_runs (event_id, run_id, created_at, updated_at, start_time, agent_name, job_type)"
NOW = "2026-01-01T00:00:00.000000Z"


# --- One schema ----------------------------------------------------------------------------------


def master(path: Path) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()


def versions(path: Path) -> tuple[int, int, list[int]]:
    with closing(sqlite3.connect(path)) as connection:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        steps = [row[0] for row in connection.execute("SELECT version FROM schema_migrations ORDER BY 1")]
        return application, version, steps


def step_by_step(path: Path, until: int) -> None:
    """Make a database of a version: each step in a transaction of its own, with runs stored in between."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for number, step in enumerate(step for step in migrate.steps() if step.version <= until):
            connection.execute("BEGIN")
            for statement in step.statements():
                connection.execute(statement)
            connection.execute("INSERT INTO schema_migrations VALUES (?, ?, ?)", (step.version, step.description, NOW))
            connection.execute(f"PRAGMA user_version = {step.version}")
            connection.execute("COMMIT")
            if number == 0:
                connection.executemany(
                    f"{_INSERT} VALUES (?, 'r', ?, ?, ?, ?, 'job')",
                    [(f"e{n}", f"2026-01-01T00:0{n % 3}:00.000000Z", NOW, NOW, f"agent{n % 2}") for n in range(12)],
                )
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


async def make_database(path: Path, **settings: object) -> None:
    store = await Store.open(Settings.model_validate({"db_path": path, **settings}), Metrics())
    await store.close()


async def test_a_fresh_database_and_a_migrated_one_have_the_same_schema(tmp_path: Path) -> None:
    fresh, migrated = tmp_path / "fresh.sqlite", tmp_path / "migrated.sqlite"
    await make_database(fresh)
    step_by_step(migrated, migrate.current_version())
    assert master(fresh) == master(migrated)
    assert versions(fresh) == versions(migrated)
    assert versions(fresh)[:2] == (APPLICATION_ID, migrate.current_version())
    assert versions(fresh)[2] == [step.version for step in migrate.steps()]


async def test_a_migrated_database_is_served_with_totals_that_agree(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    step_by_step(path, migrate.current_version())
    await make_database(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT agent_name, runs FROM run_totals").fetchall() == [
            ("agent0", 6),
            ("agent1", 6),
        ]
        assert connection.execute("SELECT runs FROM run_minutes").fetchall() == [(4,)] * 3


def test_run_steps_runs_only_what_is_behind_the_given_version(tmp_path: Path) -> None:
    first = migrate.steps()[0]
    with closing(sqlite3.connect(tmp_path / "x.sqlite", isolation_level=None)) as connection:
        for statement in first.statements():
            connection.execute(statement)
        migrate.run_steps(connection, NOW, after=first.version)
        migrate.check_schema(connection, tmp_path / "x.sqlite")
        applied = [row[0] for row in connection.execute("SELECT version FROM schema_migrations")]
        assert applied == [step.version for step in migrate.steps()[1:]]


async def test_a_run_of_version_19_has_neither_labels_nor_a_digest_and_gets_labels_by_patch(
    tmp_path: Path, make_api: MakeApi
) -> None:
    path = tmp_path / "telemetry.sqlite"
    step_by_step(path, 19)
    assert json.loads(telemetryd("migrate", "--json", "--no-backup", "--db-path", path).stdout)["from_version"] == 19
    api = await make_api(db_path=path)
    run = await api.get("/api/v1/runs/e7")
    assert {name: run[name] for name in ("labels", "attempt", "trace_id", "expected_by")} == dict.fromkeys(
        ("labels", "attempt", "trace_id", "expected_by")
    )
    body = {name: run[name] for name in ("event_id", "run_id", "agent_name", "job_type", "start_time")}
    await api.call("PATCH", "/api/v1/runs/e7", json={"labels": {"team": "x"}, "host": "h"}, status=200)
    assert "warnings" not in await api.post(body, 200)
    assert "differs in: agent_name" in str(await api.post({**body, "agent_name": "another"}, 200))
    assert [found["event_id"] for found in await api.get("/api/v1/runs?label.team=x")] == ["e7"]


def test_the_steps_are_numbered_without_gaps() -> None:
    assert [step.version for step in migrate.steps()] == list(range(8, 8 + len(migrate.steps())))


def test_a_step_is_cut_into_statements_like_sqlite_would() -> None:
    step = migrate.Step(8, "x", "CREATE TABLE a (b TEXT DEFAULT ';');\n-- a comment;\nSELECT 1;\n-- the end\n")
    assert [statement.strip().splitlines()[-1] for statement in step.statements()] == [
        "CREATE TABLE a (b TEXT DEFAULT ';');",
        "SELECT 1;",
    ]
    with pytest.raises(ValueError, match="unfinished"):
        list(migrate.Step(8, "x", "SELECT 1").statements())


def test_the_schema_for_people_is_the_current_one() -> None:
    assert SCHEMA.read_text("utf-8") == render(), "run: make schema"


@pytest.mark.parametrize("version", [step.version for step in migrate.steps()][:-1])
def test_a_database_of_each_earlier_version_becomes_the_current_one(tmp_path: Path, version: int) -> None:
    path = tmp_path / "old.sqlite"
    step_by_step(path, version)
    fires = 15 <= version < 18
    if fires:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("INSERT INTO alert_states VALUES ('rule', 'agent', 'job', ?, 7, 'so', '{}')", (NOW,))
    done = migrate_file(path, NOW)
    assert not done.layout.aside
    assert inspect(path).version == migrate.current_version()
    with closing(sqlite3.connect(path)) as connection:
        migrate.check_schema(connection, path)
        assert not count_wrong_totals(connection)
        firing = connection.execute("SELECT * FROM alert_states").fetchall()
    assert firing == [("rule", "agent", "job", "", "", NOW, 7, "so", "{}")] * fires


# --- Files that are not ours are left alone ------------------------------------------------------


def refusal(path: Path, journal_mode: str = "DELETE") -> str:
    """What the daemon says when it opens a file that it refuses."""

    async def open_it() -> None:
        store = await Store.open(Settings(db_path=path, db_journal_mode=journal_mode), Metrics())
        await store.close()

    with pytest.raises(DatabaseError) as caught:
        asyncio.run(open_it())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state(folder: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """Everything about every file, except the lock file."""
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode, path.stat().st_ino)
        for path in folder.iterdir()
        if path.suffix != ".lock"
    }


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement).fetchall()


def fill(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.executemany(
            f"{_INSERT} VALUES (?, 'r', '{NOW}', '{NOW}', '{NOW}', 'agent', 'job')",
            [(f"event-{number:05}",) for number in range(2000)],
        )
        connection.execute("COMMIT")


def flip(path: Path, *offsets: int) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset % len(content)] ^= 0xFF
    path.write_bytes(content)


def drop_index_in_wal_mode(path: Path) -> None:
    """Also in another journal mode than the daemon's, so that setting the mode would write to the file."""
    execute(path, "DROP INDEX idx_runs_status", "PRAGMA journal_mode = WAL")


def old_service(path: Path) -> None:
    path.unlink()
    execute(
        path,
        "CREATE TABLE agent_runs (id INTEGER PRIMARY KEY, event_id TEXT UNIQUE, status TEXT)",
        "INSERT INTO agent_runs VALUES (1, 'e', 'ok')",
        "PRAGMA user_version = 6",
    )


def old_service_in_wal_mode(path: Path) -> None:
    path.unlink()
    execute(path, "PRAGMA journal_mode = WAL", "CREATE TABLE agent_runs (id INTEGER PRIMARY KEY, event_id TEXT)")


def foreign(path: Path) -> None:
    path.unlink()
    execute(path, "CREATE TABLE albums (title)", "INSERT INTO albums VALUES ('x')", "PRAGMA user_version = 9")


def foreign_in_wal_mode(path: Path) -> None:
    path.unlink()
    execute(path, "PRAGMA journal_mode = WAL", "CREATE TABLE albums (title)")


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "older service": (old_service, r"has schema version 6, this telemetryd needs \d+; .*: run telemetryd migrate$"),
    "older service in WAL mode": (old_service_in_wal_mode, r"has an older schema, .*: run telemetryd migrate$"),
    "older schema": (
        lambda path: execute(path, "PRAGMA user_version = 8"),
        r"has schema version 8, this telemetryd needs \d+; nothing was changed: run telemetryd migrate$",
    ),
    "newer schema": (
        lambda path: execute(path, "PRAGMA user_version = 99"),
        r"has schema version 99, this telemetryd knows only \d+; nothing was changed: install the newer telemetryd$",
    ),
    "foreign": (foreign, r"is a SQLite database of another program .*; point TELEMETRY_DB_PATH at another file$"),
    "foreign in WAL mode": (foreign_in_wal_mode, r"is a SQLite database of another program"),
    "text": (lambda path: path.write_text("hello " * 100), r"is not a SQLite database; move it away, or point TEL"),
    "short": (lambda path: path.write_bytes(path.read_bytes()[:50]), r"is not a SQLite database; move it away"),
    "noise": (lambda path: path.write_bytes(os.urandom(20_000)), r"is not a SQLite database; move it away"),
    "cut in half": (
        lambda path: os.truncate(path, path.stat().st_size // 2),
        r"is damaged \(it should have \d+ pages but .*\); nothing was changed: .*telemetryd check.*check --repair",
    ),
    "cut inside the first page": (lambda path: os.truncate(path, 2000), r"is damaged \(.*check --repair"),
    "flipped in the schema": (lambda path: flip(path, *range(110, 300)), r"is damaged \(.*check --repair"),
    "flipped in the middle": (
        lambda path: flip(path, *(page * 4096 + at for page in range(20, 60) for at in range(12))),
        r"is damaged \(.*telemetryd check.*check --repair",
    ),
    "missing index": (
        lambda path: execute(path, "DROP INDEX idx_runs_status"),
        r"missing or different are idx_runs_status; nothing was changed: .*schema/telemetry\.sql$",
    ),
    "missing index in WAL mode": (drop_index_in_wal_mode, r"missing or different are idx_runs_status; nothing was"),
    "changed index": (
        lambda path: execute(
            path, "DROP INDEX idx_runs_event_id", "CREATE INDEX idx_runs_event_id ON agent_runs (event_id)"
        ),
        r"missing or different are idx_runs_event_id; ",
    ),
    "two changes": (
        lambda path: execute(path, "DROP INDEX idx_runs_status", "DROP TABLE run_minutes"),
        r"missing or different are run_minutes, idx_runs_status; ",
    ),
}


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path: Path, kind: str, journal_mode: str) -> None:
    path = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        migrate.create(connection, NOW)
    fill(path)
    break_it, sentence = BAD_FILES[kind]
    break_it(path)
    before = state(tmp_path)
    assert set(before) == {"telemetry.sqlite"}
    told = refusal(path, journal_mode)
    assert re.search(sentence, told), told
    assert told.startswith(f"{path} ") or "schema of" in told
    assert state(tmp_path) == before


def test_a_foreign_database_that_stands_only_in_its_log_is_refused_too(tmp_path: Path) -> None:
    path, log = tmp_path / "telemetry.sqlite", tmp_path / "telemetry.sqlite-wal"
    with closing(sqlite3.connect(tmp_path / "source.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE albums (title)")
        path.write_bytes((tmp_path / "source.sqlite").read_bytes())
        log.write_bytes((tmp_path / "source.sqlite-wal").read_bytes())
    before = state(tmp_path)
    assert "of another program" in refusal(path)
    after = state(tmp_path)
    assert (after[path.name], after[log.name]) == (before[path.name], before[log.name])


def test_the_process_says_so_too(start_daemon: StartDaemon, tmp_path: Path) -> None:
    execute(tmp_path / "telemetry.sqlite", "CREATE TABLE albums (title)")
    status, errors = start_daemon().wait()
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "of another program" in errors


def test_a_large_damaged_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        migrate.create(connection, NOW)
        connection.execute("CREATE TABLE ballast (x)")
        connection.execute("INSERT INTO ballast VALUES (zeroblob(20000000))")
    flip(path, *range(110, 300))
    before = state(tmp_path)
    assert "is damaged (" in refusal(path)
    assert state(tmp_path) == before


# --- What is taken -------------------------------------------------------------------------------


async def test_an_empty_file_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "telemetry.sqlite"
    path.touch()
    assert inspect(path).kind is Kind.EMPTY
    for command in (["check"], ["check", "--repair"], ["migrate"]):
        said = CliRunner().invoke(main, [*command, "--db-path", str(path)])
        assert said.exit_code == 1
        assert f"{path} is empty: telemetryd serve makes a new database of it, or restore a backup\n" in said.stderr
    await make_database(path)
    assert caplog.messages.count("The database file was empty: a new database is made in it") == 1
    assert inspect(path).kind is Kind.OURS


async def test_a_database_without_tables_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    execute(path, "PRAGMA journal_mode = WAL", "CREATE TABLE x (y)", "DROP TABLE x")
    await make_database(path)
    assert inspect(path).kind is Kind.OURS


async def test_tables_and_indexes_of_the_users_own_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    await make_database(path)
    execute(path, "CREATE TABLE mine (x)", "CREATE INDEX my_index ON agent_runs (host)")
    await make_database(path)


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_a_first_start_that_was_killed_anywhere_is_made_good_by_the_next(
    start_daemon: StartDaemon, tmp_path: Path, journal_mode: str
) -> None:
    """The worst place: the file is written, the journal not yet removed; then the header speaks too early."""
    path = tmp_path / "telemetry.sqlite"
    journal = tmp_path / "telemetry.sqlite-journal"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")  # spill into the file before COMMIT
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("BEGIN")
        migrate.run_steps(connection, NOW, after=0)
        connection.execute("CREATE TABLE ballast AS SELECT zeroblob(200000) AS x")
        torn, log = path.read_bytes(), journal.read_bytes()
        connection.execute("COMMIT")
    assert len(torn) > 0
    whole = path.read_bytes()
    for content in (torn, whole):
        path.write_bytes(content)
        journal.write_bytes(log)
        daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
        assert post(daemon.url, make_run())[0] == 201
        assert get(daemon.url, "/metrics")[1]["total_runs"] == 1
        assert daemon.stop() == 0
        path.unlink()
