"""Any filters, over real rows: what is answered is what Python finds, each run once, by a walk down an index."""

from __future__ import annotations

import itertools
import random
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from telemetryd.engine.indexes import INDEXES, MAX_ARMS, choose
from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.statements import counts, full_text
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.statements.runs import fetch_page, find_agents, select_page
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.model.commands import CreateRuns
from telemetryd.model.filters import Comparison, Filters, quoted
from telemetryd.model.queries import Accuracy, Count, CountMatching, Position, parse_list
from telemetryd.model.runs import FILTERS, TABLE, parse_run
from telemetryd.model.values import Status

NOW = "2025-12-24T12:00:00.000000Z"
MOMENTS = [f"2025-12-24T{hour:02}:{minute:02}:00.000000Z" for hour in (9, 10) for minute in (0, 20, 40)]
AGENTS = ("seo", "seo-blog", "Seo", "crawler", "a,b", "a*b", "[a]?", "\\", "über")
TEXTS = ("red", "green", "100%", "a_b", "x")
ERRORS = (None, "Timed out after 100% of ÄRGER", "timed OUT", "Ärger mit dem Server", "a\\b_c*[d]?", "")
WORDS = (None, "translated 100 pages", "Nothing to translate", "pages: café", "crawled")
LABELS = ("red", "green", "a,b", "a*b", "\\", "über", "'")
METRICS: tuple[Any, ...] = (
    None, {}, {"tokens": 5}, {"tokens": 1000, "model": "gpt"}, {"tokens": 2.5, "model": "5", "ok": True},
    {"tokens": "1000", "ok": False}, {"tokens": None, "usage": {"in": 7}}, {"usage": {"in": 70.0}, "model": "ärger"},
)  # fmt: skip


def random_run(source: random.Random, number: int) -> dict[str, Any]:
    optional = (
        "product", "website", "git_commit_hash", "host", "environment", "insight_id", "parent_run_id", "retry_of",
        "conversation_id",
    )  # fmt: skip
    return {
        "event_id": f"event-{number}",
        "run_id": source.choice(TEXTS),
        "agent_name": source.choice(AGENTS),
        "job_type": source.choice(TEXTS[:2]),
        "status": str(source.choice(list(Status))),
        "created_at": source.choice(MOMENTS),
        "start_time": source.choice(MOMENTS),
        "duration_ms": source.choice((0, 10, 1000)),
        "error_summary": source.choice(ERRORS),
        "error_details": source.choice(ERRORS),
        "input_summary": source.choice(WORDS),
        "output_summary": source.choice(WORDS),
        "metrics_json": source.choice(METRICS),
        "labels": {name: source.choice(LABELS) for name in ("team", "a.b_c-1") if source.random() < 0.6},
        "trace_id": source.choice((None, "a" * 32, "b" * 32)),
        **{name: source.choice((None, *TEXTS)) for name in optional},
    }


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    """A database with 300 random runs and the full-text index."""
    path: Path = tmp_path_factory.mktemp("filters") / "telemetry.sqlite"
    source = random.Random(7)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        searching.add_to(connection, lambda: False)
        migrate.create(connection, NOW)
        rows = [parse_run(random_run(source, number)).row for number in range(300)]
        connection.execute("BEGIN")
        transaction = Transaction(connection, NOW)
        transaction.apply([CreateRuns(tuple(rows[:150]))])
        full_text.rebuild(connection)
        transaction.apply([CreateRuns(tuple(rows[150:]))])
        transaction.finish()
        connection.execute("COMMIT")
        yield connection


# --- What a filter means, once more, in Python ----------------------------------------------------


def has_agent(filters: Filters, name: str) -> bool:
    patterns = [".*".join(map(re.escape, pattern)) for pattern in filters.patterns]
    return name in filters.equal.get("agent_name", ()) or any(re.fullmatch(pattern, name) for pattern in patterns)


def compares(run: dict[str, Any], comparison: Comparison) -> bool:
    found: Any = orjson.loads(run["metrics_json"]) if run["metrics_json"] else None
    for key in comparison.path:
        found = found.get(key) if isinstance(found, dict) else None
    value: Any = comparison.value
    kinds: Any = bool if isinstance(value, bool) else str if isinstance(value, str) else (int, float)
    if not isinstance(found, kinds) or (isinstance(found, bool) and kinds is not bool):
        return False
    if isinstance(value, str):
        found, value = found.encode(), value.encode()
    results: dict[str, bool] = {
        ">": found > value, "<": found < value, ">=": found >= value, "<=": found <= value, "=": found == value,
        "!=": found != value,
    }  # fmt: skip
    return results[comparison.operator]


