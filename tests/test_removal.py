"""Removal of a run, or of what its fields hold: gone everywhere, and overwritten in the database file."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import struct
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner

from telemetryd.cli import main
from telemetryd.cli.reach import session
from telemetryd.cli.target import Remote
from telemetryd.client.config import Config
from telemetryd.engine import budget
from telemetryd.engine.sqlite.statements import full_text, thinning
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.statements.removal import Removal
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.engine.sqlite.tools.check import examine
from telemetryd.model.commands import DeleteRun, RedactRun, Removed
from telemetryd.model.runs import REDACTABLE
from tests.conftest import Api, MakeApi, StartDaemon, eventually, make_run
from tests.contract.wire import RUNS, check_error, places, send
from tests.test_salvage import leaves
from tests.test_statements import NOW, random_row, store
from tests.test_upkeep import TOKEN, authorised, rows
from tests.tools.fill import make_database
from tests.tools.process import telemetryd

SECRET = "sk-live-Zq7Xw2LeakedSecret"


def leaky(**fields: Any) -> dict[str, Any]:
    texts = dict.fromkeys(("input_summary", "error_summary", "host"), f"before {SECRET} after")
    large = {"key": SECRET, "rest": ["x" * 3000, SECRET] * 5}  # so that it needs pages of its own
    return make_run(**{**texts, "error_details": SECRET * 1000, "context_json": large, **fields})


async def fill(api: Api, event_id: str = "leaky") -> None:
    runs = [make_run(status="success", duration_ms=5) for _ in range(20)]
    await api.batch([*runs, leaky(event_id=event_id, status="failure", duration_ms=70), make_run(duration_ms=9)])
    told = [{"event_type": "step", "payload": {"text": SECRET, "page": page}} for page in range(30)]
    await api.call("POST", f"{RUNS}/{event_id}/events", json=told, status=201)


async def everything(api: Api) -> Iterator[tuple[str, str]]:
    """What everybody who may read is answered."""
    answers = []
    for path in (RUNS, f"{RUNS}/export?include=events", "/api/v1/changes?after=0&events_after=0", "/metrics",
                 "/api/v1/stats?group_by=agent_name,job_type,status", f"{RUNS}?q={SECRET[-12:]}"):  # fmt: skip
        async with api.client.get(path) as response:
            assert response.status == 200, await response.text()
            answers.append((path, await response.text()))
    return iter(answers)


async def test_a_deleted_run_is_gone_everywhere(make_api: MakeApi) -> None:
    api = await authorised(make_api, full_text=True)
    await fill(api)
    runs = (await api.get("/api/v1/stats"))["groups"][0]["runs"]
    newest = (await api.get("/api/v1/changes"))["newest"]
    answer = await send(api, "DELETE", f"{RUNS}/leaky")
    assert (answer.status, answer.json) == (200, {"event_id": "leaky", "deleted": True, "events": 30})
    assert "telemetry-flow" in answer.headers
    for path, text in await everything(api):
        assert "leaky" not in text or "changes" in path
        assert SECRET not in text, path
    check_error(await send(api, "GET", f"{RUNS}/leaky"), 404)
    assert (await api.get(f"/api/v1/changes?after={newest}"))["changes"] == [{"seq": newest + 1, "deleted": "leaky"}]
    assert (await api.get("/api/v1/stats"))["groups"][0]["runs"] == runs - 1
    assert check_error(await send(api, "DELETE", f"{RUNS}/leaky"), 404) == "Run not found: leaky"
    assert (await api.post(make_run(event_id="leaky")))["status"] == "created"
    assert await api.get(f"{RUNS}/leaky/events") == []
    assert [finding.text for finding in examine(api.settings.db_path) if finding.check != "space"] == []


async def test_redacted_fields_are_gone_everywhere_and_the_run_stays(make_api: MakeApi) -> None:
    api = await authorised(make_api, full_text=True)
    await fill(api)
    before = await api.get(f"{RUNS}/leaky")
    stats = await api.get("/api/v1/stats?group_by=status")
    seen = await api.get("/api/v1/changes?events_after=0")
    fields = ["input_summary", "error_summary", "host", "error_details", "context_json"]
    body = {"event_id": "leaky", "fields": fields, "events": True}
    answer = await api.call("POST", "/api/v1/admin/redact", json=body, status=200)
    assert answer == {"event_id": "leaky", "redacted": fields, "events": 30}
    for path, text in await everything(api):
        assert SECRET not in text, path
    run = await api.get(f"{RUNS}/leaky")
    assert run == {**before, **dict.fromkeys(fields), "updated_at": run["updated_at"]}
    assert run["updated_at"] > before["updated_at"]
    assert (await api.get("/api/v1/stats?group_by=status"))["groups"] == stats["groups"]
    # Who follows gets the run, and each event in the place of the one that it knows.
    news = await api.get(f"/api/v1/changes?after={seen['last']}&events_after={seen['events'][-1]['id']}")
    assert [change["run"]["event_id"] for change in news["changes"]] == ["leaky"]
    assert [event["event_key"] for event in news["events"]] == [event["event_key"] for event in seen["events"]]
    assert {event["payload"] for event in news["events"]} == {None}
    # What is sent again is known.
    assert (await api.post(leaky(event_id="leaky"), status=200))["status"] == "duplicate"
    told = [{"event_type": "step", "payload": {"text": SECRET, "page": page}} for page in range(30)]
    assert (await api.call("POST", f"{RUNS}/leaky/events", json=told, status=201))["duplicates"] == 30
    assert (await api.call("POST", "/api/v1/admin/redact", json={**body, "fields": []}))["events"] == 0
    assert SECRET not in json.dumps(await api.get(f"{RUNS}/leaky?include=events"))
    assert [finding.text for finding in examine(api.settings.db_path) if finding.check != "space"] == []


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"event_id": "leaky", "fields": ["agent_name", "host"]}, ("body", "fields", 0)),
        ({"event_id": "leaky", "fields": ["no_such"]}, ("body", "fields", 0)),
        ({"event_id": "leaky"}, ("body",)),
        ({"event_id": "leaky", "fields": []}, ("body",)),
        ({"fields": ["host"]}, ("body", "event_id")),
        ({"event_id": "leaky", "fields": ["host"], "field": 1}, ("body", "field")),
    ],
)
async def test_a_redaction_names_what_it_cannot_do(make_api: MakeApi, body: object, place: tuple[Any, ...]) -> None:
    api = await authorised(make_api)
    assert places(check_error(await send(api, "POST", "/api/v1/admin/redact", json=body), 422)) == [place]
    unknown = {"event_id": "nobody", "fields": ["host"]}
    check_error(await send(api, "POST", "/api/v1/admin/redact", json=unknown), 404)


async def test_both_are_for_the_operator_only(make_api: MakeApi) -> None:
    api = await make_api()
    await api.post(make_run(event_id="stream"))
    requests = (("DELETE", f"{RUNS}/stream"), ("DELETE", f"{RUNS}/%73tream"), ("POST", "/api/v1/admin/redact"))
    for method, path in requests:
        assert "Admin endpoints need authentication" in check_error(await send(api, method, path, json={}), 403)
    assert check_error(await send(api, "DELETE", RUNS), 405)
    assert [run["event_id"] for run in await api.list(event_id="stream")] == ["stream"]


async def test_runs_whose_ids_are_routes_are_found_and_deleted(make_api: MakeApi) -> None:
    api = await authorised(make_api)
    ids = ["stream", "export", "batch", "a,b*c"]
    await api.batch([make_run(event_id=event_id) for event_id in [*ids, "other"]])
    assert [run["event_id"] for run in await api.list(event_id="stream,export,batch,nobody")] == ids[2::-1]
    assert [run["event_id"] for run in await api.get(f"{RUNS}?event_id=a%5C,b%5C*c&status=running")] == ids[3:]
    assert await api.get(f"{RUNS}?event_id=stream&status=success") == []
    for event_id in ids:
        assert (await send(api, "DELETE", f"{RUNS}/{event_id}")).status == 200
    assert [run["event_id"] for run in await api.list()] == ["other"]


async def test_a_run_with_very_many_events_goes_slice_by_slice(
    make_api: MakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thinning, "_EVENTS", 100)
    api = await authorised(make_api)
    await fill(api)
    told = [{"event_type": "step", "payload": {"page": page}} for page in range(100, 320)]
    await api.call("POST", f"{RUNS}/leaky/events", json=told, status=201)
    first = await api.store.submit(DeleteRun("leaky"))
    assert first is not None
    assert (first.events, first.more) == (100, True)
    assert (await api.call("DELETE", f"{RUNS}/leaky", status=200))["events"] == 150


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    """A database with a full-text index."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as opened:
        migrate.create(opened, NOW)
        full_text.at_once(opened, full_text.rebuild)
        yield opened


