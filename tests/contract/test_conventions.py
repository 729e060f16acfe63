"""What holds for every endpoint: the shape of errors, request ids, methods, media types, content codings, limits."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import re
import secrets
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from telemetryd.model import runs
from telemetryd.ops.metrics import Metrics
from telemetryd.web import body as body_module
from telemetryd.web.middleware import middleware
from telemetryd.web.tokens import BEARER, Tokens
from tests.conftest import (
    Api,
    Client,
    Daemon,
    DaemonServer,
    MakeApi,
    StartDaemon,
    bodies_of,
    eventually,
    make_run,
    patience,
    require_program,
)
from tests.contract.wire import (
    BATCH,
    JSON,
    NDJSON,
    RUNS,
    Answer,
    check_alive,
    check_error,
    is_in_hand,
    post,
    send,
    send_raw,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = pytest.mark.asyncio(loop_scope="module")
OWN_LOOP = pytest.mark.asyncio(loop_scope="function")


@pytest.fixture
def api(shared: Api) -> Api:
    """One app for the whole module; tests that need one of their own ask for `make_api`."""
    return shared


ENDPOINTS = {
    "/api/v1/runs": {"GET", "HEAD", "POST"},
    "/api/v1/runs/abc": {"DELETE", "GET", "HEAD", "PATCH"},
    "/api/v1/runs/batch": {"DELETE", "GET", "HEAD", "PATCH", "POST"},
    "/api/v1/runs/abc/associate-commit": {"POST"},
    "/api/v1/runs/abc/commit-url": {"GET", "HEAD"},
    "/api/v1/runs/abc/repo-url": {"GET", "HEAD"},
    "/api/v1/metadata": {"GET", "HEAD"},
    "/health": {"GET", "HEAD"},
    "/metrics": {"GET", "HEAD"},
    "/openapi.json": {"GET", "HEAD"},
    "/docs": {"GET", "HEAD"},
    "/docs/static/docs.js": {"GET", "HEAD"},
}
WITH_BODY = [
    ("POST", RUNS),
    ("POST", BATCH),
    ("PATCH", f"{RUNS}/abc"),
    ("POST", f"{RUNS}/abc/associate-commit"),
]

# --- JSON in, JSON out ---------------------------------------------------------------------------


async def test_text_is_utf_8_in_and_out(api: Api) -> None:
    run = make_run(item_name="Grüße 😀 世界")
    await post(api, json.dumps(run, ensure_ascii=False).encode())
    answer = await send(api, "GET", f"{RUNS}/{run['event_id']}")
    assert answer.headers["content-type"] == "application/json"
    assert "Grüße 😀 世界".encode() in answer.body


@pytest.mark.parametrize("path", ["/nope", "/api/v2/runs", "/api/v1", "/api/v1/runs//"])
async def test_404_is_json(api: Api, path: str) -> None:
    answer = await send(api, "GET", path, headers={"Accept": "text/html"})
    assert check_error(answer, 404) == "No such endpoint; /docs lists them all"


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_405_is_json_and_lists_what_is_allowed(api: Api, path: str) -> None:
    for method in {"GET", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"} - ENDPOINTS[path]:
        answer = await send(api, method, path, headers=JSON, data=b"{}")
        assert check_error(answer, 405) == "Method not allowed here; see Allow"
        assert {name.strip() for name in answer.headers["allow"].split(",")} == ENDPOINTS[path]
        assert "x-request-id" in answer.headers


@pytest.mark.parametrize("path", ["/health", "/metrics", RUNS, "/docs", "/openapi.json"])
async def test_head_is_get_without_the_body(api: Api, path: str) -> None:
    [answer] = await send_raw(
        api, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode(), is_head=True
    )
    assert (answer.status, answer.body) == (200, b"")


# --- 500 and 503 ---------------------------------------------------------------------------------


def line_of(answer: Answer, caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """Check that a 500 tells only its request id; return the one line of the log that has it too."""
    identity = answer.headers["x-request-id"]
    assert check_error(answer, 500) == f"Internal error; the log has more under request id {identity}"
    [line] = [record for record in caplog.records if getattr(record, "request_id", None) == identity]
    assert line.levelno == logging.ERROR
    return line


@OWN_LOOP
async def test_a_change_that_the_database_refuses_tells_only_a_request_id(
    make_api: MakeApi, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse_carelessly(value: object) -> runs.ParsedRun:
        row = [*parse_run(value).row]
        row[runs.STATUS] = "secret of the house"  # which a CHECK of the table refuses
        return runs.ParsedRun(tuple(row), ())

    api = await make_api()
    parse_run = runs.parse_run
    monkeypatch.setattr(runs, "parse_run", parse_carelessly)
    line = line_of(await send(api, "POST", RUNS, json=make_run()), caplog)
    assert "The database refused the change: " in line.getMessage()
    assert "status" in line.getMessage()
    assert await api.list() == []


@OWN_LOOP
async def test_an_unexpected_error_tells_only_a_request_id(
    make_api: MakeApi,
    aiohttp_client: Callable[[DaemonServer], Awaitable[Client]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = await make_api()

    async def fail(_: web.Request) -> web.Response:
        raise RuntimeError("secret of the house")

    metrics = Metrics()
    passed = middleware(api.settings, metrics, api.store.flow, Tokens(api.settings, metrics), {})
    app = web.Application(middlewares=[passed])
    app.router.add_get("/", fail)
    client = await aiohttp_client(DaemonServer(app, api.settings))
    line = line_of(await send(Api(client, api.store, api.settings), "GET", "/"), caplog)
    assert line.exc_info is not None
    assert "secret of the house" in str(line.exc_info[1])


@pytest.mark.sqlite
@OWN_LOOP
async def test_a_foreign_lock_is_503_with_retry_after_and_the_same_event_succeeds_later(make_api: MakeApi) -> None:
    api = await make_api(db_busy_timeout_ms=100)
    run = make_run()
    connection = sqlite3.connect(api.settings.db_path, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        for method, path, body in (
            ("POST", RUNS, run),
            ("POST", BATCH, [run]),
            ("PATCH", f"{RUNS}/abc", {"status": "success"}),
        ):
            answer = await send(api, method, path, json=body)
            check_error(answer, 503)
            assert re.fullmatch(r"[1-9]\d*", answer.headers["retry-after"])
        connection.execute("ROLLBACK")
    finally:
        connection.close()
    assert await api.list() == []
    await api.post(run)


@OWN_LOOP
async def test_a_full_queue_is_503_at_once(make_api: MakeApi, engine: str) -> None:
    api = await make_api(**patience(engine), queue_max=2)
    with api.locked():
        first = asyncio.create_task(send(api, "POST", RUNS, json=make_run()))
        await eventually(lambda: is_in_hand(api))  # the writer holds it and waits for the lock
        queued = [asyncio.create_task(send(api, "POST", RUNS, json=make_run())) for _ in range(2)]
        await eventually(lambda: api.store.health().queue_depth == 2)
        async with asyncio.timeout(20):
            refused = await send(api, "POST", RUNS, json=make_run())
        assert "Too many writes" in check_error(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        assert (await send(api, "GET", RUNS)).status == 200
    assert {answer.status for answer in await asyncio.gather(first, *queued)} == {201}
    assert len(await api.list()) == 3


# --- X-Request-ID --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "0f8b-17", "x" * 128, "~!@#$%^&*()_+{}|:<>?", "two words"])
async def test_a_request_id_is_accepted_and_returned(api: Api, given: str) -> None:
    for method, path in (("GET", "/health"), ("GET", "/nope"), ("POST", RUNS), ("DELETE", RUNS)):
        answer = await send(api, method, path, headers={"X-Request-ID": given})
        assert answer.headers["x-request-id"] == given, path


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"\xc3\xa4", b"\xff", b"a\tb"])
async def test_another_request_id_is_made_instead(api: Api, given: bytes) -> None:
    [answer] = await send_raw(
        api, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-ID: " + given + b"\r\n\r\n"
    )
    assert answer.status == 200
    made = answer.headers["x-request-id"]
    assert re.fullmatch(r"[\x21-\x7e]{8,128}", made)
    assert made.encode() != given


async def test_every_request_gets_an_id_of_its_own(api: Api) -> None:
    made = [(await send(api, "GET", "/health")).headers["x-request-id"] for _ in range(100)]
    assert len(set(made)) == 100


async def test_a_request_id_is_logged(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "telemetry_api")
    await send(api, "POST", RUNS, json=make_run(), headers={"X-Request-ID": "mine-1"})
    await send(api, "GET", "/nope", headers={"X-Request-ID": "mine-2"})
    logged = [record.__dict__["request_id"] for record in caplog.records if "request_id" in record.__dict__]
    assert logged == ["mine-1", "mine-2"]


# --- Media types ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/xml",
     "application/octet-stream", "application/json; charset=utf-16", "application/json; charset=latin-1", "json", "*/*",
     "application/jsonx"],
)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), WITH_BODY)
async def test_another_media_type_is_415(api: Api, method: str, path: str, content_type: str) -> None:
    answer = await send(api, method, path, data=json.dumps(make_run()).encode(), headers={"Content-Type": content_type})
    detail = check_error(answer, 415)
    assert "application/json" in detail
    assert content_type in detail


async def test_without_a_media_type_it_is_415(api: Api) -> None:
    for method, path in WITH_BODY:
        request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
        [answer] = await send_raw(api, request.encode())
        assert "Content-Type" in check_error(answer, 415)


async def test_ndjson_is_for_batches_only(api: Api) -> None:
    check_error(await post(api, json.dumps(make_run()).encode(), RUNS, NDJSON), 415)


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"']
)
async def test_json_by_any_of_its_names_is_taken(api: Api, content_type: str) -> None:
    answer = await post(api, json.dumps(make_run()).encode(), RUNS, {"Content-Type": content_type})
    assert answer.status == 201


# --- Content codings -----------------------------------------------------------------------------


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
}


async def post_coded(api: Api, data: bytes, coding: str, path: str = RUNS) -> Answer:
    return await post(api, data, path, {**JSON, "Content-Encoding": coding})


@pytest.mark.parametrize("coding", [*CODINGS, "GZIP", " Zstd "])
async def test_a_coded_body_is_decoded(api: Api, coding: str) -> None:
    run = make_run(error_details="x" * 300_000)
    data = CODINGS[coding.strip().lower()](json.dumps(run).encode())
    assert (await post_coded(api, data, coding)).status == 201
    assert (await api.get(f"{RUNS}/{run['event_id']}"))["error_details"] == run["error_details"]
    batch = CODINGS[coding.strip().lower()](json.dumps([make_run(), make_run()]).encode())
    assert (await post_coded(api, batch, coding, BATCH)).json["inserted"] == 2


async def test_deflate_without_its_zlib_header_is_decoded_too(api: Api) -> None:
    assert (await post_coded(api, raw_deflate(json.dumps(make_run()).encode()), "deflate")).status == 201


async def test_identity_is_no_coding(api: Api) -> None:
    assert (await post_coded(api, json.dumps(make_run()).encode(), "identity")).status == 201


async def test_a_change_may_be_coded(api: Api) -> None:
    run = make_run()
    await api.post(run)
    headers = {**JSON, "Content-Encoding": "gzip"}
    for method, path, body in (
        ("PATCH", f"{RUNS}/{run['event_id']}", {"status": "success"}),
        ("POST", f"{RUNS}/{run['event_id']}/associate-commit", {"commit_hash": "abcdef0", "commit_source": "ci"}),
    ):
        data = gzip.compress(json.dumps(body).encode())
        assert (await send(api, method, path, data=data, headers=headers)).status == 200


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, gzip", "deflate, gzip", "gzip,", "foo", "x" * 5000, "*"])
async def test_an_unknown_coding_is_415(api: Api, coding: str) -> None:
    data = gzip.compress(json.dumps(make_run()).encode())
    assert "gzip, deflate, zstd" in check_error(await post_coded(api, data, coding), 415)


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_broken_coding_is_400(api: Api, coding: str) -> None:
    run = make_run(event_id="broken")
    good = CODINGS[coding](json.dumps(run).encode())
    flipped = good[:-2] + bytes([good[-2] ^ 0xFF]) + good[-1:]
    for label, data in {
        "empty": b"",
        "truncated": good[:-1],
        "half": good[: len(good) // 2],
        "one byte": good[:1],
        "trailing bytes": good + b"x",
        "twice": good + good,
        "not coded": json.dumps(run).encode(),
        "junk": b"\xff" * 1000,
        **({"wrong checksum": flipped} if coding != "zstd" else {}),
    }.items():
        detail = check_error(await post_coded(api, data, coding), 400)
        assert coding in detail, label
    check_error(await send(api, "GET", f"{RUNS}/broken"), 404)
    await check_alive(api)


# --- Limits --------------------------------------------------------------------------------------


def filler(size: int) -> bytes:
    """A valid run of exactly so many bytes."""
    empty = json.dumps(make_run(error_details="")).encode()
    return empty.replace(b'"error_details": ""', b'"error_details": "' + b"x" * (size - len(empty)) + b'"')


@OWN_LOOP
async def test_a_body_of_the_largest_size_is_taken_and_one_more_byte_is_413(make_api: MakeApi) -> None:
    api = await make_api(max_body_bytes=50_000)
    for coding, encode in {"identity": bytes, **CODINGS}.items():
        assert (await post_coded(api, encode(filler(50_000)), coding)).status == 201, coding
        detail = check_error(await post_coded(api, encode(filler(50_001)), coding), 413)
        assert detail == "The body must not be larger than 50000 bytes (TELEMETRY_MAX_BODY_BYTES)"


@OWN_LOOP
async def test_a_chunked_body_is_413_as_soon_as_it_is_too_large(make_api: MakeApi) -> None:
    """It never ends, so an answer means that nobody waited for its end."""
    api = await make_api(max_body_bytes=50_000)
    head = b"POST /api/v1/runs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    [answer] = await send_raw(
        api, head + b"Transfer-Encoding: chunked\r\n\r\n" + b"EA60\r\n" + b"x" * 60_000 + b"\r\n", only_first=True
    )
    check_error(answer, 413)


async def test_the_default_limit_is_16_mib(api: Api) -> None:
    assert (await post(api, filler(16 * 1024 * 1024))).status == 201
    assert "16777216" in check_error(await post(api, filler(16 * 1024 * 1024 + 1)), 413)


def gzip_bomb(size: int) -> bytes:
    """A gzip stream of so many zeros, made from one block over and over."""
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    zeros = bytes(1 << 20)
    compressor.compress(zeros)
    compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(zeros) + compressor.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + block * (size >> 20)


def zstd_bomb(size: int) -> bytes:
    compressor = zstd.ZstdCompressor()
    parts = [compressor.compress(bytes(1 << 24)) for _ in range(size >> 24)]
    return b"".join(parts) + compressor.flush()


def high_water_mark_kb(daemon: Daemon) -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{daemon.process.pid}/status").read_text())
    assert match is not None
    return int(match[1])


def curl(url: str, body: bytes, coding: str) -> tuple[int, Any]:
    require_program("curl", "curl")
    result = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", "-H", "Content-Type: application/json", "-H",
         f"Content-Encoding: {coding}", "--data-binary", "@-", url],
        input=body, capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    text, _, status = result.stdout.decode().rpartition("\n")
    return int(status), json.loads(text)


async def test_a_bomb_stops_at_the_limit(start_daemon: StartDaemon) -> None:
    """About 1 GiB of zeros: measured by the daemon's own memory."""
    daemon = start_daemon(TELEMETRY_MAX_BODY_BYTES="1048576")
    url = await asyncio.to_thread(lambda: daemon.url)
    size = 900 << 20  # a gzip stream of it stays below the limit of encoded bytes
    bombs = {"gzip": gzip_bomb(size), "deflate": gzip_bomb(size)[10:], "zstd": zstd_bomb(1 << 30)}
    for coding, bomb in bombs.items():
        assert len(bomb) < 1_000_000, coding
        before = high_water_mark_kb(daemon)
        status, answer = await asyncio.to_thread(curl, url + RUNS, bomb, coding)
        assert (status, "TELEMETRY_MAX_BODY_BYTES" in answer["detail"]) == (413, True), coding
        assert high_water_mark_kb(daemon) - before < 32_000, coding


