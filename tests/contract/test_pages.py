"""What web pages can make a browser do to a daemon on the same machine: nothing (DNS rebinding, CSRF)."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from telemetryd.model.hosts import Names, is_address, split
from tests.conftest import Api, MakeApi, make_run
from tests.contract.wire import JSON, RUNS, Answer, check_error, send, send_raw

TOKEN = "correct-horse-battery"


async def get(api: Api, host: str, path: str = "/health", extra: bytes = b"") -> Answer:
    """Ask with a Host; {port} stands for the daemon's."""
    host = host.format(port=api.client.port)
    head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n".encode()
    [answer] = await send_raw(api, head + extra + b"\r\n")
    return answer


# --- Host: DNS rebinding -------------------------------------------------------------------------

OURS = [
    "localhost:{port}",
    "LocalHost:{port}",
    "localhost.:{port}",
    "localhost",
    "127.0.0.1:{port}",
    "127.8.8.8",
    "[::1]:{port}",
    "192.168.1.20:{port}",
    "[fe80::1]:{port}",
    "localhost:9999",
    f"{socket.gethostname()}:{{port}}",
    # The guide's nginx passes its own name on, as $host, which has no port.
    "telemetry.example.com",
]
REBOUND = [
    "evil.example:{port}",
    "EVIL.EXAMPLE:{port}",
    "evil.example.:{port}",
    "evil.example:1",
    "localhost.evil.example:{port}",
    "127.0.0.1.evil.example:{port}",
    "evil.example:{port}:{port}",
    "localhost@evil.example:{port}",
    "evil:{port}",
    "xn--80ak6aa92e.com:{port}",
    "[::1].evil.example:{port}",
    "[evil]:{port}",
    "1:{port}",
    "127.0.0.1x:{port}",
    "a" * 300 + ":{port}",
    "evil.example:{port} ,localhost",
]


@pytest.mark.parametrize("host", OURS)
async def test_who_calls_it_by_its_name_is_answered(api: Api, host: str) -> None:
    for path in ("/health", RUNS, "/metrics", "/docs"):
        assert (await get(api, host, path)).status == 200
    assert (await get(api, host)).status == 200, "remembered, it is answered again"


@pytest.mark.parametrize("host", REBOUND)
async def test_a_page_that_has_rebound_its_name_reaches_nothing(api: Api, host: str) -> None:
    for path in ("/health", RUNS, "/metrics", "/docs", "/nope", "/openapi.json"):
        detail = check_error(await get(api, host, path), 403)
        assert detail.startswith("Host ")
        assert "TELEMETRY_ALLOWED_HOSTS" in detail
    posted = await send(api, "POST", RUNS, json=make_run(), headers={"Host": host.format(port=api.client.port)})
    check_error(posted, 403)
    assert await api.list() == []


async def test_listed_names_are_answered_and_a_proxys_has_to_be_among_them(make_api: MakeApi) -> None:
    api = await make_api(allowed_hosts="Telemetry.example.com, agents-hub")
    for host in ("telemetry.example.com", "telemetry.example.com:{port}", "agents-hub:{port}", "localhost:{port}"):
        assert (await get(api, host)).status == 200, host
    for host in ("other.example.com", "x", "agents-hub.example.com:{port}"):
        check_error(await get(api, host), 403)


async def test_a_star_allows_every_name(make_api: MakeApi) -> None:
    api = await make_api(allowed_hosts="*")
    for host in ("evil.example:{port}", "x", "localhost:{port}"):
        assert (await get(api, host)).status == 200, host


async def test_with_a_token_every_name_will_do_unless_names_are_listed(
    make_api: MakeApi, engine: str, tmp_path: Path
) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token=TOKEN)
    key = b"X-API-Key: " + TOKEN.encode() + b"\r\n"
    assert (await get(api, "telemetry:{port}", RUNS, key)).status == 200
    check_error(await get(api, "evil.example:{port}", RUNS), 401)
    second = {"db_path": tmp_path / "second.sqlite"} if engine == "sqlite" else {}
    strict = await make_api(**second, api_auth_enabled=True, api_auth_token=TOKEN, allowed_hosts="telemetry")
    assert (await get(strict, "telemetry:{port}", RUNS, key)).status == 200
    check_error(await get(strict, "evil.example:{port}", RUNS, key), 403)


