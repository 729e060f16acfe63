"""Run events: whatever is reported, however often and in whatever pieces, each is stored once, as it came first."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from telemetryd.engine import pages as pages_of_runs
from telemetryd.model import values
from telemetryd.model.events import parse_events
from tests.conftest import Api, MakeApi, StartDaemon, make_run
from tests.http_client import call, get, post
from tests.test_properties import REPEATABLE

NAMES = st.sampled_from(["step", "warning", "é", "end"])
TIMES = st.sampled_from(["2025-12-24T10:00:00Z", "2025-12-24T11:00:00+01:00", "2025-12-24T10:00:00.5Z"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=5,
)
EVENTS = st.fixed_dictionaries(
    {"event_type": NAMES},
    optional={
        "event_key": st.text("kK1", min_size=1, max_size=2),
        "timestamp": TIMES,
        "payload": st.dictionaries(st.text("xy", max_size=2), VALUES, max_size=3),
    },
)


def key_of(event: dict[str, Any]) -> str:
    return str(parse_events(event).rows[0][0])


@given(st.lists(EVENTS, max_size=12), st.randoms(use_true_random=False))
@REPEATABLE
def test_a_derived_key_depends_on_the_content_alone(reported: list[dict[str, Any]], chance: Any) -> None:
    for event in reported:
        names = list(event)
        chance.shuffle(names)
        same = json.loads(json.dumps({name: event[name] for name in names}))
        assert key_of(same) == key_of(event)
        if "event_key" not in event:
            assert key_of({**event, "event_type": event["event_type"] + "!"}) != key_of(event)


def test_events_are_stored_once_however_they_are_sent(start_daemon: StartDaemon) -> None:
    url = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL").url

    @given(st.lists(st.lists(EVENTS, max_size=8), max_size=6), st.data())
    @REPEATABLE
    def check(requests: list[list[dict[str, Any]]], data: st.DataObject) -> None:
        run = make_run()
        assert post(url, run)[0] == 201
        path = f"/api/v1/runs/{run['event_id']}/events"
        expected: dict[str, dict[str, Any]] = {}
        sent = 0
        for request in requests:
            for _ in range(data.draw(st.integers(1, 2))):
                body: Any = request[0] if len(request) == 1 and data.draw(st.booleans()) else request
                before = len(expected)
                for event in request:
                    expected.setdefault(key_of(event), event)
                status, answer = call(url, "POST", path, body)
                assert status == 201
                inserted = len(expected) - before
                assert answer == {"inserted": inserted, "duplicates": len(request) - inserted}
                sent += inserted
        found = get(url, f"{path}?limit=1000")[1]
        assert len(found) == sent == len(expected)
        assert sorted(found, key=lambda event: (event["timestamp"], event["id"])) == found
        for event in found:
            first = expected[event["event_key"]]
            assert event["event_type"] == first["event_type"]
            assert event["payload"] == first.get("payload")
            if "timestamp" in first:
                assert event["timestamp"] == values.canonical_timestamp(first["timestamp"])

    check()


def test_events_survive_a_kill_and_the_repeat_after_it(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    run = make_run()
    post(daemon.url, run)
    path = f"/api/v1/runs/{run['event_id']}/events"
    body = [{"event_type": "step", "event_key": str(number)} for number in range(50)]
    assert call(daemon.url, "POST", path, body) == (201, {"inserted": 50, "duplicates": 0})
    daemon.process.kill()
    daemon.wait()
    daemon = start_daemon()
    assert call(daemon.url, "POST", path, body) == (201, {"inserted": 0, "duplicates": 50})
    assert len(get(daemon.url, path)[1]) == 50


async def test_events_count_towards_the_bound_in_bytes_of_the_queue(make_api: MakeApi) -> None:
    from telemetryd import writer
    from telemetryd.model.commands import CreateEvents

    big = writer.QUEUE_BYTES // 2
    api = await make_api()
    commands = [CreateEvents("nobody", (), size) for size in (big, big, 1)]
    results = await asyncio.gather(*(api.store.submit(command) for command in commands), return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["NoneType", "NoneType", "QueueFullError"]
    assert await api.store.submit(commands[2]) is None


async def event_pages(api: Api, following: str | None) -> list[list[Any]]:
    """Return page after page, as the Link header says."""
    pages = []
    while following:
        async with api.client.get(following) as response:
            assert response.status == 200, await response.text()
            pages.append(await response.json())
            following = str(URL(str(response.links["next"]["url"])).relative()) if "next" in response.links else None
    return pages


async def test_events_are_read_from_either_end_page_after_page(api: Api) -> None:
    run = make_run()
    await api.post(run)
    path = f"/api/v1/runs/{run['event_id']}/events"
    when = [f"2025-12-24T10:00:0{number // 3}Z" for number in range(25)]  # three at each moment, so ids decide
    told = [{"event_type": "step", "event_key": str(n), "timestamp": at} for n, at in enumerate(when)]
    await api.call("POST", path, json=told, status=201)
    for sort, keys in (("timestamp", [*range(25)]), ("-timestamp", [*reversed(range(25))])):
        pages = await event_pages(api, f"{path}?sort={sort}&limit=4")
        assert [int(event["event_key"]) for page in pages for event in page] == keys
        assert [len(page) for page in pages] == [4] * 6 + [1]
    last = (await api.get(f"{path}?sort=-timestamp&limit=1"))[0]
    place = f"{last['timestamp']},{last['id']}"
    assert await api.get(f"{path}?cursor={place}") == []
    later = {"event_type": "step", "event_key": "later", "timestamp": "2025-12-24T10:00:08Z"}
    await api.call("POST", path, json=later, status=201)
    assert [event["event_key"] for event in await api.get(f"{path}?cursor={place}")] == ["later"]


async def test_events_that_hold_a_text_are_read_from_either_end_page_after_page(api: Api) -> None:
    run = make_run()
    await api.post(run)
    path = f"/api/v1/runs/{run['event_id']}/events"
    told = [
        {
            "event_type": kind,
            "event_key": str(number),
            "timestamp": f"2025-12-24T10:00:{number:02}Z",
            "payload": payload,
        }
        for number, (kind, payload) in enumerate(
            [("step", {"file": "Ä 100%.md"}), ("Retry", {"n": 1}), ("step", None), ("end", {"why": ["retry & more"]})]
            * 5
        )
    ]
    await api.call("POST", path, json=told, status=201)
    for text, keys in (
        ("retry", [n for n in range(20) if n % 4 in (1, 3)]),
        ("ä 100%", [0, 4, 8, 12, 16]),
        ("1__%", []),
        ("retry & more", [3, 7, 11, 15, 19]),
    ):
        asked = urlencode({"text": text, "limit": 2})
        for order, expected in (("", keys), ("&sort=timestamp", keys), ("&sort=-timestamp", keys[::-1])):
            pages = await event_pages(api, f"{path}?{asked}{order}")
            assert [int(event["event_key"]) for page in pages for event in page] == expected, (text, order)
    [step] = await api.get(f"{path}?text=retry&limit=1")
    place = f"{step['timestamp']},{step['id']}"
    assert [event["event_key"] for event in await api.get(f"{path}?text=retry&cursor={place}&limit=2")] == ["3", "5"]
    assert "Invalid text: ' '" in (await api.get(f"{path}?text=%20", status=400))["detail"]


@pytest.mark.parametrize(
    "query",
    [
        "sort=id",
        "sort=",
        "cursor=x",
        "cursor=2025-12-24T10:00:00Z,1",
        "cursor=2025-12-24T10:00:00.000000Z,99999999999999999999",
        "cursor=2025-12-24T10:00:00.000000Z,1&offset=1",
        "sort=timestamp&sort=timestamp",
    ],
)
async def test_what_is_no_place_among_events_is_reported(api: Api, query: str) -> None:
    run = make_run()
    await api.post(run)
    detail = (await api.get(f"/api/v1/runs/{run['event_id']}/events?{query}", status=400))["detail"]
    assert any(name in detail for name in ("sort", "cursor"))


async def test_a_page_of_large_events_is_bounded(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_of_runs, "PAGE_BYTES", 100_000)
    api = await make_api()
    first, second = make_run(created_at="2025-12-24T11:00:00Z"), make_run(created_at="2025-12-24T10:00:00Z")
    for run in (first, second):
        await api.post(run)
        path = f"/api/v1/runs/{run['event_id']}"
        body = [{"event_type": "step", "event_key": str(n), "payload": {"x": "x" * 9_980}} for n in range(12)]
        await api.call("POST", f"{path}/events", json=body, status=201)
    path = f"/api/v1/runs/{first['event_id']}"
    refused = await api.call("GET", f"{path}/events", status=400)
    assert refused == {"detail": "Invalid limit: 100; that is more than one answer holds: ask for at most 10 at a time"}
    pages = [await api.get(f"{path}/events", params={"limit": 10, "offset": offset}) for offset in (0, 10)]
    assert [event["event_key"] for page in pages for event in page] == [str(n) for n in range(12)]
    for sort in ("timestamp", "-timestamp"):  # whose pages continue after their last event, however many there are
        pages = await event_pages(api, f"{path}/events?sort={sort}")
        assert [len(page) for page in pages] == [10, 2]
        assert len({event["event_key"] for page in pages for event in page}) == 12
    run = await api.get(path, params={"include": "events"})
    assert (len(run["events"]), run["more_events"]) == (10, True)
    listed = await api.list(include="events")
    assert [(len(run["events"]), run["more_events"]) for run in listed] == [(10, True), (0, True)]
    assert "events" in (await api.get(f"/api/v1/runs/{second['event_id']}", params={"include": "events"}))
