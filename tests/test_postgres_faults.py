"""What goes wrong with PostgreSQL: nothing acknowledged is lost, nothing is stored twice, and a sentence says why."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from telemetryd.engine.postgres.connection import Target, connect_plainly, writing_session
from telemetryd.engine.postgres.groups import Groups, Notices
from telemetryd.errors import DatabaseError, DatabaseSuspectError, UnavailableError
from telemetryd.model.commands import Command, Created, CreateRuns
from telemetryd.model.queries import CountRuns
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings, Sync
from telemetryd.store import Store
from tests import postgres_cluster
from tests.conftest import PATIENCE_S, eventually, wait_until
from tests.needs import require_program
from tests.postgres_cluster import Cluster
from tests.test_changes import new
from tests.tools.process import telemetryd
from tests.tools.tcp_proxy import Cut, Proxy, proxy_to

pytestmark = pytest.mark.postgresql

EVER = CountRuns("0001-01-01T00:00:00Z", "9999-01-01T00:00:00Z")


def settings_of(url: str, **values: Any) -> Settings:
    return Settings(**{"db_url": SecretStr(url), "db_sync": Sync.NONE, "db_readers": 2, **values})


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Store]:
    store = await Store.open(settings, Metrics())
    try:
        yield store
    finally:
        await store.close()


async def stored_in_the_end(store: Store, command: CreateRuns) -> Created:
    """Repeat a command as clients do."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await store.submit(command)
            except UnavailableError:
                await asyncio.sleep(0.05)


# --- Connections that break ----------------------------------------------------------------------


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    """A TCP way to the server."""
    with proxy_to(cluster.folder / ".s.PGSQL.5432") as proxy:
        yield proxy


def through(proxy: Proxy, url: str) -> str:
    database = url.partition("?")[0].rpartition("/")[2]
    return f"postgresql://postgres@127.0.0.1:{proxy.port}/{database}"


@pytest.mark.parametrize(("cut", "was_stored"), [(Cut.BEFORE, False), (Cut.AFTER, True), (Cut.FREEZE, True)])
async def test_a_commit_whose_answer_is_lost_is_503_and_a_repeat_says_what_became_of_it(
    postgres_database: str, proxy: Proxy, cut: Cut, was_stored: bool
) -> None:
    command = CreateRuns((new("unsure"),))
    async with opened(settings_of(through(proxy, postgres_database), db_commit_timeout_s=1.5)) as store:
        assert await store.submit(CreateRuns((new("sure"),))) == Created((True,))
        proxy.cut = cut
        with pytest.raises(DatabaseSuspectError, match="connection to PostgreSQL was lost") as caught:
            await store.submit(command)
        assert caught.value.retry_after_seconds > 0
        assert store.health().problem is not None
        assert await stored_in_the_end(store, command) == Created((not was_stored,))
        assert (await store.fetch(EVER)).total == 2
        assert store.health().problem is None


async def test_a_server_that_ends_our_sessions_costs_one_refusal(postgres_database: str) -> None:
    async with opened(settings_of(postgres_database)) as store:
        await store.submit(CreateRuns((new("before"),)))
        with psycopg.connect(postgres_database, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'telemetryd/%'"
            )
        assert await stored_in_the_end(store, CreateRuns((new("after"),))) == Created((True,))
        assert (await store.fetch(EVER)).total == 2


async def test_an_idle_daemon_notices_that_the_server_is_gone_and_that_it_is_back() -> None:
    with postgres_cluster.running(synchronous_commit="on") as cluster:
        async with opened(settings_of(cluster.url())) as store:
            await store.submit(CreateRuns((new("before"),)))
            cluster.stop()
            await eventually(lambda: store.health().problem is not None)
            with pytest.raises(UnavailableError):
                await store.submit(CreateRuns((new("during"),)))
            cluster.start()
            assert await stored_in_the_end(store, CreateRuns((new("after"),))) == Created((True,))
            assert (await store.fetch(EVER)).total == 2
            assert store.health().problem is None


