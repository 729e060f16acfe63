"""POST /api/v1/runs and GET /api/v1/runs/{event_id}, sentence by sentence."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest

from telemetryd.model.commands import RedactRun
from tests.conftest import Api, MakeApi, StartDaemon, make_run
from tests.contract.wire import RUNS, SENTENCE_OF_STATUS, check_error, places, post, send

pytestmark = pytest.mark.asyncio(loop_scope="module")
OWN_LOOP = pytest.mark.asyncio(loop_scope="function")


@pytest.fixture
def api(shared: Api) -> Api:
    """One app for the whole module; tests that need one of their own ask for `make_api`."""
    return shared


FULL: dict[str, Any] = {
    "created_at": "2025-12-24T09:00:00.000000Z",
    "start_time": "2025-12-24T10:00:00.000000Z",
    "end_time": "2025-12-24T10:05:00.250000Z",
    "agent_name": "hugo-translator",
    "job_type": "translate_directory",
    "status": "success",
    "product": "aspose.words",
    "product_family": "words",
    "platform": "net",
    "subdomain": "docs",
    "website": "aspose.com",
    "website_section": "docs",
    "item_name": "page-1.md",
    "items_discovered": 100,
    "items_succeeded": 90,
    "items_failed": 7,
    "items_skipped": 3,
    "duration_ms": 300_250,
    "input_summary": "100 pages",
    "output_summary": "90 pages",
    "source_ref": "content/en",
    "target_ref": "content/de",
    "error_summary": "7 failed",
    "error_details": "line 1\nline 2",
    "git_repo": "https://github.com/octo/site.git",
    "git_branch": "main",
    "git_commit_hash": "0123456789abcdef0123456789abcdef01234567",
    "git_run_tag": "run-7",
    "host": "worker-1",
    "environment": "prod",
    "trigger_type": "cron",
    "metrics_json": {"tokens": 5, "nested": {"list": [1, 2.5, None, "ü"]}},
    "context_json": {"ticket": "T-1"},
    "api_posted": True,
    "api_posted_at": "2025-12-24T10:06:00.000000Z",
    "api_retry_count": 2,
    "insight_id": "insight-1",
    "parent_run_id": "run-0",
    "git_commit_source": "llm",
    "git_commit_author": "Ada <ada@example.org>",
    "git_commit_timestamp": "2025-12-24T10:04:00.000000Z",
    "labels": {"env": "prod", "team": "search"},
    "attempt": 2,
    "retry_of": "event-0",
    "conversation_id": "conversation-1",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "span_id": "00f067aa0ba902b7",
    "expected_by": "2025-12-24T11:00:00.000000Z",
}
SERVER_FIELDS = {"id", "updated_at", "commit_url", "repo_url"}


async def test_a_new_run_is_created(api: Api) -> None:
    run = make_run()
    answer = await send(api, "POST", RUNS, json=run)
    assert answer.status == 201
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == {"status": "created", "event_id": run["event_id"], "run_id": run["run_id"]}


async def test_a_known_event_id_is_a_duplicate_and_the_stored_run_stays_untouched(api: Api) -> None:
    run = make_run(status="running", host="first")
    await api.post(run)
    before = await api.get(f"{RUNS}/{run['event_id']}")
    again = {**run, "run_id": "another", "status": "success", "host": "second", "metrics_json": {"a": 1}}
    assert await api.post(again, 200) == {
        "status": "duplicate",
        "event_id": run["event_id"],
        "message": "Event already exists (idempotent)",
        "warnings": [
            "The event_id is known, and the stored run, which stays as it is, differs in: run_id, status, host, "
            "metrics_json"
        ],
    }
    assert await api.get(f"{RUNS}/{run['event_id']}") == before
    # What it says as it was, or does not say, is no difference, even where the stored run has changed since.
    await api.call("PATCH", f"{RUNS}/{run['event_id']}", json={"status": "success", "items_failed": 2})
    assert "warnings" not in await api.post({**run, "items_failed": 0, "context_json": None}, 200)


WARNING = "The event_id is known, and the stored run, which stays as it is, differs in: "


async def conflicts(api: Api) -> float:
    async with api.client.get("/metrics", params={"format": "prometheus"}) as response:
        found = re.search(r"^telemetryd_runs_differing_total (\S+)", await response.text(), re.MULTILINE)
    assert found is not None
    return float(found[1])


async def test_the_first_body_is_no_difference_whatever_became_of_the_run(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_run(metrics_json={"a": 1, "b": [2]}, labels={"x": "1", "y": "2"}, host="first", items_failed=1)
    path = f"{RUNS}/{first['event_id']}"
    await api.post(first)
    before = await conflicts(api)
    changes = {"status": "success", "metrics_json": {"c": 3}, "labels": {"x": None}, "items_failed": 5}
    await api.call("PATCH", path, json=changes, status=200)
    again = {**dict(reversed(first.items())), "metrics_json": {"b": [2], "a": 1}, "labels": {"y": "2", "x": "1"}}
    for same in (first, {**again, "status": " RUNNING ", "product": None, "items_failed": "1", "duration_ms": None}):
        assert WARNING not in str(await api.post(same, 200))
    now = {name: value for name, value in (await api.get(path)).items() if name not in SERVER_FIELDS}
    assert "warnings" not in await api.post(now, 200)  # a run that was exported and is imported again
    assert await conflicts(api) == before
    # Another body is one, also if it only lacks something that no PATCH can have added.
    for other, fields in (
        ({**first, "host": "second", "items_failed": 5}, "host, metrics_json, labels"),
        ({**now, "host": None}, "host"),
    ):
        caplog.clear()
        assert (await api.post(other, 200))["warnings"] == [WARNING + fields]
        [line] = [record for record in caplog.records if record.levelname == "WARNING"]
        assert line.message == "Run already exists, and says something else"
        assert vars(line)["differs_in"] == fields.split(", ")
    many = [first, {**first, "host": "third"}, {**first, "status": "failure"}]
    caplog.clear()
    assert (await api.batch(many))["warnings"] == [
        f"Item 1: {WARNING}items_failed, host, metrics_json, labels",
        f"Item 2: {WARNING}status, items_failed, metrics_json, labels",
    ]
    [line] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert (vars(line)["differing"], vars(line)["event_ids"]) == (2, [first["event_id"]] * 2)
    assert await conflicts(api) == before + 4
    # Who is going to PATCH what it knows better is not warned of that.
    assert (await api.batch(many, params={"changes": "follow"}))["warnings"] == [f"Item 1: {WARNING}host"]
    assert "changes" in check_error(await send(api, "POST", f"{RUNS}/batch?changes=come", json=many), 400)


async def test_a_redacted_run_keeps_no_digest_of_what_was_removed(api: Api) -> None:
    run = make_run(host="secret")
    await api.post(run)
    await api.store.submit(RedactRun(str(run["event_id"]), ("host",), payloads=False))
    assert (await api.post(run, 200))["warnings"] == [WARNING + "host"]
    del run["host"]
    assert "warnings" not in await api.post(run, 200)


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("labels", ["x"], ()),
        ("labels", {f"k{number}": "x" for number in range(33)}, ()),
        ("labels", {"k" * 64: "x"}, ("k" * 64,)),
        ("labels", {"-x": "x"}, ("-x",)),
        ("labels", {"": "x"}, ("",)),
        ("labels", {"x\n": "x"}, ("x\n",)),
        ("labels", {"x": "\0"}, ("x",)),
        ("labels", {"x": " "}, ("x",)),
        ("labels", {"x": ["y"]}, ("x",)),
        ("attempt", 0, ()),
        ("attempt", 2**63, ()),
        ("attempt", 1.5, ()),
        ("attempt", True, ()),
        ("retry_of", 5, ()),
        ("conversation_id", "\0", ()),
        ("trace_id", "0" * 32, ()),
        ("trace_id", "A" * 32, ()),
        ("trace_id", "1" * 31, ()),
        ("span_id", "0" * 16, ()),
        ("span_id", "1" * 16 + "\n", ()),
        ("expected_by", "tomorrow", ()),
    ],
)
async def test_a_bad_value_of_the_later_fields_is_422_and_named(
    api: Api, name: str, value: object, place: tuple[str, ...]
) -> None:
    detail = check_error(await send(api, "POST", RUNS, json=make_run(**{name: value})), 422)
    assert places(detail) == [("body", name, *place)]


async def test_labels_come_back_as_they_are_and_null_is_none(api: Api) -> None:
    for given, stored in (
        ({"b": "2", "a.b_c-9": "x" * 255, "9": "über, *"}, {"9": "über, *", "a.b_c-9": "x" * 255, "b": "2"}),
        ({"a": None, "b": "1"}, {"b": "1"}),
        ({}, None),
        ({"a": None}, None),
        (None, None),
    ):
        run = make_run(labels=given, attempt="3")
        answer = await api.post(run)
        assert answer["warnings"] == ["Text taken as a number: attempt"]
        found = await api.get(f"{RUNS}/{run['event_id']}")
        assert (found["labels"], found["attempt"]) == (stored, 3)
        assert list(found["labels"] or ()) == sorted(found["labels"] or ())


@OWN_LOOP
async def test_the_same_event_at_once_is_created_exactly_once(make_api: MakeApi) -> None:
    api = await make_api()
    run = make_run()
    answers = await asyncio.gather(*(send(api, "POST", RUNS, json=run) for _ in range(50)))
    assert sorted(answer.status for answer in answers) == [200] * 49 + [201]
    assert len(await api.list()) == 1


async def test_every_field_is_stored_and_returned(api: Api) -> None:
    run = {**make_run(), **FULL}
    answer = await api.post(run)
    assert "warnings" not in answer
    stored = await api.get(f"{RUNS}/{run['event_id']}")
    assert {name: stored[name] for name in run} == run
    assert set(stored) == set(run) | SERVER_FIELDS
    assert stored["api_posted"] is True
    assert stored["commit_url"] == f"https://github.com/octo/site/commit/{FULL['git_commit_hash']}"
    assert stored["repo_url"] == "https://github.com/octo/site"
    assert isinstance(stored["id"], int)


@OWN_LOOP
async def test_what_is_not_given_has_its_default(make_api: MakeApi) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    api = await make_api(clock=lambda: now)
    run = make_run()
    await api.post(run)
    stored = await api.get(f"{RUNS}/{run['event_id']}")
    counts = {"items_discovered", "items_succeeded", "items_failed", "items_skipped", "duration_ms", "api_retry_count"}
    assert {stored[name] for name in counts} == {0}
    assert stored["status"] == "running"
    assert stored["api_posted"] is False
    assert stored["created_at"] == stored["updated_at"] == "2026-01-02T03:04:05.678901Z"
    rest = set(stored) - set(run) - counts - {"status", "api_posted", "created_at", "updated_at", "id"}
    assert {stored[name] for name in rest} == {None}
    assert rest >= {"end_time", "metrics_json", "context_json", "git_commit_source", "commit_url", "repo_url"}


async def test_an_acknowledged_run_survives_sigkill(start_daemon: StartDaemon) -> None:
    import signal
    import urllib.request

    daemon = start_daemon()
    run = make_run()
    request = urllib.request.Request(
        daemon.url + RUNS, json.dumps(run).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with await asyncio.to_thread(urllib.request.urlopen, request) as response:
        assert response.status == 201
    await asyncio.to_thread(daemon.stop, signal.SIGKILL)
    again = start_daemon()
    url = await asyncio.to_thread(lambda: again.url)
    with await asyncio.to_thread(urllib.request.urlopen, f"{url}{RUNS}/{run['event_id']}") as response:
        assert json.load(response)["run_id"] == run["run_id"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("2025-12-24T10:00:00Z", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24T10:00:00", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24 10:00", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24t10:00:00z", "2025-12-24T10:00:00.000000Z"),
        ("20251224T100000Z", "2025-12-24T10:00:00.000000Z"),
        ("2025-W52-3T10:00:00Z", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24T10:00:00.5Z", "2025-12-24T10:00:00.500000Z"),
        ("2025-12-24T10:00:00,25Z", "2025-12-24T10:00:00.250000Z"),
        ("2025-12-24T10:00:00.123456789Z", "2025-12-24T10:00:00.123456Z"),
        ("2025-12-24T10:00:00+05:30", "2025-12-24T04:30:00.000000Z"),
        ("2025-12-24T10:00:00-0800", "2025-12-24T18:00:00.000000Z"),
        ("2025-12-24T10:00:00+02", "2025-12-24T08:00:00.000000Z"),
        ("2025-12-31T23:30:00-01:00", "2026-01-01T00:30:00.000000Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000000Z"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
    ],
)
async def test_a_timestamp_is_stored_as_utc_of_fixed_width(api: Api, given: str, stored: str) -> None:
    run = make_run(start_time=given, end_time=given, created_at=given, git_commit_timestamp=given, api_posted_at=given)
    await api.post(run)
    answer = await api.get(f"{RUNS}/{run['event_id']}")
    for name in ("start_time", "end_time", "created_at", "git_commit_timestamp", "api_posted_at"):
        assert answer[name] == stored, name


def _statuses() -> Iterator[tuple[str, str]]:
    for status in ("running", "success", "failure", "partial", "timeout", "cancelled"):
        yield status, status
    yield from {
        "failed": "failure",
        "completed": "success",
        "succeeded": "success",
        "canceled": "cancelled",
        "RUNNING": "running",
        " Success\t": "success",
        "\nFAILED ": "failure",
    }.items()


@pytest.mark.parametrize(("given", "stored"), list(_statuses()))
async def test_a_status_is_stored_canonical(api: Api, given: str, stored: str) -> None:
    run = make_run(status=given)
    await api.post(run)
    assert (await api.get(f"{RUNS}/{run['event_id']}"))["status"] == stored


async def test_the_sentence_for_a_wrong_status_is_the_guides(api: Api) -> None:
    answer = await send(api, "POST", RUNS, json=make_run(status="invalid_status"))
    assert check_error(answer, 422) == [
        {"loc": ["body", "status"], "msg": SENTENCE_OF_STATUS, "type": "value_error"},
    ]


@OWN_LOOP
async def test_all_errors_of_a_body_come_at_once(make_api: MakeApi) -> None:
    api = await make_api()
    body = {
        "event_id": " ",
        "agent_name": "a" * 256,
        "start_time": "yesterday",
        "end_time": "2026-02-30T00:00:00Z",
        "status": "bogus",
        "items_failed": -1,
        "duration_ms": "x",
        "metrics_json": [],
        "git_commit_source": "robot",
        "host": "a\0b",
    }
    detail = check_error(await send(api, "POST", RUNS, json=body), 422)
    expected = {*body, "run_id", "job_type"}
    assert {place[1] for place in places(detail)} == expected
    assert len(detail) == len(expected)
    assert await api.list() == []


async def test_a_null_duration_means_zero(api: Api) -> None:
    run = make_run(duration_ms=None)
    await api.post(run)
    assert (await api.get(f"{RUNS}/{run['event_id']}"))["duration_ms"] == 0


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**53 + 1, 2**63 - 1])
async def test_counts_reach_from_0_to_the_largest_integer(api: Api, value: int) -> None:
    names = ("items_discovered", "items_succeeded", "items_failed", "items_skipped", "duration_ms", "api_retry_count")
    run = make_run(**dict.fromkeys(names, value))
    await api.post(run)
    stored = await api.get(f"{RUNS}/{run['event_id']}")
    assert [stored[name] for name in names] == [value] * len(names)


@pytest.mark.parametrize(
    "text", ["", "  ", "ü", "😀" * 100, "\u2028\u2029", "\u202eabc", "a\r\nb\x1b[31m", "'; DROP TABLE agent_runs;--"]
)
async def test_text_comes_back_as_it_was_given(api: Api, text: str) -> None:
    run = make_run(error_details=text, git_branch=text, context_json={"k": text})
    await api.post(run)
    stored = await api.get(f"{RUNS}/{run['event_id']}")
    assert stored["error_details"] == stored["git_branch"] == text
    assert stored["context_json"] == {"k": text}


async def test_a_megabyte_of_text_is_stored(api: Api) -> None:
    run = make_run(error_details="e" * 1_000_000)
    await api.post(run)
    assert (await api.get(f"{RUNS}/{run['event_id']}"))["error_details"] == run["error_details"]


@pytest.mark.parametrize("name", ["event_id", "run_id", "agent_name", "job_type"])
async def test_a_name_may_have_255_characters(api: Api, name: str) -> None:
    run = make_run(**{name: "😀" * 255})
    await api.post(run)
    stored = await api.get(f"{RUNS}/{quote(run['event_id'], safe='')}")
    assert stored[name] == "😀" * 255


@OWN_LOOP
@pytest.mark.parametrize(
    "event_id",
    [
        "a/b",
        "a%2Fb",
        "..",
        "../../etc/passwd",
        "with space",
        "😀",
        "ü",
        "a?b=c",
        "a#b",
        "a+b",
        "a;b",
        "%",
        "\u202e",
        "é",
    ],
)
async def test_every_event_id_is_reachable_by_percent_encoding(make_api: MakeApi, event_id: str) -> None:
    api = await make_api()
    run = make_run(event_id=event_id, git_repo="git@github.com:o/r.git", git_commit_hash="a" * 40)
    await api.post(run)
    # yarl must not normalise ".." away, so this goes over the plain socket.
    from tests.contract.wire import send_raw

    path = quote(event_id, safe="").replace(".", "%2E")
    for suffix in ("", "/commit-url", "/repo-url"):
        [answer] = await send_raw(
            api, f"GET {RUNS}/{path}{suffix} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        assert answer.status == 200, suffix
        if not suffix:
            assert answer.json["event_id"] == event_id
    body = b'{"status":"success"}'
    [answer] = await send_raw(
        api,
        f"PATCH {RUNS}/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body,
    )
    assert answer.json["event_id"] == event_id
    [stored] = await api.list()
    assert (stored["event_id"], stored["status"]) == (event_id, "success")


@OWN_LOOP
async def test_credentials_in_an_address_are_not_stored_whichever_way_it_comes(make_api: MakeApi) -> None:
    api = await make_api()
    secret = "https://user:s3cret@github.com/acme/site.git?access_token=s3cret#s3cret"
    await api.post(make_run(git_repo=secret, git_commit_hash="a" * 40))
    await api.batch([make_run(git_repo=secret), make_run(git_repo=secret)])
    lines = "\n".join(json.dumps(make_run(git_repo=secret)) for _ in range(2))
    headers = {"Content-Type": "application/x-ndjson"}
    await api.call("POST", f"{RUNS}/batch", data=lines, headers=headers, status=200)
    stored = await api.list()
    assert [run["git_repo"] for run in stored] == ["https://github.com/acme/site.git"] * 5
    assert stored[-1]["commit_url"] == f"https://github.com/acme/site/commit/{'a' * 40}"
    await api.post(make_run(event_id="unclear", git_repo="//user:s3cret@github.com/acme/site"))
    assert (await api.get(f"{RUNS}/unclear"))["git_repo"] is None


TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_a_run_joins_the_trace_of_its_request_and_the_log_names_it(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """What the run says itself wins, and a retry is another span of its client's, not another body."""
    run = make_run(event_id="traced")
    with caplog.at_level("INFO"):
        await api.post(run, headers={"traceparent": TRACEPARENT})
    again = TRACEPARENT.replace("00f067aa0ba902b7", "b7ad6b7169203331")
    assert "warnings" not in await api.post(run, 200, headers={"traceparent": again})
    stored = await api.get("/api/v1/runs/traced")
    assert (stored["trace_id"], stored["span_id"]) == (TRACEPARENT[3:35], TRACEPARENT[36:52])
    own = make_run(event_id="own-trace", trace_id="1" * 32, span_id="2" * 16)
    await api.post(own, headers={"traceparent": TRACEPARENT})
    assert (await api.get("/api/v1/runs/own-trace"))["trace_id"] == "1" * 32
    logged = [record.__dict__.get("trace_id") for record in caplog.records]
    assert TRACEPARENT[3:35] in logged


