"""Several writers on one PostgreSQL database: each run once, each number once, nothing missed, every count exact."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from pydantic import SecretStr

from telemetryd.engine.postgres.connection import (
    Plain,
    Target,
    connect_plainly,
    reading_session,
    writing_session,
)
from telemetryd.engine.postgres.groups import Groups, Notices, transact
from telemetryd.engine.postgres.schema import CLASS, COMMITS
from telemetryd.engine.postgres.statements import deltas
from telemetryd.engine.postgres.statements.changes import fetch_changes
from telemetryd.errors import CommandFailedError, DatabaseSuspectError, WriteFailedError
from telemetryd.model import events
from telemetryd.model.changes import ListChanges
from telemetryd.model.commands import Command, Created, CreateEvents, CreateRuns, UpdateRun
from telemetryd.model.runs import COLUMNS, EVENT_ID
from telemetryd.model.values import Row
from telemetryd.settings import Settings, Sync
from tests.postgres_cluster import Cluster
from tests.test_changes import EVENT_ID as EVENT_ID_OF_ALL
from tests.test_changes import Follower, commands, new

pytestmark = pytest.mark.postgresql

NOW: Final = "2025-12-24T12:00:00.000000Z"
WRITERS: Final = 2
_RUNS: Final = f"SELECT {', '.join(COLUMNS)} FROM agent_runs"
_EVENTS: Final = f"SELECT run, {', '.join(events.COLUMNS)} FROM run_events ORDER BY run, id"


class Writer:
    """What a daemon writes with: a connection, and groups."""

    def __init__(self, url: str) -> None:
        target = Target.of(Settings(db_url=SecretStr(url), db_sync=Sync.NONE))
        self.plain = connect_plainly(target, "writer", writing_session(target))
        self._notices = Notices(self.plain)
        self._groups = Groups(lambda: NOW, target)

    def write(self, *group: Command[Any]) -> list[Any]:
        return self._groups.write(self.plain, self._notices, group)


class PostgresFollower(Follower):
    """A follower that reads from PostgreSQL."""

    def read(self, connection: Any, limit: int) -> bool:
        changes = fetch_changes(connection, ListChanges(self.last, limit, events_after=self.last_event))
        assert max(len(changes.found), len(changes.events or ())) <= limit
        self.take(changes, self.last)
        return changes.more


def reader(url: str) -> Plain:
    target = Target.of(Settings(db_url=SecretStr(url), db_sync=Sync.NONE))
    return connect_plainly(target, "reader", reading_session(60))


def stored(plain: Plain) -> dict[str, Row]:
    return {str(row[EVENT_ID_OF_ALL]): row for row in plain.execute(_RUNS)}


@pytest.fixture
def url(postgres_database: str) -> str:
    return postgres_database


@pytest.fixture
def writers(url: str) -> Iterator[list[Writer]]:
    """Two writers on a new database."""
    both = [Writer(url) for _ in range(WRITERS)]
    yield both
    for writer in both:
        writer.plain.close()


groups = st.lists(commands, min_size=1, max_size=4)


class Writing(RuleBasedStateMachine):
    """Two writers, alone and at the same time, whose clients repeat what they got no answer to; and followers."""

    cluster: Cluster
    template: str

    def __init__(self) -> None:
        super().__init__()
        self.name = self.cluster.make(self.template)
        url = self.cluster.url(self.name)
        self.writers = [Writer(url) for _ in range(WRITERS)]
        self.reader = reader(url)
        self.pool = ThreadPoolExecutor(WRITERS)
        self.followers = [PostgresFollower(), PostgresFollower()]
        self.given: dict[int, str] = {}
        self.created: Counter[str] = Counter()

    def note(self, group: list[Command[Any]], outcomes: list[Any]) -> None:
        for command, outcome in zip(group, outcomes, strict=True):
            assert not isinstance(outcome, CommandFailedError)
            if isinstance(command, CreateRuns) and isinstance(outcome, Created):
                for row, is_new in zip(command.rows, outcome.new, strict=True):
                    self.created[str(row[EVENT_ID])] += is_new

    @rule(which=st.integers(0, WRITERS - 1), group=groups)
    def commit(self, which: int, group: list[Command[Any]]) -> None:
        self.note(group, self.writers[which].write(*group))

    @rule(both=st.tuples(groups, groups))
    def commit_at_the_same_time(self, both: tuple[list[Command[Any]], list[Command[Any]]]) -> None:
        writing = [self.pool.submit(writer.write, *group) for writer, group in zip(self.writers, both, strict=True)]
        while not all(each.done() for each in writing):
            self.followers[1].read(self.reader, 2)  # whatever it sees, it must miss nothing
        for group, each in zip(both, writing, strict=True):
            self.note(group, each.result(60))

    @rule(which=st.integers(0, WRITERS - 1), runs=commands.filter(lambda command: isinstance(command, CreateRuns)))
    def lose_an_answer_and_repeat_at_another(self, which: int, runs: CreateRuns) -> None:
        self.note([runs], self.writers[which].write(runs))
        (outcome,) = self.writers[1 - which].write(runs)
        assert outcome == Created((False,) * len(runs.rows))

    @rule(which=st.integers(0, WRITERS - 1))
    def add_up(self, which: int) -> None:
        transact(self.writers[which].plain, deltas.fold)

    @rule(limit=st.integers(1, 5), which=st.integers(0, 1))
    def read_a_page(self, limit: int, which: int) -> None:
        self.followers[which].read(self.reader, limit)

    @invariant()
    def each_run_was_created_once(self) -> None:
        deleted = Counter(event_id for (event_id,) in self.reader.execute("SELECT event_id FROM run_deletions"))
        there = dict.fromkeys(stored(self.reader), 1)
        assert {name: count for name, count in (self.created - deleted).items() if count} == there

    @invariant()
    def no_number_was_drawn_twice(self) -> None:
        for seq, what in fetch_changes(self.reader, ListChanges(limit=1000)).found:
            assert self.given.setdefault(seq, str(what)) == str(what)

    @invariant()
    def a_follower_that_catches_up_has_everything(self) -> None:
        for follower in self.followers:
            late = PostgresFollower()
            late.copy, late.last = dict(follower.copy), follower.last
            late.events, late.last_event = dict(follower.events), follower.last_event
            late.catch_up(self.reader, 3)
            assert late.copy == stored(self.reader)
            assert sorted(late.events.values()) == self.reader.execute(_EVENTS).fetchall()

    def teardown(self) -> None:
        assert transact(self.writers[0].plain, deltas.count_wrong) == 0
        labels = self.reader.execute("SELECT key, value, created, run FROM run_labels ORDER BY 1, 2, 3, 4").fetchall()
        assert (
            labels
            == self.reader.execute(
                "SELECT key, value, created_at, id FROM agent_runs, json_each_text(labels) ORDER BY 1, 2, 3, 4"
            ).fetchall()
        )
        for table in ("run_events", "run_changes", "run_processes", "run_arrivals"):
            strays = f"SELECT count(*) FROM {table} WHERE run NOT IN (SELECT id FROM agent_runs)"
            assert self.reader.execute(strays.encode()).fetchall() == [(0,)]
        self.pool.shutdown()
        self.reader.close()
        for writer in self.writers:
            writer.plain.close()
        self.cluster.drop(self.name)


def test_two_daemons_and_clients_that_repeat(cluster: Cluster, new_postgres_database: str) -> None:
    Writing.cluster, Writing.template = cluster, new_postgres_database
    run_state_machine_as_test(Writing, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))


def test_many_writers_of_the_same_runs_store_each_once_and_never_lock_each_other_out(url: str) -> None:
    """Each also changes what the others create, which deadlocks where rows are taken in no order."""
    count, rounds = 4, 25
    writers = [Writer(url) for _ in range(count)]
    begin = threading.Barrier(count)

    def work(place: int) -> int:
        total = 0
        for number in range(rounds):
            names = [f"run-{number}-{each}" for each in range(20)]
            names = names[place * 5 :] + names[: place * 5] if place % 2 else [*reversed(names)]
            begin.wait(60)
            group: list[Command[Any]] = [CreateRuns(tuple(new(name) for name in names))]
            group += [UpdateRun(name, {"items_failed": place}) for name in names]
            group += [CreateEvents(name, ((str(place), "note", "", None),)) for name in names]
            total += sum(writers[place].write(*group)[0].new)
        return total

    with ThreadPoolExecutor(count) as pool:
        assert sum(pool.map(work, range(count))) == rounds * 20
    with contextlib.closing(reader(url)) as plain:
        assert plain.execute("SELECT count(*), count(DISTINCT event_id) FROM agent_runs").fetchall() == [(500, 500)]
        assert plain.execute("SELECT count(*) FROM run_events").fetchall() == [(500 * count,)]
        assert plain.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchall() == [(0,)]
    assert transact(writers[0].plain, deltas.count_wrong) == 0
    for writer in writers:
        writer.plain.close()


def test_a_follower_waits_for_a_writer_that_is_slower(url: str, writers: list[Writer]) -> None:
    """Ids are drawn at once, numbers when the commit comes: so nobody reads past what is still to be committed."""
    slow, fast = writers
    follower = PostgresFollower()
    with contextlib.closing(reader(url)) as plain, psycopg.connect(url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s, %s)", (CLASS, COMMITS))
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(slow.write, CreateRuns((new("first"),)), CreateEvents("first", (("k", "t", "", None),)))
            while not plain.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall():
                pass
            second = pool.submit(fast.write, CreateRuns((new("second"),)))
            while len(plain.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall()) < WRITERS:
                follower.read(plain, 10)
            assert follower.copy == {}
            other.execute("SELECT pg_advisory_unlock(%s, %s)", (CLASS, COMMITS))
            first.result(60)
            second.result(60)
        follower.catch_up(plain)
        assert follower.copy.keys() == {"first", "second"}
        assert len(follower.events) == 1


def test_a_new_run_has_a_number_above_its_id_and_ids_are_in_the_order_of_the_batch(
    url: str, writers: list[Writer]
) -> None:
    names = ["c", "a", "b"]
    writers[0].write(CreateRuns(tuple(new(name) for name in names)))
    with contextlib.closing(reader(url)) as plain:
        found = plain.execute("SELECT event_id, id, seq FROM agent_runs JOIN run_changes ON run = id ORDER BY id")
        rows = found.fetchall()
    assert [row[0] for row in rows] == names
    assert all(seq > number for _, number, seq in rows)
    assert [row[2] for row in rows] == sorted(row[2] for row in rows)


def test_counts_are_right_at_any_moment_while_others_write(url: str, writers: list[Writer]) -> None:
    """Who checks them must see the runs and the counts of one moment."""
    checking, working = writers
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            working.write(CreateRuns((new(f"run-{number}"),)))

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(work)
        try:
            found = [transact(checking.plain, deltas.count_wrong) for _ in range(20)]
        finally:
            stop.set()
        writing.result(60)
    assert found == [0] * 20


def test_another_warning_is_no_doubt_about_the_standby(url: str, writers: list[Writer]) -> None:
    """A server warns of many things, for days before its transaction ids run out with every transaction."""
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(
            "CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN RAISE WARNING 'database must be vacuumed'; RETURN NULL; END$$"
        )
        other.execute("CREATE TRIGGER warn AFTER INSERT ON agent_runs EXECUTE FUNCTION warn()")
    assert writers[0].write(CreateRuns((new("one"),))) == [Created((True,))]


def test_a_statement_that_was_to_be_prepared_when_its_pipeline_broke_off_is_prepared_the_next_time(
    url: str, writers: list[Writer]
) -> None:
    """The driver takes it for prepared, and forgets that only with a ROLLBACK of its own."""
    (writer, _) = writers
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN IF EXISTS (SELECT 1 FROM pg_class WHERE relname = 'broken') THEN "
            "RAISE 'broken' USING ERRCODE = '40001'; END IF; RETURN NEW; END$$"
        )
        other.execute("CREATE TRIGGER refuse BEFORE INSERT ON run_deltas FOR EACH ROW EXECUTE FUNCTION refuse()")
        for number in range(12):  # the driver prepares a statement when it has seen it five times
            other.execute("CREATE TABLE broken ()")
            with pytest.raises(WriteFailedError):
                writer.write(CreateRuns((new(f"refused-{number}"),)))
            other.execute("DROP TABLE broken")
            assert writer.write(CreateRuns((new(f"run-{number}"),))) == [Created((True,))]


def test_a_session_whose_prepared_statements_are_gone_is_given_up(writers: list[Writer]) -> None:
    """The driver would name them again and again; after a deadlock in a pipeline it can be wrong about them."""
    (writer, _) = writers
    for number in range(10):
        writer.write(CreateRuns((new(f"run-{number}"),)))
    writer.plain.pgconn.exec_(b"DEALLOCATE ALL")
    with pytest.raises(DatabaseSuspectError, match="connection to PostgreSQL was lost"):
        writer.write(CreateRuns((new("one"),)))
