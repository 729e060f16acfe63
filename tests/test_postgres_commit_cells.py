"""The cells of commits on PostgreSQL: what two writers add is what the runs add up to."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telemetryd.engine.postgres import schema
from telemetryd.engine.postgres.connection import Plain, connect_plainly
from telemetryd.engine.postgres.groups import transact
from telemetryd.engine.postgres.statements import deltas
from telemetryd.engine.postgres.statements.commit_cells import READ, fetch_cells
from telemetryd.errors import DatabaseError
from telemetryd.model.commands import CreateRuns
from tests.conftest import make_run
from tests.postgres_cluster import Cluster
from tests.test_commit_cells import ALL, GROUPS, MOMENTS, SELECT, brute_force, copied, row
from tests.test_postgres_schema import target_of
from tests.test_postgres_writers import Writer, reader

pytestmark = pytest.mark.postgresql

FIRST = schema.steps()[:1]


def assert_right(plain: Plain) -> None:
    assert sorted(fetch_cells(plain, *ALL)) == brute_force(plain.execute(SELECT))
    assert transact(plain, deltas.count_wrong) == 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GROUPS, st.booleans())
def test_cells_are_those_of_the_runs_after_any_commands(
    cluster: Cluster, new_postgres_database: str, groups: list[Any], is_at_once: bool
) -> None:
    name = cluster.make(new_postgres_database)
    writers = [Writer(cluster.url(name)) for _ in range(2)]
    number = 1_000
    with contextlib.closing(reader(cluster.url(name))) as plain, ThreadPoolExecutor(2) as pool:
        for group in groups:
            if isinstance(group, list) and is_at_once:
                for done in [pool.submit(writer.write, *group) for writer in writers]:
                    done.result(60)
            elif isinstance(group, list):
                writers[0].write(*group)
            elif isinstance(group, tuple):
                writers[1].write(copied(group[0], group[1], number))
                number += 1_000
            else:
                transact(writers[1].plain, deltas.fold if group == "add up" else deltas.rebuild)
        assert_right(plain)
        transact(writers[0].plain, deltas.fold)
        assert_right(plain)
        folded = plain.execute("SELECT * FROM run_commits ORDER BY 1, 2, 3, 4").fetchall()
        transact(writers[0].plain, deltas.rebuild)
        assert plain.execute("SELECT * FROM run_commits ORDER BY 1, 2, 3, 4").fetchall() == folded
    for writer in writers:
        writer.plain.close()
    cluster.drop(name)


def test_the_log_comes_first_however_cheap_parallel_workers_are(postgres_database: str) -> None:
    with contextlib.closing(reader(postgres_database)) as plain:
        for setting in ("parallel_setup_cost", "parallel_tuple_cost", "min_parallel_table_scan_size"):
            plain.execute(f"SET {setting} = 0".encode())
        top, *_ = plain.execute(f"EXPLAIN {READ}".encode(), ALL).fetchall()
    assert top[0].startswith("Append"), top


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE run_commits SET bins = bins + 1",
        "UPDATE run_commits SET git_commit_hash = 'fff0000' WHERE git_commit_hash = 'abc1234'",
        "DELETE FROM run_commits",
        "INSERT INTO run_commits VALUES (7, 'a', 'j', 'abc1234', 1, 1, 0, 0, 5)",
    ],
)
def test_check_finds_and_corrects_a_wrong_cell(postgres_database: str, harm: str) -> None:
    writer = Writer(postgres_database)
    runs = [make_run(created_at=moment, status="success", git_commit_hash="abc1234") for moment in MOMENTS]
    writer.write(CreateRuns(tuple(map(row, runs))))
    transact(writer.plain, deltas.fold)
    with psycopg.connect(postgres_database, autocommit=True) as other:
        other.execute(harm)
    assert transact(writer.plain, deltas.count_wrong) > 0
    transact(writer.plain, deltas.rebuild)
    assert_right(writer.plain)
    writer.plain.close()


def test_the_version_before_is_counted_anew_and_its_daemons_are_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what waits in its log, which knows no commits; and a daemon of before adds nothing to it any more."""
    name = cluster.make()
    target = target_of(cluster.url(name))
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        with monkeypatch.context() as before:
            before.setattr(schema, "steps", lambda: FIRST)
            schema.make(plain, target, MOMENTS[0], count_anew=None)
        old = 'INSERT INTO run_deltas (changes, stats) VALUES (1, \'["2026-01-03T12","a","j","success",[1,0],[]]\')'
        plain.execute(old.encode())
        for number, moment in zip(count(1), MOMENTS):
            plain.execute(
                "INSERT INTO agent_runs (id, event_id, run_id, created_at, updated_at, start_time, agent_name, "
                "job_type, status, git_commit_hash) VALUES (%s, %s, 'r', %s, '', '', 'a', 'j', 'failure', 'abc1234')",
                (number, str(number), moment),
            )
        schema.make(plain, target, MOMENTS[0], count_anew=deltas.rebuild)
        assert_right(plain)
        assert plain.execute("SELECT sum(runs) FROM run_commits").fetchall() == [(len(MOMENTS),)]
        assert schema.version_of(plain, target) == schema.current_version()
        with pytest.raises(psycopg.errors.UndefinedColumn):
            plain.execute(old.encode())
        with monkeypatch.context() as before:
            before.setattr(schema, "steps", lambda: FIRST)
            with pytest.raises(DatabaseError, match="this telemetryd knows only 1"):
                schema.check(plain, target)
    cluster.drop(name)


def test_a_migration_that_is_cut_off_leaves_the_version_before(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_ATTEMPTS", 1)
    name = cluster.make()
    target = target_of(cluster.url(name))

    def die(plain: Plain) -> None:
        plain.execute("INSERT INTO run_commits VALUES (7, 'a', 'j', 'abc1234', 1, 1, 0, 0, 5)")
        plain.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with contextlib.closing(connect_plainly(target, "test", {})) as plain, monkeypatch.context() as before:
        before.setattr(schema, "steps", lambda: FIRST)
        schema.make(plain, target, MOMENTS[0], count_anew=None)
    with contextlib.closing(connect_plainly(target, "test", {})) as plain, pytest.raises(DatabaseError):
        schema.make(plain, target, MOMENTS[0], count_anew=die)
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        assert schema.version_of(plain, target) == 1
        schema.make(plain, target, MOMENTS[0], count_anew=deltas.rebuild)
        schema.check(plain, target)
    cluster.drop(name)
