"""Readers: several at once, in nobody's way, cut off at their deadline, and unable to write."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from telemetryd.engine.lanes import Lane
from telemetryd.engine.sqlite.readers import Readers
from telemetryd.errors import QueryTimeoutError
from telemetryd.model.queries import CountPrunable
from tests.conftest import PATIENCE_S, Api, MakeApi, eventually, make_run, reading

_COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) SELECT max(i) FROM n"


def endless(connection: sqlite3.Connection) -> int:
    """A query that would run for hours, on the runs' own table so that it also holds a snapshot of it."""
    answer: int = connection.execute(
        "WITH RECURSIVE n(i) AS (SELECT count(*) FROM agent_runs UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    ).fetchone()[0]
    return answer


def count_to(limit: int, connection: sqlite3.Connection) -> int:
    answer: int = connection.execute(_COUNT.format(limit)).fetchone()[0]
    return answer


def one(connection: sqlite3.Connection) -> int:
    return count_to(1, connection)


@asynccontextmanager
async def pool(folder: Path, count: int = 1, timeout_s: float = PATIENCE_S, **bounds: int) -> AsyncIterator[Readers]:
    path = folder / "telemetry.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS agent_runs (event_id TEXT)")
    connection.close()
    readers = await Readers.open(path, count, timeout_s, 1000, **bounds)
    try:
        yield readers
    finally:
        await readers.close()


# --- Nobody waits for a slow query ---------------------------------------------------------------


async def test_slow_queries_block_neither_each_other_nor_writes_nor_health(make_api: MakeApi) -> None:
    api = await make_api(db_readers=4, query_timeout_s=PATIENCE_S)
    slow = [asyncio.create_task(reading(api)._readers().fetch(endless, Lane.LONG)) for _ in range(6)]
    await eventually(reading(api)._readers()._idle[Lane.LONG].empty)
    slowest = 0.0
    for number in range(20):
        run = make_run()
        started = time.monotonic()
        await api.post(run)
        assert (await api.get(f"/api/v1/runs/{run['event_id']}"))["run_id"] == run["run_id"]
        assert len(await api.list()) == number + 1
        assert (await api.get("/health"))["status"] == "ok"
        slowest = max(slowest, time.monotonic() - started)
    assert not any(task.done() for task in slow)
    assert slowest < 20, "it waits for none of them"
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)


@pytest.mark.parametrize(
    "asked",
    [
        "/api/v1/runs?error=x",
        "/api/v1/runs?metrics.tokens>1",
        "/api/v1/runs?min_duration_ms=1",
        "/api/v1/runs?count=exact",
        "/api/v1/regressions",
        CountPrunable("2026-01-01T00:00:00.000000Z"),
    ],
)
async def test_what_may_read_many_runs_waits_for_its_like_and_nothing_else_does(
    make_api: MakeApi, asked: str | CountPrunable
) -> None:
    api = await make_api(db_readers=2, query_timeout_s=PATIENCE_S)
    slow = asyncio.create_task(reading(api)._readers().fetch(endless, Lane.LONG))
    await eventually(reading(api)._readers()._idle[Lane.LONG].empty)
    answer = api.get(asked) if isinstance(asked, str) else api.store.fetch(asked)
    waiting = asyncio.create_task(answer)
    for _ in range(3):
        assert await api.list() == []
    assert not waiting.done()
    slow.cancel()
    await asyncio.wait((slow, waiting))
    assert waiting.exception() is None


async def test_health_and_writes_go_on_when_every_reader_is_taken(make_api: MakeApi) -> None:
    api = await make_api(db_readers=2, query_timeout_s=PATIENCE_S)
    slow = [asyncio.create_task(reading(api)._readers().fetch(endless, lane)) for lane in (Lane.QUICK, Lane.LONG)]
    await eventually(lambda: all(reading(api)._readers()._idle[lane].empty() for lane in (Lane.QUICK, Lane.LONG)))
    started = time.monotonic()
    assert (await api.get("/health"))["status"] == "ok"
    await api.post(make_run())
    assert time.monotonic() - started < 20, "it waits for none of them"
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)


async def test_slow_queries_run_at_the_same_time(tmp_path: Path) -> None:
    async with pool(tmp_path, count=6) as readers:
        meeting = asyncio.Barrier(3)
        loop = asyncio.get_running_loop()

        def meet(connection: sqlite3.Connection) -> int:
            asyncio.run_coroutine_threadsafe(meeting.wait(), loop).result(PATIENCE_S)  # all three are in one
            return one(connection)

        assert await asyncio.gather(*(readers.fetch(meet) for _ in range(3))) == [1, 1, 1]


# --- The deadline --------------------------------------------------------------------------------


async def test_a_query_is_interrupted_at_its_deadline(tmp_path: Path) -> None:
    async with pool(tmp_path, timeout_s=0.3) as readers:
        started = time.monotonic()
        with pytest.raises(QueryTimeoutError, match=r"longer than 0\.3 s and was interrupted; narrow its filters"):
            await readers.fetch(endless)
        assert 0.25 < time.monotonic() - started < 20
        assert await readers.fetch(one) == 1  # and its connection serves again


async def test_waiting_for_a_connection_counts_towards_the_deadline(tmp_path: Path) -> None:
    async with pool(tmp_path, timeout_s=0.4) as readers:
        slow = asyncio.create_task(readers.fetch(endless))
        await eventually(readers._idle[Lane.QUICK].empty)
        await asyncio.sleep(0.1)
        started = time.monotonic()
        answers = await asyncio.gather(slow, readers.fetch(endless), return_exceptions=True)
        assert [type(answer) for answer in answers] == [QueryTimeoutError] * 2
        assert time.monotonic() - started < 20
        assert await readers.fetch(one) == 1


