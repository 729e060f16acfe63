"""`telemetryd follow`: the copy of a real daemon's database is equal to it, whatever was interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from telemetryd.cli.follow import PageSize
from telemetryd.cli.stream import reach
from telemetryd.client.config import Config
from telemetryd.engine.sqlite.statements.changes import fetch_changes
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.statements.replica import fetch_followed
from telemetryd.engine.sqlite.tools import backup, migrate
from telemetryd.engine.sqlite.tools.check import examine
from telemetryd.errors import CursorGoneError, UnavailableError
from telemetryd.model.changes import (
    LEAST_PAGE_BYTES,
    PAGE_BYTES,
    Cursor,
    GetFollowed,
    Known,
    ListChanges,
)
from telemetryd.model.commands import CreateEvents, CreateRuns, PruneRuns
from telemetryd.model.runs import COLUMNS, STORED, parse_run, stored_row, to_json
from telemetryd.model.values import utc_now
from tests.conftest import Api, Daemon, StartDaemon, make_run, wait_until
from tests.followed_pages import page_of
from tests.test_changes import NOW, commands, commit, connect, new
from tests.test_tail import send
from tests.tools.forks import popen
from tests.tools.process import telemetryd

TABLES = (
    "run_labels",
    "agent_runs",
    "run_events",
    "run_changes",
    "run_deletions",
    "run_totals",
    "run_minutes",
    "run_hours",
    "run_days",
)


def content(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        return {table: connection.execute(select_all(table)).fetchall() for table in TABLES}


def select_all(table: str) -> str:
    """All that a copy has as well; of the digest of a run's first body nobody learns."""
    columns = ", ".join(COLUMNS) if table == "agent_runs" else "*"
    return f"SELECT {columns} FROM {table} ORDER BY 1, 2"