def has_words(run: dict[str, Any], words: str) -> bool:
    """For the searches of these tests: words and prefixes, each in any of the fields."""
    plain = str.maketrans("äé", "ae")
    texts = [str(run[name] or "").lower().translate(plain) for name in full_text.SEARCHED]
    there = set(itertools.chain(*(re.findall(r"\w+", text.replace("_", " ")) for text in texts)))
    wanted = words.lower().translate(plain).split()
    return all(any(w == t or (w.endswith("*") and t.startswith(w[:-1])) for t in there) for w in wanted)


def matches(run: dict[str, Any], filters: Filters) -> bool:
    bounds = {"created_before": ("created_at", "<"), "created_after": ("created_at", ">")}
    bounds |= {"start_time_from": ("start_time", ">="), "start_time_to": ("start_time", "<=")}
    for name, moment in filters.bounds.items():
        column, sign = bounds[name]
        value = run[column]
        if not {"<": value < moment, ">": value > moment, ">=": value >= moment, "<=": value <= moment}[sign]:
            return False
    return (
        all(run[name] in values for name, values in filters.equal.items() if name != "agent_name")
        and (not (filters.patterns or "agent_name" in filters.equal) or has_agent(filters, run["agent_name"]))
        and run["duration_ms"] >= (filters.min_duration_ms or 0)
        and (filters.error is None or any(
            filters.error.lower() in (run[name] or "").lower() for name in ("error_summary", "error_details")
        ))
        and all(compares(run, comparison) for comparison in filters.metrics)
        and (filters.words is None or has_words(run, filters.words))
        and all(orjson.loads(run["labels"] or "{}").get(key) in values for key, values in filters.labels.items())
    )  # fmt: skip


# --- Any filters ---------------------------------------------------------------------------------


def some(values: tuple[str, ...]) -> st.SearchStrategy[str]:
    one = st.sampled_from(values).map(quoted)
    return one | st.lists(one, min_size=1, max_size=4).map(",".join)


PATTERNS = st.sampled_from(
    ("seo*", "*o", "*", "s*o", "*-*", "über*", "nobody*", "\\*", "a*b", "[*", "*\\*b", "?*", "c**r")
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "agent_name": some(AGENTS) | PATTERNS | st.tuples(PATTERNS, some(AGENTS)).map(",".join),
        "job_type": some(TEXTS[:3]),
        "status": some(tuple(map(str, Status))),
        **{name: some(TEXTS) for name in FILTERS if name not in ("agent_name", "job_type", "status")},
        **{
            n: st.sampled_from(MOMENTS) for n in ("created_before", "created_after", "start_time_from", "start_time_to")
        },
        "min_duration_ms": st.sampled_from(["0", "10", "11", "1000"]),
        "error": st.sampled_from(["timed out", "TIMED", "ärger", "Ärger", "100%", "_c", "*[", "]?", "\\", "nowhere"]),
        "q": st.sampled_from(["pages", "PAGES translated", "trans*", "cafe", "arger", "nowhere", "100"]),
        "metrics.tokens>": st.sampled_from(["5", "2.5", "1e3", "true", '"1000"', "a"]),
        "metrics.tokens!": st.sampled_from(["5", '"1000"']),
        "metrics.model": st.sampled_from(["gpt", '"5"', "5", "ärger"]),
        "metrics.ok": st.sampled_from(["true", "false"]),
        "metrics.usage.in<8": st.just(""),
        "label.team": some(LABELS),
        "label.a.b_c-1": some(LABELS),
        "label.key": some(LABELS[:1]),
    },
)
ORDERS = st.sampled_from([None, "created_at", "-created_at", "start_time", "-start_time"])


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(PARAMETERS, ORDERS, st.integers(1, 40))
@example({"agent_name": "*"}, None, 7)
@example({"agent_name": "seo*,crawler", "status": "failure,timeout", "job_type": "red,green"}, "created_at", 3)
@example({"start_time_from": MOMENTS[1], "start_time_to": MOMENTS[4], "host": "red,green"}, "-start_time", 4)
@example({"q": "pages", "agent_name": "seo,crawler"}, "start_time", 2)
@example({"label.team": "red,über", "label.a.b_c-1": "green,red", "created_after": MOMENTS[1]}, "created_at", 3)
@example({"label.team": "red,green", "start_time_from": MOMENTS[1], "start_time_to": MOMENTS[4]}, None, 2)
@example({"label.team": "red", "agent_name": "seo*"}, "-start_time", 4)
def test_pages_of_any_filters_hold_what_python_finds_each_run_once(
    filled: sqlite3.Connection, asked: dict[str, str], sort: str | None, limit: int
) -> None:
    runs = [dict(zip(TABLE, row, strict=True)) for row in filled.execute("SELECT * FROM agent_runs")]
    query = parse_list(urlencode({**asked, "limit": limit, **({"sort": sort} if sort else {})}))
    column = query.order.column
    expected = [
        run["id"]
        for run in sorted(runs, key=lambda run: (run[column], run["id"]), reverse=query.order.descending)
        if matches(run, query.filters)
    ]
    found: list[Any] = []
    while True:
        page = fetch_page(filled, query)
        found += [orjson.loads(run)["id"] for run in page.runs]
        if page.end is None:
            break
        assert len(page.runs) == limit
        query = parse_list(query.next_page("", page.end).removeprefix("?"))
    assert found == expected
    by_offset = fetch_page(filled, replace(query, after=None, offset=2))
    assert [orjson.loads(run)["id"] for run in by_offset.runs] == expected[2 : 2 + limit]
    assert counts.count_matching(filled, CountMatching(query.filters)).runs == len(expected)
    estimate = counts.count_matching(filled, CountMatching(query.filters, Count.ESTIMATED))
    assert estimate.accuracy is Accuracy.ESTIMATE or estimate.runs == len(expected)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(PARAMETERS, ORDERS, st.booleans(), st.booleans())
