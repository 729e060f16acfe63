"""The store on an engine of a dictionary: what it promises whatever the engine, and that nobody else can write."""

from __future__ import annotations

import ast
import asyncio
import gc
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import telemetryd
from telemetryd.errors import (
    CommandFailedError,
    DatabaseError,
    DatabaseSuspectError,
    LowDiskError,
    StoppingError,
    WriteFailedError,
    WriterDeadError,
)
from telemetryd.model.commands import (
    Command,
    ConfirmDelivery,
    Created,
    CreateRuns,
    Pruned,
    PruneRuns,
    Updated,
    UpdateRun,
)
from telemetryd.model.queries import GetRun
from telemetryd.model.runs import parse_run
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests.conftest import Api, eventually, make_run
from tests.memory_engine import Memory


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
async def store(memory: Memory) -> AsyncIterator[Store]:
    store = Store(memory.engine(), Settings(), Metrics())
    yield store
    if memory.closed is None:
        await store.close()


def create(*event_ids: str) -> CreateRuns:
    return CreateRuns(tuple(parse_run(make_run(event_id=event_id)).row for event_id in event_ids))


async def test_a_run_that_was_acknowledged_is_there_at_once(api: Api) -> None:
    run = make_run(metrics_json={"tokens": 5})
    assert await api.post(run) == {"status": "created", "event_id": run["event_id"], "run_id": run["run_id"]}
    stored = await api.get(f"/api/v1/runs/{run['event_id']}")
    assert stored["metrics_json"] == {"tokens": 5}
    assert await api.post(run, 200) == {
        "status": "duplicate",
        "event_id": run["event_id"],
        "message": "Event already exists (idempotent)",
    }


async def test_commands_that_wait_together_are_one_group_and_each_gets_its_own_outcome(
    memory: Memory, store: Store
) -> None:
    commands: list[Command[Any]] = [
        create("a", "b"),
        create("b", "c"),
        UpdateRun("nobody", {}),
        UpdateRun("a", {}),
        ConfirmDelivery(1),
    ]
    outcomes = await asyncio.gather(*map(store.submit, commands), return_exceptions=True)
    assert outcomes[:3] == [Created((True, True)), Created((False, True)), None]
    assert isinstance(outcomes[3], Updated)
    assert isinstance(outcomes[4], CommandFailedError)
    assert memory.groups == [5]
    found = await store.fetch(GetRun("c"))
    assert found is not None


async def test_the_totals_are_read_again_only_after_a_commit(memory: Memory, store: Store) -> None:
    first = await store.counts()
    assert not first.is_remembered
    assert (await store.counts()).is_remembered
    await store.submit(create("a"))
    counted = await store.counts()
    assert (counted.total, counted.is_remembered) == (1, False)


async def test_a_group_that_failed_is_refused_and_the_next_is_taken(memory: Memory, store: Store) -> None:
    memory.failures = [WriteFailedError()]
    with pytest.raises(WriteFailedError):
        await store.submit(create("a"))
    assert store.health().problem is not None
    assert await store.submit(create("a")) == Created((True,))
    assert store.health().problem is None


async def test_after_a_failure_that_leaves_the_disk_unknown_it_is_opened_again_first(
    memory: Memory, store: Store
) -> None:
    memory.failures = [DatabaseSuspectError("a failed sync"), DatabaseError("not yet"), DatabaseError("not yet")]
    with pytest.raises(DatabaseSuspectError):
        await store.submit(create("a"))
    with pytest.raises(DatabaseSuspectError):
        await store.submit(create("a"))
    await eventually(lambda: store.health().problem is None)
    assert memory.reopened == 3
    assert await store.submit(create("a")) == Created((True,))


async def test_a_suspicion_of_the_engine_stops_writes_until_it_is_open_again(memory: Memory, store: Store) -> None:
    memory.suspicion = DatabaseSuspectError("the file is gone")
    await eventually(lambda: memory.reopened > 0)
    memory.suspicion = None
    await eventually(lambda: store.health().problem is None)
    assert await store.submit(create("a")) == Created((True,))


async def test_with_little_room_only_what_makes_room_is_taken(memory: Memory, store: Store) -> None:
    await store.submit(create("a"))
    memory.is_low = True
    with pytest.raises(LowDiskError):
        await store.submit(create("b"))
    assert await store.submit(PruneRuns("2026-01-01T00:00:00.000000Z", 10)) == Pruned(1, more=False)


async def test_every_listener_hears_of_each_commit(store: Store) -> None:
    heard: list[str] = []
    store.on_commit(lambda: heard.append("first"))
    store.on_commit(lambda: heard.append("second"))
    await store.submit(create("a"))
    assert heard == ["first", "second"]


@pytest.mark.parametrize("is_clean", [True, False])
async def test_it_closes_the_engine_and_says_whether_all_is_in_order(
    memory: Memory, store: Store, *, is_clean: bool
) -> None:
    waiting = asyncio.create_task(store.submit(create("a")))
    await asyncio.sleep(0)
    if not is_clean:
        memory.failures = [DatabaseSuspectError("a failed sync"), *[DatabaseError("not yet")] * 1000]
        with pytest.raises(DatabaseSuspectError):
            await waiting
    await store.close()
    assert memory.closed is is_clean
    assert ("a" in memory.runs) is is_clean
    assert (store.writing.exception() is None) is is_clean
    with pytest.raises(StoppingError if is_clean else WriterDeadError):
        await store.submit(create("b"))


# --- Nobody else can write -----------------------------------------------------------------------

PACKAGE = Path(telemetryd.__file__).parent


@cache
def _names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    return {
        *(node.id for node in nodes if isinstance(node, ast.Name)),
        *(node.attr for node in nodes if isinstance(node, ast.Attribute)),
        *(alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names),
    }


def _modules_that_name(*words: str) -> set[str]:
    return {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if _names(path) & set(words)}


async def test_a_writers_failure_that_nobody_waits_for_is_not_complained_of_when_the_store_is_gone(
    memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(memory.engine(), Settings(), Metrics())
    memory.failures = [DatabaseSuspectError("a failed sync"), *[DatabaseError("not yet")] * 1000]
    with pytest.raises(DatabaseSuspectError):
        await store.submit(create("a"))
    await store.close()
    del store
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_only_the_writer_receives_the_writing_half() -> None:
    assert _modules_that_name("WritingEngine") == {"engine/interface.py", "writer.py"}
    outside = {name for name in _modules_that_name("Writing", "writing") if not name.startswith(("engine/", "client/"))}
    assert outside == {"store.py", "daemon.py"}, "daemon.py waits for the writer's task, store.writing"
    assert _modules_that_name("Writer") == {"store.py"}


def test_a_connection_that_writes_is_opened_by_the_engine_and_by_tools_that_own_the_file() -> None:
    assert _modules_that_name("open_writer") == {"engine/sqlite/opening.py"}
    outside = {name for name in _modules_that_name("sqlite3", "aiosqlite") if not name.startswith("engine/sqlite/")}
    assert outside == {"cli/database.py"}, "its commands are about the file"
