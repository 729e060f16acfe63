"""Health, metrics, metadata, the OpenAPI document and the page of /docs, sentence by sentence."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

import telemetryd
from telemetryd.engine.sqlite.statements.runs import fetch_counts
from telemetryd.model.queries import CountRuns
from telemetryd.model.runs import PATCHABLE, STORED
from tests.conftest import Api, MakeApi, eventually, make_run
from tests.contract.test_runs import FULL
from tests.contract.wire import BATCH, RUNS, check_error, is_in_hand, send
from tests.engines import patience

# --- Health --------------------------------------------------------------------------------------


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("journal_mode", "synchronous", "durable"),
    [
        ("DELETE", "FULL", True),
        ("WAL", "FULL", True),
        ("WAL", "NORMAL", False),
        ("WAL", "EXTRA", True),
        ("TRUNCATE", "FULL", True),
    ],
)
async def test_health_tells_the_modes(make_api: MakeApi, journal_mode: str, synchronous: str, durable: bool) -> None:
    api = await make_api(db_journal_mode=journal_mode, db_synchronous=synchronous)
    answer = await send(api, "GET", "/health")
    assert answer.status == 200
    health = answer.json
    assert health["status"] == "ok"
    assert health["version"] == telemetryd.__version__
    assert health["db_path"] == str(api.settings.db_path)
    assert health["journal_mode"] == journal_mode
    assert health["synchronous"] == synchronous
    assert health["durable"] is durable
    assert ("not a power cut" in health["durability"]) is not durable
    assert health["queue_depth"] == 0


async def test_health_never_waits_on_the_queue(make_api: MakeApi, engine: str) -> None:
    api = await make_api(**patience(engine))
    with api.locked():
        writing = [asyncio.create_task(send(api, "POST", RUNS, json=make_run()))]
        await eventually(lambda: is_in_hand(api))
        writing += [asyncio.create_task(send(api, "POST", RUNS, json=make_run())) for _ in range(4)]
        await eventually(lambda: api.store.health().queue_depth == 4)
        started = time.monotonic()
        health = (await send(api, "GET", "/health")).json
        assert time.monotonic() - started < 20
        assert health["status"] == "ok"
        assert health["queue_depth"] == 4
        assert not any(task.done() for task in writing)
    assert {(await task).status for task in writing} == {201}


@pytest.mark.sqlite
async def test_health_is_503_with_the_reason_when_the_database_is_gone(
    make_api: MakeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api = await make_api()
    api.settings.db_path.rename(tmp_path / "elsewhere.sqlite")
    await eventually(lambda: api.store.health().problem is not None)
    answer = await send(api, "GET", "/health")
    assert answer.status == 503
    assert answer.json["status"] == "error"
    assert str(api.settings.db_path) in answer.json["detail"]
    assert "deleted or replaced" in answer.json["detail"]
    assert caplog.records[-1].getMessage() == f"Error in /health: {answer.json['detail']}"


async def test_writes_are_503_when_the_writer_has_stopped(make_api: MakeApi) -> None:
    api = await make_api()
    await api.post(make_run())
    await api.store._writer.stop()
    answer = await send(api, "POST", RUNS, json=make_run())
    check_error(answer, 503)
    assert int(answer.headers["retry-after"]) >= 1


# --- Metrics -------------------------------------------------------------------------------------


PROMETHEUS_SERVER = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
AXIOS = "application/json, text/plain, */*"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
JSON_ACCEPTS = [None, "*/*", "application/json", "text/html", AXIOS, BROWSER, "", "text/plain;q=0", "text"]


@pytest.mark.parametrize("accept", [*JSON_ACCEPTS, "text/plain;q=0.1, application/json"])
async def test_metrics_as_json(api: Api, engine: str, accept: str | None) -> None:
    await api.batch([*(make_run(agent_name="hugo") for _ in range(3)), make_run(agent_name="seo")])
    answer = await send(api, "GET", "/metrics", headers={"Accept": accept} if accept is not None else {})
    assert answer.headers["content-type"] == "application/json"
    metrics = answer.json
    assert metrics["total_runs"] == 4
    assert metrics["agents"] == {"hugo": 3, "seo": 1}
    assert metrics["recent_24h"] == 4
    assert metrics["performance"]["db_path"] == api.store.health().description["db_path"]
    assert metrics["performance"].get("journal_mode") == ("WAL" if engine == "sqlite" else None)


@pytest.mark.parametrize(
    ("accept", "query", "kind"),
    [
        ("text/plain;version=0.0.4", "", "text/plain"),
        ("text/plain", "", "text/plain"),
        (
            "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "",
            "application/openmetrics-text",
        ),
        ("*/*", "?format=prometheus", "text/plain"),
        ("application/json", "?format=prometheus", "text/plain"),
        ("application/openmetrics-text; version=1.0.0", "?format=prometheus", "application/openmetrics-text"),
        ("text/plain", "?format=json", "application/json"),
    ],
)
async def test_metrics_are_negotiated(api: Api, accept: str, query: str, kind: str) -> None:
    await api.batch([make_run() for _ in range(3)])
    answer = await send(api, "GET", f"/metrics{query}", headers={"Accept": accept})
    assert answer.status == 200
    assert answer.headers["content-type"].partition(";")[0] == kind
    if kind == "application/json":
        assert answer.json["total_runs"] == 3
        return
    parse = parse_openmetrics if kind == "application/openmetrics-text" else parse_prometheus
    samples = [sample for family in parse(answer.text) for sample in family.samples]
    received = [sample for sample in samples if sample.name == "telemetryd_runs_received_total"]
    assert {sample.labels["outcome"]: sample.value for sample in received} == {
        "created": 3,
        "duplicate": 0,
        "invalid": 0,
    }
    values = {sample.name: sample.value for sample in samples}
    assert any(name.endswith("_created") for name in values) is (kind == "application/openmetrics-text")
    assert values["telemetryd_runs_stored"] == 3
    assert values["telemetryd_queue_depth"] == 0
    assert values["telemetryd_group_commands_count"] == 1


async def test_each_reason_to_refuse_a_write_is_counted_from_zero_on(api: Api) -> None:
    """rate() and increase() do not see a series that begins at 1."""
    text = (await send(api, "GET", "/metrics?format=prometheus")).text
    refused = [family for family in parse_prometheus(text) if family.name == "telemetryd_writes_refused"]
    counted = {sample.labels["reason"]: sample.value for family in refused for sample in family.samples}
    assert {"low disk", "queue full", "write failed", "stopping", "slow body"} <= counted.keys()
    assert set(counted.values()) == {0}


@pytest.mark.parametrize("query", ["format=xml", "format=", "format=json&format=json", "x=1"])
async def test_a_wrong_parameter_of_metrics_is_400(api: Api, query: str) -> None:
    assert "format" in check_error(await send(api, "GET", f"/metrics?{query}"), 400)


async def test_recent_runs_are_those_of_the_last_24_hours(make_api: MakeApi) -> None:
    now = datetime(2026, 1, 2, 12, tzinfo=UTC)
    api = await make_api(clock=lambda: now)
    for hours in (0, 1, 23.9, 24.1, 48):
        await api.post(make_run(created_at=(now - timedelta(hours=hours)).isoformat()))
    metrics = await api.get("/metrics")
    assert (metrics["total_runs"], metrics["recent_24h"]) == (5, 3)
    now += timedelta(days=30)
    assert (await api.get("/metrics"))["recent_24h"] == 0


async def test_duplicates_and_changes_are_not_counted_twice(api: Api) -> None:
    run = make_run()
    await api.post(run)
    await api.post(run, 200)
    await api.batch([run, run])
    await api.call("PATCH", f"{RUNS}/{run['event_id']}", json={"status": "success"}, status=200)
    metrics = await api.get("/metrics")
    assert (metrics["total_runs"], metrics["agents"]) == (1, {run["agent_name"]: 1})


@pytest.mark.sqlite
async def test_totals_do_not_cost_more_with_more_runs(api: Api) -> None:
    """Counted in steps of SQLite's virtual machine, with the same agents and minutes."""

    def steps() -> int:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1

        connection = sqlite3.connect(f"file:{api.settings.db_path}?mode=ro", uri=True)
        connection.set_progress_handler(step, 1)
        fetch_counts(connection, CountRuns("2025-01-01T00:00:00.000000Z", "2026-01-01T00:00:00.000000Z"))
        connection.close()
        return count

    await api.batch([make_run(created_at="2025-12-24T10:00:00Z") for _ in range(10)])
    few = steps()
    await api.batch([make_run(created_at="2025-12-24T10:00:00Z") for _ in range(5000)])
    assert steps() == few
    assert few > 0


