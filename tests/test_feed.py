"""The stream of runs: in order, without a gap or a repeat, to many at once, and never at the writer's cost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from telemetryd.engine.lanes import Lane
from telemetryd.errors import QueryTimeoutError, TooManySubscribersError
from telemetryd.model.changes import BEGINNING, Changes, Cursor, ListChanges
from telemetryd.model.filters import Filters
from telemetryd.model.queries import parse_list
from telemetryd.services import frames
from telemetryd.services.feed import Feed, Subscriber
from telemetryd.services.frames import Frame
from telemetryd.services.subscriptions import FEED
from telemetryd.web.connections import _Protocol, _Server
from tests.conftest import Api, StartDaemon, eventually, make_run, readers_of
from tests.event_stream import Reader, Sent, events_of, take
from tests.test_reader import endless

STREAM = "/api/v1/runs/stream"


@asynccontextmanager
async def streaming(api: Api, *, last_id: str | None = None, **parameters: str) -> AsyncIterator[AsyncIterator[Sent]]:
    """Follow the runs; inside the block the stream has begun."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    async with api.client.get(STREAM, params=parameters, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream"
        yield events_of(response)


def feed_of(api: Api) -> Feed:
    assert api.client.app is not None
    return api.client.app[FEED]


def bound(api: Api, **bounds: float) -> None:
    shared = feed_of(api)
    shared.bounds = replace(shared.bounds, **bounds)  # type: ignore[arg-type]


def seen(sent: list[Sent]) -> list[tuple[str, str]]:
    return [(event.data["event_id"], event.data["status"]) for event in sent]


async def read_runs(chunks: AsyncIterator[bytes], count: int, text: bytes = b"") -> list[Sent]:
    """Take from a tail what follows a beginning, until it ends with so many runs."""
    while text.count(b"event: run") < count or not text.endswith(b"\n\n"):
        piece = await anext(chunks)
        assert len(piece) <= frames.PIECE_BYTES
        text += piece
    return Reader().feed(text.decode().split("\n")[:-1])


async def patch(api: Api, event_id: str, **fields: object) -> None:
    await api.call("PATCH", f"/api/v1/runs/{event_id}", json=fields, status=200)


async def test_each_created_and_changed_run_comes_after_its_commit_as_it_is_answered(api: Api, engine: str) -> None:
    await api.post(make_run(event_id="before"))
    async with streaming(api) as events:
        await api.post(make_run(event_id="a", metrics_json={"tokens": 5}))
        (first,) = await take(events, 1)
        assert first.event == "run"
        assert first.data == await api.get("/api/v1/runs/a")
        await patch(api, "a", status="success")
        await patch(api, "before", status="failure")
        changed = await take(events, 2)
        assert seen(changed) == [("a", "success"), ("before", "failure")]
    page = await api.get("/api/v1/changes")
    ids = [str(event.id) for event in (first, *changed)]
    if engine == "sqlite":
        assert ids == [f"{page['epoch']}-{number}" for number in (2, 3, 4)]
    else:
        assert ids[1:] == [f"{page['epoch']}-{change['seq']}" for change in page["changes"]]


