"""One writer: many commands in one COMMIT, each caller gets its own outcome, nobody too early."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import io
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from telemetryd.engine.sqlite.connection import Connection, open_writer
from telemetryd.engine.sqlite.groups import Groups, translate
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.errors import (
    CommandFailedError,
    DatabaseBusyError,
    DatabaseError,
    DatabaseSuspectError,
    QueueFullError,
    StoppingError,
    StorageFullError,
    WriteFailedError,
    WriterDeadError,
)
from telemetryd.flow import Flow
from telemetryd.model import runs
from telemetryd.model.commands import Command, Created, CreateRuns, Updated, UpdateRun
from telemetryd.ops.metrics import Metrics
from telemetryd.writer import GROUP_ROWS, QUEUE_BYTES, Writer
from tests.conftest import PATIENCE_S, Api, MakeApi, StartDaemon, eventually, make_run
from tests.faults.strace import needs_strace, strace
from tests.http_client import get, post

NOW = "2026-01-01T00:00:00.000000Z"


@dataclass
class Bench:
    """A writer on a real file, every statement that its connection runs, and a second pair of eyes."""

    path: Path
    connection: Connection
    writer: Writer
    task: asyncio.Task[None]
    trace: list[str] = field(default_factory=list)

    def count(self, statement: str) -> int:
        return sum(line.startswith(statement) for line in self.trace)

    def query(self, sql: str) -> list[Any]:
        """Ask through a connection of its own, which sees only what is committed."""
        with contextlib.closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchall()

    def stored(self) -> set[str]:
        return {row[0] for row in self.query("SELECT event_id FROM agent_runs")}

    def totals_agree(self) -> bool:
        counted = self.query(
            "SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        )
        kept = self.query("SELECT * FROM run_totals WHERE runs > 0 ORDER BY 1, 2, 3")
        minutes = self.query("SELECT substr(created_at, 1, 16), count(*) FROM agent_runs GROUP BY 1 ORDER BY 1")
        return counted == kept and minutes == self.query("SELECT * FROM run_minutes WHERE runs > 0 ORDER BY 1")


class OneConnection:
    """A writing half on one connection, whose steps a test can replace."""

    def __init__(
        self, connection: Connection, groups: Groups, tidy_up: Callable[[sqlite3.Connection], None], reopen: Reopen
    ) -> None:
        self._connection = connection
        self._groups = groups
        self._tidy_up = tidy_up
        self._reopen = reopen

    async def write(self, commands: Sequence[Command[Any]]) -> Sequence[Any]:
        return await self._connection.run(lambda plain: self._groups.write(plain, commands))

    async def tidy_up(self) -> None:
        try:
            await self._connection.run(self._tidy_up)
        except sqlite3.Error as error:
            raise translate(error) from error

    async def reopen(self) -> None:
        await self._reopen()

    def interrupt(self) -> None:
        self._connection.interrupt_now()

    async def close(self, *, is_clean: bool) -> None:
        await self._connection.close()


async def _never() -> None:
    raise DatabaseError("It stays closed")


Reopen = Callable[[], Awaitable[None]]


@asynccontextmanager
async def bench(
    folder: Path,
    *,
    journal_mode: str = "WAL",
    busy_timeout_ms: int = 5000,
    queue_max: int = 10_000,
    transaction: Callable[[sqlite3.Connection, str], Transaction] = Transaction,
    check_place: Callable[[], None] = lambda: None,
    at_rest: Callable[[sqlite3.Connection], None] = lambda _: None,
    reopen: Reopen = _never,
) -> AsyncIterator[Bench]:
    path = folder / "telemetry.sqlite"
    connection, _ = await open_writer(path, journal_mode, "FULL", busy_timeout_ms)
    await connection.run(lambda plain: migrate.create(plain, NOW))
    writer = Writer(
        OneConnection(connection, Groups(transaction, lambda: NOW, check_place), at_rest, reopen),
        busy_timeout_s=busy_timeout_ms / 1000,
        queue_max=queue_max,
        flow=Flow(0.1, 5000),
        metrics=Metrics(),
    )
    task = asyncio.create_task(writer.run())
    made = Bench(path, connection, writer, task)
    await connection.run(lambda plain: plain.set_trace_callback(made.trace.append))
    try:
        yield made
    finally:
        await writer.stop()
        await asyncio.wait((task,))
        await writer.close()


def create(*event_ids: str, **fields: object) -> CreateRuns:
    return CreateRuns(tuple(runs.parse_run(make_run(event_id=event_id, **fields)).row for event_id in event_ids))


def create_refused(*event_ids: str) -> CreateRuns:
    """A command whose last row the database's own CHECK refuses, after the others went in."""
    good = create(*event_ids).rows
    bad = list(good[-1])
    bad[runs.STATUS] = "no such status"
    return CreateRuns((*good[:-1], tuple(bad)))


