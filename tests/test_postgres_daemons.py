"""Two daemons as processes on one PostgreSQL database: a client of either cannot tell that there are two."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from telemetryd.engine.postgres.schema import CLASS, COMMITS
from telemetryd.model.chores import Chore
from telemetryd.store import Store
from tests.conftest import Daemon, Row, eventually, make_run, wait_until
from tests.event_stream import Reader, events_of
from tests.postgres_cluster import Cluster
from tests.test_alerts import QUIET, receiving, write_rules
from tests.test_postgres_faults import opened, settings_of
from tests.tools.process import telemetryd
from tests.tools.tcp_proxy import Cut, proxy_to

pytestmark = pytest.mark.postgresql


class Daemons:
    """What starts daemons on one database."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self.started: list[Daemon] = []

    def start(self, url: str = "", **variables: str) -> Daemon:
        """Start one more."""
        folder = self._folder / f"daemon-{len(self.started)}"
        folder.mkdir()
        given = {"TELEMETRY_DB_URL": url or self._url, "TELEMETRY_DB_SYNC": "none", "TELEMETRY_DB_POLL_MS": "20"}
        self.started.append(Daemon(folder, prefix=(), pass_fds=(), **given, **variables))
        return self.started[-1]


@pytest.fixture
def daemons(tmp_path: Path, postgres_database: str) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, postgres_database)
    yield daemons
    for daemon in daemons.started:
        daemon.close()


@pytest.fixture
async def session() -> Any:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        yield session


async def send(session: aiohttp.ClientSession, daemon: Daemon, path: str, body: Any, method: str = "POST") -> int:
    """Send something, and return the status; repeat it while the daemon says that it cannot now."""
    while True:
        async with session.request(method, f"{daemon.url}/api/v1/runs{path}", json=body) as answer:
            if answer.status != 503:
                return answer.status
        await asyncio.sleep(0.05)


# --- Following ------------------------------------------------------------------------------------


async def test_a_stream_goes_on_at_the_other_daemon_without_a_gap_or_a_repeat(
    daemons: Daemons, session: aiohttp.ClientSession
) -> None:
    both = [daemons.start(), daemons.start()]
    got: list[tuple[str, Row]] = []
    total = 120

    async def write(place: int) -> None:
        for number in range(place, total, 2):
            assert await send(session, both[place], "", make_run(event_id=f"run-{number}")) == 201
            other = both[1 - place]
            assert await send(session, other, f"/run-{number}", {"status": "success"}, "PATCH") == 200

    async def read() -> None:
        last = "0"
        for place in itertools.cycle((0, 1)):
            url = f"{both[place].url}/api/v1/runs/stream"
            async with session.get(url, headers={"Last-Event-ID": last}) as answer:
                events = events_of(answer, Reader())
                for _ in range(7):
                    sent = await anext(events)
                    assert sent.event == "run"
                    last = sent.id
                    got.append((sent.id, sent.data))
                    if len({run["event_id"] for _, run in got if run["status"] == "success"}) == total:
                        return

    async with asyncio.timeout(60):
        await asyncio.gather(write(0), write(1), read())
    numbers = [int(cursor.rpartition("-")[2]) for cursor, _ in got]
    assert numbers == sorted(set(numbers))
    assert len({cursor.rpartition("-")[0] for cursor, _ in got}) == 1


def copied(copy: Path) -> tuple[set[tuple[str, str]], int]:
    with closing(sqlite3.connect(copy)) as file:
        runs = set(file.execute("SELECT event_id, status FROM agent_runs").fetchall())
        return runs, file.execute("SELECT count(*) FROM run_events").fetchall()[0][0]


