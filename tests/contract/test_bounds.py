"""What one request may hold or ask for, so that it neither fills the memory nor stops all others."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from telemetryd.engine import pages
from telemetryd.model import values
from telemetryd.web.body import BodyBounds
from tests.conftest import PATIENCE_S, Api, bodies_of, eventually, make_run
from tests.contract.wire import BATCH, NDJSON, RUNS, check_alive, check_error, places, post, send
from tests.faults.test_connections import closed


@pytest.mark.parametrize("unit", [b"[],", b"0,", b'"",', b"{},", b"[[[[[[[[]]]]]]]],", b'"\\"",', b'"\\\\",'])
async def test_more_values_than_can_be_decoded_at_once_are_413(api: Api, unit: bytes) -> None:
    body = b'{"metrics_json": {"a": [' + unit * (8_000_000 // len(unit)) + b"0]}}"
    started = time.process_time()
    for path, headers in ((RUNS, None), (BATCH, None), (BATCH, NDJSON)):
        answer = await (post(api, body, path, headers) if headers else post(api, body, path))
        if headers:  # each line is a body of its own
            assert answer.status in (413, 422)
        else:
            assert "1000000 JSON values" in check_error(answer, 413)
    assert time.process_time() - started < 5
    await check_alive(api)


@pytest.mark.parametrize(
    "text", ["a,b;" * 2_000_000, '"[{,' * 1_000_000, "\\,[" * 1_000_000], ids=["commas", "quotes", "slashes"]
)
async def test_what_stands_inside_of_a_text_is_not_counted(api: Api, text: str) -> None:
    run = make_run(error_details=text)
    assert (await post(api, json.dumps(run).encode())).status == 201
    assert (await api.get(f"{RUNS}/{run['event_id']}"))["error_details"] == text


async def test_an_object_of_the_agents_own_has_a_bound_too(api: Api) -> None:
    fitting = {str(number): 1 for number in range(values.MAX_JSON_VALUES // 2)}
    assert (await post(api, json.dumps(make_run(metrics_json=fitting)).encode())).status == 201
    body = json.dumps(make_run(metrics_json={**fitting, "x": 1}, context_json={"a": [0] * values.MAX_JSON_VALUES}))
    detail = check_error(await post(api, body.encode()), 422)
    assert places(detail) == [("body", "metrics_json"), ("body", "context_json")]
    assert all("holds more than 100000 keys and values" in fault["msg"] for fault in detail)


async def test_a_page_too_large_says_how_many_runs_fit(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter page instead would lose runs to a client that pages by offset."""
    monkeypatch.setattr(pages, "PAGE_BYTES", 100_000)
    events = [make_run(error_details="x" * 30_000) for _ in range(10)]
    await api.batch(events)
    detail = check_error(await send(api, "GET", RUNS, params={"limit": "10"}), 400)
    assert detail.startswith("Invalid limit: 10; ")
    assert "ask for at most 3 at a time" in detail
    found, path = [], f"{RUNS}?limit=3"
    while path:
        answer = await send(api, "GET", path)
        assert answer.status == 200
        found += [run["event_id"] for run in answer.json]
        path = answer.headers["link"].partition(">")[0][1:] if "link" in answer.headers else ""
    assert sorted(found) == sorted(run["event_id"] for run in events)
    await api.post(make_run(error_details="y" * 200_000))
    assert len(await api.list(limit=1)) == 1, "one run always fits"
    detail = check_error(await send(api, "GET", RUNS, params={"limit": "10"}), 400)
    assert "ask for at most 1 at a time" in detail
    assert len(await api.list(limit=100, fields="event_id")) == 11, "what is not answered takes no room"


async def test_all_bodies_together_have_a_bound(api: Api) -> None:
    bodies = bodies_of(api)
    bodies.bounds = BodyBounds(together=3_000_000)
    assert api.client.port is not None
    head = b"POST /api/v1/runs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4000000\r\n\r\n"
    large = [await asyncio.open_connection("127.0.0.1", api.client.port) for _ in range(2)]
    large[0][1].write(head + b" " * 2_000_000)
    await eventually(lambda: bodies._held >= 2_000_000)
    large[1][1].write(head + b" " * 2_000_000)
    answer = await asyncio.wait_for(large[1][0].readuntil(b"}"), PATIENCE_S)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 1" in answer
    assert b"Too many large bodies" in answer
    assert (await api.post(make_run()))["status"] == "created", "small ones come with their heads"
    for _, writer in large:
        writer.transport.abort()
    await closed(large[0][0])
    await eventually(lambda: bodies._held == 0)
    assert (await post(api, json.dumps(make_run(host="h" * 2_500_000)).encode())).status == 201, (
        "the room is free again"
    )


async def test_the_same_event_a_thousand_times_is_stored_once(api: Api) -> None:
    run = make_run()
    answer = await api.batch([run] * 1000)
    assert (answer["inserted"], answer["duplicates"], answer["total"]) == (1, 999, 1000)
