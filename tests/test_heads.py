"""What requests hold besides their bodies: bounded for each, bounded for all, and let go when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import pytest

from telemetryd.engine.lanes import Lane
from telemetryd.engine.registry import Handler
from telemetryd.engine.sqlite.statements import answers
from telemetryd.model.queries import ListRuns
from telemetryd.services.admission import METRICS
from telemetryd.services.feed import FeedBounds
from telemetryd.web import connections
from telemetryd.web.connections import _Server
from telemetryd.web.heads import HeadTooLargeError, Parser
from tests.conftest import Api, MakeApi, eventually, make_run, reading
from tests.contract.wire import send_raw
from tests.test_feed import feed_of
from tests.test_reader import endless

CHANGES = b"GET /api/v1/changes?wait=60&after=0 HTTP/1.1\r\nHost: localhost\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
CHUNKED = b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
RUNS = b"GET /api/v1/runs HTTP/1.1\r\nHost: localhost\r\n"


def fields(size: int, each: int = 4_000) -> bytes:
    return b"".join(b"X-%d: %b\r\n" % (number, b"y" * each) for number in range(size // each))


@asynccontextmanager
async def sent(api: Api, request: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Send bytes; at the end of the block the client leaves."""
    assert api.client.port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
    try:
        writer.write(request)
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def held(api: Api) -> int:
    server = api.client.server.runner.server  # type: ignore[union-attr]
    assert isinstance(server, _Server)
    return server.held.bytes


# --- One head ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEALTH + fields(80_000) + b"\r\n",
        HEALTH + fields(480_000),
        RUNS + b"\r\n" + HEALTH + fields(480_000) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b" " * 500_000,
        HEALTH + fields(10_000, 10_000) + b"\r\n",
        HEALTH.replace(b"health", b"h" * 10_000) + b"\r\n",
    ],
    ids=["ended", "unfinished", "pipelined", "blanks", "line", "path"],
)
async def test_a_head_that_is_too_large_is_refused_and_let_go(api: Api, request_bytes: bytes) -> None:
    *_, answer = await send_raw(api, request_bytes)
    assert answer.status == 431
    assert answer.json == {
        "detail": "The head of the request is too large: it may have 65536 bytes, of them 8190 in a line"
    }
    await eventually(lambda: held(api) == 0)


async def test_a_head_may_have_sixty_kilobytes_in_any_pieces(api: Api) -> None:
    async with sent(api, b"") as (reader, writer):
        for request in (HEALTH.replace(b"close", b"keep-alive"), HEALTH):
            head = request + fields(60_000) + b"\r\n"
            for start in range(0, len(head), 7_000):
                writer.write(head[start : start + 7_000])
                await writer.drain()
                await asyncio.sleep(0)
        assert (await reader.read()).count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize(
    "sizes", [[70_000, *[2_000] * 60], [*[2_000] * 60, 70_000], [30_000] * 12], ids=["first", "last", "each"]
)
async def test_bodies_of_pipelined_requests_are_no_heads(api: Api, sizes: list[int]) -> None:
    """What comes after the end of a body, or waits for its turn, holds bodies as well as heads."""
    bodies = [json.dumps(make_run(error_details="x" * size)).encode() for size in sizes]
    head = b"POST /api/v1/runs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    requests = b"".join(head % len(body) + body for body in bodies)
    async with sent(api, requests + HEALTH + b"\r\n") as (reader, _):
        answers = await asyncio.wait_for(reader.read(), 60)
    assert answers.count(b"HTTP/1.1 201 ") == len(bodies)
    assert answers.count(b"HTTP/1.1 200 ") == 1


BAD = {
    "line": (HEALTH + fields(70_000, 70_000) + b"\r\n", 431),
    "head": (HEALTH + fields(70_000) + b"\r\n", 431),
    "unfinished": (HEALTH + fields(200_000), 431),
    "garbage": (b"garbage\r\n\r\n", 400),
    "chunk": (CHUNKED + b"zz\r\n", 400),
}


async def answers_to(api: Api, begun: bytes, rest: bytes) -> bytes:
    """Send the rest when the daemon has what is begun, and return all that it answers until it closes."""
    async with sent(api, begun) as (reader, writer):
        await eventually(lambda: bool(held(api)) == bool(begun))
        writer.write(rest)
        return await asyncio.wait_for(reader.read(), 30)


@pytest.mark.parametrize(("bad", "status"), BAD.values(), ids=BAD)
async def test_requests_before_a_bad_one_are_answered(api: Api, bad: bytes, status: int) -> None:
    """One 400 was the answer to all that came in with a head that was too large; nothing was stored."""
    head = b"POST /api/v1/runs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for cut in (0, -9):  # all at once, and all but the first request after that has begun
        runs = [make_run(event_id=f"{cut}-{place}") for place in range(4)]
        first, second, third, late = (head % len(body) + body for body in (json.dumps(run).encode() for run in runs))
        requests = first + second + third + bad + late
        answers = await answers_to(api, first[:cut], requests[len(first[:cut]) :])
        assert re.findall(rb"HTTP/1\.[01] (\d+) ", answers) == [b"201", b"201", b"201", b"%d" % status]
        await eventually(lambda: held(api) == 0)
    stored = {run["event_id"] for run in await api.list()}
    assert stored == {f"{cut}-{place}" for cut in (0, -9) for place in range(3)}