# --- Group commit --------------------------------------------------------------------------------


async def test_commands_that_wait_together_are_committed_together(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        futures = [made.writer.submit(create(f"e{number}")) for number in range(500)]
        assert made.writer.depth == 500
        assert await asyncio.gather(*futures) == [Created((True,))] * 500
        assert made.count("COMMIT") == made.count("BEGIN IMMEDIATE") == 1
        assert made.count("SAVEPOINT") == 0
        assert len(made.stored()) == 500
        assert made.totals_agree()


async def test_a_group_is_bounded_in_rows(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        batches = [create(*(f"b{number}-{row}" for row in range(1000))) for number in range(12)]
        await asyncio.gather(*(made.writer.submit(batch) for batch in batches))
        assert made.count("COMMIT") == -(-12_000 // GROUP_ROWS)
        assert len(made.stored()) == 12_000


async def test_what_arrives_during_a_commit_forms_the_next_group(tmp_path: Path) -> None:
    gate = threading.Event()
    async with bench(tmp_path, check_place=lambda: _wait(gate)) as made:
        first = made.writer.submit(create("first"))
        await eventually(lambda: made.stored() == {"first"})
        later = [made.writer.submit(create(f"later{number}")) for number in range(100)]
        gate.set()
        await asyncio.gather(first, *later)
        assert made.count("COMMIT") == 2


async def test_everyone_gets_his_own_outcome_in_order_of_arrival(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        commands: list[Command[Any]] = [
            create("a", run_id="run-a"),
            create("a", "b", "b", run_id="run-b"),
            UpdateRun("a", {"status": "success"}),
            UpdateRun("missing", {"status": "success"}),
            UpdateRun("b", {"status": "failure"}),
            create("c"),
            create("c"),
        ]
        outcomes = await asyncio.gather(*map(made.writer.submit, commands))
        assert outcomes == [
            Created((True,)),
            Created((False, True, False)),
            Updated("run-a"),
            None,
            Updated("run-b"),
            Created((True,)),
            Created((False,)),
        ]
        assert made.count("COMMIT") == 1
        assert made.query("SELECT event_id, status FROM agent_runs ORDER BY id") == [
            ("a", "success"),
            ("b", "failure"),
            ("c", "running"),
        ]
        assert made.totals_agree()


# --- Not before it is durable --------------------------------------------------------------------


async def test_nobody_is_answered_before_the_commit_is_durable(tmp_path: Path) -> None:
    gate = threading.Event()
    async with bench(tmp_path, check_place=lambda: _wait(gate)) as made:
        futures = [made.writer.submit(create(f"e{number}")) for number in range(10)]
        await eventually(lambda: len(made.stored()) == 10)
        await asyncio.sleep(0.05)  # an answer that is too early comes in the loop's next turns
        assert not any(future.done() for future in futures)
        gate.set()
        assert await asyncio.gather(*futures) == [Created((True,))] * 10


async def test_a_commit_that_fails_tells_nobody_that_it_worked(tmp_path: Path) -> None:
    async with bench(tmp_path, journal_mode="DELETE", busy_timeout_ms=100) as made:
        assert await made.writer.submit(create("before")) == Created((True,))
        reader = sqlite3.connect(made.path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM agent_runs").fetchall()  # in this mode a reader keeps COMMIT from its lock
        futures = [made.writer.submit(command) for command in (create("x"), create("y"), UpdateRun("nobody", {}))]
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(result) for result in results] == [DatabaseBusyError] * 3
        reader.close()
        assert made.stored() == {"before"}
        assert await made.writer.submit(create("x")) == Created((True,))
        assert made.totals_agree()


# --- One failing command -------------------------------------------------------------------------


async def test_a_failing_command_is_undone_alone(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        results = await asyncio.gather(
            made.writer.submit(create("before")),
            made.writer.submit(create_refused("half", "whole", "broken")),  # two statements, the second fails
            made.writer.submit(create("after", "half")),
            made.writer.submit(create_refused("last")),
            made.writer.submit(UpdateRun("before", {"status": "success"})),
            return_exceptions=True,
        )
        assert results[0] == Created((True,))
        assert results[2] == Created((True, True))  # "half" was taken back with its command
        assert isinstance(results[4], Updated)
        for refused in (results[1], results[3]):
            assert isinstance(refused, CommandFailedError)
            assert "CHECK constraint failed: status" in str(refused)
        assert results[1] is not results[3]
        assert made.stored() == {"before", "after", "half"}
        assert made.count("COMMIT") == 1
        assert made.totals_agree()


class Fussy(Transaction):
    """The real transaction, except that it cannot stand one event."""

    def apply(self, commands: Sequence[Command[Any]]) -> list[Any]:
        outcomes = super().apply(commands)
        for command in commands:
            if isinstance(command, CreateRuns) and command.rows[0][runs.EVENT_ID] == "hated":
                raise ValueError("anything but this one")
        return outcomes


async def test_a_value_that_python_cannot_hand_over_costs_only_its_command(tmp_path: Path) -> None:
    async with bench(tmp_path, transaction=Fussy) as made:
        results = await asyncio.gather(
            *(made.writer.submit(create(event_id)) for event_id in ("a", "hated", "b")), return_exceptions=True
        )
        too_large = made.writer.submit(UpdateRun("a", {"duration_ms": 1 << 64}))
        neighbour = made.writer.submit(UpdateRun("a", {"duration_ms": 5}))
        assert results[0] == results[2] == Created((True,))
        assert isinstance(results[1], CommandFailedError)
        assert "anything but this one" in str(results[1])
        with pytest.raises(CommandFailedError):
            await too_large
        assert isinstance(await neighbour, Updated)
        assert made.query("SELECT event_id, duration_ms FROM agent_runs ORDER BY id") == [("a", 5), ("b", 0)]
        assert made.totals_agree()


async def test_when_sqlite_rolls_back_by_itself_the_whole_group_has_failed(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        await made.writer.submit(create("before"))
        pages = await made.connection.run(lambda plain: plain.execute("PRAGMA page_count").fetchone()[0])
        await made.connection.run(lambda plain: plain.execute(f"PRAGMA max_page_count = {pages + 4}").fetchall())
        small = [made.writer.submit(create(f"small{number}")) for number in range(5)]
        large = made.writer.submit(create(*(f"large{number}" for number in range(500)), input_summary="x" * 500))
        last = made.writer.submit(create("last"))
        results = await asyncio.gather(*small, large, last, return_exceptions=True)
        assert [type(result) for result in results] == [StorageFullError] * 7
        assert made.stored() == {"before"}
        await made.connection.run(lambda plain: plain.execute("PRAGMA max_page_count = 1000000").fetchall())
        assert await made.writer.submit(create("last")) == Created((True,))
        assert made.totals_agree()


# --- Callers that leave --------------------------------------------------------------------------


async def test_a_caller_that_leaves_changes_nothing_for_the_others(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        futures = [made.writer.submit(create(f"e{number}")) for number in range(20)]
        refused = made.writer.submit(create_refused("bad"))
        for left in (*futures[::2], refused):
            left.cancel()
        assert await asyncio.gather(*futures[1::2]) == [Created((True,))] * 10
        assert not made.task.done()
        assert made.stored() == {f"e{number}" for number in range(20)}
        assert await made.writer.submit(create("e0")) == Created((False,))
        assert made.totals_agree()


async def test_a_client_that_disconnects_while_queued_is_stored_whole_or_not_at_all(api: Api) -> None:
    items = [make_run(event_id=f"left-{number}") for number in range(50)]
    with _lock(api.settings.db_path):
        call = asyncio.create_task(api.client.post("/api/v1/runs/batch", json=items))
        await eventually(lambda: _in_hand(api))
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
    await api.post(make_run())
    stored = await api.list(limit=1000)
    assert sum(row["event_id"].startswith("left-") for row in stored) in (0, 50)
    assert (await api.batch(items))["total"] == 50
    assert sum(row["event_id"].startswith("left-") for row in await api.list(limit=1000)) == 50


# --- Full, busy ----------------------------------------------------------------------------------


async def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    gate = threading.Event()
    async with bench(tmp_path, queue_max=3, check_place=lambda: _wait(gate)) as made:
        first = made.writer.submit(create("first"))
        await eventually(lambda: made.stored() == {"first"})
        waiting = [made.writer.submit(create(f"e{number}")) for number in range(3)]
        with pytest.raises(QueueFullError):
            made.writer.submit(create("one too many"))
        gate.set()
        await asyncio.gather(first, *waiting)
        assert await made.writer.submit(create("again")) == Created((True,))
        assert made.stored() == {"first", "e0", "e1", "e2", "again"}


async def test_a_full_queue_is_503_with_retry_after(make_api: MakeApi) -> None:
    api = await make_api(queue_max=2)
    with _lock(api.settings.db_path):
        calls = [asyncio.create_task(api.post(make_run()))]
        await eventually(lambda: _in_hand(api))
        calls += [asyncio.create_task(api.post(make_run())) for _ in range(2)]
        await eventually(lambda: api.store.health().queue_depth == 2)
        async with api.client.post("/api/v1/runs", json=make_run()) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert "Too many writes are waiting" in (await response.json())["detail"]
        for path in ("/api/v1/runs", "/api/v1/runs/batch", "/api/v1/runs/x/events"):
            assert await _status_without_body(api, path) == 503, "nothing is spent on a body that is refused anyway"
        assert (await api.get("/health"))["queue_depth"] == 2
    assert [answer["status"] for answer in await asyncio.gather(*calls)] == ["created"] * 3


async def _status_without_body(api: Api, path: str) -> int:
    """Return the status that a POST gets before it has sent its body."""
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(PATIENCE_S):
        line = await reader.readline()
    writer.close()
    return int(line.split()[1])


async def test_a_queue_is_full_of_large_bodies_long_before_it_is_full_of_commands(make_api: MakeApi) -> None:
    api = await make_api()
    large = "x" * 15_000_000
    fitting = QUEUE_BYTES // len(large)

    def send(method: str, path: str, body: object, status: int) -> asyncio.Task[Any]:
        headers = {"Content-Type": "application/json"}
        data = io.BytesIO(orjson.dumps(body))
        return asyncio.create_task(api.call(method, path, status=status, data=data, headers=headers))

    with _lock(api.settings.db_path):
        calls = [asyncio.create_task(api.post(make_run()))]
        await eventually(lambda: _in_hand(api))
        for number in range(1, fitting + 1):  # one after the other, or there are too many that are being received
            calls.append(send("POST", "/api/v1/runs", make_run(error_details=large), 201))
            await eventually(lambda wanted=number: api.store.health().queue_depth == wanted)  # type: ignore[misc]
        refused = await send("PATCH", "/api/v1/runs/unknown", {"error_details": large}, 503)
        assert "Too many writes are waiting" in refused["detail"]
    assert [answer["status"] for answer in await asyncio.gather(*calls)] == ["created"] * (1 + fitting)


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
async def test_a_locked_database_is_waited_for(make_api: MakeApi, journal_mode: str) -> None:
    api = await make_api(db_journal_mode=journal_mode)
    with _lock(api.settings.db_path):
        call = asyncio.create_task(api.post(make_run()))
        await eventually(lambda: _in_hand(api))
        await asyncio.sleep(0.2)
        assert not call.done()
        assert (await api.get("/health"))["status"] == "ok"
    assert (await call)["status"] == "created"


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
async def test_a_database_locked_too_long_is_503_and_then_works_again(make_api: MakeApi, journal_mode: str) -> None:
    api = await make_api(db_journal_mode=journal_mode, db_busy_timeout_ms=300)
    run = make_run()
    with _lock(api.settings.db_path):
        started = time.monotonic()
        async with api.client.post("/api/v1/runs", json=run) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
            assert "locked by another process" in (await response.json())["detail"]
        assert 0.25 < time.monotonic() - started < 20, "it does not wait for the default of 30 s"
    assert (await api.post(run))["status"] == "created"
    assert (await api.get("/health"))["status"] == "ok"


# --- Death and stop ------------------------------------------------------------------------------


async def test_a_failed_sync_fails_everybody_until_the_database_is_open_again(tmp_path: Path) -> None:
    gate, may_reopen = threading.Event(), asyncio.Event()
    attempts: list[int] = []

    def break_down() -> None:
        _wait(gate)
        if not may_reopen.is_set():
            raise OSError(errno.EIO, "Input/output error")

    async def reopen() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise DatabaseError("Not yet")
        await may_reopen.wait()

    async with bench(tmp_path, check_place=break_down, reopen=reopen) as made:
        first = made.writer.submit(create("first"))
        await eventually(lambda: made.stored() == {"first"})
        queued = [made.writer.submit(create(f"e{number}")) for number in range(5)]
        gate.set()
        results = await asyncio.gather(first, *queued, return_exceptions=True)
        assert [type(result) for result in results] == [DatabaseSuspectError] * 6
        assert all("Input/output error" in str(result) for result in results)
        await eventually(lambda: made.writer.failure == "Not yet")
        with pytest.raises(DatabaseSuspectError):
            made.writer.submit(create("later"))
        assert made.writer.problem == "Not yet"
        assert made.stored() == {"first"}  # committed, but no caller has heard of it
        assert made.count("COMMIT") == 1
        may_reopen.set()
        await eventually(lambda: made.writer.failure is None)
        assert len(attempts) == 3
        assert made.writer.problem is None
        assert await made.writer.submit(create("first")) == Created((False,))


async def test_what_was_refused_is_not_advised_about_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[Any] = []
    monkeypatch.setattr(Flow, "advise", lambda _, commands, rows, largest, full: advised.append((commands, rows, full)))
    gate, is_broken = threading.Event(), True

    def break_down() -> None:
        _wait(gate)
        if is_broken:
            raise OSError(errno.EIO, "Input/output error")

    async def reopen() -> None:
        return

    async with bench(tmp_path, check_place=break_down, reopen=reopen) as made:
        first = made.writer.submit(create("first"))
        await eventually(lambda: made.stored() == {"first"})
        refused = CreateRuns(create(*(f"e{number}" for number in range(1000))).rows, QUEUE_BYTES // 2)
        queued = [made.writer.submit(refused), made.writer.submit(refused)]
        gate.set()
        results = await asyncio.gather(first, *queued, return_exceptions=True)
        assert [type(result) for result in results] == [DatabaseSuspectError] * 3
        is_broken = False
        await eventually(lambda: made.writer.failure is None)
        assert await made.writer.submit(create("second")) == Created((True,))
        [(commands, rows, fullness)] = advised
        assert (commands, rows) == (1, 1)
        assert fullness == pytest.approx(1 / 10_000)


async def test_a_writer_that_is_stopped_while_the_disk_is_unknown_says_so(tmp_path: Path) -> None:
    def break_down() -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with bench(tmp_path, check_place=break_down) as made:
        with pytest.raises(DatabaseSuspectError):
            await made.writer.submit(create("first"))
        await made.writer.stop()
        await asyncio.wait((made.task,), timeout=PATIENCE_S)
        assert isinstance(made.task.exception(), DatabaseSuspectError)
        assert made.writer.problem == "[Errno 5] Input/output error"
        with pytest.raises(WriterDeadError):
            made.writer.submit(create("later"))


class Broken(Transaction):
    """A transaction with a fault that nobody foresaw."""

    def finish(self) -> None:
        raise RuntimeError("a bug")


async def test_a_bug_ends_the_writer_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    async with bench(tmp_path, transaction=Broken) as made:
        results = await asyncio.gather(
            *(made.writer.submit(create(name)) for name in ("a", "b")), return_exceptions=True
        )
        assert [type(result) for result in results] == [WriterDeadError] * 2
        with pytest.raises(WriterDeadError):
            made.writer.submit(create("later"))
        await asyncio.wait((made.task,))
        assert isinstance(made.task.exception(), RuntimeError)
        assert made.writer.problem == "a bug"


class Greedy(Transaction):
    """A transaction that finds no memory for one event."""

    def finish(self) -> None:
        super().finish()
        if self._cursor.execute("SELECT count(*) FROM agent_runs WHERE event_id = 'large'").fetchone() != (0,):
            raise MemoryError


async def test_a_lack_of_memory_costs_one_group(tmp_path: Path) -> None:
    async with bench(tmp_path, transaction=Greedy) as made:
        with pytest.raises(WriteFailedError):
            await made.writer.submit(create("large"))
        assert await made.writer.submit(create("small")) == Created((True,))
        assert made.stored() == {"small"}
        assert made.totals_agree()


async def test_health_tells_that_nothing_is_taken_and_then_it_goes_on(make_api: MakeApi) -> None:
    api = await make_api(db_journal_mode="DELETE")
    kept, unsure = make_run(), make_run()
    await api.post(kept)
    moved = api.settings.db_path.rename(api.settings.db_path.with_suffix(".moved"))
    async with api.client.post("/api/v1/runs", json=unsure) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "5"
    async with api.client.get("/health") as response:
        health = await response.json()
        assert response.status == 503
        assert health["status"] == "error"
        assert "was deleted or replaced while in use" in health["detail"]
    for method, path, body in (
        ("POST", "/api/v1/runs", make_run()),
        ("POST", "/api/v1/runs/batch", [make_run()]),
        ("PATCH", f"/api/v1/runs/{kept['event_id']}", {"status": "success"}),
    ):
        async with api.client.request(method, path, json=body) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
    assert (await api.get(f"/api/v1/runs/{kept['event_id']}"))["status"] == "running"
    moved.rename(api.settings.db_path)
    await eventually(lambda: api.store.health().problem is None, timeout_s=PATIENCE_S)
    assert (await api.post(kept, 200))["status"] == "duplicate"
    await api.call("POST", "/api/v1/runs", json=unsure)
    assert len(await api.list()) == 2


@needs_strace
def test_a_database_that_cannot_be_opened_again_during_the_stop_is_not_a_clean_exit(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert post(daemon.url, make_run())[0] == 201
    answers: list[int | None] = []
    fail = "-e", "inject=fdatasync:error=EIO:delay_enter=1000000", "-e", "inject=pread64:error=EIO"
    with strace(daemon.process.pid, tmp_path / "trace", *fail):
        sender = threading.Thread(target=lambda: answers.append(post(daemon.url, make_run())[0]))
        sender.start()
        deadline = time.monotonic() + PATIENCE_S
        while " fdatasync(" not in (tmp_path / "trace").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        status = daemon.stop()
        sender.join()
    assert answers in ([503], [None])
    assert status == 1


async def test_stop_commits_what_waits_and_refuses_what_comes(tmp_path: Path) -> None:
    gate = threading.Event()
    async with bench(tmp_path, queue_max=50, check_place=lambda: _wait(gate)) as made:
        first = made.writer.submit(create("first"))
        await eventually(lambda: made.stored() == {"first"})
        waiting = [made.writer.submit(create(f"e{number}")) for number in range(50)]  # full: even the sentinel waits
        stopping = asyncio.create_task(made.writer.stop())
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            made.writer.submit(create("too late"))
        gate.set()
        await stopping
        await asyncio.wait_for(made.task, PATIENCE_S)
        assert await asyncio.gather(first, *waiting) == [Created((True,))] * 51
        assert len(made.stored()) == 51
        await made.writer.stop()  # twice does no harm


# --- At rest -------------------------------------------------------------------------------------


async def test_it_tidies_up_once_after_it_has_worked_and_rested(tmp_path: Path) -> None:
    rests: list[int] = []
    async with bench(tmp_path, at_rest=lambda plain: rests.append(plain.total_changes)) as made:
        made.writer.rest_after_s = 0
        made.writer.rest()
        made.writer.rest_after_s = 1000
        await made.writer.submit(create("one"))
        made.writer.rest()
        await made.writer.submit(create("two"))  # what was asked of it before is done by now
        assert rests == [], "nothing to do before it has worked, and not at once after it"
        made.writer.rest_after_s = 0.01
        await asyncio.sleep(0.02)
        for _ in range(3):
            made.writer.rest()
        await eventually(lambda: len(rests) == 1)
        await made.writer.submit(create("three"))
        assert len(rests) == 1
        await asyncio.sleep(0.02)
        made.writer.rest()
        await eventually(lambda: len(rests) == 2)
        assert rests[1] > rests[0]
        assert made.stored() == {"one", "two", "three"}


async def test_a_failed_sync_at_rest_is_as_bad_as_one_of_a_commit_and_a_lock_is_not(tmp_path: Path) -> None:
    codes = [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_FSYNC]
    reopened: list[int] = []

    def fail(_plain: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("injected")
        error.sqlite_errorcode = codes.pop(0)
        raise error

    async def reopen() -> None:
        reopened.append(len(codes))

    async with bench(tmp_path, at_rest=fail, reopen=reopen) as made:
        made.writer.rest_after_s = 0
        for left in (2, 1, 0):
            await made.writer.submit(create(f"e{left}"))
            await asyncio.sleep(0.01)
            made.writer.rest()
            await eventually(lambda left=left: len(codes) == left)  # type: ignore[misc]
        await eventually(lambda: reopened == [0] and made.writer.problem is None)
        made.writer.rest_after_s = 1000
        await made.writer.submit(create("after"))
        assert made.stored() == {"e2", "e1", "e0", "after"}


def test_the_log_is_written_back_when_nothing_comes(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert post(daemon.url, make_run())[0] == 201
    assert _runs_without_log(daemon.database) == 0
    deadline = time.monotonic() + PATIENCE_S
    while _runs_without_log(daemon.database) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert post(daemon.url, make_run())[0] == 201
    assert get(daemon.url, "/metrics")[1]["total_runs"] == 2


def _runs_without_log(path: Path) -> int:
    """Count what stands in the database file itself, as a copy of it alone would."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            return 0  # not even the schema
        return int(connection.execute("SELECT count(*) FROM agent_runs").fetchone()[0])


# --- Helpers -------------------------------------------------------------------------------------


def _wait(gate: threading.Event) -> None:
    assert gate.wait(PATIENCE_S)


@contextlib.contextmanager
def _lock(path: Path) -> Any:
    """Hold the database's write lock like a foreign program does."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.close()


def _in_hand(api: Api) -> bool:
    """Whether the writer has taken a first group off the queue (and waits for SQLite's lock, in these tests)."""
    return bool(inspect.getcoroutinelocals(cast("Any", api.store.writing.get_coro()))["waiting"])
