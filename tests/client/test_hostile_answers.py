"""Whatever answers, and whatever it says: a line is stored, or refused by the daemon itself, or it is kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telemetryd.client import Config
from telemetryd.client.answers import retry_after_s
from telemetryd.client.aside import Aside
from telemetryd.client.batch import Batch
from telemetryd.client.counters import Counters
from telemetryd.client.delivery import Delivery, RetryError
from telemetryd.client.lines import encode
from telemetryd.client.transport import Answer, Transport, UnreachableError
from telemetryd.compat import TelemetryClient, TelemetryConfig
from tests.client.conftest import MakeClient
from tests.client.test_too_large import told
from tests.client.test_worker import finished, leave
from tests.conftest import Api
from tests.tools.bad_proxy import BadProxy

RUN = encode(finished("e")).rstrip()
EVENT = encode({"op": "event", "event_id": "e", "event": {"event_key": "k", "event_type": "t"}}).rstrip()
CHANGE = encode({"op": "update", "event_id": "e", "fields": {"status": "success", "items_failed": 1}}).rstrip()
KINDS = {
    "run": [RUN],
    "event": [EVENT],
    "change": [CHANGE],
    "all": [RUN, EVENT, CHANGE],
}


class Always:
    """Gives one answer to everything, and /health its own."""

    def __init__(self, answer: Answer, health: Answer | None = None) -> None:
        self.answer = answer
        self.health = health or answer

    def request(self, method: str, path: str, body: bytes | None = None, media_type: str = "") -> Answer:
        return self.health if path == "/health" else self.answer


def send(lines: list[bytes], requests: Any, folder: Path | None = None, tries: int = 1) -> tuple[bool, list[Any]]:
    """Send lines until they are at their end or so many tries have failed; return whether, and what was buried."""
    buried: list[Any] = []
    counters = Counters()
    delivery = Delivery(requests, lambda *refusal: buried.append(refusal), counters, Aside(folder) if folder else None)
    batch = Batch.of(lines)
    for _ in range(tries):
        with contextlib.suppress(RetryError):
            delivery.send(batch)
            return True, buried
        assert (counters.sent, counters.dead) == (0, 0)
    return False, buried


# --- Somebody else -------------------------------------------------------------------------------

SOMEBODY_ELSE = [
    (404, {"detail": "Not Found"}),
    (404, {"detail": "Run not found: e"}),
    (405, {"detail": "Method Not Allowed"}),
    (422, {"detail": [{"loc": ["body", "status"], "msg": "no", "type": "value_error"}]}),
    (400, {"detail": "No valid fields to update"}),
    (500, {"detail": "Internal Server Error"}),
    (200, {"inserted": 1, "duplicates": 0, "errors": [], "updated": True, "status": "ok"}),
    (201, {"inserted": 1, "duplicates": 0}),
    (301, None),
    (403, None),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("status", "body"), SOMEBODY_ELSE, ids=lambda value: value if isinstance(value, int) else "")
def test_what_somebody_else_answers_decides_nothing(status: int, body: object, kind: str) -> None:
    well = told(200, {"status": "ok"}, by_the_daemon=False)
    somebody = Always(told(status, body, by_the_daemon=False), well)
    assert send(KINDS[kind], somebody, tries=30) == (False, [])


@pytest.mark.parametrize("kind", ["run", "event", "change"])
def test_what_breaks_somebody_on_the_way_again_and_again_is_set_aside(tmp_path: Path, kind: str) -> None:
    """The daemon itself is well, and it is this very line: so the others pass it."""
    broken = Always(told(500, None, by_the_daemon=False), told(200, {"status": "ok"}))
    assert send(KINDS[kind], broken, tmp_path, tries=30) == (True, [])
    assert Aside(tmp_path).holds("e")


@pytest.mark.parametrize("command", ["sync", "replay", "import"])
def test_the_commands_keep_what_somebody_else_refuses(command: str, buffer: Path, proxy_of_nobody: str) -> None:
    leave(buffer, finished("e"), {"op": "update", "event_id": "old", "fields": {"status": "success"}})
    (file,) = buffer.glob("*.ready")
    before = file.read_bytes()
    where = ["--buffer-dir", str(buffer)] if command == "sync" else [str(file)]
    words = [
        sys.executable,
        "-m",
        "telemetryd",
        command,
        *where,
        "--url",
        proxy_of_nobody,
        "--retry-for",
        "0",
        "--json",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "not telemetryd answered 404" in json.loads(done.stdout)["problem"]
    assert file.read_bytes() == before
    assert not (buffer / "dead-letter.jsonl").exists()


@pytest.fixture
def proxy_of_nobody() -> Iterator[str]:
    """An address where a program of another kind answers."""
    proxy = BadProxy("http://127.0.0.1:9")
    proxy._forward = lambda *_: (404, {"Content-Type": "application/json"}, b'{"detail":"Not Found"}')  # type: ignore[method-assign]
    yield proxy.url
    proxy.close()


def test_the_replaced_librarys_client_asks_nobody_else(proxy_of_nobody: str, buffer: Path) -> None:
    client = TelemetryClient(TelemetryConfig(api_url=proxy_of_nobody, buffer_dir=buffer, api_enabled=False))
    assert "not telemetryd" in client.get_stats()["error"]
    assert client.cleanup_stale_runs("a") == 0
    client.close()


# --- Anything ------------------------------------------------------------------------------------

COUNTS = st.integers(-2, 3) | st.booleans() | st.none() | st.text(max_size=3) | st.just(1.0) | st.just(2**70)
ANYTHING = st.recursive(
    COUNTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)
ERRORS = st.lists(st.fixed_dictionaries({}, optional={"index": COUNTS, "detail": ANYTHING}) | ANYTHING, max_size=3)
BODIES = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {},
        optional={
            "inserted": COUNTS,
            "duplicates": COUNTS,
            "errors": ERRORS | ANYTHING,
            "error_details": ERRORS | ANYTHING,
            "updated": ANYTHING,
            "detail": ANYTHING | st.lists(st.fixed_dictionaries({"loc": ANYTHING}), max_size=2),
            "status": st.just("ok"),
        },
    ),
)
DIGITS = st.text("0123456789", min_size=1, max_size=3) | st.just("9" * 5000) | st.just("0" * 5000 + "5")
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "telemetry-server": st.sampled_from(["telemetryd/4.0.0", "nginx", ""]),
        "telemetry-flow": DIGITS.map("batch={0}, pause={0}".format) | st.text(max_size=30),
        "retry-after": DIGITS
        | st.text(max_size=10)
        | st.sampled_from(
            [
                "Wed, 21 Oct 9999 07:28:00 GMT",
                "Fri, 31 Dec 9999 23:59:59 -2359",
                "Mon, 01 Jan 99999999999 00:00:00 +99999",
            ]
        ),
    },
)
STATUSES = st.sampled_from(
    [200, 201, 204, 301, 400, 401, 404, 405, 409, 413, 414, 422, 429, 500, 502, 503]
) | st.integers(100, 999)


def is_acknowledged(answer: Answer, sent: int) -> bool:
    body = answer.body
    counts: list[Any] = [body.get("inserted"), body.get("duplicates")] if isinstance(body, dict) else [None]
    are_counts = all(type(count) is int and count >= 0 for count in counts)
    errors = body.get("errors") if isinstance(body, dict) else None
    return answer.is_daemons and are_counts and isinstance(errors, list) and sum(counts) + len(errors) == sent


@settings(deadline=None)
@given(STATUSES, HEADERS, BODIES, st.sampled_from(sorted(KINDS)))
def test_any_answer_leaves_each_line_stored_refused_or_kept(
    status: int, headers: dict[str, str], body: Any, kind: str
) -> None:
    answer = Answer(status, headers, body)
    is_at_its_end, buried = send(KINDS[kind], Always(answer))
    if not answer.is_daemons and status != 413:
        assert not is_at_its_end
        assert not buried
    if kind == "run" and is_at_its_end and not buried:
        assert is_acknowledged(answer, 1)
    assert 0 <= retry_after_s(answer) <= 3600


@pytest.mark.parametrize(
    "body",
    [
        {"inserted": -1, "duplicates": 2, "errors": []},
        {"inserted": True, "duplicates": 0, "errors": []},
        {"inserted": "1", "duplicates": 0, "errors": []},
        {"inserted": 1.0, "duplicates": 0, "errors": []},
        {"inserted": 2, "duplicates": -1, "errors": []},
        {"inserted": 0, "duplicates": 0, "errors": ["x"], "error_details": [{"index": 5, "detail": "x"}]},
        {"inserted": 0, "duplicates": 0, "errors": ["x"], "error_details": [{"index": -1, "detail": "x"}]},
        {"inserted": 1, "duplicates": 0},
    ],
    ids=range(8),
)
def test_a_batch_that_is_not_accounted_for_is_kept(body: object) -> None:
    assert send([RUN], Always(told(200, body))) == (False, [])


@pytest.mark.parametrize(
    ("headers", "least"),
    [
        ({"telemetry-flow": "batch=" + "9" * 5000}, 0),
        ({"retry-after": "9" * 5000}, 3600),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 -9999"}, 0),
        ({"retry-after": "1e999"}, 3600),
    ],
    ids=range(4),
)
def test_a_header_beyond_all_bounds_costs_no_acknowledgement(headers: dict[str, str], least: float) -> None:
    done = told(200, {"inserted": 1, "duplicates": 0, "errors": []})
    answer = Answer(200, {**done.headers, **headers}, done.body)
    assert send([RUN], Always(answer)) == (True, [])
    assert least <= retry_after_s(answer) <= 3600
    assert math.isfinite(retry_after_s(answer))


def test_a_reason_of_any_depth_is_reported_or_left_out() -> None:
    """orjson reads a thousand levels, and neither repr() nor json.dumps() writes so many."""
    deep = b'{"detail":' + b"[" * 900 + b"]" * 900 + b"}"
    assert ask(head(500, len(deep)) + deep).body is None
    wide = b'{"detail":[' + b",".join([b"{}"] * 5000) + b"]}"
    assert len(ask(head(500, len(wide)) + wide).detail) == 5000


# --- Bytes ---------------------------------------------------------------------------------------


def head(status: int, length: int) -> bytes:
    return b"HTTP/1.1 %d X\r\nTelemetry-Server: telemetryd/4\r\nContent-Length: %d\r\n\r\n" % (status, length)


class Raw:
    """Answers each connection with the next bytes, whatever is asked, and closes it."""

    def __init__(self) -> None:
        self.answer = b""
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(5)
                    while connection.recv(1 << 16):
                        pass

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()


def ask(answer: bytes) -> Answer:
    """Return what the client makes of bytes."""
    raw = Raw()
    raw.answer = answer
    transport = Transport(Config(url=raw.url, timeout_s=5))
    try:
        return transport.request("GET", "/health")
    finally:
        transport.close()
        raw.close()


@pytest.fixture(scope="module")
def raw() -> Iterator[Raw]:
    server = Raw()
    yield server
    server.close()


PIECES = st.lists(
    st.sampled_from(
        [
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/9.9 999 \r\n",
            b"HTTP/1.1 -1 X\r\n",
            b"Content-Length: 5\r\n",
            b"Content-Length: -5\r\n",
            b"Content-Length: 99999999999999999999\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Telemetry-Server: telemetryd\r\n",
            b"X: \xff\x00\r\n",
            b": no name\r\n",
            b"no colon\r\n",
            b"A: b\r\n" * 200,
            b"L: " + b"x" * 70_000 + b"\r\n",
            b"\r\n",
            b"5\r\nhello\r\n",
            b"-5\r\n",
            b"f" * 40 + b"\r\n",
            b"7fffffffffffffff\r\n",
            b"0\r\n\r\n",
            b"5;" + b"e" * 70_000 + b"\r\n",
            b"[" * 2000,
        ]
    ),
    max_size=7,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(pieces=PIECES)
def test_any_bytes_are_an_answer_or_none(raw: Raw, pieces: list[bytes]) -> None:
    raw.answer = b"".join(pieces)
    transport = Transport(Config(url=raw.url, timeout_s=5))
    with contextlib.suppress(UnreachableError):
        assert isinstance(transport.request("GET", "/health"), Answer)
    transport.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    ],
    ids=["a chunk beyond all sizes", "a chunk of less than nothing", "a length of 5,000 digits"],
)
def test_a_size_that_no_body_has_harms_nobody(answer: bytes) -> None:
    with contextlib.suppress(UnreachableError):
        ask(answer)


async def test_lines_outlive_somebody_else_in_the_daemons_place(
    api: Api, proxy: BadProxy, make_client: MakeClient, buffer: Path
) -> None:
    """An agent whose address is wrong for a while: its events arrive when it is right again."""
    real = proxy._forward
    proxy._forward = lambda *_: (404, {}, b'{"detail":"Not Found"}')  # type: ignore[method-assign]
    client = make_client(proxy.url)
    with client.run("a", "j") as run:
        run.event("step")
    assert not await asyncio.to_thread(client.flush, 0.3)
    assert "not telemetryd" in client.stats()["problem"]
    proxy._forward = real  # type: ignore[method-assign]
    assert client._sender._worker is not None
    client._sender._worker._quiet_until = 0.0  # it asks again after half a minute
    deadline = time.monotonic() + 10
    while not await asyncio.to_thread(client.flush, 0.2):
        assert time.monotonic() < deadline
    there = await api.get(f"/api/v1/runs/{run.event_id}?include=events")
    assert (there["status"], len(there["events"])) == ("success", 1)
    assert not (buffer / "dead-letter.jsonl").exists()