def test_removals_of_one_group_share_their_time_and_a_merge_and_clear_once(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_text, "_MERGED_PAGES", 1)
    monkeypatch.setattr(budget, "_SLICE_S", 0)
    texts = {"input_summary": SECRET, "error_details": " ".join(f"word{number}" for number in range(2_000))}
    source = Random(1)
    store(connection, [random_row(source, f"r{number}", **texts) for number in range(8)])
    steps: list[str] = []
    connection.set_trace_callback(lambda sql: steps.append(sql) if "'merge'" in sql else None)
    commands: list[Removal] = [DeleteRun(f"r{number}") for number in range(6)]
    commands.append(RedactRun("r6", ("input_summary", "error_details"), payloads=True))

    def carry_out(now: str) -> list[Removed | None]:
        steps.clear()
        connection.execute("BEGIN")
        transaction = Transaction(connection, now)
        outcomes = transaction.apply([replace(command, again=now != "1") for command in commands])
        transaction.finish()
        connection.execute("COMMIT")
        return outcomes

    def changes() -> list[Any]:
        return connection.execute("SELECT seq, run FROM run_changes ORDER BY seq").fetchall()

    assert carry_out("1") == [Removed(0, more=True)] * 7
    assert len(steps) == 1
    numbers = changes()
    assert len(numbers) == 7
    assert carry_out("2") == [Removed(0, more=True)] * 7
    assert (len(steps), changes()) == (1, numbers)
    # What is written meanwhile goes as well, with a merge that begins anew.
    connection.execute("UPDATE agent_runs SET output_summary = ? WHERE event_id = 'r0'", (SECRET,))
    assert carry_out("3") == [Removed(0, more=True)] * 7
    assert [run for _, run in changes()] == [run for _, run in [*numbers[1:], numbers[0]]]
    assert "-1" in steps[0]
    monkeypatch.setattr(budget, "_SLICE_S", 60)
    assert carry_out("4") == [Removed(0, more=False)] * 7
    found = connection.execute("SELECT event_id, input_summary, updated_at FROM agent_runs ORDER BY id").fetchall()
    assert found[0] == ("r6", None, "1")
    assert [row[:2] for row in found] == [("r6", None), ("r7", SECRET)]
    assert carry_out("5")[:6] == [None] * 6


