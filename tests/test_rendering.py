"""A page that SQLite writes as JSON is what the rows say, whatever they hold."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telemetryd.engine import addresses
from telemetryd.engine.sqlite.statements import json_rows
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.statements.runs import fetch_page, select_page
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.git_urls import MAX_ADDRESS
from telemetryd.model import runs
from telemetryd.model.commands import CreateRuns
from telemetryd.model.queries import ListRuns
from telemetryd.model.runs import COLUMNS, parse_run
from telemetryd.model.values import Row
from tests.test_properties import IS_LONG, PAIRS, SIMPLE

NOW = "2025-12-24T12:00:00.000000Z"
ADDRESSES = ("git@github.com:acme/site.git", 'https://gitlab.com/acme/"site', "nowhere", None)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    opened = sqlite3.connect(tmp_path_factory.mktemp("rendering") / "telemetry.sqlite", isolation_level=None)
    opened.execute("PRAGMA synchronous = OFF")
    migrate.create(opened, NOW)
    yield opened
    opened.close()


def store(connection: sqlite3.Connection, rows: list[Row]) -> None:
    """Have only these runs in the database, until a rollback."""
    connection.execute("BEGIN")
    transaction = Transaction(connection, NOW)
    transaction.apply([CreateRuns(tuple(rows))])


def plain(run: dict[str, Any]) -> Any:
    return orjson.loads(orjson.dumps(run))


@settings(
    max_examples=150 if IS_LONG else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(PAIRS, min_size=1, max_size=4), st.lists(st.sampled_from(runs.ANSWERED), unique=True), st.randoms())
def test_every_run_is_rendered_as_it_is_stored(
    empty: sqlite3.Connection, pairs: list[dict[str, Any]], fields: list[str], source: random.Random
) -> None:
    given_runs = [
        {name: value for name, (value, _) in {**SIMPLE, **each}.items()}
        | {"event_id": f"e{number}", "git_repo": source.choice(ADDRESSES), "git_commit_hash": "abcdef1"}
        for number, each in enumerate(pairs)
    ]
    store(empty, [parse_run(run).row for run in given_runs])
    try:
        page = fetch_page(empty, ListRuns(fields=tuple(fields)))
        rows = empty.execute(f"SELECT {', '.join(COLUMNS)} FROM agent_runs ORDER BY created_at DESC, id DESC")
        stored = [plain(runs.to_json(row)) for row in rows]
        answered = [orjson.loads(run) for run in page.runs]
        assert answered == [{name: run[name] for name in fields or runs.ANSWERED} for run in stored]
        made_last = sorted(fields or runs.ANSWERED, key=lambda name: name in ("commit_url", "repo_url"))
        assert all(list(run) == made_last for run in answered)
    finally:
        empty.execute("ROLLBACK")


def test_a_page_takes_one_step_and_the_walk_of_its_rows(empty: sqlite3.Connection) -> None:
    """What makes it quick alongside a busy writer; and rendering must not make SQLite sort."""
    query = ListRuns()
    steps: list[str] = []
    sql, values = select_page(query)
    walk = [row[3] for row in empty.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    empty.set_trace_callback(steps.append)
    json_rows.render(empty, (sql, values), query.answered, query.order.column, None)
    empty.set_trace_callback(None)
    assert len(steps) == 1
    plan = [row[3] for row in empty.execute(f"EXPLAIN QUERY PLAN {steps[0]}")]
    assert [step for step in plan if "agent_runs" in step] == walk
    assert not [step for step in plan if "TEMP B-TREE" in step]


def test_a_run_too_large_for_the_room_is_reported(empty: sqlite3.Connection) -> None:
    query = ListRuns()
    store(empty, [parse_run({**{name: value for name, (value, _) in SIMPLE.items()}, "event_id": "e"}).row])
    try:
        with pytest.raises(json_rows.TooLargeError):
            json_rows.render(empty, select_page(query), query.answered, "created_at", 100)
        assert len(json_rows.render(empty, select_page(query), query.answered, "created_at", None).runs) == 1
    finally:
        empty.execute("ROLLBACK")


def test_a_text_too_long_to_be_an_address_is_not_kept_in_memory(
    empty: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, ...]] = []
    members = addresses.members

    def noted(fields: tuple[str, ...], *of: str) -> str:
        made.append(of)
        return members(fields, *of)

    monkeypatch.setattr(addresses, "members", noted)
    long = f"git@github.com:acme/{'x' * 10_000}"
    given_run = {name: value for name, (value, _) in SIMPLE.items()} | {"event_id": "e", "git_repo": long}
    store(empty, [parse_run(given_run | {"git_commit_hash": "abcdef1"}).row])
    try:
        page = fetch_page(empty, ListRuns(fields=("commit_url", "repo_url")))
        assert page.runs == ['{"commit_url":null,"repo_url":null}']
        assert max(map(len, made[0])) == MAX_ADDRESS + 1
    finally:
        empty.execute("ROLLBACK")
