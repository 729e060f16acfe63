"""The schema on PostgreSQL: made once, with the fields of the model, and refused if it is another program's."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr

from telemetryd.engine.postgres import schema
from telemetryd.engine.postgres.connection import Plain, Target, connect_plainly
from telemetryd.engine.postgres.statements import deltas
from telemetryd.errors import DatabaseError
from telemetryd.model import events, runs
from telemetryd.model.values import Role
from telemetryd.settings import Settings, Sync
from tests.postgres_cluster import Cluster

pytestmark = pytest.mark.postgresql


def target_of(url: str, **values: str) -> Target:
    return Target.of(Settings(db_url=SecretStr(url), db_sync=Sync.NONE, **values))


def make(target: Target) -> None:
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        schema.make(plain, target, "2025-12-24T10:00:00Z", count_anew=None)


def columns(plain: Plain, table: str) -> list[tuple[str, str]]:
    return [
        (str(name), str(kind))
        for name, kind in plain.execute(
            "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = %s "
            "ORDER BY ordinal_position",
            (table,),
        )
    ]


def test_the_tables_have_the_fields_of_the_model(postgres_database: str) -> None:
    with contextlib.closing(connect_plainly(target_of(postgres_database), "test", {})) as plain:
        kinds = dict(columns(plain, "agent_runs"))
        assert tuple(kinds) == runs.TABLE
        objects = {*runs.columns(Role.JSON)}
        assert {name for name, kind in kinds.items() if kind == "json"} == objects
        assert {name for name, kind in kinds.items() if kind == "text"} == {*runs.TEXTS} - {*runs.columns(Role.JSON)}
        assert [name for name, _ in columns(plain, "run_events") if name != "run"] == [*events.COLUMNS]


def test_of_many_that_start_at_once_one_makes_the_tables(cluster: Cluster) -> None:
    name = cluster.make()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, [target_of(cluster.url(name))] * 8))
    assert cluster.execute("SELECT count(*) FROM schema_migrations", name) == [(len(schema.steps()),)]
    cluster.drop(name)


def test_the_tables_can_be_in_a_schema_of_their_own(cluster: Cluster) -> None:
    name = cluster.make()
    target = target_of(cluster.url(name), db_schema="telemetry")
    make(target)
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        schema.check(plain, target)
    assert cluster.execute("SELECT count(*) FROM telemetry.agent_runs", name) == [(0,)]
    cluster.drop(name)


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("CREATE TABLE agent_runs (id int)", "holds another program's table agent_runs in the schema public"),
        ("CREATE TABLE schema_migrations (version text)", "holds another program's table schema_migrations"),
    ],
)
def test_another_programs_tables_are_left_alone(cluster: Cluster, statement: str, sentence: str) -> None:
    name = cluster.make()
    cluster.execute(statement, name)
    with pytest.raises(DatabaseError, match=sentence):
        make(target_of(cluster.url(name)))
    assert len(cluster.execute("SELECT 1 FROM pg_tables WHERE schemaname = 'public'", name)) == 1
    cluster.drop(name)


def test_a_newer_schema_is_refused_unless_it_says_that_it_may_be_used(postgres_database: str) -> None:
    target = target_of(postgres_database)
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        plain.execute("INSERT INTO schema_migrations VALUES (99, 'new', '', 1)")
        schema.check(plain, target)
        plain.execute("UPDATE schema_migrations SET compatible_from = 99 WHERE version = 99")
        with pytest.raises(DatabaseError, match="has schema version 99, this telemetryd knows only"):
            schema.check(plain, target)


def test_an_older_schema_is_refused_and_names_the_command(
    postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(postgres_database)
    newer = schema.Step(99, "more", "CREATE TABLE more (id bigint)")
    steps = (*schema.steps(), newer)
    monkeypatch.setattr(schema, "steps", lambda: steps)
    make(target)  # as a start does
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        with pytest.raises(DatabaseError, match="needs 99; nothing was changed: run telemetryd migrate"):
            schema.check(plain, target)
        schema.make(plain, target, "2025-12-24T10:00:00Z", count_anew=deltas.rebuild)
        schema.check(plain, target)