@pytest.mark.parametrize(
    ("how", "mode", "is_indexed"),
    [("delete", "DELETE", False), ("redact", "DELETE", True), ("delete", "WAL", True)],
)
async def test_the_space_of_the_text_is_overwritten(
    make_api: MakeApi, monkeypatch: pytest.MonkeyPatch, how: str, mode: str, *, is_indexed: bool
) -> None:
    """Nor does a table of the replaced service that was set aside, nor the full-text index, whose words are merged."""
    monkeypatch.setattr(full_text, "_MERGED_PAGES", 1)
    monkeypatch.setattr(budget, "_SLICE_S", 0)
    api = await authorised(make_api, db_journal_mode=mode, full_text=is_indexed)
    with closing(sqlite3.connect(api.settings.db_path)) as connection, connection:
        connection.execute("CREATE TABLE legacy_run_events (id INTEGER PRIMARY KEY, event_id TEXT, data TEXT)")
        connection.execute("INSERT INTO legacy_run_events (event_id, data) VALUES ('leaky', ?), ('x', 'y')", (SECRET,))
        connection.execute("CREATE TABLE legacy_other (id INTEGER PRIMARY KEY)")
    await fill(api)
    for number in range(20):
        await api.post(make_run(input_summary=" ".join(f"w{number}x{other}" for other in range(99))))
    await api.call("PATCH", f"{RUNS}/leaky", json={"output_summary": f"later {SECRET}"}, status=200)
    await api.call("PATCH", f"{RUNS}/leaky", json={"output_summary": "nothing"}, status=200)

    def kept() -> set[bytes]:
        """What the files hold: the text, or its last word, whose beginning pages of the index may leave out."""
        path = api.settings.db_path
        files = b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))
        return {text for text in (SECRET.encode(), SECRET.lower()[-12:].encode()) if text in files}

    assert len(kept()) == 1 + is_indexed
    if how == "delete":
        await api.call("DELETE", f"{RUNS}/leaky", status=200)
    else:
        body = {"event_id": "leaky", "fields": [*REDACTABLE], "events": True}
        await api.call("POST", "/api/v1/admin/redact", json=body, status=200)
    await eventually(lambda: not kept())  # the write-ahead log as soon as nobody writes
    assert rows(api.settings.db_path, "SELECT event_id FROM legacy_run_events") == [("x",)]
    assert [finding.text for finding in examine(api.settings.db_path) if finding.check == "full text"] == []