async def test_only_so_many_wait_for_a_connection(tmp_path: Path) -> None:
    async with pool(tmp_path, most_waiting=1) as readers:
        slow, waiting = (asyncio.create_task(readers.fetch(endless)) for _ in range(2))
        await eventually(lambda: readers._waiting == 1)
        with pytest.raises(QueryTimeoutError, match="Too many queries are waiting"):
            await readers.fetch(one)
        for task in (waiting, slow):
            task.cancel()
        await asyncio.wait((waiting, slow))
        assert await readers.fetch(one) == 1


async def test_over_http_a_query_that_takes_too_long_is_503(make_api: MakeApi) -> None:
    api = await make_api(db_readers=1)
    await api.post(make_run())
    other = asyncio.create_task(reading(api)._readers().fetch(endless))
    await eventually(reading(api)._readers()._idle[Lane.QUICK].empty)
    reading(api)._readers()._timeout_s = 0.05  # shorter than the one in its way still has
    async with api.client.get("/api/v1/runs") as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
        assert "Too many slow queries" in (await response.json())["detail"]
    other.cancel()
    await asyncio.wait((other,))
    reading(api)._readers()._timeout_s = PATIENCE_S
    assert len(await api.list()) == 1


# --- They cannot write ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM agent_runs",
        "INSERT INTO run_minutes VALUES ('2026-01-01T00:00', 1)",
        "CREATE TABLE mine (x)",
        "PRAGMA user_version = 99",
        "VACUUM",
    ],
)
async def test_a_write_is_refused(api: Api, statement: str) -> None:
    def write(connection: sqlite3.Connection) -> None:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute(statement)
        connection.execute("PRAGMA query_only = OFF")  # even then the file is open read-only
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute(statement)
        connection.execute("PRAGMA query_only = ON")

    await api.post(make_run())
    await reading(api)._readers().fetch(write)
    assert len(await api.list()) == 1


async def test_connections_are_set_up_as_promised(api: Api) -> None:
    def ask(connection: sqlite3.Connection) -> list[int]:
        pragmas = ("query_only", "trusted_schema", "cell_size_check", "mmap_size")
        return [connection.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in pragmas]

    assert await reading(api)._readers().fetch(ask) == [1, 0, 1, 0]


async def test_a_reader_never_checkpoints(api: Api) -> None:
    await api.post(make_run())
    wal = api.settings.db_path.with_name("telemetry.sqlite-wal")
    size = wal.stat().st_size

    def checkpoint(connection: sqlite3.Connection) -> object:
        try:
            return connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.OperationalError:
            return None

    await reading(api)._readers().fetch(checkpoint)
    assert wal.stat().st_size == size > 0


# --- Callers that leave --------------------------------------------------------------------------


async def test_the_pool_survives_callers_that_leave(tmp_path: Path) -> None:
    async with pool(tmp_path, count=2) as readers:
        for _ in range(10):
            tasks = [asyncio.create_task(readers.fetch(endless)) for _ in range(2)]
            await eventually(readers._idle[Lane.QUICK].empty)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
            assert await asyncio.gather(*(readers.fetch(one) for _ in range(4))) == [1] * 4
        await eventually(lambda: readers._idle[Lane.QUICK].qsize() + readers._idle[Lane.LONG].qsize() == 2)


@pytest.mark.parametrize("steps", range(6))
async def test_a_query_whose_caller_left_before_it_began_is_ended_too(tmp_path: Path, steps: int) -> None:
    async with pool(tmp_path) as readers:
        task = asyncio.create_task(readers.fetch(endless))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        assert await asyncio.wait_for(readers.fetch(one), PATIENCE_S) == 1


@pytest.mark.parametrize("steps", range(8))
async def test_a_caller_that_leaves_late_does_not_cut_off_the_next_query(tmp_path: Path, steps: int) -> None:
    async with pool(tmp_path) as readers:
        loop = asyncio.get_running_loop()

        def leave(remaining: int) -> None:
            if remaining:
                loop.call_soon(leave, remaining - 1)
            else:
                first.cancel()

        def finish(connection: sqlite3.Connection) -> int:
            answer = one(connection)
            loop.call_soon_threadsafe(leave, steps)
            time.sleep(0.0005 * (steps % 2))  # the loop may be sooner or later than the answer
            return answer

        for _ in range(5):
            first = asyncio.create_task(readers.fetch(finish))
            second = asyncio.create_task(readers.fetch(lambda connection: count_to(100_000, connection)))
            assert await second == 100_000
            await asyncio.wait((first,))


async def test_a_query_whose_caller_left_leaves_nothing_open_that_would_interrupt_the_next(tmp_path: Path) -> None:
    """SQLite interrupts whatever begins before the last statement has ended that ran at the interrupt."""

    def nested(connection: sqlite3.Connection) -> int:
        outer = connection.execute("SELECT 1 UNION ALL SELECT 2")
        begun.append(outer.fetchone())
        return endless(connection)

    begun: list[object] = []
    async with pool(tmp_path) as readers:
        for _ in range(3):
            first = asyncio.create_task(readers.fetch(nested))
            await eventually(lambda: bool(begun))
            begun.clear()
            second = asyncio.create_task(readers.fetch(one))
            first.cancel()
            assert await second == 1
