"""Queries on PostgreSQL are answered as SQLite answers them, byte for byte."""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from telemetryd.engine import pages
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.exports import Exports
from telemetryd.engine.postgres.statements.answers import REGISTRY as POSTGRES
from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.exports import Exports as SqliteExports
from telemetryd.engine.sqlite.statements import full_text, rollups
from telemetryd.engine.sqlite.statements.answers import REGISTRY as SQLITE
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.errors import InvalidRequestError
from telemetryd.model import stats
from telemetryd.model.alerts import EvaluateRules, ListDeliveries, ListFiring
from telemetryd.model.change_points import MEASURES
from telemetryd.model.changes import PAGE_BYTES, GetFollowed, Known, ListChanges
from telemetryd.model.clocks import Reading
from telemetryd.model.commands import (
    AlertChange,
    Command,
    ConfirmPrune,
    CreateEvents,
    CreateRuns,
    DeleteRun,
    RecordAlerts,
    RegisterProcess,
    UpdateRun,
)
from telemetryd.model.event_queries import ListEvents
from telemetryd.model.events import cursor
from telemetryd.model.processes import Process
from telemetryd.model.queries import (
    Count,
    CountMatching,
    CountPrunable,
    CountRuns,
    CountStale,
    ExportRuns,
    Format,
    GetAgents,
    GetConfirmed,
    GetOthers,
    GetRun,
    ListProcesses,
    ListRuns,
    Page,
    Prunable,
    Query,
    parse_list,
)
from telemetryd.model.regressions import FindRegressions
from telemetryd.model.rules import FailureRate, Regression, Silent, Slow, Stale
from telemetryd.model.runs import DIGEST, EVENT_ID, parse_run
from telemetryd.model.values import format_timestamp
from telemetryd.settings import Settings
from tests import twins
from tests.postgres_cluster import Cluster
from tests.test_filters import MOMENTS, NOW, ORDERS, PARAMETERS, random_run

pytestmark = pytest.mark.postgresql

POSTGRES.load()
SQLITE.load()
NOW_AS_MOMENT = datetime(2025, 12, 24, 12, tzinfo=UTC)
STATS = [
    "&".join([*grouped, *bucket, *filtered])
    for grouped, bucket, filtered in itertools.product(
        ([], ["group_by=agent_name"], ["group_by=status,job_type"], ["group_by=job_type,agent_name,status"]),
        ([], ["bucket=5h", "from=-3d"], ["bucket=1d"], ["bucket=1w", "utc_offset=%2B05:00"]),
        ([], ["agent_name=seo", "status=success,failure"], ["agent_name=*e*", "job_type=red"], ["status=success"]),
    )
]
MOST_PARAMETERS = 28
FIELDS = (None, "event_id", "commit_url,repo_url", "api_posted,metrics_json,repo_url", "status,created_at,id")


class Twins(NamedTuple):
    """A database of each engine that hold the same."""

    sqlite: sqlite3.Connection
    postgres: Plain
    path: Path
    url: str

    def both(self, query: Query[Any]) -> Any:
        """Return the answer that both give."""
        expected = SQLITE.answer(self.sqlite, query)
        found = POSTGRES.answer(self.postgres, query)
        assert found == expected, query
        return found


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, new_postgres_database: str) -> Iterator[Twins]:
    """Databases with 300 random runs and the full-text index."""
    path: Path = tmp_path_factory.mktemp("twins") / "telemetry.sqlite"
    source = random.Random(7)
    name = cluster.make(new_postgres_database)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        searching.add_to(connection, lambda: False)
        migrate.create(connection, NOW)
        rows = [parse_run(random_run(source, number)).row for number in range(300)]
        connection.execute("BEGIN")
        transaction = Transaction(connection, NOW)
        transaction.apply([CreateRuns(tuple(rows))])
        full_text.rebuild(connection)
        transaction.finish()
        connection.execute("COMMIT")
        twins.copy(connection, cluster.url(name), full_text=True)
        with twins.reading(cluster.url(name)) as plain:
            yield Twins(connection, plain, path, cluster.url(name))
    cluster.drop(name)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(PARAMETERS, ORDERS, st.integers(1, 60), st.sampled_from(FIELDS))
