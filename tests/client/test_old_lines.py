"""Lines of the replaced client's files (3.x), and what becomes of them on the way to the daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from telemetryd.client.batch import Batch
from telemetryd.client.counters import Counters
from telemetryd.client.delivery import Delivery
from telemetryd.client.lines import encode
from telemetryd.client.old_lines import translate
from telemetryd.client.transport import Answer

RAW = Path(__file__).parents[1] / "old_files" / "events_20261130.ndjson"


def old_run(**fields: Any) -> bytes:
    """A line of 3.x: every field of a run is there, mostly null."""
    known = json.loads(RAW.read_text().splitlines()[0])
    nothing = {name: None if isinstance(value, str) or value is None else value for name, value in known.items()}
    usual = {
        "event_id": "e-1", "run_id": "r-1", "agent_name": "a", "job_type": "j", "record_type": "run",
        "start_time": "2026-11-30T04:49:13.512469+00:00", "status": "running",
    }  # fmt: skip
    return json.dumps({**nothing, **usual, **fields}).encode()


def old_event(**fields: Any) -> bytes:
    usual = {"run_id": "r-1", "event_type": "tick", "timestamp": "2026-11-30T05:00:00+00:00", "payload_json": None}
    return json.dumps({**usual, "id": None, "record_type": "event", **fields}).encode()


def ours(*lines: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in translate([*lines]).lines]


def test_nulls_are_not_given_texts_are_json_and_the_owner_is_kept() -> None:
    (run,) = ours(old_run(metrics_json='{"k": 1}', context_json="", agent_owner="team", items_failed=None))
    assert run == {
        "event_id": "e-1", "run_id": "r-1", "agent_name": "a", "job_type": "j", "status": "running",
        "start_time": "2026-11-30T04:49:13.512469Z", "items_discovered": 0, "items_succeeded": 0, "items_skipped": 0,
        "duration_ms": 0, "api_posted": False, "api_retry_count": 0, "metrics_json": {"k": 1},
        "context_json": {"agent_owner": "team"},
    }  # fmt: skip
    (run,) = ours(old_run(metrics_json="null", context_json=" null ", agent_owner=None))
    assert not run.keys() & {"metrics_json", "context_json"}
    (run,) = ours(old_run(metrics_json="[1, 2]", context_json="no JSON"))
    assert (run["metrics_json"], run["context_json"]) == ({"value": [1, 2]}, {"value": "no JSON"})


def test_a_run_whose_start_is_no_time_begins_at_another_of_its_times() -> None:
    """Or it is refused with that start; the reason was that there is none."""
    moment = "2026-11-30T05:00:00.000000Z"
    (run,) = ours(old_run(start_time="gestern", created_at="vorher", updated_at=moment))
    assert run["start_time"] == moment
    assert run["context_json"]["telemetryd.rejected"]["start_time"] == "gestern"
    (run,) = ours(old_run(start_time="gestern"))
    assert run["start_time"] == "gestern"
    later = old_run(start_time="gestern", status="success", updated_at="2026-11-30T06:00:00+00:00")
    assert ours(old_run(start_time=moment), later)[0]["start_time"] == moment


def test_a_line_is_known_by_any_name_that_only_3x_wrote() -> None:
    whole = json.loads(old_run(metrics_json='{"k": 1}'))
    for name in ("record_type", "schema_version", "agent_owner"):
        others = {"record_type", "schema_version", "agent_owner"} - {name}
        line = json.dumps({key: value for key, value in whole.items() if key not in others}).encode()
        assert ours(line)[0]["metrics_json"] == {"k": 1}, name


def test_a_second_line_that_ends_the_run_is_a_change_and_the_last_word_counts() -> None:
    start = old_run(created_at="2026-11-30T04:49:13+00:00", metrics_json='{"k": 1}', product="words")
    end = old_run(status="failed", items_discovered=9, metrics_json='{"t": 2}', created_at="2026-11-30T06:00:00+00:00")
    for lines in ((start, end), (end, start)):
        run, *changes = ours(*lines)
        assert (run["status"], run["items_discovered"], run["metrics_json"]) == ("failure", 9, {"t": 2})
        assert run["product"] == "words"
        assert run["created_at"] == (
            "2026-11-30T04:49:13.000000Z" if lines[0] == start else "2026-11-30T06:00:00.000000Z"
        )
        assert changes
        assert all((change["op"], change["event_id"]) == ("update", "e-1") for change in changes)
        assert {(change["fields"]["status"], "items_discovered" in change["fields"]) for change in changes} == {
            ("failure", False)
        }


def test_lines_of_ours_stay_as_they_are_and_so_does_what_lacks_a_name() -> None:
    lines = [
        b'{"event_id":"e","run_id":"r"}', b'{"op":"update","event_id":"e","fields":{"record_type":1}}', b"half a li",
        b'{"event_id":"e","error_summary":"\\"schema_version\\""}', old_run(event_id=None), old_event(run_id=None),
    ]  # fmt: skip
    assert translate(lines).lines == lines


def test_events_find_their_run_and_equal_ones_are_told_apart_but_a_repeat_is_known() -> None:
    run, first, second, other, nobodys = ours(
        old_run(), old_event(), old_event(), old_event(payload_json='{"x": 1}'), old_event(run_id="r-2")
    )
    assert run["event_id"] == first["event_id"] == other["event_id"] == "e-1"
    assert (nobodys["op"], nobodys["run_id"], "event_id" in nobodys) == ("event", "r-2", False)
    assert other["event"]["payload"] == {"x": 1}
    keys = [line["event"]["event_key"] for line in (first, second, other, nobodys)]
    assert len({*keys}) == 4
    again = [line["event"]["event_key"] for line in ours(old_event(), old_event(), old_event(payload_json='{"x":1}'))]
    assert again == keys[:3]


class Daemon:
    """Answers what is put in, and notes what it is asked."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, Any]] = []

    def request(self, method: str, path: str, body: bytes | None = None, media_type: str = "") -> Answer:
        lines = [orjson.loads(line) for line in (body or b"").splitlines()]
        self.asked.append((method, path, lines))
        status, answer = self.answers.pop(0)
        return Answer(status, {"telemetry-server": "telemetryd/4"}, answer)


