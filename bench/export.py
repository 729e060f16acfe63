"""Measures exports of a million runs: time, the daemon's memory, the log's size, and what a poster feels meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import aiohttp

from bench.seeding import _FILL, STEP_S
from telemetryd.engine.sqlite.connection import connect
from telemetryd.engine.sqlite.files import wal_bytes
from telemetryd.engine.sqlite.tools import migrate

_PORT: Final = 28471
_HEAD: Final = "| form | snapshot | copied, s | whole, s | MiB | RSS MiB | WAL MiB | POST ms, median | 99 % | most |"
_URL: Final = f"http://127.0.0.1:{_PORT}"


def _seed(path: Path, rows: int) -> None:
    with closing(connect(path, "rwc")) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        migrate.create(connection, "2026-01-01T00:00:00.000000Z")
        connection.execute(_FILL, {"rows": rows, "step": STEP_S, "now": int(time.time())})


def _rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def _post(session: aiohttp.ClientSession, times: list[float], name: str) -> None:
    number = 0
    while True:
        number += 1
        run = {
            "event_id": f"{name}-{time.time_ns()}-{number}", "run_id": "r", "agent_name": "poster", "job_type": "j",
            "start_time": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        began = time.perf_counter()
        async with session.post(f"{_URL}/api/v1/runs", json=run) as response:
            await response.read()
        times.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.005)


async def _measure(path: Path, pid: int, form: str) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        times: list[float] = []
        poster = asyncio.create_task(_post(session, times, form or "none"))
        peak = log = first = 0.0
        size = 0
        before = _rss_mib(pid)
        began = time.perf_counter()
        if form:
            async with session.get(f"{_URL}/api/v1/runs/export?format={form}") as response:
                first = time.perf_counter() - began
                snapshot = response.headers["Telemetry-Snapshot"]
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    peak, log = max(peak, _rss_mib(pid)), max(log, wal_bytes(path) / 2**20)
        else:
            snapshot = "none"
            await asyncio.sleep(10)
        seconds = time.perf_counter() - began
        poster.cancel()
        after = _rss_mib(pid)
    times.sort()
    print(  # noqa: T201
        f"| {form or 'no export'} | {snapshot} | {first:.1f} | {seconds:.1f} | {size / 2**20:.0f} | {before:.0f} → "
        f"{max(peak, after):.0f} → {after:.0f} | {log:.0f} | {statistics.median(times):.1f} | "
        f"{times[int(len(times) * 0.99)]:.1f} | {times[-1]:.0f} |",
        flush=True,
    )


async def _until_it_serves() -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with session.get(f"{_URL}/health"):
                    return
            await asyncio.sleep(0.1)


async def _main(rows: int, mode: str, folder: Path, forms: list[str]) -> None:
    path = folder / "telemetry.sqlite"
    _seed(path, rows)
    flags = ["--db-path", str(path), "--port", str(_PORT), "--db-journal-mode", mode, "--log-level", "WARNING"]
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-m", "telemetryd", "serve", *flags)
    try:
        await _until_it_serves()
        print(_HEAD, flush=True)  # noqa: T201
        for form in ["", *forms]:
            await _measure(path, daemon.pid, form)
    finally:
        daemon.terminate()
        await daemon.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--journal-mode", default="WAL")
    parser.add_argument("--folder", type=Path, help="where the database is made [a temporary folder]")
    parser.add_argument("forms", nargs="*", default=["ndjson", "csv", "parquet", "parquet"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        asyncio.run(_main(given.rows, given.journal_mode, Path(made), given.forms))
