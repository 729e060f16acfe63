"""Queries on PostgreSQL are answered as SQLite answers them, byte for byte."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import REGISTRY as POSTGRES
from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.statements.answers import REGISTRY as SQLITE
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.model.commands import CreateRuns
from telemetryd.model.queries import Count, CountMatching, Page, Query, parse_list
from telemetryd.model.runs import parse_run
from tests import twins
from tests.postgres_cluster import Cluster
from tests.test_filters import MOMENTS, NOW, ORDERS, PARAMETERS, random_run

POSTGRES.load()
SQLITE.load()
MOST_PARAMETERS = 28
FIELDS = (None, "event_id", "commit_url,repo_url", "api_posted,metrics_json,repo_url", "status,created_at,id")


class Twins(NamedTuple):
    """A database of each engine that hold the same."""

    sqlite: sqlite3.Connection
    postgres: Plain

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
            yield Twins(connection, plain)
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