async def test_commits_that_are_gone_after_another_server_took_over_begin_a_new_epoch(postgres_database: str) -> None:
    async with opened(settings_of(postgres_database)) as store:
        await store.submit(CreateRuns((new("kept"), new("lost"))))
        with psycopg.connect(postgres_database, autocommit=True) as other:
            epoch, last = _feed(other)
            await eventually(lambda: store._reading._database.session.seen.newest >= last)  # type: ignore[attr-defined]
            other.execute("DELETE FROM run_changes WHERE seq = %s", (last,))  # as an asynchronous standby lacks it
            other.execute("DELETE FROM agent_runs WHERE event_id = 'lost'")
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'telemetryd/%'"
            )
            assert await stored_in_the_end(store, CreateRuns((new("lost"),))) == Created((True,))
            again, newest = _feed(other)
    assert again != epoch
    assert newest > last


def _feed(plain: psycopg.Connection[Any]) -> tuple[str, int]:
    row = plain.execute("SELECT (SELECT epoch FROM change_feed), (SELECT max(seq) FROM run_changes)").fetchone()
    assert row is not None
    return str(row[0]), int(row[1])


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
    from telemetryd.engine.postgres import schema

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
        self._groups = Groups(lambda: "2025-12-24T12:00:00Z", needs_standby=sync is Sync.STANDBY)
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
    """PostgreSQL says COMMIT then, with a warning beside it, which a role or an address may have turned off."""
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


# --- One sentence for each fault -----------------------------------------------------------------


async def refusal(settings: Settings) -> str:
    with pytest.raises(DatabaseError) as caught:
        await Store.open(settings, Metrics())
    text = str(caught.value)
    assert "\n" not in text
    assert "secret" not in text
    return text


async def test_a_server_that_is_not_there(free_port: int) -> None:
    text = await refusal(settings_of(f"postgresql://me:secret@127.0.0.1:{free_port}/telemetry"))
    assert text.startswith(f"Cannot connect to postgresql://127.0.0.1:{free_port}/telemetry: ")
    assert "Connection refused" in text


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://me:secret@[/telemetry", "TELEMETRY_DB_URL is no address of PostgreSQL"),
        ("postgresql://me:secret@db/telemetry?colour=red", "TELEMETRY_DB_URL is no address of PostgreSQL"),
        (
            "postgresql://me:secret@no-such-host.invalid/telemetry",
            "Cannot connect to postgresql://no-such-host.invalid",
        ),
    ],
)
async def test_a_wrong_address(url: str, sentence: str) -> None:
    assert sentence in await refusal(settings_of(url))


async def test_a_database_that_is_not_there(cluster: Cluster) -> None:
    assert 'database "nowhere" does not exist' in await refusal(settings_of(cluster.url("nowhere")))


@pytest.fixture
def limited_user(cluster: Cluster, postgres_database: str) -> Iterator[str]:
    """A user with a password and no rights."""
    cluster.execute("CREATE ROLE limited LOGIN PASSWORD 'secret'")
    yield "limited"
    cluster.execute("DROP OWNED BY limited", postgres_database.partition("?")[0].rpartition("/")[2])
    cluster.execute("DROP ROLE limited")


async def test_a_wrong_password_and_a_right_one_in_a_file(cluster: Cluster, limited_user: str, tmp_path: Path) -> None:
    name = cluster.make()
    url = cluster.url(name, limited_user)
    assert "no password supplied; set TELEMETRY_DB_PASSWORD_FILE" in await refusal(settings_of(url))
    file = tmp_path / "password"
    assert "cannot be read: No such file" in await refusal(settings_of(url, db_password_file=file))
    file.write_text("wrong\n")
    assert "password authentication failed" in await refusal(settings_of(url, db_password_file=file))
    file.write_text("secret\n")
    text = await refusal(settings_of(url, db_password_file=file))
    assert "may not make the tables there: permission denied for schema public; grant it CREATE" in text
    cluster.drop(name)