SLOW = (
    b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
)


async def test_a_body_that_stops_arriving_is_503(api: Api) -> None:
    bodies_of(api).bounds = body_module.BodyBounds(silence_s=0.2)
    [answer] = await send_raw(api, SLOW + b"{", only_first=True)
    assert "stopped arriving" in check_error(answer, 503)
    assert answer.headers["retry-after"] == "5"
    await check_alive(api)


async def send_slowly(api: Api, data: bytes, step: int) -> Answer:
    """Send a body in pieces, 20 a second, until there is an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
    writer.write(SLOW)
    answered = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
    for start in range(0, len(data), step):
        if not answered.done():
            writer.write(data[start : start + step])
            await asyncio.sleep(0.05)
    async with asyncio.timeout(60):
        status = int((await answered).split()[1])
    writer.close()
    return Answer(status, {}, b"")


async def test_a_slow_body_that_goes_on_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pauses are hours of a clock that it moves on itself, so that none of the machine's matters."""
    loop = asyncio.get_running_loop()
    clock, passed = loop.time, 0
    monkeypatch.setattr(loop, "time", lambda: clock() + passed * 3600)

    class Slow:
        def is_eof(self) -> bool:
            return False

        async def readany(self) -> bytes:
            nonlocal passed
            passed += 1
            for _ in range(3):  # timers that are due run
                await asyncio.sleep(0)
            return b"x" * 3600 if passed < 10 else b""

    request = make_mocked_request("POST", RUNS, payload=cast("Any", Slow()))
    request[BEARER] = None
    bounds = body_module.BodyBounds(silence_s=2 * 3600, slowest_bytes_per_s=0.5)
    async with body_module.Bodies(1 << 20, bounds).read(request) as body:
        assert len(body) == 9 * 3600


