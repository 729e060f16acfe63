"""`telemetryd move`: a database goes from a file to PostgreSQL and back with all that it holds, or stays as it was."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from telemetryd.engine import moving
from telemetryd.engine.postgres import moving as on_server
from telemetryd.engine.postgres import tools
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.engine.sqlite.tools import moving as in_file
from telemetryd.engine.sqlite.tools.check import examine
from telemetryd.errors import DatabaseError
from telemetryd.model.clocks import Reading
from telemetryd.model.commands import AlertChange, Command, ConfirmPrune, CreateRuns, RecordAlerts, TrustClock
from telemetryd.model.values import MAX_INTEGER
from telemetryd.settings import Settings, Sync
from tests.conftest import StartDaemon, make_run
from tests.http_client import call
from tests.postgres_cluster import Cluster
from tests.test_changes import NOW, commands, commit, connect, new
from tests.test_tail import send
from tests.tools.forks import popen
from tests.tools.process import telemetryd

pytestmark = pytest.mark.postgresql

CLOCK = Reading("2025-12-24T12:00:00.000000Z", "boot", 1234.5)
ALERT = AlertChange(
    "id-1", "slow", ("agent", "job", "", ""), True, NOW, 7, "Slow", '{"a": [1.5, "ä"]}', ("hook", "other"), '{"b":1}'
)
MADE_ANEW = {
    "run_labels", "run_hours", "run_days", "run_stats_log", "run_deltas", "backup_mark", "followed_feeds",
    "followed_runs", "schema_migrations",
}  # fmt: skip
"""What is made of the rest, or means nothing elsewhere: places of edges begin anew."""


def silent(_phase: str, _done: int, _total: int) -> None:
    pass


def settings_of(url: str) -> Settings:
    return Settings(db_url=SecretStr(url), db_sync=Sync.NONE)


def make_file(path: Path, groups: list[list[Command[Any]]]) -> None:
    with closing(connect(path)) as connection:
        migrate.create(connection, NOW)
        for group in groups:
            commit(connection, group)


def fill_strangely(path: Path) -> None:
    """Store what only few databases have."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO unconverted_values VALUES (1, ?, 'reason', ?)",
            [("a", "text"), ("b", 5), ("c", 0.1), ("d", b"\x00\xff"), ("e", "x\0y"), ("f", "")],
        )
        connection.execute("INSERT INTO run_deletions VALUES (7000000001, 'gone')")
        connection.execute("UPDATE change_feed SET event_floor = 7000000009, horizon = 3")
        connection.execute("INSERT INTO followed_feed VALUES ('abcdefabcdef', 5, 2)")


def content(path: Path) -> dict[str, list[Any]]:
    """All that a file holds, by table, but when its schema was made."""
    with closing(sqlite3.connect(path)) as connection:
        found = {}
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({name})")]
            order = ", ".join(columns)
            found[name] = connection.execute(f"SELECT * FROM {name} ORDER BY {order}").fetchall()
        for name in ("schema_migrations", "run_stats_log", "run_hours", "run_days"):  # bounds may be narrower
            del found[name]
        return found


def move_to_server(path: Path, url: str) -> moving.Moved:
    with in_file.reading(path) as source, on_server.making(settings_of(url)) as target:
        return moving.move(source, target, silent)


def move_to_file(url: str, path: Path) -> moving.Moved:
    with on_server.reading(settings_of(url)) as source, in_file.making(path) as target:
        return moving.move(source, target, silent)


groups = st.lists(st.lists(commands, min_size=1, max_size=5), max_size=10)


@settings(max_examples=15, deadline=None)
@given(groups)
def test_whatever_a_database_holds_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, groups: list[list[Command[Any]]]
) -> None:
    folder = tmp_path_factory.mktemp("move")
    one, other = folder / "one.sqlite", folder / "other.sqlite"
    extra: list[Command[Any]] = [RecordAlerts((ALERT,)), ConfirmPrune(86400.0, CLOCK), TrustClock(CLOCK)]
    long = [new(f"long-{number}", status="success", duration_ms=MAX_INTEGER, labels={"k": "v"}) for number in range(3)]
    make_file(one, [[CreateRuns(tuple(long))], *groups, extra])
    fill_strangely(one)
    name = cluster.make()
    try:
        there = move_to_server(one, cluster.url(name))
        before = content(one)  # what was logged is added to the statistics now
        assert tools.count_wrong(settings_of(cluster.url(name)), repair=False) == 0
        back = move_to_file(cluster.url(name), other)
    finally:
        cluster.drop(name)
    assert there.tables == back.tables
    for table, rows in content(other).items():
        assert rows == before[table], table
    assert [finding.text for finding in examine(other)] == []


