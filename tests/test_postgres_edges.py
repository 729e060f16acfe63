"""`telemetryd follow --db-url`: a copy on PostgreSQL, or with --as many databases in one, through kills and losses."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from telemetryd.cli.follow import newest_known
from telemetryd.engine.postgres.connection import Plain, Target, connect_plainly, writing_session
from telemetryd.engine.postgres.groups import transact
from telemetryd.engine.postgres.statements import deltas
from telemetryd.engine.postgres.statements.changes import fetch_followed
from telemetryd.engine.postgres.statements.commands import Transaction
from telemetryd.engine.postgres.statements.commands_edges import _Merge
from telemetryd.engine.sqlite.tools import backup, migrate
from telemetryd.model import events
from telemetryd.model.changes import (
    GetFollowed,
)
from telemetryd.model.commands import Applied, Command, CreateRuns, DeleteRun, MergeChanges, UpdateRun
from telemetryd.model.runs import COLUMNS
from telemetryd.model.values import Row, utc_now
from telemetryd.settings import Settings, Sync
from tests.conftest import Daemon, StartDaemon, make_run, wait_until
from tests.followed_pages import page_of
from tests.http_client import call
from tests.postgres_cluster import Cluster
from tests.test_changes import NOW, commands, commit, new
from tests.test_tail import send
from tests.tools.forks import popen
from tests.tools.process import telemetryd
from tests.tools.tcp_proxy import Cut, proxy_to

pytestmark = pytest.mark.postgresql

_RUNS: Final = f"SELECT {', '.join(COLUMNS)} FROM agent_runs ORDER BY event_id"
_EVENTS: Final = f"SELECT run, {', '.join(events.COLUMNS)} FROM run_events ORDER BY id"
_KEYS: Final = "SELECT event_id, event_key, payload IS NULL FROM run_events JOIN agent_runs ON agent_runs.id = run"


def settings_of(url: str) -> Settings:
    return Settings(db_url=SecretStr(url), db_sync=Sync.NONE)


@contextmanager
def connected(url: str) -> Iterator[Plain]:
    target = Target.of(settings_of(url))
    with closing(connect_plainly(target, "test", writing_session(target))) as plain:
        yield plain


@contextmanager
def primary() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrate.create(connection, NOW)
        yield connection


def carry_out(plain: Plain, command: Command[Any], *, is_killed: bool = False, now: str = NOW) -> Any:
    """Do a command in one transaction, or have it cut off right before its end."""
    transaction = Transaction(plain, now, Sync.NONE)
    outcomes = transaction.apply([command])
    if is_killed:
        plain.execute("ROLLBACK")
        return None
    transaction.finish()
    return outcomes[0]


steps = st.lists(st.tuples(st.lists(commands, max_size=4), st.integers(0, 4), st.booleans()), max_size=12)
made = CreateRuns(tuple(new(f"event-{run}", created_at=f"2025-12-0{run + 1}T10:00:00Z") for run in range(4)))


def all_of(plain: Plain, statement: str) -> list[tuple[Any, ...]]:
    return plain.execute(statement.encode()).fetchall()


@settings(max_examples=12, deadline=None)
@given(steps)
def test_pages_of_any_size_at_any_time_make_an_equal_copy(
    cluster: Cluster, new_postgres_database: str, steps: list[tuple[list[Any], int, bool]]
) -> None:
    name = cluster.make(new_postgres_database)
    with primary() as original, connected(cluster.url(name)) as copy:

        def take(limit: int, *, is_killed: bool = False) -> bool:
            followed = fetch_followed(copy, GetFollowed())
            page = page_of(original, followed, limit)
            carry_out(copy, page.for_copy(followed.begun), is_killed=is_killed)
            return page.more

        commit(original, [made])
        for group, limit, is_killed in steps:
            commit(original, group)
            if limit:
                take(limit, is_killed=is_killed)
        while take(3):
            pass
        numbers = "SELECT id, coalesce((SELECT seq FROM run_changes WHERE run = id), id) FROM agent_runs ORDER BY 1"
        for statement in (_RUNS, _EVENTS, numbers, "SELECT seq, event_id FROM run_deletions ORDER BY 1"):
            assert all_of(copy, statement) == original.execute(statement).fetchall()
        labels = "SELECT key, value, created, run FROM run_labels ORDER BY 1, 2, 3, 4"
        assert all_of(copy, labels) == original.execute(labels).fetchall()
        assert transact(copy, deltas.count_wrong) == 0
    cluster.drop(name)


class Edge:
    """A database of another machine, and what a relay does for it."""

    def __init__(self, name: str, connection: sqlite3.Connection, centre: Plain) -> None:
        self.name, self.connection, self.centre = name, connection, centre

    def command(self, limit: int) -> tuple[MergeChanges, bool]:
        followed = fetch_followed(self.centre, GetFollowed(self.name))
        page = page_of(self.connection, followed, limit)
        return MergeChanges(
            self.name, page.changes, page.events, page.epoch, page.last,
            begun=page.newest if followed.cursor is None else followed.begun,
            last_event=page.last_event or followed.last_event,
            known=newest_known(followed.known, page.changes),
            stood=followed.cursor, stood_event=followed.last_event,
        ), page.more  # fmt: skip

    def catch_up(self) -> None:
        is_more = True
        while is_more:
            command, is_more = self.command(3)
            carry_out(self.centre, command)

    def runs(self) -> dict[str, Row]:
        return {row[1]: row for row in self.connection.execute(_RUNS)}


def without(row: Row, *names: str) -> dict[str, Any]:
    return {name: value for name, value in zip(COLUMNS, row, strict=True) if name not in names}


_many = st.lists(
    st.tuples(st.integers(0, 1), st.lists(commands, max_size=4), st.integers(0, 4), st.booleans(), st.booleans()),
    max_size=14,
)


@settings(max_examples=20, deadline=None)
@given(_many)
def test_many_databases_become_one(cluster: Cluster, new_postgres_database: str, turns: list[tuple[Any, ...]]) -> None:
    """Whatever happens at two edges, with pages of any size, cut off or sent twice: the centre has what both have."""
    name = cluster.make(new_postgres_database)
    with primary() as one, primary() as other, connected(cluster.url(name)) as centre:
        edges = [Edge("one", one, centre), Edge("other", other, centre)]
        ticks = itertools.count(1)
        for place, group, limit, is_killed, is_repeated in turns:
            now = f"2025-12-24T12:{next(ticks):02}:00.000000Z"
            commit(edges[place].connection, group, now)
            if limit:
                command, _ = edges[place].command(limit)
                carry_out(centre, command, is_killed=is_killed)
                if is_repeated and not is_killed:  # its answer was lost, or another process has this name
                    again = carry_out(centre, command)
                    stayed = (command.stood, command.stood_event) == (
                        fetch_followed(centre, GetFollowed(command.source)).cursor,
                        command.last_event,
                    )
                    assert again == Applied(0, 0) or stayed
        for edge in edges:
            edge.catch_up()
        there = {row[1]: row for row in all_of(centre, _RUNS)}
        both = [edge.runs() for edge in edges]
        assert there.keys() == both[0].keys() | both[1].keys()
        updated = COLUMNS.index("updated_at")
        for event_id, row in there.items():
            states = [runs[event_id] for runs in both if event_id in runs]
            newest = max(states, key=lambda state: str(state[updated]))
            assert str(row[updated]) >= str(newest[updated])
            if row[updated] == newest[updated]:
                assert without(row, "id", "created_at") == without(newest, "id", "created_at")
        keys = {(event_id, key): is_empty for event_id, key, is_empty in all_of(centre, _KEYS)}
        for edge in edges:
            for event_id, key, is_empty in edge.connection.execute(_KEYS):
                assert keys[event_id, key] or not is_empty
        assert transact(centre, deltas.count_wrong) == 0
        assert all_of(centre, "SELECT * FROM followed_runs WHERE run NOT IN (SELECT id FROM agent_runs)") == []
        assert all_of(centre, "SELECT * FROM run_events WHERE run NOT IN (SELECT id FROM agent_runs)") == []
        assert len(all_of(centre, "SELECT seq FROM run_changes")) == len(there)
    cluster.drop(name)


def test_a_run_that_was_sent_to_the_centre_stays_when_an_edge_deletes_it(postgres_database: str) -> None:
    with primary() as one, connected(postgres_database) as centre:
        edge = Edge("one", one, centre)
        carry_out(centre, CreateRuns((new("both"),)))
        commit(one, [CreateRuns((new("both"), new("own")))], "2025-12-24T13:00:00.000000Z")
        edge.catch_up()
        commit(one, [DeleteRun("both"), DeleteRun("own")])
        edge.catch_up()
        assert [row[1] for row in all_of(centre, _RUNS)] == ["both"]
        carry_out(centre, UpdateRun("both", {"status": "success"}), now="2025-12-24T15:00:00.000000Z")
        commit(one, [CreateRuns((new("both"),))], "2025-12-24T14:00:00.000000Z")
        edge.catch_up()
        assert all_of(centre, "SELECT status FROM agent_runs") == [("success",)]


def test_a_run_goes_with_the_last_edge_that_has_it(postgres_database: str) -> None:
    with primary() as one, primary() as other, connected(postgres_database) as centre:
        edges = [Edge("one", one, centre), Edge("other", other, centre)]
        for edge in edges:
            commit(edge.connection, [CreateRuns((new("both"),))])
            edge.catch_up()
        for edge, left in zip(edges, (1, 0), strict=True):
            commit(edge.connection, [DeleteRun("both")])
            edge.catch_up()
            assert len(all_of(centre, _RUNS)) == left


def test_a_run_is_kept_that_is_deleted_at_the_centre_meanwhile(
    postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with primary() as one, connected(postgres_database) as centre, connected(postgres_database) as other:
        carry_out(centre, CreateRuns((new("both"),)))
        commit(one, [CreateRuns((new("both"),))])
        beforehand(monkeypatch, "_hold", lambda: carry_out(other, DeleteRun("both")))
        Edge("one", one, centre).catch_up()
        assert [row[1] for row in all_of(centre, _RUNS)] == ["both"]
        assert transact(centre, deltas.count_wrong) == 0


def test_a_run_is_kept_that_is_sent_to_the_centre_while_it_is_made_again(
    postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with primary() as one, connected(postgres_database) as centre, connected(postgres_database) as other:
        commit(one, [CreateRuns((new("both"),))])
        commit(one, [DeleteRun("both")])
        commit(one, [CreateRuns((new("both"),))])
        beforehand(monkeypatch, "_delete", lambda: carry_out(other, CreateRuns((new("both"),))))
        Edge("one", one, centre).catch_up()
        assert [row[1] for row in all_of(centre, _RUNS)] == ["both"]
        assert transact(centre, deltas.count_wrong) == 0


def beforehand(monkeypatch: pytest.MonkeyPatch, step: str, do: Callable[[], object]) -> None:
    """Do something right before a step of the next merge, as another daemon may."""
    carry_on = getattr(_Merge, step)

    def interrupted(merge: _Merge) -> None:
        monkeypatch.undo()
        do()
        carry_on(merge)

    monkeypatch.setattr(_Merge, step, interrupted)


# --- Processes -----------------------------------------------------------------------------------


@contextmanager
def following(url: str, database: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    command = [sys.executable, "-m", "telemetryd", "follow", url, "--db-url", database, "--db-sync", "none", *flags]
    with popen(command, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def once(url: str, database: str, *flags: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = ("follow", url, "--db-url", database, "--db-sync", "none", "--once", *flags)
    return telemetryd(*arguments, status=status)


def on_server(start_daemon: StartDaemon, database: str, folder: Path, port: int = 0) -> Daemon:
    folder.mkdir(exist_ok=True)
    return start_daemon(
        folder=folder,
        TELEMETRY_DB_URL=database,
        TELEMETRY_DB_SYNC="none",
        TELEMETRY_TOKENS_FILE=str(folder / "tokens"),
        TELEMETRY_API_PORT=str(port),
    )


def event_ids(url: str) -> list[str]:
    """What a daemon answers page by page of the runs that it has."""
    found: list[str] = []
    after, is_more = "", True
    while is_more:
        status, page = call(url, "GET", f"/api/v1/changes?limit=500{after}")
        assert status == 200
        found += [change["run"]["event_id"] for change in page["changes"] if "run" in change]
        after, is_more = f"&after={page['last']}", page["more"]
    return found


class Agents:
    """Send runs to an address for as long as they may, and repeat what was not acknowledged."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self.acknowledged: list[str] = []
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(3)]

    def __enter__(self) -> Agents:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _send(self, agent: int) -> None:
        for number in itertools.count():
            event_id = f"agent-{agent}-{number}"
            while call(self._url, "POST", "/api/v1/runs", make_run(event_id=event_id))[0] not in (200, 201):
                time.sleep(0.05)
            self.acknowledged.append(event_id)
            if self._is_over.is_set():
                return
            time.sleep(0.01)


