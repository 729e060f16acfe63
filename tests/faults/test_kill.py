"""SIGKILL at a random moment under mixed load: whatever was acknowledged is there, once, as acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sqlite3
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import Daemon, StartDaemon, eventually, make_run

_STATUSES = ("running", "success", "failure", "partial", "timeout", "cancelled")
_CLIENTS = 12


@dataclass
class Expected:
    """What one event may look like in the database."""

    run: dict[str, Any]
    stored: bool
    """Acknowledged, hence there; otherwise it may be there or not."""
    values: set[tuple[str, int]]
    """The status and duration that were acknowledged last, and those sent since without an answer."""


@dataclass
class Journal:
    """What the clients of one round sent, and what they were told."""

    events: dict[str, Expected] = field(default_factory=dict)
    batches: list[list[str]] = field(default_factory=list)
    acknowledged: int = 0


class Client:
    """Sends one request after the other until there is no answer; its events are touched by nobody else."""

    def __init__(self, url: str, journal: Journal, seed: int) -> None:
        self._url = url
        self._journal = journal
        self._random = random.Random(seed)
        self._own: list[Expected] = []

    async def run(self, session: aiohttp.ClientSession) -> None:
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, json.JSONDecodeError):
            while True:
                await self._random.choice((self._create, self._batch, self._update, self._repeat))(session)

    async def _create(self, session: aiohttp.ClientSession) -> None:
        (expected,) = self._new(1)
        if await self._send(session, "POST", "", expected.run) is not None:
            self._acknowledge([expected])

    async def _batch(self, session: aiohttp.ClientSession) -> None:
        batch = self._new(self._random.randint(2, 60))
        self._journal.batches.append([expected.run["event_id"] for expected in batch])
        answer = await self._send(session, "POST", "/batch", [expected.run for expected in batch])
        if answer is not None:
            assert answer["inserted"] == len(batch)
            self._acknowledge(batch)

    async def _update(self, session: aiohttp.ClientSession) -> None:
        known = [expected for expected in self._own if expected.stored]
        if not known:
            return
        expected = self._random.choice(known)
        change = self._random.choice(_STATUSES), self._random.randrange(1_000_000)
        expected.values.add(change)
        body = {"status": change[0], "duration_ms": change[1]}
        if await self._send(session, "PATCH", f"/{expected.run['event_id']}", body) is not None:
            expected.values = {change}
            self._journal.acknowledged += 1

    async def _repeat(self, session: aiohttp.ClientSession) -> None:
        if self._own:
            expected = self._random.choice(self._own)
            answer = await self._send(session, "POST", "", expected.run)
            if answer is not None:
                assert answer["status"] == ("duplicate" if expected.stored else "created")
                self._acknowledge([expected])

    def _new(self, count: int) -> list[Expected]:
        made = []
        for _ in range(count):
            run = make_run(
                agent_name=f"agent-{self._random.randrange(5)}",
                job_type=f"job-{self._random.randrange(3)}",
                status=self._random.choice(_STATUSES),
                duration_ms=self._random.randrange(1_000_000),
                output_summary="x" * self._random.randrange(2000),
                created_at=f"2026-01-01T00:{self._random.randrange(60):02}:00Z",
            )
            made.append(Expected(run, stored=False, values={(run["status"], run["duration_ms"])}))
        self._journal.events |= {expected.run["event_id"]: expected for expected in made}
        self._own += made
        return made

    def _acknowledge(self, events: list[Expected]) -> None:
        for expected in events:
            expected.stored = True
        self._journal.acknowledged += 1

    async def _send(self, session: aiohttp.ClientSession, method: str, path: str, body: object) -> Any:
        async with session.request(method, f"{self._url}/api/v1/runs{path}", json=body) as response:
            text = await response.text()
            assert response.status in (200, 201), text
            return json.loads(text)


async def run_load(url: str, journal: Journal, seed: int, end: Awaitable[None]) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session:
        clients = [
            asyncio.create_task(Client(url, journal, seed * _CLIENTS + number).run(session))
            for number in range(_CLIENTS)
        ]
        await end
        await asyncio.gather(*clients)


def check(path: Path, journal: Journal, known: set[str]) -> set[str]:
    """Compare the database with what was acknowledged; return every event_id in it."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    with contextlib.closing(connection):
        connection.execute("PRAGMA query_only = ON")
        assert [tuple(row) for row in connection.execute("PRAGMA integrity_check")] == [("ok",)]
        names = [row[0] for row in connection.execute("SELECT event_id FROM agent_runs NOT INDEXED")]
        found = set(names)
        assert len(names) == len(found), "an event is there twice"
        assert known <= found, "an event of an earlier round has gone"
        assert found <= known | journal.events.keys(), "an event that nobody sent"
        missing = {name for name, expected in journal.events.items() if expected.stored} - found
        assert not missing, f"{len(missing)} acknowledged events are lost"
        for name in journal.events.keys() & found:
            expected = journal.events[name]
            row = connection.execute("SELECT * FROM agent_runs WHERE event_id = ?", (name,)).fetchone()
            assert (row["status"], row["duration_ms"]) in expected.values
            for column in ("run_id", "agent_name", "job_type", "output_summary"):
                assert row[column] == expected.run[column]
        for batch in journal.batches:
            repeated = [name for name in batch if journal.events[name].stored]
            if not repeated:  # nobody was told anything: then all of it, or nothing
                assert len(found.intersection(batch)) in (0, len(batch))
        for counted, kept in (
            ("agent_name, job_type, status, count(*) FROM agent_runs GROUP BY 1, 2, 3", "* FROM run_totals"),
            ("substr(created_at, 1, 16), count(*) FROM agent_runs GROUP BY 1", "* FROM run_minutes"),
        ):
            real = {tuple(row) for row in connection.execute(f"SELECT {counted}")}
            assert real == {tuple(row) for row in connection.execute(f"SELECT {kept} WHERE runs > 0")}
    return found


async def _kill_after(daemon: Daemon, journal: Journal, moment: random.Random) -> None:
    enough = moment.randrange(1, 60)
    await eventually(lambda: journal.acknowledged >= enough, timeout_s=20)
    await asyncio.sleep(moment.random() * 0.2)
    daemon.process.send_signal(signal.SIGKILL)


async def _kill_rounds(start_daemon: StartDaemon, journal_mode: str, rounds: int) -> None:
    known: set[str] = set()
    acknowledged = 0
    for number in range(rounds):
        seed = random.randrange(1 << 30)
        daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
        journal = Journal()
        await run_load(daemon.url, journal, seed, _kill_after(daemon, journal, random.Random(seed)))
        assert daemon.wait()[0] == -signal.SIGKILL
        acknowledged += journal.acknowledged
        again = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
        assert again.url
        try:
            known = check(daemon.database, journal, known)
        except AssertionError as error:
            error.add_note(f"round {number}, seed {seed}")
            raise
        again.stop(signal.SIGKILL if number % 2 else signal.SIGTERM)
    assert acknowledged > rounds * 5


@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
async def test_kill_under_load_three_times(start_daemon: StartDaemon, journal_mode: str) -> None:
    await _kill_rounds(start_daemon, journal_mode, 3)


@pytest.mark.slow
@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
async def test_kill_under_load_a_hundred_times(start_daemon: StartDaemon, journal_mode: str) -> None:
    await _kill_rounds(start_daemon, journal_mode, 100)
