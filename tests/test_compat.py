"""An agent written for the replaced library goes on after a change of its import."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from telemetryd import compat
from telemetryd.client import Client, old_variables
from telemetryd.compat import TelemetryClient, TelemetryConfig
from tests.conftest import Api, MakeApi, make_run

OLD_LINES = Path(__file__).parent / "old_files" / "events_20261130.ndjson"


@pytest.fixture
def config(api: Api, tmp_path: Path) -> TelemetryConfig:
    url = str(api.client.make_url("/")).rstrip("/")
    return TelemetryConfig(api_url=url, buffer_dir=tmp_path / "buffer", agent_owner="me", more={"linger_s": 0.01})


@pytest.fixture
def client(config: TelemetryConfig) -> Iterator[TelemetryClient]:
    made = TelemetryClient(config)
    yield made
    made._client.close(0.1)


async def stored(api: Api, client: TelemetryClient, run_id: str) -> dict[str, Any]:
    assert await asyncio.to_thread(client.flush, 60)
    (run,) = [run for run in await api.list(limit=1000) if run["run_id"] == run_id]
    found: dict[str, Any] = await api.get(f"/api/v1/runs/{run['event_id']}", params={"include": "events"})
    return found


async def test_explicit_start_and_end(api: Api, client: TelemetryClient) -> None:
    run_id = client.start_run("my_agent", "process_files", trigger_type="scheduler", product="words", insight_id="i-1")
    assert re.fullmatch(r"\d{8}T\d{6}Z-my_agent-[0-9a-f]{8}", run_id)
    begun = await stored(api, client, run_id)
    client.log_event(run_id, "checkpoint", {"step": 1})
    client.log_event(run_id, "plain")
    client.end_run(run_id, status="failed", items_succeeded=10, error_summary="no", metrics_json={"x": 1})
    ended = await stored(api, client, run_id)
    assert (begun["status"], begun["trigger_type"], begun["product"], begun["insight_id"]) == (
        "running",
        "scheduler",
        "words",
        "i-1",
    )
    assert (ended["status"], ended["items_succeeded"], ended["error_summary"]) == ("failure", 10, "no")
    assert ended["metrics_json"] == {"x": 1}
    assert ended["context_json"] == {"agent_owner": "me"}
    assert [(event["event_type"], event["payload"]) for event in ended["events"]] == [
        ("checkpoint", {"step": 1}),
        ("plain", None),
    ]


async def test_the_context_manager(api: Api, client: TelemetryClient) -> None:
    with client.track_run("my_agent", "process") as ctx:
        ctx.log_event("start", {"input": "data.csv"})
        ctx.set_metrics(items_discovered=10, items_succeeded=9, output_summary="fine", metrics_json='{"tokens": 5}')
    ended = await stored(api, client, ctx.run_id)
    assert (ended["status"], ended["trigger_type"], ended["items_succeeded"]) == ("success", "cli", 9)
    assert ended["metrics_json"]["tokens"] == 5
    with pytest.raises(ValueError, match="broken"), client.track_run("my_agent", "process") as failing:
        raise ValueError("broken")
    failed = await stored(api, client, failing.run_id)
    assert (failed["status"], failed["error_summary"]) == ("failure", "ValueError: broken")


async def test_a_run_of_another_process_is_a_warning(client: TelemetryClient, caplog: pytest.LogCaptureFixture) -> None:
    client.end_run("unknown")
    client.log_event("unknown", "x")
    assert [record.getMessage().count("unknown") for record in caplog.records] == [1, 1]


@pytest.mark.parametrize("odd", [None, float("nan"), "x", 10**30, [], {}], ids=repr)
def test_nonsense_is_a_warning(tmp_path: Path, free_port: int, caplog: pytest.LogCaptureFixture, odd: Any) -> None:
    client = TelemetryClient(TelemetryConfig(api_url=f"http://127.0.0.1:{free_port}", buffer_dir=tmp_path / "buffer"))
    assert client.cleanup_stale_runs("mine", odd) == 0
    client.end_run(odd)
    client.log_event(odd, "x")
    assert client.cleanup_stale_runs("\ud800", 1) == 0
    client.close()
    assert [repr(odd) in record.getMessage() for record in caplog.records[:3]] == [True] * 3


async def test_the_totals(api: Api, client: TelemetryClient) -> None:
    await api.post(make_run())
    stats = await asyncio.to_thread(client.get_stats)
    assert (stats["total_runs"], stats["client"]["recorded"]) == (1, 0)


def test_no_daemon_is_no_exception(tmp_path: Path, free_port: int) -> None:
    client = TelemetryClient(TelemetryConfig(api_url=f"http://127.0.0.1:{free_port}", buffer_dir=tmp_path / "buffer"))
    assert "error" in client.get_stats()
    assert client.cleanup_stale_runs("a", 1) == 0
    client.close()


async def test_stale_runs_are_cancelled_as_the_guide_does_it(make_api: MakeApi, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    moment = now - timedelta(hours=3)
    api = await make_api(clock=lambda: moment)
    url = str(api.client.make_url("/")).rstrip("/")
    client = TelemetryClient(TelemetryConfig(api_url=url, buffer_dir=tmp_path / "buffer"))
    stale = [make_run(agent_name="mine", created_at=moment.isoformat()) for _ in range(7)]
    await api.batch(stale)
    await api.batch([make_run(agent_name="theirs", created_at=moment.isoformat())])
    moment = now
    await api.batch([make_run(agent_name="mine") for _ in range(2)])
    await api.call("PATCH", f"/api/v1/runs/{stale[0]['event_id']}", json={"duration_ms": 5})
    own = client.start_run("mine", "j", created_at=(now - timedelta(hours=3)).isoformat())
    await stored(api, client, own)
    assert await asyncio.to_thread(client.cleanup_stale_runs, "mine", 1) == 6
    cancelled = await api.get("/api/v1/runs", params={"status": "cancelled"})
    assert {run["event_id"] for run in cancelled} == {run["event_id"] for run in stale[1:]}
    assert cancelled[0]["error_summary"].startswith("Stale run cleaned up on startup (created at 20")
    assert cancelled[0]["output_summary"] == "Process did not complete - cleanup on restart"
    assert await asyncio.to_thread(client.cleanup_stale_runs, "mine", 1) == 0
    client._client.close(0.1)


def test_the_configuration_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TELEMETRY_API_URL", "http://somewhere:1")
    monkeypatch.setenv("TELEMETRY_BUFFER_DIR", str(tmp_path / "b"))
    monkeypatch.setenv("TELEMETRY_API_AUTH_TOKEN", "a-token")
    monkeypatch.setenv("AGENT_OWNER", "me")
    monkeypatch.setenv("AGENT_METRICS_DIR", str(tmp_path))
    config = TelemetryConfig.from_env()
    assert config.validate() == (True, [])
    assert (config.metrics_dir, config.ndjson_dir, config.api_url) == (tmp_path, tmp_path / "raw", "http://somewhere:1")
    assert config.database_path == tmp_path / "db" / "telemetry.sqlite"
    made = TelemetryClient()._client.config
    assert (made.url, made.token, made.send, made.folder) == ("http://somewhere:1", "a-token", True, tmp_path / "b")
    valid, problems = TelemetryConfig(api_url="nonsense").validate()
    assert not valid
    assert "nonsense" in problems[0]


@pytest.mark.parametrize(
    "given", [None, {"api_enabled": False, "google_sheets_api_enabled": False}], ids=["variable", "field"]
)
async def test_what_was_about_google_sheets_does_not_stop_sending_and_is_reported_once(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: Any
) -> None:
    url = str(api.client.make_url("/")).rstrip("/")
    monkeypatch.delenv("TELEMETRY_API_URL", raising=False)
    monkeypatch.setenv("METRICS_API_URL", url)
    monkeypatch.setenv("METRICS_API_ENABLED", "false")
    monkeypatch.setenv("TELEMETRY_BUFFER_DIR", str(tmp_path / "buffer"))
    old_variables._said.clear()
    clients = [TelemetryClient(TelemetryConfig(api_url=url, **given) if given else None) for _ in range(2)]
    run_id = clients[0].start_run("a", "j")
    clients[0].end_run(run_id)
    assert (await stored(api, clients[0], run_id))["status"] == "success"
    (remark,) = [record.getMessage() for record in caplog.records]
    assert remark.startswith("METRICS_API_ENABLED has no effect: the export to Google Sheets is gone")
    for client in clients:
        client.close()


def test_the_signatures_are_those_that_agents_use() -> None:
    def parameters(name: str) -> list[str]:
        return [str(p).partition(":")[0] for p in inspect.signature(getattr(TelemetryClient, name)).parameters.values()]

    assert parameters("start_run") == ["self", "agent_name", "job_type", "trigger_type", "**kw"]
    assert parameters("track_run") == ["self", "agent_name", "job_type", "trigger_type", "**kw"]
    assert parameters("end_run") == ["self", "run_id", "status", "**kw"]
    assert parameters("log_event") == ["self", "run_id", "event_type", "payload"]
    assert parameters("cleanup_stale_runs") == ["self", "agent_name", "stale_threshold_hours"]
    assert parameters("get_stats") == parameters("get_run_id_metrics") == parameters("log_run_id_metrics") == ["self"]
    assert parameters("associate_commit") == [
        "self", "run_id", "commit_hash", "commit_source", "commit_author", "commit_timestamp",
    ]  # fmt: skip


def test_every_public_name_is_there() -> None:
    names = {"TelemetryClient", "RunContext", "TelemetryConfig", "RunRecord", "RunEvent", "APIPayload"}
    assert {*compat.__all__} == names | {"SCHEMA_VERSION"}
    assert compat.SCHEMA_VERSION == 7
    fields = (
        "metrics_dir, database_path, ndjson_dir, api_url, google_sheets_api_url, google_sheets_api_enabled, api_token, "
        "api_enabled, retry_backoff_factor, agent_owner, test_mode, skip_validation"
    )
    assert ", ".join(TelemetryConfig.__dataclass_fields__).startswith(fields)


def test_the_records_are_those_of_the_old_files() -> None:
    lines = [json.loads(line) for line in OLD_LINES.read_text().splitlines()]
    kinds: dict[str, Any] = {"run": compat.RunRecord, "event": compat.RunEvent}
    for line in lines:
        made = kinds[line["record_type"]].from_dict({**line, "unknown": 1})
        assert made.to_dict() == json.loads(made.to_json()) == line
    run = compat.RunRecord("r", "a", "j", "cli", "2025-12-24T10:00:00Z")
    assert (run.status, run.schema_version, len(run.event_id)) == ("running", 7, 36)


def test_what_has_no_meaning_any_more_warns_once_and_says_what_replaces_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_variables._said.clear()
    monkeypatch.setenv("DATABASE_URL", "postgres://user:secret@host/db")
    monkeypatch.setenv("TELEMETRY_SYNC_BATCH_SIZE", "100")
    for _ in range(2):
        Client("http://127.0.0.1:9", buffer_dir=tmp_path / "b", send=False).close()
    assert [record.getMessage().split()[0] for record in caplog.records] == ["TELEMETRY_SYNC_BATCH_SIZE"]
    caplog.clear()
    given: dict[str, Any] = {
        "metrics_dir": tmp_path, "database_path": tmp_path / "t.sqlite", "ndjson_dir": tmp_path / "raw",
        "google_sheets_api_url": "https://sheets", "google_sheets_api_enabled": True, "api_token": "secret",
        "api_enabled": True, "retry_backoff_factor": 2.0, "test_mode": "mock", "skip_validation": True,
    }  # fmt: skip
    for _ in range(2):
        config = TelemetryConfig(**given, buffer_dir=tmp_path / "b", more={"send": False})
        client = TelemetryClient(config)
        assert client._client.config.token is None  # it was the one of Google Sheets
        client.close()
        payload = compat.APIPayload.from_run_record(compat.RunRecord("r", "a", "j", "cli", "2025-12-24T10:00:00Z"))
        assert payload.to_dict()["agent_name"] == "a"
        assert "end_time" not in payload.to_dict()
    said = [record.getMessage() for record in caplog.records]
    named = [text.partition(" has no effect")[0] for text in said]
    assert named == ["DATABASE_URL", *(f"TelemetryConfig({name}=…)" for name in given), "APIPayload"]
    assert "secret" not in str(said)


async def test_run_ids_are_checked_and_counted(client: TelemetryClient) -> None:
    assert client.start_run("a", "j", run_id="given-1") == "given-1"
    assert re.fullmatch("given-1-duplicate-[0-9a-f]{8}", client.start_run("a", "j", run_id="given-1"))
    for wrong in ("", "  ", "x" * 256, "a/b", "a\\b", "nul\0"):
        run_id = client.start_run("a", "j", run_id=wrong)
        assert re.fullmatch(r"\d{8}T\d{6}Z-a-[0-9a-f]{8}", run_id)
        client.end_run(run_id)
    with client.track_run("a", "j", run_id="given-2") as run:
        assert run.run_id == "given-2"
    counted = client.get_run_id_metrics()
    assert counted["run_id_metrics"] == {
        "custom_accepted": 3,
        "generated": 6,
        "rejected": {"empty": 2, "too_long": 1, "invalid_chars": 3, "total": 6},
        "duplicates_detected": 1,
        "total_runs": 9,
        "custom_percentage": 33.33,
    }
    assert counted["timestamp"].endswith("Z")
    client.log_run_id_metrics()
    assert (await asyncio.to_thread(client.get_stats))["run_id_metrics"] == counted["run_id_metrics"]
    assert await asyncio.to_thread(client.flush, 20)


async def test_a_commit_is_associated_with_a_run_that_goes_on_has_ended_or_is_another_processs(
    api: Api, client: TelemetryClient, config: TelemetryConfig
) -> None:
    author = {"commit_author": "me <me@x>", "commit_timestamp": "2025-12-24T10:00:00Z"}
    theirs = make_run(run_id="their, run")
    await api.post(theirs)
    run_id = client.start_run("a", "j")
    assert (await asyncio.to_thread(client.associate_commit, run_id, "abc1234", "llm", **author))[0]
    client.end_run(run_id)
    done, message = await asyncio.to_thread(client.associate_commit, run_id, "abcd12345", "ci")
    assert (done, message) == (True, f"Commit abcd12345 associated with run {run_id}")
    assert await asyncio.to_thread(client.associate_commit, "their, run", "abc1234", "manual") == (
        True, "Commit abc1234 associated with run their, run",
    )  # fmt: skip
    mine = await stored(api, client, run_id)
    assert (mine["git_commit_hash"], mine["git_commit_source"], mine["git_commit_author"]) == (
        "abcd12345", "ci", "me <me@x>",
    )  # fmt: skip
    assert (await asyncio.to_thread(client.associate_commit, run_id, "abc1234", "nobody"))[0] is False
    for odd in (None, 5, "unknown", "\ud800"):
        done, message = await asyncio.to_thread(client.associate_commit, odd, odd, odd)  # type: ignore[arg-type]
        assert (done, message.startswith("[ERROR] ")) == (False, True)


def test_the_next_page_is_found_behind_a_proxy_that_shows_another_path() -> None:
    for prefix in ("", "/telemetry"):
        link = f'<{prefix}/api/v1/runs?limit=2&cursor=x>; rel="next"'
        assert compat._next_page(link, "/api/v1/runs") == "/api/v1/runs?limit=2&cursor=x"
    assert compat._next_page("", "/api/v1/runs") is None