# --- Metadata ------------------------------------------------------------------------------------


async def test_metadata_lists_the_names_in_use(api: Api) -> None:
    empty = await api.get("/api/v1/metadata")
    assert {**empty, "cache_hit": None} == {
        "agent_names": [],
        "job_types": [],
        "counts": {"agent_names": 0, "job_types": 0},
        "cache_hit": None,
    }
    await api.batch([make_run(agent_name=agent, job_type=job) for agent in "cab" for job in "yx"])
    metadata = await api.get("/api/v1/metadata")
    assert metadata["agent_names"] == ["a", "b", "c"]
    assert metadata["job_types"] == ["x", "y"]
    assert metadata["counts"] == {"agent_names": 3, "job_types": 2}
    await api.post(make_run(agent_name="d", job_type="z"))
    metadata = await api.get("/api/v1/metadata")
    assert metadata["agent_names"][-1] == "d"
    assert metadata["job_types"][-1] == "z"


async def test_the_totals_are_read_again_only_after_a_change(make_api: MakeApi) -> None:
    now = datetime(2026, 1, 2, 10, 0, 30, tzinfo=UTC)
    api = await make_api(clock=lambda: now)
    created = make_run(created_at="2026-01-01T10:00:10Z")
    await api.post(created)
    assert not (await api.get("/api/v1/metadata"))["cache_hit"]
    assert (await api.get("/api/v1/metadata"))["cache_hit"]
    assert (await api.get("/metrics?format=json"))["recent_24h"] == 1
    now += timedelta(minutes=1)  # the run is more than 24 hours old now
    assert (await api.get("/metrics?format=json"))["recent_24h"] == 0
    assert (await api.get("/api/v1/metadata"))["cache_hit"]
    await api.call("PATCH", f"{RUNS}/{created['event_id']}", json={"status": "failure"}, status=200)
    assert not (await api.get("/api/v1/metadata"))["cache_hit"]


