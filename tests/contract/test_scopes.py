"""Who may do what: every route with every kind of token, prefixes of agents, and quotas."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson
import pytest
import pytest_asyncio
from aiohttp import ClientPayloadError, hdrs
from aiohttp.test_utils import TestClient
from aiohttp.web import AppKey

from telemetryd.http import ROUTES, make_app
from telemetryd.model import batches, tokens
from telemetryd.model.tokens import Asked, Limits, Scope
from telemetryd.ops import token_file
from telemetryd.ops.metrics import Metrics
from telemetryd.services.admission import METRICS
from telemetryd.services.subscriptions import FEED
from telemetryd.settings import Settings
from telemetryd.store import Store
from telemetryd.web.limits import BYTES, AgentQuotas, Quota
from telemetryd.web.limits import RUNS as PER_MINUTE
from telemetryd.web.tokens import TOKENS, unused
from tests.conftest import Api, Client, DaemonServer, MakeApi, bodies_of, eventually, make_run
from tests.contract.test_access import as_password
from tests.contract.wire import BATCH, JSON, NDJSON, RUNS, Answer, check_error, send

SINGLE = "correct-horse-battery"
RUN = f"{RUNS}/{{event_id}}"
INGEST, READ, ADMIN = Scope.INGEST, Scope.READ, Scope.ADMIN
TABLE: dict[tuple[str, str], Scope | None] = {
    ("POST", RUNS): INGEST,
    ("POST", BATCH): INGEST,
    ("PATCH", RUN): INGEST,
    ("POST", f"{RUN}/associate-commit"): INGEST,
    ("POST", f"{RUN}/events"): INGEST,
    ("POST", f"{RUN}/process"): INGEST,
    ("GET", RUNS): READ,
    ("GET", f"{RUNS}/stream"): READ,
    ("GET", "/api/v1/changes"): READ,
    ("GET", f"{RUNS}/export"): READ,
    ("GET", RUN): READ,
    ("GET", f"{RUN}/events"): READ,
    ("GET", f"{RUN}/commit-url"): READ,
    ("GET", f"{RUN}/repo-url"): READ,
    ("GET", "/api/v1/stats"): READ,
    ("GET", "/api/v1/regressions"): READ,
    ("GET", "/api/v1/alerts"): READ,
    ("GET", "/api/v1/metadata"): READ,
    ("POST", "/mcp"): READ,
    ("GET", "/metrics"): READ,
    ("GET", "/openapi.json"): READ,
    ("GET", "/"): READ,
    ("GET", "/docs"): READ,
    ("GET", "/docs/"): READ,
    ("GET", "/redoc"): READ,
    ("GET", "/redoc/"): READ,
    ("GET", "/docs/static/{file}"): READ,
    ("GET", "/page/{file}"): None,
    ("GET", "/health"): None,
    ("DELETE", RUN): ADMIN,
    ("POST", "/api/v1/admin/prune"): ADMIN,
    ("POST", "/api/v1/admin/reap"): ADMIN,
    ("POST", "/api/v1/admin/redact"): ADMIN,
    ("POST", "/api/v1/admin/confirm"): ADMIN,
    ("POST", "/api/v1/admin/backup"): ADMIN,
}
"""What each route needs: a new one without a row fails."""

ASKED = Asked("ingest", (INGEST,), "", timedelta(days=1), Limits())
ASKED_WASTEFUL = replace(ASKED, name="wasteful", limits=Limits(bytes_per_day=300))
KINDS = [
    ASKED,
    replace(ASKED, name="web", agent_prefix="web-"),
    replace(ASKED, name="reader", scopes=(READ,)),
    replace(ASKED, name="both", scopes=(INGEST, READ)),
    replace(ASKED, name="admin", scopes=(ADMIN,)),
]
MAY: dict[str, set[Scope]] = {
    "ingest": {INGEST},
    "web": {INGEST},
    "reader": {READ},
    "both": {INGEST, READ},
    "admin": {*Scope},
    "TELEMETRY_API_AUTH_TOKEN": {*Scope},
}

T = TypeVar("T")
Secrets = dict[str, str]


def make_tokens(file: Path, *asked: Asked) -> Secrets:
    """Put tokens into a file; return their secrets by name."""
    now = datetime.now(UTC)
    made = [tokens.make(each, now) for each in asked]
    token_file.change(file, lambda known: [*known, *(token for token, _ in made)])
    return {token.name: secret for token, secret in made}


def bearing(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


class Closed:
    """An app that asks for tokens, and the secrets that it takes."""

    def __init__(self, api: Api, secrets: Secrets) -> None:
        self.api = api
        self.secrets = secrets

    async def send(self, name: str | None, method: str, path: str, **options: Any) -> Answer:
        """Send a request with a token."""
        headers = {} if name is None else bearing(self.secrets[name])
        return await send(self.api, method, path, **{**options, "headers": {**headers, **options.get("headers", {})}})

    async def post(self, name: str, run: object, path: str = RUNS) -> Answer:
        return await self.send(name, "POST", path, json=run)

    def app(self, key: AppKey[T]) -> T:
        assert self.api.client.app is not None
        return self.api.client.app[key]

    def counted(self, name: str, **labels: str) -> float:
        return self.app(METRICS).registry.get_sample_value(name, labels) or 0.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def closed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Closed]:
    """One app for all that leaves its tokens as they are."""
    settings = Settings(
        db_path=tmp_path_factory.mktemp("closed") / "telemetry.sqlite",
        db_journal_mode="WAL",
        api_auth_enabled=True,
        api_auth_token=SINGLE,
    )
    secrets = {**make_tokens(settings.tokens_path, *KINDS), "TELEMETRY_API_AUTH_TOKEN": SINGLE, "wrong": "tmd_wrong"}
    metrics = Metrics()
    store = await Store.open(settings, metrics)
    client = cast("Client", TestClient(DaemonServer(make_app(store, settings, metrics), settings)))
    async with client:
        yield Closed(Api(client, store, settings), secrets)
    await store.close()


@pytest.fixture
def make_closed(make_api: MakeApi, tmp_path: Path) -> Callable[..., Awaitable[Closed]]:
    """Return a function that runs an app with some tokens; keyword arguments are settings."""

    async def make(*asked: Asked, **values: Any) -> Closed:
        secrets = make_tokens(tmp_path / "telemetry.sqlite.tokens", *(asked or KINDS))
        api = await make_api(**{"api_auth_enabled": True, "api_auth_token": SINGLE, **values})
        return Closed(api, {**secrets, "TELEMETRY_API_AUTH_TOKEN": SINGLE})

    return make


MakeClosed = Callable[..., Awaitable[Closed]]
shared = pytest.mark.asyncio(loop_scope="module")


# --- Scopes --------------------------------------------------------------------------------------


def row_of(method: str, path: str) -> tuple[str, str]:
    """The row of the table that is about a route."""
    return method, re.sub(r"^(/page/|/docs/static/).+", r"\1{file}", path)


def test_every_route_has_a_row_and_says_the_same() -> None:
    assert {row_of(route.method, route.path) for route in ROUTES} == set(TABLE)
    for route in ROUTES:
        if route.operation is not None:
            assert route.operation.scope == TABLE[row_of(route.method, route.path)], route.path


@shared
@pytest.mark.parametrize("name", [*MAY, "wrong", None])
async def test_a_token_opens_what_its_scopes_say(closed: Closed, name: str | None) -> None:
    for route in ROUTES:
        needed = TABLE[row_of(route.method, route.path)]
        path = route.path.replace("{event_id}", "web-unknown")
        methods = [route.method, hdrs.METH_HEAD] if route.method == "GET" else [route.method]
        for method in methods:
            headers = JSON if method == "POST" else {}
            if name is not None:
                headers = {**headers, **bearing(closed.secrets[name])}
            async with closed.api.client.request(
                method, path, headers=headers, data=b"[]" if method == "POST" else None, allow_redirects=False
            ) as answer:
                label = (method, path, answer.status)
                if needed is None:
                    assert answer.status not in (401, 403), label
                elif name is None or name == "wrong":
                    assert answer.status == 401, label
                    assert answer.headers.getall("WWW-Authenticate")[0] == 'Bearer realm="telemetryd"'
                elif needed in MAY[name]:
                    assert answer.status not in (401, 403), label
                else:
                    assert answer.status == 403, label
                    assert answer.headers["WWW-Authenticate"] == (
                        f'Bearer realm="telemetryd", error="insufficient_scope", scope="{needed}"'
                    )
                    if method != hdrs.METH_HEAD:
                        detail = (await answer.json())["detail"]
                        assert detail.startswith(f"This needs a token with the scope {needed}; this one has ")


@shared
async def test_a_path_that_no_route_has_needs_any_token(closed: Closed) -> None:
    for name in MAY:
        check_error(await closed.send(name, "GET", "/nope"), 404)
        check_error(await closed.send(name, "PUT", RUNS), 405)
        check_error(await closed.send(name, "DELETE", RUNS), 405)
    check_error(await closed.send(None, "GET", "/nope"), 401)


@shared
async def test_a_browsers_password_is_any_token_that_reads(closed: Closed) -> None:
    for name, status in (("reader", 200), ("both", 200), ("admin", 200), ("ingest", 403)):
        password = as_password(closed.secrets[name])
        assert (await send(closed.api, "GET", "/docs", headers=password)).status == status, name
        check_error(await send(closed.api, "GET", RUNS, headers=password), 401)


@shared
async def test_the_document_names_the_scopes(closed: Closed) -> None:
    document = (await closed.send("reader", "GET", "/openapi.json")).json
    for (method, path), needed in TABLE.items():
        if path in document["paths"]:
            described = document["paths"][path][method.lower()]
            assert described.get("x-required-scope") == needed, path
            assert ("security" in described) is (needed is None), path


# --- The prefix ----------------------------------------------------------------------------------


@shared
async def test_a_run_outside_of_the_prefix_is_not_created(closed: Closed) -> None:
    run = make_run(agent_name="mine")
    detail = check_error(await closed.post("web", run), 403)
    assert detail == "agent_name must begin with 'web-', as this token may write no other runs"
    check_error(await closed.send("admin", "GET", f"{RUNS}/{run['event_id']}"), 404)
    assert (await closed.post("web", {**run, "agent_name": "web-1"})).status == 201
    check_error(await closed.post("web", {**run, "agent_name": "Web-1"}), 403)
    check_error(await closed.post("web", {**run, "agent_name": 5}), 422)


CHANGES: list[tuple[str, str, Any]] = [
    ("PATCH", "", {"status": "success"}),
    ("POST", "/associate-commit", {"commit_hash": "a" * 40, "commit_source": "manual"}),
    ("POST", "/events", {"event_type": "x", "timestamp": "2025-12-24T10:00:00Z"}),
    ("POST", "/process", {"pid": 1, "start_time": 1, "boot_id": "0" * 32}),
]


@shared
@pytest.mark.parametrize(("method", "suffix", "body"), CHANGES)
async def test_a_run_outside_of_the_prefix_is_one_that_there_is_not(
    closed: Closed, method: str, suffix: str, body: Any
) -> None:
    own, foreign = make_run(agent_name="web-1"), make_run(agent_name="other")
    for run in (own, foreign):
        assert (await closed.post("ingest", run)).status == 201
    before = (await closed.send("reader", "GET", f"{RUNS}/{foreign['event_id']}?include=events")).json
    answers = []
    for event_id in (foreign["event_id"], "unknown"):
        answer = await closed.send("web", method, f"{RUNS}/{event_id}{suffix}", json=body)
        hidden = {"x-request-id", "date", "telemetry-flow", "content-length"}
        headers = {name: value for name, value in answer.headers.items() if name not in hidden}
        answers.append((answer.status, headers, answer.text.replace(event_id, "<id>")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert (await closed.send("reader", "GET", f"{RUNS}/{foreign['event_id']}?include=events")).json == before
    assert (await closed.send("web", method, f"{RUNS}/{own['event_id']}{suffix}", json=body)).status in (200, 201, 409)


@shared
@pytest.mark.parametrize("is_lines", [False, True])
async def test_an_item_outside_of_the_prefix_costs_the_others_nothing(closed: Closed, is_lines: bool) -> None:
    runs = [make_run(agent_name=name) for name in ("web-1", "other", "web-2", "we")]
    broken = make_run(agent_name="web-1", status="nonsense")
    items = [*runs[:2], broken, *runs[2:]]
    body = b"\n".join(map(orjson.dumps, items)) if is_lines else orjson.dumps(items)
    answer = await closed.send("web", "POST", BATCH, data=body, headers=NDJSON if is_lines else JSON)
    assert answer.status == 200
    stored = answer.json
    assert (stored["inserted"], stored["duplicates"], stored["total"]) == (2, 0, 5)
    assert [(each["index"], each.get("status"), each["event_id"]) for each in stored["error_details"]] == [
        (1, 403, runs[1]["event_id"]),
        (2, None, broken["event_id"]),
        (4, 403, runs[3]["event_id"]),
    ]
    (fault,) = stored["error_details"][0]["detail"]
    assert (fault["loc"], fault["type"]) == (["body", 1, "agent_name"], "not_allowed")
    assert stored["errors"][0] == f"Item 1 (event_id {runs[1]['event_id']}): {fault['msg']}"
    for run, status in zip(runs, (200, 404, 200, 404), strict=True):
        assert (await closed.send("reader", "GET", f"{RUNS}/{run['event_id']}")).status == status


@shared
async def test_a_batch_of_nothing_but_others_is_told_item_by_item(closed: Closed) -> None:
    answer = await closed.post("web", [make_run(), make_run()], BATCH)
    assert (answer.status, answer.json["inserted"], len(answer.json["errors"])) == (200, 0, 2)


@shared
async def test_duplicate_reveals_nothing_of_a_run_outside_of_the_prefix(closed: Closed) -> None:
    foreign, own = make_run(agent_name="other"), make_run(agent_name="web-1")
    for run in (foreign, own):
        assert (await closed.post("ingest", run)).status == 201
    detail = check_error(await closed.post("web", foreign), 403)  # before anything is looked up
    assert detail == check_error(await closed.post("web", make_run(agent_name="other")), 403)
    taken = {**foreign, "agent_name": "web-1", "job_type": "another"}
    detail = check_error(await closed.post("web", taken), 403)
    assert detail == "The event_id is taken by a run that this token may not write"
    new = make_run(agent_name="web-1")
    answer = await closed.post("web", [new, taken, {**own, "job_type": "another"}, foreign], BATCH)
    assert (answer.json["inserted"], answer.json["duplicates"], answer.json["total"]) == (1, 1, 4)
    assert [(each["index"], each["status"]) for each in answer.json["error_details"]] == [(1, 403), (3, 403)]
    places = [fault["loc"] for each in answer.json["error_details"] for fault in each["detail"]]
    assert places == [["body", 1, "event_id"], ["body", 3, "agent_name"]]
    assert answer.json["warnings"] == [
        "Item 2: The event_id is known, and the stored run, which stays as it is, differs in: job_type"
    ], "of runs of its own only"
    stored = (await closed.send("reader", "GET", f"{RUNS}/{foreign['event_id']}")).json
    assert (stored["agent_name"], stored["job_type"]) == ("other", foreign["job_type"])
    again = await closed.post("web", own)
    assert (again.status, again.json["status"]) == (200, "duplicate")


@shared
async def test_an_event_id_of_any_bytes_finds_no_run(closed: Closed) -> None:
    for text in ("%ff", "%00", "%ed%a0%80", "%22", "a" * 5000):
        answer = await closed.send("web", "PATCH", f"{RUNS}/{text}", json={"status": "success"})
        assert answer.status in (400, 404), answer.text


# --- Log and metrics -----------------------------------------------------------------------------


@shared
async def test_the_log_and_the_metrics_name_the_token_and_never_its_value(
    closed: Closed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    refused = {
        key: closed.counted("telemetryd_token_refusals_total", token=key[0], reason=key[1])
        for key in (("web", "scope"), ("web", "prefix"), ("", "wrong"), ("", "missing"))
    }
    await closed.post("web", make_run(agent_name="web-1"))
    await closed.post("web", make_run())
    await closed.send("web", "GET", RUNS)
    await closed.send("wrong", "GET", RUNS)
    await closed.send(None, "GET", RUNS)
    lines = [record.__dict__ for record in caplog.records if record.name == "telemetry_api"]
    assert [line.get("token") for line in lines] == ["web", "web", "web", None, None]
    for (token, reason), before in refused.items():
        assert closed.counted("telemetryd_token_refusals_total", token=token, reason=reason) == before + 1
    shown = (await closed.send("reader", "GET", "/metrics?format=prometheus")).text
    assert 'telemetryd_token_requests_total{status="2xx",token="web"}' in shown
    secrets = [secret for name, secret in closed.secrets.items() if name != "wrong"]
    hashes = [tokens.digest(secret.encode()).hex() for secret in secrets]
    assert not any(hidden in shown + str(lines) for hidden in [*secrets, *hashes])


# --- While the daemon runs -----------------------------------------------------------------------


async def test_a_revoked_token_opens_nothing_and_its_stream_ends(make_closed: MakeClosed) -> None:
    closed = await make_closed()
    closed.app(TOKENS).look_every_s = 0
    async with closed.api.client.get(f"{RUNS}/stream", headers=bearing(closed.secrets["reader"])) as stream:
        await stream.content.readuntil(b"\n\n")
        assert (await closed.post("web", make_run(agent_name="web-1"))).status == 201
        assert b"web-1" in await stream.content.readuntil(b"}\n\n")
        last = (await closed.send("reader", "GET", "/api/v1/changes")).json["last"]
        waits = asyncio.create_task(closed.send("reader", "GET", f"/api/v1/changes?after={last}&wait=60"))
        await eventually(lambda: closed.app(FEED).waits == 1)
        token_file.change(closed.api.settings.tokens_path, lambda known: known[:1])
        for name in ("web", "reader", "admin"):
            check_error(await closed.send(name, "GET", RUNS), 401)
        secret = make_run(agent_name="secret")
        assert (await closed.post("ingest", secret)).status == 201
        assert b"secret" not in await stream.content.read()
        check_error(await waits, 401)
    assert (await closed.send("TELEMETRY_API_AUTH_TOKEN", "GET", RUNS)).status == 200
    shown = (await closed.send("TELEMETRY_API_AUTH_TOKEN", "GET", "/metrics?format=prometheus")).text
    assert set(re.findall('token="([^"]+)"', shown)) == {"ingest", "TELEMETRY_API_AUTH_TOKEN"}


async def test_an_export_ends_when_its_token_is_revoked(make_closed: MakeClosed) -> None:
    closed = await make_closed()
    closed.app(TOKENS).look_every_s = 0
    text = "x" * 1_000_000
    for _ in range(20):
        assert (await closed.post("ingest", make_run(output_summary=text))).status == 201
    headers = bearing(closed.secrets["reader"])
    async with closed.api.client.get(f"{RUNS}/export", headers=headers) as export:
        assert (export.status, export.headers["X-Total-Count"]) == (200, "20")
        token_file.change(closed.api.settings.tokens_path, lambda known: known[:1])
        with pytest.raises(ClientPayloadError):
            await export.content.read()


class SlowRequest:
    """A request whose last byte is kept back."""

    def __init__(self, closed: Closed, name: str, path: str, body: object) -> None:
        self._body = orjson.dumps(body)
        self.has_begun, self._goes_on = asyncio.Event(), asyncio.Event()
        self._answer = asyncio.create_task(closed.send(name, "POST", path, data=self._pieces(), headers=JSON))

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield self._body[:-1]
        self.has_begun.set()
        await self._goes_on.wait()
        yield self._body[-1:]

    async def end(self) -> Answer:
        self._goes_on.set()
        return await self._answer


async def begin(closed: Closed, name: str, path: str, *bodies: object) -> list[SlowRequest]:
    """Begin requests; all of them wait for the rest of their bodies then."""
    begun = [SlowRequest(closed, name, path, body) for body in bodies]
    for each in begun:
        await each.has_begun.wait()
    await eventually(lambda: bodies_of(closed.api)._held > 0)
    await asyncio.sleep(0.1)
    return begun


async def test_a_body_that_ends_after_its_token_was_revoked_stores_nothing(make_closed: MakeClosed) -> None:
    closed = await make_closed()
    closed.app(TOKENS).look_every_s = 0
    [slow] = await begin(closed, "web", RUNS, make_run(agent_name="web-1"))
    token_file.change(closed.api.settings.tokens_path, lambda known: known[:1])
    answer = await slow.end()
    check_error(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert (await closed.send("TELEMETRY_API_AUTH_TOKEN", "GET", RUNS)).json == []


async def test_an_expired_token_opens_nothing(make_closed: MakeClosed, caplog: pytest.LogCaptureFixture) -> None:
    closed = await make_closed(replace(KINDS[2], name="old", lifetime=timedelta(seconds=-1)))
    check_error(await closed.send("old", "GET", RUNS), 401)
    assert caplog.records[-1].__dict__["error_message"] == "The token old has expired"
    assert closed.counted("telemetryd_token_refusals_total", token="old", reason="expired") == 1
    assert (await closed.send("old", "GET", "/health")).status == 200


async def test_without_authentication_nobody_is_asked(make_closed: MakeClosed) -> None:
    closed = await make_closed(api_auth_enabled=False)
    assert (await closed.send("web", "GET", RUNS)).status == 200
    assert (await closed.post("web", make_run())).status == 201
    assert "is not" not in check_error(await closed.send("admin", "POST", "/api/v1/admin/reap", json={}), 403)
    assert unused(closed.api.settings) == len(KINDS)


# --- Rates and quotas ----------------------------------------------------------------------------


async def test_a_token_has_a_rate_of_its_own(make_closed: MakeClosed) -> None:
    slow = replace(KINDS[2], name="slow", limits=Limits(requests_per_minute=2))
    closed = await make_closed(KINDS[2], slow, rate_limit_enabled=True, rate_limit_rpm=4)

    async def statuses(name: str | None, count: int) -> list[int]:
        return [(await closed.send(name, "GET", RUNS)).status for _ in range(count)]

    assert await statuses("slow", 3) == [200, 200, 429]
    assert await statuses("reader", 5) == [200, 200, 200, 200, 429]
    assert await statuses("TELEMETRY_API_AUTH_TOKEN", 2) == [200, 200], "by its address, as before"
    assert await statuses(None, 3) == [401, 401, 429]
    refused = await closed.send("slow", "GET", RUNS)
    assert check_error(refused, 429) == "Too many requests with this token"
    assert 1 <= int(refused.headers["retry-after"]) <= 30


async def test_a_limit_of_a_token_counts_without_the_setting(make_closed: MakeClosed) -> None:
    closed = await make_closed(replace(KINDS[2], limits=Limits(requests_per_minute=1)))
    assert [(await closed.send("reader", "GET", RUNS)).status for _ in range(2)] == [200, 429]


async def test_a_quota_of_runs_of_a_token(make_closed: MakeClosed) -> None:
    closed = await make_closed(replace(ASKED, scopes=(INGEST, READ), limits=Limits(runs_per_minute=3)))
    runs = [make_run() for _ in range(5)]
    assert (await closed.post("ingest", runs, BATCH)).json["inserted"] == 5, "larger than the quota, but once"
    for path, body in ((RUNS, make_run()), (BATCH, [make_run()])):
        answer = await closed.post("ingest", body, path)
        assert check_error(answer, 429) == "The quota of runs per minute of this token is used up"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    changed = await closed.send("ingest", "PATCH", f"{RUNS}/{runs[0]['event_id']}", json={"status": "success"})
    assert changed.status == 200, "it is no new run"
    assert (await closed.send("ingest", "GET", RUNS)).status == 200
    assert closed.counted("telemetryd_quota_refusals_total", whose="token", quota=PER_MINUTE) == 2


@pytest.mark.parametrize("limits", [Limits(runs_per_minute=3), Limits(bytes_per_day=300)], ids=["runs", "bytes"])
async def test_requests_at_once_go_beyond_a_quota_no_further_than_one_after_the_other(
    make_closed: MakeClosed, limits: Limits
) -> None:
    closed = await make_closed(replace(ASKED, limits=limits))
    begun = await begin(closed, "ingest", BATCH, *([make_run() for _ in range(5)] for _ in range(4)))
    answers = [await each.end() for each in begun]
    assert [answer.status for answer in answers] == [200, 429, 429, 429]
    check_error(answers[1], 429)
    stored = await closed.send("TELEMETRY_API_AUTH_TOKEN", "GET", RUNS)
    assert len(stored.json) == 5
    quota = BYTES if limits.bytes_per_day else PER_MINUTE
    assert closed.counted("telemetryd_quota_refusals_total", whose="token", quota=quota) == 3


async def test_a_quota_of_bytes_of_a_token(make_closed: MakeClosed) -> None:
    closed = await make_closed(replace(ASKED, limits=Limits(bytes_per_day=300)), ASKED_WASTEFUL)
    check_error(await closed.send("wasteful", "POST", RUNS, json={"x": "y" * 300}), 422)
    check_error(await closed.send("wasteful", "POST", RUNS, json={}), 429)  # it pays for what is wrong as well
    run = make_run()
    assert (await closed.post("ingest", run)).status == 201
    patch = f"{RUNS}/{run['event_id']}"
    assert (await closed.send("ingest", "PATCH", patch, json={"error_summary": "x" * 300})).status == 200
    for method, path in (("PATCH", patch), ("POST", f"{patch}/events"), ("POST", RUNS), ("POST", BATCH)):
        assert "bytes per day" in check_error(await closed.send("ingest", method, path, json={}), 429)


@pytest.mark.parametrize(
    ("body", "coding", "status"),
    [
        (b"x" * 2000, None, 413),
        (gzip.compress(b"x" * 2000), "gzip", 413),
        (gzip.compress(b"x" * 900)[:-1], "gzip", 400),
        (b"x" * 900, "gzip", 400),
    ],
    ids=["too large", "too large when decoded", "cut off", "no gzip"],
)
async def test_a_quota_of_bytes_pays_for_bodies_that_are_refused(
    make_closed: MakeClosed, body: bytes, coding: str | None, status: int
) -> None:
    closed = await make_closed(ASKED_WASTEFUL, max_body_bytes=1024)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 500):
            yield body[start : start + 500]
            await asyncio.sleep(0.01)

    headers = JSON if coding is None else {**JSON, "Content-Encoding": coding}
    check_error(await closed.send("wasteful", "POST", RUNS, data=pieces(), headers=headers), status)
    check_error(await closed.post("wasteful", make_run()), 429)


async def test_a_quota_of_bytes_pays_for_a_body_whose_client_leaves(make_closed: MakeClosed) -> None:
    closed = await make_closed(ASKED_WASTEFUL)
    _, writer = await asyncio.open_connection("127.0.0.1", closed.api.client.port)
    head = f"POST {RUNS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {closed.secrets['wasteful']}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 999\r\n\r\n".encode() + b"x" * 998)
    await eventually(lambda: bodies_of(closed.api)._held > 0)
    writer.close()
    await eventually(lambda: bodies_of(closed.api)._held == 0)
    check_error(await closed.post("wasteful", make_run()), 429)


async def test_a_quota_of_agents_holds_for_each_item(make_closed: MakeClosed) -> None:
    closed = await make_closed(quota_runs_per_minute=2)
    busy, idle = make_run(agent_name="busy"), make_run(agent_name="idle")
    assert (await closed.post("ingest", [make_run(agent_name="busy") for _ in range(4)], BATCH)).json["inserted"] == 4
    answer = await closed.post("ingest", busy)
    assert check_error(answer, 429) == "The quota of runs per minute of the agent 'busy' is used up; try again later"
    assert 1 <= int(answer.headers["retry-after"]) <= 90
    mixed = await closed.post("ingest", [busy, idle], BATCH)
    assert (mixed.status, mixed.json["inserted"], mixed.json["total"]) == (200, 1, 2)
    (refused,) = mixed.json["error_details"]
    assert (refused["index"], refused["status"], refused["detail"][0]["type"]) == (0, 429, "quota_exceeded")
    whole = await closed.post("ingest", [busy, {**busy, "event_id": "another"}], BATCH)
    check_error(whole, 429)
    assert 1 <= int(whole.headers["retry-after"]) <= 90
    assert closed.counted("telemetryd_quota_refusals_total", whose="agent", quota=PER_MINUTE) == 4


async def test_batches_at_once_go_beyond_an_agents_quota_no_further_than_one_after_the_other(
    make_closed: MakeClosed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_SLICE_S", 0.0)  # they are checked in turns, as large ones are
    closed = await make_closed(quota_runs_per_minute=2)

    def batch(number: int) -> list[Any]:
        return [make_run(agent_name="busy") for _ in range(4)] + [make_run(agent_name=f"idle-{number}")]

    answers = await asyncio.gather(*(closed.post("ingest", batch(number), BATCH) for number in range(3)))
    assert sorted(answer.json["inserted"] for answer in answers) == [1, 1, 5]
    late = next(answer.json for answer in answers if answer.json["inserted"] == 1)
    assert [(each["index"], each["status"]) for each in late["error_details"]] == [(at, 429) for at in range(4)]
    nothing = await asyncio.gather(*(closed.post("ingest", batch(9)[:4], BATCH) for _ in range(2)))
    assert [answer.status for answer in nothing] == [429, 429]
    assert closed.counted("telemetryd_quota_refusals_total", whose="agent", quota=PER_MINUTE) == 16


async def test_a_quota_of_an_agents_bytes_counts_changes_and_events(make_closed: MakeClosed) -> None:
    closed = await make_closed(quota_bytes_per_day=400)
    run, other = make_run(agent_name="a"), make_run(agent_name="b")
    for each in (run, other):
        assert (await closed.post("ingest", each)).status == 201
    path = f"{RUNS}/{run['event_id']}"
    assert (await closed.send("ingest", "PATCH", path, json={"error_summary": "x" * 400})).status == 200
    event = {"event_type": "x", "timestamp": "2025-12-24T10:00:00Z"}
    for method, where, body in (("PATCH", path, {"status": "success"}), ("POST", f"{path}/events", event)):
        answer = await closed.send("ingest", method, where, json=body)
        assert "bytes per day of the agent 'a'" in check_error(answer, 429)
        assert int(answer.headers["retry-after"]) > 1
    assert (
        await closed.send("ingest", "PATCH", f"{RUNS}/{other['event_id']}", json={"status": "success"})
    ).status == 200


def test_a_bucket_may_go_into_debt_once() -> None:
    now = 0.0
    quota = Quota(60, 86_400, lambda: now)
    assert quota.exhausted(creates=True) is None
    quota.pay(runs=120, size=10)
    exhausted = quota.exhausted(creates=True)
    assert exhausted is not None
    assert (exhausted.quota, exhausted.wait_s) == (PER_MINUTE, 61), "until there is room for a whole run"
    assert quota.exhausted(creates=False) is None
    now = 60.5
    assert quota.exhausted(creates=True) is not None
    now = 61.5
    assert quota.exhausted(creates=True) is None
    quota.pay(size=10 * 86_400)
    exhausted = quota.exhausted(creates=False)
    assert exhausted is not None
    assert exhausted.quota == BYTES
    now = 1e9
    quota.pay(runs=60)
    assert quota.exhausted(creates=True) is not None, "it never holds more than a minute's"


def test_what_fills_up_between_two_runs_is_no_room_for_another_one() -> None:
    now = 0.0
    quota = Quota(3, None, lambda: now)
    let_in = 0
    while quota.exhausted(creates=True) is None:
        quota.pay(runs=1)
        let_in += 1
        now += 0.001
    assert let_in == 3


def test_the_agents_that_are_remembered_are_bounded() -> None:
    quotas = AgentQuotas(1, None, agents=100)
    for number in range(10_000):
        quotas.of("known").pay(runs=1)
        quotas.of(f"agent-{number}").pay(runs=1)
    assert quotas.of("known").exhausted(creates=True) is not None
    assert len(quotas._quotas) == 100