async def test_it_goes_on_behind_any_number_of_the_sequence(api: Api) -> None:
    await api.batch([make_run(event_id=f"event-{number}") for number in range(600)])
    await patch(api, "event-0", status="success")
    page = await api.get("/api/v1/changes?limit=1000")
    epoch, last = page["epoch"], page["changes"][-4]["seq"]
    for options in ({"after": str(last)}, {"after": "5", "last_id": f"{epoch}-{last}"}, {"after": f"{epoch}-{last}"}):
        async with streaming(api, **options) as events:
            assert seen(await take(events, 3)) == [
                ("event-598", "running"),
                ("event-599", "running"),
                ("event-0", "success"),
            ]
    async with streaming(api, after="0") as events:
        everything = await take(events, 600)
        ids = [int(run["id"]) for run in await api.list(limit=600, sort="created_at")]
        assert [event.data["id"] for event in everything] == [*ids[1:], ids[0]]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"agent_name": "seo"}, ["seo", "seo failed"]),
        ({"agent_name": "s*,crawler"}, ["seo", "crawler", "seo failed"]),
        ({"status": "failure,timeout"}, ["seo failed"]),
        ({"job_type": "crawl"}, ["crawler"]),
        ({"metrics.tokens": "7"}, ["crawler"]),
        ({"label.team": "x,y"}, ["crawler"]),
    ],
)
async def test_filters_are_those_of_the_list(api: Api, filters: dict[str, str], expected: list[str]) -> None:
    async with streaming(api, **filters) as events, streaming(api) as everything:
        runs = [
            make_run(event_id="seo", agent_name="seo"),
            make_run(
                event_id="crawler",
                agent_name="crawler",
                job_type="crawl",
                metrics_json={"tokens": 7},
                labels={"team": "y"},
            ),
            make_run(event_id="other"),
            make_run(event_id="seo failed", agent_name="seo", status="failure"),
        ]
        for run in runs:
            await api.post(run)
        assert [event.data["event_id"] for event in await take(everything, 4)] == [run["event_id"] for run in runs]
        assert [event.data["event_id"] for event in await take(events, len(expected))] == expected
    assert [run["event_id"] for run in (await api.get("/api/v1/runs", params=filters))[::-1]] == expected


@pytest.mark.parametrize(
    ("parameters", "headers", "text"),
    [
        ({"status": "nope"}, {}, "Invalid status: 'nope'; it must be one of"),
        ({"after": "x"}, {}, "Invalid after: 'x'; it must be an integer from 0"),
        ({"limit": "5"}, {}, "Unknown query parameter 'limit'"),
        ({"q": "words"}, {}, "Invalid q: this daemon keeps no full-text index"),
        ({}, {"Last-Event-ID": "?"}, "Invalid Last-Event-ID: '?'"),
    ],
)
async def test_what_cannot_be_followed(
    api: Api, parameters: dict[str, str], headers: dict[str, str], text: str
) -> None:
    answer = await api.get(STREAM, 400, params=parameters, headers=headers)
    assert answer["detail"].startswith(text)


async def test_a_place_of_another_database_is_reported_and_goes_on_from_now(api: Api) -> None:
    bound(api, heartbeat_s=0.01)
    await api.batch([make_run() for _ in range(3)])
    for after in ("0123456789ab-1", "9"):
        async with streaming(api, after=after) as events:
            await eventually(lambda: len(feed_of(api)._plain.live) == 1)
            await patch(api, (await api.list())[0]["event_id"], items_failed=1)
            missed, run = await take(events, 2)
            assert (missed.event, run.event) == ("missed", "run")
            assert missed.data["missed"] >= 3
        await eventually(lambda: not feed_of(api)._plain.live)


async def test_one_who_does_not_read_loses_nothing_and_holds_nobody_up(api: Api) -> None:
    bound(api, ring_bytes=20_000)
    async with feed_of(api).open(None, Filters()) as slow, streaming(api) as events:
        await slow.begin()
        chunks = slow.chunks()
        reading = asyncio.ensure_future(anext(chunks))
        await eventually(lambda: slow._cursor is not None)
        for number in range(100):
            await api.post(make_run(event_id=f"event-{number}"))
        assert len(await take(events, 100)) == 100
        assert slow._cursor is None
        assert feed_of(api).held.bytes == 0
        received = await read_runs(chunks, 100, await reading)
        assert [event.data["event_id"] for event in received] == [f"event-{number}" for number in range(100)]
        assert slow.missed == 0
        await chunks.aclose()


