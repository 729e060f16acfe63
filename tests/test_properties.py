"""Properties over HTTP: whatever valid runs are sent, the daemon stores them faithfully, and once.

What is not valid is made by tests/faults/generated.py, and by Schemathesis from the daemon's own document.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from telemetryd.git_urls import without_credentials
from telemetryd.model import runs
from telemetryd.model import values as values_module
from telemetryd.model.filters import quoted
from tests.conftest import Api, StartDaemon, make_run

IS_LONG = settings.get_current_profile_name() == "long"
REPEATABLE = settings(
    max_examples=60 if IS_LONG else 25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Wire:
    """One keep-alive connection on which anything can be sent, be it HTTP or not."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def send(self, method: str, target: bytes, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Send a request as it is and return the status and the body of the answer."""
        fields = {"Host": "localhost", "Content-Length": str(len(body)), **headers}
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        self._socket.sendall(method.encode() + b" " + target + b" HTTP/1.1\r\n" + head.encode() + b"\r\n" + body)
        response = http.client.HTTPResponse(self._socket, method=method)
        response.begin()
        answer = response.status, response.read()
        is_last = response.will_close
        response.close()
        if is_last:
            self.close()
        return answer

    def json(self, method: str, path: str, body: object = None, status: int | None = None) -> Any:
        """Send JSON, check the status if one is given, and return the decoded answer."""
        sent = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
        got, text = self.send(method, path.encode(), sent, Content_Type="application/json")
        assert status is None or got == status, (got, text)
        return json.loads(text)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@pytest.fixture
def wire(start_daemon: StartDaemon) -> Iterator[Wire]:
    """A connection to one daemon; afterwards it must be alive, its log clean, and its end orderly."""
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    port = urlsplit(daemon.url).port
    assert port is not None
    opened = Wire(port)
    yield opened
    assert opened.json("GET", "/health", status=200)["status"] == "ok"
    opened.close()
    assert daemon.stop() == 0
    unexpected = [line for line in daemon.lines if line["level"] == "CRITICAL" or "traceback" in line]
    assert unexpected == []


# --- Any valid run comes back equal --------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
# Not only blanks, of which Python knows some (U+001C to U+001F) that Unicode does not call so.
NAMES = TEXTS.filter(lambda text: re.search(r"[^\s]|[\x1c-\x1f]", text) is not None)
COUNTS = st.integers(0, values_module.MAX_INTEGER) | st.integers(0, 100)
OFFSETS = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@st.composite
def timestamps(draw: st.DrawFn) -> tuple[str, str]:
    """A timestamp as a client may write it, and the one form in which it must come back."""
    moment = draw(st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=OFFSETS))
    canonical = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    between = draw(st.sampled_from("Tt "))
    if draw(st.booleans()):
        return moment.isoformat(between), canonical
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(between) + draw(
        st.sampled_from(["Z", "z", ""])
    ), canonical


STATUSES = st.sampled_from(
    [
        *((name, name) for name in ("running", "success", "failure", "partial", "timeout", "cancelled")),
        ("Failed", "failure"), ("completed", "success"), (" SUCCEEDED\n", "success"), ("canceled", "cancelled"),
    ]
)  # fmt: skip
PARTS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
OBJECTS = st.dictionaries(
    TEXTS,
    st.recursive(PARTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)),
    max_size=3,
)


LABELS = st.dictionaries(
    st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,62}", fullmatch=True), NAMES.filter(lambda text: len(text) < 256), min_size=1,
    max_size=4,
)  # fmt: skip


def hexadecimal(digits: int) -> st.SearchStrategy[str]:
    return st.integers(1, 16**digits - 1).map(lambda number: f"{number:0{digits}x}")


def same(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, Any]]:
    """Values that come back as they are."""
    return values.map(lambda value: (value, value))


def optional(values: st.SearchStrategy[tuple[Any, Any]]) -> st.SearchStrategy[tuple[Any, Any]]:
    return st.just((None, None)) | values