@pytest.mark.parametrize("headers", [{"traceparent": TRACEPARENT.replace("00f067aa", "b7ad6b71")}, {}])
async def test_a_retry_in_another_span_is_the_first_body_also_after_a_patch(api: Api, headers: dict[str, str]) -> None:
    event_id = f"traced-again-{len(headers)}"
    run = make_run(event_id=event_id, output_summary="as it began")
    await api.post(run, headers={"traceparent": TRACEPARENT})
    await api.call("PATCH", f"{RUNS}/{event_id}", json={"output_summary": "as it ended"}, status=200)
    assert "warnings" not in await api.post(run, 200, headers=headers)
    warned = await api.post({**run, "output_summary": "something else"}, 200, headers=headers)
    assert [warning.rpartition(": ")[2] for warning in warned["warnings"]] == ["output_summary"]


@pytest.mark.parametrize("bad", ["", "nonsense", TRACEPARENT + "-more", "ff" + TRACEPARENT[2:], TRACEPARENT.upper()])
async def test_a_malformed_traceparent_is_ignored(api: Api, bad: str) -> None:
    event_id = f"bad-trace-{len(bad)}-{bad[:2]}"
    await api.post(make_run(event_id=event_id), headers={"traceparent": bad})
    assert (await api.get(f"/api/v1/runs/{event_id}"))["trace_id"] is None


