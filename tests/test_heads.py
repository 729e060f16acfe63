"""What requests hold besides their bodies: bounded for each, bounded for all, and let go when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from telemetryd.engine.sqlite.readers import Lane
from telemetryd.engine.sqlite.statements import answers
from telemetryd.http import METRICS
from telemetryd.model.queries import ListRuns
from telemetryd.services.feed import Bounds
from telemetryd.web import connections
from telemetryd.web.connections import _Server
from tests.conftest import Api, MakeApi, eventually, make_run, reading
from tests.contract.wire import send_raw
from tests.test_feed import feed_of
from tests.test_reader import endless

CHANGES = b"GET /api/v1/changes?wait=60&after=0 HTTP/1.1\r\nHost: localhost\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
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
    ],
    ids=["ended", "unfinished", "pipelined", "blanks"],
)
async def test_a_head_that_is_too_large_is_refused_and_let_go(api: Api, request_bytes: bytes) -> None:
    *_, answer = await send_raw(api, request_bytes)
    assert answer.status == 431
    assert answer.json == {"detail": "The head of the request is too large: it may have 65536 bytes"}
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


# --- All of them ---------------------------------------------------------------------------------


async def test_when_requests_hold_too_much_those_with_most_of_it_are_cut(
    make_api: MakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api = await make_api(bounds=connections.Bounds(held_bytes=500_000))
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
    feed_of(api).bounds = Bounds(waits=1)
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

    monkeypatch.setitem(answers._ANSWERS, ListRuns, answers._Answer(search, lambda _: False))
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