def test_a_move_without_standing_still(
    start_daemon: StartDaemon, postgres_database: str, tmp_path: Path, free_port: int
) -> None:
    """As docs/how-to/postgresql.md has it: agents send all the time, and every acknowledged run is there once."""
    old = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL", TELEMETRY_API_PORT=str(free_port))
    send(old.url, "/api/v1/runs/batch", [make_run(event_id=f"old-{number}") for number in range(700)])
    with Agents(old.url) as agents:
        with following(old.url, postgres_database) as process:
            wait_until(lambda: len(agents.acknowledged) > 50)
            process.kill()
        with following(old.url, postgres_database) as process:
            wait_until(lambda: len(agents.acknowledged) > 100)
            assert old.stop() == 0
            private = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")  # at a port that no agent knows
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        once(private.url, postgres_database)
        ids = dict(old.execute("SELECT event_id, id FROM agent_runs"))
        assert private.stop() == 0
        fresh = on_server(start_daemon, postgres_database, tmp_path / "new", free_port)
        before = len(agents.acknowledged)
        wait_until(lambda: len(agents.acknowledged) > before + 20)
    found = event_ids(fresh.url)
    assert sorted(found) == sorted([*agents.acknowledged, *(f"old-{number}" for number in range(700))])
    there = dict(fresh.execute("SELECT event_id, id FROM agent_runs"))
    assert {event_id: there[event_id] for event_id in ids} == ids
    assert telemetryd("check", TELEMETRY_DB_URL=postgres_database, TELEMETRY_DB_SYNC="none").returncode == 0


