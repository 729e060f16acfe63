"""A decorated call is a run that lasts until its work is done, however the function hands that back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client import Client
from telemetryd.client.run import status_of
from tests.client.conftest import MakeClient


class Recorded:
    """A client that sends nothing, and what its runs came to."""

    def __init__(self, client: Client, buffer: Path) -> None:
        self.client = client
        self._buffer = buffer

    def statuses(self) -> list[str]:
        """Return how the runs stand, in the order of their starts."""
        told: dict[str, str] = {}
        for path in sorted(self._buffer.glob("*.jsonl.*")):
            for line in map(json.loads, path.read_bytes().splitlines()):
                told[line["event_id"]] = line.get("fields", line)["status"]
        return [*told.values()]


@pytest.fixture
def recorded(make_client: MakeClient, buffer: Path) -> Recorded:
    return Recorded(make_client(send=False), buffer)


class AsyncCallable:
    async def __call__(self) -> int:
        return await work()


class Promise:
    """Neither a coroutine nor a future."""

    def __await__(self) -> Generator[Any, None, int]:
        return work().__await__()


async def work() -> int:
    await asyncio.sleep(0)
    if (await step()) == "fail":
        raise ValueError("failed")
    return 7


async def step() -> str:
    return outcome


outcome = "succeed"


def behind_another_decorator(function: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(function)
    def inner() -> Any:
        return function()

    return inner


ASYNC: dict[str, Any] = {
    "plain": work,
    "partial": functools.partial(work),
    "callable": AsyncCallable(),
    "wrapped": behind_another_decorator(work),
    "task": lambda: asyncio.ensure_future(work()),
    "future": lambda: asyncio.gather(work()),
    "awaitable": Promise,
}


@pytest.mark.parametrize("kind", ASYNC)
@pytest.mark.parametrize("end", ["succeed", "fail"])
async def test_work_that_is_awaited_ends_when_it_is_done(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, kind: str, end: str
) -> None:
    monkeypatch.setattr(f"{__name__}.outcome", end)
    call = recorded.client.run("a", "j")(ASYNC[kind])()
    if end == "fail":
        with pytest.raises(ValueError, match="failed"):
            await call
    else:
        assert (await call) in (7, [7])
    await asyncio.sleep(0)  # a future tells it in the next round of the loop
    assert recorded.statuses() == ["success" if end == "succeed" else "failure"]


@pytest.mark.parametrize(("works", "status"), [(True, "success"), (False, "failure")])
def test_work_in_another_thread_ends_when_its_future_is_done(recorded: Recorded, works: bool, status: str) -> None:
    future: Future[int] = Future()
    assert recorded.client.run("a", "j")(lambda: future)() is future
    assert recorded.statuses() == ["running"]
    if works:
        future.set_result(7)
    else:
        future.set_exception(ValueError("failed"))
    assert recorded.statuses() == [status]


async def test_while_it_is_awaited_it_is_the_parent_of_what_begins_in_it(recorded: Recorded) -> None:
    parents: list[Any] = []

    async def outer() -> None:
        await asyncio.sleep(0)
        with recorded.client.run("a", "inner") as inner:
            parents.append(inner)

    await recorded.client.run("a", "outer")(behind_another_decorator(outer))()
    assert recorded.statuses() == ["success", "success"]
    lines = [json.loads(line) for path in recorded.client.config.folder.glob("*.jsonl.*")
             for line in path.read_bytes().splitlines()]  # fmt: skip
    started = {line["job_type"]: line for line in lines if "job_type" in line}
    assert started["inner"]["parent_run_id"] == started["outer"]["run_id"]
    assert started["outer"]["parent_run_id"] is None


async def test_a_task_that_is_cancelled_is_cancelled(recorded: Recorded) -> None:
    task = recorded.client.run("a", "j")(lambda: asyncio.ensure_future(asyncio.sleep(30)))()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert recorded.statuses() == ["cancelled"]


def test_a_plain_call_ends_when_it_returns_or_raises(recorded: Recorded) -> None:
    assert recorded.client.run("a", "j")(functools.partial(max, 1))(2) == 2
    with pytest.raises(SystemExit):
        recorded.client.run("a", "j")(sys.exit)(3)
    assert recorded.statuses() == ["success", "failure"]


def test_methods_of_a_class_can_be_decorated_in_either_order(recorded: Recorded) -> None:
    client = recorded.client

    class Agent:
        @client.run("a", "static")
        @staticmethod
        def static() -> int:
            return 1

        @client.run("a", "class")
        @classmethod
        def named(cls) -> str:
            return cls.__name__

        @staticmethod
        @client.run("a", "inside")
        def inside() -> int:
            return 2

    assert (Agent().static(), Agent.named(), Agent().inside()) == (1, "Agent", 2)
    assert recorded.statuses() == ["success"] * 3


def items() -> Iterator[int]:
    yield 1
    yield 2


async def more_items() -> AsyncIterator[int]:
    yield 1


class Generating:
    def __call__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (items, "items is a generator"),
        (more_items, "more_items is a generator"),
        (functools.partial(items), "is a generator"),
        (Generating(), "is a generator"),
        (contextlib.contextmanager(items), "items is a context manager"),
        (contextlib.asynccontextmanager(more_items), "more_items is a context manager"),
        (5, "is no function"),
        (property(lambda self: 1), "is no function"),
    ],
    ids=["generator", "async-generator", "partial", "callable", "manager", "async-manager", "number", "property"],
)
def test_what_does_not_work_while_it_is_called_is_refused_at_once(recorded: Recorded, function: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        recorded.client.run("a", "j")(function)


async def test_a_generator_behind_another_decorator_lasts_until_its_end(recorded: Recorded) -> None:
    assert [*recorded.client.run("a", "j")(behind_another_decorator(items))()] == [1, 2]
    assert [item async for item in recorded.client.run("a", "j")(behind_another_decorator(more_items))()] == [1]
    for item in recorded.client.run("a", "j")(behind_another_decorator(items))():
        assert recorded.statuses()[-1] == "running"
        if item:
            break
    assert recorded.statuses() == ["success"] * 3


async def test_a_generator_that_nobody_asks_for_more_is_no_failure(recorded: Recorded) -> None:
    def pages() -> Iterator[int]:
        with recorded.client.run("a", "j"):
            yield 1
            yield 2

    async def more_pages() -> AsyncIterator[int]:
        async with recorded.client.run("a", "j"):
            yield 1
            yield 2

    for _ in pages():
        break
    async with contextlib.aclosing(more_pages()) as left:  # type: ignore[type-var]
        async for _ in left:
            break
    assert recorded.statuses() == ["success"] * 2


def test_a_coroutine_that_is_closed_is_cancelled(recorded: Recorded) -> None:
    async def waiting() -> None:
        with recorded.client.run("a", "j"):
            await Promise()

    coroutine = waiting()
    coroutine.send(None)
    coroutine.close()
    assert recorded.statuses() == ["cancelled"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BaseExceptionGroup("", [TimeoutError(), BaseExceptionGroup("", [TimeoutError()])]), "timeout"),
        (BaseExceptionGroup("", [TimeoutError(), ValueError()]), "failure"),
        (type("Cancelled", (BaseException,), {})(), "cancelled"),
        (SystemExit("no"), "failure"),
    ],
    ids=["group", "mixed-group", "trio", "exit-with-text"],
)
def test_a_group_of_exceptions_ends_a_run_as_its_members_do(error: BaseException, status: str) -> None:
    assert status_of(error) == status
