"""A million generated requests, valid and broken ones, pipelined: no 5xx, no hang, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import orjson
import pytest
from yarl import URL

from tests.conftest import Daemon, StartDaemon
from tests.faults.conftest import Rounds
from tests.faults.generated import Generated, Generator
from tests.faults.ledger import Ledger
from tests.faults.test_connections import open_descriptors, wait_for_descriptors
from tests.faults.test_overload import resident_mb
from tests.faults.told import Told

_CONNECTIONS = 4
_PIPELINED = 25
_HANG_S = 30
_GROWTH_MB = 40
"""How much more memory the second half of the requests may leave. It holds no leak of 100 bytes a request in a million,
but some of SQLite's page caches, which fill with the database: 40 MiB of the writer's, 4 of each reader's."""
_MOST_MB = 256
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


class Client:
    """Sends what a generator makes, over one connection after another."""

    def __init__(self, url: str, seed: int) -> None:
        address = URL(url)
        self._host, self._port = str(address.host), address.port
        self._requests = Generator(seed)
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []

    async def run(self, count: int) -> None:
        """Send until so many requests are answered."""
        enough = self.statuses.total() + count
        while self.statuses.total() < enough and not self.wrong:
            pipeline = list(_until_unframed(iter(self._requests.__next__, None), _PIPELINED))
            try:
                async with asyncio.timeout(_HANG_S):
                    await self._converse(pipeline)
            except TimeoutError:
                self.wrong.append(f"no end within {_HANG_S} s: {pipeline[-1].data[:300]!r}")
                self.statuses[599] += 1

    async def _converse(self, pipeline: list[Generated]) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        framed = [request for request in pipeline if request.is_framed]
        try:
            writer.write(b"".join(request.data for request in framed))
            for request in framed:
                if await self._is_last(reader, request):
                    return
            for request in pipeline[len(framed) :]:
                writer.write(request.data)
                writer.write_eof()  # or the rest of a body might be waited for
                await self._is_last(reader, request)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _is_last(self, reader: asyncio.StreamReader, request: Generated) -> bool:
        try:
            status, is_last, content = await _answer(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            if request.is_framed:
                self.wrong.append(f"no answer: {request.data[:300]!r}")
            return True
        self.statuses[status] += 1
        if status not in request.statuses or (status >= 400 and not _is_polite(status, content)):
            self.wrong.append(f"{status}: {request.data[:300]!r}: {content[:300]!r}")
        return is_last


def _until_unframed(requests: Iterator[Generated], count: int) -> Iterator[Generated]:
    for request in islice(requests, count):
        yield request
        if not request.is_framed:  # after it, nobody can tell what is whose answer
            return


def _is_polite(status: int, content: bytes) -> bool:
    """Return whether the content of an error has the one shape of all errors, and a bounded size."""
    answer = orjson.loads(content)
    if list(answer) != ["detail"] or len(content) >= 100_000:
        return False
    return status != 422 or bool(
        answer["detail"]
        and all(set(fault) == {"loc", "msg", "type"} for fault in answer["detail"])
        and all(fault["loc"][0] == "body" and len(fault["msg"]) <= 400 for fault in answer["detail"])
    )


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    content = await reader.readexactly(int(length[1]) if length is not None else 0)
    is_last = head.startswith(b"HTTP/1.0") or b"\r\nconnection: close\r\n" in head.lower()
    return int(head[9:12]), is_last, content


async def _send_generated(daemon: Daemon, ledger: Ledger, count: int) -> None:
    told = Told(daemon.url)
    assert await asyncio.to_thread(told.send) == 201
    clients = [Client(daemon.url, seed) for seed in range(_CONNECTIONS)]
    unexpected = await _send_half(daemon, clients, count // 2)
    memory, descriptors = resident_mb(daemon), open_descriptors(daemon)
    unexpected += await _send_half(daemon, clients, count // 2)
    statuses = sum((client.statuses for client in clients), Counter())
    wrong = [line for client in clients for line in client.wrong]
    assert not unexpected, unexpected[:3]
    assert not wrong, wrong[:10]
    assert await asyncio.to_thread(told.send) == 201
    wait_for_descriptors(daemon, descriptors + 4)
    assert resident_mb(daemon) - memory < _GROWTH_MB, "memory must not grow with the number of requests"
    assert resident_mb(daemon) < _MOST_MB
    assert {200, 201, 400, 404, 405, 415, 422} <= statuses.keys()
    assert await asyncio.to_thread(daemon.stop) == 0
    counted = told.compare(daemon.database)
    counted["acknowledged"] = sum(number for status, number in statuses.items() if status in (200, 201))
    counted["server_errors"] = sum(number for status, number in statuses.items() if status >= 500)
    ledger.record(fault="generated requests, valid and broken", mode="WAL", rounds=statuses.total(), **counted)


async def _send_half(daemon: Daemon, clients: list[Client], count: int) -> list[str]:
    """Send so many requests; return what the log holds that nothing a client sends may cause."""
    unexpected: list[str] = []
    for start in range(0, count, 20_000):
        part = min(count - start, 20_000)
        await asyncio.gather(*(client.run(part // len(clients)) for client in clients))
        lines, daemon.lines = daemon.lines, []
        unexpected += [str(line)[:2000] for line in lines if "exc_info" in line or line["level"] == "CRITICAL"]
    return unexpected


async def test_some_thousand_generated_requests(start_daemon: StartDaemon, ledger: Ledger) -> None:
    await _send_generated(start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL"), ledger, 2_400)


@pytest.mark.slow
async def test_a_million_generated_requests(start_daemon: StartDaemon, ledger: Ledger, rounds: Rounds) -> None:
    await _send_generated(start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL"), ledger, rounds(1_000_000, least=20_000))