async def test_a_stream_that_is_too_far_behind_says_how_far(api: Api) -> None:
    bound(api, behind=10)
    await api.batch([make_run() for _ in range(30)])
    newest = (await api.get("/api/v1/changes"))["newest"]
    async with streaming(api, after=str(newest - 10)) as events:
        assert len(await take(events, 10)) == 10
    async with streaming(api, after=str(newest - 11)) as events:
        (missed,) = await take(events, 1)
        assert (missed.event, missed.data) == ("missed", {"missed": 11})
        await eventually(lambda: len(feed_of(api)._plain.live) == 1)
        await api.post(make_run(event_id="next"))
        assert seen(await take(events, 1)) == [("next", "running")]
    metrics = (await api.client.get("/metrics", params={"format": "prometheus"})).text()
    assert "telemetryd_tails_missed_total 11.0" in await metrics


async def test_a_stream_is_kept_alive_and_tells_how_far_it_is(api: Api) -> None:
    bound(api, heartbeat_s=0.01)
    async with api.client.get(STREAM, params={"agent_name": "nobody"}) as response:
        reader = Reader()
        await api.post(make_run())
        page = await api.get("/api/v1/changes")
        while reader.comments < 2 or reader.last_id != f"{page['epoch']}-{page['newest']}":
            assert reader.feed([(await response.content.readline()).decode().removesuffix("\n")]) == []


async def test_bounds_on_time_do_not_cut_a_stream_off_but_one_who_is_deaf(api: Api) -> None:
    async with streaming(api):
        runner = api.client.server.runner
        assert runner is not None
        server = runner.server
        assert isinstance(server, _Server)
        (protocol,) = [one for one in server.connections if isinstance(one, _Protocol)]
        far = asyncio.get_running_loop().time() + 1e6
        assert protocol.lost_patience(far) is None
        protocol.unsent = (1, 0.0)
        assert protocol.lost_patience(far) is None  # what waited has been read


