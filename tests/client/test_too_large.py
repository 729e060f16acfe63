"""What is too large for the daemon, or for something before it, costs neither the lines after it nor itself."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client import Config
from telemetryd.client.aside import Aside
from telemetryd.client.batch import Batch
from telemetryd.client.config import Pace
from telemetryd.client.counters import Counters
from telemetryd.client.delivery import MAX_BYTES, BlockedError, Delivery
from telemetryd.client.folder import entries, is_aside
from telemetryd.client.lines import encode
from telemetryd.client.transport import Answer, Transport, UnreachableError
from tests.client.conftest import MakeClient, flushed, stored, url_of
from tests.client.test_worker import finished, leave
from tests.conftest import Api, MakeApi, StartDaemon
from tests.tools.bad_proxy import DAEMONS, BadProxy, bad_proxy
from tests.tools.process import telemetryd

LIMIT = 20_000
LARGE = "x" * 2 * LIMIT


@pytest.fixture
def pace() -> Pace:
    return Pace(first_pause_s=0.005, longest_pause_s=0.02, first_look_s=0, look_every_s=0.05, aside_s=0.05)


@pytest.fixture
def narrow(proxy: BadProxy) -> BadProxy:
    """A proxy with a limit of its own in front of the daemon."""
    proxy.limit = LIMIT
    return proxy


def set_aside(buffer: Path) -> list[str]:
    return [entry.stream for entry in entries(buffer, (".ready", ".active")) if is_aside(entry.stream)]


async def test_a_line_that_a_proxy_does_not_let_through_is_set_aside_and_comes_when_it_does(
    api: Api, narrow: BadProxy, make_client: MakeClient, buffer: Path
) -> None:
    client = make_client(narrow.url)
    for number in range(20):
        client.record({**finished(f"e-{number}"), "output_summary": LARGE if number == 7 else "x" * 500})
    assert not await asyncio.to_thread(client.flush, 60), "one is not stored"
    assert {run["event_id"] for run in await api.list(limit=100)} == {f"e-{n}" for n in range(20) if n != 7}
    assert client.stats()["aside"] == 1
    assert len(set_aside(buffer)) == 1
    narrow.limit = None
    await stored(api, 20)
    await flushed(client)
    assert client.stats()["sent"] == 20
    assert not (buffer / "dead-letter.jsonl").exists()


async def test_what_is_said_of_a_run_that_is_set_aside_waits_for_it(
    api: Api, narrow: BadProxy, make_client: MakeClient, buffer: Path
) -> None:
    client = make_client(narrow.url)
    late = client.run("a", "late", input_summary=LARGE).start()  # its start is too large
    changed = client.run("a", "changed").start()
    await asyncio.to_thread(client.flush, 60)
    changed.update(output_summary=LARGE)  # a change of it is too large
    for run in (late, changed):
        run.update(output_summary="the last word")
        run.event("step")
        await asyncio.to_thread(client.flush, 60)
        run.finish("partial")
    await asyncio.to_thread(client.flush, 60)
    assert [run["status"] for run in await api.list()] == ["running"]
    narrow.limit = None
    await stored(api, 2)
    for run in (late, changed):
        while (await api.get(f"/api/v1/runs/{run.event_id}"))["status"] != "partial":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        there = await api.get(f"/api/v1/runs/{run.event_id}?include=events")
        assert there["output_summary"] == "the last word"
        assert len(there["events"]) == 1
    assert not (buffer / "dead-letter.jsonl").exists()


def test_another_process_learns_from_the_folder_what_is_set_aside(start_daemon: StartDaemon, buffer: Path) -> None:
    url = start_daemon().url
    Aside(buffer).put("late", [encode({**finished("late"), "status": "running"}).rstrip()])
    change = encode({"op": "update", "event_id": "late", "fields": {"status": "success"}}).rstrip()
    buried: list[Any] = []
    transport = Transport(Config(url=url))
    Delivery(transport, lambda *told: buried.append(told), Counters(), Aside(buffer)).send(Batch.of([change]))
    assert not buried
    done = telemetryd("sync", "--buffer-dir", buffer, "--url", url, "--json")
    assert json.loads(done.stdout)["sent"] == 2
    assert transport.request("GET", "/api/v1/runs/late").body["status"] == "success"
    transport.close()


def test_sync_says_what_does_not_come_through(start_daemon: StartDaemon, buffer: Path) -> None:
    leave(buffer, finished("small"), {**finished("large"), "output_summary": LARGE}, finished("last"))
    with bad_proxy(start_daemon().url) as proxy:
        proxy.limit = LIMIT
        for sent in (2, 0):
            done = telemetryd("sync", "--buffer-dir", buffer, "--json", "--url", proxy.url, status=1)
            told = json.loads(done.stdout)
            assert (told["sent"], told["refused"]) == (sent, 0)
            assert "413" in told["problem"] or "get through" in told["problem"]
    assert len(set_aside(buffer)) == 1


async def test_what_the_daemon_does_not_take_is_a_dead_letter_and_the_rest_of_its_change_is_stored(
    make_api: MakeApi, make_client: MakeClient, buffer: Path
) -> None:
    api = await make_api(max_body_bytes=LIMIT)
    client = make_client(url_of(api))
    run = client.run("a", "j").start()
    await flushed(client)
    run.finish("failure", error_details=LARGE, error_summary="short")
    await flushed(client)
    ended = await api.get(f"/api/v1/runs/{run.event_id}")
    assert (ended["status"], ended["error_summary"], ended["error_details"]) == ("failure", "short", None)
    assert [json.loads(line)["status"] for line in (buffer / "dead-letter.jsonl").read_text().splitlines()] == [413]


class Scripted:
    """Answers as it should, and keeps the lengths of what it was sent."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = [*answers]
        self.lengths: list[int] = []

    def request(self, method: str, path: str, body: bytes | None = None, media_type: str = "") -> Answer:
        self.lengths.append(len(body or b""))
        return self.answers.pop(0)


