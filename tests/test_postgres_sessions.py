"""A daemon's sessions with PostgreSQL: what they do when the server does not answer, refuses, or has lost commits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from telemetryd.engine.postgres import opening
from telemetryd.engine.postgres.connection import Plain, Target, connect_plainly, writing_session
from telemetryd.engine.postgres.schema import CLASS
from telemetryd.engine.postgres.statements import deltas
from telemetryd.engine.postgres.statements.full_text import INDEX
from telemetryd.model.changes import ListChanges
from telemetryd.model.chores import Chore
from telemetryd.model.commands import Created, CreateRuns
from telemetryd.model.rules import Rules, Stale
from telemetryd.ops.metrics import Metrics
from telemetryd.services.alerting import Alerting
from telemetryd.services.upkeep import FullText, Upkeep
from telemetryd.store import Store
from tests.conftest import PATIENCE_S, eventually
from tests.postgres_cluster import Cluster
from tests.test_changes import new
from tests.test_postgres_faults import opened, settings_of, stored_in_the_end

Other = psycopg.Connection[Any]


@pytest.fixture
def other(postgres_database: str) -> Iterator[Other]:
    """A session of somebody else's."""
    with psycopg.connect(postgres_database, autocommit=True) as other:
        yield other


def one(other: Other, statement: str) -> Any:
    row = other.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def end_our_sessions(other: Other) -> None:
    other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'telemetryd/%'")


EPOCH = "SELECT epoch FROM change_feed"


def lose(other: Other, event_id: str) -> None:
    """Take away the newest run, as an asynchronous standby that takes over lacks it."""
    with other.transaction():
        other.execute(
            "DELETE FROM run_changes WHERE run = (SELECT id FROM agent_runs WHERE event_id = %s)", (event_id,)
        )
        other.execute("DELETE FROM agent_runs WHERE event_id = %s", (event_id,))


async def test_the_session_itself_notices_that_commits_are_gone(postgres_database: str, other: Other) -> None:
    """It may be connected again before the writer is, and must not take what is left for all there ever was."""
    async with opened(settings_of(postgres_database)) as store:
        await store.submit(CreateRuns((new("kept"), new("lost"))))
        epoch, last = one(other, EPOCH), one(other, "SELECT max(seq) FROM run_changes")
        await eventually(lambda: store._reading._database.session.seen.newest >= last)  # type: ignore[attr-defined]
        lose(other, "lost")
        await eventually(lambda: one(other, EPOCH) != epoch)
        assert await stored_in_the_end(store, CreateRuns((new("lost"),))) == Created((True,))
        assert one(other, "SELECT max(seq) FROM run_changes") > last


async def test_what_a_subscriber_was_told_counts_as_seen(postgres_database: str, other: Other) -> None:
    """The session looks only now and then; what is lost in a failover is what was committed last."""
    async with opened(settings_of(postgres_database, db_poll_ms=60_000)) as store:
        await store.submit(CreateRuns((new("kept"), new("lost"))))
        epoch = one(other, EPOCH)
        told = await store.fetch_news(ListChanges())
        lose(other, "lost")
        end_our_sessions(other)
        assert await stored_in_the_end(store, CreateRuns((new("again"),))) == Created((True,))
        assert one(other, EPOCH) != epoch
        assert one(other, "SELECT max(seq) FROM run_changes") > told.newest


@contextlib.contextmanager
def frozen(other: Other, role: str) -> Iterator[None]:
    """Stop the server's processes for sessions of a role: their connections stay, and nothing comes of them."""
    found = other.execute("SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s", (f"telemetryd/%/{role}",))
    processes = [process for (process,) in found]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


async def test_a_session_that_gets_no_answer_leads_no_more_and_connects_again(
    postgres_database: str, other: Other
) -> None:
    async with opened(settings_of(postgres_database, db_commit_timeout_s=1.0)) as store:
        assert store.leads(Chore.COUNTS)
        news = asyncio.Event()
        store.on_commit(news.set)
        with frozen(other, "session"):
            await eventually(lambda: store.health().problem is not None)
            assert not store.leads(Chore.COUNTS)
            await eventually(lambda: store.health().problem is None)
            news.clear()
            async with opened(settings_of(postgres_database)) as neighbour:
                await neighbour.submit(CreateRuns((new("one"),)))
                async with asyncio.timeout(PATIENCE_S):
                    await news.wait()
        await eventually(lambda: store.leads(Chore.COUNTS))