@contextmanager
def following(url: str, copy: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    environment["TELEMETRY_API_AUTH_TOKEN"] = "secret-secret-secret"
    command = [sys.executable, "-m", "telemetryd", "follow", url, "--db-path", str(copy), *flags]
    pipe = subprocess.PIPE
    with popen(command, environment, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def follow(url: str, copy: Path, *flags: str) -> tuple[int, str, str]:
    with following(url, copy, *flags) as process:
        out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


def start(start_daemon: StartDaemon, port: int = 0) -> Daemon:
    return start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL", TELEMETRY_API_PORT=str(port), TELEMETRY_STALE_AFTER="1h")


def test_the_copy_is_equal_whatever_was_interrupted(start_daemon: StartDaemon, tmp_path: Path, free_port: int) -> None:
    copy = tmp_path / "copy" / "copy.sqlite"
    daemon = start(start_daemon, free_port)
    runs = [
        make_run(event_id=f"event-{number}", metrics_json={"tokens": number, "ä": [1.5, None]}, api_posted=True)
        for number in range(1200)
    ]
    told = [{"event_type": "step", "payload": {"page": page, "ä": [1.5, None]}} for page in range(40)]
    send(daemon.url, "/api/v1/runs/batch", runs)
    send(daemon.url, "/api/v1/runs/event-3", {"status": "success", "context_json": {"language": "de"}}, "PATCH")
    status, out, errors = follow(daemon.url, copy, "--once")
    assert (status, errors) == (0, "")
    assert out.startswith("1200 changes and 0 events taken over, up to ")
    assert content(copy) == content(daemon.database)

    with following(daemon.url, copy) as process:
        for number in range(20):
            send(daemon.url, "/api/v1/runs", make_run(event_id=f"late-{number}"))
            send(daemon.url, f"/api/v1/runs/event-{number}/events", told)
            if number == 10:
                process.kill()
    daemon.stop(signal.SIGKILL)
    with closing(connect(daemon.database)) as connection:
        commit(connection, [PruneRuns("9999", 10, status="success")])
    daemon = start(start_daemon, free_port)
    with following(daemon.url, copy) as process:
        send(daemon.url, "/api/v1/runs/late-3", {"status": "failure"}, "PATCH")
        send(daemon.url, "/api/v1/runs/late-3/events", told)
        wait_until(lambda: content(copy) == content(daemon.database))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    done = orjson.loads(follow(daemon.url, copy, "--once", "--json")[1])
    assert (done["changes"], done["events"]) == (0, 0)
    with closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("DELETE FROM run_events WHERE id > 500")  # as in a copy that was made before events were
    done = orjson.loads(follow(daemon.url, copy, "--once", "--json")[1])
    assert (done["changes"], done["events"]) == (0, 340)
    assert content(copy) == content(daemon.database)
    assert [finding.text for finding in examine(copy)] == []


def test_it_refuses_what_is_no_copy_and_a_primary_that_is_another_one(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sqlite"
    daemon = start(start_daemon)
    send(daemon.url, "/api/v1/runs", make_run(event_id="a"))
    assert follow(daemon.url, copy, "--once")[0] == 0
    assert daemon.stop() == 0
    backup.backup(daemon.database, tmp_path / "saved")
    backup.restore(tmp_path / "saved", daemon.database, utc_now())
    daemon = start(start_daemon)
    status, _, errors = follow(daemon.url, copy, "--once")
    assert status == 1
    assert "410: The database was restored from a backup since" in errors
    assert f"{copy} cannot be kept in step any more: move it away or delete it, and start this command again" in errors
    copy.rename(tmp_path / "old.sqlite")
    assert follow(daemon.url, copy, "--once")[0] == 0
    assert content(copy)["agent_runs"] == content(daemon.database)["agent_runs"]
    copy.unlink()
    (tmp_path / "old.sqlite").rename(copy)
    status, _, errors = follow("http://127.0.0.1:1", copy, "--once")
    assert status == 1
    assert "Cannot reach the daemon" in errors
    with closing(connect(copy)) as connection:
        commit(connection, [])
        connection.execute("UPDATE followed_feed SET seq = 0")
    status, _, errors = follow(daemon.url, copy, "--once")
    assert status == 1
    assert "holds changes that are not the primary's" in errors
    assert follow("ftp://x", copy)[0] == 2


def test_a_primary_that_was_put_back_from_an_older_copy_is_noticed(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Its epoch is the same, and its numbers have gone on beyond those of the copy: they mean something else."""
    daemon = start(start_daemon)
    send(daemon.url, "/api/v1/runs/batch", [make_run(event_id=f"event-{number}") for number in range(5)])
    assert daemon.stop() == 0
    older = daemon.database.read_bytes()
    daemon = start(start_daemon)
    send(daemon.url, "/api/v1/runs/batch", [make_run(event_id=f"lost-{number}") for number in range(3)])
    send(daemon.url, "/api/v1/runs/event-2", {"status": "success"}, "PATCH")
    copy = tmp_path / "copy.sqlite"
    assert follow(daemon.url, copy, "--once")[0] == 0
    send(daemon.url, "/api/v1/runs/event-2", {"status": "failure"}, "PATCH")  # what a copy has may have changed since
    assert follow(daemon.url, copy, "--once")[0] == 0
    assert content(copy) == content(daemon.database)
    before = content(copy)
    assert daemon.stop() == 0
    daemon.database.write_bytes(older)
    daemon = start(start_daemon)
    send(daemon.url, "/api/v1/runs/batch", [make_run(event_id=f"new-{number}") for number in range(30)])
    status, out, errors = follow(daemon.url, copy, "--once")
    assert (status, out) == (1, "")
    assert "was put back from an older copy" in errors
    assert f"{copy} cannot be kept in step any more" in errors
    assert content(copy) == before


@pytest.mark.parametrize(
    ("known", "holds"),
    [
        (Known(9, "b", 2, "2025-12-24T12:00:01.000000Z"), True),
        (Known(9, "b", 2, "2025-12-24T12:00:02.000000Z"), False),  # another change
        (Known(8, "b", 2, NOW), False),  # which has not changed since `after`
        (Known(10, "b", 2, NOW), False),  # an older state
        (Known(3, "d", 3, NOW), True),  # changed since
        (Known(3, "c", 3, NOW), True),  # deleted since
        (Known(1, "x", 1, NOW), False),  # the number was another run's
        (Known(5, "e", 5, NOW), True),  # deleted and made anew since
        (Known(6, "g"), True),
        (Known(6, "h"), False),
        (Known(7, "g"), False),
    ],
)
def test_what_a_copy_knows_is_looked_for(known: Known, holds: bool) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as primary:
        migrate.create(primary, NOW)
        later = "2025-12-24T12:00:01.000000Z"
        commit(primary, [CreateRuns((new("a"), new("b"), new("c"), new("d"), new("e")))])
        commit(primary, [CreateRuns((new("g"),))])
        primary.execute("DELETE FROM agent_runs WHERE event_id = 'g'")
        primary.execute("INSERT INTO run_deletions (seq, event_id) VALUES (6, 'g'), (12, 'c'), (13, 'e')")
        primary.execute("INSERT INTO run_changes (run, seq) VALUES (2, 9), (4, 11)")
        primary.execute("UPDATE agent_runs SET updated_at = ? WHERE id IN (2, 4)", (later,))
        primary.execute("DELETE FROM agent_runs WHERE event_id = 'c'")
        primary.execute("UPDATE agent_runs SET id = 14 WHERE event_id = 'e'")
        known = replace(known, id=4) if known.event_id == "d" else known
        changes = fetch_changes(primary, ListChanges(10, 5, known=(known,)))
        assert (changes.unknown is None) is holds
        if not holds:
            with pytest.raises(CursorGoneError):
                changes.check(Cursor(10), None)


def test_pages_become_smaller_over_a_slow_link_and_larger_over_a_quick_one() -> None:
    size = PageSize()
    first = size.bytes
    size.took(13.0)
    assert size.bytes == first // 2
    size.took(3.0)
    assert size.bytes == first // 2
    for _ in range(20):
        size.failed()
    assert size.bytes == LEAST_PAGE_BYTES
    for _ in range(20):
        size.took(0.1)
    assert size.bytes == PAGE_BYTES


async def test_an_answer_may_take_as_long_as_it_likes_while_it_comes_in() -> None:
    pauses = [0.1] * 8

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for pause in pauses:
            await asyncio.sleep(pause)
            await response.write(b" ")
        await response.write(b'{"is": 1}')
        return response

    app = web.Application()
    app.router.add_get("/", answer)
    async with TestServer(app) as server:
        config = Config(url=f"http://127.0.0.1:{server.port}", timeout_s=0.1)
        async with reach(config, longest_wait_s=0.4) as daemon:
            assert await daemon.get("/", {}, ["is"]) == {"is": 1}
            pauses[:] = [5.0]
            with pytest.raises(UnavailableError):
                await daemon.get("/", {}, ["is"])


async def test_pages_are_as_small_as_they_are_asked_for(api: Api) -> None:
    await api.batch([make_run(event_id=f"{number}", output_summary="x" * 40_000) for number in range(4)])
    for number in range(4):
        told = {"event_type": "step", "payload": {"text": "x" * 40_000}}
        await api.call("POST", f"/api/v1/runs/{number}/events", json=told, status=201)
    page = await api.get("/api/v1/changes?max_bytes=65536&events_after=0")
    assert (len(page["changes"]), page["events"], page["more"]) == (1, [], True)
    page = await api.get(f"/api/v1/changes?max_bytes=65536&events_after=0&after={page['newest']}")
    assert (len(page["events"]), page["more"]) == (1, True)
    await api.get("/api/v1/changes?max_bytes=65535", 400)
    for known in ("5", "[[1]]", "x", str([[1, "a", 1, ""]] * 9).replace("'", '"')):
        await api.get("/api/v1/changes", 400, params={"known": known})


_STRAYS = "SELECT * FROM run_events WHERE run NOT IN (SELECT id FROM agent_runs)"
told = st.builds(
    lambda run, keys: CreateEvents(f"event-{run}", tuple((key, "step", "", '{"ä":[1.5,null]}') for key in keys)),
    st.integers(0, 3),
    st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True),
)
made = CreateRuns(tuple(new(f"event-{run}", created_at=f"2025-12-0{run + 1}T10:00:00Z") for run in range(4)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.lists(commands | told, max_size=4), st.integers(0, 4), st.booleans()), max_size=12))
def test_pages_of_any_size_at_any_time_make_an_equal_copy(steps: list[tuple[list[Any], int, bool]]) -> None:
    with (
        closing(sqlite3.connect(":memory:", isolation_level=None)) as primary,
        closing(sqlite3.connect(":memory:", isolation_level=None)) as copy,
    ):
        for connection in (primary, copy):
            migrate.create(connection, NOW)

        def take(limit: int, end: str = "COMMIT") -> bool:
            followed = fetch_followed(copy, GetFollowed())
            page = page_of(primary, followed, limit)
            copy.execute("BEGIN")
            transaction = Transaction(copy, NOW)
            transaction.apply([page.for_copy(followed.begun)])
            transaction.finish()
            copy.execute(end)
            return page.more

        commit(primary, [made])
        for group, limit, is_killed in steps:
            commit(primary, group)
            if limit:
                take(limit, "ROLLBACK" if is_killed else "COMMIT")
            assert copy.execute(_STRAYS).fetchall() == []
        while take(3):
            pass
        for table in ("agent_runs", "run_labels", "run_events", "run_changes", "run_totals", "run_minutes"):
            sql = select_all(table)
            assert copy.execute(sql).fetchall() == primary.execute(sql).fetchall(), table


def _decoded(row: tuple[Any, ...]) -> dict[str, Any]:
    decoded: dict[str, Any] = orjson.loads(orjson.dumps(to_json(row)))
    return decoded


def test_a_run_comes_back_as_it_was_stored() -> None:
    row = parse_run(
        make_run(created_at=NOW, metrics_json={"b": 1.5, "a": [None, "ä"]}, api_posted=1, duration_ms=7, attempt=2)
    ).row
    stored = (7, *row, NOW)
    values = dict(zip(("id", *STORED, "updated_at"), stored, strict=True))
    run = _decoded(tuple(values[name] for name in COLUMNS))
    assert stored_row(run) == row
    older = {name: value for name, value in run.items() if name not in ("attempt", "labels", "trace_id")}
    assert stored_row(older) == tuple(None if name == "attempt" else values[name] for name in STORED)


def test_credentials_that_the_followed_daemon_stored_are_not_copied(tmp_path: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    send(daemon.url, "/api/v1/runs", make_run(event_id="e", git_repo="https://example.com/acme/site"))
    assert daemon.stop() == 0
    with closing(sqlite3.connect(tmp_path / "telemetry.sqlite")) as connection, connection:
        connection.execute("UPDATE agent_runs SET git_repo = 'https://user:s3cret@example.com/acme/site'")
    daemon = start_daemon()
    copy = tmp_path / "copy.sqlite"
    telemetryd("follow", daemon.url, "--once", "--db-path", copy)
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT git_repo FROM agent_runs").fetchall() == [("https://example.com/acme/site",)]
    assert daemon.stop() == 0