def told(status: int, body: object = None, *, by_the_daemon: bool = True) -> Answer:
    headers = {name.lower(): value for name, value in DAEMONS.items()} if by_the_daemon else {}
    return Answer(status, headers, body)


def test_after_a_413_less_is_sent_at_once_and_then_a_little_more_again(tmp_path: Path) -> None:
    lines = [encode({**finished(f"e-{n}"), "output_summary": "x" * 200_000}).rstrip() for n in range(2)]
    one = told(200, {"inserted": 1, "duplicates": 0, "errors": []})
    requests = Scripted(told(413, by_the_daemon=False), one, one)
    delivery = Delivery(requests, lambda *_: None, Counters(), Aside(tmp_path))
    delivery.send(Batch.of(lines))
    assert 200_000 < delivery.bytes < 300_000 < MAX_BYTES
    assert len(requests.lengths) == 3


def test_a_line_that_still_does_not_come_through_is_not_set_aside_again(tmp_path: Path) -> None:
    delivery = Delivery(Scripted(told(413, by_the_daemon=False)), lambda *_: None, Counters(), Aside(tmp_path))
    with pytest.raises(BlockedError, match="not telemetryd answered 413"):
        delivery.send(Batch.of([encode(finished("e")).rstrip()], was_aside=True))
    assert not entries(tmp_path)


def test_the_pauses_of_what_is_set_aside_grow_within_bounds(tmp_path: Path) -> None:
    kept = Aside(tmp_path)
    pauses = []
    for _ in range(20):
        kept.postpone("aside-x")
        pauses.append(kept._pauses["aside-x"][1])
    assert pauses[:3] == [15, 30, 60]
    assert pauses[-1] == 900
    assert not kept.is_due("aside-x")


# --- The answer to a body that is not taken whole ------------------------------------------------


@contextmanager
def server(answer: bytes, *, then_reads: bool) -> Iterator[tuple[str, list[int]]]:
    """Answer after the head of a request; then read what comes, or close with the rest unread. Yield what was read."""
    taken = [0]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(10)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(4096)
                connection.sendall(answer)
                while then_reads and (part := connection.recv(1 << 20)):
                    taken[0] += len(part)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", taken
        thread.join(10)


REFUSAL = b'HTTP/1.1 413 Too large\r\nTelemetry-Server: telemetryd/4\r\nContent-Length: 17\r\n\r\n{"detail":"large"}'[
    :-1
]


@pytest.mark.parametrize("then_reads", [True, False])
def test_an_answer_before_the_end_of_a_body_is_read_and_the_rest_is_not_sent(then_reads: bool) -> None:
    body = b"x" * (64 << 20)  # far more than the buffers of both ends take
    with server(REFUSAL, then_reads=then_reads) as (url, taken):
        transport = Transport(Config(url=url))
        answer = transport.request("POST", "/api/v1/runs/batch", body)
        transport.close()
    assert (answer.status, answer.is_daemons) == (413, True)
    assert taken[0] < len(body) / 2


def test_a_body_that_is_cut_off_without_an_answer_is_sent_again() -> None:
    with server(b"", then_reads=False) as (url, _):
        transport = Transport(Config(url=url))
        with pytest.raises(UnreachableError):
            transport.request("POST", "/api/v1/runs/batch", b"x" * (8 << 20))


def test_a_large_body_arrives_whole(start_daemon: StartDaemon) -> None:
    transport = Transport(Config(url=start_daemon().url))
    run = {**finished("large"), "output_summary": "x" * (6 << 20)}
    for _ in range(2):
        assert transport.request("POST", "/api/v1/runs", encode(run)).status in (200, 201)
    assert len(transport.request("GET", "/api/v1/runs/large").body["output_summary"]) == 6 << 20
    transport.close()