def test_many_edges_through_losses_and_kills(
    start_daemon: StartDaemon, cluster: Cluster, postgres_database: str, tmp_path: Path
) -> None:
    """Two daemons serve what three others send by way of links that break and relays that are killed."""
    name = postgres_database.partition("@/")[2].partition("?")[0]
    centre = on_server(start_daemon, postgres_database, tmp_path / "centre")
    beside = on_server(start_daemon, postgres_database, tmp_path / "beside")
    edges = []
    for number in range(3):
        (tmp_path / f"edge-{number}").mkdir()
        edges.append(start_daemon(folder=tmp_path / f"edge-{number}", TELEMETRY_DB_JOURNAL_MODE="WAL"))
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(proxy_to(cluster.folder / ".s.PGSQL.5432"))
        through = f"postgresql://postgres@127.0.0.1:{proxy.port}/{name}?sslmode=disable&gssencmode=disable"
        agents = [stack.enter_context(Agents(edge.url)) for edge in edges]
        own = stack.enter_context(Agents(centre.url))
        for turn in range(4):
            with contextlib.ExitStack() as relays:
                running = [
                    relays.enter_context(following(edge.url, through, "--as", f"edge-{number}"))
                    for number, edge in enumerate(edges)
                ]
                for cut in (Cut.BEFORE, Cut.AFTER):
                    time.sleep(1)
                    proxy.cut = cut
                wait_until(lambda: proxy.cut is Cut.NEVER)
                time.sleep(1)
                running[turn % 3].kill()
    for number, edge in enumerate(edges):
        send(edge.url, "/api/v1/runs/agent-0-1/events", [{"event_type": "step", "event_key": f"of-{number}"}])
        send(edge.url, "/api/v1/runs/agent-0-1", {"status": "success", "items_failed": number}, "PATCH")
        once(edge.url, postgres_database, "--as", f"edge-{number}")
    everything = {*own.acknowledged}.union(*(agent.acknowledged for agent in agents))
    for daemon in (centre, beside):
        found = event_ids(daemon.url)
        assert len(found) == len({*found})
        assert {*found} == everything
    told = call(beside.url, "GET", "/api/v1/runs/agent-0-1/events")[1]
    assert [event["event_key"] for event in told] == ["of-0", "of-1", "of-2"]
    run = call(beside.url, "GET", "/api/v1/runs/agent-0-1")[1]
    assert (run["status"], run["items_failed"]) == ("success", 2)
    assert telemetryd("check", TELEMETRY_DB_URL=postgres_database, TELEMETRY_DB_SYNC="none").returncode == 0
    with psycopg.connect(postgres_database) as server:
        leads = server.execute(
            "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) "
            "WHERE locktype = 'advisory' AND objid = 3 AND granted"
        ).fetchall()
        places = server.execute("SELECT source FROM followed_feeds ORDER BY 1").fetchall()
    assert {application for (application,) in leads} <= {
        f"telemetryd/{daemon.process.pid}/session" for daemon in (centre, beside)
    }
    assert places == [("edge-0",), ("edge-1",), ("edge-2",)]


