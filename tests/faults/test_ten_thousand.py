"""Ten thousand realistic runs from fifty clients, with repeats, through a `kill -9`: each is there once."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from telemetryd.model.values import canonical_timestamp
from tests.conftest import Daemon, Row, StartDaemon, eventually
from tests.faults.ledger import Ledger
from tests.faults.load import Findings, count_server_errors, damage

RUNS = 10_000
CLIENTS = 50


def write_runs(path: Path, seed: int) -> None:
    """Write a file of realistic runs, one a line."""
    chance = random.Random(seed)
    agents = ["hugo-translator", "seo_intelligence.insight_engine", "crawler", "backup", "link-checker"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(RUNS):
            minute, succeeded = number // 60 % 60, chance.randrange(200)
            run = {
                "event_id": f"{chance.getrandbits(128):032x}",
                "run_id": f"20251224T10{minute:02d}{number % 60:02d}Z-{number:05d}",
                "agent_name": chance.choice(agents),
                "job_type": chance.choice(["translate_directory", "crawl", "report"]),
                "start_time": f"2025-12-24T{number // 3600 % 24:02d}:{minute:02d}:{number % 60:02d}Z",
                "status": chance.choice(["running", "success", "success", "success", "failed", "partial"]),
                "items_discovered": 200,
                "items_succeeded": succeeded,
                "items_failed": 200 - succeeded,
                "duration_ms": chance.randrange(10**6),
                "metrics_json": {"tokens": chance.randrange(10**5), "größe": chance.random()},
                "git_repo": "git@github.com:acme/site.git",
                "git_commit_hash": f"{chance.getrandbits(160):040x}",
                "host": f"worker-{number % 7}",
            }
            file.write(json.dumps(run, ensure_ascii=False) + "\n")


def packets(runs: list[Row], chance: random.Random) -> Iterator[list[Row]]:
    """Cut the runs into batches and singles, and send every tenth run twice."""
    sent = runs + chance.sample(runs, len(runs) // 10)
    chance.shuffle(sent)
    while sent:
        size = chance.choice([1, 1, 1, 20, 100])
        packet, sent = sent[:size], sent[size:]
        yield packet


async def send(url: str, pending: list[list[Row]], answers: Counter[str], stop_after: int | None = None) -> None:
    """Post every packet with fifty clients at once; what got no answer goes back into `pending`."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS)) as session:

        async def client() -> None:
            while pending and (stop_after is None or sum(answers.values()) < stop_after):
                packet = pending.pop()
                path, body = ("/batch", packet) if len(packet) > 1 else ("", packet[0])
                try:
                    async with session.post(f"{url}/api/v1/runs{path}", json=body) as response:
                        answer = await response.json()
                        assert response.status in (200, 201), (response.status, answer)
                except (aiohttp.ClientError, ConnectionError):
                    pending.append(packet)
                    return
                if path:
                    answers.update(created=answer["inserted"], duplicate=answer["duplicates"])
                    assert answer["errors"] == []
                else:
                    answers[answer["status"]] += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def read_everything(url: str) -> list[dict[str, Any]]:
    """Page through all runs by the Link header."""
    runs: list[dict[str, Any]] = []
    async with aiohttp.ClientSession(url) as session:
        path = "/api/v1/runs?limit=1000"
        while True:
            async with session.get(path) as response:
                assert response.status == 200
                runs += await response.json()
                if "next" not in response.links:
                    return runs
                path = str(URL(response.links["next"]["url"]).relative())


def expect(run: Row) -> Row:
    """What the daemon should answer for a run of the file."""
    status = {"failed": "failure"}.get(run["status"], run["status"])
    return {**run, "start_time": canonical_timestamp(run["start_time"]), "status": status}


async def compare(daemon: Daemon, runs: list[Row], findings: Findings) -> None:
    """Compare every field of every run with the file."""
    stored = await read_everything(daemon.url)
    by_id = {run["event_id"]: run for run in stored}
    if len(stored) > len(by_id):
        findings.note("duplicated", "runs are there twice", len(stored) - len(by_id))
    for run in runs:
        answer = by_id.pop(run["event_id"], None)
        if answer is None or {name: answer[name] for name in run} != expect(run):
            findings.note("lost", f"{run} is {answer}")
    assert not by_id, "runs that nobody sent"


async def check_queries(daemon: Daemon, runs: list[Row]) -> None:
    """Compare the queries and the metrics with the file."""
    async with aiohttp.ClientSession(daemon.url) as session:
        metrics = await (await session.get("/metrics")).json()
        assert metrics["total_runs"] == metrics["recent_24h"] == len(runs)
        assert metrics["agents"] == Counter(run["agent_name"] for run in runs)
        filters = {
            "agent_name": "crawler",
            "status": "failed",
            "start_time_from": "2025-12-24T01:00:00Z",
            "limit": "1000",
        }
        answer = await (await session.get("/api/v1/runs", params=filters)).json()
        assert {run["event_id"] for run in answer} == {
            run["event_id"]
            for run in runs
            if run["agent_name"] == "crawler" and run["status"] == "failed" and run["start_time"] >= "2025-12-24T01"
        }


@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
async def test_each_of_ten_thousand_runs_is_there_once(
    start_daemon: StartDaemon, tmp_path: Path, ledger: Ledger, journal_mode: str
) -> None:
    findings = Findings()
    write_runs(tmp_path / "runs.ndjson", seed=7)
    runs = [json.loads(line) for line in (tmp_path / "runs.ndjson").read_text("utf-8").splitlines()]
    chance = random.Random(8)
    everything = list(packets(runs, chance))

    # Half of it, then kill -9 in the middle of the load.
    first, answers = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode), Counter[str]()
    pending = everything.copy()
    sending = asyncio.create_task(send(first.url, pending, answers))
    await eventually(lambda: sum(answers.values()) >= RUNS // 2, timeout_s=60)
    first.process.send_signal(signal.SIGKILL)
    await sending
    first.wait()
    acknowledged = answers["created"]
    assert RUNS // 4 < acknowledged < RUNS

    # Everything again after the restart: nothing acknowledged is new, and nothing is stored twice.
    second = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
    again = Counter[str]()
    await send(second.url, everything.copy(), again)
    if (gone := again["created"] + acknowledged - RUNS) > 0:
        findings.note("lost", f"{gone} acknowledged runs were new again", gone)
    assert again["created"] + again["duplicate"] == RUNS + RUNS // 10
    await compare(second, runs, findings)
    await check_queries(second, runs)

    # A PATCH agrees as well, and so do the totals after it.
    changed = runs[17]
    async with aiohttp.ClientSession(second.url) as session:
        body = {"status": "cancelled", "items_failed": 5}
        answer = await (await session.patch(f"/api/v1/runs/{changed['event_id']}", json=body)).json()
        assert answer == {
            "event_id": changed["event_id"],
            "updated": True,
            "fields_updated": ["status", "items_failed"],
        }
    runs[17] = {**changed, **body}
    await compare(second, runs, findings)
    await check_queries(second, runs)
    assert second.stop() == 0
    with closing(sqlite3.connect(second.database)) as database:
        for problem in damage(database):
            findings.note("unrecovered", problem)
    ledger.record(
        fault="SIGKILL in the middle of ten thousand runs, then all of them again",
        mode=journal_mode,
        rounds=1,
        acknowledged=RUNS,
        server_errors=count_server_errors([*first.lines, *second.lines]),
        **findings.figures(),
    )