async def test_a_body_that_only_trickles_is_503(api: Api) -> None:
    bodies_of(api).bounds = body_module.BodyBounds(silence_s=0.3, slowest_bytes_per_s=1000)
    data = json.dumps(make_run()).encode().ljust(5000)
    started = time.monotonic()
    assert (await send_slowly(api, data, 10)).status == 503  # 200 bytes a second
    assert time.monotonic() - started < 20, "the whole body takes 25 s"


@pytest.mark.parametrize("extra", [b"x", gzip.compress(b"{}"), bytes(200_000)], ids=["a byte", "a member", "zeros"])
@pytest.mark.parametrize("size", [0, 1 << 17], ids=["small", "large"])
async def test_nothing_may_follow_a_coded_body(api: Api, extra: bytes, size: int) -> None:
    data = json.dumps(make_run(input_summary=secrets.token_hex(size))).encode()
    compress: Callable[[bytes], bytes]
    for coding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstd.compress)):
        coded = compress(data)
        assert "one complete" in check_error(await post_coded(api, coded + extra, coding), 400)
        assert "one complete" in check_error(await post_coded(api, coded[:-1], coding), 400)
        assert (await post_coded(api, coded, coding)).status in (200, 201)


async def test_decoding_costs_as_much_as_there_is() -> None:
    """Random bytes do not shrink, so every slice leaves all the rest: 80 MB were copied 1,200 times."""
    data = os.urandom(80_000_000)
    started = time.process_time()
    share = body_module._Share(body_module.Bodies(len(data)))
    assert await body_module._decode(gzip.compress(data, 0), "gzip", share) == data
    assert time.process_time() - started < 6
