from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.client.lines import after_of, encode, plan, read_object, repair
from telemetryd.model.bodies import validate
from telemetryd.model.runs import NewRun

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_whatever_is_recorded_becomes_one_line_that_the_daemon_takes(value: object) -> None:
    line = encode({"event_id": "e", "run_id": "r", "start_time": "2025-12-24T10:00:00Z", "agent_name": "a",
                   "job_type": "j", "metrics_json": {"value": value}})  # fmt: skip
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    validate(NewRun, json.loads(line))


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("a\0b", "a�b"),
        ("\ud800", "?"),
        (2**70, str(2**70)),
        (math.nan, None),
        ({1: {2: 3}}, {"1": {"2": 3}}),
        (Path("/x"), "/x"),
        (datetime(2025, 12, 24, tzinfo=UTC), "2025-12-24T00:00:00+00:00"),
        ({"s"}, ["s"]),
    ],
)
def test_what_json_cannot_hold_becomes_the_nearest_that_it_can(value: object, stored: object) -> None:
    read = json.loads(encode({"value": value}))["value"]
    assert read == stored


def test_a_value_that_holds_itself_does_no_harm() -> None:
    value: dict[str, Any] = {}
    value["again"] = value
    assert read_object(encode(value)) is not None


RUN = st.builds(
    lambda number, more: {"event_id": f"e{number}", "metrics_json": more},
    st.integers(0, 99),
    st.dictionaries(st.sampled_from(["event_id", "op", "x"]), st.text(max_size=10) | st.just({"event_id": "in"})),
)


@given(RUN, RUN, st.integers(min_value=1))
def test_the_line_behind_a_torn_one_is_found_whole(torn: Any, whole: Any, cut: int) -> None:
    half = encode(torn).rstrip()
    half = half[: cut % len(half)]
    if half:
        assert repair(half + encode(whole).rstrip()) == encode(whole).rstrip()


def test_a_torn_line_alone_gives_nothing() -> None:
    line = encode({"event_id": "a", "metrics_json": {"event_id": {}, "op": [1]}}).rstrip()
    assert [repair(line[:length]) for length in range(1, len(line) + 1)] == [None] * len(line)


def update(event_id: str, **fields: object) -> bytes:
    return encode({"op": "update", "event_id": event_id, "fields": fields}).rstrip()


def event(event_id: str, key: str) -> bytes:
    return encode({"op": "event", "event_id": event_id, "event": {"event_key": key, "event_type": "t"}}).rstrip()


def start(event_id: str) -> bytes:
    return encode({"event_id": event_id, "status": "running"}).rstrip()


def test_changes_join_the_start_that_is_sent_with_them_and_else_each_other() -> None:
    lines = [
        start("a"),
        update("a", items_failed=1),
        update("b", items_failed=1),
        event("a", "1"),
        update("a", status="success"),
    ]
    lines += [update("b", status="failure", items_failed=2), event("b", "2"), event("a", "3")]
    wanted = plan(lines)
    (run,) = wanted.runs
    assert json.loads(run.body) == {"event_id": "a", "status": "success", "items_failed": 1}
    assert run.changes == {"items_failed": 1, "status": "success"}
    assert run.lines == [lines[0], lines[1], lines[4]]
    assert wanted.updates["b"].fields == {"items_failed": 2, "status": "failure"}
    assert [item.event["event_key"] for item in wanted.events["a"]] == ["1", "3"]
    assert not wanted.unreadable


def test_every_line_is_accounted_for() -> None:
    lines = [
        start("a"),
        b"garbage",
        update("a", x=1),
        b'{"op":"update"}',
        b'{"op":"event","event_id":"a"}',
        event("a", "1"),
    ]
    lines += [b'{"op":"dance","event_id":"a"}', encode({"op": "update", "event_id": "a", "fields": 5}).rstrip()]
    wanted = plan(lines)
    found = [line for run in wanted.runs for line in run.lines] + wanted.unreadable
    found += [item.line for items in wanted.events.values() for item in items]
    found += [line for item in wanted.updates.values() for line in item.lines]
    assert sorted(found) == sorted(lines)


def test_only_lines_of_forked_processes_wait_for_others() -> None:
    assert after_of(start("a")) is None
    assert after_of(update("a", x='"after":[')) is None
    waiting = encode({"op": "update", "event_id": "a", "fields": {}, "after": ("stream", 1, 20)}).rstrip()
    assert after_of(waiting) == ("stream", 1, 20)