async def test_an_unknown_run_is_404_and_named(api: Api) -> None:
    assert check_error(await send(api, "GET", f"{RUNS}/abc123"), 404) == "Run not found: abc123"


async def test_unknown_and_server_fields_are_ignored_and_named(api: Api) -> None:
    run = make_run(color="red", __proto__={"x": 1}, id=77, updated_at="2000-01-01T00:00:00Z", commit_url="http://x")
    answer = await send(api, "POST", RUNS, json=run)
    assert answer.status == 201
    warnings = answer.json["warnings"]
    assert len(warnings) == 5
    for name in ("color", "__proto__", "id", "updated_at", "commit_url"):
        assert any(re.search(rf": {name}$", warning) for warning in warnings), name
    stored = await api.get(f"{RUNS}/{run['event_id']}")
    assert stored["id"] != 77
    assert stored["updated_at"] > "2020"
    assert stored["commit_url"] is None
    assert "color" not in stored


async def test_a_duplicate_names_unknown_fields_too(api: Api) -> None:
    run = make_run()
    await api.post(run)
    assert (await api.post({**run, "color": 1}, 200))["warnings"] == ["Unknown field ignored: color"]


async def test_a_long_unknown_name_is_shortened(api: Api) -> None:
    [warning] = (await api.post(make_run(**{"k" * 100_000: 1})))["warnings"]
    assert len(warning) < 250