async def test_a_daemon_that_connects_again_and_gets_no_answer_can_be_stopped(
    postgres_database: str, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(settings_of(postgres_database)) as store:
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def look(plain: Plain, target: Target) -> dict[str, Any]:
            loop.call_soon_threadsafe(asked.set)
            plain.execute("SELECT pg_sleep(600)")
            return {}

        monkeypatch.setattr(opening, "look", look)
        end_our_sessions(other)
        async with asyncio.timeout(PATIENCE_S):
            await asked.wait()
            await store.close()


@pytest.fixture
def limited(cluster: Cluster, postgres_database: str, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The settings of a user with just the rights that it needs."""
    name = postgres_database.partition("?")[0].rpartition("/")[2]
    cluster.execute("CREATE ROLE just_enough LOGIN PASSWORD 'secret'")
    cluster.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO just_enough", name)
    cluster.execute("GRANT USAGE, UPDATE ON ALL SEQUENCES IN SCHEMA public TO just_enough", name)
    (tmp_path / "password").write_text("secret")
    yield {"url": cluster.url(name, "just_enough"), "db_password_file": tmp_path / "password"}
    cluster.execute("DROP OWNED BY just_enough", name)
    cluster.execute("DROP ROLE just_enough")


async def test_whatever_the_server_refuses_when_it_is_connected_to_again_is_tried_again(
    limited: dict[str, Any], other: Other
) -> None:
    async with opened(settings_of(**limited)) as store:
        other.execute("REVOKE SELECT ON schema_migrations FROM just_enough")
        end_our_sessions(other)
        await eventually(lambda: "permission denied for table schema_migrations" in (store.health().problem or ""))
        assert not store.writing.done()
        other.execute("GRANT SELECT ON schema_migrations TO just_enough")
        assert await stored_in_the_end(store, CreateRuns((new("one"),))) == Created((True,))


async def test_closing_ends_what_waits_to_change_the_index_of_words(postgres_database: str, other: Other) -> None:
    settings = settings_of(postgres_database)
    async with contextlib.AsyncExitStack() as closing:
        store = await Store.open(settings, Metrics(), full_text=True)
        closing.push_async_callback(store.close)
        await eventually(
            lambda: (
                one(
                    other,
                    f"SELECT count(*) FROM pg_index WHERE indisvalid AND indexrelid = to_regclass('{INDEX}')",
                )
                == 1
            )
        )
    other.execute("SELECT pg_advisory_lock(%s, 5)", (CLASS,))
    store = await Store.open(settings, Metrics(), full_text=False)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'telemetryd/%/words'"
    await eventually(lambda: one(other, waiting) == 1)
    await store.close()
    await eventually(lambda: one(other, waiting) == 0, timeout_s=5)


def has_words(other: Other) -> bool:
    made = f"SELECT count(*) FROM pg_index WHERE indisvalid AND indexrelid = to_regclass('{INDEX}')"
    return bool(one(other, made) == 1)


async def test_a_daemon_that_wants_no_index_of_words_leaves_it_to_one_that_does(
    postgres_database: str, other: Other
) -> None:
    settings = settings_of(postgres_database)
    wanting = await Store.open(settings, Metrics(), full_text=True)
    await eventually(lambda: has_words(other))
    again = await Store.open(settings, Metrics(), full_text=True)
    await wanting.close()
    working = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'telemetryd/%/words'"
    store = await Store.open(settings, Metrics(), full_text=False)
    await eventually(lambda: one(other, working) == 1)  # that which is not wanted has looked
    assert has_words(other)
    await store.close()
    await again.close()
    await eventually(lambda: one(other, working) == 0)
    store = await Store.open(settings, Metrics(), full_text=False)
    await eventually(lambda: not has_words(other))
    await store.close()


async def test_an_index_of_words_that_could_not_be_made_is_tried_again(
    postgres_database: str, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telemetryd.engine.postgres.words._AGAIN_S", 0.1)
    other.execute("ALTER FUNCTION telemetryd_words RENAME TO hidden")
    async with opened(settings_of(postgres_database)):
        pass
    store = await Store.open(settings_of(postgres_database), Metrics(), full_text=True)
    assert not has_words(other)
    other.execute("ALTER FUNCTION hidden RENAME TO telemetryd_words")
    await eventually(lambda: has_words(other))
    other.execute(f"DROP INDEX {INDEX}".encode())
    await eventually(lambda: has_words(other))
    await store.close()


async def test_waiting_for_the_index_of_words_costs_next_to_no_commits(postgres_database: str, other: Other) -> None:
    """Each would be waited for by all who write, and wake all who follow; and the server may need hours."""
    settings = settings_of(postgres_database, full_text=True)
    async with opened(settings) as store:
        other.execute(f"CREATE INDEX {INDEX} ON agent_runs (id)".encode())
        other.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = to_regclass(%s)", (INDEX,))
        before = store.health().groups
        upkeep = Upkeep(store, settings)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.5):
                await upkeep.index_texts()
        assert str(upkeep.full_text) == FullText.BUILDING
        assert store.health().groups - before <= 3
        other.execute("UPDATE pg_index SET indisvalid = true WHERE indexrelid = to_regclass(%s)", (INDEX,))
        async with asyncio.timeout(PATIENCE_S):
            await upkeep.index_texts()
        assert str(upkeep.full_text) == FullText.READY


def test_what_statements_rely_on_no_role_and_no_address_sets_otherwise(postgres_database: str, other: Other) -> None:
    hostile = {
        "default_transaction_isolation": "serializable",
        "datestyle": "German",
        "array_nulls": "off",
        "standard_conforming_strings": "off",
        "timezone": "Asia/Tokyo",
    }
    options = "%20".join(f"-c%20{name}%3D{value}" for name, value in hostile.items())
    target = Target.of(settings_of(f"{postgres_database}&options={options}"))
    with contextlib.closing(connect_plainly(target, "test", writing_session(target))) as plain:
        found = [one(plain, f"SHOW {name}") for name in hostile]
    assert found == ["read committed", "ISO, DMY", "on", "on", "UTC"]


async def test_only_who_leads_forgets_alerts_that_its_rules_do_not_have(postgres_database: str, other: Other) -> None:
    """While the rules are changed on one machine after the other, those of the leader count."""
    other.execute("INSERT INTO alert_deliveries (webhook, id, created_at, body) VALUES ('old', 'id', '', '')")
    rules = Rules((Stale("new", (), ("*",), 3600.0),))
    waiting = "SELECT count(*) FROM alert_deliveries"
    async with contextlib.AsyncExitStack() as stores:
        first = await Store.open(settings_of(postgres_database), Metrics())
        leading = contextlib.AsyncExitStack()
        leading.push_async_callback(first.close)
        await stores.enter_async_context(leading)
        second = await stores.enter_async_context(opened(settings_of(postgres_database)))
        await eventually(lambda: first.leads(Chore.ALERTS))
        assert not second.leads(Chore.ALERTS)
        alerting = asyncio.create_task(Alerting(second, rules).run())
        await asyncio.sleep(0.5)
        assert one(other, waiting) == 1
        await leading.aclose()
        await eventually(lambda: one(other, waiting) == 0)
        alerting.cancel()
        await asyncio.wait((alerting,))


async def test_a_session_that_has_failed_for_good_lets_another_daemon_lead(
    postgres_database: str, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(settings_of(postgres_database)) as store:
        assert store.leads(Chore.COUNTS)

        def waiting(_: Plain) -> int:
            raise ValueError("a fault of ours")

        monkeypatch.setattr(deltas, "waiting", waiting)
        await eventually(lambda: not store.leads(Chore.COUNTS))
        assert one(other, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 3") == 0