@example({"agent_name": "*"}, None, 7, None)
@example({"agent_name": "seo*,crawler", "status": "failure,timeout", "job_type": "red,green"}, "created_at", 3, None)
@example({"q": "pages", "agent_name": "seo,crawler"}, "start_time", 2, None)
@example({"label.team": "red,über", "label.a.b_c-1": "green,red", "created_after": MOMENTS[1]}, "created_at", 3, None)
def test_any_filters_find_the_same_runs_page_after_page(
    filled: Twins, asked: dict[str, str], sort: str | None, limit: int, fields: str | None
) -> None:
    assume(len(asked) < MOST_PARAMETERS)
    given_too = {name: value for name, value in (("sort", sort), ("fields", fields)) if value}
    query = parse_list(urlencode({**asked, "limit": limit, **given_too}))
    page: Page = filled.both(query)
    filled.both(replace(query, offset=2, with_events=True))
    while page.end is not None:
        query = parse_list(query.next_page("", page.end).removeprefix("?"))
        page = filled.both(query)
    for count in Count:
        filled.both(CountMatching(query.filters, count))


# --- A database with a history -------------------------------------------------------------------


def history(source: random.Random) -> list[Command[Any]]:
    """Commands as agents send them over some weeks: runs, events, changes, deletions, processes, alerts."""
    rows = [parse_run(aged(source, number)).row for number in range(400)]
    commands: list[Command[Any]] = [CreateRuns(tuple(rows[start : start + 40])) for start in range(0, 400, 40)]
    names = [str(row[EVENT_ID]) for row in rows]
    for number in range(300):
        name = source.choice(names)
        commands.append(
            source.choice(
                (
                    UpdateRun(name, {"status": "success", "duration_ms": number}),
                    UpdateRun(name, {"metrics_json": f'{{"tokens":{number}}}', "error_summary": "Zeit überschritten"}),
                    CreateEvents(name, tuple(event(source, name, number + place) for place in range(5))),
                    RegisterProcess(name, process(number)),
                    DeleteRun(name) if number % 5 == 0 else UpdateRun(name, {"output_summary": "x" * number}),
                )
            )
        )
    commands.append(RecordAlerts((alert("stale", "seo"), alert("slow", "crawler", "red"))))
    commands.append(ConfirmPrune(86_400.0, Reading(NOW, "boot", 12.5)))
    return commands


def aged(source: random.Random, number: int) -> dict[str, Any]:
    created = datetime(2025, 12, 24, 12, tzinfo=UTC) - timedelta(minutes=source.randrange(-3, 40_000))
    started = format_timestamp(created - timedelta(seconds=source.randrange(9000)))
    slow = 1000 if number % 2 and created > datetime(2025, 12, 10, tzinfo=UTC) else 100
    return {
        **random_run(source, number),
        "created_at": format_timestamp(created),
        "start_time": started,
        "agent_name": source.choice(("seo", "Seo", "crawler", "a*b")),
        "duration_ms": source.choice((0, slow, slow + source.randrange(50), 2**62)),
        "items_succeeded": source.choice((0, 5, 2**62)),
        "git_commit_hash": f"{created.day:04x}abc",
        "git_repo": "git@github.com:acme/site.git",
    }


def event(source: random.Random, run: str, number: int) -> tuple[Any, ...]:
    payload = source.choice((None, f'{{"page":{number},"über":"ÄRGER \\"x\\""}}', '{"a":[1,2.5,null,true]}'))
    moment = f"2025-12-24T10:{number % 60:02}:00.000000Z"
    return (f"key-{number}", source.choice(("begun", "page_done", "Ärger")), moment, payload)


def process(number: int) -> Process:
    return Process(number % 7, 100 * (number % 3), "boot", "machine", "4026", None, number)


def alert(rule: str, agent: str, job: str = "") -> AlertChange:
    return AlertChange(f"id-{rule}", rule, (agent, job, "", ""), True, NOW, 7, "Text", '{"a":1}', ("one", "two"), "{}")


@pytest.fixture(scope="module", params=["added up", "waiting"])
def aged_twins(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    cluster: Cluster,
    new_postgres_database: str,
) -> Iterator[Twins]:
    """Databases with a history, whose statistics are added up or wait to be."""
    path: Path = tmp_path_factory.mktemp("twins") / "telemetry.sqlite"
    name = cluster.make(new_postgres_database)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        searching.add_to(connection, lambda: False)
        migrate.create(connection, NOW)
        for number, command in enumerate(history(random.Random(11))):
            connection.execute("BEGIN")
            transaction = Transaction(connection, format_timestamp(NOW_AS_MOMENT + timedelta(seconds=number)))
            transaction.apply([command])
            transaction.finish()
            connection.execute("COMMIT")
        if request.param == "added up":
            rollups.fold(connection.cursor())
        twins.copy(connection, cluster.url(name))
        with twins.reading(cluster.url(name)) as plain:
            yield Twins(connection, plain, path, cluster.url(name))
    cluster.drop(name)


