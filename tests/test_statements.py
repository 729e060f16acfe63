"""The SQL of a page: which plan it gets, and that its answer is what filtering and sorting in Python gives."""

from __future__ import annotations

import ast
import contextlib
import itertools
import operator
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from telemetryd.engine.sqlite.statements import runs as run_rows
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.statements.predicates import old_runs, stale_runs
from telemetryd.engine.sqlite.statements.runs import fetch_counts, fetch_page, fetch_run, select_page
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.model.commands import Created, CreateRuns, Updated, UpdateRun
from telemetryd.model.filters import Filters
from telemetryd.model.queries import (
    CountPrunable,
    CountRuns,
    Counts,
    CountStale,
    GetRun,
    ListRuns,
    Page,
    Position,
    parse_list,
)
from telemetryd.model.runs import COLUMNS, CREATED_AT, parse_run
from telemetryd.model.values import Row, Status
from tests.conftest import Api, make_run
from tests.tools.docs import ROOT

NOW = "2025-12-24T12:00:00.000000Z"
AGENTS = ("hugo-translator", "seo", "crawler")
JOBS = ("translate_directory", "insight", "crawl")
# Few moments, so that many runs share one and only the id orders them.
MOMENTS = [f"2025-12-24T{hour:02}:{minute:02}:00.000000Z" for hour in range(9, 12) for minute in (0, 20, 40)]
EARLY, LATE = MOMENTS[2], MOMENTS[6]
EQUAL = ("agent_name", "status", "job_type")
BOUNDS = ("created_before", "created_after", "start_time_from", "start_time_to")
BOUND_VALUES = {"created_before": LATE, "created_after": EARLY, "start_time_from": EARLY, "start_time_to": LATE}
COMPARE: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "created_before": ("created_at", operator.lt),
    "created_after": ("created_at", operator.gt),
    "start_time_from": ("start_time", operator.ge),
    "start_time_to": ("start_time", operator.le),
}


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [chosen for size in range(len(names) + 1) for chosen in itertools.combinations(names, size)]


COMBINATIONS = [(equal, bounds) for equal in subsets(EQUAL) for bounds in subsets(BOUNDS)]


def random_row(source: random.Random, event_id: str, **fields: object) -> Row:
    run = {
        "event_id": event_id,
        "run_id": f"run-{event_id}",
        "agent_name": source.choice(AGENTS),
        "job_type": source.choice(JOBS),
        "status": str(source.choice(list(Status))),
        "created_at": source.choice(MOMENTS),
        "start_time": source.choice(MOMENTS),
        **fields,
    }
    return parse_run(run).row


def store(connection: sqlite3.Connection, rows: list[Row]) -> None:
    with connection:
        connection.execute("BEGIN")
        transaction = Transaction(connection, NOW)
        transaction.apply([CreateRuns(tuple(rows))])
        transaction.finish()


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A fresh database with the real schema."""
    opened = sqlite3.connect(tmp_path / "telemetry.sqlite", isolation_level=None)
    opened.execute("PRAGMA synchronous = OFF")
    migrate.create(opened, NOW)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a database with 400 random runs."""
    path = tmp_path_factory.mktemp("full") / "telemetry.sqlite"
    source = random.Random(1)
    with closing(sqlite3.connect(path, isolation_level=None)) as made:
        made.execute("PRAGMA synchronous = OFF")
        migrate.create(made, NOW)
        store(made, [random_row(source, f"event-{number}") for number in range(400)])
    return path