# What may be given for each field, with what must come back; by name, not by the model that is under test.
SPECIAL: dict[str, st.SearchStrategy[tuple[Any, Any]]] = {
    **dict.fromkeys(("run_id", "agent_name", "job_type"), same(NAMES)),
    **dict.fromkeys(("start_time", "created_at"), timestamps()),
    **dict.fromkeys(("end_time", "api_posted_at", "git_commit_timestamp", "expected_by"), optional(timestamps())),
    **dict.fromkeys(("items_discovered", "items_succeeded", "items_failed", "items_skipped"), same(COUNTS)),
    "api_retry_count": same(COUNTS),
    "duration_ms": same(COUNTS) | st.just((None, 0)),
    **dict.fromkeys(("metrics_json", "context_json"), optional(same(OBJECTS))),
    "labels": optional(same(LABELS)),
    "attempt": optional(same(st.integers(1, values_module.MAX_INTEGER))),
    "trace_id": optional(same(hexadecimal(32))),
    "span_id": optional(same(hexadecimal(16))),
    "api_posted": st.sampled_from([(True, True), (False, False), (1, True), (0, False)]),
    "git_repo": st.just((None, None)) | TEXTS.map(lambda text: (text, without_credentials(text))),
    "git_commit_source": same(st.sampled_from(["manual", "llm", "ci", None])),
    "status": STATUSES,
}
REQUIRED = ("run_id", "start_time", "agent_name", "job_type")
VALUES = {name: SPECIAL.get(name, optional(same(TEXTS))) for name in runs.STORED if name != "event_id"}
PAIRS = st.fixed_dictionaries(
    {name: VALUES[name] for name in REQUIRED},
    optional={name: values for name, values in VALUES.items() if name not in REQUIRED},
)
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(runs.STORED),
    **dict.fromkeys(("items_discovered", "items_succeeded", "items_failed", "items_skipped"), 0),
    "duration_ms": 0,
    "api_retry_count": 0,
    "api_posted": False,
    "status": "running",
}
SIMPLE = {
    **dict.fromkeys(("run_id", "agent_name", "job_type"), ("a", "a")),
    "start_time": ("2025-12-24T10:00:00Z", "2025-12-24T10:00:00.000000Z"),
}
NEVER_NULL = ("run_id", "agent_name", "job_type", "status")
numbers = itertools.count()