async def test_of_duplicate_keys_the_last_counts(api: Api) -> None:
    run = make_run()
    body = json.dumps(run)[:-1] + ', "status": "failure", "status": "success"}'
    assert (await post(api, body.encode())).status == 201
    assert (await api.get(f"{RUNS}/{run['event_id']}"))["status"] == "success"


async def test_created_at_defaults_to_the_moment_of_arrival(api: Api) -> None:
    run = make_run()
    await api.post(run)
    stored = await api.get(f"{RUNS}/{run['event_id']}")
    age = datetime.now(UTC) - datetime.fromisoformat(stored["created_at"])
    assert timedelta(0) <= age < timedelta(seconds=10)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stored["created_at"])


@OWN_LOOP
async def test_ids_compare_byte_by_byte(make_api: MakeApi) -> None:
    api = await make_api()
    for event_id in ("Event", "event", "event ", "\u00e9", "e\u0301"):
        await api.post(make_run(event_id=event_id))
    assert len(await api.list()) == 5


async def test_very_many_unknown_fields_are_counted_instead_of_named(api: Api) -> None:
    warnings = (await api.post(make_run(**{f"unknown-{number}": 1 for number in range(150)})))["warnings"]
    assert len(warnings) == 101
    assert warnings[-1] == "50 more fields ignored"


