"""The catalogue of bad input, as tables: each row is refused in one shape, and the daemon goes on as before.

All rows go to one app, so whatever one of them breaks, the next ones notice.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from typing import Any
from urllib.parse import quote

import pytest

from telemetryd.model import queries, runs
from telemetryd.model.filters import quoted
from tests.conftest import Api, make_run
from tests.contract.wire import BATCH, JSON, NDJSON, RUNS, check_alive, check_error, places, post, send, send_raw
from tests.faults.ledger import Ledger
from tests.faults.load import Findings, read

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD = json.dumps(make_run(event_id="good")).encode()


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def with_raw(name: str, raw: str) -> bytes:
    """A valid run, except for one more field given as JSON text."""
    return json.dumps(make_run())[:-1].encode() + f', "{name}": {raw}}}'.encode()


# --- Body ----------------------------------------------------------------------------------------

NOT_JSON = {
    "empty": b"",
    "whitespace": b" \r\n\t ",
    "truncated": GOOD[:40],
    "truncated in a string": b'{"event_id": "abc',
    "trailing garbage": GOOD + b"x",
    "two objects": GOOD + GOOD,
    "trailing NUL": GOOD + b"\0",
    "trailing comma": GOOD[:-1] + b",}",
    "single quotes": b"{'event_id': 'a'}",
    "a comment": b"// run\n" + GOOD,
    "BOM": b"\xef\xbb\xbf" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-32": GOOD.decode().encode("utf-32-le"),
    "leading zero": with_raw("items_failed", "01"),
    "plus sign": with_raw("items_failed", "+1"),
    "hexadecimal": with_raw("items_failed", "0x10"),
    "raw newline in a string": with_raw("host", '"a\nb"'),
    "raw NUL in a string": with_raw("host", '"a\0b"'),
    "10,000 levels of arrays": b"[" * 10_000 + b"]" * 10_000,
    "10,000 levels of objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "100,000 open brackets": b"[" * 100_000,
    "a number of 5,000 digits": with_raw("items_failed", "9" * 5_000),
    "a form": b"event_id=a&run_id=b",
    "gzip without saying so": gzip.compress(GOOD),
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
async def test_a_body_that_is_not_json(shared: Api, body: bytes) -> None:
    [fault] = check_error(await post(shared, body), 422)
    assert fault["loc"] == ["body"]
    assert fault["type"] == "json_invalid"
    assert re.search(r"line \d+ column \d+", fault["msg"])
    await check_alive(shared)


NOT_STRICT = {
    "Latin-1": ("host", b'"\xe9"', "UTF-8"),
    "overlong UTF-8": ("host", b'"\xc0\xaf"', "UTF-8"),
    "UTF-8 of a surrogate": ("host", b'"\xed\xa0\x80"', "UTF-8"),
    "a high surrogate alone": ("host", rb'"\ud800"', "surrogate"),
    "a low surrogate alone": ("host", rb'"\udc00"', "surrogate"),
    "surrogates in the wrong order": ("host", rb'"\udc00\ud800"', "surrogate"),
    "NaN": ("items_failed", b"NaN", "NaN is not a number"),
    "Infinity": ("items_failed", b"Infinity", "Infinity is not a number"),
    "-Infinity in metrics_json": ("metrics_json", b'{"a": [{"b": -Infinity}]}', "-Infinity is not a number"),
}


@pytest.mark.parametrize(("field", "value", "said"), NOT_STRICT.values(), ids=NOT_STRICT)
async def test_a_field_that_is_no_strict_json_is_named(shared: Api, field: str, value: bytes, said: str) -> None:
    """In a new run, a change, and one of several events, with its index."""
    run = make_run()
    await shared.post(run)
    path, change = f"{RUNS}/{run['event_id']}", b'{"%b": %b}' % (field.encode(), value)
    several = b'[{"event_type": "a"}, {"event_type": "b", "payload": %b}, %b]' % (change, change)
    for method, address, body, place in (
        ("POST", RUNS, with_raw(field, "VALUE").replace(b"VALUE", value), [("body", field)]),
        ("PATCH", path, change, [("body", field)]),
        ("POST", f"{path}/events", several, [("body", 1, "payload"), ("body", 2, field)]),
    ):
        faults = check_error(await send(shared, method, address, data=body, headers=JSON), 422)
        assert places(faults) == place
        assert {fault["type"] for fault in faults} == {"json_invalid"}
        assert all(said in fault["msg"] for fault in faults)
    named = rb'{"\ud800": %b}' % value
    [fault] = check_error(await send(shared, "PATCH", path, data=named, headers=JSON), 422)
    assert (fault["loc"], "The name of a field" in fault["msg"]) == (["body"], True)
    await check_alive(shared)


NOT_AN_OBJECT = {
    "null": b"null",
    "true": b"true",
    "an empty array": b"[]",
    "an array with a run": b"[" + GOOD + b"]",
    "a string": b'"run"',
    "a 10 MB string": b'"' + b"s" * 10_000_000 + b'"',
    "a number": b"5",
    "a million elements": b"[" + b"0," * 999_999 + b"0]",
}


@pytest.mark.parametrize("body", NOT_AN_OBJECT.values(), ids=NOT_AN_OBJECT)
async def test_a_body_that_is_no_object(shared: Api, body: bytes) -> None:
    assert places(check_error(await post(shared, body), 422)) == [("body",)]
    await check_alive(shared)


COUNTS = ("items_discovered", "items_succeeded", "items_failed", "items_skipped", "duration_ms", "api_retry_count")
NO_COUNT = [
    "1.5",
    '"5.0"',
    '"5 "',
    '"+5"',
    '"0x5"',
    '"٥"',
    '"1_000"',
    '"-1"',
    '""',
    "true",
    "false",
    "[]",
    "{}",
    "-1",
    "1e999",
    "-1e999",
]
NO_COUNT += [str(2**63), str(2**64), str(-(2**63)), str(10**400)]


@pytest.mark.parametrize("value", NO_COUNT, ids=lambda value: value[:20])
async def test_what_is_no_count(shared: Api, value: str) -> None:
    body = json.dumps(make_run())[:-1] + "".join(f', "{name}": {value}' for name in COUNTS) + "}"
    assert places(check_error(await post(shared, body.encode()), 422)) == [("body", name) for name in COUNTS]
    await check_alive(shared)


async def test_minus_zero_is_zero(shared: Api) -> None:
    run = make_run()
    answer = await post(shared, json.dumps(run)[:-1].encode() + b', "items_failed": -0}')
    assert answer.status == 201
    assert (await shared.get(f"{RUNS}/{run['event_id']}"))["items_failed"] == 0


NO_NAME: dict[str, object] = {
    "empty": "",
    "blanks": "   ",
    "other blanks": "\t\r\n\u00a0\u3000",
    "NUL": "a\0b",
    "only NUL": "\0",
    "256 characters": "x" * 256,
    "1 MB": "x" * 1_000_000,
    "null": None,
    "a number": 5,
    "a boolean": True,
    "an array": ["a"],
    "an object": {"a": 1},
}


@pytest.mark.parametrize("value", NO_NAME.values(), ids=NO_NAME)
async def test_what_is_no_name(shared: Api, value: object) -> None:
    names = ("event_id", "run_id", "agent_name", "job_type")
    answer = await post(shared, json.dumps(make_run(**dict.fromkeys(names, value))).encode())
    assert places(check_error(answer, 422)) == [("body", name) for name in names]
    await check_alive(shared)


async def test_what_is_missing_is_named(shared: Api) -> None:
    for name in ("event_id", "run_id", "start_time", "agent_name", "job_type"):
        run = make_run()
        del run[name]
        [fault] = check_error(await send(shared, "POST", RUNS, json=run), 422)
        assert fault == {"loc": ["body", name], "msg": "Field required", "type": "missing"}


TEXTS = [
    "product",
    "product_family",
    "platform",
    "subdomain",
    "website",
    "website_section",
    "item_name",
    "input_summary",
    "output_summary",
    "source_ref",
    "target_ref",
    "error_summary",
    "error_details",
    "git_repo",
    "git_branch",
    "git_commit_hash",
    "git_run_tag",
    "host",
    "environment",
    "trigger_type",
    "insight_id",
    "parent_run_id",
    "retry_of",
    "conversation_id",
    "git_commit_author",
]


async def test_the_table_has_every_text() -> None:
    """A field that comes later has to come here too."""
    schema = runs.NewRun.model_json_schema()["properties"]
    plain = {name for name, field in schema.items() if {"type": "string"} in field.get("anyOf", [field])}
    assert plain <= set(TEXTS)


@pytest.mark.parametrize("value", ["a\0b", 5, True, 1.5, [], {}], ids=repr)
async def test_what_is_no_text(shared: Api, value: object) -> None:
    answer = await send(shared, "POST", RUNS, json=make_run(**dict.fromkeys(TEXTS, value)))
    assert {place[1] for place in places(check_error(answer, 422))} == set(TEXTS)
    await check_alive(shared)


@pytest.mark.parametrize(
    "text",
    [
        "'; DROP TABLE agent_runs; --",
        '" OR ""="',
        "%_\\",
        "${7*7}{{7*7}}",
        "\u2028\u2029",
        "\u202eabc\u200f",
        "\ufeff",
        "\r\n\x1b[31m",
    ],
    ids=ascii,
)
async def test_every_text_is_only_text(shared: Api, text: str) -> None:
    run = make_run(run_id=text + "x", agent_name=text + "x", job_type=text + "x", **dict.fromkeys(TEXTS, text))
    await shared.post(run)
    stored = await shared.get(f"{RUNS}/{run['event_id']}")
    assert {name: stored[name] for name in TEXTS} == dict.fromkeys(TEXTS, text)
    listed = await shared.list(agent_name=text + "x", job_type=text + "x")
    assert [found["event_id"] for found in listed] == [run["event_id"]]
    await check_alive(shared)


NO_TIMESTAMP: list[object] = [
    "", " ", "yesterday", "now", "2025-12-24", "10:00:00", "2026-02-30T00:00:00Z", "2025-13-01T00:00:00Z",
    "2025-00-10T00:00:00Z", "2026-02-28T24:00:00Z", "2026-02-28T25:00:00Z", "2026-02-28T23:60:00Z",
    "2026-06-30T23:59:60Z", "0000-01-01T00:00:00Z", "10000-01-01T00:00:00Z", "-2025-01-01T00:00:00Z",
    "2025-12-24T10:00:00+99:99", "2025-12-24T10:00:00+24:00", "2025-12-24T10:00:00Z+01:00", "2025-12-24T10:00:00 UTC",
    "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "２025-12-24T10:00:00Z", "2025-12-24T10:00:00Z\n",
    " 2025-12-24T10:00:00Z", "2025-12-24T10:00:00.Z", "1766570400", "2025-12-24T10:00:00\0", "T" * 100_000,
    1766570400, 1766570400.5, True, [], {},
]  # fmt: skip


@pytest.mark.parametrize("value", NO_TIMESTAMP, ids=lambda value: ascii(value)[:30])
async def test_what_is_no_timestamp(shared: Api, value: object) -> None:
    names = ("created_at", "start_time", "end_time", "api_posted_at", "git_commit_timestamp")
    answer = await send(shared, "POST", RUNS, json=make_run(**dict.fromkeys(names, value)))
    assert places(check_error(answer, 422)) == [("body", name) for name in names]
    if isinstance(value, str):
        filters = ("created_before", "created_after", "start_time_from", "start_time_to")
        for name in filters if len(value) < 1000 and value not in ("now", "2025-12-24") else ():
            detail = check_error(await send(shared, "GET", RUNS, params={name: value}), 400)
            assert detail.startswith(f"Invalid {name}: ")
            assert "ISO 8601" in detail
    await check_alive(shared)


NO_STATUS: list[object] = [
    "",
    " ",
    "bogus",
    "running,success",
    "runn\u0131ng",
    "ok\0",
    "s" * 100_000,
    5,
    True,
    [],
    {},
]


@pytest.mark.parametrize("value", NO_STATUS, ids=lambda value: ascii(value)[:20])
async def test_what_is_no_status(shared: Api, value: object) -> None:
    answer = await send(shared, "POST", RUNS, json=make_run(status=value))
    [fault] = check_error(answer, 422)
    assert fault["loc"] == ["body", "status"]
    assert "running" in fault["msg"]
    if isinstance(value, str) and len(value) < 1000:
        detail = check_error(await send(shared, "GET", RUNS, params={"status": quoted(value)}), 400)
        assert detail.startswith("Invalid status: ")
        assert "cancelled" in detail


NO_JSON_OBJECT = {
    "an array": "[]",
    "a string": '"{}"',
    "a number": "5",
    "a boolean": "true",
    "65 levels": json.dumps(nested(66)),
    "100 levels": json.dumps(nested(100)),
    "an integer of 65 bits": json.dumps({"a": 2**64}),
    "a huge integer": json.dumps({"a": 10**400}),
    "a number beyond double": '{"a": 1e999}',
    "NUL in a value": r'{"a": ["\u0000"]}',
    "NUL in a key": r'{"\u0000": 1}',
}


@pytest.mark.parametrize("raw", NO_JSON_OBJECT.values(), ids=NO_JSON_OBJECT)
async def test_what_is_no_json_object(shared: Api, raw: str) -> None:
    body = json.dumps(make_run())[:-1] + f', "metrics_json": {raw}, "context_json": {raw}}}'
    detail = check_error(await post(shared, body.encode()), 422)
    assert places(detail) == [("body", "metrics_json"), ("body", "context_json")]
    await check_alive(shared)


async def test_500_levels_are_refused(shared: Api) -> None:
    body = json.dumps(make_run(metrics_json=nested(500))).encode()
    check_error(await post(shared, body), 422)
    await check_alive(shared)


@pytest.mark.parametrize(
    "value",
    [{}, nested(64), {"k" * 1_000_000: 1}, {str(n): n for n in range(10_000)}, {"a": [-(2**63), 2**64 - 1, 1e308]}],
    ids=["empty", "64 levels", "a key of 1 MB", "10,000 keys", "large numbers"],
)
async def test_what_is_a_json_object(shared: Api, value: dict[str, Any]) -> None:
    run = make_run(metrics_json=value)
    await shared.post(run)
    assert (await shared.get(f"{RUNS}/{run['event_id']}"))["metrics_json"] == value


@pytest.mark.parametrize(
    "name", ["__proto__", "constructor", "__class__", "\0", "", "'; DROP TABLE x", "a\x1b[31m\nb"], ids=ascii
)
async def test_a_strange_key_is_only_an_unknown_field(shared: Api, name: str) -> None:
    answer = await shared.post(make_run(**{name: {"polluted": True}}))
    assert answer["warnings"] == [f"Unknown field ignored: {name}"]
    await check_alive(shared)


async def test_a_flag_is_true_or_false(shared: Api) -> None:
    values: list[object] = [2, -1, "on", "y", " true", "", 0.5, [], {}]
    for value in values:
        detail = check_error(await send(shared, "POST", RUNS, json=make_run(api_posted=value)), 422)
        assert places(detail) == [("body", "api_posted")], value


async def test_null_means_not_given_except_for_what_is_required(shared: Api) -> None:
    bare = make_run()
    optional = dict.fromkeys(name for name in runs.STORED if name not in bare)
    assert (await post(shared, json.dumps(bare | optional).encode())).status == 201
    run = await shared.get(f"{RUNS}/{bare['event_id']}")
    assert (run["status"], run["api_posted"]) == ("running", False)
    assert {run[name] for name in COUNTS} == {0}
    assert run["created_at"] == run["updated_at"]  # the moment of its arrival
    detail = check_error(await post(shared, json.dumps(dict.fromkeys(bare)).encode()), 422)
    assert {place for _, place in places(detail)} == set(bare)


# --- Batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
async def test_a_batch_that_is_not_json(shared: Api, body: bytes) -> None:
    check_error(await post(shared, body, BATCH), 422)
    await check_alive(shared)


async def test_a_line_of_20_mb_is_413(shared: Api) -> None:
    body = b'{"event_id": "' + b"x" * 20_000_000 + b'"}\n'
    assert "TELEMETRY_MAX_BODY_BYTES" in check_error(await post(shared, body, BATCH, NDJSON), 413)
    await check_alive(shared)


async def test_ndjson_of_garbage_names_each_line_but_not_without_end(shared: Api) -> None:
    detail = check_error(await post(shared, b"\xff\n" * 5000, BATCH, NDJSON), 422)
    assert places(detail) == [("body", number) for number in range(100)]
    await check_alive(shared)


@pytest.mark.parametrize(
    "item",
    [
        None,
        True,
        5,
        "x",
        [],
        [[]],
        {},
        {"event_id": 5},
        {"event_id": None},
        {"event_id": "\0"},
        {"runs": []},
        make_run(event_id="one-bad-item", items_failed=2**63),
    ],
    ids=lambda item: ascii(item)[:25],
)
async def test_one_bad_item_next_to_a_good_one(shared: Api, item: object) -> None:
    good = make_run()
    answer = await shared.batch([item, good])
    assert (answer["inserted"], answer["duplicates"], answer["total"]) == (1, 0, 2)
    [fault] = answer["error_details"]
    assert fault["index"] == 0
    assert all(error["loc"][:2] == ["body", 0] for error in fault["detail"])
    await shared.get(f"{RUNS}/{good['event_id']}")


# --- Query ---------------------------------------------------------------------------------------

PARAMETERS = [
    "event_id",
    "run_id",
    "agent_name",
    "job_type",
    "status",
    "product",
    "website",
    "git_commit_hash",
    "host",
    "environment",
    "insight_id",
    "parent_run_id",
    "retry_of",
    "conversation_id",
    "trace_id",
    "min_duration_ms",
    "error",
    "metrics.NAME",
    "label.NAME",
    "q",
    "created_before",
    "created_after",
    "start_time_from",
    "start_time_to",
    "sort",
    "fields",
    "count",
    "limit",
    "offset",
    "cursor",
    "include",
]


async def query(shared: Api, query_string: str) -> Any:
    [answer] = await send_raw(
        shared, f"GET {RUNS}?{query_string} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    return answer


async def test_the_table_has_every_parameter() -> None:
    assert set(PARAMETERS) == {parameter.name for parameter in queries.LIST}


@pytest.mark.parametrize("name", PARAMETERS)
async def test_a_bad_value_of_each_parameter(shared: Api, name: str) -> None:
    bad = {"empty": "", "blank": "%20", "NUL": "a%00b", "7,000 characters": "x" * 7_000}
    for label, value in bad.items():
        detail = check_error(await query(shared, f"{name}={value}"), 400)
        assert detail.startswith(f"Invalid {name}: "), label
        assert "it must be " in detail
    detail = check_error(await query(shared, f"{name}=1&{name}=1"), 400)
    assert name in detail
    assert "more than once" in detail
    check_error(await query(shared, f"{name}=%ff"), 400)
    check_error(await query(shared, f"{name}=%ed%a0%80"), 400)
    check_error(await query(shared, f"{name}={'x' * 100_000}"), 431)
    await check_alive(shared)


@pytest.mark.parametrize(
    "query_string",
    ["agent_name=%25", "agent_name=%", "agent_name=%zz", "agent_name=%2", "agent_name='%20OR%201=1--",
     "agent_name=%5C*", "agent_name=_%25", "offset=9223372036854775807",
     "created_after=2026-01-02T00:00:00Z&created_before=2026-01-01T00:00:00Z",
     "start_time_from=2026-01-02T00:00:00Z&start_time_to=2026-01-01T00:00:00Z"]
)  # fmt: skip
async def test_what_matches_nothing_is_an_empty_list(shared: Api, query_string: str) -> None:
    await shared.post(make_run())
    answer = await query(shared, query_string)
    assert (answer.status, answer.json) == (200, [])


# --- Paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["//", "/api", "/api/v1/runs//", "//api/v1/runs", "/health//", "/API/V1/RUNS", "/api/v1/runs/a/b", "/docs//",
     "/docs/static/", "/docs/static/../../etc/passwd", "/docs/static/%2e%2e%2f%2e%2e%2fcli.py", "/docs/static/nope.js",
     "/docs/static/__init__.py", "/static/docs.html", "/%00", "/%ff", "/.env", "/" + "a" * 5000]
)  # fmt: skip
async def test_a_path_that_is_not_there(shared: Api, path: str) -> None:
    [answer] = await send_raw(shared, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert check_error(answer, 404) == "No such endpoint; /docs lists them all"


@pytest.mark.parametrize(
    "event_id",
    ["%00", "a%0d%0ab", "%ff", "%zz", "%2e%2e%2fx", "%F0%9F%98%80", "%20", "x" * 5000, quote("'; DROP TABLE--")],
)
@pytest.mark.parametrize("suffix", ["", "/commit-url", "/repo-url", "/events"])
async def test_an_event_id_that_is_not_there(shared: Api, event_id: str, suffix: str) -> None:
    [answer] = await send_raw(
        shared, f"GET {RUNS}/{event_id}{suffix} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    assert check_error(answer, 404).startswith("Run not found: ")


# --- Headers and framing -------------------------------------------------------------------------

HEAD = b"POST /api/v1/runs HTTP/1.1\r\nHost: x\r\n"
TYPED = HEAD + b"Content-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(GOOD)
CHUNKED = TYPED + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)


MALFORMED = {
    "no Host": b"GET /health HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "HTTP/1.2": b"GET /health HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS hello": bytes.fromhex("16030100c8010000c40303") + b"\0" * 50,
    "garbage": b"\x00\x01\x02garbage\r\n\r\n",
    "lower-case method": b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown method": b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "space in the path": b"GET /api/v1/runs/a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "raw UTF-8 in the path": "GET /api/v1/runs/ü HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "raw UTF-8 in the query": "GET /api/v1/runs?agent_name=ü HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "Content-Length and Transfer-Encoding": TYPED + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(GOOD),
    "two equal Content-Lengths": TYPED + LENGTH + LENGTH + b"\r\n" + GOOD,
    "two Content-Lengths": TYPED + LENGTH + b"Content-Length: 5\r\n\r\n" + GOOD,
    "Content-Length -1": TYPED + b"Content-Length: -1\r\n\r\n" + GOOD,
    "Content-Length +2": TYPED + b"Content-Length: +2\r\n\r\n" + GOOD,
    "Content-Length 1_0": TYPED + b"Content-Length: 1_0\r\n\r\n" + GOOD,
    "Content-Length 0x10": TYPED + b"Content-Length: 0x10\r\n\r\n" + GOOD,
    "Content-Length of 30 digits": TYPED + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + GOOD,
    "Transfer-Encoding identity": TYPED + b"Transfer-Encoding: identity\r\n\r\n" + GOOD,
    "chunked twice": TYPED + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + chunk(GOOD),
    "chunk size 0x2": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    "chunk size zz": CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "chunk size -2": CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    "chunk size of 72 bits": CHUNKED + b"FFFFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than its size": CHUNKED + b"2\r\n{}}}}}\r\n0\r\n\r\n",
    "a newline in a chunk extension": CHUNKED + b"2;a=\n\r\n{}\r\n0\r\n\r\n",
    "bare newlines": b"GET /health HTTP/1.1\nHost: x\n\n",
    "a folded header": GET + b"A: b\r\n c\r\n\r\n",
    "a blank before the colon": GET + b"A : b\r\n\r\n",
    "NUL in a header": GET + b"A: b\0c\r\n\r\n",
    "a bare CR in a header": GET + b"A: b\rc\r\n\r\n",
    "1,000 headers": GET + b"".join(b"A%d: b\r\n" % number for number in range(1000)) + b"\r\n",
    "two Content-Types": TYPED + b"Content-Type: text/plain\r\n" + LENGTH + b"\r\n" + GOOD,
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_no_http_request(shared: Api, request_bytes: bytes) -> None:
    [answer] = await send_raw(shared, request_bytes)
    assert check_error(answer, 400) == "The request is not valid HTTP/1.1"
    assert answer.headers["x-request-id"]
    await shared.get(f"{RUNS}/good", 404)
    await check_alive(shared)


CLOSE = b"Connection: close\r\n"
REFUSED = {
    "no Content-Type": (HEAD + CLOSE + LENGTH + b"\r\n" + GOOD, 415),
    "an empty Content-Type": (HEAD + CLOSE + b"Content-Type: \r\n" + LENGTH + b"\r\n" + GOOD, 415),
    "garbage Content-Type": (HEAD + CLOSE + b"Content-Type: \xff\xfe;;==\r\n" + LENGTH + b"\r\n" + GOOD, 415),
    "a long Content-Type": (HEAD + CLOSE + b"Content-Type: " + b"a" * 5000 + b"\r\n" + LENGTH + b"\r\n" + GOOD, 415),
    "charset garbage": (
        HEAD + CLOSE + b"Content-Type: application/json; charset=\xff\r\n" + LENGTH + b"\r\n" + GOOD,
        415,
    ),
    "Transfer-Encoding gzip": (
        TYPED + CLOSE + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunk(gzip.compress(GOOD)),
        415,
    ),
    "no Content-Length": (TYPED + CLOSE + b"\r\n", 422),
    "Content-Length beyond the limit": (TYPED + CLOSE + b"Content-Length: 16777217\r\n\r\n", 413),
    "Content-Length of 2^62": (TYPED + CLOSE + b"Content-Length: 4611686018427387904\r\n\r\n", 413),
    "Expect of something else": (TYPED + CLOSE + LENGTH + b"Expect: tea\r\n\r\n" + GOOD, 417),
    "Expect where there is nothing": (
        b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: tea\r\n\r\n",
        417,
    ),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "CONNECT": (b"CONNECT evil.com:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "TRACE": (b"TRACE /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    "an absolute path elsewhere": (
        b"GET http://evil.com/nope HTTP/1.1\r\nHost: evil.com\r\nConnection: close\r\n\r\n",
        404,
    ),
}


@pytest.mark.parametrize(("request_bytes", "status"), REFUSED.values(), ids=REFUSED)
async def test_a_request_that_is_refused(shared: Api, request_bytes: bytes, status: int) -> None:
    [answer] = await send_raw(shared, request_bytes, only_first=True)
    check_error(answer, status)
    assert answer.headers["x-request-id"]
    await shared.get(f"{RUNS}/good", 404)
    await check_alive(shared)


ACCEPTED = {
    "HTTP/1.0 without Host": b"GET /health HTTP/1.0\r\n\r\n",
    # The guide's nginx configuration passes its own server name on.
    "a foreign Host": b"GET /health HTTP/1.1\r\nHost: telemetry.example.com\r\nConnection: close\r\n\r\n",
    "absolute form": b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a fragment": b"GET /health#x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "an upgrade that is not offered": GET + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n",
    "100 headers": GET + CLOSE + b"".join(b"A%d: b\r\n" % n for n in range(100)) + b"\r\n",
    "a body on GET": GET + CLOSE + b"Content-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("request_bytes", ACCEPTED.values(), ids=ACCEPTED)
async def test_what_is_unusual_and_fine(shared: Api, request_bytes: bytes) -> None:
    [answer] = await send_raw(shared, request_bytes)
    assert (answer.status, answer.json["status"]) == (200, "ok")


@pytest.mark.parametrize(
    ("head", "framing"),
    [
        (b"Content-Type: application/json\r\n", "length"),
        (b"content-type:application/json\r\n", "chunked"),
        (b'Content-Type: Application/JSON; charset="UTF-8"\r\n', "odd chunks"),
        (b"Content-Type: application/json\r\nExpect: 100-continue\r\n", "length"),
    ],
)
async def test_framing_that_is_right(shared: Api, head: bytes, framing: str) -> None:
    body = json.dumps(make_run()).encode()
    tail = {
        "length": b"Content-Length: %d\r\n\r\n%s" % (len(body), body),
        "chunked": b"Transfer-Encoding: chunked\r\n\r\n" + chunk(body),
        "odd chunks": b"Transfer-Encoding: Chunked\r\n\r\n1\r\n{\r\n000%X;ext=1\r\n%s\r\n0\r\n\r\n"
        % (len(body) - 1, body[1:]),
    }[framing]
    *before, answer = await send_raw(shared, HEAD + CLOSE + head + tail)
    assert answer.status == 201
    assert [interim.status for interim in before] == ([100] if b"Expect" in head else [])


async def test_a_body_cut_off_is_never_stored(shared: Api) -> None:
    for request in (
        TYPED + b"Content-Length: 5000\r\n\r\n" + GOOD,
        TYPED + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(GOOD) + GOOD[:20],
        TYPED + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(GOOD), GOOD),
    ):
        assert all(answer.status == 400 for answer in await send_raw(shared, request, half_close=True))
        await shared.get(f"{RUNS}/good", 404)
        await check_alive(shared)


async def test_who_closes_his_half_behind_a_request_has_it_done_whole_or_not_at_all(shared: Api) -> None:
    """The library takes it for the end of the connection, so there need not be an answer."""
    batch = [make_run(agent_name="half") for _ in range(10)]
    body = json.dumps(batch).encode()
    head = TYPED.replace(RUNS.encode(), BATCH.encode())
    answers = await send_raw(shared, head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body), half_close=True)
    await check_alive(shared)
    assert len(await shared.list(agent_name="half")) in ([10] if answers else [0, 10])


async def test_a_content_length_too_small_ends_the_connection(shared: Api) -> None:
    first, *rest = await send_raw(shared, TYPED + b"Content-Length: 5\r\n\r\n" + GOOD)
    assert first.status in (400, 422)
    assert all(answer.status == 400 for answer in rest)
    await shared.get(f"{RUNS}/good", 404)
    await check_alive(shared)


async def test_pipelined_requests_are_answered_in_order(shared: Api) -> None:
    answers = await send_raw(
        shared,
        GET + b"X-Request-ID: one\r\n\r\nGET /nope HTTP/1.1\r\nHost: x\r\nX-Request-ID: two\r\n\r\n"
        + GET + b"X-Request-ID: three\r\nConnection: close\r\n\r\n",
    )  # fmt: skip
    assert [(answer.status, answer.headers["x-request-id"]) for answer in answers] == [
        (200, "one"),
        (404, "two"),
        (200, "three"),
    ]


_REQUESTS = r'telemetryd_http_requests_total{[^}]*method="(\w+)"[^}]*status="(\d+)"[^}]*} (\S+)'


async def test_nothing_in_the_catalogue_was_an_internal_error(
    shared: Api, engine: str, request: pytest.FixtureRequest
) -> None:
    """The daemon's own counters have seen everything above."""
    text = (await send(shared, "GET", "/metrics", params={"format": "prometheus"})).text
    statuses, written = Counter[str](), 0
    for method, status, number in re.findall(_REQUESTS, text):
        statuses[status] += int(float(number))
        written += int(float(number)) if method in ("POST", "PATCH") and status in ("200", "201") else 0
    assert {"200", "201", "400", "404", "413", "415", "422"} <= statuses.keys()
    created = int(float(re.findall(r'telemetryd_runs_received_total{outcome="created"} (\S+)', text)[0]))
    assert created <= shared.execute("SELECT count(*) FROM agent_runs")[0][0]
    if engine != "sqlite":
        assert not {status for status in statuses if status >= "500"}
        return
    with closing(sqlite3.connect(f"{shared.settings.db_path.as_uri()}?mode=ro", uri=True)) as database:
        contents = read(database)
    findings = Findings.of(contents)
    if created > len(contents.runs):
        findings.note("lost", f"{created} runs were created, {len(contents.runs)} are there")
    Ledger.of(request, "tests/contract/test_bad_input.py").record(
        fault="the catalogue of bad input",
        mode="WAL",
        rounds=statuses.total(),
        acknowledged=written,
        server_errors=sum(number for status, number in statuses.items() if status >= "500"),
        **findings.figures(),
    )
