"""Runs every operator's command against a live daemon while 32 clients post, and shows what ingest felt.

Usage: python -m tests.tools.operate_under_load FOLDER [JOURNAL_MODE]
FOLDER holds telemetry.sqlite, made by `python -m tests.tools.fill FOLDER/telemetry.sqlite 1000000`. What may not be
done to a database in use (migrate, restore, check --repair) is done to others beside it, of as many runs.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import aiohttp
import click

from telemetryd.engine.sqlite.connection import connect
from tests.conftest import Daemon, make_run
from tests.tools.old_databases import make_old_database

_CLIENTS = 32
_BASELINE_S = 10.0
_PAGE_BYTES = 4096


class Load:
    """Clients that post one run after another, and how long each answer took in the present phase."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.seconds: list[float] = []
        self.statuses: Counter[int | str] = Counter()

    async def client(self, session: aiohttp.ClientSession) -> None:
        """Post until cancelled."""
        while True:
            started = time.perf_counter()
            try:
                async with session.post(f"{self._url}/api/v1/runs", json=make_run()) as response:
                    self.statuses[response.status] += 1
            except aiohttp.ClientError as error:
                self.statuses[type(error).__name__] += 1
            self.seconds.append(time.perf_counter() - started)

    def take(self, phase: str, elapsed: float) -> str:
        """Return the phase's line of the table, and begin a new phase."""
        ordered = sorted(self.seconds) or [0.0]
        p50, p99, worst = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)], ordered[-1]
        line = (
            f"| {phase} | {elapsed:.1f} | {len(ordered) / elapsed:.0f} | {p50 * 1000:.1f} | {p99 * 1000:.1f} "
            f"| {worst * 1000:.0f} | {dict(self.statuses)} |"
        )
        self.seconds, self.statuses = [], Counter()
        return line


async def operate(folder: Path, mode: str) -> None:
    """Run the phases and print the table."""
    unix, database = folder / "d.sock", folder / "telemetry.sqlite"
    old, restored, damaged = _make_neighbours(folder)
    backups = folder / "backups"
    backups.mkdir(exist_ok=True)
    daemon = Daemon(
        folder,
        TELEMETRY_DB_JOURNAL_MODE=mode,
        TELEMETRY_API_UNIX=str(unix),
    )
    load = Load(daemon.url)
    common = ("--db-path", str(database))
    through = (*common, "--unix", str(unix))
    commands = {
        "backup": ("backup", str(backups), *common),
        "backup --zstd --keep 2": ("backup", str(backups), "--zstd", "--keep", "2", *common),
        "check": ("check", *common),
        "reap --dry-run": ("reap", "--older-than", "1h", "--dry-run", *through),
        "reap": ("reap", "--older-than", "100d", *through),
        "prune --dry-run": ("prune", "--older-than", "90d", "--dry-run", *through),
        "prune": ("prune", "--older-than", "110d", *through),
        "prune --archive": (
            "prune", "--older-than", "100d", "--archive", str(folder / f"archive-{mode}.ndjson.zst"), *through,
        ),
    }  # fmt: skip
    aside = {
        "migrate --dry-run (v5, beside)": ("migrate", "--dry-run", "--db-path", str(old)),
        "migrate (v5, beside)": ("migrate", "--db-path", str(old)),
        "restore (beside)": ("restore", "NEWEST", "--db-path", str(restored)),
        "check (damaged, beside)": ("check", "--db-path", str(damaged)),
        "check --repair (damaged, beside)": ("check", "--repair", "--db-path", str(damaged)),
        "check (repaired, beside)": ("check", "--db-path", str(damaged)),
    }
    lines = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=_CLIENTS)) as session:
        clients = [asyncio.create_task(load.client(session)) for _ in range(_CLIENTS)]
        await asyncio.sleep(2)
        load.take("warm-up", 1)
        await asyncio.sleep(_BASELINE_S)
        lines.append(load.take("nothing (baseline)", _BASELINE_S))
        for name, words in {**commands, **aside}.items():
            newest = str(max(backups.iterdir(), default=backups, key=lambda path: path.stat().st_mtime))
            arguments = [newest if word == "NEWEST" else word for word in words]
            started = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "telemetryd", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            out, err = await process.communicate()
            lines.append(load.take(name, time.monotonic() - started))
            click.echo(f"$ telemetryd {' '.join(arguments)}\n{out.decode()}{err.decode()}exit {process.returncode}")
        load.take("between", 1)
        await asyncio.sleep(_BASELINE_S)
        lines.append(load.take("nothing (again)", _BASELINE_S))
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    click.echo(f"stopped: exit {daemon.stop()}")
    daemon.close()
    click.echo(
        f"\n{mode}\n| during | s | answers/s | p50 ms | p99 ms | worst ms | answers |\n|---|---|---|---|---|---|---|"
    )
    click.echo("\n".join(lines))


def _make_neighbours(folder: Path) -> tuple[Path, Path, Path]:
    """Make an old database, the name of one to restore, and one with a damaged page in its middle."""
    source = folder / "telemetry.sqlite"
    old, damaged = folder / "old.sqlite", folder / "damaged.sqlite"
    for path in (old, damaged):
        path.unlink(missing_ok=True)
    with closing(connect(source, "ro")) as connection:
        runs = connection.execute("SELECT count(*) FROM agent_runs").fetchone()[0]
    make_old_database(old, "v5", runs)
    shutil.copyfile(source, damaged)
    with damaged.open("r+b") as file:
        file.seek(source.stat().st_size // 2 // _PAGE_BYTES * _PAGE_BYTES)
        file.write(b"\xff" * 4 * _PAGE_BYTES)
    return old, folder / "restored.sqlite", damaged


if __name__ == "__main__":
    asyncio.run(operate(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "WAL"))
