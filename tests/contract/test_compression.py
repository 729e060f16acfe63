"""Answers are compressed as Accept-Encoding asks, large ones piece by piece, and are the same otherwise."""

from __future__ import annotations

import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import hdrs
from aiohttp.http import HttpVersion10
from aiohttp.test_utils import make_mocked_request
from backports import zstd

from telemetryd.web.compression import choose
from tests.conftest import Api, StartDaemon, make_run
from tests.contract.test_conventions import high_water_mark_kb
from tests.contract.wire import BATCH, RUNS, Answer
from tests.http_client import call

UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": lambda body: zlib.decompress(body, 31), "zstd": zstd.decompress}


async def fetch(api: Api, path: str, accepted: str, method: str = "GET") -> Answer:
    """Fetch what is sent, still compressed."""
    connector = aiohttp.TCPConnector()
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        headers = {"Accept-Encoding": accepted}
        async with session.request(method, api.client.make_url(path), headers=headers) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, found, await response.read())


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("GZIP;q=0.8, zstd;q=0.5", "gzip"),
        ("gzip;q=0, zstd;q=0.0", None),
        ("*", "zstd"),
        ("*;q=0.5, zstd;q=0", "gzip"),
        ("identity, gzip;q=0.5", None),
        ("br", None),
        ("gzip;q=x, ,;", None),
    ],
)
def test_the_coding_is_the_clients_choice(accepted: str, coding: str | None) -> None:
    assert choose(make_mocked_request("GET", "/", {"Accept-Encoding": accepted})) == coding
    assert choose(make_mocked_request("GET", "/", {"Accept-Encoding": accepted}, version=HttpVersion10)) is None


async def test_answers_of_any_size_are_compressed(api: Api) -> None:
    """Small, in a thread, and in pieces; HEAD says of each what GET does."""
    await api.batch([make_run(event_id=str(number), output_summary="x" * 1200) for number in range(600)])
    runs = (f"{RUNS}?limit=3", f"{RUNS}?limit=100", f"{RUNS}?limit=1000", f"{RUNS}/export", f"{RUNS}/export?format=csv")
    for path in (*runs, "/metrics?format=prometheus", "/openapi.json", "/api/v1/changes"):
        plain = await fetch(api, path, "identity")
        assert hdrs.CONTENT_ENCODING.lower() not in plain.headers
        for coding in ("gzip", "zstd"):
            packed = await fetch(api, path, coding)
            assert packed.headers["content-encoding"] == coding, path
            assert "Accept-Encoding" in packed.headers["vary"]
            if "metrics" not in path:
                assert UNPACK[coding](packed.body) == plain.body, path
            assert len(packed.body) < len(plain.body) / 3, path
            head = await fetch(api, path, coding, "HEAD")
            for name in ("content-encoding", "vary", "content-type"):
                assert head.headers[name] == packed.headers[name], path
            assert head.body == b""
        assert "Accept-Encoding" in plain.headers["vary"]


async def test_what_is_small_or_packed_or_streams_is_left_alone(api: Api) -> None:
    await api.post(make_run(event_id="a"))
    for path in ("/health", f"{RUNS}/nobody", "/page/app.js", "/docs"):
        answer = await fetch(api, path, "gzip, zstd")
        assert "content-encoding" not in answer.headers, path
    async with api.client.get(f"{RUNS}/stream", headers={"Accept-Encoding": "gzip, zstd"}) as stream:
        assert "Content-Encoding" not in stream.headers


async def test_a_head_of_an_export_copies_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    await api.post(make_run(event_id="a", host="h"))
    monkeypatch.setattr(api.store, "export", None)
    for form in ("ndjson", "csv", "parquet"):
        head = await fetch(api, f"{RUNS}/export?format={form}&host=h", "gzip", "HEAD")
        assert (head.status, head.headers["x-total-count"], head.body) == (200, "1", b"")


def test_a_large_answer_takes_no_more_memory_compressed(start_daemon: StartDaemon, tmp_path: Path) -> None:
    runs = [make_run(output_summary=f"{number} " * 6000) for number in range(1200)]
    marks = []
    for codings in (("identity", "identity"), ("gzip", "zstd")):
        folder = tmp_path / codings[0]
        folder.mkdir()
        daemon = start_daemon(folder=folder, TELEMETRY_DB_JOURNAL_MODE="WAL")
        assert [call(daemon.url, "POST", BATCH, part)[0] for part in (runs[:600], runs[600:])] == [200, 200]
        for coding in codings:
            for path in (f"{RUNS}?limit=1000", f"{RUNS}/export"):
                assert fetch_all(f"{daemon.url}{path}", coding) > 0
        marks.append(high_water_mark_kb(daemon))
        assert daemon.stop() == 0
    assert marks[1] - marks[0] < 20_000  # buffers and threads; the answers have 24 and 28 MB


def fetch_all(url: str, accepted: str) -> int:
    request = urllib.request.Request(url, headers={"Accept-Encoding": accepted})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers.get("Content-Encoding", "identity") == accepted
        return len(answer.read())
