"""A PostgreSQL server of the tests' own: on a Unix socket, run by an ordinary user, with a database for each test."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

PACKAGE: Final = "postgresql-15"
_SETTINGS: Final = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "300",
    "shared_buffers": "64MB",
    "autovacuum": "off",
    "jit": "off",
    "log_min_messages": "fatal",
}
"""Nothing of it outlives the tests, so nothing needs to be synced."""
_ACCESS: Final = """
local all postgres trust
local all all scram-sha-256
"""
_numbers = itertools.count()


def binaries() -> Path | None:
    """Return where the server's programs are, or None if none is installed."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent  # where the others are as well
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


def as_ordinary_user() -> list[str]:
    """Return what stands before a server's command: root may not run it."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]


class Cluster:
    """A running server.

    Args:
        folder: where its files and its socket are.
        control: the command that starts and stops it.

    """

    def __init__(self, folder: Path, control: list[str]) -> None:
        self.folder = folder
        self._control = control

    def start(self) -> None:
        """Start the server."""
        _run([*self._control, "start"])

    def stop(self) -> None:
        """Stop the server as a crash does."""
        _run([*self._control, "-m", "immediate", "stop"])

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        """Return the address of a database."""
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run a statement, and return its rows."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return [] if cursor.description is None else cursor.fetchall()

    def make(self, template: str = "template1") -> str:
        """Make a database as another one is; return its name."""
        name = f"test_{os.getpid()}_{next(_numbers)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
            )
        return name

    def drop(self, name: str) -> None:
        """Drop a database, even if somebody is connected to it."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def running(**settings: str) -> Iterator[Cluster]:
    """Make a server, start it, and remove it when the block ends; settings join the usual ones."""
    programs = binaries()
    assert programs is not None, f"apt-get install {PACKAGE}"
    folder = Path(tempfile.mkdtemp(prefix="telemetryd-pg-"))  # short: a socket's path has 107 bytes at most
    data = folder / "data"
    prefix = as_ordinary_user()
    try:
        if prefix:
            shutil.chown(folder, "postgres", "postgres")
        folder.chmod(0o755)
        options = {**_SETTINGS, "unix_socket_directories": str(folder), **settings}
        initdb = [programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "-N"]
        _run([*prefix, *map(str, initdb), "--locale=C.UTF-8"])
        (data / "pg_hba.conf").write_text(_ACCESS)
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in options.items())
        control = [*prefix, str(programs / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-w"]
        cluster = Cluster(folder, control)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")
