"""Every documented filter is served by an index: an answer looks at few runs, also where those that match are old."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest

from telemetryd.engine.indexes import INDEXES
from telemetryd.engine.postgres.connection import Plain, connect_plainly
from telemetryd.engine.postgres.statements import full_text
from telemetryd.engine.postgres.statements.answers import REGISTRY
from telemetryd.engine.postgres.statements.counts import select_count, select_count_of_span
from telemetryd.engine.postgres.statements.events import select_events
from telemetryd.engine.postgres.statements.regressions import RUNS
from telemetryd.engine.postgres.statements.runs import find_way, select_page
from telemetryd.model.event_queries import ListEvents
from telemetryd.model.queries import Page, Position, parse_list
from telemetryd.model.regressions import MAX_RUNS
from telemetryd.model.runs import FILTERS
from telemetryd.model.values import Status
from tests import twins
from tests.postgres_cluster import Cluster

pytestmark = pytest.mark.postgresql

REGISTRY.load()
ROWS, OLD = 20_000, 5_000
LIMIT = 20
MOST = 14 * LIMIT
"""Runs that are looked at for a page: walks for six statuses of two agents give `LIMIT` each, and one more."""
# Of each field one value is only in the oldest runs, so that a walk through all of them would be long.
FILL = """
    INSERT INTO agent_runs (
        event_id, run_id, created_at, updated_at, start_time, agent_name, job_type, status, product, website, host,
        environment, insight_id, parent_run_id, git_commit_hash, retry_of, conversation_id, trace_id, labels,
        input_summary, duration_ms, metrics_json
    )
    SELECT
        'event-' || n, value, moment, moment, started, value, value,
        CASE WHEN n < %(old)s THEN 'failure' ELSE (ARRAY['running', 'success', 'partial'])[1 + n %% 3] END,
        value, value, value, value, value, value, value, value, value, value, json_build_object('team', value),
        CASE WHEN n < %(old)s THEN 'translated much' ELSE 'crawled' END, n, json_build_object('n', n)
    FROM (
        SELECT n, CASE WHEN n < %(old)s THEN 'old' ELSE 'new-' || n %% 3 END AS value,
            to_char('2025-12-01'::timestamp + n * '1 minute'::interval, form) AS moment,
            to_char('2025-12-01'::timestamp + (n - 1) * '1 minute'::interval, form) AS started
        FROM generate_series(1, %(rows)s) AS n CROSS JOIN (VALUES ('YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) AS f (form)
    ) AS made
"""
OLD_END = "2025-12-04T11:00:00Z"
"""Shortly before the last one of the old runs."""


@pytest.fixture(scope="module", params=["analyzed", "without statistics"])
def filled(request: pytest.FixtureRequest, cluster: Cluster, new_postgres_database: str) -> Iterator[Plain]:
    name = cluster.make(new_postgres_database)
    target = twins.target_of(cluster.url(name))
    with closing(connect_plainly(target, "test", {})) as plain:
        plain.execute(FILL, {"rows": ROWS, "old": OLD})
        plain.execute("INSERT INTO run_changes (run, seq) SELECT id, id FROM agent_runs")
        plain.execute("INSERT INTO run_minutes SELECT left(created_at, 16), count(*) FROM agent_runs GROUP BY 1")
        plain.execute(
            "INSERT INTO run_events (id, run, event_key, event_type, timestamp) "
            "SELECT id, 1 + id % 3, 'key-' || id, 'type', created_at FROM agent_runs"
        )
        twins.index_words(plain)
        plain.execute("VACUUM")
        if request.param == "analyzed":
            plain.execute("ANALYZE")
    with twins.reading(cluster.url(name)) as plain:
        yield plain
    cluster.drop(name)


@pytest.fixture
def is_analyzed(filled: Plain) -> bool:
    return filled.execute("SELECT 1 FROM pg_stats WHERE tablename = 'agent_runs'").fetchone() is not None


def looked_at(plain: Plain, sql: str, values: Any) -> tuple[int, set[str]]:
    """Return how many rows a statement looks at in all, and by which indexes."""
    plan = plain.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", values).fetchall()[0][0]
    rows, indexes = 0, set()
    nodes = [orjson.loads(plan)[0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if "Scan" in node["Node Type"] and not node["Node Type"].startswith(("Subquery", "Function", "CTE")):
            removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
            rows += round((node["Actual Rows"] + removed) * node["Actual Loops"])
            indexes.add(node.get("Index Name", node["Node Type"]))
    return rows, indexes


COMBINATIONS = [
    {name: "failure" if name == "status" else "old" for name in names} for names in map(sorted, INDEXES) if names
]
PARTS = [
    *COMBINATIONS,
    {},
    {"agent_name": "old,nobody", "job_type": "old"},
    {"agent_name": "o*"},
    {"agent_name": "*ld", "status": "failure,timeout"},
    {"label.team": "old"},
    {"label.team": "old", "agent_name": "old"},
    {"label.team": "old", "status": "failure"},
    {"agent_name": "old", "host": "old"},
    {"created_before": OLD_END},
    {"created_before": OLD_END, "agent_name": "old"},
    {"created_after": "2025-12-02T00:00:00Z", "host": "old", "sort": "created_at"},
    {"sort": "created_at"},
    {"sort": "start_time"},
    {"start_time_to": OLD_END, "sort": "-start_time"},
    {"q": "crawled"},
    {"start_time_to": OLD_END},
    {"start_time_to": OLD_END, "host": "old"},
    {"start_time_from": "2025-12-02T00:00:00Z", "start_time_to": OLD_END, "agent_name": "old", "job_type": "old"},
    {"start_time_from": "2025-12-02T00:30:00Z", "sort": "created_at"},
    {"error": "nowhere", "event_id": "event-7"},
    {"metrics.n>": "10", "agent_name": "old"},
    {"min_duration_ms": "10", "status": "failure"},
]


NEED_STATISTICS = [
    {"label.team": "old", "agent_name": "old"},
    {"label.team": "old", "status": "failure"},
    {"agent_name": "old", "host": "old"},
    {"start_time_to": OLD_END, "host": "old"},
    {"start_time_from": "2025-12-02T00:00:00Z", "start_time_to": OLD_END, "agent_name": "old", "job_type": "old"},
]
"""Without them the planner takes what two filters leave for so little that it sorts it."""


@pytest.mark.parametrize("asked", PARTS, ids=lambda asked: urlencode(asked) or "everything")
def test_a_page_looks_at_few_runs(filled: Plain, is_analyzed: bool, asked: dict[str, str]) -> None:
    if asked in NEED_STATISTICS and not is_analyzed:
        return
    query = parse_list(urlencode({**asked, "limit": LIMIT}))
    for number in range(3):
        way = find_way(filled, query)
        assert way is not None
        rows, indexes = looked_at(filled, *select_page(query, way))
        assert rows <= MOST, (number, indexes)
        page: Page = REGISTRY.answer(filled, query)
        if page.end is None:
            break
        query = parse_list(query.next_page("", page.end).removeprefix("?"))


@pytest.mark.parametrize(
    "asked",
    [
        {"agent_name": "old", "job_type": "old", "status": "success"},
        {"agent_name": "old", "status": "success"},
        {"agent_name": "new-1", "created_after": "2025-12-14T20:00:00Z"},
        {"agent_name": "new-1", "created_after": "2025-12-14T20:00:00Z", "min_duration_ms": "1"},
        {"label.team": "new-1", "created_after": "2025-12-14T20:00:00Z"},
        {"status": "success", "created_after": "2025-12-14T20:00:00Z"},
    ],
    ids=urlencode,
)
def test_a_walk_with_few_runs_ends_with_them(filled: Plain, asked: dict[str, str]) -> None:
    """What it passes over in an index no plan shows, but the pages that it reads."""
    query = parse_list(urlencode({**asked, "limit": LIMIT}))
    way = find_way(filled, query)
    assert way is not None
    sql, values = select_page(query, way)
    plan = filled.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", values).fetchall()[0][0]
    root = orjson.loads(plan)[0]["Plan"]
    assert root["Shared Hit Blocks"] + root["Shared Read Blocks"] <= 12 + 5 * root["Actual Rows"]


def test_few_that_started_in_a_time_are_sorted_and_found_by_it(filled: Plain) -> None:
    query = parse_list(urlencode({"start_time_from": "2025-12-04T00:00:00Z", "start_time_to": OLD_END, "limit": LIMIT}))
    way = find_way(filled, query)
    assert way is not None
    assert way.is_sorted
    rows, indexes = looked_at(filled, *select_page(query, way))
    assert rows <= 4 * 11 * 60  # a scan by way of a bitmap looks into the index and into the table
    assert "idx_runs_start" in indexes


def test_pages_by_offset_look_only_into_the_index_until_they_begin(filled: Plain, is_analyzed: bool) -> None:
    if not is_analyzed:  # it rather sorts what it takes for few
        return
    for asked in ({"agent_name": "old"}, {"agent_name": "old", "job_type": "old"}):
        query = parse_list(urlencode({**asked, "limit": LIMIT, "offset": 1000}))
        rows, indexes = looked_at(filled, *select_page(query))
        assert rows <= len(Status) * (1000 + 2 * LIMIT)
        assert indexes == {INDEXES[frozenset(asked)][0], "agent_runs_pkey"}


COUNTED = [
    *COMBINATIONS,
    {"agent_name": "old,nobody", "job_type": "old", "status": "failure,timeout"},
    {"label.team": "old"},
    {"created_before": OLD_END, "agent_name": "old"},
    {"created_after": "2025-12-02T00:00:00Z", "created_before": OLD_END, "status": "failure"},
    {"start_time_from": "2025-12-02T00:00:00Z", "start_time_to": OLD_END},
]


@pytest.mark.parametrize("asked", COUNTED, ids=urlencode)
def test_a_count_looks_at_those_that_match(filled: Plain, is_analyzed: bool, asked: dict[str, str]) -> None:
    filters = parse_list(urlencode(asked)).filters
    label = "team" if "label.team" in asked else None
    for most in (None, LIMIT):
        with full_text.by_index(filled, is_needed=True):
            rows, indexes = looked_at(filled, *select_count(filters, most, label))
        assert "Seq Scan" not in indexes, asked
        if is_analyzed:
            assert rows <= 2 * (most or OLD), indexes


def test_a_count_of_a_time_looks_at_minutes_and_their_ends(filled: Plain) -> None:
    bounds = {"created_after": "2025-12-02T00:00:30Z", "created_before": "2025-12-13T12:34:56Z"}
    for chosen in (bounds, *({name: bound} for name, bound in bounds.items())):
        filters = parse_list(urlencode(chosen)).filters
        by_minutes = select_count_of_span(filters)
        assert by_minutes is not None
        _, indexes = looked_at(filled, *by_minutes)
        assert "idx_runs_created_desc" in indexes
        assert filled.execute(*by_minutes).fetchall() == filled.execute(*select_count(filters)).fetchall()


def test_a_count_of_a_time_without_a_whole_minute_is_no_matter_of_minutes() -> None:
    for given in (
        {"created_after": "2025-12-02T00:00:30Z", "created_before": "2025-12-02T00:00:40Z"},
        {"created_after": "2025-12-03T00:00:30Z", "created_before": "2025-12-02T00:00:30Z"},  # no run is in it
        {"created_after": "2025-12-02T00:00:30Z", "agent_name": "old"},
        {"created_after": "2025-12-02T00:00:30Z", "start_time_to": OLD_END},
        {"agent_name": "old"},
    ):
        assert select_count_of_span(parse_list(urlencode(given)).filters) is None


def test_hours_know_when_their_runs_started_whatever_is_written(filled: Plain) -> None:
    expected = (
        "SELECT left(created_at, 13), min(left(start_time, 13)), max(left(start_time, 13)) FROM agent_runs GROUP BY 1"
    )
    assert filled.execute(f"({expected}) EXCEPT SELECT * FROM run_hours").fetchall() == []


def test_few_that_have_words_are_found_by_their_index(filled: Plain) -> None:
    query = parse_list(urlencode({"q": "much", "agent_name": "old", "limit": LIMIT}))
    way = find_way(filled, query)
    assert way is not None
    assert way.is_rare
    with full_text.by_index(filled, is_needed=True):
        _, indexes = looked_at(filled, *select_page(query, way))
    assert full_text.INDEX in indexes


def test_a_page_after_a_cursor_begins_there(filled: Plain) -> None:
    for name, descending in itertools.product(("agent_name", "host", "status"), (True, False)):
        value = "failure" if name == "status" else "old"
        sort = "-created_at" if descending else "created_at"
        query = parse_list(urlencode({name: value, "limit": LIMIT, "sort": sort}))
        query = replace(query, after=Position("2025-12-02T12:00:00.000000Z", 2160))
        way = find_way(filled, query)
        assert way is not None
        rows, _ = looked_at(filled, *select_page(query, way))
        assert rows <= 2 * LIMIT


def test_events_are_read_in_the_order_of_their_index(filled: Plain) -> None:
    for query in (
        ListEvents("event-1", LIMIT),
        ListEvents("event-1", LIMIT, is_descending=True, after=(OLD_END, 5000)),
    ):
        rows, indexes = looked_at(filled, *select_events(query, 1))
        assert rows <= LIMIT + 1
        assert indexes == {"idx_events_time"}


def test_every_field_that_is_a_filter_has_an_index(filled: Plain) -> None:
    for name in FILTERS:
        index, _ = INDEXES[frozenset({name})]
        columns = filled.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) ORDER BY attnum", (index,)
        ).fetchall()
        assert columns[0] == (name,)
        assert columns[-2:] == [("created_at",), ("id",)] or name == "event_id"


@pytest.mark.parametrize("order", ["ASC", "DESC"])
def test_the_runs_of_a_finding_are_walks_in_order(filled: Plain, is_analyzed: bool, order: str) -> None:
    """However long the stretch is, no more of it is looked at than is read for a finding."""
    stretch = {"agent_name": "old", "job_type": "old", "start": "2025-12-01T00:00:00Z", "end": "2026-12-01T00:00:00Z"}
    few = RUNS.format(order=order).replace(f"LIMIT {MAX_RUNS}", f"LIMIT {LIMIT}")
    rows, indexes = looked_at(filled, few, stretch)
    assert rows <= MOST, indexes
    assert "Seq Scan" not in indexes
