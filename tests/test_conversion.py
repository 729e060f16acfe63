from __future__ import annotations

import uuid
from typing import Any

import pytest

from telemetryd.engine.sqlite.tools.conversion import EPOCH, Converter, EventConverter, RawValue
from telemetryd.model.runs import COLUMNS

DAY = "2025-01-01T00:00:00.000000Z"
GOOD: dict[str, Any] = {
    "event_id": "e",
    "run_id": "r",
    "created_at": DAY,
    "updated_at": DAY,
    "start_time": DAY,
    "agent_name": "a",
    "job_type": "j",
    "status": "success",
    "items_failed": 0,
    "api_posted": 0,
}


def converted(**given: Any) -> tuple[dict[str, Any], dict[str, Any], Converter]:
    row = {**GOOD, **given}
    converter = Converter(list(row))
    part = converter.convert([7], [list(row.values())])
    (values,), (originals,) = part.rows(), part.originals
    return dict(zip(COLUMNS, values, strict=True)), {o.field: (o.reason, o.value) for o in originals}, converter


def test_a_good_row_stays_as_it_is() -> None:
    values, originals, converter = converted()
    assert {name: values[name] for name in GOOD} == GOOD
    assert values["id"] == 7
    assert (originals, converter.tally.changed, converter.tally.replaced) == ({}, {}, {})


@pytest.mark.parametrize(
    ("field", "raw", "value", "kind"),
    [
        ("status", " Failed ", "failure", " Failed  to failure"),
        ("status", None, "running", "NULL to running"),
        ("created_at", "2025-01-01 00:00:00", DAY, "to UTC, canonical form"),
        ("created_at", "2025-01-01", DAY, "to UTC, canonical form"),
        ("start_time", "2025-01-01T02:00:00+02:00", DAY, "to UTC, canonical form"),
        ("end_time", "", None, "empty to NULL"),
        ("items_failed", None, 0, "NULL to 0"),
        ("items_failed", 3.0, 3, "real to integer"),
        ("items_failed", " 12 ", 12, "text to integer"),
        ("job_type", None, "unknown", "NULL to unknown"),
        ("agent_name", 5, "5", "number to text"),
        ("host", b"machine", "machine", "blob to text"),
        ("metrics_json", "[1]", '{"value":[1]}', "put into an object"),
        ("metrics_json", "null", None, "JSON null to NULL"),
        ("context_json", "", None, "empty to NULL"),
        ("git_commit_source", "LLM", "llm", "case and blanks"),
        ("labels", '{"team": "search", "env": "prod"}', '{"env":"prod","team":"search"}', "canonical form"),
        ("labels", b"{}", None, "canonical form"),
    ],
)
def test_what_has_a_form_of_today_is_normalised(field: str, raw: object, value: object, kind: str) -> None:
    values, originals, converter = converted(**{field: raw})
    assert values[field] == value
    assert originals == {}
    assert converter.tally.changed == {(field, kind): 1}


@pytest.mark.parametrize(
    ("field", "raw", "value"),
    [
        ("status", "exploded", "partial"),
        ("status", 5, "partial"),
        ("end_time", "yesterday", None),
        ("end_time", 1735725600, None),
        ("created_at", "2025-13-45 00:00:00", DAY),
        ("items_failed", -1, 0),
        ("items_failed", 1.5, 0),
        ("items_failed", float("inf"), 0),
        ("items_failed", 1e30, 0),
        ("items_failed", "٣", 0),
        ("items_failed", "9" * 5000, 0),
        ("items_failed", "9" * 19, 0),
        ("api_posted", 2, 0),
        ("metrics_json", "{", None),
        ("metrics_json", '{"a": NaN}', None),
        ("metrics_json", '{"a": 1e999}', None),
        ("context_json", "-1e999", None),
        ("metrics_json", '{"a": ' + "[" * 150 + "]" * 150 + "}", None),
        ("metrics_json", '{"a": "\\u0000"}', None),
        ("metrics_json", '{"a": 18446744073709551616}', None),
        ("metrics_json", '{"a": ' + "9" * 5000 + "}", None),
        ("host", b"\xff", "\ufffd"),
        ("product", "p\0q", "p\ufffdq"),
        ("agent_name", b"a\0", "a\ufffd"),
        ("git_commit_source", "robot", None),
        ("labels", '{"Team": "x"}', None),
        ("labels", "[]", None),
        ("labels", 5, None),
        ("attempt", 0, None),
        ("attempt", "2", None),
        ("trace_id", "A" * 32, None),
        ("span_id", b"\xff", None),
        ("expected_by", "soon", None),
    ],
)
def test_what_has_none_is_replaced_and_kept(field: str, raw: object, value: object) -> None:
    values, originals, converter = converted(**{field: raw})
    assert values[field] == value
    assert originals[field][1] == raw
    assert sum(converter.tally.replaced.values()) == 1


