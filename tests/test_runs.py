from __future__ import annotations

import ast
import inspect
import json
import math
import sqlite3
import struct
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.engine.sqlite.tools import migrate
from telemetryd.errors import InvalidBodyError
from telemetryd.model import runs
from telemetryd.model.bodies import parse_json
from telemetryd.model.runs import parse_commit, parse_patch, parse_run
from telemetryd.model.values import canonical_status, canonical_timestamp
from tests.conftest import make_run


def words(text: str) -> list[str]:
    return text.split()


# The layout that the guide calls "all 42 database fields", by name.
GUIDE_FIELDS = words("""
    id event_id run_id created_at updated_at start_time end_time agent_name job_type status
    product product_family platform subdomain website website_section item_name
    items_discovered items_succeeded items_failed items_skipped duration_ms
    input_summary output_summary source_ref target_ref error_summary error_details
    git_repo git_branch git_commit_hash git_run_tag host environment trigger_type
    metrics_json context_json api_posted api_posted_at api_retry_count insight_id parent_run_id
""")
COMMIT_FIELDS = ["git_commit_source", "git_commit_author", "git_commit_timestamp"]
LATER_FIELDS = words("labels attempt retry_of conversation_id trace_id span_id expected_by")
# From the guide's PATCH section, and later additions.
PATCH_FIELDS = words("""
    status end_time duration_ms error_summary error_details output_summary items_succeeded items_failed items_skipped
    metrics_json context_json git_commit_source git_commit_author git_commit_timestamp labels expected_by
""")
INTEGERS = words("""
    id items_discovered items_succeeded items_failed items_skipped duration_ms api_posted api_retry_count
""")
OTHER_INTEGERS = ["attempt", "body_digest"]
"""Those that may be null."""
REQUIRED = words("event_id run_id start_time agent_name job_type")
ALWAYS_SET = [*REQUIRED, "created_at", "updated_at", "status", *INTEGERS]


def errors_of(run: object) -> list[tuple[list[str | int], str]]:
    with pytest.raises(InvalidBodyError) as caught:
        parse_run(run)
    assert all(item["msg"] and len(item["msg"]) < 400 for item in caught.value.errors)
    return [(item["loc"], item["type"]) for item in caught.value.errors]


def stored(**fields: Any) -> dict[str, Any]:
    return dict(zip(runs.STORED, parse_run(make_run(**fields)).row, strict=True))


# --- The definition ------------------------------------------------------------------------------


def test_a_run_has_the_guides_42_fields_and_later_ones_after_them() -> None:
    assert len(GUIDE_FIELDS) == 42
    assert list(runs.COLUMNS) == GUIDE_FIELDS + COMMIT_FIELDS + LATER_FIELDS
    assert [name for name, uses in Counter(runs.COLUMNS).items() if uses > 1] == []


def test_each_field_is_written_down_once_in_the_definition() -> None:
    """Pydantic and SQL would both take the last of two silently."""
    (definition,) = ast.parse(inspect.getsource(runs.Run)).body
    assert isinstance(definition, ast.ClassDef)
    names = [line.target.id for line in definition.body if isinstance(line, ast.AnnAssign)]  # type: ignore[union-attr]
    assert names == list(runs.COLUMNS)


def test_what_may_be_done_with_each_field() -> None:
    assert set(runs.COLUMNS) - set(runs.STORED) == {"id", "updated_at"}
    assert set(runs.PATCHABLE) == set(PATCH_FIELDS)
    assert {"agent_name", "job_type", "status", "host", "environment"} < set(runs.FILTERS)
    assert [name for name, field in runs.NewRun.model_fields.items() if field.is_required()] == REQUIRED
    assert all(field.description for field in runs.Run.model_fields.values())


