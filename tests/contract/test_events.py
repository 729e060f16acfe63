"""docs/reference/http.md on run events, sentence by sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
from aiohttp import ClientResponse

from telemetryd.model.events import MAX_EVENTS
from tests.conftest import Api, make_run
from tests.contract.wire import JSON, RUNS, check_error, places, post, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIME = "2025-12-24T10:00:00.000000Z"


@pytest.fixture
def api(shared: Api) -> Api:
    """One app for the whole module; tests that need one of their own ask for `make_api`."""
    return shared


async def new_run(api: Api, **fields: Any) -> str:
    run = make_run(**fields)
    await api.post(run)
    return f"{RUNS}/{run['event_id']}"


def next_page(response: ClientResponse) -> str:
    """Return the address of the next page as it stands in the Link header."""
    found = re.fullmatch(r'<(.*)>; rel="next"', response.headers.get("Link", ""))
    return found[1] if found else ""


async def report(api: Api, path: str, body: object, status: int = 201) -> Any:
    return await api.call("POST", f"{path}/events", json=body, status=status)


async def test_one_event_and_many_are_stored_and_answered_in_order(api: Api) -> None:
    path = await new_run(api)
    late = {"event_type": "end", "event_key": "k-2", "timestamp": "2025-12-24T11:00:00Z"}
    assert await report(api, path, late) == {"inserted": 1, "duplicates": 0}
    two = [
        {"event_type": "step", "event_key": "k-1", "timestamp": "2025-12-24T12:00:00+02:00", "payload": {"file": "a"}},
        {"event_type": "step", "event_key": "k-3", "timestamp": TIME, "payload": None},
    ]
    assert await report(api, path, two) == {"inserted": 2, "duplicates": 0}
    found = await api.get(f"{path}/events")
    assert [set(event) for event in found] == [{"id", "event_key", "event_type", "timestamp", "payload"}] * 3
    assert [(event["event_key"], event["timestamp"], event["payload"]) for event in found] == [
        ("k-1", TIME, {"file": "a"}),
        ("k-3", TIME, None),
        ("k-2", "2025-12-24T11:00:00.000000Z", None),
    ]
    assert found[0]["id"] < found[1]["id"]
    assert found[2]["id"] < found[0]["id"]


async def test_a_known_key_is_a_duplicate_and_the_stored_event_stays(api: Api) -> None:
    path, other = await new_run(api), await new_run(api)
    first = {"event_type": "step", "event_key": "k", "payload": {"n": 1}}
    await report(api, path, first)
    before = await api.get(f"{path}/events")
    run = await api.get(path)
    changed = {"event_type": "other", "event_key": "k", "payload": {"n": 2}}
    assert await report(api, path, [changed, first]) == {"inserted": 0, "duplicates": 2}
    assert await api.get(f"{path}/events") == before
    assert await api.get(path) == run
    assert await report(api, other, first) == {"inserted": 1, "duplicates": 0}  # unique in its run only


async def test_without_a_key_equal_content_is_one_event(api: Api) -> None:
    path = await new_run(api)
    body: list[dict[str, Any]] = [
        {"event_type": "step", "payload": {"a": 1, "b": [2]}},
        {"payload": {"b": [2], "a": 1}, "event_type": "step"},
        {"event_type": "step", "payload": {"a": 1, "b": [2]}, "timestamp": "2025-12-24T10:00:00Z"},
        {"event_type": "step", "payload": {"a": 1, "b": [2]}, "timestamp": "2025-12-24T11:00:00+01:00"},
        {"event_type": "step"},
        {"event_type": "step", "payload": {}},
    ]
    assert await report(api, path, body) == {"inserted": 4, "duplicates": 2}
    assert await report(api, path, body) == {"inserted": 0, "duplicates": 6}
    keys = {event["event_key"] for event in await api.get(f"{path}/events")}
    assert len(keys) == 4
    assert all(key.startswith("content-") for key in keys)


async def test_an_event_without_a_time_happened_on_arrival_and_is_a_sign_of_life(api: Api) -> None:
    path = await new_run(api)
    before = await api.get(path)
    await report(api, path, {"event_type": "step"})
    after = await api.get(path)
    event = (await api.get(f"{path}/events"))[0]
    assert event["timestamp"] == after["updated_at"] > before["updated_at"]
    assert {**after, "updated_at": ""} == {**before, "updated_at": ""}


async def test_with_one_bad_event_none_is_stored_and_every_fault_has_its_place(api: Api) -> None:
    path = await new_run(api)
    body: list[Any] = [
        {"event_type": "good"},
        {"event_type": " ", "timestamp": "yesterday"},
        {"event_type": "x", "event_key": "k" * 256, "payload": [1]},
        "no object",
        {"event_key": "only a key"},
    ]
    answer = await send(api, "POST", f"{path}/events", json=body)
    assert places(check_error(answer, 422)) == [
        ("body", 1, "event_type"),
        ("body", 1, "timestamp"),
        ("body", 2, "event_key"),
        ("body", 2, "payload"),
        ("body", 3),
        ("body", 4, "event_type"),
    ]
    assert await api.get(f"{path}/events") == []
    single = await send(api, "POST", f"{path}/events", json={"event_type": 5})
    assert places(check_error(single, 422)) == [("body", "event_type")]


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"5", b'"text"', b'[{"event_type":NaN}]'])
async def test_what_is_no_event_is_422(api: Api, body: bytes) -> None:
    path = await new_run(api)
    check_error(await post(api, body, f"{path}/events"), 422)


@pytest.mark.parametrize("payload", ['{"a": "\\u0000"}', '{"n": 99999999999999999999}', '{"a":' * 70 + "{}" + "}" * 70])
async def test_a_payload_that_cannot_be_stored_is_422(api: Api, payload: str) -> None:
    path = await new_run(api)
    body = f'{{"event_type":"x","payload":{payload}}}'.encode()
    assert places(check_error(await post(api, body, f"{path}/events"), 422)) == [("body", "payload")]


async def test_unknown_fields_are_named(api: Api) -> None:
    path = await new_run(api)
    answer = await report(api, path, [{"event_type": "x", "level": 3}, {"event_type": "y", "level": 3}])
    assert answer == {"inserted": 2, "duplicates": 0, "warnings": ["Unknown field ignored: level"]}


async def test_an_unknown_run_is_404(api: Api) -> None:
    bodies: list[Any] = [{"event_type": "x"}, []]
    for body in bodies:
        answer = await send(api, "POST", f"{RUNS}/nobody/events", json=body)
        assert check_error(answer, 404) == "Run not found: nobody"
    assert check_error(await send(api, "GET", f"{RUNS}/nobody/events"), 404) == "Run not found: nobody"


async def test_the_number_of_events_in_a_request_is_bounded(api: Api) -> None:
    path = await new_run(api)
    many = [{"event_type": "x", "event_key": str(number)} for number in range(MAX_EVENTS + 1)]
    assert "1000" in check_error(await send(api, "POST", f"{path}/events", json=many), 413)
    assert await report(api, path, many[:-1]) == {"inserted": MAX_EVENTS, "duplicates": 0}
    assert await report(api, path, []) == {"inserted": 0, "duplicates": 0}


async def test_pages_of_events_follow_each_other(api: Api) -> None:
    path = await new_run(api)
    await report(api, path, [{"event_type": "x", "event_key": str(number), "timestamp": TIME} for number in range(250)])
    assert len(await api.get(f"{path}/events")) == 100
    following, keys = f"{path}/events?limit=120", []
    while following:
        async with api.client.get(following) as response:
            assert response.status == 200
            keys += [event["event_key"] for event in await response.json()]
            following = next_page(response)
    assert keys == [str(number) for number in range(250)]
    assert len(await api.get(f"{path}/events?limit=1000&offset=240")) == 10
    assert await api.get(f"{path}/events?offset=9223372036854775807") == []


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "offset=-1", "page=2", "limit=1&limit=2"])
async def test_bad_parameters_are_400(api: Api, query: str) -> None:
    path = await new_run(api)
    check_error(await send(api, "GET", f"{path}/events?{query}"), 400)


async def test_a_run_shows_its_events_on_request(api: Api) -> None:
    path = await new_run(api)
    plain = await api.get(path)
    assert await api.get(f"{path}?include=events") == {**plain, "events": [], "more_events": False}
    await report(api, path, [{"event_type": "x", "event_key": str(number)} for number in range(MAX_EVENTS)])
    whole = await api.get(f"{path}?include=events")
    assert len(whole["events"]) == MAX_EVENTS
    assert not whole["more_events"]
    assert whole["events"] == await api.get(f"{path}/events?limit=1000")
    await report(api, path, {"event_type": "last"})
    whole = await api.get(f"{path}?include=events")
    assert (len(whole["events"]), whole["more_events"]) == (MAX_EVENTS, True)
    assert "events" not in await api.get(path)
    for query in ("include=everything", "include=", "includes=events", "include=events&include=events"):
        check_error(await send(api, "GET", f"{path}?{query}"), 400)


async def test_a_list_of_runs_shows_events_on_request(api: Api) -> None:
    agent = "agent-with-events"
    paths = [await new_run(api, agent_name=agent) for _ in range(3)]
    await report(api, paths[1], [{"event_type": "x", "event_key": str(number)} for number in range(101)])
    following, found = f"{RUNS}?agent_name={agent}&include=events&limit=2", []
    while following:
        async with api.client.get(following) as response:
            found += await response.json()
            following = next_page(response)
    assert [(len(run["events"]), run["more_events"]) for run in found] == [(0, False), (100, True), (0, False)]
    check_error(await send(api, "GET", f"{RUNS}?include=runs"), 400)


async def test_media_types_are_those_of_a_run(api: Api) -> None:
    path = await new_run(api)
    check_error(await post(api, b"{}", f"{path}/events", {"Content-Type": "text/csv"}), 415)
    answer = await post(api, b'{"event_type":"x"}', f"{path}/events", JSON)
    assert answer.status == 201
