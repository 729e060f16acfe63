"""Measures the client: runs per second end to end, what a call costs the agent, memory while the daemon is down.

The first is a scenario of `make bench`, the others are `make bench-client`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from bench.acknowledged import last_id
from bench.errors import BenchError
from bench.workplace import ROOT, TELEMETRYD_WAL, Server, workplace
from telemetryd.client import Client

TARGET_CALL_US: Final = 20.0
_RUN: Final[dict[str, Any]] = {
    "agent_name": "hugo-translator",
    "job_type": "translate_directory",
    "start_time": "2025-12-24T10:00:00Z",
    "end_time": "2025-12-24T10:05:00Z",
    "status": "success",
    "items_discovered": 100,
    "items_succeeded": 98,
    "duration_ms": 300_000,
    "metrics_json": {"tokens": 12345, "cost": 0.25},
}


def runs_per_second(server: Server, buffer: Path, count: int) -> float:
    """Return runs per second from the first call to the last acknowledgement, each stored."""
    client = Client(server.url, buffer_dir=buffer)
    started = time.perf_counter()
    for _ in range(count):
        client.record(_RUN)
    if not client.flush(300):
        raise BenchError(f"Not everything was acknowledged: {client.stats()}")
    seconds = time.perf_counter() - started
    client.close()
    if (stored := last_id(server.database)) != count:
        raise BenchError(f"{count} sent, {stored} stored")
    return count / seconds


def _times(call: Callable[[], object], count: int) -> tuple[float, float]:
    """Return the median and the 99th percentile of how long a call takes, in µs."""
    clock = time.perf_counter
    times = []
    for _ in range(count):
        began = clock()
        call()
        times.append(clock() - began)
    cuts = statistics.quantiles(times, n=100)
    return statistics.median(times) * 1e6, cuts[98] * 1e6


def _calls(url: str, folder: Path, *, send: bool) -> list[str]:
    client = Client(url, buffer_dir=folder / f"calls-{send}", send=send)
    run = client.run("bench", "calls").start()
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "record(dict)": (lambda: client.record(_RUN), 30_000),
        "run.event(…)": (lambda: run.event("step", number=1), 10_000),
        "run.metrics(…)": (lambda: run.metrics(tokens=5), 10_000),
        "run().start()": (lambda: client.run("bench", "calls").start(), 3000),
    }
    lines = []
    for name, (call, count) in calls.items():
        median, p99 = _times(call, count)
        verdict = "" if median < TARGET_CALL_US else "  MISSED"
        lines.append(f"  {name:<16} median {median:6.1f} µs   p99 {p99:8.1f} µs{verdict}")
        if send:
            client.flush(120)
    client.close(60)
    return lines


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory(folder: Path, seconds: float) -> str:
    client = Client("http://127.0.0.1:9", buffer_dir=folder / "down", max_bytes=256 << 20, flush_timeout_s=0)
    for _ in range(20_000):
        client.record(_RUN)
    before = _resident()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.record(_RUN)
    grown = _resident() - before
    recorded = client.stats()["recorded"]
    client.close(0)
    return f"  {recorded:,} runs in {seconds:g} s with the daemon down: {grown / 1024:+.0f} KiB"


@click.command()
@click.option("--memory-seconds", default=60.0, show_default=True, help="How long the daemon is down.")
def main(memory_seconds: float) -> None:
    r"""Measure the client on this machine, with the daemon next to it.

    \b
    Examples:
      python -m bench.agent
      python -m bench.agent --memory-seconds 3600
    """
    with workplace(ROOT / "build" / "bench") as place, place.corner() as folder:
        with place.serving(TELEMETRYD_WAL, folder / "telemetry.sqlite") as server:
            click.echo(f"What a call costs the agent (target: median under {TARGET_CALL_US:g} µs)")
            click.echo("\n".join(_calls(server.url, folder, send=False)))
            click.echo(" while the background thread sends")
            click.echo("\n".join(_calls(server.url, folder, send=True)))
        click.echo("Memory while the daemon is down (target: flat)")
        click.echo(_memory(folder, memory_seconds))


if __name__ == "__main__":
    main()
