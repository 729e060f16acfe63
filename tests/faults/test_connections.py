"""Connections that rest, crawl, do not listen or break off: they are cut, cost little, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from yarl import URL

from telemetryd.web import body
from telemetryd.web.connections import Bounds
from tests.conftest import Daemon, MakeApi, StartDaemon, bodies_of, eventually, make_run, wait_until
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.faults.test_overload import resident_mb
from tests.faults.told import Told

_HEAD = b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_LIST = b"GET /api/v1/runs?limit=1000 HTTP/1.1\r\nHost: localhost\r\n\r\n"
_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

Open = Callable[[], Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def ask_for_health(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ask over an open connection, and read the whole answer, so that the next one begins where it begins."""
    writer.write(_HEALTH)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))


# --- Slow loris ----------------------------------------------------------------------------------


async def silent(open_connection: Open) -> None:
    """Say nothing."""
    reader, writer = await open_connection()
    await closed(reader)
    writer.close()


async def crawling_head(open_connection: Open) -> None:
    """Send a head byte by byte."""
    await crawl(open_connection, b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 1000, pause_s=0.2)


async def crawling_second_head(open_connection: Open) -> None:
    """Ask once, and then send a head byte by byte."""
    await crawl(open_connection, _HEALTH, b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 1000, pause_s=0.2)


async def crawling_body(open_connection: Open) -> None:
    """Send a body byte by byte."""
    await crawl(open_connection, _HEAD % 1000, b"{" + b" " * 998, pause_s=0.2)


async def halting_body(open_connection: Open) -> None:
    """Send a head, half a body, and then nothing."""
    reader, writer = await open_connection()
    writer.write(_HEAD % 1000 + b"{")
    await closed(reader)
    writer.close()


async def deaf(open_connection: Open) -> None:
    """Ask for large answers and read none of them."""
    _, writer = await open_connection()
    cast("asyncio.Transport", writer.transport).pause_reading()
    try:
        while True:  # what the daemon does not read stays here; the end shows when it is written to
            writer.write(_LIST)
            await asyncio.sleep(0.2)
            if writer.transport.is_closing():
                return
    finally:
        writer.transport.abort()


async def crawl(open_connection: Open, before: bytes, slowly: bytes, pause_s: float) -> None:
    reader, writer = await open_connection()
    writer.write(before)
    end = asyncio.ensure_future(closed(reader))
    for place in range(len(slowly)):
        writer.write(slowly[place : place + 1])
        await asyncio.wait((end,), timeout=pause_s)
        if end.done():
            break
    assert end.done(), "it was never cut off"
    writer.close()


async def closed(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


SLOW = (silent, crawling_head, crawling_second_head, crawling_body, halting_body, deaf)


@pytest.mark.parametrize("client", SLOW)
async def test_a_slow_client_is_cut_off(make_api: MakeApi, client: Callable[[Open], Coroutine[Any, Any, None]]) -> None:
    api = await make_api(bounds=Bounds(head_s=0.5, deaf_s=1.0, linger_s=0.5, patrol_every_s=0.1))
    bodies_of(api).bounds = body.Bounds(silence_s=0.5)
    for _ in range(12):
        await api.post(make_run(error_details="x" * 1_000_000))

    async def open_connection() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert api.client.port is not None
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.setblocking(False)
        await asyncio.get_running_loop().sock_connect(peer, ("127.0.0.1", api.client.port))
        return await asyncio.open_connection(sock=peer, limit=1024)

    await asyncio.wait_for(client(open_connection), 60)
    assert (await api.get("/health"))["status"] == "ok"


@pytest.mark.parametrize(
    "look",
    [Bounds(patrol_every_s=0.1, large_bytes=1 << 40), Bounds(patrol_every_s=1000)],
    ids=["at the patrol", "when it is written"],
)
async def test_those_who_leave_most_unread_are_cut_off_when_it_is_too_much(make_api: MakeApi, look: Bounds) -> None:
    api = await make_api(bounds=replace(look, unread_bytes=15_000_000))
    for _ in range(12):
        await api.post(make_run(error_details="x" * 1_000_000))
    assert api.client.port is not None
    peers = [await asyncio.open_connection("127.0.0.1", api.client.port, limit=1024) for _ in range(4)]
    for reader, writer in peers:  # 12 MB each, of which the sockets take a part; and no more is read than begins it
        writer.write(_LIST)
        await reader.read(1)
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)

    def cut() -> int:
        for _, each in peers:
            each.write(b" ")  # who does not read sees the end only so
        return sum(each.transport.is_closing() for _, each in peers)

    await eventually(lambda: cut() > 0)
    assert cut() < len(peers)
    await ask_for_health(reader, writer)
    for _, each in [*peers, (reader, writer)]:
        each.transport.abort()


