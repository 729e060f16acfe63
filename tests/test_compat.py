"""An agent written for the replaced library goes on after a change of its import."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from telemetryd import compat
from telemetryd.compat import TelemetryClient, TelemetryConfig
from tests.conftest import Api, MakeApi, make_run


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
    config = TelemetryConfig.from_env()
    assert config.validate() == (True, [])
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
    compat._remark_on_sheets.cache_clear()
    clients = [TelemetryClient(TelemetryConfig(api_url=url, **given) if given else None) for _ in range(2)]
    run_id = clients[0].start_run("a", "j")
    clients[0].end_run(run_id)
    assert (await stored(api, clients[0], run_id))["status"] == "success"
    (remark,) = [record.getMessage() for record in caplog.records]
    assert "Google Sheets is gone: METRICS_API_ENABLED has no effect" in remark
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