async def test_over_the_unix_socket_every_name_will_do(start_daemon: Any, tmp_path: Path) -> None:
    daemon = start_daemon(TELEMETRY_API_UNIX=str(tmp_path / "socket"), TELEMETRY_ALLOWED_HOSTS="only.example.com")
    assert daemon.url
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "socket"))) as session,
        session.get("http://whatever:1/health") as answer,
    ):
        assert answer.status == 200


def test_on_the_default_port_of_http_a_name_without_a_port_may_be_a_browsers() -> None:
    names = Names(None, "0.0.0.0")
    assert names.may_be_a_proxys("evil.example", 8765, 80)
    assert not names.may_be_a_proxys("evil.example", 80, 80)
    assert not names.may_be_a_proxys("evil.example", 443, 443)
    assert not names.may_be_a_proxys("evil.example:8765", 8765, 80)
    assert not Names(frozenset({"a"}), "0.0.0.0").may_be_a_proxys("evil.example", 8765, 80)
    assert names.has_host("localhost")


def test_the_bound_name_is_one_of_ours() -> None:
    assert Names(None, "Telemetry.internal").has_host("telemetry.internal:8765")
    assert not Names(None, "0.0.0.0").has_host("telemetry.internal:8765")


def test_memory_is_bounded_however_many_names_come() -> None:
    names = Names(None, "0.0.0.0")
    for number in range(50_000):
        assert names.has_host(f"10.0.{number // 256}.{number % 256}:8765")
        assert not names.has_host(f"evil{number}.example:8765")
    assert len(names._known) <= 1000


@pytest.mark.parametrize(
    ("authority", "parts"),
    [
        ("a:1", ("a", "1")),
        ("A.", ("a", "")),
        ("[::1]:80", ("::1", "80")),
        ("::1", None),
        ("[::1", None),
        ("a:b", None),
        ("a/b", None),
        ("a b", None),
        ("", ("", "")),
        (":1", ("", "1")),
        ("a:１", None),
    ],
)
def test_what_is_a_host(authority: str, parts: tuple[str, str] | None) -> None:
    assert split(authority) == parts


def test_what_is_an_address() -> None:
    assert all(map(is_address, ("127.0.0.1", "::1", "10.1.2.3")))
    assert not any(map(is_address, ("127.1", "0x7f000001", "2130706433", "localhost", "")))


# --- Origin: cross-site request forgery ----------------------------------------------------------

FOREIGN = [
    "http://evil.example",
    "https://evil.example:{port}",
    "null",
    "",
    "file://",
    "chrome-extension://abc",
    "http://localhost:3000",
    "http://localhost.evil.example:{port}",
    "http://127.0.0.1",
    "localhost:{port}",
    "http://[::1]x:{port}",
    "http://",
    "http://:{port}",
]


@pytest.mark.parametrize("origin", FOREIGN)
async def test_a_foreign_page_changes_nothing(api: Api, origin: str) -> None:
    run = make_run()
    await api.post(run)
    headers = {"Origin": origin.format(port=api.client.port), "Host": f"localhost:{api.client.port}"}
    for method, path in (
        ("POST", RUNS),
        ("POST", f"{RUNS}/batch"),
        ("PATCH", f"{RUNS}/{run['event_id']}"),
        ("POST", f"{RUNS}/{run['event_id']}/associate-commit"),
        ("POST", "/api/v1/admin/prune"),
        ("POST", "/api/v1/admin/reap"),
        ("POST", "/api/v1/admin/backup"),
        ("DELETE", RUNS),
    ):
        detail = check_error(await send(api, method, path, json={"status": "failed"}, headers=headers), 403)
        assert detail.startswith("A page of "), path
    assert (await api.list())[0]["status"] == "running"
    assert len(await api.list()) == 1
    assert (await send(api, "GET", RUNS, headers=headers)).status == 200, "without CORS headers it cannot read this"


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:{port}", "localhost:{port}"),
        ("http://127.0.0.1:{port}", "127.0.0.1:{port}"),
        ("http://[::1]:{port}", "[::1]:{port}"),
        ("https://telemetry.example.com", "telemetry.example.com"),  # the guide's nginx
        ("https://telemetry.example.com:8443", "telemetry.example.com"),  # whose $host leaves out a port
    ],
)
async def test_our_own_page_may_post(api: Api, origin: str, host: str) -> None:
    headers = {"Origin": origin.format(port=api.client.port), "Host": host.format(port=api.client.port)}
    assert (await send(api, "POST", RUNS, json=make_run(), headers=headers)).status == 201


