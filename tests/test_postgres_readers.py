"""The pool of connections that only read: each query ends in time, and nobody's end hits the query of another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import psycopg
import pytest

from telemetryd.engine.lanes import Lane
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.reading import Readers
from telemetryd.errors import QueryTimeoutError, UnavailableError
from telemetryd.model.queries import CountRuns, ListRuns
from tests.conftest import PATIENCE_S, eventually
from tests.twins import target_of

COUNTED = CountRuns("2025-12-24T10:00:00.000000Z", "2025-12-24T11:00:00.000000Z")


@asynccontextmanager
async def pool(url: str, count: int = 1, timeout_s: float = PATIENCE_S, **bounds: int) -> AsyncIterator[Readers]:
    readers = Readers(target_of(url), count, timeout_s, **bounds)
    try:
        yield readers
    finally:
        await readers.close()


def sleep(seconds: float, plain: Plain) -> int:
    plain.execute("SELECT pg_sleep(%s)", (seconds,))
    return 1


def one(plain: Plain) -> int:
    row = plain.execute("SELECT 1").fetchone()
    assert row is not None
    return int(row[0])


def count(url: str, condition: str) -> int:
    with psycopg.connect(url) as plain:
        query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND {condition}"
        row = plain.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


def sleeping(url: str) -> int:
    """How many queries sleep on the server."""
    return count(url, "state = 'active' AND query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()")


async def test_a_query_is_ended_at_its_deadline_on_the_server_too(postgres_database: str) -> None:
    async with pool(postgres_database, timeout_s=0.3) as readers:
        started = time.monotonic()
        with pytest.raises(QueryTimeoutError, match=r"longer than 0\.3 s"):
            await readers.fetch(partial(sleep, PATIENCE_S))
        assert time.monotonic() - started < PATIENCE_S / 2
        await eventually(lambda: sleeping(postgres_database) == 0)


async def test_a_statement_of_many_is_ended_at_the_deadline_of_all(postgres_database: str) -> None:
    def many(plain: Plain) -> None:
        for _ in range(1000):
            sleep(0.1, plain)

    async with pool(postgres_database, timeout_s=0.5) as readers:
        with pytest.raises(QueryTimeoutError):
            await readers.fetch(many)
        await eventually(lambda: sleeping(postgres_database) == 0)


async def test_waiting_for_a_connection_counts_towards_the_deadline(postgres_database: str) -> None:
    async with pool(postgres_database, timeout_s=1) as readers:
        first = asyncio.create_task(readers.fetch(partial(sleep, 30)))
        await asyncio.sleep(0)
        with pytest.raises(QueryTimeoutError, match="Too many slow queries"):
            await readers.fetch(one)
        with pytest.raises(QueryTimeoutError):
            await first


async def test_only_so_many_wait_for_a_connection(postgres_database: str) -> None:
    async with pool(postgres_database, most_waiting=1) as readers:
        await readers.fetch(one)
        queries = [asyncio.create_task(readers.fetch(partial(sleep, 0.5))) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(QueryTimeoutError, match="Too many queries are waiting"):
            await readers.fetch(one)
        assert await asyncio.gather(*queries) == [1, 1]


async def test_the_lanes_keep_out_of_each_others_way(postgres_database: str) -> None:
    async with pool(postgres_database, count=2) as readers:
        long = asyncio.create_task(readers.fetch(partial(sleep, 2), Lane.LONG))
        feed = asyncio.create_task(readers.fetch(partial(sleep, 2), Lane.FEED))
        await eventually(lambda: sleeping(postgres_database) == 2)
        assert await readers.fetch(one) == 1
        assert not long.done()
        assert [*await asyncio.gather(long, feed)] == [1, 1]


async def test_a_caller_that_leaves_ends_its_query_and_hits_no_other(postgres_database: str) -> None:
    async with pool(postgres_database) as readers:
        for after_s in (0.0, 0.005, 0.02, 0.1):
            leaving = asyncio.create_task(readers.fetch(partial(sleep, 0.02)))
            await asyncio.sleep(after_s)
            leaving.cancel()
            assert await asyncio.gather(*(readers.fetch(partial(sleep, 0.01)) for _ in range(5))) == [1] * 5
        leaving = asyncio.create_task(readers.fetch(partial(sleep, PATIENCE_S)))
        await eventually(lambda: sleeping(postgres_database) == 1)
        leaving.cancel()
        await eventually(lambda: sleeping(postgres_database) == 0)


async def test_callers_that_leave_never_open_more_connections_than_there_are_places(postgres_database: str) -> None:
    async with pool(postgres_database, count=2) as readers:
        for _ in range(20):
            leaving = [asyncio.create_task(readers.fetch(partial(sleep, PATIENCE_S), lane)) for lane in Lane]
            await asyncio.sleep(0.02)
            for each in leaving:
                each.cancel()
            assert count(postgres_database, "application_name LIKE '%/reader'") <= 3


async def test_a_lost_connection_costs_no_answer(postgres_database: str) -> None:
    async with pool(postgres_database) as readers:
        assert await readers.fetch(one) == 1
        with psycopg.connect(postgres_database) as plain:
            plain.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%/reader'"
            )
        assert await readers.fetch(one) == 1


async def test_a_server_that_is_away_is_503_and_its_return_is_noticed(postgres_database: str) -> None:
    elsewhere = postgres_database.replace("host=", "host=/nowhere")
    async with pool(elsewhere) as readers:
        with pytest.raises(UnavailableError, match="cannot be read now"):
            await readers.read(COUNTED)
        readers._target = target_of(postgres_database)
        assert (await readers.read(COUNTED)).total == 0


@pytest.mark.parametrize(
    "statement", ["DELETE FROM agent_runs", "SET default_transaction_read_only = off; DROP TABLE x"]
)
async def test_a_reader_cannot_write(postgres_database: str, statement: str) -> None:
    async with pool(postgres_database) as readers:
        with pytest.raises(UnavailableError):
            await readers.fetch(lambda plain: plain.execute(statement.encode()) and None)


async def test_closing_ends_what_runs_and_refuses_what_waits(postgres_database: str) -> None:
    readers = Readers(target_of(postgres_database), 1, PATIENCE_S)
    queries: list[asyncio.Task[Any]] = [
        asyncio.create_task(readers.fetch(partial(sleep, PATIENCE_S))),
        asyncio.create_task(readers.fetch(one)),
    ]
    await eventually(lambda: sleeping(postgres_database) == 1)
    started = time.monotonic()
    await readers.close()
    assert time.monotonic() - started < PATIENCE_S / 2
    for query in queries:
        with pytest.raises(UnavailableError, match="being closed"):
            await query
    with pytest.raises(UnavailableError, match="being closed"):
        await readers.read(ListRuns())
    await eventually(lambda: count(postgres_database, "application_name LIKE '%/reader'") == 0)


async def test_statements_of_one_answer_see_one_snapshot(postgres_database: str) -> None:
    def look_twice(write: Callable[[], None], plain: Plain) -> tuple[int, int]:
        with plain.transaction():
            rows = [plain.execute("SELECT count(*) FROM run_deletions").fetchall()[0][0]]
            write()
            rows.append(plain.execute("SELECT count(*) FROM run_deletions").fetchall()[0][0])
        return rows[0], rows[1]

    def write() -> None:
        with psycopg.connect(postgres_database) as other:
            other.execute("INSERT INTO run_deletions (seq, event_id) VALUES (1, 'gone')")

    async with pool(postgres_database) as readers:
        assert await readers.fetch(partial(look_twice, write)) == (0, 0)