def lines(given_runs: list[dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps(run).encode() for run in given_runs)


@REPEATABLE
@example(pairs={name: SIMPLE[name] for name in REQUIRED}, event_name="a{b}/../c%2F%7B?#&+ \\;:@")
@example(pairs={**{name: SIMPLE[name] for name in REQUIRED}, "agent_name": ("\x1c", "\x1c")}, event_name="\x1f")
@given(pairs=PAIRS, event_name=NAMES)
def test_any_valid_run_comes_back_equal_by_every_way_in(
    wire: Wire, pairs: dict[str, tuple[Any, Any]], event_name: str
) -> None:
    given_fields = {name: pair[0] for name, pair in pairs.items()}
    expected = DEFAULTS | {name: pair[1] for name, pair in pairs.items()}
    number = next(numbers)
    made = [{"event_id": f"{event_name}{number}-{way}", **given_fields} for way in range(4)]
    before = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    wire.json("POST", "/api/v1/runs", made[0], 201)
    assert wire.json("POST", "/api/v1/runs/batch", [made[1]], 200)["inserted"] == 1
    assert wire.json("POST", "/api/v1/runs/batch", {"runs": [made[2]]}, 200)["inserted"] == 1
    status, text = wire.send("POST", b"/api/v1/runs/batch", lines([made[3]]), Content_Type="application/x-ndjson")
    assert (status, json.loads(text)["inserted"]) == (200, 1)
    after = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    for run in made:
        stored = wire.json("GET", f"/api/v1/runs/{quote(run['event_id'], safe='')}", status=200)
        for name in runs.STORED:
            if name == "event_id":
                assert stored[name] == run["event_id"]
            elif name == "created_at" and name not in given_fields:
                assert before <= stored[name] <= after
            else:
                assert stored[name] == expected[name], name
                assert type(stored[name]) is type(expected[name]), name
        assert before <= stored["updated_at"] <= after
        found = wire.json(
            "GET", f"/api/v1/runs?{urlencode({n: quoted(stored[n]) for n in NEVER_NULL})}&limit=1000", status=200
        )
        assert stored in found or len(found) == 1000


@REPEATABLE
@given(first=PAIRS, second=PAIRS, patch=st.fixed_dictionaries({}, optional={n: VALUES[n] for n in runs.PATCHABLE}))
def test_a_repeat_changes_nothing_and_a_patch_only_what_it_names(
    wire: Wire, first: dict[str, Any], second: dict[str, Any], patch: dict[str, tuple[Any, Any]]
) -> None:
    event_id = f"repeat-{next(numbers)}"
    path = f"/api/v1/runs/{event_id}"
    wire.json("POST", "/api/v1/runs", {"event_id": event_id, **{n: pair[0] for n, pair in first.items()}}, 201)
    stored = wire.json("GET", path, status=200)
    repeat = {"event_id": event_id, **{n: pair[0] for n, pair in second.items()}}
    assert wire.json("POST", "/api/v1/runs", repeat, 200)["status"] == "duplicate"
    assert wire.json("POST", "/api/v1/runs/batch", [repeat, repeat], 200)["duplicates"] == 2
    assert wire.json("GET", path, status=200) == stored
    changes = {name: pair for name, pair in patch.items() if pair[0] is not None}
    answer = wire.json("PATCH", path, {n: pair[0] for n, pair in patch.items()}, 200 if changes else 400)
    if changes:
        assert answer == {"event_id": event_id, "updated": True, "fields_updated": list(changes)}
    now = wire.json("GET", path, status=200)
    changed = {n: pair[1] for n, pair in changes.items()}
    if "labels" in changed:
        changed["labels"] = {**(stored["labels"] or {}), **changed["labels"]}
    assert now == {**stored, **changed, "updated_at": now["updated_at"]}
    assert (now["updated_at"] > stored["updated_at"]) == bool(changes)
    again = {"event_id": event_id, **{n: pair[0] for n, pair in reversed(first.items())}}
    assert "differs" not in str(wire.json("POST", "/api/v1/runs", again, 200).get("warnings"))


# --- Any interleaving stores each event once -----------------------------------------------------

REQUESTS = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), min_size=1, max_size=12)


@REPEATABLE
@given(requests=REQUESTS, pauses=st.lists(st.sampled_from([0, 0, 0, 0.0005, 0.002]), min_size=12, max_size=12))
async def test_any_interleaving_stores_each_event_once_and_says_created_once(
    api: Api, requests: list[list[int]], pauses: list[float]
) -> None:
    """A list of one event is a POST, a longer one a batch; all are sent at once, or nearly so."""
    prefix = f"example-{next(numbers)}"
    said: Counter[str] = Counter()
    inserted = 0

    async def send(events: list[int], pause: float) -> None:
        nonlocal inserted
        await asyncio.sleep(pause)
        made = [make_run(event_id=f"{prefix}-{event}", agent_name=prefix) for event in events]
        if len(made) == 1:
            answer = await api.call("POST", "/api/v1/runs", json=made[0])
            said[answer["status"]] += 1
            inserted += answer["status"] == "created"
        else:
            answer = await api.batch(made)
            assert answer["inserted"] + answer["duplicates"] == answer["total"] == len(events)
            assert answer["errors"] == []
            inserted += answer["inserted"]

    await asyncio.gather(*(send(events, pause) for events, pause in zip(requests, pauses, strict=False)))
    distinct = {f"{prefix}-{event}" for events in requests for event in events}
    stored = [run["event_id"] for run in await api.list(agent_name=prefix, limit=1000)]
    assert sorted(stored) == sorted(distinct)
    assert inserted == len(distinct)
    assert set(said) <= {"created", "duplicate"}
    assert (await api.get("/metrics"))["agents"][prefix] == len(distinct)
