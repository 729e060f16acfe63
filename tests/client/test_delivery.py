"""A bad daemon, a bad network: everything arrives once, and nothing blocks what comes after it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import os
import random
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.client import Config
from telemetryd.client.answers import MAX_ROWS, parse_flow, retry_after_s
from telemetryd.client.batch import Batch
from telemetryd.client.config import Pace
from telemetryd.client.counters import Counters
from telemetryd.client.delivery import Delivery, RetryError
from telemetryd.client.folder import waiting
from telemetryd.client.lines import encode
from telemetryd.client.transport import Answer, Transport
from telemetryd.client.worker import Backoff
from telemetryd.model.tokens import Asked, Limits, Scope
from telemetryd.model.tokens import make as make_token
from telemetryd.ops import token_file
from telemetryd.services.admission import QUOTAS
from tests.client.conftest import MakeClient, flushed, states, stored, url_of
from tests.conftest import Api, MakeApi
from tests.tools.bad_proxy import BREAKS, DAEMONS, ERRORS, BadProxy


@pytest.fixture
def pace() -> Pace:
    """Back off in hundredths of a second, so that the tests need not wait."""
    return Pace(first_pause_s=0.005, longest_pause_s=0.02, first_look_s=0)


def letters(buffer: Path) -> list[Any]:
    path = buffer / "dead-letter.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(number: int, **fields: Any) -> dict[str, Any]:
    return {"event_id": f"e-{number}", "agent_name": "a", "job_type": "j", "status": "success", **fields}


def whole(number: int, **fields: Any) -> dict[str, Any]:
    """A run as another program may have written it."""
    return finished(number, run_id=f"r-{number}", start_time="2025-12-24T10:00:00Z", **fields)


def update(event_id: str, **fields: Any) -> dict[str, Any]:
    """A change as another program may have written it; a run of ours leaves out what the daemon would refuse."""
    return {"op": "update", "event_id": event_id, "fields": fields}


@pytest.mark.parametrize("trouble", [*ERRORS, *BREAKS])
async def test_after_any_trouble_everything_is_stored_once(
    api: Api, proxy: BadProxy, make_client: MakeClient, buffer: Path, trouble: str
) -> None:
    proxy.script = [trouble, "pass", trouble, trouble]
    client = make_client(proxy.url)
    for number in range(30):
        client.record(finished(number))
    with client.run("a", "tracked") as run:
        run.event("step", number=1)
        await flushed(client)
    for number in range(30, 40):
        client.record(finished(number))
    proxy.script += [trouble, trouble]
    await flushed(client)
    rows = await api.list(agent_name="a", limit=1000)
    assert sorted(row["event_id"] for row in rows) == sorted([*(f"e-{n}" for n in range(40)), run.event_id])
    assert {row["status"] for row in rows} == {"success"}
    assert len(await api.get(f"/api/v1/runs/{run.event_id}/events")) == 1
    assert not letters(buffer)
    assert client.stats()["retries"] >= (0 if trouble == "slow" else 2)
    assert client.stats()["problem"] is None


async def test_random_trouble_at_every_second_request(api: Api, proxy: BadProxy, make_client: MakeClient) -> None:
    moment = random.Random(os.urandom(4))
    trouble = [*ERRORS, *(kind for kind in BREAKS if kind != "slow")]
    proxy.script = [moment.choice(["pass", moment.choice(trouble)]) for _ in range(200)]
    client = make_client(proxy.url)
    runs = []
    for number in range(60):
        with client.run("a", "tracked") as run:
            run.items(succeeded=number)
            run.event("step", number=number)
            if number % 7 == 0:
                await asyncio.sleep(0.02)
        runs.append(run)
    await flushed(client)
    rows = {row["event_id"]: row for row in await api.list(agent_name="a", limit=1000)}
    assert rows.keys() == {run.event_id for run in runs}
    for number, run in enumerate(runs):
        assert (rows[run.event_id]["status"], rows[run.event_id]["items_succeeded"]) == ("success", number)
        assert len(await api.get(f"/api/v1/runs/{run.event_id}/events")) == 1


# --- The three ways in which the replaced client lost data ---------------------------------------


async def test_an_update_made_while_the_daemon_is_down_is_not_replayed_as_a_duplicate_create(
    api: Api, proxy: BadProxy, make_client: MakeClient
) -> None:
    client = make_client(proxy.url)
    with client.run("a", "j") as run:
        await flushed(client)
        proxy.script = ["503"] * 8
        run.items(succeeded=3)
    await flushed(client)
    ended = await api.get(f"/api/v1/runs/{run.event_id}")
    assert (ended["status"], ended["items_succeeded"]) == ("success", 3)


async def test_an_end_that_joined_a_start_whose_answer_was_lost_is_not_lost_with_it(
    api: Api, proxy: BadProxy, make_client: MakeClient, buffer: Path, pace: Pace
) -> None:
    """The start is stored, nobody tells; what is sent again is start and end in one, and the daemon says: duplicate."""
    proxy.script = ["lost after", *["503"] * 1000]
    first = make_client(proxy.url, linger_s=0)
    run = first.run("a", "j").start()
    while not proxy.seen:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    first._sender.stop()
    await asyncio.to_thread(first._sender.has_stopped, 5)
    proxy.script = []
    stream = first._spool.stream
    assert stream is not None
    assert (stream.number, stream.offset) == (0, 0)
    run.finish("partial")
    first._spool.close()
    second = make_client(proxy.url, pace=replace(pace, look_every_s=0.1))
    second.record(finished(1))
    await flushed(second)
    while stream.name in waiting(buffer):  # what others left comes after its own  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (await api.get(f"/api/v1/runs/{run.event_id}"))["status"] == "partial"
    assert [path.split("/")[-1] for method, path, _ in proxy.seen if method == "PATCH"] == [run.event_id]


async def test_one_event_with_422_does_not_block_those_behind_it(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    client = make_client(url_of(api))
    for number in range(20):
        client.write(whole(number, items_failed=-1 if number % 5 == 2 else 0))
    await flushed(client)
    assert len(await api.list(agent_name="a")) == 16
    told = letters(buffer)
    assert [letter["line"]["event_id"] for letter in told] == ["e-2", "e-7", "e-12", "e-17"]
    assert {letter["status"] for letter in told} == {422}
    assert all("items_failed" in json.dumps(letter["reason"]) for letter in told)
    assert client.stats()["dead"] == 4


async def test_a_batch_answered_with_errors_is_not_taken_for_sent(
    api: Api, proxy: BadProxy, make_client: MakeClient, buffer: Path
) -> None:
    """Each line is stored or a dead letter, also if the daemon says only how many errors there are."""
    client = make_client(proxy.url)
    real = proxy._forward

    def without_details(request: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        status, headers, answer = real(request, body)
        told = json.loads(answer)
        told.pop("error_details", None)
        return status, headers, json.dumps(told).encode()

    proxy._forward = without_details  # type: ignore[method-assign]
    for number in range(9):
        client.write(whole(number, job_type="" if number == 4 else "j"))
    await flushed(client)
    assert {row["event_id"] for row in await api.list(agent_name="a")} == {f"e-{n}" for n in range(9) if n != 4}
    assert [letter["line"]["event_id"] for letter in letters(buffer)] == ["e-4"]


# --- Poison --------------------------------------------------------------------------------------


async def test_what_is_said_of_a_refused_run_follows_it_to_the_dead_letters(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    client = make_client(url_of(api))
    bad = whole(1, job_type="")
    client.write(bad)
    await flushed(client)
    client.write({"op": "event", "event_id": bad["event_id"], "event": {"event_key": "k", "event_type": "step"}})
    client.write(update(bad["event_id"], status="success"))
    with client.run("a", "j") as good:
        pass
    await flushed(client)
    assert (await api.get(f"/api/v1/runs/{good.event_id}"))["status"] == "success"
    reasons = [(letter["status"], letter["reason"]) for letter in letters(buffer)[1:]]
    assert reasons == [(404, f"Run not found: {bad['event_id']}")] * 2


async def test_a_bad_change_costs_neither_the_start_nor_the_end_of_its_run(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    client = make_client(url_of(api))
    together = client.run("a", "together").start()
    client.write(update(together.event_id, items_succeeded=-1))
    together.finish("partial", items_failed=2)
    apart = client.run("a", "apart").start()
    await flushed(client)
    client.write(update(apart.event_id, items_succeeded=-1))
    client.write(update(apart.event_id, status="partial", items_skipped=-5, items_failed=3))
    await flushed(client)
    for run, failed in ((together, 2), (apart, 3)):
        ended = await api.get(f"/api/v1/runs/{run.event_id}")
        assert (ended["status"], ended["items_failed"], ended["items_succeeded"]) == ("partial", failed, 0)
    assert [list(letter["line"]["fields"])[:1] for letter in letters(buffer)] == [
        ["items_succeeded"],
        ["items_succeeded"],
        ["status"],
    ]


async def test_a_bad_event_costs_the_other_events_nothing(api: Api, make_client: MakeClient, buffer: Path) -> None:
    client = make_client(url_of(api))
    with client.run("a", "j") as run:
        for number in range(9):
            if number == 5:
                event = {"event_key": "bad", "event_type": "", "payload": {"number": number}}
                client.write({"op": "event", "event_id": run.event_id, "event": event})
            else:
                run.event("step", number=number)
    await flushed(client)
    events = await api.get(f"/api/v1/runs/{run.event_id}/events")
    assert [event["payload"]["number"] for event in events] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert [letter["line"]["event"]["payload"] for letter in letters(buffer)] == [{"number": 5}]


async def test_lines_that_are_no_lines_go_to_the_dead_letters(api: Api, make_client: MakeClient, buffer: Path) -> None:
    client = make_client(url_of(api))
    client.record(finished(1))
    for rubbish in (
        b"\xff\x00\n",
        b"{}\n",
        b"[1]\n",
        b'{"op":"dance","event_id":"x"}\n',
        b"\n",
        b'{"event_id":"half","x"\n',
    ):
        client._spool.append(rubbish)
    client._spool.append(
        b'{"event_id":"torn","agent_na' + json.dumps(finished(2)).encode().replace(b": ", b":") + b"\n"
    )
    client.record(finished(3))
    await flushed(client)
    rows = await api.list(agent_name="a")
    assert {row["event_id"] for row in rows} == {"e-1", "e-3"}, "e-2 lacks what record() adds"
    assert len(letters(buffer)) == 6


async def test_a_torn_line_does_not_take_the_next_one_with_it(api: Api, make_client: MakeClient, buffer: Path) -> None:
    client = make_client(url_of(api))
    client._spool.append(b'{"event_id":"torn","agent_na')
    client.record(finished(2))
    with client.run("a", "j") as run:
        pass
    await flushed(client)
    assert {row["event_id"] for row in await api.list(agent_name="a")} == {"e-2", run.event_id}
    assert not letters(buffer)


async def test_a_run_too_large_for_the_daemon_is_a_dead_letter(
    make_api: MakeApi, make_client: MakeClient, buffer: Path
) -> None:
    api = await make_api(max_body_bytes=4096)
    client = make_client(url_of(api))
    for number in range(30):
        client.record(finished(number, output_summary="x" * (8000 if number == 11 else 300)))
    await flushed(client)
    assert len(await api.list(agent_name="a")) == 29
    assert [(letter["status"], letter["line"]["event_id"]) for letter in letters(buffer)] == [(413, "e-11")]


async def test_a_line_at_which_the_daemon_breaks_every_time_is_given_up_at_last(
    api: Api, proxy: BadProxy, make_client: MakeClient, buffer: Path
) -> None:
    real = proxy._forward

    def break_at(request: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return (500, DAEMONS, b'{"detail":"Internal error"}') if b'"e-7"' in body else real(request, body)

    proxy._forward = break_at  # type: ignore[method-assign]
    client = make_client(proxy.url)
    for number in range(20):
        client.record(finished(number))
    await flushed(client)
    assert len(await api.list(agent_name="a")) == 19
    assert [(letter["status"], letter["line"]["event_id"]) for letter in letters(buffer)] == [(500, "e-7")]


@pytest.mark.parametrize("event_id", ["", "x" * 9000, "x" * 2_000_000, "é" * 2000, ".", "..", "a/../b"], ids=range(7))
async def test_an_event_id_that_has_no_place_in_an_address_blocks_nobody(
    api: Api, make_client: MakeClient, buffer: Path, event_id: str
) -> None:
    client = make_client(url_of(api))
    client.record(finished(1))
    client.write({"op": "update", "event_id": event_id, "fields": {"status": "success"}})
    client.write({"op": "event", "event_id": event_id, "event": {"event_key": "k", "event_type": "x"}})
    run = client.run("a", "j", event_id=event_id or "good", heartbeat=0.01).start()
    run.event("x")
    client.record(finished(2))
    await flushed(client)
    run.finish()
    client.record(finished(3))
    await flushed(client)
    assert {f"e-{n}" for n in (1, 2, 3)} <= {row["event_id"] for row in await api.list(agent_name="a", limit=1000)}
    assert client.stats()["problem"] is None
    stored_after_all = [row for row in await api.list(agent_name="a", limit=1000) if row["event_id"] == event_id]
    told = {letter["line"].get("op") for letter in letters(buffer)}
    assert stored_after_all or {"event", "update"} <= told


@pytest.mark.parametrize("status", [400, 405, 414])
async def test_a_proxy_that_refuses_one_path_costs_that_line_only(
    api: Api, proxy: BadProxy, make_client: MakeClient, buffer: Path, status: int
) -> None:
    real = proxy._forward

    def refuse(request: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return (status, {}, b"no") if "odd" in request.path else real(request, body)

    proxy._forward = refuse  # type: ignore[method-assign]
    client = make_client(proxy.url)
    with client.run("a", "j", event_id="even") as even:
        await flushed(client)
        client.write({"op": "update", "event_id": "odd", "fields": {"status": "success"}})
        client.write({"op": "event", "event_id": "odd", "event": {"event_key": "k", "event_type": "x"}})
    assert not await asyncio.to_thread(client.flush, 60), "what is set aside is not acknowledged"
    assert (await api.get(f"/api/v1/runs/{even.event_id}"))["status"] == "success"
    assert client.stats()["aside"] == 2
    assert not letters(buffer), "nobody knows what the daemon would say"


async def test_a_proxy_that_refuses_every_change_makes_no_dead_letters(
    api: Api, proxy: BadProxy, make_client: MakeClient, buffer: Path
) -> None:
    real = proxy._forward

    def refuse(request: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return (405, {}, b"no") if request.command == "PATCH" else real(request, body)

    proxy._forward = refuse  # type: ignore[method-assign]
    client = make_client(proxy.url)
    with client.run("a", "j"):
        await flushed(client)
    assert not await asyncio.to_thread(client.flush, 0.5)
    assert "405" in client.stats()["problem"]
    assert not letters(buffer)


async def test_lines_that_other_programs_have_written_with_blanks_are_read(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    lines = [
        finished(1, status="running", run_id="r", start_time="2025-12-24T10:00:00Z"),
        {"op": "event", "event_id": "e-1", "event": {"event_key": "k", "event_type": "x"}},
        {"event_id": "e-1", "fields": {"status": "partial"}, "op": "update"},
        finished(2, run_id="r2", start_time="2025-12-24T10:00:00Z", output_summary='an "op" of its own'),
    ]
    client = make_client(url_of(api))
    for line in lines:
        client._spool.append(json.dumps(line).encode() + b"\n")
    client.record(finished(3))
    await flushed(client)
    assert len(await api.list(agent_name="a")) == 3
    run = await api.get("/api/v1/runs/e-1?include=events")
    assert (run["status"], len(run["events"])) == ("partial", 1)
    assert not letters(buffer)


async def test_an_answer_that_trickles_is_given_up_as_a_whole(
    api: Api, proxy: BadProxy, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trickle(request: Any, *_: Any) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 200:
            try:
                request.wfile.write(bytes([byte]))
            except OSError:
                return
            time.sleep(0.1)

    real = proxy._answer
    monkeypatch.setattr(proxy, "_answer", trickle)
    client = make_client(proxy.url, timeout_s=0.4)
    began = time.monotonic()
    client.record(finished(1))
    while not client.stats()["retries"]:
        assert time.monotonic() - began < 15, "as long as the bytes come"
        await asyncio.sleep(0.01)
    assert "timed out" in client.stats()["problem"]
    monkeypatch.setattr(proxy, "_answer", real)
    await flushed(client)


async def test_the_machines_own_address_is_local(api: Api, make_client: MakeClient) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("no address but the loopback's")
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("no address but the loopback's")
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_server((own, 0)) as listening:
        transport = Transport(Config(url=f"http://{own}:{listening.getsockname()[1]}"))
        assert transport.is_local is None

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        await asyncio.gather(asyncio.to_thread(serve), asyncio.to_thread(transport.request, "GET", "/health"))
    assert transport.is_local
    transport.close()


# --- Refusals ------------------------------------------------------------------------------------


async def test_a_wrong_token_is_said_once_and_everything_waits(
    make_api: MakeApi, make_client: MakeClient, buffer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token="0123456789")
    client = make_client(url_of(api), token="wrong-token")
    with caplog.at_level(logging.WARNING, "telemetryd.client"):
        client.record(finished(1))
        for _ in range(3):
            assert not await asyncio.to_thread(client.flush, 0.2)
    own = [record.getMessage() for record in caplog.records if record.name == "telemetryd.client"]
    assert len([text for text in own if "401" in text]) == 1
    assert "401" in client.stats()["problem"]
    assert client._sender._worker is not None
    assert client._sender._worker._quiet_until - time.monotonic() > 20, "slowly"
    await asyncio.to_thread(client.close)
    assert not letters(buffer)
    right = make_client(url_of(api), token="0123456789")
    right.record(finished(2))
    await flushed(right)
    await stored(api, 2, Authorization="Bearer 0123456789")


async def test_an_address_where_something_else_answers_loses_nothing(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    client = make_client(url_of(api) + "/nowhere")
    with client.run("a", "j") as run:
        run.event("x")
    assert not await asyncio.to_thread(client.flush, 0.3)
    assert "404" in client.stats()["problem"]
    await asyncio.to_thread(client.close)
    assert not letters(buffer)
    assert states(buffer) == {".ready": 1, ".lock": 1}


async def test_retry_after_is_honoured(
    proxy: BadProxy, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ERRORS, "503", (503, {"Retry-After": "1"}, b"{}"))
    proxy.script = ["503"]
    client = make_client(proxy.url)
    began = time.monotonic()
    client.record(finished(1))
    while len(proxy.seen) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert 1.0 <= time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 5),
        ("0", 0),
        ("", 0),
        ("soon", 0),
        ("-3", 0),
        ("1e9", 3600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("nan", 0),
    ],
)
def test_retry_after_is_read_in_every_form(text: str, seconds: float) -> None:
    assert retry_after_s(Answer(503, {"retry-after": text}, None)) == seconds


def test_a_date_in_retry_after_is_a_time_to_come() -> None:
    from email.utils import formatdate

    assert 55 < retry_after_s(Answer(503, {"retry-after": formatdate(time.time() + 60, usegmt=True)}, None)) <= 60


def test_the_pauses_grow_and_are_spread_out() -> None:
    backoff = Backoff(1, 60)
    pauses = [backoff.pause_s(RetryError("x")) for _ in range(12)]
    assert all(pause <= min(2**number, 60) for number, pause in enumerate(pauses))
    many = [Backoff(1, 60).pause_s(RetryError("x")) for _ in range(500)]
    assert min(many) < 0.1
    assert max(many) > 0.9
    assert Backoff().pause_s(RetryError("x", 7)) >= 7
    backoff.reset()
    assert backoff.pause_s(RetryError("x")) <= 1


# --- Flow control --------------------------------------------------------------------------------


async def test_the_daemons_pace_is_kept(api: Api, proxy: BadProxy, make_client: MakeClient) -> None:
    proxy.flow = "batch=10, pause=40"
    client = make_client(proxy.url, linger_s=0.3)
    client.record(finished(0))
    await flushed(client)
    began = time.monotonic()
    before = len(proxy.seen)
    for number in range(1, 51):
        client.record(finished(number))
    await flushed(client)
    assert len(proxy.seen) - before == 5
    assert time.monotonic() - began >= 4 * 0.04
    assert len(await api.list(agent_name="a", limit=1000)) == 51


@given(st.text())
def test_any_flow_header_gives_a_usable_pace(text: str) -> None:
    rows, pause_s = parse_flow(text)
    assert 1 <= rows <= MAX_ROWS
    assert 0 <= pause_s <= 60


def test_the_flow_header_is_read() -> None:
    assert parse_flow("batch=250, pause=1500") == (250, 1.5)
    assert parse_flow("pause=10,new=thing") == (1000, 0.01)
    assert parse_flow("batch=0") == (1, 0)


# --- The connection ------------------------------------------------------------------------------


async def test_a_unix_socket_will_do(make_api: MakeApi, make_client: MakeClient, tmp_path: Path) -> None:
    api = await make_api()
    path = tmp_path / "s.sock"
    from aiohttp import web

    site = web.UnixSite(api.client.server.runner, str(path))  # type: ignore[arg-type]
    await site.start()
    client = make_client(f"unix://{path}")
    client.record(finished(1))
    await flushed(client)
    assert len(await api.list(agent_name="a")) == 1


async def test_one_connection_is_kept(api: Api, proxy: BadProxy, make_client: MakeClient) -> None:
    client = make_client(proxy.url)
    connections = set()
    real = proxy.handle

    def watched(request: Any) -> None:
        connections.add(request.client_address)
        real(request)

    proxy.handle = watched  # type: ignore[method-assign]
    for number in range(5):
        client.record(finished(number))
        await flushed(client)
    assert len(connections) == 1
    assert "authorization" not in proxy.headers[0]


async def test_bodies_are_compressed_on_the_way_to_another_machine(
    api: Api, proxy: BadProxy, make_client: MakeClient
) -> None:
    client = make_client(proxy.url, token="secret-token")
    client.record(finished(0))
    await flushed(client)
    assert "content-encoding" not in proxy.headers[0], "not on this machine"
    assert client._sender._worker is not None
    client._sender._worker._transport.is_local = False
    for number in range(1, 50):
        client.record(finished(number))
    await flushed(client)
    compressed = [b for b, h in zip(proxy.bodies, proxy.headers, strict=True) if h.get("content-encoding") == "gzip"]
    assert compressed
    assert b'"e-1"' in gzip.decompress(compressed[0])
    assert proxy.headers[-1]["authorization"] == "Bearer secret-token"
    assert len(await api.list(agent_name="a")) == 50


async def test_a_daemon_that_comes_later_gets_everything(
    make_api: MakeApi, make_client: MakeClient, free_port: int
) -> None:
    client = make_client(f"http://127.0.0.1:{free_port}")
    runs = []
    for _ in range(5):
        with client.run("a", "j") as run:
            run.event("x")
        runs.append(run)
    assert not await asyncio.to_thread(client.flush, 0.2)
    api = await make_api()
    from aiohttp import web

    site = web.TCPSite(api.client.server.runner, "127.0.0.1", free_port)  # type: ignore[arg-type]
    await site.start()
    await flushed(client)
    assert {row["event_id"] for row in await api.list(agent_name="a")} == {run.event_id for run in runs}


async def test_a_peer_that_accepts_and_says_nothing_holds_up_neither_agent_nor_end(
    make_client: MakeClient, buffer: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = make_client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=30)
        began = time.monotonic()
        for number in range(1000):
            client.record(finished(number))
        client.close(0.3)
        assert time.monotonic() - began < 20, "no call waits for the peer"
    assert sum(path.read_bytes().count(b"\n") for path in buffer.glob("*.jsonl.*")) == 1000  # noqa: ASYNC240


AGENTS = ("web-busy", "web-idle", "web-busy", "other")


async def test_items_beyond_a_quota_come_again_later_and_those_of_others_are_set_down(
    make_api: MakeApi, tmp_path: Path
) -> None:
    web = Asked("web", (Scope.INGEST,), "web-", timedelta(days=1), Limits())
    token, secret = make_token(web, datetime.now(UTC))
    token_file.change(tmp_path / "telemetry.sqlite.tokens", lambda _: [token])
    api = await make_api(api_auth_enabled=True, api_auth_token="of-the-operator", quota_runs_per_minute=1)

    async def statuses() -> dict[str, str]:
        rows = await api.get("/api/v1/runs", headers={"X-API-Key": "of-the-operator"})
        return {row["event_id"]: row["status"] for row in rows}

    assert api.client.app is not None
    quota = api.client.app[QUOTAS].of("web-busy")
    quota.pay(runs=1000)
    config = Config(url=url_of(api), token=secret)
    with contextlib.closing(Transport(config)) as transport:
        buried: list[Any] = []
        counters = Counters()
        delivery = Delivery(transport, lambda *refused: buried.append(refused), counters)
        begun = [whole(number, agent_name=name, status="running") for number, name in enumerate(AGENTS)]
        ended = [update(f"e-{number}", status="success") for number in range(len(AGENTS))]
        batch = Batch.of([encode(line).rstrip() for line in (*begun, *ended)])
        with pytest.raises(RetryError, match="takes 2 of 4 runs only later"):
            await asyncio.to_thread(delivery.send, batch)
        with pytest.raises(RetryError) as caught:
            await asyncio.to_thread(delivery.send, batch)
        assert "The quota of runs per minute of the agent 'web-busy'" in str(caught.value)
        assert caught.value.wait_s > 1000, "as long as the daemon says"
        assert not caught.value.is_refusal
        assert await statuses() == {"e-1": "success"}
        quota.pay(runs=-2000)
        await asyncio.to_thread(delivery.send, batch)
    assert await statuses() == dict.fromkeys(("e-0", "e-1", "e-2"), "success")
    ((lines, status, reason),) = buried
    assert (len(lines), status, reason[0]["type"]) == (2, 403, "not_allowed")
    assert (counters.sent, counters.stored, counters.dead) == (8, 3, 2)
