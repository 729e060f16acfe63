"""PATCH /api/v1/runs/{event_id}, sentence by sentence."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.conftest import Api, MakeApi, make_run
from tests.contract.wire import RUNS, SENTENCE_OF_STATUS, STATUSES, check_error, places, post, send

pytestmark = pytest.mark.asyncio(loop_scope="module")
OWN_LOOP = pytest.mark.asyncio(loop_scope="function")


@pytest.fixture
def api(shared: Api) -> Api:
    """One app for the whole module; tests that need one of their own ask for `make_api`."""
    return shared


CHANGES: dict[str, Any] = {
    "status": "success",
    "end_time": "2025-12-24T13:05:00.000000Z",
    "duration_ms": 120_000,
    "error_summary": "summary",
    "error_details": "details",
    "output_summary": "output",
    "items_succeeded": 75,
    "items_failed": 25,
    "items_skipped": 1,
    "metrics_json": {"a": [1, 2]},
    "context_json": {"b": None},
    "git_commit_source": "manual",
    "git_commit_author": "Ada",
    "git_commit_timestamp": "2025-12-24T13:00:00.000000Z",
    "labels": {"env": "prod", "team": "search"},
    "expected_by": "2025-12-24T14:00:00.000000Z",
}
"""The guide's fields, and those that were added later."""


async def stored_run(api: Api, **fields: Any) -> str:
    run = make_run(**fields)
    await api.post(run)
    return f"{RUNS}/{run['event_id']}"


async def test_all_fields_at_once(api: Api) -> None:
    path = await stored_run(api)
    before = await api.get(path)
    answer = await api.call("PATCH", path, json=CHANGES, status=200)
    assert answer == {"event_id": before["event_id"], "updated": True, "fields_updated": list(CHANGES)}
    after = await api.get(path)
    assert after == {**before, **CHANGES, "updated_at": after["updated_at"]}


@pytest.mark.parametrize("name", CHANGES)
async def test_each_field_alone_changes_nothing_else(api: Api, name: str) -> None:
    path = await stored_run(api)
    before = await api.get(path)
    answer = await api.call("PATCH", path, json={name: CHANGES[name]}, status=200)
    assert answer["fields_updated"] == [name]
    after = await api.get(path)
    assert after == {**before, name: CHANGES[name], "updated_at": after["updated_at"]}


@OWN_LOOP
async def test_it_sets_updated_at_and_leaves_created_at(make_api: MakeApi) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    api = await make_api(clock=lambda: now)
    path = await stored_run(api)
    now += timedelta(hours=1)
    await api.call("PATCH", path, json={"status": "success"}, status=200)
    after = await api.get(path)
    assert after["created_at"] == "2026-01-01T00:00:00.000000Z"
    assert after["updated_at"] == "2026-01-01T01:00:00.000000Z"


async def test_null_and_missing_mean_leave(api: Api) -> None:
    path = await stored_run(api, **{name: value for name, value in CHANGES.items() if name != "status"})
    before = await api.get(path)
    body = {**dict.fromkeys(CHANGES), "status": "success"}
    assert (await api.call("PATCH", path, json=body, status=200))["fields_updated"] == ["status"]
    after = await api.get(path)
    assert after == {**before, "status": "success", "updated_at": after["updated_at"]}


@pytest.mark.parametrize(
    "body", [{}, {"status": None}, dict.fromkeys(CHANGES), {"color": "red"}, {"agent_name": "x", "event_id": "y"}]
)
async def test_nothing_left_is_400(api: Api, body: dict[str, Any]) -> None:
    path = await stored_run(api)
    before = await api.get(path)
    assert check_error(await send(api, "PATCH", path, json=body), 400) == "No valid fields to update"
    assert await api.get(path) == before


async def test_an_unknown_run_is_404(api: Api) -> None:
    answer = await send(api, "PATCH", f"{RUNS}/abc123", json={"status": "success"})
    assert check_error(answer, 404) == "Run not found: abc123"


async def test_fields_that_cannot_be_changed_are_ignored_and_named(api: Api) -> None:
    path = await stored_run(api)
    before = await api.get(path)
    body = {"status": "success", "agent_name": "x", "event_id": "y", "id": 9, "color": 1}
    answer = await api.call("PATCH", path, json=body, status=200)
    assert answer["fields_updated"] == ["status"]
    assert len(answer["warnings"]) == 4
    for name in ("agent_name", "event_id", "id", "color"):
        assert any(warning.endswith(f": {name}") for warning in answer["warnings"])
    after = await api.get(path)
    assert after == {**before, "status": "success", "updated_at": after["updated_at"]}