def test_a_fresh_database_has_exactly_these_columns() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate.create(connection, "")
    columns = connection.execute("PRAGMA table_info(agent_runs)").fetchall()
    connection.close()
    assert [name for _, name, *_ in columns] == list(runs.TABLE)
    for _, name, affinity, is_not_null, default, key in columns:
        assert affinity == ("INTEGER" if name in (*INTEGERS, *OTHER_INTEGERS) else "TEXT"), name
        assert bool(is_not_null or key) == (name in ALWAYS_SET), name
        assert bool(key) == (name == "id")
        if name in INTEGERS and name != "id":
            assert default == "0"
        elif name == "status":
            assert default == "'running'"
        else:
            assert default is None, name


def test_the_database_takes_the_defaults_of_the_definition() -> None:
    """A run with the required fields only gets the same values from the model as from the table."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate.create(connection, "")
    row = stored()
    names = [*REQUIRED, "created_at", "updated_at"]
    connection.execute(
        f"INSERT INTO agent_runs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
        [row.get(name, "2025-12-24T10:00:00.000000Z") for name in names],
    )
    made = dict(zip(runs.TABLE, connection.execute("SELECT * FROM agent_runs").fetchone(), strict=True))
    connection.close()
    assert {name: made[name] for name in runs.STORED if name != "created_at"} == {
        name: value for name, value in row.items() if name != "created_at"
    }


# --- The digest of a body ------------------------------------------------------------------------

BODIES = st.fixed_dictionaries(
    {},
    optional={
        "host": st.sampled_from(["a", "b", "", None]),
        "status": st.sampled_from(["running", "success", "failed", " FAILURE "]),
        "items_failed": st.sampled_from([0, 1, 1.0, "1", None]),
        "metrics_json": st.none()
        | st.dictionaries(st.sampled_from("abc"), st.integers(0, 2) | st.just([{"z": 1, "y": 2}])),
        "labels": st.none() | st.dictionaries(st.sampled_from("abc"), st.sampled_from(["x", "y", None])),
        "attempt": st.sampled_from([None, 1, "1", 2]),
        "created_at": st.sampled_from([None, "2025-12-24T10:00:00Z", "2025-12-24T11:00:00+01:00"]),
        "unknown": st.integers(),
    },
)


def shuffled(value: Any) -> Any:
    """The same JSON with its keys in the opposite order."""
    return {key: shuffled(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


@given(BODIES, BODIES)
def test_two_bodies_have_one_digest_if_and_only_if_they_say_the_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    run = make_run()
    first, second = stored(**{**run, **one}), stored(**{**run, **two})
    says_the_same = all(
        json.loads(first[name] or "null") == json.loads(second[name] or "null")
        if name in ("metrics_json", "labels")
        else first[name] == second[name]
        for name in first
    )
    digests = [runs.digest(tuple(values.values())) for values in (first, second, stored(**shuffled({**run, **one})))]
    assert digests[0] == digests[2]
    assert (digests[0] == digests[1]) == says_the_same
    assert -(2**63) <= digests[0] < 2**63


def test_a_digest_stays_what_it_is_when_fields_are_added() -> None:
    """It is stored for years, and later versions have more fields at the end."""
    row = parse_run(make_run(event_id="e", run_id="r", host="h", start_time="2025-12-24T10:00:00Z")).row
    assert runs.digest(row) == runs.digest((*row, None)) == 7448124592450257592


# --- Timestamps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("2025-12-24T10:00:00Z", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24T10:00:00z", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24t10:00:00Z", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24 10:00:00Z", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24T10:00:00", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24 10:00:00", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24 10:00:00.1234567", "2025-12-24T10:00:00.123456Z"),
        ("2025-12-24T10:00", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24T10:00:00.5Z", "2025-12-24T10:00:00.500000Z"),
        ("2025-12-24T10:00:00,5Z", "2025-12-24T10:00:00.500000Z"),
        ("2025-12-24T10:00:00.123Z", "2025-12-24T10:00:00.123000Z"),
        ("2025-12-24T10:00:00.123456Z", "2025-12-24T10:00:00.123456Z"),
        ("2025-12-24T10:00:00.123456789Z", "2025-12-24T10:00:00.123456Z"),
        ("2025-12-24T10:00:00.9999999Z", "2025-12-24T10:00:00.999999Z"),
        ("2025-12-24T10:00:00+00:00", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24T10:00:00-00:00", "2025-12-24T10:00:00.000000Z"),
        ("2025-12-24T10:00:00+05:30", "2025-12-24T04:30:00.000000Z"),
        ("2025-12-24T10:00:00+0530", "2025-12-24T04:30:00.000000Z"),
        ("2025-12-24T10:00:00+05", "2025-12-24T05:00:00.000000Z"),
        ("2025-12-24T20:00:00-08:00", "2025-12-25T04:00:00.000000Z"),
        ("2025-12-24T10:00:00.123456+00:00", "2025-12-24T10:00:00.123456Z"),  # datetime.now(UTC).isoformat()
        ("20251224T100000Z", "2025-12-24T10:00:00.000000Z"),
        ("2025-W52-3T10:00:00Z", "2025-12-24T10:00:00.000000Z"),
        ("2024-02-29T10:00:00Z", "2024-02-29T10:00:00.000000Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000000Z"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_a_timestamp_is_stored_in_one_form(text: str, canonical: str) -> None:
    assert canonical_timestamp(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        *words("""
    yesterday now 2025 2025-12 2025-12-24 2025-12-24T 2025-12-24TZ 1766570400 1766570400.5 10:00:00
    2025-13-01T10:00:00Z 2025-02-30T10:00:00Z 2025-02-29T10:00:00Z 2025-00-10T10:00:00Z 2025-12-00T10:00:00Z
    2025-12-24T24:00:00Z 2025-12-24T10:60:00Z 2025-12-24T10:00:60Z 2025-12-24T10:00:61Z 2025-12-24T10:00:00.Z
    2025-12-24T10:00:00+24:00 2025-12-24T10:00:00+99:99 2025-12-24T10:00:00+5 2025-12-24T10:00:00+05:30:10
    2025-12-24T10:00:00ZZ 2025-12-24T10:00:00Zjunk x2025-12-24T10:00:00Z 2025-12-24T1:00:00Z 25-12-24T10:00:00Z
    0000-01-01T00:00:00Z 10000-01-01T00:00:00Z -2025-12-24T10:00:00Z
    0001-01-01T00:00:00+00:01 9999-12-31T23:59:59-00:01 ２０２５-12-24T10:00:00Z 2025-W54-1T10:00:00Z
    """),
        "",
        " ",
        "2025-12-24T10:00:00Z\n",
        " 2025-12-24T10:00:00Z",
        "2025-12-24T10:00:00 +00:00",
        "2025-12-24T10:00:00Z\0",
    ],
)
def test_what_is_no_timestamp_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Timestamp must be an ISO 8601 date and time"):
        canonical_timestamp(text)


OFFSETS = st.integers(-23 * 60 - 59, 23 * 60 + 59).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=OFFSETS)


@given(MOMENTS, MOMENTS)
def test_the_order_of_the_texts_is_the_order_of_the_moments(one: datetime, other: datetime) -> None:
    first, second = canonical_timestamp(one.isoformat()), canonical_timestamp(other.isoformat())
    assert (first < second) == (one < other)
    assert (first == second) == (one == other)
    assert len(first) == len(second) == len("2025-12-24T10:00:00.000000Z")


@given(MOMENTS, st.sampled_from("Tt "), st.booleans())
def test_a_canonical_timestamp_is_the_moment_and_stays_as_it_is(moment: datetime, between: str, aware: bool) -> None:
    given_form = moment if aware else moment.astimezone(UTC).replace(tzinfo=None)
    canonical = canonical_timestamp(given_form.isoformat(between))
    assert datetime.fromisoformat(canonical) == moment
    assert canonical_timestamp(canonical) == canonical


@given(st.text("0123456789-:TtZz+., W", max_size=40) | st.text())
def test_any_text_is_a_canonical_timestamp_or_refused(text: str) -> None:
    try:
        canonical = canonical_timestamp(text)
    except ValueError:
        return
    assert canonical_timestamp(canonical) == canonical
    assert len(canonical) == 27


# --- Status --------------------------------------------------------------------------------------

STATUSES = words("running success failure partial timeout cancelled")
ALIASES = {"failed": "failure", "completed": "success", "succeeded": "success", "canceled": "cancelled"}


@pytest.mark.parametrize(("given_form", "canonical"), [*zip(STATUSES, STATUSES, strict=True), *ALIASES.items()])
def test_a_status_is_forgiven_its_case_blanks_and_alias(given_form: str, canonical: str) -> None:
    for form in (given_form, given_form.upper(), given_form.title(), f"  {given_form}\n", f"\t{given_form.upper()} "):
        assert canonical_status(form) == canonical
        assert stored(status=form)["status"] == canonical
        assert parse_patch({"status": form}) == ({"status": canonical}, (), ())


@pytest.mark.parametrize("value", ["", " ", "ok", "success!", "fail", "run ning", "ſuccess", 1, True, ["success"], {}])
def test_anything_else_is_no_status(value: object) -> None:
    with pytest.raises(InvalidBodyError) as caught:
        parse_run(make_run(status=value))
    assert caught.value.errors == [
        {
            "loc": ["body", "status"],
            "msg": "Status must be one of: ['running', 'success', 'failure', 'partial', 'timeout', 'cancelled']",
            "type": "value_error",
        }
    ]


# --- JSON objects --------------------------------------------------------------------------------


def nested(levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(levels - 1):
        made = {"a": made}
    return made


@pytest.mark.parametrize("name", ["metrics_json", "context_json"])
def test_a_json_object_is_stored_as_its_text(name: str) -> None:
    assert stored(**{name: {"tokens": 5, "ü": ["x", 1.5, None, True]}})[name] == '{"tokens":5,"ü":["x",1.5,null,true]}'
    assert stored(**{name: {}})[name] == "{}"
    assert stored(**{name: None})[name] is None
    assert json.loads(stored(**{name: nested(64)})[name]) == nested(64)
    numbers = {"low": -(2**63), "high": 2**64 - 1, "tiny": 5e-324, "huge": 1.7976931348623157e308}
    assert json.loads(stored(**{name: numbers})[name]) == numbers


@pytest.mark.parametrize("name", ["metrics_json", "context_json"])
@pytest.mark.parametrize(
    "value",
    [
        [], ["a"], "{}", "", 0, 1.5, True, False,
        {"a": "\0"}, {"\0": 1}, {"a": [{"b": "x\0y"}]},
        {"a": 2**64}, {"a": -(2**63) - 1}, {"a": [10**400]},
        {"a": math.inf}, {"a": [-math.inf]}, {"a": math.nan},
        nested(65), {"a": [[[nested(64)]]]},
    ],
)  # fmt: skip
def test_what_is_no_storable_json_object_is_refused(name: str, value: object) -> None:
    ((place, _),) = errors_of(make_run(**{name: value}))
    assert place == ["body", name]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def is_storable(value: object) -> bool:
    if isinstance(value, dict):
        return all(is_storable(part) for item in value.items() for part in item)
    if isinstance(value, list):
        return all(map(is_storable, value))
    if isinstance(value, str):
        return "\0" not in value
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**63) <= value < 2**64


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_a_json_object_comes_back_or_is_refused(value: dict[str, Any]) -> None:
    if is_storable(value):
        assert json.loads(stored(metrics_json=value)["metrics_json"]) == value
    else:
        assert errors_of(make_run(metrics_json=value))[0][0] == ["body", "metrics_json"]


# --- Other values --------------------------------------------------------------------------------

COUNTS = [name for name in INTEGERS if name not in ("id", "api_posted")]
TEXTS = [
    name
    for name in runs.STORED
    if name
    not in (
        *ALWAYS_SET,
        "metrics_json",
        "context_json",
        "git_commit_source",
        "labels",
        "attempt",
        "trace_id",
        "span_id",
    )
    and not name.endswith(("_at", "time", "timestamp", "_by"))
]


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_an_integer_of_63_bits(name: str) -> None:
    for value in (0, 1, 2**53 + 1, 2**63 - 1):
        assert stored(**{name: value})[name] == value
    wrong: list[object] = [-1, 2**63, 2**64, 10**400, 1.5, 1e300, math.inf, "5.0", "", True, False, [], {}]
    for bad in wrong:
        assert [place for place, _ in errors_of(make_run(**{name: bad}))] == [["body", name]], bad


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_may_be_a_whole_float_or_a_text_that_is_a_whole_number(name: str) -> None:
    for value, count in ((12.0, 12), ("5", 5), ("007", 7), (2.0**62, 2**62), (str(2**63 - 1), 2**63 - 1)):
        run = make_run(**{name: value})
        assert stored(**{name: value})[name] == count
        texts = [f"Text taken as a number: {name}"] if isinstance(value, str) else []
        assert [*parse_run(run).notes] == texts
    assert [place for place, _ in errors_of(make_run(**{name: "5", "host": 5}))] == [["body", "host"]]
    if name in runs.PATCHABLE:
        assert parse_patch({name: "5"}).changes == parse_patch({name: 5.0}).changes == {name: 5}
        assert [*parse_patch({name: "5"}).notes] == [f"Text taken as a number: {name}"]


def test_a_flag_may_be_a_word() -> None:
    for words, flag in ((("yes", "true", "1", "True", 1, True), True), (("no", "false", "0", "NO", 0, False), False)):
        for word in words:
            assert bool(stored(api_posted=word)["api_posted"]) is flag
            texts = ["Text taken as true or false: api_posted"] if isinstance(word, str) else []
            assert [*parse_run(make_run(api_posted=word)).notes] == texts


def test_null_means_not_given_wherever_something_need_not_be_given() -> None:
    required = ("event_id", "run_id", "agent_name", "job_type", "start_time")
    run = {name: None for name in runs.STORED if name not in required}
    minimal = parse_run({**make_run(event_id="e"), "run_id": "r"}).row
    assert parse_run({**run, **make_run(event_id="e"), "run_id": "r"}).row == minimal
    assert {place[1] for place, _ in errors_of({**run, **dict.fromkeys(required)})} == {*required}


def test_a_duration_of_null_means_zero() -> None:
    assert stored(duration_ms=None)["duration_ms"] == 0
    assert parse_patch({"duration_ms": None}) == ({}, (), ())


@pytest.mark.parametrize("name", ["event_id", "run_id", "agent_name", "job_type"])
def test_a_name_is_1_to_255_characters_that_are_not_all_blank(name: str) -> None:
    for value in (
        "a",
        "x" * 255,
        "𝄞" * 255,
        " a ",
        "../../etc",
        "a/b",
        "'; DROP TABLE agent_runs; --",
        "a\nb",
        "\u202e",
    ):
        assert stored(**{name: value})[name] == value
    wrong: list[object] = ["", " ", "\t\n", "\u3000", "x" * 256, "a\0b", "\0", None, 5, True, ["a"]]
    for bad in wrong:
        assert [place for place, _ in errors_of(make_run(**{name: bad}))] == [["body", name]], bad


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_may_hold_anything_but_nul(name: str) -> None:
    assert len(TEXTS) == 25
    for value in ("", "a", "\x01\x1b[31m\r\n\u2028\u202e", "𝄞ä", "x" * 1_000_000):
        assert stored(**{name: value})[name] == value
    assert stored(**{name: None})[name] is None
    wrong: list[object] = ["\0", "a\0b", 5, True, [], {}]
    for bad in wrong:
        assert [place for place, _ in errors_of(make_run(**{name: bad}))] == [["body", name]], bad


def test_every_fault_is_reported_at_once_and_little_of_the_input_is_echoed() -> None:
    bad = {"event_id": "\0" * 5000, "status": "x" * 5000, "duration_ms": "y" * 5000, "metrics_json": "z" * 5000}
    with pytest.raises(InvalidBodyError) as caught:
        parse_run(bad)
    places = {str(item["loc"][1]) for item in caught.value.errors}
    assert places == {*bad, "run_id", "start_time", "agent_name", "job_type"}
    assert not [item for item in caught.value.errors if "x" * 201 in item["msg"] or "y" * 201 in item["msg"]]


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "text", [], [{}]])
def test_a_run_is_an_object(value: object) -> None:
    assert [place for place, _ in errors_of(value)] == [["body"]]


def test_unknown_fields_are_ignored_and_named() -> None:
    parsed = parse_run(make_run(mood="good", id=7, updated_at="never", **{"x" * 500: 1, "__proto__": {}}))
    assert parsed.ignored == ("mood", "id", "updated_at", "x" * 500, "__proto__")
    warnings = runs.ignored_field_warnings(parsed.ignored)
    assert warnings[:3] == [
        "Unknown field ignored: mood",
        "Field is set by the server, ignored: id",
        "Field is set by the server, ignored: updated_at",
    ]
    assert all(len(warning) <= 250 for warning in warnings)


def test_a_patch_leaves_what_is_null_or_missing() -> None:
    changes, ignored, _ = parse_patch(
        {"end_time": "2025-12-24T13:05:00+01:00", "status": None, "items_failed": 0, "host": "h"}
    )
    assert changes == {"end_time": "2025-12-24T12:05:00.000000Z", "items_failed": 0}
    assert ignored == ("host",)


@pytest.mark.parametrize("value", ["abc", "a" * 65, "", "abc 1234", "abc\u00a01234", "abcd\n", None, 1234567])
def test_an_associated_commit_needs_a_hash(value: object) -> None:
    with pytest.raises(InvalidBodyError) as caught:
        parse_commit({"commit_hash": value, "commit_source": "llm"})
    assert {item["loc"][1] for item in caught.value.errors} == {"commit_hash"}


@pytest.mark.parametrize("source", ["manual", "llm", "ci"])
def test_an_associated_commit_sets_the_commits_fields(source: str) -> None:
    body = {"commit_hash": "a" * 40, "commit_source": source, "commit_timestamp": "2025-12-24T10:00:00+01:00", "x": 1}
    assert parse_commit(body) == (
        {
            "git_commit_hash": "a" * 40,
            "git_commit_source": source,
            "git_commit_timestamp": "2025-12-24T09:00:00.000000Z",
        },
        ("x",),
    )
    with pytest.raises(InvalidBodyError):
        parse_commit({**body, "commit_source": source.upper()})


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"{}x", b"{}{}", b'{"a":1,}', b"{'a':1}", b"{} //", b"NaN", b'{"a":NaN}', b'{"a":Infinity}',
        b'{"a":-Infinity}', b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}',
        rb'{"a":"\ud800"}', rb'{"\udfff":1}', b'{"a":01}', b'{"a":"\n"}', b'{"a":"\0"}', b"[" * 10_000,
        b'{"a":' * 10_000, b"1" * 5000 + b"x",
    ],
)  # fmt: skip
def test_json_is_read_strictly(body: bytes) -> None:
    with pytest.raises(InvalidBodyError) as caught:
        parse_json(body)
    ((place, kind, size),) = [(item["loc"], item["type"], len(item["msg"])) for item in caught.value.errors]
    assert (place, kind) == (["body"], "json_invalid")
    assert size < 300


@given(st.integers(-(2**70), 2**70))
def test_integers_keep_every_digit(number: int) -> None:
    assert parse_json(str(number)) == number


@given(st.binary(min_size=8, max_size=8))
def test_floats_keep_every_bit(bits: bytes) -> None:
    (number,) = struct.unpack("d", bits)
    if math.isfinite(number):
        read = parse_json(json.dumps(number))
        assert isinstance(read, float)
        assert struct.pack("d", read) == struct.pack("d", number)