@pytest.mark.parametrize("raw", ["", "x" * 256, "\0nul", "x\0y", b"\xff\xfe"])
def test_an_event_id_that_cannot_stay_becomes_a_uuid(raw: object) -> None:
    values, originals, _ = converted(event_id=raw)
    assert str(uuid.UUID(values["event_id"])) == values["event_id"]
    assert originals["event_id"][1] == raw


def test_equal_values_of_different_types_are_told_apart() -> None:
    raw: list[RawValue] = [1, 1.0, 0.0, -0.0, "1", None]
    part = Converter(["duration_ms", "host"]).convert(range(6), [[value, value] for value in raw])
    found = {name: list(values) for name, values in zip(COLUMNS, part.columns, strict=True)}
    assert found["duration_ms"] == [1, 1, 0, 0, 1, 0]
    assert found["host"] == ["1", "1.0", "0.0", "-0.0", "1", None]
    assert part.kept == set()


def test_rows_that_need_it_are_changed_and_the_other_fields_are_known_to_be_as_they_were() -> None:
    good: dict[str, Any] = {**GOOD, "end_time": None, "agent_owner": "me"}
    converter = Converter(list(good))
    rows = [{**good, "event_id": ""}, {**good, "end_time": "never"}, {**good, "event_id": ""}]
    part = converter.convert([3, 5, 8], [[*row.values()] for row in rows])
    first, second, third = (dict(zip(COLUMNS, row, strict=True)) for row in part.rows())
    assert len({first["event_id"], second["event_id"], third["event_id"]}) == 3  # no UUID is used twice
    assert part.kept == set(GOOD) - {"event_id"}
    assert [row[:2] for row in part.side_rows()] == [
        (3, "event_id"),
        (3, "agent_owner"),
        (5, "end_time"),
        (5, "agent_owner"),
        (8, "event_id"),
        (8, "agent_owner"),
    ]
    assert converter.tally.replaced["agent_owner", "no such field any more"] == 3


def test_without_any_time_the_epoch_is_better_than_no_row() -> None:
    values, originals, _ = converted(created_at=None, updated_at=None, start_time="never")
    assert values["created_at"] == values["start_time"] == values["updated_at"] == EPOCH
    assert originals == {"start_time": ("not a timestamp", "never")}


def test_a_field_that_is_gone_is_kept_unless_it_is_null() -> None:
    _, originals, _ = converted(agent_owner="me", schema_version=None)
    assert originals == {"agent_owner": ("no such field any more", "me")}


def test_why_a_json_object_cannot_be_stored_is_reported() -> None:
    _, originals, _ = converted(metrics_json='{"a": 1e999}')
    assert originals["metrics_json"][0] == "JSON object holds a number that is not finite"


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('{"a": 1e999}', r'{"value":"{\"a\": 1e999}"}'),
        ("1e999", '{"value":"1e999"}'),
        ('["\\u0000"]', r'{"value":"[\"\\u0000\"]"}'),
    ],
)
def test_a_payload_that_could_not_be_posted_is_kept_as_text(raw: str, kept: str) -> None:
    event = EventConverter(["run_id", "event_type", "payload"]).convert(1, ["r", "step", raw])
    assert event is not None
    assert event["payload"] == kept


def test_an_event_of_a_run_with_a_nul_in_its_name_stays_with_it() -> None:
    event = EventConverter(["run_id", "event_type", "payload"]).convert(1, ["r\0", "s\0", "p\0q"])
    assert event is not None
    assert event["run_id"] == converted(run_id="r\0")[0]["run_id"]
    assert (event["event_type"], event["payload"]) == ("s\ufffd", '{"value":"p\ufffdq"}')
