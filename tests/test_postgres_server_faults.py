"""A server that is too old, or whose disk is full: a sentence says so, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from telemetryd.errors import DatabaseError, StorageFullError, UnavailableError
from telemetryd.model.commands import Created, CreateRuns
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings, Sync
from telemetryd.store import Store
from tests import postgres_cluster
from tests.conftest import PATIENCE_S
from tests.needs import require_program
from tests.postgres_cluster import Cluster
from tests.test_changes import new
from tests.test_postgres_faults import opened

pytestmark = pytest.mark.postgresql


def settings_of(url: str, **values: Any) -> Settings:
    return Settings(**{"db_url": SecretStr(url), "db_sync": Sync.NONE, "db_readers": 2, **values})


# --- A server that is too old --------------------------------------------------------------------


@contextlib.contextmanager
def ageing(target: Path, version: str) -> Iterator[int]:
    """Run a TCP way to a server's socket on which it says that it is the 14th version; give the port."""
    older = {version.encode(): b"14" + version.encode()[2:], b"15.": b"14."}
    listening = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(target))
                threading.Thread(target=pass_on, args=(client, server, {}), daemon=True).start()
                threading.Thread(target=pass_on, args=(server, client, older), daemon=True).start()

    def pass_on(source: socket.socket, sink: socket.socket, replaced: dict[bytes, bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                for old, text in replaced.items():
                    data = data.replace(old, text)  # of the same length
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=accept, daemon=True).start()
    with listening:
        yield listening.getsockname()[1]


async def test_a_server_that_is_too_old_is_refused(cluster: Cluster, postgres_database: str) -> None:
    ((version,),) = cluster.execute("SELECT current_setting('server_version_num')")
    name = postgres_database.partition("?")[0].rpartition("/")[2]
    with ageing(cluster.folder / ".s.PGSQL.5432", str(version)) as port, pytest.raises(DatabaseError) as caught:
        await Store.open(settings_of(f"postgresql://postgres@127.0.0.1:{port}/{name}"), Metrics())
    assert f"/{name} is PostgreSQL 14." in str(caught.value)
    assert str(caught.value).endswith("; telemetryd needs 15 or newer")


# --- A full disk ---------------------------------------------------------------------------------


@pytest.fixture
def filling(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, Path]]:
    """A server, and a file: while that names a part of paths, files there do not grow."""
    require_program("gcc", "gcc")
    with tempfile.TemporaryDirectory(prefix="telemetryd-full-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the server runs as another user
        library, full = folder / "full_disk.so", folder / "full"
        source = Path(__file__).parent / "faults" / "full_disk.c"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("FULL_DISK", str(full))
        with postgres_cluster.running(synchronous_commit="on") as cluster:
            yield cluster, full


@pytest.mark.parametrize(("part", "error"), [("/base/", StorageFullError), ("/pg_wal/", UnavailableError)])
async def test_a_full_disk_of_the_server_loses_nothing_that_was_acknowledged(
    filling: tuple[Cluster, Path], part: str, error: type[UnavailableError]
) -> None:
    cluster, full = filling
    acknowledged, refused = [], []
    name = cluster.make()
    async with opened(settings_of(cluster.url(name))) as store:
        assert await store.submit(CreateRuns((new("first"),))) == Created((True,))
        full.write_text(part)
        for number in range(60):
            run = new(str(number), output_summary=secrets.token_hex(400_000))
            try:
                await store.submit(CreateRuns((run,)))
            except UnavailableError as caught:
                refused.append((run, caught))
                if isinstance(caught, error):
                    break
            else:
                acknowledged.append(run)
        assert isinstance(refused[-1][1], error)
        if error is StorageFullError:
            assert "The disk of the PostgreSQL server is full" in str(refused[-1][1])
        full.unlink()
        async with asyncio.timeout(PATIENCE_S):
            for run in (*acknowledged, *(run for run, _ in refused)):
                while True:
                    try:
                        outcome = await store.submit(CreateRuns((run,)))
                    except UnavailableError:
                        await asyncio.sleep(0.1)
                    else:
                        assert run in [each for each, _ in refused] or outcome == Created((False,))
                        break
    stored = 1 + len(acknowledged) + len(refused)
    assert cluster.execute("SELECT count(*), count(DISTINCT event_id) FROM agent_runs", name) == [(stored, stored)]