def event_ids(twins: Twins) -> list[str]:
    return [name for (name,) in twins.sqlite.execute("SELECT event_id FROM agent_runs ORDER BY id")]


def test_single_runs_and_their_agents_are_the_same(aged_twins: Twins) -> None:
    names = [*event_ids(aged_twins), "unknown"]
    for name in names:
        for most in (0, 1, 3, 100):
            aged_twins.both(GetRun(name, most))
    aged_twins.both(GetAgents(tuple(names)))
    digests = aged_twins.sqlite.execute(f"SELECT event_id, {DIGEST} FROM agent_runs").fetchall()
    aged_twins.both(GetOthers(tuple((name, value + place % 2) for place, (name, value) in enumerate(digests))))
    aged_twins.both(GetOthers(()))
    processes = POSTGRES.answer(aged_twins.postgres, ListProcesses())
    assert {*processes} == {*SQLITE.answer(aged_twins.sqlite, ListProcesses())}


@pytest.mark.parametrize("text", [None, "page", "ärger", 'ÄRGER \\"X', "2.5,NULL", "[1"])
@pytest.mark.parametrize("is_descending", [True, False])
def test_events_are_the_same_page_after_page(aged_twins: Twins, text: str | None, is_descending: bool) -> None:
    for name in event_ids(aged_twins)[::5]:
        query = ListEvents(name, 2, is_descending=is_descending, text=text)
        aged_twins.both(replace(query, offset=1))
        while (page := aged_twins.both(query)).more:
            query = replace(query, after=cursor(page.rows[-1]))


