"""HEAD answers the headers of GET and no content, on every route, so that the connection can be used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import pytest_asyncio

from telemetryd.http import ROUTES
from tests.conftest import Api, MakeApi, exports_of, make_run
from tests.contract.wire import RUNS

EVENT_ID = "a-run"
PATHS = tuple(route.path.replace("{event_id}", EVENT_ID) for route in ROUTES if route.method == "GET")
QUERIES = (
    f"{RUNS}?count=exact&limit=1",
    f"{RUNS}/export?format=csv&status=success",
    f"{RUNS}/export?include=events",
    f"{RUNS}/{EVENT_ID}?include=events",
    "/api/v1/changes?wait=60&after=999999",
    "/metrics?format=prometheus",
)
WRONG = (
    "/nope",
    f"{RUNS}/nobody",
    f"{RUNS}?limit=0",
    f"{RUNS}/export?format=xls",
    f"{RUNS}/stream?limit=1",
    f"{RUNS}/batch",
)
NOT_THE_SAME = {"date", "x-request-id", "content-disposition"}
"""Headers that hold the time, or a number."""
CHANGING = ("/health", "/metrics", "/api/v1/metadata", "/api/v1/stats", "/api/v1/regressions")
"""What is longer or shorter each time."""


class Wire:
    """A connection on which answers follow each other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, method: str, path: str) -> tuple[int, dict[str, str]]:
        """Send a request; return status and headers of the answer."""
        self.writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n\r\n".encode())
        async with asyncio.timeout(10):
            head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        return int(first.split()[1]), {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }

    async def content(self, headers: dict[str, str]) -> None:
        """Read to the end of an answer's content."""
        if headers.get("transfer-encoding") != "chunked":
            await self.reader.readexactly(int(headers.get("content-length", "0")))
            return
        while size := int(await self.reader.readline(), 16):
            await self.reader.readexactly(size + 2)
        await self.reader.readexactly(2)


@asynccontextmanager
async def connected(api: Api) -> AsyncIterator[Wire]:
    assert api.client.port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def fill(api: Api) -> None:
    for event_id, status in ((EVENT_ID, "running"), ("another", "success")):  # together an answer that goes in pieces
        await api.post(make_run(event_id=event_id, status=status, error_details="x" * 600_000))
    await api.call("POST", f"{RUNS}/{EVENT_ID}/events", json={"event_type": "step"})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled(shared: Api) -> Api:
    await fill(shared)
    return shared


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", [*PATHS, *QUERIES, *WRONG])
async def test_head_is_get_without_its_content(filled: Api, path: str) -> None:
    async with connected(filled) as wire:
        status, described = await wire.ask("HEAD", path)
        alive, _ = await wire.ask("HEAD", "/health")  # comes at once, and nothing else before it
        assert alive == 200
        got, headers = await wire.ask("GET", path.replace("wait=60", "wait=0"))
        assert got == status
        left_out = NOT_THE_SAME | {"transfer-encoding"}  # RFC 9110 §9.3.2: of a length that only the content shows
        if path.startswith(CHANGING):
            left_out |= {"content-length"}
        assert {name: described[name] for name in described.keys() - left_out} == {
            name: headers[name] for name in headers.keys() - left_out
        }
        if not path.startswith(f"{RUNS}/stream") or got != 200:  # which has no end
            await wire.content(headers)
            assert (await wire.ask("GET", "/health"))[0] == 200


async def test_head_of_an_export_copies_nothing_and_of_the_stream_opens_none(make_api: MakeApi) -> None:
    api = await make_api()
    await fill(api)
    exports_of(api)._running = 2  # so that there is room for no other
    async with connected(api) as wire:
        status, headers = await wire.ask("HEAD", f"{RUNS}/export?status=success")
        assert (status, headers["x-total-count"]) == (200, "1")
        assert (await wire.ask("GET", f"{RUNS}/export?status=success"))[0] == 503
    async with connected(api) as wire:
        for _ in range(3):
            assert (await wire.ask("HEAD", f"{RUNS}/stream"))[0] == 200
    metrics = await api.client.get("/metrics?format=prometheus")
    assert "telemetryd_tails_open 0.0" in await metrics.text()