async def test_a_page_of_a_listed_name_may_post(make_api: MakeApi) -> None:
    api = await make_api(allowed_hosts="telemetry.example.com")
    headers = {"Origin": "https://telemetry.example.com", "Host": f"localhost:{api.client.port}"}
    assert (await send(api, "POST", RUNS, json=make_run(), headers=headers)).status == 201
    headers["Origin"] = "https://evil.example"
    check_error(await send(api, "POST", RUNS, json=make_run(), headers=headers), 403)


async def test_the_admin_endpoints_take_no_foreign_page_even_with_the_token(make_api: MakeApi) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token=TOKEN, allowed_hosts="*")
    headers = {"X-API-Key": TOKEN, "Origin": "http://evil.example"}
    for word in ("prune", "reap", "backup"):
        check_error(await send(api, "POST", f"/api/v1/admin/{word}", json={}, headers=headers), 403)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]
)
async def test_what_a_form_can_send_is_never_taken(api: Api, content_type: str | None) -> None:
    """A browser sends these to anyone without asking first; everything else needs a CORS preflight, which fails."""
    skipped = {"Content-Type"} if content_type is None else None
    headers = {} if content_type is None else {"Content-Type": content_type}
    for path in (RUNS, f"{RUNS}/batch"):
        answer = await send(api, "POST", path, data=b"{}", headers=headers, skip_auto_headers=skipped)
        check_error(answer, 415)


async def test_no_preflight_succeeds_and_nothing_allows_another_origin(api: Api) -> None:
    asking = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    asking["Access-Control-Request-Headers"] = "content-type,x-api-key"
    for path in (RUNS, f"{RUNS}/batch", "/api/v1/admin/prune", "/health"):
        answer = await send(api, "OPTIONS", path, headers=asking)
        check_error(answer, 405)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    for path in ("/health", RUNS, "/docs"):
        answer = await send(api, "GET", path, headers={"Origin": "http://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control-")]


# --- What answers say ----------------------------------------------------------------------------


async def test_every_answer_hides_versions_and_forbids_sniffing(api: Api) -> None:
    answers = [
        await send(api, "GET", path, headers=JSON)
        for path in (
            "/health",
            RUNS,
            "/nope",
            f"{RUNS}?limit=0",
            "/metrics?format=prometheus",
            "/docs",
            "/docs/static/docs.js",
        )
    ]
    answers.append(await send(api, "POST", RUNS, data=b"{", headers=JSON))
    answers += await send_raw(api, b"garbage\r\n\r\n")
    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    answers += await send_raw(api, head + b"Expect: tea\r\n\r\n")
    answers += await send_raw(api, head + b"X: " + b"x" * 10_000 + b"\r\n\r\n")
    answers.append(await send(api, "PATCH", RUNS, headers={"Origin": "http://evil.example"}))
    answers.append(await send(api, "OPTIONS", RUNS))
    answers.append(await send(api, "HEAD", f"{RUNS}/stream"))
    answers.append(await send(api, "POST", RUNS, data=io.BytesIO(b" " * (1 << 24) + b"{"), headers=JSON))
    expected = [200, 200, 404, 400, 200, 200, 200, 422, 400, 417, 431, 403, 405, 200, 413]
    assert [answer.status for answer in answers] == expected
    for answer in answers:
        assert answer.headers["telemetry-server"] == "telemetryd/4", "by which clients know that it is no proxy's"
        assert answer.headers["server"] == "telemetryd"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "x-powered-by" not in answer.headers
        assert "aiohttp" not in str(answer.headers).lower()


async def test_a_page_runs_only_its_own_scripts_and_stands_in_no_frame(api: Api) -> None:
    page = await send(api, "GET", "/docs")
    policy = {part.split()[0]: part.split()[1:] for part in page.headers["content-security-policy"].split(";")}
    assert (
        policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    )
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cross-origin-resource-policy"] == page.headers["cross-origin-opener-policy"] == "same-origin"
    for inline in ("<style", "style=", "onload=", "onclick=", "javascript:", "<script>"):
        assert inline not in page.text