def chunked(body: bytes, each: int) -> bytes:
    """A request whose body comes in chunks of so many bytes."""
    chunks = (body[start : start + each] for start in range(0, len(body), each))
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


@pytest.mark.parametrize("piece", [1_009, 1 << 20])
@pytest.mark.parametrize("sizes", [[60_000], [4_000] * 40], ids=["one", "pipelined"])
async def test_the_framing_of_chunks_is_no_head(sizes: list[int], piece: int) -> None:
    parser = Parser(Mock(), asyncio.get_running_loop())
    wire = b"".join(chunked(b"x" * size, 4) for size in sizes) + CHUNKED[:40]
    pieces = [wire[:140], *(wire[start : start + piece] for start in range(140, len(wire), piece)), *[b""] * len(sizes)]
    found = 0
    for data in pieces:
        messages, _, _ = parser.feed_data(data)
        found += len(messages)
        for _ in messages:
            parser.message_consumed()
    assert found == len(sizes)
    of_head = parser.held
    parser.feed_data(b"a" * 1_000)
    assert parser.held <= of_head + 3_000 <= 10_000
    parser.feed_data(b"\r\n" + fields(70_000))
    with pytest.raises(HeadTooLargeError):
        parser.feed_data(b"")


# --- All of them ---------------------------------------------------------------------------------


async def test_when_requests_hold_too_much_those_with_most_of_it_are_cut(
    make_api: MakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api = await make_api(bounds=connections.ConnectionBounds(held_bytes=500_000))
    waiting = feed_of(api)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(sent(api, CHANGES + b"\r\n"))
        await eventually(lambda: waiting.waits == 1)
        large = [
            await stack.enter_async_context(sent(api, begun + fields(50_000) + end))
            for begun, end in ((CHANGES, b"\r\n"), (RUNS, b""), (HEALTH.replace(b"close", b"keep-alive"), b"\r\n")) * 2
        ]
        ends = [asyncio.create_task(reader.read()) for reader, _ in large]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        await eventually(lambda: held(api) <= 500_000)
        assert (await api.get("/health"))["status"] == "ok"
        assert waiting.waits >= 1
        for end in ends:
            end.cancel()
    assert "Connections cut: requests hold too much besides their bodies" in caplog.messages
    await eventually(lambda: waiting.waits == 0)


async def test_only_so_many_wait_for_changes(api: Api) -> None:
    feed_of(api).bounds = FeedBounds(waits=1)
    async with sent(api, CHANGES + b"\r\n"):
        await eventually(lambda: feed_of(api).waits == 1)
        refused = await api.get("/api/v1/changes?wait=60&after=0", 503)
        assert refused["detail"] == "Too many requests wait for changes; try again later, or without wait."
        assert (await api.get("/api/v1/changes?after=0"))["changes"] == []


# --- A client that leaves ------------------------------------------------------------------------


async def test_a_wait_ends_when_its_client_leaves(api: Api) -> None:
    async with sent(api, CHANGES + b"\r\n"):
        await eventually(lambda: feed_of(api).waits == 1)
    await eventually(lambda: feed_of(api).waits == 0)
    assert held(api) == 0
    text = await (await api.client.get("/metrics?format=prometheus")).text()
    assert 'telemetryd_http_requests_total{method="GET",route="/api/v1/changes",status="499"} 1.0' in text


async def test_a_query_ends_when_its_client_leaves(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()

    def search(connection: sqlite3.Connection, query: ListRuns) -> Any:
        began.set()
        return endless(connection)

    monkeypatch.setitem(answers.REGISTRY.handlers, ListRuns, Handler(search, lambda _: False))
    idle = reading(api)._readers()._idle[Lane.QUICK]
    all_of_them = api.settings.db_readers - api.settings.db_readers // 2
    await eventually(lambda: idle.qsize() == all_of_them)  # the start asks something, too
    async with sent(api, RUNS + b"\r\n"):
        await asyncio.to_thread(began.wait)
        assert idle.qsize() == all_of_them - 1
    await eventually(lambda: idle.qsize() == all_of_them)


async def test_a_write_goes_on_when_its_client_leaves(api: Api) -> None:
    gate, began = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        gate.wait()

    reading(api)._database.groups._check_place = wait
    body = json.dumps(make_run(event_id="left")).encode()
    head = (
        b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    async with sent(api, head % len(body) + body):
        await asyncio.to_thread(began.wait)
    await eventually(lambda: held(api) == 0)
    created = api.client.app[METRICS]._runs["created"]
    assert created._value.get() == 0
    gate.set()
    await eventually(lambda: created._value.get() == 1)
    await api.get("/api/v1/runs/left")
    await api.post(make_run(event_id="left"), 200)
