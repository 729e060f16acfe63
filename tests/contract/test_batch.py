"""POST /api/v1/runs/batch, sentence by sentence."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from telemetryd.cli.documents import is_document, read_document
from telemetryd.errors import InvalidBodyError
from telemetryd.model.bodies import holds_more_values
from telemetryd.model.items import explained, split
from telemetryd.model.runs import STORED
from tests.conftest import Api, MakeApi, StartDaemon, eventually, make_run
from tests.contract.test_conventions import high_water_mark_kb
from tests.contract.wire import (
    BATCH,
    JSON,
    NDJSON,
    RUNS,
    SENTENCE_OF_STATUS,
    check_alive,
    check_error,
    places,
    post,
    send,
)
from tests.http_client import call


def lines(*items: object, end: str = "\n") -> bytes:
    return "".join(json.dumps(item) + end for item in items).encode()


async def test_an_array_is_stored(api: Api) -> None:
    runs = [make_run() for _ in range(3)]
    assert await api.batch(runs) == {"inserted": 3, "duplicates": 0, "errors": [], "total": 3}
    assert {run["event_id"] for run in await api.list()} == {run["event_id"] for run in runs}


async def test_an_object_with_runs_is_stored(api: Api) -> None:
    assert await api.batch({"runs": [make_run(), make_run()]}) == {
        "inserted": 2,
        "duplicates": 0,
        "errors": [],
        "total": 2,
    }
    assert len(await api.list()) == 2


async def test_an_unknown_field_next_to_runs_is_named(api: Api) -> None:
    answer = await api.batch({"runs": [make_run(color=1), make_run(color=2)], "source": "x"})
    assert answer["inserted"] == 2
    assert answer["warnings"] == ["Unknown field ignored: source", "Unknown field ignored: color"]


@pytest.mark.parametrize(
    "body",
    [
        lines(make_run(event_id="a"), make_run(event_id="b")),
        lines(make_run(event_id="a"), make_run(event_id="b"), end="\r\n"),
        b"\n\r\n" + lines(make_run(event_id="a")) + b"\n \n\t\n" + lines(make_run(event_id="b")) + b"\n\n",
        (lines(make_run(event_id="a")) + lines(make_run(event_id="b"))).removesuffix(b"\n"),
    ],
    ids=["plain", "CRLF", "blank lines", "no last newline"],
)
async def test_ndjson_is_stored(api: Api, body: bytes) -> None:
    answer = await post(api, body, BATCH, NDJSON)
    assert answer.status == 200
    assert answer.json == {"inserted": 2, "duplicates": 0, "errors": [], "total": 2}
    assert {run["event_id"] for run in await api.list()} == {"a", "b"}


async def test_one_bad_line_of_ndjson_never_costs_the_good_ones(api: Api) -> None:
    body = lines(make_run(event_id="a")) + b'{"event_id": \n' + lines(make_run(event_id="b"))
    answer = (await post(api, body, BATCH, NDJSON)).json
    assert (answer["inserted"], answer["total"], len(answer["errors"])) == (2, 3, 1)
    [fault] = answer["error_details"]
    assert fault["index"] == 1
    assert fault["event_id"] is None
    assert fault["detail"][0]["loc"] == ["body", 1]
    assert fault["detail"][0]["type"] == "json_invalid"


module_loop = pytest.mark.asyncio(loop_scope="module")
HALF_AN_EMOJI = rb'"\ud83d"'
NOT_STRICT = {
    "half an emoji": ("host", HALF_AN_EMOJI, "surrogate"),
    "in a metric": ("metrics_json", b'{"a": [1, {"b": %b}]}' % HALF_AN_EMOJI, "surrogate"),
    "in a metric's name": ("metrics_json", b"{%b: 1}" % HALF_AN_EMOJI, "surrogate"),
    "no UTF-8": ("error_summary", b'"caf\xe9"', "UTF-8"),
    "NaN": ("metrics_json", b'{"loss": NaN}', "NaN"),
    "Infinity": ("items_failed", b"-Infinity", "-Infinity"),
    "in an unknown field": ("color", b"NaN", "NaN"),
}


@module_loop
@pytest.mark.parametrize(("field", "value", "said"), NOT_STRICT.values(), ids=NOT_STRICT)
@pytest.mark.parametrize("form", ["array", "runs", "lines"])
async def test_an_item_that_is_no_strict_json_costs_only_itself(
    shared: Api, field: str, value: bytes, said: str, form: str
) -> None:
    good, last = make_run(host='a, ] "} [\\', metrics_json={"a": [[]]}), make_run()
    bad = make_run()
    texts = [json.dumps(good).encode(), json.dumps(bad).encode()[:-1], json.dumps(last).encode()]
    texts[1] += b', "%b": %b}' % (field.encode(), value)
    array = b"[" + b" ,\n ".join(texts) + b"]"
    body = {"array": array, "runs": b'{"source": "x", "runs" : %b, "to": 1}' % array, "lines": b"\n".join(texts)}[form]
    answer = await post(shared, body, BATCH, NDJSON if form == "lines" else JSON)
    assert (answer.status, answer.json["inserted"], answer.json["total"]) == (200, 2, 3), answer.text
    [fault] = answer.json["error_details"]
    assert (fault["index"], fault["event_id"]) == (1, bad["event_id"])
    [detail] = fault["detail"]
    assert (detail["loc"], detail["type"]) == (["body", 1, field], "json_invalid")
    assert said in detail["msg"]
    assert (await shared.get(f"{RUNS}/{good['event_id']}"))["host"] == good["host"]
    if form == "runs":
        assert answer.json["warnings"] == ["Unknown field ignored: source", "Unknown field ignored: to"]


def took(read: Callable[[bytes], object], body: bytes) -> float:
    """Return the processor time that a reader takes for a body, at best."""
    times = []
    for _ in range(5):
        begin = time.thread_time()
        with contextlib.suppress(OSError):
            read(body)
        times.append(time.thread_time() - begin)
    return min(times)


READERS: dict[str, Callable[[bytes], object]] = {
    "split": lambda body: split(body, 1000),
    "document": lambda body: [is_document(body), *read_document(io.BytesIO(body), 1 << 30)],
    "explained": lambda body: explained(InvalidBodyError([]), body),
    "values": lambda body: holds_more_values(body, 100),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_the_work_grows_with_a_body_and_not_faster(read: Callable[[bytes], object]) -> None:
    """After a quote that is not closed, each escaped one was followed to the end: 80 kB took half a minute."""
    for begin, filling in [
        (b'{"', rb"\""), (b'{\n"', rb"\""), (b'["', b"\\\\"), (b'{"a": [', b'"runs" '), (b"[", b'"",'), (b"[", b"["),
        (b"{", b'"runs"   '), (b'{\n"runs"', b" "), (b'[{"a": ', b"9"), (b'[NaN, "', rb"\""), (b'[NaN, "', b"\xff"),
    ]:  # fmt: skip
        short, long = (begin + filling * (size // len(filling)) for size in (2_000, 16_000))
        assert took(read, long) < 30 * took(read, short) + 0.001, (begin, filling)


@module_loop
async def test_a_quote_that_is_not_closed_stops_nobody(shared: Api) -> None:
    async with asyncio.TaskGroup() as group:
        hostile = [group.create_task(post(shared, b'{"' + rb"\"" * 200_000, BATCH)) for _ in range(8)]
        await shared.post(make_run(), 201)
    assert {task.result().status for task in hostile} == {422}


@module_loop
async def test_an_item_with_another_fault_of_json_costs_only_itself(shared: Api) -> None:
    """Its brackets are closed, so the others are told from it; what is refused has no name that half a pair is in."""
    good = json.dumps(make_run()).encode()
    bad = [
        b'{"event_id": tru}',
        rb'{"\ud800": 1}',
        rb'{"event_id": "\ud800"}',
        b"NaN",
        b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    ]
    answer = await post(shared, b"[" + b",".join([*bad, good]) + b"]", BATCH)
    assert (answer.status, answer.json["inserted"], answer.json["total"]) == (200, 1, 6)
    assert [fault["event_id"] for fault in answer.json["error_details"]] == [None] * 5
    assert {fault["detail"][0]["type"] for fault in answer.json["error_details"]} == {"json_invalid"}


@module_loop
@pytest.mark.parametrize(
    "body",
    [b"[%b, NaN", b"[%b, NaN,]", b"[%b,, NaN]", b"[%b, NaN] x", b'{"runs": [%b, NaN], "a": NaN}', b'[%b, NaN, "]',
     b'{"runs": [%b, NaN], "runs": [1]}', b'{"a": {"runs": [%b, NaN]}}', b"[%b, NaN]]"],
)  # fmt: skip
async def test_without_limits_between_the_items_nothing_is_stored(shared: Api, body: bytes) -> None:
    run = make_run()
    detail = check_error(await post(shared, body % json.dumps(run).encode(), BATCH), 422)
    assert places(detail) == [("body",)]
    await shared.get(f"{RUNS}/{run['event_id']}", 404)


@module_loop
async def test_only_items_that_are_no_strict_json_are_422(shared: Api) -> None:
    body = rb'[{"event_id": "a", "host": "\ud800"}, {"host": NaN}]'
    assert places(check_error(await post(shared, body, BATCH), 422)) == [("body", 0, "host"), ("body", 1, "host")]


async def test_an_empty_array_is_zeros(api: Api) -> None:
    zeros = {"inserted": 0, "duplicates": 0, "errors": [], "total": 0}
    assert await api.batch([]) == zeros
    assert await api.batch({"runs": []}) == zeros


async def test_known_events_are_duplicates_and_stay_untouched(api: Api) -> None:
    old = make_run(host="old")
    await api.post(old)
    assert await api.batch([make_run(), {**old, "host": "new"}, old]) == {
        "inserted": 1,
        "duplicates": 2,
        "errors": [],
        "total": 3,
        "warnings": [
            "Item 1: The event_id is known, and the stored run, which stays as it is, differs in: host",
        ],
    }
    assert (await api.get(f"{RUNS}/{old['event_id']}"))["host"] == "old"


async def test_repeats_inside_one_batch_are_duplicates(api: Api) -> None:
    run = make_run()
    answer = await api.batch([{**run, "host": str(number)} for number in range(1000)])
    *first, last = answer.pop("warnings")
    assert answer == {"inserted": 1, "duplicates": 999, "errors": [], "total": 1000}
    assert (len(first), first[0][:8], last) == (100, "Item 1: ", "899 more warnings")
    assert (await api.get(f"{RUNS}/{run['event_id']}"))["host"] == "0"


async def test_one_bad_of_a_thousand_is_reported_and_costs_nothing(api: Api) -> None:
    runs = [make_run() for _ in range(1000)]
    runs[412] |= {"status": "bogus", "items_failed": -1}
    answer = await api.batch(runs)
    assert (answer["inserted"], answer["duplicates"], answer["total"]) == (999, 0, 1000)
    [sentence] = answer["errors"]
    assert "412" in sentence
    assert runs[412]["event_id"] in sentence
    assert SENTENCE_OF_STATUS in sentence
    assert "items_failed" in sentence
    [fault] = answer["error_details"]
    assert (fault["index"], fault["event_id"]) == (412, runs[412]["event_id"])
    assert set(places(fault["detail"])) == {("body", 412, "status"), ("body", 412, "items_failed")}
    await api.get(f"{RUNS}/{runs[412]['event_id']}", 404)
    await api.get(f"{RUNS}/{runs[999]['event_id']}")


async def test_there_are_no_error_details_without_errors(api: Api) -> None:
    assert set(await api.batch([make_run()])) == {"inserted", "duplicates", "errors", "total"}


async def test_all_bad_but_readable_is_still_an_answer(api: Api) -> None:
    answer = await api.batch([None, 5, "x", [], [make_run()], {}, make_run(status="bogus")])
    assert (answer["inserted"], answer["duplicates"], answer["total"]) == (0, 0, 7)
    assert [fault["index"] for fault in answer["error_details"]] == list(range(7))
    assert len(answer["errors"]) == 7
    assert await api.list() == []


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"{}", b'{"runs": 5}', b'{"runs": {}}', b'"x"', b"[", b"[{]", json.dumps(make_run()).encode()],
)
async def test_what_is_no_batch_is_422(api: Api, body: bytes) -> None:
    detail = check_error(await post(api, body, BATCH), 422)
    assert places(detail) == [("body",)]
    await check_alive(api)


async def test_ndjson_without_one_readable_line_is_422(api: Api) -> None:
    detail = check_error(await post(api, b"{\nnope\n", BATCH, NDJSON), 422)
    assert places(detail) == [("body", 0), ("body", 1)]


async def test_a_batch_inside_a_batch_is_one_bad_item(api: Api) -> None:
    answer = await api.batch([[make_run()], make_run()])
    assert (answer["inserted"], answer["total"]) == (1, 2)
    assert answer["error_details"][0]["index"] == 0


async def test_a_batch_of_the_largest_size_is_taken_and_one_more_is_413(make_api: MakeApi) -> None:
    api = await make_api(max_batch=50)
    assert (await api.batch([make_run() for _ in range(50)]))["inserted"] == 50
    for body, headers in (
        (json.dumps([make_run() for _ in range(51)]).encode(), {"Content-Type": "application/json"}),
        (json.dumps({"runs": [make_run() for _ in range(51)]}).encode(), {"Content-Type": "application/json"}),
        (lines(*(make_run() for _ in range(51))), NDJSON),
    ):
        detail = check_error(await post(api, body, BATCH, headers), 413)
        assert "TELEMETRY_MAX_BATCH" in detail
        assert "50" in detail
    assert len(await api.list(limit="1000")) == 50


async def test_the_default_limit_is_ten_thousand(api: Api) -> None:
    assert "10000" in check_error(await post(api, b"[" + b"0," * 10_000 + b"0]", BATCH), 413)
    answer = await post(api, b"[" + b"0," * 9_999 + b"0]", BATCH)
    assert answer.json["total"] == 10_000


async def test_all_good_items_commit_in_one_transaction(api: Api) -> None:
    """A reader alongside the daemon sees nothing of a batch, or all of it."""
    seen: set[int] = set()
    stop = False

    def watch() -> None:
        while not stop:
            seen.add(api.execute("SELECT count(*) FROM agent_runs")[0][0])

    watching = asyncio.create_task(asyncio.to_thread(watch))
    for _ in range(3):
        await api.batch([*(make_run() for _ in range(2000)), {"bad": 1}])
    await eventually(lambda: 6000 in seen)
    stop = True
    await watching
    assert seen <= {0, 2000, 4000, 6000}


async def test_a_batch_keeps_the_order_of_its_items(api: Api) -> None:
    runs = [make_run(created_at="2025-12-24T10:00:00Z") for _ in range(20)]
    await api.batch(runs)
    assert [run["event_id"] for run in await api.list()] == [run["event_id"] for run in reversed(runs)]


async def test_an_error_of_a_batch_echoes_no_long_input(api: Api) -> None:
    answer = await send(api, "POST", BATCH, json=[make_run(event_id="i" * 100_000), make_run(status="s" * 100_000)])
    assert answer.status == 200
    assert "i" * 201 not in answer.text
    assert "s" * 201 not in answer.text
    assert len(answer.json["errors"]) == 2


def test_many_tiny_items_stop_nobody_else(start_daemon: StartDaemon) -> None:
    """16 MiB of them, 16 KB on the wire: refused before they are built, while /health goes on answering."""
    daemon = start_daemon()
    bodies = {
        "application/x-ndjson": b"1\n" * (8 << 20),
        "application/json": b"[" + b"{}," * 5_590_000 + b"{}]",
    }
    for media_type, body in bodies.items():
        before = high_water_mark_kb(daemon)
        pauses, (status, answer) = health_during(daemon.url, BATCH, gzip.compress(body), media_type)
        assert (status, "more than" in str(answer)) == (413, True)
        assert max(pauses) < 10  # it was many seconds; a busy machine may take some
        assert high_water_mark_kb(daemon) - before < 120_000


def test_a_batch_of_nothing_but_errors_is_reported_shortly(start_daemon: StartDaemon) -> None:
    """10,000 items with every field wrong made an answer of 59 MB, and nobody else was answered meanwhile."""
    daemon = start_daemon()
    wrong = dict.fromkeys(STORED, -1)
    pauses, (status, answer) = health_during(
        daemon.url, BATCH, gzip.compress(json.dumps([wrong] * 10_000).encode()), "application/json"
    )
    assert (status, len(answer["errors"]), len(answer["error_details"])) == (200, 10_000, 10_000)
    assert len(answer["error_details"][0]["detail"]) == len(STORED)
    last = answer["error_details"][-1]
    more = f"and {len(STORED) - 1} more errors in this item"
    assert last["index"] == 9_999
    assert places(last["detail"]) == [("body", 9_999, "event_id"), ("body", 9_999)]
    assert last["detail"][1] == {"loc": ["body", 9_999], "msg": more, "type": "more_errors"}
    assert answer["errors"][-1].endswith(f"; {more}")
    assert len(json.dumps(answer)) < 5_000_000
    assert max(pauses) < 10  # it was many seconds; a busy machine may take some


def health_during(url: str, path: str, body: bytes, media_type: str) -> tuple[list[float], tuple[int, Any]]:
    """Send a gzipped body; return how long each /health took meanwhile, and the answer."""
    answers: list[tuple[int, Any]] = []

    def send_it() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.request("POST", path, body, {"Content-Type": media_type, "Content-Encoding": "gzip"})
        response = connection.getresponse()
        answers.append((response.status, json.loads(response.read())))
        connection.close()

    pauses = []
    sender = threading.Thread(target=send_it)
    sender.start()
    while sender.is_alive():
        started = time.perf_counter()
        assert call(url, "GET", "/health")[0] == 200
        pauses.append(time.perf_counter() - started)
        time.sleep(0.005)
    sender.join()
    return pauses, answers[0]
