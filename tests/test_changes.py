"""The commit sequence: every change has a number, and a client that follows it from anywhere misses nothing."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import tempfile
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from telemetryd.engine.sqlite.statements import sequence
from telemetryd.engine.sqlite.statements.changes import fetch_changes
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import backup, migrate
from telemetryd.engine.sqlite.tools.check import examine, repair
from telemetryd.engine.sqlite.tools.integrity import recount_totals
from telemetryd.engine.sqlite.tools.salvage import salvage
from telemetryd.errors import CursorGoneError
from telemetryd.model import events
from telemetryd.model.changes import BEGINNING, Changes, Cursor, ListChanges
from telemetryd.model.commands import (
    ApplyChanges,
    Command,
    CreateEvents,
    CreateRuns,
    Death,
    DeleteRun,
    EndProcess,
    PruneRuns,
    ReapRuns,
    RedactRun,
    RegisterProcess,
    UpdateRun,
)
from telemetryd.model.processes import Process
from telemetryd.model.runs import COLUMNS, parse_run
from telemetryd.model.values import Row
from tests.conftest import Api, MakeApi, make_run

NOW = "2025-12-24T12:00:00.000000Z"
PROCESS = Process(7, 7, "boot", "machine", "space")
REMOVED = '{"x":null,"day":null,"team":"b"}'
DEATH = Death(NOW, "died", "of a signal")
EVENT_ID = COLUMNS.index("event_id")
EVENTS = f"SELECT run, {', '.join(events.COLUMNS)} FROM run_events ORDER BY run, id"


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def commit(connection: sqlite3.Connection, commands: list[Command[Any]], now: str = NOW) -> list[object]:
    connection.execute("BEGIN IMMEDIATE")
    transaction = Transaction(connection, now)
    outcomes: list[object] = [*transaction.apply(commands)]
    transaction.finish()
    connection.execute("COMMIT")
    return outcomes


def new(event_id: str, **fields: object) -> Row:
    return parse_run(make_run(event_id=event_id, **fields)).row


def stored(connection: sqlite3.Connection) -> dict[str, Row]:
    rows = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM agent_runs").fetchall()
    return {row[EVENT_ID]: row for row in rows}


class Follower:
    """Keeps a copy in step, page by page; a number may only ever have one meaning, and an event comes once."""

    def __init__(self) -> None:
        self.copy: dict[str, Row] = {}
        self.events: dict[int, Row] = {}
        self.last_event = 0
        self.last = BEGINNING
        self.numbers: list[int] = []

    def take(self, changes: Changes, after: int) -> None:
        """Apply a page."""
        assert self.last == after <= changes.last <= changes.newest
        for seq, what in changes.found:
            assert self.last < seq <= changes.last
            self.numbers.append(seq)
            if isinstance(what, str):
                gone = self.copy.pop(what, (None,))[0]
                self.events = {number: row for number, row in self.events.items() if row[0] != gone}
            else:
                self.copy[str(what[EVENT_ID])] = what
        self.last = changes.last
        known = {row[0] for row in self.copy.values()}
        for run, number, *event in changes.events or ():
            assert run in known
            assert self.last_event < int(number or 0)
            self.last_event = int(number or 0)
            self.events = {  # a redacted event comes in the place of what it was
                known: row for known, row in self.events.items() if (row[0], row[2]) != (run, event[0])
            }
            self.events[self.last_event] = (run, number, *event)

    def read(self, connection: Any, limit: int) -> bool:
        """Read one page; tell whether there is more."""
        changes = fetch_changes(connection, ListChanges(self.last, limit, events_after=self.last_event))
        assert max(len(changes.found), len(changes.events or ())) <= limit
        self.take(changes, self.last)
        return changes.more

    def catch_up(self, connection: Any, limit: int = 1000) -> None:
        """Read everything there is."""
        while self.read(connection, limit):
            pass


event_ids = st.sampled_from([f"event-{number}" for number in range(12)])
moments = st.sampled_from([f"2025-12-{day:02}T10:00:00.000000Z" for day in range(1, 10)])
commands = st.one_of(
    st.lists(st.tuples(event_ids, moments), min_size=1, max_size=6).map(
        lambda made: CreateRuns(
            tuple(new(event_id, created_at=moment, labels={"day": moment, "x": "y"}) for event_id, moment in made)
        )
    ),
    st.builds(
        UpdateRun,
        event_ids,
        st.sampled_from([{"status": "success"}, {"items_failed": 1}, {"labels": '{"team":"a"}'}, {"labels": REMOVED}]),
    ),
    st.builds(
        lambda event_id, key: CreateEvents(event_id, ((key, "note", "", '{"a":1}'),)),
        event_ids,
        st.text("ab", min_size=1, max_size=2),
    ),
    st.builds(RegisterProcess, event_ids, st.just(PROCESS)),
    st.just(EndProcess(PROCESS, DEATH, 2)),
    st.builds(PruneRuns, moments, st.integers(1, 4)),
    st.builds(ReapRuns, moments, st.integers(1, 4)),
    st.builds(DeleteRun, event_ids),
    st.builds(
        RedactRun,
        event_ids,
        st.sampled_from([(), ("host", "metrics_json"), ("labels",)]),
        st.booleans(),
        st.integers(1, 2),
    ),
)


class Following(RuleBasedStateMachine):
    """Any commands in any groups, some undone, with restarts and repairs; followers that read when they like."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "telemetry.sqlite"
        self.connection = connect(self.path)
        migrate.create(self.connection, NOW)
        self.followers = [Follower(), Follower()]
        self.given: dict[int, str] = {}
        self.ticks = itertools.count()

    def now(self) -> str:
        return f"2025-12-{10 + next(self.ticks) // 86400}T12:00:00.{next(self.ticks):06}Z"

    @initialize(ids=st.lists(st.integers(1, 50), max_size=3))
    def begin_with_old_runs(self, ids: list[int]) -> None:
        """Runs of a database that is older than the sequence."""
        for number in ids:
            row = (number, *new(f"old-{number}", created_at=NOW))
            names = ", ".join(("id", *(name for name in COLUMNS if name not in ("id", "updated_at")), "updated_at"))
            values = (*row, NOW)
            self.connection.execute(
                f"INSERT OR IGNORE INTO agent_runs ({names}) VALUES ({', '.join('?' * len(values))})", values
            )

        self.connection.execute("BEGIN")
        recount_totals(self.connection)
        self.connection.execute("COMMIT")

    @rule(group=st.lists(commands, min_size=1, max_size=5))
    def commit(self, group: list[Command[Any]]) -> None:
        before = fetch_changes(self.connection, ListChanges(2**62)).newest
        commit(self.connection, group, self.now())
        self.look(before)

    @rule(group=st.lists(st.tuples(commands, st.booleans()), min_size=1, max_size=5))
    def commit_with_some_undone(self, group: list[tuple[Command[Any], bool]]) -> None:
        before = fetch_changes(self.connection, ListChanges(2**62)).newest
        self.connection.execute("BEGIN IMMEDIATE")
        transaction = Transaction(self.connection, self.now())
        for command, fails in group:
            with suppress(ZeroDivisionError), transaction.savepoint():
                transaction.apply([command])
                assert 1 // (not fails)
        transaction.finish()
        self.connection.execute("COMMIT")
        self.look(before)

    @rule(group=st.lists(commands, min_size=1, max_size=3))
    def roll_back(self, group: list[Command[Any]]) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        transaction = Transaction(self.connection, self.now())
        transaction.apply(group)
        transaction.finish()
        self.connection.execute("ROLLBACK")

    def look(self, before: int) -> None:
        """No number is drawn twice, whatever was deleted."""
        for seq, what in fetch_changes(self.connection, ListChanges(before, 1000)).found:
            assert seq > before
            assert seq not in self.given, (seq, what, self.given[seq])
            self.given[seq] = str(what)

    @rule()
    def restart(self) -> None:
        self.connection.close()
        self.connection = connect(self.path)

    @rule()
    def repair(self) -> None:
        self.connection.close()
        repair(self.path)
        self.connection = connect(self.path)

    @rule(limit=st.integers(1, 5), which=st.integers(0, 1))
    def read_a_page(self, limit: int, which: int) -> None:
        self.followers[which].read(self.connection, limit)

    @rule()
    def come_anew(self) -> None:
        self.followers[1] = Follower()

    @invariant()
    def whoever_catches_up_has_everything(self) -> None:
        for follower in self.followers:
            late = Follower()
            late.copy, late.last = dict(follower.copy), follower.last
            late.events, late.last_event = dict(follower.events), follower.last_event
            late.catch_up(self.connection, 3)
            assert late.copy == stored(self.connection)
            assert sorted(late.events.values()) == self.connection.execute(EVENTS).fetchall()

    def teardown(self) -> None:
        self.connection.close()
        with self.folder:
            assert [finding.text for finding in examine(self.path) if finding.check != "space"] == []


