"""What assistants are answered: each tool, with the official SDK as the client, on either engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import jsonschema_rs
import pytest
from mcp import Client

from telemetryd.errors import QueryTimeoutError
from telemetryd.mcp import bounds, tools
from telemetryd.model.values import format_timestamp
from tests.conftest import Api, make_run
from tests.mcp.assistants import VERSIONS, ask, assistant, complaint

GOOD, BAD = "a" * 40, "b" * 40
REPO = "https://github.com/example/nightly"


@asynccontextmanager
async def asking(api: Api, mode: str = "auto") -> AsyncIterator[Client]:
    async with assistant(str(api.client.make_url("")).rstrip("/"), mode) as client:
        yield client


def ago(**span: float) -> str:
    return format_timestamp(datetime.now(UTC) - timedelta(**span))


async def nights(api: Api) -> None:
    """Store three weeks of a nightly agent that a commit of a week ago has broken, and of one that is well."""
    runs = []
    for hour in range(21 * 24, 0, -2):
        is_bad = hour <= 7 * 24
        fails = is_bad and hour % 4 == 0
        common = {"created_at": ago(hours=hour), "start_time": ago(hours=hour), "git_repo": REPO}
        runs.append(
            make_run(
                event_id=f"crawl-{hour}",
                agent_name="nightly-crawler",
                job_type="crawl",
                status="failure" if fails else "success",
                error_summary="KeyError: 'sitemap'" if fails else None,
                error_details=f"Traceback of hour {hour}" if fails else None,
                git_commit_hash=BAD if is_bad else GOOD,
                duration_ms=1000 + hour,
                **common,
            )
        )
        runs.append(make_run(agent_name="steady", job_type="sync", status="success", git_commit_hash=GOOD, **common))
    await api.batch(runs)


@pytest.mark.parametrize("mode", VERSIONS)
async def test_what_failed_last_night_and_since_which_commit_takes_three_calls(api: Api, mode: str) -> None:
    await nights(api)
    async with asking(api, mode) as client:
        assert client.protocol_version == VERSIONS[mode]
        failed = await ask(client, "failed_runs", **{"from": "-13h"})
        [group] = failed["groups"]
        assert (group["agent_name"], group["job_type"], group["runs"]) == ("nightly-crawler", "crawl", 3)
        [error] = group["errors"]
        assert (error["error_summary"], error["runs"]) == ("KeyError: 'sitemap'", 3)
        worse = await ask(client, "regressions", agent_name=group["agent_name"], job_type=group["job_type"])
        [finding] = worse["regressions"]
        assert finding["first_bad_commit"] == BAD
        assert finding["last_good_commit"] == GOOD
        run = await ask(client, "get_run", event_id=error["event_id"])
        assert run["error_details"] == "Traceback of hour 4"
        assert run["commit_url"] == f"{REPO}/commit/{BAD}"


@pytest.mark.parametrize("mode", VERSIONS)
async def test_every_tool_is_listed_with_schemas_of_what_it_takes_and_answers(api: Api, mode: str) -> None:
    await nights(api)
    async with asking(api, mode) as client:
        listed = (await client.list_tools()).tools
        assert [tool.name for tool in listed] == [
            *("search_runs", "get_run", "failed_runs", "stats", "regressions", "alerts", "agents"),
        ]
        given: dict[str, dict[str, Any]] = {"get_run": {"event_id": "crawl-4"}}
        for tool in listed:
            assert tool.title
            assert tool.description
            assert tool.annotations is not None
            assert tool.annotations.read_only_hint
            for schema in (tool.input_schema, tool.output_schema):
                assert schema is not None
                jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
                assert "x-component" not in json.dumps(schema)
            assert all(each["description"] for each in tool.input_schema["properties"].values())
            await ask(client, tool.name, **given.get(tool.name, {}))
    shown = [{name: each for name, each in tool.items() if name != "outputSchema"} for tool in tools.listed()]
    assert len(json.dumps(shown)) < 20 * 1024  # some five thousand tokens, which every conversation pays


async def test_runs_are_found_page_by_page(api: Api) -> None:
    await nights(api)
    async with asking(api) as client:
        seen: list[str] = []
        cursor = None
        while True:
            asked = {"status": "failure", "limit": 20, "count": "exact", "cursor": cursor}
            page = await ask(client, "search_runs", **asked)
            assert (page["total"], page["total_accuracy"]) == (42, "exact")
            seen += [run["event_id"] for run in page["runs"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == [f"crawl-{hour}" for hour in range(4, 7 * 24 + 1, 4)]
        chosen = await ask(client, "search_runs", fields="event_id,host", limit=1.0, agent_name="nightly-*")
        assert chosen["runs"] == [{"event_id": "crawl-2", "host": None}]


async def test_labels_and_metrics_are_objects_of_their_own(api: Api) -> None:
    await api.post(make_run(event_id="small", labels={"team": "web"}, metrics_json={"tokens": 5}))
    await api.post(make_run(event_id="large", labels={"team": "web"}, metrics_json={"tokens": 5000}))
    await api.post(make_run(event_id="other", labels={"team": "ads"}, metrics_json={"tokens": 5000}))
    async with asking(api) as client:
        found = await ask(client, "search_runs", label={"team": "web"}, metrics={"tokens": ">1000"})
        assert [run["event_id"] for run in found["runs"]] == ["large"]
        found = await ask(client, "search_runs", metrics={"tokens": 5})
        assert [run["event_id"] for run in found["runs"]] == ["small"]


async def test_a_page_that_would_be_too_large_ends_earlier_and_the_next_goes_on_there(api: Api) -> None:
    texts = {"output_summary": "ü" * 5000, "labels": {f"key-{number}": "x" * 200 for number in range(20)}}
    for begin in range(0, 90, 30):
        runs = [
            make_run(event_id=f"big-{number:03}", created_at=ago(hours=number), **texts)
            for number in range(begin, begin + 30)
        ]
        await api.batch(runs)
    async with asking(api) as client:
        seen: list[str] = []
        cursor = None
        while cursor is not None or not seen:
            page = await ask(client, "search_runs", limit=60, cursor=cursor)
            assert len(json.dumps(page, ensure_ascii=False).encode()) < bounds.MOST_BYTES * 1.2  # blanks after commas
            assert page["shortened"]
            assert "characters left out" in page["runs"][0]["output_summary"]
            assert bounds.CUT in page["runs"][0]["labels"]
            seen += [run["event_id"] for run in page["runs"]]
            cursor = page["next_cursor"]
        assert seen == [f"big-{number:03}" for number in range(90)]


async def test_a_run_is_shown_with_events_and_within_bounds(api: Api) -> None:
    await api.post(
        make_run(event_id="run-1", error_details="e" * 100_000, context_json={"text": "c" * 100_000, "a": 1})
    )
    events = [
        {"event_key": f"e-{number:02}", "event_type": "page", "payload": {"page": number}} for number in range(60)
    ]
    await api.call("POST", "/api/v1/runs/run-1/events", json=events, status=201)
    async with asking(api) as client:
        run = await ask(client, "get_run", event_id="run-1", include="events")
        assert run["error_details"].startswith("e" * 4000)
        assert run["context_json"]["text"].endswith("c… (99000 characters left out)")
        assert run["context_json"]["a"] == 1
        assert run["shortened"]
        assert len(run["events"]) == 50
        assert run["more_events"]
        assert "events" not in await ask(client, "get_run", event_id="run-1")


async def test_numbers_names_and_alerts(api: Api) -> None:
    await nights(api)
    async with asking(api) as client:
        counted = await ask(client, "stats", **{"from": "-30d", "group_by": "agent_name,status", "status": "failure"})
        [group] = counted["groups"]
        assert (group["agent_name"], group["runs"]) == ("nightly-crawler", 42)
        named = await ask(client, "agents", agent_name="night*")
        assert named["agents"] == [{"agent_name": "nightly-crawler", "runs": 252}]
        assert (named["agent_names"], named["job_types"], named["total_runs"]) == (2, ["crawl", "sync"], 504)
        assert (await ask(client, "agents", limit=1))["agents"][0]["agent_name"] == "nightly-crawler"
        alerts = await ask(client, "alerts")
        assert alerts == {"evaluated_at": None, "rules": [], "firing": [], "webhooks": []}


async def test_failures_beyond_what_is_looked_at_are_counted(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    await nights(api)
    monkeypatch.setattr("telemetryd.model.queries.MAX_LIMIT", 10)
    async with asking(api) as client:
        failed = await ask(client, "failed_runs", **{"from": "-30d"})
        assert (failed["failed"], failed["looked_at"], failed["groups"][0]["runs"]) == (42, 10, 10)
        everything = await ask(client, "failed_runs", **{"from": "-30d", "status": "success", "agent_name": "steady"})
        assert [group["agent_name"] for group in everything["groups"]] == ["steady"]


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("search_runs", {"offset": 3}, "Unknown argument 'offset'; known are: event_id, run_id, agent_name"),
        ("search_runs", {"limit": 101}, "Invalid limit: '101'; it must be an integer from 1 to 100"),
        ("search_runs", {"limit": True}, "Invalid limit: 'true'"),
        ("search_runs", {"status": ["failure"]}, "one text; several values stand in it with commas between them"),
        ("search_runs", {"label": "x"}, "Invalid label: 'x'; it must be an object"),
        ("search_runs", {"cursor": "x"}, "Invalid cursor"),
        ("search_runs", {"created_after": "yesterday"}, "Invalid created_after: 'yesterday'"),
        ("get_run", {}, "event_id is missing"),
        ("get_run", {"event_id": "nope"}, "Run not found: nope"),
        ("failed_runs", {"from": "now"}, "Invalid from: 'now'; it must be before to ('now')"),
        ("failed_runs", {"status": "broken"}, "Invalid status: 'broken'"),
        ("stats", {"group_by": "host"}, "Invalid group_by: 'host'"),
        ("regressions", {"from": "x"}, "Invalid from: 'x'"),
        ("alerts", {"x": 1}, "Unknown argument 'x'; known are: none"),
        ("agents", {"limit": 0}, "Invalid limit: '0'"),
    ],
)
async def test_what_cannot_be_answered_is_said_so_that_the_assistant_can_correct_it(
    api: Api, tool: str, arguments: dict[str, Any], words: str
) -> None:
    async with asking(api) as client:
        assert words in await complaint(client, tool, **arguments)


async def test_a_call_that_takes_too_long_is_ended() -> None:
    class Slow:
        async def fetch(self, query: Any) -> Any:
            await asyncio.sleep(60)

        async def alerts(self) -> Any:
            await asyncio.sleep(60)

    for name in ("stats", "alerts"):
        result = await tools.call(Slow(), name, {}, deadline_s=0.01)
        assert result["isError"]
        assert "took longer than 0.01 s" in result["content"][0]["text"]


async def test_what_a_query_cannot_do_now_is_said(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(query: object) -> None:
        raise QueryTimeoutError

    monkeypatch.setattr(api.store, "fetch", fail)
    async with asking(api) as client:
        assert await complaint(client, "agents") == QueryTimeoutError.message
