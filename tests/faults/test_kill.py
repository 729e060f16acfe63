"""SIGKILL at a random moment under mixed load: whatever was acknowledged is there, once, as acknowledged."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import Daemon, StartDaemon, eventually
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.faults.load import Contents, Findings, Load, read

_ROUNDS_PER_DATABASE = 20


def look(path: Path) -> Contents:
    """Read a database that a daemon has opened."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        connection.execute("PRAGMA query_only = ON")
        return read(connection)


async def kill(daemon: Daemon, load: Load, chance: random.Random) -> None:
    """End the daemon some time after some more answers; sometimes while it stops, with its checkpoint."""
    enough = load.acknowledged + chance.randrange(1, 80)
    await eventually(lambda: load.acknowledged >= enough, timeout_s=120)
    await asyncio.sleep(chance.random() * 0.05)
    if chance.random() < 0.2:
        daemon.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(chance.random() * 0.15)
    daemon.process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
async def test_kill_under_load(
    start_daemon: StartDaemon, tmp_path: Path, rounds: Rounds, ledger: Ledger, mode: str
) -> None:
    total, acknowledged = Findings(), 0
    full = rounds(1000, least=4)
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for first in range(0, full, _ROUNDS_PER_DATABASE):
        folder = tmp_path / str(first)
        folder.mkdir()
        load = Load(seed + first)
        for number in range(first, min(first + _ROUNDS_PER_DATABASE, full)):
            if chance.random() < 0.15:  # while it starts, and recovers
                interrupted = start_daemon(folder=folder, TELEMETRY_DB_JOURNAL_MODE=mode)
                await asyncio.sleep(chance.random() * 0.6)
                interrupted.close()
            daemon = start_daemon(folder=folder, TELEMETRY_DB_JOURNAL_MODE=mode)
            url = daemon.url
            if number > first:
                total.add(load.check(look(daemon.database)), f"round {number}, seed {seed}")
            await asyncio.gather(load.run(url), kill(daemon, load, chance))
            daemon.wait()
        last = start_daemon(folder=folder, TELEMETRY_DB_JOURNAL_MODE=mode)
        assert last.url
        total.add(load.check(look(last.database)), f"round {first}, seed {seed}, the last")
        assert last.stop() == 0
        acknowledged += sum(client.stored for client in load.clients)
    assert acknowledged > full * 20
    ledger.record(
        fault="SIGKILL under mixed load",
        mode=mode,
        rounds=full,
        acknowledged=acknowledged,
        **total.figures(),
    )
