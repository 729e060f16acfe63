"""What an acknowledgement on PostgreSQL promises: a standby, a synced disk, and numbers that nobody draws again."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from telemetryd.engine.postgres import connection, epochs, schema
from telemetryd.engine.postgres.connection import Target, connect_plainly, writing_session
from telemetryd.engine.postgres.groups import Groups, Notices
from telemetryd.errors import DatabaseError, DatabaseSuspectError, UnavailableError, WriteFailedError
from telemetryd.model.commands import Command, Created, CreateRuns
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Sync
from telemetryd.store import Store
from tests import postgres_cluster
from tests.conftest import PATIENCE_S, eventually, wait_until
from tests.postgres_cluster import Cluster
from tests.test_changes import new
from tests.test_postgres_faults import feed, opened, settings_of, stored_in_the_end

pytestmark = pytest.mark.postgresql


# --- Standbys ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def waiting_cluster() -> Iterator[Cluster]:
    """A server whose synchronous standby is not there: commits that are to wait for it wait for ever."""
    if postgres_cluster.binaries() is None:
        pytest.fail(f"apt-get install {postgres_cluster.PACKAGE}")
    with postgres_cluster.running(fsync="on", full_page_writes="on", synchronous_standby_names="nobody") as cluster:
        yield cluster


@pytest.fixture
def waiting_url(waiting_cluster: Cluster) -> Iterator[str]:
    name = waiting_cluster.make()
    target = Target.of(settings_of(waiting_cluster.url(name)))
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        schema.make(plain, target, "", count_anew=None)
    yield waiting_cluster.url(name)
    waiting_cluster.drop(name)


class OneWriter:
    """Writes in a thread, because it may wait for ever."""

    def __init__(self, url: str, sync: Sync) -> None:
        target = Target.of(settings_of(url, db_sync=sync))
        self.plain = connect_plainly(target, "writer", writing_session(target))
        self._notices = Notices(self.plain)
        self._groups = Groups(lambda: "2025-12-24T12:00:00Z", target)
        self.pid = self.plain.info.backend_pid

    def write(self, *group: Command[Any]) -> list[Any]:
        return self._groups.write(self.plain, self._notices, group)


@contextlib.contextmanager
def writing_to(url: str, sync: Sync) -> Iterator[OneWriter]:
    writer = OneWriter(url, sync)
    try:
        yield writer
    finally:
        writer.plain.close()


def wait_for_standby(other: psycopg.Connection[Any], pid: int) -> None:
    asked = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: other.execute(asked, (pid,)).fetchone() == ("SyncRep",))


@pytest.mark.parametrize("options", ["", "&options=-c%20client_min_messages%3Derror"])
def test_a_cancelled_wait_for_the_standby_is_no_acknowledgement(waiting_url: str, options: str) -> None:
    """PostgreSQL says COMMIT then, with a warning next to it, which a role or an address may have turned off."""
    with (
        writing_to(waiting_url + options, Sync.STANDBY) as writer,
        psycopg.connect(waiting_url, autocommit=True) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        writing = pool.submit(writer.write, CreateRuns((new("one"),)))
        wait_for_standby(other, writer.pid)
        other.execute("SELECT pg_cancel_backend(%s)", (writer.pid,))
        with pytest.raises(DatabaseSuspectError, match="It is unknown whether a standby holds the last commit"):
            writing.result(PATIENCE_S)
        assert other.execute("SELECT count(*) FROM agent_runs").fetchone() == (1,)  # on the primary it is


def test_a_duplicate_waits_until_a_standby_holds_what_it_repeats(waiting_url: str) -> None:
    """A transaction that wrote nothing would not wait, and call a run stored that one server alone holds."""
    command = CreateRuns((new("one"),))
    with writing_to(waiting_url, Sync.LOCAL) as local:
        assert local.write(command) == [Created((True,))]
        assert local.write(command) == [Created((False,))]
    with (
        writing_to(waiting_url, Sync.STANDBY) as writer,
        psycopg.connect(waiting_url, autocommit=True) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        writing = pool.submit(writer.write, command)
        wait_for_standby(other, writer.pid)
        time.sleep(0.2)
        assert not writing.done()
        other.execute("SELECT pg_terminate_backend(%s)", (writer.pid,))
        with pytest.raises(DatabaseSuspectError):
            writing.result(PATIENCE_S)


def test_nothing_is_acknowledged_while_no_standby_is_asked_for(waiting_cluster: Cluster, waiting_url: str) -> None:
    """So Patroni leaves it when the last standby is gone, unless it is strict."""
    with (
        writing_to(waiting_url, Sync.STANDBY) as writer,
        psycopg.connect(waiting_url, autocommit=True) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        writing = pool.submit(writer.write, CreateRuns((new("one"),)))
        wait_for_standby(other, writer.pid)
        with no_standby_asked_for(waiting_cluster):
            with pytest.raises(DatabaseSuspectError, match="none is asked for any more"):
                writing.result(PATIENCE_S)
            with pytest.raises(UnavailableError, match="No synchronous standby would hold it, so it was not stored"):
                writer.write(CreateRuns((new("two"),)))
        assert other.execute("SELECT event_id FROM agent_runs").fetchall() == [("one",)]


@contextlib.contextmanager
def no_standby_asked_for(cluster: Cluster) -> Iterator[None]:
    cluster.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
    cluster.execute("SELECT pg_reload_conf()")
    wait_until(lambda: cluster.execute("SHOW synchronous_standby_names") == [("",)])
    try:
        yield
    finally:
        cluster.execute("ALTER SYSTEM RESET synchronous_standby_names")
        cluster.execute("SELECT pg_reload_conf()")


async def test_a_daemon_that_is_to_wait_for_a_standby_does_not_start_without_one(postgres_database: str) -> None:
    with pytest.raises(DatabaseError, match=r"fsync = off: a crash would lose acknowledged runs"):
        await Store.open(settings_of(postgres_database, db_sync=Sync.STANDBY), Metrics())


# --- Another server ------------------------------------------------------------------------------


LINEAGE = "SELECT lineage FROM change_feed"


def be_from(plain: psycopg.Connection[Any], old: str, other: str) -> None:
    """Let the database be one that another server held before."""
    plain.execute("UPDATE change_feed SET lineage = regexp_replace(lineage, %s, %s)", (old, other))


@pytest.mark.parametrize(
    ("change", "sync", "is_new"),
    [
        (("/.*$", "/00000007"), Sync.LOCAL, True),
        (("/.*$", "/00000007"), Sync.STANDBY, False),
        (("^.*/", "1234/"), Sync.STANDBY, True),
        (("^.*$", ""), Sync.LOCAL, False),
    ],
    ids=["took over", "took over with all that was seen", "was restored from a dump", "is asked for the first time"],
)
def test_a_server_that_may_lack_commits_begins_a_new_epoch_though_no_daemon_remembers_them(
    waiting_url: str, change: tuple[str, str], sync: Sync, is_new: bool
) -> None:
    with psycopg.connect(waiting_url, autocommit=True) as other, writing_to(waiting_url, Sync.LOCAL) as writer:
        epochs.check(writer.plain, None, waits_for_standby=sync is Sync.STANDBY)
        (lineage,) = other.execute(LINEAGE).fetchone() or ("",)
        writer.write(CreateRuns((new("one"),)))
        before, newest = feed(other)
        be_from(other, *change)
        for _ in range(2):
            epochs.check(writer.plain, None, waits_for_standby=sync is Sync.STANDBY)
            epoch, _ = feed(other)
            assert (epoch != before) is is_new
            before, is_new = epoch, False
        assert other.execute(LINEAGE).fetchone() == (lineage,)
        assert re.fullmatch(r"[0-9]+/[0-9A-F]{8}", lineage)
        writer.write(CreateRuns((new("two"),)))
        assert feed(other)[1] > newest


async def test_daemons_that_were_all_away_when_another_server_took_over_begin_a_new_epoch(
    postgres_database: str,
) -> None:
    with psycopg.connect(postgres_database, autocommit=True) as other:
        async with opened(settings_of(postgres_database)) as store:
            await store.submit(CreateRuns((new("kept"),)))
        epoch, _ = feed(other)
        async with opened(settings_of(postgres_database)):
            assert feed(other)[0] == epoch
        be_from(other, "/.*$", "/00000007")
        async with opened(settings_of(postgres_database)), opened(settings_of(postgres_database)):
            again, _ = feed(other)
        assert again != epoch
        async with opened(settings_of(postgres_database)):
            assert feed(other)[0] == again


# --- Waiting -------------------------------------------------------------------------------------


async def test_who_waits_too_long_for_the_turn_gets_503_and_keeps_the_connection(postgres_database: str) -> None:
    """All attempts together end before the server's answer counts as lost."""
    settings = settings_of(postgres_database, db_commit_timeout_s=2.0)
    async with opened(settings) as store:
        with psycopg.connect(postgres_database, autocommit=True) as other:
            session = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'telemetryd/%/writer'"
            writer = other.execute(session).fetchall()
            other.execute("SELECT pg_advisory_lock(%s, %s)", (schema.CLASS, schema.COMMITS))
            begun = time.monotonic()
            with pytest.raises(WriteFailedError):
                await store.submit(CreateRuns((new("one"),)))
            assert time.monotonic() - begun < 2.0
            assert "lock timeout" in (store.health().problem or "")
            other.execute("SELECT pg_advisory_unlock(%s, %s)", (schema.CLASS, schema.COMMITS))
            assert await store.submit(CreateRuns((new("one"),))) == Created((True,))
            assert other.execute(session).fetchall() == writer