def test_every_table_is_moved_or_made_anew(postgres_database: str, new_database: bytes, tmp_path: Path) -> None:
    """A table that a later migration brings has to be one of both."""
    (tmp_path / "new.sqlite").write_bytes(new_database)
    moved = {table.name: {*table.columns} for table in moving.TABLES}
    with closing(sqlite3.connect(tmp_path / "new.sqlite")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        in_file = {name: {row[1] for row in connection.execute(f"PRAGMA table_info({name})")} for name in tables}
    with psycopg.connect(postgres_database) as server:
        rows = server.execute(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
        ).fetchall()
    on_the_server: dict[str, set[str]] = {}
    for table, column in rows:
        on_the_server.setdefault(table, set()).add(column)
    assert {*in_file} - MADE_ANEW == {*on_the_server} - MADE_ANEW == {*moved}
    for name, columns in moved.items():
        assert in_file[name] - columns <= {"event_floor"}, name
        assert on_the_server[name] - columns <= {"one", "lineage"}, name  # which a server notes of itself


@contextmanager
def moving_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    command = [sys.executable, "-m", "telemetryd", "move", "--db-sync", "none", *arguments]
    with popen(command, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def run_move(source: Path | str, target: Path | str, status: int = 0) -> subprocess.CompletedProcess[str]:
    return telemetryd("move", "--db-sync", "none", "--from", source, "--to", target, status=status)


def seen(url: str) -> dict[str, Any]:
    """What a daemon answers of everything that a move keeps."""
    return {
        path: call(url, "GET", path)[1]
        for path in (
            "/api/v1/runs?limit=1000&total=true",
            "/api/v1/runs?label=team:search",
            "/api/v1/changes?limit=1000&events_after=0",
            "/api/v1/stats?from=2025-01-01",
            "/api/v1/runs/event-3/events",
            "/metadata",
        )
    }


def test_a_daemon_goes_on_where_the_other_one_was(start_daemon: StartDaemon, cluster: Cluster, tmp_path: Path) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    runs = [make_run(event_id=f"event-{number}", labels={"team": "search"}) for number in range(50)]
    send(daemon.url, "/api/v1/runs/batch", runs)
    send(daemon.url, "/api/v1/runs/event-3/events", [{"event_type": "step", "payload": {"ä": [1.5, None]}}])
    send(daemon.url, "/api/v1/runs/event-4", {"status": "success", "duration_ms": 12}, "PATCH")
    before = seen(daemon.url)
    place = before["/api/v1/changes?limit=1000&events_after=0"]
    cursor = f"{place['epoch']}-{place['last']}"
    assert daemon.stop() == 0

    name = cluster.make()
    url = cluster.url(name)
    out = run_move(daemon.database, url).stdout
    assert out.startswith("50 runs moved in ")
    assert "the digests of both sides are the same" in out
    assert "50 runs" in run_move(daemon.database, url).stdout  # as after a kill right at the end
    server = {"TELEMETRY_DB_URL": url, "TELEMETRY_DB_SYNC": "none"}
    with_server = start_daemon(folder=tmp_path, **server, TELEMETRY_TOKENS_FILE=str(tmp_path / "tokens"))
    assert seen(with_server.url) == before
    send(with_server.url, "/api/v1/runs", make_run(event_id="later"))
    send(with_server.url, "/api/v1/runs/event-3/events", [{"event_type": "later"}])
    status, changes = call(with_server.url, "GET", f"/api/v1/changes?after={cursor}&events_after=1")
    assert status == 200
    assert [change["run"]["event_id"] for change in changes["changes"]] == ["later", "event-3"]
    assert [event["id"] for event in changes["events"]] == [2]
    refused = run_move(url, tmp_path / "back.sqlite", 1).stderr
    assert "is in use by telemetryd/" in refused
    assert "stop every daemon on it first" in refused
    after = seen(with_server.url)
    assert with_server.stop() == 0

    back = tmp_path / "back"
    back.mkdir()
    done = orjson.loads(
        telemetryd("move", "--db-sync", "none", "--from", url, "--to", back / "telemetry.sqlite", "--json").stdout
    )
    assert done["tables"]["agent_runs"]["rows"] == 51
    again = start_daemon(folder=back, TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert seen(again.url) == after
    send(again.url, "/api/v1/runs", make_run(event_id="last"))
    assert again.stop() == 0
    assert [finding.text for finding in examine(back / "telemetry.sqlite")] == []
    cluster.drop(name)


def test_what_is_there_already_stays(postgres_database: str, tmp_path: Path, start_daemon: StartDaemon) -> None:
    path, other = tmp_path / "one.sqlite", tmp_path / "other.sqlite"
    make_file(path, [[CreateRuns((new("a"),))]])
    make_file(other, [[CreateRuns((new("b"),))]])
    assert "There is no database at" in run_move(tmp_path / "none.sqlite", postgres_database, 1).stderr
    run_move(path, postgres_database)
    assert "does not hold what" in run_move(other, postgres_database, 1).stderr
    assert "does not hold what" in run_move(postgres_database, other, 1).stderr
    assert "holds all of" in run_move(postgres_database, path).stdout
    for one in (path, other):
        assert len(content(one)["agent_runs"]) == 1
    assert run_move(path, other, 2).stderr.endswith(
        "One of --from and --to is a file, the other one an address: postgresql://…\n"
    )
    with psycopg.connect(postgres_database) as server:
        assert server.execute("SELECT event_id FROM agent_runs").fetchall() == [("a",)]
    (tmp_path / "sub").mkdir()
    daemon = start_daemon(folder=tmp_path / "sub")
    assert daemon.url
    assert "stop it first" in run_move(daemon.database, postgres_database, 1).stderr


def test_what_postgresql_cannot_hold_is_named_and_nothing_is_kept(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "one.sqlite"
    make_file(path, [[CreateRuns((new("a"), new("b")))]])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET host = 'x' || char(0) WHERE event_id = 'b'")
    name = cluster.make()
    errors = run_move(path, cluster.url(name), 1).stderr
    assert "does not take a row of agent_runs" in errors
    assert "telemetryd check --repair" in errors
    assert cluster.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", name) == [(0,)]
    telemetryd("check", "--repair", "--db-path", path)
    run_move(path, cluster.url(name))
    cluster.drop(name)


def test_a_target_that_lost_a_row_is_noticed_and_nothing_is_kept(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.sqlite"
    make_file(path, [[CreateRuns((new("a"), new("b")))]])
    name = cluster.make()
    complete = on_server.Database.complete

    def lose(self: on_server.Database, drawn: moving.Drawn, watch: moving.Watch) -> None:
        complete(self, drawn, watch)
        self._plain.execute("UPDATE agent_runs SET host = 'x' WHERE event_id = 'b'")

    monkeypatch.setattr(on_server.Database, "complete", lose)
    with pytest.raises(DatabaseError, match=r"does not hold what .* holds in agent_runs; nothing was kept of it"):
        move_to_server(path, cluster.url(name))
    assert cluster.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", name) == [(0,)]
    cluster.drop(name)


def test_killed_at_any_moment_there_is_nothing_and_a_repeat_does_it(cluster: Cluster, tmp_path: Path) -> None:
    path, back = tmp_path / "one.sqlite", tmp_path / "back.sqlite"
    rows = [new(f"event-{number}", labels={"a": "b"}, duration_ms=number) for number in range(3_000)]
    make_file(path, [[CreateRuns(tuple(rows))]])
    name = cluster.make()
    url = cluster.url(name)
    started = time.monotonic()
    run_move(path, url)
    took = time.monotonic() - started
    chance = random.Random(22)
    for turn in range(4):
        there = turn % 2 == 0
        if there:
            cluster.drop(name)
            name = cluster.make()
            url = cluster.url(name)
        else:
            back.unlink(missing_ok=True)
        pair = (str(path), url) if there else (url, str(back))
        is_killed = False
        while not is_killed:
            with moving_process("--from", pair[0], "--to", pair[1]) as process:
                try:
                    process.wait(took * chance.uniform(0.3, 1.0))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    is_killed = True
                else:
                    is_killed = process.returncode == 0
                process.wait()
            if there:
                tables = cluster.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", name)
                assert tables == [(0,)] or cluster.execute("SELECT count(*) FROM agent_runs", name) == [(3_000,)]
            else:
                assert not back.exists() or len(content(back)["agent_runs"]) == 3_000
        run_move(*pair)
    assert content(back) == content(path)
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []
    cluster.drop(name)