def test_a_vacuum_leaves_no_remains_in_gaps_of_pages(tmp_path: Path) -> None:
    """Nothing else does: SQLite leaves them where it moves rows between pages. A backup copies them."""
    path = make_database(tmp_path / "telemetry.sqlite", 200)
    with path.open("r+b") as file:
        for page in leaves(path, "agent_runs"):
            file.seek(start := (page - 1) * 4096)
            cells, content = struct.unpack(">3xHH", file.read(7))
            gap = range(8 + 2 * cells, content)
            if len(gap) >= len(SECRET):
                file.seek(start + gap.stop - len(SECRET))
                file.write(SECRET.encode())
    runs = rows(path, "SELECT * FROM agent_runs")
    with closing(sqlite3.connect(path)) as connection, closing(sqlite3.connect(tmp_path / "copy")) as copy:
        connection.backup(copy)
        assert SECRET.encode() in (tmp_path / "copy").read_bytes()
        connection.execute("VACUUM")
    assert SECRET.encode() not in path.read_bytes()
    assert rows(path, "SELECT * FROM agent_runs") == runs
    assert rows(path, "PRAGMA auto_vacuum") == [(2,)]
    assert examine(path) == []


async def test_a_stream_that_is_not_read_sends_nothing_that_was_removed(make_api: MakeApi) -> None:
    api = await authorised(make_api)
    async with api.client.get(f"{RUNS}/stream") as response:
        await response.content.readany()
        runs = [leaky(event_id=f"leaky-{number}", output_summary="x" * 200_000) for number in range(40)]
        for run in runs:
            await api.post(run)
        for run in runs:
            await api.call("DELETE", f"{RUNS}/{run['event_id']}", status=200)
        await api.post(make_run(event_id="last"))
        seen = b""
        async with asyncio.timeout(30):
            while b"last" not in seen:
                seen += await response.content.readany()
    assert seen.count(SECRET.encode()) < len(runs) * 1000  # those that were on their way already


async def test_the_command_reaches_exactly_the_run_that_is_named(make_api: MakeApi) -> None:
    """`telemetryd delete ..` asked for /api/v1/, which is no run."""
    api = await authorised(make_api)
    names = ("..", ".", "../runs", "a/b", "a%2Fb", "%2e%2e", "a?b#c", "a b+c", "é", "stream")
    for name in names:
        await api.post(make_run(event_id=name))
    async with session(Config(url=str(api.client.make_url("/")), token=TOKEN)) as request:
        for done, name in enumerate(names, 1):
            assert (await Remote(request).delete(name))["event_id"] == name
            assert {run["event_id"] for run in await api.list()} == {*names[done:]}
    for blank in ("", " "):
        for command in (("delete", blank), ("redact", blank, "host")):
            assert "no run has a blank event_id" in CliRunner().invoke(main, command).stderr


def ask(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    return telemetryd(*arguments, status=status, TELEMETRY_API_AUTH_TOKEN=TOKEN)


def test_the_commands_reach_the_daemon_the_database_and_a_follower(start_daemon: StartDaemon, tmp_path: Path) -> None:
    authentication = {"TELEMETRY_API_AUTH_ENABLED": "true", "TELEMETRY_API_AUTH_TOKEN": TOKEN}
    daemon = start_daemon(TELEMETRY_FULL_TEXT="true", **authentication)
    copy = tmp_path / "copy.sqlite"

    def follow() -> bytes:
        ask("follow", daemon.url, "--once", "--db-path", str(copy))
        return copy.read_bytes()

    for event_id in ("one", "two", "three"):
        told = [{"event_type": "step", "payload": {"text": SECRET}}]
        for path, body in ((RUNS, leaky(event_id=event_id)), (f"{RUNS}/{event_id}/events", told)):
            headers = {"Content-Type": "application/json", "X-API-Key": TOKEN}
            asked = urllib.request.Request(f"{daemon.url}{path}", json.dumps(body).encode(), headers)
            urllib.request.urlopen(asked, timeout=60).close()
    assert SECRET.encode() in follow()
    done = ask("delete", "one", "--url", daemon.url)
    assert done.stdout == "one deleted with 1 event\n"
    redacted = ask("redact", "two", *REDACTABLE, "--events", "--url", daemon.url, "--json")
    assert json.loads(redacted.stdout)["events"] == 1
    assert "Run not found: one" in ask("delete", "one", "--url", daemon.url, status=1).stderr
    assert "agent_name" in ask("redact", "two", "agent_name", "--url", daemon.url, status=2).stderr
    assert "--events" in ask("redact", "two", "--url", daemon.url, status=2).stderr
    assert daemon.stop() == 0
    assert ask("delete", "three", "--db-path", str(daemon.database)).stdout == "three deleted with 1 event\n"
    assert rows(daemon.database, "SELECT event_id, host FROM agent_runs") == [("two", None)]
    assert rows(daemon.database, "SELECT count(*) FROM sqlite_master WHERE name = 'runs_text'") == [(1,)]
    assert [finding.text for finding in examine(daemon.database) if finding.check == "full text"] == []
    daemon = start_daemon(**authentication)
    assert SECRET.encode() not in follow()
    assert rows(copy, "SELECT event_id, host FROM agent_runs") == [("two", None)]
    assert rows(copy, "SELECT payload FROM run_events") == [(None,)]
