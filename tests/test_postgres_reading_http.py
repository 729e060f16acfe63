"""Any request that only reads gets the same answer over HTTP, whichever engine holds the data."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import quote, urlencode

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.http import make_app
from telemetryd.model.queries import Count, Format
from telemetryd.model.values import format_timestamp
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests import twins
from tests.conftest import Client, DaemonServer
from tests.postgres_cluster import Cluster
from tests.test_filters import NOW, ORDERS, PARAMETERS
from tests.test_postgres_reading import FIELDS, MOST_PARAMETERS, NOW_AS_MOMENT, STATS, history

RUNS = "/api/v1/runs"
COMPARED = ("Content-Type", "Link", "X-Total-Count", "X-Total-Count-Accuracy", "Telemetry-Snapshot", "Retry-After")
PAGES = 4


class Answer(NamedTuple):
    """What a client sees."""

    status: int
    headers: Mapping[str, str | None]
    body: bytes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(
    tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, new_postgres_database: str
) -> AsyncIterator[tuple[Client, Client]]:
    """A client of a daemon on each engine; both hold the same."""
    path: Path = tmp_path_factory.mktemp("twins") / "telemetry.sqlite"
    name = cluster.make(new_postgres_database)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        searching.add_to(connection, lambda: False)
        migrate.create(connection, NOW)
        full_text.rebuild(connection)
        for number, command in enumerate(history(random.Random(5))):
            connection.execute("BEGIN")
            transaction = Transaction(connection, format_timestamp(NOW_AS_MOMENT + timedelta(seconds=number)))
            transaction.apply([command])
            transaction.finish()
            connection.execute("COMMIT")
        twins.copy(connection, cluster.url(name), full_text=True)
    given_settings: tuple[dict[str, Any], ...] = (
        {"db_path": path, "db_journal_mode": "WAL", "min_free_mb": 0},
        {"db_url": cluster.url(name), "db_sync": "none"},
    )
    async with AsyncExitStack() as stack:
        clients = []
        for values in given_settings:
            chosen = Settings(**values, db_readers=2, query_timeout_s=60)
            metrics = Metrics()
            store = await Store.open(chosen, metrics)
            stack.push_async_callback(store.close)
            server = DaemonServer(make_app(store, chosen, metrics), chosen)
            clients.append(await stack.enter_async_context(cast("Client", TestClient(server))))
        yield clients[0], clients[1]
    cluster.drop(name)


async def ask(client: Client, address: str) -> Answer:
    async with client.get(address) as response:
        headers = {header: response.headers.get(header) for header in COMPARED}
        return Answer(response.status, headers, await response.read())


async def same(both: tuple[Client, Client], address: str) -> Answer:
    """Return the answer that both give."""
    expected, found = await ask(both[0], address), await ask(both[1], address)
    assert found == expected, address
    return found


async def same_pages(both: tuple[Client, Client], address: str) -> None:
    """Compare an answer, and those that its Link headers lead to."""
    for _ in range(PAGES):
        link = (await same(both, address)).headers["Link"]
        if not link:
            return
        address = f"{address.partition('?')[0]}?{link.partition('?')[2].partition('>')[0]}"


EVENT_IDS = st.integers(0, 420).map(lambda number: f"event-{number}")
TEXTS = st.sampled_from((None, "page", "ärger", 'x\\"', "2.5", "%", "_"))
LISTS = st.builds(
    lambda asked, more: f"{RUNS}?{urlencode({**asked, **{name: value for name, value in more.items() if value}})}",
    PARAMETERS.filter(lambda asked: len(asked) < MOST_PARAMETERS - 6),
    st.fixed_dictionaries(
        {
            "sort": ORDERS,
            "limit": st.integers(0, 120),
            "offset": st.sampled_from((0, 0, 3, 2**63 - 1)),
            "include": st.sampled_from((None, None, "events")),
            "count": st.sampled_from((None, *map(str, Count))),
            "fields": st.sampled_from(FIELDS),
        }
    ),
)
EXPORTS = st.builds(
    lambda asked, form, events: (
        f"{RUNS}/export?{urlencode({**asked, 'format': str(form), **({'include': 'events'} if events else {})})}"
    ),
    PARAMETERS.filter(lambda asked: len(asked) < MOST_PARAMETERS - 2),
    st.sampled_from(Format),
    st.booleans(),
)
SINGLE = st.builds(
    lambda name, end: f"{RUNS}/{quote(name)}{end}",
    st.one_of(EVENT_IDS, st.sampled_from(("%00", "no such run", "é"))),
    st.sampled_from(("", "?include=events", "/events", "/commit-url", "/repo-url")),
)
EVENTS = st.builds(
    lambda name, text, sort, limit: (
        f"{RUNS}/{name}/events?limit={limit}&sort={sort}{'' if text is None else f'&text={quote(text)}'}"
    ),
    EVENT_IDS,
    TEXTS,
    st.sampled_from(("timestamp", "-timestamp")),
    st.integers(1, 4),
)
CHANGES = st.builds(
    lambda after, limit, events, size: f"/api/v1/changes?after={after}&limit={limit}{events}&max_bytes={size}",
    st.integers(0, 900),
    st.integers(1, 1000),
    st.sampled_from(("", "&events_after=0", "&events_after=300")),
    st.sampled_from((65536, 8388608)),
)
FROM = ("from=2025-12-20T00:00:00Z", "from=2025-11-01T00:00:00Z")
STATISTICS = st.builds(
    lambda parts, begin: (
        "/api/v1/stats?" + "&".join(filter(None, (begin, "to=2025-12-25T00:00:00Z", parts.replace("&from=-3d", ""))))
    ),
    st.sampled_from(STATS),
    st.sampled_from(FROM),
)
OTHERS = st.sampled_from(
    (
        "/api/v1/metadata",
        "/api/v1/changes",
        "/api/v1/regressions?from=2025-11-01T00:00:00Z&to=2026-01-01T00:00:00Z",
        "/api/v1/regressions?from=2025-11-01T00:00:00Z&to=2026-01-01T00:00:00Z&agent_name=s*",
        f"{RUNS}?q=%22no+such",
        f"{RUNS}?metrics.tokens>=",
        f"{RUNS}?cursor=abc",
    )
)


@pytest.mark.asyncio(loop_scope="module")
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.one_of(LISTS, LISTS, EXPORTS, SINGLE, EVENTS, CHANGES, STATISTICS, OTHERS))
async def test_any_request_gets_the_same_answer_from_both_engines(both: tuple[Client, Client], address: str) -> None:
    await same_pages(both, address)