async def test_it_is_counted_while_it_is_open_and_logged_when_it_ends(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    bound(api, heartbeat_s=0.01)  # with the next thing that it sends it notices that nobody listens

    async def metrics() -> str:
        async with api.client.get("/metrics", params={"format": "prometheus"}) as response:
            return await response.text()

    with caplog.at_level("INFO", "telemetry_api"):
        async with streaming(api) as events:
            assert "telemetryd_tails_open 1.0" in await metrics()
            await api.post(make_run())
            await take(events, 1)
        await eventually(lambda: any(record.message == "Stream ended" for record in caplog.records))
    (line,) = [record for record in caplog.records if record.message == "Stream ended"]
    assert line.__dict__["runs_sent"] >= 1
    assert line.__dict__["is_slow"] is False
    text = await metrics()
    assert "telemetryd_tails_open 0.0" in text
    assert 'telemetryd_http_requests_total{method="GET",route="/api/v1/runs/stream",status="200"} 1.0' in text


async def test_streams_with_other_comparisons_are_not_taken_for_the_same(api: Api) -> None:
    first, second = (parse_list(f"metrics.n>=1&metrics.n!=2&metrics.n!={number}").filters for number in (3, 4))
    assert Subscriber(feed_of(api), None, first).key != Subscriber(feed_of(api), None, second).key


async def test_one_who_reads_slowly_does_not_join_behind_what_was_handed_out(api: Api) -> None:
    """A page may have been read before all others left, and what they were handed since is not in it."""
    await api.post(make_run(event_id="seen"))
    shared = feed_of(api)
    page = await shared._plain.read(BEGINNING, Filters())
    async with streaming(api) as events:
        await eventually(lambda: bool(shared._plain.live))
        await api.post(make_run(event_id="handed out"))
        await take(events, 1)
        for tail in [*shared.subscribers]:
            tail.end()
        await eventually(lambda: not shared._plain.live)
    async with shared.open(None, Filters()) as late:
        assert shared._plain.join(late, page.last) is None
        assert shared._plain.join(late, (await shared._plain.read(page.last, Filters())).last) is not None


async def test_one_who_begins_ahead_of_the_others_is_handed_nothing_from_before(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = feed_of(api)
    lane = shared._plain
    async with streaming(api) as events, shared.open(None, Filters()) as late:
        await eventually(lambda: bool(lane.live) and not lane.unread.is_set() and not lane._reading.locked())
        with monkeypatch.context() as patch:
            patch.setattr(lane, "unread", asyncio.Event())  # the lane does not hear of this commit
            await api.post(make_run(event_id="before"))
            await late.begin()
            assert lane.ring.last < late.position
            chunks = late.chunks()
            reading = asyncio.ensure_future(anext(chunks))
            await eventually(lambda: late._cursor is not None)
        await api.post(make_run(event_id="next"))
        assert seen(await take(events, 2)) == [("before", "running"), ("next", "running")]
        assert seen(await read_runs(chunks, 1, await reading)) == [("next", "running")]
        await chunks.aclose()


async def test_a_sign_of_life_does_not_tell_of_more_than_was_sent(api: Api) -> None:
    bound(api, heartbeat_s=0.01)
    shared = feed_of(api)

    def hand_out(tail: Subscriber) -> None:
        shared._plain.offer(7, {tail.key: [Frame(7, 7, b"run")]})

    async with shared.open(None, Filters()) as tail:
        await tail.begin()
        page = await shared._plain.read(BEGINNING, Filters())
        tail._cursor = shared._plain.join(tail, page.last)
        waiting = asyncio.create_task(tail._is_ready())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.02, hand_out, tail)
        time.sleep(0.1)  # noqa: ASYNC251 - so that both are due in one turn of the loop: the sign of life, and a run
        assert await waiting
        assert tail._take() == b"run"


async def test_a_run_is_held_once_however_many_filters_it_matches(api: Api) -> None:
    shared = feed_of(api)
    async with shared.open(None, Filters()) as one, shared.open(None, parse_list("status=running").filters) as other:
        chunks = [tail.chunks() for tail in (one, other)]
        reading = [asyncio.ensure_future(anext(each)) for each in chunks]
        await eventually(lambda: len(shared._plain.live) == 2)
        await api.batch([make_run(error_details="x" * 100_000) for _ in range(3)])
        await asyncio.gather(*reading)
        assert one._waiting[0] is other._waiting[0]
        (page,) = shared._plain.ring._pages
        assert len(page.frames) == 3
        assert shared.held.bytes == sum(len(frame.text) for frame in page.frames)
        for each in chunks:
            await each.aclose()
    assert shared.held.bytes == 0


async def test_who_is_lapped_gets_each_run_once_in_order_and_comes_back_to_the_ring(api: Api) -> None:
    bound(api, ring_bytes=250_000, held_bytes=1_000_000)
    shared = feed_of(api)
    ring = shared._plain.ring
    async with shared.open(None, Filters()) as slow, streaming(api) as events:
        await slow.begin()
        chunks = slow.chunks()
        reading = asyncio.ensure_future(anext(chunks))
        await eventually(lambda: sum(map(len, shared._plain.live.values())) == 2)
        gc.disable()
        try:
            for number in range(30):
                await api.post(make_run(event_id=f"event-{number}", error_details="x" * 100_000))
                await take(events, 1)
                # The ring, and the run that the slow one has begun to send.
                assert ring.bytes <= 250_000
                assert shared.held.bytes <= 250_000 + 101_000
                assert (slow._cursor is None) == (number > 2)
            received = await read_runs(chunks, 30, await reading)
            await api.post(make_run(event_id="last"))
            received += await read_runs(chunks, 1)
            assert slow._cursor is not None
            assert shared.held.bytes <= 1_000_000
        finally:
            gc.enable()
        expected = [*(f"event-{number}" for number in range(30)), "last"]
        assert [event.data["event_id"] for event in received] == expected
        assert slow.missed == 0
        await chunks.aclose()
    await eventually(lambda: shared.held.bytes == 0)


class Stuck:
    """A tail that reads old runs for itself, and whose client takes one piece, until it may go on."""

    def __init__(self, shared: Feed) -> None:
        self.text = b""
        self.go_on = asyncio.Event()
        self.following = asyncio.create_task(self._follow(shared))

    async def _follow(self, shared: Feed) -> None:
        async with shared.open(Cursor(0), Filters()) as tail:
            await tail.begin()
            async with contextlib.aclosing(tail.chunks()) as chunks:
                async for piece in chunks:
                    self.text += piece
                    await self.go_on.wait()


@asynccontextmanager
async def stuck(api: Api, count: int) -> AsyncIterator[list[Stuck]]:
    """Have tails read ten large runs, one tail after the other."""
    await api.batch([make_run(event_id=f"event-{number}", error_details="x" * 100_000) for number in range(10)])
    tails: list[Stuck] = []
    for _ in range(count):
        tails.append(Stuck(feed_of(api)))
        await eventually(lambda: bool(tails[-1].text))
        assert len(tails[-1].text) == frames.PIECE_BYTES
    yield tails
    for tail in tails:
        tail.following.cancel()


async def all_read(tail: Stuck) -> bool:
    """Let a client go on, and see that it gets each run once, in their order."""
    tail.go_on.set()
    await eventually(lambda: tail.text.count(b"event: run") == 10 and tail.text.endswith(b"\n\n"))
    received = Reader().feed(tail.text.decode().split("\n")[:-1])
    return [event.data["event_id"] for event in received] == [f"event-{number}" for number in range(10)]


async def test_who_takes_nothing_gives_up_what_waits_when_it_is_too_much_and_loses_nothing(api: Api) -> None:
    bound(api, held_bytes=1_500_000)
    async with stuck(api, 6) as tails:
        assert feed_of(api).held.bytes <= 1_500_000
        for tail in tails:
            assert await all_read(tail)


async def test_who_takes_nothing_is_cut_off_when_single_runs_are_too_much(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    bound(api, held_bytes=250_000)
    async with stuck(api, 4) as tails:
        await asyncio.wait_for(asyncio.gather(*(tail.following for tail in tails[:2])), 5)
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            "Stream cut: too much waits to be read by all streams together"
        ] * 2
        assert feed_of(api).held.bytes <= 250_000
        for tail in tails[2:]:
            assert await all_read(tail)


async def test_a_group_that_reads_too_long_is_parted(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async with streaming(api) as events, streaming(api, agent_name="hugo-translator") as others:
        shared = feed_of(api)
        await eventually(lambda: len(shared._plain.live) == 2)
        fetch = shared._plain._fetch

        async def fetch_alone(query: ListChanges) -> Changes:
            if len(query.filters) > 1:
                raise QueryTimeoutError("too long for two")
            return await fetch(query)

        monkeypatch.setattr(shared._plain, "_fetch", fetch_alone)
        await api.post(make_run(event_id="a"))
        for stream in (events, others):
            assert seen(await take(stream, 1)) == [("a", "running")]


async def test_what_is_new_waits_for_no_search(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    never = asyncio.Event()

    async def search(_: ListChanges) -> Changes:
        await never.wait()
        raise AssertionError

    async with streaming(api) as events, streaming(api, error="costly") as searching:
        await eventually(lambda: bool(feed_of(api)._plain.live and feed_of(api)._searching.live))
        monkeypatch.setattr(feed_of(api)._searching, "_fetch", search)
        slow = [asyncio.create_task(readers_of(api).fetch(endless, lane)) for lane in (Lane.QUICK, Lane.LONG) * 9]
        try:
            await eventually(readers_of(api)._idle[Lane.QUICK].empty)
            await api.post(make_run(event_id="new"))
            assert seen(await take(events, 1)) == [("new", "running")]
        finally:
            for task in slow:
                task.cancel()
        del searching


async def test_nobody_waits_for_a_feed_that_has_died(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(*_: object) -> None:
        raise ZeroDivisionError

    async with streaming(api) as events:
        await eventually(lambda: bool(feed_of(api)._plain.live))
        monkeypatch.setattr(feed_of(api)._plain, "_hand_out", die)
        await api.post(make_run())
        assert [event async for event in events] == []


async def test_too_many_are_refused(api: Api) -> None:
    bound(api, subscribers=1)
    async with streaming(api):
        assert (await api.get(STREAM, 503))["detail"] == "Too many streams are open; try again later."
        with pytest.raises(TooManySubscribersError):
            feed_of(api).open(None, Filters())


async def test_five_hundred_at_once(api: Api) -> None:
    runs, tails = 5, 500
    async with contextlib.AsyncExitStack() as stack:
        connector = aiohttp.TCPConnector(limit=0)
        base = str(api.client.make_url(""))
        session = await stack.enter_async_context(aiohttp.ClientSession(base, connector=connector))
        streams = []
        for number in range(tails):
            filters = {"status": "running"} if number % 2 else {}
            response = await stack.enter_async_context(session.get(STREAM, params=filters))
            streams.append(events_of(response))
        await eventually(lambda: sum(map(len, feed_of(api)._plain.live.values())) == tails)
        for number in range(runs):
            await api.post(make_run(event_id=f"event-{number}"))
        expected = [f"event-{number}" for number in range(runs)]
        for received in await asyncio.gather(*(take(events, runs) for events in streams)):
            assert [event.data["event_id"] for event in received] == expected


async def test_nothing_is_lost_or_repeated_however_often_the_daemon_is_killed(start_daemon: StartDaemon) -> None:
    received: list[Sent] = []
    written = itertools.count()
    last_id: str | None = None
    for killed_by in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
        async with aiohttp.ClientSession(daemon.url) as session:

            async def post(session: aiohttp.ClientSession = session) -> None:
                run = make_run(event_id=f"event-{next(written)}")
                async with session.post("/api/v1/runs", json=run) as response:
                    assert response.status == 201
                if run["event_id"] != "event-0":
                    body = {"status": "success"}
                    async with session.patch("/api/v1/runs/event-0", json=body) as response:
                        assert response.status == 200

            headers: dict[str, str] = {} if last_id is None else {"Last-Event-ID": last_id}
            reader = Reader()
            async with session.get(STREAM, headers=headers) as response:
                events = events_of(response, reader)
                for _ in range(5):
                    await post()
                received += await take(events, 3)
                last_id = reader.last_id
                # What is sent from here on is not read any more.
            for _ in range(3):
                await post()
        daemon.stop(killed_by)
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    async with aiohttp.ClientSession(daemon.url) as session:
        async with session.get("/api/v1/changes", params={"limit": "1000"}) as response:
            page: dict[str, Any] = await response.json()
        async with session.get(STREAM, headers={"Last-Event-ID": str(last_id)}) as response:
            behind = [change for change in page["changes"] if change["seq"] > int(str(last_id).partition("-")[2])]
            received += await take(events_of(response), len(behind))
    numbers = [int(event.id.partition("-")[2]) for event in received]
    assert numbers == sorted(set(numbers))
    latest = {event.data["event_id"]: event.data for event in received}
    assert latest == {change["run"]["event_id"]: change["run"] for change in page["changes"]}
    assert len(latest) == next(written)


async def test_a_stop_is_not_held_up_by_streams_even_by_one_that_nobody_reads(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL", TELEMETRY_SHUTDOWN_TIMEOUT_S="600")
    address = urlsplit(daemon.url)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((address.hostname, address.port))
        deaf.sendall(b"GET " + STREAM.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert deaf.recv(12) == b"HTTP/1.1 200"
        async with aiohttp.ClientSession(daemon.url) as session, session.get(STREAM) as response:
            events = events_of(response)
            for _ in range(40):
                async with session.post("/api/v1/runs", json=make_run(error_details="x" * 400_000)) as posted:
                    assert posted.status == 201
            await take(events, 40)
            stopping = asyncio.get_running_loop().run_in_executor(None, daemon.stop)
            assert [event async for event in events] == []
            assert await stopping == 0
    assert [line for line in daemon.lines if line["message"] == "Stopped"]
    assert json.dumps([line for line in daemon.lines if line["level"] in ("ERROR", "CRITICAL")]) == "[]"
