"""What tests do with a database while a daemon serves it, on either engine, and the settings of a new one."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.postgres_cluster import Cluster


def execute(path: Path, url: str | None, statement: str) -> Sequence[tuple[Any, ...]]:
    """Run SQL on a database: the one at a URL, or else a file; return the rows, and commit what is changed."""
    if url is not None:
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return [] if cursor.description is None else cursor.fetchall()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        return file.execute(statement).fetchall()


def patience(engine: str) -> dict[str, Any]:
    """The settings with which a daemon waits long for the lock of another program."""
    return {"db_busy_timeout_ms": 60_000} if engine == "sqlite" else {}


@contextlib.contextmanager
def engine_settings(request: pytest.FixtureRequest, engine: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Give the settings of a new database on an engine; on PostgreSQL it is dropped at the end."""
    if engine == "sqlite":
        path = folder / "telemetry.sqlite"
        yield {"db_path": path, "db_journal_mode": "WAL"}
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    name = cluster.make(request.getfixturevalue("new_postgres_database"))
    yield {"db_url": cluster.url(name), "db_sync": "none", "tokens_file": folder / "telemetry.sqlite.tokens"}
    cluster.drop(name)