def test_a_server_that_lets_us_in_and_then_stands_still_is_given_up(
    postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ANSWER_S", 0.5)
    target = Target.of(settings_of(postgres_database))
    with psycopg.connect(postgres_database) as other:
        other.execute("LOCK TABLE pg_settings IN ACCESS EXCLUSIVE MODE")  # which is asked for at first
        with pytest.raises(DatabaseError, match=r"the server has not answered for 0\.5 s"):
            connect_plainly(target, "test", {})
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        assert plain.execute("SELECT 1").fetchone() == (1,)


async def test_a_server_that_stops_syncing_its_disk_gets_no_acknowledgement(
    waiting_cluster: Cluster, waiting_url: str
) -> None:
    command = CreateRuns((new("two"),))
    async with opened(settings_of(waiting_url, db_sync=Sync.LOCAL)) as store:
        assert await store.submit(CreateRuns((new("one"),))) == Created((True,))
        with turned_off(waiting_cluster, "fsync"):
            with pytest.raises(DatabaseSuspectError, match="fsync or full_page_writes was turned off"):
                await store.submit(command)
            await eventually(lambda: "has fsync = off: a crash would lose" in (store.health().problem or ""))
            with pytest.raises(UnavailableError):
                await store.submit(command)
        assert await stored_in_the_end(store, command) == Created((False,))


@contextlib.contextmanager
def turned_off(cluster: Cluster, setting: str) -> Iterator[None]:
    """Turn a setting off while the server runs."""
    cluster.execute(f"ALTER SYSTEM SET {setting} = off")
    cluster.execute("SELECT pg_reload_conf()")
    wait_until(lambda: cluster.execute(f"SHOW {setting}") == [("off",)])
    try:
        yield
    finally:
        cluster.execute(f"ALTER SYSTEM RESET {setting}")
        cluster.execute("SELECT pg_reload_conf()")