@pytest.mark.parametrize("status", [*STATUSES, "failed", "COMPLETED", " canceled "])
async def test_statuses_are_stored_canonical(api: Api, status: str) -> None:
    canonical = {"failed": "failure", "completed": "success", "canceled": "cancelled"}
    path = await stored_run(api)
    await api.call("PATCH", path, json={"status": status}, status=200)
    name = status.strip().lower()
    assert (await api.get(path))["status"] == canonical.get(name, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("status", "bogus"),
        ("status", 5),
        ("end_time", "yesterday"),
        ("end_time", 1766570400),
        ("duration_ms", -1),
        ("duration_ms", 2**63),
        ("duration_ms", 1.5),
        ("duration_ms", "5.5"),
        ("items_succeeded", True),
        ("items_failed", -1),
        ("items_skipped", "x"),
        ("error_summary", 5),
        ("error_details", ["x"]),
        ("output_summary", "a\0b"),
        ("metrics_json", []),
        ("metrics_json", "x"),
        ("context_json", 5),
        ("git_commit_source", "robot"),
        ("git_commit_author", {}),
        ("git_commit_timestamp", "2026-13-01T00:00:00Z"),
        ("labels", []),
        ("labels", {str(number): "x" for number in range(33)}),
        ("expected_by", "soon"),
    ],
)
async def test_a_bad_value_is_422_and_changes_nothing(api: Api, name: str, value: object) -> None:
    path = await stored_run(api)
    before = await api.get(path)
    answer = await send(api, "PATCH", path, json={"error_summary": "good", name: value})
    assert places(check_error(answer, 422)) == [("body", name)]
    assert await api.get(path) == before


async def test_the_sentence_for_a_wrong_status_is_the_guides(api: Api) -> None:
    path = await stored_run(api)
    assert check_error(await send(api, "PATCH", path, json={"status": "bogus"}), 422) == [
        {"loc": ["body", "status"], "msg": SENTENCE_OF_STATUS, "type": "value_error"},
    ]


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"5", b"{", b'"x"'])
async def test_a_body_that_is_no_object_is_422(api: Api, body: bytes) -> None:
    path = await stored_run(api)
    answer = await send(api, "PATCH", path, data=body, headers={"Content-Type": "application/json"})
    assert places(check_error(answer, 422)) == [("body",)]


async def test_a_body_is_checked_before_the_run_is_looked_for(api: Api) -> None:
    check_error(await send(api, "PATCH", f"{RUNS}/nope", json={"status": "bogus"}), 422)


async def test_a_duration_null_is_left_although_post_takes_it_for_zero(api: Api) -> None:
    path = await stored_run(api, duration_ms=7)
    check_error(await send(api, "PATCH", path, json={"duration_ms": None}), 400)
    assert (await api.get(path))["duration_ms"] == 7


async def test_a_patch_right_behind_its_post_finds_the_run(api: Api) -> None:
    for _ in range(20):
        run = make_run()
        body = b"{%s}" % b",".join(f'"{k}":"{v}"'.encode() for k, v in run.items())
        created = asyncio.create_task(post(api, body))
        assert (await created).status == 201
        await api.call("PATCH", f"{RUNS}/{run['event_id']}", json={"status": "success"}, status=200)


async def test_changes_at_once_are_all_acknowledged_and_one_of_them_is_last(api: Api) -> None:
    path = await stored_run(api)
    answers = await asyncio.gather(
        *(send(api, "PATCH", path, json={"items_failed": n, "items_skipped": n}) for n in range(50))
    )
    assert {answer.status for answer in answers} == {200}
    after = await api.get(path)
    assert after["items_failed"] == after["items_skipped"]
    assert after["items_failed"] in range(50)


async def test_labels_are_merged_and_null_removes_one(api: Api) -> None:
    path = await stored_run(api, labels={"team": "search", "env": "prod"})
    for changes, left in (
        ({"env": "dev", "b": "1", "gone": None}, {"b": "1", "env": "dev", "team": "search"}),
        ({"team": None}, {"b": "1", "env": "dev"}),
        ({"b": None, "env": None}, None),
        ({"new": "again"}, {"new": "again"}),
    ):
        answer = await api.call("PATCH", path, json={"labels": changes}, status=200)
        assert answer["fields_updated"] == ["labels"]
        assert (await api.get(path))["labels"] == left
    assert check_error(await send(api, "PATCH", path, json={"labels": {}}), 400) == "No valid fields to update"
    wrong = {"Team": "x", "ok": "y", "empty": "", "long": "x" * 256, "number": 5}
    detail = check_error(await send(api, "PATCH", path, json={"labels": wrong}), 422)
    assert places(detail) == [("body", "labels", name) for name in ("Team", "empty", "long", "number")]
    assert "1 to 63 characters of a-z, 0-9, _, . and -" in detail[0]["msg"]
    assert (await api.get(path))["labels"] == {"new": "again"}


async def test_a_run_has_at_most_32_labels(api: Api) -> None:
    many = {f"k{number}": "x" for number in range(31)}
    path = await stored_run(api, labels=many)
    await api.call("PATCH", path, json={"labels": {"a": "1"}, "status": "running"}, status=200)
    answer = await send(api, "PATCH", path, json={"status": "success", "labels": {"b": "2", "k0": "y"}})
    [fault] = check_error(answer, 422)
    assert (fault["loc"], fault["msg"][:30]) == (["body", "labels"], "The run would have 33 labels, ")
    run = await api.get(path)
    assert (run["status"], len(run["labels"]), run["labels"]["k0"]) == ("running", 32, "x")
    await api.call("PATCH", path, json={"labels": {"b": "2", "k0": None}}, status=200)
    assert (await api.get(path))["labels"] == {"a": "1", "b": "2", **{key: "x" for key in many if key != "k0"}}
