"""Which engine tests run on: the option, and databases on PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import pytest
from pydantic import SecretStr

from telemetryd.engine.postgres import schema
from telemetryd.engine.postgres.connection import Target, connect_plainly
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.settings import Settings, Sync
from tests import postgres_cluster
from tests.needs import give_up
from tests.postgres_cluster import Cluster

_BOTH_ENGINES: Final = frozenset(
    {
        "contract",
        "guide",
        "mcp",
        "test_alerts",
        "test_certificates",
        "test_changes",
        "test_events",
        "test_exports",
        "test_feed",
        "test_filters",
        "test_properties",
        "test_queries",
        "test_regressions",
        "test_runs",
        "test_stats",
        "test_tail",
        "test_tokens",
        "test_upkeep",
    }
)
"""Folders and modules whose tests run on PostgreSQL, too, unless they are marked `sqlite`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the engines that tests run on."""
    parser.addoption("--engine", default="sqlite", help="the engines, of sqlite,postgresql, that shared tests run on")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is the same on both engines on each that is asked for."""
    engines = str(metafunc.config.getoption("--engine")).split(",")
    if engines == ["sqlite"] or "engine" not in metafunc.fixturenames:
        return
    if metafunc.definition.get_closest_marker("postgresql") is not None:  # it has its databases of its own
        return
    metafunc.parametrize("engine", engines if _is_for_both(metafunc.definition) else ["sqlite"], scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of an engine that is not asked for; those of no engine run with those of SQLite, once."""
    engines = str(config.getoption("--engine")).split(",")
    kept = [item for item in items if _is_wanted(item, engines)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _is_wanted(item: pytest.Item, engines: list[str]) -> bool:
    if item.get_closest_marker("postgresql") is not None:
        return True
    callspec = getattr(item, "callspec", None)
    return ("sqlite" if callspec is None else callspec.params.get("engine", "sqlite")) in engines


def _is_for_both(test: pytest.Function) -> bool:
    if test.get_closest_marker("sqlite") is not None:
        return False
    return test.path.parent.name in _BOTH_ENGINES or test.path.stem in _BOTH_ENGINES


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server of this session's own."""
    if postgres_cluster.binaries() is None:
        give_up(f"PostgreSQL is needed, which is missing: apt-get install {postgres_cluster.PACKAGE}")
    with postgres_cluster.running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def new_postgres_database(cluster: Cluster) -> str:
    """The name of a database on PostgreSQL as a first start leaves it, for others to be copied from."""
    name = cluster.make()
    settings = Settings(db_url=SecretStr(cluster.url(name)), db_sync=Sync.NONE)
    target = Target.of(settings)
    with contextlib.closing(connect_plainly(target, "test", {})) as plain:
        schema.make(plain, target, format_timestamp(utc_now()), count_anew=None)
    return name


@pytest.fixture
def postgres_database(cluster: Cluster, new_postgres_database: str) -> Iterator[str]:
    """The address of a new database on PostgreSQL with the schema."""
    name = cluster.make(new_postgres_database)
    yield cluster.url(name)
    cluster.drop(name)


@pytest.fixture(scope="session")
def engine() -> str:
    """The engine that a test runs on: sqlite, or what `pytest_generate_tests` puts in its place."""
    return "sqlite"