async def test_what_3x_took_is_taken_and_texts_are_named(api: Api) -> None:
    run = make_run(items_failed="5", items_succeeded=12.0, api_posted="yes", created_at=None, status=None)
    answer = await api.post(run)
    assert answer["warnings"] == ["Text taken as a number: items_failed", "Text taken as true or false: api_posted"]
    stored = await api.get(f"{RUNS}/{run['event_id']}")
    assert (stored["items_failed"], stored["items_succeeded"], stored["api_posted"], stored["status"]) == (
        5, 12, True, "running",
    )  # fmt: skip
    answer = await api.batch([make_run(), make_run(duration_ms="7"), make_run(duration_ms=7.0)])
    assert (answer["inserted"], answer["warnings"]) == (3, ["Item 1: Text taken as a number: duration_ms"])
    changed = await api.call("PATCH", f"{RUNS}/{run['event_id']}", json={"duration_ms": "8"}, status=200)
    assert changed["warnings"] == ["Text taken as a number: duration_ms"]
    event = {"event_type": "x", "timestamp": None, "event_key": None}
    assert (await api.call("POST", f"{RUNS}/{run['event_id']}/events", json=event))["inserted"] == 1


async def test_a_slash_at_the_end_is_ignored(api: Api) -> None:
    run = make_run(host="slashed")
    await api.call("POST", f"{RUNS}/", json=run, status=201)
    for path in ("/health", "/openapi.json", f"{RUNS}/{run['event_id']}", f"{RUNS}/{run['event_id']}/commit-url"):
        assert type(await api.get(f"{path}/")) is type(await api.get(path))
    assert [found["event_id"] for found in await api.get(f"{RUNS}/?host=slashed")] == [run["event_id"]]
    answer = await send(api, "PUT", f"{RUNS}/", json={})
    assert (answer.status, answer.headers["allow"]) == (405, "GET,HEAD,POST")
    check_error(await send(api, "POST", "/api/v1/admin/prune/", json={}), 403)
    text = (await send(api, "GET", "/metrics/?format=prometheus")).body.decode()
    assert '"/api/v1/runs"' in text
    assert '/"' not in text
    for path, location in (("/redoc", "docs"), ("/docs/", "../docs"), ("/redoc/", "../docs")):
        answer = await send(api, "GET", path, allow_redirects=False)
        assert (answer.status, answer.headers["location"]) == (302, location)


async def test_a_filter_may_be_a_date_alone(api: Api) -> None:
    host: dict[str, Any] = {"host": "by-date"}
    for day in ("23T23:59:59", "24T00:00:00", "24T12:00:00"):
        await api.post(make_run(event_id=day, start_time=f"2025-12-{day}Z", created_at=f"2025-12-{day}Z", **host))
    found = await api.list(start_time_from="2025-12-24", **host)
    assert {run["event_id"] for run in found} == {"24T00:00:00", "24T12:00:00"}
    assert [run["event_id"] for run in await api.list(created_before="20251224", **host)] == ["23T23:59:59"]
    assert (await send(api, "GET", RUNS, params={"created_before": "2025-02-30"})).status == 400