def test_an_edge_that_was_restored_begins_anew(
    start_daemon: StartDaemon, postgres_database: str, tmp_path: Path
) -> None:
    edge = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    send(edge.url, "/api/v1/runs", make_run(event_id="before"))
    assert edge.stop() == 0
    backup.backup(edge.database, tmp_path / "saved")
    edge = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    send(edge.url, "/api/v1/runs", make_run(event_id="lost"))
    once(edge.url, postgres_database, "--as", "edge")
    assert edge.stop() == 0
    backup.restore(tmp_path / "saved", edge.database, utc_now())
    edge = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    send(edge.url, "/api/v1/runs", make_run(event_id="after"))
    send(edge.url, "/api/v1/runs/after/events", [{"event_type": "step"}])
    errors = once(edge.url, postgres_database, "--as", "edge").stderr
    assert "was restored from a backup since" in errors
    assert "beginning anew" in errors
    assert once(edge.url, postgres_database, "--as", "edge").stderr == ""
    with psycopg.connect(postgres_database) as server:
        assert server.execute("SELECT event_id FROM agent_runs ORDER BY 1").fetchall() == [
            ("after",), ("before",), ("lost",),
        ]  # fmt: skip
        told = server.execute("SELECT event_id FROM run_events JOIN agent_runs ON run = agent_runs.id").fetchall()
    assert told == [("after",)]