def test_pages_show_the_same_events(aged_twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    aged_twins.both(ListRuns(limit=50, with_events=True))
    monkeypatch.setattr(pages, "PAGE_BYTES", 30_000)
    aged_twins.both(ListRuns(limit=10, with_events=True))
    refusals = 0
    for room, limit in itertools.product((1, 5_000, 20_000), (1, 5, 50)):
        monkeypatch.setattr(pages, "PAGE_BYTES", room)
        refusals += refusal(aged_twins, ListRuns(limit=limit)) is not None
    assert refusals == 5


def refusal(twins: Twins, query: Query[Any]) -> str | None:
    """Return with which words both refuse to answer, if they do."""
    said: list[Any] = []
    for answer in (partial(SQLITE.answer, twins.sqlite), partial(POSTGRES.answer, twins.postgres)):
        try:
            said.append(answer(query))
        except InvalidRequestError as error:
            said.append(str(error))
    assert said[0] == said[1]
    return said[0] if isinstance(said[0], str) else None


def test_statistics_are_the_same(aged_twins: Twins) -> None:
    for text, bounds in itertools.product(
        STATS, ("", "from=-40d&to=now", "from=2025-12-01T00:00:00Z&to=2025-12-20T05:00:00Z")
    ):
        joined = "&".join(filter(None, (bounds if "from=" not in text else "", text)))
        aged_twins.both(stats.parse(joined, NOW_AS_MOMENT))


def test_counts_are_the_same(aged_twins: Twins) -> None:
    aged_twins.both(CountRuns("2025-12-23T12:00:00.000000Z", NOW))
    aged_twins.both(GetConfirmed())
    for text in (
        "",
        "status=success",
        "agent_name=seo&created_after=-5d",
        "agent_name=s*",
        "created_before=-9d",
        "host=red",
    ):
        for count in Count:
            aged_twins.both(CountMatching(parse_list(text, lambda: NOW_AS_MOMENT).filters, count))
    for before in ("2025-12-10T00:00:00.000000Z", "2025-12-24T12:01:00.000000Z", "2025-12-24T13:00:00.000000Z"):
        for names in ({}, {"agent_name": "seo"}, {"agent_name": "crawler", "job_type": "red"}):
            found: Prunable = POSTGRES.answer(aged_twins.postgres, CountPrunable(before, **names))
            expected: Prunable = SQLITE.answer(aged_twins.sqlite, CountPrunable(before, **names))
            assert (found.runs, found.oldest, sorted(found.ahead)) == (
                expected.runs,
                expected.oldest,
                sorted(expected.ahead),
            )
            aged_twins.both(CountStale(before, **names))
            aged_twins.both(CountPrunable(before, status="running", **names))


def test_changes_are_the_same_page_after_page(aged_twins: Twins) -> None:
    wanted = tuple(parse_list(text).filters for text in ("status=success", "error=ZEIT", "metrics.tokens>100"))
    newest = aged_twins.both(ListChanges(limit=1)).newest
    for limit, most_bytes, events_after in ((7, PAGE_BYTES, None), (37, 5_000, 0), (1000, PAGE_BYTES, 3), (50, 1, 0)):
        query = ListChanges(limit=limit, filters=wanted, most_bytes=most_bytes, events_after=events_after)
        while True:
            page = aged_twins.both(query)
            if not page.more:
                break
            after = query.events_after
            if page.events:
                after = page.events[-1][1]
            query = replace(query, after=page.last, events_after=after)
    followed = aged_twins.both(GetFollowed())
    known = (*followed.known, replace(followed.known[0], updated_at=""), Known(3, "other", 3, ""), Known(3, "gone"))
    for each in known:
        for after in (newest, 5):
            aged_twins.both(ListChanges(after, known=(each,)))


def test_alerts_and_regressions_are_the_same(aged_twins: Twins) -> None:
    everyone: dict[str, Any] = {"agent_name": ("*",), "webhooks": ()}
    window = {**everyone, "job_type": (), "window_s": 40 * 86_400.0}
    rules = (
        Silent("silent", **everyone | {"agent_name": ("*", "nobody")}, after_s=86_400.0),
        Silent("silent-few", **everyone | {"agent_name": ("s*", "a*b")}, after_s=3600.0),
        Stale("stale", **everyone, after_s=600.0),
        FailureRate("failing", **window, above=0.1, min_runs=2),
        Slow("slow", **window, factor=1e-12, min_runs=2),
        Regression("worse", **window, measure=MEASURES),
    )
    evaluation = aged_twins.both(EvaluateRules(rules, NOW_AS_MOMENT + timedelta(days=10)))
    assert [name for name, findings in evaluation.found.items() if not findings] == ["worse"]
    aged_twins.both(ListFiring())
    for webhook in ("one", "two", "three"):
        aged_twins.both(ListDeliveries(webhook, 10))
    for text in ("", "agent_name=seo", "agent_name=s*&job_type=red"):
        filters = parse_list(text).filters
        aged_twins.both(FindRegressions(filters, "2025-11-01T00:00:00.000000Z", "2026-01-01T00:00:00.000000Z"))


# --- Exports -------------------------------------------------------------------------------------

EXPORTED = (
    "", "agent_name=seo", "agent_name=s*&status=success", "created_after=2025-12-20T00:00:00Z&label.team=red",
    "error=%C3%84RGER", "host=red,green&min_duration_ms=100", "label.team=red,green",
    "start_time_from=2025-12-20T00:00:00Z",
)  # fmt: skip


async def exported(exports: Any, query: ExportRuns) -> tuple[int, bool, bytes]:
    async with exports.open(query) as made:
        return made.rows, made.is_exact, b"".join([chunk async for chunk in made.chunks()])


@pytest.mark.parametrize("form", Format)
async def test_exports_are_the_same_byte_for_byte(aged_twins: Twins, form: Format) -> None:
    sqlite_exports = SqliteExports(Settings(db_path=aged_twins.path, min_free_mb=0))
    exports = Exports(twins.target_of(aged_twins.url))
    for text, with_events in itertools.product(EXPORTED, (False, True)):
        if with_events and form is not Format.NDJSON:
            continue
        query = ExportRuns(parse_list(text).filters, form, with_events)
        assert await exported(exports, query) == await exported(sqlite_exports, query), text


async def test_an_export_fetches_runs_of_any_length_a_few_at_a_time(
    aged_twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = ExportRuns(form=Format.NDJSON, with_events=True)
    exports = Exports(twins.target_of(aged_twins.url))
    expected = await exported(exports, query)
    for most in (1, 3_000):
        monkeypatch.setattr("telemetryd.engine.postgres.exports._FETCHED_BYTES", most)
        assert await exported(exports, query) == expected
