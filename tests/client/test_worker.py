"""What others left, and a daemon that hesitates, hold up neither this process's lines nor its signs of life."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client import Client
from telemetryd.client.config import Pace
from telemetryd.client.lines import encode
from telemetryd.client.spool import Spool
from tests.client.conftest import MakeClient, flushed, stored, url_of
from tests.conftest import Api, eventually
from tests.tools.bad_proxy import ERRORS, BadProxy


@pytest.fixture
def pace() -> Pace:
    return Pace(first_pause_s=0.005, longest_pause_s=0.02, first_look_s=0, look_every_s=0.1)


def finished(name: str) -> dict[str, Any]:
    more = {"run_id": name, "start_time": "2025-12-24T10:00:00Z"}
    return {"event_id": name, "agent_name": "a", "job_type": "j", "status": "success", **more}


def spool_in(buffer: Path) -> Spool:
    return Spool(buffer, fsync=False, file_bytes=1 << 20, file_age_s=600)


def leave(buffer: Path, *lines: dict[str, Any]) -> str:
    """Leave lines as a process that has ended; return the stream's name."""
    spool = spool_in(buffer)
    for line in lines:
        assert spool.append(encode(line))
    assert spool.stream is not None
    name = spool.stream.name
    spool.close()
    return name


async def test_a_stream_that_waits_for_a_silent_process_holds_up_nothing(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    silent = spool_in(buffer)  # lives, has a parent's run, and does not get round to sending
    assert silent.append(encode({**finished("parent"), "status": "running"}))
    assert silent.stream is not None
    after = [silent.stream.name, 0, 10_000]
    leave(buffer, {"op": "update", "event_id": "parent", "fields": {"status": "success"}, "after": after})
    await asyncio.sleep(0.02)  # the next one is younger
    leave(buffer, finished("other"))
    client = make_client(url_of(api))
    with client.run("a", "j", heartbeat=0.05) as run:
        await stored(api, 2)
        await flushed(client)
        first = await api.get(f"/api/v1/runs/{run.event_id}")

        async def beats() -> bool:
            return bool((await api.get(f"/api/v1/runs/{run.event_id}"))["updated_at"] > first["updated_at"])

        await eventually(beats)
    silent.close()
    await stored(api, 3)

    async def has_ended() -> bool:
        return bool((await api.get("/api/v1/runs/parent"))["status"] == "success")

    await eventually(has_ended)


async def test_a_stream_that_cannot_be_opened_holds_up_no_other(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    name = leave(buffer, finished("hidden"))
    lock = buffer / f"{name}.lock"
    lock.unlink()
    lock.mkdir()  # as good as another user's file, for root too
    await asyncio.sleep(0.02)
    leave(buffer, finished("other"))
    client = make_client(url_of(api))
    client.record(finished("own"))
    await flushed(client)
    await stored(api, 2)
    assert client.stats()["problem"] is None


async def test_waiting_in_vain_leaves_nothing_behind(make_client: MakeClient) -> None:
    client = make_client()
    client.record(finished("own"))
    for _ in range(50):
        assert not await asyncio.to_thread(client.flush, 0.005)
    assert not client._sender.flushes


def test_after_the_end_a_flush_says_at_once_that_it_cannot(buffer: Path) -> None:
    client = Client("http://127.0.0.1:9", buffer_dir=buffer, flush_timeout_s=0.1)
    client.record(finished("own"))
    client.close()
    client.record(finished("late"))
    began = time.monotonic()
    assert not client.flush(60)
    assert time.monotonic() - began < 30


async def test_heartbeats_and_registrations_wait_as_the_daemon_asks(
    api: Api, proxy: BadProxy, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(proxy.url)
    runs = [client.run("a", "j", heartbeat=0.05).start() for _ in range(20)]
    await flushed(client)
    count = len(proxy.seen)
    await eventually(lambda: len(proxy.seen) > count + 5)
    monkeypatch.setitem(ERRORS, "503", (503, {"Retry-After": "600"}, b"{}"))
    proxy.script = ["503"] * 1000
    await eventually(lambda: len(proxy.script) < 1000)
    await asyncio.sleep(0.4)
    assert len(proxy.script) == 999, "none of the twenty hearts beats after the first refusal"
    for run in runs:
        run.finish()


async def test_a_flush_does_not_break_into_the_pause_that_the_daemon_asked_for(
    proxy: BadProxy, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ERRORS, "503", (503, {"Retry-After": "2"}, b"{}"))
    proxy.script = ["503"]
    client = make_client(proxy.url)
    client.record(finished("own"))
    while not proxy.seen:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    began = time.monotonic()
    assert not await asyncio.to_thread(client.flush, 0.1)
    assert len(proxy.seen) == 1
    await flushed(client)
    assert time.monotonic() - began > 0.9