def test_who_writes_besides_daemons_keeps_a_move_away(
    start_daemon: StartDaemon, postgres_database: str, tmp_path: Path
) -> None:
    edge = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    send(edge.url, "/api/v1/runs", make_run())
    asked = "SELECT count(*) FROM followed_feeds"
    with following(edge.url, postgres_database, "--as", "edge"), psycopg.connect(postgres_database) as server:
        wait_until(lambda: server.execute(asked).fetchall() == [(1,)])
        place = tmp_path / "moved.sqlite"
        refused = telemetryd("move", "--db-sync", "none", "--from", postgres_database, "--to", place, status=1)
        assert "is in use by telemetryd/" in refused.stderr


def test_what_cannot_be_followed_so(start_daemon: StartDaemon, postgres_database: str, tmp_path: Path) -> None:
    edge = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    send(edge.url, "/api/v1/runs", make_run())
    assert "needs --db-url" in telemetryd("follow", edge.url, "--as", "x", "--db-path", tmp_path / "c", status=2).stderr
    assert "takes a name" in once(edge.url, postgres_database, "--as", "a b", status=2).stderr
    once(edge.url, postgres_database, "--as", "edge")
    errors = once(edge.url, postgres_database, status=1).stderr
    assert "holds changes that are not the primary's" in errors
    assert edge.stop() == 0
    assert "Cannot reach the daemon" in once("http://127.0.0.1:1", postgres_database, "--as", "edge", status=1).stderr