async def test_follow_goes_on_at_the_other_daemon(
    daemons: Daemons, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    both = [daemons.start(), daemons.start()]
    copy = tmp_path / "copy.sqlite"
    expected: dict[str, str] = {}
    for turn in range(4):
        for number, daemon in enumerate(both):
            name = f"run-{turn}-{number}"
            await send(session, daemon, "", make_run(event_id=name, status="running"))
            await send(session, both[1 - number], f"/{name}/events", [{"event_type": "step"}])
            expected[name] = "running"
        if turn:
            await send(session, both[turn % 2], f"/run-{turn - 1}-0", {"status": "failure"}, "PATCH")
            expected[f"run-{turn - 1}-0"] = "failure"
        await asyncio.to_thread(
            telemetryd, "follow", both[turn % 2].url, "--db-path", copy, "--once", TELEMETRY_DB_JOURNAL_MODE="WAL"
        )
        assert copied(copy) == ({*expected.items()}, len(expected))


# --- What is done once ----------------------------------------------------------------------------


async def test_an_alert_is_delivered_once_by_whichever_daemon_leads(
    daemons: Daemons, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async with receiving() as receiver:
        rules = write_rules(tmp_path, receiver.url, QUIET.format("quiet"))
        both = [daemons.start(TELEMETRY_ALERTS_FILE=str(rules)) for _ in range(2)]
        long_ago = "2026-01-01T00:00:00Z"
        await send(session, both[1], "", make_run(agent_name="hugo-one", created_at=long_ago, status="success"))
        await eventually(lambda: len(receiver.got) == 1)
        await asyncio.sleep(2.5)  # both have looked again
        assert [message["subject"]["agent_name"] for message in receiver.got] == ["hugo-one"]
        for daemon in both:
            async with session.get(f"{daemon.url}/api/v1/alerts") as answer:
                assert [rule["state"] for rule in (await answer.json())["rules"]] == ["firing"]
        (leader,) = [daemon for daemon in both if any(line["message"] == "Alert firing" for line in daemon.lines)]
        leader.stop(signal.SIGKILL)
        (left,) = [daemon for daemon in both if daemon is not leader]
        await send(session, left, "", make_run(agent_name="hugo-two", created_at=long_ago, status="success"))
        await eventually(lambda: len(receiver.got) == 2)
        await asyncio.sleep(2.5)
        assert [message["subject"]["agent_name"] for message in receiver.got] == ["hugo-one", "hugo-two"]


async def test_a_daemon_that_is_not_told_of_a_chore_keeps_no_other_from_it(
    daemons: Daemons, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async with receiving() as receiver:
        first = daemons.start()
        assert first.url  # it leads what every daemon can
        rules = write_rules(tmp_path, receiver.url, QUIET.format("quiet"))
        daemons.start(TELEMETRY_ALERTS_FILE=str(rules))
        daemons.start(TELEMETRY_STALE_AFTER="1s")
        await send(session, first, "", make_run(agent_name="hugo-one", created_at="2026-01-01T00:00:00Z"))
        await send(session, first, "", make_run(event_id="stale", status="running"))
        await eventually(lambda: len(receiver.got) == 1)

        async def is_reaped() -> bool:
            async with session.get(f"{first.url}/api/v1/runs/stale") as answer:
                return bool((await answer.json())["status"] == "cancelled")

        await eventually(is_reaped)


async def test_a_daemon_that_resigns_leaves_the_lead_to_another(postgres_database: str) -> None:
    settings = settings_of(postgres_database, db_poll_ms=20)
    async with opened(settings) as first, opened(settings) as second:

        async def leads(store: Store) -> None:
            await eventually(lambda: store.leads(Chore.ALERTS))

        await leads(first)
        assert not second.leads(Chore.ALERTS)
        first.resign(Chore.ALERTS)
        await leads(second)
        assert not first.leads(Chore.ALERTS)
        assert first.leads(Chore.COUNTS)


# --- A daemon that stands still -------------------------------------------------------------------


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


_TURNS = f"""
    SELECT count(*) FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND (classid, objid) = ({CLASS}, {COMMITS})
"""


@pytest.mark.parametrize("event_id", ["same", "another"])
async def test_a_daemon_that_stands_still_in_the_turn_holds_nobody_up(
    daemons: Daemons, session: aiohttp.ClientSession, cluster: Cluster, postgres_database: str, event_id: str
) -> None:
    """To the server its transaction is neither idle nor under way, so no timeout ends it (PostgreSQL 15)."""
    name = postgres_database.partition("?")[0].rpartition("/")[2]
    with proxy_to(cluster.folder / ".s.PGSQL.5432") as proxy:
        held = daemons.start(f"postgresql://postgres@127.0.0.1:{proxy.port}/{name}")
        other = daemons.start(TELEMETRY_DB_COMMIT_TIMEOUT_S="5")
        assert [await send(session, daemon, "", make_run()) for daemon in (held, other)] == [201, 201]
        proxy.cut = Cut.HOLD
        waiting = asyncio.create_task(send(session, held, "", make_run(event_id="same")))
        await asyncio.to_thread(proxy.holds.wait, 60)
        await asyncio.to_thread(wait_until, lambda: cluster.execute(_TURNS) == [(1,)])
        with stopped(held):
            async with asyncio.timeout(20):
                assert await send(session, other, "", make_run(event_id=event_id)) == 201
        told = other.wait_for_line("A daemon that stood still in the middle of a transaction was cut off")
        assert told["session"] == f"telemetryd/{held.process.pid}/writer"
        assert await waiting == (200 if event_id == "same" else 201)
        async with session.get(f"{other.url}/api/v1/runs/same") as answer:
            assert answer.status == 200
