"""Who is let in: tokens, protected mode, and the rate limit, sentence by sentence."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import re
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request

from telemetryd.web.access import _is_loopback
from telemetryd.web.answers import client_address
from telemetryd.web.limits import RateLimit
from tests.conftest import Api, MakeApi, StartDaemon, make_run
from tests.contract.wire import BATCH, JSON, RUNS, check_error, send, send_raw

TOKEN = "correct-horse-battery"
CLOSED = [
    ("GET", RUNS),
    ("POST", RUNS),
    ("POST", BATCH),
    ("GET", f"{RUNS}/abc"),
    ("PATCH", f"{RUNS}/abc"),
    ("POST", f"{RUNS}/abc/associate-commit"),
    ("GET", f"{RUNS}/abc/commit-url"),
    ("GET", f"{RUNS}/abc/repo-url"),
    ("GET", "/api/v1/metadata"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("GET", "/docs"),
    ("GET", "/docs/static/docs.js"),
    ("GET", "/nope"),
    ("DELETE", RUNS),
    ("GET", "//health"),
    ("GET", "/%68ealth/x"),
]


async def make_closed(make_api: MakeApi, **values: Any) -> Api:
    return await make_api(api_auth_enabled=True, api_auth_token=TOKEN, **values)


# --- Tokens --------------------------------------------------------------------------------------


async def test_without_a_token_only_health_answers(make_api: MakeApi) -> None:
    api = await make_closed(make_api)
    for method, path in CLOSED:
        [answer] = await send_raw(api, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        detail = check_error(answer, 401)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "x-request-id" in answer.headers
        assert TOKEN not in detail
    assert (await send(api, "GET", "/health")).json["status"] == "ok"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {TOKEN}"},
        {"Authorization": f"bearer {TOKEN}"},
        {"Authorization": f"Bearer   {TOKEN} "},
        {"X-API-Key": TOKEN},
        {"x-api-key": TOKEN},
        {"X-API-Key": TOKEN, "Authorization": "Basic dXNlcjpwYXNz"},
    ],
    ids=str,
)
async def test_the_token_opens_everything(make_api: MakeApi, headers: dict[str, str]) -> None:
    api = await make_closed(make_api)
    run = make_run()
    assert (await send(api, "POST", RUNS, json=run, headers=headers)).status == 201
    for path in (
        RUNS,
        f"{RUNS}/{run['event_id']}",
        "/api/v1/metadata",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/health",
    ):
        assert (await send(api, "GET", path, headers=headers)).status == 200, path
    check_error(await send(api, "GET", "/nope", headers=headers), 404)


WRONG = {
    "nothing after Bearer": b"Authorization: Bearer",
    "another token": b"Authorization: Bearer wrong-horse-battery",
    "the beginning": b"Authorization: Bearer " + TOKEN[:-1].encode(),
    "more than the token": b"Authorization: Bearer " + TOKEN.encode() + b"x",
    "other case": b"Authorization: Bearer " + TOKEN.upper().encode(),
    "the token alone": b"Authorization: " + TOKEN.encode(),
    "another scheme": b"Authorization: Token " + TOKEN.encode(),
    "Basic": b"Authorization: Basic " + TOKEN.encode(),
    "two tokens": b"Authorization: Bearer " + TOKEN.encode() + b", Bearer " + TOKEN.encode(),
    "UTF-8": "Authorization: Bearer pässwörd😀".encode(),
    "no UTF-8": b"Authorization: Bearer \xff\xfe\xff",
    "long": b"Authorization: Bearer " + b"a" * 5000,
    "empty key": b"X-API-Key: ",
    "another key": b"X-API-Key: wrong",
    "no UTF-8 in the key": b"X-API-Key: \xff\xfe",
    "a wrong bearer next to the right key": b"Authorization: Bearer wrong\r\nX-API-Key: " + TOKEN.encode(),
    "a cookie": b"Cookie: token=" + TOKEN.encode(),
    "a forwarded address": b"X-Forwarded-For: 127.0.0.1",
}


async def test_a_wrong_token_is_401(make_api: MakeApi) -> None:
    api = await make_closed(make_api)
    for label, header in WRONG.items():
        tail = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"\r\n\r\n"
        [answer] = await send_raw(api, b"GET /metrics" + tail)
        assert TOKEN not in check_error(answer, 401), label
        assert answer.headers["www-authenticate"].startswith("Bearer"), label
        [answer] = await send_raw(api, b"GET /health" + tail)
        assert answer.status == 200, label


PAGES = ["/docs", "/docs/static/docs.js", "/docs/static/docs.css", "/openapi.json"]


def as_password(token: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{token}".encode()).decode()}


async def test_a_browser_may_open_the_page_with_the_token_as_the_password(make_api: MakeApi) -> None:
    api = await make_closed(make_api)
    for path in PAGES:
        assert (await send(api, "GET", path, headers=as_password(TOKEN))).status == 200, path
        check_error(await send(api, "GET", path, headers=as_password(TOKEN + "x")), 401)
        check_error(await send(api, "GET", path, headers={"Authorization": "Basic ÿ%"}), 401)
    for method, path in CLOSED:  # what a browser remembers must not serve a foreign page that makes it send something
        if path.startswith(("/api/", "/metrics")):
            check_error(await send(api, method, path, headers=as_password(TOKEN)), 401)


async def test_only_a_browser_that_opens_a_page_is_asked_for_a_password(make_api: MakeApi) -> None:
    api = await make_closed(make_api)
    for path, accept, schemes in (
        ("/docs", "text/html,*/*;q=0.8", ["Bearer", "Basic"]),
        ("/docs", "*/*", ["Bearer"]),
        (RUNS, "text/html,*/*;q=0.8", ["Bearer"]),
        ("/nope", "text/html,*/*;q=0.8", ["Bearer"]),
    ):
        async with api.client.get(path, headers={"Accept": accept}) as answer:
            assert answer.status == 401
            assert [asked.split()[0] for asked in answer.headers.getall("WWW-Authenticate")] == schemes, path


async def test_the_page_needs_no_token_because_it_asks_for_it(make_api: MakeApi) -> None:
    api = await make_closed(make_api)
    browser = {"Accept": "text/html,*/*;q=0.8"}
    page = await send(api, "GET", "/", headers=browser)
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    for asset in re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text):
        assert (await send(api, "GET", asset)).status == 200, asset
    for path in ("/page/", "/page/nope.js", "/page/..%2fdocs", "/page/index.html"):
        check_error(await send(api, "GET", path, headers=browser), 401)
    check_error(await send(api, "POST", "/", headers=browser), 401)


async def test_the_log_tells_why_somebody_was_refused(make_api: MakeApi, caplog: pytest.LogCaptureFixture) -> None:
    api = await make_closed(make_api, rate_limit_enabled=True, rate_limit_rpm=5)
    guess = "wrong-horse-battery"
    for path, headers in (
        (RUNS, {}),
        (RUNS, {"X-API-Key": guess}),
        (RUNS, {"Authorization": f"Bearer {guess}"}),
        (RUNS, as_password(guess)),
        ("/docs", as_password(guess)),
        (RUNS, {}),
    ):
        await send(api, "GET", path, headers=headers)
    told = [record.error_message for record in caplog.records if hasattr(record, "error_message")]
    assert told == [
        "No token was sent",
        "The token is wrong",
        "The token is wrong",
        "Authorization holds no bearer token",
        "The token is wrong",
        "Too many requests from this address",
    ]
    assert guess not in str([record.__dict__ for record in caplog.records])


async def test_a_token_in_the_query_is_no_token(make_api: MakeApi) -> None:
    api = await make_closed(make_api)
    check_error(await send(api, "GET", f"{RUNS}?token={TOKEN}&X-API-Key={TOKEN}"), 401)


async def test_a_token_may_hold_any_characters(make_api: MakeApi) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token="pässwörd-😀")
    head = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    for name in ("Authorization: Bearer ", "X-API-Key: "):
        [answer] = await send_raw(api, head + f"{name}pässwörd-😀\r\n\r\n".encode())
        assert answer.status == 200
        [answer] = await send_raw(api, head + f"{name}password-😀\r\n\r\n".encode())
        check_error(answer, 401)


async def test_a_token_may_be_in_a_file(make_api: MakeApi, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    api = await make_api(api_auth_enabled=True, api_auth_token_file=file)
    assert (await send(api, "GET", "/metrics", headers={"X-API-Key": TOKEN})).status == 200
    check_error(await send(api, "GET", "/metrics", headers={"X-API-Key": TOKEN + "x"}), 401)


async def test_a_refused_write_is_not_stored_and_its_body_not_read(make_api: MakeApi) -> None:
    api = await make_closed(make_api)
    check_error(await send(api, "POST", RUNS, json=make_run()), 401)
    request = (
        b"POST /api/v1/runs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n{"
    )
    [answer] = await send_raw(api, request, only_first=True)
    check_error(answer, 401)
    assert (await send(api, "GET", RUNS, headers={"X-API-Key": TOKEN})).json == []


async def test_the_token_is_shown_nowhere(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(
        TELEMETRY_API_AUTH_ENABLED="true", TELEMETRY_API_AUTH_TOKEN=TOKEN, TELEMETRY_LOG_LEVEL="DEBUG"
    )
    url = await asyncio.to_thread(lambda: daemon.url)
    texts = []
    async with aiohttp.ClientSession() as session:
        for path in ("/health", "/metrics", "/openapi.json", RUNS, f"{RUNS}?limit=0", "/nope"):
            for headers in ({}, {"X-API-Key": TOKEN}, {"Authorization": f"Bearer {TOKEN}x"}):
                async with session.get(url + path, headers=headers) as answer:
                    texts.append(await answer.text())
    status = await asyncio.to_thread(daemon.stop)
    assert status == 0
    assert len(texts) == 18
    assert TOKEN not in "".join(texts)
    assert TOKEN not in json.dumps(daemon.lines)
    assert any(line["message"].startswith("Error in") for line in daemon.lines)


# --- Protected mode ------------------------------------------------------------------------------


def own_address() -> str:
    """An address of this machine that is not loopback."""
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    for text in listed:
        address = ipaddress.ip_address(text)
        if address.version == 4 and not address.is_loopback:
            return text
    pytest.skip("this machine has loopback addresses only")


async def ask(url: str, method: str = "GET", **options: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.request(method, url, **options) as answer:
        return answer.status, await answer.json()


async def test_the_default_lets_nobody_else_in(start_daemon: StartDaemon) -> None:
    address = own_address()
    daemon = start_daemon()  # on 0.0.0.0, the guide's default
    url = await asyncio.to_thread(lambda: daemon.url)
    assert any("0.0.0.0" in text for text in daemon.wait_for_line("Serving")["addresses"])
    outside = url.replace("127.0.0.1", address)
    assert (await ask(f"{url}/health"))[0] == 200
    assert (await ask(f"{url}{RUNS}", "POST", json=make_run()))[0] == 201
    forged = {
        "X-Forwarded-For": "127.0.0.1",
        "X-Real-IP": "127.0.0.1",
        "Forwarded": "for=127.0.0.1",
        "Host": "localhost",
    }
    for headers in ({}, forged):
        for path in ("/health", RUNS, "/metrics", "/docs", "/nope"):
            status, body = await ask(outside + path, headers=headers)
            assert (status, set(body)) == (403, {"detail"}), path
            assert "TELEMETRY_API_AUTH_ENABLED" in body["detail"]
            assert "TELEMETRY_API_PROTECTED_MODE" in body["detail"]
            assert "\n" not in body["detail"]
        assert (await ask(outside + RUNS, "POST", json=make_run(), headers=headers))[0] == 403
    assert len((await ask(url + RUNS))[1]) == 1


async def test_a_client_that_resets_its_connection_is_not_taken_for_one_of_this_machine(
    start_daemon: StartDaemon,
) -> None:
    address = own_address()
    daemon = start_daemon()
    url = await asyncio.to_thread(lambda: daemon.url)
    body = json.dumps(make_run()).encode()
    head = f"POST {RUNS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for number in range(50):
        with socket.create_connection((address, int(url.rpartition(":")[2]))) as sock:
            if number % 2:
                await asyncio.sleep(0.01)  # so that it is accepted first
            sock.sendall(head.encode() + body)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert (await ask(url + RUNS))[1] == []


@pytest.mark.parametrize(
    ("variables", "headers"),
    [
        ({"TELEMETRY_API_PROTECTED_MODE": "false"}, {}),
        ({"TELEMETRY_API_AUTH_ENABLED": "true", "TELEMETRY_API_AUTH_TOKEN": TOKEN}, {"X-API-Key": TOKEN}),
    ],
    ids=["protected mode off", "authentication on"],
)
async def test_others_are_let_in_when_a_setting_says_so(
    start_daemon: StartDaemon, variables: dict[str, str], headers: dict[str, str]
) -> None:
    address = own_address()
    daemon = start_daemon(**variables)
    url = (await asyncio.to_thread(lambda: daemon.url)).replace("127.0.0.1", address)
    assert (await ask(f"{url}{RUNS}", "POST", json=make_run(), headers=headers))[0] == 201
    assert (await ask(f"{url}/health"))[0] == 200


async def test_the_unix_socket_is_served(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    daemon = start_daemon(TELEMETRY_API_UNIX=str(path))
    await asyncio.to_thread(daemon.wait_for_line, "Serving")
    connector = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post(f"http://x{RUNS}", json=make_run()) as answer,
    ):
        assert answer.status == 201


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        (None, False),
        ("", True),
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.0.2.1", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("128.0.0.1", False),
        ("::", False),
        ("::ffff:192.0.2.1", False),
        ("fe80::1%eth0", False),
        ("fd00::2", False),
        ("localhost", False),
        ("x127.0.0.1", False),
    ],
)
def test_which_peers_are_loopback(address: str | None, loopback: bool) -> None:
    assert _is_loopback(address) is loopback


# --- The rate limit ------------------------------------------------------------------------------


async def test_beyond_the_limit_it_is_429_with_retry_after(make_api: MakeApi) -> None:
    api = await make_api(rate_limit_enabled=True, rate_limit_rpm=5)
    assert [(await send(api, "GET", RUNS)).status for _ in range(5)] == [200] * 5
    for method, path in (("GET", RUNS), ("POST", RUNS), ("GET", "/nope")):
        answer = await send(api, method, path, headers=JSON)
        assert "Too many requests" in check_error(answer, 429)
        assert 1 <= int(answer.headers["retry-after"]) <= 12
        assert "x-request-id" in answer.headers


async def test_after_retry_after_it_is_open_again(make_api: MakeApi) -> None:
    api = await make_api(rate_limit_enabled=True, rate_limit_rpm=60)
    statuses = [(await send(api, "GET", RUNS)).status for _ in range(70)]
    assert statuses[:60] == [200] * 60
    assert 429 in statuses
    while (answer := await send(api, "GET", RUNS)).status == 200:
        pass
    check_error(answer, 429)
    await asyncio.sleep(int(answer.headers["retry-after"]))
    assert (await send(api, "GET", RUNS)).status == 200


async def test_it_is_off_unless_a_setting_says_so(api: Api) -> None:
    assert {(await send(api, "GET", "/nope")).status for _ in range(200)} == {404}


async def test_an_address_has_a_limit_of_its_own(start_daemon: StartDaemon) -> None:
    address = own_address()
    daemon = start_daemon(
        TELEMETRY_RATE_LIMIT_ENABLED="true", TELEMETRY_RATE_LIMIT_RPM="3", TELEMETRY_API_PROTECTED_MODE="false"
    )
    url = await asyncio.to_thread(lambda: daemon.url)
    forged = {"X-Forwarded-For": "198.51.100.7"}
    statuses = [(await ask(url + RUNS, headers=forged if number % 2 else {}))[0] for number in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert (await ask(url.replace("127.0.0.1", address) + RUNS))[0] == 200


def test_the_bucket_fills_with_time_and_never_beyond_its_size() -> None:
    now = 0.0
    limit = RateLimit(60, clock=lambda: now)
    assert [limit.wait_s("a") for _ in range(60)] == [0] * 60
    assert limit.wait_s("a") == pytest.approx(1)
    now = 0.5
    assert limit.wait_s("a") == pytest.approx(0.5)
    now = 1.0
    assert limit.wait_s("a") == 0
    assert limit.wait_s("a") > 0
    now = 10_000
    assert [limit.wait_s("a") for _ in range(60)] == [0] * 60
    assert limit.wait_s("a") > 0


def test_memory_is_bounded_however_many_addresses_come() -> None:
    now = 0.0
    limit = RateLimit(1, clock=lambda: now, addresses=100)
    assert limit.wait_s("known") == 0
    for number in range(100_000):
        limit.wait_s(f"address-{number}")
        if number % 50 == 0:
            assert limit.wait_s("known") > 0, "who keeps coming is not forgotten"
    assert len(limit._buckets) == 100


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:1:2", "::ffff:1:2"),
        ("", ""),
    ],
)
def test_a_client_has_one_address_whatever_kind_of_socket_it_came_over(remote: str, address: str) -> None:
    request = make_mocked_request("GET", "/").clone(remote=remote)
    assert client_address(request) == address