# --- The document --------------------------------------------------------------------------------


async def document(api: Api) -> dict[str, Any]:
    answer = await send(api, "GET", "/openapi.json")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert isinstance(answer.json, dict)
    return answer.json


async def test_the_document_is_valid_openapi_3_1(api: Api) -> None:
    content = await document(api)
    assert content["openapi"].startswith("3.1.")
    OPENAPI_31_VALIDATOR.validate(content)
    for schema in content["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    for target in re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', str(content).replace("'", '"')):
        assert target in content["components"]["schemas"]


async def test_the_document_lists_every_endpoint(api: Api) -> None:
    content = await document(api)
    assert {(method.upper(), path) for path, methods in content["paths"].items() for method in methods} == {
        ("POST", "/api/v1/runs"),
        ("GET", "/api/v1/runs"),
        ("POST", "/api/v1/runs/batch"),
        ("GET", "/api/v1/runs/{event_id}"),
        ("PATCH", "/api/v1/runs/{event_id}"),
        ("DELETE", "/api/v1/runs/{event_id}"),
        ("POST", "/api/v1/runs/{event_id}/events"),
        ("GET", "/api/v1/runs/{event_id}/events"),
        ("POST", "/api/v1/runs/{event_id}/process"),
        ("POST", "/api/v1/runs/{event_id}/associate-commit"),
        ("GET", "/api/v1/runs/{event_id}/commit-url"),
        ("GET", "/api/v1/runs/{event_id}/repo-url"),
        ("GET", "/api/v1/runs/export"),
        ("GET", "/api/v1/runs/stream"),
        ("GET", "/api/v1/changes"),
        ("GET", "/api/v1/stats"),
        ("GET", "/api/v1/regressions"),
        ("GET", "/api/v1/alerts"),
        ("GET", "/api/v1/metadata"),
        ("POST", "/api/v1/admin/prune"),
        ("POST", "/api/v1/admin/reap"),
        ("POST", "/api/v1/admin/redact"),
        ("POST", "/api/v1/admin/confirm"),
        ("POST", "/api/v1/admin/backup"),
        ("GET", "/health"),
        ("GET", "/metrics"),
    }
    identifiers = [operation["operationId"] for methods in content["paths"].values() for operation in methods.values()]
    assert len(set(identifiers)) == len(identifiers)


async def test_the_document_is_made_from_the_model_that_validates(api: Api) -> None:
    schemas = (await document(api))["components"]["schemas"]
    assert tuple(schemas["NewRun"]["properties"]) == STORED
    assert tuple(schemas["RunPatch"]["properties"]) == PATCHABLE
    assert set(schemas["NewRun"]["required"]) == {"event_id", "run_id", "start_time", "agent_name", "job_type"}


def validator(content: dict[str, Any], schema: dict[str, Any]) -> jsonschema_rs.Validator:
    return jsonschema_rs.Draft202012Validator({**schema, "components": content["components"]})


async def test_what_the_daemon_answers_is_what_the_document_says(api: Api) -> None:
    content = await document(api)
    run = make_run(**FULL)
    path = f"{RUNS}/{run['event_id']}"
    commit = {"commit_hash": "abcdef0", "commit_source": "ci"}
    calls: list[tuple[str, str, str, object]] = [
        ("POST", RUNS, RUNS, run),
        ("POST", RUNS, RUNS, run),
        ("POST", RUNS, RUNS, {"status": "bogus"}),
        ("POST", BATCH, BATCH, [make_run(), {}, run]),
        ("POST", BATCH, BATCH, {}),
        ("GET", RUNS, RUNS, None),
        ("GET", RUNS, f"{RUNS}?limit=0", None),
        ("GET", f"{RUNS}/{{event_id}}", path, None),
        ("GET", f"{RUNS}/{{event_id}}", f"{RUNS}/nope", None),
        ("PATCH", f"{RUNS}/{{event_id}}", path, {"status": "failed", "x": 1}),
        ("PATCH", f"{RUNS}/{{event_id}}", path, {}),
        ("PATCH", f"{RUNS}/{{event_id}}", path, {"status": 5}),
        ("POST", f"{RUNS}/{{event_id}}/associate-commit", f"{path}/associate-commit", commit),
        ("GET", f"{RUNS}/{{event_id}}/commit-url", f"{path}/commit-url", None),
        ("GET", f"{RUNS}/{{event_id}}/repo-url", f"{path}/repo-url", None),
        ("GET", "/api/v1/metadata", "/api/v1/metadata", None),
        ("GET", "/health", "/health", None),
        ("GET", "/metrics", "/metrics", None),
    ]
    seen = set()
    for method, route, target, body in calls:
        answer = await send(api, method, target, **({} if body is None else {"json": body}))
        responses = content["paths"][route][method.lower()]["responses"]
        schema = responses[str(answer.status)]["content"]["application/json"]["schema"]
        validator(content, schema).validate(answer.json)
        seen.add((method, route, answer.status))
    assert len(seen) == len(calls)


async def test_the_schema_of_a_run_tells_good_from_bad(api: Api) -> None:
    content = await document(api)
    schema = validator(content, {"$ref": "#/components/schemas/NewRun"})
    assert schema.is_valid(make_run(**FULL))
    faults: list[tuple[str, object]] = [
        ("status", "bogus"),
        ("items_failed", -1),
        ("items_failed", 2**63),
        ("metrics_json", []),
        ("event_id", ""),
        ("git_commit_source", "robot"),
    ]
    for name, bad in faults:
        assert not schema.is_valid(make_run(**{name: bad})), (name, bad)


# --- The page ------------------------------------------------------------------------------------


async def test_the_page_and_its_assets_ship_in_the_package(api: Api) -> None:
    page = await send(api, "GET", "/docs")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script>" not in page.text
    assert "style=" not in page.text
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page.text)
    assets = re.findall(r'(?:src|href)="((?:docs/static|page)/[^"]+)"', page.text)
    assert len(assets) == 4
    assert not re.findall(r'(?:src|href)="/', page.text)  # a proxy may show it all under a sub-path
    kinds = {
        "js": "text/javascript; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "svg": "image/svg+xml; charset=utf-8",
    }
    for asset in assets:
        answer = await send(api, "GET", f"/{asset}")
        assert answer.status == 200, asset
        assert answer.headers["content-type"] == kinds[asset.rpartition(".")[2]]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert len(answer.body) > 100
    assert b'"openapi.json"' in (await send(api, "GET", "/docs/static/docs.js")).body