async def test_missing_grants_are_named(
    cluster: Cluster, postgres_database: str, limited_user: str, tmp_path: Path
) -> None:
    name = postgres_database.partition("?")[0].rpartition("/")[2]
    (tmp_path / "password").write_text("secret")
    settings = settings_of(cluster.url(name, limited_user), db_password_file=tmp_path / "password")
    cluster.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO limited", name)
    cluster.execute("REVOKE UPDATE ON run_totals FROM limited", name)
    assert "lacks grants on event_numbers, numbers, run_totals; grant SELECT, INSERT" in await refusal(settings)
    cluster.execute("GRANT UPDATE ON run_totals TO limited", name)
    cluster.execute("GRANT USAGE, UPDATE ON ALL SEQUENCES IN SCHEMA public TO limited", name)
    async with opened(settings) as store:
        assert await store.submit(CreateRuns((new("one"),))) == Created((True,))


async def test_another_encoding(cluster: Cluster) -> None:
    cluster.execute("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    text = await refusal(settings_of(cluster.url("latin")))
    assert "has the encoding LATIN1; make a database with ENCODING 'UTF8'" in text
    cluster.drop("latin")


async def test_too_many_connections(
    cluster: Cluster, postgres_database: str, limited_user: str, tmp_path: Path
) -> None:
    cluster.execute("ALTER ROLE limited CONNECTION LIMIT 0")
    (tmp_path / "password").write_text("secret")
    name = postgres_database.partition("?")[0].rpartition("/")[2]
    settings = settings_of(cluster.url(name, limited_user), db_password_file=tmp_path / "password")
    assert 'too many connections for role "limited"; raise the limit, or lower' in await refusal(settings)


@pytest.mark.parametrize(("mode", "is_fine"), [("transaction", False), ("session", True)])
async def test_a_pooler_in_transaction_mode_is_refused(
    cluster: Cluster, postgres_database: str, free_port: int, mode: str, is_fine: bool
) -> None:
    require_program("pgbouncer", "pgbouncer")
    with pooler(cluster, free_port, mode):
        name = postgres_database.partition("?")[0].rpartition("/")[2]
        settings = settings_of(f"postgresql://postgres@127.0.0.1:{free_port}/{name}")
        if is_fine:
            async with opened(settings) as store:
                assert await store.submit(CreateRuns((new("one"),))) == Created((True,))
        else:
            assert "is reached through a pooler in transaction mode" in await refusal(settings)


@contextlib.contextmanager
def pooler(cluster: Cluster, port: int, mode: str) -> Iterator[None]:
    """Run pgbouncer before the server."""
    program = shutil.which("pgbouncer")
    assert program is not None
    file = cluster.folder / f"pgbouncer-{mode}.ini"
    file.write_text(
        f"[databases]\n* = host={cluster.folder} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nauth_type = any\npool_mode = {mode}\nunix_socket_dir =\n"
        "ignore_startup_parameters = extra_float_digits\n"
    )
    started = subprocess.Popen(
        [*postgres_cluster.as_ordinary_user(), program, "-q", str(file)], stderr=subprocess.DEVNULL, cwd="/"
    )
    try:
        wait_until(lambda: _answers(port))
        yield
    finally:
        started.terminate()
        started.wait(PATIENCE_S)


def _answers(port: int) -> bool:
    try:
        psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def test_the_daemon_says_it_in_one_line_and_ends(free_port: int, tmp_path: Path) -> None:
    url = f"postgresql://me:secret@127.0.0.1:{free_port}/telemetry"
    done = telemetryd("serve", status=1, cwd=tmp_path, TELEMETRY_DB_URL=url)
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"telemetryd: Cannot connect to postgresql://127\.0\.0\.1:\d+/telemetry: .*refused.*", lines[0])