async def test_a_patient_reader_and_a_resting_connection_are_left_alone(
    make_api: MakeApi,
) -> None:
    api = await make_api(bounds=Bounds(head_s=0.3, deaf_s=1.5, patrol_every_s=0.1))  # it takes two seconds, or more
    for _ in range(12):
        await api.post(make_run(error_details="x" * 1_000_000))
    assert api.client.port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port, limit=1 << 16)
    writer.write(_LIST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    with contextlib.closing(writer):
        size = 0
        while part := await reader.read(300_000):
            size += len(part)
            await asyncio.sleep(0.05)
        assert size > 12_000_000
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
    with contextlib.closing(writer):  # else what is left open fails some later test of this process
        for _ in range(2):
            await ask_for_health(reader, writer)
            await asyncio.sleep(0.8)  # a rest between two requests may be longer than a head may take


@pytest.mark.slow
async def test_hundreds_of_slow_clients_do_not_disturb_the_others(
    start_daemon: StartDaemon, rounds: Rounds, ledger: Ledger
) -> None:
    """With the real limits: 10 s for a head, 30 s for a body's pause or an answer that nobody reads."""
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    told = Told(daemon.url)
    for _ in range(12):
        assert await asyncio.to_thread(told.send, error_details="x" * 1_000_000) == 201
    address = URL(daemon.url)

    async def open_connection() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(address.host, address.port, limit=1024)

    each = rounds(150, least=10)
    clients = [asyncio.create_task(client(open_connection)) for client in SLOW for _ in range(each)]
    async with asyncio.timeout(150):
        while not all(client.done() for client in clients):
            assert await asyncio.to_thread(told.send) == 201
            assert (await asyncio.to_thread(told.health))[0] == 200
            await asyncio.sleep(0.2)
    await asyncio.gather(*clients)
    assert await asyncio.to_thread(daemon.stop) == 0
    ledger.record(fault="slow loris", mode="WAL", rounds=len(clients), **told.compare(daemon.database))


# --- Many idle connections ------------------------------------------------------------------------


def _hold_idle(start_daemon: StartDaemon, ledger: Ledger, count: int, most_mb: float) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 2_000:  # earlier tests in this process hold some, too
        pytest.skip(f"the limit on open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    told = Told(daemon.url)
    assert told.send() == 201
    descriptors = open_descriptors(daemon)
    address = URL(daemon.url)
    idle = []
    try:
        for _ in range(count):
            peer = socket.create_connection((address.host, address.port), timeout=60)
            peer.sendall(_HEALTH)
            idle.append(peer)
        for peer in idle:
            assert peer.recv(12) == b"HTTP/1.1 200"
        times = []
        for _ in range(20):
            started = time.monotonic()
            assert told.send() == 201
            times.append(time.monotonic() - started)
            assert told.health()[0] == 200
        assert sorted(times)[10] < 1
        assert resident_mb(daemon) < most_mb
    finally:
        for peer in idle:
            peer.close()
    wait_for_descriptors(daemon, descriptors)
    assert daemon.stop() == 0
    ledger.record(fault="idle connections", mode="WAL", rounds=count, **told.compare(daemon.database))


def open_descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def wait_for_descriptors(daemon: Daemon, count: int) -> None:
    deadline = time.monotonic() + 60
    while open_descriptors(daemon) > count:
        assert time.monotonic() < deadline, f"{open_descriptors(daemon)} descriptors instead of {count}"
        time.sleep(0.05)


def test_a_thousand_idle_connections(start_daemon: StartDaemon, ledger: Ledger) -> None:
    _hold_idle(start_daemon, ledger, 1_000, 120)


@pytest.mark.slow
def test_ten_thousand_idle_connections(start_daemon: StartDaemon, ledger: Ledger) -> None:
    _hold_idle(start_daemon, ledger, 10_000, 220)


# --- Streams that nobody reads --------------------------------------------------------------------

_BATCH = _HEAD.replace(b"/runs ", b"/runs/batch ").replace(b"/json", b"/x-ndjson")


@contextlib.contextmanager
def unread_streams(daemon: Daemon, queries: list[str]) -> Iterator[None]:
    """Open streams, and read no more of each than that it has begun."""
    address = URL(daemon.url)
    with contextlib.ExitStack() as stack:
        for query in queries:
            peer = stack.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.settimeout(60)
            peer.connect((address.host, address.port))
            peer.sendall(f"GET /api/v1/runs/stream?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert peer.recv(12) == b"HTTP/1.1 200"
        yield


def post_batch(daemon: Daemon, runs: list[dict[str, Any]]) -> None:
    address = URL(daemon.url)
    text = b"\n".join(map(orjson.dumps, runs))
    with socket.create_connection((address.host, address.port), timeout=60) as peer:
        peer.sendall(_BATCH % len(text) + text)
        assert peer.recv(12) == b"HTTP/1.1 200"


def most_mb(daemon: Daemon, seconds: float) -> float:
    """Return how much memory it has at most in the next time."""
    most, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        most = max(most, resident_mb(daemon))
        time.sleep(0.02)
    return most


def test_streams_with_different_filters_hold_runs_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    with unread_streams(daemon, [f"agent_name=a,n{number}" for number in range(60)]):
        before = most = resident_mb(daemon)
        for _ in range(3):
            post_batch(daemon, [make_run(agent_name="a", error_details="x" * 31_000) for _ in range(240)])
            most = max(most, most_mb(daemon, 0.7))
        assert most - before < 200


def test_streams_that_read_old_runs_hold_a_bounded_part_of_them(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    for _ in range(3):
        post_batch(daemon, [make_run(agent_name="a", error_details="x" * 31_000) for _ in range(240)])
    before = resident_mb(daemon)
    with unread_streams(daemon, [f"agent_name=a,n{number}&after=0" for number in range(80)]):
        assert most_mb(daemon, 3) - before < 200


# --- Clients that leave ---------------------------------------------------------------------------


def test_clients_that_leave_at_every_stage(start_daemon: StartDaemon, ledger: Ledger, rounds: Rounds) -> None:
    """In the head, in the body, before the answer, in the middle of it; with a farewell, or with a reset."""
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    told = Told(daemon.url)
    for _ in range(5):
        assert told.send(error_details="x" * 500_000) == 201
    descriptors = open_descriptors(daemon)
    address = URL(daemon.url)
    chance = random.Random(6)
    runs, count = {}, rounds(20_000, least=400)
    for number in range(count):
        run = make_run(output_summary="y" * 2_000)
        text = orjson.dumps(run)
        request = _HEAD % len(text) + text if number % 4 else _LIST
        cut = chance.choice((1, 20, len(request) // 3, len(request) // 2, len(request) - 1, len(request)))
        peer = socket.create_connection((address.host, address.port), timeout=60)
        peer.sendall(request[:cut])
        if cut == len(request) and chance.random() < 0.5:
            peer.recv(chance.choice((1, 100, 5_000)))
        if chance.random() < 0.5:  # reset
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        runs[run["event_id"]] = run, cut == len(request) and number % 4 != 0
    wait_for_descriptors(daemon, descriptors)
    wait_until(lambda: told.health()[1]["queue_depth"] == 0)
    assert told.health()[0] == 200
    for event_id, (run, is_whole) in list(runs.items())[-200:]:
        status, _, stored = told.call("GET", f"/api/v1/runs/{event_id}")
        assert status in ((200, 404) if is_whole else (404,))
        if status == 200:
            assert {name: stored[name] for name in run if name != "start_time"} == {
                name: value for name, value in run.items() if name != "start_time"
            }
    assert not [line for line in daemon.lines if line["level"] == "CRITICAL" or line.get("status", 0) >= 500]
    assert not [line for line in daemon.lines if "exc_info" in line]
    assert resident_mb(daemon) < 200
    assert daemon.stop() == 0
    ledger.record(fault="clients leave at every stage", mode="WAL", rounds=count, **told.compare(daemon.database))