async def test_the_page_of_the_api_is_left_where_its_addresses_hold(api: Api) -> None:
    answer = await send(api, "GET", "/docs/", allow_redirects=False)
    assert (answer.status, answer.headers["location"]) == (302, "../docs")
    assert "docs/static/docs.js" in (await send(api, "GET", "/docs/")).text


async def test_the_bare_address_is_the_page_for_browsers(api: Api) -> None:
    page = await send(api, "GET", "/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (page.status, page.headers["content-type"], page.headers["vary"]) == (
        200,
        "text/html; charset=utf-8",
        "Accept",
    )
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
    assert not re.findall(r"<script(?![^>]* src=)|<style| style=| on\w+=", page.text)
    assert not re.findall(r'(?:src|href)="/', page.text)
    assets = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert len(assets) > 5
    for asset in assets:
        first = await send(api, "GET", f"/{asset}")
        assert first.headers["cache-control"] == "no-cache"
        again = await send(api, "GET", f"/{asset}", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])


async def test_the_bare_address_leads_programs_to_the_description(api: Api) -> None:
    answer = await send(api, "GET", "/", allow_redirects=False)
    assert (answer.status, answer.headers["location"]) == (302, "docs")
    assert (await send(api, "GET", "/")).headers["content-type"] == "text/html; charset=utf-8"


async def test_the_page_lets_nothing_foreign_in(api: Api) -> None:
    headers = (await send(api, "GET", "/docs")).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


async def test_there_are_no_cors_headers(api: Api) -> None:
    for path in ("/docs", "/health", RUNS, "/openapi.json"):
        answer = await send(api, "GET", path, headers={"Origin": "https://evil.com"})
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", 'text/plain; version="1.0.0'])
async def test_an_accept_header_that_nobody_can_read_still_gets_metrics(api: Api, accept: str) -> None:
    async with api.client.get("/metrics?format=prometheus", headers={"Accept": accept}) as response:
        assert response.status == 200
        assert "telemetryd_runs_stored" in await response.text()