def test_every_plan_walks_an_index_in_order(
    filled: sqlite3.Connection, asked: dict[str, str], sort: str | None, behind: bool, by_label: bool
) -> None:
    query = parse_list(urlencode({**asked, **({"sort": sort} if sort else {})}))
    if behind:
        query = replace(query, after=Position(MOMENTS[3], 20))
    is_by_label = bool(query.filters.labels) and query.order.column == "created_at" and by_label
    label = next(iter(query.filters.labels)) if is_by_label else None
    sql, values = select_page(query, agents=find_agents(filled, query.filters) or None, label=label)
    plan = [row[3] for row in filled.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    assert not [step for step in plan if "TEMP B-TREE" in step], (plan, asked)
    if is_by_label:
        assert any("SEARCH chosen USING PRIMARY KEY (key=? AND value=?" in step for step in plan), plan
        assert not [step for step in plan if "SCAN" in step and "runs_text" not in step], plan
        return
    assert not [step for step in plan if "agent_runs" in step and "USING INDEX" not in step], plan
    narrowing = [name for name in query.filters.equal if name != "agent_name"]
    if narrowing and query.order.column == "created_at" and not query.filters.patterns and not query.filters.words:
        walks = [step for step in plan if "agent_runs" in step]
        assert all(re.match(r"SEARCH agent_runs USING INDEX \w+ \(\w+=\?", step) for step in walks), plan


def test_every_field_that_is_a_filter_has_an_index(filled: sqlite3.Connection) -> None:
    for name in FILTERS:
        index, _ = INDEXES[frozenset({name})]
        columns = [row[2] for row in filled.execute(f"PRAGMA index_info({index})")]
        assert columns[0] == name
        assert columns[-1] == "created_at" or columns == ["event_id"]


def test_values_are_combined_in_no_more_walks_than_one_statement_merges() -> None:
    many = tuple(f"v{number}" for number in range(32))
    for names in itertools.chain(*(itertools.combinations(FILTERS, size) for size in range(3))):
        _, columns, arms = choose(dict.fromkeys(names, many))
        assert 1 <= len(arms) <= MAX_ARMS
        assert bool(columns) == bool(names)


def test_a_run_without_texts_has_no_place_in_the_partial_indexes(filled: sqlite3.Connection) -> None:
    partial = dict(filled.execute("SELECT name, sql FROM sqlite_master WHERE sql LIKE 'CREATE INDEX%NOT NULL'"))
    assert {f"idx_runs_{name}" for name in FILTERS} & set(partial) == {
        f"idx_runs_{name}" for name in FILTERS if name not in ("event_id", "run_id", "agent_name", "job_type", "status")
    }