@pytest.fixture
def filled(tmp_path: Path, full: Path) -> Iterator[sqlite3.Connection]:
    """A copy of it."""
    path = tmp_path / "telemetry.sqlite"
    shutil.copyfile(full, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as opened:
        opened.execute("PRAGMA synchronous = OFF")
        yield opened


def everything(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Every row, by a statement of the test's own."""
    rows = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM agent_runs").fetchall()
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def brute_force(runs: list[dict[str, Any]], query: ListRuns) -> list[int]:
    """The ids that a query must answer if there were no limit, in order."""
    matching = [
        run
        for run in runs
        if all(run[name] in values for name, values in query.filters.equal.items())
        and all(COMPARE[name][1](run[COMPARE[name][0]], value) for name, value in query.filters.bounds.items())
    ]
    return [run["id"] for run in sorted(matching, key=lambda run: (run["created_at"], run["id"]), reverse=True)]


def ids(page: Page) -> list[int]:
    return [orjson.loads(run)["id"] for run in page.runs]


def plan(connection: sqlite3.Connection, query: ListRuns) -> list[str]:
    started = {"start_time_from", "start_time_to"} & set(query.filters.bounds)
    sql, values = select_page(query, ("2025-12-24T09", "2025-12-24T10;") if started else None)
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]


@pytest.mark.parametrize("agent_name", [None, "seo"])
@pytest.mark.parametrize("job_type", [None, "crawl"])
@pytest.mark.parametrize("status", [None, "success"])
def test_runs_to_prune_and_to_reap_are_found_without_a_sort(
    filled: sqlite3.Connection, agent_name: str | None, job_type: str | None, status: str | None
) -> None:
    ever = "9999-01-01T00:00:00.000000Z"
    prune = CountPrunable(ever, agent_name, job_type, status)
    reap = CountStale(ever, agent_name, job_type)
    wanted = {"agent_name": agent_name, "job_type": job_type, "status": status}
    found_by = [(old_runs(prune), wanted)]
    if status is None:  # to reap takes none
        found_by.append((stale_runs(reap), {**wanted, "status": "running"}))
    for (walks, values), equal in found_by:
        found = []
        for walk in walks:
            sql = f"SELECT agent_runs.id FROM {walk.in_order}"
            assert "TEMP B-TREE" not in str(filled.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall())
            found += [run for (run,) in filled.execute(sql, values)]
        given = {name: value for name, value in equal.items() if value is not None}
        assert sorted(found) == [
            run["id"] for run in everything(filled) if all(run[name] == value for name, value in given.items())
        ]


def make_query(
    equal: tuple[str, ...], bounds: tuple[str, ...], after: Position | None = None, source: random.Random | None = None
) -> ListRuns:
    values = {"agent_name": AGENTS[0], "status": "running", "job_type": JOBS[0]}
    moments = BOUND_VALUES
    if source is not None:
        values = {"agent_name": source.choice(AGENTS), "status": source.choice(list(Status)), "job_type": JOBS[1]}
        moments = {name: source.choice(MOMENTS) for name in BOUNDS}
    filters = Filters({name: (str(values[name]),) for name in equal}, {name: moments[name] for name in bounds})
    return ListRuns(filters, limit=100, after=after)


def test_the_combinations_cover_every_documented_filter() -> None:
    from telemetryd.engine.indexes import INDEXES

    assert {frozenset(equal) for equal in subsets(EQUAL)} == {names for names in INDEXES if names <= set(EQUAL)}
    assert len(COMBINATIONS) == 2**7


@pytest.mark.parametrize("analyzed", [False, True], ids=["fresh", "analyzed"])
@pytest.mark.parametrize("after", [None, Position(LATE, 200)], ids=["first page", "cursor"])
def test_every_combination_of_filters_walks_an_index_in_order(
    filled: sqlite3.Connection, after: Position | None, analyzed: bool
) -> None:
    if analyzed:
        filled.execute("ANALYZE")
    for equal, bounds in COMBINATIONS:
        steps = plan(filled, make_query(equal, bounds, after))
        told = f"{equal} {bounds}: {steps}"
        assert not [step for step in steps if "TEMP B-TREE" in step], told
        tables = [step for step in steps if "agent_runs" in step]
        assert tables, told
        for step in tables:
            assert re.search(r"USING INDEX idx_runs_\w+", step), told
            is_bounded = after is not None or {"created_before", "created_after"} & set(bounds)
            if equal or is_bounded:
                assert step.startswith("SEARCH"), told
            for name in equal:
                assert f"{name}=?" in step, told
            if is_bounded:
                assert re.search(r"created_at[<>=]", step), told


def test_the_guides_own_example_uses_the_guides_index(filled: sqlite3.Connection) -> None:
    text = "agent_name=hugo-translator&status=running&created_before=2025-12-24T12:00:00Z&limit=100"
    (step,) = plan(filled, parse_list(text))
    assert step.startswith("SEARCH agent_runs USING INDEX idx_runs_agent_status_created")
    steps = filled.execute(
        "EXPLAIN QUERY PLAN SELECT * FROM agent_runs WHERE agent_name = 'hugo-translator' AND status = 'running' "
        "AND created_at < '2025-12-24T12:00:00Z' ORDER BY created_at DESC LIMIT 100"
    ).fetchall()
    assert [row[3] for row in steps] == [step]


def pages_by_cursor(connection: sqlite3.Connection, query: ListRuns) -> Iterator[list[int]]:
    while True:
        page = fetch_page(connection, query)
        yield ids(page)
        if page.end is None:
            return
        query = replace(query, after=query.position(query.cursor(page.end)))


def test_every_combination_answers_what_brute_force_answers(filled: sqlite3.Connection) -> None:
    """In pages by cursor and by offset, each run once."""
    runs = everything(filled)
    source = random.Random(2)
    sizes = set()
    for equal, bounds in COMBINATIONS:
        query = replace(make_query(equal, bounds, source=source), limit=17)
        expected = brute_force(runs, query)
        pages = list(pages_by_cursor(filled, query))
        assert list(itertools.chain(*pages)) == expected, query
        assert all(len(page) == 17 for page in pages[:-1])
        assert len(pages) == max(1, -(-len(expected) // 17))
        offsets = range(0, len(expected) + 1, 17)
        by_offset = [ids(fetch_page(filled, replace(query, offset=offset))) for offset in offsets]
        assert list(itertools.chain(*by_offset)) == expected, query
        sizes.add(len(expected))
    assert len(sizes) > 30  # neither empty answers only, nor everything always


@pytest.mark.parametrize("equal", subsets(EQUAL), ids=" ".join)
def test_paging_by_cursor_is_not_disturbed_by_new_runs(filled: sqlite3.Connection, equal: tuple[str, ...]) -> None:
    query = replace(make_query(equal, ()), limit=5)
    expected = brute_force(everything(filled), query)
    source = random.Random(3)
    visited = []
    for number, page in enumerate(pages_by_cursor(filled, query)):
        visited += page
        newest = {"created_at": "2025-12-24T12:00:00Z"} if number % 2 else {}
        store(
            filled,
            [
                random_row(
                    source,
                    f"new-{number}-{n}",
                    **{name: values[0] for name, values in query.filters.equal.items()},
                    **newest,
                )
                for n in range(3)
            ],
        )
        assert number < 1000
    assert len(visited) == len(set(visited))
    known = set(expected)
    assert [run for run in visited if run in known] == expected


def test_a_page_far_behind_costs_what_the_first_one_costs(connection: sqlite3.Connection) -> None:
    source = random.Random(4)
    rows = [
        random_row(source, f"event-{n}", created_at=f"2025-12-24T10:{n // 60 % 60:02}:{n % 60:02}Z")
        for n in range(3000)
    ]
    store(connection, rows)

    def cost(query: ListRuns) -> int:
        """Instructions of SQLite's machine, in hundreds."""
        ticks = itertools.count()
        connection.set_progress_handler(lambda: next(ticks) and None, 100)
        fetch_page(connection, query)
        connection.set_progress_handler(None, 0)
        return next(ticks)

    for equal in subsets(EQUAL):
        query = replace(make_query(equal, ()), limit=10)
        order = brute_force(everything(connection), query)
        (created_at,) = connection.execute("SELECT created_at FROM agent_runs WHERE id = ?", (order[-30],)).fetchone()
        far = replace(query, after=Position(created_at, order[-30]))
        assert ids(fetch_page(connection, far)) == order[-29:-19]
        assert cost(far) <= cost(query) * 1.5 + 2, equal
    skipping = ListRuns(limit=10, offset=2900)
    assert cost(skipping) > 3 * cost(ListRuns(limit=10))  # so the measure does tell a skip


def test_a_run_is_found_by_its_event_id_through_the_unique_index(filled: sqlite3.Connection) -> None:
    found = fetch_run(filled, GetRun("event-17"))
    assert found is not None
    assert found[0][COLUMNS.index("run_id")] == "run-event-17"
    assert fetch_run(filled, GetRun("event-1700")) is None
    assert fetch_run(filled, GetRun("' OR 1=1 --")) is None


def test_changes_of_one_run_in_a_group_are_made_one_after_the_other(filled: sqlite3.Connection) -> None:
    changes = [
        UpdateRun("event-3", {"status": "failure", "items_failed": 3}),
        UpdateRun("event-4", {"items_failed": 4}),
        UpdateRun("event-3", {"status": "success"}),
        UpdateRun("nobody", {"status": "success"}),
        UpdateRun("event-4", {"items_failed": 5}),
    ]
    filled.execute("BEGIN")
    transaction = Transaction(filled, NOW)
    outcomes = transaction.apply(changes)
    transaction.finish()
    filled.execute("COMMIT")
    assert outcomes == [*(Updated(f"run-event-{number}") for number in (3, 4, 3)), None, Updated("run-event-4")]
    rows = filled.execute("SELECT event_id, status, items_failed FROM agent_runs WHERE event_id GLOB 'event-[34]'")
    stored = {event_id: values for event_id, *values in rows}
    assert stored["event-3"] == ["success", 3]
    assert stored["event-4"][1] == 5


def test_the_totals_are_those_of_the_rows_after_any_commands(filled: sqlite3.Connection) -> None:
    source = random.Random(5)
    for _ in range(30):
        with filled:
            filled.execute("BEGIN")
            transaction = Transaction(filled, NOW)
            for _ in range(5):
                event_id = f"event-{source.randrange(500)}"
                row = random_row(source, event_id)
                if source.random() < 0.5:
                    assert isinstance(transaction.apply([CreateRuns((row, row))])[0], Created)
                else:
                    update = UpdateRun(event_id, {"status": str(source.choice(list(Status)))})
                    with contextlib.suppress(ZeroDivisionError), transaction.savepoint():
                        [outcome] = transaction.apply([update])
                        assert outcome is None or isinstance(outcome, Updated)
                        if source.random() < 0.3:
                            raise ZeroDivisionError
            transaction.finish()
    runs = everything(filled)
    agents = {agent: sum(run["agent_name"] == agent for run in runs) for agent in AGENTS}
    since = "2025-12-24T10:20:00.000000Z"
    recent = sum(run["created_at"] >= since for run in runs)
    assert fetch_counts(filled, CountRuns(since, "9999-12-31T23:59:59.999999Z")) == Counts(
        agents, tuple(sorted(JOBS)), recent, len(runs), len(agents), len(JOBS)
    )
    kept = filled.execute("SELECT agent_name, job_type, status, runs FROM run_totals WHERE runs > 0 ORDER BY 1, 2, 3")
    counted = filled.execute(
        "SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    assert kept.fetchall() == counted.fetchall()


def test_the_cost_of_the_counts_does_not_grow_with_the_runs(filled: sqlite3.Connection) -> None:
    statements: list[str] = []
    filled.set_trace_callback(statements.append)
    fetch_counts(filled, CountRuns(NOW, NOW))
    filled.set_trace_callback(None)
    assert len(statements) == 4
    assert not [statement for statement in statements if "agent_runs" in statement]


async def test_of_many_agents_those_with_most_runs_are_named_and_the_others_counted(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.batch([make_run(agent_name=name, job_type=name) for name in "abbcccdd"])
    assert [*(await api.get("/metrics"))["agents"].items()] == [("c", 3), ("b", 2), ("d", 2), ("a", 1)]
    monkeypatch.setattr(run_rows, "MAX_NAMES", 2)
    await api.post(make_run(agent_name="c", job_type="c"))
    metrics = await api.get("/metrics")
    assert ([*metrics["agents"].items()], metrics["agents_more"]) == ([("c", 4), ("b", 2)], 2)
    assert metrics["total_runs"] == 9
    metadata = await api.get("/api/v1/metadata")
    assert (metadata["agent_names"], metadata["job_types"]) == (["b", "c"], ["a", "b"])
    assert metadata["counts"] == {"agent_names": 4, "job_types": 4}


@pytest.mark.parametrize("bounds", [{}, {"created_before": "2025-12-25T00:00:00.000000Z"}], ids=["open", "bounded"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "at the same moment"])
def test_a_page_deep_behind_a_cursor_costs_what_the_first_one_costs(bounds: dict[str, str], tied: bool) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrate.create(connection, NOW)
        source = random.Random(3)
        rows = [random_row(source, f"event-{number}") for number in range(2000)]
        transaction = Transaction(connection, "2025-12-24T12:00:00.000000Z")
        spread = [
            (*row[:CREATED_AT], "" if tied else f"2025-12-24T00:00:00.{n:06d}Z", *row[CREATED_AT + 1 :])
            for n, row in enumerate(rows)
        ]
        transaction.apply([CreateRuns(tuple(spread))])
        transaction.finish()

        def steps(query: ListRuns) -> int:
            count = 0

            def step() -> None:
                nonlocal count
                count += 1

            connection.set_progress_handler(step, 10)
            assert len(fetch_page(connection, query).runs) == 20
            connection.set_progress_handler(None, 0)
            return count

        first = ListRuns(Filters(bounds=bounds), limit=20)
        deep = fetch_page(connection, replace(first, limit=20, offset=1900)).end
        assert deep is not None
        assert steps(replace(first, after=deep)) <= steps(first) * 1.5 + 20


def test_totals_that_have_drifted_do_not_refuse_a_change(filled: sqlite3.Connection) -> None:
    filled.execute("UPDATE run_totals SET runs = 0")
    transaction = Transaction(filled, NOW)
    event_id = str(filled.execute("SELECT event_id FROM agent_runs WHERE status = 'running'").fetchone()[0])
    transaction.apply([UpdateRun(event_id, {"status": "success"})])
    transaction.finish()
    assert filled.execute("SELECT min(runs) FROM run_totals").fetchone()[0] == 0


def test_no_statement_numbers_its_parameters() -> None:
    """From Python 3.14 on, `?1` takes no sequence of values (docs.python.org/3.14/library/sqlite3.html)."""
    for path in (ROOT / "telemetryd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"[\s(]\?\d", node.value), f"{path}:{node.lineno}"
