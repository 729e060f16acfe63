"""Whatever an agent says of a run, the run is stored: what no field can take is left out, reported, and kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.client import Client, Run
from telemetryd.client.fields import CHANGES, FIELDS
from telemetryd.client.intake import MAX_NAME, REJECTED
from telemetryd.client.lines import Json, encode
from telemetryd.model import events, runs, values
from tests.client.conftest import MakeClient
from tests.client.test_values import CYCLE, DEEP, Float, Kind, Single, Unspeakable, Whole


class Recorder:
    """Keeps the lines, as the daemon would read them."""

    def __init__(self) -> None:
        self.lines: list[Json] = []
        self.rejected_fields: list[str] = []

    def write(self, line: Mapping[str, Any]) -> bool:
        self.lines.append(json.loads(encode(line)))
        return True

    def surroundings(self) -> Mapping[str, str]:
        return {"host": "box"}

    def begun(self, run: Run) -> None: ...

    def ended(self, run: Run) -> None: ...

    def rejected(self, field: str, why: str) -> None:
        self.rejected_fields.append(field)

    def failed(self) -> None:
        raise AssertionError("an error of the client itself")

    def after(self) -> None: ...

    def parsed(self) -> list[Json]:
        """Return every line as the daemon stores it; raises if the daemon refuses one or does not know a field."""
        done: list[Json] = []
        for line in self.lines:
            if "op" not in line:
                row, ignored, _ = runs.parse_run(line)
                done.append(dict(zip(runs.STORED, row, strict=True)))
            elif line["op"] == "update":
                changes, ignored, _ = runs.parse_patch(line["fields"])
                assert changes
                done.append(dict(changes))
            else:
                told = events.parse_events(line["event"])
                (row,), ignored = told.rows, told.ignored
                done.append(dict(zip(events.STORED, row, strict=True)))
            assert ignored == ()
        return done


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def client(make_client: MakeClient, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Client:
    made = make_client(send=False)
    for name in ("write", "rejected", "failed"):
        monkeypatch.setattr(made, name, getattr(recorder, name))
    return made


def begin(recorder: Recorder, agent_name: Any = "a", job_type: Any = "j", **fields: Any) -> Run:
    return Run(recorder, agent_name, job_type, None, fields)


def rejected_of(stored: Json) -> Any:
    return json.loads(stored["context_json"] or "{}").get(REJECTED, {})


LATIN = {"ascii": "x" * 256, "umlaut": "ä" * 300}

MISTAKES: list[tuple[str, Any]] = [
    ("items_discovered", "many"),
    ("items_discovered", -1),
    ("items_succeeded", 12.5),
    ("items_failed", True),
    ("items_failed", float("nan")),
    ("items_skipped", 2**63),
    ("items_skipped", [1]),
    ("duration_ms", -5),
    ("duration_ms", float("inf")),
    ("duration_ms", "soon"),
    ("start_time", "yesterday"),
    ("start_time", 5),
    ("created_at", 10**30),
    ("end_time", "2025-02-30T10:00:00Z"),
    ("end_time", True),
    ("git_commit_timestamp", ["2025"]),
    ("api_posted_at", {}),
    ("api_posted", "maybe"),
    ("api_posted", 2),
    ("api_retry_count", None.__class__),
    ("git_commit_source", "robot"),
    ("product", ["words"]),
    ("product", {"a": 1}),
    ("environment", True),
    ("website", object()),
    ("host", Unspeakable()),
    ("parent_run_id", {1, 2}),
    ("output_summary", {"done": 3}),
    ("error_details", ("a", "b")),
    ("git_branch", ["main"]),
    ("git_repo", ["https://user:s3cret@example.com"]),
    ("input_summary", range(3)),
]


def name_of_mistake(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(("field", "value"), MISTAKES, ids=name_of_mistake)
def test_a_wrong_field_costs_only_itself(client: Client, recorder: Recorder, field: str, value: Any) -> None:
    assert client.record({"agent_name": "a", "job_type": "j", "status": "success", "items_failed": 3, field: value})
    run = begin(recorder, **{"items_failed": 3, field: value}).start()
    run.update(**{"output_summary": "done", field: value})
    run.finish(**{"error_summary": "none", field: value})
    recorded, started, *_, ended = recorder.parsed()
    for stored in (recorded, started, ended) if field in CHANGES else (recorded, started):
        assert field in rejected_of(stored)
    assert (recorded["status"], ended["status"], ended["error_summary"]) == ("success", "success", "none")
    assert field == "items_failed" or (recorded["items_failed"], started["items_failed"]) == (3, 3)
    assert ended["end_time"]
    assert ended["duration_ms"] >= 0
    assert "s3cret" not in str(recorder.lines)


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("items_succeeded", Whole(5), 5),
        ("items_succeeded", Single(5), 5),
        ("items_succeeded", Decimal("5"), 5),
        ("items_succeeded", Fraction(10, 2), 5),
        ("items_succeeded", Float(5), 5),
        ("items_succeeded", 5.0, 5),
        ("items_succeeded", " 5 ", 5),
        ("items_succeeded", Kind.SECOND, 2),
        ("duration_ms", 12.5, 12),
        ("duration_ms", timedelta(seconds=1.5), 1500),
        ("end_time", datetime(2025, 12, 24, 10), "2025-12-24T10:00:00.000000Z"),
        ("end_time", datetime(2025, 12, 24, 10, tzinfo=timezone(timedelta(hours=1))), "2025-12-24T09:00:00.000000Z"),
        ("end_time", date(2025, 12, 24), "2025-12-24T00:00:00.000000Z"),
        ("end_time", "2025-12-24", "2025-12-24T00:00:00.000000Z"),
        ("end_time", " 2025-12-24T10:00:00Z\n", "2025-12-24T10:00:00.000000Z"),
        ("end_time", 1766570400.25, "2025-12-24T10:00:00.250000Z"),
        ("end_time", Whole(1766570400), "2025-12-24T10:00:00.000000Z"),
        ("git_commit_source", " LLM ", "llm"),
        ("output_summary", Path("/x"), "/x"),
        ("output_summary", 5, "5"),
        ("output_summary", b"bytes", "bytes"),
        ("output_summary", "a\0b\ud800", "a\N{REPLACEMENT CHARACTER}b?"),
        ("error_summary", ValueError("bad"), "ValueError: bad"),
        ("metrics_json", '{"a": 1}', '{"a":1}'),
        ("metrics_json", [1], '{"value":[1]}'),
        ("context_json", {"a": CYCLE}, '{"a":{"a":1,"again":"(dict that contains itself)"}}'),
        ("status", " Completed", "success"),
    ],
    ids=name_of_mistake,
)
def test_what_can_be_understood_is(client: Client, recorder: Recorder, field: str, value: Any, stored: Any) -> None:
    client.record({"agent_name": "a", "job_type": "j", field: value})
    begin(recorder).update(**{field: value})
    recorded, _, updated = recorder.parsed()
    assert (recorded[field], updated[field]) == (stored, stored)
    assert recorder.rejected_fields == []


@pytest.mark.parametrize("name", ["agent_name", "job_type", "event_id", "run_id"])
@pytest.mark.parametrize(
    "value", [None, "", " \t", "x" * 256, 5, ["a"], Unspeakable(), "a\0", True], ids=name_of_mistake
)
def test_a_run_whose_name_is_wrong_is_stored_under_another_and_says_so(
    client: Client, recorder: Recorder, name: str, value: Any
) -> None:
    given = {"agent_name": "a", "job_type": "j", name: value}
    event_id = client.record(given)
    run = Run(
        recorder, given["agent_name"], given["job_type"], None, {k: v for k, v in given.items() if k[-2:] == "id"}
    )
    run.finish()
    recorded, started, ended = recorder.parsed()
    assert recorded["event_id"] == event_id
    assert started["event_id"] == recorder.lines[2]["event_id"] == run.event_id
    if name.endswith("id") and value is None:
        assert recorder.rejected_fields == []  # it is made
    elif type(value) is int or value == "a\0":
        assert recorder.rejected_fields == []
        assert recorded[name] == ("5" if value == 5 else "a\N{REPLACEMENT CHARACTER}")
    else:
        assert name in rejected_of(recorded)
        assert name in rejected_of(started)
    if value == "x" * 256:
        assert recorded[name] == started[name], "the same again, so that a repeat is known"
        assert recorded[name].startswith("x" * 200)
        assert len(recorded[name]) <= MAX_NAME
    elif name.endswith(("name", "type")) and recorder.rejected_fields:
        assert recorded[name] == "unknown"
    assert ended["status"] == "success"


def test_a_run_that_ended_in_no_known_way_has_ended(client: Client, recorder: Recorder) -> None:
    client.record({"agent_name": "a", "job_type": "j", "status": "done"})
    begin(recorder, status="begun").finish("done")
    recorded, started, ended = recorder.parsed()
    assert [stored["status"] for stored in (recorded, started, ended)] == ["partial", "running", "partial"]
    assert rejected_of(recorded) == rejected_of(ended) == {"status": "done"}
    assert rejected_of(started) == {"status": "begun"}


def test_what_has_no_field_is_kept_by_record_as_by_a_run(client: Client, recorder: Recorder) -> None:
    odd: dict[Any, Any] = {"agent_owner": "me", "retries": Whole(3), 5: "x"}
    fetched = {"id": 7, "updated_at": "x", "commit_url": None, "repo_url": "x"}
    client.record({"agent_name": "a", "job_type": "j", **odd, **fetched})
    (recorded,) = recorder.parsed()
    assert json.loads(recorded["context_json"]) == {"agent_owner": "me", "5": "x"}
    assert json.loads(recorded["metrics_json"]) == {"retries": 3}


def test_figures_and_facts_stay_within_what_one_object_may_hold(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telemetryd.client.intake.MAX_VALUES", 1200)
    run = begin(recorder, context_json={"deep": DEEP})
    run.metrics(many=[0] * 600)
    run.metrics(more=[0] * 600, few=1)
    run.metrics(many=[0] * 600, again=2)
    run.metrics(many=0)
    run.metrics(more=[0] * 600)
    run.context(**{f"fact{number}": number for number in range(600)})
    run.event("e", {"many": [0] * 2000, "few": 1})
    *_, told, event = recorder.parsed()
    assert rejected_of(told)["more"] == "[0, 0, 0, 0, 0, 0, ...]"
    metrics = json.loads(recorder.parsed()[5]["metrics_json"])
    assert (len(metrics["more"]), metrics["few"], metrics["again"], metrics["many"]) == (600, 1, 2, 0)
    assert json.loads(event["payload"])["few"] == 1
    assert "many" in json.loads(event["payload"])[REJECTED]


def test_an_event_with_a_wrong_type_or_payload_is_stored(recorder: Recorder) -> None:
    run = begin(recorder).start()
    for kind, payload in ((None, None), ("x" * 300, [1]), (Kind.FAST, {1: Decimal("0.5")}), (["a"], CYCLE)):
        run.event(kind, payload, more=Whole(1))  # type: ignore[arg-type]
    _, *told = recorder.parsed()
    assert [event["event_type"][:7] for event in told] == ["unknown", "xxxxxxx", "fast", "unknown"]
    payloads = [json.loads(event["payload"]) for event in told]
    assert payloads[1]["value"] == [1]
    assert payloads[2] == {"1": 0.5, "more": 1}
    assert [REJECTED in payload for payload in payloads] == [True, True, False, True]


@pytest.mark.parametrize("asked", ["often", -1, float("nan"), float("inf"), object()], ids=name_of_mistake)
def test_a_heartbeat_that_is_no_number_is_a_wish_for_some(client: Client, asked: Any) -> None:
    assert client.run("a", "j", heartbeat=asked).heartbeat_s == 60.0
    assert client.run("a", "j", heartbeat=Decimal("2.5")).heartbeat_s == 2.5  # type: ignore[arg-type]
    assert client.run("a", "j", heartbeat=0).heartbeat_s is None


def test_what_is_given_in_another_way_than_asked_for_is_taken_all_the_same(recorder: Recorder) -> None:
    run: Any = begin(recorder)
    run.metrics({"tokens": 5}, cost=Float(0.5))
    run.context({"shard": 3})
    run.metrics([1])
    run.update({"output_summary": "done"}, error_summary="none")
    run.items(succeeded=1, done=2)
    run.event(event_type="checkpoint", file="a.md")
    run.event()
    told = recorder.parsed()
    assert json.loads(told[2]["metrics_json"]) == {"tokens": 5, "cost": 0.5}
    assert json.loads(told[3]["context_json"]) == {"shard": 3}
    assert json.loads(told[4]["metrics_json"])["value"] == [1]
    assert (told[5]["output_summary"], told[6]["error_summary"]) == ("done", "none")
    assert (told[7]["items_succeeded"], json.loads(told[7]["metrics_json"])["done"]) == (1, 2)
    assert [event["event_type"] for event in told[8:]] == ["checkpoint", "unknown"]


def test_fields_of_all_runs_are_taken_in_the_same_way(make_client: MakeClient, buffer: Path) -> None:
    client = make_client(send=False, fields={"environment": 5, "team": "x", "product": ["a"]})
    client.run("a", "j", host=None).start()  # type: ignore[arg-type]
    client.close()
    (line,) = [json.loads(line) for line in next(buffer.glob("*.ready")).read_bytes().splitlines()]
    assert (line["environment"], line["context_json"]) == ("5", {"team": "x", REJECTED: {"product": "['a']"}})
    assert "host" not in line


def test_the_log_names_each_field_once_a_minute_and_the_count_all(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(send=False)
    for _ in range(5):
        client.record({"agent_name": "a", "job_type": "j", "items_failed": "s3cret", "product": []})
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2
    assert "items_failed" in messages[0]
    assert "must be a whole number" in messages[0]
    assert "product" in messages[1]
    assert "s3cret" not in str(messages)
    assert client.stats()["rejected"] == 10


ODD = st.sampled_from(
    [Whole(5), Single(0.5), Unspeakable, CYCLE, DEEP, Kind.FAST, object(), Decimal("1e400"), timedelta(days=1), int,
     datetime.max, datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), date.min, datetime.now(UTC), "x" * 300,
     "\0", "\ud800", 2**64, -(2**70), float("nan"), "2025-12-24T24:00:00Z", "0001-01-01T00:00:00+14:00", b"\xff"]
).map(lambda value: value() if value is Unspeakable else value)  # fmt: skip
ANY = st.recursive(
    ODD | st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=5) | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=5), ANY, max_size=8)


@given(ARGUMENTS, ARGUMENTS, ANY, ANY)
def test_whatever_is_said_the_daemon_takes_every_line(
    first: dict[str, Any], then: dict[str, Any], one: Any, other: Any
) -> None:
    recorder = Recorder()
    agent_name: Any = first.get("agent_name")
    job_type: Any = first.get("job_type")
    run = Run(recorder, agent_name, job_type, None, first)
    run.start()
    run.event(one, other)
    run.metrics(**{"x": one, **{name: value for name, value in then.items() if name != "self"}})
    run._update(then)
    with_status = {name: value for name, value in then.items() if name not in ("self", "status")}
    run.finish(one, **with_status)
    assert recorder.parsed()[-1]["status"] in set(values.Status)


@given(ARGUMENTS)
def test_whatever_is_recorded_the_daemon_takes_the_line(given: dict[str, Any]) -> None:
    recorder = Recorder()
    client = Client.__new__(Client)
    client._surroundings = recorder  # type: ignore[assignment]
    recorder.fields = recorder.surroundings  # type: ignore[attr-defined]
    client.write, client.rejected, client.failed = (recorder.write, recorder.rejected, recorder.failed)  # type: ignore[method-assign]
    assert client.record(given) == recorder.parsed()[0]["event_id"]


def test_labels_join_and_a_wrong_one_costs_only_itself(recorder: Recorder) -> None:
    run = begin(recorder, labels={"team": "search", "Team": "x", "n" * 64: "x"}, attempt=2, trace_id="A" * 32)
    run.start()
    run.labels(shard=3, path=Path("/x"), long="x" * 256, blank=" ", list=["a"], flag=True)
    run.labels({"team": None, **{f"k{number}": "v" for number in range(40)}})
    run.finish(labels={"last": "one", "k0": "w"}, expected_by="2026-01-01T00:00:00Z")
    start, *_, end = recorder.parsed()
    assert (start["labels"], start["attempt"], start["trace_id"]) == ('{"team":"search"}', 2, None)
    said = json.loads(end["labels"])
    assert len(said) == 32
    assert (said["team"], said["shard"], said["path"], said["k0"]) == (None, "3", "/x", "w")
    assert {
        "labels.Team",
        "labels.long",
        "labels.blank",
        "labels.list",
        "labels.flag",
        "labels.k39",
        "labels.last",
    } < set(recorder.rejected_fields)
    assert end["expected_by"] == "2026-01-01T00:00:00.000000Z"
    assert rejected_of(end)["labels.Team"] == "x"


@pytest.mark.parametrize(("name", "value"), [("attempt", 0), ("attempt", -1), ("span_id", "0" * 16), ("trace_id", 5)])
def test_what_a_later_field_cannot_hold_is_left_out(recorder: Recorder, name: str, value: Any) -> None:
    begin(recorder, **{name: value}).start()
    [start] = recorder.parsed()
    assert start[name] is None
    assert recorder.rejected_fields == [name]