Following.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestFollowing = Following.TestCase


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A fresh database."""
    path = tmp_path / "telemetry.sqlite"
    with closing(connect(path)) as connection:
        migrate.create(connection, NOW)
    return path


def test_a_new_runs_number_is_its_id_and_no_number_comes_again(path: Path) -> None:
    with closing(connect(path)) as connection:
        commit(connection, [CreateRuns((new("a"), new("b"), new("c")))])
        commit(connection, [UpdateRun("a", {"status": "success"})])
        commit(connection, [PruneRuns("9999", 10)])
        assert stored(connection) == {}
    with closing(connect(path)) as connection:  # the highest rows are gone, and the process that knew of them too
        commit(connection, [CreateRuns((new("a"), new("a"))), CreateRuns((new("d"),))])
        changes = fetch_changes(connection, ListChanges())
    seen = [(seq, what if isinstance(what, str) else what[:2]) for seq, what in changes.found]
    assert seen == [(5, "a"), (6, "b"), (7, "c"), (8, (8, "a")), (9, (9, "d"))]


def test_deletions_are_remembered_within_bounds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "REMEMBERED", 4)
    with closing(connect(path)) as connection:
        commit(connection, [CreateRuns(tuple(new(f"event-{number}") for number in range(6)))])
        for _ in range(3):
            commit(connection, [PruneRuns("9999", 2)])
        changes = fetch_changes(connection, ListChanges())
    assert [seq for seq, _ in changes.found] == [9, 10, 11, 12]
    assert changes.horizon == 8
    changes.check(Cursor(BEGINNING), None)
    changes.check(Cursor(8), None)
    changes.check(Cursor(3), 8)
    for place, begun in ((Cursor(7), None), (Cursor(3), 7), (Cursor(13), None), (Cursor(9, "0123456789ab"), None)):
        with pytest.raises(CursorGoneError):
            changes.check(place, begun)


def test_many_runs_that_have_all_changed_do_not_make_a_page_slow(path: Path) -> None:
    count = 12_000
    with closing(connect(path)) as connection:
        commit(connection, [CreateRuns(tuple(new(f"event-{number}") for number in range(count)))])
        commit(connection, [UpdateRun(f"event-{number}", {"status": "success"}) for number in range(count)])
        first = fetch_changes(connection, ListChanges(BEGINNING, 1000))
        assert first.found == []
        assert first.more
        follower = Follower()
        follower.catch_up(connection, 1000)
        assert follower.copy == stored(connection)
        assert len(follower.numbers) == count


def test_a_page_of_large_runs_is_shorter_and_loses_nothing(path: Path) -> None:
    with closing(connect(path)) as connection:
        commit(
            connection, [CreateRuns((new(f"event-{number}", error_details="x" * 3_000_000),)) for number in range(7)]
        )
        assert len(fetch_changes(connection, ListChanges()).found) == 2
        follower = Follower()
        follower.catch_up(connection)
        assert sorted(follower.copy) == [f"event-{number}" for number in range(7)]


def test_a_page_of_large_events_is_shorter_and_comes_when_their_runs_are_known(path: Path) -> None:
    large = orjson.dumps({"text": "x" * 3_000_000}).decode()
    with closing(connect(path)) as connection:
        commit(connection, [CreateRuns(tuple(new(f"event-{number}") for number in range(4)))])
        commit(
            connection,
            [
                CreateEvents(f"event-{number}", (("a", "step", "", large), ("b", "step", "", None)))
                for number in range(4)
            ],
        )
        assert fetch_changes(connection, ListChanges()).events is None
        first = fetch_changes(connection, ListChanges(BEGINNING, 3, events_after=0))
        assert (first.events, first.more) == ([], True)
        page = fetch_changes(connection, ListChanges(first.newest, events_after=0))
        assert page.events is not None
        assert [row[1] for row in page.events] == [1, 2, 3, 4]
        assert page.more
        follower = Follower()
        follower.catch_up(connection)
        assert [*follower.events.values()] == connection.execute(EVENTS).fetchall()
        huge = orjson.dumps({"text": "x" * 9_000_000}).decode()
        commit(connection, [CreateEvents("event-0", (("c", "step", "", huge),))])
        follower.catch_up(connection)
        assert len(follower.events) == 9


def test_no_event_gets_the_id_of_one_that_was_deleted(path: Path) -> None:
    def ids(connection: sqlite3.Connection) -> list[int]:
        return [number for (number,) in connection.execute("SELECT id FROM run_events ORDER BY id")]

    with closing(connect(path)) as connection:
        commit(connection, [CreateRuns((new("a"), new("b"))), CreateEvents("a", (("k", "step", "", None),) * 3)])
        commit(connection, [CreateEvents("b", (("k", "step", "", None),))])
        highest = max(ids(connection))
        commit(connection, [PruneRuns("9999", 10), CreateRuns((new("c"),)), CreateEvents("c", (("k", "x", "", None),))])
        assert ids(connection) == [highest + 1]
        connection.execute("DELETE FROM agent_runs")  # what a repair finds and takes away
    repair(path)
    with closing(connect(path)) as connection:
        commit(connection, [CreateRuns((new("d"),)), CreateEvents("d", (("k", "step", "", None),))])
        assert ids(connection) == [highest + 2]


def test_a_restored_and_a_salvaged_database_begin_a_new_epoch(path: Path, tmp_path: Path) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    with closing(connect(path)) as connection:
        commit(connection, [CreateRuns((new("a"),))])
        before = fetch_changes(connection, ListChanges())
    backup.backup(path, tmp_path / "copy.sqlite")
    backup.restore(tmp_path / "copy.sqlite", path, moment)
    with closing(connect(path)) as connection:
        restored = fetch_changes(connection, ListChanges())
        assert restored == replace(before, epoch=restored.epoch)
        commit(connection, [UpdateRun("a", {"status": "success"})])
    salvage(path, moment)
    with closing(connect(path)) as connection:
        salvaged = fetch_changes(connection, ListChanges())
    assert len({before.epoch, restored.epoch, salvaged.epoch}) == 3
    for later in (restored, salvaged):
        with pytest.raises(CursorGoneError, match="restored"):
            later.check(Cursor(1, before.epoch), None)


def test_check_finds_and_repair_fixes_a_number_without_a_run(path: Path) -> None:
    with closing(connect(path)) as connection:
        commit(connection, [CreateRuns((new("a"), new("b")))])
        commit(connection, [UpdateRun("b", {"status": "success"})])
        connection.execute("DELETE FROM agent_runs WHERE id = 2")
        connection.execute("DELETE FROM change_feed")
    assert "1 rows of run_changes belong to runs that are gone" in [finding.text for finding in examine(path)]
    repair(path)
    with closing(connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM run_changes").fetchone() == (0,)
        commit(connection, [CreateRuns((new("c"),))])
        assert [seq for seq, _ in fetch_changes(connection, ListChanges(2)).found] == [4]


def test_two_that_are_made_are_in_order_and_the_plan_sorts_nothing(path: Path) -> None:
    from telemetryd.engine.sqlite.statements import changes as change_rows

    with closing(connect(path)) as connection:
        for sql in (change_rows._CHANGED, change_rows._DELETED, change_rows._CREATED):
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", (1, 2, 3))]
            assert not [step for step in plan if "TEMP B-TREE" in step or step.startswith("SCAN")], plan


# --- Over HTTP -----------------------------------------------------------------------------------


async def changes(api: Api, status: int = 200, **parameters: object) -> Any:
    return await api.get("/api/v1/changes", status, params={name: str(value) for name, value in parameters.items()})


async def test_the_changes_of_every_kind(make_api: MakeApi, engine: str) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token="secret-secret-secret", api_protected_mode=False)
    api.client.session.headers["Authorization"] = "Bearer secret-secret-secret"
    await api.batch([make_run(event_id="a"), make_run(event_id="b"), make_run(event_id="c", status="success")])
    first = await changes(api)
    numbers = [change["seq"] for change in first["changes"]]
    assert numbers == ([1, 2, 3] if engine == "sqlite" else sorted({*numbers}))
    assert [change["run"] for change in first["changes"]] == (await api.list())[::-1]
    last = numbers[-1]
    assert (first["last"], first["more"], first["newest"]) == (last, False, last)

    await api.call("PATCH", "/api/v1/runs/a", json={"items_failed": 2}, status=200)
    await api.call("POST", "/api/v1/runs/b/events", json={"event_type": "note"}, status=201)
    await api.call(
        "POST", "/api/v1/admin/prune", json={"created_before": "2999-01-01T00:00:00Z", "status": "success"}, status=200
    )
    await api.call("POST", "/api/v1/admin/reap", json={"created_before": "2999-01-01T00:00:00Z"}, status=200)
    page = await changes(api, after=last, limit=2)
    assert [change["seq"] for change in page["changes"]] == [last + 3, last + 4]
    assert page["changes"][0] == {"seq": last + 3, "deleted": "c"}
    assert page["changes"][1]["run"] == await api.get("/api/v1/runs/a")
    assert (page["last"], page["more"], page["newest"]) == (last + 4, True, last + 5)
    rest = await changes(api, after=f"{page['epoch']}-{page['last']}")
    assert [(change["seq"], change["run"]["status"]) for change in rest["changes"]] == [(last + 5, "cancelled")]
    assert rest["more"] is False


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"after": "x"}, "Invalid after: 'x'; it must be an integer from 0 to 9223372036854775807, or"),
        ({"after": "-1"}, "Invalid after: '-1'"),
        ({"after": str(2**63)}, "Invalid after"),
        ({"limit": "1001"}, "Invalid limit: '1001'; it must be an integer from 1 to 1000"),
        ({"wait": "61"}, "Invalid wait: '61'; it must be an integer from 0 to 60"),
        ({"events_after": "-1"}, "Invalid events_after: '-1'; it must be an integer from 0"),
        ({"begun": "no"}, "Invalid begun: 'no'; it must be an integer from 0"),
        ({"from": "1"}, "Unknown query parameter 'from'; known are: after, begun, events_after, limit, wait"),
    ],
)
async def test_what_cannot_be_asked(api: Api, parameters: dict[str, str], text: str) -> None:
    assert (await changes(api, 400, **parameters))["detail"].startswith(text)


async def test_a_place_that_is_gone(api: Api) -> None:
    await api.post(make_run())
    beyond = (await changes(api))["newest"] + 1
    assert "restored" in (await changes(api, 410, after=beyond, wait=30))["detail"]
    assert "restored" in (await changes(api, 410, after="0123456789ab-1"))["detail"]
    api.execute("UPDATE change_feed SET horizon = 5")
    assert (await changes(api, 410, after=3))["detail"].startswith("Deletions up to 5 are forgotten, and after is 3")
    assert (await changes(api, after=3, begun=5))["newest"] == 5
    assert (await changes(api))["newest"] == 5


async def test_whoever_waits_is_answered_by_the_commit(api: Api) -> None:
    waiting = [asyncio.create_task(changes(api, after=0, wait=60)) for _ in range(3)]
    while api.store.health().last_commit is None:
        await api.post(make_run())
    for answer in await asyncio.gather(*waiting):
        assert len(answer["changes"]) == 1
    assert (await changes(api, after=answer["last"], wait=1))["changes"] == []


async def test_events_come_with_the_last_change(api: Api) -> None:
    await api.batch([make_run(event_id="a"), make_run(event_id="b")])
    known = (await changes(api))["newest"]
    run = (await api.get("/api/v1/runs/b"))["id"]
    waiting = asyncio.create_task(changes(api, after=known, events_after=0, wait=60))
    told = [{"event_type": "step", "payload": {"n": number, "ä": [1.5, None]}} for number in range(3)]
    await api.call("POST", "/api/v1/runs/b/events", json=told, status=201)
    page = await waiting
    assert [change["run"]["event_id"] for change in page["changes"]] == ["b"]
    assert page["events"] == [{"run": run, **event} for event in await api.get("/api/v1/runs/b/events")]
    assert page["more"] is False
    assert "events" not in await changes(api, after=known)
    first = await changes(api, limit=2, events_after=0)
    assert (len(first["changes"]), len(first["events"]), first["more"]) == (2, 2, True)
    rest = await changes(api, after=first["last"], limit=2, events_after=first["events"][-1]["id"], wait=60)
    assert (rest["changes"], rest["events"], rest["more"]) == ([], page["events"][2:], False)


async def test_a_run_that_changes_while_pages_are_read_is_seen_as_it_is_at_last(api: Api) -> None:
    await api.batch([make_run(event_id=f"event-{number}") for number in range(5)])
    page = await changes(api, limit=2)
    await api.call("PATCH", "/api/v1/runs/event-0", json={"status": "success"}, status=200)
    await api.call("PATCH", "/api/v1/runs/event-4", json={"status": "failure"}, status=200)
    rest = await changes(api, after=page["last"], begun=page["newest"])
    assert [(change["run"]["event_id"], change["run"]["status"]) for change in rest["changes"]] == [
        ("event-2", "running"),
        ("event-3", "running"),
        ("event-0", "success"),
        ("event-4", "failure"),
    ]


def test_a_copy_forgets_old_deletions_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "REMEMBERED", 3)
    with closing(connect(tmp_path / "copy.sqlite")) as copy:
        migrate.create(copy, NOW)
        for start in (1, 6):
            gone = tuple((seq, f"event-{seq}") for seq in range(start, start + 5))
            commit(copy, [ApplyChanges(gone, (), "abcdefabcdef", start + 4, 0)])
        assert copy.execute("SELECT min(seq), max(seq) FROM run_deletions").fetchone() == (8, 10)
        assert fetch_changes(copy, ListChanges()).horizon == 7