def sent(daemon: Daemon, *lines: bytes) -> tuple[Counters, list[tuple[list[bytes], int | None, object]]]:
    counters, dead = Counters(), []
    delivery = Delivery(daemon, lambda lines, status, reason: dead.append((lines, status, reason)), counters)
    delivery.send(Batch.of([*lines]))
    assert not daemon.answers
    return counters, dead


def batch_answer(inserted: int, duplicates: int) -> tuple[int, Any]:
    return 200, {"inserted": inserted, "duplicates": duplicates, "errors": [], "total": inserted + duplicates}


def test_the_end_of_a_run_that_is_known_is_a_patch() -> None:
    daemon = Daemon(batch_answer(0, 1), (200, {"updated": True}))
    counters, dead = sent(daemon, old_run(status="success", error_details="none"))
    assert (counters.sent, counters.duplicates, dead) == (1, 1, [])
    method, path, ((fields),) = daemon.asked[1]
    assert (method, path) == ("PATCH", "/api/v1/runs/e-1")
    assert fields == {
        "status": "success", "error_details": "none", "items_succeeded": 0, "items_failed": 0, "items_skipped": 0,
        "duration_ms": 0,
    }  # fmt: skip


def test_what_is_refused_is_the_old_line_once() -> None:
    refusal = {"errors": ["no"], "error_details": [{"index": 0, "event_id": "e-1", "detail": "no"}]}
    refused = (200, {"inserted": 0, "duplicates": 0, "total": 1, **refusal})
    daemon = Daemon(refused, refused, (404, {"detail": "Run not found: e-1"}))
    line = old_run(status="success")
    counters, dead = sent(daemon, line)
    assert [(lines, status) for lines, status, _ in dead] == [([line], 422)]
    assert (counters.sent, counters.dead) == (1, 1)


def test_a_change_of_a_known_run_that_is_refused_is_not_lost() -> None:
    """It had joined the start of its run, so its line was forgotten, and counted as a change."""
    start = encode({**dict.fromkeys(("run_id", "agent_name", "job_type"), "x"), "event_id": "e-1"}).rstrip()
    update = encode({"op": "update", "event_id": "e-1", "fields": {"items_failed": 1}}).rstrip()
    counters, dead = sent(Daemon(batch_answer(0, 1), (404, {"detail": "Run not found: e-1"})), start, update)
    assert [(lines, status) for lines, status, _ in dead] == [([update], 404)]
    assert (counters.sent, counters.duplicates, counters.dead, counters.changes) == (2, 1, 1, 0)


def test_equal_lines_that_are_refused_count_as_often_as_they_stand_there() -> None:
    """Three equal events of a run that nobody knows were 1 line refused, and 2 changes."""
    line = old_event()
    counters, dead = sent(Daemon((200, [])), line, line, line)
    assert [lines for lines, _, _ in dead] == [[line] * 3]
    assert (counters.sent, counters.dead, counters.changes) == (3, 3, 0)


@pytest.mark.parametrize(
    ("timestamp", "event_id"),
    [("2026-11-30T05:00:00+00:00", "first"), ("2026-11-30T07:00:00", "second"), ("2026-11-29T00:00:00Z", "first")],
)
def test_an_event_of_a_run_of_another_file_finds_it_by_its_run_id_and_its_time(timestamp: str, event_id: str) -> None:
    found = [
        {"event_id": "second", "start_time": "2026-11-30T06:00:00.000000Z"},
        {"event_id": "first", "start_time": "2026-11-30T04:00:00.000000Z"},
    ]
    daemon = Daemon((200, found), (201, {"inserted": 1, "duplicates": 0}))
    counters, dead = sent(daemon, old_event(run_id="a,b\\c", timestamp=timestamp))
    assert daemon.asked[0][:2] == (
        "GET", "/api/v1/runs?run_id=a%5C%2Cb%5C%5Cc&limit=1000&fields=event_id,start_time",
    )  # fmt: skip
    assert daemon.asked[1][1] == f"/api/v1/runs/{event_id}/events"
    assert (counters.sent, dead) == (1, [])


@pytest.mark.parametrize("answer", [(200, []), (400, {"detail": "Invalid run_id"})])
def test_an_event_of_no_run_is_refused(answer: tuple[int, Any]) -> None:
    line = old_event()
    counters, dead = sent(Daemon(answer), line)
    assert [(lines, status) for lines, status, _ in dead] == [([line], 404)]
    assert counters.dead == 1
