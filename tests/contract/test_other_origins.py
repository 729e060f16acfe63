"""What a page of another origin may do through somebody's browser: read, if its origin is listed, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from telemetryd.configuration import load
from telemetryd.errors import ConfigurationError
from telemetryd.http import ROUTES
from telemetryd.model.hosts import origin_of
from tests.conftest import Api, MakeApi, make_run
from tests.contract.wire import JSON, RUNS, check_error, send

TOKEN = "correct-horse-battery"
DASHBOARD = "https://dashboard.example.com"
PROXY = "https://telemetry.example.com"
FOREIGN = ("cross-site", "same-site")
OPENED = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Accept": "text/html"}


def everything() -> Iterator[tuple[str, str]]:
    """Yield each route of the app as it may be asked."""
    for route in ROUTES:
        path = route.path.replace("{event_id}", "event-1")
        yield route.method, path
        if route.method == "GET":
            yield "HEAD", path


def is_open(path: str) -> bool:
    return path == "/health" or path.startswith(("/page/", "/docs/static/"))


@pytest.mark.parametrize("site", FOREIGN)
async def test_a_foreign_page_learns_nothing_by_any_method_and_no_path(make_api: MakeApi, site: str) -> None:
    api = await make_api(allowed_hosts="telemetry.example.com", cors_origins=DASHBOARD)
    for mode, dest in (("no-cors", "empty"), ("no-cors", "image"), ("cors", "empty"), ("navigate", "iframe")):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest, "Accept": "text/html"}
        for method, path in (*everything(), ("OPTIONS", RUNS), ("DELETE", RUNS), ("GET", "/nope")):
            answer = await send(api, method, path, headers=headers)
            assert (answer.status == 403) is not is_open(path), (method, path, mode)
            if answer.status == 403 and method != "HEAD":
                assert check_error(answer, 403).startswith("A page of another origin must not ask")
    for method, path in everything():
        answer = await send(api, method, path, headers={"Sec-Fetch-Site": site, **OPENED})
        is_page = method in ("GET", "HEAD") and path in ("/", "/docs", "/docs/", "/redoc", "/redoc/", "/openapi.json")
        assert (answer.status == 403) is not (is_page or is_open(path)), (method, path)


@pytest.mark.parametrize("site", FOREIGN)
async def test_a_navigation_of_a_program_that_does_not_say_where_to_is_one(api: Api, site: str) -> None:
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Accept": "text/html"}  # browsers always say it
    for path, status in (("/", 200), ("/docs", 200), (RUNS, 403)):
        assert (await send(api, "GET", path, headers=headers)).status == status


async def test_a_site_that_was_joined_with_another_is_foreign(api: Api) -> None:
    assert (await send(api, "GET", RUNS, headers={"Sec-Fetch-Site": "none, cross-site"})).status == 403


@pytest.mark.parametrize("site", ["same-origin", "none", None, "Same-Origin", "later-word"])
async def test_our_own_page_a_typed_address_and_programs_are_served(api: Api, site: str | None) -> None:
    headers = {} if site is None else {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
    assert (await send(api, "POST", RUNS, json=make_run(), headers=headers)).status == 201
    for path in (RUNS, "/metrics", "/docs", "/health"):
        assert (await send(api, "GET", path, headers=headers)).status == 200
        assert (await send(api, "GET", path, headers={"Origin": "http://evil.example", **headers})).status == 200


@pytest.mark.parametrize(
    ("headers", "can_read", "can_write"),
    [
        ({"Origin": PROXY}, True, True),
        ({"Origin": "http://telemetry.example.com:8080"}, True, True),
        ({"Referer": f"{PROXY}/runs?q=1"}, True, True),  # no-cors, where a GET has no Origin
        ({"Origin": DASHBOARD}, True, False),
        ({"Referer": f"{DASHBOARD}/"}, True, False),
        ({"Origin": "null", "Referer": f"{PROXY}/"}, False, False),  # a frame that its page has locked in
        ({"Origin": "https://evil.example", "Referer": f"{PROXY}/"}, False, False),
        ({"Origin": "http://dashboard.example.com"}, False, False),
        ({"Origin": f"{DASHBOARD}:8443"}, False, False),
        ({"Origin": "https://dashboard.example.com.evil.example"}, False, False),
        ({"Referer": f"https://evil.example/{PROXY}"}, False, False),
        ({"Referer": "https://dashboard.example.com@evil.example/"}, False, False),
        ({"Referer": f"{DASHBOARD}:{'9' * 5000}/"}, False, False),
    ],
)
async def test_listed_proxies_may_do_everything_and_listed_origins_may_read(
    make_api: MakeApi, headers: dict[str, str], can_read: bool, can_write: bool
) -> None:
    api = await make_api(allowed_hosts="*,telemetry.example.com", cors_origins=DASHBOARD)
    said = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty", **headers}
    for method in ("GET", "HEAD"):
        assert (await send(api, method, RUNS, headers=said)).status == (200 if can_read else 403)
    posted = await send(api, "POST", RUNS, json=make_run(), headers=said)
    assert posted.status == (201 if can_write else 403)


async def test_a_listed_page_reads_answers_errors_and_streams_with_their_headers(make_api: MakeApi) -> None:
    api = await make_api(cors_origins=f"http://localhost:3000,{DASHBOARD}", rate_limit_enabled=True, rate_limit_rpm=9)
    said = {"Origin": DASHBOARD, "Sec-Fetch-Site": "cross-site"}
    for method, path, status in (
        ("GET", f"{RUNS}?count=exact", 200),
        ("GET", f"{RUNS}/export", 200),
        ("HEAD", f"{RUNS}/stream", 200),
        ("GET", f"{RUNS}?limit=0", 400),
        ("GET", f"{RUNS}/nobody", 404),
        ("GET", "/nope", 404),
        ("POST", RUNS, 403),
    ):
        answer = await send(api, method, path, headers=said)
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == DASHBOARD
        assert answer.headers["vary"].split(", ")[-1] == "Origin"
        readable = answer.headers["access-control-expose-headers"].split(", ")
        assert {"Link", "X-Total-Count", "X-Request-ID", "Retry-After", "Telemetry-Server"} <= {*readable}
        assert "access-control-allow-credentials" not in answer.headers
    for _ in range(9):
        answer = await send(api, "GET", RUNS, headers=said)
    check_error(answer, 429)
    assert answer.headers["access-control-allow-origin"] == DASHBOARD


async def test_other_pages_get_no_word_of_it_and_caches_keep_answers_apart(make_api: MakeApi) -> None:
    api = await make_api(cors_origins=DASHBOARD)
    for headers in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": DASHBOARD.upper()}):
        answer = await send(api, "GET", RUNS, headers=headers)
        assert answer.headers["vary"].split(", ")[-1] == "Origin"
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert (await send(api, "GET", "/", headers={"Accept": "text/html"})).headers["vary"] == "Accept, Origin"


async def test_a_preflight_lets_a_listed_page_read_with_its_token(make_api: MakeApi) -> None:
    api = await make_api(cors_origins=DASHBOARD, api_auth_enabled=True, api_auth_token=TOKEN)
    asking = {
        "Origin": DASHBOARD,
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "cors",
    }
    for path in (RUNS, f"{RUNS}/export", "/metrics", "/nope"):
        answer = await send(api, "OPTIONS", path, headers=asking)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == DASHBOARD
        assert answer.headers["access-control-allow-methods"] == "GET, HEAD"
        assert "Authorization" in answer.headers["access-control-allow-headers"]
        assert "Origin" in answer.headers["vary"]
    for method in ("POST", "PATCH", "DELETE", "*"):
        refused = await send(api, "OPTIONS", RUNS, headers={**asking, "Access-Control-Request-Method": method})
        assert refused.status == 401
        assert "access-control-allow-methods" not in refused.headers
    check_error(await send(api, "OPTIONS", RUNS, headers={**asking, "Origin": "https://evil.example"}), 403)
    said = {"Origin": DASHBOARD, "Sec-Fetch-Site": "cross-site"}
    known = {**said, "Authorization": f"Bearer {TOKEN}"}
    assert (await send(api, "GET", RUNS, headers=known)).status == 200
    answer = await send(api, "GET", RUNS, headers=said)
    check_error(answer, 401)
    assert answer.headers["access-control-allow-origin"] == DASHBOARD
    check_error(await send(api, "POST", RUNS, json=make_run(), headers={**known, **JSON}), 403)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://a.example", "https://a.example"),
        (" HTTPS://A.example:443/ , http://localhost:3000", "https://a.example,http://localhost:3000"),
        ("http://a.example:80,http://a.example", "http://a.example"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_origins_are_kept_as_browsers_write_them(given: str, kept: str) -> None:
    settings = load({"cors_origins": given}, {}, None).settings
    assert settings.cors_origins == kept
    assert settings.reading_origins == frozenset(kept.split(","))


@pytest.mark.parametrize(
    "given",
    [
        "*",
        "https://*",
        "https://*.example.com",
        "null",
        "a.example",
        "ftp://a.example",
        "https://a.example/x",
        "https://a.example?",
        "https://a.example:0",
        "https://a.example:65536",
        "https://u@a.example",
        "https://ä.example",
        "https://a.example,",
        "https://",
        "http://a b",
        "file:///x",
    ],
)
def test_what_is_no_origin_is_reported_at_the_start(given: str) -> None:
    with pytest.raises(ConfigurationError, match="TELEMETRY_CORS_ORIGINS: must be origins such as"):
        load({"cors_origins": given}, {}, None)


def test_the_origin_of_an_address() -> None:
    assert origin_of("https://a.example/b?c=http://d.example#e") == "https://a.example"
    assert origin_of("https://a.example#@b.example") == "https://a.example"
    assert origin_of("//a.example") is None
